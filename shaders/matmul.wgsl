// y[m, n] = sum_k op(a)[m, k] * op(b)[k, n]  (+ bias[n])  (+ y[m, n])
//
// Three kernels. `forward_lanes` is for software adapters: no barriers; a workgroup is one vector
// of lanes along n, and a lane keeps ROWS x 4*QUADS sums in registers. `forward_tiled` is for GPUs:
// a TILE_M x TILE_N tile of y a workgroup, its strips of a and b staged through workgroup memory.
// `forward_few` is for both, where y has few rows: every element of b is used but a few times, so
// all that counts is reading it in order, and k is split over invocations. Names ending in `_quads`
// store whole quads, where n is a multiple of 4.
//
// All of them load quads along whatever axis is contiguous in memory; a 4 x 4 block is transposed
// in registers where that axis is the wrong one, which costs nothing.

// knobs
const A_TRANSPOSED: bool = false; // a is [k, m] in memory, not [m, k]
const B_TRANSPOSED: bool = false; // b is [n, k] in memory, not [k, n]
const A_ALIGNED: bool = true; // a's contiguous axis is a multiple of 4
const B_ALIGNED: bool = true;
const B_PACKED: bool = false; // forward_lanes: b is as pack leaves it
const K_TAIL: bool = true; // k is no multiple of the k that the kernel takes at a time
const LANES: u32 = 8u; // invocations along n
const ROWS: u32 = 16u; // sums of an invocation: ROWS x 4*QUADS
const QUADS: u32 = 2u;
const SLICES: u32 = 1u; // forward_few: invocations that share a column
const SUBGROUP: u32 = 1u; // forward_few: how many of those can shuffle
const TILE_M: u32 = 64u; // forward_tiled; ROWS and QUADS do not count there
const TILE_N: u32 = 64u;
const TILE_ROWS: u32 = 2u; // sums of an invocation: 4*TILE_ROWS x 4*TILE_QUADS
const TILE_QUADS: u32 = 2u;

struct Params {
    m: u32,
    n: u32,
    k: u32,
    // Workgroups along n and along m; z of the dispatch is the batch.
    groups_n: u32,
    groups: u32,
    // Flags, and not knobs: the epilogue is short, and a pipeline less is half a second less to
    // compile on software adapters.
    has_bias: u32,
    accumulate: u32, // add to what y holds
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// Of the entry points that store quads.
@group(0) @binding(3) var<storage, read> bias_quads: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y_quads: array<vec4<f32>>;

// Elements `by` to `by + 3` of two quads, for `by` below 4.
fn shifted(low: vec4<f32>, high: vec4<f32>, by: u32) -> vec4<f32> {
    let odd = (by & 1u) != 0u;
    let l = select(low, vec4<f32>(low.yzw, high.x), odd);
    let h = select(high.xy, high.yz, odd);
    return select(l, vec4<f32>(l.zw, h), (by & 2u) != 0u);
}

// Elements i to i + 3 of a. `last` is the index of its last one; no quad past it is read, and what
// is read in its place is masked, or goes into sums that are not stored.
fn a_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (A_ALIGNED) {
        return a[at / 4u];
    }
    return shifted(a[at / 4u], a[min(at / 4u + 1u, last / 4u)], at % 4u);
}

fn b_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (B_ALIGNED) {
        return b[at / 4u];
    }
    return shifted(b[at / 4u], b[min(at / 4u + 1u, last / 4u)], at % 4u);
}

// Elements i to i + 4*QUADS - 1 of b.
fn b_quads(i: u32, last: u32) -> array<vec4<f32>, QUADS> {
    var quads: array<vec4<f32>, QUADS>;
    if (B_ALIGNED) {
        for (var q = 0u; q < QUADS; q++) {
            quads[q] = b[min(i / 4u + q, last / 4u)];
        }
        return quads;
    }
    var next = b[min(i, last) / 4u];
    for (var q = 0u; q < QUADS; q++) {
        let low = next;
        next = b[min(i / 4u + q + 1u, last / 4u)];
        quads[q] = shifted(low, next, i % 4u);
    }
    return quads;
}

// Zeros past the end of k, for a quad that stands at `k`, or runs along k from there.
fn mask(v: vec4<f32>, k: u32, along: bool) -> vec4<f32> {
    if (!K_TAIL) {
        return v;
    }
    return select(vec4<f32>(), v, vec4<u32>(k) + select(vec4<u32>(), vec4<u32>(0u, 1u, 2u, 3u), along) < vec4<u32>(p.k));
}

