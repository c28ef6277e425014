//! Layers and networks, built on the graph.
//!
//! | to build | use |
//! |---|---|
//! | a network of your own: perceptrons, convolutions, anything | [`Builder::new`] and its layers |
//! | a transformer on vectors: time series, patches, game state | [`Builder::with_config`] and [`Builder::stack`] |
//! | a language model | [`Transformer`], or a [`Trainer`](crate::train::Trainer), which builds it itself |
//! | a vector per token: classifiers, sentence vectors | [`TransformerEncoder`] |
//! | a step that generates text | a [`Decoder`](crate::decode::Decoder), which runs a [`TransformerDecoder`] |
//! | layers that no configuration describes | a [`Block`], for any of the transformers above |
//!
//! Everything adds nodes to a [`Graph`](crate::Graph) and initialised parameters, with names that follow from its own:
//! see [`Builder`].
//!
//! One block definition serves all models. Pre- or post-norm, LayerNorm or RMSNorm, learned positions or RoPE, GELU or
//! SwiGLU, grouped heads, biases and a tied head are fields of a [`TransformerConfig`], not forks of the code.

mod block;
mod builder;
mod caches;
mod config;
mod decodable;
mod lora;
mod names;
mod parts;
mod slots;
mod stack;
mod stored;
mod table;
mod texts;
mod transformer;

pub use crate::graph::ParamInit;
pub use block::{Block, StandardBlock};
pub use builder::{Builder, Linear};
pub(crate) use config::check_ids;
pub use config::{Biases, Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
pub use lora::Lora;
pub(crate) use lora::{LORA_A, LORA_B, MAX_RANK, QKV, is_called};
pub use names::is_hidden_matrix;
pub(crate) use names::{layer_of, part_name, rows_of_part, table_of_part};
pub use slots::AdapterSlots;
pub use stack::Stack;
pub(crate) use transformer::TOKEN_TYPES;
pub use transformer::{
    DecodeRows, DecodeShape, Transformer, TransformerDecoder, TransformerEncoder, TransformerOptions,
};
