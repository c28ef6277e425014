
// A product with a weight [N, 4 * QUADS] of f32: neighbouring slices load neighbouring quads of a row.

// knobs
const N: u32 = 4u;

// A slice's share of column `col`. Past the last one it is that one's, and is not stored.
fn share(col: u32, slice: u32) -> Sums {
    let row = min(col, N - 1u) * QUADS;
    var acc: array<vec4<f32>, ROWS>;
    for (var q = slice; q < QUADS; q += SLICES) {
        let v = w[row + q];
        for (var r = 0u; r < ROWS; r++) { // unroll
            acc[r] = fma(x_quad(r, q), v, acc[r]);
        }
    }
    var sums: Sums;
    for (var r = 0u; r < ROWS; r++) { // unroll
        sums[r] = dot(acc[r], vec4<f32>(1.0));
    }
    return sums;
}
