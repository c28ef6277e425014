//! Softmax attention without storing the matrix of scores (FlashAttention, Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>).
//!
//! `o = softmax(scale * q k^T) v` for each head, causal or full. Several query heads may share a key and value head
//! (GQA, Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>). Forward also outputs `lse`, the log of the sum of
//! exponentials of each row of scores, from which backward recomputes the probabilities.

use std::ops::Range;

use super::cache::expect_starts;
use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::profile::AdapterClass;
use crate::quirks::LOOP_ITERATIONS;
use crate::tensor::TensorType;

// The texts of each family of kernels; `shaders/attention/shared.wgsl` says what each is for.
const LANES: LaneSource =
    lane_source!("attention/shared.wgsl", "attention/all_keys.wgsl", "attention/own_rows.wgsl", "attention/lanes.wgsl");
const LANES_FROM: LaneSource =
    lane_source!("attention/shared.wgsl", "attention/from.wgsl", "attention/own_rows.wgsl", "attention/lanes.wgsl");
const WIDE: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/own_rows.wgsl",
    "attention/wide.wgsl"
);
const WIDE_FROM: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/from.wgsl",
    "attention/dots.wgsl",
    "attention/own_rows.wgsl",
    "attention/wide.wgsl"
);
const TILED: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/make_deltas.wgsl",
    "attention/tiled.wgsl"
);
const TILED_FROM: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/from.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/read_deltas.wgsl",
    "attention/tiled.wgsl"
);
const DECODE: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/decode.wgsl"
);
const SPLIT: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/split.wgsl"
);
const COMBINE: &str =
    concat!(include_str!("../../shaders/attention/shared.wgsl"), include_str!("../../shaders/attention/combine.wgsl"),);
const ROW_DOTS: &str = concat!(
    include_str!("../../shaders/attention/shared.wgsl"),
    include_str!("../../shaders/attention/row_dots.wgsl"),
);

pub(super) const ROW: Row = Row {
    name: "attention",
    summary: "o = softmax(scale * q k^T) v by head, causal or full, grouped heads; no T x T matrix",
    sources: &[
        LANES.plain,
        LANES_FROM.plain,
        WIDE.plain,
        WIDE_FROM.plain,
        TILED.plain,
        TILED_FROM.plain,
        DECODE.plain,
        SPLIT.plain,
        COMBINE,
        ROW_DOTS,
    ],
    cases,
    bench: || {
        let square = |t: usize, heads: usize| case(1, (t, t), (heads, heads), 64, true);
        let decode = case(1, (1, 1024), (12, 12), 64, true);
        let ragged = cached((1, 1024), (12, 12), 64, &[1023.0, 511.0, 255.0, 127.0]);
        let wide = case(1, (1024, 1024), (2, 2), 256, true);
        let long = cached((1, 4096), (9, 3), 64, &[4095.0]);
        let longer = cached((1, 32_768), (9, 3), 64, &[32_767.0]);
        let one = texts(1, 1024, (6, 6), 64, "one text", &[0.0]);
        let eight = texts(1, 1024, (6, 6), 64, "eight texts", &EIGHT);
        vec![square(256, 6), square(1024, 6), square(4096, 1), wide, one, eight, decode, ragged, long, longer]
    },
};

fn cases() -> Vec<Case> {
    let (causal, full) = (true, false);
    let mut cases = vec![
        case(1, (1, 1), (1, 1), 1, causal),
        case(1, (5, 5), (2, 2), 5, causal),
        case(2, (64, 64), (4, 2), 12, causal),
        case(1, (127, 127), (2, 1), 16, causal),
        case(1, (130, 130), (1, 1), 64, causal),
        case(2, (33, 33), (6, 3), 32, full),
        case(1, (17, 17), (2, 2), 80, causal),
        case(1, (19, 19), (4, 1), 128, full),
        // Heads too wide for the registers of a software adapter.
        case(2, (35, 35), (2, 1), 192, causal),
        case(1, (3, 5), (1, 1), 1024, causal),
        // Without subgroups, so many keys, or queries, that it takes several dispatches.
        case(1, (5, 260), (1, 1), 1023, full),
        case(1, (260, 5), (1, 1), 1023, full),
        // Fewer queries than keys: decoding, and attention to another sequence.
        case(2, (3, 70), (4, 2), 16, causal),
        case(1, (1, 33), (2, 2), 32, causal),
        case(1, (1, 600), (2, 1), 64, causal),
        case(1, (2, 131), (1, 1), 128, causal),
        case(1, (1, 9), (1, 1), 7, full),
        case(2, (37, 5), (2, 2), 8, full),
        case(1, (513, 513), (1, 1), 4, causal),
    ];
    let mut large = case(1, (65, 65), (2, 2), 16, causal);
    large.name += ", large scores";
    cases.push(large.fill(0, InputFill::Normal(4.0)).fill(1, InputFill::Normal(4.0)));
    cases.extend([
        cached((1, 1), (1, 1), 1, &[0.0]),
        cached((1, 64), (4, 2), 16, &[33.0, 0.0, 63.0, 7.0]),
        cached((1, 600), (2, 1), 64, &[599.0]),
        cached((19, 131), (3, 1), 64, &[40.0, 0.0]),
        cached((70, 96), (2, 2), 5, &[0.0]),
        cached((21, 40), (1, 1), 50, &[3.0]),
        cached((9, 40), (1, 1), 128, &[37.0]), // the last queries see the whole cache
        cached((1, 66_000), (1, 1), 4, &[65_999.0]), // too many for an invocation that keeps its rows
        cached((3, 8), (1, 1), 4, &[100.0]),
        cached((6, 30), (2, 1), 8, &[20.0, 3.0, 4_294_967_295.0]),
        // Caches that GPUs split: with few keys, with as many as they hold, and in between; for heads that share keys
        // and heads that do not, for several queries, some of which see no key of the last slice.
        cached((1, 2048), (9, 3), 64, &[0.0]),
        cached((1, 2048), (3, 1), 64, &[2047.0]),
        cached((1, 1300), (4, 2), 16, &[1299.0, 700.0, 0.0, 31.0]),
        cached((4, 1100), (6, 2), 12, &[1000.0, 0.0, 30.0]),
        cached((4, 1025), (2, 2), 7, &[4_294_967_295.0]),
        cached((3, 1030), (14, 1), 20, &[64.0, 1.0]),
        cached((2, 1040), (2, 1), 320, &[900.0]),
        case(1, (1, 1100), (10, 1), 128, full),
        case(1, (4, 2050), (1, 1), 8, causal),
    ]);
    cases.extend(cases_of_texts());
    cases
}

