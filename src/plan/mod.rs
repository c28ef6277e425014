//! The plan of a step: buffers and dispatches as data, made before anything is allocated.
//!
//! [`Plan::new`] turns a graph into a plan, and an [`Executable`](crate::Executable) runs it. Print a plan to see what
//! a step will do and how much memory it takes. No device is needed: [`Requirements`](crate::Requirements) derives the
//! limits that a device must offer.
//!
//! A [`Plan`] can be read but not edited, and only [`Plan::new`] makes one: an [`Executable`](crate::Executable) runs
//! the kernels of the op table without bounds checks, so what a plan tells them must be what the planner has checked.
//!
//! ```
//! # #![forbid(unsafe_code)]
//! use throughline::{AdapterClass, Graph, Plan, Profile, TensorType};
//! let mut g = Graph::new();
//! let x = g.input("x", TensorType::f32([64]))?;
//! let y = g.gelu("y", x)?;
//! let plan = Plan::new(&g, &[y], &Profile::portable(AdapterClass::Gpu))?;
//! let dispatch = &plan.steps()[0].dispatches()[0];
//! println!("{} words, {:?} workgroups", dispatch.words().len(), dispatch.workgroups());
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! None of these compiles:
//!
//! ```compile_fail,E0616
//! # #![forbid(unsafe_code)]
//! fn longer(plan: &mut throughline::Plan) {
//!     plan.steps.clear();
//! }
//! ```
//!
//! ```compile_fail,E0616
//! # #![forbid(unsafe_code)]
//! fn longer(dispatch: &mut throughline::plan::PlannedDispatch) {
//!     dispatch.words[0] = 1 << 20;
//! }
//! ```
//!
//! ```compile_fail,E0616
//! # #![forbid(unsafe_code)]
//! fn larger(dispatch: &mut throughline::plan::PlannedDispatch) {
//!     dispatch.binds[0].as_mut().unwrap().bytes = 1 << 20;
//! }
//! ```
//!
//! ```compile_fail,E0616
//! # #![forbid(unsafe_code)]
//! fn more(dispatch: &mut throughline::plan::PlannedDispatch) {
//!     dispatch.workgroups = [1 << 10; 3];
//! }
//! ```
//!
//! Four words for what a kernel reads and writes, from the op to the device:
//!
//! - [`Bind`](crate::kernel::Bind): a binding as an op's program has it, an input or output of that op.
//! - [`BoundSlot`]: the same in a plan: a [`Slot`], which is where a value lives, and how much of it is bound.
//! - [`Bound`](crate::kernel::Bound): what became of a binding on a device that binds fewer than the kernel has.
//! - `bindings::Binding`: what the planner weighs to choose that, bytes and the cost of copies.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result, joined};
use crate::graph::{Names, Op, Part, Source, Value};
use crate::kernel::Kernel;
use crate::profile::Lanes;
use crate::tensor::TensorType;

mod bindings;
mod chains;
mod declared;
mod fuse;
mod order;
mod planner;
mod products;
mod recompute;
pub(crate) mod requirements;
mod together;
mod uses;
pub mod variants;

/// Where a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// A buffer of the plan, by index.
    Buffer(usize),
    /// An input, parameter or state, by index into [`Plan::externals`].
    External(usize),
}

/// A tensor that outlives the step: an input, a parameter or a state.
#[derive(Clone, Debug)]
pub struct External {
    /// Name of the node.
    pub name: String,
    /// The value in the graph.
    pub value: Value,
    /// Its type.
    pub ty: TensorType,
    /// Whether it is an input, a parameter or a state.
    pub source: Source,
    /// Whether a step writes it.
    pub written: bool,
}

/// A buffer that the plan shares between values whose lifetimes do not overlap.
#[derive(Clone, Debug)]
pub struct BufferSpec {
    /// Size in bytes: that of the largest value in it.
    pub bytes: usize,
    /// Names of the values in it, in order of time.
    pub values: Vec<String>,
}

/// A copy between two slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferCopy {
    /// Source.
    pub from: Slot,
    /// First byte in the source.
    pub from_offset: usize,
    /// Destination.
    pub to: Slot,
    /// First byte in the destination.
    pub to_offset: usize,
    /// Number of bytes.
    pub bytes: usize,
}

impl BufferCopy {
    /// A copy from the start of one slot to the start of another.
    pub fn whole(from: Slot, to: Slot, bytes: usize) -> Self {
        BufferCopy { from, from_offset: 0, to, to_offset: 0, bytes }
    }
}

