//! SwiGLU's activation (Shazeer 2020, <https://arxiv.org/abs/2002.05202>), the gate of Llama's feed-forward layers.
//!
//! `y = silu(gate) * up` with `silu(g) = g * sigmoid(g)`. The three matrices of the layer are separate matmuls.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Kept, Op, Recomputed, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/swiglu.wgsl");

pub(super) const ROW: Row = Row {
    name: "swiglu",
    summary: "y = gate * sigmoid(gate) * up",
    sources: &[SOURCE],
    cases: || {
        let case = |s: &&[usize]| Case::new(format!("{s:?}"), SwiGlu, &[s, s]);
        // Both tails, where a naive exp overflows.
        let fills = [InputFill::Uniform(-100.0, 100.0), InputFill::Constant(-1000.0), InputFill::Constant(1000.0)];
        let far = |fill| Case::new(format!("{fill:?}"), SwiGlu, &[&[301], &[301]]).fill(0, fill);
        // All that remains are rounding errors of f32, far below the table's default tolerance. A lone element where
        // the slope of silu nearly cancels has a relative error of 1e-6.
        elementwise::SHAPES.iter().map(case).chain(fills.map(far)).map(|case| case.tolerance(1e-11)).collect()
    },
    bench: || vec![Case::new("4096x2048", SwiGlu, &[&[4096, 2048], &[4096, 2048]])],
};

/// `(gate, up) -> silu(gate) * up`, all of the same shape. Usually added by [`Graph::swiglu`].
#[derive(Clone, Copy, Debug)]
pub struct SwiGlu;

/// `(dy, gate, up) -> (dgate, dup)`, all of the same shape: the gradient of [`SwiGlu`].
#[derive(Clone, Copy, Debug)]
pub struct SwiGluBackward;

impl Graph {
    /// `silu(gate) * up`, both of the same shape.
    ///
    /// Put it between the two input projections of a gated feed-forward layer and its output projection;
    /// [`nn`](crate::nn) does this for Llama-like models.
    pub fn swiglu(&mut self, name: &str, gate: Value, up: Value) -> Result<Value> {
        self.op1(name, SwiGlu, &[gate, up])
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_shape("up", &inputs[1], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.dy0()?, cx.inputs[0], cx.inputs[1]];
        let grads = cx.graph.op(&cx.name, SwiGluBackward, &inputs)?;
        (0..2).for_each(|i| cx.set(i, grads[i]));
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("swiglu", SOURCE, "forward");
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::In(1), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].zip(inputs[1], |g, up| g * sigmoid(g) * up)]
    }

    fn elementwise(&self) -> Option<Elementwise> {
        Some(Elementwise::trusted(&["gate", "up"][..], "gate * sigmoid(gate) * up"))
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        5 * outputs[0].len() as u64 // an exp counts as one
    }

    fn recomputed(&self, _: usize, _: &[TensorType]) -> Option<Recomputed> {
        Some(Recomputed { op: Arc::new(*self), from: vec![Kept::Input(0), Kept::Input(1)] })
    }
}

impl Op for SwiGluBackward {
    fn name(&self) -> &'static str {
        "swiglu_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 3)?;
        expect_shape("gate", &inputs[1], inputs[0].shape.dims())?;
        expect_shape("up", &inputs[2], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone(), inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of activations are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("swiglu", SOURCE, "backward");
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0), Bind::Out(1)];
        Ok(elementwise::quads(cx, kernel, &binds, &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let (dy, gate, up) = (inputs[0], inputs[1], inputs[2]);
        let slope = |g: f64| sigmoid(g) * (1.0 + g * sigmoid(-g));
        let dgate = dy.zip(up, |dy, up| dy * up).zip(gate, |v, g| v * slope(g));
        vec![dgate, dy.zip(gate, |dy, g| dy * g * sigmoid(g))]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        12 * outputs[0].len() as u64
    }
}
