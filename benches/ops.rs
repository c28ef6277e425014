//! Every op of the table on the sizes of its row, forward and with its gradient. Beside criterion's
//! wall time it prints rates, per second and per CPU-second: where the adapter is the CPU, the
//! latter do not depend on what else the machine is doing.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::Harness;
use criterion::{Criterion, Throughput};
use throughline::ops::{Case, TABLE};
use throughline::{Executable, Gpu, Plan};

fn main() {
    let gpu = common::gpu();
    println!("{}", gpu.describe());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    for row in TABLE {
        for case in (row.bench)() {
            bench(&mut criterion, gpu, row.name, &case, false);
            if case.main_outputs > 0 {
                bench(&mut criterion, gpu, row.name, &case, true);
            }
        }
    }
    criterion.final_summary();
}

/// Times the op alone, or with its gradient: of the latter only the steps that are neither the
/// harness's loss nor the forward pass.
fn bench(criterion: &mut Criterion, gpu: &Gpu, row: &str, case: &Case, backward: bool) {
    let name = format!("{} {}", case.name, if backward { "backward" } else { "forward" });
    let harness = Harness::new(case, 1);
    let exec = harness.executable(gpu.profile(), 0);
    // Once in full, so that the gradient's steps find what the forward pass leaves behind.
    exec.submit();
    gpu.wait_blocking().expect("the step runs");
    let finite = harness.read(&exec).iter().flatten().all(|x| x.is_finite());
    let first = harness.outputs[0];
    let last_forward = first.node();
    let mut plan: Plan = exec.plan().clone();
    let ops: Vec<&str> = harness.graph.nodes()[..=last_forward].iter().map(|n| n.name.as_str()).collect();
    plan.steps.retain(|s| !s.name.starts_with("loss") && ops.contains(&s.name.as_str()) != backward);
    plan.final_copies.clear();
    if plan.steps.is_empty() {
        return; // the gradient is no kernel
    }
    let (flops, bytes) = plan.steps.iter().fold((0, 0), |sum, s| (sum.0 + s.flops, sum.1 + s.bytes));
    let exec = harness.executable_of(plan);
    let step = || {
        exec.submit();
        gpu.wait_blocking().expect("the step runs");
    };
    let mut group = criterion.benchmark_group(row);
    group.throughput(Throughput::Elements(flops.max(1)));
    group.bench_function(&name, |b| b.iter(step));
    group.finish();
    rates(row, &name, &exec, step, flops as f64, bytes as f64, finite);
}

fn rates(row: &str, name: &str, exec: &Executable, step: impl Fn(), flops: f64, bytes: f64, finite: bool) {
    let (begin, cpu) = (Instant::now(), cpu_seconds());
    let mut runs = 0.0;
    while begin.elapsed() < Duration::from_millis(400) {
        step();
        runs += 1.0;
    }
    let wall = begin.elapsed().as_secs_f64() / runs / 1e-9;
    let per_cpu = match (cpu, cpu_seconds()) {
        (Some(a), Some(b)) => format!("{:.2} GFLOP per CPU-second, ", flops * runs / (b - a) / 1e9),
        _ => String::new(),
    };
    let check = if finite { "finite" } else { "NOT FINITE" };
    let gpu = exec.gpu().info().device_type;
    println!("{row} {name}: {:.2} GFLOP/s, {per_cpu}{:.2} GB/s, {check} ({gpu:?})", flops / wall, bytes / wall);
}

/// CPU time of this process, threads of the driver included; Linux only.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    // utime and stime, in ticks of 1/100 s.
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}
