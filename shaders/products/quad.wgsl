
// Sums that are quads; after kernel.wgsl.

fn moved(v: E, step: u32) -> E {
    return across4(v, step);
}
