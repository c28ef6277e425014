//! Decoding with a cache of keys and values: a model from a file, fed tokens, giving the scores of the next.
//!
//! Matrices stay as the file stores them and are decoded inside the kernels. A prompt goes through in chunks,
//! then a token takes one submit. Several sequences may go side by side, of any lengths.

mod decoder;
mod frames;
mod generation;
mod plan;
pub mod sample;

pub use decoder::Decoder;
pub use frames::{Event, FrameDecoder};
pub use generation::{Finish, Generation, GenerationOptions};
pub use plan::DecodePlan;
