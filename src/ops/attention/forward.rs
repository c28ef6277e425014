//! Attention, attention to a cache and attention from a first key on, and their methods of [`Graph`].

use super::backward::add_backward;
use super::heads::{Attention, Keys, from_first};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Launch, Program};
use crate::ops::cache::expect_starts;
use crate::tensor::TensorType;

/// `(q, k, v, start) -> (o, lse)`: causal attention to a cache of keys and values, for decoding. `start`, u32
/// `[batch]`, is the number of keys before that of each sequence's first query.
///
/// Query `t` of sequence `b` sees the keys up to `t + start[b]`. What the cache holds after the last key that any query
/// sees does not matter, even if it is NaN. There is no gradient.
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention(pub(super) Attention);

/// `(q, k, v, first) -> (o, lse)`: causal [`Attention`] from a first key on, for texts that share a sequence. `first`,
/// u32 `[batch, time]`, is the first key that each query sees: the place where its text begins.
///
/// Query `t` of sequence `b` sees the keys from `first[b, t]` to `t`, or only its own if `first[b, t]` is after that.
#[derive(Clone, Copy, Debug)]
pub struct AttentionFrom(pub(super) Attention);

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

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.outputs(inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        add_backward(*self, cx)
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
        self.0.outputs(&inputs[..3])
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

impl Op for AttentionFrom {
    fn name(&self) -> &'static str {
        "attention_from"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.0.outputs_from(inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        add_backward(self.0, cx)
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
