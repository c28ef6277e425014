//! Models from files: what they are, and their parameters under our names.
//!
//! [`Model::open`] takes a folder as Hugging Face has them (`config.json` and safetensors) or a GGUF file:
//!
//! | files | architectures |
//! |---|---|
//! | Hugging Face | `gpt2`, `llama`, `mistral`, `qwen2`, `qwen3`, `bert` |
//! | GGUF | `llama` (Mistral's too), `qwen2`, `qwen3`, `gpt2` |
//!
//! All of them are one [`TransformerConfig`]. What came from a file decodes ([`crate::decode`]), embeds
//! ([`crate::embed`]), and trains on: [`Model::load`] fills the parameters of a
//! [`Trainer`](crate::train::Trainer). [`save`] writes a folder that PyTorch loads by the same names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::{SaveTensor, Stored, StoredTensor, Weights, save_safetensors};
use crate::gpu::Gpu;
use crate::graph::Graph;
use crate::nn::{Param, Positions, Transformer, TransformerConfig, TransformerEncoder, part_of, table_of_part};
use crate::ops::packed::Packed;
use crate::optim::Arena;
use crate::tensor::Shape;

mod config;
mod names;
mod upload;

pub(crate) use upload::{Placed, Uploaded};

use names::{Names, Place};

/// A model in mapped files.
///
/// ```
/// use throughline::model::Model;
///
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::qwen3();
/// let model = Model::open(folder.path())?; // of a Qwen 3, in safetensors
/// assert!(model.config().qk_norm && model.config().tied_head);
/// let q = model.values("h.0.attn.q.weight")?; // [d_in, d_out], whatever the file has
/// assert_eq!(q.len(), 16 * 16);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    config: TransformerConfig,
    names: &'static Names,
    /// The file has the model without its head, and names without their prefix.
    bare: bool,
    params: Vec<(String, Shape)>,
}

impl Model {
    /// Maps a folder or file and checks that all parameters are there, in the shapes that the configuration
    /// says. An `Err` names file and field, or tensor.
    pub fn open(path: &Path) -> Result<Model> {
        Model::new(Weights::open(path)?)
    }

    /// The same of weights that are open already.
    pub fn new(weights: Weights) -> Result<Model> {
        let (config, names) = config::read(&weights)?;
        // Each block has several tensors: no long work for a number that cannot be.
        if config.n_layers > weights.len() {
            let message = format!("{} blocks, but only {} tensors", config.n_layers, weights.len());
            return Err(Error::Format { path: weights.path().into(), message });
        }
        let params = parameters(&config)?;
        let mut model = Model { weights, config, names, bare: false, params };
        let embedding = names.place("embed.weight", false).map(|p| p.tensor);
        model.bare = embedding.is_some_and(|name| !model.weights.contains(&name));
        for (name, shape) in &model.params {
            model.find(name, shape)?;
        }
        Ok(model)
    }

    /// What it is.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The files.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Names and shapes of the parameters, as [`nn`](crate::nn) has them.
    pub fn params(&self) -> &[(String, Shape)] {
        &self.params
    }

    fn shape(&self, name: &str) -> Result<&Shape> {
        let found = self.params.iter().find(|(n, _)| n == name);
        found.map(|(_, shape)| shape).ok_or_else(|| Error::Data {
            tensor: name.into(),
            expected: "a parameter of the model".into(),
            got: "another name".into(),
        })
    }

    /// The stored tensor that holds a parameter, its shape checked, and where in it.
    fn find(&self, name: &str, shape: &Shape) -> Result<(StoredTensor<'_>, Place)> {
        let place = self.names.place(name, self.bare).ok_or_else(|| Error::Format {
            path: self.weights.path().into(),
            message: format!("files of this kind have no place for `{name}`"),
        })?;
        let thirds = if place.third.is_some() { 3 } else { 1 };
        let expected = match *shape.dims() {
            [d_in, d_out] if is_linear(name) && self.names.input_major => Shape::from([d_in, thirds * d_out]),
            [d_in, d_out] if is_linear(name) => Shape::from([thirds * d_out, d_in]),
            [n] => Shape::from([thirds * n]),
            _ => shape.clone(),
        };
        Ok((self.weights.get(&place.tensor)?.of_shape(expected)?, place))
    }

    /// The elements of a parameter in our order: linear weights are `[d_in, d_out]`. An `Err` if one is NaN or
    /// infinite.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name)?;
        let (stored, place) = self.find(name, shape)?;
        stored.check_finite()?;
        let values = stored.values()?;
        let part = place.third.unwrap_or(0);
        Ok(match *shape.dims() {
            [d_in, d_out] if is_linear(name) && !self.names.input_major => {
                transpose(&values[part * d_in * d_out..][..d_in * d_out], d_in)
            }
            [_, d_out] if place.third.is_some() => {
                values.chunks_exact(3 * d_out).flat_map(|row| &row[part * d_out..][..d_out]).copied().collect()
            }
            _ => values[part * shape.len()..][..shape.len()].to_vec(),
        })
    }

    /// Writes all parameters into an arena of theirs, one after the other.
    pub fn load(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        for (i, (name, shape)) in params.layout.tensors.iter().enumerate() {
            let (whole, _) = table_of_part(name);
            let (values, dims) = (self.values(whole)?, self.shape(whole)?);
            let part = part_of(name, shape, dims.dims(), &values).ok_or_else(|| Error::Data {
                tensor: name.clone(),
                expected: format!("{dims}, or some rows of it"),
                got: shape.to_string(),
            })?;
            params.write_tensor(gpu, i, part)?;
        }
        Ok(())
    }

    /// The parameter as rows of the file, if the kernels can read it as it is stored: matrices in f16, bf16 or
    /// blocks of few bits whose rows are whole blocks.
    pub fn packed(&self, name: &str) -> Result<Option<(Packed, &[u8])>> {
        let Some((matrix, stored, place)) = self.find_packed(name)? else { return Ok(None) };
        stored.check_finite()?;
        Ok(Some((matrix, &stored.bytes()[third_of(matrix.bytes(), place.third)])))
    }

    /// The same without a look at the elements.
    fn find_packed(&self, name: &str) -> Result<Option<(Packed, StoredTensor<'_>, Place)>> {
        let shape = self.shape(name)?;
        let (stored, place) = self.find(name, shape)?;
        let [n, k] = match *shape.dims() {
            [d_in, d_out] if is_linear(name) && !self.names.input_major => [d_out, d_in],
            [rows, cols] if is_table_of_tokens(name) => [rows, cols],
            _ => return Ok(None),
        };
        if stored.stored() == Stored::F32 || !k.is_multiple_of(32) {
            return Ok(None);
        }
        Ok(Some((Packed { stored: stored.stored(), n, k }, stored, place)))
    }
}

