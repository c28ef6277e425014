//! What `--model` names.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use throughline::format::is_gguf;

/// Whether this is a pretrained model, not a checkpoint of the `train` example: a GGUF file, whatever its name, or a
/// folder with config.json.
pub fn is_pretrained(path: &Path) -> Result<bool> {
    if !path.is_dir() {
        return is_gguf(path).context("opening the model");
    }
    let [model, checkpoint] = ["config.json", "checkpoint.safetensors"].map(|name| path.join(name).exists());
    ensure!(model || checkpoint, "{} has neither config.json nor checkpoint.safetensors", path.display());
    Ok(model)
}
