//! Cases run on a device, against the reference.

use std::collections::HashSet;

use super::failures::Failures;
use super::harness::{Harness, Target};
use crate::array::Array;
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernel::{Bound, Kernel};
use crate::ops::Case;
use crate::plan::Plan;
use crate::profile::{AdapterClass, Cooperative, Profile};
use crate::reference::nmse;

/// Runs every case on `gpu`, forward and backward, and compares outputs and gradients with the reference, within the
/// case's tolerance. Kernels on cooperative matrices of f16 get [rounded](Case::rounded) cases. Each run is checked for
/// writes past any tensor and for elements that are never written, and repeated to see whether it gives the same bits.
///
/// Each case runs with each of [`profiles`](super::profiles), and if the op is
/// [elementwise](crate::ops::Op::elementwise), once more in one kernel with its neighbours. The first variant of an op
/// runs on every case, the others on a quarter of the cases each, at least on one. The first case of each kernel also
/// runs as on a device that binds only four storage buffers, and with its workgroups in several rows, as
/// [`Profile::grid`] has them for large tensors.
///
/// A [halved](Case::halved) case runs where it has a kernel that has not yet run on tensors in f16, each kernel as a
/// device with 16-bit floats in shaders has those, if `gpu` is one, and as others have them, as pairs in words.
pub fn kernels(gpu: &Gpu, cases: &[Case]) -> Result<(), Failures> {
    let mut runs = Runs { gpu, seen: Seen::default(), failures: Failures::default() };
    for (index, case) in cases.iter().enumerate() {
        if let Err(e) = if case.is_halved { runs.halved(case) } else { runs.whole(case, index) } {
            runs.failures.push_error(case, e);
        }
    }
    runs.failures.into_result()
}

/// What a product of inputs that are rounded to f16 may be off, as cooperative matrices may have them: each rounding is
/// off by 2^-12 at most, and the mean square of two is a fifth of this.
const F16_NMSE: f64 = 2e-7;

/// What the results of a case may be off on such an adapter.
pub fn tolerance(case: &Case, profile: &Profile) -> f64 {
    match profile.cooperative {
        Some(kind) if kind.is_f16() && !case.is_rounded => case.nmse.max(F16_NMSE),
        _ => case.nmse,
    }
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
    /// Kernels that have run on tensors in f16, with the types among their knobs, and whether the shader had f16.
    halved: HashSet<(AdapterClass, bool, &'static str, &'static str, Vec<String>)>,
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
        let merged = kernels_of(plan).filter(|k| !k.merged.is_empty());
        merged.filter(|k| self.merged.insert((target.profile.class, k.entry, k.merged.clone()))).count() > 0
    }

    /// Whether a plan has a kernel that has not run on tensors in f16. How it loads and stores them depends on its types,
    /// and not on subgroups or other knobs.
    fn halves_anew(&mut self, plan: &Plan, target: &Target) -> bool {
        let Profile { class, shader_f16, .. } = target.profile;
        let types = |k: &Kernel| k.knobs.iter().map(|(_, value)| value).filter(|v| is_type(v)).cloned().collect();
        let halved = kernels_of(plan).filter(|k| k.has_halves());
        halved.filter(|k| self.halved.insert((class, shader_f16, k.label, k.entry, types(k)))).count() > 0
    }

    /// Whether a plan has a kernel whose workgroups are in several rows for the first time.
    fn folds_anew(&mut self, plan: &Plan, target: &Target) -> bool {
        let Profile { class, subgroups, .. } = target.profile;
        let folded = plan.steps.iter().flat_map(|s| &s.dispatches).filter(|d| d.workgroups[1] > 1);
        folded.filter(|d| self.folded.insert((class, subgroups, d.kernel.label, d.kernel.entry))).count() > 0
    }
}

fn kernels_of(plan: &Plan) -> impl Iterator<Item = &Kernel> {
    plan.steps.iter().flat_map(|s| &s.dispatches).map(|d| &d.kernel)
}

/// Whether a plan has kernels on cooperative matrices.
fn multiplies_matrices(plan: &Plan) -> bool {
    kernels_of(plan).any(|kernel| kernel.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX))
}

/// Whether the value of a knob is a type, such as `vec4<f32>`.
fn is_type(value: &str) -> bool {
    value.ends_with('>') || matches!(value, "f32" | "u32")
}

/// A case with what it should give.
struct Expected<'a> {
    case: &'a Case,
    harness: Harness,
    want: Vec<Array>,
}

/// Runs on a device, and what was wrong with them.
struct Runs<'a> {
    gpu: &'a Gpu,
    seen: Seen,
    failures: Failures,
}

