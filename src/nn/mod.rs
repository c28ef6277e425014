//! Transformers built from layers, on the graph.
//!
//! One block definition serves all: pre- or post-norm, LayerNorm or RMSNorm, learned positions or
//! RoPE, GELU or SwiGLU, with or without grouped heads, biases and a tied head are fields of
//! [`GptConfig`], not forks of the code.

mod config;
mod gpt;

pub use config::{GptConfig, Init, Mlp, Norm, NormPlacement, Positions};
pub use gpt::{Gpt, GptDecoder, Param, ParamInit};
