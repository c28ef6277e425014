//! A model's parameters in GPU memory: the tensors that they become on a device, planned first, then created.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::layout::is_table_of_tokens;
use super::loaded::{Model, rows_of_a_piece};
use crate::device::{Gpu, Tensor, Uploads, pieces};
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::nn::part_name;
use crate::optim::ArenaLayout;
use crate::plan::Plan;
use crate::tensor::{Shape, TensorType, split_rows};

/// The tensors of a model on devices that bind at most this many bytes, known before there is a device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placed {
    params: Vec<PlacedParam>,
    pub max_bytes: u64,
}

#[derive(Clone, Debug, PartialEq)]
struct PlacedParam {
    name: String,
    /// The stored format, if kernels can read it.
    matrix: Option<Packed>,
    /// Name, type and rows of each tensor. A table becomes several if no binding holds it whole.
    parts: Vec<(String, TensorType, usize)>,
}

impl Placed {
    /// Parameters that are already in an arena, with each table in the same parts as in the arena's layout.
    pub fn of_layout(layout: &ArenaLayout) -> Self {
        let param = |(name, shape): &(String, Shape)| PlacedParam {
            name: name.clone(),
            matrix: None,
            parts: vec![(name.clone(), TensorType::f32(shape.clone()), shape.rows())],
        };
        Placed { params: layout.tensors.iter().map(param).collect(), max_bytes: layout.max_bytes }
    }

    /// All but these parameters.
    pub fn without(mut self, leave: impl Fn(&str) -> bool) -> Self {
        self.params.retain(|param| !leave(&param.name));
        self
    }

    /// Whether one of the tensors has this name.
    pub fn contains(&self, tensor: &str) -> bool {
        self.params.iter().flat_map(|param| &param.parts).any(|(part, ..)| part == tensor)
    }

    /// The matrices that keep their stored format.
    pub fn packed(&self) -> BTreeMap<String, Packed> {
        self.params.iter().filter_map(|p| Some((p.name.clone(), p.matrix?))).collect()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.params.iter().flat_map(|p| &p.parts).map(|(_, ty, _)| ty.storage_bytes()).sum()
    }
}

/// A model in GPU memory, for graphs that refer to its parameters by name.
#[derive(Debug, Default)]
pub(crate) struct Uploaded {
    /// By our names; tables in parts have several.
    pub tensors: HashMap<String, Tensor>,
    /// The matrices that keep their stored format.
    pub packed: BTreeMap<String, Packed>,
}

impl Uploaded {
    /// The tensor of each value, found by the value's name.
    pub fn bind(&self, g: &Graph, values: impl Iterator<Item = Value>) -> Result<HashMap<Value, Tensor>> {
        values.map(|v| Ok((v, self.tensor(g.name(v))?))).collect()
    }

    /// The externals of a plan that are among the tensors, by name.
    pub fn bindings(&self, plan: &Plan) -> HashMap<Value, Tensor> {
        plan.externals.iter().filter_map(|e| Some((e.value, self.tensors.get(&e.name)?.clone()))).collect()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let missing = || {
            let advice = "if it has blocks of its own, pass them: `DecodeOptions::block`";
            Error::Graph(format!("the model has no tensor for `{name}`: {advice}"))
        };
        self.tensors.get(name).cloned().ok_or_else(missing)
    }
}

impl Model {
    /// What [`upload`](Self::upload) creates on a device that binds tensors of at most this many bytes.
    pub(crate) fn placed(&self, max_bytes: u64) -> Result<Placed> {
        let params = self.params.iter().map(|(name, shape)| self.place(name, shape, max_bytes));
        Ok(Placed { params: params.collect::<Result<_>>()?, max_bytes })
    }

    fn place(&self, name: &str, shape: &Shape, max_bytes: u64) -> Result<PlacedParam> {
        let matrix = self.find_packed(name)?.map(|(matrix, ..)| matrix);
        let rows: Vec<usize> = match matrix {
            Some(m) if is_table_of_tokens(name) => m.split(max_bytes)?.iter().map(|part| part.n).collect(),
            Some(m) => vec![m.n],
            None if is_table_of_tokens(name) => split_rows(shape.rows(), 4 * shape.cols(), max_bytes)?,
            None => vec![shape.rows()],
        };
        let (mut first, mut parts) = (0, vec![]);
        for &n in &rows {
            let ty = match matrix {
                Some(m) => Packed { n, ..m }.ty(),
                None if rows.len() == 1 => TensorType::f32(shape.clone()),
                None => TensorType::f32([n, shape.cols()]),
            };
            parts.push((part_name(name, first, rows.len()), ty, n));
            first += n;
        }
        Ok(PlacedParam { name: name.into(), matrix, parts })
    }

    /// Uploads all parameters as planned in `placed`, which was made from this model. Decoders and encoders bind the
    /// result. Reads the file piece by piece, and waits for the device where it does not keep up.
    pub(crate) async fn upload(&self, gpu: &Gpu, placed: &Placed) -> Result<Uploaded> {
        let mut uploads = Uploads::new(gpu);
        let mut tensors = HashMap::new();
        for PlacedParam { name, matrix, parts } in &placed.params {
            let mut first = 0;
            for (part, ty, n) in parts {
                let tensor = Tensor::zeros(gpu, part, ty.clone())?;
                match matrix {
                    Some(_) => self.write_packed(&mut uploads, &tensor, name, first..first + n).await?,
                    None => self.write_rows(&mut uploads, &tensor, name, first..first + n).await?,
                }
                tensors.insert(part.clone(), tensor);
                first += n;
            }
        }
        uploads.finish()?;
        Ok(Uploaded { tensors, packed: placed.packed() })
    }

    /// Writes some rows of a matrix into a tensor of their own: the file's bytes, unchanged.
    async fn write_packed(&self, uploads: &mut Uploads, tensor: &Tensor, name: &str, rows: Range<usize>) -> Result<()> {
        let missing = || Error::Graph(format!("`{name}` cannot stay as the file stores it"));
        let (matrix, stored, place) = self.find_packed(name)?.ok_or_else(missing)?;
        let row_bytes = matrix.bytes() / matrix.n;
        let start = place.third.unwrap_or(0) * matrix.bytes();
        for piece in pieces(rows.clone(), rows_of_a_piece(row_bytes)) {
            let mut bytes = stored.finite_part(start + piece.start * row_bytes..start + piece.end * row_bytes)?;
            let words = bytes.len().div_ceil(4);
            if bytes.len() < 4 * words {
                // The last piece of all.
                bytes.to_mut().resize(4 * words, 0);
            }
            uploads.write(tensor, (piece.start - rows.start) * row_bytes, &bytes).await?;
        }
        Ok(())
    }
}
