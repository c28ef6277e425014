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
    let checks: [(&str, Check); 3] = [
        ("gpu_matches_reference", |row| Ok(check::kernels(gpu(), &(row.cases)())?)),
        ("reference_gradients_match_central_differences", |row| Ok(check::gradients(&(row.cases)())?)),
        ("shaders_are_valid", shaders_are_valid),
    ];
    // What takes longest first, so that no thread is left with it alone: kernels, of the rows with most cases.
    let mut rows: Vec<&Row> = TABLE.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.cases)().len()));
    let trials = checks.iter().flat_map(|&(name, check)| {
        rows.iter().map(move |&row| Trial::test(format!("{}::{name}", row.name), move || check(row)))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

/// Every kernel that any case of the row launches is valid WGSL, in naga and, where it is installed, in tint (Chrome's
/// compiler); so is the file as written. Plans know how much workgroup memory each takes.
fn shaders_are_valid(row: &Row) -> Result<(), Failed> {
    let mut texts = BTreeMap::from([(format!("{} as written", row.name), row.source.to_string())]);
    let mut failures: Vec<String> =
        check::wgsl(row.source).err().map(|e| format!("{} as written: {e}", row.name)).into_iter().collect();
    for (name, kernel) in check::texts(gpu(), &(row.cases)())? {
        failures.extend(check::kernel(&kernel).err().map(|e| format!("{name}: {e}")));
        if kernel.workgroup_bytes().is_none() {
            failures.push(format!("{name}: plans do not know its workgroup memory"));
        }
        texts.insert(name, kernel.wgsl()?);
    }
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
