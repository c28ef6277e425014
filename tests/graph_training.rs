//! Training of graphs that are not language models: steps against f64, files, slices, and what is told when something
//! is wrong.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use common::gpu;
use throughline::graph::ParamInit;
use throughline::nn::Builder;
use throughline::ops::adamw::AdamWSettings;
use throughline::ops::muon::MuonStep;
use throughline::ops::{Bind, Custom, Elements};
use throughline::optim::{
    AdamWConfig, Decay, LossScaleState, LossScaling, MuonConfig, OptimizerConfig, Schedule, SgdConfig,
};
use throughline::plan::Step;
use throughline::probe::{Measure, Probe, Tap};
use throughline::reference::{self, Array};
use throughline::rng::Rng;
use throughline::train::{
    Feeds, GraphCheckpoint, GraphTrainConfig, GraphTrainOptions, GraphTrainPlan, GraphTrainer, StepReport,
};
use throughline::{DType, ExecOptions, Executable, Graph, Precision, Result, Tensor, TensorType, Value};

const ROWS: usize = 24;
const WIDTH: usize = 12;

/// A network with one hidden layer, and its mean squared error.
struct Net {
    g: Graph,
    x: Value,
    y: Value,
    out: Value,
    loss: Value,
}

fn net(rows: usize, width: usize, dropout: f32) -> Net {
    let mut g = gpu().graph();
    let x = g.input("x", TensorType::f32([rows, 3])).unwrap();
    let y = g.input("y", TensorType::f32([rows, 2])).unwrap();
    let layer = |g: &mut Graph, name: &str, x: Value, d_out: usize| {
        let d_in = g.ty(x).shape.cols();
        let w = g.param_with(&format!("{name}.weight"), [d_in, d_out], ParamInit::fan_in(d_in)).unwrap();
        let b = g.param_with(&format!("{name}.bias"), [d_out], ParamInit::Uniform(0.1)).unwrap();
        g.linear(name, x, w, Some(b)).unwrap()
    };
    let first = layer(&mut g, "first", x, width);
    let mut hidden = g.gelu_tanh("gelu", first).unwrap();
    if dropout > 0.0 {
        let seed = g.step_seed().unwrap();
        hidden = g.dropout("drop", hidden, seed, dropout, 1).unwrap();
    }
    let hidden = layer(&mut g, "hidden", hidden, width);
    let out = layer(&mut g, "out", hidden, 2);
    let loss = g.mse("loss", out, y).unwrap();
    Net { g, x, y, out, loss }
}

/// Inputs and targets of a step.
fn data(step: u64, rows: usize) -> [Vec<f32>; 2] {
    let mut rng = Rng::new(&[9, step]);
    let xs: Vec<f32> = (0..3 * rows).map(|_| rng.normal() as f32).collect();
    let ys = xs.chunks(3).flat_map(|x| [x[0] * x[1], x[2].sin()]).collect();
    [xs, ys]
}

fn trainer(net: Net, config: GraphTrainConfig) -> (GraphTrainer, [Value; 3]) {
    let Net { g, x, y, out, loss } = net;
    let matrix = g.find("hidden.weight").unwrap();
    let options = GraphTrainOptions { outputs: vec![out], muon: Some(vec![matrix]), ..Default::default() };
    let trainer = GraphTrainer::with_options(gpu(), g, loss, config, &options);
    (gpu().run_blocking(trainer).unwrap(), [x, y, out])
}

fn train(trainer: &mut GraphTrainer, [x, y, _]: [Value; 3], until: u64) -> Vec<f32> {
    let mut losses = vec![];
    while trainer.step_count() < until {
        let [xs, ys] = data(trainer.step_count(), ROWS);
        losses.push(trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap().wait_blocking().unwrap());
    }
    losses
}

/// One of each, with every setting in use.
fn optimizers() -> Vec<OptimizerConfig> {
    let adamw = AdamWConfig { weight_decay: 0.2, max_grad_norm: 0.5, ..AdamWConfig::default() };
    let sgd = SgdConfig { momentum: 0.9, nesterov: false, weight_decay: 0.2, max_grad_norm: 0.5 };
    vec![
        adamw.into(),
        OptimizerConfig::Muon { muon: MuonConfig::default(), adamw },
        sgd.into(),
        SgdConfig { nesterov: true, ..sgd }.into(),
        SgdConfig { momentum: 0.0, ..sgd }.into(),
        SgdConfig::default().into(),
    ]
}

fn config(optimizer: OptimizerConfig) -> GraphTrainConfig {
    let schedule = Schedule { peak: 0.02, warmup: 2, steps: 9, final_fraction: 0.1, decay: Decay::Linear };
    GraphTrainConfig { schedule, seed: 5, ..GraphTrainConfig::new(optimizer, 0.0) }
}

fn values(trainer: &GraphTrainer) -> Vec<Vec<f32>> {
    let optimizer = trainer.optimizer();
    let arenas = [trainer.params(), &optimizer.m, &optimizer.v, trainer.frozen()];
    arenas.into_iter().flat_map(|arena| arena.read_blocking(gpu()).unwrap()).collect()
}

fn bits(values: &[Vec<f32>]) -> Vec<Vec<u32>> {
    values.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect()
}

fn fails<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else { panic!("no error with {words:?}") };
    let error = error.to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

// Steps.

/// A run in f64: the graph by the interpreter, the update by its formula.
struct Reference {
    net: Net,
    params: Vec<Value>,
    gradients: Vec<Value>,
    values: Vec<Array>,
    m: Vec<Array>,
    v: Vec<Array>,
}

impl Reference {
    fn new(mut net: Net, seed: u64) -> Self {
        let params = net.g.params();
        let gradients = net.g.gradients(net.loss, &params).unwrap();
        let initial = |&p: &Value| {
            let values = net.g.initial_values(p, seed).unwrap().into_iter().map(f64::from).collect();
            Array::new(net.g.ty(p).shape.clone(), values)
        };
        let values: Vec<Array> = params.iter().map(initial).collect();
        let zeros: Vec<Array> = values.iter().map(|v| v.map(|_| 0.0)).collect();
        Reference { net, params, gradients, values, m: zeros.clone(), v: zeros }
    }

    /// Makes a step and returns its loss.
    fn step(&mut self, config: &GraphTrainConfig, step: u64) -> f64 {
        let [xs, ys] = data(step, ROWS).map(|data| data.into_iter().map(f64::from).collect::<Vec<_>>());
        let given = self.params.iter().copied().zip(self.values.clone());
        let inputs = [(self.net.x, Array::new([ROWS, 3], xs)), (self.net.y, Array::new([ROWS, 2], ys))];
        let given = given.chain(inputs).collect();
        let wanted = [&self.gradients[..], &[self.net.loss]].concat();
        let mut got = reference::run(&self.net.g, &given, &wanted).unwrap();
        let loss = got.pop().unwrap().data[0];
        let norm = got.iter().flat_map(|g| &g.data).map(|g| g * g).sum::<f64>().sqrt();
        let lr = config.schedule.at(step);
        for (i, mut grad) in got.into_iter().enumerate() {
            let max = match config.optimizer {
                OptimizerConfig::AdamW(c) | OptimizerConfig::Muon { adamw: c, .. } => c.max_grad_norm,
                OptimizerConfig::Sgd(c) => c.max_grad_norm,
                _ => unreachable!(),
            };
            let clip = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
            grad = grad.map(|g| g * clip);
            match config.optimizer {
                OptimizerConfig::Sgd(c) => self.sgd(i, &grad, c, lr),
                OptimizerConfig::Muon { muon, .. } if self.net.g.name(self.params[i]) == "hidden.weight" => {
                    self.muon(i, &grad, muon, lr);
                }
                OptimizerConfig::AdamW(c) | OptimizerConfig::Muon { adamw: c, .. } => {
                    self.adamw(i, &grad, c, lr, step as i32 + 1);
                }
                _ => unreachable!(),
            }
        }
        loss
    }

    fn decay(&self, i: usize, decay: f64) -> f64 {
        if self.values[i].shape.rank() > 1 { decay } else { 0.0 }
    }

    fn sgd(&mut self, i: usize, grad: &Array, c: SgdConfig, lr: f64) {
        let decay = self.decay(i, c.weight_decay);
        let g = grad.zip(&self.values[i], |g, p| g + decay * p);
        self.m[i] = self.m[i].zip(&g, |v, g| c.momentum * v + g);
        let step = if c.nesterov { g.zip(&self.m[i], |g, v| g + c.momentum * v) } else { self.m[i].clone() };
        self.values[i] = self.values[i].zip(&step, |p, s| p - lr * s);
    }

    fn adamw(&mut self, i: usize, grad: &Array, c: AdamWConfig, lr: f64, step: i32) {
        let [beta1, beta2] = [c.beta1 as f32, c.beta2 as f32].map(f64::from);
        self.m[i] = self.m[i].zip(grad, |m, g| beta1 * m + (1.0 - beta1) * g);
        self.v[i] = self.v[i].zip(grad, |v, g| beta2 * v + (1.0 - beta2) * g * g);
        let corrected = self.m[i]
            .zip(&self.v[i], |m, v| (m / (1.0 - beta1.powi(step))) / ((v / (1.0 - beta2.powi(step))).sqrt() + c.eps));
        let keep = 1.0 - lr * self.decay(i, c.weight_decay);
        self.values[i] = self.values[i].zip(&corrected, |p, s| keep * p - lr * s);
    }

