//! The stream and its gradient before any training.

use std::sync::Arc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use throughline::nn::{Init, NormPlacement, Transformer};
use throughline::probe::{Instruments, Readings, standard};
use throughline::rng::Rng;
use throughline::{ExecOptions, Executable, Gpu};

use crate::fit::{cell, slope};
use crate::{PLACEMENTS, Settings, VOCAB, name};

const BATCH: usize = 2;
/// The gradient of post-norm grows towards the output only where many tokens attend to each other. With a causal mask
/// and few tokens it does not.
const TIME: usize = 128;

/// Models that differ only in depth.
#[derive(Deserialize, Serialize)]
pub struct Family {
    pub placement: NormPlacement,
    /// `plain` is a standard deviation of 1/sqrt(d); `gpt2` scales projections into the stream by 1/sqrt(2 L).
    pub init: String,
    pub depths: Vec<Depth>,
    /// Slope of the logarithm of the last layer's W_2 gradient against log L.
    pub last_w2_slope: Option<f64>,
}

/// Geometric means over seeds. Far from the output a gradient is a product of many random factors, so the largest of a
/// few seeds would dominate an arithmetic mean. W_2 is the last matrix of the feed-forward half of a layer.
#[derive(Deserialize, Serialize)]
pub struct Depth {
    pub layers: usize,
    /// After the embedding and after each layer.
    pub stream_rms: Vec<f64>,
    /// RMS of the gradient of the loss at the same places.
    pub stream_grad_rms: Vec<f64>,
    /// Norm of the gradient of each layer's W_2.
    pub w2_grad_norm: Vec<f64>,
    /// Slope of log `stream_grad_rms` against the layer: above 0 it grows towards the output.
    pub stream_grad_slope: Option<f64>,
    /// The same slope for each seed.
    pub stream_grad_slopes: Vec<f64>,
    /// Slope of log `w2_grad_norm` against the layer.
    pub w2_grad_slope: Option<f64>,
    /// The power of l with which E|x_l|^2 - E|x_0|^2 grows.
    pub stream_power: Option<f64>,
}

/// Measures and prints every family.
pub fn study(gpu: &Gpu, settings: &Settings) -> Result<Vec<Family>> {
    let Settings { dim, seeds, .. } = settings;
    println!("\nAt initialisation: d {dim}, {BATCH} x {TIME} tokens without a mask, geometric mean of {seeds} seeds");
    let mut families = vec![];
    for (init_name, init) in settings.inits() {
        for placement in PLACEMENTS {
            println!(
                "\n{}-norm, {init_name}\n{:>5} {:>16} {:>7} {:>21} {:>16} {:>21} {:>10}",
                name(placement),
                "L",
                "stream RMS 0, L",
                "power",
                "its gradient 1, L",
                "per layer",
                "W_2's gradient 1, L",
                "per layer"
            );
            let mut depths = vec![];
            for &layers in &settings.depths {
                let depth = measure(gpu, settings, layers, placement, init)?;
                println!("{depth}");
                depths.push(depth);
            }
            let last = |d: &Depth| ((d.layers as f64).ln(), d.w2_grad_norm[d.layers - 1].ln());
            let last_w2_slope = slope(depths.iter().map(last));
            println!("slope of the last W_2's gradient against L, log-log: {}", cell(last_w2_slope));
            families.push(Family { placement, init: init_name.into(), depths, last_w2_slope });
        }
    }
    Ok(families)
}

