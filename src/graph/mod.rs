//! The graph builder: named nodes, checked shapes.
//!
//! A graph is a list of nodes in the order in which they were made, which is a topological order.
//! It owns no GPU memory. [`crate::plan`] turns it into buffers and dispatches, [`crate::device`]
//! runs those, [`crate::reference`] interprets it in f64.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::{Shape, TensorType};

mod op;

pub use op::{Op, Vjp};

/// One output of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value {
    pub(crate) node: usize,
    pub(crate) output: usize,
}

impl Value {
    /// Index of its node in [`Graph::nodes`].
    pub fn node(self) -> usize {
        self.node
    }

    /// Which of the node's outputs it is.
    pub fn output(self) -> usize {
        self.output
    }
}

/// Where a node's outputs come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Source {
    /// The host writes it before a step.
    Input,
    /// A trained tensor: read by the graph, owned by the caller.
    Param,
    /// A tensor that outlives the step and that [`Graph::store`] may write: gradients, moments.
    State,
    /// Computed.
    Op(Arc<dyn Op>),
}

/// A node: a name, where its outputs come from, what it reads.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique name, with the scopes it was made in: `h.0.attn.q`.
    pub name: String,
    /// Where the outputs come from.
    pub source: Source,
    /// Values that it reads.
    pub inputs: Vec<Value>,
    /// Types of its outputs.
    pub outputs: Vec<TensorType>,
}

