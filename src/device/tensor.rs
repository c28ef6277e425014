//! Tensors in GPU memory.

use std::borrow::Cow;
use std::fmt::Display;

use super::gpu::{Gpu, Home, TENSOR_USAGES};
use super::readback::{self, Readback};
use crate::error::{Error, Result};
use crate::tensor::{Element, TensorType};

/// A tensor in GPU memory: a typed range of a buffer. Cloning clones the handle, not the data.
///
/// Make one from a buffer of your own with [`from_buffer`](Self::from_buffer), to let a network read or write it
/// without a copy; pass it to [`ExecOptions::bindings`](crate::ExecOptions::bindings).
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: wgpu::Buffer,
    offset: u64,
    ty: TensorType,
    /// `None` for a buffer of the caller's: wgpu does not tell which device a buffer belongs to.
    home: Option<Home>,
}

impl Tensor {
    /// Usages that the buffer of a tensor must have.
    pub const USAGES: wgpu::BufferUsages = TENSOR_USAGES;

    /// A zeroed tensor in a buffer of its own.
    pub fn zeros(gpu: &Gpu, label: &str, ty: TensorType) -> Result<Tensor> {
        let buffer = gpu.storage_buffer(label, ty.storage_bytes() as u64)?;
        Ok(Tensor { buffer, offset: 0, ty, home: Some(gpu.home()) })
    }

    /// A range of a buffer that the caller owns.
    ///
    /// # Errors
    ///
    /// The buffer needs [`USAGES`](Self::USAGES), `offset` must be a multiple of 256, and the range must hold
    /// [`TensorType::storage_bytes`].
    pub fn from_buffer(buffer: wgpu::Buffer, offset: u64, ty: TensorType) -> Result<Tensor> {
        let err = |expected: String, got: String| Error::data("buffer range", expected, got);
        if let Some(problem) = ty.shape.problem() {
            return Err(err("a shape with elements".into(), problem));
        }
        ty.shape.check_len("buffer range")?;
        if !buffer.usage().contains(Self::USAGES) {
            let expected = format!("usages {:?}, see `Tensor::USAGES`", Self::USAGES);
            return Err(err(expected, format!("{:?}", buffer.usage())));
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
        Ok(Tensor { buffer, offset, ty, home: None })
    }

    /// A range of a buffer of this device.
    pub(super) fn on(gpu: &Gpu, buffer: wgpu::Buffer, offset: u64, ty: TensorType) -> Result<Tensor> {
        Ok(Tensor { home: Some(gpu.home()), ..Self::from_buffer(buffer, offset, ty)? })
    }

    /// Another range of this tensor's buffer.
    pub(crate) fn range(&self, offset: u64, ty: TensorType) -> Result<Tensor> {
        Ok(Tensor { home: self.home.clone(), ..Self::from_buffer(self.buffer.clone(), offset, ty)? })
    }

    /// Returns an error with the tensor's name if it is known to belong to another device.
    pub(super) fn check_device(&self, gpu: &Gpu, name: impl Display) -> Result<()> {
        match &self.home {
            Some(home) if !gpu.is_home(home) => {
                let device = gpu.describe();
                Err(Error::Device(format!("tensor `{name}` is of another device than this one, on {device}")))
            }
            _ => Ok(()),
        }
    }

    /// Shape and element type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// The buffer that holds the elements.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Offset of the first element in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Queues a write of all elements, to happen before the next submit. Does not wait.
    pub fn write<T: Element>(&self, gpu: &Gpu, data: &[T]) -> Result<()> {
        self.expect(gpu, data)?;
        gpu.write(&self.buffer, self.offset, &words(data))
    }

    /// Records a write of all elements into `encoder`: what is recorded after it sees the new data. The bytes go
    /// through recycled staging buffers, so repeated writes allocate nothing.
    pub fn record_write<T: Element>(&self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder, data: &[T]) -> Result<()> {
        self.expect(gpu, data)?;
        readback::upload(gpu, encoder, &self.buffer, self.offset, &words(data))
    }

    fn expect<T: Element>(&self, gpu: &Gpu, data: &[T]) -> Result<()> {
        self.check_device(gpu, &self.ty)?;
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
        let from = self.check_device(gpu, &self.ty).map(|()| (&self.buffer, self.offset));
        Readback::record(gpu, encoder, from, self.ty.clone())
    }

    /// Reads all elements as they are after everything submitted so far.
    /// Resolves once the device has been polled; outside of frames, use [`read_blocking`](Self::read_blocking).
    pub async fn read<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        let mut encoder = gpu.encoder("read");
        let readback = self.record_read(gpu, &mut encoder);
        gpu.submit(encoder)?;
        readback.take().await
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking<T: Element>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        gpu.run_blocking(self.read(gpu))
    }
}

/// The bytes of elements, filled up to whole words, which is what can be copied.
pub(super) fn words<T: Element>(data: &[T]) -> Cow<'_, [u8]> {
    let bytes: &[u8] = bytemuck::cast_slice(data);
    match bytes.len() % 4 {
        0 => Cow::Borrowed(bytes),
        rest => Cow::Owned([bytes, &[0; 4][rest..]].concat()),
    }
}
