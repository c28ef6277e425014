//! Chains: elementwise ops next to each other become one kernel, forward and backward.
//!
//! A tensor between two such ops is written and read again for a few operations each; with small tensors a dispatch
//! costs more than its work. A chain is placed where its last node is, and writes what anything else needs: outputs of
//! the plan, activations that a gradient reads, values that a probe looks at. So no value is computed twice, and
//! nothing that the graph names is lost.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::uses::{Inputs, Uses, now, part, redirect, roots, uses};
use crate::graph::{Node, Operand, Source, Value};
use crate::ops::map::Chain;
use crate::profile::Profile;

/// Ops of a chain at most: compilers take long for long kernels.
const MAX_PARTS: usize = 24;

/// Rewrites `nodes` in place and returns where values moved. Nodes that became parts of others stay, unused. `keep` is
/// read after the step, `stores` are values and the states that they replace.
pub(crate) fn fuse(
    nodes: &mut [Node],
    keep: &[Value],
    stores: &[(Value, Value)],
    profile: &Profile,
) -> HashMap<Value, Value> {
    let groups = Search::new(nodes, keep, stores, profile).groups();
    let mut moved = HashMap::new();
    for group in &groups {
        make_chain(nodes, group, &mut moved);
    }
    redirect(nodes, &moved);
    moved
}

/// Nodes that become one, in order, and which of them have to be written.
struct Group {
    members: Vec<usize>,
    outputs: Vec<usize>,
}

