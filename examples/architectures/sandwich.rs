//! A norm before each branch and another after it: CogView's Sandwich-LN (Ding et al. 2021,
//! <https://arxiv.org/abs/2105.13290>), and the order of Gemma 2 (<https://arxiv.org/abs/2408.00118>).
//!
//! The gain of the second norm sets the size of what a branch adds, however large its weights are: the stream cannot
//! blow up. For the same reason, initial scaling of the branch's last projection, such as GPT-2's, has no effect.

use throughline::nn::{Block, Builder};
use throughline::{Result, Value};

/// `x + norm(f(norm(x)))`, for attention and then for the feed-forward half.
#[derive(Debug)]
pub struct Sandwich;

impl Block for Sandwich {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        let x = b.residual("attn", x, |b, x| {
            let y = b.attention(x)?;
            b.norm("out_norm", y)
        })?;
        b.residual("mlp", x, |b, x| {
            let y = b.feed_forward(x)?;
            b.norm("out_norm", y)
        })
    }
}
