//! Between a file's description of its model (`config.json`, GGUF metadata) and our configuration.

use super::names::Names;
use super::{gguf, hugging_face};
use crate::error::{Error, Result};
use crate::format::{Settings, Weights};
use crate::nn::TransformerConfig;

/// The configuration of the model, and the parameter names of this kind of file.
pub(super) fn read(weights: &Weights) -> Result<(TransformerConfig, &'static Names)> {
    let (config, names) = match weights.config() {
        Some(json) => hugging_face::read(&Settings::of(weights.config_path(), json.clone())?)?,
        None if weights.metadata().contains("general.architecture") => gguf::read(weights)?,
        None => {
            let message = "has no config.json beside it: give the folder that holds both";
            return Err(Error::format(weights.path(), message));
        }
    };
    config.validate().map_err(|e| Error::format(weights.path(), e))?;
    Ok((config, names))
}