    /// By the definition of the op in f64, which tests/muon.rs compares with PyTorch.
    fn muon(&mut self, i: usize, grad: &Array, c: MuonConfig, lr: f64) {
        let mut g = Graph::new();
        let shape = grad.shape.clone();
        let ty = TensorType::f32(shape.clone());
        let arenas = ["p", "g", "m"].map(|name| g.input(name, ty.clone()).unwrap());
        let [hyper, norm] = [("hyper", 4), ("norm", 1)].map(|(name, n)| g.input(name, TensorType::f32([n])).unwrap());
        let rate = c.scale.of(shape.rows(), shape.cols());
        let step = MuonStep { nesterov: c.nesterov, steps: c.steps, rate };
        let new = g.muon("muon", arenas, hyper, norm, step).unwrap();
        let settings = Array::new([4], vec![lr * c.lr_factor, c.momentum, c.weight_decay, 0.0]);
        let given = arenas.into_iter().zip([&self.values[i], grad, &self.m[i]].map(Array::clone));
        let given = given.chain([(hyper, settings), (norm, Array::zeros([1]))]).collect();
        let mut got = reference::run(&g, &given, &new).unwrap().into_iter();
        (self.values[i], self.m[i]) = (got.next().unwrap(), got.next().unwrap());
    }
}

#[test]
fn steps_of_every_optimizer_are_those_in_f64() {
    for optimizer in optimizers() {
        let config = config(optimizer);
        let mut reference = Reference::new(net(ROWS, WIDTH, 0.0), config.seed);
        let (mut trainer, [x, y, out]) = trainer(net(ROWS, WIDTH, 0.0), config.clone());
        for step in 0..6 {
            let [xs, ys] = data(step, ROWS);
            let loss = trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap();
            assert_eq!(loss.step, step);
            let (got, want) = (f64::from(loss.wait_blocking().unwrap()), reference.step(&config, step));
            assert!((got - want).abs() < 1e-5 * want, "{optimizer:?}: loss of step {step}: {got}, expected {want}");
        }
        let got = trainer.params().read_blocking(gpu()).unwrap();
        for (((name, _), got), want) in trainer.params().layout.tensors.iter().zip(got).zip(&reference.values) {
            let nmse = reference::nmse(&got, &want.data);
            assert!(nmse < 1e-9, "{optimizer:?}: `{name}`: {nmse:.1e}");
        }
        assert_eq!(trainer.read_blocking::<f32>(out).unwrap().len(), 2 * ROWS);
    }
}

#[test]
fn memory_for_moments_is_what_the_optimizer_needs() {
    let lens = optimizers().into_iter().map(|optimizer| {
        let (trainer, _) = trainer(net(ROWS, WIDTH, 0.0), config(optimizer));
        [&trainer.optimizer().m, &trainer.optimizer().v].map(|arena| arena.layout.tensors.len())
    });
    assert_eq!(Vec::from_iter(lens), [[6, 6], [6, 5], [6, 0], [6, 0], [0, 0], [0, 0]]);
}

#[test]
fn micro_batches_are_one_large_batch() {
    let large = config(AdamWConfig::default().into());
    let small = GraphTrainConfig { micro_batches: 2, ..large.clone() };
    let (mut large, [x, y, _]) = trainer(net(ROWS, WIDTH, 0.0), large);
    let (mut small, [half_x, half_y, _]) = trainer(net(ROWS / 2, WIDTH, 0.0), small);
    for step in 0..3 {
        let [xs, ys] = data(step, ROWS);
        let one = large.step(&[x.with(&xs), y.with(&ys)]).unwrap().wait_blocking().unwrap();
        let halves = xs.chunks(3 * ROWS / 2).zip(ys.chunks(ROWS)).map(|(xs, ys)| [half_x.with(xs), half_y.with(ys)]);
        let halves = Feeds::micro_batches(halves);
        // Halves of equal weight are what is taken by default.
        let halves = if step == 1 { halves.weighted([0.5, 0.5]) } else { halves };
        let two = small.step(halves).unwrap().wait_blocking().unwrap();
        assert!((one - two).abs() < 1e-5 * one, "step {step}: {one} and {two}");
        let [one, two] = [&large, &small].map(|t| t.grads().read_blocking(gpu()).unwrap().concat());
        assert!(common::worst(&one, &two) < 1e-6, "step {step}");
    }
    // What only the first of them feeds stays for the others; a weight of zero takes a micro-batch out.
    let [xs, ys] = data(7, ROWS / 2);
    let both = [half_x.with(&xs), half_y.with(&ys)];
    let none: [throughline::train::Feed<'_>; 0] = [];
    let mut step = |feeds: Feeds<'_>| small.step(feeds).unwrap().wait_blocking().unwrap();
    let twice = step(Feeds::micro_batches([&both[..], &none[..]]));
    let (mut other, [other_x, other_y, _]) = trainer(net(ROWS / 2, WIDTH, 0.0), config(AdamWConfig::default().into()));
    other.params().write(gpu(), &large.params().read_blocking(gpu()).unwrap()).unwrap();
    let alone = other.step(&[other_x.with(&xs), other_y.with(&ys)]).unwrap().wait_blocking().unwrap();
    assert!((twice - alone).abs() < 1e-4 * alone, "{twice} and {alone}");
    let [others, _] = data(8, ROWS / 2);
    let first = step(Feeds::micro_batches([&both[..], &[half_x.with(&others)]]).weighted([1.0, 0.0]));
    assert!(first.is_finite() && first < 2.0 * twice, "{first}");
}

#[test]
fn slices_are_the_step() {
    for (micro_batches, precision) in [(1, Precision::F32), (2, Precision::F32), (2, Precision::MIXED)] {
        let config = GraphTrainConfig { micro_batches, precision, ..config(AdamWConfig::default().into()) };
        let (mut whole, [x, y, _]) = trainer(net(ROWS, WIDTH, 0.2), config.clone());
        let (mut sliced, [sliced_x, sliced_y, _]) = trainer(net(ROWS, WIDTH, 0.2), config);
        for step in 0..3 {
            let all = Vec::from_iter((0..micro_batches as u64).map(|i| data(2 * step + i, ROWS)));
            let feeds = |[x, y]: [Value; 2]| Feeds::micro_batches(all.iter().map(|[xs, ys]| [x.with(xs), y.with(ys)]));
            let want = whole.step(feeds([x, y])).unwrap().wait_blocking().unwrap();
            if step == 0 {
                sliced.profile_blocking(feeds([sliced_x, sliced_y])).unwrap();
                continue;
            }
            let (mut probe, _) = trainer(net(ROWS, WIDTH, 0.2), sliced.config().clone());
            let [px, py] =
                ["x", "y"].map(|name| probe.plan().externals().iter().find(|e| e.name == name).unwrap().value);
            let profile = probe.profile_blocking(feeds([px, py])).unwrap();
            let slices = sliced.slices(&profile, Duration::from_nanos(1)).unwrap();
            let mut progress = sliced.start_sliced(&slices, feeds([sliced_x, sliced_y])).unwrap();
            let (mut count, mut loss) = (0, None);
            while loss.is_none() {
                let mut encoder = gpu().device().create_command_encoder(&Default::default());
                loss = sliced.record_slice(&mut encoder, &mut progress).unwrap();
                count += 1;
                // An encoder that is dropped starts the step over.
                if step == 2 && count == 3 {
                    drop(encoder);
                } else {
                    gpu().submit(encoder).unwrap();
                }
            }
            assert!(count > 10, "{count} slices");
            assert_eq!(loss.unwrap().wait_blocking::<f32>().unwrap()[0].to_bits(), want.to_bits());
            assert_eq!(bits(&values(&sliced)), bits(&values(&whole)), "step {step}");
        }
    }
}

#[test]
fn a_step_in_a_dropped_encoder_does_not_count() {
    let (mut trainer, [x, y, _]) = trainer(net(ROWS, WIDTH, 0.2), config(AdamWConfig::default().into()));
    let [xs, ys] = data(0, ROWS);
    trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap();
    let before = values(&trainer);
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    let loss = trainer.record(&mut encoder, &[x.with(&xs), y.with(&ys)]).unwrap();
    assert_eq!(trainer.step_count(), 2);
    drop(encoder);
    fails(loss.wait_blocking::<f32>(), &["not submitted"]);
    assert_eq!((trainer.step_count(), bits(&values(&trainer))), (1, bits(&before)));
    // What is not fed keeps what it has.
    let loss = trainer.step(&[]).unwrap();
    assert!(loss.step == 1 && loss.wait_blocking().unwrap().is_finite());
    assert_ne!(bits(&values(&trainer)), bits(&before));
}

#[test]
fn a_network_of_ones_own_learns() {
    for (optimizer, lr) in [
        (OptimizerConfig::default(), 0.02),
        (OptimizerConfig::Muon { muon: MuonConfig::default(), adamw: AdamWConfig::default() }, 0.02),
        (SgdConfig { momentum: 0.9, ..SgdConfig::default() }.into(), 0.05),
    ] {
        let (mut trainer, [x, y, _]) = trainer(net(256, 32, 0.0), GraphTrainConfig::new(optimizer, lr));
        let mut step = |i| {
            let [xs, ys] = data(i, 256);
            trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap()
        };
        let first = step(0).wait_blocking().unwrap();
        (1..200).for_each(|i| drop(step(i)));
        let last = step(200).wait_blocking().unwrap();
        println!("{optimizer:?}: from {first} to {last}");
        assert!(last < 0.3 * first, "{optimizer:?}: from {first} to {last}");
        assert_eq!(trainer.loss_blocking().unwrap(), last);
    }
}

/// Elementwise parameters have gradients of one shape, so that one kernel computes several of them. All are in one arena.
#[test]
fn gradients_of_one_kernel_may_share_a_buffer() {
    let mut rng = Rng::new(&[3]);
    let [x, wanted] = [(); 2].map(|()| (0..64).map(|_| rng.normal() as f32).collect::<Vec<f32>>());
    for micro_batches in [1, 2] {
        let mut g = gpu().graph();
        let [a, b] = ["x", "wanted"].map(|name| g.input(name, TensorType::f32([64])).unwrap());
        let gain = g.param_with("gain", [64], ParamInit::Normal(1.0)).unwrap();
        let slope = g.param_with("slope", [64], ParamInit::Normal(1.0)).unwrap();
        let steep = g.mul("steep", slope, a).unwrap();
        let curve = g.exp("curve", steep).unwrap();
        let y = g.mul("y", gain, curve).unwrap();
        let loss = g.mse("loss", y, b).unwrap();
        let [gains, slopes] = [gain, slope].map(|v| g.initial_values(v, 0).unwrap());
        let config = GraphTrainConfig { micro_batches, ..GraphTrainConfig::sgd(1e-3) };
        let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, config).unwrap();
        let several = |step: &Step| step.outputs().iter().filter(|(_, ty)| ty.len() == 64).count() > 1;
        assert!(trainer.plan().steps().iter().any(several), "{}", trainer.plan());
        trainer.step(Feeds::micro_batches(vec![[a.with(&x), b.with(&wanted)]; micro_batches])).unwrap();
        let gradients = trainer.grads().read_blocking(gpu()).unwrap();
        for i in 0..64 {
            let [x, wanted, gain, slope] = [&x, &wanted, &gains, &slopes].map(|list| f64::from(list[i]));
            let curve = (slope * x).exp();
            let dy = 2.0 / 64.0 * (gain * curve - wanted);
            for (got, want) in gradients.iter().zip([dy * curve, dy * gain * curve * x]) {
                let got = f64::from(got[i]);
                assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{i}: {got} instead of {want}");
            }
        }
    }
}

