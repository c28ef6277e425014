// matmul on cooperative matrices, which the invocations of a subgroup hold together (tensor cores,
// simdgroup matrices); after shared.wgsl and strips.wgsl. `enable` lines must come before all of that,
// and only naga knows this extension: src/ops/matmul.rs adds them. A workgroup is one subgroup and
// makes a tile of y; where subgroups turn out smaller, each of them does the same work.
//
// Strips of a and b go through workgroup memory, where edges are zeros and E may be f16, and so does
// y on its way out. So matrices in memory may have any shape and alignment.

// knobs
alias E = f32; // what is multiplied; sums are f32
alias MatrixA = coop_mat8x8<f32, A>;
alias MatrixB = coop_mat8x8<f32, B>;
alias MatrixC = coop_mat8x8<f32, C>;
const SIZE: u32 = 8u; // rows and columns of these matrices
const COOPERATING: u32 = 32u; // invocations of a subgroup

const MATRICES_M: u32 = TILE_M / SIZE;
const MATRICES_N: u32 = TILE_N / SIZE;

// strip_a[k][m], strip_b[k][n], tile[m][n]
var<workgroup> strip_a: array<E, TILE_K * TILE_M>;
var<workgroup> strip_b: array<E, TILE_K * TILE_N>;
var<workgroup> tile: array<f32, TILE_M * TILE_N>;

fn stage_strips(row0: u32, col0: u32, k: u32, z: u32, lid: u32) {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    for (var t = lid; t < A_BLOCKS; t += COOPERATING) {
        let source = block(t, row0, p.m, A_WIDTH, a0, !A_TRANSPOSED);
        let rows = load_a(source, k, a0 + p.m * p.k - 1u);
        for (var i = 0u; i < 16u; i++) { // unroll
            strip_a[(source.k + i / 4u) * TILE_M + 4u * source.x + i % 4u] = E(rows[i / 4u][i % 4u]);
        }
    }
    for (var t = lid; t < BLOCKS - A_BLOCKS; t += COOPERATING) {
        let source = block(t, col0, p.n, B_WIDTH, b0, B_TRANSPOSED);
        let rows = load_b(source, k, b0 + p.k * p.n - 1u);
        for (var i = 0u; i < 16u; i++) { // unroll
            strip_b[(source.k + i / 4u) * TILE_N + 4u * source.x + i % 4u] = E(rows[i / 4u][i % 4u]);
        }
    }
}

@compute @workgroup_size(COOPERATING)
fn forward_cooperative(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    var acc: array<array<MatrixC, MATRICES_N>, MATRICES_M>;
    for (var k = w.k; k < w.k_end; k += TILE_K) {
        stage_strips(w.row0, w.col0, k, w.matrix, lid);
        workgroupBarrier();
        for (var kk = 0u; kk < TILE_K; kk += SIZE) {
            var bs: array<MatrixB, MATRICES_N>;
            for (var j = 0u; j < MATRICES_N; j++) { // unroll
                bs[j] = coopLoadT<MatrixB>(&strip_b[kk * TILE_N + j * SIZE], TILE_N);
            }
            for (var i = 0u; i < MATRICES_M; i++) { // unroll
                let a_matrix = coopLoad<MatrixA>(&strip_a[kk * TILE_M + i * SIZE], TILE_M);
                for (var j = 0u; j < MATRICES_N; j++) { // unroll
                    acc[i][j] = coopMultiplyAdd(a_matrix, bs[j], acc[i][j]);
                }
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < MATRICES_M; i++) { // unroll
        for (var j = 0u; j < MATRICES_N; j++) { // unroll
            coopStoreT(acc[i][j], &tile[i * SIZE * TILE_N + j * SIZE], TILE_N);
        }
    }
    workgroupBarrier();
    for (var i = lid; i < TILE_M * TILE_N; i += COOPERATING) {
        let row = w.row0 + i / TILE_N;
        let col = w.col0 + i % TILE_N;
        if (row < p.m && col < p.n) {
            store((w.plane * p.m + row) * p.n, col, tile[i]);
        }
    }
}
