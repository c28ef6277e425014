//! The largest learning rate that a short run tolerates.
//!
//! The task: the next token is a fixed function of the current one, and tokens are uniform. A model that ignores its
//! input cannot get below ln V nats.
//!
//! - A run is *stable* if no loss exceeds [`BOUND`] times the first one, and its final loss is below the first.
//!   Infinities and NaN exceed the bound.
//! - A run *learns* if it is stable and its final loss is [`MARGIN`] nats below ln V.
//!
//! The final loss is the mean of the last quarter. Rates are powers of 2.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use throughline::Gpu;
use throughline::nn::{NormPlacement, TransformerConfig};
use throughline::optim::{AdamWConfig, Schedule};
use throughline::rng::Rng;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};

use crate::{PLACEMENTS, Settings, VOCAB, name};

const BATCH: usize = 4;
const TIME: usize = 32;
const BOUND: f64 = 1.25;
const MARGIN: f64 = 0.1;
/// The grid of rates goes from 1 down to 2 to the power of minus this.
const LAST: i32 = 9;

/// The largest rates at one depth.
#[derive(Deserialize, Serialize)]
pub struct Search {
    pub layers: usize,
    pub init: String,
    pub placement: NormPlacement,
    /// Steps over which the rate rises.
    pub warmup: u64,
    /// `None` if no rate of the grid is stable.
    pub max_stable: Option<f64>,
    pub max_learning: Option<f64>,
    /// The runs that the search tried, by descending rate.
    pub runs: Vec<Run>,
}

/// A short training run.
#[derive(Clone, Copy, Deserialize, Serialize)]
pub struct Run {
    pub rate: f64,
    pub first_loss: f64,
    /// `None` if the run was aborted as unstable.
    pub last_loss: Option<f64>,
    pub stable: bool,
    pub learns: bool,
}

/// Measures and prints every search.
pub fn study(gpu: &Gpu, settings: &Settings) -> Result<Vec<Search>> {
    let Settings { dim, steps, .. } = settings;
    println!("\nLearning rates: d {dim}, {BATCH} x {TIME} tokens, {steps} steps of AdamW, no clipping");
    println!("stable: no loss above {BOUND} times the first; learns: ends {MARGIN} nats below ln {VOCAB}");
    let [l, norm, init] = ["L", "norm", "init"];
    println!(
        "{l:>5} {norm:>5} {init:>6} {:>8} {:>11} {:>11} {:>11}",
        "warm-up", "max stable", "max learns", "best loss"
    );
    let mut searches = vec![];
    for (init, start) in settings.inits() {
        for placement in PLACEMENTS {
            for warmup in [0, steps / 2] {
                for &layers in &settings.depths {
                    let config = config(settings, settings.model(layers, TIME, placement, start), warmup);
                    let search = search(gpu, &config, init, settings.steps)?;
                    println!("{search}");
                    searches.push(search);
                }
            }
        }
    }
    Ok(searches)
}

impl std::fmt::Display for Search {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Search { layers, init, warmup, .. } = self;
        let rate = |rate: Option<f64>| rate.map_or("none".into(), |r| format!("1/{:.0}", 1.0 / r));
        let (norm, stable, learns) = (name(self.placement), rate(self.max_stable), rate(self.max_learning));
        let best = self.runs.iter().filter_map(|r| r.last_loss).fold(f64::INFINITY, f64::min);
        write!(f, "{layers:5} {norm:>5} {init:>6} {warmup:8} {stable:>11} {learns:>11} {best:11.3}")
    }
}

/// Everything but the rate.
fn config(settings: &Settings, model: TransformerConfig, warmup: u64) -> TrainConfig {
    TrainConfig {
        schedule: Schedule { warmup, ..Schedule::constant(1.0) },
        adamw: AdamWConfig { weight_decay: 0.0, max_grad_norm: 0.0, ..AdamWConfig::default() },
        seed: settings.seed,
        ..TrainConfig::new(model, BATCH)
    }
}

fn search(gpu: &Gpu, config: &TrainConfig, init: &str, steps: u64) -> Result<Search> {
    let mut runs: BTreeMap<i32, Run> = BTreeMap::new();
    let mut is = |halvings: i32, good: fn(&Run) -> bool| -> Result<bool> {
        if let Some(run) = runs.get(&halvings) {
            return Ok(good(run));
        }
        let mut config = config.clone();
        config.schedule.peak = 0.5f64.powi(halvings);
        let run = try_out(gpu, config, steps)?;
        runs.insert(halvings, run);
        Ok(good(&run))
    };
    // Every second rate from the largest down, and then the one above the first success. Bisection would not do: a rate
    // can also be too small to learn anything, so the rates that learn are a window in the grid.
    let mut largest = |good: fn(&Run) -> bool| -> Result<Option<f64>> {
        for halvings in (1..=LAST).step_by(2) {
            if is(halvings, good)? {
                let twice = is(halvings - 1, good)?;
                return Ok(Some(0.5f64.powi(if twice { halvings - 1 } else { halvings })));
            }
        }
        Ok(None)
    };
    let (max_stable, max_learning) = (largest(|run| run.stable)?, largest(|run| run.learns)?);
    let (layers, placement, warmup) = (config.model.n_layers, config.model.norm_placement, config.schedule.warmup);
    Ok(Search {
        layers,
        init: init.into(),
        placement,
        warmup,
        max_stable,
        max_learning,
        runs: runs.into_values().collect(),
    })
}

fn try_out(gpu: &Gpu, config: TrainConfig, steps: u64) -> Result<Run> {
    let (rate, seed) = (config.schedule.peak, config.seed);
    let mut trainer = Trainer::new_blocking(gpu, config)?;
    let mut losses = vec![];
    for step in 0..steps {
        let loss = f64::from(trainer.step(&[batch(seed, step)])?.wait_blocking()?);
        losses.push(loss);
        let bounded = loss <= BOUND * losses[0];
        if !bounded {
            return Ok(Run { rate, first_loss: losses[0], last_loss: None, stable: false, learns: false });
        }
    }
    let end = &losses[losses.len() * 3 / 4..];
    let last = end.iter().sum::<f64>() / end.len() as f64;
    let stable = last < losses[0];
    let learns = stable && last < (VOCAB as f64).ln() - MARGIN;
    Ok(Run { rate, first_loss: losses[0], last_loss: Some(last), stable, learns })
}

fn batch(seed: u64, step: u64) -> Batch {
    let mut rng = Rng::new(&[seed, step]);
    let tokens = Vec::from_iter((0..BATCH * TIME).map(|_| rng.below(VOCAB as u64) as u32));
    // 5 and V are coprime, so all tokens are targets equally often.
    let targets = tokens.iter().map(|t| (5 * t + 3) % VOCAB as u32).collect();
    Batch::new(tokens, targets)
}
