//! Input checks that the ops of the table share.

use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, TensorType};

/// Whether a setting that kernels divide by, or take the root of, keeps that finite. Denormal floats do not, since
/// adapters may take them for zero.
pub(crate) fn is_positive(x: f32) -> bool {
    x > 0.0 && x.is_normal()
}

/// What settings of optimisers must be. They are checked as what the kernels see, f32.
pub(crate) const RATE: &str = "at least 0 and below 1, as f32 too";
pub(crate) const POSITIVE: &str = "finite and at least 1.2e-38, the least normal f32";
pub(crate) const NOT_NEGATIVE: &str = "finite and not negative, as f32 too";

pub(crate) fn is_rate(x: f64) -> bool {
    x >= 0.0 && (x as f32) < 1.0
}

pub(crate) fn is_not_negative(x: f64) -> bool {
    x >= 0.0 && (x as f32).is_finite()
}

/// Largest learning rate. Steps of AdamW and Muon do not grow with the gradient, so that a larger one is a mistake, and
/// soon makes weights that are no numbers.
const MAX_LR: f64 = 10.0;

pub(crate) fn check_lr(lr: f64) -> Result<()> {
    Error::unless((0.0..=MAX_LR).contains(&lr), "lr", &format!("from 0 to {MAX_LR}"), lr)
}

/// Checks what all optimisers take: the learning rate, the weight decay, and the norm to clip to.
pub(crate) fn check_update(lr: f64, (field, decay): (&'static str, f64), max_grad_norm: f64) -> Result<()> {
    check_lr(lr)?;
    Error::unless(is_not_negative(decay), field, NOT_NEGATIVE, decay)?;
    // Beyond twice that, weights would grow with each step.
    let wanted = format!("at most 1 / {lr}, as a step at this learning rate would subtract more than the whole weight");
    Error::unless((lr * decay) as f32 <= 1.0, field, &wanted, decay)?;
    let clips = max_grad_norm == 0.0 || is_positive(max_grad_norm as f32);
    Error::unless(clips, "max_grad_norm", &format!("0, which turns clipping off, or {POSITIVE}"), max_grad_norm)
}

/// Checks that an op got `n` inputs, all of them f32.
pub(crate) fn expect_f32(inputs: &[TensorType], n: usize) -> Result<(), String> {
    if inputs.len() != n {
        let plural = if n == 1 { "" } else { "s" };
        return Err(format!("takes {n} input{plural}, got {}", inputs.len()));
    }
    match inputs.iter().position(|t| t.dtype != DType::F32) {
        Some(i) => Err(format!("input {i} must be f32")),
        None => Ok(()),
    }
}

/// Checks that an input has the expected shape.
pub(crate) fn expect_shape(what: &str, ty: &TensorType, dims: &[usize]) -> Result<(), String> {
    match ty.shape.dims() == dims {
        true => Ok(()),
        false => Err(format!("{what} must have shape {dims:?}, got {}", ty.shape)),
    }
}

/// Checks that an input holds ids.
pub(super) fn expect_ids(ids: &TensorType) -> Result<(), String> {
    match ids.dtype {
        DType::U32 => Ok(()),
        dtype => Err(format!("ids must be u32, got {dtype}")),
    }
}

/// The length of an axis, which must exist.
pub(super) fn expect_axis(shape: &Shape, axis: usize) -> Result<usize, String> {
    let length = shape.dims().get(axis).copied();
    length.ok_or_else(|| format!("{shape} has no axis {axis}: they count from 0, and it has {}", shape.rank()))
}