// Options.

#[test]
fn frozen_parameters_stay_and_are_part_of_the_model() {
    let build = || {
        let net = net(ROWS, WIDTH, 0.0);
        let frozen = ["first.weight", "first.bias"].map(|name| net.g.find(name).unwrap());
        (net, frozen)
    };
    let (Net { g, x, y, loss, .. }, frozen) = build();
    // One of them in a tensor of the app's, and the other named twice.
    let bias = Tensor::zeros(gpu(), "bias", TensorType::f32([WIDTH])).unwrap();
    bias.write(gpu(), &[0.5f32; WIDTH]).unwrap();
    let options = GraphTrainOptions {
        frozen: vec![frozen[0], frozen[1], frozen[0]],
        bindings: HashMap::from([(frozen[1], bias.clone())]),
        ..GraphTrainOptions::default()
    };
    let initial = g.initial_values(frozen[0], 5).unwrap();
    let config = config(AdamWConfig::default().into());
    let made = GraphTrainer::with_options(gpu(), g, loss, config, &options);
    let mut trainer = gpu().run_blocking(made).unwrap();
    let names =
        |arena: &throughline::optim::Arena| arena.layout.tensors.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(trainer.params()), ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]);
    assert_eq!(names(trainer.frozen()), ["first.weight"]);
    train(&mut trainer, [x, y, x], 3);
    assert_eq!(trainer.frozen().read_blocking(gpu()).unwrap(), [initial]);
    assert_eq!(bias.read_blocking::<f32>(gpu()).unwrap(), [0.5; WIDTH]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    trainer.save_blocking(&path).unwrap();
    let found = throughline::format::Weights::open(&path).unwrap();
    assert_eq!(found.len(), 5);
    trainer.load_blocking(&path).unwrap();
    // Other graphs see all of them.
    let (other, _) = build();
    assert_eq!(trainer.bindings(&other.g).unwrap().len(), 6);
    let exec = trainer.executable_blocking(&other.g, &[other.loss]).unwrap();
    let [xs, ys] = data(3, ROWS);
    exec.write(other.x, &xs).unwrap();
    exec.write(other.y, &ys).unwrap();
    exec.submit().unwrap();
    let want = exec.read_blocking::<f32>(other.loss).unwrap()[0];
    let got = trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap().wait_blocking().unwrap();
    assert_eq!(got.to_bits(), want.to_bits());
}

#[test]
fn tensors_of_the_app_are_read_and_written() {
    let Net { mut g, x, y, out, loss } = net(ROWS, WIDTH, 0.0);
    let picture = g.state("picture", g.ty(out).clone()).unwrap();
    g.store(out, picture).unwrap();
    let [xs, ys] = data(0, ROWS);
    let zeros = |name: &str, n| Tensor::zeros(gpu(), name, TensorType::f32([ROWS, n])).unwrap();
    let (target, output) = (zeros("target", 2), zeros("output", 2));
    target.write(gpu(), &ys).unwrap();
    let probes = vec![Probe::new("weight", Tap::forward("out.weight"), Measure::Rms)];
    let probes = [probes, vec![Probe::new("gradient", Tap::gradient("out.weight"), Measure::Rms)]].concat();
    let bindings = HashMap::from([(y, target), (picture, output.clone())]);
    let options = GraphTrainOptions { outputs: vec![out], bindings, probes, ..GraphTrainOptions::default() };
    let config = config(AdamWConfig::default().into());
    let made = GraphTrainer::with_options(gpu(), g, loss, config, &options);
    let mut trainer = gpu().run_blocking(made).unwrap();
    trainer.write(x, &xs).unwrap();
    let first = trainer.step(&[]).unwrap().wait_blocking().unwrap();
    assert_eq!(output.read_blocking::<f32>(gpu()).unwrap(), trainer.read_blocking::<f32>(out).unwrap());
    let readings = trainer.take_probes().unwrap().wait_blocking().unwrap();
    let i = trainer.params().layout.tensors.iter().position(|(name, _)| name == "out.weight").unwrap();
    let grads = trainer.grads().read_blocking(gpu()).unwrap().swap_remove(i);
    let rms = (grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>() / grads.len() as f64).sqrt();
    let got = readings.get("gradient", None).unwrap();
    assert!((got - rms).abs() < 1e-5 * rms, "{got}, expected {rms}");
    assert!(trainer.take_probes().is_none());
    for _ in 0..20 {
        trainer.step(&[]).unwrap();
    }
    assert!(trainer.loss_blocking().unwrap() < first);
}

#[test]
fn a_plan_knows_memory_and_needs_before_there_is_a_device() {
    let config = GraphTrainConfig { micro_batches: 2, ..config(AdamWConfig::default().into()) };
    let Net { g, loss, .. } = net(ROWS, WIDTH, 0.1);
    let options = GraphTrainOptions::default();
    let plan = GraphTrainPlan::new(g.clone(), loss, &config, &options, gpu().profile()).unwrap();
    assert_eq!(plan.parameter_count(), 3 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2);
    plan.requirements().check(&gpu().device().limits()).unwrap();
    let trainer = gpu().run_blocking(GraphTrainer::from_plan(gpu(), &plan, &HashMap::new())).unwrap();
    assert_eq!((trainer.buffer_bytes(), trainer.parameter_count()), (plan.bytes(), plan.parameter_count()));
    let bias = Tensor::zeros(gpu(), "bias", TensorType::f32([2])).unwrap();
    let bound = HashMap::from([(g.find("out.bias").unwrap(), bias)]);
    fails(gpu().run_blocking(GraphTrainer::from_plan(gpu(), &plan, &bound)), &["`out.bias` cannot be bound"]);
    let bytes = plan.bytes() as u64;
    let within = |max| {
        let options = GraphTrainOptions { max_bytes: Some(max), ..GraphTrainOptions::default() };
        GraphTrainPlan::new(g.clone(), loss, &config, &options, gpu().profile())
    };
    within(bytes).unwrap();
    fails(within(bytes - 1), &["`max_bytes`", &bytes.to_string(), &(bytes - 1).to_string(), "230 parameters"]);
}

// Steps.

