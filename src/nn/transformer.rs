//! Whole transformers: trained, decoding with a cache, or encoding.

use std::collections::BTreeMap;

use super::block::{Block, StandardBlock};
use super::builder::{Builder, Caches, Param, Table};
use super::config::{NormPlacement, Positions, TransformerConfig};
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::tensor::TensorType;

/// The values of a language model in a graph: what to write, what to read, what to train.
#[derive(Clone, Debug)]
pub struct Transformer {
    /// Input: token ids, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input, if the model has them: kinds of the tokens, u32 `[batch, time]`. Zero unless written.
    pub token_types: Option<Value>,
    /// Input, if `dropout` is not 0: seed and step, u32 `[2]`.
    pub dropout_seed: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// The end of the stream, normalised: what the head reads.
    pub hidden: Value,
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
    /// use throughline::Graph;
    /// use throughline::nn::{Transformer, TransformerConfig};
    /// let mut g = Graph::new();
    /// let config = TransformerConfig::gpt2(65, 32, 2, 48, 4);
    /// let model = Transformer::build(&mut g, &config, 3, 32, false)?;
    /// assert_eq!(g.ty(model.logits).shape.dims(), [3, 32, 65]);
    /// assert_eq!(model.stream.len(), 3); // the embedding and two blocks
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn build(g: &mut Graph, config: &TransformerConfig, batch: usize, time: usize, train: bool) -> Result<Self> {
        Self::build_with(g, config, &StandardBlock, batch, time, train)
    }

    /// The same with layers of another kind.
    pub fn build_with(
        g: &mut Graph,
        config: &TransformerConfig,
        block: &dyn Block,
        batch: usize,
        time: usize,
        train: bool,
    ) -> Result<Self> {
        let b = Builder::new(g, config)?;
        let mut b = if train { b.training()? } else { b };
        let (inputs, table, stream) = forward(&mut b, block, batch, time)?;
        let hidden = final_norm(&mut b, stream[stream.len() - 1])?;
        let logits = b.head(table, hidden)?;
        let Inputs { tokens, token_types } = inputs;
        Ok(Transformer { tokens, token_types, dropout_seed: b.dropout_seed, stream, hidden, logits, params: b.params })
    }
}

/// The values of an encoder in a graph: a transformer without a head.
#[derive(Clone, Debug)]
pub struct TransformerEncoder {
    /// Input: token ids, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input, if the model has them: kinds of the tokens, u32 `[batch, time]`. Zero unless written.
    pub token_types: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// What it makes of the tokens, `[batch, time, d_model]`.
    pub hidden: Value,
    /// All parameters, in the order of the forward pass.
    pub params: Vec<Param>,
}

impl TransformerEncoder {
    /// Adds the forward pass for `batch` sequences of `time` tokens.
    ///
    /// ```
    /// use throughline::Graph;
    /// use throughline::nn::{TransformerConfig, TransformerEncoder};
    /// let mut g = Graph::new();
    /// let config = TransformerConfig::bert(100, 64, 2, 48, 4);
    /// let encoder = TransformerEncoder::build(&mut g, &config, 1, 9)?;
    /// assert_eq!(g.ty(encoder.hidden).shape.dims(), [1, 9, 48]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn build(g: &mut Graph, config: &TransformerConfig, batch: usize, time: usize) -> Result<Self> {
        Self::build_packed(g, config, &BTreeMap::new(), batch, time)
    }

    /// The same with the matrices that `packed` names as a file stores them.
    pub fn build_packed(
        g: &mut Graph,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        batch: usize,
        time: usize,
    ) -> Result<Self> {
        let mut b = Builder::new(g, config)?.packed(packed);
        let (Inputs { tokens, token_types }, _, stream) = forward(&mut b, &StandardBlock, batch, time)?;
        let hidden = final_norm(&mut b, stream[stream.len() - 1])?;
        Ok(TransformerEncoder { tokens, token_types, stream, hidden, params: b.params })
    }
}

/// What the host writes before a pass.
struct Inputs {
    tokens: Value,
    token_types: Option<Value>,
}

/// Embedding and blocks.
fn forward(b: &mut Builder<'_>, block: &dyn Block, batch: usize, time: usize) -> Result<(Inputs, Table, Vec<Value>)> {
    let config = b.config();
    if time > config.context {
        let message = format!("must be at least the sequence length {time}, but is {}", config.context);
        return Err(Error::config("context", message));
    }
    let tokens = b.g.input("tokens", TensorType::u32([batch, time]))?;
    let token_types = match config.token_types {
        0 => None,
        _ => Some(b.g.input("token_types", TensorType::u32([batch, time]))?),
    };
    let (table, x) = b.embed(tokens, token_types, None)?;
    let stream = blocks(b, block, x)?;
    Ok((Inputs { tokens, token_types }, table, stream))
}

