//! Sentence embeddings: an encoder from files whose output is pooled to one vector per sentence (Reimers and Gurevych
//! 2019, <https://arxiv.org/abs/1908.10084>).
//!
//! Use them for semantic search and clustering: the dot product of two vectors of length 1 is the cosine similarity of
//! the sentences.
//!
//! Folders of sentence-transformers say what follows the transformer, in `modules.json` and the folders that it lists.
//! `TextEncoder::open` (with the feature `tokenizers`) does all that they say, from text to vector;
//! [`SentenceEncoder::open`] does so from token ids. What they say and is not supported is an error that names file and
//! module.
//!
//! | module | what is supported |
//! |---|---|
//! | Transformer | any encoder that [`Model`](crate::model::Model) opens |
//! | Pooling | every [`Pooling`], also several, one after another |
//! | Dense | weights in safetensors, the usual activations, the residual connection |
//! | LayerNorm, Normalize, Dropout | yes. Without a Normalize, vectors have any length |
//!
//! A folder without `modules.json` gets [`Pooling::Mean`] and no Normalize, as in sentence-transformers.

mod encoder;
mod folder;
mod layers;
mod pooling;
#[cfg(feature = "tokenizers")]
mod text;

pub use encoder::SentenceEncoder;
pub use pooling::Pooling;
#[cfg(feature = "tokenizers")]
pub use text::TextEncoder;
