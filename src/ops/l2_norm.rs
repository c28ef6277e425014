//! The Euclidean norm of all elements.
//!
//! `y = sqrt(sum x^2)`; `dx = x * dy / y`, zero where `y` is zero. The main use is clipping gradients by their global
//! norm without reading them back. Elements are added in a fixed order and level by level, so the result is
//! reproducible and millions of elements cost little accuracy.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::AdapterClass;
use crate::tensor::TensorType;

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "l2_norm.wgsl");

pub(super) const ROW: Row = Row {
    name: "l2_norm",
    summary: "y = sqrt(sum x^2) over all elements",
    sources: &[SOURCE.plain],
    cases: || {
        let shapes: [&[usize]; 5] = [&[1], &[127], &[1757], &[33, 7, 5], &[2, 4999]];
        let mut cases: Vec<Case> = shapes.iter().map(|s| Case::new(format!("{s:?}"), L2Norm, &[s])).collect();
        // The same sign and size everywhere, so that rounding errors accumulate.
        let large = Case::new("1000001", L2Norm, &[&[1_000_001]]).fill(0, InputFill::Uniform(0.9, 1.1)).forward_only();
        let op = L2NormBackward { accumulate: true };
        let backward = Case::new("backward, accumulate", op, &[&[5, 7], &[1], &[1], &[5, 7]])
            .fill(1, InputFill::Uniform(0.5, 1.5))
            .forward_only();
        let zero = Case::new("backward of zero", L2NormBackward::default(), &[&[35], &[1], &[1]])
            .fill(0, InputFill::Constant(0.0))
            .fill(1, InputFill::Constant(0.0))
            .forward_only();
        cases.extend([large, backward, zero]);
        cases
    },
    bench: || vec![Case::new("10M", L2Norm, &[&[10 << 20]])],
};

/// `x -> sqrt(sum x^2)`: `[..] -> [1]`. Usually added by [`Graph::l2_norm`].
#[derive(Clone, Copy, Debug)]
pub struct L2Norm;

/// `(x, norm, dy [, base]) -> x * dy / norm [+ base]`: `[..], [1], [1] -> [..]`. Zero where `norm` is zero. The
/// gradient of [`L2Norm`].
#[derive(Clone, Copy, Debug, Default)]
pub struct L2NormBackward {
    accumulate: bool,
}

impl Graph {
    /// The Euclidean norm of all elements: `[..] -> [1]`.
    pub fn l2_norm(&mut self, name: &str, x: Value) -> Result<Value> {
        self.op1(name, L2Norm, &[x])
    }
}

impl Op for L2Norm {
    fn name(&self) -> &'static str {
        "l2_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        Ok(vec![TensorType::f32([1])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let inputs = [cx.inputs[0], cx.outputs[0], dy];
        let dx = cx.graph.op1(&cx.name, L2NormBackward::default(), &inputs)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let mut program = Program::default();
        let layout = RowLayout::whole(cx);
        let len = cx.inputs[0].len();
        // On software adapters, few workgroups with much work each: starting one is expensive there.
        let chunk = match cx.profile.class {
            AdapterClass::Cpu => 2048,
            AdapterClass::Gpu => 4096,
        };
        let groups = len.div_ceil(4 * chunk);
        let mut level = |[from, to]: [Bind; 2], [len, chunk, groups]: [usize; 3], [square, root]: [bool; 2]| {
            let kernel = layout.kernel::<Self>("l2_norm", SOURCE, "forward").knob("SQUARE", square).knob("ROOT", root);
            let words = [0, len, chunk, groups].map(|w| w as u32);
            program.dispatch(kernel, &[from, to], &words, cx.profile.grid(groups));
        };
        if groups == 1 {
            level([Bind::In(0), Bind::Out(0)], [len, chunk, 1], [true, true]);
            return Ok(program);
        }
        level([Bind::In(0), Bind::Scratch(0)], [len, chunk, groups], [true, false]);
        level([Bind::ScratchIn(0), Bind::Out(0)], [groups, groups.div_ceil(4), 1], [false, true]);
        program.scratch(TensorType::f32([groups]));
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![Array::new([1], vec![inputs[0].dot(inputs[0]).sqrt()])]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * inputs[0].len() as u64
    }
}

impl Op for L2NormBackward {
    fn name(&self) -> &'static str {
        "l2_norm_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 3 + usize::from(self.accumulate))?;
        expect_shape("norm", &inputs[1], &[1])?;
        expect_shape("dy", &inputs[2], &[1])?;
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[3], inputs[0].shape.dims())?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of norms are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("l2_norm", SOURCE.plain, "backward").knob("ACCUMULATE", self.accumulate);
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0)];
        Ok(elementwise::quads(cx, kernel, &binds, &[0, 0, 0]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let (norm, dy) = (inputs[1].data[0], inputs[2].data[0]);
        let scale = if norm > 0.0 { dy / norm } else { 0.0 };
        let dx = inputs[0].map(|x| x * scale);
        vec![if self.accumulate { dx.zip(inputs[3], |d, base| d + base) } else { dx }]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(3)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(L2NormBackward { accumulate: true }) as Arc<dyn Op>)
    }
}
