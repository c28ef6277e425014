//! `cargo xtask test`: all tests on this machine's adapter, and those of kernels once more on the newest Mesa.

use std::path::Path;

use serde_json::Value;
use xtask::mesa::Mesa;
use xtask::{Outcome, cargo, run, shown};

use crate::{adapter, fetch};

/// Tests of kernels. The newest Mesa runs on the CPU what drivers that systems install seldom have there: cooperative
/// matrices, and 16-bit floats beside them.
const ON_NEWEST_MESA: [&str; 1] = ["ops"];

/// Which of them run, unless the user says what to run: those that use matrices, and products with packed weights, all of
/// them. That Mesa takes seconds for each kernel, and more than half an hour for all rows: `-- gpu_matches_reference`.
const DRIVEN: [&str; 2] = ["matrices", "packed::gpu_matches_reference"];

/// `[--mesa DIR] [-- FLAGS]`.
pub fn test(args: &[String]) -> Outcome {
    let (folder, flags) = match args {
        [flag, folder, rest @ ..] if flag == "--mesa" => (Some(Path::new(folder)), rest),
        [flag] if flag == "--mesa" => return Err("test: --mesa needs a folder".into()),
        rest => (None, rest),
    };
    let flags = flags.strip_prefix(&["--".to_string()]).unwrap_or(flags);
    // What tests/smollm2.rs, tests/sentences.rs and tests/tokenizing.rs run, and Mesa, fetched while everything compiles.
    let fetch = || {
        fetch::fetch("smollm2").and_then(|()| fetch::fetch("minilm"))?;
        if Mesa::runs_here() { Mesa::get(folder).map(Some) } else { Ok(None) }
    };
    let of_cargo = flags.iter().take_while(|a| *a != "--");
    let compile = || run(cargo(&["test", "--workspace", "--no-run"]).args(of_cargo));
    let mesa = std::thread::scope(|scope| {
        let fetched = scope.spawn(fetch);
        compile()?;
        fetched.join().map_err(|_| "fetching models or Mesa panicked".to_string())?
    })?;
    adapter::ensure(&[])?;
    run(cargo(&["test", "--workspace"]).args(flags))?;
    match mesa {
        Some(mesa) => on_newest_mesa(&mesa, flags),
        None => {
            println!("The newest Mesa, on which kernels are tested too, is for Linux on x86_64 only.");
            Ok(())
        }
    }
}

/// Without an adapter that has all it is for, this fails.
fn on_newest_mesa(mesa: &Mesa, flags: &[String]) -> Outcome {
    let mut adapters = mesa.cargo(&["run", "--quiet", "--example", "adapters", "--", "--json"])?;
    let output = adapters.output().map_err(|e| format!("{}: {e}", shown(&adapters)))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "the newest Mesa has no adapter: `{}` failed ({})\n{errors}",
            shown(&adapters),
            output.status
        ));
    }
    let what = has_all(&said)?;
    println!("On the newest Mesa: {what}");
    let each: Vec<Vec<String>> = match flags {
        [] => DRIVEN.iter().map(|name| vec![name.to_string()]).collect(),
        flags => vec![flags.to_vec()],
    };
    for flags in each {
        let mut tests = mesa.cargo(&["test", "--workspace"])?;
        tests.args(ON_NEWEST_MESA.iter().flat_map(|name| ["--test", name])).args(&flags);
        println!("+ {}", shown(&tests));
        run(&mut tests)?;
    }
    Ok(())
}

/// The adapter in words, of what the example `adapters` prints.
fn has_all(adapter: &str) -> Result<String, String> {
    let facts: Value =
        serde_json::from_str(adapter).map_err(|e| format!("the newest Mesa's adapter: {e}: {adapter}"))?;
    let matrices: Vec<&str> =
        facts["cooperative_matrices"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let lacks = match (facts["shader_f16"].as_bool(), &matrices[..]) {
        (Some(true), [_, ..]) => {
            let text = |key: &str| facts[key].as_str().unwrap_or_default().to_string();
            return Ok(format!(
                "{}, {}, with 16-bit floats and cooperative matrices of {}",
                text("name"),
                text("driver_info"),
                matrices.join(" and ")
            ));
        }
        (Some(true), []) => "cooperative matrices",
        _ => "16-bit floats in shaders",
    };
    Err(format!("the newest Mesa's adapter lacks {lacks}, which kernels are to be tested with: {adapter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_without_matrices_or_f16_is_a_failure() {
        let adapter = |f16: &str, matrices: &str| {
            format!(
                r#"{{"name": "llvmpipe", "driver_info": "Mesa 26", "shader_f16": {f16}, "cooperative_matrices": {matrices}}}"#
            )
        };
        let all = has_all(&adapter("true", r#"["F16"]"#)).unwrap();
        assert_eq!(all, "llvmpipe, Mesa 26, with 16-bit floats and cooperative matrices of F16");
        assert!(has_all(&adapter("true", "[]")).unwrap_err().contains("lacks cooperative matrices"));
        assert!(has_all(&adapter("false", r#"["F16"]"#)).unwrap_err().contains("lacks 16-bit floats"));
        assert!(has_all("").is_err());
    }

    #[test]
    fn mesa_needs_a_folder() {
        assert!(test(&["--mesa".to_string()]).unwrap_err().contains("a folder"));
    }
}
