// matmul for GPUs with cooperative matrices; after shared.wgsl, strips.wgsl and common/matrices.wgsl.

// knobs
const COLUMN_SUMS: bool = false; // also sum the columns of b

const BLOCKS_EACH: u32 = (BLOCKS + TILE_GROUP - 1u) / TILE_GROUP; // blocks that an invocation stages

// As in tiled.wgsl: the sources of misaligned blocks are computed for each strip.
const BLOCKS_AGAIN: bool = BLOCKS_EACH > 1u && !(A_ALIGNED && B_ALIGNED);

struct Staging {
    blocks: array<Block, BLOCKS_EACH>, // `x` is the first row in the strip
    rows: array<mat4x4<f32>, BLOCKS_EACH>,
    columns: array<vec4<f32>, BLOCKS_EACH>, // sums of b's columns so far
}

// Block `t` of a strip of `len` rows of a, or columns of b, from `x0` of `size` on. Neighbours are neighbours
// along k: so they store to different banks. Where k is contiguous in memory, the rows of a block may be
// any, and are a quarter of the strip apart, for the same reason.
fn strip_block(t: u32, x0: u32, size: u32, len: u32, matrix: u32, along_k: bool) -> Block {
    let count = vec4<u32>(0u, 1u, 2u, 3u);
    let k = 4u * (t % (TILE_K / 4u));
    let x = t / (TILE_K / 4u);
    if (along_k) {
        let row = min(vec4<u32>(x0 + x) + count * (len / 4u), vec4<u32>(size - 1u));
        return Block(row * p.k + vec4<u32>(matrix + k), k, x);
    }
    return Block((vec4<u32>(k) + count) * size + vec4<u32>(matrix + min(x0 + 4u * x, size - 1u)), k, 4u * x);
}

// Block `t` of both strips, those of a first.
fn staged_block(w: Work, t: u32) -> Block {
    if (t < A_BLOCKS) {
        return strip_block(t, w.row0, p.m, TILE_M, w.matrix * p.m * p.k, !A_TRANSPOSED);
    }
    return strip_block(t - A_BLOCKS, w.col0, p.n, TILE_N, w.matrix * p.k * p.n, B_TRANSPOSED);
}

fn begin(s: ptr<function, Staging>, w: Work, lid: u32) {
    for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
        (*s).blocks[i] = staged_block(w, i * TILE_GROUP + lid);
    }
}

fn fetch(s: ptr<function, Staging>, w: Work, k: u32, lid: u32) {
    let a_last = (w.matrix + 1u) * p.m * p.k - 1u;
    let b_last = (w.matrix + 1u) * p.k * p.n - 1u;
    for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        if (BLOCKS_AGAIN) {
            (*s).blocks[i] = staged_block(w, t);
        }
        if (t < A_BLOCKS) {
            (*s).rows[i] = a_rows((*s).blocks[i], k, a_last);
        } else if (BLOCKS % TILE_GROUP == 0u || t < BLOCKS) {
            (*s).rows[i] = b_rows((*s).blocks[i], k, b_last);
        }
    }
}

fn put(s: ptr<function, Staging>, buffer: u32, lid: u32) {
    for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        let source = (*s).blocks[i];
        var rows = (*s).rows[i];
        if (t < A_BLOCKS) {
            if (A_TRANSPOSED) {
                rows = transpose(rows);
            }
            for (var j = 0u; j < 4u; j++) { // unroll
                put_a(buffer, source.x + j * select(TILE_M / 4u, 1u, A_TRANSPOSED), source.k, rows[j]);
            }
        } else if (BLOCKS % TILE_GROUP == 0u || t < BLOCKS) {
            if (COLUMN_SUMS) {
                (*s).columns[i] += (rows[0] + rows[1]) + (rows[2] + rows[3]);
            }
            if (!B_TRANSPOSED) {
                rows = transpose(rows);
            }
            for (var j = 0u; j < 4u; j++) { // unroll
                put_b(buffer, source.x + j * select(1u, TILE_N / 4u, B_TRANSPOSED), source.k, rows[j]);
            }
        }
    }
}

