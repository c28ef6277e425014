//! The plan of a step: buffers and dispatches, as data. Printable, made before anything is
//! allocated; there is no wgpu in it. How it is made is in `planner.rs`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Names, Op, Value};
use crate::kernel::Kernel;
use crate::tensor::TensorType;

mod bindings;
mod declared;
mod fuse;
mod planner;
pub(crate) mod requirements;
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
pub struct Copy {
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

impl Copy {
    /// A copy of what is at the start of a slot, to the start of another.
    pub fn whole(from: Slot, to: Slot, bytes: usize) -> Self {
        Copy { from, from_offset: 0, to, to_offset: 0, bytes }
    }
}

/// A dispatch with its bindings resolved.
#[derive(Clone, Debug)]
pub struct PlannedDispatch {
    /// The kernel.
    pub kernel: Kernel,
    /// Slot, bytes and whether the kernel writes, for bindings 1, 2, ...; `None` is unused.
    pub binds: Vec<Option<(Slot, usize, bool)>>,
    /// Words of the uniform at binding 0.
    pub words: Vec<u32>,
    /// Words of the uniform behind the last of `binds`, if any: where the ranges of bindings that were merged start,
    /// and their last indices. See [`Profile::max_storage_buffers`](crate::Profile::max_storage_buffers).
    pub ranges: Vec<u32>,
    /// Copies into buffers of merged bindings, to make first.
    pub copies_in: Vec<Copy>,
    /// Copies out of them, to make behind the dispatch.
    pub copies_out: Vec<Copy>,
    /// Workgroups in x, y, z.
    pub workgroups: [u32; 3],
}

/// The work of one node.
#[derive(Clone, Debug)]
pub struct Step {
    /// Name of the node.
    pub name: String,
    /// Its op.
    pub op: Arc<dyn Op>,
    /// Where its inputs live, before the copies, with their types.
    pub inputs: Vec<(Slot, TensorType)>,
    /// For each output the input that it starts as, if any.
    pub starts_as: Vec<Option<usize>>,
    /// Copies to make first.
    pub copies: Vec<Copy>,
    /// Dispatches, in order.
    pub dispatches: Vec<PlannedDispatch>,
    /// Where the outputs live, with their types.
    pub outputs: Vec<(Slot, TensorType)>,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes that must move at least.
    pub bytes: u64,
}

/// A planned graph: the work of a step in order, and the memory that it needs.
///
/// Formatting it with `{}` prints the table of nodes, kernels and buffers.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Work, in order.
    pub steps: Vec<Step>,
    /// Copies to make last: stores that could not be written in place.
    pub final_copies: Vec<Copy>,
    /// The plan's own buffers.
    pub buffers: Vec<BufferSpec>,
    /// Inputs, parameters and states.
    pub externals: Vec<External>,
    pub(crate) kept: HashMap<Value, (Slot, TensorType)>,
    pub(crate) names: Names,
}

impl Plan {
    /// Where an output given to [`new`](Self::new), or an input, parameter or state, lives. `None` for all else, and
    /// for values of other graphs.
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
                 the outputs of `Plan::new`"
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
        for step in &self.steps {
            let outs: Vec<String> = step.outputs.iter().map(|(s, ty)| format!("{} {ty}", slot(s))).collect();
            let copy = |c: &Copy| format!("copy {} to {}", slot(&c.from), slot(&c.to));
            let mut work: Vec<String> = step.copies.iter().map(copy).collect();
            for d in &step.dispatches {
                let groups: u64 = d.workgroups.iter().map(|&n| u64::from(n)).product();
                work.extend(d.copies_in.iter().map(copy));
                work.push(format!("{}.{} x{groups}", d.kernel.label, d.kernel.entry));
                work.extend(d.copies_out.iter().map(copy));
            }
            writeln!(f, "  {:width$}  -> {}  by {}", step.name, outs.join(", "), work.join(", "))?;
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
