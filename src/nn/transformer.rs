//! Whole transformers: for training, decoding with a cache, or encoding.

use std::collections::BTreeMap;

use super::block::{Block, StandardBlock};
use super::builder::Builder;
use super::caches::Caches;
use super::config::{Positions, TransformerConfig};
use super::decodable::{self, Subject};
use super::lora::Lora;
use super::slots::{AdapterSlots, Slots};
use super::stack::Stack;
use super::stored::store_activations;
use super::table::Table;
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::ops::packed_i8::Activations;
use crate::tensor::{DType, TensorType};

/// The values of a language model in a graph: what to write, what to read, what to train.
///
/// Build one to add a loss, probes or layers of your own to the graph. Plain training needs only a
/// [`Trainer`](crate::train::Trainer), which builds its model itself.
#[derive(Clone, Debug)]
pub struct Transformer {
    /// Input: token ids, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input, if the model has token types: the type of each token, u32 `[batch, time]`. Usually zeros.
    pub token_types: Option<Value>,
    /// Input, if sequences hold [several texts](TransformerOptions::packing): the place in its sequence where the text
    /// of each token begins, u32 `[batch, time]`.
    pub starts: Option<Value>,
    /// Input, if they do and positions are learned: the place of each token in its text, u32 `[batch, time]`.
    pub positions: Option<Value>,
    /// Input, if the graph has dropout: seed and step, u32 `[2]`.
    pub dropout_seed: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// The normalised end of the stream, `[batch, time, d_model]`: the input of the output projection.
    pub hidden: Value,
    /// Logits of the next token, `[batch, time, vocab_size]`.
    pub logits: Value,
    /// All parameters, in the order of the forward pass.
    pub params: Vec<Value>,
}

impl Transformer {
    /// Adds the forward pass for `batch` sequences of `time` tokens. `train` applies the configuration's dropout.
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

    /// The same with blocks of your own instead of [`StandardBlock`](super::StandardBlock)s.
    pub fn build_with(
        g: &mut Graph,
        config: &TransformerConfig,
        block: &dyn Block,
        batch: usize,
        time: usize,
        train: bool,
    ) -> Result<Self> {
        let options = TransformerOptions { block, training: train, ..TransformerOptions::default() };
        Self::build_of(g, config, [batch, time], &options)
    }

    /// [`build`](Self::build) with all options: blocks of your own, adapters, weights in the format of their file.
    ///
    /// # Errors
    ///
    /// As for `build`. [`Error::Config`] names a target of the adapters that is no layer of the model, and says that
    /// texts cannot share sequences in a bidirectional one.
    pub fn build_of(
        g: &mut Graph,
        config: &TransformerConfig,
        [batch, time]: [usize; 2],
        options: &TransformerOptions<'_>,
    ) -> Result<Self> {
        let mut b = for_tokens(g, config, options.training)?;
        if let Some(packed) = options.packed {
            b = b.packed(packed);
        }
        if let Some(lora) = options.lora {
            lora.validate()?;
            b = b.adapted(lora);
        }
        if options.packing {
            b.texts = Some(Texts::add(b.g, config, [batch, time])?);
        }
        let (starts, positions) = (b.texts.map(|texts| texts.starts), b.texts.and_then(|texts| texts.positions));
        let (encoder, table) = encode(&mut b, options.block, [batch, time])?;
        let logits = head(&mut b, table, encoder.hidden)?;
        let params = b.added_params();
        if let Some(lora) = options.lora {
            lora.check_names(params.iter().map(|&p| g.name(p)))?;
        }
        let TransformerEncoder { tokens, token_types, dropout_seed, stream, hidden, .. } = encoder;
        Ok(Transformer { tokens, token_types, starts, positions, dropout_seed, stream, hidden, logits, params })
    }
}

/// How [`Transformer::build_of`] builds a model. Start from the default: standard blocks, no dropout, all weights in
/// f32, no adapters, and a text for each sequence.
#[derive(Clone, Copy, Debug)]
pub struct TransformerOptions<'a> {
    /// The layers of the model.
    pub block: &'a dyn Block,
    /// Whether to apply dropout, that of the configuration and that of adapters.
    pub training: bool,
    /// Matrices that keep their stored format, by name. They become inputs, since nothing trains them.
    pub packed: Option<&'a BTreeMap<String, Packed>>,
    /// Adapters beside linear layers.
    pub lora: Option<&'a Lora>,
    /// Whether sequences hold several texts, each of which sees only itself: the model then has the inputs
    /// [`starts`](Transformer::starts) and, with learned positions, [`positions`](Transformer::positions). It holds for
    /// whatever a block does by [`Builder::attend`]; a convolution over time, say, would see the text before.
    pub packing: bool,
}

