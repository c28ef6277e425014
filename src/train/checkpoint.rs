//! Checkpoints: one safetensors file with weights, moments, and everything that a run needs to resume bit for bit.
//!
//! Weights have their own names. Moments are `optimizer.m.<name>` and `optimizer.v.<name>`. Only what AdamW updates has
//! the second one; for what Muon updates, the first is Muon's momentum. Settings and position of the run are JSON under
//! `throughline` in the file's metadata, with what loss scaling has come to. Batches, dropout and samples depend on (seed, step) alone, so the step count
//! is the whole random state and data position.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config::{MAX_STEPS, TrainConfig};
use super::trainer::Trainer;
use crate::device::{Gpu, PIECE_BYTES, pieces};
use crate::error::{Error, Result, quoted};
use crate::files::NewFile;
pub use crate::files::write_atomically;
use crate::format::{Stored, StoredTensor, Weights};
use crate::hash::fnv1a;
use crate::optim::{self, Arena, LossScaleState, Named, OPTIMIZER};
use crate::tensor::Shape;

/// Key of the metadata entry with the [`RunState`].
const KEY: &str = "throughline";

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
    /// Tells the base of adapters from other models. `None` if all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<u64>,
    /// What loss scaling has come to; `None` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScaleState>,
}

impl RunState {
    /// The version that this crate writes.
    pub const VERSION: u32 = 1;

    /// The state of a trainer.
    async fn of(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Result<Self> {
        Ok(RunState {
            version: Self::VERSION,
            config: trainer.config().clone(),
            step: trainer.step_count(),
            alphabet: alphabet.to_string(),
            text_hash,
            base: trainer.base_fingerprint(),
            loss_scale: trainer.graph_trainer().loss_scale().await?,
        })
    }

    /// The entry of a file's metadata.
    fn metadata(&self, path: impl Into<PathBuf>) -> Result<HashMap<String, String>> {
        let state = serde_json::to_string(self).map_err(|e| Error::format(path, e))?;
        Ok(HashMap::from([(KEY.to_string(), state)]))
    }

    /// What is wrong with the state of a file with so many tensors.
    fn check(&self, tensors: usize) -> Result<(), String> {
        let model = &self.config.model;
        if self.version != Self::VERSION {
            return Err(format!("has version {}, this crate reads {}", self.version, Self::VERSION));
        }
        if self.step >= MAX_STEPS {
            return Err(format!("metadata `{KEY}`: step: expected fewer than {MAX_STEPS}, got {}", self.step));
        }
        // Each block has several tensors: reject impossible numbers before they cost time.
        if model.n_layers > tensors && self.config.lora.is_none() {
            return Err(format!("metadata `{KEY}`: {} blocks, but only {tensors} tensors", model.n_layers));
        }
        let valid = model.validate().and_then(|()| self.config.validate());
        let valid =
            valid.and_then(|()| LossScaleState::check(self.loss_scale.as_ref(), self.config.scaling().as_ref()));
        valid.map_err(|e| format!("metadata `{KEY}`: {e}"))
    }
}

/// FNV-1a hash of a text, for [`RunState::text_hash`].
pub fn text_hash(text: &str) -> u64 {
    fnv1a(text.bytes())
}

/// A checkpoint: a file, or the same in host memory.
///
/// Save a run with [`save_trainer`](Self::save_trainer), open the file with [`load`](Self::load), and continue from it
/// with [`restore`](Self::restore). None of these holds a copy of the model: tensors are read and written piece by
/// piece.
///
/// ```
/// use throughline::nn::TransformerConfig;
/// use throughline::train::checkpoint::Checkpoint;
/// use throughline::train::{TrainConfig, TrainOptions, Trainer};
/// use throughline::Gpu;
///
/// let gpu = Gpu::headless_blocking()?;
/// let trainer = Trainer::new_blocking(&gpu, TrainConfig::new(TransformerConfig::gpt2(65, 16, 1, 16, 2), 2))?;
/// let path = std::env::temp_dir().join(format!("doc-checkpoint-{}", std::process::id()));
/// Checkpoint::save_trainer_blocking(&trainer, "", 0, &path)?;
///
/// let checkpoint = Checkpoint::load(&path)?;
/// let options = TrainOptions { init: false, ..TrainOptions::default() };
/// let mut resumed = Trainer::with_options_blocking(&gpu, checkpoint.state.config.clone(), &options)?;
/// checkpoint.restore_blocking(&mut resumed)?;
/// # drop(checkpoint);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    /// Settings and position of the run.
    pub state: RunState,
    tensors: Weights,
}