/// A step cut into submits, down to one for each kernel, is the step: of every optimiser, of micro-batches, with
/// dropout and probes.
#[test]
fn a_step_in_many_submits_gives_the_same_bits() {
    let [whole, each] = [Duration::from_secs(1000), Duration::ZERO];
    for optimizer in optimizers() {
        for micro_batches in [1, 3] {
            let run = |time: Duration| {
                let config = GraphTrainConfig { micro_batches, ..config(optimizer) };
                let (mut trainer, [x, y, out]) = trainer(net(ROWS, WIDTH, 0.2), config);
                trainer.set_submit_time(time);
                let (mut losses, mut submits) = (vec![], vec![]);
                for step in 0..3 {
                    let batches: Vec<_> = (0..micro_batches as u64).map(|i| data(3 * step + i, ROWS)).collect();
                    let feeds = batches.iter().map(|[xs, ys]| [x.with(xs), y.with(ys)]);
                    let loss = trainer.step(Feeds::micro_batches(feeds)).unwrap();
                    submits.push(loss.submits);
                    losses.push(loss.wait_blocking().unwrap());
                }
                let commands = micro_batches * trainer.plan().dispatches() + trainer.optimizer().plan().dispatches();
                let values = [values(&trainer), vec![trainer.read_blocking(out).unwrap(), losses]].concat();
                (bits(&values), submits, commands)
            };
            let (want, submits, _) = run(whole);
            assert_eq!(submits, [1; 3]);
            let (got, submits, commands) = run(each);
            assert!(submits.iter().all(|&n| n >= commands), "{submits:?} submits of {commands} dispatches");
            assert_eq!(got, want, "{optimizer:?}, {micro_batches} micro-batches");
        }
    }
}

#[test]
fn the_longer_a_step_takes_the_more_submits_it_is_cut_into() {
    let (mut trainer, inputs) = trainer(net(4096, 64, 0.0), config(AdamWConfig::default().into()));
    let [xs, ys] = data(0, 4096);
    let feeds = [inputs[0].with(&xs), inputs[1].with(&ys)];
    // What is measured comes to bear.
    for _ in 0..3 {
        trainer.step(&feeds).unwrap().wait_blocking().unwrap();
    }
    let started = Instant::now();
    trainer.step(&feeds).unwrap().wait_blocking().unwrap();
    let time = started.elapsed();
    let mut submits = |parts: u32| {
        trainer.set_submit_time(time / parts);
        let loss = trainer.step(&feeds).unwrap();
        let submits = loss.submits;
        loss.wait_blocking().unwrap();
        submits
    };
    let [one, two, eight] = [submits(1), submits(2), submits(8)];
    assert!(one <= 3 && one <= two && two <= eight && (4..=32).contains(&eight), "{one}, {two}, {eight}");
}

/// Where the first submits of a step go through and a later one does not, nothing goes on as if all were well.
#[test]
fn a_step_that_was_submitted_in_part_is_told_until_a_checkpoint_is_restored() {
    let Net { g, x, y, loss, .. } = net(ROWS, WIDTH, 0.0);
    let [xs, ys] = data(0, ROWS);
    let target = Tensor::zeros(gpu(), "target", TensorType::f32([ROWS, 2])).unwrap();
    target.write(gpu(), &ys).unwrap();
    let options = GraphTrainOptions { bindings: HashMap::from([(y, target.clone())]), ..Default::default() };
    let config = config(AdamWConfig::default().into());
    let mut trainer = GraphTrainer::with_options_blocking(gpu(), g, loss, config, &options).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    trainer.step(&[x.with(&xs)]).unwrap();
    trainer.save_checkpoint_blocking(&path).unwrap();

    // In one submit, all of it fails, and the trainer is as it was.
    target.buffer().destroy();
    fails(trainer.step(&[x.with(&xs)]), &["submit 1 of the training step 1", "destroyed"]);
    assert_eq!(trainer.step_count(), 1);
    trainer.save_checkpoint_blocking(&path).unwrap();

    // In several, those before the loss go through.
    trainer.set_submit_time(Duration::ZERO);
    fails(trainer.step(&[x.with(&xs)]), &["of the training step 1", "destroyed"]);
    assert_eq!(trainer.step_count(), 1);
    let words = ["submits of step 1 went through", "restore a checkpoint", "destroyed"];
    fails(trainer.step(&[x.with(&xs)]), &words);
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    fails(trainer.record(&mut encoder, &[x.with(&xs)]), &words);
    fails(trainer.profile_blocking(&[x.with(&xs)]), &words);
    fails(trainer.save_blocking(&path), &words);
    fails(trainer.save_checkpoint_blocking(&path), &words);
    trainer.resume_blocking(&path).unwrap();
    trainer.save_checkpoint_blocking(&path).unwrap();
    fails(trainer.step(&[x.with(&xs)]), &["of the training step 1", "destroyed"]);
}

#[test]
fn a_resumed_run_equals_an_unbroken_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let each = |precision| optimizers().into_iter().map(move |optimizer| (optimizer, precision));
    for (optimizer, precision) in each(Precision::F32).chain(each(Precision::MIXED)) {
        let make = || trainer(net(ROWS, WIDTH, 0.2), GraphTrainConfig { precision, ..config(optimizer) });
        let (mut whole, inputs) = make();
        let losses = train(&mut whole, inputs, 7);
        let (mut first, inputs) = make();
        train(&mut first, inputs, 3);
        first.save_checkpoint_blocking(&path).unwrap();
        let (mut second, inputs) = make();
        second.resume_blocking(&path).unwrap();
        assert_eq!(bits(&values(&second)), bits(&values(&first)), "{optimizer:?}");
        drop(first);
        assert_eq!(second.step_count(), 3);
        assert_eq!(bits(&[train(&mut second, inputs, 7)]), bits(&[losses[3..].to_vec()]), "{optimizer:?}");
        assert_eq!(bits(&values(&second)), bits(&values(&whole)), "{optimizer:?}");
        // The weights alone do for inference.
        let (third, _) = make();
        third.load_blocking(&path).unwrap();
        assert_eq!(third.step_count(), 0);
    }
}

// Loss scaling.

/// Scales from tiny ones to one at which squares of any gradient overflow in f32.
fn scaling() -> LossScaling {
    let (least, largest) = (2f64.powi(-40), 2f64.powi(100));
    LossScaling { initial: 1024.0, backoff: 2f64.powi(-16), least, largest, ..LossScaling::default() }
}

fn scaled(optimizer: OptimizerConfig) -> GraphTrainConfig {
    GraphTrainConfig { loss_scaling: Some(scaling()), ..config(optimizer) }
}

fn state(trainer: &GraphTrainer) -> LossScaleState {
    trainer.loss_scale_blocking().unwrap().unwrap()
}

/// A step on this data, the same for all micro-batches.
fn step_on(trainer: &mut GraphTrainer, [x, y, _]: [Value; 3], index: u64) -> StepReport {
    let [xs, ys] = data(index, ROWS);
    let micro_batches = trainer.config().micro_batches;
    let feeds = Feeds::micro_batches(vec![[x.with(&xs), y.with(&ys)]; micro_batches]);
    trainer.step(feeds).unwrap().report_blocking().unwrap()
}

#[test]
fn a_step_that_overflows_changes_nothing_but_the_scale() {
    let norm = |t: &GraphTrainer| t.optimizer().grad_norm().unwrap().read_blocking::<f32>(gpu()).unwrap();
    let cases = optimizers().into_iter().flat_map(|optimizer| [1, 3].map(|micro_batches| (optimizer, micro_batches)));
    for (optimizer, micro_batches) in cases {
        let config = GraphTrainConfig { micro_batches, ..scaled(optimizer) };
        let (mut whole, inputs) = trainer(net(ROWS, WIDTH, 0.0), config.clone());
        let want = Vec::from_iter((0..6).map(|i| step_on(&mut whole, inputs, i)));
        let (mut other, inputs) = trainer(net(ROWS, WIDTH, 0.0), config);
        for (i, want) in want[..3].iter().enumerate() {
            assert_eq!(step_on(&mut other, inputs, i as u64), *want);
            assert!(!want.skipped && want.loss_scale == 1024.0);
        }
        let before = values(&other);
        other.set_loss_scale(2f32.powi(100)).unwrap();
        let mut scale = 2f32.powi(100);
        for skipped in 1..=3 {
            let report = step_on(&mut other, inputs, 3);
            let expected = StepReport { loss: want[3].loss, loss_scale: scale, skipped: true };
            assert_eq!(report, expected, "{optimizer:?}");
            assert_eq!(bits(&values(&other)), bits(&before), "{optimizer:?}");
            scale *= 2f32.powi(-16);
            assert_eq!(state(&other), LossScaleState { scale, finite: 0, applied: 3, skipped });
            assert_eq!(norm(&other), [f32::INFINITY]);
        }
        // The scale is now 2^52, and powers of two change no digit: what follows is what would have.
        for (i, want) in want.iter().enumerate().skip(3) {
            let report = step_on(&mut other, inputs, i as u64);
            assert_eq!(report, StepReport { loss_scale: 2f32.powi(52), ..*want }, "{optimizer:?}");
        }
        assert_eq!(bits(&values(&other)), bits(&values(&whole)), "{optimizer:?}, {micro_batches} micro-batches");
        assert_eq!((other.step_count(), state(&other).applied), (9, 6));
        assert_eq!(norm(&other), norm(&whole));
    }
}

