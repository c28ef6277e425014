//! Trains a coordinate network, which maps a position (x, y) to a colour.

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::sync::Arc;
use std::time::Duration;

use throughline::graph::ParamInit;
use throughline::optim::{AdamWConfig, Arena, ArenaLayout, Optimizer};
use throughline::rng::Rng;
use throughline::{ExecOptions, Executable, Gpu, Graph, Pace, Result, Slice, Tensor, TensorType, Value};

/// Number of random waves that encode a position, each as a sine and a cosine, and the standard deviation of their
/// frequencies, in periods per picture.
const WAVES: usize = 32;
const FREQUENCY: f64 = 3.0;
/// Width of the residual stream.
const WIDTH: usize = 64;
const BLOCKS: usize = 2;
const LEARNING_RATE: f64 = 4e-3;
const SEED: u64 = 1;

/// The network, its gradients and its optimiser, on the app's device. Each frame records as much of a training step as
/// the budget allows.
#[derive(Debug)]
pub struct Learner {
    gpu: Gpu,
    /// Forward and backward.
    exec: Executable,
    optimizer: Optimizer,
    loss: Value,
    slices: Vec<Slice>,
    /// Estimated time of an update.
    update: Duration,
    pace: Pace,
    /// Index of the next slice. After the last slice comes the update.
    next: usize,
    steps: u64,
}

impl Learner {
    /// A network that learns `target`, f32 `[height * width, 3]`, and writes its result to `output`, a tensor of the
    /// same type. Both are in buffers of the app. Runs a step a few times to measure it.
    pub fn new(gpu: &Gpu, width: usize, target: &Tensor, output: &Tensor, budget: Duration) -> Result<Learner> {
        let n = target.ty().shape.dims()[0];
        let mut g = gpu.graph();
        let places = g.input("places", TensorType::f32([n, 2 * WAVES]))?;
        let rgb = network(&mut g, places)?;
        let params = g.params();

        let wanted = g.input("target", target.ty().clone())?;
        let learnt = g.scale("minus_rgb", rgb, -1.0)?;
        let error = g.add("error", wanted, learnt)?;
        let squares = g.mul("squares", error, error)?;
        let sum = g.sum("squares.sum", squares)?;
        let loss = g.scale("loss", sum, 1.0 / (3 * n) as f32)?;

        // Between two slices of a step, the step's own memory holds intermediate values. What the app reads at that
        // time must be a state, which changes only when the step stores it, all at once.
        let picture = g.state("picture", output.ty().clone())?;
        g.store(rgb, picture)?;
        let last_loss = g.state("last_loss", TensorType::f32([1]))?;
        g.store(loss, last_loss)?;

        let layout = Arc::new(ArenaLayout::of(&g, &params, gpu.profile().max_tensor_bytes())?);
        let (weights, grads) = (Arena::zeros(gpu, "weights", &layout)?, Arena::zeros(gpu, "gradients", &layout)?);
        for (i, &p) in params.iter().enumerate() {
            weights.write_tensor(gpu, i, &g.initial_values(p, SEED).unwrap_or_default())?;
        }
        let mut bindings: HashMap<Value, Tensor> =
            params.iter().copied().zip(weights.tensors.iter().cloned()).collect();
        bindings.extend([(wanted, target.clone()), (picture, output.clone())]);
        for ((gradient, &p), tensor) in g.gradients(loss, &params)?.into_iter().zip(&params).zip(&grads.tensors) {
            let state = g.state(&format!("{}.gradient", g.name(p)), g.ty(p).clone())?;
            g.store(gradient, state)?;
            bindings.insert(state, tensor.clone());
        }
        let plan = Arc::new(gpu.plan(&g, &[])?);
        let exec = Executable::new_blocking(gpu, plan, ExecOptions::bound(bindings))?;
        exec.write(places, &features(width, n))?;
        let config = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
        let optimizer = || pollster::block_on(Optimizer::new(gpu, config, &weights, &grads));
        // An update changes the moments even at a learning rate of 0, so a second optimiser is measured instead.
        let (slices, update) = measure(&exec, &optimizer()?, budget)?;
        let (gpu, pace) = (gpu.clone(), Pace::new(gpu, budget)?);
        let (optimizer, next, steps) = (optimizer()?, 0, 0);
        Ok(Learner { gpu, exec, optimizer, loss: last_loss, slices, update, pace, next, steps })
    }

    /// Records as many slices as fit the budget: at least one, and none beyond the end of the step.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let (may, mut taken) = (self.pace.begin(encoder)?, Duration::ZERO);
        while taken.is_zero() || (self.next > 0 && taken + self.estimate(self.next) <= may) {
            // A kernel may be too short for the clock to measure.
            taken += self.estimate(self.next).max(Duration::from_nanos(1));
            match self.slices.get(self.next) {
                Some(slice) => {
                    self.exec.record_slice(encoder, slice)?;
                    self.next += 1;
                }
                None => {
                    self.optimizer.record(encoder, LEARNING_RATE, self.steps)?;
                    (self.next, self.steps) = (0, self.steps + 1);
                }
            }
        }
        self.pace.end(encoder, taken)
    }

    /// Estimated time of a slice or, after the last one, of the update.
    fn estimate(&self, slice: usize) -> Duration {
        self.slices.get(slice).map_or(self.update, |s| s.estimate)
    }

    /// Time that slices take within frames, as a multiple of the estimates.
    pub fn pace(&self) -> f64 {
        self.pace.factor()
    }

    /// Number of slices of a step, including the update, and the time of the longest.
    pub fn slices(&self) -> (usize, Duration) {
        let longest = (0..=self.slices.len()).map(|i| self.estimate(i)).max();
        (self.slices.len() + 1, longest.unwrap_or_default())
    }

    /// Estimated time of a whole step.
    pub fn step_time(&self) -> Duration {
        (0..=self.slices.len()).map(|i| self.estimate(i)).sum()
    }

    /// Training steps completed.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The mean squared error of the most recent picture. Waits for the GPU, so frames do not call it.
    pub fn loss_blocking(&self) -> Result<f32> {
        Ok(self.exec.read_blocking::<f32>(self.loss)?[0])
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

/// Cuts the step into slices, several per budget, by its measured time here; also measures an update.
fn measure(exec: &Executable, optimizer: &Optimizer, budget: Duration) -> Result<(Vec<Slice>, Duration)> {
    let (mut step, mut update) = (exec.profile_blocking()?, optimizer.profile_blocking(0.0, 0)?);
    for _ in 0..3 {
        step = step.shorter(&exec.profile_blocking()?);
        update = update.shorter(&optimizer.profile_blocking(0.0, 0)?);
    }
    Ok((exec.slices(&step, budget / 4)?, Duration::from_nanos(update.ns())))
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
