//! The graph builder: named nodes with checked shapes.
//!
//! Start every computation here: add inputs, parameters and ops to a [`Graph`]. [`nn`](crate::nn) does so for whole
//! transformers. A graph is a list of nodes in the order in which they were added, which is a topological order. It
//! owns no GPU memory. [`crate::plan`] turns it into buffers and dispatches, [`crate::device`] runs those, and
//! [`crate::reference`] interprets it in f64.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, TensorType};

mod init;
mod op;
mod value;

pub use init::ParamInit;
pub use op::{Kept, Op, Operand, Part, Recomputed, Vjp};
pub(crate) use op::{check_outputs, infer};
use value::Lineage;
pub(crate) use value::Names;
pub use value::Value;

/// The origin of a node's outputs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Source {
    /// Written by the host before a step.
    Input,
    /// A trained tensor, and how it is initialised, if the graph says so.
    Param(Option<ParamInit>),
    /// A tensor that outlives the step and that [`Graph::store`] may write: gradients, moments.
    State,
    /// Computed by an op.
    Op(Arc<dyn Op>),
}

/// A node: its name, its origin, its inputs and the types of its outputs.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique name, including the scopes that it was added in: `h.0.attn.q`.
    pub name: String,
    /// The origin of the outputs.
    pub source: Source,
    /// The values that it reads.
    pub inputs: Vec<Value>,
    /// Types of its outputs.
    pub outputs: Vec<TensorType>,
}

impl Node {
    /// The op that computes it, if one does.
    pub(crate) fn op(&self) -> Option<&Arc<dyn Op>> {
        match &self.source {
            Source::Op(op) => Some(op),
            _ => None,
        }
    }
}

/// A graph of tensor operations, under construction.
///
/// Every method that adds a node takes a name and checks shapes at once, so an error names the node that is wrong.
/// Inputs, parameters and states get their data at run time.
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
#[derive(Debug)]
pub struct Graph {
    lineage: Lineage,
    nodes: Vec<Node>,
    by_name: HashMap<String, usize>,
    scopes: Vec<String>,
    stores: Vec<(Value, Value)>,
    step_seed: Option<Value>,
    max_tensor_bytes: Option<u64>,
}

impl Default for Graph {
    fn default() -> Self {
        let (nodes, by_name, scopes, stores) = Default::default();
        let lineage = Lineage::new();
        Graph { lineage, nodes, by_name, scopes, stores, step_seed: None, max_tensor_bytes: None }
    }
}

impl Clone for Graph {
    /// A separate graph. Values that the original has so far belong to both; see [`Value`].
    fn clone(&self) -> Self {
        Graph {
            lineage: self.lineage.cloned_at(self.nodes.len()),
            nodes: self.nodes.clone(),
            by_name: self.by_name.clone(),
            scopes: self.scopes.clone(),
            stores: self.stores.clone(),
            step_seed: self.step_seed,
            max_tensor_bytes: self.max_tensor_bytes,
        }
    }
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number by which messages refer to this graph: 1 for the first in the process, and so on.
    pub fn id(&self) -> u32 {
        self.lineage.id()
    }

    /// A graph for a device that binds tensors of at most this many bytes: [`nn`](crate::nn) splits larger tables into
    /// parts. [`Gpu::graph`](crate::Gpu::graph) returns one for its device.
    pub fn with_max_tensor_bytes(max: u64) -> Self {
        Graph { max_tensor_bytes: Some(max), ..Self::default() }
    }

    /// The most bytes that a tensor may take; `u64::MAX` if no limit was set.
    pub fn max_tensor_bytes(&self) -> u64 {
        self.max_tensor_bytes.unwrap_or(u64::MAX)
    }

