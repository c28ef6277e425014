//! Matrices in parts: those that no binding or buffer holds whole, such as GPT-2's table of tokens, of
//! 154 MB in f32.
//!
//! A part is a tensor with whole rows of the matrix `[rows, k]`, the first ones in the first part. What
//! is here is made of ops of the table, so it is differentiated like them; with one part it gives
//! the nodes of the plain op, and nothing more.

use super::embedding::Embedding;
use super::packed::PackedRows;
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};

impl Graph {
    /// [`embedding`](Self::embedding) from a table in parts `[n0, d], [n1, d], ..`, whose rows have ids from
    /// 0 through: each part gives its rows and zeros for the other ids, and these are added up.
    pub fn embedding_parts(&mut self, name: &str, tables: &[Value], ids: Value) -> Result<Value> {
        if let [table] = tables {
            return self.embedding(name, *table, ids);
        }
        let rows = tables.iter().map(|&t| Ok(self.type_of(name, t)?.shape.rows())).collect::<Result<Vec<_>>>()?;
        self.sum_of_parts(name, &rows, |g, name, i, first| g.op1(name, Embedding { first }, &[tables[i], ids]))
    }

    /// [`packed_rows`](Self::packed_rows) from a packed matrix in parts, as [`Packed::split`] gives them.
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

    /// `x w^T` with `w` in parts `[n0, k], [n1, k], ..`: `[.., k] -> [.., n0 + n1 + ..]`. The products with each
    /// part are put side by side.
    pub fn matmul_nt_parts(&mut self, name: &str, x: Value, parts: &[Value]) -> Result<Value> {
        match parts {
            [w] => self.matmul_nt(name, x, *w),
            _ => self.side_by_side(name, parts.len(), |g, name, i| g.matmul_nt(name, x, parts[i])),
        }
    }

    /// [`packed_linear`](Self::packed_linear) without a bias, with a packed matrix in parts, as
    /// [`Packed::split`] gives them.
    pub fn packed_linear_parts(&mut self, name: &str, x: Value, parts: &[(Value, Packed)]) -> Result<Value> {
        match parts {
            [(w, matrix)] => self.packed_linear(name, x, *w, *matrix, None),
            _ => self
                .side_by_side(name, parts.len(), |g, name, i| g.packed_linear(name, x, parts[i].0, parts[i].1, None)),
        }
    }

    /// The sum of what each part makes, given its index and the id of its first row. The last addition
    /// has the name.
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

    /// What each part makes, given its index, along the last axis.
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
