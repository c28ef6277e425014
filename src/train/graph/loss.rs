//! The loss of a step, on its way to the host.

use crate::device::Readback;
use crate::error::Result;

/// The loss of a submitted step, to be read when convenient.
///
/// It is NaN or infinite if training has diverged, and stays so. Look at it now and then, stop, and continue from a
/// checkpoint at a lower learning rate.
#[derive(Debug)]
pub struct StepLoss {
    /// The step that this is the loss of.
    pub step: u64,
    /// The number of submits that the step was cut into: see
    /// [`GraphTrainer::set_submit_time`](crate::train::GraphTrainer::set_submit_time).
    pub submits: usize,
    pub(super) readback: Readback,
    pub(super) submitted: wgpu::SubmissionIndex,
}

impl StepLoss {
    /// The loss; a [`Trainer`](crate::train::Trainer)'s is in nats per token. Waits for this step, but not for later
    /// ones.
    pub fn wait_blocking(self) -> Result<f32> {
        self.readback.gpu().wait_for_blocking(self.submitted.clone())?;
        Ok(self.readback.wait_blocking::<f32>()?[0])
    }

    /// The loss. Resolves once the device has been polled after the step.
    pub async fn take(self) -> Result<f32> {
        Ok(self.readback.take::<f32>().await?[0])
    }
}