// A block of a is some rows by four k, as quads: one a row, or with A_TRANSPOSED one for each k and
// four rows. Loads quad `t` of the block at `row` and `k`. Rows past the end are clamped, as are
// the columns of b, so that loops over k have no branches; their sums are not stored.
fn a_block(t: u32, row: u32, k: u32, a0: u32, last: u32) -> vec4<f32> {
    if (A_TRANSPOSED) {
        let kt = k + t % 4u;
        return mask(a_quad(a0 + kt * p.m + min(row + t / 4u * 4u, p.m - 1u), last), kt, false);
    }
    return mask(a_quad(a0 + min(row + t, p.m - 1u) * p.k + k, last), k, true);
}

// Four k by 4*QUADS columns of b: [q][j] is row k + j, quad q.
fn b_block(col: u32, k: u32, b0: u32, last: u32) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    if (B_TRANSPOSED) {
        for (var q = 0u; q < QUADS; q++) {
            let c = vec4<u32>(col + 4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
            let at = vec4<u32>(b0 + k) + min(c, vec4<u32>(p.n - 1u)) * p.k;
            block[q] = transpose(mat4x4<f32>(
                mask(b_quad(at.x, last), k, true),
                mask(b_quad(at.y, last), k, true),
                mask(b_quad(at.z, last), k, true),
                mask(b_quad(at.w, last), k, true),
            ));
        }
        return block;
    }
    for (var j = 0u; j < 4u; j++) {
        let row = b_quads(b0 + (k + j) * p.n + min(col, p.n - 1u), last);
        for (var q = 0u; q < QUADS; q++) {
            block[q][j] = mask(row[q], k + j, false);
        }
    }
    return block;
}

// Adds four k to a quad of sums. As fma, which is what the loops consist of.
fn add_products(sum: vec4<f32>, v: vec4<f32>, block: mat4x4<f32>) -> vec4<f32> {
    return fma(vec4<f32>(v.w), block[3], fma(vec4<f32>(v.z), block[2],
        fma(vec4<f32>(v.y), block[1], fma(vec4<f32>(v.x), block[0], sum))));
}

// Stores to column `col` of the row of y that starts at `row`.
fn store(row: u32, col: u32, sum: f32) {
    var v = sum;
    if (p.has_bias != 0u) {
        v += bias[col];
    }
    if (p.accumulate != 0u) {
        v += y[row + col];
    }
    y[row + col] = v;
}

fn store_quad(row: u32, col: u32, sum: vec4<f32>) {
    var v = sum;
    if (p.has_bias != 0u) {
        v += bias_quads[col / 4u];
    }
    if (p.accumulate != 0u) {
        v += y_quads[(row + col) / 4u];
    }
    y_quads[(row + col) / 4u] = v;
}

// --- forward_lanes

const COLS: u32 = 4u * QUADS;
const SHARES: u32 = max(ROWS / LANES, 1u); // quads of a block of a that a lane loads
const SHARE_QUADS: u32 = max(min(ROWS, LANES) / 4u, 1u);

// b_block of misaligned columns. Each quad takes two, of which the first is what the block before
// ended with, and is held: loads are what costs.
fn b_block_held(
    col: u32,
    k: u32,
    b0: u32,
    last: u32,
    held: ptr<function, array<vec4<f32>, COLS>>,
) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    for (var q = 0u; q < QUADS; q++) {
        for (var j = 0u; j < 4u; j++) {
            let at = b0 + k + min(col + 4u * q + j, p.n - 1u) * p.k;
            let next = b[min(at / 4u + 1u, last / 4u)];
            block[q][j] = mask(shifted((*held)[4u * q + j], next, at % 4u), k, true);
            (*held)[4u * q + j] = next;
        }
        block[q] = transpose(block[q]);
    }
    return block;
}

// Columns of a workgroup behind one another, by k, with zeros where k ends: in memory's own order,
// whatever shape b has. Packing reads b once, the tiles read it once for every ROWS rows.
const STRIP: u32 = LANES * QUADS; // quads
@group(0) @binding(2) var<storage, read_write> packed: array<vec4<f32>>;

fn b_block_packed(strip: u32, k: u32, lane: u32) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    for (var j = 0u; j < 4u; j++) {
        for (var q = 0u; q < QUADS; q++) {
            block[q][j] = b[(strip * ((p.k + 3u) / 4u * 4u) + k + j) * STRIP + lane * QUADS + q];
        }
    }
    return block;
}

