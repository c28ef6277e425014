//! A model in files.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::config;
use super::layout::{is_linear, is_table_of_tokens, transpose_into};
use super::names::{Names, Place, Spelling};
use crate::device::{Gpu, PIECE_BYTES, Tensor, Uploads, pieces};
use crate::error::{Error, Result, quoted};
use crate::format::{Packed, Stored, StoredTensor, Weights, quant};
use crate::graph::{Graph, Value};
use crate::hash::fnv1a;
use crate::nn::{Transformer, TransformerConfig, TransformerEncoder, rows_of_part, table_of_part};
use crate::optim::Arena;
use crate::tensor::Shape;

/// Bytes of each tensor that tell a model from others.
const FIRST_BYTES: usize = 1024;

/// A model in files, of which tensors are read when they are asked for.
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
    pub(super) names: &'static Names,
    spelling: Spelling,
    pub(super) params: Vec<(String, Shape)>,
}

impl Model {
    /// Opens a folder or file and checks that all parameters are there, in the shapes that the configuration
    /// says. An `Err` names file and field, or tensor.
    pub fn open(path: &Path) -> Result<Model> {
        Model::new(Weights::open(path)?)
    }

    /// The same for weights that are already open.
    pub fn new(weights: Weights) -> Result<Model> {
        let (mut config, names) = config::read(&weights)?;
        // Each block has several tensors: reject impossible numbers before they cost time.
        let tensors = weights.names().count();
        if config.n_layers > tensors {
            let message = format!("{} blocks, but only {tensors} tensors", config.n_layers);
            return Err(Error::format(weights.path(), message));
        }
        let spelling = Spelling::of(names, weights.names());
        // The graph of a model takes much more memory than a line of a header: look for the blocks before it is built.
        for i in 0..config.n_layers {
            let norm = format!("h.{i}.attn_norm.weight");
            if let Some(place) = spelling.place(names, &norm, |tensor| weights.contains(tensor)) {
                weights.get(&place.tensor)?;
            }
        }
        if config.tied_head && !config.bidirectional {
            config.tied_head = !has_other_head(&weights, names, &spelling)?;
        }
        let params = parameters(&config).map_err(|e| Error::format(weights.path(), e))?;
        let model = Model { weights, config, names, spelling, params };
        let mut used = HashSet::new();
        for (name, shape) in &model.params {
            let (stored, _) = model.find(name, shape)?;
            used.insert(stored.name());
        }
        model.check_unused(&used)?;
        Ok(model)
    }

    /// Returns an error if a tensor belongs to a module of the model, but is none of its parameters: a bias that the
    /// configuration does not know of, a scale of quantised weights, an adapter.
    fn check_unused(&self, used: &HashSet<&str>) -> Result<()> {
        let modules: HashSet<&str> = used.iter().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
        let longest = modules.iter().map(|module| module.len()).max().unwrap_or(0);
        for name in self.weights.names().filter(|name| !used.contains(name)) {
            let parents =
                name.match_indices('.').map(|(at, _)| &name[..at]).take_while(|parent| parent.len() <= longest);
            let inside = parents.into_iter().find(|parent| modules.contains(parent));
            if let Some(module) = inside {
                let message = format!("tensor {}: the model has {}, but not this of it", quoted(name), quoted(module));
                return Err(Error::format(self.weights.path(), message));
            }
        }
        Ok(())
    }

    /// The configuration of the model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// A number that tells this model's weights from others: of names, shapes, formats, and the first elements of each
    /// tensor.
    pub(crate) fn fingerprint(&self) -> Result<u64> {
        let mut hash = fnv1a([]);
        for tensor in self.weights.iter() {
            let header = format!("{} {:?} {}", tensor.name(), tensor.stored(), tensor.shape());
            let first = tensor.part(0..tensor.byte_len().min(FIRST_BYTES))?;
            hash = fnv1a(hash.to_le_bytes().into_iter().chain(header.bytes()).chain(first.iter().copied()));
        }
        Ok(hash)
    }

    /// The files of the model.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Names and shapes of the parameters, as [`nn`](crate::nn) defines them.
    pub fn params(&self) -> &[(String, Shape)] {
        &self.params
    }

    fn shape(&self, name: &str) -> Result<&Shape> {
        let found = self.params.iter().find(|(n, _)| n == name);
        found.map(|(_, shape)| shape).ok_or_else(|| Error::data(name, "a parameter of the model", "another name"))
    }

