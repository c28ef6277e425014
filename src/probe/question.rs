//! What to ask of a graph.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};

/// What a probe looks at: a node by its name, or another output than the first of it as `name:1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tap {
    /// What the node computes, or what an input, parameter or state holds.
    Forward(String),
    /// The gradient of the loss with respect to it.
    Gradient(String),
}

impl Tap {
    /// What the node of this name computes.
    pub fn forward(node: impl Into<String>) -> Self {
        Tap::Forward(node.into())
    }

    /// The gradient with respect to the node of this name.
    pub fn gradient(node: impl Into<String>) -> Self {
        Tap::Gradient(node.into())
    }

    /// Name of the node.
    pub fn node(&self) -> &str {
        let (Tap::Forward(node) | Tap::Gradient(node)) = self;
        node
    }
}

/// What a probe tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Measure {
    /// Root of the mean square.
    Rms,
    /// Largest magnitude.
    MaxAbs,
    /// Mean.
    Mean,
    /// Cosine of the angle to another tensor of the same shape, both as one long vector. NaN if one is zero.
    Cosine(Tap),
    /// RMS over the RMS of another, of any shape.
    Ratio(Tap),
    /// All elements. They stay in memory to the end of the step.
    Whole,
}

impl Measure {
    pub(super) fn other(&self) -> Option<&Tap> {
        match self {
            Measure::Cosine(other) | Measure::Ratio(other) => Some(other),
            _ => None,
        }
    }
}

/// A question about a node of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Name of the answer: `stream_rms`.
    pub name: String,
    /// The layer that it is about, if it is about one.
    #[serde(default)]
    pub layer: Option<usize>,
    /// What it looks at.
    pub tap: Tap,
    /// What it tells.
    pub measure: Measure,
}

impl Probe {
    /// A probe that is about no layer in particular.
    pub fn new(name: impl Into<String>, tap: Tap, measure: Measure) -> Self {
        Probe { name: name.into(), layer: None, tap, measure }
    }

    /// The same, about a layer.
    pub fn of_layer(self, layer: usize) -> Self {
        Probe { layer: Some(layer), ..self }
    }

    pub(super) fn taps(&self) -> impl Iterator<Item = &Tap> {
        [&self.tap].into_iter().chain(self.measure.other())
    }
}

/// The name by which [`Tap`]s find a value.
pub(crate) fn tap_name(graph: &Graph, value: Value) -> String {
    match value.output {
        0 => graph.name(value).into(),
        n => format!("{}:{n}", graph.name(value)),
    }
}

/// The value of this name, `who` wants to know.
pub(super) fn find(graph: &Graph, who: &str, name: &str) -> Result<Value> {
    let output = |(node, n): (&str, &str)| {
        let value = Value { output: n.parse().ok()?, ..graph.find(node)? };
        graph.check_values(&[value]).ok().map(|()| value)
    };
    let found = graph.find(name).or_else(|| name.rsplit_once(':').and_then(output));
    found.ok_or_else(|| Error::Graph(format!("{who}: the graph has no node `{name}`")))
}
