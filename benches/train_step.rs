//! Benchmarks whole training steps in shapes known from nanoGPT: tokens/s, and the host's time for recording a step.
//! And what recording a pass of a small network costs the frame of an app.

use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput};
use throughline::nn::{Builder, TransformerConfig};
use throughline::optim::Schedule;
use throughline::rng::Rng;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{ExecOptions, Executable, Gpu, Result, TensorType, wgpu};

/// Name, vocabulary, layers, width, heads, context, batch.
const SHAPES: [(&str, [usize; 6]); 3] = [
    ("L4 d128 h4 T64 batch 12", [65, 4, 128, 4, 64, 12]),
    ("L6 d384 h6 T256 batch 4", [65, 6, 384, 6, 256, 4]),
    ("GPT-2 small T1024 batch 1", [50257, 12, 768, 12, 1024, 1]),
];

fn main() {
    let gpu = Gpu::headless_blocking().expect("a GPU adapter, a software one will do");
    println!("{}", gpu.describe());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(8))
        .configure_from_args();
    record_small_network(&gpu, &mut criterion).expect("a network");
    for (name, [vocab, layers, dim, heads, context, batch]) in SHAPES {
        let config = TrainConfig {
            schedule: Schedule::constant(1e-3),
            ..TrainConfig::new(TransformerConfig::gpt2(vocab, context, layers, dim, heads), batch)
        };
        let tokens = config.tokens_per_step();
        let started = Instant::now();
        let mut trainer = match Trainer::new_blocking(&gpu, config) {
            Ok(trainer) => trainer,
            Err(e) => {
                println!("{name}: skipped: {e}");
                continue;
            }
        };
        let mut rng = Rng::new(&[1]);
        let mut ids = || (0..tokens).map(|_| rng.below(vocab as u64) as u32).collect::<Vec<_>>();
        let data = Batch::new(ids(), ids());
        let mut step = || trainer.step(std::slice::from_ref(&data)).expect("a step");
        step().wait_blocking().expect("a loss");
        println!("{name}: first step after {:.2} s", started.elapsed().as_secs_f64());
        let mut host = vec![];
        let mut group = criterion.benchmark_group("train_step");
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let begin = Instant::now();
                let loss = step();
                host.push(begin.elapsed());
                loss.wait_blocking().expect("a loss")
            });
        });
        group.finish();
        host.sort();
        let flops = trainer.plan().flops() as f64;
        let dispatches = trainer.plan().dispatches();
        println!("{name}: {:.1} GFLOP per step, {dispatches} dispatches", flops / 1e9);
        // Nothing, if a filter left this shape out.
        if let Some(median) = host.get(host.len() / 2) {
            println!("{name}: recording and submitting takes {:.2} ms, median", median.as_secs_f64() * 1e3);
        }
    }
    criterion.final_summary();
}

/// Three layers of 64 on 4,096 places, as a game or a picture may have them in each frame.
fn record_small_network(gpu: &Gpu, criterion: &mut Criterion) -> Result<()> {
    let mut g = gpu.graph();
    let places = g.input("places", TensorType::f32([4096, 64]))?;
    let mut b = Builder::new(&mut g);
    let mut x = places;
    for layer in 0..3 {
        x = b.linear(&format!("{layer}"), x, 64)?;
        x = b.relu("", x)?;
    }
    let exec = Executable::new_blocking(gpu, gpu.plan(&g, &[x])?.into(), ExecOptions::default())?;
    exec.write(places, &[0.5f32; 4096 * 64])?;
    let encoder = || gpu.device().create_command_encoder(&Default::default());
    criterion.bench_function("record/MLP 3 x 64 on 4096 places", |b| {
        // wgpu does much of the work of recording when an encoder is finished.
        let record = |mut encoder: wgpu::CommandEncoder| {
            exec.record(&mut encoder).expect("inputs");
            encoder.finish()
        };
        b.iter_batched(encoder, record, BatchSize::PerIteration);
    });
    Ok(())
}
