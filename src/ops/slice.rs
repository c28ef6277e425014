//! A range along one axis, and its dual: the same range of a larger tensor of zeros.
//!
//! `slice`: `y[o, i, n] = x[o, start + i, n]`. `slice_pad`: `y[o, start + i, n] = x[o, i, n]`, zero elsewhere. Each is
//! the other's gradient.

use std::sync::Arc;

use super::cases::{Case, Row};
use super::checks::{expect_axis, expect_f32};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/slice.wgsl");

pub(super) const ROW: Row = Row {
    name: "slice",
    summary: "y = x[start .. start + len] along one axis, and its dual, zeros around y",
    sources: &[SOURCE],
    cases: || {
        let slice = |x: &[usize], axis: usize, start: usize, len: usize| {
            let name = format!("{start}..{} of axis {axis} of {x:?}", start + len);
            Case::new(name, Slice { axis, start, len }, &[x])
        };
        let pad = |x: &[usize], axis: usize, start: usize, total: usize| {
            let op = SlicePad { axis, start, total, accumulate: true };
            let whole = with_axis(&x.into(), axis, total);
            Case::new(format!("add {x:?} at {start} of axis {axis} of {whole}"), op, &[x, whole.dims()])
        };
        vec![
            slice(&[1], 0, 0, 1),
            slice(&[127], 0, 5, 17),
            slice(&[1757], 0, 4, 1200),
            slice(&[12, 7], 0, 3, 8),
            slice(&[33, 36], 1, 12, 12),
            slice(&[33, 36], 1, 12, 13),
            slice(&[5, 9, 8], 1, 2, 6),
            slice(&[2, 3, 5, 7], 2, 4, 1),
            pad(&[5, 6, 8], 1, 2, 9),
            pad(&[33, 5], 1, 2, 12),
            Case::new("ids", Slice { axis: 1, start: 1, len: 8 }, &[]).ids(&[5, 9], 50_000).forward_only(),
        ]
    },
    bench: || vec![Case::new("4096x768 of 4096x2304", Slice { axis: 1, start: 768, len: 768 }, &[&[4096, 2304]])],
};

/// `x -> x[start .. start + len]` along `axis`. Usually added by [`Graph::slice`].
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// The axis, counted from 0.
    pub axis: usize,
    /// First index that is kept.
    pub start: usize,
    /// Number of indices kept.
    pub len: usize,
}

/// `(x [, base]) -> zeros, or base, with x added at [start ..] of
/// axis`. The result has length `total` along `axis`. The gradient of [`Slice`]; added by [`Graph::pad`], too.
#[derive(Clone, Copy, Debug)]
pub struct SlicePad {
    axis: usize,
    start: usize,
    total: usize,
    accumulate: bool,
}

impl Graph {
    /// The range `start .. start + len` along `axis`: `[.., n, ..] -> [.., len, ..]`.
    ///
    /// This copies. Use it to split a fused projection into its parts, or to keep only the last token of a sequence.
    pub fn slice(&mut self, name: &str, x: Value, axis: usize, start: usize, len: usize) -> Result<Value> {
        self.op1(name, Slice { axis, start, len }, &[x])
    }

    /// `x` with zeros around it along `axis`: `[.., n, ..] -> [.., before + n + after, ..]`.
    ///
    /// Convolutions and pools have padding of their own.
    pub fn pad(&mut self, name: &str, x: Value, axis: usize, before: usize, after: usize) -> Result<Value> {
        let n = self.type_of(name, x)?.shape.dims().get(axis).copied().unwrap_or(0);
        let total = before.saturating_add(n).saturating_add(after);
        self.op1(name, SlicePad { axis, start: before, total, accumulate: false }, &[x])
    }
}

/// The shape with another length along one axis.
pub(super) fn with_axis(shape: &Shape, axis: usize, len: usize) -> Shape {
    let mut dims = shape.dims().to_vec();
    dims[axis] = len;
    dims.into()
}

/// A range along one axis of a tensor, as contiguous runs: the whole tensor consists of runs of `stride` units, and in
/// each of them the range is the `run` units from `start`.
pub(super) struct Runs {
    /// Whether a unit is a quad; otherwise it is one element.
    quads: bool,
    run: usize,
    stride: usize,
    start: usize,
}

impl Runs {
    /// The range `start .. start + len` of `axis` of a tensor of this shape.
    pub fn new(whole: &Shape, axis: usize, start: usize, len: usize) -> Self {
        let inner: usize = whole.dims()[axis + 1..].iter().product();
        let [run, stride, start] = [len, whole.dims()[axis], start].map(|n| n * inner);
        let quads = [run, stride, start].iter().all(|n| n % 4 == 0);
        let width = if quads { 4 } else { 1 };
        Runs { quads, run: run / width, stride: stride / width, start: start / width }
    }

