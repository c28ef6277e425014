//! The trait that every op implements, and the context of its gradient.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use super::{Graph, Value};
use crate::array::Array;
use crate::error::{Error, Result};
use crate::kernel::{Elementwise, Gemv, Launch, OnRead, Program};
use crate::tensor::TensorType;

/// A differentiable operation on tensors: shapes, gradient, kernels, and a definition in f64.
///
/// For an op of your own, start with [`Custom`](crate::ops::Custom), which is an op made of closures: with its gradient
/// and its test it takes some forty lines. Implement this trait for what `Custom` lacks: a number of inputs that varies,
/// outputs that [start as](Self::starts_as) an input, additions folded into the op. Only [`name`](Self::name),
/// [`infer`](Self::infer), [`vjp`](Self::vjp), [`launch`](Self::launch) and [`reference`](Self::reference) are required.
///
/// Either is added to a graph by [`Graph::op`], and then planned, fused, tuned and differentiated like the ops of this
/// crate. If the launch and the WGSL disagree, planning fails with the name of the node. What planning cannot see
/// (values, gradients, stray writes and more) is tested by `throughline::check`, behind the feature `check`.
/// `examples/own_op.rs` in the repository is a complete op with a backward kernel, its test, and what it is good for.
///
/// This one has its whole kernel in WGSL. [`Elements`](crate::ops::Elements) would write all but one line of it.
///
/// ```
/// use throughline::kernel::Kernel;
/// use throughline::ops::{Bind, Launch, Op, Program, Vjp};
/// use throughline::reference::Array;
/// use throughline::{Graph, Result, TensorType};
///
/// /// `y = 2 x + 1`.
/// #[derive(Debug)]
/// struct TwicePlusOne;
///
/// const WGSL: &str = "
/// @group(0) @binding(0) var<uniform> n: u32;
/// @group(0) @binding(1) var<storage, read> x: array<f32>;
/// @group(0) @binding(2) var<storage, read_write> y: array<f32>;
///
/// @compute @workgroup_size(64)
/// fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
///            @builtin(local_invocation_index) local: u32) {
///     // A dimension has at most 65,535 workgroups, so `Profile::grid` puts more into several rows.
///     let i = (group.x + group.y * groups.x) * 64u + local;
///     if (i < n) {
///         y[i] = 2.0 * x[i] + 1.0;
///     }
/// }";
///
/// impl Op for TwicePlusOne {
///     fn name(&self) -> &'static str {
///         "twice_plus_one"
///     }
///     fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
///         Ok(inputs.to_vec())
///     }
///     fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
///         let dy = cx.dy0()?;
///         let dx = cx.graph.scale(&cx.name, dy, 2.0)?;
///         cx.set(0, dx);
///         Ok(())
///     }
///     fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
///         let n = cx.outputs[0].len();
///         let kernel = Kernel::new("twice_plus_one", WGSL, "forward");
///         Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &[n as u32], cx.profile.grid(n.div_ceil(64))))
///     }
///     fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
///         vec![inputs[0].map(|x| 2.0 * x + 1.0)]
///     }
/// }
///
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([127]))?;
/// let y = g.op1("y", TwicePlusOne, &[x])?;
/// # Ok::<(), throughline::Error>(())
/// ```
pub trait Op: Any + Debug + Send + Sync {
    /// Name of the kind of op, shown in plans, errors and profiles.
    fn name(&self) -> &'static str;

    /// Types of the outputs, or what is wrong with the inputs. The graph adds the name of the node and the types of its
    /// inputs to the message.
    ///
    /// These are the types that the op computes with. Floats are f32 here, and in WGSL, also where a graph
    /// [stores](Graph::store_as) them in f16: the planner rewrites loads and stores.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Adds the nodes of the vector-Jacobian product: reads `cx.dy`, and calls `cx.set` for each input that `cx.needs`.
    ///
    /// There is no default. An op without a gradient returns [`Vjp::no_gradient`], so that differentiating through it
    /// is an error and not a silent zero.
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()>;

    /// Names of the ways to split up the work on this adapter. [`Launch::variant`] is an index into them.
    ///
    /// The first is used unless a [`Tuner`](crate::Tuner) has measured another to be faster. The default is a single
    /// way.
    fn variants(&self, _cx: &Launch<'_>) -> Vec<String> {
        vec![]
    }

    /// Identifies the op with its settings, in [choices](crate::Choices) that are kept in files.
    ///
    /// The default is the `Debug` output. Implement it if that leaves out a setting on which the fastest variant
    /// depends.
    fn key(&self) -> String {
        format!("{self:?}")
    }