/// The first keys of eight texts of 128 tokens.
static EIGHT: [f64; 1024] = {
    let mut firsts = [0.0; 1024];
    let mut i = 0;
    while i < 1024 {
        firsts[i] = (i / 128 * 128) as f64;
        i += 1;
    }
    firsts
};

/// Texts that share sequences, and first keys that are those of no text.
fn cases_of_texts() -> Vec<Case> {
    const PAST: f64 = 4_294_967_295.0; // every token is a text of its own
    // In sequences of other lengths the values go on cyclically, so that texts begin anywhere.
    const TEXTS: &[f64] = &[0.0, 0.0, 0.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 9.0, 10.0];
    const LONG: &[f64] = &[0.0, 0.0, 0.0, 70.0, 1.0, 140.0, 64.0, 33.0, PAST, 200.0, 5.0, 130.0, 129.0];
    const FEW: &[f64] = &[0.0, 0.0, 2.0];
    vec![
        texts(1, 1, (1, 1), 1, "one token", &[0.0]),
        texts(2, 3, (2, 1), 8, "two texts", FEW),
        texts(1, 11, (2, 2), 5, "texts and padding", TEXTS),
        texts(2, 64, (4, 2), 12, "one text", &[0.0]),
        texts(2, 67, (2, 1), 16, "padding", &[PAST]),
        texts(2, 130, (2, 1), 16, "any", TEXTS),
        texts(1, 260, (4, 2), 64, "any", LONG),
        texts(1, 300, (2, 2), 64, "eight texts", &EIGHT),
        texts(2, 257, (2, 1), 4, "eight texts", &EIGHT),
        texts(1, 520, (2, 1), 20, "any", LONG),
        texts(1, 145, (2, 1), 80, "any", LONG),
        texts(1, 160, (2, 1), 128, "eight texts", &EIGHT),
        texts(1, 150, (2, 1), 192, "any", LONG),
        texts(2, 35, (1, 1), 256, "texts", TEXTS),
        texts(1, 5, (1, 1), 1024, "two texts", FEW),
        // So many keys that without subgroups it takes several dispatches.
        texts(1, 270, (1, 1), 1023, "eight texts", &EIGHT),
        texts(1, 270, (1, 1), 1023, "any", LONG),
    ]
}

/// `firsts` gives the first key that each query sees, `[batch, t]`, cyclically.
fn texts(b: usize, t: usize, heads: (usize, usize), dh: usize, what: &str, firsts: &'static [f64]) -> Case {
    let plain = case(b, (t, t), heads, dh, true);
    let op = Attention { heads: heads.0, kv_heads: heads.1, causal: true, scale: None };
    let mut case = Case::new(format!("{}, {what}", plain.name), AttentionFrom(op), &[]);
    case.inputs = plain.inputs;
    case.ids(&[b, t], 1).fill(3, InputFill::Values(firsts))
}

/// `starts` gives the number of keys before the first query of each sequence.
fn cached(times: (usize, usize), heads: (usize, usize), dh: usize, starts: &'static [f64]) -> Case {
    let plain = case(starts.len(), times, heads, dh, true);
    let op = Attention { heads: heads.0, kv_heads: heads.1, causal: true, scale: None };
    let mut case = Case::new(format!("{}, cache of {starts:?}", plain.name), CachedAttention(op), &[]).forward_only();
    case.inputs = plain.inputs;
    case.ids(&[starts.len()], 1).fill(3, InputFill::Values(starts))
}

fn case(b: usize, (tq, tk): (usize, usize), (heads, kv_heads): (usize, usize), dh: usize, causal: bool) -> Case {
    let op = Attention { heads, kv_heads, causal, scale: None };
    let name = format!("b{b} t{tq}/{tk} h{heads}/{kv_heads} d{dh}{}", if causal { " causal" } else { "" });
    let kv = [b, tk, kv_heads * dh];
    Case::new(name, op, &[&[b, tq, heads * dh], &kv, &kv])
}

/// `(q, k, v) -> (o, lse)`: `q` and `o` `[batch, tq, heads * dh]`, `k` and `v` `[batch, tk, kv_heads * dh]`, `lse`
/// `[batch * heads * tq]`. If `causal`, query `t` sees keys up to `t + tk - tq`.
///
/// A head has at most 1024 elements. Pass it to [`Graph::attention`] or [`Graph::attention_cached`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads. `heads` must be a multiple of it.
    pub kv_heads: usize,
    /// Whether a query sees no keys after its own position. False in encoders.
    pub causal: bool,
    /// Factor of the scores; `1 / sqrt(dh)` if `None`.
    pub scale: Option<f32>,
}

/// `(q, k, v, start) -> (o, lse)`: causal attention to a cache of keys and values, for decoding. `start`, u32
/// `[batch]`, is the number of keys before that of each sequence's first query.
///
/// Query `t` of sequence `b` sees the keys up to `t + start[b]`. What the cache holds after the last key that any query
/// sees does not matter, even if it is NaN. There is no gradient.
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention(Attention);

/// `(q, k, v, first) -> (o, lse)`: causal [`Attention`] from a first key on, for texts that share a sequence. `first`,
/// u32 `[batch, time]`, is the first key that each query sees: the place where its text begins.
///
/// Query `t` of sequence `b` sees the keys from `first[b, t]` to `t`, or only its own if `first[b, t]` is after that.
#[derive(Clone, Copy, Debug)]
pub struct AttentionFrom(Attention);

/// `(q, k, v, o, lse, do) -> (dq, dk, dv)`: the gradient of [`Attention`], and with `first` as one more input that of
/// [`AttentionFrom`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward(Attention, Keys);

