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
//! The parts of [`op`] are functions too ([`kernels`], [`gradients`], [`shaders`]), as are the tools under them: a
//! [`Harness`] is a case as a graph with a loss, [`Guarded`] runs any plan with guards around its buffers.

mod failures;
mod guarded;
mod harness;
mod shaders;

use std::collections::{HashMap, HashSet};

use harness::Gradient;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::kernel::Bound;
use crate::plan::Plan;
use crate::profile::{AdapterClass, Profile};
use crate::reference::{self, Array, nmse};

pub use crate::ops::{Case, InputFill, InputSpec};
pub use failures::{Failure, Failures};
pub use guarded::Guarded;
pub use harness::{Harness, Target, profiles, read_blocking, with_loops, write};
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

/// Runs every case on `gpu`, forward and backward, and compares outputs and gradients with the reference, within the
/// case's tolerance. Each run is checked for writes past any tensor and for elements that are never written, and
/// repeated to see whether it gives the same bits.
///
/// Each case runs with each of [`profiles`], and if the op is [elementwise](crate::ops::Op::elementwise), once more in one
/// kernel with its neighbours. The first variant of an op runs on every case, the others on a quarter of
/// the cases each, at least on one. The first case of each kernel also runs as on a device that binds only four storage
/// buffers, and with its workgroups in several rows, as [`Profile::grid`] has them for large tensors.
pub fn kernels(gpu: &Gpu, cases: &[Case]) -> Result<(), Failures> {
    let mut failures = Failures::default();
    let mut seen = Seen::default();
    for (index, case) in cases.iter().enumerate() {
        if let Err(e) = run_case(gpu, case, index, &mut seen, &mut failures) {
            failures.push_error(case, e);
        }
    }
    failures.into_result()
}

type Subgroups = Option<[u32; 2]>;

/// What has run so far, to choose what else need not.
#[derive(Default)]
struct Seen {
    /// Kernels whose bindings were merged, with how.
    merged: HashSet<(AdapterClass, &'static str, Vec<Bound>)>,
    /// Kernels whose workgroups were spread over x and y.
    folded: HashSet<(AdapterClass, Subgroups, &'static str, &'static str)>,
    variants: HashSet<(AdapterClass, Subgroups, String)>,
}

impl Seen {
    /// Whether case `index` is one for this target to run: software adapters take seconds to compile some variants.
    fn wants(&mut self, index: usize, target: &Target) -> bool {
        let Profile { class, subgroups, .. } = target.profile;
        let new = |name: &String| !self.variants.contains(&(class, subgroups, name.clone()));
        let wants =
            target.variant == 0 || (index + target.variant).is_multiple_of(4) || target.variants().iter().any(new);
        if wants {
            self.variants.extend(target.variants().iter().map(|name| (class, subgroups, name.clone())));
        }
        wants
    }

    /// Whether a plan has a kernel whose bindings are merged in a way that has not run.
    fn merges_anew(&mut self, plan: &Plan, target: &Target) -> bool {
        let kernels = plan.steps.iter().flat_map(|s| &s.dispatches).map(|d| &d.kernel);
        let merged = kernels.filter(|k| !k.merged.is_empty());
        merged.filter(|k| self.merged.insert((target.profile.class, k.entry, k.merged.clone()))).count() > 0
    }

    /// Whether a plan has a kernel whose workgroups are in several rows for the first time.
    fn folds_anew(&mut self, plan: &Plan, target: &Target) -> bool {
        let Profile { class, subgroups, .. } = target.profile;
        let folded = plan.steps.iter().flat_map(|s| &s.dispatches).filter(|d| d.workgroups[1] > 1);
        folded.filter(|d| self.folded.insert((class, subgroups, d.kernel.label, d.kernel.entry))).count() > 0
    }
}

fn run_case(gpu: &Gpu, case: &Case, index: usize, seen: &mut Seen, failures: &mut Failures) -> Result<()> {
    let harness = Harness::new(case, 1)?;
    let want = harness.reference()?;
    let mut run = |target: &Target| {
        if let Err(e) = run_target(gpu, case, (&harness, &want), target, failures) {
            failures.push(case, target, e);
        }
    };
    for target in harness.targets(gpu)? {
        if !seen.wants(index, &target) {
            continue;
        }
        run(&target);
        if target.variant > 0 {
            continue;
        }
        if case.op.elementwise().is_some() {
            run(&Target { fused: true, ..target.clone() });
        }
        let few = target.downlevel();
        if seen.merges_anew(&harness.plan(&few.profile)?, &few) {
            run(&few);
        }
        if let Some(folded) = target.folded(&harness.plan(&target.profile)?) {
            match harness.plan(&folded.profile) {
                // An op need not use `Profile::grid`: what it can't launch on large tensors, it refuses.
                Err(Error::Limit { .. }) => {}
                plan => {
                    if seen.folds_anew(&plan?, &folded) {
                        run(&folded);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Runs a case twice with one target.
fn run_target(
    gpu: &Gpu,
    case: &Case,
    (harness, want): (&Harness, &[Array]),
    target: &Target,
    failures: &mut Failures,
) -> Result<()> {
    let guarded = harness.guarded_blocking(gpu, harness.plan_for(target)?)?;
    if let Err(e) = guarded.step_blocking() {
        failures.push(case, target, e);
    }
    let got = harness.read_blocking(guarded.executable())?;
    let allowed = match target.profile.cooperative {
        Some(kind) if kind.is_f16() => case.nmse.max(case.rounded),
        _ => case.nmse,
    };
    for ((value, got), want) in harness.wanted().into_iter().zip(&got).zip(want) {
        let error = nmse(got, &want.data);
        if !error.is_nan() && error <= allowed {
            continue;
        }
        let name = harness.name(value);
        match guarded.unwritten_blocking(value)? {
            Some(i) => failures.push(case, target, format_args!("{name}[{i}] is never written, of {}", got.len())),
            None => failures.push(case, target, difference(&name, got, &want.data, (error, allowed))),
        }
    }
    guarded.step_blocking()?;
    let again = harness.read_blocking(guarded.executable())?;
    let differs = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    for (value, runs) in harness.wanted().into_iter().zip(got.iter().zip(&again)) {
        if let Some(i) = differs(runs) {
            let (name, a, b) = (harness.name(value), runs.0[i], runs.1[i]);
            failures.push(case, target, format_args!("{name}[{i}] is {a:e} on one run and {b:e} on the next"));
        }
    }
    Ok(())
}

/// How a tensor differs from the reference, with the element that is furthest off.
fn difference(name: &str, got: &[f32], want: &[f64], (error, allowed): (f64, f64)) -> String {
    let distance = |i: usize| (f64::from(got[i]) - want[i]).abs();
    let furthest = (0..got.len().min(want.len())).max_by(|&a, &b| distance(a).total_cmp(&distance(b)));
    let element = furthest.map(|i| format!(": {name}[{i}] is {:e}, expected {:e}", got[i], want[i]));
    let element = element.unwrap_or_default();
    format!("{name} has an NMSE of {error:.1e} against the reference, more than {allowed:.0e}{element}")
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
