//! What the benchmarks and the roofline share: cases of the op table cut into directions, a clock that
//! suits the adapter, and the check that goes with every figure.
#![allow(dead_code)] // each program uses a part

use std::time::{Duration, Instant};

use throughline::ops::Case;
use throughline::reference::nmse;
use throughline::{Executable, Gpu};

use crate::common::Harness;

/// One direction of a case: the op alone, or the nodes that its gradient adds.
pub struct Piece {
    pub name: &'static str,
    pub exec: Executable,
    pub flops: f64,
    pub bytes: f64,
}

/// The directions of a case that have kernels. Whatever they read has been computed once.
pub fn pieces(harness: &Harness, gpu: &Gpu) -> Vec<Piece> {
    let full = harness.executable(gpu.profile(), 0);
    let last_forward = harness.outputs[0].node();
    let forward: Vec<&str> = harness.graph.nodes()[..=last_forward].iter().map(|n| n.name.as_str()).collect();
    let piece = |name, backward| {
        // Without copies: they are the planner's, where it could not prove that the op may work in place, and move
        // bytes that are not the kernel's.
        let plan = full.plan().kernels_of(|s| !s.name().starts_with("loss") && forward.contains(&s.name()) != backward);
        let (flops, bytes) = plan.steps().iter().fold((0, 0), |sum, s| (sum.0 + s.flops(), sum.1 + s.bytes()));
        let exec = (!plan.steps().is_empty()).then(|| harness.executable_of(plan));
        exec.map(|exec| Piece { name, exec, flops: flops as f64, bytes: bytes as f64 })
    };
    [piece("forward", false), piece("backward", true)].into_iter().flatten().collect()
}

/// How outputs and gradients differ from the f64 reference.
pub struct Check {
    pub nmse: f64,
    pub bound: f64,
}

impl Check {
    /// Runs the case on the adapter and the reference on the host.
    pub fn of(case: &Case, harness: &Harness, gpu: &Gpu) -> Check {
        let exec = harness.executable(gpu.profile(), 0);
        exec.submit().expect("the step runs");
        let (got, want) = (harness.read(&exec), harness.reference());
        let errors = got.iter().zip(&want).map(|(got, want)| nmse(got, &want.data));
        // NaN is the worst error, and `max` would lose it.
        let worst = errors.fold(0.0, |worst: f64, e| if e.is_nan() || e > worst { e } else { worst });
        Check { nmse: worst, bound: case.nmse }
    }

    pub fn ok(&self) -> bool {
        self.nmse <= self.bound
    }
}

/// What rates are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// CPU time of this process: for software adapters, where it does not depend on what else the
    /// machine is doing.
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

    /// What one run takes: of CPU time the mean over `budget`, of GPU time the least of several runs.
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
                while begin.elapsed() < budget {
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

/// CPU time of this process, threads of the driver included; Linux only.
pub fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    // utime and stime, in ticks of 1/100 s.
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}
