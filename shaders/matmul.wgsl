// y[m, n] = sum_k op(a)[m, k] * op(b)[k, n]  (+ bias[n])  (+ y[m, n])
//
// `forward_quads` and `forward` are for software adapters: no workgroup memory, no barriers; a
// workgroup is one vector of lanes along n, and a lane keeps ROWS x 4*QUADS sums in registers. The
// first stores whole quads, where n is a multiple of 4. `forward_tiled` is for GPUs: a 64 x 64 tile
// staged through workgroup memory, 4 x 4 sums an invocation.
//
// Loads go in quads along whatever axis is contiguous in memory; a quad block is transposed in
// registers where that axis is the wrong one, which costs nothing.

// knobs
const A_TRANSPOSED: bool = false; // a is [k, m] in memory, not [m, k]
const B_TRANSPOSED: bool = false; // b is [n, k] in memory, not [k, n]
const LANES: u32 = 8u;
const ROWS: u32 = 16u;
const QUADS: u32 = 2u;
alias A = vec4<f32>; // f32 where a's contiguous axis is no multiple of 4
alias B = vec4<f32>;
const A_QUADS: bool = true; // A is vec4<f32>
const B_QUADS: bool = true;
const K_TAIL: bool = true; // k is no multiple of 4

const COLS: u32 = 4u * QUADS;
const SHARES: u32 = max(ROWS / LANES, 1u); // quads of a block of a that a lane loads
const SHARE_QUADS: u32 = min(ROWS, LANES) / 4u;

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
@group(0) @binding(1) var<storage, read> a: array<A>;
@group(0) @binding(2) var<storage, read> b: array<B>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// forward_quads
@group(0) @binding(3) var<storage, read> bias_quads: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y_quads: array<vec4<f32>>;

// Element `i` of a, however it is bound.
fn a_at(i: u32) -> f32 {
    if (A_QUADS) {
        return vec4<f32>(a[i / 4u])[i % 4u];
    }
    return vec4<f32>(a[i]).x;
}

fn b_at(i: u32) -> f32 {
    if (B_QUADS) {
        return vec4<f32>(b[i / 4u])[i % 4u];
    }
    return vec4<f32>(b[i]).x;
}

// Elements i to i + 3 of a; where they could pass its end, `last` bounds each index.
fn a_quad(i: u32, last: u32) -> vec4<f32> {
    if (A_QUADS) {
        return vec4<f32>(a[select(i, min(i, last), K_TAIL) / 4u]);
    }
    return vec4<f32>(a_at(min(i, last)), a_at(min(i + 1u, last)), a_at(min(i + 2u, last)), a_at(min(i + 3u, last)));
}

fn b_quad(i: u32, last: u32) -> vec4<f32> {
    if (B_QUADS) {
        return vec4<f32>(b[select(i, min(i, last), K_TAIL) / 4u]);
    }
    return vec4<f32>(b_at(min(i, last)), b_at(min(i + 1u, last)), b_at(min(i + 2u, last)), b_at(min(i + 3u, last)));
}

// Zeros past the end of k, for a quad that stands at `k`, or runs along k from there.
fn mask(v: vec4<f32>, k: u32, along: bool) -> vec4<f32> {
    if (!K_TAIL) {
        return v;
    }
    return select(vec4<f32>(), v, vec4<u32>(k) + select(vec4<u32>(), vec4<u32>(0u, 1u, 2u, 3u), along) < vec4<u32>(p.k));
}

// Column `col` of the row of y that starts at `row`.
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

alias Sums = array<array<array<array<vec4<f32>, QUADS>, 4>, SHARE_QUADS>, SHARES>;

// A block of a is ROWS rows by four k: ROWS quads, one a row, or with A_TRANSPOSED one for each k and
// four rows. Loads quad `t` of the block at `k`. Rows past the end are clamped, as are the columns
// of b, so that the loop has no branches; their sums are not stored.
fn a_block(t: u32, row0: u32, k: u32, a0: u32, last: u32) -> vec4<f32> {
    if (A_TRANSPOSED) {
        let kt = k + t % 4u;
        return mask(a_quad(a0 + kt * p.m + min(row0 + t / 4u * 4u, p.m - 1u), last), kt, false);
    }
    return mask(a_quad(a0 + min(row0 + t, p.m - 1u) * p.k + k, last), k, true);
}

