//! Matrix product with optional transposes, batch, bias and addition to what the output holds.
//!
//! `y = op(a) op(b) + bias`, where `op` may transpose. Backward it is two more matmuls and a sum.

use std::sync::Arc;

use super::{Bind, Case, LaneSource, Launch, Op, Program, Row, expect_f32, expect_shape, lane_source, table_kernel};
use crate::autodiff::Vjp;
use crate::error::Result;
use crate::gpu::AdapterClass;
use crate::graph::{Graph, Value};
use crate::reference::Array;
use crate::tensor::{Shape, TensorType};

const SOURCE: LaneSource = lane_source!("matmul.wgsl");

/// The tile of software adapters: the rows and quads of columns that each lane keeps. Fewer rows
/// where there are fewer, as in decoding. See docs/rejected.md for others.
const ROWS: [usize; 3] = [4, 8, 16];
const QUADS: usize = 2;

pub(super) const ROW: Row = Row {
    name: "matmul",
    summary: "y = op(a) op(b) + bias, op transposes or not; batched; adds to the stream in its epilogue",
    source: SOURCE.plain,
    cases,
    bench: || {
        let square = |n: usize| Case::new(format!("{n}"), Matmul::default(), &[&[n, n], &[n, n]]);
        let form = |name: &str, ta: bool, tb: bool| {
            let op = Matmul { transpose_a: ta, transpose_b: tb, ..Matmul::default() };
            Case::new(format!("512 {name}"), op, &[&[512, 512], &[512, 512]])
        };
        vec![square(256), square(512), square(1024), form("nt", false, true), form("tn", true, false)]
    },
};

fn cases() -> Vec<Case> {
    let plain = Matmul::default();
    let mut cases = Vec::new();
    // (m, n, k): every transpose form on shapes that fit no tile, and one that fits.
    for (m, n, k) in
        [(1, 1, 1), (127, 1, 5), (1, 130, 127), (17, 67, 33), (64, 64, 32), (20, 36, 1757), (4, 68, 13), (7, 5, 8)]
    {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let a = if ta { [k, m] } else { [m, k] };
            let b = if tb { [n, k] } else { [k, n] };
            let form = format!("{m}x{n}x{k} {}{}", if ta { 't' } else { 'n' }, if tb { 't' } else { 'n' });
            let op = Matmul { transpose_a: ta, transpose_b: tb, ..plain };
            cases.push(Case::new(form, op, &[&a, &b]));
        }
    }
    let bias = Matmul { bias: true, ..plain };
    cases.push(Case::new("bias", bias, &[&[3, 5, 24], &[24, 20], &[20]]));
    let add = Matmul { accumulate: true, ..plain };
    cases.push(Case::new("accumulate", add, &[&[3, 5, 24], &[24, 20], &[3, 5, 20]]));
    let both = Matmul { bias: true, accumulate: true, ..plain };
    cases.push(Case::new("bias, accumulate", both, &[&[65, 24], &[24, 33], &[33], &[65, 33]]));
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let op = Matmul { batch: true, transpose_a: ta, transpose_b: tb, ..plain };
        let a: &[usize] = if ta { &[2, 3, 12, 9] } else { &[2, 3, 9, 12] };
        let b: &[usize] = if tb { &[2, 3, 17, 12] } else { &[2, 3, 12, 17] };
        cases.push(Case::new(format!("batch {ta} {tb}"), op, &[a, b]));
    }
    cases
}

/// `(a, b [, bias] [, base]) -> op(a) op(b) + bias + base`.
///
/// Without `batch`, leading dimensions are collapsed into the rows: `a` of `[batch, time, k]` and
/// `b` of `[k, n]` give `[batch, time, n]`. With `batch`, all dimensions but the last two must be
/// equal and each pair of matrices is multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matmul {
    /// `a` is `[k, m]` in memory.
    pub transpose_a: bool,
    /// `b` is `[n, k]` in memory.
    pub transpose_b: bool,
    /// Multiply matrix by matrix over leading dimensions.
    pub batch: bool,
    /// Takes a bias of `[n]` after `b`.
    pub bias: bool,
    /// Takes a tensor of the output's shape last, and adds to it.
    pub accumulate: bool,
}

impl Graph {
    /// `a b`: `[.., k] x [k, n] -> [.., n]`, or matrix by matrix if `b` has more than two
    /// dimensions.
    pub fn matmul(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        let batch = self.ty(b).shape.rank() > 2;
        self.op1(name, Matmul { batch, ..Matmul::default() }, &[a, b])
    }

    /// `x w + bias`: `[.., d_in] x [d_in, d_out] -> [.., d_out]`. The weight is stored input-major,
    /// as GPT-2's files have it.
    pub fn linear(&mut self, name: &str, x: Value, w: Value, bias: Option<Value>) -> Result<Value> {
        let op = Matmul { bias: bias.is_some(), ..Matmul::default() };
        let inputs: Vec<Value> = [x, w].into_iter().chain(bias).collect();
        self.op1(name, op, &inputs)
    }

