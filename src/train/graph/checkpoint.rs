//! The files of a trainer: weights alone, and checkpoints from which a run resumes bit for bit.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::config::GraphTrainConfig;
use super::trainer::GraphTrainer;
use crate::error::{Error, Result, joined};
use crate::format::Weights;
use crate::optim::{self, LossScaleState, Named};
use crate::train::config::MAX_STEPS;

/// Key of the metadata entry with the [`State`].
const KEY: &str = "throughline.training";

/// Settings and position of a run, stored next to the tensors.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Format version of this struct.
    version: u32,
    config: GraphTrainConfig,
    /// Number of completed steps. With the seed this is also the random state.
    step: u64,
    /// What loss scaling has come to, if there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<LossScaleState>,
}

const VERSION: u32 = 1;

/// A checkpoint of a [`GraphTrainer`], opened to look at its settings before something is loaded, or to resume with
/// others. For the usual case there is [`GraphTrainer::resume`].
///
/// ```no_run
/// # fn app(gpu: &throughline::Gpu, graph: throughline::Graph, loss: throughline::Value) -> throughline::Result<()> {
/// use throughline::optim::Schedule;
/// use throughline::train::{GraphCheckpoint, GraphTrainConfig, GraphTrainer};
/// let checkpoint = GraphCheckpoint::open("run.safetensors")?;
/// let config = GraphTrainConfig { schedule: Schedule::constant(1e-4), ..checkpoint.config.clone() };
/// let mut trainer = GraphTrainer::new_blocking(gpu, graph, loss, config)?;
/// checkpoint.restore_blocking(&mut trainer)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GraphCheckpoint {
    /// The settings of the run.
    pub config: GraphTrainConfig,
    /// Number of completed steps.
    pub step: u64,
    /// What loss scaling has come to, if the run has it.
    pub loss_scale: Option<LossScaleState>,
    file: Weights,
}

impl GraphCheckpoint {
    /// Opens and checks a file. Tensors are read when they are restored.
    ///
    /// # Errors
    ///
    /// Every error names the file and what is wrong with it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(Weights::open(path.as_ref())?)
    }

    /// The same for a file that is in memory already. `path` is its name in messages.
    pub fn from_bytes(path: &str, file: Vec<u8>) -> Result<Self> {
        Self::new(Weights::from_bytes(path, file)?)
    }

    fn new(file: Weights) -> Result<Self> {
        let bad = |message: String| Error::format(file.path(), message);
        if !file.metadata().contains(KEY) {
            let message = "not a checkpoint of a `GraphTrainer`. `GraphTrainer::load` reads weights alone";
            return Err(bad(format!("has no `{KEY}` metadata: {message}")));
        }
        let in_state = |e: &dyn std::fmt::Display| bad(format!("metadata `{KEY}`: {e}"));
        let state: State = serde_json::from_str(file.metadata().str(KEY)?).map_err(|e| in_state(&e))?;
        if state.version != VERSION {
            return Err(bad(format!("has version {}, this crate reads {VERSION}", state.version)));
        }
        if state.step >= MAX_STEPS {
            return Err(in_state(&format!("step: expected fewer than {MAX_STEPS}, got {}", state.step)));
        }
        state.config.validate().map_err(|e| in_state(&e))?;
        let State { config, step, loss_scale, .. } = state;
        LossScaleState::check(loss_scale.as_ref(), config.scaling().as_ref()).map_err(|e| in_state(&e))?;
        Ok(GraphCheckpoint { config, step, loss_scale, file })
    }

    /// Puts weights, moments and step count into a trainer, whose settings may differ. Resolves once the device has
    /// been polled, several times for a large model; outside of frames, use
    /// [`restore_blocking`](Self::restore_blocking).
    ///
    /// A trainer with [loss scaling](GraphTrainConfig::loss_scaling) continues a run without as if all steps had been
    /// applied, from its first scale. The reverse continues from the count of all steps, so that those which were
    /// skipped count for the schedule, too.
    ///
    /// # Errors
    ///
    /// If a tensor is missing, such as a moment that the optimiser needs, has another shape, or is not one of the
    /// trainer's: then the trainer is as it was. If the file cannot be read to its end, some of the tensors have been
    /// written.
    pub async fn restore(&self, trainer: &mut GraphTrainer) -> Result<()> {
        optim::restore(trainer.gpu(), &self.file, &arenas(trainer), "trainer's").await?;
        trainer.set_position(self.step, self.loss_scale.as_ref())
    }

    /// [`restore`](Self::restore), waiting for the GPU.
    pub fn restore_blocking(&self, trainer: &mut GraphTrainer) -> Result<()> {
        trainer.gpu().clone().run_blocking(self.restore(trainer))
    }
}

