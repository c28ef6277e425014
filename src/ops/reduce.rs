//! Sums, means and extremes along one axis, which the result no longer has, and the dual of the sum: repetition along
//! an axis.
//!
//! `sum`: `y[p, m] = sum_i x[p, i, m]`; `mean`: the same over the length of the axis; `max` and `min`: `y[p, m] = x[p,
//! i, m]` for the first `i` where that is largest or smallest. Each column is reduced in a fixed order, so results do
//! not vary between runs. The gradient of a sum or mean is repeated along the axis. That of an extreme goes to the
//! element at `i`, the first of equal ones, by [`gather`](super::gather)'s dual.

use super::axis::{Columns, without_axis};
use super::cases::{Case, InputFill, Row};
use super::checks::{expect_axis, expect_f32};
use super::gather::GatherBackward;
use super::source::table_kernel;
use super::sum;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::profile::{AdapterClass, Profile};
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/reduce.wgsl");

pub(super) const ROW: Row = Row {
    name: "reduce",
    summary: "y = sum, mean, largest or smallest of x along one axis, and y = x repeated along one",
    sources: &[SOURCE],
    cases: || {
        let case = |by: Reduction, x: &[usize], axis: usize| {
            Case::new(format!("{by:?} along axis {axis} of {x:?}"), Reduce { axis, by }, &[x])
        };
        let mut cases = vec![
            case(Reduction::Sum, &[1], 0),
            case(Reduction::Mean, &[1757], 0),
            case(Reduction::Max, &[1], 0),
            case(Reduction::Min, &[1757], 0),
        ];
        let shapes: [(&[usize], usize); 9] = [
            (&[127, 3], 1),
            (&[3, 4096], 1),
            (&[257, 2, 12], 2),
            (&[5, 9, 8], 1),
            (&[3, 1757, 4], 1),
            (&[2, 33, 7], 1),
            (&[4, 130, 1], 1),
            (&[130, 5, 2], 0),
            (&[2, 3, 5, 36], 2),
        ];
        for (shape, axis) in shapes {
            cases.push(case(Reduction::Sum, shape, axis));
            cases.push(case(Reduction::Max, shape, axis));
        }
        cases.push(case(Reduction::Mean, &[2, 300_001], 1)); // too long for one lane
        cases.push(case(Reduction::Sum, &[2, 1 << 17], 1)); // long enough to be cut up
        cases.push(case(Reduction::Min, &[2, 300_001], 1));
        cases.push(case(Reduction::Mean, &[7, 5, 6], 1));
        cases.push(case(Reduction::Min, &[7, 5, 6], 1));
        let below_zero = case(Reduction::Max, &[3, 1001], 1).fill(0, InputFill::Uniform(-2.0, -1.0));
        cases.push(Case { name: "Max of negative numbers".into(), ..below_zero });
        // Equal extremes have no gradient to compare with: it depends on the direction.
        let equal = InputFill::Values(&[1.0, 5.0, 2.0, -5.0, 5.0, -5.0, 3.0]);
        for (by, shape, axis) in [
            (Reduction::Max, [4, 1000, 3], 1),
            (Reduction::Max, [5, 2, 1001], 2),
            (Reduction::Min, [5, 2, 1000], 2),
            (Reduction::Min, [2, 500, 8], 1),
        ] {
            let equal = case(by, &shape, axis).fill(0, equal).forward_only();
            cases.push(Case { name: format!("{}, equal ones", equal.name), ..equal });
        }
        cases.extend([([5, 7, 12], 1), ([5, 7, 12], 2), ([5, 12, 7], 1), ([1, 127, 1], 1)].map(|(to, axis)| {
            let op = Repeat { to: to.into(), axis, scale: 0.5 };
            let from = without_axis(&op.to, axis);
            Case::new(format!("repeat {from} along axis {axis} of {to:?}"), op, &[from.dims()])
        }));
        cases
    },
    bench: || {
        let case = |by: Reduction, x: &[usize], axis: usize| {
            Case::new(format!("{by:?} along axis {axis} of {x:?}"), Reduce { axis, by }, &[x])
        };
        vec![
            case(Reduction::Sum, &[4096, 1024], 1),
            case(Reduction::Sum, &[16, 4096, 64], 1),
            case(Reduction::Max, &[4096, 1024], 1),
            case(Reduction::Max, &[16, 4096, 64], 1),
        ]
    },
};

