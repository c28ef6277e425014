//! Shapes and element types.
//!
//! The storage of a tensor is always a whole number of 16-byte quads, so that elementwise kernels can process `vec4`s
//! without a tail. The contents of the padding after the last element are unspecified; reductions must not read it.
//!
//! Tensors in GPU memory are [`Tensor`](crate::Tensor)s.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Element type of a tensor: how it is stored. Kernels compute in f32, whatever the type of floats in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float: half the memory and traffic, 11 bits of precision, and values up to 65504; larger ones become
    /// infinite. Kernels convert it as they load and store, and sum in f32. It needs nothing of a device: without 16-bit
    /// floats in shaders, kernels unpack pairs.
    F16,
    /// 32-bit unsigned integer: token ids, seeds.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 => 2,
        }
    }

    /// Whether it is a float.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16)
    }

    /// The type that kernels compute in.
    pub(crate) const fn computed(self) -> DType {
        match self {
            DType::F32 | DType::F16 => DType::F32,
            DType::U32 => DType::U32,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::U32 => "u32",
        })
    }
}

/// Dimensions, row-major: the last one is contiguous.
///
/// Arrays, slices and vectors convert into it, so most functions accept `[4, 8]` directly.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// A shape with these dimensions. A scalar is `[1]`.
    pub fn new(dims: impl Into<Vec<usize>>) -> Self {
        Shape(dims.into())
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements. Graphs check that it does not overflow.
    pub fn len(&self) -> usize {
        self.0.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the last dimension; 1 for rank 0.
    pub fn cols(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions except the last.
    pub fn rows(&self) -> usize {
        self.0.split_last().map_or(1, |(_, lead)| lead.iter().product())
    }

    /// All dimensions except the last.
    pub fn lead(&self) -> &[usize] {
        self.0.split_last().map_or(&[], |(_, lead)| lead)
    }

    /// The same leading dimensions with another last dimension.
    pub fn with_cols(&self, cols: usize) -> Shape {
        let mut dims = self.lead().to_vec();
        dims.push(cols);
        Shape(dims)
    }

    /// Why this shape cannot be that of a tensor, if it cannot.
    pub(crate) fn problem(&self) -> Option<String> {
        if self.0.is_empty() || self.0.contains(&0) {
            return Some(format!("shape {self} is empty; every dimension must be at least 1"));
        }
        None
    }

    /// An `Err` if this has more elements than a tensor of any device: bytes are counted in a u32.
    pub(crate) fn check_len(&self, name: &str) -> Result<()> {
        let (len, max) = (self.0.iter().fold(1, |n: usize, &d| n.saturating_mul(d)), u32::MAX / 4);
        match len <= max as usize {
            true => Ok(()),
            false => Err(Error::limit(format!("elements of `{name}`, {self}"), len as u64, max.into())),
        }
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Shape(dims.to_vec())
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Shape(dims.to_vec())
    }
}

impl From<Vec<usize>> for Shape {
    fn from(dims: Vec<usize>) -> Self {
        Shape(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Shape and element type of a tensor.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The dimensions.
    pub shape: Shape,
    /// The element type.
    pub dtype: DType,
}

impl TensorType {
    /// An f32 tensor of this shape.
    pub fn f32(shape: impl Into<Shape>) -> Self {
        TensorType { shape: shape.into(), dtype: DType::F32 }
    }

    /// An f16 tensor of this shape.
    pub fn f16(shape: impl Into<Shape>) -> Self {
        TensorType { shape: shape.into(), dtype: DType::F16 }
    }

    /// A u32 tensor of this shape.
    pub fn u32(shape: impl Into<Shape>) -> Self {
        TensorType { shape: shape.into(), dtype: DType::U32 }
    }

    /// The same shape with other elements.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        TensorType { shape: self.shape.clone(), dtype }
    }

    /// As kernels compute with it, however it is stored.
    pub(crate) fn computed(&self) -> Self {
        self.with_dtype(self.dtype.computed())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.shape.is_empty()
    }

    /// Bytes of the elements, without padding.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Bytes of the elements in whole words, as copies have them.
    pub(crate) fn word_bytes(&self) -> usize {
        self.bytes().next_multiple_of(4)
    }

    /// Bytes of storage: [`bytes`](Self::bytes) rounded up to whole quads of 16 bytes.
    pub fn storage_bytes(&self) -> usize {
        self.bytes().next_multiple_of(16)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Host types that tensors can be read into and written from: `f32`, `u32`, and `f16` of the crate
/// [`half`](https://docs.rs/half).
pub trait Element: bytemuck::Pod {
    /// The corresponding element type of tensors.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// Splits the rows of a matrix into as few parts as possible with at most `max_bytes` each, and returns the number of
/// rows of each part.
///
/// Use it with [`Profile::max_tensor_bytes`](crate::Profile::max_tensor_bytes) for tables that a device cannot bind
/// whole. The parts have about the same size. All parts but the last have a multiple of 64 rows, if that many fit, so
/// that kernels can load quads.
/// ```
/// use throughline::tensor::split_rows;
/// assert_eq!(split_rows(49_152, 4 * 576, 128 << 20)?, [49_152]);
/// assert_eq!(split_rows(50_257, 4 * 768, 128 << 20)?, [25_152, 25_105]);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn split_rows(rows: usize, row_bytes: usize, max_bytes: u64) -> Result<Vec<usize>> {
    // Storage is a multiple of 16 bytes.
    let max = usize::try_from(max_bytes).unwrap_or(usize::MAX) / 16 * 16;
    let fit = max / row_bytes.max(1);
    if fit == 0 {
        return Err(Error::limit("bytes of a row in one binding", row_bytes as u64, max_bytes));
    }
    let unit = if fit < 64 { 1 } else { 64 };
    let most = if rows <= fit { rows.max(1) } else { fit / unit * unit };
    let each = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(unit).clamp(1, most);
    Ok((0..rows).step_by(each).map(|start| each.min(rows - start)).collect())
}
