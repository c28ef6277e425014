//! A decoder-only transformer as nodes of a graph.

use std::collections::BTreeMap;

use super::config::{Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::ops::attention::Attention;
use crate::ops::packed::Packed;
use crate::ops::rope::Rope;
use crate::rng::Rng;
use crate::tensor::TensorType;

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ParamInit {
    /// Normal with this standard deviation.
    Normal(f32),
    /// The same everywhere.
    Constant(f32),
}

impl ParamInit {
    /// `n` values. The stream depends on the seed and the parameter's name alone, so a model's
    /// start does not depend on the order in which it was built.
    pub fn values(self, n: usize, seed: u64, name: &str) -> Vec<f32> {
        match self {
            ParamInit::Constant(c) => vec![c; n],
            ParamInit::Normal(std) => {
                let key: Vec<u64> = [seed].into_iter().chain(name.bytes().map(u64::from)).collect();
                let mut rng = Rng::new(&key);
                (0..n).map(|_| (f64::from(std) * rng.normal()) as f32).collect()
            }
        }
    }
}

/// A parameter of a model: its value in the graph and how it starts.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// The value; the graph knows name and shape.
    pub value: Value,
    /// How it starts.
    pub init: ParamInit,
}

/// The values of a GPT in a graph: what to write, what to read, what to train.
#[derive(Clone, Debug)]
pub struct Transformer {
    /// Input: token ids, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input, if `dropout` is not 0: seed and step, u32 `[2]`.
    pub dropout_seed: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// Scores of the next token, `[batch, time, vocab_size]`.
    pub logits: Value,
    /// All parameters, in the order of the forward pass.
    pub params: Vec<Param>,
}

impl Transformer {
    /// Adds the forward pass for `batch` sequences of `time` tokens. `train` puts dropout in, where
    /// the configuration asks for it.
    ///
    /// ```
    /// use throughline::{Graph, nn::{Transformer, TransformerConfig}};
    /// let mut g = Graph::new();
    /// let config = TransformerConfig::gpt2(65, 32, 2, 48, 4);
    /// let gpt = Transformer::build(&mut g, &config, 3, 32, false)?;
    /// assert_eq!(g.ty(gpt.logits).shape.dims(), [3, 32, 65]);
    /// assert_eq!(gpt.stream.len(), 3); // the embedding and two blocks
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn build(
        g: &mut Graph,
        config: &TransformerConfig,
        batch: usize,
        time: usize,
        train: bool,
    ) -> Result<Transformer> {
        config.validate()?;
        if time > config.context {
            let message = format!("must be at least the sequence length {time}, but is {}", config.context);
            return Err(Error::Config { field: "context", message });
        }
        let dropout = if train { config.dropout } else { 0.0 };
        let tokens = g.input("tokens", TensorType::u32([batch, time]))?;
        let dropout_seed = match dropout > 0.0 {
            true => Some(g.input("dropout_seed", TensorType::u32([2]))?),
            false => None,
        };
        let mut b = Builder { dropout, dropout_seed, ..Builder::new(config) };
        let (embedding, mut x) = b.embed(g, tokens, time)?;
        let mut stream = vec![x];
        for layer in 0..config.n_layers {
            x = g.scoped(&format!("h.{layer}"), |g| b.block(g, x))?;
            stream.push(x);
        }
        // In post-norm the last block has normalised already.
        if config.norm_placement == NormPlacement::Pre {
            x = b.norm(g, "norm_f", x)?;
        }
        let logits = b.head(g, embedding, x)?;
        Ok(Transformer { tokens, dropout_seed, stream, logits, params: b.params })
    }
}