impl Checkpoint {
    /// Opens and checks a file. Tensors are read when they are needed: keep the file as it is until then. (To replace
    /// it by saving another checkpoint changes nothing.)
    ///
    /// # Errors
    ///
    /// Every error names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        Self::new(Weights::open(path)?)
    }

    /// The same for a file that is in memory already. `path` is its name in messages.
    pub fn from_bytes(path: &str, file: Vec<u8>) -> Result<Self> {
        Self::new(Weights::from_bytes(path, file)?)
    }

    fn new(tensors: Weights) -> Result<Self> {
        let bad = |message: String| Error::format(tensors.path(), message);
        if !tensors.metadata().contains(KEY) {
            return Err(bad(format!("has no `{KEY}` metadata: not a checkpoint of this crate")));
        }
        let state = serde_json::from_str(tensors.metadata().str(KEY)?);
        let state: RunState = state.map_err(|e| bad(format!("metadata `{KEY}`: {e}")))?;
        state.check(tensors.len()).map_err(bad)?;
        if let Some((name, ty)) = tensors.unread().first() {
            return Err(bad(format!("tensor {} must be F32, but is {ty}", quoted(name))));
        }
        tensors.iter().try_for_each(|tensor| tensor.stored_as(&[Stored::F32]).map(drop))?;
        Ok(Checkpoint { state, tensors })
    }

    /// The state of a trainer after everything submitted so far, in host memory: to compare it, or to keep it without a
    /// file. Resolves once the device has been polled; outside of frames, use [`of_blocking`](Self::of_blocking).
    pub async fn of(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Result<Self> {
        trainer.graph_trainer().check_whole()?;
        let state = RunState::of(trainer, alphabet, text_hash).await?.metadata("checkpoint")?;
        Self::from_bytes("checkpoint", optim::to_bytes(trainer.gpu(), "checkpoint", state, &arenas(trainer)).await?)
    }

    /// [`of`](Self::of), waiting for the GPU.
    pub fn of_blocking(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Result<Self> {
        trainer.gpu().run_blocking(Self::of(trainer, alphabet, text_hash))
    }

    /// Saves the state of a trainer after everything submitted so far: the usual way to save a run. It goes to the file
    /// piece by piece. Dropped half-way, it leaves the old file as it was, as an error does.
    ///
    /// Resolves once the device has been polled, several times for a large model. Until then, submit nothing that
    /// changes the trainer. Outside of frames, use [`save_trainer_blocking`](Self::save_trainer_blocking).
    pub async fn save_trainer(trainer: &Trainer, alphabet: &str, text_hash: u64, path: &Path) -> Result<()> {
        trainer.graph_trainer().check_whole()?;
        let state = RunState::of(trainer, alphabet, text_hash).await?.metadata(path)?;
        optim::save(trainer.gpu(), path, state, &arenas(trainer)).await
    }

    /// [`save_trainer`](Self::save_trainer), waiting for the GPU.
    pub fn save_trainer_blocking(trainer: &Trainer, alphabet: &str, text_hash: u64, path: &Path) -> Result<()> {
        trainer.gpu().run_blocking(Self::save_trainer(trainer, alphabet, text_hash, path))
    }

    /// Whether both hold the same state and the same bits in every tensor: for tests of reproducibility. A file that
    /// cannot be read any more is not the same.
    pub fn same_bits(&self, other: &Checkpoint) -> bool {
        let same = |ours: StoredTensor<'_>| {
            let theirs = other.tensors.get(ours.name()).ok().filter(|theirs| theirs.shape() == ours.shape());
            let part = |piece: Range<usize>| Some(ours.part(piece.clone()).ok()? == theirs?.part(piece).ok()?);
            pieces(0..ours.byte_len(), PIECE_BYTES).all(|piece| part(piece) == Some(true))
        };
        self.state == other.state && self.tensors.len() == other.tensors.len() && self.tensors.iter().all(same)
    }

    /// Puts weights, moments and step count into a trainer of the same configuration. Make it with
    /// [`TrainOptions::init`](super::TrainOptions::init) set to false: its parameters are all overwritten.
    ///
    /// A trainer with loss scaling also accepts a checkpoint of a run without it, and the reverse: see
    /// [`GraphCheckpoint::restore`](super::GraphCheckpoint::restore).
    ///
    /// A trainer with Muon also accepts a checkpoint of AdamW, and continues from its first moments. The reverse is an
    /// error, since the second moments are missing.
    ///
    /// The file is read piece by piece. Resolves once the device has been polled, several times for a large model;
    /// outside of frames, use [`restore_blocking`](Self::restore_blocking).
    ///
    /// # Errors
    ///
    /// If a tensor is missing, has another shape, or is not one of the trainer's: then the trainer is as it was. If the
    /// file cannot be read to its end, restore another one, since some of the tensors have been written.
    pub async fn restore(&self, trainer: &mut Trainer) -> Result<()> {
        if self.state.base != trainer.base_fingerprint() {
            let kind = |base: Option<u64>| if base.is_some() { "adapters" } else { "all weights" };
            let message = match (self.state.base, trainer.base_fingerprint()) {
                (Some(_), Some(_)) => "its adapters are for another model than the trainer's base".to_string(),
                (file, here) => format!("has {}, but the trainer has {}", kind(file), kind(here)),
            };
            return Err(Error::format(self.tensors.path(), message));
        }
        optim::restore(trainer.gpu(), &self.tensors, &arenas(trainer), "trainer's").await?;
        trainer.set_position(self.state.step, self.state.loss_scale.as_ref())
    }

    /// [`restore`](Self::restore), waiting for the GPU.
    pub fn restore_blocking(&self, trainer: &mut Trainer) -> Result<()> {
        trainer.gpu().clone().run_blocking(self.restore(trainer))
    }

    /// Names and shapes of the weights, without the optimiser's moments.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Shape)> {
        let weights = self.tensors.iter().filter(|tensor| !tensor.name().starts_with(OPTIMIZER));
        weights.map(|tensor| (tensor.name(), tensor.shape()))
    }

    /// The values of a tensor, read now: for [`model::save_with`](crate::model::save_with). The error for an unknown
    /// name includes it and the file.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.tensors.get(name)?.values()
    }

    /// Puts the weights into an arena, for inference. Resolves like [`restore`](Self::restore); outside of frames, use
    /// [`restore_weights_blocking`](Self::restore_weights_blocking).
    pub async fn restore_weights(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        optim::restore_some(gpu, &self.tensors, params).await
    }

    /// [`restore_weights`](Self::restore_weights), waiting for the GPU.
    pub fn restore_weights_blocking(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        gpu.run_blocking(self.restore_weights(gpu, params))
    }

    /// Writes the file atomically: a temporary file first, which then takes its place. Whatever happens, the path holds
    /// either the old checkpoint or the new one, never a part. Threads that save to one path do not disturb each other,
    /// and it may be the file that this was loaded from.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.write(path, |_| true)
    }

    /// The same without the optimiser's moments, about a third of the size: for inference. A run cannot resume from it.
    pub fn save_weights(&self, path: &Path) -> Result<()> {
        self.write(path, |name| !name.starts_with(OPTIMIZER))
    }

    fn write(&self, path: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
        let tensors: Vec<StoredTensor<'_>> = self.tensors.iter().filter(|tensor| keep(tensor.name())).collect();
        let described = tensors.iter().map(|tensor| (tensor.name().to_string(), tensor.shape().dims().to_vec()));
        let start = optim::start_of(self.state.metadata(path)?, described).map_err(|e| Error::format(path, e))?;
        let mut file = NewFile::create(path)?;
        file.write(&start)?;
        for tensor in tensors {
            for piece in pieces(0..tensor.byte_len(), PIECE_BYTES) {
                file.write(&tensor.part(piece)?)?;
            }
        }
        file.commit()
    }
}

fn arenas(trainer: &Trainer) -> [Named<'_>; 3] {
    let optimizer = trainer.optimizer();
    [("", trainer.params()), ("optimizer.m.", &optimizer.m), ("optimizer.v.", &optimizer.v)]
}
