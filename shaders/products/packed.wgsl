
// A product with a packed weight [N, 4 * QUADS]; after packed/decode.wgsl.

// knobs
const N: u32 = 4u;

fn weight(i: u32) -> u32 {
    return w[i];
}

// A slice's share of column `col`. Past the last one it is that one's, and is not stored.
fn share(col: u32, slice: u32) -> Sums {
    let row = min(col, N - 1u) * (QUADS / 8u);
    var acc: array<vec4<f32>, ROWS>;
    for (var t = slice; t < QUADS / PIECE; t += SLICES) {
        let v = piece(row, t);
        for (var r = 0u; r < ROWS; r++) { // unroll
            for (var i = 0u; i < PIECE; i++) { // unroll
                acc[r] = fma(x_quad(r, piece_quad(t, i)), v[i], acc[r]);
            }
        }
    }
    var sums: Sums;
    for (var r = 0u; r < ROWS; r++) { // unroll
        sums[r] = dot(acc[r], vec4<f32>(1.0));
    }
    return sums;
}
