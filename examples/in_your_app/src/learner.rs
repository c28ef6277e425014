//! Trains a coordinate network, which maps a position (x, y) to a colour.

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::time::Duration;

use throughline::graph::ParamInit;
use throughline::optim::AdamWConfig;
use throughline::rng::Rng;
use throughline::train::{GraphTrainConfig, GraphTrainOptions, GraphTrainer, SlicedStep, StepSlices};
use throughline::{Gpu, Graph, Pace, Result, Tensor, TensorType, Value};

/// Number of random waves that encode a position, each as a sine and a cosine, and the standard deviation of their
/// frequencies, in periods per picture.
const WAVES: usize = 32;
const FREQUENCY: f64 = 3.0;
/// Width of the residual stream.
const WIDTH: usize = 64;
const BLOCKS: usize = 2;
const LEARNING_RATE: f64 = 4e-3;
const SEED: u64 = 1;

/// The network and its trainer, on the app's device. Each frame records as much of a training step as the budget allows.
#[derive(Debug)]
pub struct Learner {
    trainer: GraphTrainer,
    /// The loss of the most recent picture.
    loss: Tensor,
    slices: StepSlices,
    /// The step in progress.
    step: SlicedStep,
    pace: Pace,
}

impl Learner {
    /// A network that learns `target`, f32 `[height * width, 3]`, and writes its result to `output`, a tensor of the
    /// same type. Both are in buffers of the app. Runs a step a few times to measure it.
    pub fn new(gpu: &Gpu, width: usize, target: &Tensor, output: &Tensor, budget: Duration) -> Result<Learner> {
        let n = target.ty().shape.dims()[0];
        let mut g = gpu.graph();
        let places = g.input("places", TensorType::f32([n, 2 * WAVES]))?;
        let rgb = network(&mut g, places)?;

        let wanted = g.input("target", target.ty().clone())?;
        let loss = g.mse("loss", rgb, wanted)?;

        // Between two slices of a step, the step's own memory holds intermediate values. What the app reads at that
        // time must be a state, which changes only when the step stores it, all at once.
        let picture = g.state("picture", output.ty().clone())?;
        g.store(rgb, picture)?;
        let last_loss = g.state("last_loss", TensorType::f32([1]))?;
        g.store(loss, last_loss)?;

        let loss_tensor = Tensor::zeros(gpu, "loss", TensorType::f32([1]))?;
        let bindings =
            HashMap::from([(wanted, target.clone()), (picture, output.clone()), (last_loss, loss_tensor.clone())]);
        let options = GraphTrainOptions { bindings, ..GraphTrainOptions::default() };
        let trainer = |rate: f64| {
            let adamw = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
            let config = GraphTrainConfig { seed: SEED, ..GraphTrainConfig::new(adamw, rate) };
            let trainer = GraphTrainer::with_options_blocking(gpu, g.clone(), loss, config, &options)?;
            trainer.write(places, &features(width, n))?;
            Ok(trainer)
        };
        // A step that is measured is a step, so one is measured that learns nothing.
        let mut still = trainer(0.0)?;
        let mut profile = still.profile_blocking(&[])?;
        for _ in 0..3 {
            profile = profile.shorter(&still.profile_blocking(&[])?);
        }
        let trainer = trainer(LEARNING_RATE)?;
        // Several slices per budget.
        let slices = trainer.slices(&profile, budget / 4)?;
        let step = trainer.start_sliced(&slices, &[])?;
        Ok(Learner { trainer, loss: loss_tensor, slices, step, pace: Pace::new(gpu, budget)? })
    }

    /// Records as many slices as fit the budget: at least one, and none beyond the end of the step.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let (may, mut taken) = (self.pace.begin(encoder)?, Duration::ZERO);
        while taken.is_zero() || taken + self.step.next_estimate() <= may {
            // A kernel may be too short for the clock to measure.
            taken += self.step.next_estimate().max(Duration::from_nanos(1));
            if self.trainer.record_slice(encoder, &mut self.step)?.is_some() {
                self.step = self.trainer.start_sliced(&self.slices, &[])?;
                break;
            }
        }
        self.pace.end(encoder, taken)
    }

    /// Time that slices take within frames, as a multiple of the estimates.
    pub fn pace(&self) -> f64 {
        self.pace.factor()
    }

    /// How a step is sliced.
    pub fn slices(&self) -> &StepSlices {
        &self.slices
    }

    /// Training steps completed.
    pub fn steps(&self) -> u64 {
        self.trainer.step_count()
    }

    /// The mean squared error of the most recent picture. Waits for the GPU, so frames do not call it.
    pub fn loss_blocking(&self) -> Result<f32> {
        Ok(self.loss.read_blocking::<f32>(self.gpu())?[0])
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        self.trainer.gpu()
    }
}

/// A residual stream from the features of a position to its colour.
fn network(g: &mut Graph, places: Value) -> Result<Value> {
    let linear = |g: &mut Graph, name: &str, x: Value, d_out: usize, gain: f32, bias: f32| {
        let d_in = g.ty(x).shape.cols();
        let init = ParamInit::Normal(gain / (d_in as f32).sqrt());
        let weight = g.param_with(&format!("{name}.weight"), [d_in, d_out], init)?;
        let shift = g.param_with(&format!("{name}.bias"), [d_out], ParamInit::Constant(bias))?;
        g.linear(name, x, weight, Some(shift))
    };
    let mut stream = linear(g, "first", places, WIDTH, 1.4, 0.0)?;
    for i in 0..BLOCKS {
        let up = linear(g, &format!("{i}.up"), stream, WIDTH, 1.0, 0.0)?;
        let active = g.gelu_tanh(&format!("{i}.gelu"), up)?;
        let branch = linear(g, &format!("{i}.down"), active, WIDTH, 1.0, 0.0)?;
        stream = g.residual_add(&format!("{i}.stream"), stream, branch)?;
    }
    linear(g, "rgb", stream, 3, 0.1, 0.5)
}

/// Sines and cosines of random waves at every pixel. Without them such a network does not learn sharp edges.
fn features(width: usize, n: usize) -> Vec<f32> {
    let longer = width.max(n / width) as f64;
    let mut rng = Rng::new(&[SEED]);
    let waves: Vec<[f64; 2]> = (0..WAVES).map(|_| [(); 2].map(|()| FREQUENCY * rng.normal())).collect();
    let mut features = Vec::with_capacity(n * 2 * WAVES);
    for i in 0..n {
        let (x, y) = ((i % width) as f64 / longer, (i / width) as f64 / longer);
        for [a, b] in &waves {
            let (sin, cos) = (TAU * (a * x + b * y)).sin_cos();
            features.extend([sin as f32, cos as f32]);
        }
    }
    features
}
