//! Saving a model as a GGUF file.

use std::collections::HashMap;
use std::path::Path;

use super::companions::tokenizer_metadata;
use super::gguf::FREQUENCIES;
use super::layout::{check_values, is_linear, is_matrix, is_query_or_key, to_neighbours, transpose};
use super::loaded::{Model, decoded_rows, rows_of_a_piece};
use super::to_gguf::{self, Described};
use crate::device::pieces;
use crate::error::{Error, Result, quoted};
use crate::format::{GgufTensor, GgufWriter, Metadata, Stored, StoredTensor};
use crate::tensor::Shape;

/// The types of the tensors in a GGUF file, for [`Model::save_gguf`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TensorTypes {
    /// Those of the model's own file. Norms, biases and positions of a folder become f32, as llama.cpp has them.
    #[default]
    Keep,
    /// One type for all matrices, the tables of tokens included, and f32 for norms, biases and positions.
    ///
    /// Of a matrix whose rows are not whole blocks of the type, llama.cpp's substitute is taken: Q5_0 for Q4_K, Q5_1 for
    /// Q5_K, Q8_0 for Q6_K; or else f16.
    Matrices(Stored),
}

impl TensorTypes {
    /// The type of a tensor that now has the type `kept`.
    fn of(self, is_matrix: bool, cols: usize, kept: Stored) -> Stored {
        match self {
            TensorTypes::Keep => kept,
            TensorTypes::Matrices(_) if !is_matrix => Stored::F32,
            TensorTypes::Matrices(stored) => fitting(stored, cols),
        }
    }
}

/// The type, or what llama.cpp takes instead for rows that are not whole blocks of it.
fn fitting(stored: Stored, cols: usize) -> Stored {
    let smaller = match stored {
        Stored::Q4_K => Stored::Q5_0,
        Stored::Q5_K => Stored::Q5_1,
        Stored::Q6_K => Stored::Q8_0,
        other => other,
    };
    let fits = |stored: &Stored| cols.is_multiple_of(stored.block_len());
    [stored, smaller].into_iter().find(fits).unwrap_or(Stored::F16)
}

impl Model {
    /// Saves this model as a GGUF file, which [`Model::open`](Self::open), llama.cpp and all that builds on it load.
    ///
    /// `values` gives the elements of parameters that have changed, by the names and in the layout of
    /// [`values`](Self::values), and `None` for those that have not: the weights with an adapter merged in, say, or
    /// those of a checkpoint. It is asked once for each parameter. A tensor that stays what it is, in the type that it
    /// has, is copied byte for byte. No more than one tensor is in host memory at a time, and only in pieces if nothing
    /// of it has changed.
    ///
    /// Of a GGUF file, all metadata and all tensors are kept; with [`TensorTypes::Matrices`], `general.file_type` says
    /// the new type. A folder's configuration, tokenizer and chat template are converted: to the architectures `gpt2`,
    /// `llama` (Mistral's models, too), `qwen2` and `qwen3`, with q and k in the order of rows that these have. It may
    /// be the model's own file that is replaced.
    ///
    /// # Errors
    ///
    /// If no architecture of GGUF files has all parts of the model; if such files cannot say how its tokenizer splits
    /// text, or the feature `tokenizers` is off and the folder has one; if a tensor's type is only read, and it would
    /// have to be encoded; if there are other values than a parameter has elements, or some that are NaN, infinite or
    /// too large for the type; or if the file cannot be written. A file that was there before then stays as it was.
    ///
    /// ```
    /// use throughline::format::Stored;
    /// use throughline::model::{Model, TensorTypes};
    ///
    /// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
    /// # let (folder, out) = (doctest::qwen3(), tempfile::tempdir().unwrap());
    /// # let path = out.path().join("model.gguf");
    /// let model = Model::open(folder.path())?;
    /// model.save_gguf(&path, TensorTypes::Matrices(Stored::BF16), |name| {
    ///     // Everything as it was, but for one norm.
    ///     Ok((name == "norm_f.weight").then(|| vec![1.0; 16]))
    /// })?;
    /// let saved = Model::open(&path)?;
    /// assert_eq!(saved.values("norm_f.weight")?, [1.0; 16]);
    /// assert_eq!(saved.weights().get("blk.0.attn_q.weight")?.stored(), Stored::BF16);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn save_gguf(
        &self,
        path: &Path,
        types: TensorTypes,
        mut values: impl FnMut(&str) -> Result<Option<Vec<f32>>>,
    ) -> Result<()> {
        let plan = match self.weights().config() {
            Some(_) => Export::of_folder(self, types)?,
            None => Export::of_gguf(self, types)?,
        };
        let described = plan.tensors.iter().map(|tensor| tensor.target.clone()).collect();
        let mut file = GgufWriter::create(path, &plan.metadata, described)?;
        for tensor in &plan.tensors {
            let changed = tensor.params.iter().map(|(name, shape)| {
                let changed = values(name)?;
                changed.as_deref().map_or(Ok(()), |values| check_values(name, shape, values))?;
                Ok(changed)
            });
            let changed = changed.collect::<Result<Vec<_>>>()?;
            match &tensor.source {
                Source::Rows(rows) if changed.iter().all(Option::is_none) => {
                    copy_rows(&mut file, rows, tensor.target.stored)?;
                }
                Source::Made(values) => file.write_values(values)?,
                _ => {
                    for ((name, shape), changed) in tensor.params.iter().zip(changed) {
                        let values = changed.map_or_else(|| self.values(name), Ok)?;
                        let values = plan.in_rows(name, shape, values);
                        file.write_values(&values)?;
                    }
                }
            }
        }
        file.finish()
    }
}

