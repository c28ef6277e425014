//! Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>).
//!
//! Pair `j` of a head of `dh` elements is rotated by `position * theta^(-2 j / dh)`:
//! `(a, b) -> (a cos - b sin, b cos + a sin)`. Two layouts are in use: `(j, j + dh / 2)` in Hugging Face's models, and
//! `(2 j, 2 j + 1)` in the paper and Meta's files. Backward rotates the gradient the other way with the same kernel.
//!
//! [`RopeWrite`] puts the rotated rows into a cache, as decoders do with keys.
//!
//! The frequencies are computed on the host in f64 and passed to the kernel as 48-bit fixed-point fractions of a turn.
//! The kernel's integer arithmetic then loses nothing at any position.

use std::f64::consts::TAU;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::cache::{self, CacheWrite, expect_starts};
use super::cases::{Case, InputFill, Row};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Part, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::AdapterClass;
use crate::quirks::LOOP_ITERATIONS;
use crate::tensor::{DType, Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/rope.wgsl");

/// Keeps the table of frequencies within the 16 KiB that every adapter allows for a uniform.
const MAX_HEAD: usize = 1024;

pub(super) const ROW: Row = Row {
    name: "rope",
    summary: "rotates pairs of elements by position * theta^(-2j/dh); halves or interleaved",
    sources: &[SOURCE],
    cases,
    bench: || {
        let op = Rope { heads: 12, ..Rope::default() };
        [op, Rope { interleaved: true, ..op }].map(|op| Case::new(op.label("8x512x768"), op, &[&[8, 512, 768]])).into()
    },
};

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for interleaved in [false, true] {
        let rope = |heads| Rope { heads, interleaved, ..Rope::default() };
        let case = |op: Rope, shape: &[usize]| Case::new(op.label(&format!("{shape:?}")), op, &[shape]);
        cases.extend([
            case(rope(1), &[1, 1, 2]),
            case(rope(1), &[1, 1757, 4]),
            case(rope(5), &[2, 9, 30]),
            case(rope(3), &[3, 17, 48]),
            case(Rope { theta: 500_000.0, ..rope(2) }, &[7, 256]),
            case(Rope { inverse: true, ..rope(2) }, &[2, 127, 16]),
        ]);
        let llama3 = Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
        let yarn = Scaling::Yarn {
            factor: 4.0,
            original_context: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
        };
        for scaling in [Scaling::Linear { factor: 4.0 }, llama3, yarn] {
            cases.push(case(Rope { scaling, ..rope(2) }, &[1, 300, 64]));
        }
        // Decoding far into a sequence: the first is the last position of a 128k context.
        for start in [131_071, 1_000_003] {
            let op = Rope { has_start: true, ..rope(3) };
            let name = op.label(&format!("start {start}"));
            cases.push(Case::new(name, op, &[&[2, 5, 24]]).ids(&[2], 1).fill(1, InputFill::Constant(f64::from(start))));
        }
        let op = Rope { has_start: true, ..rope(2) };
        let ragged = Case::new(op.label("ragged starts"), op, &[&[2, 2, 3, 16]]).ids(&[4], 1);
        cases.push(ragged.fill(1, InputFill::Values(&[0.0, 700.0, 3.0, 131_069.0])));
        cases.extend([
            write(rope(3), [1, 1, 5, 48], &[4.0]),
            write(Rope { has_start: true, ..rope(2) }, [3, 2, 9, 16], &[0.0, 7.0, 3.0]),
            // The last two rows of the first do not fit, and none of the last.
            write(Rope { has_start: true, ..rope(1) }, [3, 4, 6, 6], &[4.0, 1.0, 4_294_967_295.0]),
        ]);
    }
    // Tighter than the default tolerance: only exact angles achieve it.
    cases.into_iter().map(|case| case.tolerance(1e-13)).collect()
}