impl Graph {
    /// Attention by head: `q` `[batch, tq, heads * dh]`, `k` and `v` `[batch, tk, kv_heads * dh]`, result like `q`.
    ///
    /// Use it for training, and for encoders. Memory grows with `tq + tk`, not with their product. To decode with a
    /// cache use [`attention_cached`](Self::attention_cached).
    pub fn attention(&mut self, name: &str, q: Value, k: Value, v: Value, op: Attention) -> Result<Value> {
        self.op1(name, op, &[q, k, v])
    }

    /// Causal [`attention`](Self::attention) for texts that share a sequence: query `t` of sequence `b` sees the keys
    /// from `first[b, t]` to `t`.
    ///
    /// Use it to train on many short texts without a row of padding for each. `first`, u32 `[batch, time]`, is the place
    /// in the sequence where the text of each token begins. Padding may be texts of one token. There are as many
    /// queries as keys, and `op` must be causal. A query whose `first` is after itself sees its own key.
    ///
    /// ```
    /// use throughline::ops::attention::Attention;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let [q, k, v] = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([1, 6, 64])));
    /// let first = g.input("first", TensorType::u32([1, 6]))?; // 0, 0, 0, 3, 3, 5: of three, two and one token
    /// let op = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
    /// let o = g.attention_from("o", [q?, k?, v?], first, op)?;
    /// assert_eq!(g.ty(o).shape.dims(), [1, 6, 64]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn attention_from(&mut self, name: &str, [q, k, v]: [Value; 3], first: Value, op: Attention) -> Result<Value> {
        self.op1(name, AttentionFrom(op), &[q, k, v, first])
    }

    /// [`attention`](Self::attention) to a cache, `k` and `v` `[batch, capacity, kv_heads * dh]`.
    ///
    /// `start`, u32 `[batch]`, is the number of rows of each sequence that the cache held before. The keys and values
    /// that belong to `q` must follow them already (see [`cache_write`](Self::cache_write)). `op` must be causal.
    ///
    /// ```
    /// use throughline::ops::attention::Attention;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let start = g.input("start", TensorType::u32([1]))?;
    /// let [q, k, v] = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([1, 1, 64])));
    /// let [keys, values] = ["keys", "values"].map(|n| g.state(n, TensorType::f32([1, 512, 64])));
    /// let (q, k, v, keys, values) = (q?, k?, v?, keys?, values?);
    /// let new_keys = g.cache_write("new_keys", k, start, keys)?;
    /// let new_values = g.cache_write("new_values", v, start, values)?;
    /// let op = Attention { heads: 1, kv_heads: 1, causal: true, scale: None };
    /// let o = g.attention_cached("o", q, [new_keys, new_values], start, op)?;
    /// g.store(new_keys, keys)?;
    /// g.store(new_values, values)?;
    /// assert_eq!(g.ty(o).shape.dims(), [1, 1, 64]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn attention_cached(
        &mut self,
        name: &str,
        q: Value,
        [k, v]: [Value; 2],
        start: Value,
        op: Attention,
    ) -> Result<Value> {
        self.op1(name, CachedAttention(op), &[q, k, v, start])
    }
}

/// The most elements of a head that any case tests.
const WIDEST: usize = 1024;

/// Which keys a query may see, apart from those after it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Keys {
    All,
    /// Those of a cache, of which input 3 says how many were there before.
    Cached,
    /// Those from a first one on, which input 3 gives; backward, the last input.
    From,
}

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    tq: usize,
    tk: usize,
    dh: usize,
    kv_heads: usize,
    /// Query heads that share a key and value head.
    sharing: usize,
}

impl Attention {
    fn dims(&self, inputs: &[TensorType]) -> Result<Dims, String> {
        let (h, kv) = (self.heads, self.kv_heads);
        if h == 0 || kv == 0 || h % kv != 0 {
            return Err(format!("heads ({h}) must be a multiple of kv_heads ({kv})"));
        }
        let &[batch, tq, width] = inputs[0].shape.dims() else {
            return Err(format!("q must be [batch, time, heads * dh], got {}", inputs[0].shape));
        };
        if width % h != 0 {
            return Err(format!("the width {width} of q is not a multiple of {h} heads"));
        }
        let dh = width / h;
        if dh > WIDEST {
            return Err(format!("heads of {dh} elements are wider than {WIDEST}, the most that the kernels take"));
        }
        let tk = inputs[1].shape.dims().get(1).copied().unwrap_or(0);
        for (name, ty) in [("k", &inputs[1]), ("v", &inputs[2])] {
            if ty.shape.dims() != [batch, tk, kv * dh] {
                return Err(format!("{name} must be [{batch}, time, {}], got {}", kv * dh, ty.shape));
            }
        }
        if self.causal && tq > tk {
            return Err(format!("causal attention of {tq} queries needs as many keys, got {tk}"));
        }
        Ok(Dims { batch, tq, tk, dh, kv_heads: kv, sharing: h / kv })
    }

    fn scale(&self, dh: usize) -> f32 {
        self.scale.unwrap_or(1.0 / (dh as f32).sqrt())
    }

    /// Adds the dispatches of one kernel for `times` rows of `heads` heads, which meet `others` of the other side in
    /// `loops` loops over columns.
    fn dispatch(
        &self,
        program: &mut Program,
        cx: &Launch<'_>,
        (kernel, binds): (Kernel, &[Bind]),
        (times, heads): (usize, usize),
        (others, loops): (usize, usize),
        tile: Tile,
    ) -> Result<(), String> {
        let d = self.dims(&cx.inputs[..3])?;
        let blocks = times.div_ceil(tile.rows_of_group());
        let groups = blocks * heads * d.batch * tile.parts(d.dh);
        let kernel = kernel.knob("CAUSAL", self.causal);
        let step = tile.others_of_dispatch(d.dh, loops).unwrap_or(others);
        for since in (0..others).step_by(step) {
            let words = self.words(&d, blocks, groups, since..others.min(since + step));
            program.dispatch(kernel.clone(), binds, &words, cx.profile.grid(groups));
        }
        Ok(())
    }