impl GraphTrainer {
    /// Saves the parameters, as they are after everything submitted so far, as a safetensors file: under their names, in
    /// f32, for [`load`](Self::load) or any other program.
    ///
    /// The file appears whole or not at all. Resolves once the device has been polled, several times for a large model.
    /// Until then, submit no further step. Outside of frames, use [`save_blocking`](Self::save_blocking).
    pub async fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.check_whole()?;
        optim::save(self.gpu(), path.as_ref(), HashMap::new(), &weights(self)).await
    }

    /// [`save`](Self::save), waiting for the GPU.
    pub fn save_blocking(&self, path: impl AsRef<Path>) -> Result<()> {
        self.gpu().run_blocking(self.save(path))
    }

    /// Loads the parameters from a safetensors file, by name. Moments and step count stay as they are. Resolves once the
    /// device has been polled, several times for a large model; outside of frames, use
    /// [`load_blocking`](Self::load_blocking).
    ///
    /// # Errors
    ///
    /// If a parameter is missing, has another shape, is not stored in f32, or is not one of the trainer's: then nothing
    /// has been written. Moments, which checkpoints have, are left out.
    pub async fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        optim::restore(self.gpu(), &Weights::open(path.as_ref())?, &weights(self), "trainer's").await
    }

    /// [`load`](Self::load), waiting for the GPU.
    pub fn load_blocking(&self, path: impl AsRef<Path>) -> Result<()> {
        self.gpu().run_blocking(self.load(path))
    }

    /// Saves everything that the run needs to resume bit for bit: parameters, moments, step count, seed, settings, the
    /// loss scale. The data, and what is in inputs and states, is yours to restore. See [`save`](Self::save) for how it is written.
    pub async fn save_checkpoint(&self, path: impl AsRef<Path>) -> Result<()> {
        self.check_whole()?;
        let path = path.as_ref();
        let (config, step, loss_scale) = (self.config().clone(), self.step_count(), self.loss_scale().await?);
        let state = State { version: VERSION, config, step, loss_scale };
        let state = serde_json::to_string(&state).map_err(|e| Error::format(path, e))?;
        optim::save(self.gpu(), path, HashMap::from([(KEY.to_string(), state)]), &arenas(self)).await
    }

    /// [`save_checkpoint`](Self::save_checkpoint), waiting for the GPU.
    pub fn save_checkpoint_blocking(&self, path: impl AsRef<Path>) -> Result<()> {
        self.gpu().run_blocking(self.save_checkpoint(path))
    }

    /// Continues from a checkpoint, bit for bit. Resolves once the device has been polled, several times for a large
    /// model; outside of frames, use [`resume_blocking`](Self::resume_blocking).
    ///
    /// # Errors
    ///
    /// If the settings of the run are not this trainer's: the error lists what differs. To continue with other
    /// settings, use [`GraphCheckpoint::restore`], which has the other errors.
    pub async fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let checkpoint = GraphCheckpoint::open(path)?;
        let differing = differences(&checkpoint.config, self.config());
        if !differing.is_empty() {
            let message = format!("the run has other settings than the trainer: {}", joined(differing, "; "));
            return Err(Error::format(checkpoint.file.path(), message));
        }
        checkpoint.restore(self).await
    }

    /// [`resume`](Self::resume), waiting for the GPU.
    pub fn resume_blocking(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.gpu().clone().run_blocking(self.resume(path))
    }
}

/// What [`GraphTrainer::save`] writes.
fn weights(trainer: &GraphTrainer) -> [Named<'_>; 2] {
    [("", trainer.params()), ("", trainer.frozen())]
}

/// What [`GraphTrainer::save_checkpoint`] writes.
fn arenas(trainer: &GraphTrainer) -> [Named<'_>; 4] {
    let ([params, frozen], optimizer) = (weights(trainer), trainer.optimizer());
    [params, frozen, ("optimizer.m.", &optimizer.m), ("optimizer.v.", &optimizer.v)]
}

/// The settings that differ, each with both values.
fn differences(file: &GraphTrainConfig, here: &GraphTrainConfig) -> Vec<String> {
    // Numbers as they come out of a file.
    let read = |config: &GraphTrainConfig| {
        let text = serde_json::to_string(config).unwrap_or_default();
        serde_json::from_str::<Json>(&text).unwrap_or_default()
    };
    let mut found = vec![];
    compare("", &read(file), &read(here), &mut found);
    found
}

fn compare(path: &str, file: &Json, here: &Json, found: &mut Vec<String>) {
    match (file, here) {
        (Json::Object(a), Json::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => compare(&path, a, b, found),
                    (Some(_), None) => found.push(format!("`{path}` is only in the file")),
                    (None, _) => found.push(format!("`{path}` is not in the file")),
                }
            }
        }
        _ if file != here => found.push(format!("`{path}` is {file} in the file and {here} here")),
        _ => {}
    }
}
