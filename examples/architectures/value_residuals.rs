//! Each layer's attention mixes its own values with those of the first layer: ResFormer (Zhou et al. 2024,
//! <https://arxiv.org/abs/2410.17897>), in the variant with two learned factors, which start at a half each here.
//!
//! This gives later layers a second path, besides the stream, to what the first layer read from the tokens.

use throughline::nn::{Block, Builder, ParamInit};
use throughline::{Result, Value};

/// The standard block with `v = a * v_own + b * v_of_layer_0`.
#[derive(Debug)]
pub struct ValueResiduals;

impl Block for ValueResiduals {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        let x = b.residual("attn", x, |b, x| {
            let [q, k, own] = b.qkv(x)?;
            let values = match b.kept("values") {
                // The first layer keeps its values for the others.
                None => {
                    b.keep("values", own);
                    own
                }
                Some(first) => mix(b, own, first)?,
            };
            let y = b.attend([q, k, values])?;
            b.project(y)
        })?;
        b.residual("mlp", x, Builder::feed_forward)
    }
}

fn mix(b: &mut Builder<'_>, own: Value, first: Value) -> Result<Value> {
    let half = ParamInit::Constant(0.5);
    let (a, c) = (b.param_with("own_factor", [1], half)?, b.param_with("first_factor", [1], half)?);
    let (own, first) = (b.mul("own", own, a)?, b.mul("first", first, c)?);
    b.add("mixed", own, first)
}
