//! Epilogue fusion: folds `residual_add(x, f(...))` into `f` where `f` can add to its output.
//!
//! One rule serves the residual stream forward (the matmul that ends a branch), its gradient
//! backward (a norm's gradient added to the stream's) and gradients with several contributions.

use std::collections::HashMap;

use crate::graph::{Node, Source, Value};

/// Rewrites `nodes` in place; returns where values moved. Nodes that became dead stay, unused.
pub(crate) fn fold_additions(nodes: &mut [Node], keep: &[Value]) -> HashMap<Value, Value> {
    let mut fuser = Fuser { nodes, moved: HashMap::new(), uses: HashMap::new() };
    fuser.count_uses(keep);
    for id in 0..fuser.nodes.len() {
        fuser.redirect_inputs(id);
        fuser.try_fold(id);
    }
    fuser.moved
}

struct Fuser<'a> {
    nodes: &'a mut [Node],
    /// From a value of the graph as it came to where it is now. One look-up, not a chain: a node
    /// that takes in another has outputs by the names that its own had before.
    moved: HashMap<Value, Value>,
    /// Nodes that read each value as it is named now, in order; `usize::MAX` stands for the end of
    /// the step.
    uses: HashMap<Value, Vec<usize>>,
}

impl Fuser<'_> {
    fn count_uses(&mut self, keep: &[Value]) {
        for (id, node) in self.nodes.iter().enumerate() {
            for &v in &node.inputs {
                self.uses.entry(v).or_default().push(id);
            }
        }
        for &v in keep {
            self.uses.entry(v).or_default().push(usize::MAX);
        }
    }

    fn redirect_inputs(&mut self, id: usize) {
        for i in 0..self.nodes[id].inputs.len() {
            let input = &mut self.nodes[id].inputs[i];
            *input = self.moved.get(input).copied().unwrap_or(*input);
        }
    }

    fn try_fold(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Source::Op(op) = &node.source else { return };
        if !op.is_addition() {
            return;
        }
        // A dead addition has no inputs any more.
        let [x, branch] = node.inputs[..] else { return };
        // The branch first: the stream is what should keep its buffer.
        if x != branch && !self.fold(id, branch, x) {
            self.fold(id, x, branch);
        }
    }

    /// Makes the addition `id` compute `addend` itself, starting from `base`.
    fn fold(&mut self, id: usize, addend: Value, base: Value) -> bool {
        let maker = &self.nodes[addend.node];
        let Source::Op(op) = &maker.source else { return false };
        let Some(fused) = op.with_addend(addend.output) else { return false };
        let n = maker.outputs.len();
        let outputs = |node| (0..n).map(move |output| Value { node, output });
        let used_once = self.uses.get(&addend).is_some_and(|u| u.len() == 1);
        // The maker moves to the addition's place, so nobody may want its other outputs before.
        let others_wait = outputs(addend.node)
            .filter(|v| *v != addend)
            .all(|v| self.uses.get(&v).is_none_or(|u| u.iter().all(|&user| user > id)));
        if !used_once || !others_wait {
            return false;
        }
        let mut inputs = maker.inputs.clone();
        inputs.push(base);
        let types = maker.outputs.clone();
        self.move_outputs(addend, id, n);
        for &input in &inputs[..inputs.len() - 1] {
            if let Some(user) = self.uses.get_mut(&input).and_then(|u| u.iter_mut().find(|u| **u == addend.node)) {
                *user = id;
            }
        }
        self.nodes[addend.node].inputs.clear();
        let node = &mut self.nodes[id];
        node.source = Source::Op(fused);
        node.inputs = inputs;
        node.outputs = types;
        true
    }

    /// Renames the `n` outputs of the maker of `addend` to those of `id`, and what `id` computed so
    /// far to the output that the addend is.
    fn move_outputs(&mut self, addend: Value, id: usize, n: usize) {
        let sum = Value { node: id, output: 0 };
        let sum_uses = self.uses.remove(&sum).unwrap_or_default();
        for value in self.moved.values_mut().filter(|v| v.node == addend.node) {
            value.node = id;
        }
        for output in 0..n {
            let (from, to) = (Value { node: addend.node, output }, Value { node: id, output });
            let uses = self.uses.remove(&from).unwrap_or_default();
            self.uses.insert(to, if from == addend { sum_uses.clone() } else { uses });
            self.moved.entry(from).or_insert(to);
        }
        self.moved.insert(sum, Value { node: id, output: addend.output });
    }
}
