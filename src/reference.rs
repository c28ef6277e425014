//! The oracle: an interpreter that runs a whole graph in f64 on the CPU.
//!
//! Use it to check an op or a graph of your own without a GPU, or to find out which of two GPU results is right. It is
//! slow and plain on purpose. All kernels are compared with it, forward and backward, and it is itself checked against
//! central differences.

use std::collections::HashMap;

pub use crate::array::{Array, nmse};
use crate::error::{Error, Result};
use crate::graph::{Graph, Source, Value};
use crate::tensor::TensorType;

/// Computes the values `wanted`, with all nodes that they depend on. `given` holds the inputs, parameters and states;
/// stores are not carried out.
///
/// ```
/// use std::collections::HashMap;
/// use throughline::reference::{self, Array};
/// use throughline::{Graph, TensorType};
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([2, 2]))?;
/// let y = g.sum("y", x)?;
/// let given = HashMap::from([(x, Array::new([2, 2], vec![1.0, 2.0, 3.0, 4.0]))]);
/// assert_eq!(reference::run(&g, &given, &[y])?[0].data, [10.0]);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn run(graph: &Graph, given: &HashMap<Value, Array>, wanted: &[Value]) -> Result<Vec<Array>> {
    graph.check_values(wanted, |i| format!("reference: wanted[{i}]"))?;
    graph.check_values(&given.keys().copied().collect::<Vec<_>>(), |_| "reference: a key of `given`".into())?;
    let mut values: HashMap<Value, Array> = given.clone();
    for id in graph.needed(wanted) {
        let node = graph.node(id);
        let Source::Op(op) = &node.source else {
            let value = graph.value(id, 0);
            let got = values.get(&value).map_or("nothing".into(), |a| a.shape.to_string());
            if got != node.outputs[0].shape.to_string() {
                return Err(Error::data(&node.name, &node.outputs[0], got));
            }
            continue;
        };
        let inputs: Vec<&Array> = node.inputs.iter().map(|v| &values[v]).collect();
        let outputs = op.reference(&inputs, &node.outputs);
        if outputs.len() != node.outputs.len() {
            let message = format!("`reference` gave {} outputs, but `infer` {}", outputs.len(), node.outputs.len());
            let types = node.inputs.iter().map(|&v| graph.ty(v));
            return Err(Error::node(&node.name, op.name(), message, types));
        }
        for (output, (array, ty)) in outputs.into_iter().zip(&node.outputs).enumerate() {
            check_type(&node.name, &array, ty)?;
            values.insert(graph.value(id, output), array);
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
