// Attention for GPUs; after the texts that shared.wgsl lists. A tile of rows meets a tile of the
// other side in workgroup memory. An invocation makes 4 x 4 of their scores and, for its four rows, some
// units of their sums. Sums of wide heads are too many for a workgroup, so several make the same scores,
// and each a part of the sums.

// knobs
const CHUNK: u32 = 4u; // units of a row that are staged at a time for scores; divides DIM
const SLAB: u32 = 8u; // rows that are staged at a time for sums; divides OTHERS

const WEIGHTS: u32 = 4u * GROUP; // quads in `weights`
const QUARTER: u32 = GROUP / LANES; // distance between the four rows of an invocation
const TILE: u32 = 4u * QUARTER; // rows of a workgroup
const PARTS: u32 = DIM / PART; // workgroups that share a tile of rows
const OTHERS: u32 = 4u * LANES; // rows of the other side that they meet at a time

alias Scores = array<vec4<f32>, 4>; // [j][r]: row r and other row j * LANES of this invocation
alias Sums = array<array<E, OWN>, 4>; // [r][i]: unit unit_of(i) of row r

// Where rows are staged. An odd stride spreads neighbouring rows over the banks.
struct Stage {
    to: u32,
    rows: u32,
    units: u32,
    stride: u32,
}

const STRIDE: u32 = CHUNK | 1u;
const MINE: Stage = Stage(0u, TILE, CHUNK, STRIDE);
const THEIRS: Stage = Stage(TILE * STRIDE, OTHERS, CHUNK, STRIDE);
const WHOLE: Stage = Stage(0u, SLAB, PART, OWN * LANES);

var<workgroup> staged: array<E, max((TILE + OTHERS) * STRIDE, SLAB * OWN * LANES)>;

// Rotated, so that neither writers nor readers meet in one bank.
fn weight_at(other: u32, quarter: u32) -> u32 {
    return other * QUARTER + (quarter + other) % QUARTER;
}

fn slot(s: Stage, i: u32) -> u32 {
    return s.to + i / s.units * s.stride + i % s.units;
}

// Stages rows from `row` on: of each, the units from `c` on. These four functions differ only in what
// they read: WGSL takes pointers to storage as parameters only with the language extension
// `unrestricted_pointer_parameters`, which not every implementation has.
fn stage_q(at: Place, lane: u32, s: Stage, row: u32, c: u32) {
    for (var i = lane; i < s.rows * s.units; i += GROUP) {
        staged[slot(s, i)] = q[q_at(at, row + i / s.units) + c + i % s.units];
    }
}

fn stage_do(at: Place, lane: u32, s: Stage, row: u32, c: u32) {
    for (var i = lane; i < s.rows * s.units; i += GROUP) {
        staged[slot(s, i)] = do_[q_at(at, row + i / s.units) + c + i % s.units];
    }
}

fn stage_k(at: Place, lane: u32, s: Stage, key: u32, c: u32) {
    for (var i = lane; i < s.rows * s.units; i += GROUP) {
        staged[slot(s, i)] = k[kv_at(at, kv_head(at), key + i / s.units) + c + i % s.units];
    }
}

fn stage_v(at: Place, lane: u32, s: Stage, key: u32, c: u32) {
    for (var i = lane; i < s.rows * s.units; i += GROUP) {
        staged[slot(s, i)] = v[kv_at(at, kv_head(at), key + i / s.units) + c + i % s.units];
    }
}

// The rows of an invocation.
fn four(row0: u32, lane: u32) -> vec4<u32> {
    return row0 + lane / LANES + vec4<u32>(0u, 1u, 2u, 3u) * QUARTER;
}

fn visible4(rows: vec4<u32>, ahead: u32) -> vec4<u32> {
    return vec4<u32>(
        visible(rows.x, ahead),
        visible(rows.y, ahead),
        visible(rows.z, ahead),
        visible(rows.w, ahead),
    );
}

fn first_key4(batch: u32, rows: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(
        first_key(batch, rows.x),
        first_key(batch, rows.y),
        first_key(batch, rows.z),
        first_key(batch, rows.w),
    );
}

// scores += products of the rows staged as MINE and THEIRS.
fn add_products(scores: ptr<function, Scores>, lane: u32) {
    let mine = lane / LANES * STRIDE;
    let theirs = THEIRS.to + lane % LANES * STRIDE;
    for (var c = 0u; c < CHUNK; c++) {
        var x: array<E, 4>;
        for (var r = 0u; r < 4u; r++) { // unroll
            x[r] = staged[mine + r * QUARTER * STRIDE + c];
        }
        for (var j = 0u; j < 4u; j++) { // unroll
            let y = staged[theirs + j * LANES * STRIDE + c];
            for (var r = 0u; r < 4u; r++) { // unroll
                (*scores)[j][r] = add_dot(x[r], y, (*scores)[j][r]);
            }
        }
    }
}

