//! The residual stream at initialisation and in the first steps. Checks are exact where zeros make it exact, and
//! statistical, with fixed seeds, where papers predict how it grows.

mod common;

use std::sync::Arc;

use common::gpu;
use throughline::nn::{Init, NormPlacement, Transformer, TransformerConfig};
use throughline::optim::{AdamWConfig, Schedule};
use throughline::rng::Rng;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{ExecOptions, Executable, Graph, Value};

const BATCH: usize = 2;
const TIME: usize = 16;
const VOCAB: usize = 61;

fn batch(step: u64, time: usize) -> Batch {
    let mut rng = Rng::new(&[11, step]);
    let mut ids = || (0..BATCH * time).map(|_| rng.below(VOCAB as u64) as u32).collect();
    Batch::new(ids(), ids())
}

fn llama(n_layers: usize) -> TransformerConfig {
    TransformerConfig {
        init: Init::ZeroResidual { std: 0.2 },
        ..TransformerConfig::llama(VOCAB, TIME, n_layers, 32, 4)
    }
}

fn gpt2(n_layers: usize) -> TransformerConfig {
    TransformerConfig { init: Init::ZeroResidual { std: 0.2 }, ..TransformerConfig::gpt2(VOCAB, TIME, n_layers, 32, 4) }
}

/// A model with its stream, and the loss's gradient everywhere, as outputs.
struct Net {
    graph: Graph,
    model: Transformer,
    targets: Value,
    /// Of the stream, then of the parameters.
    gradients: Vec<Value>,
    exec: Executable,
}

/// One forward and backward pass of a fresh model.
struct Pass {
    /// The stream after the embedding and after each block.
    stream: Vec<Vec<f32>>,
    /// The loss's gradient there.
    stream_gradients: Vec<Vec<f32>>,
    /// Name and gradient of each parameter.
    gradients: Vec<(String, Vec<f32>)>,
}

impl Net {
    fn new(config: &TransformerConfig) -> Net {
        let mut g = Graph::new();
        let model = Transformer::build(&mut g, config, BATCH, config.context, false).unwrap();
        let targets = g.input("targets", g.ty(model.tokens).clone()).unwrap();
        let loss = g.cross_entropy("loss", model.logits, targets).unwrap();
        let params = model.params.iter().copied();
        let wrt: Vec<Value> = model.stream.iter().copied().chain(params).collect();
        let gradients = g.gradients(loss, &wrt).unwrap();
        let plan = gpu().plan(&g, &[model.stream.clone(), gradients.clone()].concat()).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        Net { graph: g, model, targets, gradients, exec }
    }

    fn pass(&self, seed: u64) -> Pass {
        let Net { graph: g, model, exec, .. } = self;
        for &p in &model.params {
            exec.write(p, &g.initial_values(p, seed).unwrap()).unwrap();
        }
        let data = batch(seed, g.ty(model.tokens).shape.cols());
        exec.write(model.tokens, &data.tokens).unwrap();
        exec.write(self.targets, &data.targets).unwrap();
        exec.submit().unwrap();
        let read = |values: &[Value]| values.iter().map(|&v| exec.read_blocking(v).unwrap()).collect::<Vec<Vec<f32>>>();
        let (of_stream, of_params) = self.gradients.split_at(model.stream.len());
        let names = model.params.iter().map(|p| g.name(*p).to_string());
        Pass {
            stream: read(&model.stream),
            stream_gradients: read(of_stream),
            gradients: names.zip(read(of_params)).collect(),
        }
    }
}

/// The mean of a figure over some fresh models.
fn mean(config: &TransformerConfig, figure: impl Fn(&Pass) -> f64) -> f64 {
    const SEEDS: u64 = 4;
    let net = Net::new(config);
    (0..SEEDS).map(|seed| figure(&net.pass(seed))).sum::<f64>() / SEEDS as f64
}

