//! Waiting for the GPU, on threads that have nothing else to do.
//!
//! A wait ends by what is known: the queue is done, the data are there, the encoder was dropped, the device is lost. One
//! thing is not known: whether somebody who keeps an encoder will submit it. There a clock decides, which starts anew
//! whenever something happens.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::gpu::Gpu;
use crate::error::Result;

/// A thread that waits for another one sleeps this long before it looks again, unless it is woken.
const PAUSE: Duration = Duration::from_millis(1);
/// A thread gives up after so many looks in vain, for so long. On a busy machine, other threads may get no turn for a
/// second, and then nor does this one: so time alone does not decide.
const LOOKS: u32 = 200;
const PATIENCE: Duration = Duration::from_secs(1);
/// Every so many looks a thread asks whether the device is lost.
const LOST_EVERY: u32 = 50;
/// A look that takes longer was held up by something that happens on the device. Drivers that compile hold locks.
const SLOW: Duration = Duration::from_millis(100);

impl Gpu {
    /// Waits until everything submitted so far has finished.
    pub fn wait_blocking(&self) -> Result<()> {
        self.wait(None)
    }

    /// Waits until this submission, and those before it, have finished.
    pub fn wait_for_blocking(&self, submission: wgpu::SubmissionIndex) -> Result<()> {
        self.wait(Some(submission))
    }

    fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let mut vain = Vain::new();
        loop {
            let start = Instant::now();
            match self.poll(wgpu::PollType::Wait { submission_index: submission_index.clone(), timeout: None })? {
                Some(_) => return Ok(()),
                // Waits without a limit have one on some devices: two seconds on OpenGL.
                None if !vain.over(start.elapsed()) => std::thread::sleep(PAUSE),
                None => return Err(self.error("the driver says that the GPU is done, and that it is not")),
            }
        }
    }

    /// Polls the device. `None` if the time for waiting is over.
    fn poll(&self, poll: wgpu::PollType) -> Result<Option<wgpu::PollStatus>> {
        match self.device().poll(poll) {
            Ok(status) => Ok(Some(status)),
            Err(wgpu::PollError::Timeout) => Ok(None),
            Err(e) => Err(self.error(format!("waiting for the GPU: {e}"))),
        }
    }

    /// Runs a future of this crate to completion, polling the device while it waits: the blocking form of every `async`
    /// function here. Only for futures that wait for this device alone.
    ///
    /// # Errors
    ///
    /// That of the future. Also if the device is lost, or if nothing has happened on it for a second and the future
    /// still waits: then what it waits for is in an encoder that was never submitted. What was submitted by
    /// [`submit`](Self::submit) is waited for as long as it takes, and an encoder that was dropped is an error at once.
    ///
    /// ```
    /// use throughline::{Gpu, Tensor, TensorType};
    /// let gpu = Gpu::headless_blocking()?;
    /// let x = Tensor::zeros(&gpu, "x", TensorType::f32([3]))?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// let readback = x.record_read(&gpu, &mut encoder);
    /// gpu.submit(encoder)?;
    /// assert_eq!(gpu.run_blocking(readback.take::<f32>())?, [0.0; 3]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn run_blocking<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        let mut future = std::pin::pin!(future);
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let (mut vain, mut looks) = (Vain::new(), 0);
        loop {
            let start = Instant::now();
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            // This may complete what the future waits for, so the future comes before any decision.
            let idle = self.poll(wgpu::PollType::Poll)?.is_some_and(|status| status.is_queue_empty());
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            if !idle {
                // Without a limit: where a wait ends before the work does, wgpu 30 panics if another thread's poll then
                // finds the queue empty (gfx-rs/wgpu#9958).
                self.poll(wgpu::PollType::wait_indefinitely())?;
                vain = Vain::new();
                continue;
            }
            looks += 1;
            if looks % LOST_EVERY == 0 && self.is_lost() {
                return Err(self.error("what is waited for did not come"));
            }
            if self.is_at_work() {
                // Another thread has it, or is busy with the device and may submit it next.
                vain = Vain::new();
            } else if vain.over(start.elapsed()) {
                return Err(self.error("the GPU is idle: was the encoder that records what is waited for submitted?"));
            }
            std::thread::park_timeout(PAUSE);
        }
    }
}

/// How long, and how often, a thread has looked in vain.
struct Vain {
    since: Instant,
    looks: u32,
}

impl Vain {
    fn new() -> Vain {
        Vain { since: Instant::now(), looks: 0 }
    }

    /// Counts a look that took this long. Whether it is time to give up.
    fn over(&mut self, look: Duration) -> bool {
        if look > SLOW {
            *self = Vain::new();
        }
        self.looks += 1;
        self.looks > LOOKS && self.since.elapsed() > PATIENCE
    }
}

/// Wakes a thread that waits.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
