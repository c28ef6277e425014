//! Products with a matrix that each sequence chooses by id, and the gradient of those matrices.
//!
//! `y[s] = x[s] w[ids[s]]`: rows of `x` that have one id go through one matrix of the stack `w`. It is what a batch of
//! sequences with an adapter of its own for each needs (Chen et al. 2023, <https://arxiv.org/abs/2310.18547>), and a
//! mixture of experts, with an id for each token; ggml calls it `mul_mat_id`. An id without a matrix gives rows of zeros
//! and passes no gradient, as in [`embedding`](super::embedding). Backward, `dw[i]` is the sum of `x[s]^T dy[s]` where
//! `ids[s] = i`, added in a fixed order: the same bits on every run.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_ids, expect_shape};
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

macro_rules! source {
    ($file:literal) => {
        lane_source!(
            "matmul/quads.wgsl",
            "matmul/columns.wgsl",
            "matmul/reduce.wgsl",
            "matmul_by_id/shared.wgsl",
            $file
        )
    };
}
const FORWARD: LaneSource = source!("matmul_by_id/forward.wgsl");
const BACKWARD: LaneSource = source!("matmul_by_id/backward.wgsl");

pub(super) const ROW: Row = Row {
    name: "matmul_by_id",
    summary: "y[s] = x[s] w[ids[s]]; ids out of range give zeros",
    sources: &[FORWARD.plain, BACKWARD.plain],
    cases,
    bench,
};

/// A product of `x` with `count` matrices `[k, n]`, by ids below `below`: above the count, some have no matrix.
fn forward(x: &[usize], ids: &[usize], [count, n]: [usize; 2], transpose: bool, below: u32) -> Case {
    let k = x[x.len() - 1];
    let w = if transpose { [count, n, k] } else { [count, k, n] };
    let name = format!("{x:?} by {ids:?} of {count} {k}x{n}{}", if transpose { " nt" } else { "" });
    Case::new(name, MatmulById { transpose, accumulate: false }, &[x, &w]).ids(ids, below)
}

fn backward(x: &[usize], ids: &[usize], [count, n]: [usize; 2], below: u32, accumulate: bool) -> Case {
    let (lead, k) = (&x[..x.len() - 1], x[x.len() - 1]);
    let name = format!("backward of {count} {k}x{n} from {x:?} by {ids:?}, accumulate {accumulate}");
    let op = MatmulByIdBackward { count, accumulate };
    let case = Case::new(name, op, &[x, &[lead, &[n]].concat()]).ids(ids, below);
    if accumulate { case.also(&[count, k, n]) } else { case }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for transpose in [false, true] {
        cases.extend([
            forward(&[1, 1, 1], &[1], [1, 1], transpose, 1),
            // To few columns and from few elements, with and without whole quads, of one row and several.
            forward(&[3, 1, 576], &[3], [2, 8], transpose, 3),
            forward(&[3, 1, 8], &[3], [2, 576], transpose, 3),
            forward(&[5, 127], &[5], [3, 5], transpose, 4),
            forward(&[4, 2, 5], &[4], [3, 127], transpose, 4),
            forward(&[2, 19, 1757], &[2], [4, 13], transpose, 5),
            forward(&[3, 33, 12], &[3], [2, 260], transpose, 2),
            forward(&[2, 3, 64], &[2], [2, 68], transpose, 3),
            forward(&[2, 5, 36], &[2, 5], [3, 20], transpose, 4), // an id for each row
        ]);
    }
    let add = |x: &[usize], ids: &[usize], n: usize| {
        let case = forward(x, ids, [3, n], false, 4);
        let op = MatmulById { transpose: false, accumulate: true };
        let y = [&x[..x.len() - 1], &[n]].concat();
        Case { name: format!("{}, accumulate", case.name), op: Arc::new(op), ..case }.also(&y)
    };
    cases.extend([add(&[4, 1, 16], &[4], 96), add(&[2, 3, 4, 70], &[2], 7), add(&[2, 9, 260], &[2], 12)]);
    let none = forward(&[3, 4, 20], &[3], [2, 36], false, 2);
    cases.push(Case { name: format!("{}, none", none.name), ..none.fill(2, InputFill::Constant(4294967295.0)) });
    cases.extend([
        backward(&[1, 1, 1], &[1], [1, 1], 1, false),
        backward(&[3, 5, 127], &[3], [2, 5], 3, true),
        backward(&[3, 70, 8], &[3], [4, 132], 5, false),
        backward(&[2, 300, 36], &[2], [2, 20], 2, true),
        backward(&[77, 6], &[77], [3, 9], 4, false),
    ]);
    cases
}

