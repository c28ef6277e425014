//! The flag for the precision of training.

use throughline::{DType, Precision};

/// How training stores what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionFlag {
    /// Everything in f32
    F32,
    /// Activations and their gradients in f16, the residual stream in f32
    Mixed,
    /// The residual stream in f16, too
    MixedStream,
}

impl From<PrecisionFlag> for Precision {
    fn from(flag: PrecisionFlag) -> Precision {
        match flag {
            PrecisionFlag::F32 => Precision::F32,
            PrecisionFlag::Mixed => Precision::MIXED,
            PrecisionFlag::MixedStream => Precision::Mixed { stream: DType::F16 },
        }
    }
}
