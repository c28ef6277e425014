//! The same storage in another shape. No kernel runs.

use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Launch, Program};
use crate::tensor::{Shape, TensorType};

/// `x -> x` in another shape with the same number of elements. Usually added by [`Graph::reshape`].
#[derive(Clone, Debug)]
pub struct Reshape {
    to: Shape,
}

impl Graph {
    /// `x` in another shape with the same number of elements. Free: the result is a view.
    ///
    /// Axes keep their order; to exchange them use [`transpose`](Self::transpose).
    pub fn reshape(&mut self, name: &str, x: Value, to: impl Into<Shape>) -> Result<Value> {
        self.op1(name, Reshape { to: to.into() }, &[x])
    }

    /// `x` in the shape of `like`; `x` itself if it has that shape already.
    pub(crate) fn reshape_like(&mut self, x: Value, like: Value) -> Result<Value> {
        let to = self.ty(like).shape.clone();
        if self.ty(x).shape == to {
            return Ok(x);
        }
        let name = format!("{}.reshape", self.name(x));
        self.reshape(&name, x, to)
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = inputs else { return Err(format!("takes 1 input, got {}", inputs.len())) };
        if self.to.problem().is_some() || self.to.check_len("").is_err() || self.to.len() != x.len() {
            return Err(format!("{} elements cannot take shape {}", x.len(), self.to));
        }
        Ok(vec![TensorType { shape: self.to.clone(), dtype: x.dtype }])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.reshape_like(dy, cx.inputs[0])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, _: &Launch<'_>) -> Result<Program, String> {
        Ok(Program::default())
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![Array::new(self.to.clone(), inputs[0].data.clone())]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn bytes(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn is_view(&self) -> bool {
        true
    }
}