// Packs a matrix, a 4 x 4 block an invocation. It is bound as `a`: n is m here.
@compute @workgroup_size(64)
fn pack(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let width = p.groups_n * STRIP;
    let depth = (p.k + 3u) / 4u;
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= width * depth) {
        return;
    }
    let x = i % width;
    let k = i / width * 4u;
    let a0 = wid.z * p.m * p.k;
    let last = a0 + p.m * p.k - 1u;
    var rows = mat4x4<f32>(a_block(0u, 4u * x, k, a0, last), a_block(1u, 4u * x, k, a0, last),
        a_block(2u, 4u * x, k, a0, last), a_block(3u, 4u * x, k, a0, last));
    if (!A_TRANSPOSED) {
        rows = transpose(rows);
    }
    let strip = wid.z * p.groups_n + x / STRIP;
    for (var j = 0u; j < 4u; j++) {
        packed[(strip * 4u * depth + k + j) * STRIP + x % STRIP] = rows[j];
    }
}

alias Sums = array<array<array<array<vec4<f32>, QUADS>, 4>, SHARE_QUADS>, SHARES>;

// The sums of the tile that starts at (row0, col0), in matrix `z` of the batch.
fn lane_sums(row0: u32, col0: u32, z: u32, lane: u32) -> Sums {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    let a_last = a0 + p.m * p.k - 1u;
    let b_last = b0 + p.k * p.n - 1u;
    var acc: Sums;
    var held: array<vec4<f32>, COLS>;
    if (B_TRANSPOSED && !B_ALIGNED && !B_PACKED) {
        for (var j = 0u; j < COLS; j++) {
            held[j] = b[(b0 + min(col0 + j, p.n - 1u) * p.k) / 4u];
        }
    }
    for (var k = 0u; k < p.k; k += 4u) {
        var bs: array<mat4x4<f32>, QUADS>;
        if (B_PACKED) {
            bs = b_block_packed(z * p.groups_n + col0 / (LANES * COLS), k, lane);
        } else if (B_TRANSPOSED && !B_ALIGNED) {
            bs = b_block_held(col0, k, b0, b_last, &held);
        } else {
            bs = b_block(col0, k, b0, b_last);
        }
        // All lanes need all of a's block. With subgroups each loads some quads and hands them
        // round: a load costs as much as tens of multiply-adds on software adapters.
        for (var s = 0u; s < SHARES; s++) {
            var mine: vec4<f32>;
            if (SUBGROUPS) {
                mine = a_block(s * LANES + lane % ROWS, row0, k, a0, a_last);
            }
            for (var g = 0u; g < SHARE_QUADS; g++) {
                var rows: array<vec4<f32>, 4>;
                for (var i = 0u; i < 4u; i++) {
                    if (SUBGROUPS) {
                        rows[i] = from_lane(mine, 4u * g + i);
                    } else {
                        rows[i] = a_block(s * LANES + 4u * g + i, row0, k, a0, a_last);
                    }
                }
                if (A_TRANSPOSED) {
                    let t = transpose(mat4x4<f32>(rows[0], rows[1], rows[2], rows[3]));
                    rows = array<vec4<f32>, 4>(t[0], t[1], t[2], t[3]);
                }
                for (var i = 0u; i < 4u; i++) {
                    for (var q = 0u; q < QUADS; q++) {
                        acc[s][g][i][q] = add_products(acc[s][g][i][q], rows[i], bs[q]);
                    }
                }
            }
        }
    }
    return acc;
}

// The sums of a tile on their way out, through memory of the lane's own, where an index may vary: as
// unrolled code the stores would take the compiler longer than all the rest. (Loops that read them
// back count from a row and column, not from 0, which would be unrolled: the quirk
// `slow-unrolled-memory`.) No lane looks at another's, so there is no barrier.
var<workgroup> staged: array<vec4<f32>, LANES * ROWS * QUADS>;

fn stage(sums: Sums, lane: u32) {
    for (var s = 0u; s < SHARES; s++) {
        for (var g = 0u; g < SHARE_QUADS; g++) {
            for (var i = 0u; i < 4u; i++) {
                for (var q = 0u; q < QUADS; q++) {
                    staged[((s * LANES + 4u * g + i) * QUADS + q) * LANES + lane] = sums[s][g][i][q];
                }
            }
        }
    }
}

