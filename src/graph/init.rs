//! The values that parameters start from.

use crate::error::{Error, Result};
use crate::rng::Rng;

/// How a parameter is initialised, given to [`Graph::param_with`](crate::Graph::param_with).
///
/// An [`Executable`](crate::Executable) or a trainer draws the values. They depend only on the seed and on the name of
/// the parameter, so they stay the same if a model is built in another order, on another device.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ParamInit {
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform from minus this bound to the bound.
    Uniform(f32),
    /// The same value everywhere.
    Constant(f32),
}

impl ParamInit {
    /// Zero everywhere: biases.
    pub const ZEROS: ParamInit = ParamInit::Constant(0.0);

    /// One everywhere: the gains of norms.
    pub const ONES: ParamInit = ParamInit::Constant(1.0);

    /// Uniform within `1 / sqrt(fan_in)`, as PyTorch initialises the weights of a layer where each output is a sum over
    /// `fan_in` inputs.
    ///
    /// ```
    /// use throughline::graph::ParamInit;
    /// assert_eq!(ParamInit::fan_in(16), ParamInit::Uniform(0.25));
    /// ```
    pub fn fan_in(fan_in: usize) -> Self {
        ParamInit::Uniform((fan_in.max(1) as f32).sqrt().recip())
    }

    /// Normal with standard deviation `sqrt(2 / fan_in)`: for layers followed by ReLU (He et al. 2015,
    /// <https://arxiv.org/abs/1502.01852>).
    pub fn he(fan_in: usize) -> Self {
        ParamInit::Normal((2.0 / fan_in.max(1) as f32).sqrt())
    }

    /// `n` initial values of the parameter of this name.
    pub fn values(self, n: usize, seed: u64, name: &str) -> Vec<f32> {
        let rng = || {
            let key: Vec<u64> = [seed].into_iter().chain(name.bytes().map(u64::from)).collect();
            Rng::new(&key)
        };
        match self {
            ParamInit::Constant(c) => vec![c; n],
            ParamInit::Normal(std) => {
                let mut rng = rng();
                (0..n).map(|_| (f64::from(std) * rng.normal()) as f32).collect()
            }
            ParamInit::Uniform(bound) => {
                let mut rng = rng();
                (0..n).map(|_| (f64::from(bound) * (2.0 * rng.uniform() - 1.0)) as f32).collect()
            }
        }
    }

    /// Returns an error if it would give numbers that are not finite.
    pub(super) fn check(self, param: &str) -> Result<()> {
        let (ParamInit::Normal(x) | ParamInit::Uniform(x) | ParamInit::Constant(x)) = self;
        match x.is_finite() {
            true => Ok(()),
            false => Err(Error::Graph(format!("`{param}`: its initialisation must be finite, got {self:?}"))),
        }
    }
}
