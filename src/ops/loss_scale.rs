//! Dynamic loss scaling (Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>), by the rules of PyTorch's
//! `GradScaler`: what becomes of a step, and the scale of the next one.
//!
//! The gradient was computed from the loss times `scale`. If its norm is finite, the step counts, and the gradient is to
//! be multiplied by `clip / scale`; after `interval` such steps in a row, the scale grows. If not, the step is to be
//! skipped, and the scale shrinks. Scales are powers of two, so that scaling changes no digit of a gradient.
//!
//! [`optim`](crate::optim) builds these nodes for you: see [`LossScaling`](crate::optim::LossScaling). Use the op
//! directly to write your own update step.

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_shape, is_not_negative};
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{DType, TensorType};

const SOURCE: &str = include_str!("../../shaders/loss_scale.wgsl");

pub(super) const ROW: Row = Row {
    name: "loss_scale",
    summary: "whether a step counts by the norm of its scaled gradient, the factor of that gradient, the next scale",
    sources: &[SOURCE],
    cases: || {
        let op =
            LossScale { growth: 4.0, backoff: 0.125, interval: 3, least: 2.0, largest: 1024.0, max_grad_norm: 0.5 };
        let free = LossScale { max_grad_norm: 0.0, ..op };
        let case = |op: LossScale, norm: f64, scale: f64, counts: &'static [f64]| {
            let name = format!("norm {norm}, at most {}, scale {scale}, counts {counts:?}", op.max_grad_norm);
            Case::new(name, op, &[&[1], &[1]])
                .ids(&[3], 1)
                .fill(0, InputFill::Constant(norm))
                .fill(1, InputFill::Constant(scale))
                .fill(2, InputFill::Values(counts))
                .forward_only()
        };
        vec![
            case(op, 100.0, 64.0, &[0.0, 0.0, 0.0]),
            case(op, 3.0, 64.0, &[2.0, 7.0, 5.0]),
            case(free, 100.0, 0.25, &[2.0, 7.0, 5.0]),
            case(op, 0.0, 512.0, &[2.0, 1e6, 0.0]),
            case(op, f64::INFINITY, 64.0, &[1.0, 9.0, 4.0]),
            case(op, f64::NAN, 8.0, &[2.0, 9.0, 4.0]),
            case(free, f64::NEG_INFINITY, 2.0, &[0.0, 0.0, 4_294_967_295.0]),
        ]
    },
    bench: || {
        let op =
            LossScale { growth: 2.0, backoff: 0.5, interval: 2000, least: 1.0, largest: 65536.0, max_grad_norm: 1.0 };
        vec![Case::new("1", op, &[&[1], &[1]]).fill(1, InputFill::Constant(64.0)).ids(&[3], 1).forward_only()]
    },
};

/// `(norm, scale, counts) -> (outcome, norm, scale, counts)`.
///
/// `norm` is f32 `[1]`, the global norm of the scaled gradient; the output of that name is what it is without the
/// scale, or infinite. `scale` is f32 `[1]`, a power of two. `counts` is u32 `[3]`: finite steps in a row since the
/// scale last changed, steps that were applied, steps that were skipped. `outcome` is f32 `[3]`, for the updates: the
/// factor of the gradient, 1 if the step is to be skipped or else 0, and the scale that the step had.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// Factor of the scale after `interval` finite steps in a row: a power of two from 1 to 2^16.
    pub growth: f32,
    /// Factor of the scale after a step that overflowed: a power of two from 2^-16 to 1.
    pub backoff: f32,
    /// Number of finite steps in a row after which the scale grows, at least 1.
    pub interval: u32,
    /// The scale shrinks no further than this.
    pub least: f32,
    /// The scale grows no further than this.
    pub largest: f32,
    /// Gradients with a larger global norm, without the scale, are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f32,
}

/// Exponents of the scales that there may be. With this range, neither a scale nor its reciprocal comes near the limits
/// of f32 on its way to the next.
const EXPONENTS: std::ops::RangeInclusive<i32> = -100..=100;

/// What a loss scale must be.
pub(crate) const SCALE: &str = "a power of two from 2^-100 to 2^100";

pub(crate) fn is_scale(x: f64) -> bool {
    is_power_of_two(x, EXPONENTS)
}

/// Whether this is two to one of these powers.
pub(crate) fn is_power_of_two(x: f64, exponents: std::ops::RangeInclusive<i32>) -> bool {
    exponents.into_iter().any(|exponent| x == 2f64.powi(exponent))
}

impl Graph {
    /// What becomes of a step by the `norm` of its scaled gradient, and the next `scale` and `counts`: returns
    /// `[outcome, norm, scale, counts]`. See [`LossScale`]. [`store`](Self::store) the last two to the states that they
    /// came from.
    pub fn loss_scale(&mut self, name: &str, norm: Value, states: [Value; 2], op: LossScale) -> Result<[Value; 4]> {
        let made = self.op(name, op, &[norm, states[0], states[1]])?;
        Ok([made[0], made[1], made[2], made[3]])
    }
}