    /// The forward pass.
    fn launch_forward<O: Op>(&self, cx: &Launch<'_>, keys: Keys) -> Result<Program, String> {
        let d = self.dims(&cx.inputs[..3])?;
        let of_keys = if keys == Keys::All { Bind::Null } else { Bind::In(3) };
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0), Bind::Out(1), of_keys];
        let tile = Tile::pick(&Tile::forward(cx, &d, keys), cx.variant)?;
        let kernel = tile.kernel::<O>("forward", d.dh);
        let kernel = if keys == Keys::Cached { kernel.knob("CACHED", true) } else { kernel };
        let mut program = Program::default();
        if let Cut::Split(split) = tile.cut {
            self.launch_split::<O>(&mut program, cx, (kernel, &binds), split)?;
            return Ok(program);
        }
        self.dispatch(&mut program, cx, (kernel, &binds), (d.tq, self.heads), (d.tk, 2), tile)?;
        Ok(program)
    }

    /// Few queries on a GPU: the slices of their keys, and then the dispatch that combines them, if they are several.
    fn launch_split<O: Op>(
        &self,
        program: &mut Program,
        cx: &Launch<'_>,
        (kernel, binds): (Kernel, &[Bind; 6]),
        Split { rows, slices, .. }: Split,
    ) -> Result<(), String> {
        let d = self.dims(&cx.inputs[..3])?;
        let blocks = (d.tq * d.sharing).div_ceil(rows);
        let groups = d.batch * d.kv_heads * blocks * slices;
        let kernel = kernel.knob("CAUSAL", self.causal);
        let words = self.words(&d, blocks, groups, 0..d.tk);
        let &[q, k, v, o, lse, start] = binds;
        if slices == 1 {
            program.dispatch(kernel, binds, &words, cx.profile.grid(groups));
            return Ok(());
        }
        let all = d.batch * d.tq * self.heads;
        let parts = program.scratch(TensorType::f32([all, slices, d.dh]));
        let stats = program.scratch(TensorType::f32([all, slices, 2]));
        let binds = [q, k, v, Bind::Scratch(parts), Bind::Scratch(stats), start];
        program.dispatch(kernel, &binds, &words, cx.profile.grid(groups));
        let blocks = units(d.dh).2.div_ceil(COMBINED);
        let kernel = shared_kernel::<O>(COMBINE, "combine", d.dh)
            .knob("SLICES", slices as u32)
            .knob("SETS", slices.next_power_of_two().min(16) as u32);
        let binds = [Bind::ScratchIn(parts), Bind::ScratchIn(stats), o, lse];
        let words = self.words(&d, blocks, all * blocks, 0..d.tk);
        program.dispatch(kernel, &binds, &words, cx.profile.grid(all * blocks));
        Ok(())
    }

    /// `o` and `lse`, where query `t` of sequence `b` sees the keys `seen(sizes, b, t)`.
    fn reference_forward(
        &self,
        inputs: &[&Array],
        outputs: &[TensorType],
        seen: impl Fn(&Dims, usize, usize) -> Range<usize>,
    ) -> Vec<Array> {
        let types: Vec<TensorType> = inputs[..3].iter().map(|a| TensorType::f32(a.shape.clone())).collect();
        // `infer` accepted these shapes.
        let Ok(d) = self.dims(&types) else { return vec![] };
        let (q, k, v) = (&inputs[0].data, &inputs[1].data, &inputs[2].data);
        let scale = f64::from(self.scale(d.dh));
        let mut o = Array::zeros(outputs[0].shape.clone());
        let mut lse = vec![f64::NEG_INFINITY; d.batch * self.heads * d.tq];
        let stat = |b: usize, h: usize, t: usize| (b * self.heads + h) * d.tq + t;
        // Two passes: the sums of exponentials, then the weighted values.
        self.for_each_pair(&d, &seen, |b, t, h, key| {
            let [qr, kr] = self.ranges(&d, (b, t, h, key));
            let s = scale * dot(&q[qr], &k[kr]);
            let l = &mut lse[stat(b, h, t)];
            *l = l.max(s) + (-(*l - s).abs()).exp().ln_1p();
        });
        self.for_each_pair(&d, &seen, |b, t, h, key| {
            let [qr, kr] = self.ranges(&d, (b, t, h, key));
            let prob = (scale * dot(&q[qr.clone()], &k[kr.clone()]) - lse[stat(b, h, t)]).exp();
            o.data[qr].iter_mut().zip(&v[kr]).for_each(|(o, v)| *o += prob * v);
        });
        vec![o, Array::new(outputs[1].shape.clone(), lse)]
    }

    fn words(&self, d: &Dims, blocks: usize, groups: usize, others: Range<usize>) -> [u32; 10] {
        let [h, kv, tq, tk, blocks, groups] = [self.heads, self.kv_heads, d.tq, d.tk, blocks, groups].map(|x| x as u32);
        let [since, until, tokens] = [others.start, others.end, d.batch * d.tq].map(|x| x as u32);
        [h, kv, tq, tk, self.scale(d.dh).to_bits(), blocks, groups, since, until, tokens]
    }

    /// Adds the backward pass, with the first keys if they are input 3.
    fn add_backward(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let mut inputs = cx.inputs[..3].to_vec();
        inputs.extend([cx.outputs[0], cx.outputs[1], cx.dy0()?]);
        inputs.extend(cx.inputs.get(3));
        let keys = if inputs.len() > 6 { Keys::From } else { Keys::All };
        let grads = cx.graph.op(&cx.name, AttentionBackward(*self, keys), &inputs)?;
        (0..3).for_each(|i| cx.set(i, grads[i]));
        Ok(())
    }

    /// The variants of the forward pass.
    fn forward_variants(&self, cx: &Launch<'_>, keys: Keys) -> Vec<String> {
        self.dims(&cx.inputs[..3]).map(|d| Tile::names(&Tile::forward(cx, &d, keys))).unwrap_or_default()
    }

    /// The number of pairs of query and key that see each other, over all heads.
    fn pairs(&self, d: &Dims) -> u64 {
        let (tq, tk) = (d.tq as u64, d.tk as u64);
        let pairs = if self.causal { tq * (tk - tq) + tq * (tq + 1) / 2 } else { tq * tk };
        pairs * (d.batch * self.heads) as u64
    }

    /// The keys that query `t` sees with `ahead` keys before that of the first query.
    fn seen(&self, d: &Dims, t: usize, ahead: usize) -> Range<usize> {
        0..if self.causal { (t + ahead + 1).min(d.tk) } else { d.tk }
    }

    /// Calls `f(batch, query, head, key)` for all pairs that see each other, in order. Query `t` of sequence `b` sees
    /// the keys `seen(d, b, t)`.
    fn for_each_pair(
        &self,
        d: &Dims,
        seen: impl Fn(&Dims, usize, usize) -> Range<usize>,
        mut f: impl FnMut(usize, usize, usize, usize),
    ) {
        for b in 0..d.batch {
            for h in 0..self.heads {
                for t in 0..d.tq {
                    seen(d, b, t).for_each(|key| f(b, t, h, key));
                }
            }
        }
    }

    /// The range of a head in a row of `q`, and in a row of `k`.
    fn ranges(&self, d: &Dims, (b, t, h, key): (usize, usize, usize, usize)) -> [Range<usize>; 2] {
        let q = ((b * d.tq + t) * self.heads + h) * d.dh;
        let kv = ((b * d.tk + key) * self.kv_heads + h / (self.heads / self.kv_heads)) * d.dh;
        [q..q + d.dh, kv..kv + d.dh]
    }
}

