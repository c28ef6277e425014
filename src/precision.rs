//! Mixed precision: which of a graph's values are stored in f16.
//!
//! Kernels compute in f32 whatever a tensor is stored in, so mixed precision is a choice of storage, made after the
//! gradients are in the graph. It knows no particular op: shapes, [`Op::stays_f32`], [`Op::is_addition`] and what reads
//! what decide.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, Op, Value};
use crate::kernel::{Bind, Halves, Launch};
use crate::profile::Profile;
use crate::tensor::{DType, Shape, TensorType};

/// How training stores what it computes.
///
/// Choose mixed precision where memory or its bandwidth is what limits a run, and on cards with matrix units, which
/// multiply f16: activations and their gradients take half of both. Parameters, their gradients and moments stay f32,
/// and so does every sum, so that small updates are not lost (Micikevicius et al. 2018,
/// <https://arxiv.org/abs/1710.03740>). Products read the parameters from copies in f16, which take two more bytes for
/// each element of a matrix. On software adapters mixed precision saves memory, but no time.
///
/// `docs/performance.md` in the repository has figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Activations and their gradients in f16: see [`Graph::store_mixed`].
    Mixed {
        /// How the residual stream and its gradient are stored. All layers add to them, so f32 is the safe choice: each
        /// addition to a stream in f16 is rounded to 11 bits, and a stream that grows beyond 65504 is infinite.
        stream: DType,
    },
}

impl Precision {
    /// Mixed precision with the residual stream in f32: the usual choice.
    pub const MIXED: Precision = Precision::Mixed { stream: DType::F32 };

    /// Whether it is mixed.
    pub const fn is_mixed(self) -> bool {
        matches!(self, Precision::Mixed { .. })
    }

    /// Checks the type of the stream.
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Precision::Mixed { stream } if !stream.is_float() => {
                Err(Error::config("precision.mixed.stream", format!("must be f32 or f16, got {stream}")))
            }
            _ => Ok(()),
        }
    }

    /// What training in this precision plans for: in f32 without cooperative matrices, whose products round to f16.
    pub(crate) fn profile(self, profile: &Profile) -> Profile {
        let cooperative = profile.cooperative.filter(|_| self.is_mixed());
        Profile { cooperative, ..profile.clone() }
    }

    /// Elements whose multiples tensors of a parameters' arena start at: 256 bytes in the narrowest type.
    pub(crate) const fn align(self) -> usize {
        if self.is_mixed() { 128 } else { 64 }
    }
}