// Stores a tile, quad by quad, or element by element.
fn store_tile_quads(w: Work, lid: u32, sums: ptr<function, Sums>) {
    for (var i = 0u; i < MATRICES_M; i++) { // unroll
        for (var j = 0u; j < MATRICES_N; j += OUT_WIDE / SIZE) { // unroll
            let place = place_of(i, j, lid);
            for (var c = 0u; c < OUT_WIDE / SIZE; c++) { // unroll
                coopStoreT((*sums)[i][j + c], &out[place.at + c * SIZE], OUT_WIDE);
            }
            workgroupBarrier();
            for (var t = 4u * (lid % COOPERATING); t < OUT_LEN; t += 4u * COOPERATING) {
                let row = w.row0 + place.row + t / OUT_WIDE;
                let col = w.col0 + place.col + t % OUT_WIDE;
                if (row < p.m && col < p.n) {
                    store_quad((w.plane * p.m + row) * p.n, col, out_quad(place.at + t));
                }
            }
            workgroupBarrier();
        }
    }
}

fn store_tile(w: Work, lid: u32, sums: ptr<function, Sums>) {
    for (var i = 0u; i < MATRICES_M; i++) { // unroll
        for (var j = 0u; j < MATRICES_N; j += OUT_WIDE / SIZE) { // unroll
            let place = place_of(i, j, lid);
            for (var c = 0u; c < OUT_WIDE / SIZE; c++) { // unroll
                coopStoreT((*sums)[i][j + c], &out[place.at + c * SIZE], OUT_WIDE);
            }
            workgroupBarrier();
            for (var t = lid % COOPERATING; t < OUT_LEN; t += COOPERATING) {
                let row = w.row0 + place.row + t / OUT_WIDE;
                let col = w.col0 + place.col + t % OUT_WIDE;
                if (row < p.m && col < p.n) {
                    store((w.plane * p.m + row) * p.n, col, out[place.at + t]);
                }
            }
            workgroupBarrier();
        }
    }
}

@compute @workgroup_size(TILE_GROUP)
fn forward_cooperative_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    var staging: Staging;
    var sums: Sums;
    begin(&staging, w, lid);
    multiply(w, lid, &staging, &sums);
    store_tile_quads(w, lid, &sums);
}

@compute @workgroup_size(TILE_GROUP)
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
    var staging: Staging;
    var sums: Sums;
    begin(&staging, w, lid);
    multiply(w, lid, &staging, &sums);
    store_tile(w, lid, &sums);
}

// With the column sums of b as a second output: see tiled.wgsl.
@group(0) @binding(5) var<storage, read_write> b_sums: array<f32>; // [slices, n], with slices like y

// Sums the columns of the tile, through the memory in which sums have left, and stores them.
fn store_columns(w: Work, lid: u32, s: ptr<function, Staging>) {
    for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
        let t = i * TILE_GROUP + lid;
        if (t >= A_BLOCKS && t < BLOCKS) {
            let at = (*s).blocks[i].k / 4u * TILE_N + (*s).blocks[i].x;
            for (var j = 0u; j < 4u; j++) { // unroll
                out[at + j] = (*s).columns[i][j];
            }
        }
    }
    workgroupBarrier();
    for (var i = lid; i < TILE_N; i += TILE_GROUP) {
        let col = w.col0 + i;
        if (w.row0 == 0u && col < p.n) {
            var v = out[i];
            for (var k4 = 1u; k4 < TILE_K / 4u; k4++) { // unroll
                v += out[k4 * TILE_N + i];
            }
            if (p.accumulate_sums != 0u) {
                v += b_sums[w.plane * p.n + col];
            }
            b_sums[w.plane * p.n + col] = v;
        }
    }
}

@compute @workgroup_size(TILE_GROUP)
fn forward_cooperative_sums_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    var staging: Staging;
    var sums: Sums;
    begin(&staging, w, lid);
    multiply(w, lid, &staging, &sums);
    store_tile_quads(w, lid, &sums);
    store_columns(w, lid, &staging);
}

@compute @workgroup_size(TILE_GROUP)
fn forward_cooperative_sums(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    var staging: Staging;
    var sums: Sums;
    begin(&staging, w, lid);
    multiply(w, lid, &staging, &sums);
    store_tile(w, lid, &sums);
    store_columns(w, lid, &staging);
}
