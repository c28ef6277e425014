//! Keeping what is recorded into frames within a budget, given how long earlier frames took.

use std::collections::VecDeque;
use std::time::Duration;

use super::fate::Fate;
use super::gpu::Gpu;
use super::readback::Readback;
use super::tensor::Tensor;
use super::ticks;
use crate::error::{Error, Result};
use crate::tensor::TensorType;

/// Number of past frames considered.
const FRAMES: usize = 64;
/// The share of these frames that took at most as long as the factor predicts.
const SHARE: f64 = 0.95;
/// Limits of the factor. A profile that is off by more is a profile of something else.
const FACTOR: [f64; 2] = [1.0 / 16.0, 16.0];

/// Corrects time estimates by what frames really took.
///
/// A profile has the times of one run, kernel by kernel, on an otherwise idle GPU. In an application's frames the same
/// kernels take more or less: clocks change, and the application has work of its own. For each frame, a pace returns
/// how much may be recorded *according to the estimates* to stay within the budget. It measures the outcome by
/// timestamps that are read a few frames later, so nothing waits. On a device without `TIMESTAMP_QUERY`, or whose
/// timestamps measure nothing ([`frames`](Self::frames) stays 0), report the times yourself with [`took`](Self::took).
///
/// Use it together with [`Trainer::start_sliced`](crate::train::Trainer::start_sliced),
/// [`Executable::slices`](crate::Executable::slices) or [`FrameDecoder`](crate::decode::FrameDecoder).
///
/// ```no_run
/// # use throughline::train::{Trainer, data::Batch};
/// # fn app(gpu: &throughline::Gpu, trainer: &mut Trainer, batches: &[Batch]) -> throughline::Result<()> {
/// use std::time::Duration;
/// let budget = Duration::from_micros(1500);
/// let profile = trainer.profile_blocking(batches)?;
/// let slices = trainer.slices(&profile, budget / 4)?;
/// let mut step = trainer.start_sliced(&slices, batches)?;
/// let mut pace = throughline::Pace::new(gpu, budget)?;
/// loop {
///     let mut encoder = gpu.device().create_command_encoder(&Default::default());
///     let (may, mut taken) = (pace.begin(&mut encoder)?, Duration::ZERO);
///     while taken + step.next_estimate() <= may || taken.is_zero() {
///         taken += step.next_estimate();
///         if let Some(loss) = trainer.record_slice(&mut encoder, &mut step)? {
///             step = trainer.start_sliced(&slices, batches)?;
///             # drop(loss);
///         }
///     }
///     pace.end(&mut encoder, taken)?;
///     // Your own passes, and:
///     gpu.submit(encoder)?;
///     # break;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pace {
    gpu: Gpu,
    budget: Duration,
    /// `None` without timestamps.
    timer: Option<Timer>,
    /// Times of past frames as multiples of their estimates, the oldest first.
    ratios: VecDeque<f64>,
    /// The encoder of the frame that was begun and has not ended.
    begun: Option<Fate>,
    /// Frames whose timestamps are on their way to the host, the oldest first.
    pending: VecDeque<Frame>,
}

/// A frame that is being measured.
#[derive(Debug)]
struct Frame {
    estimate: Duration,
    /// What became of the encoders in which it began and ended: mostly one encoder.
    begun: Fate,
    ended: Fate,
    ticks: Readback,
}

#[derive(Debug)]
struct Timer {
    queries: wgpu::QuerySet,
    /// u32 `[3, 2]`: begin, begin again, end, the low words first.
    ticks: Tensor,
}

