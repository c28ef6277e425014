//! Measures what the standard probes cost in a training step of the L6 d384 model, and where the time goes. Steps with
//! and without probes alternate, so that other load on the machine affects both equally. CPU time is that of the
//! process, which on a software adapter includes the kernels.

use std::time::Instant;

use throughline::Gpu;
use throughline::nn::TransformerConfig;
use throughline::optim::{AdamWConfig, Schedule};
use throughline::rng::Rng;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, Trainer};

const ROUNDS: usize = 11;

fn main() -> throughline::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    println!("{}", gpu.describe());
    let model = TransformerConfig::gpt2(65, 256, 6, 384, 6);
    let (schedule, adamw) = (Schedule::constant(1e-3), AdamWConfig::default());
    let config = TrainConfig { schedule, adamw, ..TrainConfig::new(model, 4) };
    let mut rng = Rng::new(&[1]);
    let mut ids = || (0..config.tokens_per_step()).map(|_| rng.below(65) as u32).collect::<Vec<_>>();
    let batch = [Batch::new(ids(), ids())];
    let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
    let mut plain = Trainer::new_blocking(&gpu, config.clone())?;
    let mut probed = Trainer::with_options_blocking(&gpu, config, &options)?;
    // CPU and wall seconds of a step, and how many numbers its probes gave.
    let step = |trainer: &mut Trainer| -> throughline::Result<([f64; 2], usize)> {
        let (wall, cpu) = (Instant::now(), cpu_seconds());
        trainer.step(&batch)?.wait_blocking()?;
        let readings = trainer.take_probes().map(|probes| probes.wait_blocking()).transpose()?;
        Ok(([cpu_seconds() - cpu, wall.elapsed().as_secs_f64()], readings.map_or(0, |r| r.values.len())))
    };
    step(&mut plain)?;
    let (_, count) = step(&mut probed)?;
    let mut times = vec![];
    for round in 0..ROUNDS {
        // Alternate which of the two goes first.
        times.push(if round % 2 == 0 {
            [step(&mut plain)?.0, step(&mut probed)?.0]
        } else {
            let second = step(&mut probed)?.0;
            [step(&mut plain)?.0, second]
        });
    }
    for (i, what) in ["CPU", "wall"].into_iter().enumerate() {
        let [without, with] = [0, 1].map(|t| sorted(times.iter().map(|pair| pair[t][i])));
        let ratios = sorted(times.iter().map(|pair| pair[1][i] / pair[0][i]));
        let ms = |t: &[f64]| format!("{:.0} ms ({:.0} at best)", t[ROUNDS / 2] * 1e3, t[0] * 1e3);
        println!(
            "{what}: {} without, {} with {count} probes; ratio {:.3}, quartiles {:.3} to {:.3}",
            ms(&without),
            ms(&with),
            ratios[ROUNDS / 2],
            ratios[ROUNDS / 4],
            ratios[ROUNDS - 1 - ROUNDS / 4]
        );
    }
    for (name, trainer) in [("without", &mut plain), ("with", &mut probed)] {
        let (dispatches, bytes) = (trainer.plan().dispatches(), trainer.plan().buffer_bytes());
        println!("{name}: {dispatches} dispatches, {:.1} MB of buffers", bytes as f64 / 1e6);
        let timeline = trainer.profile_blocking(&batch)?;
        let total: u64 = timeline.nodes.iter().flat_map(|n| &n.spans).map(|s| s.ns).sum();
        let share = |what: &str, keep: &dyn Fn(&str, &str, &str) -> bool| {
            let spans = timeline.nodes.iter().flat_map(|n| n.spans.iter().map(move |s| (n, s)));
            let part: u64 = spans.filter(|(n, s)| keep(&n.node, n.op, &s.what)).map(|(_, s)| s.ns).sum();
            println!("  {what}: {:.2} ms, {:.2} %", part as f64 / 1e6, part as f64 / total as f64 * 100.0);
        };
        share("all kernels", &|_, _, _| true);
        share("statistics of pairs", &|node, op, _| op == "stats" && node.contains(" and "));
        share("statistics of gradients", &|node, op, _| op == "stats" && node.contains(".grad"));
        share("other statistics", &|node, op, _| op == "stats" && !node.contains(".grad") && !node.contains(" and "));
        share("additions on their own", &|_, op, _| op == "residual_add");
        share("copies", &|_, _, what| what == "copy");
    }
    Ok(())
}

fn sorted(times: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Of this process, all threads; 0 where the system has no `/proc`.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind = stat.rsplit(')').next().unwrap_or_default();
    let ticks = behind.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}