/// The values of a GPT that decodes with a cache: what to write, what to read, what to bind.
#[derive(Clone, Debug)]
pub struct TransformerDecoder {
    /// Input: the ids of the new tokens, u32 `[1, time]`.
    pub tokens: Value,
    /// Input: how many tokens came before, u32 `[1]`.
    pub start: Value,
    /// Input: which of the new tokens the logits are of, u32 `[1]`.
    pub last: Value,
    /// Scores of the token behind that one, `[1, vocab_size]`.
    pub logits: Value,
    /// Parameters: f32, or packed as words.
    pub params: Vec<Value>,
    /// States: keys and values of each layer, `[1, capacity, n_kv_heads * head_dim]`.
    pub caches: Vec<Value>,
}

impl TransformerDecoder {
    /// Adds the forward pass for `time` new tokens behind a cache of at most `capacity`. Matrices that
    /// `packed` names stay as a file stores them; the others are as those of [`Transformer`]. Positions must be
    /// rotary.
    pub fn build(
        g: &mut Graph,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        time: usize,
        capacity: usize,
    ) -> Result<TransformerDecoder> {
        config.validate()?;
        if config.positions == Positions::Learned {
            return Err(Error::Config { field: "positions", message: "a decoder needs rotary ones".into() });
        }
        if capacity == 0 || capacity > config.context {
            let message = format!("a cache of {capacity} tokens must be from 1 to the context, {}", config.context);
            return Err(Error::Config { field: "context", message });
        }
        let tokens = g.input("tokens", TensorType::u32([1, time]))?;
        let start = g.input("start", TensorType::u32([1]))?;
        let last = g.input("last", TensorType::u32([1]))?;
        let cache = Some(Cache { start, capacity, states: vec![] });
        let mut b = Builder { packed: Some(packed), cache, ..Builder::new(config) };
        let (embedding, mut x) = b.embed(g, tokens, time)?;
        for layer in 0..config.n_layers {
            x = g.scoped(&format!("h.{layer}"), |g| b.block(g, x))?;
        }
        // Only one row goes on to the head, which is as large as many blocks.
        let rows = g.reshape("rows", x, [time, config.d_model])?;
        let mut x = g.embedding("last_row", rows, last)?;
        if config.norm_placement == NormPlacement::Pre {
            x = b.norm(g, "norm_f", x)?;
        }
        let logits = b.head(g, embedding, x)?;
        let params = b.params.iter().map(|p| p.value).collect();
        let caches = b.cache.map_or(vec![], |cache| cache.states);
        Ok(TransformerDecoder { tokens, start, last, logits, params, caches })
    }
}

/// The caches of a decoder, as blocks are added.
struct Cache {
    start: Value,
    capacity: usize,
    states: Vec<Value>,
}

impl Cache {
    /// A cache of its own for `rows`, with them written.
    fn write(&mut self, g: &mut Graph, name: &str, rows: Value) -> Result<Value> {
        let width = g.ty(rows).shape.cols();
        let state = g.state(name, TensorType::f32([1, self.capacity, width]))?;
        let written = g.cache_write(&format!("{name}.write"), rows, self.start, state)?;
        g.store(written, state)?;
        self.states.push(state);
        Ok(written)
    }
}

/// The table of embeddings.
#[derive(Clone, Copy)]
struct Table {
    value: Value,
    packed: Option<Packed>,
}

struct Builder<'a> {
    config: &'a TransformerConfig,
    /// Matrices that stay packed, by name.
    packed: Option<&'a BTreeMap<String, Packed>>,
    cache: Option<Cache>,
    dropout: f32,
    dropout_seed: Option<Value>,
    /// Each place that drops has a random stream of its own.
    dropout_sites: u32,
    params: Vec<Param>,
}

impl<'a> Builder<'a> {
    fn new(config: &'a TransformerConfig) -> Self {
        let (packed, cache, dropout_seed) = (None, None, None);
        Builder { config, packed, cache, dropout: 0.0, dropout_seed, dropout_sites: 0, params: vec![] }
    }

