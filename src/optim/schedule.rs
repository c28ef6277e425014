//! Learning rates by step, and the settings of AdamW.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::adamw::{AdamWSettings, check_adamw};
use crate::ops::check_lr;

/// How the learning rate decays after the warm-up.
///
/// [`Cosine`](Self::Cosine) is the usual choice for a run of known length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// No decay.
    Constant,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
}

/// Learning rate by step: a linear warm-up, then a decay.
///
/// Large models need a warm-up; [`constant`](Self::constant) suffices for small experiments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest rate, reached at the end of the warm-up; from 0 to 10.
    pub peak: f64,
    /// Steps of warm-up; step 0 has rate `peak / warmup`.
    pub warmup: u64,
    /// Step at which the decay ends, not before the warm-up. Later steps keep the final rate.
    pub steps: u64,
    /// Final rate as a fraction of the peak, from 0 to 1.
    pub final_fraction: f64,
    /// Shape of the decay.
    pub decay: Decay,
}

impl Schedule {
    /// The same rate at every step.
    pub fn constant(lr: f64) -> Self {
        Schedule { peak: lr, warmup: 0, steps: 0, final_fraction: 1.0, decay: Decay::Constant }
    }

    /// The learning rate of a step, counted from 0.
    ///
    /// ```
    /// use throughline::optim::{Decay, Schedule};
    /// let s = Schedule { peak: 1.0, warmup: 10, steps: 110, final_fraction: 0.1, decay: Decay::Cosine };
    /// assert_eq!(s.at(0), 0.1);
    /// assert_eq!(s.at(9), 1.0);
    /// assert!((s.at(60) - 0.55).abs() < 1e-9);
    /// assert!((s.at(500) - 0.1).abs() < 1e-9);
    /// ```
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let t = ((step - self.warmup) as f64 / span).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Cosine => 0.5 * (1.0 + (PI * t).cos()),
            Decay::Linear => 1.0 - t,
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * left)
    }

    /// Checks the settings. The error names the first field with an impossible value. Plans and trainers call it
    /// themselves.
    pub fn validate(&self) -> Result<()> {
        check_lr(self.peak)?;
        let fraction = self.final_fraction;
        Error::unless((0.0..=1.0).contains(&fraction), "schedule.final_fraction", "from 0 to 1", fraction)?;
        let wanted = format!("at least the {} steps of warm-up", self.warmup);
        let decays = self.decay == Decay::Constant || self.steps >= self.warmup;
        Error::unless(decays, "schedule.steps", &wanted, self.steps)
    }
}

/// Settings of AdamW and of gradient clipping.
///
/// The default is a good start for transformers; change `weight_decay` and the [`Schedule`] first.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rate of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay rate of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment for numerical stability; positive, also as f32.
    pub eps: f64,
    /// Decoupled weight decay, applied to tensors of two or more dimensions. Each step subtracts it times the learning
    /// rate times the weight, which must be no more than the whole weight.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 turns clipping off.
    pub max_grad_norm: f64,
}

impl AdamWConfig {
    /// Checks the settings, as PyTorch does and a little stricter: what would make weights that are no numbers, such as
    /// an `eps` that is zero as f32, is an error too. It names the first field with an impossible value. Plans,
    /// optimisers and trainers call this themselves.
    ///
    /// ```
    /// use throughline::optim::AdamWConfig;
    /// let error = AdamWConfig { beta2: 1.0, ..Default::default() }.validate().unwrap_err();
    /// assert_eq!(error.to_string(), "setting `beta2`: must be at least 0 and below 1, as f32 too, but is 1");
    /// ```
    pub fn validate(&self) -> Result<()> {
        self.check_at(0.0)
    }

    /// The same at the highest learning rate of a run.
    pub(crate) fn check_at(&self, lr: f64) -> Result<()> {
        check_adamw([lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.max_grad_norm])
    }

    /// The values that kernels read in a step.
    pub(super) fn settings(&self, lr: f64) -> Result<AdamWSettings> {
        self.check_at(lr)?;
        let [lr, beta1, beta2, eps, weight_decay, max_grad_norm] =
            [lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.max_grad_norm].map(|x| x as f32);
        Ok(AdamWSettings { lr, beta1, beta2, eps, weight_decay, max_grad_norm })
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 }
    }
}
