//! The loss of a step, on its way to the host.

use crate::device::Readback;
use crate::error::Result;

/// The loss of a submitted step, to be read when convenient.
///
/// It is NaN or infinite if training has diverged, and stays so. Look at it now and then, stop, and continue from a
/// checkpoint at a lower learning rate. With [loss scaling](crate::optim::LossScaling), a diverged run skips every step:
/// [`report`](Self::report) tells.
#[derive(Debug)]
pub struct StepLoss {
    /// The step that this is the loss of.
    pub step: u64,
    /// The number of submits that the step was cut into: see
    /// [`GraphTrainer::set_submit_time`](crate::train::GraphTrainer::set_submit_time).
    pub submits: usize,
    pub(super) readback: Readback,
    /// With loss scaling, the [outcome](crate::optim::Optimizer::outcome) of the step.
    pub(super) outcome: Option<Readback>,
    pub(super) submitted: wgpu::SubmissionIndex,
}

/// A step's loss and, with [loss scaling](crate::optim::LossScaling), what became of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The loss, without the scale.
    pub loss: f32,
    /// The scale that the loss was multiplied by; 1 without loss scaling.
    pub loss_scale: f32,
    /// Whether the step changed nothing but the scale, because its gradient was not finite at this one.
    pub skipped: bool,
}

impl StepLoss {
    /// The loss; a [`Trainer`](crate::train::Trainer)'s is in nats per token. Waits for this step, but not for later
    /// ones.
    pub fn wait_blocking(self) -> Result<f32> {
        Ok(self.report_blocking()?.loss)
    }

    /// The loss. Resolves once the device has been polled after the step.
    pub async fn take(self) -> Result<f32> {
        Ok(self.report().await?.loss)
    }

    /// The loss, its scale, and whether the step was skipped. Waits for this step, but not for later ones.
    pub fn report_blocking(self) -> Result<StepReport> {
        let gpu = self.readback.gpu().clone();
        gpu.wait_for_blocking(self.submitted.clone())?;
        gpu.run_blocking(self.report())
    }

    /// The loss, its scale, and whether the step was skipped. Resolves once the device has been polled after the step.
    pub async fn report(self) -> Result<StepReport> {
        let loss = self.readback.take::<f32>().await?[0];
        let outcome = match self.outcome {
            Some(outcome) => outcome.take::<f32>().await?,
            None => vec![],
        };
        Ok(match outcome[..] {
            [_, skipped, loss_scale] => StepReport { loss, loss_scale, skipped: skipped != 0.0 },
            _ => StepReport { loss, loss_scale: 1.0, skipped: false },
        })
    }
}
