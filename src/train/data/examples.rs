//! Texts as tokens, each with a mask of what the loss counts.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::rng::Rng;

/// Sets the draws of a split apart from others of the same seed.
const SPLIT: u64 = 0x7370_6c69_7400_0001;

/// Tokens to train on, and which of them the loss counts.
///
/// ```
/// use throughline::train::data::Example;
/// // The model reads 5 and 6, and learns to write 7 and 2.
/// let example = Example::completion(&[5, 6], &[7, 2]);
/// assert_eq!(example.counts, [false, false, true, true]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// For each token, whether the model learns to write it there. That of the first token does not matter: there is
    /// nothing to predict it from.
    pub counts: Vec<bool>,
}

impl Example {
    /// A text, all of which counts.
    pub fn text(tokens: Vec<u32>) -> Self {
        Example { counts: vec![true; tokens.len()], tokens }
    }

    /// A prompt, which does not count, and what the model should write after it, which does.
    pub fn completion(prompt: &[u32], completion: &[u32]) -> Self {
        let mut example = Example::default();
        example.extend(prompt, false);
        example.extend(completion, true);
        example
    }

    /// Appends tokens that all count, or all do not.
    pub fn extend(&mut self, tokens: &[u32], counts: bool) {
        self.tokens.extend_from_slice(tokens);
        self.counts.resize(self.tokens.len(), counts);
    }
}

/// The examples of a data set, in order, from [files](Self::read) or [pushed](Self::push) one by one.
///
/// They are whole, whatever their length. [`Batches`](super::Batches) fits them into sequences.
///
/// ```
/// use throughline::train::data::{Example, Examples};
/// let mut examples = Examples::default();
/// for i in 0..10 {
///     examples.push(&Example::completion(&[i], &[i + 1, 0]))?;
/// }
/// let [train, val] = examples.split(0.2, 7)?;
/// assert_eq!((train.len(), val.len()), (8, 2));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    tokens: Vec<u32>,
    counts: Vec<bool>,
    entries: Vec<Entry>,
    /// Tokens that end a text or a turn; empty if not known.
    stop: Vec<u32>,
}

/// One example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Where its tokens end.
    end: usize,
    /// What it is a part of, such as a line of a file. Parts of one are not split between training and validation.
    source: usize,
}

impl Examples {
    /// Adds an example.
    ///
    /// # Errors
    ///
    /// If `tokens` and `counts` differ in length.
    pub fn push(&mut self, example: &Example) -> Result<()> {
        self.push_all(std::slice::from_ref(example))
    }

    /// Adds examples that are parts of one, such as the replies of a chat: [`split`](Self::split) keeps them together.
    pub fn push_all(&mut self, parts: &[Example]) -> Result<()> {
        for (i, part) in parts.iter().enumerate() {
            if part.tokens.len() != part.counts.len() {
                let expected = format!("{}, one for each token", part.tokens.len());
                return Err(Error::data(format!("examples[{}].counts", self.len() + i), expected, part.counts.len()));
            }
        }
        let source = self.sources();
        for part in parts {
            self.tokens.extend_from_slice(&part.tokens);
            self.counts.extend_from_slice(&part.counts);
            self.entries.push(Entry { end: self.tokens.len(), source });
        }
        Ok(())
    }

    /// Adds all examples of another set, such as those of a second file.
    pub fn append(&mut self, other: Examples) {
        let (tokens, sources) = (self.tokens.len(), self.sources());
        self.tokens.extend(other.tokens);
        self.counts.extend(other.counts);
        let moved = |e: Entry| Entry { end: tokens + e.end, source: sources + e.source };
        self.entries.extend(other.entries.into_iter().map(moved));
        self.stop.extend(other.stop);
        self.stop.sort_unstable();
        self.stop.dedup();
    }

    /// Says which tokens end a text or a turn, to find examples that lack them.
    #[cfg(feature = "tokenizers")]
    pub(super) fn ending_with(stop: &[u32]) -> Self {
        Examples { stop: stop.to_vec(), ..Examples::default() }
    }

