//! Choosing the next token.

use crate::error::{Error, Result};
use crate::rng::Rng;

/// How to choose a token from logits.
///
/// By default the temperature is 0.8 and no token is excluded. A temperature of 0 is greedy decoding: no randomness at
/// all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits. 0 always takes the likeliest token.
    pub temperature: f32,
    /// Restricts the choice to this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Restricts the choice to the likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Seed of the random draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.8, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// The likeliest tokens of a row of logits: the result of the op [`top_k`](crate::ops::top_k) at the temperature of the
/// sampling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidates<'a> {
    /// Logits, in descending order.
    pub values: &'a [f32],
    /// The id of each.
    pub ids: &'a [u32],
    /// `ln(sum(exp((x - values[0]) / temperature)))` over the whole row; NaN if one of its logits is.
    pub lse: f32,
}

/// Largest relative error of the op's sum of exponentials: WGSL allows `exp` some error. This is a hundred times what
/// was observed, and costs one additional draw in a few thousand.
const SUM_ERROR: f64 = 1e-4;

impl Sampling {
    /// Checks the settings. The error names the first field with an impossible value.
    pub fn validate(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            let message = format!("must be finite and not negative, but is {}", self.temperature);
            return Err(Error::config("temperature", message));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config("top_p", format!("must be in (0, 1], but is {}", self.top_p)));
        }
        Ok(())
    }

    /// Draws token number `n` of a text from its logits. The draw depends only on `(seed, n)`, so a text can be
    /// reproduced. Set logits to negative infinity to exclude their tokens.
    ///
    /// # Errors
    ///
    /// If a setting is impossible, or if the logits are no numbers to choose by: one is NaN or the largest is infinite,
    /// which is what overflowing activations or broken weights lead to.
    ///
    /// ```
    /// use throughline::decode::sample::Sampling;
    /// let greedy = Sampling { temperature: 0.0, ..Default::default() };
    /// assert_eq!(greedy.draw(&[0.1, 2.0, -1.0], 0)?, 1);
    /// let top2 = Sampling { temperature: 5.0, top_k: 2, ..Default::default() };
    /// assert!((0..100).all(|n| top2.draw(&[3.0, 2.0, 1.0], n).unwrap() != 2));
    /// assert!(greedy.draw(&[0.1, f32::NAN, -1.0], 0).is_err());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn draw(&self, logits: &[f32], n: u64) -> Result<u32> {
        self.validate()?;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        expect_numbers(largest, logits.iter().any(|x| x.is_nan()))?;
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // In descending order; equal ones by id, so that the order is the same everywhere.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        if self.temperature == 0.0 {
            return Ok(order[0] as u32);
        }
        let values: Vec<f32> = order.iter().map(|&i| logits[i]).collect();
        let weights = self.weights(&values);
        Ok(order[self.choose(&weights, n)] as u32)
    }

    /// Like [`draw`](Self::draw), from only the likeliest tokens: returns the same token, or `None` if these do not
    /// decide it, because the draw, [`top_k`](Self::top_k) or the nucleus of [`top_p`](Self::top_p) may reach beyond
    /// them.
    ///
    /// Fall back to [`draw`](Self::draw) on `None`. It never occurs if `top_k` is from 1 to the number of candidates.
    ///
    /// # Errors
    ///
    /// Those of [`draw`](Self::draw), and an `Err` if there are no candidates.
    ///
    /// ```
    /// use throughline::decode::sample::{Candidates, Sampling};
    /// let logits = [0.5f32, 3.0, -1.0, 2.0];
    /// let sampling = Sampling { temperature: 1.0, ..Default::default() };
    /// let lse = logits.iter().map(|x| (x - 3.0).exp()).sum::<f32>().ln();
    /// let two = Candidates { values: &[3.0, 2.0], ids: &[1, 3], lse };
    /// for n in 0..100 {
    ///     if let Some(id) = sampling.draw_from(&two, n)? {
    ///         assert_eq!(id, sampling.draw(&logits, n)?);
    ///     }
    /// }
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn draw_from(&self, candidates: &Candidates<'_>, n: u64) -> Result<Option<u32>> {
        self.validate()?;
        let &Candidates { mut values, ids, lse } = candidates;
        expect_numbers(values.first().copied().unwrap_or(f32::NEG_INFINITY), lse.is_nan())?;
        let decided = (1..=values.len()).contains(&self.top_k);
        if decided {
            values = &values[..self.top_k];
        }
        if self.temperature == 0.0 {
            return Ok(ids.first().copied());
        }
        let weights = self.weights(values);
        if decided {
            return Ok(ids.get(self.choose(&weights, n)).copied());
        }
        let (known, last) = (weights.iter().sum::<f64>(), weights[weights.len() - 1]);
        let all = f64::from(lse).exp();
        let [least, most] = match self.top_k {
            0 => [all, all],
            // A few more than the candidates, none of them above the last.
            top_k => [known, all.min(known + (top_k - weights.len()) as f64 * last)],
        };
        // The draw inverts the cumulative distribution: the more there is to draw from, the further down the list it
        // goes. So if both bounds give the same token, that is the token.
        let least = self.share(&weights, least * (1.0 - SUM_ERROR), 0.0);
        let most = self.share(&weights, most * (1.0 + SUM_ERROR), last);
        let [low, high] = [least, most].map(|(kept, sum)| self.invert(&weights[..kept], sum, n));
        Ok(low.filter(|_| low == high).and_then(|i| ids.get(i).copied()))
    }

    /// Probabilities of logits in descending order, relative to the first.
    fn weights(&self, values: &[f32]) -> Vec<f64> {
        let max = f64::from(values[0]);
        values.iter().map(|&x| ((f64::from(x) - max) / f64::from(self.temperature)).exp()).collect()
    }

    /// Index of the token of draw `n`, given the weights of all tokens.
    fn choose(&self, weights: &[f64], n: u64) -> usize {
        let (kept, sum) = self.share(weights, weights.iter().sum(), 0.0);
        self.invert(&weights[..kept], sum, n).unwrap_or(kept - 1)
    }

    /// The number of weights that together reach `top_p` of `total`, including the one that crosses it, and their sum.
    /// If they do not reach it: all of them, and `top_p` of `total` plus `more` for the one that crosses it.
    fn share(&self, weights: &[f64], total: f64, more: f64) -> (usize, f64) {
        let (mut sum, goal) = (0.0, f64::from(self.top_p) * total);
        let last = weights.iter().position(|w| {
            sum += w;
            sum >= goal
        });
        last.map_or((weights.len(), total.min(goal + more)), |i| (i + 1, sum))
    }

    /// Index at which the running sum of weights passes this draw's share of `sum`.
    fn invert(&self, weights: &[f64], sum: f64, n: u64) -> Option<usize> {
        let mut left = Rng::new(&[self.seed, n]).uniform() * sum;
        weights.iter().position(|w| {
            left -= w;
            left < 0.0
        })
    }
}

