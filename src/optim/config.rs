//! Which optimiser, and its settings.

use serde::{Deserialize, Serialize};

use super::muon::MuonConfig;
use crate::error::{Error, Result};
use crate::ops::adamw::{AdamW, AdamWSettings, check_adamw};
use crate::ops::sgd::{Sgd, check_sgd};

/// The optimiser of a run and its settings. [`AdamWConfig`] and [`SgdConfig`] convert into it.
///
/// AdamW is the safe choice. Muon often needs fewer steps for models with large matrices, at more work per step. SGD
/// takes the least memory: one moment with momentum, none without.
///
/// ```
/// use throughline::optim::{AdamWConfig, MuonConfig, OptimizerConfig, SgdConfig};
/// let adamw = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
/// let optimizers: [OptimizerConfig; 3] = [
///     adamw.into(),
///     OptimizerConfig::Muon { muon: MuonConfig::default(), adamw },
///     SgdConfig { momentum: 0.9, ..SgdConfig::default() }.into(),
/// ];
/// for optimizer in optimizers {
///     optimizer.validate()?;
/// }
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// AdamW for everything.
    #[serde(rename = "adamw")]
    AdamW(AdamWConfig),
    /// Muon for the matrices that the arenas' layout sets apart for it, AdamW for the rest. The norm that gradients are
    /// clipped to is AdamW's setting.
    Muon {
        /// Settings of Muon.
        muon: MuonConfig,
        /// Settings of AdamW.
        adamw: AdamWConfig,
    },
    /// Gradient descent, with momentum or without, for everything.
    Sgd(SgdConfig),
}

impl OptimizerConfig {
    /// Checks the settings. The error names the first field with an impossible value. Plans, optimisers and trainers
    /// call this themselves.
    pub fn validate(&self) -> Result<()> {
        self.check_at(0.0)
    }

    /// The same at the highest learning rate of a run.
    pub(crate) fn check_at(&self, lr: f64) -> Result<()> {
        match self {
            OptimizerConfig::AdamW(adamw) => adamw.check_at(lr),
            OptimizerConfig::Muon { muon, adamw } => {
                adamw.check_at(lr)?;
                muon.validate()?;
                muon.check_at(lr, adamw.max_grad_norm)
            }
            OptimizerConfig::Sgd(sgd) => sgd.check_at(lr),
        }
    }

    /// Muon's settings, if it is used.
    pub(crate) fn muon(&self) -> Option<&MuonConfig> {
        match self {
            OptimizerConfig::Muon { muon, .. } => Some(muon),
            _ => None,
        }
    }

    /// Largest global norm of the gradient; 0 turns clipping off.
    pub(super) fn max_grad_norm(&self) -> f64 {
        match self {
            OptimizerConfig::AdamW(adamw) | OptimizerConfig::Muon { adamw, .. } => adamw.max_grad_norm,
            OptimizerConfig::Sgd(sgd) => sgd.max_grad_norm,
        }
    }

    /// Storage buffers that the update of a part binds. (Muon's own kernels bind no more than AdamW.)
    pub(crate) fn buffers(&self) -> usize {
        match self {
            OptimizerConfig::AdamW(_) | OptimizerConfig::Muon { .. } => AdamW::BUFFERS,
            OptimizerConfig::Sgd(_) => Sgd::BUFFERS,
        }
    }
}

impl Default for OptimizerConfig {
    /// AdamW with its default settings.
    fn default() -> Self {
        AdamWConfig::default().into()
    }
}

impl From<AdamWConfig> for OptimizerConfig {
    fn from(config: AdamWConfig) -> Self {
        OptimizerConfig::AdamW(config)
    }
}

impl From<SgdConfig> for OptimizerConfig {
    fn from(config: SgdConfig) -> Self {
        OptimizerConfig::Sgd(config)
    }
}

/// Settings of AdamW and of gradient clipping.
///
/// The default is a good start for transformers; change `weight_decay` and the [`Schedule`](super::Schedule) first.
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

    /// The values that kernels read in a step, counted from 0.
    pub(super) fn at(&self, lr: f64, step: u64) -> Result<[f32; 8]> {
        self.check_at(lr)?;
        let [lr, beta1, beta2, eps, weight_decay, max_grad_norm] =
            [lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.max_grad_norm].map(|x| x as f32);
        let settings = AdamWSettings { lr, beta1, beta2, eps, weight_decay, max_grad_norm };
        Ok(settings.values(step.saturating_add(1)))
    }

    /// The logarithms of the betas as rounded to f32, which the kernels average with. They stand for the bias
    /// corrections where [`Scheduled`](crate::ops::schedule::Scheduled) computes these.
    pub(super) fn log_betas(&self) -> [f32; 2] {
        [self.beta1, self.beta2].map(|beta| f64::from(beta as f32).ln().max(-200.0) as f32)
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 }
    }
}

/// Settings of stochastic gradient descent and of gradient clipping. [`ops::sgd`](crate::ops::sgd) has the formula,
/// which is PyTorch's.
///
/// The default is plain gradient descent: no momentum, no weight decay, no clipping. 0.9 is a usual momentum; it makes
/// steps up to 10 times as long, so lower the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SgdConfig {
    /// What remains of the velocity in each step, in `[0, 1)`. With 0 there is no velocity, and no memory for it.
    pub momentum: f64,
    /// Whether the newest gradient counts once more (Nesterov momentum). Needs a momentum.
    pub nesterov: bool,
    /// Weight decay, applied to tensors of two or more dimensions. Each step adds it times the weight to the gradient;
    /// times the learning rate, it must be at most 1.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 turns clipping off.
    pub max_grad_norm: f64,
}

impl SgdConfig {
    /// Checks the settings. The error names the first field with an impossible value. Plans, optimisers and trainers
    /// call this themselves.
    pub fn validate(&self) -> Result<()> {
        self.check_at(0.0)
    }

    /// The same at the highest learning rate of a run.
    pub(crate) fn check_at(&self, lr: f64) -> Result<()> {
        check_sgd([lr, self.momentum, self.weight_decay, self.max_grad_norm])?;
        Error::unless(!self.nesterov || self.momentum > 0.0, "nesterov", "false without a momentum", self.nesterov)
    }

    /// The values that kernels read in a step.
    pub(super) fn values(&self, lr: f64) -> Result<[f32; 4]> {
        self.check_at(lr)?;
        Ok([lr, self.momentum, self.weight_decay, self.max_grad_norm].map(|x| x as f32))
    }
}
