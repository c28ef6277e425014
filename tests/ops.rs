//! Tests every case of every row of the op table, with both classes of kernels. There is one test per row and check,
//! named `<row>::<check>`.

mod common;
#[path = "common/registers.rs"]
mod registers;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::process::Command;

use common::{gpu, webgpu};
use libtest_mimic::{Arguments, Failed, Trial};
use registers::varying_indices;
use throughline::check::{self, Harness};
use throughline::kernel::Kernel;
use throughline::ops::{Case, Row, TABLE};
use throughline::{AdapterClass, Cooperative, Profile};

fn main() {
    type Check = fn(&Row) -> Result<(), Failed>;
    let checks: [(&str, Check); 5] = [
        ("gpu_matches_reference", |row| Ok(check::kernels(gpu(), &with_halved((row.cases)()))?)),
        ("reference_gradients_match_central_differences", |row| Ok(check::gradients(&(row.cases)())?)),
        ("keeps_to_webgpu", keeps_to_webgpu),
        ("shaders_are_valid", shaders_are_valid),
        ("registers_have_constant_indices", registers_have_constant_indices),
    ];
    // What takes longest first, so that no thread is left with it alone: kernels, of the rows with most cases.
    let mut rows: Vec<&Row> = TABLE.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.cases)().len()));
    let trials = checks.iter().flat_map(|&(name, check)| {
        rows.iter().map(move |&row| Trial::test(format!("{}::{name}", row.name), move || check(row)))
    });
    let trials = trials.chain([
        Trial::test("varying_indices_are_found", varying_indices_are_found),
        Trial::test("matrices_of_the_adapter_are_used", matrices_of_the_adapter_are_used),
        Trial::test("cases_have_every_kernel_on_matrices", cases_have_every_kernel_on_matrices),
    ]);
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

/// The cases, and the same with tensors in f16.
fn with_halved(cases: Vec<Case>) -> Vec<Case> {
    let halved: Vec<Case> = cases.iter().map(Case::halved).collect();
    [cases, halved].concat()
}

/// As `gpu_matches_reference`, within what the WebGPU standard promises everywhere. That depends on kernels more than on
/// shapes, so a sixth of the cases will do.
fn keeps_to_webgpu(row: &Row) -> Result<(), Failed> {
    let cases: Vec<Case> = (row.cases)().into_iter().step_by(6).collect();
    Ok(check::kernels(webgpu(), &with_halved(cases))?)
}

/// Every kernel that any case of the row launches is valid WGSL, in naga and, where it is installed, in tint (Chrome's
/// compiler); so are the texts as written, where every storage binding says its shape. Plans know how much workgroup
/// memory each kernel takes.
fn shaders_are_valid(row: &Row) -> Result<(), Failed> {
    let as_written = |(i, text): (usize, &&str)| (format!("{} as written, {i}", row.name), text.to_string());
    let mut texts: BTreeMap<String, String> = row.sources.iter().enumerate().map(as_written).collect();
    let mut failures: Vec<String> =
        texts.iter().filter_map(|(name, text)| Some(format!("{name}: {}", check::wgsl(text).err()?))).collect();
    let shapeless = row.sources.iter().flat_map(|text| without_shape(text));
    failures.extend(shapeless.map(|line| format!("no shape: {line}")));
    for (name, kernel) in check::texts(gpu(), &with_halved((row.cases)()))? {
        failures.extend(check::kernel(&kernel).err().map(|e| format!("{name}: {e}")));
        if kernel.workgroup_bytes().is_none() {
            failures.push(format!("{name}: plans do not know its workgroup memory"));
        }
        texts.insert(name, kernel.wgsl()?);
    }
    failures.extend(texts.iter().filter_map(|(name, wgsl)| Some(format!("tint: {name}: {}", tint_error(wgsl)?))));
    if failures.is_empty() { Ok(()) } else { Err(Failed::from(failures.join("\n"))) }
}

