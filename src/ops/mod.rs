//! The ops: a trait and a table.
//!
//! An op is two files with the same stem, `src/ops/<op>.rs` and `shaders/<op>.wgsl`, and one row in
//! [`TABLE`]. Tests, benchmarks, shader validation and the generated op table iterate the rows;
//! autodiff, fusion, the planner and the executor call the trait. Nothing else knows which ops
//! there are, so an app's own op works like these.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use crate::autodiff::Vjp;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::profile::Profile;
use crate::reference::Array;
use crate::tensor::TensorType;

pub mod adamw;
pub mod add;
pub mod attention;
pub mod cache;
pub mod concat;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod fill;
pub mod gelu;
pub mod l2_norm;
pub mod matmul;
pub mod mul;
pub mod muon;
pub mod norm;
pub mod packed;
pub mod parts;
pub mod reshape;
pub mod residual_add;
pub mod rope;
pub mod scale;
pub mod slice;
pub mod softmax;
pub mod stats;
pub mod sum;
pub mod swiglu;
pub mod top_k;
pub mod transpose;

mod cases;
mod doc;
mod elementwise;
mod rowwise;
pub use cases::{Case, Fill as InputFill, InputSpec, Row, random_array};
pub use doc::markdown;

/// A differentiable operation on tensors.
///
/// Implement it for an op of your own; [`Graph::op1`](crate::Graph::op1) adds it to a graph, where nothing sets it apart
/// from the ops of this crate. Where its launch and its WGSL disagree, planning fails with the name of the node. What
/// the compiler can't see, `throughline::check` (feature `check`) tests: values, gradients, stray writes and more.
/// `examples/own_op.rs` is a whole op with a backward kernel, its test and a network that trains with it.
///
/// ```
/// use throughline::autodiff::Vjp;
/// use throughline::kernel::Kernel;
/// use throughline::ops::{Bind, Launch, Op, Program};
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
    /// Name of the kind of op, as in plans, errors and profiles.
    fn name(&self) -> &'static str;

    /// Types of the outputs, or what is wrong with the inputs. The graph adds the node's name and
    /// the types that came.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Adds the nodes of the vector-Jacobian product: reads `cx.dy`, calls `cx.set` for each input
    /// that `cx.needs`. There is no default: an op without a gradient returns
    /// [`Vjp::no_gradient`], so that differentiating through it is an error and not a silent zero.
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()>;

    /// Ways to cut the work on this adapter, by name: `cx.variant` of [`launch`](Self::launch) is an
    /// index into them. The first is the one to take unmeasured; a tuner tries them all. By default
    /// there is one way.
    fn variants(&self, _cx: &Launch<'_>) -> Vec<String> {
        vec![]
    }

    /// The dispatches that compute the outputs. Pure: no GPU is needed.
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String>;

    /// The outputs in f64: the definition of the op.
    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array>;

    /// Floating-point operations (a multiply-add is two), for the rates in plans and profiles. By default 0, as for ops
    /// that only move data: they have no such rate.
    fn flops(&self, _inputs: &[TensorType], _outputs: &[TensorType]) -> u64 {
        0
    }

    /// Bytes that must move at least: by default every input once and every output once.
    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        inputs.iter().chain(outputs).map(|t| t.bytes() as u64).sum()
    }

    /// `Some(i)` if the output starts as the contents of input `i`, which the kernel then updates.
    /// The planner gives both the same buffer where it can prove that nobody else needs the input,
    /// and records a copy where it cannot. Such an input is not bound: kernels read the output.
    fn starts_as(&self, _output: usize) -> Option<usize> {
        None
    }

    /// The op that computes the same, but adds output `output` to one more, last, input. That
    /// output then [starts as](Self::starts_as) that input. Lets the planner fold additions (the
    /// residual stream, gradients from several consumers) into whoever makes the addend.
    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        None
    }

    /// True for the addition that `with_addend` folds.
    fn is_addition(&self) -> bool {
        false
    }

    /// True for an op that is planned right behind the last of its inputs, wherever in the graph it stands: one
    /// that looks at values that are soon overwritten. See [`probe`](crate::probe).
    fn runs_early(&self) -> bool {
        false
    }

    /// True if the output is the input's storage under another shape: no kernel runs.
    fn is_view(&self) -> bool {
        false
    }
}

/// What a launch is made for.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Types of the inputs.
    pub inputs: &'a [TensorType],
    /// Types of the outputs.
    pub outputs: &'a [TensorType],
    /// The adapter.
    pub profile: &'a Profile,
    /// Which of the op's [`variants`](Op::variants).
    pub variant: usize,
}

