//! One step of Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>): the update of a weight matrix
//! is its momentum, orthogonalised by the Newton-Schulz iteration.
//!
//! ```text
//! m = momentum m + (1 - momentum) g          g is clipped by its global norm
//! u = (1 - momentum) g + momentum m          or u = m without Nesterov's momentum
//! X = u / (|u|_F + 1e-7)
//! X = a X + b A X + c A A X, A = X X^T       several times; (a, b, c) = (3.4445, -4.7750, 2.0315)
//! p = p (1 - lr decay) - lr rate X
//! ```
//!
//! Five iterations map every singular value that is not tiny (at least 0.004 of the norm) into 0.68 .. 1.21 and leave
//! the singular vectors alone. Everything is f32, where the published code uses bfloat16. Matrices of one shape form a
//! batch.
//!
//! Three small ops do what matmul does not. Instead of X they keep c^(1/4) X: its product with itself is then sqrt(c)
//! A, and the square of that is c A A, so no product needs a factor. The term a X enters the polynomial of A as a I,
//! which is a small matrix even where X is large.

use super::cases::{Case, InputFill, Row};
use super::checks::{RATE, check_update, expect_f32, expect_shape, is_positive, is_rate};
use super::elementwise;
use super::loss_scale::{factor_of, is_outcome};
use super::matmul::Matmul;
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::AdapterClass;
use crate::tensor::{Shape, TensorType};

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "muon.wgsl");

/// The polynomial's coefficients as published. They make it steepest at zero, not convergent to 1.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

pub(super) const ROW: Row = Row {
    name: "muon",
    summary: "Muon: momentum over its Frobenius norm, by matrix; the polynomial a I + b A; the update, in place",
    sources: &[SOURCE.plain],
    cases: || {
        // lr, momentum, weight decay, largest norm.
        const PLAIN: &[f64] = &[0.5, 0.95, 0.0, 0.0];
        const CLIPPED: &[f64] = &[0.5, 0.8, 0.7, 2.5];
        let momentum = |shape: &[usize], nesterov: bool, hyper: &'static [f64]| {
            let name = format!("momentum of {shape:?}, Nesterov {nesterov}, at most {}", hyper[3]);
            momentum_case(&name, shape, nesterov).fill(2, InputFill::Values(hyper))
        };
        let update = |shape: &[usize], hyper: &'static [f64]| {
            let op = MuonUpdate { rate: 0.3 };
            Case::new(format!("update of {shape:?}"), op, &[shape, shape, &[4]])
                .fill(2, InputFill::Values(hyper))
                .forward_only()
        };
        // After a LossScale: the factor of the gradient, 1 to skip the step, the scale.
        const SCALED: &[f64] = &[0.25, 0.0, 4.0];
        const SKIPPED: &[f64] = &[0.0, 1.0, 4.0];
        let by_outcome = |shape: &[usize], outcome: &'static [f64]| {
            let case = momentum_case(&format!("momentum of {shape:?} by {outcome:?}"), shape, true);
            case.fill(2, InputFill::Values(CLIPPED)).input(3, &[3], InputFill::Values(outcome))
        };
        let scaled = |shape: &[usize], outcome: &'static [f64]| {
            let case = Case::new(
                format!("update of {shape:?} by {outcome:?}"),
                MuonUpdate { rate: 0.3 },
                &[shape, shape, &[3], &[4]],
            );
            case.fill(2, InputFill::Values(outcome)).fill(3, InputFill::Values(CLIPPED)).forward_only()
        };
        let zero = momentum(&[3, 4], true, PLAIN).fill(0, InputFill::Constant(0.0)).fill(1, InputFill::Constant(0.0));
        vec![
            momentum(&[1, 1], true, CLIPPED),
            momentum(&[127, 3], false, PLAIN),
            momentum(&[5, 7, 12], true, CLIPPED),
            momentum(&[3, 130, 132], false, CLIPPED),
            momentum(&[1757, 41], true, PLAIN),
            Case { name: "momentum of zeros".into(), ..zero },
            by_outcome(&[5, 7, 12], SCALED),
            // Only the momentum is as it was; the direction is that of a gradient times 0, and is not used.
            by_outcome(&[127, 3], SKIPPED),
            scaled(&[5, 7, 12], SCALED),
            scaled(&[127, 3], SKIPPED).fill(1, InputFill::Constant(f64::NAN)),
            shift_case(&[1, 1]),
            shift_case(&[127, 127]),
            shift_case(&[5, 3, 3]),
            shift_case(&[2, 68, 68]),
            update(&[1, 1], CLIPPED),
            update(&[1757, 3], PLAIN),
            update(&[5, 7, 12], CLIPPED),
        ]
    },
    bench: || {
        const HYPER: &[f64] = &[1e-3, 0.95, 0.1, 1.0];
        let update = Case::new("update 4x1024x1024", MuonUpdate { rate: 0.2 }, &[&[4 << 20], &[4 << 20], &[4]])
            .fill(2, InputFill::Values(HYPER))
            .forward_only();
        let momentum = momentum_case("momentum 4x1024x1024", &[4, 1024, 1024], true);
        vec![momentum.fill(2, InputFill::Values(HYPER)), shift_case(&[4, 1024, 1024]), update]
    },
};