/// What a binding of a dispatch covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoundSlot {
    /// Where the tensor lives.
    pub slot: Slot,
    /// Bytes of it, from its start.
    pub bytes: usize,
    /// Whether the kernel writes it.
    pub writes: bool,
}

/// A dispatch with its bindings resolved.
#[derive(Clone, Debug)]
pub struct PlannedDispatch {
    pub(crate) kernel: Kernel,
    pub(crate) binds: Vec<Option<BoundSlot>>,
    pub(crate) words: Vec<u32>,
    pub(crate) ranges: Vec<u32>,
    pub(crate) copies_in: Vec<BufferCopy>,
    pub(crate) copies_out: Vec<BufferCopy>,
    pub(crate) workgroups: [u32; 3],
}

impl PlannedDispatch {
    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// What bindings 1, 2, ... cover; `None` is unused.
    pub fn binds(&self) -> &[Option<BoundSlot>] {
        &self.binds
    }

    /// Words of the uniform at binding 0.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Words of the uniform that follows the last of `binds`, if any: where the ranges of bindings that were merged
    /// start, and their last indices. See [`Profile::max_storage_buffers`](crate::Profile::max_storage_buffers).
    pub fn ranges(&self) -> &[u32] {
        &self.ranges
    }

    /// Copies into buffers of merged bindings, before the dispatch.
    pub fn copies_in(&self) -> &[BufferCopy] {
        &self.copies_in
    }

    /// Copies out of them, made after it.
    pub fn copies_out(&self) -> &[BufferCopy] {
        &self.copies_out
    }

    /// Workgroups in x, y, z.
    pub fn workgroups(&self) -> [u32; 3] {
        self.workgroups
    }
}

/// The work of one node.
#[derive(Clone, Debug)]
pub struct Step {
    pub(crate) name: String,
    pub(crate) op: Arc<dyn Op>,
    pub(crate) inputs: Vec<(Slot, TensorType)>,
    pub(crate) starts_as: Vec<Option<usize>>,
    pub(crate) copies: Vec<BufferCopy>,
    pub(crate) dispatches: Vec<PlannedDispatch>,
    pub(crate) outputs: Vec<(Slot, TensorType)>,
    pub(crate) flops: u64,
    pub(crate) bytes: u64,
}

impl Step {
    /// Name of the node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ops whose work its kernels do, if they are several, such as a [chain](crate::ops::map::Chain) of elementwise
    /// ones; else none.
    pub fn parts(&self) -> &[Part] {
        self.op.parts()
    }

    /// Names of the other nodes that it computes: all but the last one's, which is its own.
    pub fn others(&self) -> Vec<&str> {
        let parts = self.parts();
        parts[..parts.len().saturating_sub(1)].iter().map(|part| part.name.as_str()).collect()
    }

    /// Its op.
    pub fn op(&self) -> &Arc<dyn Op> {
        &self.op
    }

    /// The places of its inputs before the copies, and their types.
    pub fn inputs(&self) -> &[(Slot, TensorType)] {
        &self.inputs
    }

    /// For each output the input that it starts as, if any.
    pub fn starts_as(&self) -> &[Option<usize>] {
        &self.starts_as
    }

    /// Copies to make before the dispatches.
    pub fn copies(&self) -> &[BufferCopy] {
        &self.copies
    }

    /// Dispatches, in order.
    pub fn dispatches(&self) -> &[PlannedDispatch] {
        &self.dispatches
    }

    /// The places of the outputs, and their types.
    pub fn outputs(&self) -> &[(Slot, TensorType)] {
        &self.outputs
    }

    /// Floating-point operations.
    pub fn flops(&self) -> u64 {
        self.flops
    }

    /// The least number of bytes that must move.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The share of each dispatch in the work, by its workgroups.
    pub(crate) fn shares(&self) -> impl Iterator<Item = f64> {
        let groups = |d: &PlannedDispatch| d.workgroups.iter().map(|&n| f64::from(n)).product::<f64>();
        let all: f64 = self.dispatches.iter().map(groups).sum();
        self.dispatches.iter().map(move |d| groups(d) / all)
    }
}

/// A planned graph: the work of a step in order, and the memory that it needs.
///
/// Formatting it with `{}` prints the table of nodes, kernels and buffers.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) final_copies: Vec<BufferCopy>,
    pub(crate) buffers: Vec<BufferSpec>,
    pub(crate) externals: Vec<External>,
    pub(crate) kept: HashMap<Value, (Slot, TensorType)>,
    pub(crate) names: Names,
    pub(crate) lanes: Lanes,
    pub(crate) recomputed: usize,
}

