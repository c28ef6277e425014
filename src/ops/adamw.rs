//! One step of AdamW (Loshchilov & Hutter 2019, <https://arxiv.org/abs/1711.05101>), computed as PyTorch does,
//! including clipping of the gradient by its global norm.
//!
//! It updates flat arenas in place, so one dispatch covers all parameters. Parameters with weight decay come first in
//! the arena.
//!
//! [`Trainer`](crate::train::Trainer) and [`optim`](crate::optim) build these nodes for you. Use the op directly to
//! write your own update step.

use super::cases::{Case, InputFill, Row};
use super::checks::{POSITIVE, RATE, check_update, expect_f32, expect_shape, is_positive, is_rate};
use super::elementwise;
use super::loss_scale::{factor_of, is_outcome};
use super::source::table_kernel;
use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/adamw.wgsl");

pub(super) const ROW: Row = Row {
    name: "adamw",
    summary: "AdamW over flat arenas, in place, with decoupled weight decay and clipping by global norm",
    sources: &[SOURCE],
    cases: || {
        // lr, beta1, beta2, eps, weight decay, 1 - beta1^3, 1 - beta2^3, largest norm. The values are larger than in
        // practice, so that every term shows against the parameters.
        const PLAIN: &[f64] = &[0.5, 0.9, 0.999, 1e-8, 0.0, 0.271, 0.002_997_001, 0.0];
        const CLIPPED: &[f64] = &[0.5, 0.8, 0.9, 1e-2, 0.7, 0.488, 0.271, 2.5];
        let case = |n: usize, decay_len: usize, hyper: &'static [f64], norm: f64| {
            let name = format!("{n}, {decay_len} decayed, norm {norm}, at most {}", hyper[7]);
            bench_case(&name, n, decay_len).fill(4, InputFill::Values(hyper)).fill(5, InputFill::Constant(norm))
        };
        // After a LossScale: the factor of the gradient, 1 to skip the step, the scale.
        let scaled = |name: &str, outcome: &'static [f64]| {
            let case = case(1757, 1001, CLIPPED, 0.0).input(5, &[3], InputFill::Values(outcome));
            Case { name: name.into(), ..case }
        };
        vec![
            scaled("scaled", &[0.25, 0.0, 4.0]),
            scaled("skipped", &[0.0, 1.0, 4.0]).fill(1, InputFill::Constant(f64::NAN)),
            case(1, 1, CLIPPED, 10.0),
            case(127, 0, PLAIN, 10.0),
            case(1757, 1757, CLIPPED, 1.0),
            case(1757, 1001, CLIPPED, 7.5),
            case(9001, 4099, CLIPPED, 0.0),
        ]
    },
    bench: || vec![bench_case("10M", 10 << 20, 8 << 20)],
};

fn bench_case(name: &str, n: usize, decay_len: usize) -> Case {
    const HYPER: &[f64] = &[1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 1.0];
    Case::new(name, AdamW { decay_len }, &[&[n], &[n], &[n], &[n], &[8], &[1]])
        .fill(3, InputFill::Uniform(0.0, 2.0))
        .fill(4, InputFill::Values(HYPER))
        .fill(5, InputFill::Constant(3.0))
        .forward_only()
}

/// `(param, grad, m, v, hyper, norm) -> (param, m, v)`. The first four have one shape; `hyper` is `[8]`, from
/// [`AdamWSettings::at_step`]; `norm` is `[1]`, the global norm of the gradient, or `[3]`, the outcome of a
/// [`LossScale`](super::loss_scale::LossScale), by which the step may change nothing.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Weight decay applies to the first `decay_len` elements only.
    pub decay_len: usize,
}

/// Settings of one step, written by the host.
///
/// Only for graphs with an update of your own: an [`Optimizer`](crate::optim::Optimizer) derives these from its
/// [`AdamWConfig`](crate::optim::AdamWConfig) and the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Learning rate.
    pub lr: f32,
    /// Decay rate of the running mean of gradients.
    pub beta1: f32,
    /// Decay rate of the running mean of squared gradients.
    pub beta2: f32,
    /// Added to the denominator for numerical stability.
    pub eps: f32,
    /// Decoupled weight decay: each step subtracts `lr * weight_decay * param`.
    pub weight_decay: f32,
    /// Gradients with a larger global norm are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f32,
}

impl AdamWSettings {
    /// The `hyper` input of [`AdamW`] for a step, counted from 1: `[lr, beta1, beta2, eps, weight_decay, 1 -
    /// beta1^step, 1 - beta2^step, max_grad_norm]`. Write it before each step.
    ///
    /// The bias corrections are computed in f64 from the betas as rounded to f32, because the kernel averages with
    /// those. Corrections from the unrounded betas would be off by 1e-5 at first.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names a setting that would make weights that are no numbers: a beta outside `[0, 1)`, an `eps`
    /// of zero, a negative or infinite rate, a step of 0.
    pub fn at_step(&self, step: u64) -> Result<[f32; 8]> {
        Error::unless(step > 0, "step", "at least 1", step)?;
        let AdamWSettings { lr, beta1, beta2, eps, weight_decay, max_grad_norm } = *self;
        check_adamw([lr, beta1, beta2, eps, weight_decay, max_grad_norm].map(f64::from))?;
        Ok(self.values(step))
    }

    /// The same of settings that were checked before they were rounded.
    pub(crate) fn values(&self, step: u64) -> [f32; 8] {
        let AdamWSettings { lr, beta1, beta2, eps, weight_decay, max_grad_norm } = *self;
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        [lr, beta1, beta2, eps, weight_decay, correction(beta1), correction(beta2), max_grad_norm]
    }
}

