//! Transformers built from layers, on the graph.
//!
//! One block definition serves all: pre- or post-norm, LayerNorm or RMSNorm, learned positions or
//! RoPE, GELU or SwiGLU, with or without grouped heads, biases and a tied head are fields of
//! [`TransformerConfig`], not forks of the code.

mod config;
mod transformer;

pub use config::{Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
pub use transformer::{Param, ParamInit, Transformer, TransformerDecoder};
