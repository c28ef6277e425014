//! Examples as sequences, and sequences as the batches of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::batch::{Batch, IGNORE_INDEX};
use super::examples::{Examples, is_text, shuffled};
use crate::error::{Error, Result};
use crate::nn::check_ids;
use crate::train::config::{MAX_STEPS, TrainConfig, check_count};

/// Sets the order of an epoch apart from other draws of the same seed.
const ORDER: u64 = 0x6f72_6465_7200_0001;

/// The id of padding: any in the vocabulary will do, since nothing that counts sees it.
const PADDING: u32 = 0;

/// Cuts [`Examples`] into the batches of a run.
///
/// A sequence holds as many examples as fit if the run [packs](TrainConfig::packing), and one otherwise. What is left of
/// it is padding, which does not count. An example that is longer than a sequence loses its end, and is left out if
/// nothing that counts remains. A text that counts throughout is cut into pieces instead, so that all of it is trained
/// on.
///
/// Every epoch has the same sequences in an order of its own, and each exactly once. A batch that an epoch does not fill
/// goes on with the next one. The batches of a step depend on the seed and the step alone: a resumed run sees those of an
/// uninterrupted one.
///
/// ```
/// use throughline::nn::TransformerConfig;
/// use throughline::train::TrainConfig;
/// use throughline::train::data::{Batches, Example, Examples};
///
/// let mut examples = Examples::default();
/// for i in 0..20 {
///     examples.push(&Example::completion(&[1, i % 5], &[i % 7, 2]))?;
/// }
/// let config = TrainConfig { packing: true, ..TrainConfig::new(TransformerConfig::llama(32, 16, 2, 32, 4), 2) };
/// let mut batches = Batches::new(examples, &config)?;
/// println!("{}", batches.stats());
///
/// // Three targets of four tokens each, and so five examples in 16 places.
/// assert_eq!((batches.stats().sequences, batches.steps(3.0)), (4, 6));
/// let step = batches.step(0)?; // for `Trainer::step`
/// assert_eq!(step[0].counted(), 2 * 5 * 2);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Batches {
    examples: Examples,
    pieces: Vec<Piece>,
    /// Indices of pieces, sequence by sequence.
    packed: Vec<usize>,
    /// Where the pieces of each sequence are in `packed`. In the order of their first examples.
    sequences: Vec<Range<usize>>,
    stats: DataStats,
    batch: usize,
    packing: bool,
    seed: u64,
    /// The epoch whose order is known, and that order.
    order: Option<(u64, Vec<usize>)>,
}

/// A part of an example that is read in one sequence. Its targets are its tokens and the one that follows, without the
/// first.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Where it starts among all tokens.
    start: usize,
    /// Number of tokens that are read.
    len: usize,
}

/// What a data set comes to, for people to look at before they train: print it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataStats {
    /// Examples that are trained on.
    pub examples: usize,
    /// Those of them that are too long for a sequence and lose their end.
    pub truncated: usize,
    /// Examples that are left out, since nothing in them counts, or nothing before they are cut.
    pub dropped: usize,
    /// Examples that are whole but do not end with a token that ends a text or a turn. A model does not learn from them
    /// where to stop. Only known of examples from files.
    pub unended: usize,
    /// Tokens that are read in an epoch, without padding.
    pub tokens: usize,
    /// Targets that count in an epoch.
    pub counted: usize,
    /// Sequences of an epoch.
    pub sequences: usize,
    /// Tokens of a sequence, padding included.
    pub seq_len: usize,
    /// Sequences of a step.
    pub sequences_per_step: usize,
}

impl DataStats {
    /// The share of all places that is padding, from 0 to 1.
    pub fn padding(&self) -> f64 {
        let places = self.sequences as f64 * self.seq_len as f64;
        if places > 0.0 { 1.0 - self.tokens as f64 / places } else { 0.0 }
    }

    /// Steps that an epoch takes. The last one may go on with the next epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.sequences.div_ceil(self.sequences_per_step.max(1)) as u64
    }
}

impl fmt::Display for DataStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} examples, {} tokens, {} of them learned", self.examples, self.tokens, self.counted)?;
        let notes = [
            (self.truncated, "cut short"),
            (self.dropped, "left out since no target is left"),
            (self.unended, "without a token that ends them"),
        ];
        for (count, what) in notes.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "; {count} {what}")?;
        }
        let padding = 100.0 * self.padding();
        write!(f, "; {} sequences of {}, {padding:.1}% padding", self.sequences, self.seq_len)?;
        write!(f, "; {} steps per epoch", self.steps_per_epoch())
    }
}

