// What kernels share that sum products to scalars: wide.wgsl, and those of teams.wgsl.

fn kv_head(at: Place) -> u32 {
    return at.head / (p.heads / p.kv_heads);
}

// s + the sum of a * b.
fn add_dot(a: E, b: E, s: f32) -> f32 {
    let x = vec4<f32>(a);
    let y = vec4<f32>(b);
    if (WIDTH == 1u) {
        return fma(x.x, y.x, s);
    }
    return fma(x.x, y.x, fma(x.y, y.y, fma(x.z, y.z, fma(x.w, y.w, s))));
}