/// Rates and bias corrections are computed on the device in f32, to within some units in the last place of those that
/// the host computes in f64. Everything else has the same bits.
#[test]
fn scaled_steps_are_those_without_a_scale() {
    for optimizer in optimizers() {
        for constant in [false, true] {
            let mut plain = config(optimizer);
            if constant {
                plain.schedule = Schedule::constant(0.02);
            }
            let run = |config: GraphTrainConfig| {
                let (mut trainer, inputs) = trainer(net(ROWS, WIDTH, 0.0), config);
                let losses = Vec::from_iter((0..6).map(|i| step_on(&mut trainer, inputs, i).loss));
                (losses, values(&trainer))
            };
            let (losses, want) = run(plain.clone());
            let (scaled_losses, got) = run(GraphTrainConfig { loss_scaling: Some(scaling()), ..plain });
            let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let off = worst(&got.concat(), &want.concat());
            println!("{optimizer:?}, constant {constant}: {off:.1e}");
            // Steps of up to 0.02 are off by less than a millionth, which may round a parameter to its neighbour, of
            // which those near 1 are 1.2e-7 apart. Muon's iteration amplifies what is small in a matrix.
            let allowed = if matches!(optimizer, OptimizerConfig::Muon { .. }) { 2e-6 } else { 2.4e-7 };
            assert!(off <= allowed && worst(&losses, &scaled_losses) < 1e-6, "{optimizer:?}: {off:.1e}");
            if constant && matches!(optimizer, OptimizerConfig::Sgd(_)) {
                assert_eq!(bits(&got), bits(&want), "{optimizer:?}");
            }
        }
    }
}

/// The device's rate and bias corrections at every step, as the host has them.
#[test]
fn schedules_of_the_device_are_those_of_the_host() {
    let mut g = gpu().graph();
    let hyper = g.input("hyper", TensorType::f32([8])).unwrap();
    let schedule = g.input("schedule", TensorType::f32([5])).unwrap();
    let counts = g.input("counts", TensorType::u32([3])).unwrap();
    let settings = g.scheduled("settings", hyper, schedule, counts).unwrap();
    let plan = gpu().plan(&g, &[settings]).unwrap();
    let exec = Executable::new_blocking(gpu(), plan.into(), ExecOptions::default()).unwrap();
    let (beta1, beta2) = (0.9f32, 0.999f32);
    let [log1, log2] = [beta1, beta2].map(|beta| f64::from(beta).ln() as f32);
    exec.write(hyper, &[1.0, beta1, beta2, 1e-8, 0.1, log1, log2, 1.0]).unwrap();
    let mut worst = 0.0f64;
    for (kind, decay) in [Decay::Constant, Decay::Cosine, Decay::Linear].into_iter().enumerate() {
        let on_host = Schedule { peak: 3e-3, warmup: 10, steps: 150, final_fraction: 0.0, decay };
        exec.write(schedule, &[3e-3, 10.0, 150.0, 0.0, kind as f32]).unwrap();
        for step in (0..160).step_by(3).chain([149, 150, 4000, 16_000_000]) {
            exec.write(counts, &[0, step + 1, 0]).unwrap();
            exec.submit().unwrap();
            let got = exec.read_blocking::<f32>(settings).unwrap();
            let lr = on_host.at(step.into()) as f32;
            let settings = AdamWSettings { lr, beta1, beta2, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
            let want = settings.at_step(u64::from(step) + 1).unwrap();
            for (i, (got, want)) in got.into_iter().zip(want).map(|(a, b)| (f64::from(a), f64::from(b))).enumerate() {
                let off = if want == 0.0 { got.abs() } else { (got / want - 1.0).abs() };
                assert!(off < 6e-7, "{decay:?} at {step}: setting {i} is {got:e}, expected {want:e}");
                worst = worst.max(off);
            }
        }
    }
    println!("off by {worst:.1e}");
}

#[test]
fn scales_grow_and_shrink_within_their_bounds() {
    let growing = LossScaling { growth: 4.0, growth_interval: 2, initial: 16.0, largest: 128.0, ..scaling() };
    let config = |scaling| GraphTrainConfig { loss_scaling: Some(scaling), ..config(SgdConfig::default().into()) };
    let (mut trainer, inputs) = trainer(net(ROWS, WIDTH, 0.0), config(growing));
    let expected = [(16.0, 1), (64.0, 0), (64.0, 1), (128.0, 0), (128.0, 1), (128.0, 0)];
    for (i, (scale, finite)) in expected.into_iter().enumerate() {
        step_on(&mut trainer, inputs, i as u64);
        assert_eq!(state(&trainer), LossScaleState { scale, finite, applied: i as u32 + 1, skipped: 0 });
    }
    // What the user says of the count of steps is what the device counts on from.
    trainer.set_step_count(70).unwrap();
    assert_eq!(state(&trainer), LossScaleState { scale: 128.0, finite: 0, applied: 70, skipped: 0 });

    let stuck = LossScaling { initial: 2f64.powi(97), least: 2f64.powi(90), ..scaling() };
    let (mut trainer, inputs) = self::trainer(net(ROWS, WIDTH, 0.0), config(stuck));
    let before = values(&trainer);
    for (skipped, scale) in [(1, 90), (2, 90)] {
        assert!(step_on(&mut trainer, inputs, 0).skipped);
        assert_eq!(state(&trainer), LossScaleState { scale: 2f32.powi(scale), finite: 0, applied: 0, skipped });
    }
    assert_eq!(bits(&values(&trainer)), bits(&before));
}

/// With steps that overflow, some before the checkpoint and some after it.
#[test]
fn a_scaled_run_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let growing = LossScaling { growth: 2f64.powi(16), growth_interval: 2, initial: 2f64.powi(40), ..scaling() };
    for optimizer in optimizers() {
        let make =
            || trainer(net(ROWS, WIDTH, 0.2), GraphTrainConfig { loss_scaling: Some(growing), ..config(optimizer) });
        let run = |trainer: &mut GraphTrainer, inputs: [Value; 3], until: u64| {
            let steps = trainer.step_count()..until;
            Vec::from_iter(steps.map(|i| step_on(trainer, inputs, i)))
        };
        let (mut whole, inputs) = make();
        let reports = run(&mut whole, inputs, 12);
        let skipped = |reports: &[StepReport]| reports.iter().filter(|report| report.skipped).count();
        assert!(skipped(&reports[..7]) > 0 && skipped(&reports[7..]) > 0, "{reports:?}");
        let (mut first, inputs) = make();
        run(&mut first, inputs, 7);
        first.save_checkpoint_blocking(&path).unwrap();
        let (mut second, inputs) = make();
        second.resume_blocking(&path).unwrap();
        assert_eq!((second.step_count(), state(&second)), (7, state(&first)));
        assert_eq!(run(&mut second, inputs, 12), reports[7..], "{optimizer:?}");
        assert_eq!(bits(&values(&second)), bits(&values(&whole)), "{optimizer:?}");
        assert_eq!(state(&second), state(&whole));
    }
}

#[test]
fn checkpoints_with_and_without_a_scale_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let optimizer: OptimizerConfig = AdamWConfig::default().into();
    let (mut plain, inputs) = trainer(net(ROWS, WIDTH, 0.0), config(optimizer));
    train(&mut plain, inputs, 2);
    assert_eq!(plain.loss_scale_blocking().unwrap(), None);
    fails(plain.set_loss_scale(2.0), &["`loss_scaling`", "off"]);
    plain.save_checkpoint_blocking(&path).unwrap();
    let (mut other, inputs) = trainer(net(ROWS, WIDTH, 0.0), scaled(optimizer));
    fails(other.resume_blocking(&path), &["run.safetensors", "`loss_scaling` is not in the file"]);
    // Whoever means it. All steps so far were applied.
    GraphCheckpoint::open(&path).unwrap().restore_blocking(&mut other).unwrap();
    let expected = LossScaleState { scale: 1024.0, finite: 0, applied: 2, skipped: 0 };
    assert_eq!((other.step_count(), state(&other)), (2, expected));

    other.set_loss_scale(2f32.powi(100)).unwrap();
    assert!(step_on(&mut other, inputs, 2).skipped);
    other.save_checkpoint_blocking(&path).unwrap();
    fails(plain.resume_blocking(&path), &["run.safetensors", "`loss_scaling` is only in the file"]);
    let checkpoint = GraphCheckpoint::open(&path).unwrap();
    assert_eq!(checkpoint.loss_scale, Some(state(&other)));
    checkpoint.restore_blocking(&mut plain).unwrap();
    assert_eq!(plain.step_count(), 3);
    // A scale that other settings do not allow is brought within their bounds.
    let small = LossScaling { largest: 4096.0, ..scaling() };
    let small = GraphTrainConfig { loss_scaling: Some(small), ..config(optimizer) };
    let (mut small, _) = trainer(net(ROWS, WIDTH, 0.0), small);
    checkpoint.restore_blocking(&mut small).unwrap();
    assert_eq!(state(&small), LossScaleState { scale: 4096.0, finite: 0, applied: 2, skipped: 1 });

    // Of the same length, so that the header need not be written anew.
    let file = std::fs::read(&path).unwrap();
    let edited = |from: &str, to: &str, words: &[&str]| {
        assert_eq!(from.len(), to.len());
        let at = file.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut file = file.clone();
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
        fails(GraphCheckpoint::from_bytes("some.file", file), &[&["some.file"], words].concat());
    };
    edited("loss_scale\\\"", "lost_scale\\\"", &["`loss_scale`", "is missing", "`loss_scaling`"]);
    edited("loss_scaling", "lost_scaling", &["`loss_scale`", "is there", "no `loss_scaling`"]);
    edited("initial\\\":1024", "initial\\\":1023", &["`loss_scaling.initial`", "a power of two", "is 1023"]);
    edited("skipped\\\":1", "skipped\\\":-", &["throughline.training"]);
    let scale = format!("scale\\\":{}", serde_json::to_string(&state(&other).scale).unwrap());
    let odd = format!("{}4", &scale[..scale.len() - 1]);
    edited(&scale, &odd, &["`loss_scale.scale`", "a power of two"]);
}