impl Plan {
    /// The work of each node, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Copies to make at the end: stores that could not be written in place.
    pub fn final_copies(&self) -> &[BufferCopy] {
        &self.final_copies
    }

    /// Buffers of the plan itself.
    pub fn buffers(&self) -> &[BufferSpec] {
        &self.buffers
    }

    /// Inputs, parameters and states.
    pub fn externals(&self) -> &[External] {
        &self.externals
    }

    /// The kernels of some steps alone, without the copies around them. For measuring how long they take: their inputs
    /// hold whatever was there.
    #[cfg(feature = "check")]
    pub(crate) fn kernels_of(&self, keep: impl Fn(&Step) -> bool) -> Plan {
        let mut plan = self.clone();
        plan.steps.retain(keep);
        plan.steps.iter_mut().for_each(|s| s.copies.clear());
        plan.final_copies.clear();
        plan
    }

    /// The place of an input, parameter or state, or of an output that was given to [`new`](Self::new). `None` for all
    /// other values, and for those of other graphs.
    pub fn slot(&self, value: Value) -> Option<(Slot, &TensorType)> {
        if let Some((slot, ty)) = self.kept.get(&value) {
            return Some((*slot, ty));
        }
        let i = self.externals.iter().position(|e| e.value == value)?;
        Some((Slot::External(i), &self.externals[i].ty))
    }

    /// [`slot`](Self::slot), or an error that names the value.
    pub(crate) fn find(&self, value: Value) -> Result<(Slot, &TensorType)> {
        let missing = || match self.names.of(value) {
            Ok(name) => Error::Graph(format!(
                "`{name}` is neither an output of this plan nor an input, parameter or state that it uses: add it to \
                 the outputs of `Plan::new`, or to `GraphTrainOptions::outputs`"
            )),
            Err(message) => Error::Graph(message),
        };
        self.slot(value).ok_or_else(missing)
    }

    /// The input, parameter or state that a tensor is to be bound to. The error names the value that cannot be bound.
    pub(crate) fn bound(&self, value: Value) -> Result<&External> {
        let missing = || match self.names.of(value) {
            Ok(name) => Error::Graph(format!(
                "`{name}` cannot be bound: it is not an input, parameter or state that this plan uses. An output is \
                 bound through `Graph::state` and `Graph::store`"
            )),
            Err(message) => Error::Graph(format!("a binding: {message}")),
        };
        self.externals.iter().find(|e| e.value == value).ok_or_else(missing)
    }

    /// A readable name of a slot: `b3`, or the name of the input, parameter or state.
    pub(crate) fn slot_name(&self, slot: Slot) -> String {
        match slot {
            Slot::Buffer(i) => format!("b{i}"),
            Slot::External(i) => self.externals[i].name.clone(),
        }
    }

    /// The values in a slot, for messages: `` `x` ``, or `` `x` or `y` `` where several share a buffer over time.
    pub(crate) fn slot_values(&self, slot: Slot) -> String {
        let name = |name: &String| format!("`{name}`");
        match slot {
            Slot::Buffer(i) => joined(self.buffers[i].values.iter().map(name), " or "),
            Slot::External(i) => name(&self.externals[i].name),
        }
    }

    /// Bytes of the plan's own buffers: activations and gradients in flight.
    pub fn buffer_bytes(&self) -> usize {
        self.buffers.iter().map(|b| b.bytes).sum()
    }

    /// Bytes of inputs, parameters and states.
    pub fn external_bytes(&self) -> usize {
        self.externals.iter().map(|e| e.ty.storage_bytes()).sum()
    }

    /// Bytes that an executable allocates: buffers, uniforms, and the externals that are not bound to tensors.
    pub(crate) fn allocated_bytes(&self, is_bound: impl Fn(Value) -> bool) -> usize {
        let own = self.externals.iter().filter(|e| !is_bound(e.value));
        self.buffer_bytes() + self.uniform_bytes() + own.map(|e| e.ty.storage_bytes()).sum::<usize>()
    }

    /// Which of this plan's buffers each of another's can be, where the two never run at the same time. Those with
    /// outputs are not among them, since an output is read after a step; nor is one buffer given twice.
    pub(crate) fn lend_to(&self, other: &Plan) -> Vec<Option<usize>> {
        let kept: HashSet<Slot> = self.kept.values().map(|(slot, _)| *slot).collect();
        let mut free: Vec<usize> = (0..self.buffers.len()).filter(|&i| !kept.contains(&Slot::Buffer(i))).collect();
        let mut lent = vec![None; other.buffers.len()];
        let mut wanted: Vec<usize> = (0..lent.len()).collect();
        // The largest first: what one of these leaves is large enough for all that follow.
        wanted.sort_by_key(|&i| Reverse(other.buffers[i].bytes));
        for i in wanted {
            let fits = free.iter().copied().filter(|&b| self.buffers[b].bytes >= other.buffers[i].bytes);
            lent[i] = fits.min_by_key(|&b| self.buffers[b].bytes);
            free.retain(|&b| Some(b) != lent[i]);
        }
        lent
    }

