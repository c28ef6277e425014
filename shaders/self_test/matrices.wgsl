// A product of cooperative matrices, for src/device/self_test.rs: y = a b, with the staging, orientations and
// strides of the kernels, whose text (common/matrices.wgsl) comes before this. Elements are eighths, so that sums are
// exact in any order, and neither matrix is symmetric. One is too large for f16, where it must be infinite.

const TILE_M: u32 = 2u * SUBGROUPS_M * SIZE;
const TILE_N: u32 = 2u * SUBGROUPS_N * SIZE;
const TILE_K: u32 = 16u;

@group(0) @binding(1) var<storage, read_write> y: array<f32>; // [TILE_M, TILE_N]

struct Work {
    k: u32,
    k_end: u32,
}

const QUADS_A: u32 = TILE_M * TILE_K / 4u;
const QUADS_B: u32 = TILE_N * TILE_K / 4u;
const EACH_A: u32 = (QUADS_A + TILE_GROUP - 1u) / TILE_GROUP;
const EACH_B: u32 = (QUADS_B + TILE_GROUP - 1u) / TILE_GROUP;

struct Staging {
    a: array<vec4<f32>, EACH_A>,
    b: array<vec4<f32>, EACH_B>,
}

fn eighths(hash: vec4<u32>, k: vec4<u32>, k_end: u32) -> vec4<f32> {
    return select(vec4<f32>(), (vec4<f32>(hash % vec4<u32>(15u)) - 7.0) / 8.0, k < vec4<u32>(k_end));
}

fn a_quad(m: u32, k0: u32, k_end: u32) -> vec4<f32> {
    let k = vec4<u32>(k0) + vec4<u32>(0u, 1u, 2u, 3u);
    let v = eighths(7u * m + 3u * k + m * k, k, k_end);
    return select(v, vec4<f32>(70000.0), k == vec4<u32>(3u + 1000u * u32(m != 5u)));
}

fn b_quad(k: vec4<u32>, n: vec4<u32>, k_end: u32) -> vec4<f32> {
    return eighths(5u * k + 11u * n + k * k * n, k, k_end);
}

fn fetch(s: ptr<function, Staging>, w: Work, k: u32, lid: u32) {
    let count = vec4<u32>(0u, 1u, 2u, 3u);
    for (var i = 0u; i < EACH_A; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        (*s).a[i] = a_quad(t / (TILE_K / 4u), k + 4u * (t % (TILE_K / 4u)), w.k_end);
    }
    for (var i = 0u; i < EACH_B; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        if (B_ALONG_N) {
            let n = vec4<u32>(4u * (t % (TILE_N / 4u))) + count;
            (*s).b[i] = b_quad(vec4<u32>(k + t / (TILE_N / 4u)), n, w.k_end);
        } else {
            let along = vec4<u32>(k + 4u * (t % (TILE_K / 4u))) + count;
            (*s).b[i] = b_quad(along, vec4<u32>(t / (TILE_K / 4u)), w.k_end);
        }
    }
}

fn put(s: ptr<function, Staging>, buffer: u32, lid: u32) {
    for (var i = 0u; i < EACH_A; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        if (t < QUADS_A) {
            put_a(buffer, t / (TILE_K / 4u), 4u * (t % (TILE_K / 4u)), (*s).a[i]);
        }
    }
    for (var i = 0u; i < EACH_B; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        let width = select(TILE_K, TILE_N, B_ALONG_N) / 4u;
        if (t < QUADS_B) {
            put_b(buffer, t / width, 4u * (t % width), (*s).b[i]);
        }
    }
}

@compute @workgroup_size(TILE_GROUP)
fn matrices(@builtin(local_invocation_index) lid: u32) {
    var staging: Staging;
    var sums: Sums;
    multiply(Work(0u, 40u), lid, &staging, &sums);
    for (var i = 0u; i < MATRICES_M; i++) { // unroll
        for (var j = 0u; j < MATRICES_N; j += OUT_WIDE / SIZE) { // unroll
            let place = place_of(i, j, lid);
            for (var c = 0u; c < OUT_WIDE / SIZE; c++) { // unroll
                coopStoreT(sums[i][j + c], &out[place.at + c * SIZE], OUT_WIDE);
            }
            workgroupBarrier();
            for (var t = lid % COOPERATING; t < OUT_LEN; t += COOPERATING) {
                y[(place.row + t / OUT_WIDE) * TILE_N + place.col + t % OUT_WIDE] = out[place.at + t];
            }
            workgroupBarrier();
        }
    }
}
