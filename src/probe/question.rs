//! What to measure in a graph.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};

/// What a probe reads: a node by its name, or another output than its first as `name:1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tap {
    /// The value that the node computes, or that an input, parameter or state holds.
    Forward(String),
    /// The gradient of the loss with respect to that value.
    Gradient(String),
}

impl Tap {
    /// The value of the node of this name.
    pub fn forward(node: impl Into<String>) -> Self {
        Tap::Forward(node.into())
    }

    /// The gradient with respect to the node of this name.
    pub fn gradient(node: impl Into<String>) -> Self {
        Tap::Gradient(node.into())
    }

    /// The name of the node.
    pub fn node(&self) -> &str {
        let (Tap::Forward(node) | Tap::Gradient(node)) = self;
        node
    }
}

/// What a probe reports.
///
/// All but [`Whole`](Self::Whole) are reductions on the GPU and cost one number per step.
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
    /// Cosine similarity to another tensor of the same shape, both flattened. NaN if one of them is zero.
    Cosine(Tap),
    /// RMS divided by the RMS of another tensor of any shape.
    Ratio(Tap),
    /// All elements. They stay in memory to the end of the step, so this can be large.
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

/// A question about one node of a graph, answered in each step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Name of the answer, such as `stream_rms`.
    pub name: String,
    /// The layer that it concerns, if any.
    #[serde(default)]
    pub layer: Option<usize>,
    /// What it reads.
    pub tap: Tap,
    /// What it reports.
    pub measure: Measure,
}

impl Probe {
    /// A probe that concerns no layer in particular.
    pub fn new(name: impl Into<String>, tap: Tap, measure: Measure) -> Self {
        Probe { name: name.into(), layer: None, tap, measure }
    }

    /// The same probe, marked as concerning this layer. Readings can then be plotted by depth.
    pub fn of_layer(self, layer: usize) -> Self {
        Probe { layer: Some(layer), ..self }
    }

    pub(super) fn taps(&self) -> impl Iterator<Item = &Tap> {
        [&self.tap].into_iter().chain(self.measure.other())
    }

    /// Whether it reads a value of the node of this name, or the gradient of one.
    pub(crate) fn is_of(&self, name: &str) -> bool {
        self.taps().any(|tap| tap.node() == name || tap.node().rsplit_once(':').is_some_and(|(node, _)| node == name))
    }
}

/// The name by which [`Tap`]s find a value.
pub(crate) fn tap_name(graph: &Graph, value: Value) -> String {
    match value.output() {
        0 => graph.name(value).into(),
        n => format!("{}:{n}", graph.name(value)),
    }
}

/// The value of this name; `who` asks for it, for the error.
pub(super) fn find(graph: &Graph, who: &str, name: &str) -> Result<Value> {
    let output = |(node, n): (&str, &str)| {
        let value = graph.value(graph.find(node)?.node(), n.parse().ok()?);
        graph.contains(value).then_some(value)
    };
    let found = graph.find(name).or_else(|| name.rsplit_once(':').and_then(output));
    found.ok_or_else(|| Error::Graph(format!("{who}: the graph has no node `{name}`: printed, it lists them all")))
}