    /// The WGSL type of a unit: `vector` for quads, `scalar` for single elements.
    pub fn unit(&self, vector: &'static str, scalar: &'static str) -> &'static str {
        if self.quads { vector } else { scalar }
    }

    /// The number of units for this many elements, and the words of the uniform.
    pub fn words(&self, elements: usize) -> (usize, [u32; 4]) {
        let len = if self.quads { elements / 4 } else { elements };
        (len, [len, self.run, self.stride, self.start].map(|w| w as u32))
    }
}

/// The index in the whole tensor of each element of the range, in order: for references.
pub(super) fn range_indices(whole: &Shape, axis: usize, start: usize, len: usize) -> impl Iterator<Item = usize> {
    let inner: usize = whole.dims()[axis + 1..].iter().product();
    let stride = whole.dims()[axis] * inner;
    let runs = whole.len() / stride;
    (0..runs).flat_map(move |r| (0..len * inner).map(move |i| r * stride + start * inner + i))
}

impl Op for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = inputs else { return Err(format!("takes 1 input, got {}", inputs.len())) };
        let n = expect_axis(&x.shape, self.axis)?;
        let inside = self.start.checked_add(self.len).is_some_and(|end| end <= n);
        if self.len == 0 || !inside {
            let (start, end) = (self.start, self.start.saturating_add(self.len));
            let problem = if self.len == 0 { "empty" } else { "out of range" };
            return Err(format!("{start}..{end} is {problem}: axis {} has length {n}", self.axis));
        }
        Ok(vec![TensorType { shape: with_axis(&x.shape, self.axis, self.len), dtype: x.dtype }])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let total = cx.graph.ty(cx.inputs[0]).shape.dims()[self.axis];
        let op = SlicePad { axis: self.axis, start: self.start, total, accumulate: false };
        let dx = cx.graph.op1(&cx.name, op, &[dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let runs = Runs::new(&cx.inputs[0].shape, self.axis, self.start, self.len);
        let (len, words) = runs.words(cx.outputs[0].len());
        let kernel = table_kernel::<Self>("slice", SOURCE, "forward").knob("E", runs.unit("vec4<u32>", "u32"));
        let (kernel, groups) = elementwise::spread(cx.profile, len, kernel);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let x = inputs[0];
        let data = range_indices(&x.shape, self.axis, self.start, self.len).map(|i| x.data[i]).collect();
        vec![Array::new(outputs[0].shape.clone(), data)]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn bytes(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        2 * outputs[0].bytes() as u64
    }

    fn is_light(&self) -> bool {
        true
    }
}

impl Op for SlicePad {
    fn name(&self) -> &'static str {
        "slice_pad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1 + usize::from(self.accumulate))?;
        let x = &inputs[0].shape;
        let n = expect_axis(x, self.axis)?;
        if self.start.checked_add(n).is_none_or(|end| end > self.total) {
            let SlicePad { axis, start, total, .. } = self;
            return Err(format!("{x} from {start} does not fit into length {total} of axis {axis}"));
        }
        let ty = TensorType::f32(with_axis(x, self.axis, self.total));
        match inputs.get(1) {
            Some(base) if *base != ty => Err(format!("the tensor to add to must be {ty}, got {base}")),
            _ => Ok(vec![ty]),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        if cx.needs(0) {
            let len = cx.graph.ty(cx.inputs[0]).shape.dims()[self.axis];
            let name = cx.name.clone();
            let dx = cx.graph.slice(&name, dy, self.axis, self.start, len)?;
            cx.set(0, dx);
        }
        if self.accumulate {
            cx.set(1, dy);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (x, y) = (&cx.inputs[0], &cx.outputs[0]);
        let runs = Runs::new(&y.shape, self.axis, self.start, x.shape.dims()[self.axis]);
        let (len, words) = runs.words(if self.accumulate { x.len() } else { y.len() });
        let kernel = table_kernel::<Self>("slice", SOURCE, "pad")
            .knob("E", runs.unit("vec4<f32>", "f32"))
            .knob("ACCUMULATE", self.accumulate);
        let (kernel, groups) = elementwise::spread(cx.profile, len, kernel);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, whole) = (inputs[0], &outputs[0].shape);
        let mut y = match self.accumulate {
            true => inputs[1].clone(),
            false => Array::zeros(whole.clone()),
        };
        let len = x.shape.dims()[self.axis];
        range_indices(whole, self.axis, self.start, len).zip(&x.data).for_each(|(i, x)| y.data[i] += x);
        vec![y]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        if self.accumulate { inputs[0].len() as u64 } else { 0 }
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        let x = inputs[0].bytes() as u64;
        if self.accumulate { 3 * x } else { x + outputs[0].bytes() as u64 }
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(1)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(SlicePad { accumulate: true, ..*self }) as Arc<dyn Op>)
    }

    fn is_light(&self) -> bool {
        true
    }
}
