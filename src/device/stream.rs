//! Models and checkpoints on their way to the GPU and back: piece by piece, since they may be larger than what is left
//! of the host's memory.

use std::collections::VecDeque;
use std::ops::Range;

use futures_intrusive::channel::shared::{OneshotReceiver, oneshot_channel};

use super::gpu::Gpu;
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::tensor::TensorType;

/// Most bytes that are transferred at a time. Whole words of every type, and of every alignment.
pub(crate) const PIECE_BYTES: usize = 16 << 20;

/// The same in elements of f32.
pub(crate) const PIECE: usize = PIECE_BYTES / 4;

/// `range` in consecutive parts of at most `len`.
pub(crate) fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..end.min(start.saturating_add(len)))
}

/// Writes to tensors, submitted as they come; each waits for those before the last one. Of what was written, no more than two pieces are in host memory.
#[derive(Debug)]
pub(crate) struct Uploads {
    gpu: Gpu,
    /// Bytes written since the last submit.
    queued: usize,
    /// The submits that the GPU may still be at work on.
    submitted: VecDeque<OneshotReceiver<()>>,
}

impl Uploads {
    pub fn new(gpu: &Gpu) -> Self {
        Uploads { gpu: gpu.clone(), queued: 0, submitted: VecDeque::new() }
    }

    /// Writes whole words into a tensor, from this byte of it on.
    pub async fn write(&mut self, tensor: &Tensor, at: usize, bytes: &[u8]) -> Result<()> {
        tensor.check_device(&self.gpu, tensor.ty())?;
        let end = at.checked_add(bytes.len());
        if end.is_none_or(|end| end > tensor.ty().storage_bytes()) {
            let range = format!("{} bytes from byte {at}", bytes.len());
            return Err(Error::data(tensor.ty(), format!("{} bytes at most", tensor.ty().storage_bytes()), range));
        }
        for part in pieces(0..bytes.len(), PIECE_BYTES) {
            let offset = tensor.offset() + (at + part.start) as u64;
            self.queued += part.len();
            self.gpu.write(tensor.buffer(), offset, &bytes[part])?;
            if self.queued >= PIECE_BYTES {
                self.submit()?;
                while self.submitted.len() > 1 {
                    self.wait().await;
                }
            }
        }
        Ok(())
    }

    /// Submits the rest.
    pub fn finish(mut self) -> Result<()> {
        self.submit()
    }

    fn submit(&mut self) -> Result<()> {
        self.queued = 0;
        self.gpu.flush()?;
        let (sender, done) = oneshot_channel();
        self.gpu.queue().on_submitted_work_done(move || drop(sender.send(())));
        self.submitted.push_back(done);
        Ok(())
    }

    /// Waits for the oldest submit. What it wrote has left host memory then.
    async fn wait(&mut self) {
        if let Some(done) = self.submitted.pop_front() {
            done.receive().await;
        }
    }
}

/// Reads some elements of an f32 tensor, which start at a multiple of 64.
pub(crate) async fn read_part(gpu: &Gpu, tensor: &Tensor, elements: Range<usize>) -> Result<Vec<f32>> {
    let ty = TensorType::f32([elements.len()]);
    tensor.range(tensor.offset() + 4 * elements.start as u64, ty)?.read(gpu).await
}