#[test]
fn settings_of_loss_scaling_are_checked() {
    let bad = |f: fn(&mut LossScaling), words: &[&str]| {
        let mut scaling = LossScaling::default();
        f(&mut scaling);
        let config = GraphTrainConfig { loss_scaling: Some(scaling), ..GraphTrainConfig::sgd(0.1) };
        fails(config.validate(), words);
        let Net { g, loss, .. } = net(2, 2, 0.0);
        fails(GraphTrainer::new_blocking(gpu(), g, loss, config), words);
    };
    bad(|s| s.initial = 3.0, &["`loss_scaling.initial`", "a power of two from 1 to 16777216", "is 3"]);
    bad(|s| s.initial = 0.5, &["`loss_scaling.initial`", "is 0.5"]);
    bad(|s| s.initial = f64::NAN, &["`loss_scaling.initial`", "is NaN"]);
    bad(|s| s.growth = 1.5, &["`loss_scaling.growth`", "from 1 to 2^16", "is 1.5"]);
    bad(|s| s.growth = 0.5, &["`loss_scaling.growth`", "is 0.5"]);
    bad(|s| s.backoff = 1.0, &["`loss_scaling.backoff`", "from 2^-16 to 1/2", "is 1"]);
    bad(|s| s.backoff = 0.0, &["`loss_scaling.backoff`", "is 0"]);
    bad(|s| s.growth_interval = 0, &["`loss_scaling.growth_interval`", "at least 1", "is 0"]);
    bad(|s| s.least = 0.0, &["`loss_scaling.least`", "from 2^-100 to 2^100", "is 0"]);
    bad(|s| s.largest = f64::INFINITY, &["`loss_scaling.largest`", "is inf"]);
    bad(|s| s.largest = 0.25, &["`loss_scaling.largest`", "at least `loss_scaling.least`, 1", "is 0.25"]);
    let (trainer, _) = trainer(net(2, 2, 0.0), scaled(SgdConfig::default().into()));
    for scale in [0.0, 3.0, -2.0, f32::NAN, f32::INFINITY, 2f32.powi(101)] {
        fails(trainer.set_loss_scale(scale), &["`loss_scale.scale`", "a power of two"]);
    }
    assert_eq!(state(&trainer).scale, 1024.0);
}

/// Gradients are told without the scale, and how far they are from overflow with it.
#[test]
fn probes_tell_gradients_without_their_scale() {
    let taps = [("w", "hidden.weight"), ("h", "gelu")];
    let mut probes = vec![Probe::new("out", Tap::forward("out"), Measure::MaxAbs)];
    for (name, node) in taps {
        let tap = || Tap::gradient(node);
        probes.extend([Measure::MaxAbs, Measure::Rms, Measure::Whole].map(|m| Probe::new(name, tap(), m)));
        probes.push(Probe::new(name, tap(), Measure::Ratio(Tap::forward("out"))));
        probes.push(Probe::new(name, tap(), Measure::Cosine(tap())));
    }
    let read = |loss_scaling: Option<LossScaling>| {
        let Net { g, x, y, loss, .. } = net(ROWS, WIDTH, 0.0);
        let options = GraphTrainOptions { probes: probes.clone(), ..Default::default() };
        let config = GraphTrainConfig { loss_scaling, ..GraphTrainConfig::sgd(0.01) };
        let mut trainer = GraphTrainer::with_options_blocking(gpu(), g, loss, config, &options).unwrap();
        let [xs, ys] = data(0, ROWS);
        trainer.step(&[x.with(&xs), y.with(&ys)]).unwrap();
        trainer.take_probes().unwrap().wait_blocking().unwrap()
    };
    let (plain, scaled) = (read(None), read(Some(scaling())));
    assert_eq!(scaled.tensors, plain.tensors);
    for (plain, scaled) in plain.values.iter().zip(&scaled.values) {
        assert!((plain.value - scaled.value).abs() <= 1e-6 * plain.value.abs(), "{plain:?} and {scaled:?}");
        assert_eq!(plain.scale, 1.0);
    }
    let largest = |name: &str| scaled.values.iter().find(|r| r.name == name).unwrap();
    let (out, w) = (largest("out"), largest("w"));
    assert_eq!((out.scale, w.scale), (1.0, 1024.0));
    assert!((w.f16_headroom() - (65504.0 / 1024.0 / w.value).log2()).abs() < 1e-9);
    assert!((out.f16_headroom() - (65504.0 / out.value).log2()).abs() < 1e-9);
}

#[test]
fn an_executable_loads_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.safetensors");
    let (mut saved, inputs) = trainer(net(ROWS, WIDTH, 0.0), config(AdamWConfig::default().into()));
    train(&mut saved, inputs, 3);
    saved.save_blocking(&path).unwrap();
    let alone = |net: &Net, output: Value| {
        let plan = gpu().plan(&net.g, &[output]).unwrap();
        Executable::new_blocking(gpu(), plan.into(), ExecOptions::default()).unwrap()
    };
    let [xs, ys] = data(7, ROWS);
    let loss = |exec: &Executable, net: &Net| {
        exec.write(net.x, &xs).unwrap();
        exec.write(net.y, &ys).unwrap();
        exec.submit().unwrap();
        exec.read_blocking::<f32>(net.loss).unwrap()[0]
    };
    let other = net(ROWS, WIDTH, 0.0);
    let exec = alone(&other, other.loss);
    let before = loss(&exec, &other);
    exec.load_blocking(&path).unwrap();
    let after = loss(&exec, &other);
    let want = loss(&saved.executable_blocking(&other.g, &[other.loss]).unwrap(), &other);
    assert!(after.to_bits() == want.to_bits() && after != before, "{before}, {after}, {want}");

    // A part of the network takes its part of the file.
    alone(&other, other.g.find("gelu").unwrap()).load_blocking(&path).unwrap();

    // What cannot be loaded leaves things as they are.
    let wider = net(ROWS, WIDTH + 1, 0.0);
    let exec = alone(&wider, wider.loss);
    let before = loss(&exec, &wider);
    fails(exec.load_blocking(&path), &["net.safetensors", "`first.weight` has shape [3, 12], expected [3, 13]"]);
    write_file(&path, &[("first.weight", &[3, 13])]);
    fails(exec.load_blocking(&path), &["net.safetensors", "`first.bias` is missing"]);
    assert_eq!(loss(&exec, &wider).to_bits(), before.to_bits());
}

/// What an op does that cannot be rewritten for f16 stays f32, and only that. Parameters are read and written as they are.
#[test]
fn networks_of_ones_own_train_in_mixed_precision() {
    let doubled = || {
        // It asks for the length of its input, which in f16 may be another.
        let body = "y[i] = 2.0 * x[min(i, arrayLength(&x) - 1u)];";
        Custom::new(
            "doubled",
            |[x]| Ok([x.clone()]),
            move |cx| {
                let each = Elements::new("doubled", cx.outputs[0].len(), body);
                each.bind("x", Bind::In(0)).bind("y", Bind::Out(0)).program(cx)
            },
            |[x]| [x.map(|x| 2.0 * x)],
        )
    };
    let doubled = doubled().vjp(move |cx| {
        let dy = cx.dy0()?;
        let dx = cx.graph.scale(&cx.name, dy, 2.0)?;
        cx.set(0, dx);
        Ok(())
    });
    let mut g = gpu().graph();
    let x = g.input("x", TensorType::f32([64, 16])).unwrap();
    let mut b = Builder::new(&mut g);
    let first = b.linear("first", x, 16).unwrap();
    let own = b.op1("own", doubled, &[first]).unwrap();
    let gelu = b.gelu("gelu", own).unwrap();
    let out = b.linear("out", gelu, 16).unwrap();
    let loss = b.mse("loss", out, x).unwrap();
    let mut stored = g.clone();
    stored.store_mixed(&[loss], &[], DType::F32, gpu().profile()).unwrap();
    let types = [first, own, gelu, out, loss].map(|v| stored.ty(v).dtype);
    assert_eq!(types, [DType::F32, DType::F32, DType::F16, DType::F16, DType::F32]);

    let weight = g.find("first.weight").unwrap();
    let config = GraphTrainConfig { precision: Precision::MIXED, ..GraphTrainConfig::adamw(0.01) };
    let options = GraphTrainOptions { outputs: vec![out, weight], ..Default::default() };
    let mut trainer = GraphTrainer::with_options_blocking(gpu(), g, loss, config, &options).unwrap();
    let xs: Vec<f32> = (0..64 * 16).map(|i| ((i * i) % 17) as f32 / 17.0).collect();
    let before = trainer.step(&[x.with(&xs)]).unwrap().wait_blocking().unwrap();
    for _ in 0..60 {
        trainer.step(&[]).unwrap();
    }
    let after = trainer.loss_blocking().unwrap();
    assert!(after < 0.5 * before, "{before} to {after}");
    assert_eq!(trainer.read_blocking::<f32>(out).unwrap().len(), 64 * 16);
    let ours = trainer.read_blocking::<f32>(weight).unwrap();
    assert_eq!(ours, trainer.params().read_blocking(gpu()).unwrap()[0]);
    assert!(ours.iter().any(|x| half::f16::from_f32(*x).to_f32() != *x));
    trainer.write(weight, &vec![0.0f32; 256]).unwrap();
    trainer.step(&[]).unwrap();
    assert!(trainer.loss_blocking().unwrap() > after);
}