    /// The dispatches that compute the outputs. Pure: no GPU is needed.
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String>;

    /// The outputs in f64: the definition of the op, which kernels are tested against.
    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array>;

    /// Floating-point operations, for the rates in plans and profiles; a multiply-add counts as two. The default is 0,
    /// which is right for ops that only move data.
    fn flops(&self, _inputs: &[TensorType], _outputs: &[TensorType]) -> u64 {
        0
    }

    /// The least number of bytes that must move. By default every input and every output once.
    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        inputs.iter().chain(outputs).map(|t| t.bytes() as u64).sum()
    }

    /// `Some(i)` if the output starts as the contents of input `i`, which the kernel then updates.
    ///
    /// The planner gives both the same buffer if it can prove that nothing else needs the input, and records a copy
    /// otherwise. Such an input is not bound: the kernel reads the output instead.
    fn starts_as(&self, _output: usize) -> Option<usize> {
        None
    }

    /// The op that computes the same, but adds output `output` to one more input, its last. That output then [starts
    /// as](Self::starts_as) that input.
    ///
    /// The planner uses it to fold additions (the residual stream, gradients from several consumers) into the op that
    /// computes the addend.
    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        None
    }

    /// The op that computes the same and, as one more output, its last, the sums of the columns of input `input`: over
    /// all of its dimensions but the last.
    ///
    /// The planner uses it on GPUs where a graph has both, as it does for the weight and the bias of a linear layer: the
    /// op reads that input anyway.
    fn with_column_sums(&self, _input: usize) -> Option<Arc<dyn Op>> {
        None
    }

    /// Whether this is the sum of columns that `with_column_sums` makes needless: of its only input, over all dimensions
    /// but the last.
    fn is_column_sum(&self) -> bool {
        false
    }

    /// Whether this is the addition that `with_addend` folds.
    fn is_addition(&self) -> bool {
        false
    }

    /// The op as a function of single elements, if it is one: of f32 inputs whose shapes
    /// [broadcast](crate::ops::map#broadcasting) to that of its only output.
    ///
    /// The planner then computes it in one kernel with elementwise ops before and after it, as part of a
    /// [`Chain`](crate::ops::map::Chain).
    fn elementwise(&self) -> Option<Elementwise> {
        None
    }

    /// The op as a product of its first input, of few rows, if it is one.
    ///
    /// On GPUs the planner then computes it in one dispatch with other products of that input, as part of
    /// [`Products`](crate::ops::products::Products).
    fn gemv(&self, _inputs: &[TensorType]) -> Option<Gemv> {
        None
    }

    /// The op as a function that another kernel applies to the rows of its first input as it reads them, if it is one.
    ///
    /// On GPUs the planner then leaves it to the products of its result, where those have few rows.
    fn on_read(&self, _inputs: &[TensorType]) -> Option<OnRead> {
        None
    }

    /// The op that computes the same and writes it to a cache, as a [`CacheWrite`](crate::ops::cache::CacheWrite) of its
    /// only output does. It takes two more inputs, the start and the cache, and its output [starts
    /// as](Self::starts_as) the cache.
    ///
    /// On GPUs the planner uses it where nothing else needs the rows. `parts` are this op and the write, for
    /// [`parts`](Self::parts).
    fn written_to_cache(&self, _parts: [Part; 2]) -> Option<Arc<dyn Op>> {
        None
    }

    /// How to compute an output again from what is kept anyway, if that is cheap: much less work than a product of
    /// matrices.
    ///
    /// Plans that [recompute](crate::Plan::recomputing) do so rather than keep the output from forward to backward.
    /// Other outputs are made again, if memory is short, by running the whole op.
    ///
    /// If it is made from another output of the op, and that is stored in f16, the op itself must make it from what it
    /// has stored, too: [`Launch::outputs`] has the types.
    fn recomputed(&self, _output: usize, _inputs: &[TensorType]) -> Option<Recomputed> {
        None
    }

    /// Whether its launch is one dispatch whose invocations each do a little and need no others: it moves elements, or
    /// maps them.
    ///
    /// On GPUs the planner launches such an op together with neighbours that are light, too, and don't depend on it.
    fn is_light(&self) -> bool {
        false
    }

    /// The ops whose work it does, each after those that it is applied to. Empty for all but those that plans make of
    /// several, such as [`Chain`](crate::ops::map::Chain).
    fn parts(&self) -> &[Part] {
        &[]
    }

    /// Which of its [`parts`](Self::parts) an output is the result of.
    fn made_by(&self, _output: usize) -> Option<usize> {
        None
    }

    /// Whether the op is scheduled right after the last of its inputs, wherever it is in the graph. For ops that read
    /// values which are soon overwritten; see [`probe`](crate::probe).
    fn runs_early(&self) -> bool {
        false
    }

    /// Whether the op is scheduled only once something else than a loss needs it, with the ops before it that nothing
    /// else needed until then. What reads its first output, the loss, waits too.
    ///
    /// Where a loss is put together from several, as in [`Graph::cross_entropy_in_chunks`], each of these then comes
    /// right before its gradient, and what the two work on need not outlive them.
    fn runs_late(&self) -> bool {
        false
    }

    /// Which inputs the op takes row by row, if each row of its only output, over all dimensions but the last, comes
    /// from the same row of those inputs and from the others as a whole. Applied to some of the rows, the same op then
    /// makes those rows of the output.
    ///
    /// By default this is known of [elementwise](Self::elementwise) ops.
    fn by_rows(&self, inputs: &[TensorType]) -> Option<Vec<usize>> {
        self.elementwise()?;
        let computed: Vec<TensorType> = inputs.iter().map(TensorType::computed).collect();
        let outputs = self.infer(&computed).ok()?;
        let [y] = &outputs[..] else { return None };
        let is_whole = |x: &TensorType| x.shape.rank() == y.shape.rank() && x.shape.lead() == y.shape.lead();
        let repeats = |x: &TensorType| x.len() == 1 || x.shape.dims() == [y.shape.cols()];
        let known = inputs.iter().all(|x| is_whole(x) || repeats(x));
        known.then(|| (0..inputs.len()).filter(|&i| is_whole(&inputs[i])).collect())
    }

    /// Whether an output is stored in f32 in [mixed precision](crate::Precision), too: because it is a sum or another
    /// statistic that is worth the precision, or because it may exceed what f16 holds, as powers and exponentials do.
    /// Vectors and single numbers stay f32 without this.
    fn stays_f32(&self, _output: usize) -> bool {
        false
    }

    /// Whether the output is the input's storage in another shape, so that no kernel runs.
    fn is_view(&self) -> bool {
        false
    }
}

