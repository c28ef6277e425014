//! Shapes, gradient and definition, and the methods of graphs.

use std::sync::Arc;

use super::product::Matmul;
use super::tiles::Way;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{FEW_ROWS, Gemv, Launch, Program};
use crate::ops::checks::{expect_f32, expect_shape};
use crate::tensor::TensorType;

const GEMV_ROWS: &str = include_str!("../../../shaders/products/rows.wgsl");
const GEMV_QUADS: &str = include_str!("../../../shaders/products/quads.wgsl");

impl Graph {
    /// `a b`: `[.., k] x [k, n] -> [.., n]`, or matrix by matrix if `b` has more than two dimensions.
    pub fn matmul(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        let batch = self.type_of(name, b)?.shape.rank() > 2;
        self.op1(name, Matmul { batch, ..Matmul::default() }, &[a, b])
    }

    /// `x w + bias`: `[.., d_in] x [d_in, d_out] -> [.., d_out]`. The layout of the weight is that of GPT-2's files; if
    /// yours is `[d_out, d_in]`, as in PyTorch's `Linear`, use [`matmul_nt`](Self::matmul_nt).
    pub fn linear(&mut self, name: &str, x: Value, w: Value, bias: Option<Value>) -> Result<Value> {
        let op = Matmul { bias: bias.is_some(), ..Matmul::default() };
        let inputs: Vec<Value> = [x, w].into_iter().chain(bias).collect();
        self.op1(name, op, &inputs)
    }

    /// `a b^T`: `[.., k] x [n, k] -> [.., n]`: linear layers with PyTorch's layout, and output projections tied to an
    /// embedding.
    pub fn matmul_nt(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        self.op1(name, Matmul { transpose_b: true, ..Matmul::default() }, &[a, b])
    }
}

impl Matmul {
    /// This product without its epilogue, and with other transposes.
    fn form(&self, transpose_a: bool, transpose_b: bool) -> Matmul {
        Matmul { transpose_a, transpose_b, batch: self.batch, ..Matmul::default() }
    }

