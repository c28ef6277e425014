
// norm.wgsl for RMS norm.

const CENTERED: bool = false;

// Quad q of row r.
fn x_quad(r: u32, q: u32) -> vec4<f32> {
    return x[r * QUADS + q] * rstd[r] * gamma[q];
}
