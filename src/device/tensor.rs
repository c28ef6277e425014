//! Tensors in GPU memory.

use super::gpu::{Gpu, TENSOR_USAGES};
use super::readback::{self, Readback};
use crate::error::{Error, Result};
use crate::tensor::{Element, TensorType};

/// A tensor in GPU memory: a typed range of a buffer. Cloning clones the handle, not the data.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: wgpu::Buffer,
    offset: u64,
    ty: TensorType,
}

impl Tensor {
    /// What the buffer of a tensor must be usable for.
    pub const USAGES: wgpu::BufferUsages = TENSOR_USAGES;

    /// A zeroed tensor in a buffer of its own.
    pub fn zeros(gpu: &Gpu, label: &str, ty: TensorType) -> Result<Tensor> {
        let buffer = gpu.storage_buffer(label, ty.storage_bytes() as u64)?;
        Ok(Tensor { buffer, offset: 0, ty })
    }

    /// A range of a buffer that the caller owns. The buffer needs [`USAGES`](Self::USAGES); `offset` must be a multiple of 256 and the range must hold
    /// [`TensorType::storage_bytes`].
    pub fn from_buffer(buffer: wgpu::Buffer, offset: u64, ty: TensorType) -> Result<Tensor> {
        let err = |expected: String, got: String| Error::data("buffer range", expected, got);
        if let Some(problem) = ty.shape.problem() {
            return Err(err("a shape with elements".into(), problem));
        }
        ty.shape.check_len("buffer range")?;
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
        readback::upload(gpu, encoder, &self.buffer, self.offset, bytemuck::cast_slice(data))
    }

    fn expect<T: Element>(&self, data: &[T]) -> Result<()> {
        match T::DTYPE == self.ty.dtype && data.len() == self.ty.len() {
            true => Ok(()),
            false => Err(Error::data(
                &self.ty,
                format!("{} elements of {}", self.ty.len(), self.ty.dtype),
                format!("{} elements of {}", data.len(), T::DTYPE),
            )),
        }
    }

    /// Records a copy of the elements into `encoder`, to be read once that has been submitted.
    pub fn record_read(&self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder) -> Readback {
        Readback::record(gpu, encoder, (&self.buffer, self.offset), self.ty.clone())
    }

    /// Reads all elements as they are behind everything submitted so far.
    /// Resolves once the device has been polled; outside of frames, use [`read_blocking`](Self::read_blocking).
    pub async fn read<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let readback = self.record_read(gpu, &mut encoder);
        gpu.submit(encoder)?;
        readback.take().await
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        gpu.run_blocking(self.read(gpu))
    }
}
