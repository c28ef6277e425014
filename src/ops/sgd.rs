//! One step of stochastic gradient descent, with momentum or without, computed as PyTorch's `SGD` does, including
//! clipping of the gradient by its global norm.
//!
//! `g = clip(grad) + decay * p`, `v = momentum * v + g`, `p -= lr * v`; with Nesterov momentum `p -= lr * (g + momentum
//! * v)` (Sutskever et al. 2013, <https://proceedings.mlr.press/v28/sutskever13.html>). It updates flat arenas in place,
//! like [`adamw`](super::adamw).
//!
//! [`GraphTrainer`](crate::train::GraphTrainer) and [`optim`](crate::optim) build these nodes for you. Use the op
//! directly to write your own update step.

use super::cases::{Case, InputFill, Row};
use super::checks::{RATE, check_update, expect_f32, expect_shape, is_rate};
use super::elementwise;
use super::loss_scale::{factor_of, is_outcome};
use super::source::table_kernel;
use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/sgd.wgsl");

pub(super) const ROW: Row = Row {
    name: "sgd",
    summary: "gradient descent over flat arenas, in place, with momentum, weight decay and clipping by global norm",
    sources: &[SOURCE],
    cases: || {
        // lr, momentum, weight decay, largest norm. The values are larger than in practice, so that every term shows
        // against the parameters.
        const OPEN: &[f64] = &[0.5, 0.9, 0.0, 0.0];
        const CLIPPED: &[f64] = &[0.5, 0.8, 0.7, 2.5];
        let case = |n: usize, op: Sgd, momentum: bool, hyper: &'static [f64], norm: f64| {
            let kind = if momentum { "momentum" } else { "plain" };
            let kind = if op.nesterov { "nesterov" } else { kind };
            let name = format!("{kind} {n}, {} decayed, norm {norm}, at most {}", op.decay_len, hyper[3]);
            sized(&name, n, op, momentum, hyper, norm)
        };
        let op = |decay_len, nesterov| Sgd { decay_len, nesterov };
        // After a LossScale: the factor of the gradient, 1 to skip the step, the scale.
        let scaled = |name: &str, momentum: bool, outcome: &'static [f64]| {
            let norm = if momentum { 4 } else { 3 };
            let case = case(1757, op(1001, false), momentum, CLIPPED, 0.0);
            let case = case.input(norm, &[3], InputFill::Values(outcome));
            Case { name: name.into(), ..case }
        };
        let nan = InputFill::Constant(f64::NAN);
        vec![
            scaled("momentum, scaled", true, &[0.25, 0.0, 4.0]),
            scaled("momentum, skipped", true, &[0.0, 1.0, 4.0]).fill(1, nan),
            scaled("plain, scaled", false, &[0.25, 0.0, 4.0]),
            scaled("plain, skipped", false, &[0.0, 1.0, 4.0]).fill(1, nan),
            case(1, op(1, false), true, CLIPPED, 10.0),
            case(127, op(0, true), true, OPEN, 10.0),
            case(1757, op(1757, false), true, CLIPPED, 1.0),
            case(1757, op(1001, true), true, CLIPPED, 7.5),
            case(127, op(64, false), false, CLIPPED, 0.0),
            case(9001, op(4099, false), false, CLIPPED, 7.5),
        ]
    },
    bench: || {
        const HYPER: &[f64] = &[0.1, 0.9, 1e-4, 1.0];
        let op = Sgd { decay_len: 8 << 20, nesterov: false };
        vec![sized("10M", 10 << 20, op, true, HYPER, 3.0), sized("plain 10M", 10 << 20, op, false, HYPER, 3.0)]
    },
};

fn sized(name: &str, n: usize, op: Sgd, momentum: bool, hyper: &'static [f64], norm: f64) -> Case {
    let arenas = if momentum { 3 } else { 2 };
    let shapes = [vec![[n]; arenas], vec![[4], [1]]].concat();
    let shapes: Vec<&[usize]> = shapes.iter().map(|s| &s[..]).collect();
    let case = Case::new(name, op, &shapes).fill(arenas, InputFill::Values(hyper));
    case.fill(arenas + 1, InputFill::Constant(norm)).forward_only()
}

/// `(param, grad, velocity, hyper, norm) -> (param, velocity)`, or `(param, grad, hyper, norm) -> param` without
/// momentum. The arenas have one shape; `hyper` is `[4]`, from [`SgdSettings::values`]; `norm` is `[1]`, the global norm
/// of the gradient, or `[3]`, the outcome of a [`LossScale`](super::loss_scale::LossScale), by which the step may change
/// nothing.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Weight decay applies to the first `decay_len` elements only.
    pub decay_len: usize,
    /// Whether the newest gradient counts once more (Nesterov momentum).
    pub nesterov: bool,
}

