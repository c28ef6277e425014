//! A network with two hidden layers learns a function of one number from samples of it. The picture shows the function
//! and what the network makes of it on the way: it gets long waves before short ones.
//!
//! `cargo run --release --example mlp -- --out mlp.svg`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use plotters::prelude::*;
use throughline::nn::Builder;
use throughline::train::{GraphTrainConfig, GraphTrainer};
use throughline::{ExecOptions, Executable, Gpu, Graph, TensorType, Value, optim::Schedule, rng::Rng};

const BATCH: usize = 256;
const POINTS: usize = 400;

/// What the network is to learn: waves that become shorter.
fn target(x: f32) -> f32 {
    (5.0 * x * x).sin()
}

/// The network for so many samples at once, with its input and its output, both `[samples, 1]`.
fn network(gpu: &Gpu, samples: usize) -> throughline::Result<(Graph, Value, Value)> {
    let mut g = gpu.graph();
    let x = g.input("x", TensorType::f32([samples, 1]))?;
    let y = Builder::new(&mut g).mlp("net", x, &[64, 64, 1], |g, h| g.tanh("", h))?;
    Ok((g, x, y))
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(cli::Picture { out }: cli::Picture) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let (mut g, x, y) = network(&gpu, BATCH)?;
    let wanted = g.input("wanted", TensorType::f32([BATCH, 1]))?;
    let loss = g.mse("loss", y, wanted)?;
    let config = GraphTrainConfig { schedule: Schedule::cosine(0.02, 20, 1000), ..GraphTrainConfig::adamw(0.02) };
    let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, config)?;

    // A second graph on the same parameters, for the points of the curve.
    let (g, points, curve) = network(&gpu, POINTS)?;
    let learnt = trainer.executable_blocking(&g, &[curve])?;
    let xs: Vec<f32> = (0..POINTS).map(|i| 2.0 * i as f32 / POINTS as f32).collect();
    learnt.write(points, &xs)?;

    let picture = SVGBackend::new(&out, (900, 400)).into_drawing_area();
    picture.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&picture).build_cartesian_2d(0.0..2f32, -1.2..1.6f32)?;
    let line = |ys: Vec<f32>, style| LineSeries::new(xs.iter().copied().zip(ys), style);
    chart.draw_series(line(xs.iter().map(|&x| target(x)).collect(), BLACK.mix(0.3).stroke_width(7)))?;
    let mut rng = Rng::new(&[0]);
    for (steps, color) in [(10, GREEN), (100, BLUE), (1000, RED)] {
        while trainer.step_count() < steps {
            let samples: Vec<f32> = (0..BATCH).map(|_| 2.0 * rng.uniform() as f32).collect();
            let targets: Vec<f32> = samples.iter().map(|&x| target(x)).collect();
            trainer.step(&[x.with(&samples), wanted.with(&targets)])?; // waits for nothing
        }
        println!("after {steps} steps the loss is {:.5}", trainer.loss_blocking()?);
        learnt.submit()?;
        let drawn = chart.draw_series(line(learnt.read_blocking(curve)?, color.stroke_width(2)))?;
        drawn.label(format!("{steps} steps")).legend(move |at| Circle::new(at, 4, color.filled()));
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).draw()?;
    picture.present()?;

    // An app needs no trainer: it loads the weights into a graph whose parameters have the same names.
    let weights = out.with_extension("safetensors");
    trainer.save_blocking(&weights)?;
    let app = Executable::new_blocking(&gpu, gpu.plan(&g, &[curve])?.into(), ExecOptions::default())?;
    app.load_blocking(&weights)?;
    app.write(points, &xs)?;
    app.submit()?;
    let same = app.read_blocking::<f32>(curve)? == learnt.read_blocking::<f32>(curve)?;
    anyhow::ensure!(same, "the loaded network differs");
    Ok(())
}
