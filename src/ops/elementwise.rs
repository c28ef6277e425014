//! Host side of the element-by-element kernels: their grid, and the shapes to test them on.

use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::profile::{AdapterClass, Profile};

/// Shapes for the cases of ops that work element by element.
pub(super) const SHAPES: [&[usize]; 4] = [&[1], &[127], &[1757], &[3, 5, 7]];

/// Invocations of a workgroup of such kernels.
pub(super) fn invocations(profile: &Profile) -> usize {
    match profile.class {
        AdapterClass::Cpu => 8,
        AdapterClass::Gpu => 64,
    }
}

/// Sets the knobs of a kernel that computes `n` elements independently, and returns it with its number of workgroups.
/// On software adapters starting an invocation costs as much as several loads, so each computes many elements.
pub(super) fn spread(profile: &Profile, n: usize, kernel: Kernel) -> (Kernel, [u32; 3]) {
    spread_thinly(profile, n, usize::MAX, kernel)
}

/// The same, but no invocation computes more than `most` elements.
pub(super) fn spread_thinly(profile: &Profile, n: usize, most: usize, kernel: Kernel) -> (Kernel, [u32; 3]) {
    let invocations = invocations(profile);
    let each = match profile.class {
        AdapterClass::Cpu => most.clamp(1, 64),
        AdapterClass::Gpu => 1,
    };
    let kernel = kernel.knob("INVOCATIONS", invocations as u32).knob("EACH", each as u32);
    (kernel, profile.grid(n.div_ceil(invocations * each)))
}

/// One dispatch that computes `n` elements independently. `n` is the first word of its uniform; `words` follow.
pub(super) fn elements(cx: &Launch<'_>, n: usize, kernel: Kernel, binds: &[Bind], words: &[u32]) -> Program {
    let (kernel, groups) = spread(cx.profile, n, kernel);
    Program::one(kernel, binds, &[&[n as u32], words].concat(), groups)
}

/// [`elements`] for a kernel whose elements are the quads of the output.
pub(super) fn quads(cx: &Launch<'_>, kernel: Kernel, binds: &[Bind], words: &[u32]) -> Program {
    elements(cx, cx.outputs[0].len().div_ceil(4), kernel, binds, words)
}
