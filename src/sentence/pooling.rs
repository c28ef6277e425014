//! From one vector per token to one per sentence.

use serde_json::Value as Json;

use crate::error::{Error, Result, joined, quoted};
use crate::format::Settings;
use crate::graph::{Graph, Value};
use crate::tensor::TensorType;

/// How the token vectors of a sentence are reduced to one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean, as most sentence models use.
    #[default]
    Mean,
    /// The vector of the first token, `[CLS]` in a BERT.
    First,
    /// The largest value of each dimension.
    Max,
    /// Their sum, divided by the square root of their number.
    MeanSqrtLen,
    /// Their mean, weighted by position: the `i`-th of `n` tokens counts `i / (1 + 2 + .. + n)` (Muennighoff 2022,
    /// <https://arxiv.org/abs/2202.08904>).
    WeightedMean,
    /// The vector of the last token.
    Last,
}

/// Each pooling with its name and its older flag in configurations of sentence-transformers, in the order in which
/// several flags are concatenated.
const NAMES: [(Pooling, &str, &str); 6] = [
    (Pooling::First, "cls", "pooling_mode_cls_token"),
    (Pooling::Max, "max", "pooling_mode_max_tokens"),
    (Pooling::Mean, "mean", "pooling_mode_mean_tokens"),
    (Pooling::MeanSqrtLen, "mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
    (Pooling::WeightedMean, "weightedmean", "pooling_mode_weightedmean_tokens"),
    (Pooling::Last, "lasttoken", "pooling_mode_lasttoken"),
];

impl Pooling {
    /// Adds the pooling of rows, `[n, d_model]` to `[d_model]`. `before` is the number of the sentence's tokens that
    /// come before them. [`Pooling::WeightedMean`] needs [weights](position_weights).
    pub(super) fn build(self, g: &mut Graph, rows: Value, before: usize, weights: &mut Option<Value>) -> Result<Value> {
        let [n, d_model] = *g.ty(rows).shape.dims() else {
            return Err(Error::Graph("pooling needs a matrix".into()));
        };
        let pooled = match self {
            Pooling::Mean | Pooling::MeanSqrtLen => {
                let sum = g.sum_to("sum", rows, [d_model])?;
                let count = if self == Pooling::Mean { n as f32 } else { (n as f32).sqrt() };
                g.scale("mean", sum, 1.0 / count)?
            }
            Pooling::First => g.slice("first", rows, 0, 0, 1)?,
            Pooling::Last => g.slice("last", rows, 0, n - 1, 1)?,
            Pooling::Max => {
                let columns = g.transpose("columns", rows, 0, 1)?;
                let one = g.fill("one", [1], 1.0)?;
                g.top_k("largest", columns, one, 1)?[0]
            }
            Pooling::WeightedMean => {
                let weights = match *weights {
                    Some(weights) => weights,
                    None => *weights.insert(g.input("weights", TensorType::f32([1, n]))?),
                };
                let sum = g.matmul("sum", weights, rows)?;
                g.scale("mean", sum, 1.0 / position_weights(n, before).iter().sum::<f32>())?
            }
        };
        g.reshape("pooled", pooled, [d_model])
    }
}

/// The position of each row in its sentence, counted from 1.
pub(super) fn position_weights(n: usize, before: usize) -> Vec<f32> {
    (before + 1..=before + n).map(|position| position as f32).collect()
}

/// Reads the configuration of a Pooling module: `pooling_mode`, a name or several, or a flag for each.
pub(super) fn of_config(config: &Settings) -> Result<Vec<Pooling>> {
    const KEY: &str = "pooling_mode";
    let names = match config.get(KEY) {
        Some(Json::String(name)) => Some(vec![name.as_str()]),
        _ => config.strs(KEY)?,
    };
    if let Some(names) = names {
        return match names.is_empty() {
            true => Err(config.bad(KEY, "expected a name, got an empty list")),
            false => names.into_iter().map(|name| by_name(config, name)).collect(),
        };
    }
    for (key, value) in config.iter().filter(|(key, _)| key.starts_with(KEY)) {
        if !NAMES.iter().any(|(.., flag)| *flag == key) && *value != false {
            return Err(config.bad(key, format!("expected one of {}", joined(NAMES.map(|(.., flag)| flag), ", "))));
        }
    }
    let mut poolings = vec![];
    for (pooling, _, flag) in NAMES {
        if config.bool(flag)?.unwrap_or(false) {
            poolings.push(pooling);
        }
    }
    if poolings.is_empty() {
        poolings.push(Pooling::Mean);
    }
    Ok(poolings)
}

fn by_name(config: &Settings, name: &str) -> Result<Pooling> {
    let found = NAMES.iter().find(|(_, known, _)| name.eq_ignore_ascii_case(known));
    found.map(|&(pooling, ..)| pooling).ok_or_else(|| {
        let known = joined(NAMES.map(|(_, name, _)| name), ", ");
        config.bad("pooling_mode", format!("expected one of {known}, got {}", quoted(name)))
    })
}
