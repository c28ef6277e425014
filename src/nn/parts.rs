//! The parts of a transformer's block.

use super::builder::{Builder, Linear};
use super::config::{Mlp, NormPlacement, Positions};
use crate::error::Result;
use crate::graph::{ParamInit, Value};
use crate::ops::attention::Attention;
use crate::ops::rope::Rope;

/// Parts of a transformer, as the configuration says. Without a configuration they return an
/// [`Error::Graph`](crate::Error::Graph).
impl Builder<'_> {
    /// Adds a branch to the residual stream: `x + f(norm(x))`, or `norm(x + f(x))` in post-norm models.
    ///
    /// `branch` receives the input of the branch and returns what to add to the stream, both `[batch, time, d_model]`.
    /// Dropout and the [residual gate](super::TransformerConfig::residual_gate) are applied here.
    pub fn residual(
        &mut self,
        name: &str,
        x: Value,
        branch: impl FnOnce(&mut Self, Value) -> Result<Value>,
    ) -> Result<Value> {
        let c = self.configured("a residual branch")?;
        let norm = format!("{name}_norm");
        let pre = c.norm_placement == NormPlacement::Pre;
        let input = if pre { self.norm(&norm, x)? } else { x };
        let mut y = self.scoped(name, |b| branch(b, input))?;
        y = self.dropout(y, c.dropout)?;
        if let Some(start) = c.residual_gate {
            let gate = self.g.param_with(&format!("{name}_gate"), [1], ParamInit::Constant(start))?;
            y = self.g.mul(&format!("{name}_gated"), y, gate)?;
        }
        let sum = self.g.residual_add(&format!("{name}_add"), x, y)?;
        if pre { Ok(sum) } else { self.norm(&norm, sum) }
    }

    /// Self-attention of `x`, `[batch, time, d_model] -> [batch, time, d_model]`, including the cache when decoding.
    ///
    /// It is [`qkv`](Self::qkv), [`attend`](Self::attend) and [`project`](Self::project). Call those yourself to change
    /// what happens between them.
    pub fn attention(&mut self, x: Value) -> Result<Value> {
        let qkv = self.qkv(x)?;
        let y = self.attend(qkv)?;
        self.project(y)
    }

    /// Queries, `[batch, time, n_heads * head_dim]`, and keys and values, `[batch, time, n_kv_heads * head_dim]`.
    /// Queries and keys are normalised and rotated as the configuration says.
    pub fn qkv(&mut self, x: Value) -> Result<[Value; 3]> {
        let c = self.configured("attention")?;
        let how = Linear { bias: c.biases.qkv, ..Linear::default() };
        let [q_width, kv_width] = [c.n_heads, c.n_kv_heads].map(|n| n * c.head_dim());
        let q = self.linear_with("q", x, q_width, how)?;
        let k = self.linear_with("k", x, kv_width, how)?;
        let v = self.linear_with("v", x, kv_width, how)?;
        Ok([self.positioned("q", q, c.n_heads)?, self.positioned("k", k, c.n_kv_heads)?, v])
    }

    /// The outputs of all heads, concatenated: `[batch, time, n_heads * head_dim]`.
    ///
    /// A [`Decoder`](crate::decode::Decoder) keeps the keys and values that this is given of earlier tokens. It is the
    /// only way for a block to look at other tokens and be decoded: see [`Block`](super::Block). Where texts share
    /// sequences ([`packing`](super::TransformerOptions::packing)), a token sees those of its own text.
    pub fn attend(&mut self, [q, k, v]: [Value; 3]) -> Result<Value> {
        let c = self.configured("attention")?;
        let (heads, kv_heads, causal) = (c.n_heads, c.n_kv_heads, !c.bidirectional);
        let op = Attention { heads, kv_heads, causal, scale: Some(c.attention_scale()) };
        match (&mut self.caches, self.texts) {
            (Some(caches), _) => {
                let written = [caches.write(self.g, "keys", k)?, caches.write(self.g, "values", v)?];
                self.g.attention_cached("scores", q, written, caches.start, op)
            }
            (None, Some(texts)) => self.g.attention_from("scores", [q, k, v], texts.starts, op),
            (None, None) => self.g.attention("scores", q, k, v, op),
        }
    }

    /// The output projection of attention: `[batch, time, n_heads * head_dim] -> [batch, time, d_model]`.
    pub fn project(&mut self, y: Value) -> Result<Value> {
        let c = self.configured("attention")?;
        self.linear_with("o", y, c.d_model, Linear { bias: c.biases.out, into_stream: true, init: None })
    }

    /// Queries or keys with the head norm and the rotation of the model applied.
    fn positioned(&mut self, name: &str, x: Value, heads: usize) -> Result<Value> {
        let c = self.configured("attention")?;
        let mut x = x;
        if c.qk_norm {
            let whole = self.g.ty(x).shape.clone();
            let by_head = [self.g.ty(x).shape.rows() * heads, c.head_dim()];
            let split = self.g.reshape(&format!("{name}.heads"), x, by_head)?;
            let gamma = self.g.param_with(&format!("{name}_norm.weight"), [c.head_dim()], ParamInit::ONES)?;
            let normed = self.g.rmsnorm(&format!("{name}_norm"), split, gamma, c.norm_eps)?;
            x = self.g.reshape(&format!("{name}.joined"), normed, whole)?;
        }
        let Positions::Rope { theta, interleaved, scaling } = c.positions else { return Ok(x) };
        let rope = Rope { heads, theta, interleaved, scaling, ..Rope::default() };
        let name = format!("{name}_rope");
        match &self.caches {
            Some(caches) => self.g.rope_from(&name, x, caches.start, rope),
            None => self.g.rope(&name, x, rope),
        }
    }

    /// The feed-forward network of a block: `[batch, time, d_model] -> [batch, time, d_model]`.
    pub fn feed_forward(&mut self, x: Value) -> Result<Value> {
        let c = self.configured("a feed-forward network")?;
        let how = Linear { bias: c.biases.mlp, ..Linear::default() };
        let up = self.linear_with("up", x, c.d_ff, how)?;
        let hidden = match c.mlp {
            Mlp::GeluTanh => self.g.gelu_tanh("gelu", up)?,
            Mlp::GeluErf => self.g.gelu("gelu", up)?,
            Mlp::SwiGlu => {
                let gate = self.linear_with("gate", x, c.d_ff, how)?;
                self.g.swiglu("swiglu", gate, up)?
            }
        };
        self.linear_with("down", hidden, c.d_model, Linear { into_stream: true, ..how })
    }
}
