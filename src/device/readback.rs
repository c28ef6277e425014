//! Transfers between host memory and the GPU, in both directions.
//!
//! Both use staging buffers that are recorded into the caller's encoder and map themselves when it is submitted. The
//! buffers are recycled: a step that transfers as much as the one before allocates nothing.

use std::sync::{Arc, Mutex, Weak};

use futures_intrusive::channel::shared::{OneshotReceiver, oneshot_channel};

use super::gpu::{Gpu, encoder_id, now};
use super::pool::{Pool, lock, put};
use crate::error::{Error, Result};
use crate::tensor::{Element, TensorType};

/// Records a write of `bytes`, which must be whole words, into a buffer.
pub(crate) fn upload(
    gpu: &Gpu,
    encoder: &mut wgpu::CommandEncoder,
    to: &wgpu::Buffer,
    offset: u64,
    bytes: &[u8],
) -> Result<()> {
    let Some(size) = wgpu::BufferSize::new(bytes.len() as u64) else { return Ok(()) };
    gpu.guarded(|| {
        let mut belt = lock(&gpu.staging().uploads);
        let slice = belt.allocate(size, wgpu::BufferSize::MIN);
        // On a lost device nothing can be mapped.
        let view = slice.get_mapped_range_mut().map_err(|e| gpu.error(format!("staging {size} bytes: {e}")));
        view?.copy_from_slice(bytes);
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), to, offset, Some(size.get()));
        belt.finish_and_recall_on_submit(encoder);
        Ok(())
    })
}

/// A copy of a tensor on its way to the host. Recording it costs one copy; nothing waits until asked to. Submit the
/// encoder, then take the data: without waiting, in whatever executor, or waiting.
///
/// Dropping it is fine at any time.
#[derive(Debug)]
pub struct Readback {
    gpu: Gpu,
    ty: TensorType,
    /// An error if there was no memory for it, or nothing to read.
    staging: Result<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    buffer: wgpu::Buffer,
    pool: Weak<Mutex<Pool>>,
    /// Receives the result once the copy has run and the buffer is mapped.
    mapped: OneshotReceiver<Result<(), wgpu::BufferAsyncError>>,
}

impl Readback {
    pub(crate) fn record(
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        from: Result<(&wgpu::Buffer, u64)>,
        ty: TensorType,
    ) -> Self {
        let record = |from| gpu.guarded(|| Ok(Mapping::record(gpu, encoder, from, ty.word_bytes() as u64)));
        let staging = from.and_then(record);
        Readback { gpu: gpu.clone(), ty, staging }
    }

    /// The data. Resolves once the device has been polled after the copy ran: apps that render do so anyway, since
    /// every submit polls too; others call [`Gpu::wait_blocking`] or [`wait_blocking`](Self::wait_blocking). Needs no
    /// executor of a particular kind. An `Err` if the encoder was dropped instead of submitted.
    pub async fn take<T: Element>(mut self) -> Result<Vec<T>> {
        self.expect::<T>()?;
        let arrived = match &self.staging {
            Ok(mapping) => mapping.mapped.receive().await,
            Err(_) => None,
        };
        self.finish(arrived)
    }

    /// The data if it is there, for loops that ask every frame; `None` if it is not yet. Once it was given, there is
    /// no more: an `Err`.
    ///
    /// ```
    /// # use throughline::{Gpu, Tensor, TensorType};
    /// # let gpu = Gpu::headless_blocking()?;
    /// let x = Tensor::zeros(&gpu, "x", TensorType::f32([3]))?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// let mut readback = x.record_read(&gpu, &mut encoder);
    /// gpu.submit(encoder)?;
    /// let data: Vec<f32> = loop {
    ///     // A frame: its submit polls the device; here is none.
    ///     gpu.device().poll(wgpu::PollType::Poll).unwrap();
    ///     if let Some(data) = readback.try_take()? {
    ///         break data;
    ///     }
    /// };
    /// assert_eq!(data, [0.0; 3]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn try_take<T: Element>(&mut self) -> Result<Option<Vec<T>>> {
        self.expect::<T>()?;
        match &self.staging {
            Ok(mapping) => match now(mapping.mapped.receive()) {
                Some(arrived) => self.finish(arrived).map(Some),
                None => Ok(None),
            },
            Err(_) => self.finish(None).map(Some),
        }
    }

    /// `arrived` is the argument of the map's callback; `None` if it will not be called.
    fn finish<T: Element>(&mut self, arrived: Option<Result<(), wgpu::BufferAsyncError>>) -> Result<Vec<T>> {
        let over = Error::Device(format!("reading {} back: its data was given already", self.ty));
        let mapping = std::mem::replace(&mut self.staging, Err(over))?;
        let failed = |e: String| self.gpu.error(format!("reading {} back: {e}", self.ty));
        match arrived {
            Some(Ok(())) => mapping.copy_out(self.ty.bytes()).map_err(failed),
            Some(Err(e)) => Err(failed(e.to_string())),
            None => Err(failed("the encoder that copies it was not submitted".into())),
        }
    }

    fn expect<T: Element>(&self) -> Result<()> {
        match T::DTYPE == self.ty.dtype {
            true => Ok(()),
            false => Err(Error::data(format_args!("readback of {}", self.ty), self.ty.dtype, T::DTYPE)),
        }
    }

    /// The data, waiting for the GPU that it comes from. An `Err` if nothing comes since the encoder was not submitted:
    /// see [`Gpu::run_blocking`].
    pub fn wait_blocking<T: Element>(self) -> Result<Vec<T>> {
        self.gpu.clone().run_blocking(self.take())
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Mapping {
    fn record(
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        (from, offset): (&wgpu::Buffer, u64),
        size: u64,
    ) -> Mapping {
        let pool = &gpu.staging().readbacks;
        let unused = lock(pool).take(size);
        let buffer = unused.unwrap_or_else(|| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("throughline readback"),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        });
        encoder.copy_buffer_to_buffer(from, offset, &buffer, 0, Some(size));
        let (sender, mapped) = oneshot_channel();
        let (unwanted, pool) = (buffer.clone(), Arc::downgrade(pool));
        let to = pool.clone();
        let arrival = gpu.staging().arriving.recorded(encoder_id(encoder));
        encoder.map_buffer_on_submit(&buffer, wgpu::MapMode::Read, .., move |result| {
            let _arrival = arrival; // until the result is there for whoever waits
            let mapped = result.is_ok();
            // The receiver was dropped: nothing wants the data any more.
            if sender.send(result).is_err() && mapped {
                put(&to, unwanted);
            }
        });
        Mapping { buffer, pool, mapped }
    }

    fn copy_out<T: Element>(&self, bytes: usize) -> Result<Vec<T>, String> {
        let view = self.buffer.get_mapped_range(..).map_err(|e| e.to_string())?;
        // `pod_collect_to_vec` accepts a mapping that is not aligned for T.
        let data = bytemuck::pod_collect_to_vec(&view[..bytes.min(view.len())]);
        drop(view);
        put(&self.pool, self.buffer.clone());
        Ok(data)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The data arrived but was not taken. (After `take` the channel is empty.)
        if let Some(Some(Ok(()))) = now(self.mapped.receive()) {
            put(&self.pool, self.buffer.clone());
        }
    }
}