    /// The stored tensor that holds a parameter, its shape checked, and where in it.
    pub(super) fn find(&self, name: &str, shape: &Shape) -> Result<(StoredTensor<'_>, Place)> {
        let place = self.spelling.place(self.names, name, |tensor| self.weights.contains(tensor)).ok_or_else(|| {
            Error::format(self.weights.path(), format!("files of this kind have no place for `{name}`"))
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

    /// The elements of a parameter, decoded to f32 and in our layout: linear weights are `[d_in, d_out]`.
    ///
    /// # Errors
    ///
    /// [`Error::Format`](crate::Error::Format) if the file is damaged or an element is NaN or infinite.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name)?;
        let mut values = Vec::with_capacity(shape.len());
        for piece in self.pieces(name, 0..shape.rows())? {
            let piece = piece?;
            match piece.len() == shape.len() {
                true => values = piece,
                false => values.extend(piece),
            }
        }
        Ok(values)
    }

    /// Some rows of a parameter, as [`values`](Self::values), in pieces of whole rows that fill a transfer each. What
    /// has to be transposed is one piece, and always whole.
    pub(super) fn pieces(
        &self,
        name: &str,
        rows: Range<usize>,
    ) -> Result<impl Iterator<Item = Result<Vec<f32>>> + use<'_>> {
        let shape = self.shape(name)?;
        let (stored, place) = self.find(name, shape)?;
        let third = place.third.unwrap_or(0);
        let transposed = shape.rank() == 2 && is_linear(name) && !self.names.input_major;
        let len = if transposed { usize::MAX } else { rows_of_a_piece(4 * stored.shape().cols()) };
        Ok(pieces(rows, len).map(move |rows| match transposed {
            true => transposed_rows(&stored, shape.cols() * third, shape.cols()),
            false => {
                let mut values = decoded_rows(&stored, rows)?;
                let (width, cols) = (stored.shape().cols(), shape.cols());
                if width > cols {
                    let part = values.chunks_exact(width).flat_map(|row| &row[third * cols..][..cols]);
                    values = part.copied().collect();
                }
                Ok(values)
            }
        }))
    }

    /// Writes all parameters into an arena, one after another: the first step of fine-tuning. Of a trainer's, say
    /// [`TrainOptions::init`](crate::train::TrainOptions::init) that it need not draw parameters before.
    ///
    /// The file is read piece by piece, and no more than a few pieces are in host memory at a time. Resolves once the
    /// device has been polled, several times for a large model; outside of frames, use
    /// [`load_blocking`](Self::load_blocking).
    pub async fn load(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        self.load_some(gpu, params, |_| true).await
    }

    /// [`load`](Self::load) for the tensors of an arena whose names `wanted` selects.
    pub(crate) async fn load_some(&self, gpu: &Gpu, params: &Arena, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let mut uploads = Uploads::new(gpu);
        let tensors = params.layout.tensors.iter().zip(&params.tensors);
        for ((name, shape), tensor) in tensors.filter(|((name, _), _)| wanted(name)) {
            let (whole, _) = table_of_part(name);
            let dims = self.shape(whole)?;
            let rows = rows_of_part(name, shape, dims)
                .ok_or_else(|| Error::data(name, format!("{dims}, or some rows of it"), shape))?;
            self.write_rows(&mut uploads, tensor, whole, rows).await?;
        }
        uploads.finish()
    }

    /// Writes some rows of a parameter into a tensor of their own.
    pub(super) async fn write_rows(
        &self,
        uploads: &mut Uploads,
        tensor: &Tensor,
        name: &str,
        rows: Range<usize>,
    ) -> Result<()> {
        let mut at = 0;
        for piece in self.pieces(name, rows)? {
            let piece = piece?;
            uploads.write(tensor, at, bytemuck::cast_slice(&piece)).await?;
            at += 4 * piece.len();
        }
        Ok(())
    }

    /// [`load`](Self::load), waiting for the GPU.
    pub fn load_blocking(&self, gpu: &Gpu, params: &Arena) -> Result<()> {
        gpu.run_blocking(self.load(gpu, params))
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

    /// The same without checking the elements.
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

/// Whether a head lies beside the table of tokens that it is said to be, with other elements: then it counts, as in
/// transformers 5.
fn has_other_head(weights: &Weights, names: &Names, spelling: &Spelling) -> Result<bool> {
    let lies = |name: &str| {
        let place = spelling.place(names, name, |tensor| weights.names().any(|n| n == tensor))?;
        weights.names().any(|n| n == place.tensor).then_some(place.tensor)
    };
    match (lies("embed.weight"), lies("head.weight")) {
        (Some(table), Some(head)) => Ok(!weights.get(&table)?.same_elements(&weights.get(&head)?)?),
        _ => Ok(false),
    }
}

/// Rows of so many bytes that fit a transfer: a multiple of four, so that they end at a whole word.
pub(super) fn rows_of_a_piece(row_bytes: usize) -> usize {
    (PIECE_BYTES / row_bytes.max(1) / 4 * 4).max(4)
}

/// Some rows of a tensor, decoded. An `Err` if an element is NaN or infinite.
pub(super) fn decoded_rows(stored: &StoredTensor<'_>, rows: Range<usize>) -> Result<Vec<f32>> {
    let row_bytes = stored.byte_len() / stored.shape().rows();
    let part = rows.start * row_bytes..rows.end * row_bytes;
    quant::dequantize(stored.stored(), &stored.finite_part(part)?)
}

/// The transpose of `count` rows of a tensor, from row `first` on.
fn transposed_rows(stored: &StoredTensor<'_>, first: usize, count: usize) -> Result<Vec<f32>> {
    let cols = stored.shape().cols();
    let mut out = vec![0.0; count * cols];
    for rows in pieces(0..count, rows_of_a_piece(4 * cols)) {
        let values = decoded_rows(stored, first + rows.start..first + rows.end)?;
        transpose_into(&values, cols, &mut out, count, rows.start);
    }
    Ok(out)
}

fn third_of(len: usize, third: Option<usize>) -> Range<usize> {
    let part = third.unwrap_or(0);
    part * len..(part + 1) * len
}

/// Names and shapes of a model's parameters.
pub(super) fn parameters(config: &TransformerConfig) -> Result<Vec<(String, Shape)>> {
    let mut g = Graph::new();
    let params: Vec<Value> = match config.bidirectional {
        true => TransformerEncoder::build(&mut g, config, 1, 1)?.params,
        false => Transformer::build(&mut g, config, 1, 1, false)?.params,
    };
    Ok(params.iter().map(|&p| (g.name(p).to_string(), g.ty(p).shape.clone())).collect())
}
