//! Products of the same few rows become one dispatch, with the norm before them and the activation after them.
//!
//! On GPUs a token's step is made of small dispatches that wait for each other. Products of one input do not, so q, k
//! and v are one; a norm of a few rows is less work than a dispatch, so the products work it out for themselves; and an
//! elementwise function of two products, such as SwiGLU's, is made where both are. Values that anything else needs are
//! still stored.

use std::collections::HashMap;
use std::sync::Arc;

use crate::graph::{Node, Op, Operand, Part, Source, Value};
use crate::kernel::FEW_ROWS;
use crate::ops::products::Products;
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

/// As the position of a use: after the last node.
const END: usize = usize::MAX;

/// A norm is left alone before products of more columns than this: many workgroups would each work it out again, and
/// one dispatch more does not show beside them.
const WIDE: usize = 1 << 14;

/// Rewrites `nodes` in place and returns where values moved. Nodes that became parts of others stay, unused. `keep` is
/// read after the step.
pub(crate) fn join(nodes: &mut [Node], keep: &[Value], profile: &Profile) -> HashMap<Value, Value> {
    if profile.class != AdapterClass::Gpu {
        return HashMap::new();
    }
    let search = Search::new(nodes, keep, profile);
    let groups = search.groups();
    let made: Vec<Joined> = groups.iter().filter_map(|group| search.joined(group)).collect();
    let mut moved = HashMap::new();
    for Joined { at, node, members, outputs } in made {
        moved.extend(outputs.iter().enumerate().map(|(o, &from)| (Value::local(from, 0), Value::local(at, o))));
        members.iter().for_each(|&m| nodes[m].inputs.clear());
        nodes[at] = node;
    }
    for input in nodes.iter_mut().flat_map(|node| &mut node.inputs) {
        *input = moved.get(input).copied().unwrap_or(*input);
    }
    moved
}

/// Products that are computed together, and the function of them, if any.
struct Group {
    products: Vec<usize>,
    function: Option<usize>,
}

/// A node that takes the place of others.
struct Joined {
    at: usize,
    node: Node,
    members: Vec<usize>,
    /// The nodes whose results are its outputs.
    outputs: Vec<usize>,
}

struct Search<'a> {
    nodes: &'a [Node],
    profile: &'a Profile,
    /// The nodes that read each value, in order.
    uses: HashMap<Value, Vec<usize>>,
}