/// In the HLSL and MSL of every kernel for GPUs, all indices into variables of functions are literals: see
/// `varying_indices`. A loop that fails needs the comment `// unroll`.
fn registers_have_constant_indices(row: &Row) -> Result<(), Failed> {
    let cooperative = [Cooperative::F32, Cooperative::F16].map(|kind| Profile {
        subgroups: Some([32, 32]),
        cooperative: Some(kind),
        ..Profile::portable(AdapterClass::Gpu)
    });
    let (mut seen, mut failures) = (HashSet::new(), BTreeSet::new());
    for case in with_halved((row.cases)()) {
        let harness = Harness::new(&case, 1)?;
        let targets = harness.targets(gpu())?.into_iter().map(|target| target.profile);
        for profile in targets.chain(cooperative.clone()).filter(|p| p.class == AdapterClass::Gpu) {
            for dispatch in harness.plan(&profile)?.steps().iter().flat_map(|step| step.dispatches()) {
                let kernel = dispatch.kernel();
                if seen.insert(kernel.clone()) {
                    let found = varying_indices(kernel).into_iter();
                    failures.extend(found.map(|index| format!("{}.{}: {index}", kernel.label, kernel.entry)));
                }
            }
        }
    }
    match failures.is_empty() {
        true => Ok(()),
        false => Err(Failed::from(failures.into_iter().collect::<Vec<_>>().join("\n"))),
    }
}

/// `registers_have_constant_indices` can fail.
fn varying_indices_are_found() -> Result<(), Failed> {
    const WGSL: &str = "
        @group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [4] of vec4
        var<workgroup> shared_: array<vec4<f32>, 4>;
        fn put(to: ptr<function, array<f32, 3>>, at: u32) { (*to)[at] = 1.0; }
        @compute @workgroup_size(4) fn main(@builtin(local_invocation_index) lid: u32) {
            var quad = vec4<f32>();
            var rows: mat4x4<f32>;
            var sums: array<f32, 3>;
            quad[lid] = 1.0;
            rows[lid] = quad;
            put(&sums, lid);
            for (var i = 0u; i < 3u; i++) { quad.x += sums[i] * quad[i]; }
            shared_[lid][lid] = sums[2] + rows[1][lid];
            y[lid] = shared_[lid ^ 1u] + quad;
        }";
    let found = varying_indices(&Kernel::new("t", WGSL, "main"));
    let found: Vec<&str> = found.iter().map(|index| index.split("` in").next().unwrap()).collect();
    let of = |language: &str| found.iter().filter(|index| index.starts_with(language)).count();
    let stores =
        ["HLSL: `quad[lid] =", "HLSL: `rows[lid] =", "HLSL: `to[at] =", "MSL: `quad_[lid] =", "MSL: `rows[lid] ="];
    match stores.iter().all(|store| found.contains(store)) && [of("HLSL"), of("MSL")] == [5, 5] {
        true => Ok(()),
        false => Err(Failed::from(format!("{found:#?}"))),
    }
}

/// No kernel is left out because the device has failed its own test.
fn matrices_of_the_adapter_are_used() -> Result<(), Failed> {
    match gpu().tested().map_or(&[][..], |test| &test.dropped) {
        [] => Ok(()),
        dropped => Err(Failed::from(dropped.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))),
    }
}

/// On an adapter with matrices, `gpu_matches_reference` runs all kernels of products that multiply them.
fn cases_have_every_kernel_on_matrices() -> Result<(), Failed> {
    for kind in Cooperative::ALL {
        let profile = Profile {
            subgroups: Some([8, 8]),
            cooperative: Some(kind),
            max_workgroup_bytes: 32 << 10,
            ..Profile::portable(AdapterClass::Gpu)
        };
        let mut entries = BTreeSet::new();
        for row in TABLE.iter().filter(|row| ["matmul", "packed"].contains(&row.name)) {
            for case in (row.cases)() {
                let plan = Harness::new(&case, 1)?.plan(&profile)?;
                let kernels = plan.steps().iter().flat_map(|step| step.dispatches()).map(|d| d.kernel());
                entries.extend(kernels.map(|kernel| (kernel.label, kernel.entry)));
            }
        }
        for entry in [
            ("matmul", "forward_cooperative"),
            ("matmul", "forward_cooperative_quads"),
            ("matmul", "forward_cooperative_sums"),
            ("matmul", "forward_cooperative_sums_quads"),
            ("packed", "forward_cooperative"),
            ("packed", "backward_cooperative"),
        ] {
            if !entries.contains(&entry) {
                return Err(Failed::from(format!("no case runs {entry:?} with {kind:?}")));
            }
        }
    }
    Ok(())
}

/// Storage bindings whose line does not end with a shape, such as `// [rows, cols]`.
fn without_shape(wgsl: &str) -> impl Iterator<Item = &str> {
    wgsl.lines().filter(|line| line.contains("var<storage") && !line.contains("; // ["))
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
    let out = Command::new("tint").args(["--format", "wgsl"]).arg(file.path()).output().ok()?;
    (!out.status.success()).then(|| String::from_utf8_lossy(&out.stderr).into_owned())
}
