// matmul for GPUs; after shared.wgsl and strips.wgsl. A workgroup makes a tile of y, whose strips of a
// and b are staged in workgroup memory.

// knobs
const TILE_ROWS: u32 = 2u; // sums of an invocation: 4*TILE_ROWS x 4*TILE_QUADS
const TILE_QUADS: u32 = 2u;
const COLUMN_SUMS: bool = false; // also sum the columns of b

const DOWN: u32 = A_WIDTH / TILE_ROWS; // invocations along m
const ACROSS: u32 = B_WIDTH / TILE_QUADS; // along n
const TILE_GROUP: u32 = DOWN * ACROSS;
const BLOCKS_EACH: u32 = (BLOCKS + TILE_GROUP - 1u) / TILE_GROUP; // blocks that an invocation stages

// Quads that straddle two take registers that the sources of several blocks would need: those are computed
// for each strip then, or cards with 128 registers spill.
const BLOCKS_AGAIN: bool = BLOCKS_EACH > 1u && !(A_ALIGNED && B_ALIGNED);

var<workgroup> tile_a: array<vec4<f32>, A_WIDTH * TILE_K>; // [k][m / 4]
var<workgroup> tile_b: array<vec4<f32>, B_WIDTH * TILE_K>; // [k][n / 4]

// Where quad `x` of row 4*k4 of a strip is. Invocations that load along k store to four rows at a
// time; without this exchange of quads, those would be in the same banks of memory.
fn slot(k4: u32, x: u32, width: u32) -> u32 {
    return 4u * k4 * width + (x ^ (2u * k4 % width));
}

// Block `t` of both strips, those of a first.
fn staged_block(w: Work, t: u32) -> Block {
    if (t < A_BLOCKS) {
        return block(t, w.row0, p.m, A_WIDTH, w.matrix * p.m * p.k, !A_TRANSPOSED);
    }
    return block(t - A_BLOCKS, w.col0, p.n, B_WIDTH, w.matrix * p.k * p.n, B_TRANSPOSED);
}

// A block of a's strip as quads along m, by k.
fn load_a(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let rows = a_rows(source, k, last);
    if (A_TRANSPOSED) {
        return rows;
    }
    return transpose(rows);
}

// One of b's as quads along n, by k.
fn load_b(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let rows = b_rows(source, k, last);
    if (B_TRANSPOSED) {
        return transpose(rows);
    }
    return rows;
}

// [row / 4][row % 4][quad of columns]
alias TileSums = array<array<array<vec4<f32>, TILE_QUADS>, 4>, TILE_ROWS>;

// Invocation (x, y) sums quads x, x + ACROSS.. of columns and y, y + DOWN.. of rows: neighbours read
// neighbouring quads of workgroup memory, or the same.
fn tile_sums(w: Work, lid: u32) -> TileSums {
    let a0 = w.matrix * p.m * p.k;
    let b0 = w.matrix * p.k * p.n;
    var blocks: array<Block, BLOCKS_EACH>;
    for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
        blocks[i] = staged_block(w, i * TILE_GROUP + lid);
    }
    var acc: TileSums;
    var columns: array<vec4<f32>, BLOCKS_EACH>;
    for (var k = w.k; k < w.k_end; k += TILE_K) {
        for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
            let t = i * TILE_GROUP + lid;
            if (BLOCKS_AGAIN) {
                blocks[i] = staged_block(w, t);
            }
            if (t < A_BLOCKS) {
                let rows = load_a(blocks[i], k, a0 + p.m * p.k - 1u);
                for (var j = 0u; j < 4u; j++) { // unroll
                    tile_a[slot(blocks[i].k / 4u, blocks[i].x, A_WIDTH) + j * A_WIDTH] = rows[j];
                }
            } else if (BLOCKS % TILE_GROUP == 0u || t < BLOCKS) {
                let rows = load_b(blocks[i], k, b0 + p.k * p.n - 1u);
                for (var j = 0u; j < 4u; j++) { // unroll
                    tile_b[slot(blocks[i].k / 4u, blocks[i].x, B_WIDTH) + j * B_WIDTH] = rows[j];
                }
                if (COLUMN_SUMS) {
                    columns[i] += (rows[0] + rows[1]) + (rows[2] + rows[3]);
                }
            }
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < TILE_K / 4u; k4++) { // unroll
            for (var j = 0u; j < 4u; j++) { // unroll
                var va: array<vec4<f32>, TILE_ROWS>;
                for (var i = 0u; i < TILE_ROWS; i++) { // unroll
                    va[i] = tile_a[slot(k4, lid / ACROSS + i * DOWN, A_WIDTH) + j * A_WIDTH];
                }
                for (var q = 0u; q < TILE_QUADS; q++) { // unroll
                    let vb = tile_b[slot(k4, lid % ACROSS + q * ACROSS, B_WIDTH) + j * B_WIDTH];
                    for (var i = 0u; i < TILE_ROWS; i++) { // unroll
                        acc[i][0][q] = fma(vec4<f32>(va[i].x), vb, acc[i][0][q]);
                        acc[i][1][q] = fma(vec4<f32>(va[i].y), vb, acc[i][1][q]);
                        acc[i][2][q] = fma(vec4<f32>(va[i].z), vb, acc[i][2][q]);
                        acc[i][3][q] = fma(vec4<f32>(va[i].w), vb, acc[i][3][q]);
                    }
                }
            }
        }
        workgroupBarrier();
    }
    if (COLUMN_SUMS) {
        for (var i = 0u; i < BLOCKS_EACH; i++) { // unroll
            let t = i * TILE_GROUP + lid;
            if (t >= A_BLOCKS && t < BLOCKS) {
                tile_b[blocks[i].k / 4u * B_WIDTH + blocks[i].x] = columns[i];
            }
        }
        workgroupBarrier();
    }
    return acc;
}