/// How a kernel splits its work.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// Each invocation keeps this many whole rows.
    Rows(usize),
    /// Each invocation has this many rows, too wide to keep, which meet so many of the other side at a time.
    Wide(usize, usize),
    /// So many invocations share four rows, and make so many units of their sums.
    Tiled { lanes: usize, part: usize },
    /// A workgroup works on one row, and this many invocations share its keys.
    Decode(usize),
    /// A workgroup works on rows that share a key head, and on a slice of their keys.
    Split(Split),
}

/// How few queries of many heads meet their keys on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Split {
    /// Rows of a workgroup.
    rows: usize,
    /// Invocations that share a key.
    lanes: usize,
    /// Neighbours whose sums shuffles can add.
    reach: usize,
    /// Workgroups that share the keys of a row.
    slices: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    cut: Cut,
    group: usize,
    subgroups: bool,
    /// Whether queries see keys from a first one on.
    from: bool,
}

/// The most units of a row that an invocation on a software adapter can keep: the quirk `no-long-unrolling`.
const UNROLLED: usize = 32;

/// Quads of workgroup memory that any device has: `wgpu::Limits::downlevel_defaults`.
const WORKGROUP_QUADS: usize = 16_352 / 16;

/// The most rows of a workgroup on a software adapter, which with [`Keys::From`] looks for the first key of them all.
const OWN_ROWS: usize = 128;

/// Up to this many queries, one workgroup for each wastes less than the unused part of a tile.
const FEW: usize = 4;

/// Keys that few queries meet in one dispatch: to read so many takes a workgroup about as long as it takes to start the
/// dispatch that combines slices.
const UNSPLIT: usize = 1024;

/// The fewest keys of a full cache that are worth a slice.
const SLICE: usize = 32;

/// Units of a row that a workgroup of combine.wgsl makes.
const COMBINED: usize = 16;

/// Workgroups that keep a large GPU busy when all they do is read.
const BUSY: usize = 160;

impl Tile {
    /// The ways to split a forward pass.
    fn forward(cx: &Launch<'_>, d: &Dims, keys: Keys) -> Vec<Tile> {
        let few = d.tq <= FEW && keys != Keys::From;
        if few && cx.profile.class == AdapterClass::Gpu {
            // The tuner, whose caches are empty, could not tell what is best.
            return vec![Tile::split(cx, d)];
        }
        let rows = if d.dh <= 64 && !few { [2, 1] } else { [1, 2] };
        let mut tiles = Tile::all(cx, d, &rows, d.tk, keys);
        if let (AdapterClass::Cpu, true, (group, false)) = (cx.profile.class, few, cx.profile.vector_lanes()) {
            // Passing rows around would cost no additional loads, and loads are what takes time: so only without
            // subgroups. Its invocations keep sums, too. They go over units, and over the keys of their team.
            let dim = units(d.dh).2;
            let iterations = (dim + group + 2) * d.tk.div_ceil(4 * group);
            if dim <= UNROLLED * group && iterations < LOOP_ITERATIONS {
                tiles.truncate(1);
                tiles.insert(0, Tile { cut: Cut::Decode(group), group, subgroups: false, from: false });
            }
        }
        tiles
    }

    /// The ways to split a backward pass.
    fn backward(cx: &Launch<'_>, d: &Dims, keys: Keys) -> Vec<Tile> {
        let rows: &[usize] = match d.dh {
            0..=32 => &[2, 1],
            33..=64 => &[1, 2],
            _ => &[1],
        };
        Tile::all(cx, d, rows, d.tk.max(d.tq * d.sharing), keys)
    }

    /// On software adapters a row of the other side is expensive to load and registers spill cheaply, so an invocation
    /// keeps one of these numbers of `rows`, unless they are too wide, or meet so many `others` that it would run into
    /// the quirk `loops-end-early`. On GPUs workgroup memory is cheap and occupancy counts, so more invocations share
    /// wide heads: no more than eight elements each of a row's sum, or what Apple's M1 can keep in registers.
    fn all(cx: &Launch<'_>, d: &Dims, rows: &[usize], others: usize, keys: Keys) -> Vec<Tile> {
        let from = keys == Keys::From;
        if cx.profile.class == AdapterClass::Cpu {
            let (group, subgroups) = cx.profile.vector_lanes();
            let looking = if from { OWN_ROWS } else { 0 };
            let fits = units(d.dh).2 <= UNROLLED && others + 2 * UNROLLED + looking < LOOP_ITERATIONS;
            let cuts = match fits {
                true => rows.iter().map(|&n| Cut::Rows(n)).collect(),
                false => vec![Tile::wide(d, subgroups)],
            };
            return cuts.into_iter().map(|cut| Tile { cut, group, subgroups, from }).collect();
        }
        let shapes: &[(usize, usize)] = match d.dh {
            0..=16 => &[(64, 4), (64, 8)],
            17..=64 => &[(128, 8), (128, 16), (64, 8)],
            65..=128 => &[(128, 16), (64, 16)],
            129..=256 => &[(128, 32), (64, 32)],
            _ => &[(128, 64), (64, 64)],
        };
        shapes.iter().map(|&shape| Tile { from, ..Tile::tiled(cx, d.dh, shape, 8) }).collect()
    }

