//! Ops that do not depend on each other in one dispatch: a token's queries and keys are turned and its keys and values
//! written by a few workgroups each, and a dispatch costs more than their work.

use std::any::{Any, TypeId};

use super::cache::{CacheRead, CacheWrite};
use super::cases::{Case, InputFill, Row};
use super::rope::Rope;
use super::slice::Slice;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Operand, Part, Vjp, infer};
use crate::kernel::{self, Bind, Dispatch, Launch, Program};
use crate::tensor::TensorType;

pub(super) const ROW: Row = Row {
    name: "together",
    summary: "light ops that do not depend on each other, such as the ropes and cache writes of a token, in one dispatch",
    sources: &[kernel::SKELETON],
    cases,
    bench: || vec![decoding("9 heads of 64, 3 for keys", [1, 1, 2048], [9, 3], 64)],
};

/// Light ops that the planner computes in one dispatch: [`Plan::new`](crate::Plan::new) makes them of neighbours in a
/// graph. Each has one output, and those are the outputs of the whole, in order.
#[derive(Clone, Debug)]
pub struct Together {
    /// What is launched.
    members: Vec<Part>,
    /// The same, with members that do the work of several taken apart.
    parts: Vec<Part>,
    /// The part that makes each output.
    made_by: Vec<usize>,
    inputs: usize,
}

impl Together {
    /// These ops, applied to inputs alone.
    pub(crate) fn new(members: Vec<Part>) -> Self {
        let (mut parts, mut made_by) = (vec![], vec![]);
        for member in &members {
            let before = parts.len();
            made_by.push(before + member.op.made_by(0).unwrap_or(0));
            let operand = |operand: &Operand| match *operand {
                Operand::Input(i) => member.operands.get(i).copied().unwrap_or(Operand::Input(usize::MAX)),
                Operand::Part(i) => Operand::Part(before + i),
            };
            match member.op.parts() {
                [] => parts.push(member.clone()),
                inner => parts.extend(inner.iter().map(|part| {
                    let operands = part.operands.iter().map(operand).collect();
                    Part { operands, ..part.clone() }
                })),
            }
        }
        let operands = members.iter().flat_map(|member| &member.operands);
        let used = operands.map(|operand| input_of(operand).map_or(0, |i| i + 1));
        Together { inputs: used.max().unwrap_or(0), members, parts, made_by }
    }

    /// The only dispatch of member `m`, with the bindings of the whole, and whether it may run unchecked.
    fn dispatch(&self, m: usize, cx: &Launch<'_>) -> Result<(Dispatch, bool), String> {
        let member = &self.members[m];
        let types = member.types(cx.inputs, &[])?;
        let program = member.op.launch(&Launch { inputs: &types, outputs: &cx.outputs[m..=m], variant: 0, ..*cx })?;
        let refused = || format!("`{}` ({}) cannot be launched with others", member.name, member.op.name());
        let [dispatch] = &program.dispatches[..] else { return Err(refused()) };
        let bind = |bind: &Bind| match *bind {
            Bind::In(i) => Some(Bind::In(input_of(member.operands.get(i)?)?)),
            Bind::Out(0) => Some(Bind::Out(m)),
            Bind::Null => Some(Bind::Null),
            _ => None,
        };
        let binds = dispatch.binds.iter().map(bind).collect::<Option<Vec<_>>>().ok_or_else(refused)?;
        // A part is trusted if it would be in a node of its own.
        let own = dispatch.kernel.clone().planned_for((member.op.as_ref() as &dyn Any).type_id());
        Ok((Dispatch { binds, ..dispatch.clone() }, own.is_trusted()))
    }
}

fn input_of(operand: &Operand) -> Option<usize> {
    match *operand {
        Operand::Input(i) => Some(i),
        Operand::Part(_) => None,
    }
}