@compute @workgroup_size(LANES)
fn forward_lanes_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = (group % p.groups_n) * (LANES * COLS) + lane * COLS;
    stage(lane_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col += 4u) {
            let v = staged[((row - row0) * QUADS + (col - col0) / 4u) * LANES + lane];
            store_quad((wid.z * p.m + row) * p.n, col, v);
        }
    }
}

@compute @workgroup_size(LANES)
fn forward_lanes(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = (group % p.groups_n) * (LANES * COLS) + lane * COLS;
    stage(lane_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col++) {
            let j = col - col0;
            store((wid.z * p.m + row) * p.n, col, staged[((row - row0) * QUADS + j / 4u) * LANES + lane][j % 4u]);
        }
    }
}

// --- forward_few: y has ROWS rows. A workgroup is LANES invocations along n by SLICES along k.

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
        for (var r = 0u; r < ROWS; r++) {
            let v = mask(a_quad(a0 + r * p.k + k, a0 + ROWS * p.k - 1u), k, true);
            for (var q = 0u; q < QUADS; q++) {
                acc[r * QUADS + q] = add_products(acc[r * QUADS + q], v, bs[q]);
            }
        }
    }
    // Sums over slices, in a fixed order: within subgroups first, then through workgroup memory.
    for (var i = 0u; i < ROWS * QUADS; i++) {
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

// --- forward_tiled

const TILE_K: u32 = 16u;
const A_WIDTH: u32 = TILE_M / 4u; // quads of a k of a's strip
const B_WIDTH: u32 = TILE_N / 4u;
const DOWN: u32 = A_WIDTH / TILE_ROWS; // invocations along m and n
const ACROSS: u32 = B_WIDTH / TILE_QUADS;
const TILE_GROUP: u32 = DOWN * ACROSS;
// 4 x 4 blocks of the strips, and how many an invocation stages.
const A_BLOCKS: u32 = A_WIDTH * TILE_K / 4u;
const BLOCKS: u32 = A_BLOCKS + B_WIDTH * TILE_K / 4u;
const BLOCKS_EACH: u32 = (BLOCKS + TILE_GROUP - 1u) / TILE_GROUP;

// tile_a[k][m / 4], tile_b[k][n / 4]
var<workgroup> tile_a: array<vec4<f32>, A_WIDTH * TILE_K>;
var<workgroup> tile_b: array<vec4<f32>, B_WIDTH * TILE_K>;

// Where quad `x` of row 4*k4 of a strip is. Invocations that load along k store to four rows at a
// time, which are in the same banks of memory but for this exchange of quads.
fn slot(k4: u32, x: u32, width: u32) -> u32 {
    return 4u * k4 * width + (x ^ (2u * k4 % width));
}

// A 4 x 4 block on its way to a strip: where in memory its quads start in the strip at k = 0, its
// first k there, and its quad along m or n. Worked out once: there is little time between barriers.
struct Block {
    at: vec4<u32>,
    k: u32,
    x: u32,
}

// Block `t` of a strip along m or n, `width` quads wide, from `x0` of `size` rows or columns on.
// Neighbouring invocations load neighbouring quads.
fn block(t: u32, x0: u32, size: u32, width: u32, matrix: u32, along_k: bool) -> Block {
    let count = vec4<u32>(0u, 1u, 2u, 3u);
    let x = select(t % width, t / (TILE_K / 4u), along_k);
    let k = 4u * select(t / width, t % (TILE_K / 4u), along_k);
    if (along_k) {
        let row = min(vec4<u32>(x0 + 4u * x) + count, vec4<u32>(size - 1u));
        return Block(row * p.k + vec4<u32>(matrix + k), k, x);
    }
    return Block((vec4<u32>(k) + count) * size + vec4<u32>(matrix + min(x0 + 4u * x, size - 1u)), k, x);
}

// The block in the strip at `k`, as quads along m, by k.
fn load_a(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let at = source.at + vec4<u32>(k * select(1u, p.m, A_TRANSPOSED));
    var rows: mat4x4<f32>;
    for (var j = 0u; j < 4u; j++) {
        rows[j] = mask(a_quad(at[j], last), source.k + k + select(0u, j, A_TRANSPOSED), !A_TRANSPOSED);
    }
    if (A_TRANSPOSED) {
        return rows;
    }
    return transpose(rows);
}

fn load_b(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let at = source.at + vec4<u32>(k * select(p.n, 1u, B_TRANSPOSED));
    var rows: mat4x4<f32>;
    for (var j = 0u; j < 4u; j++) {
        rows[j] = mask(b_quad(at[j], last), source.k + k + select(j, 0u, B_TRANSPOSED), B_TRANSPOSED);
    }
    if (B_TRANSPOSED) {
        return transpose(rows);
    }
    return rows;
}

// [row / 4][row % 4][quad of columns]
alias TileSums = array<array<array<vec4<f32>, TILE_QUADS>, 4>, TILE_ROWS>;

// Invocation (x, y) sums quads x, x + ACROSS.. of columns and y, y + DOWN.. of rows: neighbours read
// neighbouring quads of workgroup memory, or the same.
fn tile_sums(row0: u32, col0: u32, z: u32, lid: u32) -> TileSums {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    var blocks: array<Block, BLOCKS_EACH>;
    for (var i = 0u; i < BLOCKS_EACH; i++) {
        let t = i * TILE_GROUP + lid;
        if (t < A_BLOCKS) {
            blocks[i] = block(t, row0, p.m, A_WIDTH, a0, !A_TRANSPOSED);
        } else {
            blocks[i] = block(t - A_BLOCKS, col0, p.n, B_WIDTH, b0, B_TRANSPOSED);
        }
    }
    var acc: TileSums;
    for (var k = 0u; k < p.k; k += TILE_K) {
        for (var i = 0u; i < BLOCKS_EACH; i++) {
            let t = i * TILE_GROUP + lid;
            if (t < A_BLOCKS) {
                let rows = load_a(blocks[i], k, a0 + p.m * p.k - 1u);
                for (var j = 0u; j < 4u; j++) {
                    tile_a[slot(blocks[i].k / 4u, blocks[i].x, A_WIDTH) + j * A_WIDTH] = rows[j];
                }
            } else if (BLOCKS % TILE_GROUP == 0u || t < BLOCKS) {
                let rows = load_b(blocks[i], k, b0 + p.k * p.n - 1u);
                for (var j = 0u; j < 4u; j++) {
                    tile_b[slot(blocks[i].k / 4u, blocks[i].x, B_WIDTH) + j * B_WIDTH] = rows[j];
                }
            }
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < TILE_K / 4u; k4++) {
            for (var j = 0u; j < 4u; j++) {
                var va: array<vec4<f32>, TILE_ROWS>;
                for (var i = 0u; i < TILE_ROWS; i++) {
                    va[i] = tile_a[slot(k4, lid / ACROSS + i * DOWN, A_WIDTH) + j * A_WIDTH];
                }
                for (var q = 0u; q < TILE_QUADS; q++) {
                    let vb = tile_b[slot(k4, lid % ACROSS + q * ACROSS, B_WIDTH) + j * B_WIDTH];
                    for (var i = 0u; i < TILE_ROWS; i++) {
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
    return acc;
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
    let row0 = (group / p.groups_n) * TILE_M;
    let col0 = (group % p.groups_n) * TILE_N;
    let sums = tile_sums(row0, col0, wid.z, lid);
    for (var i = 0u; i < TILE_ROWS; i++) {
        for (var r = 0u; r < 4u; r++) {
            let row = row0 + 4u * (lid / ACROSS + i * DOWN) + r;
            for (var q = 0u; q < TILE_QUADS; q++) {
                let col = col0 + 4u * (lid % ACROSS + q * ACROSS);
                if (row < p.m && col < p.n) {
                    store_quad((wid.z * p.m + row) * p.n, col, sums[i][r][q]);
                }
            }
        }
    }
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
    let row0 = (group / p.groups_n) * TILE_M;
    let col0 = (group % p.groups_n) * TILE_N;
    let sums = tile_sums(row0, col0, wid.z, lid);
    for (var i = 0u; i < TILE_ROWS; i++) {
        for (var r = 0u; r < 4u; r++) {
            let row = row0 + 4u * (lid / ACROSS + i * DOWN) + r;
            for (var q = 0u; q < TILE_QUADS; q++) {
                let col = col0 + 4u * (lid % ACROSS + q * ACROSS);
                for (var j = 0u; j < 4u; j++) {
                    if (row < p.m && col + j < p.n) {
                        store((wid.z * p.m + row) * p.n, col + j, sums[i][r][q][j]);
                    }
                }
            }
        }
    }
}
