//! What `--model` names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Whether this is a pretrained model, not a checkpoint of the `train` example: a GGUF file, whatever its name, or a
/// folder with config.json.
pub fn is_pretrained(path: &Path) -> Result<bool> {
    if path.is_dir() {
        let [model, checkpoint] = ["config.json", "checkpoint.safetensors"].map(|name| path.join(name).exists());
        ensure!(model || checkpoint, "{} has neither config.json nor checkpoint.safetensors", path.display());
        return Ok(model);
    }
    let mut magic = vec![];
    let read = File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic));
    read.with_context(|| format!("opening the model {}", path.display()))?;
    Ok(magic == b"GGUF")
}