    /// Number of examples. A chat may be several: see [`read`](Self::read).
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of tokens of all examples.
    pub fn token_count(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens of an example, and for each whether it counts. `None` past the end.
    pub fn get(&self, i: usize) -> Option<(&[u32], &[bool])> {
        let range = self.range(i)?;
        Some((&self.tokens[range.clone()], &self.counts[range]))
    }

    /// Tokens and what counts of them, example by example.
    pub fn iter(&self) -> impl Iterator<Item = (&[u32], &[bool])> {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    /// Where the tokens of an example are among those of all.
    pub(super) fn range(&self, i: usize) -> Option<Range<usize>> {
        let end = self.entries.get(i)?.end;
        Some(i.checked_sub(1).map_or(0, |before| self.entries[before].end)..end)
    }

    /// Tokens of all examples, and whether they count.
    pub(super) fn flat(&self) -> (&[u32], &[bool]) {
        (&self.tokens, &self.counts)
    }

    /// Whether an example lacks the token that would end it, as far as such tokens are known.
    pub(super) fn is_unended(&self, last: u32) -> bool {
        !self.stop.is_empty() && self.stop.binary_search(&last).is_err()
    }

    /// Number of sources.
    fn sources(&self) -> usize {
        self.entries.last().map_or(0, |last| last.source + 1)
    }

    /// Draws a part of the data for validation, such as a tenth; returns training and validation examples, in their
    /// order. Which ones it draws depends on the seed alone. With a fraction of 0 it draws none, otherwise at least one.
    ///
    /// Lines of a file stay whole. A lone text is cut instead: its end is for validation.
    ///
    /// # Errors
    ///
    /// If `val_fraction` is not at least 0 and below 1, or there is only one chat or completion.
    pub fn split(self, val_fraction: f64, seed: u64) -> Result<[Examples; 2]> {
        Error::unless((0.0..1.0).contains(&val_fraction), "val_fraction", "at least 0 and below 1", val_fraction)?;
        let (all, none) = (self.sources(), Examples { stop: self.stop.clone(), ..Examples::default() });
        if val_fraction == 0.0 || self.is_empty() {
            return Ok([self, none]);
        }
        if all == 1 {
            return self.cut(val_fraction);
        }
        let drawn = ((all as f64 * val_fraction).round() as usize).clamp(1, all - 1);
        let order = shuffled(all, &[seed, SPLIT]);
        let mut is_val = vec![false; all];
        order[..drawn].iter().for_each(|&source| is_val[source] = true);
        let mut parts = [none.clone(), none];
        let mut last = None;
        for (i, entry) in self.entries.iter().enumerate() {
            let (Some((tokens, counts)), part) = (self.get(i), &mut parts[usize::from(is_val[entry.source])]) else {
                continue;
            };
            // The next source, unless this is a part of the last one.
            let source = part.sources() - usize::from(last == Some(entry.source));
            last = Some(entry.source);
            part.tokens.extend_from_slice(tokens);
            part.counts.extend_from_slice(counts);
            part.entries.push(Entry { end: part.tokens.len(), source });
        }
        Ok(parts)
    }

    /// Cuts a lone text in two.
    fn cut(mut self, val_fraction: f64) -> Result<[Examples; 2]> {
        let val = (self.tokens.len() as f64 * val_fraction) as usize;
        let train = self.tokens.len() - val;
        if self.len() > 1 || !is_text(&self.counts) || val < 2 || train < 2 {
            let expected = "at least two to draw some for validation, or a text that can be cut";
            return Err(Error::data("examples", expected, "one, and not long enough or not a text"));
        }
        let mut rest = Examples { stop: self.stop.clone(), ..Examples::default() };
        rest.push(&Example::text(self.tokens.split_off(train)))?;
        self.counts.truncate(train);
        self.entries = vec![Entry { end: train, source: 0 }];
        Ok([self, rest])
    }
}

/// Whether all tokens count that can: an example that may be cut anywhere.
pub(super) fn is_text(counts: &[bool]) -> bool {
    counts.iter().skip(1).all(|&counts| counts)
}

/// The numbers below `n` in an order that depends on the key alone (Fisher and Yates).
pub(super) fn shuffled(n: usize, key: &[u64]) -> Vec<usize> {
    let mut rng = Rng::new(key);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order
}