impl Runs<'_> {
    /// Runs case `index` in all ways that are not known from other cases.
    fn whole(&mut self, case: &Case, index: usize) -> Result<()> {
        let harness = Harness::new(case, 1)?;
        let want = harness.reference()?;
        let expected = Expected { case, harness, want };
        let rounded_case = case.rounded();
        let mut rounded = None;
        for target in expected.harness.targets(self.gpu)? {
            if !self.seen.wants(index, &target) {
                continue;
            }
            let in_f16 = target.profile.cooperative.is_some_and(Cooperative::is_f16);
            let expected = match in_f16 && multiplies_matrices(&expected.harness.plan(&target.profile)?) {
                true => match &rounded {
                    Some(rounded) => rounded,
                    None => {
                        let harness = Harness::new(&rounded_case, 1)?;
                        let want = harness.reference()?;
                        &*rounded.insert(Expected { case: &rounded_case, harness, want })
                    }
                },
                false => &expected,
            };
            self.run(expected, &target);
            if target.variant == 0 {
                self.otherwise(expected, &target)?;
            }
        }
        Ok(())
    }

    /// Runs a case with its neighbours, with merged bindings, and with workgroups in several rows.
    fn otherwise(&mut self, expected: &Expected<'_>, target: &Target) -> Result<()> {
        if expected.case.op.elementwise().is_some() {
            self.run(expected, &Target { fused: true, ..target.clone() });
        }
        let harness = &expected.harness;
        let few = target.downlevel();
        if self.seen.merges_anew(&harness.plan(&few.profile)?, &few) {
            self.run(expected, &few);
        }
        if let Some(folded) = target.folded(&harness.plan(&target.profile)?) {
            match harness.plan(&folded.profile) {
                // An op need not use `Profile::grid`: what it can't launch on large tensors, it refuses.
                Err(Error::Limit { .. }) => {}
                plan => {
                    if self.seen.folds_anew(&plan?, &folded) {
                        self.run(expected, &folded);
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs a case with tensors in f16 where it has a kernel that has not run that way.
    fn halved(&mut self, case: &Case) -> Result<()> {
        let harness = Harness::new(case, 1)?;
        let targets = harness.targets(self.gpu)?;
        // Devices without subgroups are mostly those without f16. The other two pairs run for what those two leave out:
        // a kernel that only one of them has.
        let storage =
            |likely: bool| targets.iter().filter_map(move |t| t.halved(t.profile.subgroups.is_none() == likely));
        let mut anew = vec![];
        for target in storage(true).chain(storage(false)) {
            if self.seen.halves_anew(&harness.plan(&target.profile)?, &target) {
                anew.push(target);
            }
        }
        if !anew.is_empty() {
            let want = harness.reference()?;
            let expected = Expected { case, harness, want };
            anew.iter().for_each(|target| self.run(&expected, target));
        }
        Ok(())
    }

    /// Runs a case twice with one target.
    fn run(&mut self, expected: &Expected<'_>, target: &Target) {
        if let Err(e) = self.compare(expected, target) {
            self.failures.push(expected.case, target, e);
        }
    }

    fn compare(&mut self, Expected { case, harness, want }: &Expected<'_>, target: &Target) -> Result<()> {
        let guarded = harness.guarded_blocking(self.gpu, harness.plan_for(target)?)?;
        if let Err(e) = guarded.step_blocking() {
            self.failures.push(case, target, e);
        }
        let got = harness.read_blocking(guarded.executable())?;
        let allowed = tolerance(case, &target.profile);
        for ((value, got), want) in harness.wanted().into_iter().zip(&got).zip(want) {
            let error = nmse(got, &want.data);
            if !error.is_nan() && error <= allowed {
                continue;
            }
            let name = harness.name(value);
            let message = match guarded.unwritten_blocking(value)? {
                Some(i) => format!("{name}[{i}] is never written, of {}", got.len()),
                None => difference(&name, got, &want.data, (error, allowed)),
            };
            self.failures.push(case, target, message);
        }
        guarded.step_blocking()?;
        let again = harness.read_blocking(guarded.executable())?;
        let differs = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        for (value, runs) in harness.wanted().into_iter().zip(got.iter().zip(&again)) {
            if let Some(i) = differs(runs) {
                let (name, a, b) = (harness.name(value), runs.0[i], runs.1[i]);
                self.failures.push(case, target, format_args!("{name}[{i}] is {a:e} on one run and {b:e} on the next"));
            }
        }
        Ok(())
    }
}

/// How a tensor differs from the reference, with the element that is furthest off.
fn difference(name: &str, got: &[f32], want: &[f64], (error, allowed): (f64, f64)) -> String {
    let distance = |i: usize| (f64::from(got[i]) - want[i]).abs();
    let furthest = (0..got.len().min(want.len())).max_by(|&a, &b| distance(a).total_cmp(&distance(b)));
    let element = furthest.map(|i| format!(": {name}[{i}] is {:e}, expected {:e}", got[i], want[i]));
    let element = element.unwrap_or_default();
    format!("{name} has an NMSE of {error:.1e} against the reference, more than {allowed:.0e}{element}")
}