    /// Wide heads on a software adapter. More rows need fewer loads for each product, as many as registers allow.
    fn wide(d: &Dims, subgroups: bool) -> Cut {
        match (subgroups, d.tq <= FEW) {
            (true, few) => Cut::Wide(if few { 1 } else { 2 }, 32),
            (false, few) => Cut::Wide(if few { 1 } else { 4 }, 8),
        }
    }

    /// Few queries on a GPU. Where the keys are not split, each row has a workgroup of its own unless there are plenty:
    /// they start together, and what one reads again is in the cache.
    fn split(cx: &Launch<'_>, d: &Dims) -> Tile {
        let shuffles = cx.profile.subgroup_lanes().map_or(0, |n| n as usize);
        // Elements of a row that an invocation has, and the most rows: what Apple's M1 can keep in registers.
        let (own, most) = match d.dh {
            0..=64 => (4, 8),
            65..=128 => (4, 7),
            129..=256 if shuffles < 32 => (4, 4),
            _ => (8, 2),
        };
        let lanes = d.dh.div_ceil(own).next_power_of_two().max(4);
        let all = d.sharing * d.tq;
        let most = all.min(most).min(lanes);
        let groups = |rows: usize| d.batch * d.kv_heads * all.div_ceil(rows);
        let (rows, slices) = if d.tk <= UNSPLIT || groups(most) >= BUSY {
            ((1..=most).rev().find(|&rows| groups(rows) >= BUSY).unwrap_or(1), 1)
        } else {
            (most, BUSY.div_ceil(groups(most)).next_power_of_two().min(d.tk.div_ceil(SLICE)))
        };
        let rows = all.div_ceil(all.div_ceil(rows)); // evenly
        // As many invocations as meet all keys at once, within limits.
        let allowed = 1 << cx.profile.max_invocations.clamp(128, 256).ilog2();
        let group = (d.tk.div_ceil(slices) * lanes / 4).next_power_of_two().clamp(lanes.max(64), allowed);
        let subgroups = shuffles >= lanes;
        let reach = if subgroups { shuffles.min(group) } else { lanes };
        let split = Split { rows, lanes, reach, slices };
        Tile { cut: Cut::Split(split), group, subgroups, from: false }
    }

    /// `own` is how many elements of each row's sum an invocation can keep. If the lanes cannot keep all, it takes
    /// several workgroups, unless no small number of them can share a row evenly. Subgroups help if each of them contains
    /// all invocations that share a row.
    fn tiled(cx: &Launch<'_>, dh: usize, (group, lanes): (usize, usize), own: usize) -> Tile {
        let (_, width, dim) = units(dh);
        let least = dh.div_ceil(lanes * own);
        let parts = (least..=4 * least).find(|parts| dim.is_multiple_of(*parts) && dim / parts * width <= lanes * own);
        let subgroups = cx.profile.subgroup_lanes().is_some_and(|n| n as usize >= lanes);
        Tile { cut: Cut::Tiled { lanes, part: dim / parts.unwrap_or(1) }, group, subgroups, from: false }
    }

    /// The one for the second half of a backward pass. On GPUs it has two sums for each row, so an invocation keeps less
    /// of them.
    fn for_keys(self, cx: &Launch<'_>, dh: usize) -> Tile {
        let Cut::Tiled { lanes, .. } = self.cut else { return self };
        let lanes = if dh > 4 * lanes { (2 * lanes).min(64) } else { lanes };
        Tile { from: self.from, ..Tile::tiled(cx, dh, (self.group, lanes), 4) }
    }

    /// The one that a launch selects.
    fn pick(tiles: &[Tile], variant: usize) -> Result<Tile, String> {
        tiles.get(variant).copied().ok_or_else(|| format!("there are {} variants, not {variant}", tiles.len()))
    }

    fn names(tiles: &[Tile]) -> Vec<String> {
        let name = |t: &Tile| match t.cut {
            Cut::Rows(n) => format!("{n} rows a lane"),
            Cut::Wide(rows, others) => format!("{rows} rows a lane, {others} at a time"),
            Cut::Tiled { lanes, .. } => format!("{} rows x {}", t.rows_of_group(), 4 * lanes),
            Cut::Decode(lanes) => format!("a row by {} of {lanes}", t.group),
            Cut::Split(s) => format!("{} rows by {} of {}, {} slices", s.rows, t.group, s.lanes, s.slices),
        };
        tiles.iter().map(name).collect()
    }

    /// Workgroups that share a tile of rows with `dh` elements.
    fn parts(&self, dh: usize) -> usize {
        let Cut::Tiled { part, .. } = self.cut else { return 1 };
        units(dh).2 / part
    }

    fn rows_of_group(&self) -> usize {
        match self.cut {
            Cut::Rows(n) | Cut::Wide(n, _) => self.group * n,
            Cut::Tiled { lanes, .. } => 4 * self.group / lanes,
            Cut::Decode(_) => 1,
            Cut::Split(split) => split.rows,
        }
    }

    /// The most rows of the other side that one dispatch may meet, in `loops` loops over the columns of each set that
    /// an invocation meets at a time. `None` if any number will do.
    fn others_of_dispatch(&self, dh: usize, loops: usize) -> Option<usize> {
        let Cut::Wide(_, others) = self.cut else { return None };
        // One more for each loop, and one for the loop over sets: the quirk `loops-end-early`.
        let iterations = (units(dh).2 + 2) * loops;
        let looking = if self.from { OWN_ROWS } else { 0 };
        Some(((LOOP_ITERATIONS - looking) / iterations).max(1) * others)
    }

