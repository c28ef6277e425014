//! Patches: a graph with some of its values changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::question::find;
use crate::error::Result;
use crate::graph::{Graph, Source, Value};
use crate::nn::Transformer;
use crate::tensor::TensorType;

/// What a patch does to a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Edit {
    /// Takes another tensor instead: the new input `<node>.replacement`, of the same type.
    Replace,
    /// Multiplies with a constant.
    Scale(f32),
    /// Multiplies with the new input `<node>.factor`, f32 `[1]`: 0 is ablation, 1 changes nothing.
    ScaleBy,
    /// Adds the new input `<node>.addend` of these dimensions: those of the value, or the last few of them, `[d_model]`
    /// say.
    Add(Vec<usize>),
}

/// A change to a node of a graph, for all that read it. Inputs that it brings are the host's to write, and zero until
/// then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Patch {
    /// Name of the node, or `name:1` for another output than the first.
    pub node: String,
    /// What happens to it.
    pub edit: Edit,
}

impl Patch {
    /// This edit of this node.
    pub fn new(node: impl Into<String>, edit: Edit) -> Self {
        Patch { node: node.into(), edit }
    }
}

/// A graph with patches, and where the values of the old one went.
#[derive(Clone, Debug)]
pub struct Patched {
    /// The new graph. Its nodes have the names that they had.
    pub graph: Graph,
    /// By old value: itself, and what its readers read now.
    values: BTreeMap<Value, (Value, Value)>,
}

impl Patched {
    /// What the readers of an old value read now: the patched one, if it is.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    pub fn value(&self, old: Value) -> Value {
        self.values[&old].1
    }

    /// The same value in the new graph, before any patch. Inputs, parameters and states are to be written by it.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    pub fn unpatched(&self, old: Value) -> Value {
        self.values[&old].0
    }

    /// The values of a model in the new graph.
    pub fn transformer(&self, old: &Transformer) -> Transformer {
        let mut new = old.clone();
        let inputs = new.token_types.iter_mut().chain(&mut new.dropout_seed).chain([&mut new.tokens]);
        for v in inputs.chain(new.params.iter_mut().map(|p| &mut p.value)) {
            *v = self.unpatched(*v);
        }
        for v in new.stream.iter_mut().chain([&mut new.hidden, &mut new.logits]) {
            *v = self.value(*v);
        }
        new
    }
}

impl Graph {
    /// The graph with some of its values changed for all that read them; several patches of one node go one behind the
    /// other. Gradients are to be made afterwards: they then see the patches. An `Err` names a node that is not there.
    ///
    /// ```
    /// use throughline::probe::{Edit, Patch};
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([4, 8]))?;
    /// let h = g.gelu("h", x)?;
    /// let y = g.sum("y", h)?;
    /// let patched = g.patched(&[Patch::new("h", Edit::Add(vec![8])), Patch::new("h", Edit::ScaleBy)])?;
    /// let factor = patched.graph.find("h.factor").unwrap();
    /// assert_eq!(patched.graph.ty(factor).len(), 1);
    /// assert_eq!(patched.graph.name(patched.value(y)), "y");
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn patched(&self, patches: &[Patch]) -> Result<Patched> {
        let mut edits: BTreeMap<Value, Vec<&Patch>> = BTreeMap::new();
        for patch in patches {
            edits.entry(find(self, "patch", &patch.node)?).or_default().push(patch);
        }
        let mut patched =
            Patched { graph: Graph::with_max_tensor_bytes(self.max_tensor_bytes()), values: BTreeMap::new() };
        for (id, node) in self.nodes().iter().enumerate() {
            let g = &mut patched.graph;
            let ty = || node.outputs[0].clone();
            let made = match &node.source {
                Source::Input => vec![g.input(&node.name, ty())?],
                Source::Param => vec![g.param(&node.name, ty().shape)?],
                Source::State => vec![g.state(&node.name, ty())?],
                Source::Op(op) => {
                    let inputs: Vec<Value> = node.inputs.iter().map(|v| patched.values[v].1).collect();
                    g.op_arc(&node.name, op.clone(), &inputs)?
                }
            };
            for (output, value) in made.into_iter().enumerate() {
                let old = Value { node: id, output };
                let mut now = value;
                for patch in edits.get(&old).into_iter().flatten() {
                    now = patch.apply(&mut patched.graph, now)?;
                }
                patched.values.insert(old, (value, now));
            }
        }
        for &(value, state) in self.stores() {
            let (value, state) = (patched.value(value), patched.unpatched(state));
            patched.graph.store(value, state)?;
        }
        Ok(patched)
    }
}

impl Patch {
    /// Adds the nodes that make another value of `x`.
    fn apply(&self, g: &mut Graph, x: Value) -> Result<Value> {
        let (node, ty) = (&self.node, g.ty(x).clone());
        match &self.edit {
            Edit::Replace => g.input(&format!("{node}.replacement"), ty),
            Edit::Scale(factor) => g.scale(&format!("{node}.scaled"), x, *factor),
            Edit::ScaleBy => {
                let factor = g.input(&format!("{node}.factor"), TensorType::f32([1]))?;
                let factor = g.broadcast(&format!("{node}.factors"), factor, ty.shape)?;
                g.mul(&format!("{node}.scaled"), x, factor)
            }
            Edit::Add(dims) => {
                let addend = g.input(&format!("{node}.addend"), TensorType::f32(&dims[..]))?;
                g.add(&format!("{node}.steered"), x, addend)
            }
        }
    }
}
