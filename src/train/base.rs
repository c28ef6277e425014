//! The model that a run fine-tunes: which of its weights stay as the file has them, and where they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::{TrainConfig, TrainOptions};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::model::{Model, Placed, Uploaded};
use crate::nn::{Positions, Transformer, TransformerConfig, table_of_part};
use crate::optim::Arena;
use crate::profile::Profile;

/// A base and its adapters, planned.
#[derive(Clone, Debug)]
pub(super) struct BasePlan {
    pub model: Arc<Model>,
    /// Tells the model from others.
    pub fingerprint: u64,
    /// The weights that are not trained.
    placed: Placed,
    /// The matrices among them that keep their stored format.
    pub packed: BTreeMap<String, Packed>,
}

impl BasePlan {
    /// The base of a run, if it has adapters.
    pub fn of(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<Option<Self>> {
        let (model, lora) = match (&options.base, &config.lora) {
            (None, None) => return Ok(None),
            (Some(model), Some(lora)) => (model.clone(), lora),
            (None, Some(_)) => {
                let message = "adapters need the model that they are for: `TrainOptions::base`";
                return Err(Error::config("lora", message));
            }
            (Some(_), None) => {
                let message = "a base is for adapters: set `TrainConfig::lora`, or load the weights with `Model::load`";
                return Err(Error::config("base", message));
            }
        };
        // What matters only in training may differ, and the context, unless there is a vector for each position.
        let TransformerConfig { dropout, init, .. } = config.model;
        let context = match config.model.positions {
            Positions::Learned => model.config().context,
            Positions::Rope { .. } => config.model.context,
        };
        if (TransformerConfig { dropout, init, context, ..model.config().clone() }) != config.model {
            let message = format!("must be the configuration of the base, {}", model.weights().path());
            return Err(Error::config("model", message));
        }
        let placed = model.placed(profile.max_tensor_bytes())?.without(|param| lora.trains(param));
        Ok(Some(BasePlan { fingerprint: model.fingerprint()?, packed: placed.packed(), placed, model }))
    }

    /// The parameters of a graph that are not trained, and all values that are bound to tensors of the base: those, and
    /// matrices in their stored format.
    pub fn frozen(&self, g: &Graph, transformer: &Transformer) -> [Vec<Value>; 2] {
        let bound: Vec<Value> =
            transformer.params.iter().copied().filter(|&p| self.placed.contains(g.name(p))).collect();
        let params = g.params();
        [bound.iter().copied().filter(|p| params.contains(p)).collect(), bound]
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.placed.bytes()
    }

    /// Puts the weights on the device.
    pub async fn upload(&self, gpu: &Gpu) -> Result<Uploaded> {
        self.model.upload(gpu, &self.placed).await
    }

    /// Loads the modules that are trained whole.
    pub async fn load_trained(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        let of_model = |name: &str| self.model.params().iter().any(|(param, _)| param == table_of_part(name).0);
        self.model.load_some(gpu, params, of_model).await
    }
}
