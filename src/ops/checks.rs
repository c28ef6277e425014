//! Input checks that the ops of the table share.

use crate::tensor::{DType, TensorType};

/// Checks that an op got `n` inputs, all of them f32.
pub(crate) fn expect_f32(inputs: &[TensorType], n: usize) -> Result<(), String> {
    if inputs.len() != n {
        return Err(format!("takes {n} inputs, got {}", inputs.len()));
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
