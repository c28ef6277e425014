//! What an op is, and what its gradient is made with.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use super::{Graph, Value};
use crate::array::Array;
use crate::error::{Error, Result};
use crate::kernel::{Launch, Program};
use crate::tensor::TensorType;

/// A differentiable operation on tensors.
pub trait Op: Any + Debug + Send + Sync {
    /// Name of the kind of op, as in plans, errors and profiles.
    fn name(&self) -> &'static str;

    /// Types of the outputs, or what is wrong with the inputs. The graph adds the node's name and
    /// the types that came.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Adds the nodes of the vector-Jacobian product: reads `cx.dy`, calls `cx.set` for each input
    /// that `cx.needs`. There is no default: an op without a gradient returns
    /// [`Vjp::no_gradient`], so that differentiating through it is an error and not a silent zero.
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()>;

    /// Ways to cut the work on this adapter, by name: `cx.variant` of [`launch`](Self::launch) is an
    /// index into them. The first is the one to take unmeasured; a tuner tries them all. By default
    /// there is one way.
    fn variants(&self, _cx: &Launch<'_>) -> Vec<String> {
        vec![]
    }

    /// Identifies the op with its settings, for [choices](crate::Choices) that are kept in files. The default is the
    /// `Debug` form; implement it if that leaves out a setting that changes which variant is the fastest.
    fn key(&self) -> String {
        format!("{self:?}")
    }

    /// The dispatches that compute the outputs. Pure: no GPU is needed.
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String>;

    /// The outputs in f64: the definition of the op.
    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array>;

    /// Floating-point operations (a multiply-add is two). 0 for ops that only move data.
    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64;

    /// Bytes that must move at least: by default every input once and every output once.
    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        inputs.iter().chain(outputs).map(|t| t.bytes() as u64).sum()
    }

    /// `Some(i)` if the output starts as the contents of input `i`, which the kernel then updates.
    /// The planner gives both the same buffer where it can prove that nobody else needs the input,
    /// and records a copy where it cannot. Such an input is not bound: kernels read the output.
    fn starts_as(&self, _output: usize) -> Option<usize> {
        None
    }

    /// The op that computes the same, but adds output `output` to one more, last, input. That
    /// output then [starts as](Self::starts_as) that input. Lets the planner fold additions (the
    /// residual stream, gradients from several consumers) into whoever makes the addend.
    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        None
    }

    /// True for the addition that `with_addend` folds.
    fn is_addition(&self) -> bool {
        false
    }

    /// True for an op that is planned right behind the last of its inputs, wherever in the graph it stands: one
    /// that looks at values that are soon overwritten. See [`probe`](crate::probe).
    fn runs_early(&self) -> bool {
        false
    }

    /// True if the output is the input's storage under another shape: no kernel runs.
    fn is_view(&self) -> bool {
        false
    }
}

/// What an op's `vjp` works with: its own values, the cotangents of its outputs, and the graph to
/// add the backward nodes to.
#[derive(Debug)]
pub struct Vjp<'a> {
    /// The graph; new nodes are named after the node being differentiated.
    pub graph: &'a mut Graph,
    /// Name of the node being differentiated, with `.grad` behind.
    pub name: String,
    /// What the node read.
    pub inputs: Vec<Value>,
    /// What it computed.
    pub outputs: Vec<Value>,
    /// Cotangent of each output; `None` where the loss does not depend on that output.
    pub dy: Vec<Option<Value>>,
    pub(crate) op: &'static str,
    pub(crate) needs: Vec<bool>,
    pub(crate) cotangents: Vec<Option<Value>>,
}

impl Vjp<'_> {
    /// Whether anybody wants the gradient of this input.
    pub fn needs(&self, input: usize) -> bool {
        self.needs[input]
    }

    /// The cotangent of output 0, which every differentiated op with one main output has.
    pub fn dy0(&self) -> Result<Value> {
        self.dy[0].ok_or_else(|| {
            Error::Graph(format!("`{}`: the loss depends only on a side output, which has no gradient", self.name))
        })
    }

    /// The error for an op that cannot be differentiated: return it from `vjp`.
    pub fn no_gradient(&self, reason: &'static str) -> Error {
        Error::NoGradient { node: self.name.strip_suffix(".grad").unwrap_or(&self.name).into(), op: self.op, reason }
    }

    /// Sets the gradient that flows to an input.
    pub fn set(&mut self, input: usize, cotangent: Value) {
        self.cotangents[input] = Some(cotangent);
    }
}