// The sums of the tile that starts at (row0, col0), in matrix `z` of the batch.
fn tile_sums(row0: u32, col0: u32, z: u32, lane: u32) -> Sums {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    let a_last = a0 + p.m * p.k - 1u;
    let b_last = b0 + p.k * p.n - 1u;
    var cols: array<u32, COLS>;
    for (var j = 0u; j < COLS; j++) {
        cols[j] = b0 + min(col0 + j, p.n - 1u) * select(1u, p.k, B_TRANSPOSED);
    }
    var acc: Sums;
    for (var k = 0u; k < p.k; k += 4u) {
        // bs[q][j]: row k + j, quad q of this lane's columns.
        var bs: array<mat4x4<f32>, QUADS>;
        for (var q = 0u; q < QUADS; q++) {
            let c = 4u * q;
            if (B_TRANSPOSED) {
                bs[q] = transpose(mat4x4<f32>(
                    mask(b_quad(cols[c] + k, b_last), k, true),
                    mask(b_quad(cols[c + 1u] + k, b_last), k, true),
                    mask(b_quad(cols[c + 2u] + k, b_last), k, true),
                    mask(b_quad(cols[c + 3u] + k, b_last), k, true),
                ));
            } else {
                let at = cols[c] + k * p.n;
                bs[q] = mat4x4<f32>(
                    mask(b_quad(at, b_last), k, false),
                    mask(b_quad(at + p.n, b_last), k + 1u, false),
                    mask(b_quad(at + 2u * p.n, b_last), k + 2u, false),
                    mask(b_quad(at + 3u * p.n, b_last), k + 3u, false),
                );
            }
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
                    let v = rows[i];
                    for (var q = 0u; q < QUADS; q++) {
                        acc[s][g][i][q] = fma(vec4<f32>(v.w), bs[q][3], fma(vec4<f32>(v.z), bs[q][2],
                            fma(vec4<f32>(v.y), bs[q][1], fma(vec4<f32>(v.x), bs[q][0], acc[s][g][i][q]))));
                    }
                }
            }
        }
    }
    return acc;
}

// The sums of a tile on their way out, through memory of the lane's own, where an index may vary: as
// unrolled code the stores would take the compiler longer than all the rest. (Loops that read them
// back count from a row and column, not from 0, or Mesa 25 would unroll them.) No lane looks at
// another's, so there is no barrier.
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
fn forward_quads(
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
    stage(tile_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        let at = (wid.z * p.m + row) * p.n;
        for (var col = col0; col < min(col0 + COLS, p.n); col += 4u) {
            var v = staged[((row - row0) * QUADS + (col - col0) / 4u) * LANES + lane];
            if (p.has_bias != 0u) {
                v += bias_quads[col / 4u];
            }
            if (p.accumulate != 0u) {
                v += y_quads[(at + col) / 4u];
            }
            y_quads[(at + col) / 4u] = v;
        }
    }
}

@compute @workgroup_size(LANES)
fn forward(
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
    stage(tile_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        let at = (wid.z * p.m + row) * p.n;
        for (var col = col0; col < min(col0 + COLS, p.n); col++) {
            let j = col - col0;
            store(at, col, staged[((row - row0) * QUADS + j / 4u) * LANES + lane][j % 4u]);
        }
    }
}

const TILE: u32 = 64u;
const TILE_K: u32 = 16u;
const TILE_QUADS: u32 = TILE / 4u;

// tile_a[k][m / 4], tile_b[k][n / 4]
var<workgroup> tile_a: array<vec4<f32>, TILE_QUADS * TILE_K>;
var<workgroup> tile_b: array<vec4<f32>, TILE_QUADS * TILE_K>;

fn a_elem(base: u32, row: u32, k: u32) -> f32 {
    if (row >= p.m || k >= p.k) {
        return 0.0;
    }
    return a_at(base + select(row * p.k + k, k * p.m + row, A_TRANSPOSED));
}

fn b_elem(base: u32, k: u32, col: u32) -> f32 {
    if (col >= p.n || k >= p.k) {
        return 0.0;
    }
    return b_at(base + select(k * p.n + col, col * p.k + k, B_TRANSPOSED));
}

@compute @workgroup_size(16, 16)
fn forward_tiled(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_id) lid: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * TILE;
    let col0 = (group % p.groups_n) * TILE;
    let a0 = wid.z * p.m * p.k;
    let b0 = wid.z * p.k * p.n;
    // Which quad of each tile this invocation loads.
    let lk = index / TILE_QUADS;
    let lq = index % TILE_QUADS;

    var acc: array<vec4<f32>, 4>;
    for (var k = 0u; k < p.k; k += TILE_K) {
        let r = row0 + 4u * lq;
        let c = col0 + 4u * lq;
        let kk = k + lk;
        tile_a[lk * TILE_QUADS + lq] =
            vec4<f32>(a_elem(a0, r, kk), a_elem(a0, r + 1u, kk), a_elem(a0, r + 2u, kk), a_elem(a0, r + 3u, kk));
        tile_b[lk * TILE_QUADS + lq] =
            vec4<f32>(b_elem(b0, kk, c), b_elem(b0, kk, c + 1u), b_elem(b0, kk, c + 2u), b_elem(b0, kk, c + 3u));
        workgroupBarrier();
        for (var t = 0u; t < TILE_K; t++) {
            let va = tile_a[t * TILE_QUADS + lid.y];
            let vb = tile_b[t * TILE_QUADS + lid.x];
            acc[0] = fma(vec4<f32>(va.x), vb, acc[0]);
            acc[1] = fma(vec4<f32>(va.y), vb, acc[1]);
            acc[2] = fma(vec4<f32>(va.z), vb, acc[2]);
            acc[3] = fma(vec4<f32>(va.w), vb, acc[3]);
        }
        workgroupBarrier();
    }
    let col = col0 + 4u * lid.x;
    for (var i = 0u; i < 4u; i++) {
        let row = row0 + 4u * lid.y + i;
        if (row >= p.m) {
            return;
        }
        let at = wid.z * p.m * p.n + row * p.n;
        for (var j = 0u; j < min(4u, p.n - min(col, p.n)); j++) {
            store(at, col + j, acc[i][j]);
        }
    }
}