impl Graph {
    /// Stores in f16 what this graph computes, as far as that suits mixed precision. Call it when the gradients are
    /// there, and before planning. A [`GraphTrainer`](crate::train::GraphTrainer) in [mixed precision](Precision) does
    /// so; use it for a training loop of your own.
    ///
    /// Stored in f32 remain
    ///
    /// - vectors and single numbers, including matrices of one column: losses, norms, statistics of rows;
    /// - what [`store`](Self::store) leaves in states of f32, such as gradients of parameters, and what is added up to
    ///   them;
    /// - the values `read`, which the host is going to read;
    /// - what an op says must [stay so](Op::stays_f32): sums, powers, exponentials;
    /// - the residual stream and its gradient, if `stream` is f32;
    /// - what an op of your own reads or writes in a way that [cannot be rewritten](Self::store_as) for f16.
    ///
    /// The residual stream is found by what it is: a value to which something is [added](Op::is_addition) that was
    /// computed from it, `x + f(x)`. That holds before and after norms, for parallel branches, for its gradient in the
    /// backward pass, and for networks of any kind that use [`residual_add`](Self::residual_add); not for two terms that
    /// know nothing of each other, such as a layer and a low-rank adapter.
    ///
    /// `copied` are parameters whose values are to be bound in f16: of those, the ones that some op reads as a whole.
    /// They become tensors of f16 in this graph, and are returned. Their gradients stay f32. Lookups alone are not
    /// worth a copy, since they touch few rows.
    ///
    /// ```
    /// use throughline::{AdapterClass, DType, Graph, Profile, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([64, 256]))?;
    /// let w = g.param("w", [256, 256])?;
    /// let branch = g.matmul("branch", x, w)?;
    /// let y = g.residual_add("y", x, branch)?;
    /// let loss = g.sum("loss", y)?;
    /// let dw = g.gradients(loss, &[w])?[0];
    ///
    /// let profile = Profile::portable(AdapterClass::Gpu);
    /// let copied = g.store_mixed(&[loss, dw], &[w], DType::F32, &profile)?;
    /// assert_eq!(copied, [w]);
    /// let types = [w, branch, y, loss, dw].map(|value| g.ty(value).dtype);
    /// assert_eq!(types, [DType::F16, DType::F16, DType::F32, DType::F32, DType::F32]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If a value is not of this graph, or the stream is to be stored as integers.
    pub fn store_mixed(
        &mut self,
        read: &[Value],
        copied: &[Value],
        stream: DType,
        profile: &Profile,
    ) -> Result<Vec<Value>> {
        self.check_values(read, |i| format!("store_mixed: read[{i}]"))?;
        self.check_values(copied, |i| format!("store_mixed: copied[{i}]"))?;
        Precision::Mixed { stream }.validate()?;
        let search = Search::new(self);
        let kept = search.kept(read, stream);
        let mut halves = search.halves(&kept);
        halves.extend(copied.iter().copied().filter(|&param| search.is_read_whole(param) && !kept.contains(&param)));
        halves.iter().for_each(|&value| self.set_dtype(value, DType::F16));
        for id in 0..self.nodes().len() {
            let node = self.node(id);
            if self.can_convert(node, profile) {
                continue;
            }
            let search = Search::new(self);
            let outputs = (0..node.outputs.len()).map(|output| self.value(id, output));
            let touched: Vec<Value> = outputs.chain(node.inputs.iter().map(|&v| search.root(v))).collect();
            for value in touched.into_iter().filter(|value| halves.contains(value)) {
                self.set_dtype(value, DType::F32);
            }
        }
        Ok(copied.iter().copied().filter(|&param| self.ty(param).dtype == DType::F16).collect())
    }

    /// Whether the kernels of a node can convert what they load and store. Those of the table can.
    fn can_convert(&self, node: &Node, profile: &Profile) -> bool {
        let Some(op) = node.op().filter(|op| !op.is_view()) else { return true };
        let inputs: Vec<TensorType> = node.inputs.iter().map(|&v| self.ty(v).clone()).collect();
        if inputs.iter().chain(&node.outputs).all(|ty| ty.dtype != DType::F16) {
            return true;
        }
        // What cannot be launched at all is for the planner to say.
        let cx = Launch { inputs: &inputs, outputs: &node.outputs, profile, variant: 0 };
        let Ok(program) = op.launch(&cx) else { return true };
        let ty = |bind: &Bind| match *bind {
            Bind::In(i) => inputs.get(i),
            Bind::Out(i) | Bind::OutIn(i) => node.outputs.get(i),
            Bind::Scratch(i) | Bind::ScratchIn(i) => program.scratch.get(i),
            Bind::Null => None,
        };
        program.dispatches.iter().filter(|d| !d.kernel.is_of_table()).all(|d| {
            let stored = (1..).zip(&d.binds).filter(|(_, bind)| ty(bind).is_some_and(|ty| ty.dtype == DType::F16));
            let halves = Halves { bindings: stored.map(|(n, _)| n).collect(), in_words: !profile.shader_f16 };
            d.kernel.clone().with_halves(halves).as_stored().is_ok()
        })
    }
}

/// Whether a tensor is worth storing in f16: vectors are small, and often statistics.
fn is_matrix(shape: &Shape) -> bool {
    shape.rank() >= 2 && shape.cols() > 1
}

/// What decides about storage.
struct Search<'a> {
    graph: &'a Graph,
    /// For each view the value whose storage it is.
    roots: HashMap<Value, Value>,
}

impl<'a> Search<'a> {
    fn new(graph: &'a Graph) -> Self {
        let mut search = Search { graph, roots: HashMap::new() };
        for (id, node) in graph.nodes().iter().enumerate() {
            if let (Some(true), [x, ..]) = (node.op().map(|op| op.is_view()), &node.inputs[..]) {
                search.roots.insert(graph.value(id, 0), search.root(*x));
            }
        }
        search
    }