impl Default for TransformerOptions<'_> {
    fn default() -> Self {
        TransformerOptions { block: &StandardBlock, training: false, packed: None, lora: None, packing: false }
    }
}

/// The values of an encoder in a graph: a transformer without an output projection.
///
/// Use it for classifiers and other models that read text but write none, with layers of your own on
/// [`hidden`](Self::hidden). For sentence vectors use a [`SentenceEncoder`](crate::sentence::SentenceEncoder), which
/// runs one of these.
#[derive(Clone, Debug)]
pub struct TransformerEncoder {
    /// Input: token ids, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input, if the model has token types: the type of each token, u32 `[batch, time]`. Usually zeros.
    pub token_types: Option<Value>,
    /// Input, if the graph has dropout: seed and step, u32 `[2]`.
    pub dropout_seed: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// The output: one vector per token, `[batch, time, d_model]`.
    pub hidden: Value,
    /// All parameters, in the order of the forward pass.
    pub params: Vec<Value>,
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
        Self::build_with(g, config, &StandardBlock, batch, time, false)
    }

    /// The same with blocks of your own. `train` applies the configuration's dropout.
    ///
    /// ```
    /// use throughline::nn::{Builder, StandardBlock, TransformerConfig, TransformerEncoder};
    /// use throughline::rng::Rng;
    /// use throughline::train::{GraphTrainConfig, GraphTrainer};
    /// use throughline::{Gpu, TensorType};
    ///
    /// // A classifier: does the first letter of a text come again? The answer is read from the first place.
    /// let gpu = Gpu::headless_blocking()?;
    /// let config = TransformerConfig { vocab_size: 4, dropout: 0.1, ..TransformerConfig::stack(5, 1, 32, 4) };
    /// let mut g = gpu.graph();
    /// let encoder = TransformerEncoder::build_with(&mut g, &config, &StandardBlock, 32, 5, true)?;
    /// let first = g.slice("first", encoder.hidden, 1, 0, 1)?;
    /// let logits = Builder::new(&mut g).linear("answer", first, 2)?;
    /// let answers = g.input("answers", TensorType::u32([32, 1]))?;
    /// let loss = g.cross_entropy("loss", logits, answers)?;
    ///
    /// let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, GraphTrainConfig::adamw(3e-3))?;
    /// let mut rng = Rng::new(&[1]);
    /// for _ in 0..100 {
    ///     let texts: Vec<u32> = (0..32 * 5).map(|_| rng.below(4) as u32).collect();
    ///     let right: Vec<u32> = texts.chunks(5).map(|text| u32::from(text[1..].contains(&text[0]))).collect();
    ///     trainer.step(&[encoder.tokens.with(&texts), answers.with(&right)])?;
    /// }
    /// assert!(trainer.loss_blocking()? < 0.5); // 0.69 is what guessing gives
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn build_with(
        g: &mut Graph,
        config: &TransformerConfig,
        block: &dyn Block,
        batch: usize,
        time: usize,
        train: bool,
    ) -> Result<Self> {
        let mut b = for_tokens(g, config, train)?;
        let (encoder, _) = encode(&mut b, block, [batch, time])?;
        Ok(TransformerEncoder { params: b.added_params(), ..encoder })
    }

    /// [`build`](Self::build), keeping the matrices that `packed` lists in their stored format.
    pub fn build_packed(
        g: &mut Graph,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        batch: usize,
        time: usize,
    ) -> Result<Self> {
        let mut b = for_tokens(g, config, false)?.packed(packed);
        let (encoder, _) = encode(&mut b, &StandardBlock, [batch, time])?;
        Ok(TransformerEncoder { params: b.added_params(), ..encoder })
    }
}

/// Name of the input with the type of each token.
pub(crate) const TOKEN_TYPES: &str = "token_types";

/// A builder for a model with a vocabulary.
fn for_tokens<'a>(g: &'a mut Graph, config: &'a TransformerConfig, train: bool) -> Result<Builder<'a>> {
    config.validate()?;
    let b = Builder::with_config(g, config)?;
    Ok(if train { b.training() } else { b })
}

