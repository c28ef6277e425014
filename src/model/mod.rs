//! Models from files: what they are, and their parameters under our names.
//!
//! [`Model::open`] takes a folder as Hugging Face has them (`config.json` and safetensors) or a GGUF file:
//!
//! | files | architectures |
//! |---|---|
//! | Hugging Face | `gpt2`, `llama`, `mistral`, `qwen2`, `qwen3`, `bert` |
//! | GGUF | `llama` (Mistral's too), `qwen2`, `qwen3`, `gpt2` |
//!
//! All of them are one [`TransformerConfig`](crate::nn::TransformerConfig). What came from a file decodes ([`crate::decode`]), embeds
//! ([`crate::embed`]), and trains on: [`Model::load`] fills the parameters of a
//! [`Trainer`](crate::train::Trainer). [`save`] writes a folder that PyTorch loads by the same names.

mod config;
mod layout;
mod loaded;
mod names;
mod save;
mod upload;

pub use loaded::Model;
pub use save::save;
pub(crate) use upload::{Placed, Uploaded};
