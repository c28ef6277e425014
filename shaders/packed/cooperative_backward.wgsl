// dx = dy w on GPUs with cooperative matrices; after decode.wgsl, shared.wgsl and common/matrices.wgsl. Strips
// go along n; columns of a tile are those of whole pieces, in the order that these have them.

// knobs
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u; // along k of the product whose gradient this is

const TILE_K: u32 = 16u;

@group(0) @binding(2) var<storage, read> dy: array<f32>; // [m, n]
@group(0) @binding(3) var<storage, read_write> dx: array<vec4<f32>>; // [m, units, 8] of vec4

const PARTS: u32 = TILE_N / 4u / PIECE; // pieces of a tile's columns
const DY_EACH: u32 = (TILE_K / 4u * TILE_M + GROUP - 1u) / GROUP; // quads of dy that an invocation stages
const W_EACH: u32 = (TILE_K * PARTS + GROUP - 1u) / GROUP; // pieces of w

struct Work {
    row0: u32,
    piece0: u32,
    k: u32,
    k_end: u32,
}

struct Staging {
    dy: array<vec4<f32>, DY_EACH>,
    w: array<Piece, W_EACH>,
}

fn dy_quad(row: u32, n: u32) -> vec4<f32> {
    let at = min(row, p.m - 1u) * p.n;
    let cols = vec4<u32>(n) + vec4<u32>(0u, 1u, 2u, 3u);
    let source = min(cols, vec4<u32>(p.n - 1u)) + vec4<u32>(at);
    let v = vec4<f32>(dy[source.x], dy[source.y], dy[source.z], dy[source.w]);
    return select(vec4<f32>(), v, cols < vec4<u32>(p.n));
}

fn fetch(s: ptr<function, Staging>, work: Work, n: u32, lid: u32) {
    for (var i = 0u; i < DY_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K / 4u * TILE_M % GROUP == 0u || t < TILE_K / 4u * TILE_M) {
            (*s).dy[i] = dy_quad(work.row0 + t / (TILE_K / 4u), n + 4u * (t % (TILE_K / 4u)));
        }
    }
    for (var i = 0u; i < W_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K * PARTS % GROUP == 0u || t < TILE_K * PARTS) {
            let row = min(n + t / PARTS, p.n - 1u);
            (*s).w[i] = piece(row * p.units, min(work.piece0 + t % PARTS, p.units * 8u / PIECE - 1u));
        }
    }
}

fn put(s: ptr<function, Staging>, buffer: u32, lid: u32) {
    for (var i = 0u; i < DY_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K / 4u * TILE_M % GROUP == 0u || t < TILE_K / 4u * TILE_M) {
            put_a(buffer, t / (TILE_K / 4u), 4u * (t % (TILE_K / 4u)), (*s).dy[i]);
        }
    }
    for (var i = 0u; i < W_EACH; i++) { // unroll
        let t = i * GROUP + lid;
        if (TILE_K * PARTS % GROUP == 0u || t < TILE_K * PARTS) {
            for (var j = 0u; j < PIECE; j++) { // unroll
                put_b(buffer, t / PARTS, 4u * (t % PARTS * PIECE + j), (*s).w[i][j]);
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn backward_cooperative(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let work = Work((group / p.groups_n) * TILE_M, (group % p.groups_n) * PARTS, 0u, p.n);
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
            for (var t = 4u * (lid % COOPERATING); t < OUT_LEN; t += 4u * COOPERATING) {
                let row = work.row0 + place.row + t / OUT_WIDE;
                let quad = (place.col + t % OUT_WIDE) / 4u;
                let piece = work.piece0 + quad / PIECE;
                if (row < p.m && piece < p.units * 8u / PIECE) {
                    let to = row * p.units * 8u + piece_quad(piece, quad % PIECE);
                    var v = out_quad(place.at + t);
                    if (p.accumulate != 0u) {
                        v += dx[to];
                    }
                    dx[to] = v;
                }
            }
            workgroupBarrier();
        }
    }
}