/// Settings of one step, written by the host.
///
/// Only for graphs with an update of your own: an [`Optimizer`](crate::optim::Optimizer) derives these from its
/// [`SgdConfig`](crate::optim::SgdConfig) and the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdSettings {
    /// Learning rate.
    pub lr: f32,
    /// What remains of the velocity in each step.
    pub momentum: f32,
    /// Each step adds this times the parameter to the gradient.
    pub weight_decay: f32,
    /// Gradients with a larger global norm are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f32,
}

impl SgdSettings {
    /// The `hyper` input of [`Sgd`]: `[lr, momentum, weight_decay, max_grad_norm]`. Write it before the first step, and
    /// whenever the learning rate changes.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names a setting that would make weights that are no numbers: a momentum outside `[0, 1)`, a
    /// negative or infinite rate.
    pub fn values(&self) -> Result<[f32; 4]> {
        let SgdSettings { lr, momentum, weight_decay, max_grad_norm } = *self;
        let settings = [lr, momentum, weight_decay, max_grad_norm];
        check_sgd(settings.map(f64::from))?;
        Ok(settings)
    }
}

/// Checks learning rate, momentum, weight decay and the norm to clip to, before they are rounded.
pub(crate) fn check_sgd([lr, momentum, weight_decay, max_grad_norm]: [f64; 4]) -> Result<()> {
    Error::unless(is_rate(momentum), "momentum", RATE, momentum)?;
    check_update(lr, ("weight_decay", weight_decay), max_grad_norm)
}

impl Graph {
    /// One step of gradient descent with momentum: from `[param, grad, velocity]` of one shape, `hyper` `[4]` and the
    /// gradient's global `norm` `[1]` to the new `[param, velocity]`.
    ///
    /// [`store`](Self::store) the results to the states or parameters they came from and the step runs in place.
    pub fn sgd(&mut self, name: &str, arenas: [Value; 3], hyper: Value, norm: Value, op: Sgd) -> Result<[Value; 2]> {
        let [param, grad, velocity] = arenas;
        let new = self.op(name, op, &[param, grad, velocity, hyper, norm])?;
        Ok([new[0], new[1]])
    }
}

impl Sgd {
    /// Storage buffers that it binds, velocity included.
    pub(crate) const BUFFERS: usize = 5;
}

impl Op for Sgd {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = if inputs.len() == 4 { 4 } else { Self::BUFFERS };
        expect_f32(inputs, n)?;
        let (param, arenas) = (&inputs[0], n - 2);
        for (ty, what) in inputs[1..arenas].iter().zip(["grad", "velocity"]) {
            expect_shape(what, ty, param.shape.dims())?;
        }
        expect_shape("hyper", &inputs[arenas], &[4])?;
        is_outcome(&inputs[arenas + 1])?;
        if self.decay_len > param.len() {
            return Err(format!("decay_len {} is more than the {} parameters", self.decay_len, param.len()));
        }
        Ok(vec![param.clone(); arenas - 1])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let words = [self.decay_len as u32];
        let scaled = is_outcome(&cx.inputs[cx.inputs.len() - 1])?;
        Ok(match cx.outputs.len() {
            1 => {
                let kernel = table_kernel::<Self>("sgd", SOURCE, "plain").knob("SCALED", scaled);
                elementwise::quads(cx, kernel, &[Bind::In(1), Bind::In(2), Bind::In(3), Bind::Out(0)], &words)
            }
            _ => {
                let kernel = table_kernel::<Self>("sgd", SOURCE, "momentum");
                let kernel = kernel.knob("NESTEROV", self.nesterov).knob("SCALED", scaled);
                let binds: [Bind; Self::BUFFERS] = [Bind::In(1), Bind::In(3), Bind::In(4), Bind::Out(0), Bind::Out(1)];
                elementwise::quads(cx, kernel, &binds, &words)
            }
        })
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let [param, grad, velocity @ .., hyper, norm] = inputs else { return vec![] };
        let [lr, momentum, decay, max_norm] = hyper.data[..] else { return vec![] };
        let Some(clip) = factor_of(norm, max_norm) else {
            return [param].into_iter().chain(velocity).map(|&old| old.clone()).collect();
        };
        let mut new: Vec<Array> = outputs.iter().map(|ty| Array::zeros(ty.shape.clone())).collect();
        for i in 0..param.data.len() {
            let p = param.data[i];
            let g = grad.data[i] * clip + if i < self.decay_len { decay * p } else { 0.0 };
            let step = match velocity {
                [velocity] => {
                    let v = momentum * velocity.data[i] + g;
                    new[1].data[i] = v;
                    if self.nesterov { g + momentum * v } else { v }
                }
                _ => g,
            };
            new[0].data[i] = p - lr * step;
        }
        new
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        (4 + 2 * outputs.len() as u64) * inputs[0].len() as u64
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        [0, 2].get(output).copied()
    }
}
