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
const ROW_QUADS: u32 = ROWS / 4u;

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

// Elements i to i + 3 of a. Where a is not in quads, `last` bounds each index.
fn a_quad(i: u32, last: u32) -> vec4<f32> {
    if (A_QUADS) {
        return vec4<f32>(a[i / 4u]);
    }
    return vec4<f32>(a_at(i), a_at(min(i + 1u, last)), a_at(min(i + 2u, last)), a_at(min(i + 3u, last)));
}

fn b_quad(i: u32, last: u32) -> vec4<f32> {
    if (B_QUADS) {
        return vec4<f32>(b[i / 4u]);
    }
    return vec4<f32>(b_at(i), b_at(min(i + 1u, last)), b_at(min(i + 2u, last)), b_at(min(i + 3u, last)));
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

alias Sums = array<array<vec4<f32>, QUADS>, ROWS>;

// The sums of the tile that starts at (row0, col0), in matrix `z` of the batch.
fn tile_sums(row0: u32, col0: u32, z: u32) -> Sums {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    let a_last = a0 + p.m * p.k - 1u;
    let b_last = b0 + p.k * p.n - 1u;

    // Where the quads of this lane start at k = 0: rows and columns past the end are clamped, so
    // that the loop has no branches; their sums are not stored.
    var a_row: array<u32, ROWS>;
    for (var i = 0u; i < ROWS; i++) {
        if (A_TRANSPOSED) {
            a_row[i] = a0 + min(row0 + i, p.m - 1u);
        } else {
            a_row[i] = a0 + min(row0 + i, p.m - 1u) * p.k;
        }
    }
    var b_col: array<u32, COLS>;
    for (var j = 0u; j < COLS; j++) {
        if (B_TRANSPOSED) {
            b_col[j] = b0 + min(col0 + j, p.n - 1u) * p.k;
        } else {
            b_col[j] = b0 + min(col0 + j, p.n - 1u);
        }
    }

    var acc: Sums;
    let whole = p.k / 4u * 4u;
    for (var k = 0u; k < whole; k += 4u) {
        // av[i] holds a[row i, k..k+4]; bv[q][j] holds b[k + j, quad q].
        var av: array<vec4<f32>, ROWS>;
        if (A_TRANSPOSED) {
            for (var q = 0u; q < ROW_QUADS; q++) {
                let at = a_row[4u * q] + k * p.m;
                let t = transpose(mat4x4<f32>(
                    a_quad(at, a_last),
                    a_quad(at + p.m, a_last),
                    a_quad(at + 2u * p.m, a_last),
                    a_quad(at + 3u * p.m, a_last),
                ));
                av[4u * q] = t[0];
                av[4u * q + 1u] = t[1];
                av[4u * q + 2u] = t[2];
                av[4u * q + 3u] = t[3];
            }
        } else {
            for (var i = 0u; i < ROWS; i++) {
                av[i] = a_quad(a_row[i] + k, a_last);
            }
        }
        for (var q = 0u; q < QUADS; q++) {
            var bv: mat4x4<f32>;
            if (B_TRANSPOSED) {
                bv = transpose(mat4x4<f32>(
                    b_quad(b_col[4u * q] + k, b_last),
                    b_quad(b_col[4u * q + 1u] + k, b_last),
                    b_quad(b_col[4u * q + 2u] + k, b_last),
                    b_quad(b_col[4u * q + 3u] + k, b_last),
                ));
            } else {
                let at = b_col[4u * q] + k * p.n;
                bv = mat4x4<f32>(
                    b_quad(at, b_last),
                    b_quad(at + p.n, b_last),
                    b_quad(at + 2u * p.n, b_last),
                    b_quad(at + 3u * p.n, b_last),
                );
            }
            for (var i = 0u; i < ROWS; i++) {
                let v = av[i];
                acc[i][q] = fma(vec4<f32>(v.w), bv[3], fma(vec4<f32>(v.z), bv[2],
                    fma(vec4<f32>(v.y), bv[1], fma(vec4<f32>(v.x), bv[0], acc[i][q]))));
            }
        }
    }
    if (!K_TAIL) {
        return acc;
    }
    for (var k = whole; k < p.k; k++) {
        for (var i = 0u; i < ROWS; i++) {
            let at = a_row[i] + select(k, k * p.m, A_TRANSPOSED);
            let v = vec4<f32>(a_at(at));
            for (var q = 0u; q < QUADS; q++) {
                let step = select(k * p.n, k, B_TRANSPOSED);
                let c = 4u * q;
                let w = vec4<f32>(b_at(b_col[c] + step), b_at(b_col[c + 1u] + step),
                    b_at(b_col[c + 2u] + step), b_at(b_col[c + 3u] + step));
                acc[i][q] = fma(v, w, acc[i][q]);
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
    for (var i = 0u; i < ROWS; i++) {
        for (var q = 0u; q < QUADS; q++) {
            staged[(i * QUADS + q) * LANES + lane] = sums[i][q];
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
    stage(tile_sums(row0, col0, wid.z), lane);
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
    stage(tile_sums(row0, col0, wid.z), lane);
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