    /// Adds a tensor that the host writes before a step: data, token ids, settings. A step before the first write is an
    /// error.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<Value> {
        self.external(name, Source::Input, ty)
    }

    /// Adds a trained f32 tensor whose values come from elsewhere: a file, another executable, the host. A step before
    /// they are set is an error. To start from random values, use [`param_with`](Self::param_with).
    ///
    /// Differentiate with respect to it with [`gradients`](Self::gradients).
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Value> {
        self.external(name, Source::Param(None), TensorType::f32(shape))
    }

    /// Adds a trained f32 tensor that starts from these values, unless it is bound to a tensor that has some already.
    ///
    /// ```
    /// use throughline::Graph;
    /// use throughline::graph::ParamInit;
    /// let mut g = Graph::new();
    /// let w = g.param_with("w", [64, 3], ParamInit::fan_in(64))?;
    /// let bias = g.param_with("bias", [3], ParamInit::ZEROS)?;
    /// assert_eq!(g.init(bias), Some(ParamInit::ZEROS));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn param_with(&mut self, name: &str, shape: impl Into<Shape>, init: ParamInit) -> Result<Value> {
        init.check(&self.full_name(name))?;
        self.external(name, Source::Param(Some(init)), TensorType::f32(shape))
    }

    /// The initialisation of a parameter. `None` if it has none, or is no parameter of this graph.
    pub fn init(&self, param: Value) -> Option<ParamInit> {
        match self.nodes.get(param.node()).filter(|_| self.contains(param))?.source {
            Source::Param(init) => init,
            _ => None,
        }
    }

    /// The values that a parameter starts from, for this seed. `None` if [`init`](Self::init) is.
    pub fn initial_values(&self, param: Value, seed: u64) -> Option<Vec<f32>> {
        Some(self.init(param)?.values(self.ty(param).len(), seed, self.name(param)))
    }

    /// The input `step_seed`, u32 `[2]`: a seed and the number of the step, from which [`dropout`](Self::dropout) draws.
    /// Added on the first call, outside of all scopes. Trainers write it before each step.
    pub fn step_seed(&mut self) -> Result<Value> {
        if let Some(seed) = self.step_seed {
            return Ok(seed);
        }
        let scopes = std::mem::take(&mut self.scopes);
        let seed = self.input("step_seed", TensorType::u32([2]));
        self.scopes = scopes;
        self.step_seed = Some(seed?);
        self.step_seed()
    }

    /// What [`step_seed`](Self::step_seed) has added, if it was called.
    pub fn find_step_seed(&self) -> Option<Value> {
        self.step_seed
    }

    /// Adds a tensor that outlives a step and that [`store`](Self::store) may write: caches, moments, outputs in
    /// buffers of your own.
    pub fn state(&mut self, name: &str, ty: TensorType) -> Result<Value> {
        self.external(name, Source::State, ty)
    }

    fn external(&mut self, name: &str, source: Source, ty: TensorType) -> Result<Value> {
        if let Some(problem) = ty.shape.problem() {
            return Err(Error::Graph(format!("`{}`: {problem}", self.full_name(name))));
        }
        let name = self.full_name(name);
        if name.split('.').any(str::is_empty) {
            return Err(Error::Graph(format!(
                "`{name}` is no name: inputs, parameters and states need one, and so do layers that have parameters, as \
                 files and other graphs find them by it"
            )));
        }
        ty.shape.check_len(&name)?;
        if self.by_name.contains_key(&name) {
            return Err(Error::Graph(format!(
                "there are two inputs, parameters or states named `{name}`: give one another name, or put it in \
                 `Graph::scoped`"
            )));
        }
        let node = self.push(Node { name, source, inputs: vec![], outputs: vec![ty] });
        Ok(self.value(node, 0))
    }

    /// Adds an op with a single output and returns that.
    pub fn op1(&mut self, name: &str, op: impl Op, inputs: &[Value]) -> Result<Value> {
        Ok(self.op(name, op, inputs)?[0])
    }

    /// Adds an op and returns its outputs.
    ///
    /// The methods named after ops, such as [`matmul`](Self::matmul), call this one. Use it for ops of your own and for
    /// side outputs. The current scopes are prepended to the name, and a number is appended if the name is taken. An empty
    /// name stands for that of the op, and `.part` for `part`: so methods that add several nodes work without a name.
    ///
    /// # Errors
    ///
    /// [`Error::Node`] if the op rejects the types of the inputs.
    pub fn op(&mut self, name: &str, op: impl Op, inputs: &[Value]) -> Result<Vec<Value>> {
        self.op_arc(name, Arc::new(op), inputs)
    }

    /// [`op`](Self::op) for an op that is shared already.
    pub fn op_arc(&mut self, name: &str, op: Arc<dyn Op>, inputs: &[Value]) -> Result<Vec<Value>> {
        let name = self.full_name(match name.trim_start_matches('.') {
            "" => op.name(),
            name => name,
        });
        if let Some(message) = self.foreign(inputs, |i| format!("input {i}")) {
            let shown = inputs.iter().map(|&v| self.get(v).map_or("?".into(), |ty| ty.to_string()));
            return Err(Error::node(&name, op.name(), message, shown));
        }
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v).clone()).collect();
        let err = |message| Error::node(&name, op.name(), message, &types);
        let outputs = op::stored(op.as_ref(), &types, op::infer(op.as_ref(), &types).map_err(err)?);
        if let Some(problem) = outputs.iter().find_map(|t| t.shape.problem()) {
            return Err(err(problem));
        }
        check_outputs(op.as_ref(), &types, &outputs).map_err(err)?;
        outputs.iter().try_for_each(|t| t.shape.check_len(&name))?;
        let n = outputs.len();
        let name = self.free_name(name);
        let node = self.push(Node { name, source: Source::Op(op), inputs: inputs.to_vec(), outputs });
        Ok((0..n).map(|output| self.value(node, output)).collect())
    }

    /// Stores a value that an op computes as this type of floats. Its shapes and gradients stay the same, and so does what
    /// kernels do, which compute in f32: they convert as they store it and as they load it.
    ///
    /// Results are f32 unless you say otherwise, or they take the place of a tensor that is not. Use f16 for large
    /// tensors that are written and read again: it halves their memory and traffic, for 11 bits of precision and values
    /// up to 65504. To convert an input or parameter, there is [`cast`](Self::cast).
    ///
    /// ```
    /// use throughline::{AdapterClass, DType, Graph, Plan, Profile, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([64, 256]))?;
    /// let up = g.param("up", [256, 1024])?;
    /// let wide = g.matmul("wide", x, up)?;
    /// g.store_as(wide, DType::F16)?;
    /// assert_eq!(g.ty(wide).to_string(), "f16[64, 1024]");
    /// let down = g.param("down", [1024, 256])?;
    /// let y = g.matmul("y", wide, down)?; // f32 again
    /// let plan = Plan::new(&g, &[y], &Profile::portable(AdapterClass::Gpu))?;
    /// assert_eq!(plan.buffers()[0].bytes, 2 * 64 * 1024);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if the value is no float, is not computed by an op, is the storage of another value in a new
    /// shape, or is to be left in a state of another type.
    pub fn store_as(&mut self, value: Value, dtype: DType) -> Result<()> {
        self.check_values(&[value], |_| "store_as: the value".into())?;
        let (node, ty) = (self.node(value.node()), self.ty(value));
        let problem = match &node.source {
            _ if !ty.dtype.is_float() || !dtype.is_float() => Some("only floats are stored as other floats"),
            Source::Op(op) if op.is_view() => Some("it has the storage of its input: store that"),
            Source::Op(_) => None,
            _ => Some("only what an op computes is: give it this type as you add it, or use `Graph::cast`"),
        };
        if let Some(problem) = problem {
            return Err(Error::Graph(format!("`{}`, {ty}, cannot be stored as {dtype}: {problem}", node.name)));
        }
        let shared = self.sharing(value);
        if let Some(&(_, state)) = self.stores.iter().find(|(v, s)| shared.contains(v) && self.ty(*s).dtype != dtype) {
            let (name, state) = (&node.name, self.name(state));
            return Err(Error::Graph(format!(
                "`{name}` cannot be stored as {dtype}: a step leaves it in `{state}`, which is {}",
                ty.dtype
            )));
        }
        self.set_dtype(value, dtype);
        Ok(())
    }

    /// The value, and all views that share its storage.
    fn sharing(&self, value: Value) -> Vec<Value> {
        let mut shared = vec![value];
        for id in value.node() + 1..self.nodes.len() {
            let node = &self.nodes[id];
            let is_view = node.op().is_some_and(|op| op.is_view());
            if is_view && node.inputs.first().is_some_and(|input| shared.contains(input)) {
                shared.push(self.value(id, 0));
            }
        }
        shared
    }

    /// Sets the type of a value, and of all that shares its storage.
    pub(crate) fn set_dtype(&mut self, value: Value, dtype: DType) {
        for value in self.sharing(value) {
            self.nodes[value.node()].outputs[value.output()].dtype = dtype;
        }
    }

    /// Runs `f` with `scope.` prepended to every name.
    pub fn scoped<T>(&mut self, scope: &str, f: impl FnOnce(&mut Graph) -> Result<T>) -> Result<T> {
        self.enter(scope);
        let result = f(self);
        self.leave();
        result
    }

    /// Prepends `scope.` to every name from here to [`leave`](Self::leave).
    pub(crate) fn enter(&mut self, scope: &str) {
        self.scopes.push(scope.to_string());
    }

    pub(crate) fn leave(&mut self) {
        self.scopes.pop();
    }

    /// Makes each step leave `value` in `state`, a state or parameter of the same type. In place where possible: a step
    /// then costs no copy.
    ///
    /// States are for what the next step needs, such as caches, and for outputs in buffers of your own. To store to a
    /// parameter is a training step in the graph itself: for updates of your own, or a network with a few parameters.
    ///
    /// ```
    /// use throughline::graph::ParamInit;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([16, 4]))?;
    /// let w = g.param_with("w", [4, 1], ParamInit::fan_in(4))?;
    /// let y = g.matmul("y", x, w)?;
    /// let loss = g.sum("loss", y)?;
    ///
    /// let gradient = g.gradients(loss, &[w])?[0];
    /// let step = g.scale("step", gradient, -0.1)?; // gradient descent
    /// let moved = g.add("moved", w, step)?;
    /// g.store(moved, w)?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if the types differ, `state` is neither a state nor a parameter, or something is stored there
    /// already.
    pub fn store(&mut self, value: Value, state: Value) -> Result<()> {
        self.check_values(&[value, state], |i| ["store: the value", "store: the state"][i].into())?;
        let target = self.node(state.node());
        if !matches!(target.source, Source::State | Source::Param(_)) {
            return Err(Error::Graph(format!(
                "store: `{}` is not a state or parameter: make one with `Graph::state`",
                target.name
            )));
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
            return Err(Error::Graph(format!(
                "store: something is stored in `{}` already: a step can leave one value in it",
                target.name
            )));
        }
        self.stores.push((value, state));
        Ok(())
    }

    /// All `(value, state)` pairs given to [`store`](Self::store).
    pub fn stores(&self) -> &[(Value, Value)] {
        &self.stores
    }

    /// What is wrong if one of the values belongs to another graph. `role` describes the value at an index.
    fn foreign(&self, values: &[Value], role: impl Fn(usize) -> String) -> Option<String> {
        let i = values.iter().position(|&v| !self.contains(v))?;
        Some(format!("{} is {}", role(i), self.not_ours(values[i])))
    }

    fn not_ours(&self, value: Value) -> String {
        let ends = match &self.nodes[..] {
            [] => "which is empty".into(),
            [only] => format!("which has one node, `{}`", only.name),
            [first, .., last] => format!("`{}` to `{}`", first.name, last.name),
        };
        format!("not a value of this graph: it is {value:?}, and this is graph {}, {ends}", self.id())
    }

    /// Returns an error if one of the values belongs to another graph. `role` describes the value at an index.
    pub(crate) fn check_values(&self, values: &[Value], role: impl Fn(usize) -> String) -> Result<()> {
        self.foreign(values, role).map_or(Ok(()), |message| Err(Error::Graph(message)))
    }

    /// Whether a value belongs to this graph.
    pub fn contains(&self, value: Value) -> bool {
        self.get(value).is_some()
    }

    /// Type of a value, if it belongs to this graph.
    fn get(&self, value: Value) -> Option<&TensorType> {
        let node = self.nodes.get(value.node()).filter(|_| self.lineage.made(value))?;
        node.outputs.get(value.output())
    }

    /// [`ty`](Self::ty), or an error with the name of the node that was to read the value.
    pub(crate) fn type_of(&self, reader: &str, value: Value) -> Result<&TensorType> {
        let foreign = || Error::Graph(format!("an input of `{}` is {}", self.full_name(reader), self.not_ours(value)));
        self.get(value).ok_or_else(foreign)
    }

    /// Type of a value.
    ///
    /// # Panics
    ///
    /// If the value belongs to another graph: see [`contains`](Self::contains).
    #[track_caller]
    pub fn ty(&self, value: Value) -> &TensorType {
        match self.get(value) {
            Some(ty) => ty,
            None => panic!("{}", self.not_ours(value)),
        }
    }

    /// Name of the node that computes a value.
    ///
    /// # Panics
    ///
    /// If the value belongs to another graph: see [`contains`](Self::contains).
    #[track_caller]
    pub fn name(&self, value: Value) -> &str {
        assert!(self.contains(value), "{}", self.not_ours(value));
        &self.nodes[value.node()].name
    }

    /// Names of all nodes.
    pub(crate) fn names(&self) -> Names {
        Names { lineage: self.lineage.clone(), nodes: self.nodes.iter().map(|node| node.name.clone()).collect() }
    }

    /// An output of a node of this graph.
    pub(crate) fn value(&self, node: usize, output: usize) -> Value {
        self.lineage.value(node, output)
    }

    /// The first output of the node of this name, scopes included.
    pub fn find(&self, name: &str) -> Option<Value> {
        self.by_name.get(name).map(|&node| self.value(node, 0))
    }

    /// All nodes, in a topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All parameters, in the order in which they were added.
    pub fn params(&self) -> Vec<Value> {
        self.externals(|s| matches!(s, Source::Param(_)))
    }

    pub(crate) fn externals(&self, keep: impl Fn(&Source) -> bool) -> Vec<Value> {
        let ids = (0..self.nodes.len()).filter(|&i| keep(&self.nodes[i].source));
        ids.map(|node| self.value(node, 0)).collect()
    }

    pub(crate) fn node(&self, id: usize) -> &Node {
        &self.nodes[id]
    }

    /// Ids of the nodes that `wanted` depends on, in order.
    pub(crate) fn needed(&self, wanted: &[Value]) -> Vec<usize> {
        let mut seen = BTreeSet::new();
        let mut stack: Vec<usize> = wanted.iter().map(|v| v.node()).collect();
        while let Some(id) = stack.pop() {
            if seen.insert(id) {
                stack.extend(self.nodes[id].inputs.iter().map(|v| v.node()));
            }
        }
        seen.into_iter().collect()
    }

    fn push(&mut self, node: Node) -> usize {
        self.by_name.insert(node.name.clone(), self.nodes.len());
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The name with the current scopes prepended.
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
                Source::Param(_) => "param",
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
