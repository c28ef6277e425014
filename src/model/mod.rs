//! Models from files: their configuration, and their parameters under our names.
//!
//! Use [`Model::open`] to run or fine-tune a published model. It takes a folder in Hugging Face's layout (`config.json`
//! and safetensors) or a GGUF file:
//!
//! | files | architectures |
//! |---|---|
//! | Hugging Face | `gpt2`, `llama`, `mistral`, `qwen2`, `qwen3`, `bert` |
//! | GGUF | `llama` (Mistral's too), `qwen2`, `qwen3`, `gpt2` |
//!
//! A file may come from anywhere. What it leaves out has the default of `transformers` or llama.cpp. What it says of a
//! model that this crate would compute otherwise is an error that names the key or the tensor.
//!
//! All of them become one [`TransformerConfig`](crate::nn::TransformerConfig). A model from a file decodes
//! ([`crate::decode`]), embeds sentences ([`crate::sentence`]), or trains further: [`Model::load`] fills the parameters
//! of a [`Trainer`](crate::train::Trainer), and [`Model::save`] writes a folder that PyTorch loads, with tokenizer and
//! chat template. [`save`] does so for models that were trained from scratch. [`Model::save_gguf`] writes a GGUF file,
//! in another precision if you like.

mod adapter;
mod companions;
mod config;
mod gguf;
mod hugging_face;
mod layout;
mod loaded;
mod names;
mod save;
mod save_gguf;
mod to_gguf;
mod to_hugging_face;
mod upload;

pub use adapter::{Adapter, AdapterLayer};
pub use hugging_face::config_from_json;
pub use loaded::Model;
pub use save::{save, save_arena, save_arena_blocking, save_with};
pub use save_gguf::TensorTypes;
pub use to_hugging_face::config_to_json;
pub(crate) use upload::{Placed, Uploaded};
