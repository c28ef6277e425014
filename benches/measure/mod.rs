//! Shared by the benchmarks and the roofline: cases of the op table split into forward and backward, a clock that suits
//! the adapter, and the check that goes with every measurement.
#![allow(dead_code)] // each program uses a part

use std::time::{Duration, Instant};

use throughline::check::{Harness, tolerance};
use throughline::ops::Case;
use throughline::reference::nmse;
use throughline::{Cooperative, Executable, Gpu};

/// The adapter's device, with its cooperative matrices if it has any.
pub fn open() -> throughline::Result<Gpu> {
    Gpu::headless_cooperative_blocking(Cooperative::F32).or_else(|_| Gpu::headless_blocking())
}

/// The adapter's device with the fastest kind of cooperative matrices that it has.
pub fn with_matrices() -> throughline::Result<Gpu> {
    let kinds = [Cooperative::F16, Cooperative::F16x8, Cooperative::F32];
    let opened = kinds.into_iter().find_map(|kind| Gpu::headless_cooperative_blocking(kind).ok());
    opened.map_or_else(|| Gpu::headless_cooperative_blocking(Cooperative::F16), Ok)
}

/// That device, for benchmarks.
pub fn gpu() -> Gpu {
    open().expect("measuring needs a GPU adapter, a software one will do")
}

/// One direction of a case: the op by itself, or the nodes that its gradient adds.
pub struct Piece {
    pub name: &'static str,
    pub exec: Executable,
    pub flops: f64,
    pub bytes: f64,
    /// Whether it multiplies with cooperative matrices.
    pub on_matrices: bool,
}

/// The directions of a case that have kernels. Their inputs have been computed already.
pub fn pieces(harness: &Harness, gpu: &Gpu) -> Vec<Piece> {
    let piece = |name, backward| {
        let plan = harness.part(gpu.profile(), backward).expect("the case has a plan");
        let (flops, bytes) = plan.steps().iter().fold((0, 0), |sum, s| (sum.0 + s.flops(), sum.1 + s.bytes()));
        let (flops, bytes) = (flops as f64, bytes as f64);
        let mut kernels = plan.steps().iter().flat_map(|s| s.dispatches()).map(|d| d.kernel());
        let matrices = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let on_matrices = kernels.any(|kernel| kernel.features().contains(matrices));
        let exec = |plan| harness.executable_blocking(gpu, plan).expect("the plan runs here");
        (!plan.steps().is_empty()).then(|| Piece { name, exec: exec(plan), flops, bytes, on_matrices })
    };
    [piece("forward", false), piece("backward", true)].into_iter().flatten().collect()
}

/// The error of outputs and gradients against the f64 reference.
pub struct Check {
    pub nmse: f64,
    pub bound: f64,
}

impl Check {
    /// Runs the case on the adapter and the reference on the host.
    pub fn of(case: &Case, harness: &Harness, gpu: &Gpu) -> Check {
        let plan = harness.plan(gpu.profile()).expect("the case has a plan");
        let exec = harness.executable_blocking(gpu, plan).expect("the plan runs here");
        exec.submit().expect("the step runs");
        let got = harness.read_blocking(&exec).expect("the device works");
        let want = harness.reference().expect("the case has a reference");
        let errors = got.iter().zip(&want).map(|(got, want)| nmse(got, &want.data));
        // NaN is the worst error, and `max` would lose it.
        let worst = errors.fold(0.0, |worst: f64, e| if e.is_nan() || e > worst { e } else { worst });
        Check { nmse: worst, bound: tolerance(case, gpu.profile()) }
    }

    pub fn ok(&self) -> bool {
        self.nmse <= self.bound
    }
}

/// The clock that rates are measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// CPU time of this process. Used for software adapters, where it does not depend on other load on the machine.
    Cpu,
    /// GPU timestamps, or the host's clock where there are none.
    Gpu,
}

impl Clock {
    pub fn of(gpu: &Gpu) -> Clock {
        match gpu.info().device_type {
            wgpu::DeviceType::Cpu if cpu_seconds().is_some() => Clock::Cpu,
            _ => Clock::Gpu,
        }
    }

    /// The unit of what [`seconds`](Self::seconds) returns.
    pub fn unit(self) -> &'static str {
        match self {
            Clock::Cpu => "CPU-second",
            Clock::Gpu => "second",
        }
    }

    /// The time of one run: the mean CPU time over `budget`, or the shortest GPU time of several runs.
    pub fn seconds(self, exec: &Executable, budget: Duration) -> f64 {
        let run = || {
            exec.submit().expect("the step runs");
            exec.gpu().wait_blocking().expect("the step runs");
        };
        run(); // compiles, and warms the caches
        let begin = Instant::now();
        match self {
            Clock::Cpu => {
                let cpu = || cpu_seconds().unwrap_or(f64::NAN);
                let (start, mut runs) = (cpu(), 0.0);
                // On a busy machine a short budget may pass without a tick of the clock.
                while begin.elapsed() < budget || cpu() <= start {
                    run();
                    runs += 1.0;
                }
                (cpu() - start) / runs
            }
            Clock::Gpu => {
                let mut least = f64::INFINITY;
                let mut runs = 0;
                while begin.elapsed() < budget || runs < 3 {
                    let timeline = exec.profile_blocking().expect("the step runs");
                    least = least.min(timeline.kernel_ns() as f64 / 1e9);
                    runs += 1;
                }
                least
            }
        }
    }
}

/// CPU time of this process, including the threads of the driver. Linux only.
pub fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    // utime and stime, in ticks of 1/100 s.
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}
