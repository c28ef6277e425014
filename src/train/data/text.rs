//! One text: its characters as tokens, and the batches of a run on it.

use super::batch::Batch;
use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::train::config::check_count;

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
