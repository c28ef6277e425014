//! A training step spread over several frames, in slices of bounded time.

use std::time::Duration;

use super::data::Batch;
use super::trainer::Trainer;
use crate::device::timeline::Timeline;
use crate::device::{Fate, Readback, Slice};
use crate::error::{Error, Result};

/// How the steps of a trainer are sliced. [`Trainer::slices`] returns one.
#[derive(Clone, Debug)]
pub struct StepSlices {
    /// Slices of forward and backward of a micro-batch.
    passes: Vec<Slice>,
    /// Time of the update, which is always one slice.
    update: Duration,
}

impl StepSlices {
    /// The estimated time of the longest slice. It exceeds the budget if a single kernel, or the update, does.
    pub fn longest(&self) -> Duration {
        self.passes.iter().map(|s| s.estimate).chain([self.update]).max().unwrap_or_default()
    }
}

/// A step in progress. Dropping it cancels the step: until its last slice, nothing that others read has changed. If an
/// encoder with a slice of it is dropped, the step starts over.
#[derive(Clone, Debug)]
pub struct SlicedStep {
    slices: StepSlices,
    batches: Vec<Batch>,
    /// The weight of each.
    weights: Vec<f32>,
    /// The number of this step.
    step: u64,
    micro_batch: usize,
    next: usize,
    /// Of the encoders with its slices, as far as they have not run.
    fates: Vec<Fate>,
}

impl SlicedStep {
    /// The estimated time of the next slice.
    pub fn next_estimate(&self) -> Duration {
        let next = if self.is_lost() { 0 } else { self.next };
        self.slices.passes.get(next).map_or(self.slices.update, |s| s.estimate)
    }

    fn is_lost(&self) -> bool {
        self.fates.iter().any(Fate::is_dropped)
    }
}

impl Trainer {
    /// Divides steps into slices of at most `budget` each, by the times of one step, which
    /// [`profile_blocking`](Self::profile_blocking) measures.
    ///
    /// Use it to train within the frames of an application. The update of the weights is always the last slice, as a
    /// whole, so readers of the weights only ever see the end of a step.
    pub fn slices(&self, profile: &Timeline, budget: Duration) -> Result<StepSlices> {
        let exec = &self.forward_backward.exec;
        let times = profile.command_ns()?;
        let passes = self.config.micro_batches * exec.command_count();
        let (Some(pass), Some(update)) = (times.get(..exec.command_count()), times.get(passes..)) else {
            return Err(Error::data("profile", format!("times of at least {passes} commands"), times.len()));
        };
        let update = Duration::from_nanos(update.iter().sum());
        Ok(StepSlices { passes: exec.slices_of(pass, budget)?, update })
    }

    /// Starts a step in slices. Records nothing yet. Errors are those of [`step`](Self::step).
    ///
    /// ```no_run
    /// # use throughline::train::{Trainer, data::Batch};
    /// # fn app(trainer: &mut Trainer, batches: &[Batch]) -> throughline::Result<()> {
    /// # let (device, queue) = (trainer.gpu().device().clone(), trainer.gpu().queue().clone());
    /// let profile = trainer.profile_blocking(batches)?; // once; a step like others
    /// let slices = trainer.slices(&profile, std::time::Duration::from_micros(500))?;
    /// let mut step = trainer.start_sliced(&slices, batches)?;
    /// loop {
    ///     // A frame: your passes and one slice, in one submit.
    ///     let mut encoder = device.create_command_encoder(&Default::default());
    ///     if let Some(loss) = trainer.record_slice(&mut encoder, &mut step)? {
    ///         step = trainer.start_sliced(&slices, batches)?;
    ///         # drop(loss);
    ///     }
    ///     queue.submit([encoder.finish()]);
    ///     # break;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_sliced(&self, slices: &StepSlices, batches: &[Batch]) -> Result<SlicedStep> {
        let weights = self.check(batches)?;
        let (slices, batches) = (slices.clone(), batches.to_vec());
        let fates = vec![];
        Ok(SlicedStep { slices, batches, weights, step: self.step_count(), micro_batch: 0, next: 0, fates })
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
        let count = self.step_count();
        if step.step < count {
            let expected = format!("slices of step {count}");
            return Err(Error::data("sliced step", expected, format!("one of step {}", step.step)));
        }
        if step.step > count || step.is_lost() {
            (step.step, step.micro_batch, step.next) = (count, 0, 0);
            step.fates.clear();
        }
        step.fates.retain(|fate| !fate.is_done());
        step.fates.push(Fate::of(encoder));
        if step.micro_batch == self.config.micro_batches {
            return self.update(encoder).map(Some);
        }
        if step.next == 0 {
            if step.micro_batch == 0 {
                self.clear(encoder)?;
            }
            self.load(encoder, &step.batches[step.micro_batch], step.weights[step.micro_batch])?;
        }
        self.forward_backward.exec.record_slice(encoder, &step.slices.passes[step.next])?;
        step.next += 1;
        if step.next == step.slices.passes.len() {
            step.micro_batch += 1;
            // The update follows the last micro-batch.
            step.next = if step.micro_batch == self.config.micro_batches { step.next } else { 0 };
        }
        Ok(None)
    }
}
