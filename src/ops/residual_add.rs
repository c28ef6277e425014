//! `y = x + branch`, in place on the stream `x`.
//!
//! This is the addition that makes the throughline. Its gradient needs no kernel: stream and branch both receive the
//! cotangent itself. Forward, the planner usually folds it into the matmul that computes `branch`.

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/residual_add.wgsl");

pub(super) const ROW: Row = Row {
    name: "residual_add",
    summary: "y = x + branch, in place on x; its gradient needs no kernel",
    sources: &[SOURCE],
    cases: || elementwise::SHAPES.iter().map(|s| Case::new(format!("{s:?}"), ResidualAdd, &[s, s])).collect(),
    bench: || vec![Case::new("4096x768", ResidualAdd, &[&[4096, 768], &[4096, 768]])],
};

/// `(x, branch) -> x + branch`; both of the same shape. Usually added by [`Graph::residual_add`].
#[derive(Clone, Copy, Debug)]
pub struct ResidualAdd;

impl Graph {
    /// Adds a branch to the residual stream: `x + branch`, both of the same shape.
    ///
    /// The planner reuses the buffer of `x` for the result if no later node reads `x`, and it can fold the addition
    /// into the op that computes `branch`. For broadcasting additions use [`add`](Self::add).
    pub fn residual_add(&mut self, name: &str, x: Value, branch: Value) -> Result<Value> {
        self.op1(name, ResidualAdd, &[x, branch])
    }
}

impl Op for ResidualAdd {
    fn name(&self) -> &'static str {
        "residual_add"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        expect_shape("the branch", &inputs[1], inputs[0].shape.dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        cx.set(0, dy);
        cx.set(1, dy);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("residual_add", SOURCE, "forward");
        Ok(elementwise::quads(cx, kernel, &[Bind::In(1), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].zip(inputs[1], |x, b| x + b)]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64
    }

    fn elementwise(&self) -> Option<Elementwise> {
        Some(Elementwise::trusted(&["a", "b"][..], "a + b"))
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(0)
    }

    fn is_addition(&self) -> bool {
        true
    }
}
