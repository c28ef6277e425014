//! Attention of each layer mixes its values with those of the first layer, by two learned factors: ResFormer (Zhou et
//! al. 2024, <https://arxiv.org/abs/2410.17897>), in the form with learned factors; here they start at a half each.
//!
//! It is a second way, beside the stream, by which what the first layer read of the tokens gets to the last.

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
                // The first layer leaves its own.
                None => {
                    b.keep("values", own);
                    own
                }
                Some(first) => mix(b, own, first)?,
            };
            let y = b.attend([q, k, values])?;
            let config = b.config();
            b.linear("o", y, config.d_model, config.biases.out, true)
        })?;
        b.residual("mlp", x, Builder::mlp)
    }
}

fn mix(b: &mut Builder<'_>, own: Value, first: Value) -> Result<Value> {
    let half = ParamInit::Constant(0.5);
    let (a, c) = (b.param("own_factor", &[1], half)?, b.param("first_factor", &[1], half)?);
    let (own, first) = (b.scaled("own", own, a)?, b.scaled("first", first, c)?);
    b.g.add("mixed", own, first)
}
