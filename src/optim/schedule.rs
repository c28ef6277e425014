//! Learning rates by step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
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

/// Learning rate by step: a linear warm-up, then a decay. A number is the [same rate](Self::constant) at every step.
///
/// Large models need a warm-up; [`constant`](Self::constant) suffices for small experiments, and
/// [`cosine`](Self::cosine) ends at a lower loss.
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

    /// A linear warm-up to `peak`, then half a cosine down to 0 at step `steps`: for a run of known length.
    ///
    /// ```
    /// let s = throughline::optim::Schedule::cosine(1e-2, 10, 110);
    /// assert_eq!([0, 9, 60, 110].map(|step| s.at(step) as f32), [1e-3, 1e-2, 5e-3, 0.0]);
    /// ```
    pub fn cosine(peak: f64, warmup: u64, steps: u64) -> Self {
        Schedule { peak, warmup, steps, final_fraction: 0.0, decay: Decay::Cosine }
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

    /// What [`Scheduled`](crate::ops::schedule::Scheduled) reads.
    pub(super) fn values(&self) -> [f32; 5] {
        let kind = match self.decay {
            Decay::Constant => 0.0,
            Decay::Cosine => 1.0,
            Decay::Linear => 2.0,
        };
        [self.peak as f32, self.warmup as f32, self.steps as f32, self.final_fraction as f32, kind]
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

impl From<f64> for Schedule {
    fn from(lr: f64) -> Self {
        Schedule::constant(lr)
    }
}
