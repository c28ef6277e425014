//! The usual questions about a transformer.

use super::question::{Measure, Probe, Tap, tap_name};
use crate::graph::{Graph, Source, Value};
use crate::nn::layer_of;

/// The usual probes of a transformer: a good default for watching training. `stream` is its residual stream, before
/// each layer and at the end, as [`Transformer`](crate::nn::Transformer), [`TransformerEncoder`] and
/// [`Stack`](crate::nn::Stack) have it, or as a network of your own does. With `gradients` they include those that need
/// a backward pass.
///
/// [`TransformerEncoder`]: crate::nn::TransformerEncoder
///
/// | name | layer | value |
/// |---|---|---|
/// | `stream_rms` | 0 to L | RMS of the stream before that layer; L is the end of the stream |
/// | `stream_cosine` | 0 to L - 1 | cosine similarity of the stream before and after that layer |
/// | `attn_rms`, `mlp_rms` | 0 to L - 1 | RMS of what a branch adds to the stream |
/// | `attn_ratio`, `mlp_ratio` | 0 to L - 1 | the same, divided by the RMS of what it is added to |
/// | `stream_grad_rms` | 0 to L | RMS of the gradient of the stream |
/// | `weight_grad_rms` | from its name | RMS of the gradient of each parameter of the graph, by node |
///
/// Branches are the `residual_add` nodes of a layer and named after those: a [`Block`](crate::nn::Block) whose addition
/// is `both_add` yields `both_rms` and `both_ratio`.
pub fn standard(graph: &Graph, stream: &[Value], gradients: bool) -> Vec<Probe> {
    let mut probes = vec![];
    let forward = |v: Value| Tap::Forward(tap_name(graph, v));
    for (layer, &x) in stream.iter().enumerate() {
        let mut add = |name: String, tap: Tap, m: Measure| probes.push(Probe::new(name, tap, m).of_layer(layer));
        add("stream_rms".into(), forward(x), Measure::Rms);
        if gradients {
            add("stream_grad_rms".into(), Tap::Gradient(tap_name(graph, x)), Measure::Rms);
        }
        let Some(&next) = stream.get(layer + 1) else { continue };
        add("stream_cosine".into(), forward(x), Measure::Cosine(forward(next)));
        for Branch { name, base, value } in branches(graph, x, next) {
            add(format!("{name}_rms"), forward(value), Measure::Rms);
            add(format!("{name}_ratio"), forward(value), Measure::Ratio(forward(base)));
        }
    }
    for p in graph.params().into_iter().filter(|_| gradients) {
        let name = graph.name(p);
        let probe = Probe::new("weight_grad_rms", Tap::gradient(name), Measure::Rms);
        probes.push(Probe { layer: layer_of(name), ..probe });
    }
    probes
}

/// A branch: something that is added to the stream.
pub(crate) struct Branch {
    /// `attn` for the node `h.0.attn_add`.
    name: String,
    /// The value that it is added to.
    base: Value,
    pub value: Value,
}

/// The branches that a layer adds to the stream between `x` and `next`.
pub(crate) fn branches(graph: &Graph, x: Value, next: Value) -> Vec<Branch> {
    // Empty if the layer returns the stream of an earlier one.
    let nodes = graph.nodes().get(x.node() + 1..=next.node()).unwrap_or_default();
    let additions = nodes.iter().filter(|n| matches!(&n.source, Source::Op(op) if op.is_addition()));
    let branch = |node: &crate::graph::Node| {
        let local = node.name.rsplit('.').next().unwrap_or_default();
        let name = local.strip_suffix("_add").unwrap_or(local).into();
        Some(Branch { name, base: *node.inputs.first()?, value: *node.inputs.get(1)? })
    };
    additions.filter_map(branch).collect()
}
