//! `y = a * b`, element by element.

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/mul.wgsl");

pub(super) const ROW: Row = Row {
    name: "mul",
    summary: "y = a * b, element by element",
    sources: &[SOURCE],
    cases: || elementwise::SHAPES.iter().map(|s| Case::new(format!("{s:?}"), Mul, &[s, s])).collect(),
    bench: || vec![Case::new("4096x768", Mul, &[&[4096, 768], &[4096, 768]])],
};

/// `(a, b) -> a * b`; both of the same shape. Usually added by [`Graph::mul`].
#[derive(Clone, Copy, Debug)]
pub struct Mul;

impl Graph {
    /// `a * b`, element by element, both of the same shape: gates and masks.
    pub fn mul(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        self.op1(name, Mul, &[a, b])
    }
}

impl Op for Mul {
    fn name(&self) -> &'static str {
        "mul"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_shape("b", &inputs[1], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let (a, b) = (cx.inputs[0], cx.inputs[1]);
        for (i, other, what) in [(0, b, "a"), (1, a, "b")] {
            if cx.needs(i) {
                let grad = cx.graph.mul(&format!("{}.{what}", cx.name), dy, other)?;
                cx.set(i, grad);
            }
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("mul", SOURCE, "forward");
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::In(1), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].zip(inputs[1], |a, b| a * b)]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64
    }
}
