//! The loss of logits of which never all exist at once.
//!
//! Logits are by far the largest tensor of a language model's step: those of 1,024 tokens and GPT-2's vocabulary take
//! 206 MB. But each row of them matters only for its own loss and gradient. So rows go through the output projection,
//! the loss and its gradient in chunks: a plan finishes with one before it begins the next, and nothing is computed
//! twice.

use std::collections::HashMap;
use std::sync::Arc;

use super::cross_entropy::{CrossEntropySum, TargetShare};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value};
use crate::tensor::TensorType;

/// Bytes of logits that trainers of language models have at a time: enough rows for products to be efficient, even with
/// the largest vocabularies.
pub const LOGIT_BYTES: usize = 64 << 20;

/// Chunks have a multiple of this many rows, which suits the tiles of products.
const ALIGN: usize = 32;

/// Ops between the logits and what is cut into chunks, at most. More than any output projection is made of.
const DEPTH: usize = 8;

impl Graph {
    /// [`cross_entropy`](Self::cross_entropy) of `logits` that are computed in chunks of rows, each of at most
    /// `max_bytes`, forward and backward. [`LOGIT_BYTES`] is what trainers take.
    ///
    /// Use it where a vocabulary is large and only the loss is of interest. The logits that it is given are then not
    /// computed, unless something else reads them: the products that they are made of are repeated for each chunk, on
    /// some of the rows. The result is the same up to rounding, in as many operations.
    ///
    /// It adds a plain `cross_entropy` if the logits fit into one chunk, or are not made by products or other ops that
    /// keep rows apart ([`Op::by_rows`]).
    ///
    /// ```
    /// use throughline::{AdapterClass, Graph, Plan, Profile, TensorType};
    /// let mut g = Graph::new();
    /// let hidden = g.input("hidden", TensorType::f32([4, 256, 64]))?;
    /// let table = g.param("table", [50_257, 64])?;
    /// let targets = g.input("targets", TensorType::u32([4, 256]))?;
    /// let logits = g.matmul_nt("logits", hidden, table)?; // 206 MB
    /// let loss = g.cross_entropy_in_chunks("loss", logits, targets, 16 << 20)?;
    /// let gradients = g.gradients(loss, &[table])?;
    /// let plan = Plan::new(&g, &gradients, &Profile::portable(AdapterClass::Gpu))?;
    /// assert!(plan.buffer_bytes() < 100 << 20);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`cross_entropy`](Self::cross_entropy).
    pub fn cross_entropy_in_chunks(
        &mut self,
        name: &str,
        logits: Value,
        targets: Value,
        max_bytes: usize,
    ) -> Result<Value> {
        let ty = self.type_of(name, logits)?.clone();
        self.type_of(name, targets)?;
        let (rows, classes) = (ty.shape.rows(), ty.shape.cols());
        let room = self.max_tensor_bytes().min(max_bytes as u64) / (4 * classes.max(1) as u64);
        let most = (room as usize).max(1);
        let cut = Cut::of(self, logits).filter(|_| rows > most && self.ty(targets).len() == rows);
        let Some(mut cut) = cut else { return self.cross_entropy(name, logits, targets) };

        let even = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(ALIGN);
        let each = if even > most { most } else { even };
        let share = self.op1(&format!("{name}.share"), TargetShare { classes }, &[targets])?;
        let ids = match self.ty(targets).shape.rank() {
            1 => targets,
            _ => self.reshape(&format!("{name}.targets"), targets, [rows])?,
        };
        let mut sum = None;
        for first in (0..rows).step_by(each) {
            let mut chunk = Chunk { cut: &mut cut, first, len: each.min(rows - first), made: HashMap::new() };
            let label = format!("{name}.rows{first}");
            let scores = chunk.rows(self, logits)?;
            let targets = self.slice(&format!("{label}.targets"), ids, 0, first, chunk.len)?;
            let loss = self.op1(&label, CrossEntropySum, &[scores, targets])?;
            sum = Some(match sum {
                None => loss,
                Some(sum) => self.residual_add(&format!("{name}.sum"), sum, loss)?,
            });
        }
        let sum = sum.ok_or_else(|| Error::Graph(format!("`{}`: there are no rows", self.full_name(name))))?;
        self.mul(name, sum, share)
    }
}