    /// The matrix `[n, k]` of this name, if it stays packed.
    fn packed_matrix(&mut self, g: &mut Graph, name: &str, n: usize, k: usize) -> Result<Option<(Value, Packed)>> {
        let full = g.full_name(name);
        let Some(&matrix) = self.packed.and_then(|packed| packed.get(&full)) else { return Ok(None) };
        if [matrix.n, matrix.k] != [n, k] {
            let (expected, got) = (format!("{n} x {k}"), format!("{} x {}", matrix.n, matrix.k));
            return Err(Error::Data { tensor: full, expected, got });
        }
        let value = g.input(name, matrix.ty())?; // frozen, so no parameter
        self.params.push(Param { value, init: ParamInit::Constant(0.0) });
        Ok(Some((value, matrix)))
    }

    fn param(&mut self, g: &mut Graph, name: &str, shape: &[usize], init: ParamInit) -> Result<Value> {
        let value = g.param(name, shape)?;
        self.params.push(Param { value, init });
        Ok(value)
    }

    /// The initialisation of ordinary weights, and of projections into the residual stream.
    fn weight_init(&self, into_stream: bool) -> ParamInit {
        let scale = 1.0 / (2.0 * self.config.n_layers as f32).sqrt();
        match (self.config.init, into_stream) {
            (Init::Gpt2 { std }, true) => ParamInit::Normal(std * scale),
            (Init::ZeroResidual { .. }, true) => ParamInit::Constant(0.0),
            (Init::Gpt2 { std } | Init::ZeroResidual { std }, false) => ParamInit::Normal(std),
        }
    }

    fn embed(&mut self, g: &mut Graph, tokens: Value, time: usize) -> Result<(Table, Value)> {
        let c = self.config;
        let init = self.weight_init(false);
        if let Some((table, matrix)) = self.packed_matrix(g, "embed.weight", c.vocab_size, c.d_model)? {
            let x = g.packed_rows("embed", table, matrix, tokens)?;
            return Ok((Table { value: table, packed: Some(matrix) }, x));
        }
        let table = self.param(g, "embed.weight", &[c.vocab_size, c.d_model], init)?;
        let mut x = g.embedding("embed", table, tokens)?;
        if c.positions == Positions::Learned {
            let positions = self.param(g, "position.weight", &[c.context, c.d_model], init)?;
            let used = match time == c.context {
                true => positions,
                false => g.slice("position.used", positions, 0, 0, time)?,
            };
            x = g.add("position", x, used)?;
        }
        Ok((Table { value: table, packed: None }, self.drop(g, x)?))
    }

    fn block(&mut self, g: &mut Graph, x: Value) -> Result<Value> {
        let x = self.sublayer(g, "attn", x, Self::attention)?;
        self.sublayer(g, "mlp", x, Self::mlp)
    }

    /// A branch of the residual stream, normalised before or after.
    fn sublayer(
        &mut self,
        g: &mut Graph,
        name: &str,
        x: Value,
        branch: fn(&mut Self, &mut Graph, Value) -> Result<Value>,
    ) -> Result<Value> {
        let norm = format!("{name}_norm");
        let pre = self.config.norm_placement == NormPlacement::Pre;
        let input = if pre { self.norm(g, &norm, x)? } else { x };
        let y = g.scoped(name, |g| branch(self, g, input))?;
        let y = self.drop(g, y)?;
        let sum = g.residual_add(&format!("{name}_add"), x, y)?;
        if pre { Ok(sum) } else { self.norm(g, &norm, sum) }
    }

