//! Checkpoints: one safetensors file with weights, moments, and everything that a run needs to resume bit for bit.
//!
//! Weights have their own names. Moments are `optimizer.m.<name>` and `optimizer.v.<name>`. Only what AdamW updates has
//! the second one; for what Muon updates, the first is Muon's momentum. Settings and position of the run are JSON under
//! `throughline` in the file's metadata. Batches, dropout and samples depend on (seed, step) alone, so the step count
//! is the whole random state and data position.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::trainer::Trainer;
use crate::device::{Gpu, PIECE, PIECE_BYTES, Tensor, Uploads, pieces, read_part};
use crate::error::{Error, Result, quoted};
use crate::files::NewFile;
pub use crate::files::write_atomically;
use crate::format::{Stored, StoredTensor, Weights, safetensors_start};
use crate::hash::fnv1a;
use crate::nn::{rows_of_part, table_of_part};
use crate::optim::Arena;
use crate::tensor::Shape;

/// Key of the metadata entry with the [`RunState`].
const KEY: &str = "throughline";

/// What the names of the optimiser's tensors begin with.
const OPTIMIZER: &str = "optimizer.";

/// More steps than any run takes: at one per microsecond, 9000 years.
const MAX_STEPS: u64 = 1 << 58;

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

    /// The state of a trainer.
    fn of(trainer: &Trainer, alphabet: &str, text_hash: u64) -> Self {
        RunState {
            version: Self::VERSION,
            config: trainer.config().clone(),
            step: trainer.step_count(),
            alphabet: alphabet.to_string(),
            text_hash,
        }
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
        if model.n_layers > tensors {
            return Err(format!("metadata `{KEY}`: {} blocks, but only {tensors} tensors", model.n_layers));
        }
        let valid = model.validate().and_then(|()| self.config.validate());
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
/// let mut resumed = gpu.run_blocking(Trainer::with_options(&gpu, checkpoint.state.config.clone(), &options))?;
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
        let state = RunState::of(trainer, alphabet, text_hash);
        let tensors = tables(&arenas(trainer));
        let mut file =
            start(&state, &tensors).map_err(|e| Error::data("checkpoint", "a state that can be saved", e))?;
        for table in &tensors {
            for (tensor, piece) in table.pieces() {
                file.extend_from_slice(bytemuck::cast_slice(&read_part(trainer.gpu(), tensor, piece).await?));
            }
        }
        Self::from_bytes("checkpoint", file)
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
        let tensors = tables(&arenas(trainer));
        let state = RunState::of(trainer, alphabet, text_hash);
        let start = start(&state, &tensors).map_err(|e| Error::format(path, e))?;
        let mut file = NewFile::create(path)?;
        file.write(&start)?;
        for table in &tensors {
            for (tensor, piece) in table.pieces() {
                file.write(bytemuck::cast_slice(&read_part(trainer.gpu(), tensor, piece).await?))?;
            }
        }
        file.commit()
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
        let arenas = arenas(trainer);
        let found = arenas.map(|(prefix, arena)| self.find(prefix, arena)).into_iter().collect::<Result<Vec<_>>>()?;
        self.check_all_used(&trainer.params)?;
        let mut uploads = Uploads::new(trainer.gpu());
        for (arena, parts) in arenas.iter().map(|(_, arena)| *arena).zip(found) {
            write(&mut uploads, arena, &parts).await?;
        }
        uploads.finish()?;
        trainer.set_step_count(self.state.step);
        Ok(())
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
        let found = self.find("", params)?;
        let mut uploads = Uploads::new(gpu);
        write(&mut uploads, params, &found).await?;
        uploads.finish()
    }

    /// [`restore_weights`](Self::restore_weights), waiting for the GPU.
    pub fn restore_weights_blocking(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        gpu.run_blocking(self.restore_weights(gpu, params))
    }

    /// The stored tensor of each tensor of an arena, its shape checked, and the first byte in it.
    fn find(&self, prefix: &str, arena: &Arena) -> Result<Vec<(StoredTensor<'_>, usize)>> {
        let find = |(name, shape): &(String, Shape)| {
            let stored = self.tensors.get(&format!("{prefix}{}", table_of_part(name).0))?;
            let rows = rows_of_part(name, shape, stored.shape()).ok_or_else(|| {
                let message =
                    format!("tensor {} has shape {}, expected {shape}", quoted(stored.name()), stored.shape());
                Error::format(self.tensors.path(), message)
            })?;
            Ok((stored, 4 * rows.start * shape.cols()))
        };
        arena.layout.tensors.iter().map(find).collect()
    }

    /// Returns an error if there are weights that these parameters lack: the file is of another model.
    fn check_all_used(&self, params: &Arena) -> Result<()> {
        let known: Vec<&str> = params.layout.tensors.iter().map(|(name, _)| table_of_part(name).0).collect();
        match self.weights().find(|(name, _)| !known.contains(name)) {
            None => Ok(()),
            Some((name, _)) => {
                let message = format!("tensor {} is not one of the trainer's", quoted(name));
                Err(Error::format(self.tensors.path(), message))
            }
        }
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
        let start = start_of(&self.state, described).map_err(|e| Error::format(path, e))?;
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

/// A tensor of the file: one of an arena's, or a table that is in parts there. Files do not contain parts, which
/// another device may not need.
struct Table<'a> {
    name: String,
    dims: Vec<usize>,
    parts: Vec<&'a Tensor>,
}

