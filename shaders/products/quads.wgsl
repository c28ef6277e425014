
// A product with a weight [4 * QUADS, N] of f32, in quads of columns: neighbouring lanes load neighbouring
// quads of a row.

// knobs
const N: u32 = 4u;

const WIDTH: u32 = N / 4u;

// A slice's share of quad `col` of columns. Past the last one it is that one's, and is not stored.
fn share(col: u32, slice: u32) -> Sums {
    let at = min(col, WIDTH - 1u);
    var acc: Sums;
    for (var q = slice; q < QUADS; q += SLICES) {
        let row = 4u * q * WIDTH + at;
        let w0 = w[row];
        let w1 = w[row + WIDTH];
        let w2 = w[row + 2u * WIDTH];
        let w3 = w[row + 3u * WIDTH];
        for (var r = 0u; r < ROWS; r++) { // unroll
            let v = x_quad(r, q);
            acc[r] = fma(vec4<f32>(v.w), w3, fma(vec4<f32>(v.z), w2, fma(vec4<f32>(v.y), w1, fma(vec4<f32>(v.x), w0, acc[r]))));
        }
    }
    return acc;
}
