//! Tests every case of every row of the op table, with both classes of kernels. There is one test per row and check,
//! named `<row>::<check>`.

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
/// compiler); so are the texts as written, where every storage binding says its shape. Plans know how much workgroup
/// memory each kernel takes.
fn shaders_are_valid(row: &Row) -> Result<(), Failed> {
    let as_written = |(i, text): (usize, &&str)| (format!("{} as written, {i}", row.name), text.to_string());
    let mut texts: BTreeMap<String, String> = row.sources.iter().enumerate().map(as_written).collect();
    let mut failures: Vec<String> =
        texts.iter().filter_map(|(name, text)| Some(format!("{name}: {}", check::wgsl(text).err()?))).collect();
    let shapeless = row.sources.iter().flat_map(|text| without_shape(text));
    failures.extend(shapeless.map(|line| format!("no shape: {line}")));
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
