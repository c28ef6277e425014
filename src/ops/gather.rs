//! Elements by id along an axis, and the gradient of what they are taken from.
//!
//! `y[p, j, m] = x[p, ids[p, j, m], m]`. An id without an element gives zero and passes no gradient, as in
//! [`embedding`](super::embedding), which takes whole rows. Backward, `dx[p, i, m]` is the sum of `dy[p, j, m]` where
//! `ids[p, j, m] = i`, added in the order of `j`: the same bits on every run.

use super::axis::{Columns, without_axis};
use super::cases::{Case, Row};
use super::checks::{expect_axis, expect_f32, expect_ids};
use super::elementwise;
use super::slice::with_axis;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::quirks::LOOP_ITERATIONS;
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/gather.wgsl");

pub(super) const ROW: Row = Row {
    name: "gather",
    summary: "y[p, j, m] = x[p, ids[p, j, m], m]; ids out of range give zeros",
    sources: &[SOURCE],
    cases: || {
        // The last number bounds the ids: above the length of the axis, some are out of range.
        let case = |x: &[usize], axis: usize, ids: &[usize], below: u32| {
            let name = format!("{ids:?} below {below} along axis {axis} of {x:?}");
            Case::new(name, Gather { axis }, &[x]).ids(ids, below)
        };
        let backward = |x: &[usize], axis: usize, dy: &[usize], below: u32| {
            let name = format!("backward of {x:?} along axis {axis} from {dy:?} below {below}");
            Case::new(name, GatherBackward::new(x, axis), &[dy]).ids(dy, below)
        };
        vec![
            case(&[1], 0, &[1], 1),
            case(&[127], 0, &[33], 140),
            case(&[5, 64], 1, &[5], 64),
            case(&[130, 7], 1, &[130, 3], 8),
            case(&[3, 9, 1757], 2, &[3, 9, 5], 1757),
            case(&[4, 10], 1, &[4, 1000], 12),
            case(&[5, 9, 8], 1, &[5, 4, 8], 10),
            case(&[5, 9, 7], 1, &[5, 7], 9),
            case(&[11, 12], 0, &[3, 12], 12),
            backward(&[5, 12], 1, &[5, 3], 13),
            backward(&[5, 7], 1, &[5], 7),
            backward(&[2, 6, 3], 1, &[2, 3], 7),
        ]
    },
    bench: || {
        let case = |x: &[usize], ids: &[usize]| {
            let n = x[x.len() - 1] as u32;
            Case::new(format!("{ids:?} of {x:?}"), Gather { axis: x.len() - 1 }, &[x]).ids(ids, n)
        };
        vec![case(&[4096, 1024], &[4096]), case(&[64, 50_257], &[64, 16])]
    },
};

/// `(x, ids) -> y`: along `axis`, `x` `[.., n, ..]` and `ids` u32 `[.., k, ..]` give `[.., k, ..]`; all other axes are
/// alike. `ids` may also lack the axis, which picks one element of each column.
///
/// Usually added by [`Graph::gather`], which takes the last axis.
#[derive(Clone, Copy, Debug)]
pub struct Gather {
    /// The axis, counted from 0.
    pub axis: usize,
}

/// `(dy, ids) -> dx`: the gradient of [`Gather`].
#[derive(Clone, Debug)]
pub struct GatherBackward {
    to: Shape,
    axis: usize,
}

impl GatherBackward {
    /// For an input of shape `to`.
    pub(super) fn new(to: impl Into<Shape>, axis: usize) -> Self {
        GatherBackward { to: to.into(), axis }
    }
}

impl Graph {
    /// Picks elements of each row by id: `x` `[.., n]` and `ids` u32 `[.., k]` give `[.., k]`, with `y[r, j] = x[r,
    /// ids[r, j]]`. With `ids` `[..]`, one element of each row: `[..]`.
    ///
    /// Use it for the score of the class that was right, or the value of the action that was taken. For whole rows of a
    /// table by id use [`embedding`](Self::embedding); for another axis, [`Gather`]. Ids of `n` or more give zeros and
    /// pass no gradient. The gradient's cost is that of `n * k` comparisons per row.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let values = g.input("values", TensorType::f32([32, 6]))?;
    /// let actions = g.input("actions", TensorType::u32([32]))?;
    /// let taken = g.gather("taken", values, actions)?;
    /// assert_eq!(g.ty(taken), &TensorType::f32([32]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn gather(&mut self, name: &str, x: Value, ids: Value) -> Result<Value> {
        let axis = self.type_of(name, x)?.shape.rank() - 1;
        self.op1(name, Gather { axis }, &[x, ids])
    }
}

