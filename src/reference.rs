//! The oracle: every op in f64 on the CPU, and an interpreter that runs a whole graph that way.
//!
//! It is slow and plain on purpose. GPU results are compared with it, forward and backward, and it
//! is itself checked against central differences.

use std::collections::HashMap;

pub use crate::array::{Array, nmse};
use crate::error::{Error, Result};
use crate::graph::{Graph, Source, Value};
use crate::tensor::TensorType;

/// Runs the nodes that `wanted` depends on. `given` holds the inputs, parameters and states by
/// their values. Stores are not carried out.
pub fn run(graph: &Graph, given: &HashMap<Value, Array>, wanted: &[Value]) -> Result<Vec<Array>> {
    let mut values: HashMap<Value, Array> = given.clone();
    for id in graph.needed(wanted) {
        let node = graph.node(id);
        let Source::Op(op) = &node.source else {
            let value = Value { node: id, output: 0 };
            let got = values.get(&value).map_or("nothing".into(), |a| a.shape.to_string());
            if got != node.outputs[0].shape.to_string() {
                return Err(Error::data(&node.name, &node.outputs[0], got));
            }
            continue;
        };
        let inputs: Vec<&Array> = node.inputs.iter().map(|v| &values[v]).collect();
        let outputs = op.reference(&inputs, &node.outputs);
        for (output, (array, ty)) in outputs.into_iter().zip(&node.outputs).enumerate() {
            check_type(&node.name, &array, ty)?;
            values.insert(Value { node: id, output }, array);
        }
    }
    Ok(wanted.iter().map(|v| values[v].clone()).collect())
}

fn check_type(name: &str, array: &Array, ty: &TensorType) -> Result<()> {
    if array.shape == ty.shape {
        return Ok(());
    }
    Err(Error::data(format!("{name} (reference)"), ty, &array.shape))
}