/// Checks learning rate, betas, eps, weight decay and the norm to clip to, in this order and before they are rounded.
pub(crate) fn check_adamw([lr, beta1, beta2, eps, weight_decay, max_grad_norm]: [f64; 6]) -> Result<()> {
    Error::unless(is_rate(beta1), "beta1", RATE, beta1)?;
    Error::unless(is_rate(beta2), "beta2", RATE, beta2)?;
    // PyTorch accepts 0, and then divides 0 by 0 where a gradient has always been 0.
    Error::unless(is_positive(eps as f32), "eps", POSITIVE, eps)?;
    check_update(lr, ("weight_decay", weight_decay), max_grad_norm)
}

impl Graph {
    /// One step of AdamW: from `[param, grad, m, v]` of one shape, `hyper` `[8]` and the gradient's global `norm` `[1]`
    /// to the new `[param, m, v]`.
    ///
    /// [`store`](Self::store) the results to the parameter and the states they came from and the step runs in place.
    ///
    /// For networks with a few parameters this is a training step without arenas or bindings. With many, an
    /// [`Optimizer`](crate::optim::Optimizer) takes fewer dispatches and clips by the norm of all gradients.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use throughline::graph::ParamInit;
    /// use throughline::ops::adamw::AdamWSettings;
    /// use throughline::{ExecOptions, Executable, Gpu, TensorType};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let mut g = gpu.graph();
    /// let x = g.input("x", TensorType::f32([1, 2]))?;
    /// let w = g.param_with("w", [2, 1], ParamInit::ONES)?;
    /// let y = g.matmul("y", x, w)?;
    /// let loss = g.sum("loss", y)?;
    ///
    /// let grad = g.gradients(loss, &[w])?[0];
    /// let hyper = g.input("hyper", TensorType::f32([8]))?;
    /// let norm = g.l2_norm("norm", grad)?;
    /// let [m, v] = [("m", [2, 1]), ("v", [2, 1])].map(|(name, shape)| g.state(name, TensorType::f32(shape)));
    /// let states = [w, m?, v?];
    /// let new = g.adamw("adamw", [w, grad, states[1], states[2]], hyper, norm, 0)?;
    /// for (value, state) in new.into_iter().zip(states) {
    ///     g.store(value, state)?;
    /// }
    ///
    /// let exec = Executable::new_blocking(&gpu, Arc::new(gpu.plan(&g, &[])?), ExecOptions::default())?;
    /// exec.write(x, &[1.0f32, -1.0])?;
    /// let settings =
    ///     AdamWSettings { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    /// for step in 1..=10 {
    ///     exec.write(hyper, &settings.at_step(step)?)?;
    ///     exec.submit()?;
    /// }
    /// let [down, up] = exec.read_blocking::<f32>(w)?[..] else { unreachable!() };
    /// assert!(down.abs() < 1e-3 && (up - 2.0).abs() < 1e-3); // 10 steps of 0.1
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn adamw(
        &mut self,
        name: &str,
        arenas: [Value; 4],
        hyper: Value,
        norm: Value,
        decay_len: usize,
    ) -> Result<[Value; 3]> {
        let [param, grad, m, v] = arenas;
        let new = self.op(name, AdamW { decay_len }, &[param, grad, m, v, hyper, norm])?;
        Ok([new[0], new[1], new[2]])
    }
}

impl AdamW {
    /// Storage buffers that it binds.
    pub(crate) const BUFFERS: usize = 6;
}

impl Op for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 6)?;
        let param = &inputs[0];
        for (ty, what) in inputs[1..4].iter().zip(["grad", "m", "v"]) {
            expect_shape(what, ty, param.shape.dims())?;
        }
        expect_shape("hyper", &inputs[4], &[8])?;
        is_outcome(&inputs[5])?;
        if self.decay_len > param.len() {
            return Err(format!("decay_len {} is more than the {} parameters", self.decay_len, param.len()));
        }
        Ok(vec![param.clone(); 3])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("adamw", SOURCE, "forward").knob("SCALED", is_outcome(&cx.inputs[5])?);
        let binds: [Bind; Self::BUFFERS] =
            [Bind::In(1), Bind::In(4), Bind::In(5), Bind::Out(0), Bind::Out(1), Bind::Out(2)];
        Ok(elementwise::quads(cx, kernel, &binds, &[self.decay_len as u32]))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let [param, grad, m, v, hyper, norm] = inputs else { return vec![] };
        let [lr, beta1, beta2, eps, decay, correction1, correction2, max_norm] = hyper.data[..] else { return vec![] };
        let Some(clip) = factor_of(norm, max_norm) else {
            return [param, m, v].into_iter().map(|&old| old.clone()).collect();
        };
        let mut new: Vec<Array> = outputs.iter().map(|ty| Array::zeros(ty.shape.clone())).collect();
        for i in 0..param.data.len() {
            let g = grad.data[i] * clip;
            let m = beta1 * m.data[i] + (1.0 - beta1) * g;
            let v = beta2 * v.data[i] + (1.0 - beta2) * g * g;
            let mut p = param.data[i];
            if i < self.decay_len {
                p -= lr * decay * p;
            }
            p -= lr * (m / correction1) / ((v / correction2).sqrt() + eps);
            (new[0].data[i], new[1].data[i], new[2].data[i]) = (p, m, v);
        }
        new
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        16 * inputs[0].len() as u64
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        [0, 2, 3].get(output).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_corrects_by_what_the_kernel_averages_with() {
        let settings =
            AdamWSettings { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
        let hyper = settings.at_step(1).unwrap();
        assert_eq!(hyper[5..7], [1.0 - 0.9f32, 1.0 - 0.999f32]);
        assert_eq!(settings.at_step(1_000_000).unwrap()[5..7], [1.0, 1.0]);
        assert!(settings.at_step(0).unwrap_err().to_string().contains("`step`"));
    }
}
