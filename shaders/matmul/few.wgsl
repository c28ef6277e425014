// matmul where y has few rows, ROWS of them, for any adapter; after shared.wgsl and columns.wgsl. Each
// element of b is used only a few times, so all that counts is reading b in order. A workgroup is LANES
// invocations along n by SLICES along k.

// knobs
const SLICES: u32 = 1u; // invocations that share a column
const SUBGROUP: u32 = 1u; // how many of those can shuffle

const FEW_GROUP: u32 = LANES * SLICES;
var<workgroup> partial: array<vec4<f32>, FEW_GROUP * ROWS * QUADS>;

@compute @workgroup_size(FEW_GROUP)
fn forward_few(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let col0 = (group * LANES + lid % LANES) * COLS;
    let a0 = wid.z * ROWS * p.k;
    let b0 = wid.z * p.k * p.n;
    var acc: array<vec4<f32>, ROWS * QUADS>;
    for (var k = 4u * (lid / LANES); k < p.k; k += 4u * SLICES) {
        let bs = b_block(col0, k, b0, b0 + p.k * p.n - 1u);
        for (var r = 0u; r < ROWS; r++) { // unroll
            let v = mask(a_quad(a0 + r * p.k + k, a0 + ROWS * p.k - 1u), k, true);
            for (var q = 0u; q < QUADS; q++) { // unroll
                acc[r * QUADS + q] = add_products(acc[r * QUADS + q], v, bs[q]);
            }
        }
    }
    // Sums over slices, in a fixed order: within subgroups first, then through workgroup memory.
    for (var i = 0u; i < ROWS * QUADS; i++) { // unroll
        var v = acc[i];
        for (var step = LANES; step < SUBGROUP; step *= 2u) {
            v += vec4<f32>(across(v.xy, step), across(v.zw, step));
        }
        partial[i * FEW_GROUP + lid] = v;
    }
    for (var step = FEW_GROUP / 2u; step >= max(LANES, SUBGROUP); step /= 2u) {
        workgroupBarrier();
        if (lid < step) {
            for (var i = 0u; i < ROWS * QUADS; i++) {
                partial[i * FEW_GROUP + lid] += partial[i * FEW_GROUP + lid + step];
            }
        }
    }
    if (lid < LANES) {
        for (var row = 0u; row < ROWS; row++) {
            for (var col = col0; col < min(col0 + COLS, p.n); col++) {
                let j = col - col0;
                store((wid.z * ROWS + row) * p.n, col, partial[(row * QUADS + j / 4u) * FEW_GROUP + lid][j % 4u]);
            }
        }
    }
}