/// One of the ops whose work another does: the planner computes neighbours in a graph together where that saves
/// dispatches. See [`Op::parts`].
#[derive(Clone, Debug)]
pub struct Part {
    /// Name of its node.
    pub name: String,
    /// The op.
    pub op: Arc<dyn Op>,
    /// What it is applied to.
    pub operands: Vec<Operand>,
}

impl Part {
    pub(crate) fn new(name: &str, op: impl Op, operands: impl IntoIterator<Item = Operand>) -> Self {
        Part { name: name.into(), op: Arc::new(op), operands: operands.into_iter().collect() }
    }

    /// The types of its operands, if the inputs of the whole and the earlier parts have these. The error names the part.
    pub(crate) fn types(&self, inputs: &[TensorType], parts: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let ty = |operand: &Operand| match *operand {
            Operand::Input(i) => inputs.get(i).cloned(),
            Operand::Part(i) => parts.get(i).cloned(),
        };
        let types = self.operands.iter().map(ty).collect::<Option<Vec<_>>>();
        types.ok_or_else(|| format!("`{}` lacks an operand among {} inputs", self.name, inputs.len()))
    }

    /// The first output of each part in f64. `types` has the types of a part's outputs, by its index and operands.
    pub(crate) fn results(
        parts: &[Part],
        inputs: &[&Array],
        types: impl Fn(usize, &[&Array]) -> Vec<TensorType>,
    ) -> Vec<Array> {
        let mut results: Vec<Array> = vec![];
        for (i, part) in parts.iter().enumerate() {
            let operand = |operand: &Operand| match *operand {
                Operand::Input(i) => inputs[i],
                Operand::Part(i) => &results[i],
            };
            let operands: Vec<&Array> = part.operands.iter().map(operand).collect();
            results.extend(part.op.reference(&operands, &types(i, &operands)).into_iter().next());
        }
        results
    }
}

/// What a [`Part`] is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// The input of this index of the whole.
    Input(usize),
    /// The first output of an earlier part, by its index.
    Part(usize),
}

/// A cheap way to compute an output of an op again: see [`Op::recomputed`].
#[derive(Clone, Debug)]
pub struct Recomputed {
    /// An op whose only output is of the same type and has the same bits: the op itself, or one whose kernel does the
    /// last of the same operations.
    pub op: Arc<dyn Op>,
    /// What it is applied to.
    pub from: Vec<Kept>,
}

/// What an output is computed from [again](Recomputed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The op's input of this index.
    Input(usize),
    /// Another of its outputs.
    Output(usize),
}

