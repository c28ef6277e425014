//! How the activations of blocks are stored.

use std::any::Any;
use std::collections::BTreeSet;

use crate::error::Result;
use crate::graph::{Graph, Op, Value};
use crate::ops::norm::Norm;
use crate::tensor::DType;

/// Stores what the nodes from `first` on compute as this type of floats, if it is as wide as the residual stream or
/// wider. The stream itself stays as it is; `stream` has it before and after each block. Narrower are the keys and
/// values of few heads, the products inside of adapters, and statistics of rows.
pub(super) fn store_activations(g: &mut Graph, first: usize, stream: &[Value], dtype: DType) -> Result<()> {
    let on_stream = inside_blocks(g, first, stream);
    let least = stream.first().map_or(0, |&v| g.ty(v).len());
    for id in first..g.nodes().len() {
        for output in 0..g.node(id).outputs.len() {
            let (node, value) = (g.node(id), g.value(id, output));
            let Some(op) = node.op().filter(|op| !op.is_view()) else { continue };
            // In place, it has the type of what it takes the place of.
            let dtype = op.starts_as(output).map_or(dtype, |i| g.ty(node.inputs[i]).dtype);
            let ty = g.ty(value);
            if ty.dtype.is_float() && ty.dtype != dtype && ty.len() >= least && !on_stream.contains(&value) {
                g.store_as(value, dtype)?;
            }
        }
    }
    Ok(())
}

/// The stream, with what it is inside of blocks: before an addition, and before the norm of a post-norm model.
fn inside_blocks(g: &Graph, first: usize, stream: &[Value]) -> BTreeSet<Value> {
    let mut found: BTreeSet<Value> = stream.iter().map(|&v| root(g, v)).collect();
    for id in (first..g.nodes().len()).rev() {
        let node = g.node(id);
        let carries = |op: &dyn Op| op.is_addition() || (op as &dyn Any).is::<Norm>();
        if found.contains(&g.value(id, 0)) && node.op().is_some_and(|op| carries(op.as_ref())) {
            found.extend(node.inputs.first().map(|&v| root(g, v)));
        }
    }
    found
}

/// The value whose storage a view shares.
fn root(g: &Graph, value: Value) -> Value {
    let node = g.node(value.node());
    match (node.op(), node.inputs.first()) {
        (Some(op), Some(&input)) if op.is_view() => root(g, input),
        _ => value,
    }
}
