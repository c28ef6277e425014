//! Checkpoints: one safetensors file with weights, moments, and everything that a run needs to resume bit for bit.
//!
//! Weights have their own names. Moments are `optimizer.m.<name>` and `optimizer.v.<name>`. Only what AdamW updates has
//! the second one; for what Muon updates, the first is Muon's momentum. Settings and position of the run are JSON under
//! `throughline` in the file's metadata. Batches, dropout and samples depend on (seed, step) alone, so the step count
//! is the whole random state and data position.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::trainer::Trainer;
use crate::device::Gpu;
use crate::error::{Error, Result};
pub use crate::files::write_atomically;
use crate::hash::fnv1a;
use crate::nn::{part_of, table_of_part};
use crate::optim::{Arena, ArenaLayout};

/// Key of the metadata entry with the [`RunState`].
const KEY: &str = "throughline";

/// Largest file that is read: a guard against mistaken paths, far above any model that fits a trainer's arenas.
const MAX_BYTES: u64 = 64 << 30;

/// Settings and position of a run, stored next to the tensors.
///
/// Compare its [`text_hash`](Self::text_hash) before you resume, and rebuild the tokenizer from its
/// [`alphabet`](Self::alphabet).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Format version of this struct.
    pub version: u32,
    /// Settings of model and training.
    pub config: TrainConfig,
    /// Number of completed steps. With the seed in the configuration this is also the data position and random state.
    pub step: u64,
    /// The characters of the tokenizer, in order of their ids.
    pub alphabet: String,
    /// FNV-1a hash of the training text, so that a run cannot silently continue on another one.
    pub text_hash: u64,
}

impl RunState {
    /// The version that this crate writes.
    pub const VERSION: u32 = 1;
}

/// FNV-1a hash of a text, for [`RunState::text_hash`].
pub fn text_hash(text: &str) -> u64 {
    fnv1a(text.bytes())
}

/// A checkpoint in host memory.
///
/// Make one with [`of`](Self::of) or [`load`](Self::load), write it with [`save`](Self::save), and continue training
/// from it with [`restore`](Self::restore).
#[derive(Debug)]
pub struct Checkpoint {
    /// Settings and position of the run.
    pub state: RunState,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    path: PathBuf,
}