/// The number of ids of each column of `x`: 1 if they have no such axis.
fn ids_by_column(x: &Shape, axis: usize, ids: &Shape) -> Result<usize, String> {
    let n = expect_axis(x, axis)?;
    if *ids == without_axis(x, axis) {
        return Ok(1);
    }
    match ids.dims().get(axis) {
        Some(&k) if *ids == with_axis(x, axis, k) => Ok(k),
        _ => {
            Err(format!("ids must have the shape of x, {x}, with any length instead of {n}, or without it; got {ids}"))
        }
    }
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, ids] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        expect_f32(std::slice::from_ref(x), 1)?;
        expect_ids(ids)?;
        ids_by_column(&x.shape, self.axis, &ids.shape)?;
        Ok(vec![TensorType::f32(ids.shape.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let op = GatherBackward::new(cx.graph.ty(cx.inputs[0]).shape.clone(), self.axis);
        let dx = cx.graph.op1(&cx.name, op, &[dy, cx.inputs[1]])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let x = &cx.inputs[0].shape;
        let columns = Columns::of(x, self.axis);
        let k = ids_by_column(x, self.axis, &cx.inputs[1].shape)?;
        let words = [columns.n, k, columns.inner].map(|w| w as u32);
        let kernel = table_kernel::<Self>("gather", SOURCE, "forward");
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(0)];
        Ok(elementwise::elements(cx, cx.outputs[0].len(), kernel, &binds, &words))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, ids) = (inputs[0], inputs[1]);
        let columns = Columns::of(&x.shape, self.axis);
        let picked = columns.with_length(ids.data.len());
        let element = |(at, &id): (usize, &f64)| match id as usize {
            id if id < columns.n => x.data[columns.at(picked.column(at), id)],
            _ => 0.0,
        };
        vec![Array::new(outputs[0].shape.clone(), ids.data.iter().enumerate().map(element).collect())]
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        // Only the elements that are picked move.
        (inputs[1].bytes() + 2 * outputs[0].bytes()) as u64
    }
}

impl Op for GatherBackward {
    fn name(&self) -> &'static str {
        "gather_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, ids] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        expect_f32(std::slice::from_ref(dy), 1)?;
        expect_ids(ids)?;
        ids_by_column(&self.to, self.axis, &ids.shape)?;
        if dy.shape != ids.shape {
            return Err(format!("dy must have the shape of the ids, {}, got {}", ids.shape, dy.shape));
        }
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.op1(&cx.name, Gather { axis: self.axis }, &[dy, cx.inputs[1]])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let columns = Columns::of(&self.to, self.axis);
        let k = ids_by_column(&self.to, self.axis, &cx.inputs[1].shape)?;
        let (quads, last) = (columns.width() == 4, columns.inner == 1);
        let [_, n, inner] = columns.units();
        let kernel = table_kernel::<Self>("gather", SOURCE, "backward")
            .knob("E", if quads { "vec4<f32>" } else { "f32" })
            .knob("I", if quads { "vec4<u32>" } else { "u32" })
            .knob("D", if quads && !last { "vec4<f32>" } else { "f32" })
            .knob("J", if quads && !last { "vec4<u32>" } else { "u32" })
            .knob("STEP", if last { columns.width() as u32 } else { 1 })
            .knob("OFFSETS", if quads && last { "vec4<u32>(0u, 1u, 2u, 3u)" } else { "I()" });
        // Each element looks at all ids: the quirk `loops-end-early`.
        cx.profile.quirks.check_loops("the number of ids by row", k, k + 2)?;
        let len = cx.outputs[0].len() / columns.width();
        let (kernel, groups) = elementwise::spread_thinly(cx.profile, len, LOOP_ITERATIONS / (k + 2), kernel);
        let words = [len, n, k, inner].map(|w| w as u32);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::In(1), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut dx = Array::zeros(self.to.clone());
        let columns = Columns::of(&self.to, self.axis);
        let picked = columns.with_length(inputs[1].data.len());
        for (at, (&dy, &id)) in inputs[0].data.iter().zip(&inputs[1].data).enumerate() {
            if (id as usize) < columns.n {
                dx.data[columns.at(picked.column(at), id as usize)] += dy;
            }
        }
        vec![dx]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }
}
