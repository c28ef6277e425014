//! Fusion into the ops that read or write a tensor anyway: column sums, and additions.
//!
//! Column sums become another output of an op that reads the same tensor: on GPUs, the product that is the gradient of a
//! weight also gives that of the bias.
//!
//! `residual_add(x, f(...))` is folded into `f`, if `f` can add to its output. One rule covers the residual stream
//! forward (the matmul that ends a branch), its gradient backward (a norm's gradient added to that of the stream), and
//! gradients with several contributions.

use std::collections::HashMap;

use super::uses::{Uses, now, redirect, uses};
use crate::graph::{Node, Source, Value};
use crate::profile::{AdapterClass, Profile};

/// Leaves column sums to ops that read the same tensor. Rewrites `nodes` in place and returns where values moved. Dead
/// nodes stay, unused.
///
/// Not on software adapters: what reads the tensor there has no spare loads, and sums of its own cost little.
pub(crate) fn fold_column_sums(nodes: &mut [Node], keep: &[Value], profile: &Profile) -> HashMap<Value, Value> {
    if profile.class == AdapterClass::Cpu {
        return HashMap::new();
    }
    let mut fuser = Fuser::new(nodes, keep);
    for id in 0..fuser.nodes.len() {
        fuser.leave_column_sum(id);
    }
    redirect(fuser.nodes, &fuser.moved);
    fuser.moved
}

/// Folds additions. Rewrites `nodes` in place and returns where values moved. Dead nodes stay, unused.
pub(crate) fn fold_additions(nodes: &mut [Node], keep: &[Value]) -> HashMap<Value, Value> {
    let mut fuser = Fuser::new(nodes, keep);
    for id in 0..fuser.nodes.len() {
        fuser.redirect_inputs(id);
        fuser.try_fold(id);
    }
    fuser.moved
}

struct Fuser<'a> {
    nodes: &'a mut [Node],
    /// Maps a value of the original graph to its current place. One look-up suffices, not a chain: a node that absorbs
    /// another produces outputs under the names that its own had before.
    moved: HashMap<Value, Value>,
    /// Of each value under its current name.
    uses: Uses,
}

impl<'a> Fuser<'a> {
    fn new(nodes: &'a mut [Node], keep: &[Value]) -> Self {
        let uses = uses(nodes, keep);
        Fuser { nodes, moved: HashMap::new(), uses }
    }

    fn redirect_inputs(&mut self, id: usize) {
        for i in 0..self.nodes[id].inputs.len() {
            let input = &mut self.nodes[id].inputs[i];
            *input = now(&self.moved, *input);
        }
    }

    /// If `id` sums the columns of a tensor, makes the sums an output of another node that reads it.
    fn leave_column_sum(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Source::Op(op) = &node.source else { return };
        let ([x], true) = (&node.inputs[..], op.is_column_sum()) else { return };
        let (x, sums) = (*x, Value::local(id, 0));
        let [ty, columns] = [&self.nodes[x.node()].outputs[x.output()], &node.outputs[0]];
        // Sums that nobody needs are not computed.
        let Some(&first_use) = self.uses.get(&sums).and_then(|users| users.iter().min()) else { return };
        if columns.shape.dims() != [ty.shape.cols()] {
            return;
        }
        let columns = columns.clone();
        // Where there is a choice, the last: the sums need not live long.
        for &user in self.uses[&x].iter().rev().filter(|&&user| user < first_use && user != id) {
            let node = &self.nodes[user];
            let Source::Op(op) = &node.source else { continue };
            let is_needed = (0..node.outputs.len()).any(|o| self.uses.contains_key(&Value::local(user, o)));
            let input = node.inputs.iter().position(|input| *input == x);
            let Some(fused) = input.filter(|_| is_needed).and_then(|input| op.with_column_sums(input)) else {
                continue;
            };
            let to = Value::local(user, node.outputs.len());
            self.nodes[user].source = Source::Op(fused);
            self.nodes[user].outputs.push(columns);
            self.nodes[id].inputs.clear();
            self.moved.insert(sums, to);
            return;
        }
    }

