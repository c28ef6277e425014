// y[s] = x[s] w[ids[s]] (+ y[s]) for each sequence s of rows, with zeros where there is no such matrix; after
// shared.wgsl. x is bound as `a` and w as `b`.
//
// A workgroup makes ROWS rows of one sequence, which so have one matrix, and LANES times COLS columns; SLICES
// invocations share each. `forward_quads` is for one slice, and keeps out of workgroup memory.

// knobs
const SHARED: bool = false; // each lane loads some rows of x, and hands them round

@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [sequences, rows, n]

// Entry points that store quads.
@group(0) @binding(4) var<storage, read_write> y_quads: array<vec4<f32>>; // [sequences, rows, n]

// What a workgroup makes.
struct Work {
    sequence: u32,
    row0: u32, // in the sequence
    col0: u32,
}

fn work(group: u32) -> Work {
    let down = group / p.groups_n;
    return Work(down / p.groups_rows, down % p.groups_rows * ROWS, group % p.groups_n * LANES * COLS);
}

// The first column of an invocation.
fn column(w: Work, lid: u32) -> u32 {
    return w.col0 + lid % LANES * COLS;
}

// Four k of a row of x. Rows past the end are clamped, as columns are in `b_block`.
fn x_quad(w: Work, row: u32, k: u32) -> vec4<f32> {
    let first = w.sequence * p.rows;
    let last = (first + p.rows) * p.k - 1u;
    return mask(a_quad((first + min(w.row0 + row, p.rows - 1u)) * p.k + k, last), k, true);
}

// The sums of an invocation's slice. An id without a matrix has no terms.
fn sums_of(w: Work, lid: u32) -> Sums {
    let id = ids[w.sequence];
    let found = id < p.count;
    let k_end = select(0u, p.k, found);
    let b0 = select(0u, id, found) * p.k * p.n;
    var acc: Sums;
    for (var k0 = 0u; k0 < k_end; k0 += 4u * SLICES) {
        let k = k0 + 4u * (lid / LANES);
        let block = b_block(column(w, lid), k, b0, b0 + p.k * p.n - 1u);
        var mine: vec4<f32>;
        if (SUBGROUPS && SHARED) {
            mine = x_quad(w, lid % ROWS, k);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            var v: vec4<f32>;
            if (SUBGROUPS && SHARED) {
                v = from_lane(mine, r);
            } else {
                v = x_quad(w, r, k);
            }
            for (var q = 0u; q < QUADS; q++) { // unroll
                acc[r * QUADS + q] = add_products(acc[r * QUADS + q], v, block[q]);
            }
        }
    }
    return acc;
}

fn store_quad(w: Work, row: u32, col: u32, sum: vec4<f32>) {
    let at = ((w.sequence * p.rows + row) * p.n + col) / 4u;
    var v = sum;
    if (p.accumulate != 0u) {
        v += y_quads[at];
    }
    y_quads[at] = v;
}

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    let col0 = column(w, lid);
    reduce(sums_of(w, lid), lid);
    if (lid >= LANES) {
        return;
    }
    for (var row = w.row0; row < min(w.row0 + ROWS, p.rows); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col++) {
            let j = col - col0;
            let at = (w.sequence * p.rows + row) * p.n + col;
            var v = partial[((row - w.row0) * QUADS + j / 4u) * GROUP + lid][j % 4u];
            if (p.accumulate != 0u) {
                v += y[at];
            }
            y[at] = v;
        }
    }
}

@compute @workgroup_size(GROUP)
fn forward_shared_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    let col0 = column(w, lid);
    reduce(sums_of(w, lid), lid);
    if (lid >= LANES) {
        return;
    }
    for (var row = w.row0; row < min(w.row0 + ROWS, p.rows); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col += 4u) {
            store_quad(w, row, col, partial[((row - w.row0) * QUADS + (col - col0) / 4u) * GROUP + lid]);
        }
    }
}

@compute @workgroup_size(GROUP)
fn forward_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let w = work(group);
    let col0 = column(w, lid);
    let sums = sums_of(w, lid);
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var q = 0u; q < QUADS; q++) { // unroll
            let col = col0 + 4u * q;
            if (w.row0 + r < p.rows && col < p.n) {
                store_quad(w, w.row0 + r, col, sums[r * QUADS + q]);
            }
        }
    }
}
