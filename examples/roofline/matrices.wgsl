// Does as many products of cooperative matrices as the adapter can: independent sums, no memory access in the loop.
// probes.rs adds the `enable` lines.

// knobs
alias E = f32; // what is multiplied; sums are f32
alias MatrixA = coop_mat8x8<f32, A>;
alias MatrixB = coop_mat8x8<f32, B>;
alias MatrixC = coop_mat8x8<f32, C>;
const SIZE: u32 = 8u; // rows and columns of these matrices
const COOPERATING: u32 = 32u; // invocations of a subgroup
const ROWS: u32 = 2u; // of matrices a subgroup sums
const COLUMNS: u32 = 2u;

struct Params {
    subgroups: u32,
    turns: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

var<workgroup> factors: array<E, SIZE * SIZE>;
var<workgroup> sums: array<f32, SIZE * SIZE>;

@compute @workgroup_size(COOPERATING)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    for (var i = lid; i < SIZE * SIZE; i += COOPERATING) {
        factors[i] = E(x[i % 2u].x / f32(SIZE));
    }
    workgroupBarrier();
    var a: array<MatrixA, ROWS>;
    var b: array<MatrixB, COLUMNS>;
    var acc: array<array<MatrixC, COLUMNS>, ROWS>;
    for (var r = 0u; r < ROWS; r++) { // unroll
        a[r] = coopLoad<MatrixA>(&factors[0], SIZE);
    }
    for (var c = 0u; c < COLUMNS; c++) { // unroll
        b[c] = coopLoadT<MatrixB>(&factors[0], SIZE);
    }
    let turns = p.turns;
    for (var t = 0u; t < turns; t++) {
        for (var r = 0u; r < ROWS; r++) { // unroll
            for (var c = 0u; c < COLUMNS; c++) { // unroll
                acc[r][c] = coopMultiplyAdd(a[r], b[c], acc[r][c]);
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLUMNS; c++) { // unroll
            // So that no sum is needless.
            coopStoreT(acc[r][c], &sums[0], SIZE);
            workgroupBarrier();
            if (lid == 0u) {
                y[group.x] += vec4<f32>(sums[0]);
            }
            workgroupBarrier();
        }
    }
}
