//! Tests for ops of your own: what this crate asks of its ops, asked of yours. Needs the feature `check`, which belongs
//! under `[dev-dependencies]`.
//!
//! An op is written four times: WGSL, launch, gradient and reference. Each can be wrong while everything still runs: a
//! kernel may skip the last elements, write past its output, depend on the order of its threads, or disagree with its
//! own gradient. [`op`] finds all of these, given nothing but [`Case`]s: the op, shapes, and how to fill the inputs.
//!
//! ```
//! use throughline::check::{self, Case};
//! use throughline::ops::{Bind, Custom, Elements};
//! use throughline::reference::Array;
//! use throughline::{Gpu, TensorType};
//!
//! /// `[rows, cols]` to the product of each row.
//! fn row_product() -> Custom {
//!     Custom::new(
//!         "row_product",
//!         |[x]| Ok([TensorType::f32([x.shape.rows()])]),
//!         |cx| {
//!             let body = "var p = 1.0;
//!                 for (var j = 0u; j < cols; j++) { p *= x[i * cols + j]; }
//!                 y[i] = p;";
//!             let rows = Elements::new("row_product", cx.outputs[0].len(), body);
//!             rows.bind("x", Bind::In(0)).bind("y", Bind::Out(0)).word("cols", cx.inputs[0].shape.cols()).program(cx)
//!         },
//!         |[x]| [Array::new([x.shape.rows()], x.rows().map(|row| row.iter().product()).collect())],
//!     )
//! }
//!
//! // Take odd sizes, tall and wide ones, and one element: the last workgroup is where kernels go wrong.
//! let cases = [[1, 1], [1757, 3], [37, 13]];
//! let cases = cases.map(|shape| Case::new(format!("{shape:?}"), row_product(), &[&shape]).forward_only());
//!
//! check::op(&Gpu::headless_blocking()?, &cases)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! This op has no gradient; [`Custom`](crate::ops::Custom) has an example with one. Its test is the same without
//! [`forward_only`](Case::forward_only). In a test function, `check::op(..).unwrap()` prints what is wrong: op, case,
//! the kind of adapter and variant, the tensor, the element, what was expected and what came.
//!
//! A graph may store its tensors in f16 ([`Graph::store_as`](crate::Graph::store_as)), and then the planner rewrites the
//! text of their kernels, as far as it can: it refuses a text that takes the address of an element or asks for the length
//! of an array. If an op of yours is to run that way, check its cases and the same [halved](Case::halved). The ops of
//! this crate are.
//!
//! The parts of [`op`] are functions too ([`kernels`], [`gradients`], [`shaders`]), as are the tools under them: a
//! [`Harness`] is a case as a graph with a loss, [`Guarded`] runs any plan with guards around its buffers.

mod failures;
mod guarded;
mod harness;
mod kernels;
mod shaders;

use std::collections::HashMap;

use harness::Gradient;

use crate::device::Gpu;
use crate::error::Result;
use crate::graph::Value;
use crate::reference::{self, Array};

pub use crate::ops::{Case, InputFill, InputSpec};
pub use failures::{Failure, Failures};
pub use guarded::Guarded;
pub use harness::{Harness, Target, profiles, read_blocking, with_loops, write};
pub use kernels::{kernels, tolerance};
pub use shaders::{kernel, shaders, texts, wgsl};

/// Everything: [`shaders`], [`gradients`], and, if all shaders are valid, [`kernels`]. One call is the whole test of an
/// op.
///
/// No cases are a failure too: nothing would have been checked.
pub fn op(gpu: &Gpu, cases: &[Case]) -> Result<(), Failures> {
    if cases.is_empty() {
        return Err(Failures::no_cases());
    }
    let mut results = vec![shaders(gpu, cases), gradients(cases)];
    if results[0].is_ok() {
        results.push(kernels(gpu, cases));
    }
    Failures(results.into_iter().filter_map(Result::err).flat_map(|f| f.0).collect()).into_result()
}

/// Compares the gradients that [`Op::vjp`](crate::ops::Op::vjp) gives with central differences of the op's forward
/// pass, both in f64 by the op's references. Nothing runs on a device. In large inputs a sample of the elements.
pub fn gradients(cases: &[Case]) -> Result<(), Failures> {
    let mut failures = Failures::default();
    for case in cases {
        if let Err(e) = case_gradients(case, &mut failures) {
            failures.push_error(case, e);
        }
    }
    failures.into_result()
}

fn case_gradients(case: &Case, failures: &mut Failures) -> Result<()> {
    let harness = Harness::new(case, 2)?;
    let Some(loss) = harness.loss() else { return Ok(()) };
    let loss_of = |given: &HashMap<Value, Array>| -> Result<f64> {
        Ok(reference::run(harness.graph(), given, &[loss])?[0].data[0])
    };
    let analytic = harness.reference()?.split_off(harness.outputs().len());
    for (Gradient { index, input, .. }, gradient) in harness.gradients().iter().zip(analytic) {
        // One difference costs two whole forward passes.
        let stride = (gradient.data.len() / 12).max(1);
        let scale = gradient.data.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
        for (at, exact) in gradient.data.iter().enumerate().step_by(stride) {
            let mut given = harness.given().clone();
            let x = given[input].data[at];
            let h = 1e-5 * x.abs().max(1.0);
            let mut shifted = |x: f64| {
                given.entry(*input).and_modify(|array| array.data[at] = x);
                loss_of(&given)
            };
            let numeric = (shifted(x + h)? - shifted(x - h)?) / (2.0 * h);
            if (numeric - exact).abs() > 1e-6 * scale {
                failures.push(
                    case,
                    "",
                    format_args!("the gradient of input {index} at [{at}] is {exact:e}, by central differences of the reference {numeric:e}"),
                );
            }
        }
    }
    Ok(())
}
