//! Gaussian error linear units (Hendrycks & Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
//!
//! `y = x * phi(x)`. In the exact form `phi` is the normal distribution function `(1 + erf(x / sqrt(2))) / 2`. In the
//! tanh form, used by GPT-2, it is `(1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Kept, Op, Recomputed, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/gelu.wgsl");

/// Coefficient of the cubic term in the tanh form.
const CUBIC: f64 = 0.044715;

pub(super) const ROW: Row = Row {
    name: "gelu",
    summary: "y = x * phi(x); phi exact (erf) or in GPT-2's tanh form",
    sources: &[SOURCE],
    cases,
    bench: || [true, false].map(|tanh| Case::new(form("4096x3072", tanh), Gelu { tanh }, &[&[4096, 3072]])).into(),
};

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for tanh in [true, false] {
        let case = |s: &&[usize]| Case::new(form(&format!("{s:?}"), tanh), Gelu { tanh }, &[s]);
        cases.extend(elementwise::SHAPES.iter().map(case));
        // Both tails, where a naive tanh or exp overflows.
        let fills = [InputFill::Uniform(-50.0, 50.0), InputFill::Constant(-50.0), InputFill::Constant(1e20)];
        let far = |fill| Case::new(form(&format!("{fill:?}"), tanh), Gelu { tanh }, &[&[301]]).fill(0, fill);
        cases.extend(fills.map(far));
    }
    // All that remains are rounding errors of f32, far below the table's default tolerance.
    cases.into_iter().map(|case| case.tolerance(1e-12)).collect()
}

fn form(name: &str, tanh: bool) -> String {
    format!("{name} {}", if tanh { "tanh" } else { "erf" })
}

/// `x -> x * phi(x)`, of any shape. Usually added by [`Graph::gelu`] or [`Graph::gelu_tanh`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gelu {
    /// Whether to use the tanh form rather than the exact one.
    pub tanh: bool,
}

/// `(dy, x) -> dx = dy * (phi(x) + x * phi'(x))`, of any shape: the gradient of [`Gelu`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GeluBackward {
    /// Whether to use the tanh form rather than the exact one.
    pub tanh: bool,
}

impl Graph {
    /// GELU with the exact normal distribution function, of the shape of `x`. BERT uses this form.
    pub fn gelu(&mut self, name: &str, x: Value) -> Result<Value> {
        self.op1(name, Gelu { tanh: false }, &[x])
    }

    /// GELU in the tanh form, of the shape of `x`. GPT-2 uses this form.
    pub fn gelu_tanh(&mut self, name: &str, x: Value) -> Result<Value> {
        self.op1(name, Gelu { tanh: true }, &[x])
    }
}

/// `phi(x)` and `phi'(x)`.
fn phi(x: f64, tanh: bool) -> (f64, f64) {
    if tanh {
        // sqrt(2 / pi) = 2 / sqrt(pi) / sqrt(2)
        let c = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
        let t = (c * (x + CUBIC * x.powi(3))).tanh();
        return (0.5 * (1.0 + t), 0.5 * (1.0 - t * t) * c * (1.0 + 3.0 * CUBIC * x * x));
    }
    let density = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (-0.5 * x * x).exp();
    (0.5 * libm::erfc(-x * FRAC_1_SQRT_2), density)
}

impl Op for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.dy0()?, cx.inputs[0]];
        let dx = cx.graph.op1(&cx.name, GeluBackward { tanh: self.tanh }, &inputs)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("gelu", SOURCE, "forward").knob("TANH", self.tanh);
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].map(|x| x * phi(x, self.tanh).0)]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        // An exp counts as one.
        outputs[0].len() as u64 * if self.tanh { 9 } else { 22 }
    }

    fn recomputed(&self, _: usize, _: &[TensorType]) -> Option<Recomputed> {
        Some(Recomputed { op: Arc::new(*self), from: vec![Kept::Input(0)] })
    }
}

impl Op for GeluBackward {
    fn name(&self) -> &'static str {
        "gelu_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_shape("x", &inputs[1], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of activations are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("gelu", SOURCE, "backward").knob("TANH", self.tanh);
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::In(1), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let slope = |x: f64| {
            let (value, derivative) = phi(x, self.tanh);
            value + x * derivative
        };
        vec![inputs[0].zip(inputs[1], |dy, x| dy * slope(x))]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64 * if self.tanh { 17 } else { 25 }
    }
}
