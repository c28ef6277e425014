// y = x w^T + bias for many rows, on GPUs with cooperative matrices; after decode.wgsl, shared.wgsl, store.wgsl
// and common/matrices.wgsl. A weight is decoded once for all rows of a tile.

// knobs
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;

const TILE_K: u32 = 16u;

@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4

const PARTS: u32 = TILE_K / 4u / PIECE; // pieces of a strip
const X_EACH: u32 = (TILE_K / 4u * TILE_M + GROUP - 1u) / GROUP; // quads of x that an invocation stages
const W_EACH: u32 = (PARTS * TILE_N + GROUP - 1u) / GROUP; // pieces of w

struct Work {
    row0: u32,
    col0: u32,
    k: u32,
    k_end: u32,
}

struct Staging {
    x: array<vec4<f32>, X_EACH>,
    w: array<Piece, W_EACH>,
}

// Both strips hold the quads of the same pieces, in whatever order these have them.
fn fetch(s: ptr<function, Staging>, work: Work, k: u32, lid: u32) {
    let first = k / TILE_K * PARTS;
    for (var i = 0u; i < X_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K / 4u * TILE_M % GROUP == 0u || t < TILE_K / 4u * TILE_M) {
            let q = t % (TILE_K / 4u);
            let row = min(work.row0 + t / (TILE_K / 4u), p.m - 1u);
            (*s).x[i] = x[row * p.units * 8u + piece_quad(first + q / PIECE, q % PIECE)];
        }
    }
    for (var i = 0u; i < W_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (PARTS * TILE_N % GROUP == 0u || t < PARTS * TILE_N) {
            (*s).w[i] = piece(min(work.col0 + t / PARTS, p.n - 1u) * p.units, first + t % PARTS);
        }
    }
}

fn put(s: ptr<function, Staging>, buffer: u32, lid: u32) {
    for (var i = 0u; i < X_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K / 4u * TILE_M % GROUP == 0u || t < TILE_K / 4u * TILE_M) {
            put_a(buffer, t / (TILE_K / 4u), 4u * (t % (TILE_K / 4u)), (*s).x[i]);
        }
    }
    for (var i = 0u; i < W_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (PARTS * TILE_N % GROUP == 0u || t < PARTS * TILE_N) {
            for (var j = 0u; j < PIECE; j++) { // unroll
                put_b(buffer, t / PARTS, 4u * (t % PARTS * PIECE + j), (*s).w[i][j]);
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn forward_cooperative(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let work = Work((group / p.groups_n) * TILE_M, (group % p.groups_n) * TILE_N, 0u, p.units * 32u);
    var staging: Staging;
    var sums: Sums;
    multiply(work, lid, &staging, &sums);
    for (var i = 0u; i < MATRICES_M; i++) { // unroll
        for (var j = 0u; j < MATRICES_N; j += OUT_WIDE / SIZE) { // unroll
            let place = place_of(i, j, lid);
            for (var c = 0u; c < OUT_WIDE / SIZE; c++) { // unroll
                coopStoreT(sums[i][j + c], &out[place.at + c * SIZE], OUT_WIDE);
            }
            workgroupBarrier();
            for (var t = lid % COOPERATING; t < OUT_LEN; t += COOPERATING) {
                let row = work.row0 + place.row + t / OUT_WIDE;
                store(row, work.col0 + place.col + t % OUT_WIDE, out[place.at + t]);
            }
            workgroupBarrier();
        }
    }
}