/// What [`Reduce`] makes of the elements along its axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

impl Reduction {
    /// Whether it picks one of the elements.
    fn picks(self) -> bool {
        matches!(self, Reduction::Max | Reduction::Min)
    }

    /// The factor of the sum of `n` elements.
    fn scale(self, n: usize) -> f32 {
        if self == Reduction::Mean { 1.0 / n as f32 } else { 1.0 }
    }
}

/// `x -> y` without `axis`, or `x -> (y, index u32)` for extremes, where `index` says where along the axis the first of
/// the largest or smallest elements is. What has no other axis becomes `[1]`.
///
/// Usually added by [`Graph::sum_axis`], [`Graph::mean_axis`], [`Graph::max_axis`], [`Graph::min_axis`] or
/// [`Graph::argmax_axis`].
#[derive(Clone, Copy, Debug)]
pub struct Reduce {
    /// The axis, counted from 0.
    pub axis: usize,
    /// What is made of its elements.
    pub by: Reduction,
}

/// `x -> scale * x`, repeated along a new axis: `to` without `axis` becomes `to`. The gradient of sums and means.
#[derive(Clone, Debug)]
pub struct Repeat {
    to: Shape,
    axis: usize,
    scale: f32,
}

impl Graph {
    /// The sum along `axis`, counted from 0: `[.., n, ..] -> [.., ..]`. Of a tensor with one axis, `[1]`.
    ///
    /// [`sum`](Self::sum) adds up everything. To keep the axis with length 1, [`reshape`](Self::reshape) the result,
    /// which is free.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([8, 20, 3]))?;
    /// let over_time = g.sum_axis("over_time", x, 1)?;
    /// assert_eq!(g.ty(over_time), &TensorType::f32([8, 3]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn sum_axis(&mut self, name: &str, x: Value, axis: usize) -> Result<Value> {
        match self.leading(name, x, axis)? {
            Some([to, shape]) if to == shape => self.sum_to(name, x, to),
            Some([to, shape]) => {
                let sum = self.sum_to(&format!("{name}.sum"), x, to)?;
                self.reshape(name, sum, shape)
            }
            None => self.op1(name, Reduce { axis, by: Reduction::Sum }, &[x]),
        }
    }

    /// The mean along `axis`, counted from 0: `[.., n, ..] -> [.., ..]`. Of a tensor with one axis, `[1]`.
    ///
    /// Use it to pool over time or space: `[batch, time, d] -> [batch, d]` along axis 1. For all of an image `[batch,
    /// height, width, channels]`, reshape it to `[batch, height * width, channels]` first.
    pub fn mean_axis(&mut self, name: &str, x: Value, axis: usize) -> Result<Value> {
        if self.leading(name, x, axis)?.is_none() {
            return self.op1(name, Reduce { axis, by: Reduction::Mean }, &[x]);
        }
        let scale = Reduction::Mean.scale(self.ty(x).shape.dims()[axis]);
        let sum = self.sum_axis(&format!("{name}.sum"), x, axis)?;
        self.scale(name, sum, scale)
    }

    /// The largest element along `axis`, counted from 0: `[.., n, ..] -> [.., ..]`. Of a tensor with one axis, `[1]`.
    ///
    /// The gradient goes to that element alone, to the first of equal ones. If elements are NaN, the result may be any
    /// of the elements. [`Reduce`] itself also returns the index.
    pub fn max_axis(&mut self, name: &str, x: Value, axis: usize) -> Result<Value> {
        Ok(self.op(name, Reduce { axis, by: Reduction::Max }, &[x])?[0])
    }

    /// The smallest element along `axis`: see [`max_axis`](Self::max_axis).
    pub fn min_axis(&mut self, name: &str, x: Value, axis: usize) -> Result<Value> {
        Ok(self.op(name, Reduce { axis, by: Reduction::Min }, &[x])?[0])
    }

    /// Where the largest element along `axis` is, the first of equal ones: `[.., n, ..] -> u32 [.., ..]`. Of a tensor
    /// with one axis, `[1]`.
    ///
    /// Use it for the likeliest class of each row of logits. It has no gradient. [`TopK`](super::top_k::TopK) finds the
    /// `k` largest of a row.
    pub fn argmax_axis(&mut self, name: &str, x: Value, axis: usize) -> Result<Value> {
        Ok(self.op(name, Reduce { axis, by: Reduction::Max }, &[x])?[1])
    }

    /// Where all axes before this one have length 1: the trailing shape that a [`Sum`](super::sum::Sum) over leading
    /// dimensions goes down to, and the shape without the axis.
    fn leading(&self, name: &str, x: Value, axis: usize) -> Result<Option<[Shape; 2]>> {
        let shape = &self.type_of(name, x)?.shape;
        let before = shape.dims().get(..axis).is_some_and(|before| before.iter().all(|&n| n == 1));
        if !before || axis >= shape.rank() {
            return Ok(None);
        }
        let after = &shape.dims()[axis + 1..];
        let to = if after.is_empty() { Shape::from([1]) } else { after.into() };
        Ok(Some([to, without_axis(shape, axis)]))
    }
}

