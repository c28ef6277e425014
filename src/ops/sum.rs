//! Sums over leading dimensions, and their dual, repetition over leading dimensions.
//!
//! `sum`: `y[c] = sum_r x[r, c]`; `broadcast`: `y[r, c] = x[c]`. Each is the other's gradient. The order of additions
//! is fixed (slices or chunks of rows, then those sums), so results do not vary between runs. Sums along other axes are
//! in [`reduce`](super::reduce).

use std::sync::Arc;

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Elementwise, Launch, Program};
use crate::profile::{AdapterClass, Profile};
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/sum.wgsl");

pub(super) const ROW: Row = Row {
    name: "sum",
    summary: "y[c] = sum_r x[r, c], and its dual y[r, c] = x[c]",
    sources: &[SOURCE],
    cases: || {
        let sum = |from: &[usize], to: &[usize]| Case::new(format!("{from:?} to {to:?}"), Sum::to(to), &[from]);
        let repeat = |from: &[usize], to: &[usize]| {
            Case::new(format!("broadcast {from:?} to {to:?}"), Broadcast { to: to.into() }, &[from])
        };
        vec![
            sum(&[1], &[1]),
            sum(&[127], &[1]),
            sum(&[1757, 3], &[3]),
            sum(&[5, 7, 12], &[12]),
            sum(&[5, 7, 12], &[7, 12]),
            sum(&[2, 3, 1757], &[1]),
            sum(&[3000, 2], &[2]),
            sum(&[2100, 36], &[36]),
            sum(&[64, 64], &[1]),
            sum(&[9, 300], &[300]),
            sum(&[70, 4400], &[4400]),
            sum(&[50_001, 3], &[3]), // two levels, on GPUs too
            Case::new("accumulate", Sum { to: [12].into(), accumulate: true }, &[&[70, 12], &[12]]),
            Case::new("accumulate in two levels", Sum { to: [1].into(), accumulate: true }, &[&[140_000], &[1]]),
            repeat(&[1], &[127]),
            repeat(&[12], &[5, 12]),
            repeat(&[7, 3], &[5, 7, 3]),
        ]
    },
    bench: || {
        let sum = |rows: usize, cols: usize| Case::new(format!("{rows}x{cols}"), Sum::to([cols]), &[&[rows, cols]]);
        vec![sum(4096, 768), sum(1 << 20, 1)]
    },
};

/// `x -> sum over leading dimensions`, down to the trailing shape `to`; `[1]` sums everything. Usually added by
/// [`Graph::sum`] or [`Graph::sum_to`].
#[derive(Clone, Debug)]
pub struct Sum {
    to: Shape,
    accumulate: bool,
}

impl Sum {
    /// Sums down to this trailing shape.
    pub fn to(to: impl Into<Shape>) -> Self {
        Sum { to: to.into(), accumulate: false }
    }
}

/// `x -> x` repeated over leading dimensions, up to the shape `to`. Usually added by [`Graph::broadcast`].
#[derive(Clone, Debug)]
pub struct Broadcast {
    to: Shape,
}

impl Graph {
    /// The sum of all elements, as `[1]`: the simplest loss.
    pub fn sum(&mut self, name: &str, x: Value) -> Result<Value> {
        self.sum_to(name, x, [1])
    }

    /// Sums over leading dimensions, down to the trailing shape `to`: a column sum, or the gradient of a bias.
    pub fn sum_to(&mut self, name: &str, x: Value, to: impl Into<Shape>) -> Result<Value> {
        self.op1(name, Sum::to(to), &[x])
    }

    /// Repeats `x` over leading dimensions, up to the shape `to`. [`add`](Self::add) repeats its second operand by
    /// itself.
    pub fn broadcast(&mut self, name: &str, x: Value, to: impl Into<Shape>) -> Result<Value> {
        self.op1(name, Broadcast { to: to.into() }, &[x])
    }
}

/// Checks that `small` is the end of `large`, or `[1]`.
pub(super) fn expect_suffix(small: &Shape, large: &Shape) -> Result<(), String> {
    match small.dims() == [1] || large.dims().ends_with(small.dims()) {
        true => Ok(()),
        false => Err(format!("{small} is neither [1] nor the trailing dimensions of {large}")),
    }
}

/// Appends the dispatches that sum `rows` rows of each source into its target, with scratch between levels. One source
/// or two of the same shape: GPUs sum two in the same dispatches.
pub(super) fn sum_rows<O: Op>(
    program: &mut Program,
    profile: &Profile,
    ends: &[(Bind, Bind)],
    (rows, cols): (usize, usize),
    accumulate: bool,
) {
    match profile.class {
        AdapterClass::Cpu => {
            ends.iter().for_each(|&ends| sum_columns::<O>(program, profile, ends, (rows, cols), accumulate));
        }
        AdapterClass::Gpu => sum_strips::<O>(program, profile, ends, (rows, cols), accumulate),
    }
}

