//! The dispatches of an op: kernels with bindings, uniforms and workgroups.

use super::knobs::Kernel;
use crate::profile::Profile;
use crate::tensor::TensorType;

/// What a launch is made for.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Types of the inputs.
    pub inputs: &'a [TensorType],
    /// Types of the outputs.
    pub outputs: &'a [TensorType],
    /// The adapter.
    pub profile: &'a Profile,
    /// Which of the op's [`variants`](crate::graph::Op::variants).
    pub variant: usize,
}

/// What a binding of a dispatch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