/// The context of [`Op::vjp`]: the node's values, the cotangents of its outputs, and the graph to add backward nodes
/// to.
#[derive(Debug)]
pub struct Vjp<'a> {
    /// The graph. Name new nodes after [`name`](Self::name).
    pub graph: &'a mut Graph,
    /// Name of the node being differentiated, with the suffix `.grad`.
    pub name: String,
    /// Inputs of the node.
    pub inputs: Vec<Value>,
    /// Outputs of the node.
    pub outputs: Vec<Value>,
    /// Cotangent of each output. `None` if the loss does not depend on that output.
    pub dy: Vec<Option<Value>>,
    pub(crate) op: &'static str,
    pub(crate) needs: Vec<bool>,
    pub(crate) cotangents: Vec<Option<Value>>,
    /// Inputs given to `set_zero`.
    pub(crate) zeros: Vec<usize>,
    /// The first input that `set` was given and that the node does not have.
    pub(crate) no_input: Option<usize>,
}

impl Vjp<'_> {
    /// Whether the gradient of this input is needed. Skip work for those that are not. An input that the node does not
    /// have needs none.
    pub fn needs(&self, input: usize) -> bool {
        self.needs.get(input) == Some(&true)
    }

    /// The cotangent of output 0: the one that ops with a single main output need.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if the loss depends only on side outputs.
    pub fn dy0(&self) -> Result<Value> {
        self.dy.first().copied().flatten().ok_or_else(|| {
            Error::Graph(format!("`{}`: the loss depends only on a side output, which has no gradient", self.name))
        })
    }

    /// The error to return from `vjp` for an op that cannot be differentiated.
    pub fn no_gradient(&self, reason: &'static str) -> Error {
        Error::NoGradient { node: self.name.strip_suffix(".grad").unwrap_or(&self.name).into(), op: self.op, reason }
    }

    /// Sets the gradient of an input. Those that are not needed may be set too, and are ignored.
    ///
    /// [`Graph::gradients`] fails if there is no such input, if the gradient is of another type than the input, or if
    /// one that is needed is never set. Where it is zero, say so by [`set_zero`](Self::set_zero).
    pub fn set(&mut self, input: usize, cotangent: Value) {
        match self.cotangents.get_mut(input) {
            Some(set) => *set = Some(cotangent),
            None => self.no_input = self.no_input.or(Some(input)),
        }
    }

    /// Says that the gradient of an input is zero everywhere, as that of a comparison's operands. No node is added.
    pub fn set_zero(&mut self, input: usize) {
        match input < self.cotangents.len() {
            true => self.zeros.push(input),
            false => self.no_input = self.no_input.or(Some(input)),
        }
    }
}

/// The types of an op's outputs, as it computes them: however floats are stored, ops see f32.
pub(crate) fn infer(op: &dyn Op, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
    let computed: Vec<TensorType> = inputs.iter().map(TensorType::computed).collect();
    op.infer(&computed)
}

/// The types that the outputs of a new node are stored in: an output that starts as an input, or is its storage, as that
/// one.
pub(crate) fn stored(op: &dyn Op, inputs: &[TensorType], mut outputs: Vec<TensorType>) -> Vec<TensorType> {
    for (o, output) in outputs.iter_mut().enumerate() {
        let from = if op.is_view() { Some(0) } else { op.starts_as(o) };
        if let Some(input) = from.and_then(|i| inputs.get(i)).filter(|input| input.computed().dtype == output.dtype) {
            output.dtype = input.dtype;
        }
    }
    outputs
}

/// Whether an op with these inputs and outputs is one that can be planned: it has outputs, and what it says of their
/// storage is possible.
pub(crate) fn check_outputs(op: &dyn Op, inputs: &[TensorType], outputs: &[TensorType]) -> Result<(), String> {
    if outputs.is_empty() {
        return Err("has no outputs: `infer` must give the type of at least one".into());
    }
    if op.is_view() {
        return match (inputs, outputs) {
            ([x, ..], [y]) if x.bytes() == y.bytes() => Ok(()),
            _ => Err("is a view, and so must have one output of as many elements as its first input".into()),
        };
    }
    for (o, output) in outputs.iter().enumerate() {
        let Some(i) = op.starts_as(o) else { continue };
        match inputs.get(i) {
            Some(input) if input.computed().bytes() == output.computed().bytes() => {}
            Some(input) => return Err(format!("output {o}, {output}, cannot start as input {i}, {input}")),
            None => return Err(format!("output {o} starts as input {i}, but the inputs are only {}", inputs.len())),
        }
    }
    Ok(())
}