fn op(node: &Node) -> Option<&Arc<dyn Op>> {
    match &node.source {
        Source::Op(op) => Some(op),
        _ => None,
    }
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], keep: &[Value], profile: &'a Profile) -> Self {
        let mut uses: HashMap<Value, Vec<usize>> = HashMap::new();
        for (id, node) in nodes.iter().enumerate() {
            node.inputs.iter().for_each(|&v| uses.entry(v).or_default().push(id));
        }
        keep.iter().for_each(|&v| uses.entry(v).or_default().push(END));
        Search { nodes, profile, uses }
    }

    fn ty(&self, value: Value) -> &TensorType {
        &self.nodes[value.node()].outputs[value.output()]
    }

    fn types(&self, values: &[Value]) -> Vec<TensorType> {
        values.iter().map(|&v| self.ty(v).clone()).collect()
    }

    fn uses(&self, value: Value) -> &[usize] {
        self.uses.get(&value).map_or(&[], Vec::as_slice)
    }

    /// Whether node `id` is a product of few rows that something needs.
    fn is_product(&self, id: usize) -> bool {
        let node = &self.nodes[id];
        let Some(op) = op(node).filter(|_| !self.uses(Value::local(id, 0)).is_empty()) else { return false };
        let Some(&x) = node.inputs.first() else { return false };
        self.ty(x).shape.rows() <= FEW_ROWS && op.gemv(&self.types(&node.inputs)).is_some()
    }

    /// The products that are computed together, by their first one.
    fn groups(&self) -> Vec<Group> {
        let mut by_input: Vec<(Value, Vec<usize>)> = vec![];
        for id in (0..self.nodes.len()).filter(|&id| self.is_product(id)) {
            let x = self.nodes[id].inputs[0];
            match by_input.iter_mut().find(|(value, _)| *value == x) {
                Some((_, ids)) => ids.push(id),
                None => by_input.push((x, vec![id])),
            }
        }
        by_input.into_iter().flat_map(|(_, ids)| self.split(ids)).collect()
    }

    /// Splits products of one input: those that a function takes are a group, and the others are as long as they are
    /// ready where the first of them is and the device binds enough.
    fn split(&self, mut ids: Vec<usize>) -> Vec<Group> {
        let mut groups = vec![];
        while let Some(&first) = ids.first() {
            let mut group = self.with_function(first, &ids).unwrap_or(Group { products: vec![first], function: None });
            if group.function.is_none() {
                for &id in &ids[1..] {
                    let products = [&group.products[..], &[id]].concat();
                    let longer = Group { products, function: None };
                    if self.with_function(id, &ids).is_none() && self.joined(&longer).is_some() {
                        group = longer;
                    }
                }
            }
            ids.retain(|id| !group.products.contains(id));
            groups.push(group);
        }
        groups
    }

    /// The group of an elementwise function that nothing but it takes product `id` to, if all that it is applied to are
    /// such products among `ids`.
    fn with_function(&self, id: usize, ids: &[usize]) -> Option<Group> {
        let &[user] = self.uses(Value::local(id, 0)) else { return None };
        let node = self.nodes.get(user)?;
        op(node)?.elementwise()?;
        let own = |v: &Value| ids.contains(&v.node()) && self.uses(*v) == [user];
        let mut products: Vec<usize> = node.inputs.iter().map(|v| v.node()).collect();
        products.dedup();
        let each_once = products.len() == node.inputs.len();
        let group = Group { products, function: Some(user) };
        (each_once && node.inputs.iter().all(own) && self.joined(&group).is_some()).then_some(group)
    }

    /// The node that does the work of a group; `None` if that saves nothing or is not possible.
    fn joined(&self, group: &Group) -> Option<Joined> {
        let &first = group.products.iter().min()?;
        let x = self.nodes[first].inputs[0];
        let norm = self.norm(x, group);
        if norm.is_none() && group.products.len() == 1 && group.function.is_none() {
            return None;
        }
        let ready = |v: &Value| v.node() < first || op(&self.nodes[v.node()]).is_none();
        if !group.products.iter().all(|&id| self.nodes[id].inputs.iter().all(ready)) {
            return None;
        }
        self.node(group, norm, first).or_else(|| self.node(group, None, first))
    }

    /// The norm that makes `x`, if the products can leave it out: nothing else needs what it makes, and what it reads
    /// is still there.
    fn norm(&self, x: Value, group: &Group) -> Option<usize> {
        let (id, first) = (x.node(), *group.products.iter().min()?);
        let node = &self.nodes[id];
        op(node)?.on_read(&self.types(&node.inputs))?;
        let columns: usize = group.products.iter().map(|&p| self.nodes[p].outputs[0].shape.cols()).sum();
        let others = (1..node.outputs.len()).all(|o| self.uses(Value::local(id, o)).is_empty());
        let source = node.inputs.first()?;
        let between = |&user: &usize| user > id && user < first;
        let own = x.output() == 0 && others && columns <= WIDE && !self.uses(*source).iter().any(between);
        // Products that another dispatch computes read it, too, and one may have it as its weight.
        let uses = self.uses(x);
        let each_once = uses.len() == group.products.len() && uses.iter().all(|user| group.products.contains(user));
        (own && each_once).then_some(id)
    }

    fn node(&self, group: &Group, norm: Option<usize>, first: usize) -> Option<Joined> {
        let x = self.nodes[first].inputs[0];
        let mut inputs = norm.map_or(vec![x], |id| self.nodes[id].inputs.clone());
        let before = usize::from(norm.is_some());
        let part = |id: usize, operands: Vec<Operand>| {
            let node = &self.nodes[id];
            Some(Part { name: node.name.clone(), op: op(node)?.clone(), operands })
        };
        let norm_part = match norm {
            Some(id) => Some(part(id, (0..inputs.len()).map(Operand::Input).collect())?),
            None => None,
        };
        let mut products = vec![];
        for &id in &group.products {
            let start = inputs.len();
            inputs.extend(&self.nodes[id].inputs[1..]);
            let x = if norm.is_some() { Operand::Part(0) } else { Operand::Input(0) };
            let operands = std::iter::once(x).chain((start..inputs.len()).map(Operand::Input));
            products.push(part(id, operands.collect())?);
        }
        let function = match group.function {
            Some(id) => {
                let place = |v: &Value| group.products.iter().position(|&p| p == v.node()).map(|i| before + i);
                let operands = self.nodes[id].inputs.iter().map(|v| Some(Operand::Part(place(v)?)));
                Some(part(id, operands.collect::<Option<Vec<_>>>()?)?)
            }
            None => None,
        };
        let types = self.types(&inputs);
        let products = Products::new(norm_part, products, function, &types)?;
        if products.bindings(&types) > self.profile.max_storage_buffers as usize {
            return None;
        }
        let outputs = match group.function {
            Some(id) => vec![id],
            None => group.products.clone(),
        };
        let members = norm.into_iter().chain(group.products.iter().copied()).chain(group.function).collect();
        let node = Node {
            name: self.nodes[*outputs.last()?].name.clone(),
            outputs: outputs.iter().map(|&id| self.nodes[id].outputs[0].clone()).collect(),
            source: Source::Op(Arc::new(products)),
            inputs,
        };
        Some(Joined { at: first, node, members, outputs })
    }
}
