//! Softmax over the last dimension: `y = exp(x - max) / sum(exp(x - max))`. Backward: `dx = y * (dy - sum(dy * y))`.

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "softmax.wgsl");

pub(super) const ROW: Row = Row {
    name: "softmax",
    summary: "y = exp(x) / sum(exp(x)), by row",
    sources: &[SOURCE.plain],
    cases: || {
        // Without subgroups, the last is too long for one lane.
        let shapes: [&[usize]; 7] = [&[1, 1], &[127, 3], &[5, 1757], &[257, 12], &[2, 9, 64], &[3, 4096], &[2, 33_001]];
        let case = |s: &&[usize]| Case::new(format!("{s:?}"), Softmax, &[s]);
        let mut cases: Vec<Case> = shapes.iter().map(case).collect();
        cases.push(Case::new("large scores", Softmax, &[&[9, 33]]).fill(0, InputFill::Normal(30.0)));
        cases
    },
    bench: || vec![Case::new("1024x1024", Softmax, &[&[1024, 1024]])],
};

/// `x -> softmax(x)` over the last dimension. Usually added by [`Graph::softmax`].
#[derive(Clone, Copy, Debug)]
pub struct Softmax;

/// `(dy, y) -> dx`, all of one shape: the gradient of [`Softmax`].
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxBackward;

impl Graph {
    /// Softmax over the last dimension: `[.., d] -> [.., d]`.
    ///
    /// Use it for attention or probabilities of your own. [`attention`](Self::attention) and
    /// [`cross_entropy`](Self::cross_entropy) have theirs built in and never store it.
    pub fn softmax(&mut self, name: &str, x: Value) -> Result<Value> {
        self.op1(name, Softmax, &[x])
    }
}

/// Both directions are one kernel over rows, which binds `inputs` and then the output.
fn launch<O: Op>(cx: &Launch<'_>, entry: &'static str) -> Result<Program, String> {
    let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
    let layout = RowLayout::independent(cx, rows, cols, 2);
    layout.check(cx, cols, 2)?;
    let binds: Vec<Bind> = (0..cx.inputs.len()).map(Bind::In).chain([Bind::Out(0)]).collect();
    let words = [rows as u32, (cols / layout.width) as u32, layout.groups as u32];
    let kernel = layout.kernel::<O>("softmax", SOURCE, entry);
    Ok(Program::one(kernel, &binds, &words, cx.profile.grid(layout.groups)))
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        Ok(inputs.to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.dy0()?, cx.outputs[0]];
        let dx = cx.graph.op1(&cx.name, SoftmaxBackward, &inputs)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        launch::<Self>(cx, "forward")
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut y = vec![];
        for row in inputs[0].rows() {
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            y.extend(row.iter().map(|v| (v - max).exp() / sum));
        }
        vec![Array::new(inputs[0].shape.clone(), y)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }
}

impl Op for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_shape("y", &inputs[1], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of softmax are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        launch::<Self>(cx, "backward")
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut dx = vec![];
        for (dy, y) in inputs[0].rows().zip(inputs[1].rows()) {
            let sum: f64 = dy.iter().zip(y).map(|(d, y)| d * y).sum();
            dx.extend(dy.iter().zip(y).map(|(d, y)| y * (d - sum)));
        }
        vec![Array::new(inputs[0].shape.clone(), dx)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }
}
