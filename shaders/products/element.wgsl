
// Sums that are elements; after kernel.wgsl.

fn moved(v: E, step: u32) -> E {
    return across(vec2<f32>(v, 0.0), step).x;
}
