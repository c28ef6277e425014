//! Low-rank adapters of a model: from files, for files, and merged into the weights.

mod gguf;
mod modules;
mod peft;

use std::collections::BTreeMap;
use std::path::Path;

use super::layout::{check_values, is_linear};
use super::loaded::Model;
use crate::error::{Error, Result, quoted};
use crate::format::is_gguf;
use crate::nn::{LORA_A, LORA_B, Lora, QKV, TransformerConfig, table_of_part};
use crate::tensor::Shape;

/// A low-rank adapter (LoRA) for a model: what fine-tuning with [`TrainConfig::lora`](crate::train::TrainConfig::lora)
/// makes, and what files of adapters hold.
///
/// [`open`](Self::open) reads the two usual kinds of files, and [`save_peft`](Self::save_peft) writes one:
///
/// - a folder of Hugging Face's `peft` with `adapter_config.json` and `adapter_model.safetensors`;
/// - a GGUF file of llama.cpp's.
///
/// Names and layouts are those of [`nn`](crate::nn), whatever the file has. The adapter of one model fits another of the
/// same shape, such as the same model in fewer bits.
///
/// [`Trainer::adapter`](crate::train::Trainer::adapter) gives that of a run, and
/// [`Trainer::load_adapter`](crate::train::Trainer::load_adapter) goes on with one. [`merged`](Self::merged) adds it to
/// the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The file, or where else it is from, for messages.
    path: String,
    config: TransformerConfig,
    layers: BTreeMap<String, AdapterLayer>,
    whole: BTreeMap<String, Vec<f32>>,
    shared_qkv: bool,
}

/// The adapter of one linear layer, which adds `scale * (x a) b` to its output.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayer {
    /// Width of the layer's input.
    pub d_in: usize,
    /// Width of its output.
    pub d_out: usize,
    /// Width in between.
    pub rank: usize,
    /// Factor of what is added.
    pub scale: f32,
    /// `[d_in, rank]`.
    pub a: Vec<f32>,
    /// `[rank, d_out]`.
    pub b: Vec<f32>,
}

impl Adapter {
    /// Reads an adapter for a model: a folder of `peft`'s, or a GGUF file.
    ///
    /// # Errors
    ///
    /// If the file is damaged, is for a model of another shape, or needs what this crate does not have, such as DoRA:
    /// the error names file and tensor or field.
    ///
    /// ```no_run
    /// # fn main() -> throughline::Result<()> {
    /// use throughline::model::{Adapter, Model};
    /// let model = Model::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
    /// let adapter = Adapter::open("pirate".as_ref(), &model)?;
    /// // The whole model with the adapter in it, as a folder that others load.
    /// throughline::model::save_with("pirate-merged".as_ref(), model.config(), |name| match adapter.merged(&model, name)? {
    ///     Some(values) => Ok(values),
    ///     None => model.values(name),
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(path: &Path, model: &Model) -> Result<Adapter> {
        match !path.is_dir() && is_gguf(path)? {
            true => gguf::read(path, model),
            false => peft::read(path, model),
        }
    }

    /// An adapter of these parameters, by the names that a trainer's have: `h.0.attn.q.lora_a`, and modules that are
    /// [trained](Lora::trained) whole. `from` says in messages where they are from.
    ///
    /// # Errors
    ///
    /// If one is missing, is none of the model's, or has another length than it must.
    pub fn new(
        from: &str,
        model: &Model,
        lora: &Lora,
        tensors: impl IntoIterator<Item = (String, Vec<f32>)>,
    ) -> Result<Adapter> {
        lora.validate()?;
        let mut adapter = Adapter::empty(from, model.config(), lora.shared_qkv);
        let mut tensors: BTreeMap<String, Vec<f32>> = joined_tables(tensors);
        for (name, shape) in model.params() {
            let Some(layer) = name.strip_suffix(".weight").filter(|_| shape.rank() == 2 && is_linear(name)) else {
                continue;
            };
            if !lora.adapts(layer) {
                continue;
            }
            let [d_in, d_out] = [shape.rows(), shape.cols()];
            let mut take = |name: String, rows: usize, cols: usize, keep: bool| {
                let found = if keep { tensors.get(&name).cloned() } else { tensors.remove(&name) };
                let values = found.ok_or_else(|| Error::data(&name, "a matrix of the adapter", "none"))?;
                check_values(&name, &Shape::from([rows, cols]), &values).map(|()| values)
            };
            // Matrices that several layers share are left for the others.
            let owner = lora.owner_of_a(layer);
            let a = take(format!("{owner}.{LORA_A}"), d_in, lora.rank, owner != layer)?;
            let b = take(format!("{layer}.{LORA_B}"), lora.rank, d_out, false)?;
            let layer_of = AdapterLayer { d_in, d_out, rank: lora.rank, scale: lora.scale(), a, b };
            adapter.layers.insert(layer.into(), layer_of);
        }
        tensors.retain(|name, _| !name.ends_with(&format!(".{QKV}.{LORA_A}")));
        for (name, values) in tensors {
            adapter.add_whole(model, &name, values)?;
        }
        Ok(adapter)
    }

    fn empty(path: &str, config: &TransformerConfig, shared_qkv: bool) -> Adapter {
        let (path, config) = (path.to_string(), config.clone());
        Adapter { path, config, layers: BTreeMap::new(), whole: BTreeMap::new(), shared_qkv }
    }