    /// `a b^T`: `[.., k] x [n, k] -> [.., n]`.
    pub fn matmul_nt(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        self.op1(name, Matmul { transpose_b: true, ..Matmul::default() }, &[a, b])
    }
}

/// Sizes of one product.
struct Dims {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
}

impl Matmul {
    fn dims(&self, a: &Shape, b: &Shape) -> Result<Dims, String> {
        let matrix = |s: &Shape, name: &str| match (self.batch, s.dims()) {
            (true, [.., r, c]) => Ok((*r, *c)),
            (false, [_, ..]) => Ok((s.rows(), s.cols())),
            _ => Err(format!("{name} must have at least two dimensions, got {s}")),
        };
        let (ar, ac) = matrix(a, "a")?;
        let (br, bc) = matrix(b, "b")?;
        let (m, ka) = if self.transpose_a { (ac, ar) } else { (ar, ac) };
        let (kb, n) = if self.transpose_b { (bc, br) } else { (br, bc) };
        if ka != kb {
            return Err(format!("inner dimensions differ: {ka} of a {a} against {kb} of b {b}"));
        }
        let lead = |s: &Shape| s.dims()[..s.rank().saturating_sub(2)].to_vec();
        if self.batch && lead(a) != lead(b) {
            return Err(format!("batch dimensions differ: a {a} against b {b}"));
        }
        let batch = if self.batch { lead(a).iter().product() } else { 1 };
        Ok(Dims { batch, m, n, k: ka })
    }

    /// This product without epilogue, with other transposes.
    fn form(&self, transpose_a: bool, transpose_b: bool) -> Matmul {
        Matmul { transpose_a, transpose_b, batch: self.batch, bias: false, accumulate: false }
    }

    fn extra_inputs(&self) -> usize {
        usize::from(self.bias) + usize::from(self.accumulate)
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

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let d = self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape)?;
        let software = cx.profile.class == AdapterClass::Cpu;
        let (lanes, subgroups) = cx.profile.vector_lanes();
        let rows = ROWS.into_iter().find(|&rows| rows >= d.m).unwrap_or(ROWS[2]);
        let (tile_m, tile_n) = if software { (rows, lanes * QUADS * 4) } else { (64, 64) };
        let groups_n = d.n.div_ceil(tile_n);
        let groups = groups_n * d.m.div_ceil(tile_m);
        let [x, y, _] = cx.profile.grid(groups);
        // Quads run along the contiguous axis, and must not straddle rows.
        let a_quads = (if self.transpose_a { d.m } else { d.k }) % 4 == 0;
        let b_quads = (if self.transpose_b { d.k } else { d.n }) % 4 == 0;
        let elem = |quads: bool| if quads { "vec4<f32>" } else { "f32" };
        let entry = match (software, d.n % 4) {
            (true, 0) => "forward_quads",
            (true, _) => "forward",
            (false, _) => "forward_tiled",
        };
        let source = SOURCE.text(software && subgroups);
        let kernel = table_kernel("matmul", source, entry)
            .knob("A_TRANSPOSED", self.transpose_a)
            .knob("B_TRANSPOSED", self.transpose_b)
            .knob("LANES", lanes as u32)
            .knob("ROWS", rows as u32)
            .knob("QUADS", QUADS as u32)
            .knob("A", elem(a_quads))
            .knob("B", elem(b_quads))
            .knob("A_QUADS", a_quads)
            .knob("B_QUADS", b_quads)
            .knob("K_TAIL", !d.k.is_multiple_of(4));
        let bias = if self.bias { Bind::In(2) } else { Bind::Null };
        let [m, n, k, groups_n, groups] = [d.m, d.n, d.k, groups_n, groups].map(|x| x as u32);
        let words = [m, n, k, groups_n, groups, u32::from(self.bias), u32::from(self.accumulate)];
        let binds = [Bind::In(0), Bind::In(1), bias, Bind::Out(0)];
        Ok(Program::one(kernel, &binds, &words, [x, y, d.batch as u32]))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (a, b) = (inputs[0], inputs[1]);
        // `infer` accepted these shapes, so there are dimensions.
        let Ok(d) = self.dims(&a.shape, &b.shape) else { return vec![] };
        let mut y = Array::zeros(outputs[0].shape.clone());
        for (i, out) in y.data.iter_mut().enumerate() {
            let (z, r, c) = (i / (d.m * d.n), i / d.n % d.m, i % d.n);
            let (a0, b0) = (z * d.m * d.k, z * d.k * d.n);
            let a_at = |k: usize| a.data[a0 + if self.transpose_a { k * d.m + r } else { r * d.k + k }];
            let b_at = |k: usize| b.data[b0 + if self.transpose_b { c * d.k + k } else { k * d.n + c }];
            *out = (0..d.k).map(|k| a_at(k) * b_at(k)).sum();
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

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Matmul { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}
