//! A convolutional network learns to tell shapes apart. The picture shows a few test images and what it takes them for.
//!
//! `cargo run --release --example image -- --out image.svg`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use plotters::prelude::*;
use throughline::train::{GraphTrainConfig, GraphTrainer};
use throughline::{Gpu, Graph, TensorType, Value, nn::Builder, ops::patches::Conv, ops::pool::Pool, rng::Rng};

const SHAPES: [&str; 3] = ["circle", "square", "triangle"];
const SIZE: usize = 12;
const BATCH: usize = 30;

/// An image of a shape in any place and size. A tenth of its pixels are noise.
fn image(shape: usize, rng: &mut Rng) -> Vec<f32> {
    let r = 3.0 + 2.5 * rng.uniform();
    let [cx, cy] = [0, 1].map(|_| r + (SIZE as f64 - 2.0 * r) * rng.uniform());
    let pixel = |i| {
        let (x, y) = ((i % SIZE) as f64 + 0.5 - cx, (i / SIZE) as f64 + 0.5 - cy);
        let inside = [x.hypot(y) < r, x.abs().max(y.abs()) < 0.85 * r, y < r && 2.0 * x.abs() < y + r];
        if rng.below(10) == 0 { rng.uniform() as f32 } else { f32::from(inside[shape]) }
    };
    (0..SIZE * SIZE).map(pixel).collect()
}

/// The network for `n` images, with its input, `[n, SIZE, SIZE, 1]`, and the logits of the shapes, `[n, 3]`.
fn network(gpu: &Gpu, n: usize) -> throughline::Result<(Graph, Value, Value)> {
    let mut g = gpu.graph();
    let images = g.input("images", TensorType::f32([n, SIZE, SIZE, 1]))?;
    let mut b = Builder::new(&mut g);
    let x = b.conv2d("conv", images, 16, [5, 5], Conv::same())?;
    let x = b.relu("", x)?;
    let x = b.max_pool2d("", x, Pool::new(3))?;
    let features = b.reshape("features", x, [n, SIZE / 3 * SIZE / 3 * 16])?;
    let logits = b.mlp("mlp", features, &[32, SHAPES.len()], |g, h| g.relu("", h))?;
    Ok((g, images, logits))
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(cli::Picture { out }: cli::Picture) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let (mut g, x, logits) = network(&gpu, BATCH)?;
    let labels = g.input("labels", TensorType::u32([BATCH]))?;
    let loss = g.cross_entropy("loss", logits, labels)?;
    let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, GraphTrainConfig::adamw(5e-3))?;
    trainer.write(labels, &[0u32, 1, 2].repeat(BATCH / 3))?;
    let mut rng = Rng::new(&[0]);
    let mut images = |n| (0..n).flat_map(|i| image(i % SHAPES.len(), &mut rng)).collect::<Vec<f32>>();
    for _ in 0..600 {
        trainer.step(&[x.with(&images(BATCH))])?;
    }

    // A second graph on the same parameters, for the test images.
    let (mut g, x, logits) = network(&gpu, 600)?;
    let best = g.argmax_axis("best", logits, 1)?;
    let classifier = trainer.executable_blocking(&g, &[best])?;
    let tests = images(600);
    classifier.write(x, &tests)?;
    classifier.submit()?;
    let answers: Vec<u32> = classifier.read_blocking(best)?;
    let right = answers.iter().zip((0..3).cycle()).filter(|(answer, shape)| *answer == shape).count();
    println!("{right} of {} test images are recognised", answers.len());
    let picture = SVGBackend::new(&out, (750, 330)).into_drawing_area();
    picture.fill(&WHITE)?;
    for ((panel, image), answer) in picture.split_evenly((2, 5)).iter().zip(tests.chunks(SIZE * SIZE)).zip(answers) {
        panel.draw(&Text::new(SHAPES[answer as usize], (15, 5), ("sans-serif", 18)))?;
        for (i, &pixel) in image.iter().enumerate().filter(|(_, pixel)| **pixel > 0.0) {
            let [x, y] = [i % SIZE, i / SIZE].map(|place| 10 * place as i32);
            panel.draw(&Rectangle::new([(x + 15, y + 30), (x + 25, y + 40)], BLACK.mix(pixel.into()).filled()))?;
        }
    }
    Ok(picture.present()?)
}
