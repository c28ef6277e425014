// The results of packed products; after shared.wgsl.

@group(0) @binding(3) var<storage, read> bias: array<f32>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [m, n]

// Stores a sum, if it is not past an edge.
fn store(row: u32, col: u32, sum: f32) {
    if (row < p.m && col < p.n) {
        var v = sum;
        if (p.has_bias != 0u) {
            v += bias[col];
        }
        if (p.accumulate != 0u) {
            v += y[row * p.n + col];
        }
        y[row * p.n + col] = v;
    }
}
