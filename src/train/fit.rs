//! Finding what fits when a training configuration does not, by planning smaller ones.

use super::config::{TrainConfig, TrainOptions};
use super::plan::TrainPlan;
use crate::error::{Error, Result, listed};
use crate::profile::Profile;

/// Sequences are not shortened below this length.
const SHORTEST: usize = 16;

impl TrainConfig {
    /// Returns this configuration if it fits devices of the profile and [`TrainOptions::max_bytes`]. Otherwise returns
    /// the first that fits when the [`batch`](Self::batch) is halved repeatedly, and then the
    /// [`seq_len`](Self::seq_len), down to 16 tokens.
    ///
    /// `micro_batches` grows to keep the number of tokens per step, or a few more if that does not divide. Each attempt
    /// is a plan and takes milliseconds.
    ///
    /// # Errors
    ///
    /// The error of the smallest configuration, if even that does not fit.
    ///
    /// ```
    /// # use throughline::{nn::TransformerConfig, train::TrainConfig};
    /// # let config = TrainConfig::new(TransformerConfig::gpt2(65, 128, 4, 128, 4), 64);
    /// use throughline::{AdapterClass, Profile};
    /// use throughline::train::TrainOptions;
    /// let options = TrainOptions { max_bytes: Some(100 << 20), ..TrainOptions::default() };
    /// let fitted = config.fitted(&options, &Profile::portable(AdapterClass::Gpu))?;
    /// assert_eq!((config.batch, fitted.batch, fitted.micro_batches), (64, 32, 2));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn fitted(&self, options: &TrainOptions<'_>, profile: &Profile) -> Result<TrainConfig> {
        match TrainPlan::as_is(self, options, profile) {
            Ok(_) => Ok(self.clone()),
            Err(Error::Limit { .. }) => smaller(self, options, profile).map_err(|(seq_len, e)| {
                e.advise(format!("That is for batch 1, seq_len {seq_len}, the smallest tried"))
            }),
            Err(e) => Err(e),
        }
    }
}

impl TrainPlan {
    /// Plans training for devices of this profile.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] names a tensor and the limit that it exceeds, or the bytes that [`TrainOptions::max_bytes`]
    /// allows, and a configuration that would fit.
    pub fn new(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<Self> {
        Self::as_is(config, options, profile).map_err(|e| with_advice(e, config, options, profile))
    }
}

/// The largest configuration that fits, by halving, not counting `config` itself. The error is that of the smallest.
fn smaller(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<TrainConfig, (usize, Error)> {
    let fits = |c: &TrainConfig| TrainPlan::as_is(c, options, profile).map(drop);
    let mut seq_len = config.seq_len();
    let one = loop {
        let one = resized(config, 1, seq_len);
        match fits(&one) {
            Ok(()) => break one,
            Err(Error::Limit { .. }) if seq_len / 2 >= SHORTEST => seq_len /= 2,
            Err(e) => return Err((seq_len, e)),
        }
    };
    if seq_len < config.seq_len() {
        // More of these would have as many tokens as one that was too long.
        return Ok(one);
    }
    let halves = std::iter::successors(Some(config.batch / 2), |n| Some(n / 2)).take_while(|&n| n > 1);
    let fitting = halves.map(|batch| resized(config, batch, seq_len)).find(|c| fits(c).is_ok());
    Ok(fitting.unwrap_or(one))
}

fn resized(config: &TrainConfig, batch: usize, seq_len: usize) -> TrainConfig {
    let micro_batches = config.tokens_per_step().div_ceil(batch * seq_len);
    let kept = (seq_len == config.seq_len()).then_some(config.seq_len);
    TrainConfig { batch, micro_batches, seq_len: kept.unwrap_or(Some(seq_len)), ..config.clone() }
}

/// The error of planning, with what would fit if the cause was lack of room.
fn with_advice(e: Error, config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Error {
    if !matches!(e, Error::Limit { .. }) {
        return e;
    }
    match smaller(config, options, profile) {
        Ok(c) => {
            let (batch, seq_len, micro_batches) = (c.batch, c.seq_len(), c.micro_batches);
            e.advise(format!("This fits: batch {batch}, seq_len {seq_len}, micro_batches {micro_batches}"))
        }
        Err((seq_len, Error::Limit { exceeded, .. })) => {
            e.advise(format!("Even batch 1, seq_len {seq_len} does not fit: {}", listed(&exceeded)))
        }
        // Something else is wrong.
        Err(_) => e,
    }
}