fn bench() -> Vec<Case> {
    // An adapter for each sequence: down to the rank and up again, for a token and for a prompt.
    let pair = |batch: usize, time: usize, k: usize, rank: usize, n: usize| {
        let down = forward(&[batch, time, k], &[batch], [8, rank], false, 8);
        [down, forward(&[batch, time, rank], &[batch], [8, n], false, 8)]
    };
    let pairs = [(1, 1, 576, 8, 1536), (8, 1, 4096, 16, 4096), (64, 1, 2048, 64, 8192), (4, 128, 2048, 16, 2048)];
    let mut cases: Vec<Case> = pairs.into_iter().flat_map(|(b, t, k, r, n)| pair(b, t, k, r, n)).collect();
    cases.push(backward(&[4, 256, 576], &[4], [4, 16], 4, false));
    cases
}

/// `(x, w, ids [, base]) -> x w[ids] [+ base]`: `[.., k], [count, k, n], u32 [..] -> [.., n]`. Zeros for ids without a
/// matrix. Usually added by [`Graph::matmul_by_id`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MatmulById {
    /// Whether the matrices are `[n, k]` in memory.
    pub transpose: bool,
    /// Whether a last input, of the output's shape, is added to the result.
    pub accumulate: bool,
}

/// `(x, dy, ids [, base]) -> dw [+ base]`: `[.., k], [.., n], u32 [..] -> [count, k, n]`. Matrices without an id are zero,
/// or those of `base`. The gradient of [`MatmulById`].
#[derive(Clone, Copy, Debug)]
pub struct MatmulByIdBackward {
    count: usize,
    accumulate: bool,
}

impl Graph {
    /// `x` times a matrix of a stack by id: `x` `[.., k]`, `w` `[count, k, n]`, result `[.., n]`. The shape of `ids`, u32,
    /// is the beginning of that of `x`: `[batch]` for one matrix per sequence of `x` `[batch, time, k]`, `[batch, time]`
    /// for one per token.
    ///
    /// Use it where rows of one batch belong to different models: adapters, experts, heads for several tasks. Ids of
    /// `count` or more give zeros and pass no gradient, so such ids can stand for "none".
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([3, 20, 64]))?;
    /// let experts = g.param("experts", [8, 64, 96])?;
    /// let chosen = g.input("chosen", TensorType::u32([3]))?;
    /// let y = g.matmul_by_id("y", x, experts, chosen)?;
    /// assert_eq!(g.ty(y), &TensorType::f32([3, 20, 96]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn matmul_by_id(&mut self, name: &str, x: Value, w: Value, ids: Value) -> Result<Value> {
        self.op1(name, MatmulById::default(), &[x, w, ids])
    }
}

/// Sizes of the products of a launch: `sequences` of `rows` each have one id.
#[derive(Clone, Copy)]
struct Dims {
    sequences: usize,
    rows: usize,
    count: usize,
    k: usize,
    n: usize,
}

/// How many rows have one id, for rows of this type and these ids.
fn rows_by_id(x: &TensorType, ids: &TensorType) -> Result<usize, String> {
    expect_ids(ids)?;
    match x.shape.lead().starts_with(ids.shape.dims()) {
        true => Ok(x.shape.rows() / ids.len()),
        false => Err(format!(
            "the shape of ids must be the beginning of {}, the shape of x without its last dimension: got {}",
            TensorType::f32(x.shape.lead()).shape,
            ids.shape
        )),
    }
}

/// What a workgroup makes: `rows` of a sequence by `lanes` times so many `quads` of columns, each by `slices`
/// invocations.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    lanes: usize,
    slices: usize,
    rows: usize,
    quads: usize,
}

/// The most invocations of a workgroup on a GPU, and for tiles of many rows, which take much workgroup memory.
const GROUP: usize = 256;
const GROUP_OF_MANY_ROWS: usize = 64;

/// The fewest that are worth a workgroup of their own.
const LEAST_GROUP: usize = 32;