/// Invocations that keep a GPU busy.
const ENOUGH: usize = 1 << 16;

impl Reduce {
    /// How many invocations share a column.
    fn lanes(columns: Columns, profile: &Profile) -> usize {
        let [count, length, _] = columns.units();
        let lanes = match profile.class {
            // One, since a barrier costs a context switch; but a vector where there are few columns.
            AdapterClass::Cpu if count >= 16 || length < 64 => 1,
            AdapterClass::Cpu => 8,
            // As many as can load several units each, of a contiguous column; otherwise what it takes to fill the GPU.
            AdapterClass::Gpu => {
                let contiguous = if columns.inner == 1 { length.div_ceil(4) } else { 1 };
                ENOUGH.div_ceil(count).max(contiguous).min(length).next_power_of_two().min(256)
            }
        };
        // What one lane could not go through, several can: the quirk `loops-end-early`.
        let more = std::iter::successors(Some(lanes), |&lanes| (lanes < 256).then_some(2 * lanes));
        more.into_iter().find(|&lanes| profile.quirks.ends_loops(length / lanes + 32)).unwrap_or(256)
    }

    /// The kernel for these columns, with the words of its uniform and its workgroups.
    fn kernel(&self, cx: &Launch<'_>, columns: Columns, scale: f32) -> Result<(Kernel, [u32; 5], [u32; 3]), String> {
        let [count, length, apart] = columns.units();
        let lanes = Self::lanes(columns, cx.profile);
        cx.profile.quirks.check_loops("the length of the axis", columns.n, length / lanes + 32)?;
        let group = match cx.profile.class {
            AdapterClass::Cpu => lanes.max(8),
            AdapterClass::Gpu => 256,
        };
        let groups = count.div_ceil(group / lanes);
        let quads = columns.width() == 4;
        let kernel = table_kernel::<Self>("reduce", SOURCE, if self.by.picks() { "extreme" } else { "sum" })
            .knob("GROUP", group as u32)
            .knob("LANES", lanes as u32)
            .knob("LAST", columns.inner == 1)
            .knob("E", if quads { "vec4<f32>" } else { "f32" })
            .knob("I", if quads { "vec4<u32>" } else { "u32" })
            .knob("WIDTH", columns.width() as u32)
            .knob("SIGN", if self.by == Reduction::Min { "-1.0" } else { "1.0" });
        let [count, length, apart] = [count, length, apart].map(|n| n as u32);
        Ok((kernel, [count, length, apart, groups as u32, scale.to_bits()], cx.profile.grid(groups)))
    }

