//! Shapes, gradient and definition, and the methods of graphs.

use std::sync::Arc;

use super::product::Matmul;
use super::tiles::Tile;
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
        Matmul { transpose_a, transpose_b, batch: self.batch, bias: false, accumulate: false }
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2 + self.extra_inputs())?;
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
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[inputs.len() - 1], &dims)?;
        }
        Ok(vec![TensorType::f32(dims)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let (a, b) = (cx.inputs[0], cx.inputs[1]);
        let (ta, tb) = (self.transpose_a, self.transpose_b);
        if cx.needs(0) {
            let (op, inputs) = if ta { (self.form(tb, true), [b, dy]) } else { (self.form(false, !tb), [dy, b]) };
            let da = cx.graph.op1(&format!("{}.a", cx.name), op, &inputs)?;
            let da = cx.graph.reshape_like(da, a)?;
            cx.set(0, da);
        }
        if cx.needs(1) {
            let (op, inputs) = if tb { (self.form(true, ta), [dy, a]) } else { (self.form(!ta, false), [a, dy]) };
            let db = cx.graph.op1(&format!("{}.b", cx.name), op, &inputs)?;
            let db = cx.graph.reshape_like(db, b)?;
            cx.set(1, db);
        }
        if self.bias && cx.needs(2) {
            let n = cx.graph.ty(cx.inputs[2]).shape.clone();
            let dbias = cx.graph.sum_to(&format!("{}.bias", cx.name), dy, n)?;
            cx.set(2, dbias);
        }
        if self.accumulate {
            cx.set(2 + usize::from(self.bias), dy);
        }
        Ok(())
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        let dims = self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape);
        dims.map_or(vec![], |d| self.tiles(&d, cx.profile).into_iter().map(Tile::name).collect())
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
        if self.accumulate {
            y = y.zip(inputs[inputs.len() - 1], |y, x| y + x);
        }
        vec![y]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let dims = self.dims(&inputs[0].shape, &inputs[1].shape);
        dims.map_or(0, |d| 2 * (d.batch * d.m * d.n * d.k) as u64)
    }

    fn gemv(&self, inputs: &[TensorType]) -> Option<Gemv> {
        let d = self.dims(&inputs[0].shape, &inputs[1].shape).ok()?;
        let whole_quads = d.k.is_multiple_of(4) && (self.transpose_b || d.n.is_multiple_of(4));
        if self.batch || self.transpose_a || self.accumulate || d.m > FEW_ROWS || !whole_quads {
            return None;
        }
        let text = if self.transpose_b { GEMV_ROWS } else { GEMV_QUADS };
        let gemv = Gemv::new::<Self>(text, "vec4<f32>", [d.m, d.n, d.k]);
        Some(Gemv { quads: !self.transpose_b, bias: self.bias, ..gemv })
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Matmul { accumulate: true, ..*self }) as Arc<dyn Op>)
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