    /// The gradients of a and b, as far as they come from the product.
    fn product_vjp(&self, cx: &mut Vjp<'_>, dy: Value) -> Result<Option<Value>> {
        let (a, b) = (cx.inputs[0], cx.inputs[1]);
        let (ta, tb) = (self.transpose_a, self.transpose_b);
        if cx.needs(0) {
            let (op, inputs) = if ta { (self.form(tb, true), [b, dy]) } else { (self.form(false, !tb), [dy, b]) };
            let da = cx.graph.op1(&format!("{}.a", cx.name), op, &inputs)?;
            let da = cx.graph.reshape_like(da, a)?;
            cx.set(0, da);
        }
        if !cx.needs(1) {
            return Ok(None);
        }
        let (op, inputs) = if tb { (self.form(true, ta), [dy, a]) } else { (self.form(!ta, false), [a, dy]) };
        let db = cx.graph.op1(&format!("{}.b", cx.name), op, &inputs)?;
        cx.graph.reshape_like(db, b).map(Some)
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, self.inputs())?;
        if self.accumulate_sums && !self.column_sums {
            return Err("there are no column sums to add to".into());
        }
        if self.column_sums && (self.batch || self.transpose_b) {
            return Err("column sums are of one matrix that is not transposed".into());
        }
        let (a, b) = (&inputs[0].shape, &inputs[1].shape);
        let d = self.dims(a, b)?;
        let mut dims = match (self.batch, self.transpose_a) {
            (true, _) => a.dims()[..a.rank() - 2].iter().copied().chain([d.m]).collect(),
            (false, true) => vec![d.m],
            (false, false) => a.lead().to_vec(),
        };
        dims.push(d.n);
        if self.bias {
            expect_shape("the bias", &inputs[2], &[d.n])?;
        }
        if let Some(i) = self.base() {
            expect_shape("the tensor to add to", &inputs[i], &dims)?;
        }
        if let Some(i) = self.base_of_sums() {
            expect_shape("the tensor to add column sums to", &inputs[i], &[d.n])?;
        }
        let sums = self.column_sums.then(|| TensorType::f32([d.n]));
        Ok([TensorType::f32(dims)].into_iter().chain(sums).collect())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dsums = cx.dy.get(1).copied().flatten();
        let dy = if dsums.is_some() { cx.dy[0] } else { Some(cx.dy0()?) };
        let mut db = match dy {
            Some(dy) => self.product_vjp(cx, dy)?,
            None => {
                cx.set_zero(0);
                None
            }
        };
        if let (Some(dsums), true) = (dsums, cx.needs(1)) {
            let shape = cx.graph.ty(cx.inputs[1]).shape.clone();
            let every_k = cx.graph.broadcast(&format!("{}.b_columns", cx.name), dsums, shape)?;
            db = Some(match db {
                Some(db) => cx.graph.residual_add(&format!("{}.b_sum", cx.name), db, every_k)?,
                None => every_k,
            });
        }
        if let Some(db) = db {
            cx.set(1, db);
        }
        if self.bias && cx.needs(2) {
            match dy {
                Some(dy) => {
                    let n = cx.graph.ty(cx.inputs[2]).shape.clone();
                    let dbias = cx.graph.sum_to(&format!("{}.bias", cx.name), dy, n)?;
                    cx.set(2, dbias);
                }
                None => cx.set_zero(2),
            }
        }
        for (base, d) in [(self.base(), dy), (self.base_of_sums(), dsums)] {
            match (base, d) {
                (Some(i), Some(d)) => cx.set(i, d),
                (Some(i), None) => cx.set_zero(i),
                (None, _) => {}
            }
        }
        Ok(())
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        let dims = self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape);
        dims.map_or(vec![], |d| self.ways(&d, cx.profile).into_iter().map(Way::name).collect())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.program(cx)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (a, b) = (inputs[0], inputs[1]);
        // `infer` accepted these shapes, so there are dimensions.
        let Ok(d) = self.dims(&a.shape, &b.shape) else { return vec![] };
        // Both by rows of k, so that each element is a product of two slices.
        let a_rows = if self.transpose_a { transposed(&a.data, d.k, d.m) } else { a.data.clone() };
        let b_cols = if self.transpose_b { b.data.clone() } else { transposed(&b.data, d.k, d.n) };
        let mut y = Array::zeros(outputs[0].shape.clone());
        for (i, out) in y.data.iter_mut().enumerate() {
            let (row, col) = (i / d.n, i / (d.m * d.n) * d.n + i % d.n);
            *out = dot(&a_rows[row * d.k..][..d.k], &b_cols[col * d.k..][..d.k]);
        }
        if self.bias {
            y = y.zip(inputs[2], |y, b| y + b);
        }
        if let Some(i) = self.base() {
            y = y.zip(inputs[i], |y, x| y + x);
        }
        if !self.column_sums {
            return vec![y];
        }
        let mut sums = match self.base_of_sums() {
            Some(i) => inputs[i].clone(),
            None => Array::zeros(outputs[1].shape.clone()),
        };
        for (sum, column) in sums.data.iter_mut().zip(b_cols.chunks_exact(d.k)) {
            *sum += column.iter().sum::<f64>();
        }
        vec![y, sums]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let dims = self.dims(&inputs[0].shape, &inputs[1].shape);
        let sums = if self.column_sums { inputs[1].len() as u64 } else { 0 };
        dims.map_or(0, |d| 2 * (d.batch * d.m * d.n * d.k) as u64 + sums)
    }

    fn gemv(&self, inputs: &[TensorType]) -> Option<Gemv> {
        let d = self.dims(&inputs[0].shape, &inputs[1].shape).ok()?;
        let whole_quads = d.k.is_multiple_of(4) && (self.transpose_b || d.n.is_multiple_of(4));
        if self.batch || self.transpose_a || self.accumulate || self.column_sums || d.m > FEW_ROWS || !whole_quads {
            return None;
        }
        let text = if self.transpose_b { GEMV_ROWS } else { GEMV_QUADS };
        let gemv = Gemv::new::<Self>(text, "vec4<f32>", [d.m, d.n, d.k]);
        Some(Gemv { quads: !self.transpose_b, bias: self.bias, ..gemv })
    }

    fn by_rows(&self, _: &[TensorType]) -> Option<Vec<usize>> {
        let apart = !self.batch && !self.transpose_a && !self.column_sums;
        apart.then(|| [0].into_iter().chain(self.base()).collect())
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        if output == 0 { self.base() } else { self.base_of_sums() }
    }

    fn with_addend(&self, output: usize) -> Option<Arc<dyn Op>> {
        // The input is to be the last, and that of the column sums is the very last.
        let fused = match output {
            0 if !self.accumulate && !self.accumulate_sums => Matmul { accumulate: true, ..*self },
            1 if self.column_sums && !self.accumulate_sums => Matmul { accumulate_sums: true, ..*self },
            _ => return None,
        };
        Some(Arc::new(fused))
    }

    fn with_column_sums(&self, input: usize) -> Option<Arc<dyn Op>> {
        let can = input == 1 && !self.batch && !self.transpose_b && !self.column_sums;
        can.then(|| Arc::new(Matmul { column_sums: true, ..*self }) as Arc<dyn Op>)
    }
}

/// Each `[rows, cols]` matrix of `data`, transposed to `[cols, rows]`.
fn transposed(data: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let matrices = data.chunks_exact(rows * cols);
    matrices.flat_map(|x| (0..cols).flat_map(move |c| (0..rows).map(move |r| x[r * cols + c]))).collect()
}

/// In eight sums, so that the compiler can use vectors.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks(8), b.chunks(8));
    let mut sums = [0.0; 8];
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}
