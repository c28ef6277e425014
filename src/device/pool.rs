//! Staging buffers, used again and again.

use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of unused staging buffers that are kept for the next readback.
const KEPT_BYTES: u64 = 16 << 20;

/// Least bytes of a staging buffer for writes: about what a step of a small model is told.
const UPLOAD_BYTES: u64 = 4 << 10;

/// The staging buffers of a device.
#[derive(Debug)]
pub(super) struct Staging {
    pub uploads: Mutex<wgpu::util::StagingBelt>,
    pub readbacks: Arc<Mutex<Pool>>,
}

/// Buffers that nobody uses, the one that was used last at the end.
#[derive(Debug, Default)]
pub(super) struct Pool(Vec<wgpu::Buffer>);

impl Pool {
    pub fn take(&mut self, size: u64) -> Option<wgpu::Buffer> {
        let i = self.0.iter().rposition(|buffer| buffer.size() == size)?;
        Some(self.0.remove(i))
    }

    /// Takes a mapped buffer back.
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

/// Gives a mapped buffer back, if the device is still of interest to anybody.
pub(super) fn put(pool: &Weak<Mutex<Pool>>, buffer: wgpu::Buffer) {
    if let Some(pool) = pool.upgrade() {
        lock(&pool).put(buffer);
    }
}
