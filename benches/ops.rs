//! Benchmarks every op of the table, forward and backward, in the sizes of its row. Besides criterion's wall time it
//! prints rates by a clock that suits the adapter, and checks results against the reference.

mod measure;

use std::time::Duration;

use criterion::{Criterion, Throughput};
use measure::{Check, Clock};
use throughline::Gpu;
use throughline::check::Harness;
use throughline::ops::{Case, TABLE};

fn main() {
    let gpu = &measure::gpu();
    println!("{}", gpu.describe());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    for row in TABLE {
        for case in (row.bench)() {
            bench(&mut criterion, gpu, row.name, &case);
        }
    }
    criterion.final_summary();
}

/// Times the op by itself, and then what its gradient adds.
fn bench(criterion: &mut Criterion, gpu: &Gpu, row: &str, case: &Case) {
    let harness = Harness::new(case, 1).expect("the case has a graph");
    let clock = Clock::of(gpu);
    let mut check = None;
    for piece in measure::pieces(&harness, gpu) {
        let name = format!("{} {}", case.name, piece.name);
        let mut ran = false;
        let mut group = criterion.benchmark_group(row);
        group.throughput(Throughput::Elements((piece.flops as u64).max(1)));
        group.bench_function(&name, |b| {
            b.iter(|| {
                piece.exec.submit().expect("the step runs");
                gpu.wait_blocking().expect("the step runs");
            });
            ran = true;
        });
        group.finish();
        // Criterion's filter skips benches; what it skips is not measured here either.
        if !ran {
            continue;
        }
        let seconds = clock.seconds(&piece.exec, Duration::from_millis(400));
        let check = check.get_or_insert_with(|| Check::of(case, &harness, gpu));
        let (gflops, gbs, unit) = (piece.flops / seconds / 1e9, piece.bytes / seconds / 1e9, clock.unit());
        let verdict = if check.ok() { "right" } else { "WRONG" };
        println!("{row} {name}: {gflops:.2} GFLOP, {gbs:.2} GB per {unit}; {verdict}, NMSE {:.1e}", check.nmse);
    }
}
