//! A constant tensor.

use super::cases::{Case, Row};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/fill.wgsl");

pub(super) const ROW: Row = Row {
    name: "fill",
    summary: "y = c everywhere",
    sources: &[SOURCE],
    cases: || {
        let case = |s: &&[usize]| Case::new(format!("{s:?}"), Fill::new(*s, 0.5), &[]).forward_only();
        elementwise::SHAPES.iter().map(case).collect()
    },
    bench: Vec::new,
};

/// `() -> c` everywhere, of a given shape. Usually added by [`Graph::fill`].
#[derive(Clone, Debug)]
pub struct Fill {
    shape: Shape,
    value: f32,
    early: bool,
}

impl Fill {
    /// `value` in every element of `shape`.
    pub fn new(shape: impl Into<Shape>, value: f32) -> Self {
        Fill { shape: shape.into(), value, early: false }
    }

    /// The same, but computed before all other nodes.
    pub(crate) fn early(shape: impl Into<Shape>, value: f32) -> Self {
        Fill { early: true, ..Self::new(shape, value) }
    }
}

impl Graph {
    /// A constant f32 tensor: `value` in every element of `shape`.
    ///
    /// Use it for zeros and ones inside a graph. Values that change between runs belong in an [`input`](Self::input).
    pub fn fill(&mut self, name: &str, shape: impl Into<Shape>, value: f32) -> Result<Value> {
        self.op1(name, Fill::new(shape, value), &[])
    }
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(vec![TensorType::f32(self.shape.clone())])
    }

    fn vjp(&self, _: &mut Vjp<'_>) -> Result<()> {
        Ok(()) // it has no inputs
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("fill", SOURCE, "forward");
        Ok(elementwise::quads(cx, kernel, &[Bind::Out(0)], &[self.value.to_bits()]))
    }

    fn reference(&self, _: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![Array::zeros(self.shape.clone()).map(|_| f64::from(self.value))]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn elementwise(&self) -> Option<Elementwise> {
        let function = || Elementwise::trusted(&[][..], "value").constant("value", self.value);
        (!self.early).then(function)
    }

    fn runs_early(&self) -> bool {
        self.early
    }
}
