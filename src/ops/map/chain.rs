//! Several elementwise ops in one kernel.

use std::any::TypeId;

use super::broadcast;
use super::functions;
use super::kernel::{self, Link};
use super::op::Map;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Operand, Part, Vjp};
use crate::kernel::{Kernel, Launch, Program};
use crate::ops::checks::expect_f32;
use crate::tensor::{Shape, TensorType};

/// Elementwise ops that the planner computes in one kernel: [`Plan::new`](crate::Plan::new) makes them of neighbours in
/// a graph.
///
/// Inputs may broadcast; all that is computed has one shape. A value that something else needs is an output, the others
/// are never stored.
#[derive(Clone, Debug)]
pub struct Chain {
    parts: Vec<Part>,
    outputs: Vec<usize>,
    inputs: usize,
    shape: Shape,
}

impl Chain {
    /// Parts, each after those that it is applied to, and which of them are outputs. Their results have this shape.
    pub(crate) fn new(parts: Vec<Part>, outputs: Vec<usize>, shape: Shape) -> Self {
        let inputs = parts.iter().flat_map(|part| &part.operands).map(|operand| match operand {
            Operand::Input(i) => i + 1,
            Operand::Part(_) => 0,
        });
        Chain { inputs: inputs.max().unwrap_or(0), parts, outputs, shape }
    }

    /// `(x, scale [, shift]) -> x * scale [+ shift]`, of the shape of `x`: with `shifts` one `fma`.
    pub(crate) fn scale_and_shift(shifts: bool, shape: Shape) -> Self {
        let (entry, n) = if shifts { (&functions::fma, 3) } else { (&functions::mul, 2) };
        let scaled = Part::new("scaled", Map::of_table(entry, &[]), (0..n).map(Operand::Input).collect::<Vec<_>>());
        Chain::new(vec![scaled], vec![0], shape)
    }

    /// The types of a part's operands.
    fn types(&self, part: &Part, inputs: &[TensorType]) -> Vec<TensorType> {
        let ty = |operand: &Operand| match *operand {
            Operand::Input(i) => inputs[i].clone(),
            Operand::Part(_) => TensorType::f32(self.shape.clone()),
        };
        part.operands.iter().map(ty).collect()
    }
}

impl Op for Chain {
    fn name(&self) -> &'static str {
        "chain"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, self.inputs)?;
        let output = TensorType::f32(self.shape.clone());
        let all = broadcast::shape(&[inputs, std::slice::from_ref(&output)].concat())?;
        match all == self.shape {
            true => Ok(vec![output; self.outputs.len()]),
            false => Err(format!("its inputs have shape {all} together, not {}", self.shape)),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("plans make chains, of graphs that have their gradients"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let link = |part: &Part| {
            let Part { name, op, operands } = part;
            let function = op.elementwise().ok_or_else(|| format!("`{name}` is no longer elementwise"))?;
            let (takes, got) = (function.operands.len(), operands.len());
            if takes != got {
                return Err(format!("`{name}` ({}): `elementwise` is a function of {takes}, not {got}", op.name()));
            }
            Ok(Link { function, operands: operands.clone() })
        };
        let links: Vec<Link> = self.parts.iter().map(link).collect::<Result<_, String>>()?;
        // One function that anybody wrote makes the whole text untrusted.
        let trusted = links.iter().all(|link| link.function.is_trusted());
        Ok(kernel::launch(cx, &links, &self.outputs, |text, entry| match trusted {
            true => Kernel::new("map", text, entry).made_by(TypeId::of::<Self>()),
            false => Kernel::new("map", text, entry),
        }))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let results = Part::results(&self.parts, inputs, |_, _| vec![TensorType::f32(self.shape.clone())]);
        self.outputs.iter().map(|&i| results[i].clone()).collect()
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        let output = &outputs[..1];
        self.parts.iter().map(|part| part.op.flops(&self.types(part, inputs), output)).sum()
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn made_by(&self, output: usize) -> Option<usize> {
        self.outputs.get(output).copied()
    }
}