/// Rows of sequences that are at these positions, into a cache there.
fn write(rope: Rope, [batch, time, capacity, d]: [usize; 4], starts: &'static [f64]) -> Case {
    let name = rope.label(&format!("into a cache of {capacity} at {starts:?}"));
    let mut case = Case::new(name, RopeWrite { rope, parts: vec![] }, &[&[batch, time, d]]);
    if rope.has_start {
        case = case.ids(&[batch], 1).fill(1, InputFill::Values(&[700.0, 0.0, 3.0]));
    }
    let place = case.inputs.len();
    case.ids(&[batch], 1).fill(place, InputFill::Values(starts)).also(&[batch, capacity, d])
}

/// `(x [, start]) -> y`: `x` and `y` `[.., time, heads * dh]`, `start` u32 with one element per sequence.
///
/// The position of a row is its index along the `time` axis, plus the `start` of its sequence. Add it with
/// [`Graph::rope`] or [`Graph::rope_from`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Heads in the last dimension.
    pub heads: usize,
    /// Base of the frequencies: 10000 unless the model sets another.
    pub theta: f32,
    /// Whether pairs are neighbours `(2 j, 2 j + 1)` rather than `(j, j + dh / 2)`.
    pub interleaved: bool,
    /// Whether to rotate backwards, as the gradient does.
    pub inverse: bool,
    /// Whether a second input gives the position of each sequence's first row, for decoding with a cache.
    pub has_start: bool,
    /// How the frequencies are stretched for a context longer than the one the model was first trained on.
    pub scaling: Scaling,
}

/// `(x [, start], place, cache) -> cache`: [`Rope`], whose rows of sequence `b` are written to the cache at `place[b]`
/// and after. `x` `[batch, time, heads * dh]`, `place` u32 `[batch]`, `cache` `[batch, capacity, heads * dh]`.
///
/// [`Plan::new`](crate::Plan::new) makes it of a [`Rope`] and the [`CacheWrite`] of its result.
#[derive(Clone, Debug)]
pub struct RopeWrite {
    rope: Rope,
    parts: Vec<Part>,
}

/// Changes to the frequencies of a model that was adapted to a longer context.
///
/// Take it from the model's configuration: a model gives wrong results with any scaling but its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scaling {
    /// No change.
    #[default]
    None,
    /// Position interpolation: all frequencies are divided (Chen et al. 2023, <https://arxiv.org/abs/2306.15595>).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// The rule of Llama 3.1: wavelengths longer than `original_context / low_freq_factor` are stretched by `factor`,
    /// those shorter than `original_context / high_freq_factor` are kept, and those between are interpolated.
    Llama3 {
        /// The stretch of the longest wavelengths.
        factor: f32,
        /// `original_context` divided by the shortest wavelength that is stretched in full.
        low_freq_factor: f32,
        /// `original_context` divided by the longest wavelength that is kept.
        high_freq_factor: f32,
        /// Context of the original model, in tokens.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>): pairs that turn more than `beta_fast` times within
    /// the original context are kept, those that turn less than `beta_slow` times are stretched by `factor`, and those
    /// between are interpolated. YaRN also scales the attention scores: see
    /// [`attention_factor`](Self::attention_factor).
    Yarn {
        /// The stretch of the slowest pairs.
        factor: f32,
        /// Context of the original model, in tokens.
        original_context: usize,
        /// Turns above which a pair is kept; usually 32.
        beta_fast: f32,
        /// Turns below which a pair is stretched in full; usually 1.
        beta_slow: f32,
        /// Whether to round the ends of the interpolated range to whole pairs, as most models do.
        truncate: bool,
        /// Factor of the rotated queries and keys; by default `0.1 ln(factor) + 1`.
        attention_factor: Option<f32>,
    },
}

impl Scaling {
    /// Factor of the rotated queries and keys: 1 except for YaRN. The rotation does not include it. Multiply the
    /// attention scores by its square instead.
    pub fn attention_factor(&self) -> f32 {
        match *self {
            Scaling::Yarn { attention_factor: Some(given), .. } => given,
            Scaling::Yarn { factor, .. } if factor > 1.0 => 0.1 * factor.ln() + 1.0,
            _ => 1.0,
        }
    }

