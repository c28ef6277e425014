
// x as it is; after kernel.wgsl.

fn prepare(lid: u32) {}

// Quad q of row r.
fn x_quad(r: u32, q: u32) -> vec4<f32> {
    return x[r * QUADS + q];
}