/// What a binding of a dispatch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// The op's input of this index, read only.
    In(usize),
    /// The op's output of this index, read and write.
    Out(usize),
    /// Scratch of this index, read and write.
    Scratch(usize),
    /// Scratch of this index, read only.
    ScratchIn(usize),
    /// The op's output of this index, written by an earlier dispatch of this program and now read
    /// only.
    OutIn(usize),
    /// A read-only binding that the entry point mentions but that this launch's knobs make dead. (A
    /// binding that the entry point does not mention must not be listed: number bindings without
    /// gaps for each entry point.)
    Null,
}

/// One dispatch: a kernel, its storage bindings (1, 2, ... of group 0), the words of the uniform at
/// binding 0, and how many workgroups.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    /// The kernel.
    pub kernel: Kernel,
    /// Storage bindings from binding 1.
    pub binds: Vec<Bind>,
    /// The uniform `p` at binding 0, as 32-bit words.
    pub words: Vec<u32>,
    /// Workgroups in x, y, z.
    pub workgroups: [u32; 3],
}

/// The dispatches of an op, in order, and the scratch memory that they share.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Program {
    /// In order; each sees what the ones before wrote.
    pub dispatches: Vec<Dispatch>,
    /// Types of the scratch tensors.
    pub scratch: Vec<TensorType>,
}

impl Program {
    /// A program of one dispatch.
    pub fn one(kernel: Kernel, binds: &[Bind], words: &[u32], workgroups: [u32; 3]) -> Self {
        let mut program = Program::default();
        program.dispatch(kernel, binds, words, workgroups);
        program
    }

    /// Adds a dispatch.
    pub fn dispatch(&mut self, kernel: Kernel, binds: &[Bind], words: &[u32], workgroups: [u32; 3]) {
        self.dispatches.push(Dispatch { kernel, binds: binds.to_vec(), words: words.to_vec(), workgroups });
    }

    /// Adds a scratch tensor, for `Bind::Scratch` and `Bind::ScratchIn`.
    pub fn scratch(&mut self, ty: TensorType) -> usize {
        self.scratch.push(ty);
        self.scratch.len() - 1
    }
}

/// The text of a WGSL file behind `shaders/common/subgroups.wgsl`, or its stand-in.
#[derive(Clone, Copy)]
pub(crate) struct LaneSource {
    /// For devices without subgroup operations.
    pub plain: &'static str,
    /// For those with.
    pub subgroups: &'static str,
}

impl LaneSource {
    /// The one or the other.
    pub fn text(&self, subgroups: bool) -> &'static str {
        if subgroups { self.subgroups } else { self.plain }
    }
}

macro_rules! lane_source {
    ($($file:literal),+) => {
        $crate::ops::LaneSource {
            plain: concat!(
                include_str!("../../shaders/common/no_subgroups.wgsl"),
                $(include_str!(concat!("../../shaders/", $file))),+
            ),
            subgroups: concat!(
                include_str!("../../shaders/common/subgroups.wgsl"),
                $(include_str!(concat!("../../shaders/", $file))),+
            ),
        }
    };
}
pub(crate) use lane_source;

/// A kernel of the table. These run without injected bounds checks; see `Gpu::compile` for why
/// that is sound.
pub(crate) fn table_kernel(label: &'static str, source: &'static str, entry: &'static str) -> Kernel {
    Kernel { trusted: true, ..Kernel::new(label, source, entry) }
}

/// Checks that an op got `n` inputs of f32.
pub(crate) fn expect_f32(inputs: &[TensorType], n: usize) -> Result<(), String> {
    if inputs.len() != n {
        return Err(format!("takes {n} inputs, got {}", inputs.len()));
    }
    match inputs.iter().position(|t| t.dtype != crate::tensor::DType::F32) {
        Some(i) => Err(format!("input {i} must be f32")),
        None => Ok(()),
    }
}

/// Checks that an input has the shape expected.
pub(crate) fn expect_shape(what: &str, ty: &TensorType, dims: &[usize]) -> Result<(), String> {
    match ty.shape.dims() == dims {
        true => Ok(()),
        false => Err(format!("{what} must have shape {dims:?}, got {}", ty.shape)),
    }
}

/// Every op with a kernel, or a gradient that needs one. See [`Row`].
pub const TABLE: &[Row] = &[
    adamw::ROW,
    add::ROW,
    attention::ROW,
    cache::ROW,
    concat::ROW,
    cross_entropy::ROW,
    dropout::ROW,
    embedding::ROW,
    fill::ROW,
    gelu::ROW,
    l2_norm::ROW,
    matmul::ROW,
    mul::ROW,
    muon::ROW,
    norm::LAYERNORM,
    norm::RMSNORM,
    packed::ROW,
    residual_add::ROW,
    rope::ROW,
    scale::ROW,
    slice::ROW,
    softmax::ROW,
    stats::ROW,
    sum::ROW,
    swiglu::ROW,
    top_k::ROW,
    transpose::ROW,
];