    /// What is wrong with the settings, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        let (numbers, context) = match *self {
            Scaling::None => return None,
            Scaling::Linear { factor } => (vec![factor], 1),
            Scaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                (vec![factor, low, high, high - low], original_context)
            }
            Scaling::Yarn { factor, original_context, beta_fast: fast, beta_slow: slow, .. } => {
                (vec![factor, fast, slow, fast - slow, self.attention_factor()], original_context)
            }
        };
        let fine = context > 0 && numbers.iter().all(|x| x.is_finite() && *x > 0.0);
        (!fine).then(|| format!("the numbers of {self:?} must be positive, and the bounds in order"))
    }

    /// The divisor of each pair's frequency in a head of `head` elements.
    pub(crate) fn divisors(&self, theta: f32, head: usize) -> Vec<f64> {
        let rope = Rope { theta, scaling: *self, ..Rope::default() };
        let plain = Rope { scaling: Scaling::None, ..rope };
        (0..head / 2).map(|j| plain.frequency(j, head) / rope.frequency(j, head)).collect()
    }

    /// The frequency of pair `j`, given its unscaled frequency `plain` in radians per position.
    fn apply(&self, plain: f64, j: usize, head: usize, theta: f64) -> f64 {
        // The weight of the unscaled frequency in the interpolation.
        let (factor, kept) = match *self {
            Scaling::None => return plain,
            Scaling::Linear { factor } => (factor, 0.0),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                (factor, (original_context as f64 * plain / TAU - low) / (high - low))
            }
            Scaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                // The pair, as a fractional index, that turns this often within the original context.
                let pair = |turns: f32| {
                    head as f64 * (original_context as f64 / (f64::from(turns) * TAU)).ln() / (2.0 * theta.ln())
                };
                let (low, high) = (pair(beta_fast), pair(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(head as f64 - 1.0));
                let span = if low == high { 0.001 } else { high - low };
                (factor, 1.0 - (j as f64 - low) / span)
            }
        };
        let kept = kept.clamp(0.0, 1.0);
        plain * kept + plain / f64::from(factor) * (1.0 - kept)
    }
}

impl Default for Rope {
    /// One head, theta 10000, halves, forward, positions from 0.
    fn default() -> Self {
        Rope { heads: 1, theta: 10_000.0, interleaved: false, inverse: false, has_start: false, scaling: Scaling::None }
    }
}

impl Graph {
    /// Applies rotary position embedding to `x`, `[.., time, heads * dh]`, with positions from 0.
    ///
    /// Apply it to queries and keys in training and prefill; when decoding with a cache use
    /// [`rope_from`](Self::rope_from).
    ///
    /// ```
    /// use throughline::ops::rope::Rope;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let q = g.input("q", TensorType::f32([2, 16, 48]))?;
    /// let q = g.rope("q.rope", q, Rope { heads: 6, ..Rope::default() })?;
    /// assert_eq!(g.ty(q), &TensorType::f32([2, 16, 48]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn rope(&mut self, name: &str, x: Value, rope: Rope) -> Result<Value> {
        self.op1(name, Rope { has_start: false, ..rope }, &[x])
    }

    /// [`rope`](Self::rope) with positions from `start`, u32 `[batch]`: the number of rows that the cache holds of each
    /// sequence. The batch is the product of the dimensions before `time`.
    pub fn rope_from(&mut self, name: &str, x: Value, start: Value, rope: Rope) -> Result<Value> {
        self.op1(name, Rope { has_start: true, ..rope }, &[x, start])
    }
}

impl Rope {
    /// Elements of a head.
    fn head(&self, x: &Shape) -> usize {
        x.cols() / self.heads
    }

    /// Radians per position of pair `j`.
    fn frequency(&self, j: usize, head: usize) -> f64 {
        let theta = f64::from(self.theta);
        self.scaling.apply(theta.powf(-2.0 * j as f64 / head as f64), j, head, theta)
    }

