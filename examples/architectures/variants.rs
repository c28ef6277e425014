//! The architectures to compare, all with the same number of parameters.
#![allow(dead_code)] // each example uses a part

use anyhow::Result;
use throughline::Graph;
use throughline::nn::{Block, StandardBlock, Transformer, TransformerConfig};

use super::parallel::Parallel;
use super::sandwich::Sandwich;
use super::value_residuals::ValueResiduals;

/// An architecture, ready to train.
pub struct Variant {
    pub name: &'static str,
    pub block: &'static dyn Block,
    /// The baseline with a different `d_ff`.
    pub model: TransformerConfig,
    pub parameters: usize,
}

/// The baseline, followed by the others, whose `d_ff` brings them closest to its number of parameters.
pub fn variants(baseline: &TransformerConfig) -> Result<Vec<Variant>> {
    let blocks: [(&str, &'static dyn Block); 4] = [
        ("baseline", &StandardBlock),
        ("parallel", &Parallel),
        ("sandwich norm", &Sandwich),
        ("value residuals", &ValueResiduals),
    ];
    let wanted = parameters(baseline, &StandardBlock)?;
    blocks
        .into_iter()
        .map(|(name, block)| {
            let mut model = baseline.clone();
            // The number of parameters is linear in d_ff.
            let one_more = TransformerConfig { d_ff: baseline.d_ff + 1, ..baseline.clone() };
            let has = parameters(&model, block)?;
            let slope = parameters(&one_more, block)? as f64 - has as f64;
            let change = ((wanted as f64 - has as f64) / slope).round();
            model.d_ff = (baseline.d_ff as f64 + change).max(1.0) as usize;
            let parameters = parameters(&model, block)?;
            Ok(Variant { name, block, model, parameters })
        })
        .collect()
}

/// The number of parameters of a model.
fn parameters(model: &TransformerConfig, block: &dyn Block) -> Result<usize> {
    let mut g = Graph::new();
    let transformer = Transformer::build_with(&mut g, model, block, 1, 1, true)?;
    Ok(transformer.params.iter().map(|&p| g.ty(p).len()).sum())
}