/// A model's file before it is written.
struct Export<'a> {
    metadata: Metadata,
    tensors: Vec<Exported<'a>>,
    /// The width of heads, if the rows of q and k change their order.
    permuted: Option<usize>,
}

/// A tensor of the file.
struct Exported<'a> {
    target: GgufTensor,
    /// The parameters in it, from the first row to the last.
    params: Vec<(String, Shape)>,
    source: Source<'a>,
}

/// Where the elements of a tensor come from if its parameters have not changed.
enum Source<'a> {
    /// A tensor with the same rows.
    Rows(StoredTensor<'a>),
    /// Its parameters.
    Params,
    /// Computed for the file.
    Made(Vec<f32>),
}

impl<'a> Export<'a> {
    /// All that the model's own file has.
    fn of_gguf(model: &'a Model, types: TensorTypes) -> Result<Self> {
        let weights = model.weights();
        if let Some((name, ty)) = weights.unread().first() {
            let message = format!("tensor {} is {ty}, which this crate cannot copy", quoted(name));
            return Err(Error::format(weights.path(), message));
        }
        let mut params: HashMap<&str, Vec<(String, Shape)>> = HashMap::new();
        for (name, shape) in &model.params {
            let (stored, _) = model.find(name, shape)?;
            params.entry(stored.name()).or_default().push((name.clone(), shape.clone()));
        }
        let tensors = weights.iter().map(|tensor| {
            let params = params.remove(tensor.name()).unwrap_or_default();
            let stored = match params.first() {
                Some((name, shape)) => types.of(is_matrix(name, shape.rank()), tensor.shape().cols(), tensor.stored()),
                None => tensor.stored(),
            };
            let target = GgufTensor { name: tensor.name().into(), stored, shape: tensor.shape().clone() };
            Exported { target, params, source: Source::Rows(tensor) }
        });
        let tensors = tensors.collect();
        let mut metadata = weights.metadata().clone();
        if let TensorTypes::Matrices(stored) = types {
            to_gguf::set_file_type(&mut metadata, stored);
        }
        Ok(Export { metadata, tensors, permuted: None })
    }