// sums += weights of other rows from `first` on times those rows, which are staged as WHOLE.
fn add_weighted(sums: ptr<function, Sums>, lane: u32, first: u32) {
    for (var j = 0u; j < SLAB; j++) {
        let w = weights[weight_at(first + j, lane / LANES)];
        for (var i = 0u; i < OWN; i++) { // unroll
            let x = staged[(j * OWN + i) * LANES + lane % LANES];
            for (var r = 0u; r < 4u; r++) { // unroll
                (*sums)[r][i] += w[r] * x;
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn tiled_forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = wid.x + wid.y * nwg.x;
    if (index >= p.groups) {
        return;
    }
    let group = index / PARTS;
    let unit0 = index % PARTS * PART; // the first unit of the workgroup's sums
    var at = tile_place(group, p.heads);
    let rows = four(at.row0, lane);
    let before = ahead(at.batch);
    let first = first_key4(at.batch, rows);
    let seen = visible4(rows, before) - first; // keys, counted from the first
    let end = visible(at.row0 + TILE - 1u, before);
    at.last = end - 1u;
    var sums: Sums;
    var top = vec4<f32>(MASKED);
    var norm: vec4<f32>; // this invocation's share
    for (var key0 = first_tile(at); key0 < end; key0 += OTHERS) {
        var s: Scores;
        for (var c = 0u; c < DIM; c += CHUNK) {
            workgroupBarrier();
            stage_q(at, lane, MINE, at.row0, c);
            stage_k(at, lane, THEIRS, key0, c);
            workgroupBarrier();
            add_products(&s, lane);
        }
        var peak = top;
        for (var j = 0u; j < 4u; j++) { // unroll
            let key = vec4<u32>(key0 + lane % LANES + j * LANES);
            s[j] = select(vec4<f32>(MASKED), s[j] * p.scale, key - first < seen);
            peak = max(peak, s[j]);
        }
        peak = combined(peak, lane, false);
        let shrink = exp(top - peak);
        top = peak;
        norm *= shrink;
        for (var j = 0u; j < 4u; j++) { // unroll
            let w = exp(s[j] - peak);
            norm += w;
            weights[weight_at(lane % LANES + j * LANES, lane / LANES)] = w;
        }
        for (var r = 0u; r < 4u; r++) { // unroll
            for (var i = 0u; i < OWN; i++) { // unroll
                sums[r][i] *= shrink[r];
            }
        }
        for (var j = 0u; j < OTHERS; j += SLAB) {
            workgroupBarrier();
            stage_v(at, lane, WHOLE, key0 + j, unit0);
            workgroupBarrier();
            add_weighted(&sums, lane, j);
        }
    }
    workgroupBarrier();
    norm = combined(norm, lane, true);
    for (var r = 0u; r < 4u; r++) { // unroll
        if (rows[r] < p.tq) {
            for (var i = 0u; i < OWN; i++) { // unroll
                if (unit_of(i, lane) < PART) {
                    o[q_at(at, rows[r]) + unit0 + unit_of(i, lane)] = sums[r][i] / norm[r];
                }
            }
            if (lane % LANES == 0u && unit0 == 0u) {
                lse_out[stat_at(at, rows[r])] = top[r] + log(norm[r]);
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn tiled_backward_q(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = wid.x + wid.y * nwg.x;
    if (index >= p.groups) {
        return;
    }
    let group = index / PARTS;
    let unit0 = index % PARTS * PART; // the first unit of the workgroup's sums
    let at = tile_place(group, p.heads);
    let rows = four(at.row0, lane);
    let first = first_key4(at.batch, rows);
    let seen = visible4(rows, p.tk - p.tq) - first; // keys, counted from the first
    var row_lse: vec4<f32>;
    for (var r = 0u; r < 4u; r++) { // unroll
        row_lse[r] = lse_at(stat_at(at, rows[r]));
    }
    let row_delta = deltas(at, rows, lane, unit0 == 0u);
    var sums: Sums;
    let end = visible(at.row0 + TILE - 1u, p.tk - p.tq);
    for (var key0 = first_tile(at); key0 < end; key0 += OTHERS) {
        var s: Scores;
        var dp: Scores;
        for (var c = 0u; c < DIM; c += CHUNK) {
            workgroupBarrier();
            stage_q(at, lane, MINE, at.row0, c);
            stage_k(at, lane, THEIRS, key0, c);
            workgroupBarrier();
            add_products(&s, lane);
        }
        for (var c = 0u; c < DIM; c += CHUNK) {
            workgroupBarrier();
            stage_do(at, lane, MINE, at.row0, c);
            stage_v(at, lane, THEIRS, key0, c);
            workgroupBarrier();
            add_products(&dp, lane);
        }
        for (var j = 0u; j < 4u; j++) { // unroll
            let key = vec4<u32>(key0 + lane % LANES + j * LANES);
            let prob = select(vec4<f32>(), exp(s[j] * p.scale - row_lse), key - first < seen);
            weights[weight_at(lane % LANES + j * LANES, lane / LANES)] = prob * (dp[j] - row_delta);
        }
        for (var j = 0u; j < OTHERS; j += SLAB) {
            workgroupBarrier();
            stage_k(at, lane, WHOLE, key0 + j, unit0);
            workgroupBarrier();
            add_weighted(&sums, lane, j);
        }
    }
    for (var r = 0u; r < 4u; r++) { // unroll
        if (rows[r] < p.tq) {
            for (var i = 0u; i < OWN; i++) { // unroll
                if (unit_of(i, lane) < PART) {
                    dq[q_at(at, rows[r]) + unit0 + unit_of(i, lane)] = sums[r][i] * p.scale;
                }
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn tiled_backward_kv(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = wid.x + wid.y * nwg.x;
    if (index >= p.groups) {
        return;
    }
    let group = index / PARTS;
    let unit0 = index % PARTS * PART; // the first unit of the workgroup's sums
    var at = key_place(group);
    let keys = four(at.row0, lane);
    var dks: Sums;
    var dvs: Sums;
    let first = first_query(at);
    let until = queries_until(at.batch, at.row0 + TILE - 1u);
    for (var h = 0u; h < p.heads / p.kv_heads; h++) {
        for (var row0 = first; row0 < until; row0 += OTHERS) {
            var s: Scores;
            for (var c = 0u; c < DIM; c += CHUNK) {
                workgroupBarrier();
                stage_k(at, lane, MINE, at.row0, c);
                stage_q(at, lane, THEIRS, row0, c);
                workgroupBarrier();
                add_products(&s, lane);
            }
            // Probabilities wait in workgroup memory, or registers would be too few: the M1 has 128.
            for (var j = 0u; j < 4u; j++) { // unroll
                let other = lane % LANES + j * LANES;
                let row = row0 + other;
                let row_first = first_key(at.batch, row);
                let seen = select(0u, visible(row, p.tk - p.tq) - row_first, row < p.tq);
                let sees = keys - row_first < vec4<u32>(seen); // a key before the first has a number past all
                let prob = select(vec4<f32>(), exp(s[j] * p.scale - lse_at(stat_at(at, row))), sees);
                weights[weight_at(other, lane / LANES)] = prob;
            }
            var dp: Scores;
            for (var c = 0u; c < DIM; c += CHUNK) {
                workgroupBarrier();
                stage_v(at, lane, MINE, at.row0, c);
                stage_do(at, lane, THEIRS, row0, c);
                workgroupBarrier();
                add_products(&dp, lane);
            }
            for (var j = 0u; j < OTHERS; j += SLAB) {
                workgroupBarrier();
                stage_do(at, lane, WHOLE, row0 + j, unit0);
                workgroupBarrier();
                add_weighted(&dvs, lane, j);
            }
            workgroupBarrier();
            for (var j = 0u; j < 4u; j++) { // unroll
                let other = lane % LANES + j * LANES;
                let mine = weight_at(other, lane / LANES);
                weights[mine] *= dp[j] - delta_at(stat_at(at, row0 + other));
            }
            for (var j = 0u; j < OTHERS; j += SLAB) {
                workgroupBarrier();
                stage_q(at, lane, WHOLE, row0 + j, unit0);
                workgroupBarrier();
                add_weighted(&dks, lane, j);
            }
        }
        at.head++;
    }
    at.head--;
    for (var r = 0u; r < 4u; r++) { // unroll
        if (keys[r] < p.tk) {
            for (var i = 0u; i < OWN; i++) { // unroll
                if (unit_of(i, lane) < PART) {
                    let to = kv_at(at, kv_head(at), keys[r]) + unit0 + unit_of(i, lane);
                    dk[to] = dks[r][i] * p.scale;
                    dv[to] = dvs[r][i];
                }
            }
        }
    }
}