fn measure(gpu: &Gpu, settings: &Settings, layers: usize, placement: NormPlacement, init: Init) -> Result<Depth> {
    let mut config = settings.model(layers, TIME, placement, init);
    config.bidirectional = true;
    let mut g = gpu.graph();
    let model = Transformer::build(&mut g, &config, BATCH, TIME, false)?;
    let targets = g.input("targets", g.ty(model.tokens).clone())?;
    let loss = g.cross_entropy("loss", model.logits, targets)?;
    let mut probes = standard(&g, &model.stream, true);
    let wanted = |node: &str| node.ends_with("mlp.down.weight");
    probes.retain(|p| p.name == "stream_rms" || p.name == "stream_grad_rms" || wanted(p.tap.node()));
    let instruments = Instruments::with_gradients(&mut g, loss, &probes)?;
    let plan = gpu.plan(&g, &instruments.outputs())?;
    let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;

    let mut depth = Depth::zeros(layers);
    for seed in settings.seed..settings.seed + settings.seeds {
        for &p in &model.params {
            exec.write(p, &g.initial_values(p, seed).unwrap_or_default())?;
        }
        let mut rng = Rng::new(&[seed]);
        for input in [model.tokens, targets] {
            exec.write(input, &Vec::from_iter((0..BATCH * TIME).map(|_| rng.below(VOCAB as u64) as u32)))?;
        }
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        exec.record(&mut encoder)?;
        let readback = instruments.record_read(&exec, &mut encoder, 0)?;
        gpu.queue().submit([encoder.finish()]);
        let w2 = (config.d_model * config.d_ff) as f64;
        depth.add(&readback.wait_blocking()?, w2, 1.0 / settings.seeds as f64)?;
    }
    depth.fit();
    Ok(depth)
}

impl Depth {
    fn zeros(layers: usize) -> Self {
        Depth {
            layers,
            stream_rms: vec![0.0; layers + 1],
            stream_grad_rms: vec![0.0; layers + 1],
            w2_grad_norm: vec![0.0; layers],
            stream_grad_slope: None,
            stream_grad_slopes: vec![],
            w2_grad_slope: None,
            stream_power: None,
        }
    }

    /// Adds one seed's share of the means, as logarithms. W_2 has `w2` elements.
    fn add(&mut self, readings: &Readings, w2: f64, share: f64) -> Result<()> {
        let means = [
            ("stream_rms", 1.0, &mut self.stream_rms),
            ("stream_grad_rms", 1.0, &mut self.stream_grad_rms),
            ("weight_grad_rms", w2.sqrt(), &mut self.w2_grad_norm),
        ];
        for (name, factor, mean) in means {
            let mut values = vec![];
            for (layer, mean) in mean.iter_mut().enumerate() {
                let value = readings.get(name, layer).with_context(|| format!("no {name} of layer {layer}"))?;
                *mean += share * (factor * value).ln();
                values.push(value);
            }
            if name == "stream_grad_rms" {
                self.stream_grad_slopes.extend(by_layer(&values[1..]));
            }
        }
        Ok(())
    }

    /// Computes slopes from the means, once all seeds are in.
    fn fit(&mut self) {
        let means = [&mut self.stream_rms, &mut self.stream_grad_rms, &mut self.w2_grad_norm];
        means.into_iter().flatten().for_each(|mean| *mean = mean.exp());
        // The embedding is not normalised, so with post-norm the gradient there is of a different size.
        self.stream_grad_slope = by_layer(&self.stream_grad_rms[1..]);
        self.w2_grad_slope = by_layer(&self.w2_grad_norm);
        let start = self.stream_rms[0].powi(2);
        let growth = self.stream_rms.iter().enumerate().skip(1);
        self.stream_power = slope(growth.map(|(l, x)| ((l as f64).ln(), (x.powi(2) - start).ln())));
    }

    /// Standard deviation of the slope over seeds.
    fn slope_spread(&self) -> Option<f64> {
        let (all, mean) = (&self.stream_grad_slopes, self.stream_grad_slope?);
        let squares: f64 = all.iter().map(|s| (s - mean).powi(2)).sum();
        (all.len() > 1).then(|| (squares / (all.len() - 1) as f64).sqrt())
    }
}

/// Slope of the logarithm against the index.
fn by_layer(values: &[f64]) -> Option<f64> {
    slope(values.iter().enumerate().map(|(l, v)| (l as f64, v.ln())))
}

impl std::fmt::Display for Depth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Depth { layers: n, stream_rms: x, stream_grad_rms: g, w2_grad_norm: w, .. } = self;
        write!(
            f,
            "{n:5} {:8.3} {:7.3} {:>7} {:10.2e} {:10.2e} {:>16} {:10.2e} {:10.2e} {:>10}",
            x[0],
            x[*n],
            cell(self.stream_power),
            g[1],
            g[*n],
            format!("{} ± {}", cell(self.stream_grad_slope), cell(self.slope_spread())),
            w[0],
            w[n - 1],
            cell(self.w2_grad_slope)
        )
    }
}
