//! Texts that share sequences.

use super::config::{Positions, TransformerConfig};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::tensor::TensorType;

/// Where texts begin, for models whose sequences hold several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Texts {
    /// Where in its sequence the text of each token begins: u32 `[batch, time]`.
    pub starts: Value,
    /// The place of each token in its text, if positions are learned: u32 `[batch, time]`.
    pub positions: Option<Value>,
}

impl Texts {
    /// Adds the inputs.
    pub fn add(g: &mut Graph, config: &TransformerConfig, [batch, time]: [usize; 2]) -> Result<Self> {
        if config.bidirectional {
            return Err(Error::config("packing", "needs a model whose tokens see only those before them"));
        }
        let starts = g.input("starts", TensorType::u32([batch, time]))?;
        let positions = match config.positions {
            Positions::Learned => Some(g.input("positions", TensorType::u32([batch, time]))?),
            // The rotation between two tokens depends on their distance alone.
            Positions::Rope { .. } => None,
        };
        Ok(Texts { starts, positions })
    }
}
