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
    // A value may have moved more than once: follow each to its end.
    let moved = fuser.moved;
    moved.keys().map(|&from| (from, follow(&moved, from))).collect()
}

fn follow(moved: &HashMap<Value, Value>, mut value: Value) -> Value {
    while let Some(&next) = moved.get(&value) {
        value = next;
    }
    value
}

struct Fuser<'a> {
    nodes: &'a mut [Node],
    moved: HashMap<Value, Value>,
    /// Nodes that read each value, in order; `usize::MAX` stands for the end of the step.
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
            let v = self.nodes[id].inputs[i];
            self.nodes[id].inputs[i] = follow(&self.moved, v);
        }
    }

    fn try_fold(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Source::Op(op) = &node.source else { return };
        if !op.is_addition() {
            return;
        }
        // The branch first: the stream is what should keep its buffer.
        let [x, branch] = [node.inputs[0], node.inputs[1]];
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
        let sum = Value { node: id, output: 0 };
        let sum_uses = self.uses.remove(&sum).unwrap_or_default();
        for (from, to) in outputs(addend.node).zip(outputs(id)) {
            let uses = self.uses.remove(&from).unwrap_or_default();
            self.uses.insert(to, if from == addend { sum_uses.clone() } else { uses });
            if from != addend {
                self.moved.insert(from, to);
            }
        }
        for &input in &inputs[..inputs.len() - 1] {
            if let Some(user) = self.uses.get_mut(&input).and_then(|u| u.iter_mut().find(|u| **u == addend.node)) {
                *user = id;
            }
        }
        let fused_sum = Value { node: id, output: addend.output };
        if fused_sum != sum {
            self.moved.insert(sum, fused_sum);
        }
        self.nodes[addend.node].inputs.clear();
        let node = &mut self.nodes[id];
        node.source = Source::Op(fused);
        node.inputs = inputs;
        node.outputs = types;
        true
    }
}
