//! Transformers, built from layers on the graph.
//!
//! Start here to train or study a transformer: describe it by a [`TransformerConfig`] and hand that to a
//! [`Trainer`](crate::train::Trainer), or build the graph yourself with [`Transformer::build`].
//!
//! One block definition serves all models. Pre- or post-norm, LayerNorm or RMSNorm, learned positions or RoPE, GELU or
//! SwiGLU, grouped heads, biases and a tied head are fields of the configuration, not forks of the code. For a layer
//! that no field describes, implement [`Block`] with the same parts, which [`Builder`] provides.

mod block;
mod builder;
mod config;
mod transformer;

pub use crate::graph::ParamInit;
pub use block::{Block, StandardBlock};
pub use builder::{Builder, is_hidden_matrix};
pub(crate) use builder::{part_name, rows_of_part, table_of_part};
pub(crate) use config::check_ids;
pub use config::{Biases, Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
pub(crate) use transformer::TOKEN_TYPES;
pub use transformer::{DecodeRows, DecodeShape, Transformer, TransformerDecoder, TransformerEncoder};