/// The most rows of a tile.
const MOST_ROWS: usize = 8;

/// Rows of an invocation of the backward pass, as in the WGSL.
const BLOCK: usize = 4;

impl Tile {
    fn name(self) -> String {
        format!("{}x{} {} rows", self.lanes, self.slices, self.rows)
    }

    /// Workgroups along the rows of a sequence, and along n.
    fn groups(self, d: &Dims) -> [usize; 2] {
        [d.rows.div_ceil(self.rows), d.n.div_ceil(4 * self.lanes * self.quads)]
    }

    fn count(self, d: &Dims) -> usize {
        d.sequences * self.groups(d).iter().product::<usize>()
    }

    /// The tiles worth trying. The first is used if nothing was measured.
    fn of(d: &Dims, profile: &Profile) -> Vec<Tile> {
        let rows = d.rows.next_power_of_two().min(MOST_ROWS);
        let (across, along) = (d.n.div_ceil(4), d.k.div_ceil(4));
        if profile.class == AdapterClass::Cpu {
            let (vector, shuffles) = profile.vector_lanes();
            let lanes = across.next_power_of_two().min(vector);
            // Rows of x that lanes can't hand round, each of them would load for itself.
            let rows = if shuffles && lanes == vector { rows.min(vector) } else { rows.min(4) };
            let quads = if across >= 2 * vector { 2 } else { 1 };
            return vec![Tile { lanes, slices: vector / lanes, rows, quads }];
        }
        let most = if rows > 2 { GROUP_OF_MANY_ROWS } else { GROUP }.min(profile.max_invocations as usize);
        let mut tiles: Vec<Tile> = vec![];
        let mut lanes = across.next_power_of_two().min(64);
        while lanes > 0 {
            let slices = (most / lanes).clamp(1, along.next_power_of_two());
            if tiles.is_empty() || lanes * slices >= LEAST_GROUP {
                tiles.push(Tile { lanes, slices, rows, quads: 1 });
            }
            lanes /= 2;
        }
        // The wider a workgroup is, the more of a cache line is its own: the widest that fill the card, or else the
        // narrowest, in which each invocation has least to do.
        let best = tiles.iter().position(|tile| tile.count(d) >= 2 * profile.units as usize);
        let best = best.unwrap_or(tiles.len() - 1);
        tiles[..=best].rotate_right(1);
        tiles
    }
}

/// How many invocations of a workgroup can shuffle to add up its slices.
fn subgroup([lanes, slices]: [usize; 2], profile: &Profile) -> u32 {
    let reach = match (profile.class, profile.vector_lanes()) {
        (AdapterClass::Cpu, (vector, true)) => vector as u32,
        (AdapterClass::Cpu, _) => 1,
        (AdapterClass::Gpu, _) => profile.subgroup_lanes().unwrap_or(1),
    };
    if slices > 1 { reach.min((lanes * slices) as u32) } else { 1 }
}

/// The uniform, `Params` in the WGSL.
fn words(d: &Dims, [groups_rows, groups_n, groups]: [usize; 3], accumulate: bool) -> [u32; 9] {
    let Dims { sequences, rows, count, k, n } = *d;
    [n, k, rows, sequences, count, groups_n, groups_rows, groups, usize::from(accumulate)].map(|x| x as u32)
}

impl MatmulById {
    fn dims(&self, inputs: &[TensorType]) -> Result<Dims, String> {
        let (x, w, ids) = (&inputs[0], &inputs[1], &inputs[2]);
        let rows = rows_by_id(x, ids)?;
        let (count, kw, n) = match (self.transpose, w.shape.dims()) {
            (false, &[count, k, n]) | (true, &[count, n, k]) => (count, k, n),
            _ => return Err(format!("the matrices must have three dimensions, got {}", w.shape)),
        };
        let k = x.shape.cols();
        if k != kw {
            return Err(format!(
                "inner dimensions differ: {k} of x {} against {kw} of the matrices {}",
                x.shape, w.shape
            ));
        }
        Ok(Dims { sequences: ids.len(), rows, count, k, n })
    }
}

