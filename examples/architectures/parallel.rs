//! Attention and feed-forward side by side: both read the same normalised stream, and their sum is added to it.
//! GPT-J (Wang and Komatsuzaki 2021) and PaLM (Chowdhery et al. 2022, <https://arxiv.org/abs/2204.02311>, section 2).
//!
//! This saves a norm per layer, and the two halves could run at the same time. But the feed-forward half no longer sees
//! the result of its own layer's attention.

use throughline::nn::{Block, Builder};
use throughline::{Result, Value};

/// `x + attention(norm(x)) + mlp(norm(x))`.
#[derive(Debug)]
pub struct Parallel;

impl Block for Parallel {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        b.residual("both", x, |b, x| {
            let attention = b.scoped("attn", |b| b.attention(x))?;
            let mlp = b.scoped("mlp", |b| b.feed_forward(x))?;
            b.add("sum", attention, mlp)
        })
    }
}
