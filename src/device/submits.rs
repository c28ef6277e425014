//! Work that is cut into submits of bounded time.
//!
//! Systems reset a device that is at work on one submit for long: Windows after two seconds, Linux drivers after some
//! ten. And while a submit runs, nothing else gets the device, such as the desktop. So long steps are cut where their
//! estimated time says so. Nothing waits between the submits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::gpu::Gpu;
use super::pool::lock;
use crate::error::{Error, Result};

/// Longest time of a submit, by estimate: well below the two seconds after which Windows resets a device, and long
/// enough that the submits themselves cost nothing that can be measured.
pub(super) const SUBMIT_TIME: Duration = Duration::from_millis(75);

/// Number of measurements considered.
const MEASUREMENTS: usize = 32;

/// Limits of the factor. What is off by more is no measurement.
const FACTOR: [f64; 2] = [1.0 / 256.0, 256.0];

/// What a device does at least, as guessed before anything is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    flops_per_ns: f64,
    bytes_per_ns: f64,
    launch_ns: f64,
}

impl Rates {
    /// Those of a slow device of this type.
    pub fn of(device: wgpu::DeviceType) -> Self {
        let (flops_per_ns, bytes_per_ns, launch_ns) = match device {
            wgpu::DeviceType::DiscreteGpu => (1000.0, 100.0, 5e3),
            wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::VirtualGpu => (150.0, 15.0, 5e3),
            wgpu::DeviceType::Other => (50.0, 10.0, 5e3),
            wgpu::DeviceType::Cpu => (10.0, 4.0, 20e3),
        };
        Rates { flops_per_ns, bytes_per_ns, launch_ns }
    }

    /// Nanoseconds for a command that computes and moves this much.
    pub fn ns(&self, flops: f64, bytes: f64) -> f64 {
        self.launch_ns + (flops / self.flops_per_ns).max(bytes / self.bytes_per_ns)
    }
}

/// How long submits really take, as a multiple of what [`Rates`] estimate.
///
/// A submit is known to be done when somebody polls the device, so the times are upper bounds: the least of the last
/// ones counts.
#[derive(Clone, Debug)]
pub(crate) struct Meter(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    submit_time: Duration,
    /// Submits that are not known to be done, the oldest first: number, time of submission, estimate in nanoseconds.
    open: VecDeque<(u64, Instant, f64)>,
    /// Number of the next submit.
    next: u64,
    /// The device has been at work since then on nothing known but what is done and what is open.
    since: Instant,
    /// Estimate and number of what was submitted and done since then.
    done: (f64, usize),
    /// Measured times as multiples of the estimates, the oldest first.
    ratios: VecDeque<f64>,
}

/// A submit, until it is done or dropped.
struct Open {
    meter: Meter,
    number: u64,
    done: bool,
}

impl Meter {
    pub fn new() -> Self {
        Meter(Arc::new(Mutex::new(State {
            submit_time: SUBMIT_TIME,
            open: VecDeque::new(),
            next: 0,
            since: Instant::now(),
            done: (0.0, 0),
            ratios: VecDeque::new(),
        })))
    }

    pub fn set_submit_time(&self, time: Duration) {
        lock(&self.0).submit_time = time;
    }

    /// How much may be in a submit, in nanoseconds by estimate.
    fn budget(&self) -> f64 {
        let state = lock(&self.0);
        let least = state.ratios.iter().copied().min_by(f64::total_cmp).unwrap_or(1.0);
        state.submit_time.as_nanos() as f64 / least.clamp(FACTOR[0], FACTOR[1])
    }

    /// Measures the time of an encoder with work of this estimate, which is submitted next.
    fn measure(&self, encoder: &wgpu::CommandEncoder, estimate: f64) {
        let number = lock(&self.0).submitted(estimate, Instant::now());
        let open = Open { meter: self.clone(), number, done: false };
        encoder.on_submitted_work_done(move || open.has_run());
    }
}

impl State {
    fn submitted(&mut self, estimate: f64, now: Instant) -> u64 {
        if self.open.is_empty() {
            (self.since, self.done) = (now, (0.0, 0));
        }
        self.next += 1;
        self.open.push_back((self.next, now, estimate));
        self.next
    }