/// [`sum_rows`] for software adapters, which want few invocations: a column of a chunk of rows each.
fn sum_columns<O: Op>(
    program: &mut Program,
    profile: &Profile,
    (mut from, to): (Bind, Bind),
    (mut rows, cols): (usize, usize),
    accumulate: bool,
) {
    // In order: invocations of a workgroup; elements that a row should have at least, where possible; rows summed at
    // once; and rows per invocation where there are more than that.
    let (invocations, wide, most, chunk) = (8, 32, 2048, 128);
    loop {
        // Several short rows act as one long row, whose parts are summed at the next level.
        let mut fold = 1;
        while 2 * fold * cols <= wide && rows.is_multiple_of(2 * fold) && 4 * fold * fold <= rows {
            fold *= 2;
        }
        let (long, wide_cols) = (rows / fold, cols * fold);
        let (elem, width) = unit(wide_cols);
        let chunk = if long <= most { long } else { chunk };
        let chunks = long.div_ceil(chunk);
        let last = chunks * fold == 1;
        let scratch = if last { 0 } else { program.scratch(TensorType::f32([chunks, wide_cols])) };
        let out = if last { to } else { Bind::Scratch(scratch) };
        let across = (wide_cols / width).div_ceil(invocations);
        let kernel = table_kernel::<O>("sum", SOURCE, "columns")
            .knob("INVOCATIONS", invocations as u32)
            .knob("E", elem)
            .knob("ACCUMULATE", accumulate && last);
        let words = [0, long, wide_cols / width, chunk, across, 0].map(|w| w as u32);
        program.dispatch(kernel, &[from, out], &words, profile.grid(across * chunks));
        if last {
            return;
        }
        (from, rows) = (Bind::ScratchIn(scratch), chunks * fold);
    }
}

/// The type of the elements in which columns are summed, and its width.
fn unit(cols: usize) -> (&'static str, usize) {
    if cols.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) }
}

/// How the workgroups of a GPU share a matrix: see `strips` in sum.wgsl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Strips {
    /// Units of a row that a workgroup sums.
    strip: usize,
    /// Invocations that share a column.
    slices: usize,
    /// Parts that the rows are cut into, each summed by other workgroups. Where there are several, they are summed in
    /// turn by a second level.
    chunks: usize,
}

impl Strips {
    /// The most invocations of a workgroup.
    const GROUP: usize = 256;
    /// Workgroups that keep a GPU busy.
    const ENOUGH: usize = 64;
    /// Rows that an invocation goes over at least, where there are as many: what it loads at once.
    const AT_ONCE: usize = 8;
    /// Rows that an invocation may go over before a second level takes less time.
    const MOST: usize = 512;

    fn of(rows: usize, units: usize, width: usize) -> Self {
        let most = rows.div_ceil(Self::AT_ONCE);
        let mut strip = Self::GROUP;
        // A strip narrower than 16 elements, or 64 bytes, would waste parts of what memory delivers.
        while units.div_ceil(strip) < Self::ENOUGH && strip * width > 16 && Self::GROUP / strip < most {
            strip /= 2;
        }
        let strip = strip.min(units);
        let slices = (Self::GROUP / strip).min(most);
        let across = units.div_ceil(strip);
        let chunks = match across < Self::ENOUGH && rows > slices * Self::MOST {
            true => (2 * Self::ENOUGH / across).min(rows / (slices * Self::MOST / 8)),
            false => 1,
        };
        Strips { strip, slices, chunks }
    }
}

/// [`sum_rows`] for GPUs: in one dispatch, or in two where few workgroups would have long to go.
fn sum_strips<O: Op>(
    program: &mut Program,
    profile: &Profile,
    ends: &[(Bind, Bind)],
    (mut rows, cols): (usize, usize),
    accumulate: bool,
) {
    let (elem, width) = unit(cols);
    let units = cols / width;
    let entry = if ends.len() == 2 { "strip_pairs" } else { "strips" };
    let mut ends = ends.to_vec();
    loop {
        let Strips { strip, slices, chunks } = Strips::of(rows, units, width);
        let across = units.div_ceil(strip);
        let chunk = rows.div_ceil(chunks);
        let chunks = rows.div_ceil(chunk);
        let scratch: Vec<usize> = match chunks {
            1 => vec![],
            _ => ends.iter().map(|_| program.scratch(TensorType::f32([chunks, cols]))).collect(),
        };
        let to = |i: usize| scratch.get(i).map_or(ends[i].1, |&s| Bind::Scratch(s));
        let binds: Vec<Bind> = ends.iter().enumerate().flat_map(|(i, &(from, _))| [from, to(i)]).collect();
        let kernel = table_kernel::<O>("sum", SOURCE, entry)
            .knob("INVOCATIONS", (strip * slices).next_multiple_of(64) as u32)
            .knob("E", elem)
            .knob("ACCUMULATE", accumulate && chunks == 1)
            .knob("STRIP", strip as u32)
            .knob("SLICES", slices as u32);
        let words = [0, rows, units, chunk, across, 0].map(|w| w as u32);
        program.dispatch(kernel, &binds, &words, profile.grid(across * chunks));
        if chunks == 1 {
            return;
        }
        ends.iter_mut().zip(scratch).for_each(|(ends, s)| ends.0 = Bind::ScratchIn(s));
        rows = chunks;
    }
}

