//! Shapes, types and tensors in GPU memory.
//!
//! Storage contract: a tensor's storage is a whole number of 16-byte quads, so that elementwise
//! kernels may process `vec4`s without a tail. What the padding behind the last element holds is
//! unspecified; reductions must not read it.

use std::fmt;

use crate::error::{Error, Result};

/// Element type of a tensor. Both take four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 32-bit unsigned integer: token ids, seeds.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        4
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::U32 => "u32",
        })
    }
}

/// Dimensions, row-major: the last one is contiguous.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// A shape of these dimensions. A scalar is `[1]`.
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

    /// Number of elements. Checked not to overflow when a graph takes the shape.
    pub fn len(&self) -> usize {
        self.0.iter().product()
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the last dimension; 1 for rank 0.
    pub fn cols(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.0.split_last().map_or(1, |(_, lead)| lead.iter().product())
    }

    /// All dimensions but the last.
    pub fn lead(&self) -> &[usize] {
        self.0.split_last().map_or(&[], |(_, lead)| lead)
    }

    /// The same leading dimensions with another last one.
    pub fn with_cols(&self, cols: usize) -> Shape {
        let mut dims = self.lead().to_vec();
        dims.push(cols);
        Shape(dims)
    }

    /// Why this shape cannot be a tensor, if it cannot.
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

/// Shape and element type.
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

    /// A u32 tensor of this shape.
    pub fn u32(shape: impl Into<Shape>) -> Self {
        TensorType { shape: shape.into(), dtype: DType::U32 }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.is_empty()
    }

    /// Bytes of the elements, without padding.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Bytes of storage: [`bytes`](Self::bytes) rounded up to whole quads of 16.
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

/// Host types that tensors are read into and written from.
pub trait Element: bytemuck::Pod {
    /// The tensor element type that this is.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// Rows of each part of a matrix, as few parts as do with at most `max_bytes` each, which a device gives as
/// [`Profile::max_tensor_bytes`](crate::Profile::max_tensor_bytes). Parts are about as large as each other,
/// and but for the last of a multiple of 64 rows where that many fit, so that kernels can load quads.
///
/// ```
/// use throughline::tensor::split_rows;
/// assert_eq!(split_rows(49_152, 4 * 576, 128 << 20)?, [49_152]);
/// assert_eq!(split_rows(50_257, 4 * 768, 128 << 20)?, [25_152, 25_105]);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn split_rows(rows: usize, row_bytes: usize, max_bytes: u64) -> Result<Vec<usize>> {
    // Storage comes in quads of 16 bytes.
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