    fn attention(&mut self, g: &mut Graph, x: Value) -> Result<Value> {
        let c = self.config;
        let (heads, kv_heads) = (c.n_heads, c.n_kv_heads);
        let kv_width = kv_heads * c.head_dim();
        let mut q = self.linear(g, "q", x, c.d_model, false)?;
        let mut k = self.linear(g, "k", x, kv_width, false)?;
        let v = self.linear(g, "v", x, kv_width, false)?;
        if let Positions::Rope { theta, interleaved } = c.positions {
            let rope = |heads| Rope { heads, theta, interleaved, ..Rope::default() };
            for (name, x, rope) in [("q_rope", &mut q, rope(heads)), ("k_rope", &mut k, rope(kv_heads))] {
                *x = match &self.cache {
                    Some(cache) => g.rope_from(name, *x, cache.start, rope)?,
                    None => g.rope(name, *x, rope)?,
                };
            }
        }
        let op = Attention { heads, kv_heads, causal: true, scale: None };
        let y = match &mut self.cache {
            Some(cache) => {
                let written = [cache.write(g, "keys", k)?, cache.write(g, "values", v)?];
                g.attention_cached("scores", q, written, cache.start, op)?
            }
            None => g.attention("scores", q, k, v, op)?,
        };
        self.linear(g, "o", y, c.d_model, true)
    }

    fn mlp(&mut self, g: &mut Graph, x: Value) -> Result<Value> {
        let c = self.config;
        let up = self.linear(g, "up", x, c.d_ff, false)?;
        let hidden = match c.mlp {
            Mlp::GeluTanh => g.gelu_tanh("gelu", up)?,
            Mlp::GeluErf => g.gelu("gelu", up)?,
            Mlp::SwiGlu => {
                let gate = self.linear(g, "gate", x, c.d_ff, false)?;
                g.swiglu("swiglu", gate, up)?
            }
        };
        self.linear(g, "down", hidden, c.d_model, true)
    }

    fn head(&mut self, g: &mut Graph, embedding: Table, x: Value) -> Result<Value> {
        let c = self.config;
        match (c.tied_head, embedding.packed) {
            (true, Some(matrix)) => g.packed_linear("head", x, embedding.value, matrix, None),
            (true, None) => g.matmul_nt("head", x, embedding.value),
            (false, _) => {
                if let Some((w, matrix)) = self.packed_matrix(g, "head.weight", c.vocab_size, c.d_model)? {
                    return g.packed_linear("head", x, w, matrix, None);
                }
                let init = self.weight_init(false);
                let w = self.param(g, "head.weight", &[c.d_model, c.vocab_size], init)?;
                g.linear("head", x, w, None)
            }
        }
    }

    fn linear(&mut self, g: &mut Graph, name: &str, x: Value, d_out: usize, into_stream: bool) -> Result<Value> {
        let d_in = g.ty(x).shape.cols();
        let init = self.weight_init(into_stream);
        let weight = format!("{name}.weight");
        let packed = self.packed_matrix(g, &weight, d_out, d_in)?;
        let w = match packed {
            Some((w, _)) => w,
            None => self.param(g, &weight, &[d_in, d_out], init)?,
        };
        let bias = match self.config.bias {
            true => Some(self.param(g, &format!("{name}.bias"), &[d_out], ParamInit::Constant(0.0))?),
            false => None,
        };
        match packed {
            Some((_, matrix)) => g.packed_linear(name, x, w, matrix, bias),
            None => g.linear(name, x, w, bias),
        }
    }

    fn norm(&mut self, g: &mut Graph, name: &str, x: Value) -> Result<Value> {
        let (d, eps) = (self.config.d_model, self.config.norm_eps);
        let gamma = self.param(g, &format!("{name}.weight"), &[d], ParamInit::Constant(1.0))?;
        match self.config.norm {
            Norm::RmsNorm => g.rmsnorm(name, x, gamma, eps),
            Norm::LayerNorm => {
                let beta = self.param(g, &format!("{name}.bias"), &[d], ParamInit::Constant(0.0))?;
                g.layernorm(name, x, gamma, beta, eps)
            }
        }
    }

    fn drop(&mut self, g: &mut Graph, x: Value) -> Result<Value> {
        let Some(seed) = self.dropout_seed else { return Ok(x) };
        self.dropout_sites += 1;
        g.dropout("drop", x, seed, self.dropout, self.dropout_sites)
    }
}
