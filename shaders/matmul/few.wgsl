// matmul where y has few rows, ROWS of them, for any adapter; after shared.wgsl, columns.wgsl and
// reduce.wgsl. Each element of b is used only a few times, so all that counts is reading b in order. A
// workgroup is LANES invocations along n by SLICES along k.

// knobs
const WIDTH: u32 = COLS; // columns of an invocation that are its own: COLS, 2 or 1

// `b_block` for columns from `col` on, of which the first WIDTH count.
fn few_block(col: u32, k: u32, b0: u32, last: u32) -> array<mat4x4<f32>, QUADS> {
    if (!B_TRANSPOSED || WIDTH >= 4u) {
        return b_block(col, k, b0, last);
    }
    let first = mask(b_quad(b0 + k + min(col, p.n - 1u) * p.k, last), k, true);
    var second: vec4<f32>;
    if (WIDTH == 2u) {
        second = mask(b_quad(b0 + k + min(col + 1u, p.n - 1u) * p.k, last), k, true);
    }
    var block: array<mat4x4<f32>, QUADS>;
    block[0] = transpose(mat4x4<f32>(first, second, vec4<f32>(), vec4<f32>()));
    return block;
}

@compute @workgroup_size(GROUP)
fn forward_few(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let own = (group * LANES + lid % LANES) * WIDTH;
    // Whole quads are loaded where they are aligned, from the one that the first column is in.
    let col0 = select(own, own / 4u * 4u, WIDTH < 4u && !B_TRANSPOSED && B_ALIGNED);
    let a0 = wid.z / p.slices * ROWS * p.k;
    let b0 = wid.z / p.slices * p.k * p.n;
    let k0 = wid.z % p.slices * p.slice_k;
    var acc: Sums;
    for (var k = k0 + 4u * (lid / LANES); k < min(k0 + p.slice_k, p.k); k += 4u * SLICES) {
        let bs = few_block(col0, k, b0, b0 + p.k * p.n - 1u);
        for (var r = 0u; r < ROWS; r++) { // unroll
            let v = mask(a_quad(a0 + r * p.k + k, a0 + ROWS * p.k - 1u), k, true);
            for (var q = 0u; q < QUADS; q++) { // unroll
                acc[r * QUADS + q] = add_products(acc[r * QUADS + q], v, bs[q]);
            }
        }
    }
    reduce(acc, lid);
    if (lid < LANES) {
        for (var row = 0u; row < ROWS; row++) {
            for (var col = own; col < min(own + WIDTH, p.n); col++) {
                let j = col - col0;
                store((wid.z * ROWS + row) * p.n, col, partial[(row * QUADS + j / 4u) * GROUP + lid][j % 4u]);
            }
        }
    }
}