/// A graph under construction.
///
/// ```
/// use throughline::{Graph, TensorType};
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([4, 8]))?;
/// let w = g.param("w", [8, 3])?;
/// let y = g.matmul("y", x, w)?;
/// assert_eq!(g.ty(y).shape.dims(), [4, 3]);
/// let err = g.matmul("z", y, w).unwrap_err().to_string();
/// assert!(err.contains("`z`") && err.contains("[4, 3]") && err.contains("[8, 3]"), "{err}");
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    by_name: HashMap<String, usize>,
    scopes: Vec<String>,
    stores: Vec<(Value, Value)>,
    max_tensor_bytes: Option<u64>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// A graph for a device that binds tensors of at most so many bytes: [`nn`](crate::nn) puts larger tables in
    /// parts. [`Gpu::graph`](crate::Gpu::graph) gives one for its device.
    pub fn with_max_tensor_bytes(max: u64) -> Self {
        Graph { max_tensor_bytes: Some(max), ..Self::default() }
    }

    /// The bytes that a tensor may take, as far as the graph knows.
    pub fn max_tensor_bytes(&self) -> u64 {
        self.max_tensor_bytes.unwrap_or(u64::MAX)
    }

    /// A tensor that the host writes before each step.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<Value> {
        self.external(name, Source::Input, ty)
    }

    /// A trained tensor of f32.
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Value> {
        self.external(name, Source::Param, TensorType::f32(shape))
    }

    /// A tensor that outlives a step and that [`store`](Self::store) may write.
    pub fn state(&mut self, name: &str, ty: TensorType) -> Result<Value> {
        self.external(name, Source::State, ty)
    }

    fn external(&mut self, name: &str, source: Source, ty: TensorType) -> Result<Value> {
        if let Some(problem) = ty.shape.problem() {
            return Err(Error::Graph(format!("`{}`: {problem}", self.full_name(name))));
        }
        let name = self.full_name(name);
        ty.shape.check_len(&name)?;
        if self.by_name.contains_key(&name) {
            return Err(Error::Graph(format!("there are two inputs, parameters or states named `{name}`")));
        }
        let node = self.push(Node { name, source, inputs: vec![], outputs: vec![ty] });
        Ok(Value { node, output: 0 })
    }

    /// Adds an op with one output.
    pub fn op1(&mut self, name: &str, op: impl Op, inputs: &[Value]) -> Result<Value> {
        Ok(self.op(name, op, inputs)?[0])
    }

    /// Adds an op and returns its outputs. The name gets the current scopes in front, and a number
    /// behind if it is taken.
    pub fn op(&mut self, name: &str, op: impl Op, inputs: &[Value]) -> Result<Vec<Value>> {
        self.op_arc(name, Arc::new(op), inputs)
    }

    /// [`op`](Self::op) for an op that is already shared.
    pub fn op_arc(&mut self, name: &str, op: Arc<dyn Op>, inputs: &[Value]) -> Result<Vec<Value>> {
        let name = self.full_name(name);
        let err = |message: String, inputs: String| Error::Node { node: name.clone(), op: op.name(), message, inputs };
        if let Some(v) = self.foreign(inputs) {
            return Err(err(format!("{v:?} is not a value of this graph"), "-".into()));
        }
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v).clone()).collect();
        let shown = || types.iter().map(|t| t.to_string()).collect::<Vec<_>>().join(", ");
        let outputs = op.infer(&types).map_err(|message| err(message, shown()))?;
        if let Some(problem) = outputs.iter().find_map(|t| t.shape.problem()) {
            return Err(err(problem, shown()));
        }
        outputs.iter().try_for_each(|t| t.shape.check_len(&name))?;
        let n = outputs.len();
        let name = self.free_name(name);
        let node = self.push(Node { name, source: Source::Op(op), inputs: inputs.to_vec(), outputs });
        Ok((0..n).map(|output| Value { node, output }).collect())
    }

    /// Runs `f` with `scope.` in front of every name.
    pub fn scoped<T>(&mut self, scope: &str, f: impl FnOnce(&mut Graph) -> Result<T>) -> Result<T> {
        self.enter(scope);
        let result = f(self);
        self.leave();
        result
    }

    /// Puts `scope.` in front of every name from here to [`leave`](Self::leave).
    pub(crate) fn enter(&mut self, scope: &str) {
        self.scopes.push(scope.to_string());
    }

    pub(crate) fn leave(&mut self) {
        self.scopes.pop();
    }

    /// Makes each step leave `value` in `state`.
    pub fn store(&mut self, value: Value, state: Value) -> Result<()> {
        self.check_values(&[value, state])?;
        let target = self.node(state.node);
        if !matches!(target.source, Source::State | Source::Param) {
            return Err(Error::Graph(format!("store: `{}` is not a state or parameter", target.name)));
        }
        if self.ty(value) != self.ty(state) {
            return Err(Error::Graph(format!(
                "store: `{}` is {}, but state `{}` is {}",
                self.name(value),
                self.ty(value),
                target.name,
                self.ty(state)
            )));
        }
        if self.stores.iter().any(|&(_, s)| s == state) {
            return Err(Error::Graph(format!("store: `{}` is stored twice", target.name)));
        }
        self.stores.push((value, state));
        Ok(())
    }

    /// All `(value, state)` pairs given to [`store`](Self::store).
    pub fn stores(&self) -> &[(Value, Value)] {
        &self.stores
    }

    /// The first of these values that is not of this graph.
    fn foreign(&self, values: &[Value]) -> Option<Value> {
        let known = |v: &Value| self.nodes.get(v.node).is_some_and(|n| v.output < n.outputs.len());
        values.iter().copied().find(|v| !known(v))
    }

    /// An `Err` if one of the values is not of this graph.
    pub(crate) fn check_values(&self, values: &[Value]) -> Result<()> {
        match self.foreign(values) {
            Some(v) => Err(Error::Graph(format!("{v:?} is not a value of this graph"))),
            None => Ok(()),
        }
    }

    /// Type of a value.
    ///
    /// # Panics
    ///
    /// If the value is of another graph.
    pub fn ty(&self, value: Value) -> &TensorType {
        &self.nodes[value.node].outputs[value.output]
    }

    /// Name of the node that makes a value.
    ///
    /// # Panics
    ///
    /// If the value is of another graph.
    pub fn name(&self, value: Value) -> &str {
        &self.nodes[value.node].name
    }

    /// The first output of the node of this name.
    pub fn find(&self, name: &str) -> Option<Value> {
        self.by_name.get(name).map(|&node| Value { node, output: 0 })
    }

    /// All nodes, in a topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All parameters, in the order in which they were made.
    pub fn params(&self) -> Vec<Value> {
        self.externals(|s| matches!(s, Source::Param))
    }

    pub(crate) fn externals(&self, keep: impl Fn(&Source) -> bool) -> Vec<Value> {
        let ids = (0..self.nodes.len()).filter(|&i| keep(&self.nodes[i].source));
        ids.map(|node| Value { node, output: 0 }).collect()
    }

    pub(crate) fn node(&self, id: usize) -> &Node {
        &self.nodes[id]
    }

    /// Ids of the nodes that `wanted` depends on, in order.
    pub(crate) fn needed(&self, wanted: &[Value]) -> Vec<usize> {
        let mut seen = BTreeSet::new();
        let mut stack: Vec<usize> = wanted.iter().map(|v| v.node).collect();
        while let Some(id) = stack.pop() {
            if seen.insert(id) {
                stack.extend(self.nodes[id].inputs.iter().map(|v| v.node));
            }
        }
        seen.into_iter().collect()
    }

    fn push(&mut self, node: Node) -> usize {
        self.by_name.insert(node.name.clone(), self.nodes.len());
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The name with the current scopes in front.
    pub(crate) fn full_name(&self, name: &str) -> String {
        let mut parts: Vec<&str> = self.scopes.iter().map(String::as_str).collect();
        parts.push(name);
        parts.join(".")
    }

    fn free_name(&self, name: String) -> String {
        let taken = |n: &str| self.by_name.contains_key(n);
        if !taken(&name) {
            return name;
        }
        (2..).map(|i| format!("{name}#{i}")).find(|n| !taken(n)).unwrap_or(name)
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for node in &self.nodes {
            let kind = match &node.source {
                Source::Input => "input",
                Source::Param => "param",
                Source::State => "state",
                Source::Op(op) => op.name(),
            };
            let inputs: Vec<&str> = node.inputs.iter().map(|v| self.name(*v)).collect();
            let types: Vec<String> = node.outputs.iter().map(|t| t.to_string()).collect();
            writeln!(f, "{} = {kind}({}) -> {}", node.name, inputs.join(", "), types.join(", "))?;
        }
        Ok(())
    }
}
