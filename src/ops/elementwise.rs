//! What kernels without neighbours share on the host: their grid, and shapes to test them on.

use super::{Bind, Launch, Program};
use crate::kernel::Kernel;

/// Invocations of a workgroup of these kernels.
const GROUP: usize = 64;

/// Shapes for the cases of ops that work element by element.
pub(super) const SHAPES: [&[usize]; 4] = [&[1], &[127], &[1757], &[3, 5, 7]];

/// One dispatch of `n` invocations in workgroups of 64. `n` is the first word of its uniform;
/// `words` follow.
pub(super) fn invocations(cx: &Launch<'_>, n: usize, kernel: Kernel, binds: &[Bind], words: &[u32]) -> Program {
    let words = [&[n as u32], words].concat();
    Program::one(kernel, binds, &words, cx.profile.grid(n.div_ceil(GROUP)))
}

/// [`invocations`] for a kernel that makes a quad of the output in each.
pub(super) fn quads(cx: &Launch<'_>, kernel: Kernel, binds: &[Bind], words: &[u32]) -> Program {
    invocations(cx, cx.outputs[0].len().div_ceil(4), kernel, binds, words)
}