/// The program that makes `[planes, rows, cols]` from `[planes, cols]`: each plane repeated, times `scale`.
pub(super) fn repeat<O: Op>(cx: &Launch<'_>, rows: usize, cols: usize, scale: f32) -> Program {
    let (elem, from, [width, rows, cols]) = match (rows, cols) {
        (_, 1) if rows.is_multiple_of(4) => ("vec4<f32>", "f32", [4, rows / 4, 1]),
        _ if cols.is_multiple_of(4) => ("vec4<f32>", "vec4<f32>", [4, rows, cols / 4]),
        _ => ("f32", "f32", [1, rows, cols]),
    };
    let kernel = table_kernel::<O>("sum", SOURCE, "broadcast").knob("E", elem).knob("X", from);
    let words = [rows as u32, cols as u32, 0, 0, scale.to_bits()];
    elementwise::elements(cx, cx.outputs[0].len() / width, kernel, &[Bind::In(0), Bind::Out(0)], &words)
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1 + usize::from(self.accumulate))?;
        expect_suffix(&self.to, &inputs[0].shape)?;
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[1], self.to.dims())?;
        }
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let to = cx.graph.ty(cx.inputs[0]).shape.clone();
        let dx = cx.graph.broadcast(&cx.name, dy, to)?;
        cx.set(0, dx);
        if self.accumulate {
            cx.set(1, dy);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let mut program = Program::default();
        let cols = self.to.len();
        let rows = cx.inputs[0].len() / cols;
        sum_rows::<Self>(&mut program, cx.profile, &[(Bind::In(0), Bind::Out(0))], (rows, cols), self.accumulate);
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut y = match self.accumulate {
            true => inputs[1].clone(),
            false => Array::zeros(self.to.clone()),
        };
        let n = y.data.len();
        for (i, x) in inputs[0].data.iter().enumerate() {
            y.data[i % n] += x;
        }
        vec![y]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(1)
    }

    fn is_column_sum(&self) -> bool {
        self.to.rank() == 1 && !self.accumulate
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Sum { to: self.to.clone(), accumulate: true }) as Arc<dyn Op>)
    }

    fn stays_f32(&self, _output: usize) -> bool {
        true
    }
}

impl Op for Broadcast {
    fn name(&self) -> &'static str {
        "broadcast"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        expect_suffix(&inputs[0].shape, &self.to)?;
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let to = cx.graph.ty(cx.inputs[0]).shape.clone();
        let dx = cx.graph.sum_to(&cx.name, dy, to)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let cols = cx.inputs[0].len();
        Ok(repeat::<Self>(cx, cx.outputs[0].len() / cols, cols, 1.0))
    }

    fn elementwise(&self) -> Option<Elementwise> {
        Some(Elementwise::trusted(&["x"][..], "x"))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![Array::zeros(self.to.clone()).zip(inputs[0], |_, x| x)]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Workgroups of each level for a matrix of these rows and columns.
    fn levels(rows: usize, cols: usize) -> Vec<u32> {
        let profile = Profile::portable(AdapterClass::Gpu);
        let mut program = Program::default();
        sum_rows::<Sum>(&mut program, &profile, &[(Bind::In(0), Bind::Out(0))], (rows, cols), false);
        program.dispatches.iter().map(|d| d.workgroups.iter().product()).collect()
    }

    #[test]
    fn gpus_sum_columns_in_one_dispatch_unless_it_would_leave_them_idle() {
        assert_eq!(levels(8192, 768), [48]);
        assert_eq!(levels(8192, 3072), [96]);
        assert_eq!(levels(8, 1024 * 768), [768]);
        assert_eq!(levels(100_000, 1), [1]);
        assert_eq!(levels(10_000_000, 1), [128, 1]);
        assert_eq!(levels(1 << 20, 64), [128, 1]);
    }

    #[test]
    fn no_invocation_goes_over_many_rows_while_others_idle() {
        for units in [1, 2, 3, 7, 16, 17, 63, 64, 192, 257, 5000] {
            for width in [1, 4] {
                for rows in [1, 7, 8, 9, 64, 1757, 8192, 100_003, 1 << 24] {
                    let Strips { strip, slices, chunks } = Strips::of(rows, units, width);
                    let groups = units.div_ceil(strip) * chunks;
                    let each = rows.div_ceil(chunks).div_ceil(slices);
                    assert!(strip * slices <= Strips::GROUP && chunks <= rows, "{rows} x {units}");
                    // Beyond `ENOUGH` workgroups all units of a GPU are busy.
                    let enough = groups >= Strips::ENOUGH || each <= Strips::MOST;
                    assert!(enough, "{rows} x {units}: {groups} workgroups, {each} rows each");
                }
            }
        }
    }
}
