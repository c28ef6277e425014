//! Settings and state of dynamic loss scaling.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::loss_scale::{LossScale, SCALE, is_power_of_two, is_scale};

/// Settings of dynamic loss scaling (Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>), which keeps small
/// gradients from vanishing in 16 bits.
///
/// f16 has no numbers below 6e-8, and gradients of activations often are. The gradient of the loss times a scale is the
/// gradient times that scale; it comes through backward in numbers that f16 has, and the update divides it again. The
/// best scale is the largest that overflows nowhere, and changes while a model learns. So the device looks for it: a
/// step whose gradient is not finite changes no parameter and no moment, only the scale, which then is
/// [`backoff`](Self::backoff) times as large; after so many finite steps in a row it is [`growth`](Self::growth) times
/// as large. The host is not asked, and nothing waits.
///
/// Skipped steps do not count for the learning rate's schedule or for AdamW's bias corrections, which the device
/// evaluates itself. A few skipped steps in the beginning, and one every few thousand later, are as they should be. If
/// most are skipped, the model has diverged, or the scale has come down to [`least`](Self::least).
///
/// Use it for gradients in 16 bits. In f32 it changes nothing but the last digits of rates, for two or three small
/// dispatches. The defaults are PyTorch's, with bounds.
///
/// ```
/// use throughline::optim::LossScaling;
/// use throughline::train::GraphTrainConfig;
/// let scaling = LossScaling { initial: 1024.0, ..LossScaling::default() };
/// let config = GraphTrainConfig { loss_scaling: Some(scaling), ..GraphTrainConfig::adamw(1e-3) };
/// config.validate()?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LossScaling {
    /// The first scale. All scales and factors are powers of two, so that scaling changes no digit of a gradient.
    pub initial: f64,
    /// Factor of the scale after [`growth_interval`](Self::growth_interval) finite steps in a row, from 1 to 2^16.
    pub growth: f64,
    /// Factor of the scale after a step that overflowed, from 2^-16 to 1/2.
    pub backoff: f64,
    /// Number of finite steps in a row after which the scale grows, at least 1.
    pub growth_interval: u32,
    /// The scale shrinks no further than this, at least 2^-100.
    pub least: f64,
    /// The scale grows no further than this, at most 2^100.
    pub largest: f64,
}

impl Default for LossScaling {
    fn default() -> Self {
        LossScaling {
            initial: 65_536.0,
            growth: 2.0,
            backoff: 0.5,
            growth_interval: 2000,
            least: 1.0,
            largest: 16_777_216.0,
        }
    }
}

impl LossScaling {
    /// Checks the settings. The error names the first field with an impossible value. Plans, optimisers and trainers
    /// call this themselves.
    pub fn validate(&self) -> Result<()> {
        let LossScaling { initial, growth, backoff, growth_interval, least, largest } = *self;
        Error::unless(is_scale(least), "loss_scaling.least", SCALE, least)?;
        Error::unless(is_scale(largest), "loss_scaling.largest", SCALE, largest)?;
        let wanted = format!("at least `loss_scaling.least`, {least}");
        Error::unless(largest >= least, "loss_scaling.largest", &wanted, largest)?;
        self.check_scale("loss_scaling.initial", initial)?;
        let grows = is_power_of_two(growth, 0..=16);
        Error::unless(grows, "loss_scaling.growth", "a power of two from 1 to 2^16", growth)?;
        let shrinks = is_power_of_two(backoff, -16..=-1);
        Error::unless(shrinks, "loss_scaling.backoff", "a power of two from 2^-16 to 1/2", backoff)?;
        Error::unless(growth_interval > 0, "loss_scaling.growth_interval", "at least 1", growth_interval)
    }

    /// Checks a scale for a run with these settings.
    pub(super) fn check_scale(&self, field: &'static str, scale: f64) -> Result<()> {
        let wanted = format!("a power of two from {} to {}", self.least, self.largest);
        Error::unless(is_scale(scale) && (self.least..=self.largest).contains(&scale), field, &wanted, scale)
    }

    /// The state of a run that begins after so many steps.
    pub(crate) fn state_at(&self, applied: u64) -> LossScaleState {
        LossScaleState { scale: self.initial as f32, finite: 0, applied: count(applied), skipped: 0 }
    }

    /// A state that other settings have led to, with a scale that these allow.
    pub(crate) fn bounded(&self, state: &LossScaleState) -> LossScaleState {
        LossScaleState { scale: state.scale.clamp(self.least as f32, self.largest as f32), ..*state }
    }

    /// The op of an update that clips to this norm.
    pub(super) fn op(&self, max_grad_norm: f64) -> LossScale {
        let [growth, backoff, least, largest, max_grad_norm] =
            [self.growth, self.backoff, self.least, self.largest, max_grad_norm].map(|x| x as f32);
        LossScale { growth, backoff, interval: self.growth_interval, least, largest, max_grad_norm }
    }
}

/// A number of steps as the device counts them.
pub(super) fn count(steps: u64) -> u32 {
    u32::try_from(steps).unwrap_or(u32::MAX)
}

/// What [`LossScaling`] has come to: part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaleState {
    /// The scale of the next step.
    pub scale: f32,
    /// Number of finite steps in a row since the scale last changed, or would have but for its bounds.
    pub finite: u32,
    /// Number of steps that were applied: the position in the schedule.
    pub applied: u32,
    /// Number of steps that were skipped.
    pub skipped: u32,
}

impl LossScaleState {
    /// Checks what a file says of a run with these settings.
    pub(crate) fn check(state: Option<&Self>, settings: Option<&LossScaling>) -> Result<()> {
        match (state, settings) {
            (Some(state), Some(settings)) => settings.check_scale("loss_scale.scale", state.scale.into()),
            (Some(_), None) => Err(Error::config("loss_scale", "is there, but the settings have no `loss_scaling`")),
            (None, Some(_)) => Err(Error::config("loss_scale", "is missing, but the settings have `loss_scaling`")),
            (None, None) => Ok(()),
        }
    }
}
