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

    /// Makes one node of the addition `id` and the maker of `addend`, starting from `base`.
    fn fold(&mut self, id: usize, addend: Value, base: Value) -> bool {
        let maker = &self.nodes[addend.node];
        let Source::Op(op) = &maker.source else { return false };
        let Some(fused) = op.with_addend(addend.output) else { return false };
        if self.uses.get(&addend).is_none_or(|u| u.len() != 1) {
            return false;
        }
        let (outputs, mut inputs) = (maker.outputs.clone(), maker.inputs.clone());
        inputs.push(base);
        let sum = Value { node: id, output: 0 };
        let at = if self.base_is_ready(id, addend.node, base) {
            addend.node
        } else if self.outputs_can_wait(id, addend, outputs.len()) {
            id
        } else {
            return false;
        };
        let sum_uses = self.uses.remove(&sum).unwrap_or_default();
        self.uses.remove(&addend);
        let fused_sum = Value { node: at, output: addend.output };
        self.redirect(sum, fused_sum);
        self.uses.insert(fused_sum, sum_uses);
        self.move_user(base, id, at);
        if at == id {
            for (&input, _) in inputs.iter().zip(1..inputs.len()) {
                self.move_user(input, addend.node, id);
            }
            for output in (0..outputs.len()).filter(|&o| o != addend.output) {
                let from = Value { node: addend.node, output };
                let uses = self.uses.remove(&from).unwrap_or_default();
                self.redirect(from, Value { node: id, output });
                self.uses.insert(Value { node: id, output }, uses);
            }
        }
        let (dead, name) = (id + addend.node - at, self.nodes[id].name.clone());
        self.nodes[dead].inputs.clear();
        self.nodes[at] = Node { name, source: Source::Op(fused), inputs, outputs };
        true
    }

    /// Whether the sum can be made where the addend is: the base is there, and nobody between the
    /// two still reads the base, which the sum is to overwrite. This keeps the addend's inputs from
    /// living longer.
    fn base_is_ready(&self, id: usize, maker: usize, base: Value) -> bool {
        let external = !matches!(self.nodes[base.node].source, Source::Op(_));
        let between = |u: &Vec<usize>| u.iter().any(|&user| user > maker && user < id);
        (external || base.node < maker) && !self.uses.get(&base).is_some_and(between)
    }

    /// Whether the maker can move to the addition's place: nobody wants its other outputs before.
    fn outputs_can_wait(&self, id: usize, addend: Value, n: usize) -> bool {
        let others = (0..n).filter(|&o| o != addend.output).map(|output| Value { node: addend.node, output });
        others.into_iter().all(|v| self.uses.get(&v).is_none_or(|u| u.iter().all(|&user| user > id)))
    }

    fn redirect(&mut self, from: Value, to: Value) {
        if from != to {
            self.moved.insert(from, to);
        }
    }

    fn move_user(&mut self, value: Value, from: usize, to: usize) {
        if let Some(user) = self.uses.get_mut(&value).and_then(|u| u.iter_mut().find(|u| **u == from)) {
            *user = to;
        }
    }
}
