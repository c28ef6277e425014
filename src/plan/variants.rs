//! The ops of a plan that offer several variants, and the keys under which choices among them are stored.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Plan, Step};
use crate::error::Result;
use crate::graph::{Graph, Op, Value};
use crate::kernel::Launch;
use crate::profile::{Choices, Profile};
use crate::tensor::TensorType;

/// What ops have in common that use the same variant: settings, element types, and dimensions rounded up to a power of
/// two, with a mark if they are not a multiple of 4.
pub fn key(op: &dyn Op, inputs: &[TensorType]) -> String {
    let class = |&n: &usize| match n {
        0..=8 => n.to_string(),
        _ => format!("{}{}", n.next_power_of_two(), if n.is_multiple_of(4) { "" } else { "-" }),
    };
    let input = |t: &TensorType| {
        let dims: Vec<String> = t.shape.dims().iter().map(class).collect();
        format!("{}[{}]", t.dtype, dims.join(","))
    };
    let inputs: Vec<String> = inputs.iter().map(input).collect();
    format!("{} {}", op.key(), inputs.join(" "))
}

/// An op of a plan that offers several variants.
#[derive(Clone, Debug)]
pub struct Tunable {
    /// Its [`key`].
    pub key: String,
    /// The names of its variants.
    pub variants: Vec<String>,
    op: Arc<dyn Op>,
    inputs: Vec<TensorType>,
}

/// The ops of a plan that can be tuned, each key once. A [`Tuner`](crate::Tuner) measures them.
pub fn tunables(plan: &Plan, profile: &Profile) -> Vec<Tunable> {
    let mut seen = BTreeSet::new();
    plan.steps.iter().filter_map(|step| tunable(step, profile)).filter(|t| seen.insert(t.key.clone())).collect()
}

fn tunable(step: &Step, profile: &Profile) -> Option<Tunable> {
    let types = |slots: &[(_, TensorType)]| slots.iter().map(|(_, ty)| ty.clone()).collect::<Vec<_>>();
    let (inputs, outputs) = (types(&step.inputs), types(&step.outputs));
    let variants = step.op.variants(&Launch { inputs: &inputs, outputs: &outputs, profile, variant: 0 });
    let key = key(step.op.as_ref(), &inputs);
    (variants.len() > 1).then(|| Tunable { key, variants, op: step.op.clone(), inputs })
}

impl Tunable {
    /// The op alone, planned once for each variant.
    pub(crate) fn plans(&self, profile: &Profile) -> Result<Vec<Plan>> {
        let (graph, outputs) = self.graph()?;
        let plan = |name: &String| {
            let mut profile = Profile { choices: Choices::default(), ..profile.clone() };
            profile.choices.set(self.key.clone(), name.clone());
            Plan::new(&graph, &outputs, &profile)
        };
        self.variants.iter().map(plan).collect()
    }

    fn graph(&self) -> Result<(Graph, Vec<Value>)> {
        let mut graph = Graph::new();
        let inputs: Vec<Value> = (self.inputs.iter().enumerate())
            .map(|(i, ty)| graph.input(&format!("x{i}"), ty.clone()))
            .collect::<Result<_>>()?;
        let outputs = graph.op_arc("tuned", self.op.clone(), &inputs)?;
        Ok((graph, outputs))
    }
}

/// Index of the variant that `op` uses: 0 if none is chosen, or if the chosen one is not offered.
pub(crate) fn chosen(choices: &Choices, op: &dyn Op, cx: &Launch<'_>) -> usize {
    if choices.is_empty() {
        return 0;
    }
    let name = choices.get(&key(op, cx.inputs));
    name.and_then(|name| op.variants(cx).iter().position(|v| v == name)).unwrap_or(0)
}