struct Search<'a> {
    nodes: &'a [Node],
    stores: &'a [(Value, Value)],
    max_bindings: usize,
    /// The nodes that read each value, in order.
    uses: Uses,
    /// The value whose storage a view shares.
    root: HashMap<Value, Value>,
    can_join: Vec<bool>,
    /// The group of each node, and the members of each group, in order.
    group_of: Vec<usize>,
    groups: Vec<Vec<usize>>,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], keep: &[Value], stores: &'a [(Value, Value)], profile: &Profile) -> Self {
        let mut search = Search {
            nodes,
            stores,
            max_bindings: profile.max_storage_buffers as usize,
            uses: uses(nodes, keep.iter().chain(stores.iter().flat_map(|(value, state)| [value, state]))),
            root: roots(nodes),
            can_join: vec![],
            group_of: (0..nodes.len()).collect(),
            groups: (0..nodes.len()).map(|id| vec![id]).collect(),
        };
        search.can_join = (0..nodes.len()).map(|id| search.is_elementwise(id)).collect();
        for id in 0..nodes.len() {
            search.leave_to_epilogue(id);
        }
        search
    }

    fn is_elementwise(&self, id: usize) -> bool {
        let node = &self.nodes[id];
        let needed = self.uses.contains_key(&Value::local(id, 0));
        needed && node.outputs.len() == 1 && node.op().is_some_and(|op| op.elementwise().is_some())
    }

    /// An addition that the op before it can do in its epilogue, in place, is left to that.
    fn leave_to_epilogue(&mut self, id: usize) {
        let node = &self.nodes[id];
        if !node.op().is_some_and(|op| op.is_addition()) {
            return;
        }
        for v in &node.inputs {
            let folds = self.nodes[v.node()].op().is_some_and(|op| op.with_addend(v.output()).is_some());
            if folds && self.uses[v].len() == 1 {
                self.can_join[id] = false;
                self.can_join[v.node()] = false;
            }
        }
    }

    /// Joins each node with the groups of those before it where that is possible, the nearest first.
    fn groups(mut self) -> Vec<Group> {
        for id in (0..self.nodes.len()).filter(|&id| self.can_join[id]).collect::<Vec<_>>() {
            let before: BTreeSet<usize> = self.nodes[id].inputs.iter().map(|v| v.node()).collect();
            for other in before.into_iter().rev() {
                if self.can_join[other] && self.nodes[other].outputs[0].shape == self.nodes[id].outputs[0].shape {
                    self.try_join(other, id);
                }
            }
        }
        let groups = self.groups.iter().filter(|members| members.len() > 1);
        groups.map(|members| Group { members: members.clone(), outputs: self.outputs(members) }).collect()
    }

    fn try_join(&mut self, other: usize, id: usize) {
        let (from, to) = (self.group_of[other], self.group_of[id]);
        if from == to {
            return;
        }
        let mut members = [&self.groups[from][..], &self.groups[to]].concat();
        members.sort_unstable();
        if !self.is_legal(&members, id) {
            return;
        }
        members.iter().for_each(|&member| self.group_of[member] = to);
        self.groups[from].clear();
        self.groups[to] = members;
    }

    /// Whether these nodes can be computed together where the last one, `at`, is.
    fn is_legal(&self, members: &[usize], at: usize) -> bool {
        let inputs = self.inputs(members);
        members.len() <= MAX_PARTS
            && inputs.len() + self.outputs(members).len() <= self.max_bindings
            && members.iter().all(|&m| self.can_wait(m, members, at))
    }

    /// Whether node `m` can move to `at`: nothing else reads it before that, and what it reads stays as it is.
    fn can_wait(&self, m: usize, members: &[usize], at: usize) -> bool {
        let uses = self.uses.get(&Value::local(m, 0));
        let early = |&user: &usize| user <= at && members.binary_search(&user).is_err();
        if uses.is_some_and(|uses| uses.iter().any(early)) {
            return false;
        }
        let between = m + 1..at;
        let outside = |v: &&Value| members.binary_search(&v.node()).is_err();
        self.nodes[m]
            .inputs
            .iter()
            .filter(outside)
            .all(|&v| !between.clone().any(|k| self.replaces(k, self.root_of(v))))
    }

    fn root_of(&self, value: Value) -> Value {
        now(&self.root, value)
    }

    /// Whether node `k` would like to write its result where `value` is, which a later use of that would prevent.
    fn replaces(&self, k: usize, value: Value) -> bool {
        let node = &self.nodes[k];
        let Some(op) = node.op() else { return false };
        let reads = |i: usize| node.inputs.get(i).is_some_and(|&v| self.root_of(v) == value);
        let starts = (0..node.outputs.len()).any(|output| op.starts_as(output).is_some_and(reads));
        let adds = op.is_addition() && (0..node.inputs.len()).any(reads);
        let stored = self.stores.iter().any(|&(v, state)| state == value && self.root_of(v).node() == k);
        starts || adds || stored
    }

    /// What the members read that is not theirs, each value once.
    fn inputs(&self, members: &[usize]) -> Vec<Value> {
        let mut inputs = vec![];
        for &v in members.iter().flat_map(|&m| &self.nodes[m].inputs) {
            if members.binary_search(&v.node()).is_err() && !inputs.contains(&v) {
                inputs.push(v);
            }
        }
        inputs
    }

    /// The members that something else reads.
    fn outputs(&self, members: &[usize]) -> Vec<usize> {
        let is_read = |m: &usize| {
            let outside = |user: &usize| members.binary_search(user).is_err();
            self.uses.get(&Value::local(*m, 0)).is_some_and(|uses| uses.iter().any(outside))
        };
        members.iter().copied().filter(is_read).collect()
    }
}

/// Puts a group in the place of its last member.
fn make_chain(nodes: &mut [Node], group: &Group, moved: &mut HashMap<Value, Value>) {
    let Some(&at) = group.members.last() else { return };
    let mut inputs = Inputs::default();
    let mut parts = vec![];
    for &m in &group.members {
        let operand = |&v: &Value| match group.members.binary_search(&v.node()) {
            Ok(part) => Operand::Part(part),
            Err(_) => inputs.operand(v),
        };
        let Some(part) = part(&nodes[m], nodes[m].inputs.iter().map(operand)) else { return };
        parts.push(part);
    }
    let mut outputs = vec![];
    for (part, m) in group.members.iter().enumerate().filter(|(_, m)| group.outputs.contains(m)) {
        moved.insert(Value::local(*m, 0), Value::local(at, outputs.len()));
        outputs.push(part);
    }
    let shape = nodes[at].outputs[0].shape.clone();
    let types = outputs.iter().map(|&part| nodes[group.members[part]].outputs[0].clone()).collect();
    group.members.iter().for_each(|&m| nodes[m].inputs.clear());
    let node = &mut nodes[at];
    node.source = Source::Op(Arc::new(Chain::new(parts, outputs, shape)));
    node.outputs = types;
    node.inputs = inputs.0;
}
