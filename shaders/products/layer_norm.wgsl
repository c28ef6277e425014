
// norm.wgsl for layer norm.

const CENTERED: bool = true;

// Quad q of row r.
fn x_quad(r: u32, q: u32) -> vec4<f32> {
    return (x[r * QUADS + q] - vec4<f32>(mean[r])) * rstd[r] * gamma[q] + beta[q];
}