fn momentum_case(name: &str, shape: &[usize], nesterov: bool) -> Case {
    let op = MuonMomentum { nesterov, to: 1.2 };
    Case::new(name, op, &[shape, shape, &[4], &[1]]).fill(3, InputFill::Constant(10.0)).forward_only()
}

fn shift_case(shape: &[usize]) -> Case {
    let op = MuonShift { identity: 3.4, factor: -2.5 };
    Case::new(format!("shift of {shape:?}"), op, &[shape]).forward_only()
}

/// `(grad, m, hyper, norm) -> (m, x)`. Matrices are `[.., rows, cols]`, `hyper` comes from [`MuonSettings`], `norm` is
/// `[1]`, the global norm of the gradient, or `[3]`, the outcome of a [`LossScale`](super::loss_scale::LossScale); if
/// that is to skip the step, `m` stays as it is. `x` is the matrix to orthogonalise, scaled to Frobenius norm `to`.
#[derive(Clone, Copy, Debug)]
pub struct MuonMomentum {
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Frobenius norm of each `x`.
    pub to: f32,
}

/// `gram -> identity I + factor gram`, square matrices `[.., n, n]`.
#[derive(Clone, Copy, Debug)]
pub struct MuonShift {
    /// Added to the diagonal.
    pub identity: f32,
    /// Factor of the matrix.
    pub factor: f32,
}

/// `(param, x [, outcome], hyper) -> param (1 - lr weight_decay) - lr rate x`, of any shape. With the outcome of a
/// [`LossScale`](super::loss_scale::LossScale) that is to skip the step, `param` stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct MuonUpdate {
    /// Factor of the learning rate, chosen for the shape of the matrix.
    pub rate: f32,
}

/// Settings of one step, written by the host.
///
/// Only for graphs with an update of your own: an [`Optimizer`](crate::optim::Optimizer) derives these from its
/// [`MuonConfig`](crate::optim::MuonConfig) and the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonSettings {
    /// Learning rate.
    pub lr: f32,
    /// Decay rate of the running mean of gradients.
    pub momentum: f32,
    /// Decoupled weight decay: each step subtracts `lr * weight_decay * param`.
    pub weight_decay: f32,
    /// Gradients with a larger global norm are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f32,
}

impl MuonSettings {
    /// The `hyper` input: `[lr, momentum, weight_decay, max_grad_norm]`. Write it before each step.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names a setting that would make weights that are no numbers.
    pub fn values(&self) -> Result<[f32; 4]> {
        let values = [self.lr, self.momentum, self.weight_decay, self.max_grad_norm];
        check_muon(values.map(f64::from))?;
        Ok(values)
    }
}

/// Checks learning rate, momentum, weight decay and the norm to clip to, in this order and before they are rounded.
pub(crate) fn check_muon([lr, momentum, weight_decay, max_grad_norm]: [f64; 4]) -> Result<()> {
    Error::unless(is_rate(momentum), "muon.momentum", RATE, momentum)?;
    check_update(lr, ("muon.weight_decay", weight_decay), max_grad_norm)
}

/// The most Newton-Schulz iterations. Five do, and each takes three products of matrices.
pub(crate) const MAX_STEPS: usize = 20;

/// Settings of [`Graph::muon`] that are fixed when the step is planned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Number of Newton-Schulz iterations, at most 20; 5 in the published method.
    pub steps: usize,
    /// Factor of the learning rate.
    pub rate: f64,
}

