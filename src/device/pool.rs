//! Staging buffers, recycled.

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
        Staging { uploads, readbacks: Arc::default() }
    }
}

/// Puts a mapped buffer back, if the device is still in use.
pub(super) fn put(pool: &Weak<Mutex<Pool>>, buffer: wgpu::Buffer) {
    if let Some(pool) = pool.upgrade() {
        lock(&pool).put(buffer);
    }
}
