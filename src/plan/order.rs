//! The order in which a plan runs nodes: that of the graph, but for ops that run early or late.

use crate::graph::{Node, Source, Value};

/// Puts nodes in order, and returns where each node went.
pub(super) fn ordered(nodes: Vec<Node>) -> (Vec<Node>, Vec<usize>) {
    let (nodes, early) = early_first(nodes);
    let (nodes, late) = late_last(nodes);
    (nodes, early.into_iter().map(|place| late[place]).collect())
}

/// Moves each node that runs early right after the last of its inputs.
fn early_first(nodes: Vec<Node>) -> (Vec<Node>, Vec<usize>) {
    let early = |n: &Node| n.op().is_some_and(|op| op.runs_early());
    if !nodes.iter().any(early) {
        return unmoved(nodes);
    }
    // The node that each one follows: itself, or the node that it waits for. Externals are there from the start.
    let mut after: Vec<usize> = vec![];
    for (id, node) in nodes.iter().enumerate() {
        after.push(match &node.source {
            Source::Op(_) if !early(node) => id,
            Source::Op(_) => node.inputs.iter().map(|v| after[v.node()]).max().unwrap_or(0),
            _ => 0,
        });
    }
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by_key(|&id| (after[id], id));
    moved(nodes, &order)
}

/// Moves the nodes that run late right before the first of those that need them and don't themselves wait.
///
/// A loss in several parts is where it matters: in the graph, all of forward comes before all of backward. Backward
/// needs of a part what its gradient reads, but not the loss. So the parts wait, and each comes right before its
/// gradient.
fn late_last(nodes: Vec<Node>) -> (Vec<Node>, Vec<usize>) {
    let late: Vec<bool> = nodes.iter().map(|n| n.op().is_some_and(|op| op.runs_late())).collect();
    if !late.contains(&true) {
        return unmoved(nodes);
    }
    let waits = waiting(&nodes, &late);
    let mut placed = vec![false; nodes.len()];
    let mut order = vec![];
    for id in (0..nodes.len()).filter(|&id| !waits[id]) {
        let mut wanted = vec![];
        let mut stack = vec![id];
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut placed[id], true) {
                wanted.push(id);
                stack.extend(nodes[id].inputs.iter().map(|v| v.node()));
            }
        }
        wanted.sort_unstable();
        order.extend(wanted);
    }
    order.extend((0..nodes.len()).filter(|&id| !placed[id]));
    moved(nodes, &order)
}

/// The nodes that wait until one that doesn't needs them: those that run late, those that read a loss of theirs, and
/// those whose first reader waits.
fn waiting(nodes: &[Node], late: &[bool]) -> Vec<bool> {
    let mut waits = late.to_vec();
    for (id, node) in nodes.iter().enumerate() {
        // The first output is the loss; the others are for its gradient.
        let is_loss = |v: &Value| waits[v.node()] && (v.output() == 0 || !late[v.node()]);
        waits[id] |= node.inputs.iter().any(is_loss);
    }
    let mut first_reader = vec![usize::MAX; nodes.len()];
    for (id, node) in nodes.iter().enumerate().rev() {
        waits[id] |= node.op().is_some() && waits.get(first_reader[id]) == Some(&true);
        node.inputs.iter().for_each(|v| first_reader[v.node()] = first_reader[v.node()].min(id));
    }
    waits
}

fn unmoved(nodes: Vec<Node>) -> (Vec<Node>, Vec<usize>) {
    let place = (0..nodes.len()).collect();
    (nodes, place)
}

/// The nodes in this order, and where each one went.
fn moved(nodes: Vec<Node>, order: &[usize]) -> (Vec<Node>, Vec<usize>) {
    let mut place = vec![0; nodes.len()];
    order.iter().enumerate().for_each(|(new, &old)| place[old] = new);
    let mut nodes: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let mut sorted: Vec<Node> = order.iter().filter_map(|&old| nodes[old].take()).collect();
    for v in sorted.iter_mut().flat_map(|n| &mut n.inputs) {
        *v = Value::local(place[v.node()], v.output());
    }
    (sorted, place)
}
