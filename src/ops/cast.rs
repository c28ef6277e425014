//! The same values, stored as another type of floats.

use super::cases::{Case, Row};
use super::checks::expect_f32;
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::tensor::{DType, TensorType};

const SOURCE: &str = include_str!("../../shaders/cast.wgsl");

pub(super) const ROW: Row = Row {
    name: "cast",
    summary: "y = x, stored as another type of floats",
    sources: &[SOURCE],
    cases: || elementwise::SHAPES.iter().map(|s| Case::new(format!("{s:?}"), Cast, &[s])).collect(),
    bench: || vec![Case::new("4096x768", Cast, &[&[4096, 768]])],
};

/// `x -> x`, of any shape. Usually added by [`Graph::cast`].
#[derive(Clone, Copy, Debug)]
pub struct Cast;

impl Graph {
    /// `x`, stored as this type of floats: an input or a parameter for products that read it in f16, or a result that
    /// the host reads in f32. What an op computes needs no cast: see [`store_as`](Self::store_as).
    ///
    /// ```
    /// use throughline::{DType, Graph, TensorType};
    /// let mut g = Graph::new();
    /// let w = g.param("w", [512, 512])?;
    /// let half = g.cast("w.half", w, DType::F16)?;
    /// assert_eq!(g.ty(half), &TensorType::f16([512, 512]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn cast(&mut self, name: &str, x: Value, dtype: DType) -> Result<Value> {
        let y = self.op1(name, Cast, &[x])?;
        self.store_as(y, dtype)?;
        Ok(y)
    }
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        Ok(inputs.to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        cx.set(0, dy);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("cast", SOURCE, "forward");
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::Out(0)], &[]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].clone()]
    }

    fn stays_f32(&self, _output: usize) -> bool {
        // Whoever casts has said what to store it as.
        true
    }

    fn elementwise(&self) -> Option<Elementwise> {
        Some(Elementwise::trusted(&["x"][..], "x"))
    }
}
