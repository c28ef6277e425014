//! A training step spread over several frames, in slices of bounded time.

use std::time::Duration;

use super::feed::Feeds;
use super::trainer::GraphTrainer;
use crate::device::timeline::Timeline;
use crate::device::{Fate, Readback, Slice};
use crate::error::{Error, Result};

/// How the steps of a trainer are sliced. [`GraphTrainer::slices`] returns one.
#[derive(Clone, Debug)]
pub struct StepSlices {
    /// Time of what comes before the first micro-batch: in mixed precision, a slice that copies matrices.
    begin: Option<Duration>,
    /// Slices of forward and backward of a micro-batch.
    passes: Vec<Slice>,
    /// Number of micro-batches of a step.
    micro_batches: usize,
    /// Time of the update, which is always one slice.
    update: Duration,
}

impl StepSlices {
    /// The number of slices of a step.
    pub fn count(&self) -> usize {
        usize::from(self.begin.is_some()) + self.micro_batches * self.passes.len() + 1
    }

    /// The estimated time of a whole step.
    pub fn total(&self) -> Duration {
        self.begin.unwrap_or_default()
            + self.update
            + self.passes.iter().map(|s| s.estimate).sum::<Duration>() * self.micro_batches as u32
    }

    /// The estimated time of the longest slice. It exceeds the budget if a single kernel, or the update, does.
    pub fn longest(&self) -> Duration {
        self.passes.iter().map(|s| s.estimate).chain([self.update]).chain(self.begin).max().unwrap_or_default()
    }
}

/// A step in progress. Dropping it cancels the step: until its last slice, no parameter has changed. If an encoder with a
/// slice of it is dropped, the step starts over.
#[derive(Clone, Debug)]
pub struct SlicedStep {
    slices: StepSlices,
    feeds: Feeds<'static>,
    /// The weight of each micro-batch.
    weights: Vec<f32>,
    /// The number of this step.
    step: u64,
    /// Whether what comes before the first micro-batch has been recorded.
    begun: bool,
    micro_batch: usize,
    next: usize,
    /// Of the encoders with its slices, as far as they have not run.
    fates: Vec<Fate>,
}

impl SlicedStep {
    /// The estimated time of the next slice.
    pub fn next_estimate(&self) -> Duration {
        let (begun, next) = if self.is_lost() { (false, 0) } else { (self.begun, self.next) };
        if let Some(begin) = self.slices.begin.filter(|_| !begun) {
            return begin;
        }
        self.slices.passes.get(next).map_or(self.slices.update, |s| s.estimate)
    }

    fn is_lost(&self) -> bool {
        self.fates.iter().any(Fate::is_dropped)
    }
}

impl GraphTrainer {
    /// Divides steps into slices of at most `budget` each, by the times of one step, which
    /// [`profile_blocking`](Self::profile_blocking) measures.
    ///
    /// Use it to train within the frames of an application. The update of the weights is always the last slice, as a
    /// whole, so readers of the weights only ever see the end of a step.
    pub fn slices(&self, profile: &Timeline, budget: Duration) -> Result<StepSlices> {
        let exec = self.exec();
        let times = profile.command_ns()?;
        let micro_batches = self.config().micro_batches;
        let begin = self.begin_count();
        let passes = begin + micro_batches * exec.command_count();
        let (Some(pass), Some(update)) = (times.get(begin..begin + exec.command_count()), times.get(passes..)) else {
            return Err(Error::data("profile", format!("times of at least {passes} commands"), times.len()));
        };
        let time = |ns: &[u64]| Duration::from_nanos(ns.iter().sum());
        let (update, begin) = (time(update), (begin > 0).then(|| time(&times[..begin])));
        Ok(StepSlices { begin, passes: exec.slices_of(pass, budget)?, micro_batches, update })
    }

    /// Starts a step in slices, with a copy of the data. Records nothing yet. Errors are those of [`step`](Self::step).
    ///
    /// ```no_run
    /// # use throughline::train::{Feed, GraphTrainer};
    /// # fn app(trainer: &mut GraphTrainer, feeds: &[Feed]) -> throughline::Result<()> {
    /// # let (device, queue) = (trainer.gpu().device().clone(), trainer.gpu().queue().clone());
    /// let profile = trainer.profile_blocking(feeds)?; // once; a step like others
    /// let slices = trainer.slices(&profile, std::time::Duration::from_micros(500))?;
    /// let mut step = trainer.start_sliced(&slices, feeds)?;
    /// loop {
    ///     // A frame: your passes and one slice, in one submit.
    ///     let mut encoder = device.create_command_encoder(&Default::default());
    ///     if let Some(loss) = trainer.record_slice(&mut encoder, &mut step)? {
    ///         step = trainer.start_sliced(&slices, feeds)?;
    ///         # drop(loss);
    ///     }
    ///     queue.submit([encoder.finish()]);
    ///     # break;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_sliced<'a>(&self, slices: &StepSlices, feeds: impl Into<Feeds<'a>>) -> Result<SlicedStep> {
        let feeds = feeds.into();
        let weights = self.check(&feeds)?;
        let (slices, feeds, step) = (slices.clone(), feeds.owned(), self.step_count());
        Ok(SlicedStep { slices, feeds, weights, step, begun: false, micro_batch: 0, next: 0, fates: vec![] })
    }

    /// Records the next slice of a step. The last slice completes the step and returns the loss, `[1]`, on its way to
    /// the host.
    ///
    /// If an encoder that this step or the one before was recorded into has been dropped, the step starts over: this
    /// call records its first slice.
    ///
    /// # Errors
    ///
    /// If the trainer has run another step since this one started.
    pub fn record_slice(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        step: &mut SlicedStep,
    ) -> Result<Option<Readback>> {
        self.check_whole()?;
        let count = self.step_count();
        if step.step < count {
            let expected = format!("slices of step {count}");
            return Err(Error::data("sliced step", expected, format!("one of step {}", step.step)));
        }
        if step.step > count || step.is_lost() {
            (step.step, step.begun, step.micro_batch, step.next) = (count, false, 0, 0);
            step.fates.clear();
        }
        self.sliced = true;
        step.fates.retain(|fate| !fate.is_done());
        step.fates.push(Fate::of(encoder));
        if !std::mem::replace(&mut step.begun, true) && step.slices.begin.is_some() {
            self.begin(encoder)?;
            return Ok(None);
        }
        if step.micro_batch == self.config().micro_batches {
            return self.update(encoder).map(Some);
        }
        if step.next == 0 {
            if step.micro_batch == 0 {
                self.clear(encoder)?;
            }
            self.feed(encoder, &step.feeds.batches[step.micro_batch], step.weights[step.micro_batch])?;
        }
        self.exec().record_slice(encoder, &step.slices.passes[step.next])?;
        step.next += 1;
        if step.next == step.slices.passes.len() {
            step.micro_batch += 1;
            // The update follows the last micro-batch.
            step.next = if step.micro_batch == self.config().micro_batches { step.next } else { 0 };
        }
        Ok(None)
    }
}