#[test]
fn a_run_with_other_settings_is_told_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let adamw = AdamWConfig::default();
    let (mut saved, inputs) = trainer(net(ROWS, WIDTH, 0.0), config(adamw.into()));
    train(&mut saved, inputs, 2);
    saved.save_checkpoint_blocking(&path).unwrap();
    let resumed = |config: GraphTrainConfig| {
        let (mut trainer, _) = trainer(net(ROWS, WIDTH, 0.0), config);
        let result = trainer.resume_blocking(&path);
        assert!(result.is_ok() || trainer.step_count() == 0);
        result
    };
    resumed(config(adamw.into())).unwrap();
    let other = config(AdamWConfig { beta2: 0.99, ..adamw }.into());
    fails(resumed(other.clone()), &["run.safetensors", "`optimizer.adamw.beta2` is 0.95 in the file and 0.99 here"]);
    let other = GraphTrainConfig { seed: 1, schedule: Schedule::constant(1e-3), ..config(adamw.into()) };
    fails(resumed(other), &["`seed` is 5 in the file and 1 here", "`schedule.peak` is 0.02 in the file and 0.001"]);
    let other = GraphTrainConfig { precision: Precision::MIXED, ..config(adamw.into()) };
    fails(resumed(other), &["`precision` is \"f32\" in the file and {\"mixed\":{\"stream\":\"f32\"}} here"]);
    let sgd = config(SgdConfig::default().into());
    fails(resumed(sgd.clone()), &["`optimizer.adamw` is only in the file", "`optimizer.sgd` is not in the file"]);

    // Whoever means it.
    let checkpoint = GraphCheckpoint::open(&path).unwrap();
    assert_eq!((checkpoint.step, &checkpoint.config), (2, saved.config()));
    let (mut plain, _) = trainer(net(ROWS, WIDTH, 0.0), sgd);
    checkpoint.restore_blocking(&mut plain).unwrap();
    assert_eq!(plain.step_count(), 2);
    // Its moments are not in there.
    plain.save_checkpoint_blocking(&path).unwrap();
    let checkpoint = GraphCheckpoint::open(&path).unwrap();
    fails(checkpoint.restore_blocking(&mut saved), &["`optimizer.m.first.weight` is missing"]);
    // A file of weights is no checkpoint.
    plain.save_blocking(&path).unwrap();
    fails(plain.resume_blocking(&path), &["run.safetensors", "not a checkpoint of a `GraphTrainer`"]);
    fails(plain.resume_blocking(dir.path().join("none")), &["none"]);
}

#[test]
fn checkpoints_that_cannot_be_are_errors_that_say_why() {
    let file = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/checkpoint/graph")).unwrap();
    let good = GraphCheckpoint::from_bytes("some.file", file.clone()).unwrap();
    let momentum = SgdConfig { momentum: 0.9, nesterov: true, max_grad_norm: 1.0, ..SgdConfig::default() };
    assert_eq!((good.step, good.config.optimizer), (3, momentum.into()));
    // Of the same length, so that the header need not be written anew.
    let edited = |from: &str, to: &str, words: &[&str]| {
        assert_eq!(from.len(), to.len());
        let at = file.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut file = file.clone();
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
        fails(GraphCheckpoint::from_bytes("some.file", file), &[&["some.file"], words].concat());
    };
    edited("version\\\":1", "version\\\":7", &["version 7", "reads 1"]);
    edited("momentum\\\":0.9", "momentum\\\":1.1", &["`momentum`", "is 1.1"]);
    edited("micro_batches\\\":1", "micro_batches\\\":0", &["`micro_batches`", "is 0"]);
    edited("step\\\":3", "step\\\":-", &["throughline.training"]);
    edited("sgd", "sad", &["throughline.training", "`sad`"]);
    edited("throughline.training", "throughline.tramming", &["not a checkpoint of a `GraphTrainer`"]);
    for len in [0, 7, 100, file.len() - 1] {
        fails(GraphCheckpoint::from_bytes("some.file", file[..len].to_vec()), &["some.file"]);
    }
}

/// Writes a file with these tensors.
fn write_file(path: &Path, tensors: &[(&str, &[usize])]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, dims)| vec![0; 4 * dims.iter().product::<usize>()]).collect();
    let views = tensors.iter().zip(&data).map(|(&(name, dims), data)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, dims.to_vec(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn weights_of_another_network_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    let mut g = gpu().graph();
    let w = g.param_with("w", [4, 1], ParamInit::Constant(0.25)).unwrap();
    let b = g.param_with("b", [1], ParamInit::ONES).unwrap();
    let x = g.input("x", TensorType::f32([8, 4])).unwrap();
    let y = g.linear("y", x, w, Some(b)).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::sgd(0.1)).unwrap();
    let load = |tensors: &[(&str, &[usize])], words: &[&str]| {
        write_file(&path, tensors);
        fails(trainer.load_blocking(&path), words);
        let kept: Vec<f32> = trainer.params().read_blocking(gpu()).unwrap().concat();
        assert_eq!(kept, [0.25, 0.25, 0.25, 0.25, 1.0]);
    };
    load(&[("w", &[4, 1])], &["weights.safetensors", "`b` is missing"]);
    load(&[("w", &[4, 1]), ("b", &[1]), ("c", &[3])], &["weights.safetensors", "`c` is not one of the trainer's"]);
    load(&[("w", &[4, 2]), ("b", &[1])], &["weights.safetensors", "`w` has shape [4, 2], expected [4, 1]"]);
    write_file(&path, &[("w", &[4, 1]), ("b", &[1]), ("optimizer.m.w", &[4, 1])]);
    trainer.load_blocking(&path).unwrap();
    assert_eq!(trainer.params().read_blocking(gpu()).unwrap().concat(), [0.0; 5]);

    // The same of a second graph.
    let second = |name: &str, rows: usize| {
        let mut g = gpu().graph();
        let x = g.input("x", TensorType::f32([2, rows])).unwrap();
        let w = g.param(name, [rows, 1]).unwrap();
        let y = g.matmul("y", x, w).unwrap();
        trainer.executable_blocking(&g, &[y])
    };
    second("w", 4).unwrap();
    fails(second("v", 4), &["parameter `v` of the graph is not one of the trainer's", "`w`, `b`"]);
    fails(second("w", 3), &["`w`", "the trainer's f32[4, 1]", "f32[3, 1]"]);
}

// What is told when something is wrong.

#[test]
fn ids_are_of_classes_and_rows() {
    let mut g = gpu().graph();
    let logits = g.param_with("logits", [4, 3], ParamInit::Normal(1.0)).unwrap();
    let target = g.input("target", TensorType::u32([4])).unwrap();
    let loss = g.cross_entropy("loss", logits, target).unwrap();
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::sgd(0.1)).unwrap();
    fails(trainer.step(&[target.with(&[0, 1, 3, 2])]), &["`target`", "ids below 3", "`IGNORE_INDEX`", "3 at 2"]);
    trainer.step(&[target.with(&[0, 1, u32::MAX, 2])]).unwrap();
    // The row of a target that is ignored.
    assert_eq!(trainer.grads().read_blocking(gpu()).unwrap()[0][6..9], [0.0; 3]);

    // A table in two parts.
    let mut g = gpu().graph();
    let ids = g.input("ids", TensorType::u32([4])).unwrap();
    let parts = [3, 2].map(|rows| g.param_with(&format!("rows{rows}"), [rows, 4], ParamInit::ONES).unwrap());
    let rows = g.embedding_parts("rows", &parts, ids).unwrap();
    let loss = g.sum("loss", rows).unwrap();
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::sgd(0.1)).unwrap();
    fails(trainer.step(&[ids.with(&[0, 4, 5, 2])]), &["`ids`", "ids below 5", "5 at 2"]);
    let loss = trainer.step(&[ids.with(&[0, 4, u32::MAX, 2])]).unwrap();
    assert_eq!(loss.wait_blocking().unwrap(), 12.0);
}