impl Checkpoint {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// Every error names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let len = fs::metadata(path).map_err(Error::io(path))?.len();
        if len > MAX_BYTES {
            return Err(bad(format!("{len} bytes is larger than any checkpoint this crate writes")));
        }
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| Error::format(path, e))?;
        let state = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let state = state.ok_or_else(|| bad(format!("has no `{KEY}` metadata: not a checkpoint of this crate")))?;
        let state: RunState = serde_json::from_str(state).map_err(|e| bad(format!("metadata `{KEY}`: {e}")))?;
        if state.version != RunState::VERSION {
            return Err(bad(format!("has version {}, this crate reads {}", state.version, RunState::VERSION)));
        }
        let mut tensors = HashMap::new();
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 {
                return Err(bad(format!("tensor `{name}` must be F32, but is {:?}", view.dtype())));
            }
            tensors.insert(name.to_string(), (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data())));
        }
        Ok(Checkpoint { state, tensors, path: path.into() })
    }

    /// The state of a trainer after everything submitted so far.
    /// Resolves once the device has been polled; outside of frames, use [`of_blocking`](Self::of_blocking).
    pub async fn of(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Result<Self> {
        let state = RunState {
            version: RunState::VERSION,
            config: trainer.config().clone(),
            step: trainer.step_count(),
            alphabet: alphabet.to_string(),
            text_hash,
        };
        let mut tensors = HashMap::new();
        for (prefix, arena) in arenas(trainer) {
            let values = arena.read(trainer.gpu()).await?;
            for ((name, shape), values) in arena.layout.tensors.iter().zip(values) {
                // Files do not contain parts, which another device may not need.
                let (table, first) = table_of_part(name);
                let whole: &mut (Vec<usize>, Vec<f32>) = tensors.entry(format!("{prefix}{table}")).or_default();
                whole.0 = shape.dims().to_vec();
                whole.0[0] += first;
                whole.1.extend(values);
            }
        }
        Ok(Checkpoint { state, tensors, path: PathBuf::new() })
    }

    /// [`of`](Self::of), waiting for the GPU.
    pub fn of_blocking(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Result<Self> {
        trainer.gpu().run_blocking(Self::of(trainer, alphabet, text_hash))
    }

    /// Whether both hold the same state and the same bits in every tensor: for tests of reproducibility.
    pub fn same_bits(&self, other: &Checkpoint) -> bool {
        let bits = |c: &Checkpoint| -> std::collections::BTreeMap<String, Vec<u32>> {
            let tensors = c.tensors.iter();
            tensors.map(|(name, (_, v))| (name.clone(), v.iter().map(|x| x.to_bits()).collect())).collect()
        };
        self.state == other.state && bits(self) == bits(other)
    }

    /// Puts weights, moments and step count into a trainer of the same configuration.
    ///
    /// A trainer with Muon also accepts a checkpoint of AdamW, and continues from its first moments. The reverse is an
    /// error, since the second moments are missing.
    pub fn restore(&self, trainer: &mut Trainer) -> Result<()> {
        // All tensors are looked up before the first is written, so an error leaves the trainer as it was.
        let found = arenas(trainer).map(|(prefix, arena)| Ok((arena, self.values(prefix, &arena.layout)?)));
        for (arena, values) in found.into_iter().collect::<Result<Vec<_>>>()? {
            arena.write(trainer.gpu(), &values)?;
        }
        trainer.set_step_count(self.state.step);
        Ok(())
    }

    /// Names and values of the weights, without the optimiser's moments: for [`model::save`](crate::model::save).
    pub fn weights(&self) -> Vec<(String, Vec<f32>)> {
        let weights = self.tensors.iter().filter(|(name, _)| !name.starts_with("optimizer."));
        weights.map(|(name, (_, values))| (name.clone(), values.clone())).collect()
    }

    /// Puts the weights into an arena, for inference.
    pub fn restore_weights(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        params.write(gpu, &self.values("", &params.layout)?)
    }

    fn values(&self, prefix: &str, layout: &ArenaLayout) -> Result<Vec<&[f32]>> {
        let bad = |message: String| Error::format(&self.path, message);
        (layout.tensors.iter())
            .map(|(layout_name, shape)| {
                let name = format!("{prefix}{}", table_of_part(layout_name).0);
                let (dims, values) =
                    self.tensors.get(&name).ok_or_else(|| bad(format!("tensor `{name}` is missing")))?;
                part_of(layout_name, shape, dims, values)
                    .ok_or_else(|| bad(format!("tensor `{name}` has shape {dims:?}, expected {shape}")))
            })
            .collect()
    }

    /// Writes the file atomically: a temporary file first, which then takes its place. Whatever happens, the path holds
    /// either the old checkpoint or the new one, never a part.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.write(path, |_| true)
    }

    /// The same without the optimiser's moments, about a third of the size: for inference. A run cannot resume from it.
    pub fn save_weights(&self, path: &Path) -> Result<()> {
        self.write(path, |name| !name.starts_with("optimizer."))
    }

    fn write(&self, path: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
        let bad = |message: String| Error::format(path, message);
        let state = serde_json::to_string(&self.state).map_err(|e| Error::format(path, e))?;
        let mut views = vec![];
        for (name, (shape, values)) in self.tensors.iter().filter(|(name, _)| keep(name)) {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
            views.push((name.as_str(), view.map_err(|e| bad(format!("tensor `{name}`: {e}")))?));
        }
        let metadata = HashMap::from([(KEY.to_string(), state)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::format(path, e))?;
        write_atomically(path, &bytes)
    }
}

fn arenas(trainer: &Trainer) -> [(&'static str, &Arena); 3] {
    let optimizer = &trainer.optimizer;
    [("", &trainer.params), ("optimizer.m.", &optimizer.m), ("optimizer.v.", &optimizer.v)]
}