    /// How many pieces to cut each column into, so that there are enough for a GPU. A divisor of the length.
    fn pieces(columns: Columns, profile: &Profile) -> usize {
        let [count, length, _] = columns.units();
        let most = (ENOUGH / 256 / count).min(length / 4096);
        let mut pieces = 1;
        while profile.class == AdapterClass::Gpu && 2 * pieces <= most && columns.n.is_multiple_of(8 * pieces) {
            pieces *= 2;
        }
        pieces
    }
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        "reduce"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        expect_axis(&inputs[0].shape, self.axis)?;
        let shape = without_axis(&inputs[0].shape, self.axis);
        let mut outputs = vec![TensorType::f32(shape.clone())];
        if self.by.picks() {
            outputs.push(TensorType::u32(shape));
        }
        Ok(outputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let to = cx.graph.ty(cx.inputs[0]).shape.clone();
        let dx = if self.by.picks() {
            cx.graph.op1(&cx.name, GatherBackward::new(to, self.axis), &[dy, cx.outputs[1]])?
        } else {
            let scale = self.by.scale(to.dims()[self.axis]);
            cx.graph.op1(&cx.name, Repeat { to, axis: self.axis, scale }, &[dy])?
        };
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let columns = Columns::of(&cx.inputs[0].shape, self.axis);
        let scale = self.by.scale(columns.n);
        let mut program = Program::default();
        if self.by.picks() {
            let (kernel, words, groups) = self.kernel(cx, columns, scale)?;
            program.dispatch(kernel, &[Bind::In(0), Bind::Out(0), Bind::Out(1)], &words, groups);
            return Ok(program);
        }
        let pieces = Self::pieces(columns, cx.profile);
        let mut from = Bind::In(0);
        if pieces > 1 {
            // Pieces of a column are like columns of more planes.
            let scratch = program.scratch(TensorType::f32([columns.planes, pieces, columns.inner]));
            let cut = Columns { planes: columns.planes * pieces, n: columns.n / pieces, ..columns };
            let (kernel, words, groups) = self.kernel(cx, cut, 1.0)?;
            program.dispatch(kernel, &[from, Bind::Scratch(scratch)], &words, groups);
            from = Bind::ScratchIn(scratch);
        }
        let rest = if pieces > 1 { Columns { n: pieces, ..columns } } else { columns };
        let (kernel, words, groups) = self.kernel(cx, rest, scale)?;
        program.dispatch(kernel, &[from, Bind::Out(0)], &words, groups);
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, columns) = (&inputs[0].data, Columns::of(&inputs[0].shape, self.axis));
        let shape = &outputs[0].shape;
        let column = |c: usize| (0..columns.n).map(move |i| x[columns.at(c, i)]);
        if !self.by.picks() {
            let over = if self.by == Reduction::Mean { columns.n as f64 } else { 1.0 };
            return vec![Array::new(shape.clone(), (0..shape.len()).map(|c| column(c).sum::<f64>() / over).collect())];
        }
        let sign = if self.by == Reduction::Min { -1.0 } else { 1.0 };
        let first = |c: usize| {
            column(c)
                .enumerate()
                .fold((0, f64::NEG_INFINITY), |best, (i, v)| if sign * v > best.1 { (i, sign * v) } else { best })
        };
        let picked: Vec<(usize, f64)> = (0..shape.len()).map(first).collect();
        let values = picked.iter().map(|&(_, v)| sign * v).collect();
        let indices = picked.iter().map(|&(i, _)| i as f64).collect();
        vec![Array::new(shape.clone(), values), Array::new(shape.clone(), indices)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }

    fn stays_f32(&self, _output: usize) -> bool {
        true
    }
}

impl Op for Repeat {
    fn name(&self) -> &'static str {
        "repeat"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        expect_axis(&self.to, self.axis)?;
        let from = without_axis(&self.to, self.axis);
        if inputs[0].shape != from {
            return Err(format!(
                "{} along axis {} is repeated from {from}, got {}",
                self.to, self.axis, inputs[0].shape
            ));
        }
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let name = cx.name.clone();
        let sum = cx.graph.sum_axis(&name, dy, self.axis)?;
        let dx = if self.scale == 1.0 { sum } else { cx.graph.scale(&name, sum, self.scale)? };
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let columns = Columns::of(&self.to, self.axis);
        Ok(sum::repeat::<Self>(cx, columns.n, columns.inner, self.scale))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let columns = Columns::of(&self.to, self.axis);
        let mut y = Array::zeros(self.to.clone());
        for (c, x) in inputs[0].data.iter().enumerate() {
            (0..columns.n).for_each(|i| y.data[columns.at(c, i)] = f64::from(self.scale) * x);
        }
        vec![y]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        if self.scale == 1.0 { 0 } else { outputs[0].len() as u64 }
    }
}
