//! `y = c * x` with a constant `c`: attention scores, scaled residuals, averaged losses.

use std::sync::Arc;

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/scale.wgsl");

pub(super) const ROW: Row = Row {
    name: "scale",
    summary: "y = c * x with a constant c; adds to the stream in place",
    sources: &[SOURCE],
    cases: || {
        let plain = Scale { factor: -0.375, accumulate: false };
        let case = |s: &&[usize]| Case::new(format!("{s:?}"), plain, &[s]);
        let add = Case::new("accumulate", Scale { accumulate: true, ..plain }, &[&[9, 13], &[9, 13]]);
        elementwise::SHAPES.iter().map(case).chain([add]).collect()
    },
    bench: || vec![Case::new("4096x768", Scale { factor: 0.5, accumulate: false }, &[&[4096, 768]])],
};

/// `(x [, base]) -> factor * x [+ base]`, of any shape. Usually added by [`Graph::scale`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scale {
    /// The constant factor, fixed when the graph is planned.
    pub factor: f32,
    /// Whether a last input, of the output's shape, is added to the result.
    pub accumulate: bool,
}

impl Graph {
    /// `factor * x`, of the shape of `x`. The factor is a constant of the graph.
    pub fn scale(&mut self, name: &str, x: Value, factor: f32) -> Result<Value> {
        self.op1(name, Scale { factor, accumulate: false }, &[x])
    }
}

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1 + usize::from(self.accumulate))?;
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[1], inputs[0].shape.dims())?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        if cx.needs(0) {
            let dx = cx.graph.scale(&cx.name, dy, self.factor)?;
            cx.set(0, dx);
        }
        if self.accumulate {
            cx.set(1, dy);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("scale", SOURCE, "forward").knob("ACCUMULATE", self.accumulate);
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::Out(0)], &[self.factor.to_bits()]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let y = inputs[0].map(|x| f64::from(self.factor) * x);
        vec![if self.accumulate { y.zip(inputs[1], |y, base| y + base) } else { y }]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64 * if self.accumulate { 2 } else { 1 }
    }

    fn elementwise(&self) -> Option<Elementwise> {
        let function = || Elementwise::trusted(&["x"][..], "factor * x").constant("factor", self.factor);
        (!self.accumulate).then(function)
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(1)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Scale { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}
