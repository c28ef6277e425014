//! Transformers built from layers, on the graph.
//!
//! One block definition serves all: pre- or post-norm, LayerNorm or RMSNorm, learned positions or
//! RoPE, GELU or SwiGLU, with or without grouped heads, biases and a tied head are fields of
//! [`TransformerConfig`], not forks of the code. Layers that no field describes are a [`Block`] of your own, made
//! of the same parts ([`Builder`]).

mod block;
mod builder;
mod config;
mod transformer;

pub use block::{Block, StandardBlock};
pub use builder::{Builder, Param, ParamInit, is_hidden_matrix};
pub(crate) use builder::{part_name, part_of, table_of_part};
pub use config::{Biases, Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
pub use transformer::{DecodeRows, DecodeShape, Transformer, TransformerDecoder, TransformerEncoder};
