//! Staging buffers, recycled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Unused staging buffers of up to this many bytes are kept for the next readback.
const KEPT_BYTES: u64 = 16 << 20;

/// Smallest staging buffer for writes, in bytes: about the inputs of a small model's step.
const UPLOAD_BYTES: u64 = 4 << 10;

/// The staging buffers of a device.
#[derive(Debug)]
pub(super) struct Staging {
    pub uploads: Mutex<wgpu::util::StagingBelt>,
    pub readbacks: Arc<Mutex<Pool>>,
    pub arriving: Arriving,
}

/// The readbacks on their way, by the encoder that copies them. Knows which of them were submitted, so that nobody
/// stops waiting for these.
#[derive(Clone, Debug, Default)]
pub(super) struct Arriving(Arc<Mutex<HashMap<u64, Copies>>>);

/// The readbacks of an encoder.
#[derive(Debug, Default)]
struct Copies {
    count: usize,
    submitted: bool,
}

/// A readback on its way, until this is dropped.
#[derive(Debug)]
pub(super) struct Arrival {
    encoder: u64,
    arriving: Arriving,
}

impl Arriving {
    /// Notes that a readback was recorded in this encoder.
    pub fn recorded(&self, encoder: u64) -> Arrival {
        lock(&self.0).entry(encoder).or_default().count += 1;
        Arrival { encoder, arriving: self.clone() }
    }

    /// Notes that an encoder was submitted.
    pub fn submitted(&self, encoder: u64) {
        if let Some(copies) = lock(&self.0).get_mut(&encoder) {
            copies.submitted = true;
        }
    }

    /// Whether a readback is sure to arrive.
    pub fn is_any_submitted(&self) -> bool {
        lock(&self.0).values().any(|copies| copies.submitted)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let mut arriving = lock(&self.arriving.0);
        if let Entry::Occupied(mut copies) = arriving.entry(self.encoder) {
            copies.get_mut().count -= 1;
            if copies.get().count == 0 {
                copies.remove();
            }
        }
    }
}

/// Unused buffers, the most recently used one at the end.
#[derive(Debug, Default)]
pub(super) struct Pool(Vec<wgpu::Buffer>);

impl Pool {
    pub fn take(&mut self, size: u64) -> Option<wgpu::Buffer> {
        let i = self.0.iter().rposition(|buffer| buffer.size() == size)?;
        Some(self.0.remove(i))
    }

    /// Puts a mapped buffer back.
    pub fn put(&mut self, buffer: wgpu::Buffer) {
        buffer.unmap();
        self.0.push(buffer);
        let mut kept: u64 = self.0.iter().map(wgpu::Buffer::size).sum();
        while kept > KEPT_BYTES {
            kept -= self.0.remove(0).size();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Staging {
    pub(super) fn new(device: &wgpu::Device) -> Self {
        let uploads = Mutex::new(wgpu::util::StagingBelt::new(device.clone(), UPLOAD_BYTES));
        Staging { uploads, readbacks: Arc::default(), arriving: Arriving::default() }
    }
}

/// Puts a mapped buffer back, if the device is still in use.
pub(super) fn put(pool: &Weak<Mutex<Pool>>, buffer: wgpu::Buffer) {
    if let Some(pool) = pool.upgrade() {
        lock(&pool).put(buffer);
    }
}
