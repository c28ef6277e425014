//! Matrices in parts.
//!
//! No binding or buffer may be large enough for a whole table: GPT-2's token table is 154 MB in f32, and WebGPU's
//! default limit for a binding is 128 MiB. Such a matrix is split by rows. Each part is a tensor with whole rows of the
//! matrix `[rows, k]`, the first part with the first rows.
//!
//! The methods are composed of ops of the table, so their gradients follow from those. With one part they add the nodes
//! of the plain op and nothing else.

use super::embedding::Embedding;
use super::packed::PackedRows;
use super::packed_i8::Activations;
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};

impl Graph {
    /// Looks up rows of a table that is split into parts `[n0, d], [n1, d], ..`: `u32 [..] -> [.., d]`.
    ///
    /// Use it instead of [`embedding`](Self::embedding) for tables larger than the device's binding limit. Ids count
    /// through all parts, from 0. Each part contributes its own rows and zeros for all other ids, and the contributions
    /// are added up.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] without any part, or with shapes that do not match.
    pub fn embedding_parts(&mut self, name: &str, tables: &[Value], ids: Value) -> Result<Value> {
        if let [table] = tables {
            return self.embedding(name, *table, ids);
        }
        let rows = tables.iter().map(|&t| Ok(self.type_of(name, t)?.shape.rows())).collect::<Result<Vec<_>>>()?;
        self.sum_of_parts(name, &rows, |g, name, i, first| g.op1(name, Embedding { first }, &[tables[i], ids]))
    }

    /// [`packed_rows`](Self::packed_rows) from a packed matrix in parts, as returned by [`Packed::split`].
    pub fn packed_rows_parts(&mut self, name: &str, parts: &[(Value, Packed)], ids: Value) -> Result<Value> {
        if let [(w, matrix)] = parts {
            return self.packed_rows(name, *w, *matrix, ids);
        }
        let rows: Vec<usize> = parts.iter().map(|(_, matrix)| matrix.n).collect();
        self.sum_of_parts(name, &rows, |g, name, i, first| {
            let (w, matrix) = parts[i];
            g.op1(name, PackedRows { matrix, first }, &[w, ids])
        })
    }

    /// `x w^T` with `w` in parts `[n0, k], [n1, k], ..`: `[.., k] -> [.., n0 + n1 + ..]`.
    ///
    /// Use it for an output projection larger than the device's binding limit. The products with the parts are
    /// concatenated along the last axis.
    pub fn matmul_nt_parts(&mut self, name: &str, x: Value, parts: &[Value]) -> Result<Value> {
        match parts {
            [w] => self.matmul_nt(name, x, *w),
            _ => self.side_by_side(name, parts.len(), |g, name, i| g.matmul_nt(name, x, parts[i])),
        }
    }

    /// [`packed_linear`](Self::packed_linear) without a bias, with a packed matrix in parts as returned by
    /// [`Packed::split`].
    pub fn packed_linear_parts(&mut self, name: &str, x: Value, parts: &[(Value, Packed)]) -> Result<Value> {
        self.packed_linear_parts_of(name, x, parts, Activations::F32)
    }

    /// [`packed_linear_parts`](Self::packed_linear_parts) with these activations.
    pub(crate) fn packed_linear_parts_of(
        &mut self,
        name: &str,
        x: Value,
        parts: &[(Value, Packed)],
        activations: Activations,
    ) -> Result<Value> {
        let product = |g: &mut Graph, name: &str, i: usize| {
            let (w, matrix) = parts[i];
            g.packed_linear_of(name, [x, w], matrix, None, activations)
        };
        match parts.len() {
            1 => product(self, name, 0),
            n => self.side_by_side(name, n, product),
        }
    }

    /// The sum of what `make` returns for each part, given the part's index and the id of its first row. The last
    /// addition gets the name `name`.
    fn sum_of_parts(
        &mut self,
        name: &str,
        rows: &[usize],
        mut make: impl FnMut(&mut Graph, &str, usize, usize) -> Result<Value>,
    ) -> Result<Value> {
        let (mut sum, mut first) = (None, 0);
        for (i, n) in rows.iter().enumerate() {
            let part = make(self, &format!("{name}.part{i}"), i, first)?;
            first += n;
            sum = Some(match sum {
                None => part,
                Some(sum) if i + 1 == rows.len() => self.residual_add(name, sum, part)?,
                Some(sum) => self.residual_add(&format!("{name}.sum"), sum, part)?,
            });
        }
        sum.ok_or_else(|| self.no_parts(name))
    }

    /// What `make` returns for each part, given the part's index, concatenated along the last axis.
    fn side_by_side(
        &mut self,
        name: &str,
        n: usize,
        mut make: impl FnMut(&mut Graph, &str, usize) -> Result<Value>,
    ) -> Result<Value> {
        let made = (0..n).map(|i| make(self, &format!("{name}.part{i}"), i)).collect::<Result<Vec<_>>>()?;
        let Some(&y) = made.first() else { return Err(self.no_parts(name)) };
        let axis = self.ty(y).shape.rank() - 1;
        self.concat(name, &made, axis)
    }

    fn no_parts(&self, name: &str) -> Error {
        Error::Graph(format!("`{}`: a matrix in parts needs at least one part, got none", self.full_name(name)))
    }
}