impl Pace {
    /// A pace for a budget of GPU time per frame.
    pub fn new(gpu: &Gpu, budget: Duration) -> Result<Self> {
        let timer = match gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            true => Some(gpu.guarded(|| Timer::new(gpu))?),
            false => None,
        };
        let (ratios, pending) = (VecDeque::new(), VecDeque::new());
        Ok(Pace { gpu: gpu.clone(), budget, timer, ratios, begun: None, pending })
    }

    /// Changes the budget from now on.
    pub fn set_budget(&mut self, budget: Duration) {
        self.budget = budget;
    }

    /// Begins the part of a frame that the budget covers. Returns how much may be recorded, according to the estimates.
    ///
    /// A frame is measured if it begins and ends in encoders that are both submitted. If one is dropped, or
    /// [`end`](Self::end) is not called, nothing is learned from that frame.
    pub fn begin(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<Duration> {
        self.collect()?;
        if let Some(timer) = &self.timer {
            // The quirk `late-timestamps`: a time is taken when the next flush comes, which is that before the next
            // time.
            timer.stamp(encoder, 0);
            timer.stamp(encoder, 1);
            self.begun = Some(Fate::of(encoder));
        }
        Ok(self.budget.div_f64(self.factor()))
    }

    /// Takes the measurements that have arrived. Those of dropped encoders never will.
    fn collect(&mut self) -> Result<()> {
        for _ in 0..self.pending.len() {
            let Some(mut frame) = self.pending.pop_front() else { break };
            if frame.begun.is_dropped() || frame.ended.is_dropped() {
                continue;
            }
            // What was not begun on the GPU has the times of another frame. Polls report that after the data.
            if !frame.begun.is_done() {
                self.pending.push_back(frame);
                continue;
            }
            match frame.ticks.try_take::<u32>() {
                Ok(Some(words)) => {
                    let ticks = ticks::from_words(&words);
                    let period = self.gpu.queue().get_timestamp_period();
                    self.took(frame.estimate, ticks::between(ticks[0], ticks[2], period).unwrap_or_default());
                }
                Ok(None) => self.pending.push_back(frame),
                Err(e @ Error::DeviceLost(_)) => return Err(e),
                Err(_) => {} // one measurement less
            }
        }
        Ok(())
    }

    /// Ends that part. `estimate` is the estimated time of what was recorded since [`begin`](Self::begin). A frame in
    /// which it is zero is not measured, nor is a second end.
    pub fn end(&mut self, encoder: &mut wgpu::CommandEncoder, estimate: Duration) -> Result<()> {
        if let (Some(timer), Some(begun)) = (&self.timer, self.begun.take())
            && !estimate.is_zero()
        {
            timer.stamp(encoder, 2);
            encoder.resolve_query_set(&timer.queries, 0..3, timer.ticks.buffer(), 0);
            let ticks = timer.ticks.record_read(&self.gpu, encoder);
            if self.pending.len() == FRAMES {
                self.pending.pop_front(); // in an encoder that somebody keeps
            }
            self.pending.push_back(Frame { estimate, begun, ended: Fate::of(encoder), ticks });
        }
        Ok(())
    }

    /// Reports that a frame took `time` and was estimated at `estimate`: for applications that measure by themselves.
    /// Zero is no time, and nor are hours.
    pub fn took(&mut self, estimate: Duration, time: Duration) {
        if estimate.is_zero() || time.is_zero() || time > ticks::LONGEST {
            return;
        }
        if self.ratios.len() == FRAMES {
            self.ratios.pop_front();
        }
        self.ratios.push_back(time.as_secs_f64() / estimate.as_secs_f64());
    }

    /// Number of frames, at most the last 64, whose times the [`factor`](Self::factor) comes from. If it stays 0
    /// though frames are submitted, the device does not measure.
    pub fn frames(&self) -> usize {
        self.ratios.len()
    }

    /// Time of a frame as a multiple of its estimate, which nearly all of the last frames did not exceed.
    pub fn factor(&self) -> f64 {
        let mut ratios: Vec<f64> = self.ratios.iter().copied().collect();
        ratios.sort_by(f64::total_cmp);
        let at = (SHARE * ratios.len() as f64).ceil() as usize;
        let factor = ratios.get(at.saturating_sub(1)).copied().unwrap_or(1.0);
        factor.clamp(FACTOR[0], FACTOR[1])
    }
}

impl Timer {
    fn new(gpu: &Gpu) -> Result<Timer> {
        let (device, label) = (gpu.device(), Some("throughline pace"));
        let queries =
            device.create_query_set(&wgpu::QuerySetDescriptor { label, ty: wgpu::QueryType::Timestamp, count: 3 });
        let ty = TensorType::u32([3, 2]);
        let (size, usage) = (ty.storage_bytes() as u64, Tensor::USAGES | wgpu::BufferUsages::QUERY_RESOLVE);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false });
        Ok(Timer { queries, ticks: Tensor::from_buffer(buffer, 0, ty)? })
    }

    /// Writes the time at which everything recorded before has run.
    fn stamp(&self, encoder: &mut wgpu::CommandEncoder, at: u32) {
        drop(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("throughline pace"),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set: &self.queries,
                beginning_of_pass_write_index: None,
                end_of_pass_write_index: Some(at),
            }),
        }));
    }
}
