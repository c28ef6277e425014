//! The dispatches of an op: kernels with bindings, uniforms and workgroups.

use super::knobs::Kernel;
use crate::profile::Profile;
use crate::tensor::TensorType;

/// Everything that an op's [`launch`](crate::ops::Op::launch) may depend on.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Types of the inputs.
    pub inputs: &'a [TensorType],
    /// Types of the outputs.
    pub outputs: &'a [TensorType],
    /// The adapter that the plan is for.
    pub profile: &'a Profile,
    /// Index of the chosen one of the op's [`variants`](crate::graph::Op::variants).
    pub variant: usize,
}

/// What is bound to one storage binding of a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bind {
    /// The op's input of this index, read-only.
    In(usize),
    /// The op's output of this index, read and write.
    Out(usize),
    /// Scratch of this index, read and write.
    Scratch(usize),
    /// Scratch of this index, read-only, written by an earlier dispatch.
    ScratchIn(usize),
    /// The op's output of this index, written by an earlier dispatch of this program and now read-only.
    OutIn(usize),
    /// A placeholder for a read-only binding that the entry point mentions but that this launch's knobs make dead. (Do
    /// not list bindings that the entry point never mentions: number the bindings of each entry point without gaps.)
    Null,
}

/// One dispatch: a kernel, its storage bindings (1, 2, ... of group 0), the words of the uniform at binding 0, and the
/// number of workgroups.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    /// The kernel.
    pub kernel: Kernel,
    /// Storage bindings, the first at binding 1.
    pub binds: Vec<Bind>,
    /// Contents of the uniform at binding 0, as 32-bit words.
    pub words: Vec<u32>,
    /// Number of workgroups in x, y and z; see [`Profile::grid`].
    pub workgroups: [u32; 3],
}

/// The dispatches of an op, in order, and the scratch memory that they share.
///
/// Return one from [`launch`](crate::ops::Op::launch). An op that runs no kernel returns `Program::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Program {
    /// The dispatches, in order. Each sees what the ones before it wrote.
    pub dispatches: Vec<Dispatch>,
    /// Types of the scratch tensors.
    pub scratch: Vec<TensorType>,
}

impl Program {
    /// A program of a single dispatch.
    pub fn one(kernel: Kernel, binds: &[Bind], words: &[u32], workgroups: [u32; 3]) -> Self {
        let mut program = Program::default();
        program.dispatch(kernel, binds, words, workgroups);
        program
    }

    /// Appends a dispatch.
    pub fn dispatch(&mut self, kernel: Kernel, binds: &[Bind], words: &[u32], workgroups: [u32; 3]) {
        self.dispatches.push(Dispatch { kernel, binds: binds.to_vec(), words: words.to_vec(), workgroups });
    }

    /// Adds a scratch tensor and returns its index, for [`Bind::Scratch`] and [`Bind::ScratchIn`].
    pub fn scratch(&mut self, ty: TensorType) -> usize {
        self.scratch.push(ty);
        self.scratch.len() - 1
    }
}