    /// Notes that a submit was done by now, or dropped.
    fn finished(&mut self, number: u64, done: bool, now: Instant) {
        let Some(i) = self.open.iter().position(|open| open.0 == number) else { return };
        let Some((_, _, estimate)) = self.open.remove(i) else { return };
        if !done || estimate <= 0.0 {
            return;
        }
        self.done = (self.done.0 + estimate, self.done.1 + 1);
        if self.ratios.len() == MEASUREMENTS {
            self.ratios.pop_front();
        }
        self.ratios.push_back((now - self.since).as_nanos() as f64 / self.done.0);
        // Speeds change. What is open has not begun before it was submitted.
        if let (Some((_, submitted, _)), MEASUREMENTS..) = (self.open.front(), self.done.1) {
            (self.since, self.done) = (*submitted, (0.0, 0));
        }
    }
}

impl Open {
    fn has_run(mut self) {
        self.done = true;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.meter.0).finished(self.number, self.done, Instant::now());
    }
}

/// Encoders one after another, each submitted when the next command would make it too long.
#[derive(Debug)]
pub(crate) struct Submits {
    gpu: Gpu,
    meter: Meter,
    /// What this is, for errors and captures.
    what: String,
    encoder: Option<wgpu::CommandEncoder>,
    /// Estimate of what is in the encoder, in nanoseconds.
    recorded: f64,
    /// How much may be in it.
    budget: f64,
    count: usize,
}

impl Submits {
    /// Submits that are measured by this meter.
    pub fn new(gpu: &Gpu, meter: &Meter, what: impl Into<String>) -> Self {
        let (gpu, meter, what) = (gpu.clone(), meter.clone(), what.into());
        let budget = meter.budget();
        Submits { gpu, meter, what, encoder: None, recorded: 0.0, budget, count: 0 }
    }

    /// The encoder that is being recorded into, for copies.
    pub fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| self.gpu.encoder(&self.what))
    }

    /// Submits what is recorded if it would be too long with another `ns` nanoseconds, by estimate.
    pub fn make_room(&mut self, ns: f64) -> Result<()> {
        match self.is_full(ns) {
            true => self.submit().map(drop),
            false => Ok(()),
        }
    }

    /// Whether what is recorded would be too long with another `ns` nanoseconds.
    pub fn is_full(&self, ns: f64) -> bool {
        self.recorded > 0.0 && self.recorded + ns > self.budget
    }

    /// Counts what is recorded next.
    pub fn add(&mut self, ns: f64) {
        self.recorded += ns;
    }

    /// Number of submits so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Submits what has been recorded since the last submit.
    pub fn submit(&mut self) -> Result<wgpu::SubmissionIndex> {
        let encoder = self.encoder.take().unwrap_or_else(|| self.gpu.encoder(&self.what));
        self.meter.measure(&encoder, self.recorded);
        self.recorded = 0.0;
        let submitted = self.gpu.submit(encoder).map_err(|e| {
            let named = |message| format!("submit {} of the {}: {message}", self.count + 1, self.what);
            match e {
                Error::Device(message) => Error::Device(named(message)),
                Error::DeviceLost(message) => Error::DeviceLost(named(message)),
                Error::OutOfMemory(message) => Error::OutOfMemory(named(message)),
                e => e,
            }
        })?;
        self.count += 1;
        self.budget = self.meter.budget();
        Ok(submitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn the_least_time_counts_since_polls_may_be_late() {
        let (meter, start) = (Meter::new(), Instant::now());
        assert_eq!(meter.budget(), 75e6);
        let run = |from, to| {
            let mut state = lock(&meter.0);
            let number = state.submitted(10e6, after(start, from));
            state.finished(number, true, after(start, to));
        };
        run(0, 50); // 10 ms by estimate took 50
        assert_eq!(meter.budget(), 15e6);
        run(100, 1100);
        assert_eq!(meter.budget(), 15e6);
        run(2000, 2020);
        assert_eq!(meter.budget(), 37.5e6);
        for i in 0..MEASUREMENTS as u64 {
            run(3000 + 100 * i, 3040 + 100 * i); // it has become slower
        }
        assert_eq!(meter.budget(), 75e6 / 4.0);
        meter.set_submit_time(Duration::from_millis(150));
        assert_eq!(meter.budget(), 150e6 / 4.0);
    }

    /// Two that are seen to be done at once have not taken no time.
    #[test]
    fn what_overlaps_is_measured_together() {
        let (meter, start) = (Meter::new(), Instant::now());
        let mut state = lock(&meter.0);
        let numbers: Vec<u64> = (0..3).map(|i| state.submitted(10e6, after(start, i))).collect();
        state.finished(numbers[0], true, after(start, 60));
        state.finished(numbers[1], true, after(start, 60));
        // One that was dropped took no time and tells nothing.
        state.finished(numbers[2], false, after(start, 60));
        assert_eq!(state.ratios, [6.0, 3.0]);
        assert!(state.open.is_empty());
    }
}
