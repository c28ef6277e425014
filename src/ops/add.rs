//! `y = a + b`, where `b` may repeat over leading dimensions: biases, learned positions.

use super::cases::{Case, Row};
use super::checks::expect_f32;
use super::elementwise;
use super::source::table_kernel;
use super::sum::expect_suffix;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/add.wgsl");

pub(super) const ROW: Row = Row {
    name: "add",
    summary: "y = a + b; b may repeat over leading dimensions",
    sources: &[SOURCE],
    cases: || {
        let case = |a: &[usize], b: &[usize]| Case::new(format!("{a:?} + {b:?}"), Add, &[a, b]);
        vec![
            case(&[1], &[1]),
            case(&[1757], &[1757]),
            case(&[3, 5, 7], &[5, 7]),
            case(&[4, 6, 8], &[8]),
            case(&[127, 3], &[1]),
        ]
    },
    bench: || vec![Case::new("4096x768", Add, &[&[4096, 768], &[4096, 768]])],
};

/// `(a, b) -> a + b`; `b` has the shape of `a`, its trailing dimensions, or `[1]`. Usually added by [`Graph::add`].
#[derive(Clone, Copy, Debug)]
pub struct Add;

impl Graph {
    /// `a + b`, where `b` has the shape of `a`, its trailing dimensions, or `[1]`.
    ///
    /// Use it for biases and position tables. To add a branch to the residual stream use
    /// [`residual_add`](Self::residual_add), which the planner can run in place.
    pub fn add(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        self.op1(name, Add, &[a, b])
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_suffix(&inputs[1].shape, &inputs[0].shape)?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        cx.set(0, dy);
        let b = cx.graph.ty(cx.inputs[1]).shape.clone();
        if b == cx.graph.ty(dy).shape {
            cx.set(1, dy);
        } else if cx.needs(1) {
            let db = cx.graph.sum_to(&cx.name, dy, b)?;
            cx.set(1, db);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (n, period) = (cx.outputs[0].len(), cx.inputs[1].len());
        // Storage is padded to whole quads, so single elements are only needed where `b` repeats.
        let quads = n == period || period % 4 == 0;
        let (elem, width) = if quads { ("vec4<f32>", 4) } else { ("f32", 1) };
        let (len, period) = (n.div_ceil(width), period.div_ceil(width));
        let kernel = table_kernel::<Self>("add", SOURCE, "forward").knob("E", elem).knob("REPEATS", len != period);
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(0)];
        Ok(elementwise::elements(cx, len, kernel, &binds, &[period as u32]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].zip(inputs[1], |a, b| a + b)]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64
    }
}
