//! A causal transformer learns to predict a chaotic time series. The picture shows both, the prediction in red.
//!
//! `cargo run --release --example sequence -- --out sequence.svg`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use plotters::prelude::*;
use throughline::nn::{Builder, TransformerConfig};
use throughline::train::{GraphTrainConfig, GraphTrainer};
use throughline::{Gpu, Graph, TensorType, Value, ops::patches::Conv, optim::Schedule, rng::Rng};

const BATCH: usize = 16;
const CONTEXT: usize = 24;

/// Every second value of the Mackey-Glass equation (<https://doi.org/10.1126/science.267326>), centred and scaled.
fn series(len: usize) -> Vec<f32> {
    let mut x = vec![1.2f32; 18];
    while x.len() < 2 * len {
        let [now, delayed] = [1, 18].map(|back| x[x.len() - back]);
        x.push(0.9 * now + 0.2 * delayed / (1.0 + delayed.powi(10)));
    }
    x.iter().step_by(2).map(|x| 4.0 * (x - 0.9)).collect()
}

/// The network: for each value of its input, `[batch, CONTEXT, 1]`, the value after it.
fn network(gpu: &Gpu, batch: usize) -> throughline::Result<(Graph, Value, Value)> {
    let mut g = gpu.graph();
    let values = g.input("values", TensorType::f32([batch, CONTEXT, 1]))?;
    let config = TransformerConfig { bidirectional: false, ..TransformerConfig::stack(CONTEXT, 2, 32, 4) };
    let mut b = Builder::with_config(&mut g, &config)?;
    let x = b.conv1d("in", values, config.d_model, 8, Conv::causal())?; // each place sees the last 8 values
    let hidden = b.stack(x)?.hidden;
    let next = b.linear("out", hidden, 1)?;
    Ok((g, values, next))
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(cli::Picture { out }: cli::Picture) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let (mut g, values, next) = network(&gpu, BATCH)?;
    let targets = g.input("targets", TensorType::f32([BATCH, CONTEXT, 1]))?;
    let loss = g.mse("loss", next, targets)?;
    let config = GraphTrainConfig { schedule: Schedule::cosine(0.01, 20, 500), ..GraphTrainConfig::adamw(0.01) };
    let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, config)?;

    let series = series(3000);
    let (known, future) = series.split_at(2850);
    let mut rng = Rng::new(&[0]);
    for _ in 0..500 {
        let starts = [0; BATCH].map(|_| rng.below((known.len() - CONTEXT) as u64) as usize);
        let [now, later] = [0, 1].map(|shift| starts.map(|start| &known[start + shift..][..CONTEXT]).concat());
        trainer.step(&[values.with(&now), targets.with(&later)])?;
    }
    println!("the loss is {:.4}", trainer.loss_blocking()?);

    // A second graph on the same parameters, for one window. Each prediction becomes the end of the next window.
    let (g, window, next) = network(&gpu, 1)?;
    let model = trainer.executable_blocking(&g, &[next])?;
    let mut predicted = known.to_vec();
    for _ in future {
        model.write(window, &predicted[predicted.len() - CONTEXT..])?;
        model.submit()?;
        predicted.push(model.read_blocking(next)?[CONTEXT - 1]);
    }

    let picture = SVGBackend::new(&out, (900, 300)).into_drawing_area();
    picture.fill(&WHITE)?;
    let first = known.len() - CONTEXT;
    let mut chart = ChartBuilder::on(&picture).build_cartesian_2d(first..series.len(), -3f32..3.0)?;
    for (values, from, color) in [(&series, first, BLACK), (&predicted, known.len(), RED)] {
        chart.draw_series(LineSeries::new((from..).zip(values[from..].to_vec()), color.stroke_width(2)))?;
    }
    Ok(picture.present()?)
}