    fn try_fold(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Source::Op(op) = &node.source else { return };
        if !op.is_addition() {
            return;
        }
        // An addition that is already dead has no inputs left.
        let [x, branch] = node.inputs[..] else { return };
        // The branch first: the stream is the one that should keep its buffer.
        if x != branch && !self.fold(id, branch, x) {
            self.fold(id, x, branch);
        }
    }

    /// Fuses the addition `id` and the maker of `addend` into one node, which starts from `base`.
    fn fold(&mut self, id: usize, addend: Value, base: Value) -> bool {
        let maker = &self.nodes[addend.node()];
        let Source::Op(op) = &maker.source else { return false };
        let Some(fused) = op.with_addend(addend.output()) else { return false };
        if self.uses.get(&addend).is_none_or(|u| u.len() != 1) {
            return false;
        }
        let (mut outputs, mut inputs) = (maker.outputs.clone(), maker.inputs.clone());
        outputs[addend.output()].dtype = self.nodes[id].outputs[0].dtype;
        let at = if self.base_is_ready(id, addend.node(), base) {
            let sum = Value::local(id, 0);
            let sum_uses = self.uses.remove(&sum).unwrap_or_default();
            self.uses.insert(addend, sum_uses);
            self.moved.insert(sum, addend);
            self.move_user(base, id, addend.node());
            addend.node()
        } else if self.outputs_can_wait(id, addend, outputs.len()) {
            self.move_outputs(addend, id, outputs.len());
            inputs.iter().for_each(|&input| self.move_user(input, addend.node(), id));
            id
        } else {
            return false;
        };
        inputs.push(base);
        let (dead, name) = (id + addend.node() - at, self.nodes[id].name.clone());
        self.nodes[dead].inputs.clear();
        self.nodes[at] = Node { name, source: Source::Op(fused), inputs, outputs };
        true
    }

    /// Whether the sum can be computed where the addend is: the base is available, and nothing between the two nodes
    /// still reads the base, which the sum overwrites. This way the inputs of the addend need not live any longer.
    fn base_is_ready(&self, id: usize, maker: usize, base: Value) -> bool {
        let external = !matches!(self.nodes[base.node()].source, Source::Op(_));
        let between = |u: &Vec<usize>| u.iter().any(|&user| user > maker && user < id);
        (external || base.node() < maker) && !self.uses.get(&base).is_some_and(between)
    }

    /// Whether the maker can move to the place of the addition: nothing needs its other outputs before that.
    fn outputs_can_wait(&self, id: usize, addend: Value, n: usize) -> bool {
        let mut others = (0..n).filter(|&o| o != addend.output()).map(|output| Value::local(addend.node(), output));
        others.all(|v| self.uses.get(&v).is_none_or(|u| u.iter().all(|&user| user > id)))
    }

    fn move_user(&mut self, value: Value, from: usize, to: usize) {
        if let Some(user) = self.uses.get_mut(&value).and_then(|u| u.iter_mut().find(|u| **u == from)) {
            *user = to;
        }
    }

    /// Renames the `n` outputs of the maker of `addend` to those of `id`, and the output of `id` to the output that the
    /// addend is.
    fn move_outputs(&mut self, addend: Value, id: usize, n: usize) {
        let sum = Value::local(id, 0);
        let sum_uses = self.uses.remove(&sum).unwrap_or_default();
        for value in self.moved.values_mut().filter(|v| v.node() == addend.node()) {
            *value = Value::local(id, value.output());
        }
        for output in 0..n {
            let (from, to) = (Value::local(addend.node(), output), Value::local(id, output));
            let uses = self.uses.remove(&from).unwrap_or_default();
            self.uses.insert(to, if from == addend { sum_uses.clone() } else { uses });
            self.moved.entry(from).or_insert(to);
        }
        self.moved.insert(sum, Value::local(id, addend.output()));
    }
}