impl Pass {
    fn gradient_norm(&self, name: &str) -> f64 {
        norm(&self.gradients.iter().find(|(n, _)| n == name).unwrap().1)
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn rms(x: &[f32]) -> f64 {
    norm(x) / (x.len() as f64).sqrt()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn is_zero(x: &[f32]) -> bool {
    x.iter().all(|&x| x == 0.0)
}

/// Weights and biases of the projections into the stream.
fn into_stream(name: &str) -> bool {
    name.contains("attn.o.") || name.contains("mlp.down.")
}

/// Parameters within a branch, the norms before it too, but for its projection into the stream.
fn inside_branch(name: &str) -> bool {
    name.starts_with("h.") && !into_stream(name)
}

#[test]
fn zero_projections_leave_the_stream_and_its_gradient_as_they_are() {
    for config in [llama(3), gpt2(3)] {
        let pass = Net::new(&config).pass(0);
        // What each head would read, and so the logit lens, is the same at every depth: the bits are.
        for l in 1..=3 {
            assert_eq!(bits(&pass.stream[l]), bits(&pass.stream[0]), "stream after block {l}");
            assert_eq!(bits(&pass.stream_gradients[l]), bits(&pass.stream_gradients[0]), "its gradient");
        }
        assert!(!is_zero(&pass.stream_gradients[0]));
        for (name, gradient) in &pass.gradients {
            assert_eq!(is_zero(gradient), inside_branch(name), "{name}");
        }
    }
}

fn trainer(model: TransformerConfig, lr: f64) -> Trainer {
    let config = TrainConfig {
        schedule: Schedule::constant(lr),
        adamw: AdamWConfig { weight_decay: 0.0, ..Default::default() },
        seed: 3,
        ..TrainConfig::new(model, BATCH)
    };
    Trainer::new_blocking(gpu(), config).unwrap()
}

#[test]
fn with_a_zero_head_the_layers_of_weights_wake_up_one_step_after_the_other() {
    for config in [llama(2), TransformerConfig { tied_head: false, ..gpt2(2) }] {
        let mut trainer = trainer(config, 1e-2);
        let layout = trainer.params().layout.clone();
        let head = layout.tensors.iter().position(|(name, _)| name == "head.weight").unwrap();
        trainer.params().tensors[head].write(gpu(), &vec![0.0f32; layout.tensors[head].1.len()]).unwrap();
        for step in 0..3 {
            let loss = trainer.step(&[batch(step, TIME)]).unwrap().wait_blocking().unwrap();
            if step == 0 {
                let uniform = (VOCAB as f32).ln();
                assert!((loss - uniform).abs() <= 2.0 * f32::EPSILON * uniform, "{loss}, ln V is {uniform}");
            }
            for ((name, _), gradient) in layout.tensors.iter().zip(trainer.grads().read_blocking(gpu()).unwrap()) {
                let awake = match step {
                    0 => name == "head.weight",
                    1 => !inside_branch(name),
                    _ => true,
                };
                // The gradient of a key bias is zero in theory, and rounding noise in practice.
                if !name.ends_with("attn.k.bias") {
                    assert_eq!(!is_zero(&gradient), awake, "step {step}: {name}");
                }
            }
        }
    }
}

/// Slope of the line through points, by least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (mx, my) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let covariance: f64 = points.iter().map(|(x, y)| (x - mx) * (y - my)).sum();
    covariance / points.iter().map(|(x, _)| (x - mx).powi(2)).sum::<f64>()
}

/// Xavier's variance for a square matrix, and no scale by depth: the setting of Xiong et al. 2020.
fn plain(placement: NormPlacement, n_layers: usize) -> TransformerConfig {
    let init = Init::Plain { std: 1.0 / 32f32.sqrt() };
    TransformerConfig { init, norm_placement: placement, tied_head: false, ..gpt2(n_layers) }
}

const DEPTHS: [usize; 4] = [6, 12, 24, 48];

/// Slope of log |dLoss/dW_2| of the last layer against log L.
fn last_layer_slope(placement: NormPlacement) -> f64 {
    let point = |n: usize| {
        let name = format!("h.{}.mlp.down.weight", n - 1);
        ((n as f64).ln(), mean(&plain(placement, n), |pass| pass.gradient_norm(&name)).ln())
    };
    slope(&DEPTHS.map(point))
}

/// arXiv 2002.04745: in post-norm the last layer's gradient does not depend on depth, in pre-norm it falls with
/// the square root.
#[test]
fn the_last_layers_gradient_falls_with_depth_in_pre_norm_only() {
    let (pre, post) = (last_layer_slope(NormPlacement::Pre), last_layer_slope(NormPlacement::Post));
    println!("slope of the last layer's gradient against log L: pre-norm {pre:.3}, post-norm {post:.3}");
    assert!((pre + 0.5).abs() < 0.15, "{pre}");
    assert!(post.abs() < 0.2, "{post}");
}

/// The same paper: at initialisation post-norm's gradient grows towards the output. It takes many tokens that
/// see each other; with 16 and a causal mask it does not. Pre-norm's falls a little, as its stream grows.
#[test]
fn the_streams_gradient_grows_towards_the_output_in_post_norm_only() {
    let ratio = |placement| {
        let config = TransformerConfig { context: 128, bidirectional: true, ..plain(placement, 24) };
        mean(&config, |pass| rms(&pass.stream_gradients[24]) / rms(&pass.stream_gradients[1]))
    };
    let (pre, post) = (ratio(NormPlacement::Pre), ratio(NormPlacement::Post));
    println!("gradient at the output over that behind the first block: pre-norm {pre:.3}, post-norm {post:.3}");
    assert!((0.1..1.0).contains(&pre), "{pre}");
    assert!(post > 3.0 && post > 10.0 * pre, "{post}");
}

#[test]
fn pre_norms_stream_grows_linearly_and_post_norms_not_at_all() {
    let pass = |placement| Net::new(&plain(placement, 48)).pass(0);
    let squares = |placement| pass(placement).stream.iter().map(|x| rms(x).powi(2)).collect::<Vec<f64>>();
    let pre = squares(NormPlacement::Pre);
    // A power of the depth: 1 is linear.
    let points: Vec<(f64, f64)> = (4..=48).map(|l| ((l as f64).ln(), (pre[l] - pre[0]).ln())).collect();
    let power = slope(&points);
    println!("pre-norm: E|x_l|^2 grows as l^{power:.3}");
    assert!((power - 1.0).abs() < 0.15, "{power}");
    let post = squares(NormPlacement::Post);
    assert!(post[1..].iter().all(|s| (s - 1.0).abs() < 1e-3), "{post:?}");
}

#[test]
fn gpt2s_scale_adds_the_same_variance_whatever_the_depth() {
    let added = |n_layers| {
        let init = Init::Gpt2 { std: 1.0 / 32f32.sqrt() };
        let config = TransformerConfig { init, ..plain(NormPlacement::Pre, n_layers) };
        mean(&config, |pass| rms(&pass.stream[n_layers]).powi(2) - rms(&pass.stream[0]).powi(2))
    };
    let added = DEPTHS.map(added);
    println!("added variance at depths {DEPTHS:?}: {added:.3?}");
    let (least, most) = (added.iter().copied().fold(f64::MAX, f64::min), added.iter().copied().fold(0.0, f64::max));
    assert!(most / least < 1.3, "{added:?}");
}

#[test]
fn a_hundred_layers_train() {
    let init = Init::Gpt2 { std: 0.1 };
    let mut trainer = trainer(TransformerConfig { init, ..llama(100) }, 3e-3);
    let losses: Vec<f32> = (0..20).map(|_| trainer.step(&[batch(0, TIME)]).unwrap().wait_blocking().unwrap()).collect();
    println!("{losses:?}");
    assert!(losses.iter().all(|loss| loss.is_finite()));
    assert!(losses[19] < losses[0] - 0.5, "{losses:?}");
}
