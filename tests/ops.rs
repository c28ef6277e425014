//! Every row of the op table, every case of it, both classes of kernels: one test per row and
//! check, named `<row>::<check>`.

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use common::gpu;
use libtest_mimic::{Arguments, Failed, Trial};
use throughline::check;
use throughline::ops::{Row, TABLE};

fn main() {
    type Check = fn(&Row) -> Result<(), Failed>;
    let checks: [(&str, Check); 4] = [
        ("gpu_matches_reference", |row| Ok(check::kernels(gpu(), &(row.cases)())?)),
        ("reference_gradients_match_central_differences", |row| Ok(check::gradients(&(row.cases)())?)),
        ("shaders_are_valid", |row| Ok(check::shaders(gpu(), &(row.cases)())?)),
        ("shaders_are_valid_elsewhere", shaders_are_valid_elsewhere),
    ];
    let trials = TABLE
        .iter()
        .flat_map(|row| checks.map(|(name, check)| Trial::test(format!("{}::{name}", row.name), move || check(row))));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

/// The file as written is valid, plans know how much workgroup memory its kernels take, and tint (Chrome's compiler)
/// accepts all of them, where it is installed.
fn shaders_are_valid_elsewhere(row: &Row) -> Result<(), Failed> {
    let kernels = check::texts(gpu(), &(row.cases)())?;
    let mut texts = BTreeMap::from([(format!("{} as written", row.name), row.source.to_string())]);
    let mut failures = vec![];
    for (name, kernel) in kernels {
        if kernel.workgroup_bytes().is_none() {
            failures.push(format!("{name}: plans do not know its workgroup memory"));
        }
        texts.insert(name, kernel.wgsl()?);
    }
    failures.extend(check::wgsl(row.source).err().map(|e| format!("{} as written: {e}", row.name)));
    failures.extend(texts.iter().filter_map(|(name, wgsl)| Some(format!("tint: {name}: {}", tint_error(wgsl)?))));
    if failures.is_empty() { Ok(()) } else { Err(Failed::from(failures.join("\n"))) }
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
