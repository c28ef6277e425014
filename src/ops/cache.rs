//! Rows of a longer sequence, at a position known only at run time and given for each sequence of the batch: writing
//! the keys and values of new tokens into a cache, and the dual, reading rows out of it.

use super::cases::{Case, InputFill, Row};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{DType, Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/cache.wgsl");

pub(super) const ROW: Row = Row {
    name: "cache",
    summary: "cache[b, start[b] + i] = rows[b, i] in place, and its dual rows[b, i] = cache[b, start[b] + i]",
    sources: &[SOURCE],
    cases: || {
        let mut cases = vec![];
        let shapes: [([usize; 4], &[f64]); 7] = [
            ([1, 1, 1, 1], &[0.0]),
            ([1, 1, 127, 64], &[126.0]),
            ([2, 5, 33, 12], &[7.0]),
            ([3, 2, 9, 7], &[0.0, 7.0, 3.0]),
            ([2, 4, 6, 20], &[4.0]), // the last two rows do not fit
            ([2, 3, 5, 4], &[1757.0]),
            ([4, 3, 5, 8], &[5.0, 0.0, 4_294_967_295.0, 3.0]),
        ];
        for (shape, starts) in shapes {
            cases.extend([write(shape, starts), read(shape, starts)]);
        }
        cases
    },
    bench: || vec![write([1, 128, 2048, 768], &[512.0]), write([8, 1, 2048, 768], &[512.0, 0.0, 2047.0])],
};

/// The starts repeat if the batch has more sequences.
fn write([b, t, capacity, d]: [usize; 4], starts: &'static [f64]) -> Case {
    let name = format!("write {t} of {capacity} at {starts:?}, b{b} d{d}");
    let case = Case::new(name, CacheWrite, &[&[b, t, d]]).ids(&[b], 1);
    case.fill(1, InputFill::Values(starts)).also(&[b, capacity, d])
}

fn read([b, t, capacity, d]: [usize; 4], starts: &'static [f64]) -> Case {
    let name = format!("read {t} of {capacity} at {starts:?}, b{b} d{d}");
    let case = Case::new(name, CacheRead { time: t }, &[&[b, capacity, d]]).ids(&[b], 1);
    case.fill(1, InputFill::Values(starts))
}

/// `(rows, start, cache) -> cache`: `[batch, time, d], u32 [batch], [batch, capacity, d]`. Puts the `rows` of sequence
/// `b` at `start[b]` and after. Rows past the end are dropped.
#[derive(Clone, Copy, Debug)]
pub struct CacheWrite;

/// `(cache, start) -> rows`: `[batch, capacity, d], u32 [batch] -> [batch, time, d]`. Zeros past the end of the cache.
/// The gradient of [`CacheWrite`].
#[derive(Clone, Copy, Debug)]
pub struct CacheRead {
    /// Number of rows read from each sequence.
    pub time: usize,
}

impl Graph {
    /// Writes new rows into a cache: `rows` `[batch, time, d]`, `start` u32 `[batch]`, `cache` `[batch, capacity, d]`,
    /// returning the updated cache.
    ///
    /// This is how a decoder appends keys and values. The rows of sequence `b` go to `start[b], start[b] + 1, ..`; rows
    /// past the end are dropped. It runs in place if `cache` is a [state](Self::state) that the result is
    /// [stored](Self::store) to.
    pub fn cache_write(&mut self, name: &str, rows: Value, start: Value, cache: Value) -> Result<Value> {
        self.op1(name, CacheWrite, &[rows, start, cache])
    }
}

/// Checks the cache and the starts; returns batch, capacity and width.
fn dims(cache: &TensorType, start: &TensorType) -> Result<[usize; 3], String> {
    match (cache.dtype, cache.shape.dims()) {
        (DType::F32, &[batch, capacity, d]) => {
            expect_starts(start, batch)?;
            Ok([batch, capacity, d])
        }
        _ => Err(format!("the cache must be f32 [batch, capacity, d], got {cache}")),
    }
}

/// Checks that there is one start per sequence.
pub(super) fn expect_starts(start: &TensorType, sequences: usize) -> Result<(), String> {
    match *start == TensorType::u32([sequences]) {
        true => Ok(()),
        false => Err(format!("the start must be u32[{sequences}], one for each sequence, got {start}")),
    }
}

/// One dispatch of `entry` for these rows and this cache.
fn launch<O: Op>(
    cx: &Launch<'_>,
    entry: &'static str,
    rows: &TensorType,
    cache: &TensorType,
    binds: &[Bind],
) -> Program {
    let (time, d) = (rows.shape.dims()[1], rows.shape.cols());
    let (elem, width) = if d.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) };
    let cols = d / width;
    let words = [time * cols, cols, cache.shape.dims()[1]].map(|x| x as u32);
    let kernel = table_kernel::<O>("cache", SOURCE, entry).knob("E", elem);
    elementwise::elements(cx, rows.len() / width, kernel, binds, &words)
}