    /// The texts and the entry point; `plain` is the name of the latter in `lanes.wgsl`.
    fn family(&self, plain: &'static str) -> (LaneSource, &'static str) {
        let entry = match (self.cut, plain) {
            (Cut::Rows(_), _) => plain,
            (Cut::Wide(..), "backward_q") => "wide_backward_q",
            (Cut::Wide(..), "backward_kv") => "wide_backward_kv",
            (Cut::Wide(..), _) => "wide_forward",
            (Cut::Decode(_), _) => "decode",
            (Cut::Split(_), _) => "split",
            (Cut::Tiled { .. }, "backward_q") => "tiled_backward_q",
            (Cut::Tiled { .. }, "backward_kv") => "tiled_backward_kv",
            (Cut::Tiled { .. }, _) => "tiled_forward",
        };
        let text = match (self.cut, self.from) {
            (Cut::Rows(_), false) => LANES,
            (Cut::Rows(_), true) => LANES_FROM,
            (Cut::Wide(..), false) => WIDE,
            (Cut::Wide(..), true) => WIDE_FROM,
            (Cut::Tiled { .. }, false) => TILED,
            (Cut::Tiled { .. }, true) => TILED_FROM,
            (Cut::Decode(_), _) => DECODE,
            (Cut::Split(_), _) => SPLIT,
        };
        (text, entry)
    }

    fn kernel<O: Op>(&self, plain: &'static str, dh: usize) -> Kernel {
        let (elem, width, dim) = units(dh);
        let divisor = |most: usize| (1..=most.min(dim)).rev().find(|n| dim.is_multiple_of(*n)).unwrap_or(1);
        let (source, entry) = self.family(plain);
        let kernel = shared_kernel::<O>(source.text(self.subgroups), entry, dh)
            .knob("Moved", elem)
            .knob("GROUP", self.group as u32);
        match self.cut {
            Cut::Rows(rows) => {
                // As much of a row as the lanes can hold, and as many rows as fit next to each other.
                let lanes = if self.subgroups { self.group } else { 8 };
                let span = divisor(lanes);
                let step = if self.subgroups { lanes / span } else { 1 };
                kernel
                    .knob("ROWS", rows as u32)
                    .knob("SPAN", span as u32)
                    .knob("PIECE", divisor(2) as u32)
                    .knob("STEP", step as u32)
            }
            Cut::Wide(rows, others) => {
                let loads = if self.subgroups { others / self.group } else { others };
                kernel.knob("ROWS", rows as u32).knob("OTHERS", others as u32).knob("LOADS", loads as u32)
            }
            Cut::Tiled { lanes, part } => {
                // 64 bytes of a row at a time, or what fits beside the weights; then as many whole rows as fit the same
                // memory.
                let (rows, others) = (self.rows_of_group(), 4 * lanes);
                let stride = (WORKGROUP_QUADS - 4 * self.group) * 4 / width / (rows + others);
                let chunk = divisor((16 / width).min((stride - 1) | 1));
                let memory = (rows + others) * (chunk | 1);
                let slab = (memory / part.next_multiple_of(lanes)).clamp(1, others);
                kernel
                    .knob("LANES", lanes as u32)
                    .knob("PART", part as u32)
                    .knob("CHUNK", chunk as u32)
                    .knob("SLAB", 1 << slab.ilog2())
            }
            Cut::Decode(lanes) => kernel.knob("LANES", lanes as u32),
            Cut::Split(Split { rows, lanes, reach, slices }) => kernel
                .knob("LANES", lanes as u32)
                .knob("ROWS", rows as u32)
                .knob("REACH", reach as u32)
                .knob("SLICES", slices as u32),
        }
    }
}

/// What kernels load at a time: its type, its number of elements, and the number of loads in a head of `dh` elements.
fn units(dh: usize) -> (&'static str, usize, usize) {
    let (elem, width) = if dh.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) };
    (elem, width, dh / width)
}

/// A kernel with the knobs of `shared.wgsl` that depend on the width of a head.
fn shared_kernel<O: Op>(source: &'static str, entry: &'static str, dh: usize) -> Kernel {
    let (elem, width, dim) = units(dh);
    table_kernel::<O>("attention", source, entry).knob("E", elem).knob("WIDTH", width as u32).knob("DIM", dim as u32)
}

/// In four sums, which the compiler turns into one vector.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    let mut sums = [0.0; 4];
    for (a, b) in a.iter().zip(b) {
        (0..4).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 3)?;
        let d = self.dims(inputs)?;
        Ok(vec![inputs[0].clone(), TensorType::f32([d.batch * self.heads * d.tq])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        self.add_backward(cx)
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.forward_variants(cx, Keys::All)
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.launch_forward::<Self>(cx, Keys::All)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        self.reference_forward(inputs, outputs, |d, _, t| self.seen(d, t, d.tk.saturating_sub(d.tq)))
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        self.dims(inputs).map_or(0, |d| 4 * d.dh as u64 * self.pairs(&d))
    }
}

impl Op for CachedAttention {
    fn name(&self) -> &'static str {
        "attention_cached"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [_, _, _, start] = inputs else { return Err(format!("takes 4 inputs, got {}", inputs.len())) };
        if !self.0.causal {
            return Err("attention to a cache must be causal".into());
        }
        expect_starts(start, inputs[0].shape.dims().first().copied().unwrap_or(1))?;
        self.0.infer(&inputs[..3])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("attention to a cache is for decoding; train with `attention`"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.0.forward_variants(cx, Keys::Cached)
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.0.launch_forward::<Self>(cx, Keys::Cached)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        self.0.reference_forward(inputs, outputs, |d, b, t| self.0.seen(d, t, inputs[3].data[b] as usize))
    }

    /// As if the cache were full: its length is not known before the step.
    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.0.flops(&inputs[..3], outputs)
    }
}