#[test]
fn wrong_data_is_named_before_anything_is_recorded() {
    let Net { mut g, x, y, loss, .. } = net(ROWS, WIDTH, 0.2);
    let unused = g.input("unused", TensorType::f32([1])).unwrap();
    let (seed, param) = (g.find_step_seed().unwrap(), g.find("out.bias").unwrap());
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::adamw(1e-3)).unwrap();
    let [xs, ys] = data(0, ROWS);
    let two = [0.0f32; 2];
    fails(trainer.step(&[]), &["never fed", "`x`, `y`", "`Value::with`"]);
    fails(trainer.step(&[x.with(&xs)]), &["never fed", "`y`"]);
    fails(trainer.step(&[x.with(&xs[1..]), y.with(&ys)]), &["`x`", "72 elements for f32[24, 3]", "71 elements of f32"]);
    fails(trainer.step(&[x.with(&[0u32; 72]), y.with(&ys)]), &["`x`", "f32[24, 3]", "72 elements of u32"]);
    fails(trainer.step(&[x.with(&xs), x.with(&xs)]), &["`x`", "twice"]);
    fails(trainer.step(&[param.with(&two)]), &["`out.bias` cannot be fed", "no input"]);
    fails(trainer.step(&[seed.with(&[1u32, 2])]), &["`step_seed` cannot be fed", "the trainer writes it"]);
    fails(trainer.step(&[unused.with(&[1.0f32])]), &["`unused` cannot be fed", "depends on"]);
    fails(trainer.step(&[loss.with(&[1.0f32])]), &["`loss` cannot be fed"]);
    let foreign = net(ROWS, WIDTH, 0.0);
    fails(trainer.step(&[foreign.x.with(&xs)]), &["a feed", "not a value of this plan"]);
    let both = [x.with(&xs), y.with(&ys)];
    fails(trainer.step(Feeds::micro_batches([&both, &both])), &["feeds", "1, one for each", "got 2"]);
    fails(trainer.step(Feeds::micro_batches([&both]).weighted([0.5])), &["weights", "got 0.5"]);
    fails(trainer.write(x, &xs[1..]), &["`x`", "71 elements"]);
    assert_eq!(trainer.step_count(), 0);
    trainer.step(&both).unwrap();
    trainer.step(&[y.with(&ys)]).unwrap();

    let config = GraphTrainConfig { micro_batches: 2, ..GraphTrainConfig::adamw(1e-3) };
    let (mut two, [x, y, _]) = self::trainer(net(ROWS, WIDTH, 0.0), config);
    let both = [x.with(&xs), y.with(&ys)];
    fails(two.step(&both), &["2, one for each of the `micro_batches`", "got 1"]);
    let weighted = |weights: &[f32]| Feeds::micro_batches([&both, &both]).weighted(weights);
    fails(two.step(weighted(&[0.5])), &["weights of micro-batches", "[0.5]"]);
    fails(two.step(weighted(&[0.5, -0.5])), &["negative", "-0.5"]);
    fails(two.step(weighted(&[0.5, f32::NAN])), &["NaN"]);
    fails(two.step(Feeds::micro_batches([&both[..1], &both[1..]])), &["never fed", "`y`"]);
}

#[test]
fn graphs_that_cannot_be_trained_are_told_why() {
    type Edit = fn(&mut Net, &mut GraphTrainOptions);
    let refused = |edit: Edit, words: &[&str]| {
        let (mut net, mut options) = (net(ROWS, WIDTH, 0.0), GraphTrainOptions::default());
        edit(&mut net, &mut options);
        let config = GraphTrainConfig::adamw(1e-3);
        fails(GraphTrainPlan::new(net.g, net.loss, &config, &options, gpu().profile()), words);
    };
    refused(
        |net, _| {
            net.g.param_with("extra", [4], ParamInit::ZEROS).unwrap();
        },
        &["`extra`", "the loss `loss` does not depend on it", "`GraphTrainOptions::frozen`"],
    );
    refused(|net, _| net.loss = net.out, &["loss", "`out` must be f32[1]"]);
    refused(|net, _| net.loss = self::net(ROWS, WIDTH, 0.0).loss, &["the loss", "not a value of this graph"]);
    refused(|net, options| options.frozen = net.g.params(), &["no parameters to train"]);
    refused(|net, options| options.frozen = vec![net.x], &["frozen", "`x` is not a parameter"]);
    refused(
        |net, options| options.muon = net.g.find("out.bias").map(|v| vec![v]),
        &["muon", "`out.bias` must be a matrix"],
    );
    refused(|net, options| options.muon = Some(vec![net.out]), &["muon", "`out` is not a parameter"]);
    refused(
        |net, options| {
            options.frozen = vec![net.g.find("out.weight").unwrap()];
            options.muon = Some(options.frozen.clone());
        },
        &["muon", "`out.weight` is frozen"],
    );
    refused(
        |net, options| {
            let tensor = Tensor::zeros(gpu(), "w", TensorType::f32([2])).unwrap();
            options.bindings.insert(net.g.find("out.bias").unwrap(), tensor);
        },
        &["`out.bias`", "only frozen ones are bound"],
    );
    refused(
        |net, _| {
            let w = net.g.param("raw", [1]).unwrap();
            net.loss = net.g.mul("product", net.loss, w).unwrap();
        },
        &["`raw` has no initialisation", "`Graph::param_with`", "`GraphTrainOptions::init`"],
    );
    refused(
        |net, _| {
            let w = net.g.find("out.bias").unwrap();
            let twice = net.g.scale("twice", w, 2.0).unwrap();
            net.g.store(twice, w).unwrap();
        },
        &["`out.bias`", "stores to it"],
    );
    refused(
        |net, _| {
            let w = net.g.param_with("optimizer.w", [1], ParamInit::ONES).unwrap();
            net.loss = net.g.mul("product", net.loss, w).unwrap();
        },
        &["`optimizer.w`", "moments"],
    );
    let Net { g, loss, .. } = net(ROWS, WIDTH, 0.0);
    let muon = GraphTrainConfig::muon(1e-3);
    let plan = |config: &GraphTrainConfig| {
        GraphTrainPlan::new(g.clone(), loss, config, &GraphTrainOptions::default(), gpu().profile())
    };
    fails(plan(&muon), &["`muon`", "no matrices", "`GraphTrainOptions::muon`"]);
    let sgd = |sgd: SgdConfig, words: &[&str]| fails(plan(&GraphTrainConfig::new(sgd, 0.1)), words);
    sgd(SgdConfig { momentum: 1.0, ..SgdConfig::default() }, &["`momentum`", "below 1", "is 1"]);
    sgd(SgdConfig { nesterov: true, ..SgdConfig::default() }, &["`nesterov`", "without a momentum"]);
    sgd(SgdConfig { weight_decay: 11.0, ..SgdConfig::default() }, &["`weight_decay`", "more than the whole weight"]);
    sgd(SgdConfig { max_grad_norm: -1.0, ..SgdConfig::default() }, &["`max_grad_norm`", "turns clipping off"]);
    fails(plan(&GraphTrainConfig::sgd(11.0)), &["`lr`", "from 0 to 10"]);
    fails(plan(&GraphTrainConfig { micro_batches: 0, ..muon.clone() }), &["`micro_batches`"]);
    // Without initial values a parameter needs no initialisation.
    let mut g = gpu().graph();
    let w = g.param("w", [4]).unwrap();
    let loss = g.sum("loss", w).unwrap();
    let options = GraphTrainOptions { init: false, ..GraphTrainOptions::default() };
    GraphTrainPlan::new(g, loss, &GraphTrainConfig::sgd(0.1), &options, gpu().profile()).unwrap();
}

// Cost.

#[test]
fn a_small_network_is_recorded_in_a_fraction_of_a_millisecond() {
    let mut g = gpu().graph();
    let x = g.input("x", TensorType::f32([4096, 64])).unwrap();
    let mut hidden = x;
    for i in 0..3 {
        let w = g.param_with(&format!("{i}.weight"), [64, 64], ParamInit::fan_in(64)).unwrap();
        let b = g.param_with(&format!("{i}.bias"), [64], ParamInit::ZEROS).unwrap();
        hidden = g.linear(&format!("{i}"), hidden, w, Some(b)).unwrap();
        if i < 2 {
            hidden = g.gelu_tanh(&format!("{i}.gelu"), hidden).unwrap();
        }
    }
    let loss = g.sum("loss", hidden).unwrap();
    let forward = g.clone();
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::adamw(1e-3)).unwrap();
    let exec = trainer.executable_blocking(&forward, &[hidden]).unwrap();
    exec.write(x, &vec![0.5f32; 4096 * 64]).unwrap();
    trainer.write(x, &vec![0.5f32; 4096 * 64]).unwrap();
    let fastest = |record: &mut dyn FnMut(&mut wgpu::CommandEncoder)| {
        let times = (0..50).map(|_| {
            let mut encoder = gpu().device().create_command_encoder(&Default::default());
            let start = Instant::now();
            record(&mut encoder);
            let time = start.elapsed();
            gpu().submit(encoder).unwrap();
            time
        });
        times.min().unwrap()
    };
    let pass = fastest(&mut |encoder| exec.record(encoder).unwrap());
    let step = fastest(&mut |encoder| drop(trainer.record(encoder, &[]).unwrap()));
    println!("recording takes {pass:?} for a forward pass, {step:?} for a training step");
    // A release build takes half as long, other tests run at the same time.
    assert!(pass < Duration::from_micros(200) && step < Duration::from_millis(1), "{pass:?} {step:?}");
}
