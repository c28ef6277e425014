//! Every row of the op table, every case of it, both classes of kernels: one test per row and
//! check, named `<row>::<check>`.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;

use common::Harness;
use libtest_mimic::{Arguments, Failed, Trial};
use throughline::kernel::Kernel;
use throughline::ops::{Row, TABLE};
use throughline::reference::{self, nmse};
use throughline::{AdapterClass, Cooperative, Plan, Profile, Requirements};

fn main() {
    type Check = fn(&Row) -> Vec<String>;
    let checks: [(&str, Check); 3] = [
        ("gpu_matches_reference", gpu_matches_reference),
        ("reference_gradients_match_central_differences", reference_gradients_match_central_differences),
        ("shaders_are_valid", shaders_are_valid),
    ];
    let trials = TABLE.iter().flat_map(|row| {
        checks.map(|(name, check)| {
            Trial::test(format!("{}::{name}", row.name), move || match check(row) {
                failures if failures.is_empty() => Ok(()),
                failures => Err(Failed::from(failures.join("\n"))),
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

/// GPU outputs and GPU gradients against the f64 reference, with nothing written past any output,
/// every element of every output written, and the same bits on a second run.
fn gpu_matches_reference(row: &Row) -> Vec<String> {
    let mut failures = vec![];
    let mut merged = HashSet::new();
    for (index, case) in (row.cases)().into_iter().enumerate() {
        let harness = Harness::new(&case, 1);
        let want = harness.reference();
        // On a device that binds few buffers, the first case of each kernel whose bindings are then merged, and of each
        // way in which they are.
        let mut differs = |profile: &Profile| {
            let plan = Plan::new(&harness.graph, &harness.wanted(), profile).unwrap();
            let kernels = plan.steps().iter().flat_map(|s| s.dispatches()).map(|d| d.kernel().clone());
            let new = kernels.filter(|k| !k.merged.is_empty()).map(|k| (profile.class, k.entry, k.merged));
            new.filter(|key| merged.insert(key.clone())).count() > 0
        };
        // What is taken unmeasured runs on every case, every other variant on a quarter of them: software
        // adapters take seconds to compile some.
        let runs = |(nth, _): &(usize, _)| *nth == 0 || (index + nth) % 4 == 0;
        let profiles = harness.profiles().into_iter().filter(runs);
        let mut few = |(nth, p): &(usize, Profile)| (*nth == 0).then(|| downlevel(p)).filter(|p| differs(p));
        for profile in profiles.flat_map(|p| few(&p).into_iter().chain([p.1])) {
            let mut fail = |what: &dyn Display| failures.push(format!("{} ({profile:?}): {what}", case.name));
            let exec = harness.executable(&profile, 256);
            exec.poison();
            exec.submit().unwrap();
            if let Err(e) = exec.check_guards() {
                fail(&e);
            }
            let got = harness.read(&exec);
            for ((value, got), want) in harness.wanted().into_iter().zip(&got).zip(&want) {
                let error = nmse(got, &want.data);
                if error.is_nan() || error > case.nmse {
                    fail(&format!("{} {value:?}: NMSE {error:.1e}", harness.graph.name(value)));
                }
            }
            exec.poison();
            exec.submit().unwrap();
            let bits = |run: &[Vec<f32>]| -> Vec<u32> { run.iter().flatten().map(|x| x.to_bits()).collect() };
            if bits(&harness.read(&exec)) != bits(&got) {
                fail(&"two runs differ");
            }
        }
    }
    failures
}

/// The reference's own gradients against central differences of its forward pass, in f64.
fn reference_gradients_match_central_differences(row: &Row) -> Vec<String> {
    let mut failures = vec![];
    for case in (row.cases)() {
        let harness = Harness::new(&case, 2);
        let Some(loss) = harness.loss else { continue };
        let loss_of = |given: &_| reference::run(&harness.graph, given, &[loss]).unwrap()[0].data[0];
        let analytic = harness.reference().split_off(harness.outputs.len());
        for ((i, input, _), gradient) in harness.grads.iter().zip(analytic) {
            // Large inputs are sampled: one difference costs two whole forward passes.
            let stride = (gradient.data.len() / 12).max(1);
            let scale = gradient.data.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
            for (at, exact) in gradient.data.iter().enumerate().step_by(stride) {
                let mut given = harness.given.clone();
                let x = given[input].data[at];
                let h = 1e-5 * x.abs().max(1.0);
                let mut shifted = |x: f64| {
                    given.get_mut(input).unwrap().data[at] = x;
                    loss_of(&given)
                };
                let numeric = (shifted(x + h) - shifted(x - h)) / (2.0 * h);
                if (numeric - exact).abs() > 1e-6 * scale {
                    failures.push(format!("{}: input {i}[{at}]: {exact} but differences give {numeric}", case.name));
                }
            }
        }
    }
    failures
}

/// The same with no more than `wgpu::Limits::downlevel_defaults` offers.
fn downlevel(profile: &Profile) -> Profile {
    Profile { max_storage_buffers: 4, max_workgroup_bytes: 16_352, ..profile.clone() }
}

/// Every kernel that any case of the row launches is valid WGSL, in naga and, where it is
/// installed, in tint (Chrome's compiler); so is the file as written.
fn shaders_are_valid(row: &Row) -> Vec<String> {
    let mut failures = vec![];
    let mut variants = BTreeMap::from([(format!("{} as written", row.name), (row.source.to_string(), None))]);
    for case in (row.cases)() {
        let harness = Harness::new(&case, 3);
        // No adapter is needed to check text: nor, then, one with cooperative matrices.
        let cooperative = [Cooperative::F32, Cooperative::F16].map(|kind| Profile {
            subgroups: Some([32, 32]),
            cooperative: Some(kind),
            ..Profile::portable(AdapterClass::Gpu)
        });
        for (nth, profile) in harness.profiles().into_iter().chain(cooperative.map(|p| (1, p))) {
            for few in [true, false] {
                let profile = if few { downlevel(&profile) } else { profile.clone() };
                let plan = Plan::new(&harness.graph, &harness.wanted(), &profile).unwrap();
                let missing = few.then(|| Requirements::of(&plan).check(&wgpu::Limits::downlevel_defaults()));
                if let Some(Err(e)) = missing {
                    failures.push(format!("{}: {e}", case.name));
                }
                // The text of other variants merges alike.
                for d in plan.steps().iter().filter(|_| nth == 0 || !few).flat_map(|s| s.dispatches()) {
                    let text = || (d.kernel().wgsl().unwrap(), Some(d.kernel().clone()));
                    variants.entry(d.kernel().describe()).or_insert_with(text);
                }
            }
        }
    }
    let error = |name: &str, (wgsl, kernel): &(String, Option<Kernel>)| {
        Some(format!("naga: {name}: {}", naga_error(wgsl, kernel.as_ref())?))
    };
    failures.extend(variants.iter().filter_map(|(name, variant)| error(name, variant)));
    let error = |(name, (wgsl, _)): (&String, &(String, _))| Some(format!("tint: {name}: {}", tint_error(wgsl)?));
    failures.extend(variants.iter().filter_map(error));
    failures
}

/// Also if this crate says that a kernel uses other than the workgroup memory that naga says.
fn naga_error(wgsl: &str, kernel: Option<&Kernel>) -> Option<String> {
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    let module = match naga::front::wgsl::parse_str(wgsl) {
        Err(e) => return Some(e.emit_to_string(wgsl)),
        Ok(module) => module,
    };
    let capabilities = Capabilities::SUBGROUP
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let info = match Validator::new(ValidationFlags::all(), capabilities).validate(&module) {
        Err(e) => return Some(e.emit_to_string(wgsl)),
        Ok(info) => info,
    };
    let kernel = kernel?;
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let entry = info.get_entry_point(module.entry_points.iter().position(|e| e.name == kernel.entry)?);
    let used = module
        .global_variables
        .iter()
        .filter(|(handle, g)| g.space == naga::AddressSpace::WorkGroup && !entry[*handle].is_empty());
    let bytes: u32 = used.map(|(_, g)| layouter[g.ty].size.next_multiple_of(16)).sum();
    let ours = kernel.workgroup_bytes();
    (ours != Some(bytes)).then(|| format!("{bytes} bytes of workgroup memory, not {ours:?}"))
}

fn tint_error(wgsl: &str) -> Option<String> {
    if wgsl.starts_with("enable wgpu_") {
        return None; // extensions that only naga knows
    }
    let file = tempfile::Builder::new().suffix(".wgsl").tempfile().unwrap();
    // Where naga wants no such line, the standard does.
    let enable =
        if wgsl.contains("= subgroup") || wgsl.contains("return subgroup") { "enable subgroups;\n" } else { "" };
    std::fs::write(file.path(), format!("{enable}{wgsl}")).unwrap();
    let out = std::process::Command::new("tint").args(["--format", "wgsl"]).arg(file.path()).output().ok()?;
    (!out.status.success()).then(|| String::from_utf8_lossy(&out.stderr).into_owned())
}