impl Op for MatmulById {
    fn name(&self) -> &'static str {
        "matmul_by_id"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = 3 + usize::from(self.accumulate);
        if inputs.len() != n {
            return Err(format!("takes {n} inputs, got {}", inputs.len()));
        }
        expect_f32(&inputs[..2], 2)?;
        let y = TensorType::f32(inputs[0].shape.with_cols(self.dims(inputs)?.n));
        match inputs.get(3) {
            Some(base) if *base != y => Err(format!("the tensor to add to must be {y}, got {base}")),
            _ => Ok(vec![y]),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let [x, w, ids] = [cx.inputs[0], cx.inputs[1], cx.inputs[2]];
        if cx.needs(0) {
            let op = MatmulById { transpose: !self.transpose, accumulate: false };
            let dx = cx.graph.op1(&format!("{}.x", cx.name), op, &[dy, w, ids])?;
            cx.set(0, dx);
        }
        if cx.needs(1) {
            let op = MatmulByIdBackward { count: cx.graph.ty(w).shape.dims()[0], accumulate: false };
            let inputs = if self.transpose { [dy, x, ids] } else { [x, dy, ids] };
            let dw = cx.graph.op1(&format!("{}.w", cx.name), op, &inputs)?;
            cx.set(1, dw);
        }
        if self.accumulate {
            cx.set(3, dy);
        }
        Ok(())
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        let dims = self.dims(cx.inputs);
        dims.map_or(vec![], |d| Tile::of(&d, cx.profile).into_iter().map(Tile::name).collect())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (d, profile) = (self.dims(cx.inputs)?, cx.profile);
        let tiles = Tile::of(&d, profile);
        let tile = *tiles.get(cx.variant).ok_or_else(|| format!("no variant {} of {}", cx.variant, tiles.len()))?;
        let Tile { lanes, slices, rows, quads } = tile;
        let iterations = d.k.div_ceil(4 * slices) + rows * (1 + 4 * quads) + 2;
        profile.quirks.check_loops("the inner dimension", d.k, iterations)?;
        let shared = profile.class == AdapterClass::Cpu && slices == 1 && rows > 1 && profile.vector_lanes().1;
        let entry = match (d.n.is_multiple_of(4), slices) {
            (true, 1) => "forward_quads",
            (true, _) => "forward_shared_quads",
            (false, _) => "forward",
        };
        let subgroup = subgroup([lanes, slices], profile);
        let kernel = table_kernel::<Self>("matmul_by_id", FORWARD.text(shared || subgroup > 1), entry)
            .knob("LANES", lanes as u32)
            .knob("SLICES", slices as u32)
            .knob("ROWS", rows as u32)
            .knob("QUADS", quads as u32)
            .knob("SUBGROUP", subgroup)
            .knob("SHARED", shared)
            .knob("B_TRANSPOSED", self.transpose)
            .knob("A_ALIGNED", d.k.is_multiple_of(4))
            .knob("B_ALIGNED", if self.transpose { d.k } else { d.n }.is_multiple_of(4))
            .knob("K_TAIL", !d.k.is_multiple_of(4 * slices));
        let ([groups_rows, groups_n], count) = (tile.groups(&d), tile.count(&d));
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0)];
        let words = words(&d, [groups_rows, groups_n, count], self.accumulate);
        Ok(Program::one(kernel, &binds, &words, profile.grid(count)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, w, ids) = (inputs[0], inputs[1], inputs[2]);
        let (k, n) = (x.shape.cols(), outputs[0].shape.cols());
        let rows = x.shape.rows() / ids.data.len();
        let mut y = match inputs.get(3) {
            Some(&base) => base.clone(),
            None => Array::zeros(outputs[0].shape.clone()),
        };
        let matrices: Vec<&[f64]> = w.data.chunks_exact(k * n).collect();
        let [step_k, step_n] = if self.transpose { [1, k] } else { [n, 1] };
        for (row, (y, x)) in y.data.chunks_exact_mut(n).zip(x.data.chunks_exact(k)).enumerate() {
            let Some(matrix) = matrices.get(ids.data[row / rows] as usize) else { continue };
            for (j, y) in y.iter_mut().enumerate() {
                *y += x.iter().enumerate().map(|(i, x)| x * matrix[i * step_k + j * step_n]).sum::<f64>();
            }
        }
        vec![y]
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        2 * (outputs[0].len() * inputs[0].shape.cols()) as u64
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        // Of the matrices at most one for each id.
        let matrix = inputs[1].bytes() / inputs[1].shape.dims()[0];
        let used = inputs[1].shape.dims()[0].min(inputs[2].len());
        (inputs[0].bytes() + used * matrix + inputs[2].bytes() + outputs[0].bytes()) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(3)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(MatmulById { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

impl MatmulByIdBackward {
    fn dims(&self, inputs: &[TensorType]) -> Result<Dims, String> {
        let (x, dy, ids) = (&inputs[0], &inputs[1], &inputs[2]);
        let rows = rows_by_id(x, ids)?;
        let n = dy.shape.cols();
        expect_shape("dy", dy, x.shape.with_cols(n).dims())?;
        Ok(Dims { sequences: ids.len(), rows, count: self.count, k: x.shape.cols(), n })
    }
}

impl Op for MatmulByIdBackward {
    fn name(&self) -> &'static str {
        "matmul_by_id_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = 3 + usize::from(self.accumulate);
        if inputs.len() != n {
            return Err(format!("takes {n} inputs, got {}", inputs.len()));
        }
        expect_f32(&inputs[..2], 2)?;
        let d = self.dims(inputs)?;
        let dw = TensorType::f32([d.count, d.k, d.n]);
        match inputs.get(3) {
            Some(base) if *base != dw => Err(format!("the tensor to add to must be {dw}, got {base}")),
            _ => Ok(vec![dw]),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dw = cx.dy0()?;
        let [x, dy, ids] = [cx.inputs[0], cx.inputs[1], cx.inputs[2]];
        for (i, (name, of, transpose)) in [("x", dy, true), ("dy", x, false)].into_iter().enumerate() {
            if cx.needs(i) {
                let op = MatmulById { transpose, accumulate: false };
                let back = cx.graph.op1(&format!("{}.{name}", cx.name), op, &[of, dw, ids])?;
                cx.set(i, back);
            }
        }
        if self.accumulate {
            cx.set(3, dw);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (d, profile) = (self.dims(cx.inputs)?, cx.profile);
        let rows = d.sequences * d.rows;
        let [lanes, slices] = match profile.class {
            AdapterClass::Cpu => [profile.vector_lanes().0, 1],
            AdapterClass::Gpu => {
                let slices = rows.div_ceil(MOST_ROWS).next_power_of_two().min(16);
                [GROUP / 2 / slices, slices]
            }
        };
        profile.quirks.check_loops("the number of rows", rows, rows.div_ceil(slices) + BLOCK * (1 + BLOCK) + 2)?;
        let blocks = d.count * d.k.div_ceil(BLOCK) * d.n.div_ceil(4);
        let entry = if d.n.is_multiple_of(4) { "backward_quads" } else { "backward" };
        let subgroup = subgroup([lanes, slices], profile);
        let kernel = table_kernel::<Self>("matmul_by_id", BACKWARD.text(subgroup > 1), entry)
            .knob("LANES", lanes as u32)
            .knob("SLICES", slices as u32)
            .knob("ROWS", BLOCK as u32)
            .knob("QUADS", 1u32)
            .knob("SUBGROUP", subgroup)
            .knob("A_ALIGNED", d.k.is_multiple_of(4))
            .knob("B_ALIGNED", d.n.is_multiple_of(4))
            .knob("K_TAIL", false);
        let groups = blocks.div_ceil(lanes);
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0)];
        let words = words(&d, [1, 1, groups], self.accumulate);
        Ok(Program::one(kernel, &binds, &words, profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, dy, ids) = (inputs[0], inputs[1], inputs[2]);
        let (k, n) = (x.shape.cols(), dy.shape.cols());
        let rows = x.shape.rows() / ids.data.len();
        let mut dw = match inputs.get(3) {
            Some(&base) => base.clone(),
            None => Array::zeros(outputs[0].shape.clone()),
        };
        for (row, (x, dy)) in x.data.chunks_exact(k).zip(dy.data.chunks_exact(n)).enumerate() {
            let Some(matrix) = dw.data.chunks_exact_mut(k * n).nth(ids.data[row / rows] as usize) else { continue };
            for (dw, x) in matrix.chunks_exact_mut(n).zip(x) {
                dw.iter_mut().zip(dy).for_each(|(dw, dy)| *dw += x * dy);
            }
        }
        vec![dw]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * (inputs[0].len() * inputs[1].shape.cols()) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(3)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(MatmulByIdBackward { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}