    fn root(&self, value: Value) -> Value {
        self.roots.get(&value).copied().unwrap_or(value)
    }

    fn op(&self, value: Value) -> Option<&'a dyn Op> {
        self.graph.node(value.node()).op().map(|op| op.as_ref())
    }

    /// What nodes compute that need not be f32.
    fn halves(&self, kept: &HashSet<Value>) -> Vec<Value> {
        let mut halves = vec![];
        for (id, node) in self.graph.nodes().iter().enumerate() {
            let Some(op) = node.op().filter(|op| !op.is_view()) else { continue };
            for (output, ty) in node.outputs.iter().enumerate() {
                let value = self.graph.value(id, output);
                let large = ty.dtype == DType::F32 && is_matrix(&ty.shape);
                if large && !op.stays_f32(output) && !kept.contains(&value) {
                    halves.push(value);
                }
            }
        }
        halves
    }

    /// What stays f32 for what becomes of it.
    fn kept(&self, read: &[Value], stream: DType) -> HashSet<Value> {
        let mut kept: HashSet<Value> = HashSet::new();
        let mut stack: Vec<Value> = self.graph.stores().iter().map(|&(value, _)| self.root(value)).collect();
        while let Some(value) = stack.pop() {
            if kept.insert(value) && self.op(value).is_some_and(|op| op.is_addition()) {
                stack.extend(self.graph.node(value.node()).inputs.iter().map(|&v| self.root(v)));
            }
        }
        kept.extend(read.iter().map(|&v| self.root(v)));
        for node in self.graph.nodes() {
            let Some(op) = node.op() else { continue };
            let stays = (0..node.outputs.len()).filter(|&output| op.stays_f32(output));
            // What such an output is made of in place.
            let from = stays.filter_map(|output| node.inputs.get(op.starts_as(output)?));
            kept.extend(from.map(|&v| self.root(v)));
        }
        if stream == DType::F32 {
            kept.extend(self.stream());
        }
        kept
    }

    /// The values along residual streams, forward and backward.
    fn stream(&self) -> HashSet<Value> {
        // For each sum along a stream what it was before.
        let mut before: HashMap<Value, Value> = HashMap::new();
        for (id, node) in self.graph.nodes().iter().enumerate() {
            let (Some(true), &[a, b]) = (node.op().map(|op| op.is_addition()), &node.inputs[..]) else { continue };
            let [a, b] = [self.root(a), self.root(b)];
            let x = [(a, b), (b, a)].into_iter().find(|&(x, branch)| self.is_branch(branch, x, &before));
            if let Some((x, _)) = x {
                before.insert(self.graph.value(id, 0), x);
            }
        }
        before.into_iter().flat_map(|(sum, x)| [sum, x]).collect()
    }

    /// Whether this is computed from the stream that `x` is on, there or earlier.
    fn is_branch(&self, branch: Value, x: Value, before: &HashMap<Value, Value>) -> bool {
        let mut along = std::iter::successors(Some(x), |x| before.get(x).copied());
        branch != x && along.any(|x| self.depends(branch, x))
    }

    fn depends(&self, value: Value, on: Value) -> bool {
        let (mut seen, mut stack) = (HashSet::new(), vec![value.node()]);
        while let Some(id) = stack.pop() {
            if id == on.node() {
                return true;
            }
            if id > on.node() && seen.insert(id) {
                stack.extend(self.graph.node(id).inputs.iter().map(|v| v.node()));
            }
        }
        false
    }

    /// Whether an op moves at least as many bytes as this parameter has, of two dimensions or more.
    fn is_read_whole(&self, param: Value) -> bool {
        let ty = self.graph.ty(param);
        let reads = |node: &Node| {
            let types: Vec<TensorType> = node.inputs.iter().map(|&v| self.graph.ty(v).clone()).collect();
            let takes = node.inputs.iter().any(|&v| self.root(v) == param);
            takes && node.op().is_some_and(|op| !op.is_view() && op.bytes(&types, &node.outputs) >= ty.bytes() as u64)
        };
        ty.dtype == DType::F32 && is_matrix(&ty.shape) && self.graph.nodes().iter().any(reads)
    }
}