impl Batches {
    /// The batches of a run with this configuration: its `batch`, `micro_batches`, sequence length, packing and seed.
    ///
    /// # Errors
    ///
    /// If a setting is impossible, an id is not in the vocabulary, or no target counts within a sequence.
    pub fn new(examples: Examples, config: &TrainConfig) -> Result<Self> {
        let (batch, micro_batches, seq_len) = (config.batch, config.micro_batches, config.seq_len());
        check_count("batch", batch)?;
        check_count("micro_batches", micro_batches)?;
        check_count("seq_len", seq_len)?;
        for (i, (tokens, _)) in examples.iter().enumerate() {
            check_ids(format_args!("examples[{i}].tokens"), tokens, config.model.vocab_size)?;
        }
        let mut stats = DataStats { seq_len, sequences_per_step: batch * micro_batches, ..DataStats::default() };
        let pieces = pieces(&examples, &mut stats);
        if pieces.is_empty() {
            let got = match stats.dropped {
                0 => "none".into(),
                dropped => format!("{dropped} without: use longer sequences, or look at the data"),
            };
            let expected = format!("at least one with a target that counts in its first {} tokens", seq_len + 1);
            return Err(Error::data("examples", expected, got));
        }
        let mut sequences = match config.packing {
            true => best_fit(&pieces, seq_len),
            false => (0..pieces.len()).map(|piece| vec![piece]).collect(),
        };
        sequences.sort_unstable_by_key(|pieces| pieces[0]);
        let ends = sequences.iter().scan(0, |end, pieces| {
            *end += pieces.len();
            Some(*end - pieces.len()..*end)
        });
        let ranges: Vec<Range<usize>> = ends.collect();
        stats.sequences = ranges.len();
        Ok(Batches {
            packed: sequences.into_iter().flatten().collect(),
            sequences: ranges,
            examples,
            pieces,
            stats,
            batch,
            packing: config.packing,
            seed: config.seed,
            order: None,
        })
    }

    /// What the data comes to.
    pub fn stats(&self) -> &DataStats {
        &self.stats
    }

    /// Number of steps that so many epochs take, such as 3 or 0.5: at least one.
    pub fn steps(&self, epochs: f64) -> u64 {
        let steps = epochs * self.sequences.len() as f64 / (self.stats.sequences_per_step as f64);
        (steps.ceil() as u64).max(1)
    }

    /// How many epochs are over once so many steps are.
    pub fn epochs(&self, steps: u64) -> f64 {
        steps as f64 * self.stats.sequences_per_step as f64 / self.sequences.len() as f64
    }

    /// The batches of a step, one for each micro-batch, for [`Trainer::step`](crate::train::Trainer::step). They depend
    /// on the seed and the step alone.
    ///
    /// # Errors
    ///
    /// If `step` is 2^58 or more.
    pub fn step(&mut self, step: u64) -> Result<Vec<Batch>> {
        Error::unless(step < MAX_STEPS, "step", "below 2^58", step)?;
        let per_step = self.stats.sequences_per_step as u128;
        let first = u128::from(step) * per_step;
        let drawn: Vec<usize> = (first..first + per_step).map(|i| self.drawn(i)).collect();
        Ok(drawn.chunks(self.batch).map(|sequences| self.gather(sequences)).collect())
    }

    /// Batches for evaluation, for [`Trainer::evaluate`](crate::train::Trainer::evaluate): all sequences in order, or, if
    /// they are more than `limit` batches, so many spread evenly over them. They are the same at every call, so their
    /// losses compare. Where sequences are lacking in the last one, it has padding.
    ///
    /// # Errors
    ///
    /// If `limit` is zero.
    pub fn evaluation(&self, limit: usize) -> Result<Vec<Batch>> {
        Error::unless(limit > 0, "limit", "at least 1", limit)?;
        let all = self.sequences.len();
        let taken = all.min(limit.saturating_mul(self.batch));
        let spread: Vec<usize> = (0..taken).map(|i| (i as u128 * all as u128 / taken as u128) as usize).collect();
        Ok(spread.chunks(self.batch).map(|sequences| self.gather(sequences)).collect())
    }