impl Graph {
    /// One step of Muon: from `[param, grad, m]`, matrices `[.., rows, cols]` each, `hyper` `[4]` from [`MuonSettings`]
    /// and the gradient's global `norm` `[1]`, or the `[3]` outcome of a [`LossScale`](super::loss_scale::LossScale), to
    /// the new `[param, m]`.
    ///
    /// [`store`](Self::store) the results to the states they came from and the step runs in place. Each iteration takes
    /// three matrix products and one small kernel, on the smaller of `x x^T` and `x^T x`. Trainers do all of this for
    /// you: see [`MuonConfig`](crate::optim::MuonConfig).
    pub fn muon(
        &mut self,
        name: &str,
        [param, grad, m]: [Value; 3],
        hyper: Value,
        norm: Value,
        step: MuonStep,
    ) -> Result<[Value; 2]> {
        Error::unless(step.steps <= MAX_STEPS, "steps", &format!("at most {MAX_STEPS}"), step.steps)?;
        let [a, b, c] = COEFFICIENTS;
        let quarter = c.powf(0.25); // see the module documentation
        let op = MuonMomentum { nesterov: step.nesterov, to: quarter as f32 };
        let made = self.op(&format!("{name}.momentum"), op, &[grad, m, hyper, norm])?;
        let (m, mut x) = (made[0], made[1]);
        let dims = self.ty(x).shape.dims();
        let wide = dims[dims.len() - 2] <= dims[dims.len() - 1];
        let product = Matmul { batch: true, ..Matmul::default() };
        let gram_op = Matmul { transpose_a: !wide, transpose_b: wide, ..product };
        for i in 0..step.steps {
            let name = |what: &str| format!("{name}.{i}.{what}");
            let gram = self.op1(&name("gram"), gram_op, &[x, x])?;
            let op = MuonShift { identity: a as f32, factor: (b / c.sqrt()) as f32 };
            let shifted = self.op1(&name("shift"), op, &[gram])?;
            let op = Matmul { accumulate: true, ..product };
            let polynomial = self.op1(&name("polynomial"), op, &[gram, gram, shifted])?;
            x = self.op1(&name("x"), product, &if wide { [polynomial, x] } else { [x, polynomial] })?;
        }
        let op = MuonUpdate { rate: (step.rate / quarter) as f32 };
        let inputs = match is_outcome(self.ty(norm)) {
            Ok(true) => vec![param, x, norm, hyper],
            _ => vec![param, x, hyper],
        };
        Ok([self.op1(name, op, &inputs)?, m])
    }
}

/// Number of matrices in a batch, and elements of each.
fn matrices(shape: &Shape) -> (usize, usize) {
    let each = shape.dims().iter().rev().take(2).product();
    (shape.len() / each, each)
}