/// The embedding and the stack of every model that reads whole sequences. Returns the table of the embedding too. Its
/// caller lists the parameters, once all are there.
fn encode(b: &mut Builder<'_>, block: &dyn Block, [batch, time]: [usize; 2]) -> Result<(TransformerEncoder, Table)> {
    let c = b.config()?;
    if time > c.context {
        let message = format!("must be at least the sequence length {time}, but is {}", c.context);
        return Err(Error::config("context", message));
    }
    let tokens = b.g.input("tokens", TensorType::u32([batch, time]))?;
    let mut token_types = None;
    if c.token_types > 0 {
        token_types = Some(b.g.input(TOKEN_TYPES, TensorType::u32([batch, time]))?);
    }
    let (table, mut x) = embed(b, tokens)?;
    if let Some(types) = token_types {
        let kinds = b.g.param_with("token_type.weight", [c.token_types, c.d_model], c.weight_init(false))?;
        let rows = b.g.embedding("token_type", kinds, types)?;
        x = b.g.add("token_type.add", x, rows)?;
    }
    let Stack { stream, hidden } = b.stack_of(block, x)?;
    let dropout_seed = b.g.find_step_seed();
    Ok((TransformerEncoder { tokens, token_types, dropout_seed, stream, hidden, params: vec![] }, table))
}

/// The table of tokens, and its rows for these.
fn embed(b: &mut Builder<'_>, tokens: Value) -> Result<(Table, Value)> {
    let c = b.config()?;
    let table = b.table("embed.weight", [c.vocab_size, c.d_model], c.weight_init(false))?;
    let x = table.rows(b.g, "embed", tokens)?;
    Ok((table, x))
}

/// The logits of all tokens, from the normalised end of the stream.
fn head(b: &mut Builder<'_>, embedding: Table, hidden: Value) -> Result<Value> {
    let c = b.config()?;
    let table = match c.tied_head {
        true => embedding,
        false => b.table("head.weight", [c.vocab_size, c.d_model], c.weight_init(false))?,
    };
    table.scores(b.g, "head", hidden, b.activations)
}

/// Which tokens a decoder computes logits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeRows {
    /// One of the new tokens of each sequence, chosen by the input `last`. This is all that generation needs.
    Last,
    /// All new tokens: to score a given text.
    All,
}

/// Shape of one pass of a decoder.
///
/// A decoder has two of these: many tokens for prompts, and one for each token that it generates.
#[derive(Clone, Copy, Debug)]
pub struct DecodeShape {
    /// Number of sequences.
    pub batch: usize,
    /// Number of new tokens per sequence.
    pub time: usize,
    /// Number of tokens that a cache holds per sequence.
    pub capacity: usize,
    /// Which tokens get logits.
    pub rows: DecodeRows,
    /// How packed products read their inputs.
    pub activations: Activations,
    /// How the caches are stored: [`DType::F32`] or [`DType::F16`].
    pub cache: DType,
    /// How a pass of several tokens per sequence stores what its blocks compute, apart from the residual stream:
    /// [`DType::F32`] or [`DType::F16`].
    pub prompts: DType,
}

/// The values of a model that decodes with a cache: what to write, what to read, what to bind.
///
/// [`Decoder`](crate::decode::Decoder) runs these for you. Build one yourself to put a decoding step into a graph of
/// your own.
#[derive(Clone, Debug)]
pub struct TransformerDecoder {
    /// Input: the ids of the new tokens, u32 `[batch, time]`.
    pub tokens: Value,
    /// Input: number of earlier tokens of each sequence, u32 `[batch]`.
    pub start: Value,
    /// Input, if the model has learned positions: those of the new tokens, u32 `[batch, time]`.
    pub positions: Option<Value>,
    /// Input, with [`DecodeRows::Last`]: the row of `[batch * time]` to compute logits for, u32 `[batch]`.
    pub last: Option<Value>,
    /// The residual stream `[batch, time, d_model]`: after the embedding, then after each block.
    pub stream: Vec<Value>,
    /// Logits of the next token, `[rows, vocab_size]`.
    pub logits: Value,
    /// Parameters: f32, or the words of packed matrices.
    pub params: Vec<Value>,
    /// States: keys and values of each attention, `[batch, capacity, n_kv_heads * head_dim]`.
    pub caches: Vec<Value>,
    /// Input, if there is room for adapters: the slot of each sequence, u32 `[batch]`. A number that is no slot stands
    /// for no adapter.
    pub slots: Option<Value>,
    /// Inputs, if so: the matrices of all slots, `{layer}.lora_a` `[count, d_in, rank]` and `{layer}.lora_b`
    /// `[count, rank, d_out]` of each layer.
    pub adapters: Vec<Value>,
}

impl TransformerDecoder {
    /// Adds the forward pass for new tokens that follow a cache. Matrices that `packed` lists keep their stored format;
    /// all other parameters have the layout of [`Transformer`]'s.
    pub fn build(
        g: &mut Graph,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        shape: DecodeShape,
    ) -> Result<Self> {
        Self::assemble(g, config, &StandardBlock, packed, shape, None)
    }

