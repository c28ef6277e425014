//! A plan between guards, to find what its kernels write where they shouldn't, and what they don't write.

use std::sync::Arc;

use crate::device::{ExecOptions, Executable, Gpu, Memory, SENTINEL, Tensor};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::plan::Plan;
use crate::tensor::{DType, TensorType};

/// Bytes before and after every buffer; a binding's offset must be a multiple of this.
const GUARD: usize = 256;

/// An executable whose buffers stand between guards. Kernels are given the guards after their tensors too, so that a
/// write there is neither clamped nor dropped.
///
/// Use it where [`kernels`](super::kernels) does not reach: for a whole graph, or for several steps in a row.
#[derive(Debug)]
pub struct Guarded {
    exec: Executable,
}

impl Guarded {
    /// Sets up a plan. Its inputs, and parameters without an initialisation, are to be written.
    pub fn new_blocking(gpu: &Gpu, plan: Arc<Plan>) -> Result<Guarded> {
        let memory = Memory { guard: GUARD, ..Memory::default() };
        let exec = gpu.run_blocking(Executable::with_memory(gpu, plan, ExecOptions::default(), memory))?;
        Ok(Guarded { exec })
    }

    /// To write inputs and read outputs.
    pub fn executable(&self) -> &Executable {
        &self.exec
    }

    /// Runs one step after filling the plan's buffers with a NaN that no kernel makes. An `Err` names a value next to
    /// which something was written. Inputs, parameters and states have no guards.
    pub fn step_blocking(&self) -> Result<()> {
        self.exec.poison()?;
        self.exec.submit()?;
        self.check_guards_blocking()
    }

    fn check_guards_blocking(&self) -> Result<()> {
        let specs = &self.exec.plan().buffers;
        for (buffer, spec) in self.exec.buffers().iter().zip(specs) {
            let words = words_blocking(self.exec.gpu(), buffer, 0, buffer.size() as usize / 4)?;
            let (first, end) = (GUARD / 4, (GUARD + spec.bytes) / 4);
            let touched = |i: &usize| (*i < first || *i >= end) && words[*i] != SENTINEL;
            if let Some(i) = (0..words.len()).find(touched) {
                return Err(Error::Device(format!(
                    "a kernel wrote byte {} of {}, which has {}",
                    4 * i as i64 - GUARD as i64,
                    spec.values.join(" or "),
                    spec.bytes
                )));
            }
        }
        Ok(())
    }

    /// Index of the first element of an output that the last step did not write.
    pub fn unwritten_blocking(&self, output: Value) -> Result<Option<usize>> {
        let tensor = self.exec.tensor(output)?;
        let ty = tensor.ty();
        let words = words_blocking(self.exec.gpu(), tensor.buffer(), tensor.offset(), ty.word_bytes() / 4)?;
        let half = |i: usize| (words[i / 2] ^ SENTINEL) >> (16 * (i % 2)) & 0xffff;
        Ok(match ty.dtype {
            DType::F16 => (0..ty.len()).find(|&i| half(i) == 0),
            DType::F32 | DType::U32 => words.iter().position(|w| *w == SENTINEL),
        })
    }
}

/// A range of a buffer as bits: reading floats might change those of a NaN.
fn words_blocking(gpu: &Gpu, buffer: &wgpu::Buffer, offset: u64, len: usize) -> Result<Vec<u32>> {
    Tensor::from_buffer(buffer.clone(), offset, TensorType::u32([len]))?.read_blocking(gpu)
}
