//! Neighbours that do little and do not depend on each other become one dispatch, and what is only written to a cache
//! is written there by its maker.
//!
//! On GPUs a token's step is made of small dispatches that wait for each other. Before attention, queries and keys are
//! turned and keys and values written to their caches: four dispatches of a few workgroups each, which can be one.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::uses::{Inputs, Uses, now, part, redirect, roots, uses};
use crate::graph::{Node, Op, Operand, Source, Value, infer};
use crate::kernel::Launch;
use crate::ops::cache::CacheWrite;
use crate::ops::together::Together;
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

/// Ops of a dispatch at most: compilers take long for long kernels.
const MAX_MEMBERS: usize = 8;

/// Rewrites `nodes` in place and returns where values moved. Nodes that became parts of others stay, unused. `keep` is
/// read after the step.
pub(crate) fn join(nodes: &mut [Node], keep: &[Value], profile: &Profile) -> HashMap<Value, Value> {
    if profile.class != AdapterClass::Gpu {
        return HashMap::new();
    }
    write_at_once(nodes, keep);
    let groups = Search::new(nodes, keep, profile).groups();
    let mut moved = HashMap::new();
    for Group { members, node } in groups {
        let Some(&at) = members.last() else { continue };
        moved.extend(members.iter().enumerate().map(|(o, &m)| (Value::local(m, 0), Value::local(at, o))));
        members.iter().for_each(|&m| nodes[m].inputs.clear());
        nodes[at] = node;
    }
    redirect(nodes, &moved);
    moved
}

/// Where nothing but a write to a cache needs an op's result, the op writes it there.
fn write_at_once(nodes: &mut [Node], keep: &[Value]) {
    let uses = uses(nodes, keep);
    for id in 0..nodes.len() {
        let node = &nodes[id];
        let is_write = node.op().is_some_and(|op| (op.as_ref() as &dyn Any).is::<CacheWrite>());
        let [rows, start, cache] = node.inputs[..] else { continue };
        let maker = &nodes[rows.node()];
        if !is_write || maker.outputs.len() != 1 || uses.get(&rows).is_none_or(|users| users[..] != [id]) {
            continue;
        }
        let n = maker.inputs.len();
        let write = [Operand::Part(0), Operand::Input(n), Operand::Input(n + 1)].into_iter();
        let parts = [part(maker, (0..n).map(Operand::Input)), part(node, write)];
        let [Some(made), Some(written)] = parts else { continue };
        let Some(fused) = maker.op().and_then(|op| op.written_to_cache([made, written])) else { continue };
        let inputs = std::mem::take(&mut nodes[rows.node()].inputs);
        nodes[id].inputs = inputs.into_iter().chain([start, cache]).collect();
        nodes[id].source = Source::Op(fused);
    }
}

/// Nodes that become one, in the place of the last.
struct Group {
    members: Vec<usize>,
    node: Node,
}

struct Search<'a> {
    nodes: &'a [Node],
    profile: &'a Profile,
    uses: Uses,
    /// The value whose storage a view shares.
    root: HashMap<Value, Value>,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], keep: &[Value], profile: &'a Profile) -> Self {
        Search { nodes, profile, uses: uses(nodes, keep), root: roots(nodes) }
    }

    /// Groups of light ops with nothing but views in between, so that none has to wait long for the last.
    fn groups(&self) -> Vec<Group> {
        let mut groups = vec![];
        let mut open: Option<Group> = None;
        let mut members: Vec<usize> = vec![];
        for (id, node) in self.nodes.iter().enumerate() {
            let used = (0..node.outputs.len()).any(|o| self.uses.contains_key(&Value::local(id, o)));
            let Some(op) = node.op().filter(|_| used) else { continue };
            if op.is_view() && !self.depends(id, &members) {
                continue;
            }
            if op.is_light() {
                let longer = [&members[..], &[id]].concat();
                if let Some(group) = self.group(&longer) {
                    (open, members) = (Some(group), longer);
                    continue;
                }
            }
            groups.extend(open.take());
            members = if op.is_light() { vec![id] } else { vec![] };
        }
        groups.extend(open);
        groups
    }

    fn root_of(&self, value: Value) -> Value {
        now(&self.root, value)
    }

    fn depends(&self, id: usize, members: &[usize]) -> bool {
        self.nodes[id].inputs.iter().any(|v| members.contains(&self.root_of(*v).node()))
    }

    /// Whether a member writes its result where what another reads is.
    fn writes_what_another_reads(&self, members: &[usize]) -> bool {
        let start = |&m: &usize| {
            let node = &self.nodes[m];
            let input = node.op()?.starts_as(0)?;
            node.inputs.get(input).map(|v| (m, self.root_of(*v)))
        };
        let reads = |m: usize, value: Value| self.nodes[m].inputs.iter().any(|v| self.root_of(*v) == value);
        members
            .iter()
            .filter_map(start)
            .any(|(m, value)| members.iter().any(|&other| other != m && reads(other, value)))
    }

    /// These nodes as one, if they can be.
    fn group(&self, members: &[usize]) -> Option<Group> {
        let &last = members.last()?;
        let earlier = &members[..members.len() - 1];
        let possible = (2..=MAX_MEMBERS).contains(&members.len()) && !self.depends(last, earlier);
        if !possible || self.writes_what_another_reads(members) {
            return None;
        }
        let mut inputs = Inputs::default();
        let mut parts = vec![];
        for &m in members {
            let node = &self.nodes[m];
            parts.push(part(node, node.inputs.iter().map(|&v| inputs.operand(v)))?);
        }
        let together = Together::new(parts);
        let ty = |v: &Value| self.nodes[v.node()].outputs[v.output()].clone();
        let types: Vec<TensorType> = inputs.0.iter().map(ty).collect();
        infer(&together, &types).ok()?;
        let outputs: Vec<TensorType> = members.iter().map(|&m| self.nodes[m].outputs[0].clone()).collect();
        let cx = Launch { inputs: &types, outputs: &outputs, profile: self.profile, variant: 0 };
        let program = together.launch(&cx).ok()?;
        let binds = program.dispatches.first()?.binds.len();
        let node = &self.nodes[last];
        let name = node.name.clone();
        (binds <= self.profile.max_storage_buffers as usize).then(|| Group {
            members: members.to_vec(),
            node: Node { name, outputs, source: Source::Op(Arc::new(together)), inputs: inputs.0 },
        })
    }
}
