//! Concatenation along one axis. The gradient of each input is a slice.

use super::cases::{Case, Row};
use super::checks::expect_axis;
use super::elementwise;
use super::slice::{Runs, range_indices, with_axis};
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/concat.wgsl");

pub(super) const ROW: Row = Row {
    name: "concat",
    summary: "y = the inputs concatenated along one axis",
    sources: &[SOURCE],
    cases: || {
        let case =
            |axis: usize, shapes: &[&[usize]]| Case::new(format!("axis {axis} of {shapes:?}"), Concat { axis }, shapes);
        vec![
            case(0, &[&[1], &[1]]),
            case(0, &[&[127], &[1], &[1757]]),
            case(1, &[&[33, 12], &[33, 24]]),
            case(1, &[&[33, 12], &[33, 7], &[33, 4]]),
            case(0, &[&[5, 7], &[3, 7]]),
            case(1, &[&[2, 3, 8], &[2, 5, 8], &[2, 1, 8]]),
            case(1, &[[2, 3, 5, 7].as_slice(); 9]),
            Case::new("ids", Concat { axis: 0 }, &[]).ids(&[5, 9], 50_000).ids(&[2, 9], 50_000).forward_only(),
        ]
    },
    bench: || vec![Case::new("4096x768 three times", Concat { axis: 1 }, &[[4096, 768].as_slice(); 3])],
};

/// `(x0, x1, ..) -> the inputs concatenated along axis`. Takes two inputs or more. Each is a dispatch of its own, so
/// the adapter's limit on bindings does not bound their number.
#[derive(Clone, Copy, Debug)]
pub struct Concat {
    /// The axis, counted from 0. All other axes must agree.
    pub axis: usize,
}

impl Graph {
    /// Concatenates two or more tensors along `axis`: `[.., n0, ..], [.., n1, ..], .. -> [.., n0 + n1 + .., ..]`.
    ///
    /// Inputs may be f32 or u32, all of one type. [`slice`](Self::slice) takes the result apart again.
    pub fn concat(&mut self, name: &str, inputs: &[Value], axis: usize) -> Result<Value> {
        self.op1(name, Concat { axis }, inputs)
    }
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [first, rest @ ..] = inputs else { return Err("takes at least 2 inputs, got 0".into()) };
        let axis = self.axis;
        if rest.is_empty() {
            return Err("takes at least 2 inputs, got 1".into());
        }
        let mut total = expect_axis(&first.shape, axis)?;
        for (i, x) in rest.iter().enumerate() {
            let agrees = x.dtype == first.dtype
                && x.shape.rank() == first.shape.rank()
                && with_axis(&x.shape, axis, 1) == with_axis(&first.shape, axis, 1);
            if !agrees {
                return Err(format!("input {} is {x}, which differs from {first} in more than axis {axis}", i + 1));
            }
            total += x.shape.dims()[axis];
        }
        Ok(vec![TensorType { shape: with_axis(&first.shape, axis, total), dtype: first.dtype }])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let mut start = 0;
        for i in 0..cx.inputs.len() {
            let len = cx.graph.ty(cx.inputs[i]).shape.dims()[self.axis];
            if cx.needs(i) {
                let dx = cx.graph.slice(&format!("{}.{i}", cx.name), dy, self.axis, start, len)?;
                cx.set(i, dx);
            }
            start += len;
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let mut program = Program::default();
        let mut start = 0;
        for (i, x) in cx.inputs.iter().enumerate() {
            let len = x.shape.dims()[self.axis];
            let runs = Runs::new(&cx.outputs[0].shape, self.axis, start, len);
            let (units, words) = runs.words(x.len());
            let kernel = table_kernel::<Self>("concat", SOURCE, "forward").knob("E", runs.unit("vec4<u32>", "u32"));
            let (kernel, groups) = elementwise::spread(cx.profile, units, kernel);
            program.dispatch(kernel, &[Bind::In(i), Bind::Out(0)], &words, groups);
            start += len;
        }
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let mut y = Array::zeros(outputs[0].shape.clone());
        let mut start = 0;
        for x in inputs {
            let len = x.shape.dims()[self.axis];
            let at = range_indices(&outputs[0].shape, self.axis, start, len);
            at.zip(&x.data).for_each(|(i, x)| y.data[i] = *x);
            start += len;
        }
        vec![y]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn by_rows(&self, inputs: &[TensorType]) -> Option<Vec<usize>> {
        let side_by_side = inputs.first().is_some_and(|x| self.axis + 1 == x.shape.rank());
        side_by_side.then(|| (0..inputs.len()).collect())
    }
}
