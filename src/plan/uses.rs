//! What the passes over a plan's nodes ask and do alike.

use std::collections::HashMap;

use crate::graph::{Node, Operand, Part, Value};

/// As the position of a use: after the last node.
pub(super) const END: usize = usize::MAX;

/// The nodes that read each value, in order, and [`END`] for what is read after the step.
pub(super) type Uses = HashMap<Value, Vec<usize>>;

/// The uses of all values, of which `keep` are read after the step.
pub(super) fn uses<'a>(nodes: &[Node], keep: impl IntoIterator<Item = &'a Value>) -> Uses {
    let mut uses = Uses::new();
    for (id, node) in nodes.iter().enumerate() {
        node.inputs.iter().for_each(|&v| uses.entry(v).or_default().push(id));
    }
    keep.into_iter().for_each(|&v| uses.entry(v).or_default().push(END));
    uses
}

/// For each view the value whose storage it shares.
pub(super) fn roots(nodes: &[Node]) -> HashMap<Value, Value> {
    let mut roots = HashMap::new();
    for (id, node) in nodes.iter().enumerate() {
        if let (Some(true), [x]) = (node.op().map(|op| op.is_view()), &node.inputs[..]) {
            roots.insert(Value::local(id, 0), now(&roots, *x));
        }
    }
    roots
}

/// Where a value is by this map, which has those that are elsewhere.
pub(super) fn now(moved: &HashMap<Value, Value>, value: Value) -> Value {
    moved.get(&value).copied().unwrap_or(value)
}

/// Lets all nodes read values where they are now.
pub(super) fn redirect(nodes: &mut [Node], moved: &HashMap<Value, Value>) {
    nodes.iter_mut().flat_map(|node| &mut node.inputs).for_each(|input| *input = now(moved, *input));
}

/// What several nodes read together, each value once.
#[derive(Default)]
pub(super) struct Inputs(pub Vec<Value>);

impl Inputs {
    /// The operand that a value is, which is added if it is new.
    pub fn operand(&mut self, value: Value) -> Operand {
        let known = self.0.iter().position(|input| *input == value);
        Operand::Input(known.unwrap_or_else(|| {
            self.0.push(value);
            self.0.len() - 1
        }))
    }
}

/// A node as a part of a whole, applied to these operands. `None` if it has no op.
pub(super) fn part(node: &Node, operands: impl IntoIterator<Item = Operand>) -> Option<Part> {
    let operands = operands.into_iter().collect();
    node.op().map(|op| Part { name: node.name.clone(), op: op.clone(), operands })
}
