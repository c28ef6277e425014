//! The op table as a Markdown page.

use std::fmt::Write;

use super::cases::Row;
use super::map::{self, Entry, FUNCTIONS};

/// The op table as Markdown: the contents of `docs/ops.md`.
///
/// Call it to document a table of your own ops in the same way.
pub fn markdown(table: &[Row]) -> String {
    let mut page = String::from(
        "# Ops\n\nGenerated from the op table by `cargo run --example op_table > docs/ops.md`; a test checks that it is \
         up to date.\n\nEvery op is tested on all its cases: against an f64 reference, forward and backward, for \
         stray writes, and for the same bits on two runs. *NMSE* is the largest error that its tests allow, \
         `sum((got - want)^2) / sum(want^2)`.\n\n| op | what it computes | kernels | cases | NMSE |\n|---|---|---|---|---|\n",
    );
    for row in table {
        let cases = (row.cases)();
        let worst = cases.iter().map(|c| c.nmse).fold(0.0, f64::max);
        let mut kernels: Vec<&str> = vec![];
        for name in row.sources.iter().flat_map(|text| entry_points(text)) {
            // Several texts may lead up to the same kernels.
            if !kernels.contains(&name) {
                kernels.push(name);
            }
        }
        let kernels = kernels.join(", ");
        // A write to a String cannot fail.
        let _ = writeln!(page, "| {} | {} | {kernels} | {} | {worst:.0e} |", row.name, row.summary, cases.len());
    }
    if table.iter().any(|row| row.name == map::ROW.name) {
        write_functions(&mut page);
    }
    page
}

/// The functions of `map`, which the table of ops has in one row.
fn write_functions(page: &mut String) {
    page.push_str(
        "\n## Functions of map\n\nExpressions are WGSL, and may call the functions in `shaders/map/helpers.wgsl`. Those \
         of gradients may also mention the output `y` and its cotangent `dy`; no gradient flows to an operand that has \
         none here.\n\n| function | y | gradients |\n|---|---|---|\n",
    );
    for Entry { name, operands, constants, wgsl, gradients, .. } in FUNCTIONS {
        let code = |wgsl: &str| format!("`{}`", wgsl.replace('|', "\\|"));
        let constants = if constants.is_empty() { String::new() } else { format!("; {}", constants.join(", ")) };
        let gradients: Vec<String> = gradients.iter().map(|(of, wgsl, _)| format!("{of}: {}", code(wgsl))).collect();
        let operands = operands.join(", ");
        let _ = writeln!(page, "| {name}({operands}{constants}) | {} | {} |", code(wgsl), gradients.join(", "));
    }
}

/// Names of the entry points: the functions marked `@compute`.
fn entry_points(wgsl: &str) -> Vec<&str> {
    let name = |part: &'_ str| -> Option<usize> { part.find("fn ").map(|at| at + 3) };
    wgsl.split("@compute")
        .skip(1)
        .filter_map(|part| {
            let rest = &part[name(part)?..];
            Some(&rest[..rest.find('(')?])
        })
        .collect()
}
