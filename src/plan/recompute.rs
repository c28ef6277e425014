//! Recomputation: what backward reads again is computed a second time rather than kept.
//!
//! Forward leaves many tensors to backward, and those take most of the memory that training has beside the parameters.
//! Some are cheap to compute from others that are kept anyway: an activation from its argument, the result of a norm
//! from the normalised rows. Each gets a second maker right before its first late reader, and its first buffer is free
//! in between.

use std::collections::HashMap;

use super::uses::Uses;
use crate::graph::{Kept, Node, Source, Value};
use crate::tensor::TensorType;

/// Tensors of fewer bytes are kept: a dispatch costs more than they are worth.
const MIN_BYTES: usize = 64 << 10;

/// Ops between two readers of a value from which on it is not worth keeping. Those within backward are nearer.
const FAR: usize = 6;

/// A value's second maker, and the node that it goes before: the value's first late reader.
struct Second {
    value: Value,
    before: usize,
    node: Node,
}

/// Inserts second makers into `nodes`, of which `needed` are, in order. Returns where each node went, and the number of
/// values that are computed twice. `keep` is read after the step.
pub(crate) fn insert(nodes: &mut Vec<Node>, needed: &[usize], keep: &[Value]) -> (Vec<usize>, usize) {
    let seconds = Search::new(nodes, needed, keep).seconds();
    let mut before: HashMap<usize, Vec<&Second>> = HashMap::new();
    seconds.iter().for_each(|second| before.entry(second.before).or_default().push(second));
    // The nodes in their new order, each with its old place or that of the node that it goes before.
    let mut ordered: Vec<(usize, Node)> = vec![];
    let mut place = vec![];
    let mut again: HashMap<Value, (usize, usize)> = HashMap::new();
    for (id, node) in std::mem::take(nodes).into_iter().enumerate() {
        for second in before.get(&id).into_iter().flatten() {
            again.insert(second.value, (id, ordered.len()));
            ordered.push((id, second.node.clone()));
        }
        place.push(ordered.len());
        ordered.push((id, node));
    }
    for (at, node) in &mut ordered {
        for v in &mut node.inputs {
            *v = match again.get(v) {
                Some(&(before, second)) if *at >= before => Value::local(second, 0),
                _ => Value::local(place[v.node()], v.output()),
            };
        }
    }
    nodes.extend(ordered.into_iter().map(|(_, node)| node));
    (place, seconds.len())
}

struct Search<'a> {
    nodes: &'a [Node],
    needed: &'a [usize],
    /// The needed nodes that read each value, in order.
    uses: Uses,
    /// Needed nodes before each node.
    rank: Vec<usize>,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], needed: &'a [usize], keep: &[Value]) -> Self {
        let mut uses = Uses::new();
        let mut rank = vec![0; nodes.len()];
        for (i, &id) in needed.iter().enumerate() {
            rank[id] = i;
            nodes[id].inputs.iter().for_each(|&v| uses.entry(v).or_default().push(id));
        }
        // What is read after the step has to be kept.
        keep.iter().for_each(|v| drop(uses.remove(v)));
        Search { nodes, needed, uses, rank }
    }

    fn seconds(&self) -> Vec<Second> {
        let values = self.needed.iter().flat_map(|&id| (0..self.nodes[id].outputs.len()).map(move |o| (id, o)));
        values.filter_map(|(id, output)| self.second(id, output)).collect()
    }

    /// The second maker of an output, if it is large, cheap, and read again much later.
    fn second(&self, id: usize, output: usize) -> Option<Second> {
        let (maker, value) = (&self.nodes[id], Value::local(id, output));
        if maker.outputs[output].bytes() < MIN_BYTES {
            return None;
        }
        let recomputed = maker.op()?.recomputed(output, &self.types(&maker.inputs))?;
        let before = self.first_late_reader(value)?;
        let from = |kept: &Kept| match *kept {
            Kept::Input(i) => maker.inputs.get(i).copied(),
            Kept::Output(o) => (o < maker.outputs.len()).then_some(Value::local(id, o)),
        };
        let inputs: Vec<Value> = recomputed.from.iter().map(from).collect::<Option<_>>()?;
        let outputs = vec![maker.outputs[output].clone()];
        let fits = recomputed.op.infer(&self.types(&inputs)).is_ok_and(|types| types == outputs);
        let in_place = recomputed.op.starts_as(0).is_some();
        if !fits || in_place || !inputs.iter().all(|&v| self.is_kept_until(v, before)) {
            return None;
        }
        let name = format!("{}.again", maker.name);
        Some(Second { value, before, node: Node { name, source: Source::Op(recomputed.op), inputs, outputs } })
    }

    fn types(&self, values: &[Value]) -> Vec<TensorType> {
        values.iter().map(|v| self.nodes[v.node()].outputs[v.output()].clone()).collect()
    }

    /// The reader after the longest time without one.
    fn first_late_reader(&self, value: Value) -> Option<usize> {
        let readers = self.uses.get(&value)?;
        // A view shares the value's memory, for readers of its own.
        if readers.iter().any(|&id| self.nodes[id].op().is_some_and(|op| op.is_view())) {
            return None;
        }
        let wait = |pair: &[usize]| self.rank[pair[1]] - self.rank[pair[0]];
        let longest = readers.windows(2).max_by_key(|pair| wait(pair))?;
        (wait(longest) > FAR).then_some(longest[1])
    }

    /// Whether a value is in memory then in any case.
    fn is_kept_until(&self, value: Value, id: usize) -> bool {
        match self.nodes[value.node()].source {
            Source::Op(_) => self.uses.get(&value).is_some_and(|readers| readers.iter().any(|&reader| reader >= id)),
            Source::Param(_) | Source::Input => true,
            Source::State => false,
        }
    }
}