/// The error of a draw, with the name of the logits.
pub(super) fn of_sequence(error: Error, tensor: String) -> Error {
    match error {
        Error::Data { expected, got, .. } => Error::Data { tensor, expected, got },
        other => other,
    }
}

/// Checks that there are numbers to choose from: the largest of the logits is finite, and none is NaN.
///
/// With infinity there are no probabilities, and which of several infinite tokens is likelier is lost, so it is an
/// error as well. Negative infinity is how tokens are excluded, but not all of them.
fn expect_numbers(largest: f32, nan: bool) -> Result<()> {
    if largest.is_finite() && !nan {
        return Ok(());
    }
    let got = if nan { "NaN".into() } else { format!("{largest} as the largest") };
    Err(Error::data("logits", "numbers, the largest of them finite: do weights or activations overflow f32?", got))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thousands of rows, with the sum of exponentials off by as much as an adapter may be.
    #[test]
    fn draws_from_candidates_are_draws_from_all() {
        let mut rng = Rng::new(&[1]);
        let (mut decided, mut draws) = (0, 0);
        for round in 0..4000u64 {
            let n = 1 + rng.below(90) as usize;
            let coarse = round % 3 == 0;
            let logit = |_| if coarse { rng.below(5) as f32 } else { 3.0 * rng.normal() as f32 };
            let logits: Vec<f32> = (0..n).map(logit).collect();
            let sampling = Sampling {
                temperature: [0.0, 0.3, 1.0, 2.5][rng.below(4) as usize],
                top_k: [0, 0, 3, 8, 9, 20, 200][rng.below(7) as usize],
                top_p: [1.0, 1.0, 0.9, 0.6, 0.05][rng.below(5) as usize],
                seed: round,
            };
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let values: Vec<f32> = order.iter().map(|&i| logits[i]).collect();
            let ids: Vec<u32> = order.iter().map(|&i| i as u32).collect();
            let divisor = sampling.temperature.max(1e-30); // as the op has it
            let sum: f64 = values.iter().map(|x| f64::from((x - values[0]) / divisor).exp()).sum();
            let k = n.min(8);
            for error in [-3e-5, 0.0, 3e-5] {
                let lse = (sum * (1.0 + error)).ln() as f32;
                let candidates = Candidates { values: &values[..k], ids: &ids[..k], lse };
                for draw in 0..3 {
                    let few = sampling.draw_from(&candidates, draw).unwrap();
                    let all = sampling.draw(&logits, draw).unwrap();
                    assert!(few.is_none_or(|id| id == all), "{few:?}, not {all}: {sampling:?} {logits:?}");
                    assert!(few.is_some() || !(1..=k).contains(&sampling.top_k), "{sampling:?} {logits:?}");
                    decided += usize::from(few.is_some());
                    draws += 1;
                }
            }
        }
        assert!(decided > draws * 2 / 3, "{decided} of {draws}");
    }

    #[test]
    fn logits_that_are_no_numbers_are_errors() {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Default::default() };
            let bad: [(&[f32], &str); 6] = [
                (&[1.0, f32::NAN, 0.5], "NaN"),
                (&[f32::NAN; 3], "NaN"),
                (&[-f32::NAN, f32::INFINITY], "NaN"),
                (&[1.0, f32::INFINITY], "got inf"),
                (&[f32::NEG_INFINITY; 2], "got -inf"),
                (&[], "got -inf"),
            ];
            for (logits, got) in bad {
                let error = sampling.draw(logits, 0).unwrap_err().to_string();
                assert!(error.contains("`logits`") && error.contains(got), "{error} for {logits:?}");
            }
            let from = |values: &[f32], lse| sampling.draw_from(&Candidates { values, ids: &[7], lse }, 0);
            assert!(from(&[1.0], f32::NAN).unwrap_err().to_string().contains("NaN"));
            assert!(from(&[f32::INFINITY], 0.0).is_err() && from(&[], 0.0).is_err());
            assert_eq!(from(&[1.0], 0.0).unwrap(), Some(7));
            // Excluded tokens are not drawn.
            for n in 0..20 {
                assert!([1, 3].contains(&sampling.draw(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 0.5], n).unwrap()));
            }
        }
    }

    /// Settings and logits of all magnitudes: an error or a token that is there.
    #[test]
    fn any_settings_give_a_token_or_an_error() {
        let mut rng = Rng::new(&[2]);
        let odd = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 0.1, 1.0, 1.5, 1e30, f32::MAX, f32::INFINITY, f32::NAN, -1.0];
        let mut accepted = 0;
        for seed in 0..20_000 {
            let mut any = || odd[rng.below(odd.len() as u64) as usize];
            let (temperature, top_p) = (any(), any());
            let logits: Vec<f32> = (0..seed % 6).map(|_| any()).collect();
            let top_k = [0, 1, 3, usize::MAX][rng.below(4) as usize];
            let sampling = Sampling { temperature, top_k, top_p, seed };
            let Ok(id) = sampling.draw(&logits, seed) else {
                let numbers = logits.iter().all(|x| x.is_finite()) && !logits.is_empty();
                assert!(!numbers || sampling.validate().is_err(), "{sampling:?} {logits:?}");
                continue;
            };
            assert!(logits[id as usize].is_finite(), "{id}: {sampling:?} {logits:?}");
            accepted += 1;
        }
        assert!(accepted > 1000, "{accepted}");
    }
}
