//! Products of the same few rows become one dispatch, with the norm before them and the activation after them.
//!
//! On GPUs a token's step is made of small dispatches that wait for each other. Products of one input do not, so q, k
//! and v are one; a norm of a few rows is less work than a dispatch, so the products work it out for themselves; and an
//! elementwise function of two products, such as SwiGLU's, is made where both are. Values that anything else needs are
//! still stored.

use std::collections::HashMap;
use std::sync::Arc;

use super::uses::{Uses, part, redirect, uses};
use crate::graph::{Node, Operand, Part, Source, Value};
use crate::kernel::FEW_ROWS;
use crate::ops::products::Products;
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

/// A norm is left alone before products of more columns than this: many workgroups would each work it out again, and
/// one dispatch more does not show beside them.
const WIDE: usize = 1 << 14;

/// Rewrites `nodes` in place and returns where values moved. Nodes that became parts of others stay, unused. `keep` is
/// read after the step.
pub(crate) fn join(nodes: &mut [Node], keep: &[Value], profile: &Profile) -> HashMap<Value, Value> {
    if profile.class != AdapterClass::Gpu {
        return HashMap::new();
    }
    let made = Search::new(nodes, keep, profile).joined();
    let mut moved = HashMap::new();
    for Joined { at, node, members, outputs } in made {
        moved.extend(outputs.iter().enumerate().map(|(o, &from)| (Value::local(from, 0), Value::local(at, o))));
        members.iter().for_each(|&m| nodes[m].inputs.clear());
        nodes[at] = node;
    }
    redirect(nodes, &moved);
    moved
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
    uses: Uses,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], keep: &[Value], profile: &'a Profile) -> Self {
        Search { nodes, profile, uses: uses(nodes, keep) }
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
        let Some(op) = node.op().filter(|_| !self.uses(Value::local(id, 0)).is_empty()) else { return false };
        let Some(&x) = node.inputs.first() else { return false };
        self.ty(x).shape.rows() <= FEW_ROWS && op.gemv(&self.types(&node.inputs)).is_some()
    }

    /// The products that are computed together, by their first one.
    fn joined(&self) -> Vec<Joined> {
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

    /// Splits products of one input: those that a function takes belong together, and so do the others as long as they
    /// are ready where the first of them is and the device binds enough.
    fn split(&self, mut ids: Vec<usize>) -> Vec<Joined> {
        let mut all = vec![];
        while let Some(&first) = ids.first() {
            let joined = self.with_function(first, &ids).or_else(|| {
                let mut products = vec![first];
                let mut joined = self.join(&products, None);
                for &id in ids[1..].iter().filter(|&&id| self.with_function(id, &ids).is_none()) {
                    let longer = [&products[..], &[id]].concat();
                    if let Some(more) = self.join(&longer, None) {
                        (products, joined) = (longer, Some(more));
                    }
                }
                joined
            });
            ids.retain(|id| *id != first && !joined.as_ref().is_some_and(|joined| joined.members.contains(id)));
            all.extend(joined);
        }
        all
    }

    /// An elementwise function that nothing but it takes product `id` to, with all that it is applied to, if those are
    /// such products among `ids`.
    fn with_function(&self, id: usize, ids: &[usize]) -> Option<Joined> {
        let &[user] = self.uses(Value::local(id, 0)) else { return None };
        let node = self.nodes.get(user)?;
        node.op()?.elementwise()?;
        let own = |v: &Value| ids.contains(&v.node()) && self.uses(*v) == [user];
        let products: Vec<usize> = node.inputs.iter().map(|v| v.node()).collect();
        node.inputs.iter().all(own).then(|| self.join(&products, Some(user)))?
    }

    /// The node that does the work of these products, and of the function of them; `None` if that saves nothing or is
    /// not possible.
    fn join(&self, products: &[usize], function: Option<usize>) -> Option<Joined> {
        let &first = products.iter().min()?;
        let norm = self.norm(products, first);
        if norm.is_none() && products.len() == 1 && function.is_none() {
            return None;
        }
        let ready = |v: &Value| v.node() < first || self.nodes[v.node()].op().is_none();
        if !products.iter().all(|&id| self.nodes[id].inputs.iter().all(ready)) {
            return None;
        }
        self.node(products, function, norm, first).or_else(|| self.node(products, function, None, first))
    }

    /// The norm that makes the input of these products, if they can leave it out: nothing else needs what it makes, and
    /// what it reads is still there.
    fn norm(&self, products: &[usize], first: usize) -> Option<usize> {
        let x = self.nodes[first].inputs[0];
        let id = x.node();
        let node = &self.nodes[id];
        node.op()?.on_read(&self.types(&node.inputs))?;
        let columns: usize = products.iter().map(|&p| self.nodes[p].outputs[0].shape.cols()).sum();
        let others = (1..node.outputs.len()).all(|o| self.uses(Value::local(id, o)).is_empty());
        let source = node.inputs.first()?;
        let between = |&user: &usize| user > id && user < first;
        let own = x.output() == 0 && others && columns <= WIDE && !self.uses(*source).iter().any(between);
        // Products that another dispatch computes read it, too, and one may have it as its weight.
        let uses = self.uses(x);
        let each_once = uses.len() == products.len() && uses.iter().all(|user| products.contains(user));
        (own && each_once).then_some(id)
    }

    fn node(&self, products: &[usize], function: Option<usize>, norm: Option<usize>, first: usize) -> Option<Joined> {
        let mut inputs = match norm {
            Some(id) => self.nodes[id].inputs.clone(),
            None => vec![self.nodes[first].inputs[0]],
        };
        let mut parts: Vec<Part> = vec![];
        if let Some(id) = norm {
            parts.push(part(&self.nodes[id], (0..inputs.len()).map(Operand::Input))?);
        }
        let (before, x) = (parts.len(), if norm.is_some() { Operand::Part(0) } else { Operand::Input(0) });
        for &id in products {
            let start = inputs.len();
            inputs.extend(&self.nodes[id].inputs[1..]);
            parts.push(part(&self.nodes[id], [x].into_iter().chain((start..inputs.len()).map(Operand::Input)))?);
        }
        if let Some(id) = function {
            // It takes the products in their order.
            parts.push(part(&self.nodes[id], (before..parts.len()).map(Operand::Part))?);
        }
        let types = self.types(&inputs);
        let op = Products::new(parts, norm.is_some(), function.is_some(), &types)?;
        if op.bindings(&types) > self.profile.max_storage_buffers as usize {
            return None;
        }
        let outputs = function.map_or(products.to_vec(), |id| vec![id]);
        let members = norm.into_iter().chain(products.iter().copied()).chain(function).collect();
        let node = Node {
            name: self.nodes[*outputs.last()?].name.clone(),
            outputs: outputs.iter().map(|&id| self.nodes[id].outputs[0].clone()).collect(),
            source: Source::Op(Arc::new(op)),
            inputs,
        };
        Some(Joined { at: first, node, members, outputs })
    }
}