impl<'a> Table<'a> {
    /// Its elements, in order: ranges of tensors.
    fn pieces(&self) -> impl Iterator<Item = (&'a Tensor, Range<usize>)> + use<'a, '_> {
        self.parts.iter().flat_map(|&part| pieces(0..part.ty().len(), PIECE).map(move |piece| (part, piece)))
    }
}

/// What is in the arenas of a trainer, under the names that it has in a file.
fn tables<'a>(arenas: &[(&'static str, &'a Arena); 3]) -> Vec<Table<'a>> {
    let mut tables: Vec<Table<'a>> = vec![];
    for (prefix, arena) in arenas {
        for ((name, shape), tensor) in arena.layout.tensors.iter().zip(&arena.tensors) {
            let (table, first) = table_of_part(name);
            let name = format!("{prefix}{table}");
            // The parts of a table follow each other.
            match tables.last_mut().filter(|whole| first > 0 && whole.name == name) {
                Some(whole) => {
                    whole.dims[0] += shape.rows();
                    whole.parts.push(tensor);
                }
                None => tables.push(Table { name, dims: shape.dims().to_vec(), parts: vec![tensor] }),
            }
        }
    }
    tables
}

/// The file up to its data.
fn start(state: &RunState, tables: &[Table<'_>]) -> Result<Vec<u8>, String> {
    start_of(state, tables.iter().map(|table| (table.name.clone(), table.dims.clone())))
}

fn start_of(state: &RunState, tensors: impl Iterator<Item = (String, Vec<usize>)>) -> Result<Vec<u8>, String> {
    let state = serde_json::to_string(state).map_err(|e| e.to_string())?;
    safetensors_start(tensors.map(|(name, dims)| (name, Dtype::F32, dims)), HashMap::from([(KEY.to_string(), state)]))
}

/// Writes what [`Checkpoint::find`] has found for an arena.
async fn write(uploads: &mut Uploads, arena: &Arena, found: &[(StoredTensor<'_>, usize)]) -> Result<()> {
    for (tensor, (stored, start)) in arena.tensors.iter().zip(found) {
        for piece in pieces(0..4 * tensor.ty().len(), PIECE_BYTES) {
            let bytes = stored.part(start + piece.start..start + piece.end)?;
            uploads.write(tensor, piece.start, &bytes).await?;
        }
    }
    Ok(())
}

fn arenas(trainer: &Trainer) -> [(&'static str, &Arena); 3] {
    let optimizer = &trainer.optimizer;
    [("", &trainer.params), ("optimizer.m.", &optimizer.m), ("optimizer.v.", &optimizer.v)]
}