    /// The kernel's table: for each unit of `width` pairs the high words, then the low words, each padded to a quad.
    fn table(&self, head: usize, width: usize) -> Vec<u32> {
        let turns = |j| (self.frequency(j, head) / TAU * (1u64 << 48) as f64).round() as u64;
        let mut words = Vec::new();
        for unit in 0..head / 2 / width {
            for part in [|t: u64| (t >> 16) as u32, |t: u64| (t & 0xffff) as u32] {
                words.extend((unit * width..(unit + 1) * width).map(|j| part(turns(j))));
                words.resize(words.len().next_multiple_of(4), 0);
            }
        }
        words
    }

    /// Where the two elements of pair `j` are in a head.
    fn pair(&self, j: usize, head: usize) -> (usize, usize) {
        if self.interleaved { (2 * j, 2 * j + 1) } else { (j, j + head / 2) }
    }

    /// The program of op `O`, which rotates its first input, and writes it to its last if that is a cache, of this
    /// capacity.
    fn program<O: Op>(&self, cx: &Launch<'_>, capacity: Option<usize>) -> Result<Program, String> {
        let x = &cx.inputs[0].shape;
        let (rows, time, head) = (x.rows(), x.lead()[x.rank() - 2], self.head(x));
        let quads = !self.interleaved && head % 8 == 0;
        let width = if quads { 4 } else { 1 };
        let units = head / 2 / width;
        // Angles cost loads and arithmetic, which software adapters share between heads.
        let group = if cx.profile.class == AdapterClass::Cpu { self.heads } else { 1 };
        let groups = self.heads / group;
        let kernel = table_kernel::<O>("rope", SOURCE, if self.interleaved { "interleaved" } else { "halves" })
            .knob("E", if quads { "vec4<f32>" } else { "f32" })
            .knob("U", if quads { "vec4<u32>" } else { "u32" })
            .knob("I", if quads { "vec4<i32>" } else { "i32" })
            .knob("UNITS", units as u32)
            .knob("HAS_START", self.has_start)
            .knob("INTO_CACHE", capacity.is_some());
        let sign = if self.inverse { -1.0f32 } else { 1.0 };
        // An invocation makes one unit of a group's heads at a time: the quirk `loops-end-early`.
        cx.profile.quirks.check_loops("the number of heads", self.heads, group + 2)?;
        let len = rows * groups * units;
        let (kernel, grid) = elementwise::spread_thinly(cx.profile, len, LOOP_ITERATIONS / (group + 2), kernel);
        // The table starts at a quad.
        let [len, time, heads, group, groups] = [len, time, self.heads, group, groups].map(|w| w as u32);
        let mut words = vec![len, time, heads, group, groups, sign.to_bits(), capacity.unwrap_or(0) as u32, 0];
        words.extend(self.table(head, width));
        let start = if self.has_start { Bind::In(1) } else { Bind::Null };
        let place = if capacity.is_some() { Bind::In(1 + usize::from(self.has_start)) } else { Bind::Null };
        let binds = [Bind::In(0), start, Bind::Out(0), place];
        Ok(Program::one(kernel, &binds, &words, grid))
    }