impl AttentionBackward {
    /// Adds the dispatch for what both halves of the backward pass read of each row, if the first half does not make it
    /// itself. Returns what to bind for it in the second half, and that with the output and what may follow in the
    /// first.
    fn stats(&self, program: &mut Program, cx: &Launch<'_>, d: &Dims, tile: Tile) -> ([Bind; 2], Vec<Bind>) {
        let rows = d.batch * self.0.heads * d.tq;
        let (words, grid) = (self.0.words(d, 1, rows, 0..0), cx.profile.grid(rows.div_ceil(64)));
        let kernel = |entry| shared_kernel::<Self>(ROW_DOTS, entry, d.dh);
        if tile.from {
            let stats = program.scratch(TensorType::f32([rows, 2]));
            let firsts = program.scratch(TensorType::u32([2, d.batch, d.tq]));
            let made = [Bind::Scratch(stats), Bind::Scratch(firsts)];
            let binds = [&[Bind::In(3), Bind::In(5), Bind::In(4), Bind::In(6)][..], &made].concat();
            program.dispatch(kernel("row_stats"), &binds, &words, grid);
            let stats = [Bind::ScratchIn(stats), Bind::ScratchIn(firsts)];
            return (stats, vec![stats[0], stats[1], Bind::Out(0)]);
        }
        let delta = program.scratch(TensorType::f32([rows]));
        let stats = [Bind::In(4), Bind::ScratchIn(delta)];
        if let Cut::Tiled { .. } = tile.cut {
            return (stats, vec![Bind::In(4), Bind::Scratch(delta), Bind::Out(0), Bind::In(3)]);
        }
        program.dispatch(kernel("row_dots"), &[Bind::In(3), Bind::In(5), Bind::Scratch(delta)], &words, grid);
        (stats, vec![stats[0], stats[1], Bind::Out(0)])
    }
}

impl Op for AttentionFrom {
    fn name(&self) -> &'static str {
        "attention_from"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [q, k, _, first] = inputs else { return Err(format!("takes 4 inputs, got {}", inputs.len())) };
        let outputs = self.0.infer(&inputs[..3])?;
        if !self.0.causal {
            return Err("attention from a first key on must be causal".into());
        }
        let (tokens, keys) = (&q.shape.dims()[..2], k.shape.dims()[1]);
        if tokens[1] != keys {
            return Err(format!(
                "attention from a first key on takes as many keys as queries, {}, got {keys}",
                tokens[1]
            ));
        }
        if *first != TensorType::u32(tokens) {
            return Err(format!("the first keys must be {}, one for each query, got {first}", TensorType::u32(tokens)));
        }
        Ok(outputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        self.0.add_backward(cx)
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.0.forward_variants(cx, Keys::From)
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        self.0.launch_forward::<Self>(cx, Keys::From)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        self.0.reference_forward(inputs, outputs, |d, b, t| from_first(&inputs[3].data, d, b, t))
    }

    /// As if each sequence were one text: where texts begin is not known before the step.
    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.0.flops(&inputs[..3], outputs)
    }
}

/// The keys that query `t` of sequence `b` sees, from the first keys of all queries.
fn from_first(firsts: &[f64], d: &Dims, b: usize, t: usize) -> Range<usize> {
    (firsts[b * d.tq + t] as usize).min(t)..t + 1
}

impl Op for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let forward = match (self.1, inputs) {
            (Keys::From, [q, k, v, _, _, _, first]) => {
                AttentionFrom(self.0).infer(&[q, k, v, first].map(TensorType::clone))?
            }
            (Keys::From, _) => return Err(format!("takes 7 inputs, got {}", inputs.len())),
            _ => {
                expect_f32(inputs, 6)?;
                self.0.infer(&inputs[..3])?
            }
        };
        expect_f32(&inputs[..6], 6)?;
        for (what, ty, like) in [("y", &inputs[3], &forward[0]), ("lse", &inputs[4], &forward[1])] {
            expect_shape(what, ty, like.shape.dims())?;
        }
        expect_shape("dy", &inputs[5], inputs[0].shape.dims())?;
        Ok(inputs[..3].to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of attention are not implemented"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.0.dims(cx.inputs).map(|d| Tile::names(&Tile::backward(cx, &d, self.1))).unwrap_or_default()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (op, d) = (&self.0, self.0.dims(cx.inputs)?);
        let mut program = Program::default();
        let tile = Tile::pick(&Tile::backward(cx, &d, self.1), cx.variant)?;
        let ins = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::In(5)];
        let (stats, mut binds) = self.stats(&mut program, cx, &d, tile);
        binds.splice(0..0, ins);
        let kernel = tile.kernel::<Self>("backward_q", d.dh);
        op.dispatch(&mut program, cx, (kernel, &binds), (d.tq, op.heads), (d.tk, 3), tile)?;
        let binds = [&ins[..], &stats, &[Bind::Out(1), Bind::Out(2)]].concat();
        let tile = tile.for_keys(cx, d.dh);
        let kernel = tile.kernel::<Self>("backward_kv", d.dh);
        op.dispatch(&mut program, cx, (kernel, &binds), (d.tk, op.kv_heads), (d.tq, 2 * d.sharing), tile)?;
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let op = &self.0;
        let types: Vec<TensorType> = inputs.iter().map(|a| TensorType::f32(a.shape.clone())).collect();
        let Ok(d) = op.dims(&types) else { return vec![] };
        let [q, k, v, o, lse, dy] = [0, 1, 2, 3, 4, 5].map(|i| &inputs[i].data);
        let scale = f64::from(op.scale(d.dh));
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i: usize| Array::zeros(outputs[i].shape.clone()));
        op.for_each_pair(
            &d,
            |d, b, t| match inputs.get(6) {
                Some(firsts) => from_first(&firsts.data, d, b, t),
                None => op.seen(d, t, d.tk.saturating_sub(d.tq)),
            },
            |b, t, h, key| {
                let [qr, kr] = op.ranges(&d, (b, t, h, key));
                let (q, k, v, dy) = (&q[qr.clone()], &k[kr.clone()], &v[kr.clone()], &dy[qr.clone()]);
                let prob = (scale * dot(q, k) - lse[(b * op.heads + h) * d.tq + t]).exp();
                let ds = scale * prob * (dot(dy, v) - dot(dy, &o[qr.clone()]));
                for i in 0..d.dh {
                    dq.data[qr.start + i] += ds * k[i];
                    dk.data[kr.start + i] += ds * q[i];
                    dv.data[kr.start + i] += prob * dy[i];
                }
            },
        );
        vec![dq, dk, dv]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        // Five products: scores, dp, dq, dk, dv.
        self.0.dims(inputs).map_or(0, |d| 10 * d.dh as u64 * self.0.pairs(&d))
    }
}
