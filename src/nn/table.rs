//! Tables with a row per token, in as many tensors as a device needs.

use crate::error::Result;
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::ops::packed_i8::Activations;

/// A matrix with a row per token, split into parts if it is too large for one tensor.
#[derive(Clone, Debug)]
pub(super) enum Table {
    Plain(Vec<Value>),
    Packed(Vec<(Value, Packed)>),
}

impl Table {
    /// Looks up rows by id.
    pub fn rows(&self, g: &mut Graph, name: &str, ids: Value) -> Result<Value> {
        match self {
            Table::Plain(parts) => g.embedding_parts(name, parts, ids),
            Table::Packed(parts) => g.packed_rows_parts(name, parts, ids),
        }
    }

    /// The product of `x` with every row.
    pub fn scores(&self, g: &mut Graph, name: &str, x: Value, activations: Activations) -> Result<Value> {
        match self {
            Table::Plain(parts) => g.matmul_nt_parts(name, x, parts),
            Table::Packed(parts) => g.packed_linear_parts_of(name, x, parts, activations),
        }
    }
}
