// A product of cooperative matrices, for src/device/self_test.rs: y = a b, with the loads, strides and
// orientations of matmul/cooperative.wgsl. The elements of a and b are small integers, so that sums are
// exact in any order, and neither matrix is symmetric. src/device/self_test.rs adds the `enable` lines.

// knobs
alias E = f32; // what is multiplied; sums are f32
alias MatrixA = coop_mat8x8<f32, A>;
alias MatrixB = coop_mat8x8<f32, B>;
alias MatrixC = coop_mat8x8<f32, C>;
const SIZE: u32 = 8u; // rows and columns of these matrices
const COOPERATING: u32 = 32u; // invocations of a subgroup

const MATRICES_M: u32 = 2u;
const MATRICES_N: u32 = 3u;
const M: u32 = MATRICES_M * SIZE;
const N: u32 = MATRICES_N * SIZE;
const K: u32 = 2u * SIZE;

@group(0) @binding(1) var<storage, read_write> y: array<f32>; // [M, N]

// strip_a[k][m], strip_b[k][n], tile[m][n]
var<workgroup> strip_a: array<E, K * M>;
var<workgroup> strip_b: array<E, K * N>;
var<workgroup> tile: array<f32, M * N>;

@compute @workgroup_size(COOPERATING)
fn matrices(@builtin(local_invocation_index) lid: u32) {
    for (var i = lid; i < K * M; i += COOPERATING) {
        let k = i / M;
        let m = i % M;
        strip_a[i] = E(f32((7u * m + 3u * k + m * k) % 15u) - 7.0);
    }
    for (var i = lid; i < K * N; i += COOPERATING) {
        let k = i / N;
        let n = i % N;
        strip_b[i] = E(f32((5u * k + 11u * n + k * k * n) % 15u) - 7.0);
    }
    workgroupBarrier();
    var acc: array<array<MatrixC, MATRICES_N>, MATRICES_M>;
    for (var k = 0u; k < K; k += SIZE) {
        for (var i = 0u; i < MATRICES_M; i++) {
            let a = coopLoad<MatrixA>(&strip_a[k * M + i * SIZE], M);
            for (var j = 0u; j < MATRICES_N; j++) {
                let b = coopLoadT<MatrixB>(&strip_b[k * N + j * SIZE], N);
                acc[i][j] = coopMultiplyAdd(a, b, acc[i][j]);
            }
        }
    }
    for (var i = 0u; i < MATRICES_M; i++) {
        for (var j = 0u; j < MATRICES_N; j++) {
            coopStoreT(acc[i][j], &tile[i * SIZE * N + j * SIZE], N);
        }
    }
    workgroupBarrier();
    for (var i = lid; i < M * N; i += COOPERATING) {
        y[i] = tile[i];
    }
}