    /// Adds a module that is trained whole.
    fn add_whole(&mut self, model: &Model, name: &str, values: Vec<f32>) -> Result<()> {
        let found = model.params().iter().find(|(param, _)| param == name);
        let (_, shape) = found.ok_or_else(|| Error::data(name, "a parameter of the model", "another name"))?;
        check_values(name, shape, &values)?;
        self.whole.insert(name.into(), values);
        Ok(())
    }

    /// The file, or where else it is from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Names of the adapted linear layers, such as `h.0.attn.q`, and what is added to each.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &AdapterLayer)> {
        self.layers.iter().map(|(name, layer)| (&name[..], layer))
    }

    /// The largest rank of its layers: that of the slots which a [`Decoder`](crate::decode::Decoder::load_adapter) needs
    /// for it.
    pub fn max_rank(&self) -> usize {
        self.layers.values().map(|layer| layer.rank).max().unwrap_or(0)
    }

    /// The adapter of a layer, if it has one.
    pub fn layer(&self, name: &str) -> Option<&AdapterLayer> {
        self.layers.get(name)
    }

    /// Names and values of the parameters that are replaced whole, such as `norm_f.weight`.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.whole.iter().map(|(name, values)| (&name[..], &values[..]))
    }

    /// Settings to train this adapter further with.
    ///
    /// # Errors
    ///
    /// If its layers have different ranks or scales: a run has one.
    pub fn lora(&self) -> Result<Lora> {
        let mut layers = self.layers.values();
        let first = layers.next().ok_or_else(|| self.bad("it adapts no layer".into()))?;
        let (rank, scale) = (first.rank, first.scale);
        if let Some(other) = layers.find(|layer| (layer.rank, layer.scale) != (rank, scale)) {
            let message = format!("layers with ranks {rank} and {}, scales {scale} and {}", other.rank, other.scale);
            return Err(self.bad(format!("{message}: expected the same in all, to train it further")));
        }
        let mut trained: Vec<String> = vec![];
        for module in self.whole.keys().filter_map(|param| Some(param.rsplit_once('.')?.0)) {
            if trained.last().is_none_or(|last| last != module) {
                trained.push(module.into());
            }
        }
        let targets = self.layers.keys().cloned().collect();
        let shared_qkv = self.shared_qkv;
        Ok(Lora { targets, trained, shared_qkv, ..Lora::new(rank, scale * rank as f32) })
    }

    /// The values of a parameter of a trainer's with these settings: `h.0.attn.q.lora_b`, `norm_f.weight`.
    ///
    /// # Errors
    ///
    /// If the adapter has no such parameter, or another rank.
    pub(crate) fn values(&self, lora: &Lora, name: &str) -> Result<Vec<f32>> {
        if let Some(values) = self.whole.get(name) {
            return Ok(values.clone());
        }
        let missing = || self.bad(format!("it has no {}, which the trainer trains", quoted(name)));
        let (module, matrix) = name.rsplit_once('.').ok_or_else(missing)?;
        let layer = match module.strip_suffix(QKV).filter(|_| self.shared_qkv && matrix == LORA_A) {
            Some(block) => self.layers.get(&format!("{block}q")),
            None => self.layers.get(module),
        };
        let layer = layer.ok_or_else(missing)?;
        if layer.rank != lora.rank {
            return Err(self.bad(format!(
                "{}: rank {}, but the trainer has {}",
                quoted(module),
                layer.rank,
                lora.rank
            )));
        }
        if matrix == LORA_A {
            return Ok(layer.a.clone());
        }
        let factor = layer.scale / lora.scale();
        Ok(layer.b.iter().map(|b| b * factor).collect())
    }

    /// A parameter of the model with the adapter in it, in f32: `w + scale * a b`, or a module that was trained whole.
    /// `None` if the adapter leaves it as it is.
    ///
    /// # Errors
    ///
    /// Those of [`Model::values`]. [`Error::Data`] if the model has another shape than the one that the adapter was
    /// opened for.
    pub fn merged(&self, model: &Model, name: &str) -> Result<Option<Vec<f32>>> {
        if let Some(values) = self.whole.get(name) {
            return Ok(Some(values.clone()));
        }
        let Some(layer) = name.strip_suffix(".weight").and_then(|layer| self.layers.get(layer)) else {
            return Ok(None);
        };
        let mut w = model.values(name)?;
        check_values(name, &Shape::from([layer.d_in, layer.d_out]), &w)?;
        for (w, a) in w.chunks_exact_mut(layer.d_out).zip(layer.a.chunks_exact(layer.rank)) {
            for (a, b) in a.iter().zip(layer.b.chunks_exact(layer.d_out)) {
                let a = layer.scale * a;
                w.iter_mut().zip(b).for_each(|(w, b)| *w += a * b);
            }
        }
        Ok(Some(w))
    }

    fn bad(&self, message: String) -> Error {
        Error::format(&self.path, message)
    }
}

/// Tensors by name, with tables that are in parts in one piece.
fn joined_tables(tensors: impl IntoIterator<Item = (String, Vec<f32>)>) -> BTreeMap<String, Vec<f32>> {
    let mut parts: Vec<(String, usize, Vec<f32>)> = vec![];
    for (name, values) in tensors {
        let (table, first) = table_of_part(&name);
        parts.push((table.into(), first, values));
    }
    parts.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let mut joined = BTreeMap::<String, Vec<f32>>::new();
    for (name, _, values) in parts {
        joined.entry(name).or_default().extend(values);
    }
    joined
}
