//! Attention and feed-forward side by side: both read the same norm of the stream, and one addition takes both in.
//! GPT-J (Wang and Komatsuzaki 2021) and PaLM (Chowdhery et al. 2022, <https://arxiv.org/abs/2204.02311>, section 2).
//!
//! A layer saves a norm, and its two halves could run at once. But the feed-forward half no longer sees what its
//! own layer's attention found.

use throughline::nn::{Block, Builder};
use throughline::{Result, Value};

/// `x + attention(norm(x)) + mlp(norm(x))`.
#[derive(Debug)]
pub struct Parallel;

impl Block for Parallel {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        b.residual("both", x, |b, x| {
            let attention = b.scoped("attn", |b| b.attention(x))?;
            let mlp = b.scoped("mlp", |b| b.mlp(x))?;
            b.g.add("sum", attention, mlp)
        })
    }
}