    /// What a GGUF file has of a folder's model.
    fn of_folder(model: &'a Model, types: TensorTypes) -> Result<Self> {
        let config = model.config();
        let Described { mut metadata, names, permuted, frequencies } = to_gguf::write(config)?;
        let permuted = permuted.then(|| config.head_dim());
        let mut groups: Vec<(String, Vec<(String, Shape)>)> = vec![];
        for (name, shape) in &model.params {
            let place = names.place(name, false);
            let place = place.ok_or_else(|| Error::data(name, "a parameter that such files have", "another one"))?;
            let param = (name.clone(), shape.clone());
            match groups.iter_mut().find(|(tensor, _)| *tensor == place.tensor) {
                // Queries, keys and values come in this order.
                Some((_, params)) => params.push(param),
                None => groups.push((place.tensor, vec![param])),
            }
        }
        let tensors = groups.into_iter().map(|(name, params)| exported(model, types, permuted.is_some(), name, params));
        let mut tensors = tensors.collect::<Result<Vec<_>>>()?;
        if let Some(divisors) = frequencies {
            let shape = Shape::from([divisors.len()]);
            let target = GgufTensor { name: FREQUENCIES.into(), stored: Stored::F32, shape };
            tensors.push(Exported { target, params: vec![], source: Source::Made(divisors) });
        }
        if let Some(name) = Path::new(model.weights().path()).file_name().and_then(|name| name.to_str()) {
            metadata.set("general.name", name);
        }
        let of_a_layer =
            |tensor: &&Exported<'_>| tensor.params.iter().any(|(name, s)| is_linear(name) && s.rank() == 2);
        if let Some(matrix) = tensors.iter().find(of_a_layer) {
            let stored = if let TensorTypes::Matrices(stored) = types { stored } else { matrix.target.stored };
            to_gguf::set_file_type(&mut metadata, stored);
        }
        for (key, value) in tokenizer_metadata(model)?.iter() {
            metadata.set(key, value.clone());
        }
        Ok(Export { metadata, tensors, permuted })
    }

    /// The elements of a parameter as the rows of its tensor, or some of them.
    fn in_rows(&self, name: &str, shape: &Shape, values: Vec<f32>) -> Vec<f32> {
        let values = match self.permuted {
            Some(head_dim) if is_query_or_key(name) => to_neighbours(head_dim, &values),
            _ => values,
        };
        match *shape.dims() {
            [_, d_out] if is_linear(name) => transpose(&values, d_out),
            _ => values,
        }
    }
}

/// A tensor with these parameters of a folder's model.
fn exported(
    model: &Model,
    types: TensorTypes,
    permuted: bool,
    name: String,
    params: Vec<(String, Shape)>,
) -> Result<Exported<'_>> {
    let found = params.iter().map(|(name, shape)| Ok(model.find(name, shape)?.0)).collect::<Result<Vec<_>>>()?;
    let (Some((first, shape)), Some(stored)) = (params.first(), found.first().copied()) else {
        return Err(Error::data(name, "a parameter", "none"));
    };
    let is_linear = is_linear(first) && shape.rank() == 2;
    let mut dims = shape.dims().to_vec();
    if is_linear {
        dims.reverse();
    }
    dims[0] *= params.len();
    let shape = Shape::from(dims);
    let is_matrix = is_matrix(first, shape.rank());
    let ty = types.of(is_matrix, shape.cols(), if is_matrix { stored.stored() } else { Stored::F32 });
    let reordered = permuted && is_query_or_key(first) || is_linear && model.names.input_major;
    let whole = *stored.shape() == shape && found.iter().all(|other| other.name() == stored.name());
    let source = if whole && !reordered { Source::Rows(stored) } else { Source::Params };
    Ok(Exported { target: GgufTensor { name, stored: ty, shape }, params, source })
}

/// Writes all rows of a tensor in another type, or its bytes if that is the one that it has.
fn copy_rows(file: &mut GgufWriter, tensor: &StoredTensor<'_>, stored: Stored) -> Result<()> {
    let shape = tensor.shape();
    for rows in pieces(0..shape.rows(), rows_of_a_piece(4 * shape.cols())) {
        if tensor.stored() == stored {
            let row_bytes = tensor.byte_len() / shape.rows();
            file.write(&tensor.part(rows.start * row_bytes..rows.end * row_bytes)?)?;
        } else {
            file.write_values(&decoded_rows(tensor, rows)?)?;
        }
    }
    Ok(())
}
