//! Ops made of values instead of types.

use std::fmt;
use std::sync::Arc;

use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Value, Vjp};
use crate::kernel::{Launch, Program};
use crate::tensor::TensorType;

type InferFn = dyn Fn(&[TensorType]) -> Result<Vec<TensorType>, String> + Send + Sync;
type VjpFn = dyn Fn(&mut Vjp<'_>) -> Result<()> + Send + Sync;
type LaunchFn = dyn Fn(&Launch<'_>) -> Result<Program, String> + Send + Sync;
type ReferenceFn = dyn Fn(&[&Array]) -> Vec<Array> + Send + Sync;
type FlopsFn = dyn Fn(&[TensorType], &[TensorType]) -> u64 + Send + Sync;

/// An op of your own, made of closures: output types, kernels, and the definition in f64.
///
/// Use it for what no op of this crate computes, and for the [`backward`](Self::backward) kernel of such an op. It is
/// planned, tuned and differentiated like the ops of this crate, and tested by `throughline::check`. Its kernels run
/// with bounds checks.
///
/// A function of elements needs no kernel of its own: see [`Map`](super::map::Map). For others,
/// [`Elements`](super::Elements) writes the kernel around what happens to one element. Implement [`Op`] instead if the
/// number of inputs varies, if an output [starts as](Op::starts_as) an input, or if the op is to be fused with
/// additions.
///
/// Write the inputs of closures as a pattern, such as `|[x, dy]|`: it names them, and says how many there are. Another
/// number is an error with the name of the node.
///
/// ```
/// use throughline::check::{self, Case};
/// use throughline::ops::{Bind, Custom, Elements};
/// use throughline::Gpu;
///
/// /// Sums along the last axis, `y[i] = x[0] + .. + x[i]`, or `x[i] + .. + x[last]` from the back.
/// fn running_sum(from_back: bool) -> Custom {
///     Custom::new(
///         "running_sum",
///         |[x]| Ok([x.clone()]),
///         move |cx| {
///             let row = cx.inputs[0].shape.cols();
///             let body = "var sum = 0.0;
///                 for (var j = 0u; j < row; j++) {
///                     let at = i * row + select(j, row - 1u - j, from_back == 1u);
///                     sum += x[at];
///                     y[at] = sum;
///                 }";
///             let rows = Elements::new("running_sum", cx.outputs[0].shape.rows(), body)
///                 .bind("x", Bind::In(0))
///                 .bind("y", Bind::Out(0));
///             rows.word("row", row).word("from_back", u32::from(from_back)).program(cx)
///         },
///         move |[x]| {
///             let mut y = x.clone();
///             for row in y.data.chunks_mut(x.shape.cols()) {
///                 for j in 1..row.len() {
///                     let (at, before) = if from_back { (row.len() - 1 - j, row.len() - j) } else { (j, j - 1) };
///                     row[at] += row[before];
///                 }
///             }
///             [y]
///         },
///     )
///     .vjp(move |cx| {
///         let dx = cx.graph.op1(&cx.name, running_sum(!from_back), &[cx.dy0()?])?;
///         cx.set(0, dx);
///         Ok(())
///     })
/// }
///
/// let gpu = Gpu::headless_blocking()?;
/// let shapes: [&[usize]; 3] = [&[1], &[37, 5], &[3, 1757]];
/// check::op(&gpu, &shapes.map(|shape| Case::new(format!("{shape:?}"), running_sum(false), &[shape])))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Custom {
    name: &'static str,
    settings: Option<String>,
    variants: Vec<String>,
    infer: Arc<InferFn>,
    launch: Arc<LaunchFn>,
    reference: Arc<ReferenceFn>,
    vjp: Option<Arc<VjpFn>>,
    flops: Option<Arc<FlopsFn>>,
}

impl Custom {
    /// An op with `IN` inputs and `OUT` outputs. `name` is shown in plans, errors and profiles.
    ///
    /// `infer` gives the types of the outputs, or says what is wrong with those of the inputs ([`Op::infer`]). `launch`
    /// gives the dispatches ([`Op::launch`]), and `reference` the outputs in f64, which the kernels are tested against
    /// ([`Op::reference`]).
    pub fn new<const IN: usize, const OUT: usize>(
        name: &'static str,
        infer: impl Fn([&TensorType; IN]) -> Result<[TensorType; OUT], String> + Send + Sync + 'static,
        launch: impl Fn(&Launch<'_>) -> Result<Program, String> + Send + Sync + 'static,
        reference: impl Fn([&Array; IN]) -> [Array; OUT] + Send + Sync + 'static,
    ) -> Self {
        let infer = move |inputs: &[TensorType]| {
            let all: Vec<&TensorType> = inputs.iter().collect();
            let plural = if IN == 1 { "" } else { "s" };
            let wrong = |all: Vec<_>| format!("takes {IN} input{plural}, got {}", all.len());
            Ok(infer(all.try_into().map_err(wrong)?)?.into())
        };
        // Another number of inputs never gets here: `infer` has refused it.
        let reference =
            move |inputs: &[&Array]| inputs.try_into().map(|inputs| reference(inputs).into()).unwrap_or_default();
        Custom {
            name,
            settings: None,
            variants: vec![],
            infer: Arc::new(infer),
            launch: Arc::new(launch),
            reference: Arc::new(reference),
            vjp: None,
            flops: None,
        }
    }

    /// Gives the op a gradient: see [`Op::vjp`], and [`backward`](Self::backward) for the usual case. Without one,
    /// differentiating through the op is an error.
    pub fn vjp(mut self, vjp: impl Fn(&mut Vjp<'_>) -> Result<()> + Send + Sync + 'static) -> Self {
        self.vjp = Some(Arc::new(vjp));
        self
    }

    /// Gives the op a gradient by another op, such as a `Custom`. That takes the inputs of this op and then the gradient
    /// of its output, and its outputs are the gradients of the inputs, in order. It may leave out those of the last
    /// inputs, which then have none.
    ///
    /// Use [`vjp`](Self::vjp) for anything else: two outputs that a loss may depend on, outputs that the gradient is
    /// computed from, gradients made of several nodes.
    pub fn backward(self, op: impl Op) -> Self {
        let op: Arc<dyn Op> = Arc::new(op);
        self.vjp(move |cx| {
            let dy = cx.dy0()?;
            if cx.dy[1..].iter().any(Option::is_some) {
                return Err(cx.no_gradient("`Custom::backward` is for a loss that depends on output 0 alone"));
            }
            let inputs: Vec<Value> = cx.inputs.iter().copied().chain([dy]).collect();
            let gradients = cx.graph.op_arc(&cx.name, op.clone(), &inputs)?;
            gradients.into_iter().enumerate().for_each(|(i, gradient)| cx.set(i, gradient));
            Ok(())
        })
    }

    /// Counts floating-point operations, given the types of inputs and outputs, for the rates in plans and profiles: see
    /// [`Op::flops`]. The default is 0.
    pub fn flops(mut self, flops: impl Fn(&[TensorType], &[TensorType]) -> u64 + Send + Sync + 'static) -> Self {
        self.flops = Some(Arc::new(flops));
        self
    }

    /// Offers several ways to split up the work, for a [`Tuner`](crate::Tuner) to choose from: see [`Op::variants`].
    /// `launch` looks at [`Launch::variant`]. `throughline::check` runs all of them.
    pub fn variants<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.variants = names.into_iter().map(Into::into).collect();
        self
    }

    /// Names what the closures have captured, such as a radius. It is shown with the op's name by `Debug`, and ops with
    /// other settings have [variants](Self::variants) measured of their own: see [`Op::key`].
    pub fn settings(mut self, settings: impl fmt::Debug) -> Self {
        self.settings = Some(format!("{settings:?}"));
        self
    }
}

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.settings {
            None => write!(f, "Custom({})", self.name),
            Some(settings) => write!(f, "Custom({}, {settings})", self.name),
        }
    }
}

impl Op for Custom {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        (self.infer)(inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        match &self.vjp {
            Some(vjp) => vjp(cx),
            None => Err(cx.no_gradient("`Custom::backward` or `Custom::vjp` gives it one")),
        }
    }

    fn variants(&self, _: &Launch<'_>) -> Vec<String> {
        self.variants.clone()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        (self.launch)(cx)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        (self.reference)(inputs)
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.flops.as_ref().map_or(0, |flops| flops(inputs, outputs))
    }
}
