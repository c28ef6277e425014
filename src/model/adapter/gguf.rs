//! The adapter files of llama.cpp.

use std::collections::BTreeMap;
use std::path::Path;

use super::Adapter;
use super::modules::{Modules, Pair};
use crate::error::{Error, Result, quoted};
use crate::format::{Stored, Weights};
use crate::model::loaded::Model;
use crate::model::names::{GGUF, GGUF_GPT2, Names};
use crate::model::to_hugging_face;
use crate::nn::TransformerConfig;

/// The architecture of a model's GGUF files, and the names in them.
fn architecture(config: &TransformerConfig) -> Result<(String, &'static Names)> {
    let (json, _) = to_hugging_face::write(config)?;
    let kind = json["model_type"].as_str().unwrap_or_default().to_string();
    let names = if kind == "gpt2" { &GGUF_GPT2 } else { &GGUF };
    Ok((kind, names))
}

/// Reads a file.
pub(super) fn read(path: &Path, model: &Model) -> Result<Adapter> {
    from_weights(&Weights::open(path)?, model)
}

fn from_weights(weights: &Weights, model: &Model) -> Result<Adapter> {
    let metadata = weights.metadata();
    let (kind, names) = architecture(model.config())?;
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", &kind)] {
        let got = metadata.str(key)?;
        if got != expected {
            let message = format!("`{key}`: expected {}, got {}", quoted(expected), quoted(got));
            return Err(Error::format(weights.path(), message));
        }
    }
    let alpha = metadata.f32("adapter.lora.alpha")?;
    // Files of the architecture `llama` rotate neighbours.
    let modules = Modules::of(model.config(), names, kind == "llama")?;
    let mut adapter = Adapter::empty(weights.path(), model.config(), modules.stack_qkv());
    let mut pairs: BTreeMap<&str, Pair<'_>> = BTreeMap::new();
    for tensor in weights.iter() {
        let tensor = tensor.stored_as(&[Stored::F32, Stored::F16, Stored::BF16])?;
        let parts = tensor.name().rsplit_once(".weight.lora_");
        let Some((module, i)) = parts.and_then(|(m, which)| Some((m, ["a", "b"].iter().position(|w| *w == which)?)))
        else {
            let expected = "expected `....weight.lora_a` or `....weight.lora_b`";
            return Err(adapter.bad(format!("tensor {}: {expected}", quoted(tensor.name()))));
        };
        pairs.entry(module).or_default()[i] = Some(tensor);
    }
    for (module, pair) in &pairs {
        let Some(linear) = modules.linears.iter().find(|linear| linear.theirs == *module) else {
            return Err(adapter.bad(format!("tensors of {}: the model has no such linear layer", quoted(module))));
        };
        // An alpha of 0 means none.
        linear.read(&mut adapter, &modules, pair, |rank| Ok(if alpha == 0.0 { 1.0 } else { alpha / rank as f32 }))?;
    }
    Ok(adapter)
}