    /// The same with blocks of your own.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] names the first node of a block that cannot be decoded: see [`Block`].
    pub fn build_with(
        g: &mut Graph,
        config: &TransformerConfig,
        block: &dyn Block,
        packed: &BTreeMap<String, Packed>,
        shape: DecodeShape,
    ) -> Result<Self> {
        let max_tensor_bytes = g.max_tensor_bytes();
        let model = Self::assemble(g, config, block, packed, shape, None)?;
        Self::check_blocks(config, block, max_tensor_bytes)?;
        Ok(model)
    }

    /// Returns an error if these blocks cannot be decoded.
    pub(crate) fn check_blocks(config: &TransformerConfig, block: &dyn Block, max_tensor_bytes: u64) -> Result<()> {
        let mut g = Graph::with_max_tensor_bytes(max_tensor_bytes);
        let time = decodable::TIME.min(config.context);
        let shape = DecodeShape {
            batch: decodable::BATCH,
            time,
            capacity: time,
            rows: DecodeRows::All,
            activations: Activations::F32,
            cache: DType::F32,
            prompts: DType::F32,
        };
        let model = Self::assemble(&mut g, config, block, &BTreeMap::new(), shape, None)?;
        let inputs: Vec<Value> = [model.tokens].into_iter().chain(model.positions).collect();
        let stream = [model.stream[0], model.stream[config.n_layers]];
        decodable::check(&Subject { graph: &g, time, stream, inputs: &inputs, caches: &model.caches })
    }

    /// [`build_with`](Self::build_with) without a look at what the blocks do, with room for adapters.
    pub(crate) fn assemble(
        g: &mut Graph,
        config: &TransformerConfig,
        block: &dyn Block,
        packed: &BTreeMap<String, Packed>,
        shape: DecodeShape,
        adapters: Option<&AdapterSlots>,
    ) -> Result<Self> {
        let DecodeShape { batch, time, capacity, rows, activations, cache, prompts } = shape;
        if config.bidirectional || config.token_types > 0 {
            return Err(Error::config("bidirectional", "an encoder sees all tokens at once; it does not decode"));
        }
        if capacity == 0 || capacity > config.context {
            let message = format!("a cache of {capacity} tokens must be from 1 to the context, {}", config.context);
            return Err(Error::config("context", message));
        }
        for (field, dtype) in [("cache", cache), ("prompts", prompts)] {
            if !dtype.is_float() {
                return Err(Error::config(field, format!("must be f32 or f16, but is {dtype}")));
            }
        }
        let mut b = for_tokens(g, config, false)?.packed(packed);
        let tokens = b.g.input("tokens", TensorType::u32([batch, time]))?;
        let start = b.g.input("start", TensorType::u32([batch]))?;
        let positions = match config.positions {
            Positions::Learned => Some(b.g.input("positions", TensorType::u32([batch, time]))?),
            Positions::Rope { .. } => None,
        };
        b.activations = activations.of_rows(batch * time);
        b.caches = Some(Caches { start, capacity, dtype: cache, states: vec![] });
        if let Some(room) = adapters {
            room.validate()?;
            b.slots = Some(Slots::new(b.g, room, batch)?);
        }
        let (table, x) = embed(&mut b, tokens)?;
        let x = b.begin(x, positions)?;
        let first = b.g.nodes().len();
        let stream = b.blocks(block, x)?;
        if time > 1 {
            store_activations(b.g, first, &stream, prompts)?;
        }
        let mut x = b.g.reshape("rows", stream[config.n_layers], [batch * time, config.d_model])?;
        let mut last = None;
        if rows == DecodeRows::Last {
            // Only one row per sequence goes on to the output projection, which costs as much as many blocks.
            let ids = b.g.input("last", TensorType::u32([batch]))?;
            x = b.g.embedding("last_rows", x, ids)?;
            last = Some(ids);
        }
        let x = b.final_norm(x)?;
        let logits = head(&mut b, table, x)?;
        let params = b.added_params();
        let caches = b.caches.map_or(vec![], |caches| caches.states);
        let (slots, stacks) = b.slots.map(|slots| (slots.ids, slots.stacks)).unzip();
        let stacks = stacks.unwrap_or_default();
        if let Some(room) = adapters {
            room.check_names(params.iter().chain(&stacks).map(|&v| g.name(v)))?;
        }
        Ok(TransformerDecoder {
            tokens,
            start,
            positions,
            last,
            stream,
            logits,
            params,
            caches,
            slots,
            adapters: stacks,
        })
    }
}
