//! The adapter files of llama.cpp.

use std::collections::BTreeMap;
use std::path::Path;

use super::Adapter;
use super::modules::{Modules, Pair, Written};
use crate::error::{Error, Result, quoted};
use crate::format::{GgufTensor, GgufWriter, Metadata, Stored, Weights};
use crate::model::loaded::Model;
use crate::model::to_gguf;
use crate::nn::TransformerConfig;

/// The architecture of a model's GGUF files, and its linear layers in them.
fn described(config: &TransformerConfig) -> Result<(String, Modules)> {
    let described = to_gguf::write(config)?;
    let architecture = described.metadata.str("general.architecture")?.to_string();
    // Files of the architecture `llama` rotate neighbours.
    let modules = Modules::of(config, described.names, architecture == "llama")?;
    Ok((architecture, modules))
}

/// Reads a file.
pub(super) fn read(path: &Path, model: &Model) -> Result<Adapter> {
    from_weights(&Weights::open(path)?, model)
}

fn from_weights(weights: &Weights, model: &Model) -> Result<Adapter> {
    let metadata = weights.metadata();
    let (kind, modules) = described(model.config())?;
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", &kind)] {
        let got = metadata.str(key)?;
        if got != expected {
            let message = format!("`{key}`: expected {}, got {}", quoted(expected), quoted(got));
            return Err(Error::format(weights.path(), message));
        }
    }
    let alpha = metadata.f32("adapter.lora.alpha")?;
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

impl Adapter {
    /// Writes a GGUF file that llama.cpp loads beside the model (`--lora`), and [`open`](Self::open) too. Tensors are
    /// f32. The file is put in place atomically.
    ///
    /// # Errors
    ///
    /// If no architecture of GGUF files has the parts of the model; if modules were trained whole, for which such files
    /// have no place (save the merged model instead); or if the file cannot be written.
    pub fn save_gguf(&self, path: &Path) -> Result<()> {
        if let Some(name) = self.whole.keys().next() {
            let message = "was trained whole, and GGUF adapters have only low-rank matrices: save the merged model";
            return Err(self.bad(format!("{} {message}", quoted(name))));
        }
        let (architecture, modules) = described(&self.config)?;
        let (mut tensors, mut values, mut alpha) = (vec![], vec![], None);
        for linear in &modules.linears {
            let Some(Written { rank, scale, a, mut b, d_out }) = linear.write(self, &modules)? else { continue };
            // All layers of a file share one alpha, so what differs goes into `b`.
            let own = scale * rank as f32;
            let factor = own / *alpha.get_or_insert(own);
            if factor != 1.0 {
                b.iter_mut().for_each(|b| *b *= factor);
            }
            for (matrix, shape, elements) in [("a", [rank, linear.d_in], a), ("b", [d_out, rank], b)] {
                let name = format!("{}.weight.lora_{matrix}", linear.theirs);
                tensors.push(GgufTensor { name, shape: shape.into(), stored: Stored::F32 });
                values.push(elements);
            }
        }
        let mut metadata = Metadata::default();
        for (key, value) in [("general.architecture", &architecture[..]), ("general.type", "adapter")] {
            metadata.set(key, value);
        }
        metadata.set("adapter.type", "lora");
        metadata.set("adapter.lora.alpha", alpha.unwrap_or(1.0));
        let mut file = GgufWriter::create(path, &metadata, tensors)?;
        values.iter().try_for_each(|values| file.write_values(values))?;
        file.finish()
    }
}