/// How logits are made: the nodes to repeat for each chunk, and the inputs that each takes row by row. Other values are
/// cut into rows as they are.
struct Cut {
    repeated: HashMap<usize, (Arc<dyn Op>, Vec<usize>)>,
    /// What is cut into rows, as a matrix.
    matrices: HashMap<Value, Value>,
}

impl Cut {
    fn of(g: &Graph, logits: Value) -> Option<Self> {
        let mut cut = Cut { repeated: HashMap::new(), matrices: HashMap::new() };
        cut.repeat(g, logits, DEPTH).then_some(cut)
    }

    /// Repeats the maker of a value, and of what it is made from where that is smaller. Returns whether that can be.
    fn repeat(&mut self, g: &Graph, value: Value, depth: usize) -> bool {
        let node = g.node(value.node());
        let types: Vec<TensorType> = node.inputs.iter().map(|&v| g.ty(v).clone()).collect();
        let Some(op) = node.op().filter(|_| node.outputs.len() == 1) else { return false };
        let Some(by_rows) = op.by_rows(&types) else { return false };
        let wide = g.ty(value).shape.rank() > 1 && by_rows.iter().all(|&i| types[i].shape.rank() > 1);
        if by_rows.is_empty() || !wide {
            return false;
        }
        for input in by_rows.iter().map(|&i| node.inputs[i]) {
            if depth > 0 && !self.repeated.contains_key(&input.node()) && widens(g, input, depth) {
                self.repeat(g, input, depth - 1);
            }
        }
        self.repeated.insert(value.node(), (op.clone(), by_rows));
        true
    }

    /// A value as a matrix: the same one for all chunks, so that its gradient is a sum in place.
    fn matrix(&mut self, g: &mut Graph, value: Value) -> Result<Value> {
        if let Some(&matrix) = self.matrices.get(&value) {
            return Ok(matrix);
        }
        let shape = g.ty(value).shape.clone();
        let matrix = match shape.rank() {
            2 => value,
            _ => g.reshape(&format!("{}.matrix", g.name(value)), value, [shape.rows(), shape.cols()])?,
        };
        self.matrices.insert(value, matrix);
        Ok(matrix)
    }
}

/// Whether less has to be cut to make a value from its inputs than to cut the value itself.
fn widens(g: &Graph, value: Value, depth: usize) -> bool {
    width(g, value, depth) < g.ty(value).shape.cols()
}

/// The least number of columns to cut for this value.
fn width(g: &Graph, value: Value, depth: usize) -> usize {
    let own = g.ty(value).shape.cols();
    let node = g.node(value.node());
    let Some(op) = node.op().filter(|_| node.outputs.len() == 1 && depth > 0) else { return own };
    let types: Vec<TensorType> = node.inputs.iter().map(|&v| g.ty(v).clone()).collect();
    match op.by_rows(&types) {
        Some(by_rows) if !by_rows.is_empty() => {
            let mut inputs: Vec<Value> = by_rows.iter().map(|&i| node.inputs[i]).collect();
            inputs.sort();
            inputs.dedup();
            own.min(inputs.into_iter().map(|v| width(g, v, depth - 1)).sum())
        }
        _ => own,
    }
}

/// Some of the rows.
struct Chunk<'a> {
    cut: &'a mut Cut,
    first: usize,
    len: usize,
    made: HashMap<Value, Value>,
}

impl Chunk<'_> {
    /// These rows of a value, with as many dimensions as that has: what was made of many is made of some.
    fn rows(&mut self, g: &mut Graph, value: Value) -> Result<Value> {
        if let Some(&made) = self.made.get(&value) {
            return Ok(made);
        }
        let name = format!("{}.rows{}", g.name(value), self.first);
        let made = match self.cut.repeated.get(&value.node()).cloned() {
            Some((op, by_rows)) => {
                let mut inputs = g.node(value.node()).inputs.clone();
                for i in by_rows {
                    inputs[i] = self.rows(g, inputs[i])?;
                }
                g.op_arc(&name, op, &inputs)?[0]
            }
            None => {
                let matrix = self.cut.matrix(g, value)?;
                let rows = g.slice(&name, matrix, 0, self.first, self.len)?;
                let mut dims = vec![1; g.ty(value).shape.rank()];
                dims.splice(dims.len() - 2.., [self.len, g.ty(value).shape.cols()]);
                if dims.len() == 2 { rows } else { g.reshape(&format!("{name}.shaped"), rows, dims)? }
            }
        };
        self.made.insert(value, made);
        Ok(made)
    }
}