fn third_of(len: usize, third: Option<usize>) -> Range<usize> {
    let part = third.unwrap_or(0);
    part * len..(part + 1) * len
}

/// Whether a parameter of two dimensions is a linear layer's, rather than a table of rows.
fn is_linear(name: &str) -> bool {
    !["embed.weight", "head.weight", "position.weight", "token_type.weight"].contains(&name)
}

/// Whether a parameter may be in parts of whole rows.
fn is_table_of_tokens(name: &str) -> bool {
    ["embed.weight", "head.weight"].contains(&name)
}

/// Names and shapes of a model's parameters.
fn parameters(config: &TransformerConfig) -> Result<Vec<(String, Shape)>> {
    let mut g = Graph::new();
    let params: Vec<Param> = match config.bidirectional {
        true => TransformerEncoder::build(&mut g, config, 1, 1)?.params,
        false => Transformer::build(&mut g, config, 1, 1, false)?.params,
    };
    Ok(params.iter().map(|p| (g.name(p.value).to_string(), g.ty(p.value).shape.clone())).collect())
}

/// The transpose of a matrix with rows of `cols`, in tiles that stay in the cache.
fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let rows = x.len() / cols;
    let mut out = vec![0.0; x.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for c in c0..(c0 + TILE).min(cols) {
                for r in r0..(r0 + TILE).min(rows) {
                    out[c * rows + r] = x[r * cols + c];
                }
            }
        }
    }
    out
}

/// Writes a model as a folder of Hugging Face's, `config.json` and `model.safetensors` in f32, that PyTorch's
/// `transformers` and [`Model::open`] load. `params` are names and values as in a trainer's arena.
///
/// An `Err` says which part of the model no architecture of theirs has; see the table of [`crate::model`].
///
/// ```
/// use throughline::model::{self, Model};
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
    let (json, names) = config::to_hugging_face(config)?;
    let shapes = parameters(config)?;
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = vec![];
    for (name, shape) in &shapes {
        let parts = params.iter().filter(|(n, _)| table_of_part(n).0 == name);
        let values: Vec<f32> = parts.flat_map(|(_, values)| values).copied().collect();
        if values.len() != shape.len() {
            let expected = format!("{} values for {shape}", shape.len());
            return Err(Error::Data { tensor: name.clone(), expected, got: values.len().to_string() });
        }
        let values = halves(config, name, values);
        // Places of both kinds of files are known: `to_hugging_face` has seen the parts.
        let Some(place) = names.place(name, false) else { continue };
        let (dims, values) = match *shape.dims() {
            [d_in, d_out] if is_linear(name) && !names.input_major => (vec![d_out, d_in], transpose(&values, d_out)),
            _ => (shape.dims().to_vec(), values),
        };
        // The second and third third go beside what is there.
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
    let io = |path: &Path, source| Error::Io { path: path.display().to_string(), source };
    std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
    let views: Vec<SaveTensor<'_>> =
        (tensors.iter()).map(|(name, shape, values)| SaveTensor { name, shape, values, stored: Stored::F32 }).collect();
    save_safetensors(&dir.join("model.safetensors"), &views, &BTreeMap::new())?;
    let path = dir.join("config.json");
    std::fs::write(&path, format!("{json:#}\n")).map_err(|e| io(&path, e))
}

/// The matrices `a` and `b` side by side, which have rows of `a_cols` and `b_cols`.
fn beside(a: &[f32], a_cols: usize, b: &[f32], b_cols: usize) -> Vec<f32> {
    a.chunks_exact(a_cols).zip(b.chunks_exact(b_cols)).flat_map(|(a, b)| a.iter().chain(b)).copied().collect()
}

/// Values of a parameter for RoPE by halves of a head, if the model's rotates neighbours: columns `2 j` and
/// `2 j + 1` of each head of q and k become `j` and `j + dh / 2`.
fn halves(config: &TransformerConfig, name: &str, values: Vec<f32>) -> Vec<f32> {
    let rotated = ["attn.q.", "attn.k.", "attn.q_norm.", "attn.k_norm."].iter().any(|part| name.contains(part));
    let Positions::Rope { interleaved: true, .. } = config.positions else { return values };
    if !rotated {
        return values;
    }
    let dh = config.head_dim();
    let source = |i: usize| match i % dh {
        j if j < dh / 2 => i - j + 2 * j,
        j => i - j + 2 * (j - dh / 2) + 1,
    };
    (0..values.len()).map(|i| values[source(i)]).collect()
}
