//! The blocks of a transformer, from the start of the residual stream to its end.

use super::block::{Block, StandardBlock};
use super::builder::Builder;
use super::config::{NormPlacement, Positions};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::tensor::DType;

/// The values of a stack of blocks: see [`Builder::stack`].
#[derive(Clone, Debug)]
pub struct Stack {
    /// The residual stream `[batch, time, d_model]`: before the first block, then after each block.
    pub stream: Vec<Value>,
    /// The normalised end of the stream, `[batch, time, d_model]`.
    pub hidden: Value,
}

impl Builder<'_> {
    /// A transformer on vectors: the blocks of the configuration on `x`, `[batch, time, d_model]`, and the final norm.
    ///
    /// Use it for anything but text: time series, patches of an image, the state of a game. A
    /// [`linear`](Self::linear) layer brings its features to `d_model`, and another follows the stack. Learned positions
    /// are added to `x`, if the configuration has them; `bidirectional` decides whether a place sees those after it.
    /// Tables and heads for tokens are in [`Transformer`](super::Transformer) and
    /// [`TransformerEncoder`](super::TransformerEncoder), which add the same nodes after their embedding.
    ///
    /// Names begin with `h.{layer}`, `position` and `norm_f`. For two stacks in one graph, put each in a
    /// [scope](Self::scoped).
    pub fn stack(&mut self, x: Value) -> Result<Stack> {
        self.stack_of(&StandardBlock, x)
    }

    /// [`stack`](Self::stack) with blocks of your own.
    pub fn stack_of(&mut self, block: &dyn Block, x: Value) -> Result<Stack> {
        let c = self.configured("a stack of blocks")?;
        let ty = self.g.type_of("a stack of blocks", x)?;
        let fits = matches!(*ty.shape.dims(), [_, time, width] if width == c.d_model && time <= c.context);
        if !fits || ty.dtype != DType::F32 {
            let expected =
                format!("f32 [batch, time, {}], as input of a stack, with at most {} steps", c.d_model, c.context);
            return Err(Error::data(self.g.name(x), expected, ty));
        }
        let x = self.begin(x, self.texts.and_then(|texts| texts.positions))?;
        let stream = self.blocks(block, x)?;
        let hidden = self.final_norm(stream[stream.len() - 1])?;
        Ok(Stack { stream, hidden })
    }

    /// The start of the stream: `x` with learned positions, norm and dropout, as far as the configuration has them.
    /// `positions`, u32 `[batch, time]`, count from 0 if they are not given.
    pub(super) fn begin(&mut self, x: Value, positions: Option<Value>) -> Result<Value> {
        let c = self.config()?;
        let mut x = x;
        if c.positions == Positions::Learned {
            let all = self.g.param_with("position.weight", [c.context, c.d_model], c.weight_init(false))?;
            let time = self.g.ty(x).shape.dims()[1];
            let used = match positions {
                Some(ids) => self.g.embedding("position.used", all, ids)?,
                None if time == c.context => all,
                None => self.g.slice("position.used", all, 0, 0, time)?,
            };
            x = self.g.add("position", x, used)?;
        }
        if c.embed_norm {
            x = self.norm("embed_norm", x)?;
        }
        self.dropout(x, c.dropout)
    }

    /// The stream from `x` on: before each block, and after the last.
    pub(super) fn blocks(&mut self, block: &dyn Block, x: Value) -> Result<Vec<Value>> {
        let mut stream = vec![x];
        for layer in 0..self.config()?.n_layers {
            let x = stream[layer];
            stream.push(self.scoped(&format!("h.{layer}"), |b| block.build(b, layer, x))?);
        }
        Ok(stream)
    }

    /// The norm after the last block. In post-norm models that has normalised already.
    pub(super) fn final_norm(&mut self, x: Value) -> Result<Value> {
        match self.config()?.norm_placement {
            NormPlacement::Pre => self.norm("norm_f", x),
            NormPlacement::Post => Ok(x),
        }
    }
}
