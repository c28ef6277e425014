//! Saving a model as a folder that PyTorch loads.

use std::collections::BTreeMap;
use std::path::Path;

use super::hugging_face;
use super::layout::{beside, halves, is_linear, transpose};
use super::loaded::parameters;
use crate::error::{Error, Result};
use crate::format::{SaveTensor, Stored, save_safetensors};
use crate::nn::{TransformerConfig, table_of_part};

/// Saves a model in Hugging Face's layout, as `config.json` and `model.safetensors` in f32. PyTorch's `transformers`
/// and [`Model::open`](super::Model::open) both load the folder.
///
/// Use it to publish or evaluate what was trained here. `params` are names and values as in a trainer's arena.
///
/// # Errors
///
/// If no architecture of Hugging Face has all parts of the model (see the table of [`crate::model`]), or if a file
/// cannot be written.
///
/// ```
/// use throughline::model;
/// use throughline::model::Model;
/// use throughline::nn::TransformerConfig;
/// use throughline::optim::ArenaLayout;
///
/// let config = TransformerConfig::gpt2(65, 32, 2, 48, 4);
/// let layout = ArenaLayout::of_model(&config, u64::MAX)?;
/// let params = layout.tensors.into_iter().map(|(name, shape)| (name, vec![0.5; shape.len()]));
/// let dir = std::env::temp_dir().join(format!("doc-model-{}", std::process::id()));
/// model::save(&dir, &config, &params.collect::<Vec<_>>())?;
/// assert_eq!(Model::open(&dir)?.config(), &config);
/// # std::fs::remove_dir_all(dir).unwrap();
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn save(dir: &Path, config: &TransformerConfig, params: &[(String, Vec<f32>)]) -> Result<()> {
    let (json, names) = hugging_face::write(config)?;
    let shapes = parameters(config)?;
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = vec![];
    for (name, shape) in &shapes {
        let parts = params.iter().filter(|(n, _)| table_of_part(n).0 == name);
        let values: Vec<f32> = parts.flat_map(|(_, values)| values).copied().collect();
        if values.len() != shape.len() {
            let expected = format!("{} values for {shape}", shape.len());
            return Err(Error::data(name, expected, values.len()));
        }
        let values = halves(config, name, values);
        // The names cover all parts here: `to_hugging_face` has already rejected other models.
        let Some(place) = names.place(name, false) else { continue };
        let (dims, values) = match *shape.dims() {
            [d_in, d_out] if is_linear(name) && !names.input_major => (vec![d_out, d_in], transpose(&values, d_out)),
            _ => (shape.dims().to_vec(), values),
        };
        // The second and third thirds go next to what is already there.
        match tensors.iter_mut().find(|(tensor, ..)| *tensor == place.tensor) {
            Some((_, shape, fused)) => {
                let (cols, width) = (shape[shape.len() - 1], dims[dims.len() - 1]);
                *fused = beside(fused, cols, &values, width);
                shape.pop();
                shape.push(cols + width);
            }
            None => tensors.push((place.tensor, dims, values)),
        }
    }
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let views: Vec<SaveTensor<'_>> =
        (tensors.iter()).map(|(name, shape, values)| SaveTensor { name, shape, values, stored: Stored::F32 }).collect();
    save_safetensors(&dir.join("model.safetensors"), &views, &BTreeMap::new())?;
    let path = dir.join("config.json");
    std::fs::write(&path, format!("{json:#}\n")).map_err(Error::io(&path))
}