impl Op for MuonMomentum {
    fn name(&self) -> &'static str {
        "muon_momentum"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 4)?;
        if !is_positive(self.to) {
            return Err(format!("the norm to scale to must be finite and positive, got {}", self.to));
        }
        let shape = &inputs[0].shape;
        if shape.rank() < 2 {
            return Err(format!("the gradient must be one matrix or more, got {shape}"));
        }
        expect_shape("m", &inputs[1], shape.dims())?;
        expect_shape("hyper", &inputs[2], &[4])?;
        is_outcome(&inputs[3])?;
        let (n, each) = matrices(shape);
        if n > 1 && each % 4 != 0 {
            return Err(format!("matrices of a batch must have a multiple of 4 elements, got {shape}"));
        }
        Ok(vec![inputs[0].clone(); 2])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let mut program = Program::default();
        let layout = RowLayout::whole(cx);
        let (n, each) = matrices(&cx.inputs[0].shape);
        // As for norms: on software adapters, few workgroups with much work each.
        let chunk = match cx.profile.class {
            AdapterClass::Cpu => 2048,
            AdapterClass::Gpu => 1024,
        };
        let quads = each.div_ceil(4);
        let chunks = quads.div_ceil(chunk);
        let [quads, len, chunk, chunks, groups] = [quads, each, chunk, chunks, n * chunks].map(|w| w as u32);
        let words = [quads, len, chunk, chunks, groups, 0, self.to.to_bits(), 0];
        let grid = cx.profile.grid(n * chunks as usize);
        let sums = program.scratch(TensorType::f32([n, chunks as usize]));
        let kernel = layout.kernel::<Self>("muon", SOURCE, "momentum");
        let kernel = kernel.knob("NESTEROV", self.nesterov).knob("SCALED", is_outcome(&cx.inputs[3])?);
        let binds = [Bind::In(0), Bind::In(2), Bind::In(3), Bind::Out(0), Bind::Out(1), Bind::Scratch(sums)];
        program.dispatch(kernel, &binds, &words, grid);
        let kernel = layout.kernel::<Self>("muon", SOURCE, "normalise");
        program.dispatch(kernel, &[Bind::ScratchIn(sums), Bind::Out(1)], &words, grid);
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let [grad, m, hyper, norm] = inputs else { return vec![] };
        let [_, momentum, _, max_norm] = hyper.data[..] else { return vec![] };
        let clip = factor_of(norm, max_norm);
        let grad = grad.map(|g| g * clip.unwrap_or_default());
        let old = *m;
        let m = m.zip(&grad, |m, g| momentum * m + (1.0 - momentum) * g);
        let mut x = match self.nesterov {
            true => m.zip(&grad, |m, g| momentum * m + (1.0 - momentum) * g),
            false => m.clone(),
        };
        let (_, each) = matrices(&x.shape);
        for matrix in x.data.chunks_exact_mut(each) {
            let norm = matrix.iter().map(|x| x * x).sum::<f64>().sqrt();
            matrix.iter_mut().for_each(|x| *x *= f64::from(self.to) / (norm + 1e-7));
        }
        vec![if clip.is_some() { m } else { old.clone() }, x]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        10 * inputs[0].len() as u64
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        (output == 0).then_some(1)
    }
}

impl Op for MuonShift {
    fn name(&self) -> &'static str {
        "muon_shift"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        match inputs[0].shape.dims() {
            [.., rows, cols] if rows == cols => Ok(vec![inputs[0].clone()]),
            _ => Err(format!("must be square matrices, got {}", inputs[0].shape)),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let side = cx.inputs[0].shape.cols() as u32;
        let kernel = table_kernel::<Self>("muon", SOURCE.plain, "shift");
        let words = [0, 0, 0, 0, side, self.identity.to_bits(), self.factor.to_bits()];
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::Out(0)], &words))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut y = inputs[0].map(|x| f64::from(self.factor) * x);
        let n = y.shape.cols();
        for (i, row) in y.data.chunks_exact_mut(n).enumerate() {
            row[i % n] += f64::from(self.identity);
        }
        vec![y]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        2 * outputs[0].len() as u64
    }
}

impl Op for MuonUpdate {
    fn name(&self) -> &'static str {
        "muon_update"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let scaled = inputs.len() == 4;
        expect_f32(inputs, if scaled { 4 } else { 3 })?;
        if !self.rate.is_finite() || self.rate < 0.0 {
            return Err(format!("the rate must be finite and not negative, got {}", self.rate));
        }
        expect_shape("x", &inputs[1], inputs[0].shape.dims())?;
        if scaled {
            expect_shape("outcome", &inputs[2], &[3])?;
        }
        expect_shape("hyper", &inputs[inputs.len() - 1], &[4])?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (entry, binds) = match cx.inputs.len() {
            4 => ("update_scaled", vec![Bind::In(1), Bind::In(3), Bind::Out(0), Bind::In(2)]),
            _ => ("update", vec![Bind::In(1), Bind::In(2), Bind::Out(0)]),
        };
        let kernel = table_kernel::<Self>("muon", SOURCE.plain, entry);
        Ok(elementwise::quads(cx, kernel, &binds, &[0, 0, 0, 0, 0, self.rate.to_bits(), 0]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let [param, x, outcome @ .., hyper] = inputs else { return vec![] };
        let [lr, _, decay, _] = hyper.data[..] else { return vec![] };
        if outcome.first().is_some_and(|outcome| factor_of(outcome, 0.0).is_none()) {
            return vec![(*param).clone()];
        }
        let rate = lr * f64::from(self.rate);
        vec![param.zip(x, |p, x| p * (1.0 - lr * decay) - rate * x)]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        3 * outputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(0)
    }
}
