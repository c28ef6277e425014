//! What a layer does to the residual stream.

use std::fmt;

use super::builder::Builder;
use crate::error::Result;
use crate::graph::Value;

/// How a layer transforms the residual stream: the one thing that most new architectures change.
///
/// Implement it to try an architecture that no field of [`TransformerConfig`](super::TransformerConfig) describes.
/// A [`Trainer`](crate::train::Trainer) takes it as [`TrainOptions::block`](crate::train::TrainOptions::block):
///
/// ```
/// use throughline::nn::{Block, Builder, Transformer, TransformerConfig};
/// use throughline::{Graph, Result, Value};
///
/// /// Attention and feed-forward side by side, as GPT-J has them: one norm, one addition.
/// #[derive(Debug)]
/// struct Parallel;
///
/// impl Block for Parallel {
///     fn build(&self, b: &mut Builder<'_>, _layer: usize, x: Value) -> Result<Value> {
///         b.residual("both", x, |b, x| {
///             let attention = b.scoped("attn", |b| b.attention(x))?;
///             let mlp = b.scoped("mlp", |b| b.feed_forward(x))?;
///             b.add("sum", attention, mlp)
///         })
///     }
/// }
///
/// let mut g = Graph::new();
/// let config = TransformerConfig::llama(65, 32, 2, 48, 4);
/// let model = Transformer::build_with(&mut g, &config, &Parallel, 3, 32, true)?;
/// assert_eq!(model.stream.len(), 3);
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// # Decoding
///
/// A [`Decoder`](crate::decode::Decoder) feeds a few tokens at a time, and keeps keys and values of those before. It
/// takes any block ([`DecodeOptions::block`](crate::decode::DecodeOptions::block)) that lets tokens look at each other
/// by [`Builder::attend`] alone, as often per layer as it likes. Values that go from layer to layer with
/// [`Builder::keep`] are no problem. But a convolution over time, say, would need rows that are no longer there: this is
/// an error that names its node.
pub trait Block: fmt::Debug + Send + Sync {
    /// Adds layer `layer`, counted from 0, to the graph. Takes the stream before the layer, `[batch, time, d_model]`,
    /// and returns the stream after it.
    ///
    /// The names of nodes and parameters are already in the scope of the layer: `h.0` and so on.
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value>;
}

/// Attention, then a feed-forward network, each as a branch of its own: the block of GPT-2, Llama and BERT.
#[derive(Clone, Copy, Debug)]
pub struct StandardBlock;

impl Block for StandardBlock {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        let x = b.residual("attn", x, Builder::attention)?;
        b.residual("mlp", x, Builder::feed_forward)
    }
}