/// The stream from `x` on: before each block, and after the last.
fn blocks(b: &mut Builder<'_>, block: &dyn Block, x: Value) -> Result<Vec<Value>> {
    let mut stream = vec![x];
    for layer in 0..b.config().n_layers {
        let x = stream[layer];
        stream.push(b.scoped(&format!("h.{layer}"), |b| block.build(b, layer, x))?);
    }
    Ok(stream)
}

/// The norm before the head. In post-norm the last block has normalised already.
fn final_norm(b: &mut Builder<'_>, x: Value) -> Result<Value> {
    match b.config().norm_placement {
        NormPlacement::Pre => b.norm("norm_f", x),
        NormPlacement::Post => Ok(x),
    }
}

/// What a decoder gives scores for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeRows {
    /// One of the new tokens of each sequence, which the input `last` says.
    Last,
    /// All new tokens.
    All,
}

/// What a decoder's step is made for.
#[derive(Clone, Copy, Debug)]
pub struct DecodeShape {
    /// Sequences.
    pub batch: usize,
    /// New tokens of each.
    pub time: usize,
    /// How many tokens a cache holds.
    pub capacity: usize,
    /// Where scores are wanted.
    pub rows: DecodeRows,
}

/// The values of a model that decodes with a cache: what to write, what to read, what to bind.
#[derive(Clone, Debug)]
pub struct TransformerDecoder {
    /// Input: the ids of the new tokens, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input: how many tokens of each sequence came before, u32 `[batch]`.
    pub start: Value,
    /// Input, in models with learned positions: those of the new tokens, u32 `[batch, time]`.
    pub positions: Option<Value>,
    /// Input, with [`DecodeRows::Last`]: which row of `[batch * time]` the scores are of, u32 `[batch]`.
    pub last: Option<Value>,
    /// Scores of the token behind, `[rows, vocab_size]`.
    pub logits: Value,
    /// Parameters: f32, or packed as words.
    pub params: Vec<Value>,
    /// States: keys and values of each layer, `[batch, capacity, n_kv_heads * head_dim]`.
    pub caches: Vec<Value>,
}

impl TransformerDecoder {
    /// Adds the forward pass for new tokens behind a cache. Matrices that `packed` names stay as a file stores
    /// them; the others are as those of [`Transformer`].
    pub fn build(
        g: &mut Graph,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        shape: DecodeShape,
    ) -> Result<Self> {
        let DecodeShape { batch, time, capacity, rows } = shape;
        if config.bidirectional || config.token_types > 0 {
            return Err(Error::config("bidirectional", "an encoder sees all tokens at once; it does not decode"));
        }
        if capacity == 0 || capacity > config.context {
            let message = format!("a cache of {capacity} tokens must be from 1 to the context, {}", config.context);
            return Err(Error::config("context", message));
        }
        let mut b = Builder::new(g, config)?.packed(packed);
        let tokens = b.g.input("tokens", TensorType::u32([batch, time]))?;
        let start = b.g.input("start", TensorType::u32([batch]))?;
        let positions = match config.positions {
            Positions::Learned => Some(b.g.input("positions", TensorType::u32([batch, time]))?),
            Positions::Rope { .. } => None,
        };
        b.caches = Some(Caches { start, capacity, states: vec![] });
        let (table, x) = b.embed(tokens, None, positions)?;
        let x = blocks(&mut b, &StandardBlock, x)?[config.n_layers];
        let mut x = b.g.reshape("rows", x, [batch * time, config.d_model])?;
        let mut last = None;
        if rows == DecodeRows::Last {
            // Only one row of each sequence goes on to the head, which is as large as many blocks.
            let ids = b.g.input("last", TensorType::u32([batch]))?;
            x = b.g.embedding("last_rows", x, ids)?;
            last = Some(ids);
        }
        let x = final_norm(&mut b, x)?;
        let logits = b.head(table, x)?;
        let params = b.params.iter().map(|p| p.value).collect();
        let caches = b.caches.map_or(vec![], |caches| caches.states);
        Ok(TransformerDecoder { tokens, start, positions, last, logits, params, caches })
    }
}