    fn label(&self, name: &str) -> String {
        let layout = if self.interleaved { "interleaved" } else { "halves" };
        let scaled = if self.scaling == Scaling::None { String::new() } else { format!(", {:?}", self.scaling) };
        format!("{name} {} heads, {layout}{}{scaled}", self.heads, if self.inverse { ", inverse" } else { "" })
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = 1 + usize::from(self.has_start);
        if inputs.len() != n {
            return Err(format!("takes {n} inputs, got {}", inputs.len()));
        }
        let x = &inputs[0];
        if x.dtype != DType::F32 || x.shape.rank() < 2 {
            return Err(format!("x must be f32 [.., time, heads * dh], got {x}"));
        }
        if self.heads == 0 || !x.shape.cols().is_multiple_of(2 * self.heads) || self.head(&x.shape) > MAX_HEAD {
            return Err(format!(
                "the last dimension must be {} heads of an even size of at most {MAX_HEAD}, got {}",
                self.heads, x.shape
            ));
        }
        if !self.theta.is_finite() || self.theta < 1.0 {
            return Err(format!("theta must be finite and at least 1, got {}", self.theta));
        }
        if let Some(problem) = self.scaling.problem() {
            return Err(problem);
        }
        if self.has_start {
            expect_starts(&inputs[1], x.shape.rows() / x.shape.lead()[x.shape.rank() - 2])?;
        }
        Ok(vec![x.clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let back = Rope { inverse: !self.inverse, ..*self };
        let inputs: Vec<Value> = [dy].into_iter().chain(cx.inputs.get(1).copied()).collect();
        let dx = cx.graph.op1(&cx.name, back, &inputs)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.program::<Self>(cx, None)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let x = &inputs[0].shape;
        let (time, head) = (x.lead()[x.rank() - 2], self.head(x));
        let sign = if self.inverse { -1.0 } else { 1.0 };
        let mut y = inputs[0].clone();
        for (row, elements) in y.data.chunks_mut(x.cols()).enumerate() {
            let start = if self.has_start { inputs[1].data[row / time] } else { 0.0 };
            let position = start + (row % time) as f64;
            for j in 0..head / 2 {
                let (sin, cos) = (sign * position * self.frequency(j, head)).sin_cos();
                let (a, b) = self.pair(j, head);
                for v in elements.chunks_mut(head) {
                    (v[a], v[b]) = (v[a] * cos - v[b] * sin, v[b] * cos + v[a] * sin);
                }
            }
        }
        vec![y]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        3 * outputs[0].len() as u64
    }

    fn written_to_cache(&self, parts: [Part; 2]) -> Option<Arc<dyn Op>> {
        Some(Arc::new(RopeWrite { rope: *self, parts: parts.into() }))
    }

    fn is_light(&self) -> bool {
        true
    }
}

impl RopeWrite {
    /// The inputs of the rope, and those of the write after the rows.
    fn split<'a, T>(&self, inputs: &'a [T]) -> Option<(&'a [T], [&'a T; 2])> {
        let (rope, rest) = inputs.split_at_checked(1 + usize::from(self.rope.has_start))?;
        let [place, cache] = rest else { return None };
        Some((rope, [place, cache]))
    }
}

impl Op for RopeWrite {
    fn name(&self) -> &'static str {
        "rope_write"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let takes = 3 + usize::from(self.rope.has_start);
        let (rope, [place, cache]) =
            self.split(inputs).ok_or_else(|| format!("takes {takes} inputs, got {}", inputs.len()))?;
        let rows = self.rope.infer(rope)?.remove(0);
        CacheWrite.infer(&[rows, place.clone(), cache.clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let (dy, name, n) = (cx.dy0()?, cx.name.clone(), cx.inputs.len());
        let (x, place) = (cx.graph.ty(cx.inputs[0]).shape.clone(), cx.inputs[n - 2]);
        if cx.needs(0) {
            let drows = cache::rows_gradient(cx.graph, &name, [dy, place], &x)?;
            let back = Rope { inverse: !self.rope.inverse, ..self.rope };
            let start = self.rope.has_start.then(|| cx.inputs[1]);
            let inputs: Vec<Value> = [drows].into_iter().chain(start).collect();
            let dx = cx.graph.op1(&name, back, &inputs)?;
            cx.set(0, dx);
        }
        if cx.needs(n - 1) {
            let dcache = cache::cache_gradient(cx.graph, &name, [dy, place], &x)?;
            cx.set(n - 1, dcache);
        }
        Ok(())
    }

    fn key(&self) -> String {
        // Nodes of any name.
        format!("RopeWrite {:?}", self.rope)
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.rope.program::<Self>(cx, Some(cx.outputs[0].shape.dims()[1]))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let Some((rope, [place, cache])) = self.split(inputs) else { return vec![] };
        let rows = self.rope.reference(rope, &[]);
        CacheWrite.reference(&[&rows[0], place, cache], outputs)
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        3 * inputs[0].len() as u64
    }

    fn bytes(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * inputs[0].bytes() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(2 + usize::from(self.rope.has_start))
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn made_by(&self, output: usize) -> Option<usize> {
        (output == 0 && !self.parts.is_empty()).then_some(1)
    }

    fn is_light(&self) -> bool {
        true
    }
}
