//! Patches: a copy of a graph with some of its values changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::question::find;
use crate::error::Result;
use crate::graph::{Graph, Source, Value};
use crate::nn::Transformer;
use crate::tensor::TensorType;

/// How a patch changes a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Edit {
    /// Replaces it by a new input `<node>.replacement` of the same type: for activation patching.
    Replace,
    /// Multiplies it by a constant.
    Scale(f32),
    /// Multiplies it by a new input `<node>.factor`, f32 `[1]`: 0 is ablation, 1 changes nothing.
    ScaleBy,
    /// Adds a new input `<node>.addend` of these dimensions: all dimensions of the value, or only the last ones, such
    /// as `[d_model]` for a steering vector.
    Add(Vec<usize>),
}

/// A change to a node of a graph, seen by all that read the node. The host writes the inputs that it adds,
/// before the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Patch {
    /// Name of the node, or `name:1` for its second output, and so on.
    pub node: String,
    /// The change.
    pub edit: Edit,
}

impl Patch {
    /// Applies `edit` to the node of this name.
    pub fn new(node: impl Into<String>, edit: Edit) -> Self {
        Patch { node: node.into(), edit }
    }
}

/// A patched graph, with a map from the values of the original.
///
/// [`Graph::patched`] returns one. Plan its [`graph`](Self::graph), and translate values that you hold with
/// [`value`](Self::value) and [`unpatched`](Self::unpatched).
#[derive(Clone, Debug)]
pub struct Patched {
    /// The new graph. Its nodes keep their names.
    pub graph: Graph,
    /// For each old value: itself in the new graph, and the value that its readers now read.
    values: BTreeMap<Value, (Value, Value)>,
}

impl Patched {
    /// What the readers of an old value now read: the patched value, or the value itself if no patch changes it. Use it
    /// to ask for outputs.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    #[track_caller]
    pub fn value(&self, old: Value) -> Value {
        self.both(old).1
    }

    /// The same value in the new graph, before any patch. Use it to write inputs, parameters and states.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    #[track_caller]
    pub fn unpatched(&self, old: Value) -> Value {
        self.both(old).0
    }

    #[track_caller]
    fn both(&self, old: Value) -> (Value, Value) {
        match self.values.get(&old) {
            Some(both) => *both,
            None => panic!("not a value of the graph that was patched: {old:?}"),
        }
    }

    /// The values of a model, mapped to the new graph.
    pub fn transformer(&self, old: &Transformer) -> Transformer {
        let mut new = old.clone();
        let inputs = [&mut new.token_types, &mut new.starts, &mut new.positions, &mut new.dropout_seed];
        let inputs = inputs.into_iter().flatten().chain([&mut new.tokens]);
        for v in inputs.chain(&mut new.params) {
            *v = self.unpatched(*v);
        }
        for v in new.stream.iter_mut().chain([&mut new.hidden, &mut new.logits]) {
            *v = self.value(*v);
        }
        new
    }
}

impl Graph {
    /// A copy of the graph in which these patches change some values for everything that reads them. Several patches of
    /// one node apply in order.
    ///
    /// Patch before you differentiate: [`gradients`](Self::gradients) of the result then include the patches.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`](crate::Error::Graph) names a node that does not exist.
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
                Source::Input if self.find_step_seed() == Some(self.value(id, 0)) => vec![g.step_seed()?],
                Source::Input => vec![g.input(&node.name, ty())?],
                Source::Param(None) => vec![g.param(&node.name, ty().shape)?],
                Source::Param(Some(init)) => vec![g.param_with(&node.name, ty().shape, *init)?],
                Source::State => vec![g.state(&node.name, ty())?],
                Source::Op(op) => {
                    let inputs: Vec<Value> = node.inputs.iter().map(|v| patched.values[v].1).collect();
                    g.op_arc(&node.name, op.clone(), &inputs)?
                }
            };
            for (output, value) in made.into_iter().enumerate() {
                let old = self.value(id, output);
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
    /// Adds the nodes that compute the changed value from `x`.
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