    /// The sequence at a place in the endless row of all epochs.
    fn drawn(&mut self, at: u128) -> usize {
        let n = self.sequences.len() as u128;
        let (epoch, at) = ((at / n) as u64, (at % n) as usize);
        match &self.order {
            Some((known, order)) if *known == epoch => order[at],
            _ => {
                let order = shuffled(self.sequences.len(), &[self.seed, epoch, ORDER]);
                let drawn = order[at];
                self.order = Some((epoch, order));
                drawn
            }
        }
    }

    /// A batch of these sequences, and of padding after them.
    fn gather(&self, sequences: &[usize]) -> Batch {
        let (time, len) = (self.stats.seq_len, self.batch * self.stats.seq_len);
        let (mut ids, mut targets) = (vec![PADDING; len], vec![IGNORE_INDEX; len]);
        // Tokens of padding are texts of their own.
        let mut starts: Vec<u32> = (0..len).map(|at| (at % time) as u32).collect();
        let (tokens, counts) = self.examples.flat();
        for (row, sequence) in sequences.iter().enumerate() {
            let mut at = row * time;
            let pieces = self.packed[self.sequences[*sequence].clone()].iter().map(|&piece| self.pieces[piece]);
            for Piece { start, len } in pieces {
                ids[at..at + len].copy_from_slice(&tokens[start..start + len]);
                for i in (0..len).filter(|i| counts[start + i + 1]) {
                    targets[at + i] = tokens[start + i + 1];
                }
                starts[at..at + len].fill((at - row * time) as u32);
                at += len;
            }
        }
        Batch { tokens: ids, targets, starts: self.packing.then_some(starts) }
    }
}

/// What is trained on of each example, in order.
fn pieces(examples: &Examples, stats: &mut DataStats) -> Vec<Piece> {
    let (seq_len, mut pieces) = (stats.seq_len, vec![]);
    for (i, (tokens, counts)) in examples.iter().enumerate() {
        let Some(start) = examples.range(i).map(|range| range.start) else { continue };
        // What follows the last target teaches nothing.
        let last = |counts: &[bool]| counts.iter().rposition(|&counts| counts).filter(|&last| last > 0);
        let (whole, cut) = (last(counts), last(&counts[..counts.len().min(seq_len + 1)]));
        let len = match (whole, cut) {
            (Some(len), _) if len > seq_len && is_text(counts) => len,
            (Some(whole), Some(cut)) => {
                stats.truncated += usize::from(cut < whole);
                cut
            }
            _ => {
                stats.dropped += 1;
                continue;
            }
        };
        if whole == Some(len) && examples.is_unended(tokens[len]) {
            stats.unended += 1;
        }
        stats.examples += 1;
        stats.tokens += len;
        stats.counted += counts[1..=len].iter().filter(|&&counts| counts).count();
        let piece = |at: usize| Piece { start: start + at, len: seq_len.min(len - at) };
        pieces.extend((0..len).step_by(seq_len).map(piece));
    }
    pieces
}

/// Distributes pieces over sequences: the longest first, each to the fullest sequence that has room for it. Deterministic;
/// the pieces of a sequence are in order.
fn best_fit(pieces: &[Piece], seq_len: usize) -> Vec<Vec<usize>> {
    let mut by_length: Vec<usize> = (0..pieces.len()).collect();
    by_length.sort_by_key(|&i| std::cmp::Reverse(pieces[i].len)); // stable
    let mut sequences: Vec<Vec<usize>> = vec![];
    // Sequences by the places that are free in them; the last of a list is used first.
    let mut free: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for piece in by_length {
        let len = pieces[piece].len;
        let found = free.range_mut(len..).next().and_then(|(&room, list)| {
            let sequence = list.pop()?;
            Some((room, list.is_empty(), sequence))
        });
        let (room, sequence) = match found {
            Some((room, is_last, sequence)) => {
                if is_last {
                    free.remove(&room);
                }
                (room, sequence)
            }
            None => {
                sequences.push(vec![]);
                (seq_len, sequences.len() - 1)
            }
        };
        sequences[sequence].push(piece);
        if room > len {
            free.entry(room - len).or_default().push(sequence);
        }
    }
    sequences.iter_mut().for_each(|pieces| pieces.sort_unstable());
    sequences
}