impl Op for Together {
    fn name(&self) -> &'static str {
        "together"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if inputs.len() != self.inputs {
            return Err(format!("takes {} inputs, got {}", self.inputs, inputs.len()));
        }
        let output = |member: &Part| {
            let named = |e: String| format!("`{}`: {e}", member.name);
            let mut outputs = infer(member.op.as_ref(), &member.types(inputs, &[])?).map_err(named)?;
            match outputs.len() {
                1 => Ok(outputs.remove(0)),
                n => Err(format!("`{}` ({}) has {n} outputs, not one", member.name, member.op.name())),
            }
        };
        self.members.iter().map(output).collect()
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("plans make these, of graphs that have their gradients"))
    }

    fn key(&self) -> String {
        // Nodes of any name.
        self.members.iter().map(|member| member.op.key()).collect::<Vec<_>>().join(", ")
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let members: Vec<(Dispatch, bool)> =
            (0..self.members.len()).map(|m| self.dispatch(m, cx)).collect::<Result<_, String>>()?;
        let trusted = members.iter().all(|(_, trusted)| *trusted);
        let dispatches: Vec<Dispatch> = members.into_iter().map(|(dispatch, _)| dispatch).collect();
        let joined = kernel::together(&dispatches, cx.profile).map_err(|e| e.to_string())?;
        let mut dispatch = joined.ok_or("its parts' kernels cannot be one")?;
        if trusted {
            dispatch.kernel = dispatch.kernel.made_by(TypeId::of::<Self>());
        }
        Ok(Program { dispatches: vec![dispatch], scratch: vec![] })
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        Part::results(&self.members, inputs, |m, _| vec![outputs[m].clone()])
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.sum(inputs, outputs, |op, inputs, outputs| op.flops(inputs, outputs))
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.sum(inputs, outputs, |op, inputs, outputs| op.bytes(inputs, outputs))
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        let member = self.members.get(output)?;
        input_of(member.operands.get(member.op.starts_as(0)?)?)
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn made_by(&self, output: usize) -> Option<usize> {
        self.made_by.get(output).copied()
    }
}

impl Together {
    fn sum(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        cost: impl Fn(&dyn Op, &[TensorType], &[TensorType]) -> u64,
    ) -> u64 {
        let of = |(member, output): (&Part, &TensorType)| {
            let types = member.types(inputs, &[]).unwrap_or_default();
            cost(member.op.as_ref(), &types, std::slice::from_ref(output))
        };
        self.members.iter().zip(outputs).map(of).sum()
    }
}

fn part(name: &str, op: impl Op, operands: &[usize]) -> Part {
    Part::new(name, op, operands.iter().map(|&i| Operand::Input(i)))
}

/// What a decoding step does before attention: queries and keys turned, keys and values written.
fn decoding(name: &str, [batch, time, capacity]: [usize; 3], [heads, kv_heads]: [usize; 2], head: usize) -> Case {
    let rope = |heads| Rope { heads, has_start: true, ..Rope::default() };
    // q, k, v, where they start, and the caches.
    let keys = part("write", CacheWrite, &[]);
    let keys = rope(kv_heads).written_to_cache([part("k", rope(kv_heads), &[]), keys]);
    let keys = keys.map(|op| Part { name: "keys".into(), op, operands: [1, 3, 3, 4].map(Operand::Input).to_vec() });
    let queries = part("queries", rope(heads), &[0, 3]);
    let values = part("values", CacheWrite, &[2, 3, 5]);
    let members = [queries].into_iter().chain(keys).chain([values]).collect();
    let [q, kv] = [heads, kv_heads].map(|heads| [batch, time, heads * head]);
    let cache = [batch, capacity, kv[2]];
    let case = Case::new(name, Together::new(members), &[&q, &kv, &kv]).ids(&[batch], capacity as u32);
    case.also(&cache).also(&cache).forward_only()
}

fn cases() -> Vec<Case> {
    let slices = [(0, 3), (3, 5), (9, 2)].map(|(start, len)| part("slice", Slice { axis: 1, start, len }, &[0]));
    let mut odd = vec![part("rope", Rope { heads: 3, interleaved: true, ..Rope::default() }, &[0])];
    odd.push(part("read", CacheRead { time: 4 }, &[2, 1]));
    vec![
        decoding("one token", [1, 1, 9], [4, 2], 16),
        decoding("several sequences", [3, 5, 130], [3, 1], 24),
        decoding("odd heads", [2, 2, 4], [3, 3], 6),
        Case::new("slices", Together::new(slices.into()), &[&[127, 11, 8]]).forward_only(),
        Case::new("interleaved, and a read", Together::new(odd), &[&[2, 7, 30]])
            .ids(&[2], 1)
            .fill(1, InputFill::Values(&[2.0, 5.0]))
            .also(&[2, 6, 12])
            .forward_only(),
    ]
}
