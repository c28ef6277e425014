//! What a step is fed.

use std::fmt::Display;

use crate::error::{Error, Result};
use crate::nn::check_ids;

/// The target of a position that does not count in the loss, such as padding or a prompt. PyTorch's `ignore_index` is
/// the same for -100.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Inputs and targets of `batch` sequences of `time` tokens, row by row. The target of a token is the token that
/// follows it.
///
/// [`Batches`](super::Batches) and [`Dataset`](super::Dataset) make them; fill in the fields yourself for data of another kind. Positions whose target is
/// [`IGNORE_INDEX`] do not count in the loss. All other ids must be in the vocabulary, those of padding too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[batch, time]`.
    pub tokens: Vec<u32>,
    /// Ids of the tokens to predict, `[batch, time]`, or [`IGNORE_INDEX`].
    pub targets: Vec<u32>,
    /// SHIM
    pub starts: Vec<u32>,
}

impl Batch {
    /// Number of targets that count in the loss.
    ///
    /// ```
    /// use throughline::train::data::{Batch, IGNORE_INDEX};
    /// let batch = Batch { tokens: vec![5, 2, 7, 0], targets: vec![IGNORE_INDEX, 7, 1, IGNORE_INDEX], starts: vec![] };
    /// assert_eq!(batch.counted(), 2);
    /// ```
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&id| id != IGNORE_INDEX).count()
    }

    /// Checks the lengths and ids, found at `what`.
    pub(crate) fn check(&self, what: impl Display, [batch, time]: [usize; 2], vocab_size: usize) -> Result<()> {
        for (field, ids) in [("tokens", &self.tokens), ("targets", &self.targets)] {
            if ids.len() != batch * time {
                let expected = format!("{} ids, {batch} sequences of {time}", batch * time);
                return Err(Error::data(format!("{what}.{field}"), expected, ids.len()));
            }
        }
        check_ids(format!("{what}.tokens"), &self.tokens, vocab_size)?;
        let stray = |&id: &u32| id as usize >= vocab_size && id != IGNORE_INDEX;
        match self.targets.iter().position(stray) {
            None => Ok(()),
            Some(i) => {
                let expected = format!("ids below {vocab_size}, the size of the vocabulary, or `IGNORE_INDEX`");
                Err(Error::data(format!("{what}.targets"), expected, format!("{} at index {i}", self.targets[i])))
            }
        }
    }
}

/// The number of targets that count in each of these batches, and in all of them: at least one.
pub(crate) fn counted(batches: &[Batch]) -> Result<(Vec<usize>, usize)> {
    let counts: Vec<usize> = batches.iter().map(Batch::counted).collect();
    match counts.iter().sum() {
        // Their mean would be 0 / 0.
        0 => Err(Error::data("targets", "at least one that counts in the loss", "`IGNORE_INDEX` everywhere")),
        total => Ok((counts, total)),
    }
}
