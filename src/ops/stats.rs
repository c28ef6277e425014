//! Statistics of one or two tensors in a single pass, for [`probe`](crate::probe)s.
//!
//! Each chunk of the tensors fills one row of a board that many such nodes share, in place: `sum a`, `sum a^2`,
//! `max |a|`, `a.b`, `sum b`, `sum b^2`, `max |b|`, 0. The order of additions is fixed. The rows are few enough for the
//! host to add, in f64, which saves every probe a second dispatch.

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::TensorType;

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "stats.wgsl");

pub(super) const ROW: Row = Row {
    name: "stats",
    summary: "board[row..] = sum, sum of squares, largest magnitude of a and of b, and a.b, by chunk; for probes",
    sources: &[SOURCE.plain],
    cases: || {
        let shapes: [&[usize]; 5] = [&[1], &[127], &[33, 7, 5], &[2, 34_999], &[1757, 4]];
        let one = |s: &&[usize]| case(format!("{s:?}"), s, false);
        let two = |s: &&[usize]| case(format!("{s:?} and {s:?}"), s, true);
        let mut cases: Vec<Case> = shapes.iter().map(one).chain(shapes.iter().map(two)).collect();
        // The same sign and size everywhere, so that rounding errors accumulate.
        cases.push(case("1000001".into(), &[1_000_001], false).fill(0, InputFill::Uniform(0.9, 1.1)));
        cases
    },
    bench: || vec![case("1024x384".into(), &[1024, 384], false), case("1024x384, two".into(), &[1024, 384], true)],
};

/// Writes neither the first row of the board nor the last.
fn case(name: String, shape: &[usize], pair: bool) -> Case {
    let op = Stats { pair, row: 2 };
    let rows = Stats::rows(shape.iter().product());
    let board = [2 + rows + 1, Stats::COLUMNS];
    let inputs: &[&[usize]] = if pair { &[shape, shape, &board] } else { &[shape, &board] };
    Case::new(name, op, inputs).forward_only()
}

/// `(a [, b], board) -> board`: `[..] [, [..]], [rows, 8] -> [rows, 8]`, with [`Stats::rows`] rows replaced.
///
/// [`Instruments`](crate::probe::Instruments) lays out the board and reads it back; use those rather than this op.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Whether there is a second tensor.
    pub pair: bool,
    /// First row of the board to write.
    pub row: usize,
}

impl Stats {
    /// Columns of the board.
    pub const COLUMNS: usize = 8;

    /// Rows that a tensor of `len` elements fills: one per 16,384 elements, but at most 256.
    pub fn rows(len: usize) -> usize {
        len.div_ceil(16 << 10).clamp(1, 256)
    }

    /// Elements per chunk.
    fn chunk(len: usize) -> usize {
        len.div_ceil(4 * Self::rows(len)) * 4
    }
}

impl Op for Stats {
    fn name(&self) -> &'static str {
        "stats"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = 1 + usize::from(self.pair);
        expect_f32(inputs, n + 1)?;
        if self.pair {
            expect_shape("b", &inputs[1], inputs[0].shape.dims())?;
        }
        let (board, rows) = (&inputs[n], self.row.saturating_add(Self::rows(inputs[0].len())));
        if board.shape.rank() != 2 || board.shape.cols() != Self::COLUMNS || board.shape.rows() < rows {
            return Err(format!("the board must be [{rows} or more, {}], got {}", Self::COLUMNS, board.shape));
        }
        Ok(vec![board.clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("statistics are for looking at; use sum or l2_norm"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let len = cx.inputs[0].len();
        let groups = Self::rows(len);
        let layout = RowLayout::whole(cx);
        cx.profile.quirks.check_loops("the number of elements", len, Self::chunk(len) / 4 / layout.lanes + 64)?;
        let kernel = layout.kernel::<Self>("stats", SOURCE, "forward").knob("PAIR", self.pair);
        let b = if self.pair { Bind::In(1) } else { Bind::Null };
        let words = [len, Self::chunk(len) / 4, groups, self.row].map(|w| w as u32);
        Ok(Program::one(kernel, &[Bind::In(0), b, Bind::Out(0)], &words, cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let a = &inputs[0].data;
        let b: &[f64] = if self.pair { &inputs[1].data } else { &[] };
        let mut board = inputs[inputs.len() - 1].clone();
        let chunk = Self::chunk(a.len());
        let rows = board.data.chunks_exact_mut(Self::COLUMNS).skip(self.row);
        for (i, row) in rows.take(Self::rows(a.len())).enumerate() {
            let range = |x: &[f64]| (i * chunk).min(x.len())..((i + 1) * chunk).min(x.len());
            let (a, b) = (&a[range(a)], &b[range(b)]);
            let sum = |x: &[f64]| x.iter().sum::<f64>();
            let square = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>();
            let top = |x: &[f64]| x.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let dot = a.iter().zip(b).map(|(a, b)| a * b).sum();
            row.copy_from_slice(&[sum(a), square(a), top(a), dot, sum(b), square(b), top(b), 0.0]);
        }
        vec![board]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        (if self.pair { 8 } else { 3 }) * inputs[0].len() as u64
    }

    fn bytes(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let rows = 4 * Self::COLUMNS * Self::rows(inputs[0].len());
        (inputs[..inputs.len() - 1].iter().map(TensorType::bytes).sum::<usize>() + rows) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(1 + usize::from(self.pair))
    }

    fn runs_early(&self) -> bool {
        true
    }

    fn stays_f32(&self, _output: usize) -> bool {
        true
    }
}
