//! From text to tokens to batches.

use std::fmt::Display;

use super::config::check_count;
use crate::error::{Error, Result};
use crate::nn::check_ids;
use crate::rng::Rng;

/// A vocabulary of characters, in code point order: the simplest tokenizer, for small models trained from scratch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CharTokenizer {
    chars: Vec<char>,
}

impl CharTokenizer {
    /// The vocabulary of all characters that occur in a text.
    ///
    /// ```
    /// use throughline::train::data::CharTokenizer;
    /// let t = CharTokenizer::of("abba c");
    /// assert_eq!(t.encode("cab")?, [3, 1, 2]);
    /// assert_eq!(t.decode(&[3, 1, 2]), "cab");
    /// assert!(t.encode("x").unwrap_err().to_string().contains("'x'"));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn of(text: &str) -> Self {
        let set: std::collections::BTreeSet<char> = text.chars().collect();
        CharTokenizer { chars: set.into_iter().collect() }
    }

    /// Number of characters.
    pub fn vocab_size(&self) -> usize {
        self.chars.len()
    }

    /// All characters as one string, in order of their ids: what a checkpoint stores.
    pub fn alphabet(&self) -> String {
        self.chars.iter().collect()
    }

    /// The ids of a text's characters. The error names a character that the vocabulary lacks.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let id = |c: char| {
            self.chars.binary_search(&c).map(|i| i as u32).map_err(|_| {
                Error::data(
                    "text",
                    format!("the {} characters that the model was trained on", self.chars.len()),
                    format!("{c:?}"),
                )
            })
        };
        text.chars().map(id).collect()
    }

    /// The text of ids. Ids that are not in the vocabulary become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        ids.iter().map(|&i| self.chars.get(i as usize).copied().unwrap_or('\u{fffd}')).collect()
    }
}

/// A text as token ids, split into training and validation parts.
///
/// It also cuts the [`Batch`]es of a run, reproducibly.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The training part: the beginning of the text.
    pub train: Vec<u32>,
    /// The validation part: the rest.
    pub val: Vec<u32>,
}

/// The target of a position that does not count in the loss, such as padding or a prompt. PyTorch's `ignore_index` is
/// the same for -100.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Inputs and targets of `batch` sequences of `time` tokens, row by row. The target of a token is the token that
/// follows it.
///
/// [`Dataset::batch`] makes one; use [`new`](Self::new), or fill in the fields yourself, for data of another kind.
/// Positions whose target is [`IGNORE_INDEX`] do not count in the loss. All other ids must be in the vocabulary, those
/// of padding too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[batch, time]`.
    pub tokens: Vec<u32>,
    /// Ids of the tokens to predict, `[batch, time]`, or [`IGNORE_INDEX`].
    pub targets: Vec<u32>,
    /// For [packed](super::TrainConfig::packing) batches: where the text begins that each token belongs to, as a place
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

impl Dataset {
    /// Splits off the last `val_fraction` of the text for validation, such as 0.1. Both parts must hold at least a
    /// sequence of `context` tokens and the token after it.
    ///
    /// # Errors
    ///
    /// If `val_fraction` is not from 0 to 1, or one of the parts is too short.
    pub fn new(ids: Vec<u32>, val_fraction: f64, context: usize) -> Result<Self> {
        Error::unless((0.0..=1.0).contains(&val_fraction), "val_fraction", "from 0 to 1", val_fraction)?;
        check_count("context", context)?;
        if ids.is_empty() {
            return Err(Error::data("text", "some text", "an empty one"));
        }
        let split = ids.len() - (ids.len() as f64 * val_fraction) as usize;
        let (train, val) = (ids[..split].to_vec(), ids[split..].to_vec());
        expect_text(&train, "training", context)?;
        expect_text(&val, "validation", context)?;
        Ok(Dataset { train, val })
    }

    /// The training batch of a step. Its sequences start at positions that depend on (seed, step) alone, so a resumed
    /// run sees the same batches as an uninterrupted one.
    ///
    /// # Errors
    ///
    /// If `batch` or `time` is zero, or the training part has no `time` tokens and one more.
    pub fn batch(&self, seed: u64, step: u64, batch: usize, time: usize) -> Result<Batch> {
        check_count("batch", batch)?;
        check_count("time", time)?;
        expect_text(&self.train, "training", time)?;
        let mut rng = Rng::new(&[seed, step]);
        let starts = (0..batch).map(|_| rng.below((self.train.len() - time) as u64) as usize);
        Ok(Self::gather(&self.train, starts, time))
    }

    /// `batches` validation batches, spread evenly over the text. They are the same at every call, so their losses
    /// compare.
    ///
    /// # Errors
    ///
    /// If `batches`, `batch` or `time` is zero, or the validation part has no `time` tokens and one more.
    pub fn val_batches(&self, batches: usize, batch: usize, time: usize) -> Result<Vec<Batch>> {
        check_count("batches", batches)?;
        check_count("batch", batch)?;
        check_count("time", time)?;
        expect_text(&self.val, "validation", time)?;
        let last = (self.val.len() - time - 1) as u128;
        let total = batches as u128 * batch as u128;
        let start = |i: u128| (last * i / (total - 1).max(1)) as usize;
        let one = |first: u128| Self::gather(&self.val, (first..first + batch as u128).map(start), time);
        Ok((0..batches as u128).map(|i| one(i * batch as u128)).collect())
    }

    fn gather(ids: &[u32], starts: impl Iterator<Item = usize>, time: usize) -> Batch {
        let (mut tokens, mut targets) = (vec![], vec![]);
        for s in starts {
            tokens.extend_from_slice(&ids[s..s + time]);
            targets.extend_from_slice(&ids[s + 1..s + time + 1]);
        }
        Batch::new(tokens, targets)
    }
}

/// Checks that a part of a text has a sequence of `time` tokens with targets.
fn expect_text(ids: &[u32], part: &str, time: usize) -> Result<()> {
    match ids.len() > time {
        true => Ok(()),
        false => Err(Error::data(
            format!("{part} text"),
            format!("at least {} tokens, one more than a sequence", time + 1),
            format!("{} tokens; use a longer text or shorter sequences", ids.len()),
        )),
    }
}