    /// Bytes of the buffer that holds all uniforms.
    pub(crate) fn uniform_bytes(&self) -> usize {
        let words = self.steps.iter().flat_map(|s| &s.dispatches).flat_map(|d| [&d.words, &d.ranges]);
        words.map(|words| uniform_stride(words.len()) as usize).sum::<usize>().max(256)
    }

    /// Bytes of everything that must be in GPU memory during a step.
    pub fn peak_bytes(&self) -> usize {
        self.buffer_bytes() + self.external_bytes()
    }

    /// Floating-point operations per step.
    pub fn flops(&self) -> u64 {
        self.steps.iter().map(|s| s.flops).sum()
    }

    /// The largest dispatch: the node that it belongs to, and its floating-point operations. Those of a node with several
    /// are shared out by workgroups.
    ///
    /// A dispatch runs as a whole, whatever [cuts](crate::Executable::submit) a step into short submits: one of 100 GFLOP
    /// takes a second on an integrated GPU.
    pub fn largest_dispatch(&self) -> Option<(&Step, u64)> {
        let largest = |step: &Step| (step.flops as f64 * step.shares().fold(0.0, f64::max)) as u64;
        self.steps.iter().map(|step| (step, largest(step))).max_by_key(|(_, flops)| *flops)
    }

    /// Values that are computed twice rather than kept: see [`recomputing`](Self::recomputing). The nodes that do so
    /// have the names of the first ones, with `.again`.
    pub fn recomputed(&self) -> usize {
        self.recomputed
    }

    /// Dispatches per step.
    pub fn dispatches(&self) -> usize {
        self.steps.iter().map(|s| s.dispatches.len()).sum()
    }
}

/// Bytes that this many words take in an executable's buffer of uniforms.
pub(crate) fn uniform_stride(words: usize) -> u64 {
    ((words * 4) as u64).next_multiple_of(256)
}

impl fmt::Display for Plan {
    /// Prints the nodes with their kernels and buffers, then the buffers with their sizes and values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slot = |s: &Slot| self.slot_name(*s);
        let width = self.steps.iter().map(|s| s.name.len()).max().unwrap_or(4);
        writeln!(
            f,
            "{} nodes, {} dispatches, {:.1} MFLOP",
            self.steps.len(),
            self.dispatches(),
            self.flops() as f64 / 1e6
        )?;
        if self.recomputed > 0 {
            writeln!(f, "{} values are computed twice rather than kept", self.recomputed)?;
        }
        for step in &self.steps {
            let outs: Vec<String> = step.outputs.iter().map(|(s, ty)| format!("{} {ty}", slot(s))).collect();
            let copy = |c: &BufferCopy| format!("copy {} to {}", slot(&c.from), slot(&c.to));
            let mut work: Vec<String> = step.copies.iter().map(copy).collect();
            for d in &step.dispatches {
                let groups: u64 = d.workgroups.iter().map(|&n| u64::from(n)).product();
                work.extend(d.copies_in.iter().map(copy));
                work.push(format!("{}.{} x{groups}", d.kernel.label, d.kernel.entry));
                work.extend(d.copies_out.iter().map(copy));
            }
            let with =
                if step.parts().is_empty() { String::new() } else { format!(", with {}", step.others().join(", ")) };
            writeln!(f, "  {:width$}  -> {}  by {}{with}", step.name, outs.join(", "), work.join(", "))?;
        }
        for c in &self.final_copies {
            writeln!(f, "  copy {} to {}", slot(&c.from), slot(&c.to))?;
        }
        writeln!(f, "{} buffers, {} bytes:", self.buffers.len(), self.buffer_bytes())?;
        for (i, b) in self.buffers.iter().enumerate() {
            writeln!(f, "  b{i}  {} bytes, {} values: {}", b.bytes, b.values.len(), b.values.join(", "))?;
        }
        writeln!(
            f,
            "{} inputs, parameters and states, {} bytes; peak {} bytes",
            self.externals.len(),
            self.external_bytes(),
            self.peak_bytes()
        )
    }
}
