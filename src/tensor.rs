//! Shapes, types and tensors in GPU memory.
//!
//! Storage contract: a tensor's storage is a whole number of 16-byte quads, so that elementwise
//! kernels may process `vec4`s without a tail. What the padding behind the last element holds is
//! unspecified; reductions must not read it.

use std::fmt;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::staging::{self, Readback};

/// Element type of a tensor. Both take four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        let len = self.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        match len {
            Some(n) if n <= u32::MAX as usize / 4 => None,
            _ => Some(format!("shape {self} has more than {} elements", u32::MAX / 4)),
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

/// A tensor in GPU memory: a typed range of a buffer. Cloning clones the handle, not the data.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: wgpu::Buffer,
    offset: u64,
    ty: TensorType,
}

impl Tensor {
    /// What the buffer of a tensor must be usable for.
    pub const USAGES: wgpu::BufferUsages =
        wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

    /// A zeroed tensor in a buffer of its own.
    pub fn zeros(gpu: &Gpu, label: &str, ty: TensorType) -> Result<Tensor> {
        let buffer = gpu.storage_buffer(label, ty.storage_bytes() as u64)?;
        Ok(Tensor { buffer, offset: 0, ty })
    }

    /// A range of a buffer that the caller owns. The buffer needs [`USAGES`](Self::USAGES); `offset` must be a multiple of 256 and the range must hold
    /// [`TensorType::storage_bytes`].
    pub fn from_buffer(buffer: wgpu::Buffer, offset: u64, ty: TensorType) -> Result<Tensor> {
        let err = |expected: String, got: String| Error::Data { tensor: "buffer range".into(), expected, got };
        if let Some(problem) = ty.shape.problem() {
            return Err(err("a shape with elements".into(), problem));
        }
        if !buffer.usage().contains(Self::USAGES) {
            return Err(err(format!("usages {:?}", Self::USAGES), format!("{:?}", buffer.usage())));
        }
        if !offset.is_multiple_of(256) {
            return Err(err("an offset that is a multiple of 256".into(), offset.to_string()));
        }
        let end = offset.checked_add(ty.storage_bytes() as u64);
        if end.is_none_or(|end| end > buffer.size()) {
            return Err(err(
                format!("{} bytes from offset {offset} for {ty}", ty.storage_bytes()),
                format!("a buffer of {} bytes", buffer.size()),
            ));
        }
        Ok(Tensor { buffer, offset, ty })
    }

    /// Shape and element type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// The buffer that holds the elements.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Where in the buffer the first element is, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Queues a write of all elements. The write happens before the next submit; nothing blocks.
    pub fn write<T: Element>(&self, gpu: &Gpu, data: &[T]) -> Result<()> {
        self.expect(data)?;
        gpu.write(&self.buffer, self.offset, bytemuck::cast_slice(data))
    }

    /// Records a write of all elements into `encoder`: it happens between what was recorded before it and what comes
    /// behind. The bytes go through staging buffers that are used again, so that repeated writes allocate nothing.
    pub fn record_write<T: Element>(&self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder, data: &[T]) -> Result<()> {
        self.expect(data)?;
        staging::upload(gpu, encoder, &self.buffer, self.offset, bytemuck::cast_slice(data))
    }

    fn expect<T: Element>(&self, data: &[T]) -> Result<()> {
        match T::DTYPE == self.ty.dtype && data.len() == self.ty.len() {
            true => Ok(()),
            false => Err(Error::Data {
                tensor: self.ty.to_string(),
                expected: format!("{} elements of {}", self.ty.len(), self.ty.dtype),
                got: format!("{} elements of {}", data.len(), T::DTYPE),
            }),
        }
    }

    /// Records a copy of the elements into `encoder`, to be read once that has been submitted.
    pub fn read_later(&self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder) -> Readback {
        Readback::record(gpu, encoder, self)
    }

    /// Reads all elements as they are behind everything submitted so far. Resolves once the device has been polled.
    pub async fn read<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let readback = self.read_later(gpu, &mut encoder);
        gpu.submit(encoder)?;
        readback.take().await
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        gpu.run_blocking(self.read(gpu))
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