/// Calls `f(index in rows, index in cache)` for every element that fits.
fn for_each(rows: &Array, cache: &Array, start: &Array, mut f: impl FnMut(usize, usize)) {
    let (time, capacity, d) = (rows.shape.dims()[1], cache.shape.dims()[1], rows.shape.cols());
    for i in 0..rows.data.len() {
        let (b, c) = (i / d / time, i % d);
        let t = start.data[b] as usize + i / d % time;
        if t < capacity {
            f(i, (b * capacity + t) * d + c);
        }
    }
}

/// The gradient of the rows of a write, given that of the cache.
pub(super) fn rows_gradient(g: &mut Graph, name: &str, [dy, start]: [Value; 2], rows: &Shape) -> Result<Value> {
    g.op1(&format!("{name}.rows"), CacheRead { time: rows.dims()[1] }, &[dy, start])
}

/// The gradient of the cache as it was before a write of these rows, given that of the cache after it.
pub(super) fn cache_gradient(g: &mut Graph, name: &str, [dy, start]: [Value; 2], rows: &Shape) -> Result<Value> {
    let zeros = g.fill(&format!("{name}.zeros"), rows.clone(), 0.0)?;
    g.cache_write(&format!("{name}.cache"), zeros, start, dy)
}

impl Op for CacheWrite {
    fn name(&self) -> &'static str {
        "cache_write"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [rows, start, cache] = inputs else { return Err(format!("takes 3 inputs, got {}", inputs.len())) };
        let [batch, _, d] = dims(cache, start)?;
        match (rows.dtype, rows.shape.dims()) {
            (DType::F32, &[b, _, cols]) if [b, cols] == [batch, d] => Ok(vec![cache.clone()]),
            _ => Err(format!("rows must be f32 [{batch}, time, {d}], got {rows}")),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let (dy, start) = (cx.dy0()?, cx.inputs[1]);
        let rows = cx.graph.ty(cx.inputs[0]).shape.clone();
        if cx.needs(0) {
            let drows = rows_gradient(cx.graph, &cx.name, [dy, start], &rows)?;
            cx.set(0, drows);
        }
        if cx.needs(2) {
            let dcache = cache_gradient(cx.graph, &cx.name, [dy, start], &rows)?;
            cx.set(2, dcache);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let binds = [Bind::In(1), Bind::In(0), Bind::Out(0)];
        Ok(launch::<Self>(cx, "write_rows", &cx.inputs[0], &cx.inputs[2], &binds))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let (rows, mut cache) = (inputs[0], inputs[2].clone());
        for_each(rows, inputs[2], inputs[1], |i, at| cache.data[at] = rows.data[i]);
        vec![cache]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn bytes(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * inputs[0].bytes() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(2)
    }

    fn is_light(&self) -> bool {
        true
    }
}

impl Op for CacheRead {
    fn name(&self) -> &'static str {
        "cache_read"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [cache, start] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        let [batch, _, d] = dims(cache, start)?;
        Ok(vec![TensorType::f32([batch, self.time, d])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let (dy, start) = (cx.dy0()?, cx.inputs[1]);
        let cache = cx.graph.ty(cx.inputs[0]).shape.clone();
        let zeros = cx.graph.fill(&format!("{}.zeros", cx.name), cache, 0.0)?;
        let dcache = cx.graph.cache_write(&format!("{}.cache", cx.name), dy, start, zeros)?;
        cx.set(0, dcache);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let binds = [Bind::In(1), Bind::In(0), Bind::Out(0)];
        Ok(launch::<Self>(cx, "read_rows", &cx.outputs[0], &cx.inputs[0], &binds))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let mut rows = Array::zeros(outputs[0].shape.clone());
        let shape = rows.clone();
        for_each(&shape, inputs[0], inputs[1], |i, at| rows.data[i] = inputs[0].data[at]);
        vec![rows]
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
