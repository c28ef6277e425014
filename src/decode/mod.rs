//! Text generation: a model that is fed tokens, keeps their keys and values in a cache, and returns the logits of the
//! next token.
//!
//! Choose by what goes in and who waits:
//!
//! - `Chat` (with the feature `tokenizers`) for a conversation in text.
//! - [`Decoder::generate`] for a program that may wait for the GPU: an iterator, or an async stream, over new tokens.
//! - [`Decoder::feed`] to choose tokens yourself from all logits.
//! - [`FrameDecoder`] for an application with frames: it records as much work as a budget allows, for many texts at
//!   once.
//! - [`DecodePlan`] to know memory and limits before there is a device.
//!
//! Matrices keep the format of the file and are decoded inside the kernels. A prompt is processed in chunks; after that
//! each token takes one submit. Several sequences of any lengths can run side by side, each with an [adapter](AdapterSlots)
//! of its own or none. Models with blocks of one's own decode as well, and caches in f16 hold twice the context in the
//! same memory: see [`DecodeOptions`].

mod adapters;
#[cfg(feature = "tokenizers")]
mod chat;
mod decoder;
mod frames;
mod generation;
mod plan;
pub mod sample;

pub use crate::nn::AdapterSlots;
pub use crate::ops::packed_i8::Activations;
#[cfg(feature = "tokenizers")]
pub use chat::{Chat, Reply};
pub use decoder::Decoder;
pub use frames::{Event, FrameDecoder};
pub use generation::{Finish, Generation, GenerationOptions};
pub use plan::{DecodeOptions, DecodePlan};