impl LossScale {
    fn problem(&self) -> Option<String> {
        let LossScale { growth, backoff, interval, least, largest, max_grad_norm } = *self;
        if !is_power_of_two(growth.into(), 0..=16) {
            return Some(format!("growth must be a power of two from 1 to 2^16, got {growth}"));
        }
        if !is_power_of_two(backoff.into(), -16..=0) {
            return Some(format!("backoff must be a power of two from 2^-16 to 1, got {backoff}"));
        }
        for (field, x) in [("least", least), ("largest", largest)] {
            if !is_scale(x.into()) {
                return Some(format!("{field} must be {SCALE}, got {x}"));
            }
        }
        match () {
            _ if interval == 0 => Some("the interval must be at least 1, got 0".into()),
            _ if least > largest => Some(format!("least must be at most largest, {largest}, got {least}")),
            _ if !is_not_negative(max_grad_norm.into()) => {
                Some(format!("max_grad_norm must be finite and not negative, got {max_grad_norm}"))
            }
            _ => None,
        }
    }
}

impl Op for LossScale {
    fn name(&self) -> &'static str {
        "loss_scale"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if let Some(problem) = self.problem() {
            return Err(problem);
        }
        let [norm, scale, counts] = inputs else { return Err(format!("takes 3 inputs, got {}", inputs.len())) };
        for (what, ty) in [("norm", norm), ("scale", scale)] {
            expect_shape(what, ty, &[1])?;
            if ty.dtype != DType::F32 {
                return Err(format!("{what} must be f32, got {ty}"));
            }
        }
        expect_counts(counts)?;
        Ok(vec![TensorType::f32([3]), norm.clone(), scale.clone(), counts.clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, _: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("loss_scale", SOURCE, "forward");
        let [growth, backoff, least, largest, max_norm] =
            [self.growth, self.backoff, self.least, self.largest, self.max_grad_norm].map(f32::to_bits);
        let words = [growth, backoff, self.interval, least, largest, max_norm];
        let binds = [Bind::In(0), Bind::Out(0), Bind::Out(1), Bind::Out(2), Bind::Out(3)];
        Ok(Program::one(kernel, &binds, &words, [1, 1, 1]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let [norm, scale, counts] = inputs else { return vec![] };
        let ([norm], [scale], [finite, applied, skipped]) = (&norm.data[..], &scale.data[..], &counts.data[..]) else {
            return vec![];
        };
        let next = |count: &f64| (count + 1.0).min(u32::MAX.into());
        let made = |outcome: [f64; 3], norm: f64, scale: f64, counts: [f64; 3]| {
            let one = |x| Array::new([1], vec![x]);
            vec![Array::new([3], outcome.to_vec()), one(norm), one(scale), Array::new([3], counts.to_vec())]
        };
        if !norm.is_finite() {
            let after = (scale * f64::from(self.backoff)).max(self.least.into());
            return made([0.0, 1.0, *scale], f64::INFINITY, after, [0.0, *applied, next(skipped)]);
        }
        let (unscaled, most) = (norm / scale, f64::from(self.max_grad_norm));
        let clip = if most > 0.0 { (most / (unscaled + 1e-6)).min(1.0) } else { 1.0 };
        let grows = next(finite) >= self.interval.into();
        let after = if grows { (scale * f64::from(self.growth)).min(self.largest.into()) } else { *scale };
        let finite = if grows { 0.0 } else { next(finite) };
        made([clip / scale, 0.0, *scale], unscaled, after, [finite, next(applied), *skipped])
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        6
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        [None, None, Some(1), Some(2)].get(output).copied().flatten()
    }
}

/// Checks what counts steps.
pub(super) fn expect_counts(counts: &TensorType) -> Result<(), String> {
    expect_shape("counts", counts, &[3])?;
    match counts.dtype {
        DType::U32 => Ok(()),
        dtype => Err(format!("counts must be u32, got {dtype}")),
    }
}

/// Whether an update that reads this gets the global norm of the gradient, `[1]`, or the outcome of a [`LossScale`],
/// `[3]`.
pub(super) fn is_outcome(norm: &TensorType) -> Result<bool, String> {
    match norm.shape.dims() {
        [1] => Ok(false),
        [3] => Ok(true),
        _ => Err(format!("norm must have shape [1], or [3] with loss scaling, got {}", norm.shape)),
    }
}

/// The factor of the gradient in an update that clips it to `max_norm`; `None` if the step is to be skipped. For
/// references.
pub(super) fn factor_of(norm: &Array, max_norm: f64) -> Option<f64> {
    match norm.data[..] {
        [factor, skip, _] => (skip == 0.0).then_some(factor),
        [norm, ..] if max_norm > 0.0 => Some((max_norm / (norm + 1e-6)).min(1.0)),
        _ => Some(1.0),
    }
}