// The column sums of b that `tile_sums` leaves in workgroup memory, of quad `x` of the tile's columns.
fn column_sums(x: u32) -> vec4<f32> {
    var sum = tile_b[x];
    for (var k4 = 1u; k4 < TILE_K / 4u; k4++) { // unroll
        sum += tile_b[k4 * B_WIDTH + x];
    }
    return sum;
}

// Stores a tile, quad by quad, or element by element.
fn store_tile_quads(w: Work, lid: u32, sums: TileSums) {
    for (var i = 0u; i < TILE_ROWS; i++) { // unroll
        for (var r = 0u; r < 4u; r++) { // unroll
            let row = w.row0 + 4u * (lid / ACROSS + i * DOWN) + r;
            for (var q = 0u; q < TILE_QUADS; q++) { // unroll
                let col = w.col0 + 4u * (lid % ACROSS + q * ACROSS);
                if (row < p.m && col < p.n) {
                    store_quad((w.plane * p.m + row) * p.n, col, sums[i][r][q]);
                }
            }
        }
    }
}

fn store_tile(w: Work, lid: u32, sums: TileSums) {
    for (var i = 0u; i < TILE_ROWS; i++) { // unroll
        for (var r = 0u; r < 4u; r++) { // unroll
            let row = w.row0 + 4u * (lid / ACROSS + i * DOWN) + r;
            for (var q = 0u; q < TILE_QUADS; q++) { // unroll
                let col = w.col0 + 4u * (lid % ACROSS + q * ACROSS);
                for (var j = 0u; j < 4u; j++) { // unroll
                    if (row < p.m && col + j < p.n) {
                        store((w.plane * p.m + row) * p.n, col + j, sums[i][r][q][j]);
                    }
                }
            }
        }
    }
}

@compute @workgroup_size(TILE_GROUP)
fn forward_tiled_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    store_tile_quads(w, lid, tile_sums(w, lid));
}

@compute @workgroup_size(TILE_GROUP)
fn forward_tiled(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    store_tile(w, lid, tile_sums(w, lid));
}

// With the column sums of b as a second output. All workgroups of a column of tiles have them; the first
// stores them.
@group(0) @binding(5) var<storage, read_write> b_sums_quads: array<vec4<f32>>; // [slices, n], with slices like y
@group(0) @binding(5) var<storage, read_write> b_sums: array<f32>; // [slices, n]

@compute @workgroup_size(TILE_GROUP)
fn forward_tiled_sums_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    store_tile_quads(w, lid, tile_sums(w, lid));
    let col = w.col0 + 4u * lid;
    if (w.row0 == 0u && lid < B_WIDTH && col < p.n) {
        var v = column_sums(lid);
        if (p.accumulate_sums != 0u) {
            v += b_sums_quads[(w.plane * p.n + col) / 4u];
        }
        b_sums_quads[(w.plane * p.n + col) / 4u] = v;
    }
}

@compute @workgroup_size(TILE_GROUP)
fn forward_tiled_sums(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    store_tile(w, lid, tile_sums(w, lid));
    let col = w.col0 + 4u * lid;
    if (w.row0 == 0u && lid < B_WIDTH) {
        let v = column_sums(lid);
        for (var j = 0u; j < 4u; j++) { // unroll
            if (col + j < p.n) {
                let old = select(0.0, b_sums[w.plane * p.n + col + j], p.accumulate_sums != 0u);
                b_sums[w.plane * p.n + col + j] = old + v[j];
            }
        }
    }
}
