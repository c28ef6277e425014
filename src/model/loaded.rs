//! A model in files.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use super::config;
use super::layout::{is_linear, is_table_of_tokens, transpose};
use super::names::{Names, Place};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::format::{Packed, Stored, StoredTensor, Weights, quant};
use crate::graph::Graph;
use crate::nn::{Param, Transformer, TransformerConfig, TransformerEncoder, part_of, table_of_part};
use crate::optim::Arena;
use crate::tensor::Shape;

/// A model in files, of which tensors are read when they are asked for.
///
/// ```
/// use throughline::format::Weights;
/// use throughline::model::Model;
///
/// let model = Model::open("tests/data/hf/qwen3".as_ref())?;
/// assert!(model.config().qk_norm && model.config().tied_head);
/// let q = model.values("h.0.attn.q.weight")?; // [d_in, d_out], whatever the file has
/// assert_eq!(q.len(), 32 * 64);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    config: TransformerConfig,
    names: &'static Names,
    /// The file has the model without its head, and names without their prefix.
    bare: bool,
    pub(super) params: Vec<(String, Shape)>,
}

impl Model {
    /// Opens a folder or file and checks that all parameters are there, in the shapes that the configuration
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
        let values = quant::dequantize(stored.stored(), &stored.finite_bytes()?)?;
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
    pub fn packed(&self, name: &str) -> Result<Option<(Packed, Cow<'_, [u8]>)>> {
        let Some((matrix, stored, place)) = self.find_packed(name)? else { return Ok(None) };
        let third = third_of(matrix.bytes(), place.third);
        Ok(Some(match stored.finite_bytes()? {
            Cow::Borrowed(bytes) => (matrix, Cow::Borrowed(&bytes[third])),
            Cow::Owned(mut bytes) => {
                bytes.truncate(third.end);
                bytes.drain(..third.start);
                (matrix, Cow::Owned(bytes))
            }
        }))
    }

    /// The same without a look at the elements.
    pub(super) fn find_packed(&self, name: &str) -> Result<Option<(Packed, StoredTensor<'_>, Place)>> {
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

/// Names and shapes of a model's parameters.
pub(super) fn parameters(config: &TransformerConfig) -> Result<Vec<(String, Shape)>> {
    let mut g = Graph::new();
    let params: Vec<Param> = match config.bidirectional {
        true => TransformerEncoder::build(&mut g, config, 1, 1)?.params,
        false => Transformer::build(&mut g, config, 1, 1, false)?.params,
    };
    Ok(params.iter().map(|p| (g.name(p.value).to_string(), g.ty(p.value).shape.clone())).collect())
}
