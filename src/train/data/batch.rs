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
/// [`Batches`](super::Batches) and [`Dataset`](super::Dataset) make them; use [`new`](Self::new), or fill in the fields
/// yourself, for data of another kind. Positions whose target is [`IGNORE_INDEX`] do not count in the loss. All other ids must be in the vocabulary, those
/// of padding too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[batch, time]`.
    pub tokens: Vec<u32>,
    /// Ids of the tokens to predict, `[batch, time]`, or [`IGNORE_INDEX`].
    pub targets: Vec<u32>,
    /// For [packed](crate::train::TrainConfig::packing) batches: where the text begins that each token belongs to, as a place
    /// in its sequence, `[batch, time]`. A token sees those of its own text, up to itself. Padding may be texts of one
    /// token.
    pub starts: Option<Vec<u32>>,
}

impl Batch {
    /// A batch whose sequences are one text each.
    pub fn new(tokens: Vec<u32>, targets: Vec<u32>) -> Self {
        Batch { tokens, targets, starts: None }
    }

    /// The place of each token in its own text, counted from 0.
    ///
    /// ```
    /// use throughline::train::data::{Batch, IGNORE_INDEX};
    /// // One sequence with texts of three and two tokens, and one of padding.
    /// let batch = Batch {
    ///     tokens: vec![5, 2, 7, 5, 9, 0],
    ///     targets: vec![2, 7, IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX],
    ///     starts: Some(vec![0, 0, 0, 3, 3, 5]),
    /// };
    /// assert_eq!(batch.positions(6), [0, 1, 2, 0, 1, 0]);
    /// ```
    pub fn positions(&self, time: usize) -> Vec<u32> {
        let places = (0..self.tokens.len()).map(|i| (i % time.max(1)) as u32);
        match &self.starts {
            Some(starts) => places.zip(starts).map(|(place, start)| place.saturating_sub(*start)).collect(),
            None => places.collect(),
        }
    }

    /// Number of targets that count in the loss.
    ///
    /// ```
    /// use throughline::train::data::{Batch, IGNORE_INDEX};
    /// let batch = Batch::new(vec![5, 2, 7, 0], vec![IGNORE_INDEX, 7, 1, IGNORE_INDEX]);
    /// assert_eq!(batch.counted(), 2);
    /// ```
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&id| id != IGNORE_INDEX).count()
    }

    /// Checks the lengths and ids, found at `what`, and that there are starts if sequences are `packed`.
    pub(crate) fn check(
        &self,
        what: impl Display,
        [batch, time]: [usize; 2],
        vocab_size: usize,
        packed: bool,
    ) -> Result<()> {
        for (field, ids) in [("tokens", &self.tokens), ("targets", &self.targets)] {
            if ids.len() != batch * time {
                let expected = format!("{} ids, {batch} sequences of {time}", batch * time);
                return Err(Error::data(format!("{what}.{field}"), expected, ids.len()));
            }
        }
        check_ids(format!("{what}.tokens"), &self.tokens, vocab_size)?;
        let stray = |&id: &u32| id as usize >= vocab_size && id != IGNORE_INDEX;
        if let Some(i) = self.targets.iter().position(stray) {
            let expected = format!("ids below {vocab_size}, the size of the vocabulary, or `IGNORE_INDEX`");
            return Err(Error::data(format!("{what}.targets"), expected, format!("{} at index {i}", self.targets[i])));
        }
        self.check_starts(format_args!("{what}.starts"), [batch, time], packed)
    }

    /// Checks that no text starts after one of its tokens.
    fn check_starts(&self, what: impl Display, [batch, time]: [usize; 2], packed: bool) -> Result<()> {
        let wrong = |expected: String, got: String| Err(Error::data(what.to_string(), expected, got));
        let starts = match (&self.starts, packed) {
            (None, false) => return Ok(()),
            (None, true) => return wrong("the start of each token's text, as `packing` is set".into(), "none".into()),
            (Some(_), false) => {
                return wrong("none: sequences hold one text each unless `packing` is set".into(), "some".into());
            }
            (Some(starts), true) => starts,
        };
        if starts.len() != batch * time {
            let expected = format!("{} places, {batch} sequences of {time}", batch * time);
            return wrong(expected, starts.len().to_string());
        }
        match starts.iter().enumerate().find(|&(i, &start)| start as usize > i % time) {
            None => Ok(()),
            Some((i, start)) => wrong(
                format!("at most {}, the place of the token itself", i % time),
                format!("{start} at index {i}, sequence {}", i / time),
            ),
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
