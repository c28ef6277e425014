// Scaled dot-product attention without the T x T matrix (Dao et al. 2022): the keys pass by, a few
// at a time, with a running maximum and sum.
//
// forward, backward_q and backward_kv are for software adapters. An invocation owns ROWS query rows
// (key rows in backward_kv) and keeps them and their sums in registers, so that a row from the other
// side, which all invocations of a workgroup share, serves ROWS of them. With subgroups each lane
// loads a part of that row, or of several, and hands it round: there a load costs as much as tens of
// multiply-adds. Nothing goes through workgroup memory.
//
// tiled_forward, tiled_backward_q and tiled_backward_kv are for GPUs: a tile of rows meets a tile of
// the other side in workgroup memory, and an invocation makes 4 x 4 of their scores and, for four
// rows, a part of their sums.
//
// decode gives a whole workgroup to one query row.
//
// Heads lie side by side in the last dimension: element (batch, time, head, i) is at
// ((batch * times + time) * heads + head) * width + i.

// knobs
const CAUSAL: bool = true; // query t sees keys up to t + tk - tq
const CACHED: bool = false; // or up to t + start[b], of sequence b; forward only
const GROUP: u32 = 8u; // invocations of a workgroup
const ROWS: u32 = 4u;
alias E = vec4<f32>; // f32 where the width of a head is no multiple of 4
const WIDTH: u32 = 4u;
const DIM: u32 = 8u; // width of a head, in units of E
const SPAN: u32 = 1u; // of those, how many the lanes hand round at a time; divides DIM
const PIECE: u32 = 1u; // how many a lane loads or stores of a row at a time; divides DIM
const STEP: u32 = 1u; // rows of the other side that are loaded at a time
const LANES: u32 = 4u; // tiled, decode: invocations that share rows; divides GROUP
const CHUNK: u32 = 4u; // tiled: units of a row that are staged at a time for scores; divides DIM
const SLAB: u32 = 8u; // tiled: rows that are staged at a time for sums; divides OTHERS

const SPANS: u32 = DIM / SPAN;
alias Vector = array<E, DIM>; // one row of one head

struct Params {
    heads: u32,
    kv_heads: u32,
    tq: u32,
    tk: u32,
    scale: f32,
    blocks: u32, // workgroups for one head
    groups: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<E>;
@group(0) @binding(2) var<storage, read> k: array<E>;
@group(0) @binding(3) var<storage, read> v: array<E>;

// forward
@group(0) @binding(4) var<storage, read_write> o_out: array<E>;
@group(0) @binding(5) var<storage, read_write> lse_out: array<f32>;
@group(0) @binding(6) var<storage, read> start: array<u32>;

// row_dots
@group(0) @binding(1) var<storage, read> o: array<E>;
@group(0) @binding(2) var<storage, read> do_dots: array<E>;
@group(0) @binding(3) var<storage, read_write> delta_out: array<f32>;

// backward_q and backward_kv
@group(0) @binding(4) var<storage, read> do_: array<E>;
@group(0) @binding(5) var<storage, read> lse: array<f32>;
@group(0) @binding(6) var<storage, read> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dq: array<E>;
@group(0) @binding(7) var<storage, read_write> dk: array<E>;
@group(0) @binding(8) var<storage, read_write> dv: array<E>;

// Where a masked score stands: finite, so that no infinities meet.
const MASKED: f32 = -3e38;

// s + the sum of a * b.
fn add_dot(a: E, b: E, s: f32) -> f32 {
    let x = vec4<f32>(a);
    let y = vec4<f32>(b);
    if (WIDTH == 1u) {
        return fma(x.x, y.x, s);
    }
    return fma(x.x, y.x, fma(x.y, y.y, fma(x.z, y.z, fma(x.w, y.w, s))));
}

fn total(v: E) -> f32 {
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

// Which head and which rows a workgroup works on.
struct Place {
    batch: u32,
    head: u32,
    row0: u32, // of this invocation
    // The last key that counts. It is read for those behind it, too: their weight is 0, but what a cache holds
    // there may be no number.
    last: u32,
}

fn place(group: u32, lane: u32, heads: u32) -> Place {
    let index = group / p.blocks;
    return Place(index / heads, index % heads, ((group % p.blocks) * GROUP + lane) * ROWS, p.tk - 1u);
}

fn q_at(at: Place, row: u32) -> u32 {
    return ((at.batch * p.tq + min(row, p.tq - 1u)) * p.heads + at.head) * DIM;
}

fn kv_at(at: Place, kv_head: u32, key: u32) -> u32 {
    return ((at.batch * p.tk + min(key, at.last)) * p.kv_heads + kv_head) * DIM;
}

fn stat_at(at: Place, row: u32) -> u32 {
    return (at.batch * p.heads + at.head) * p.tq + min(row, p.tq - 1u);
}

// Unit of a row of the other side: from the lane that has loaded it as `mine`, or from memory. The
// one that is not used is dead code.
fn unit(mine: E, lane: u32, direct: E) -> E {
    if (SUBGROUPS) {
        return from_lane(mine, lane);
    }
    return direct;
}

// A row moved down by PIECE units, of which the last stay. A lane's own rows are loaded at their end
// and stored from their start, a piece at a time between shifts. Mesa compiles loads and stores
// slowly (the quirk `slow-unrolled-memory`), so there should be few and they must stand in a loop; it
// must not unroll that, hence a loop that counts from the row's number; and arrays indexed by its
// variable compile slower still.
fn shifted(row: Vector) -> Vector {
    var next = row;
    for (var i = 0u; i < DIM - PIECE; i++) {
        next[i] = next[i + PIECE];
    }
    return next;
}

// Keys before that of the first query, in kernels that may have a cache.
fn ahead(batch: u32) -> u32 {
    if (CACHED) {
        return min(start[batch], p.tk);
    }
    return p.tk - p.tq;
}

// Keys that a query row sees, of which `ahead` are before that of the first query.
fn visible(row: u32, ahead: u32) -> u32 {
    if (CACHED) {
        return min(min(row, p.tq - 1u) + ahead + 1u, p.tk);
    }
    if (CAUSAL) {
        return min(row, p.tq - 1u) + ahead + 1u;
    }
    return p.tk;
}

// The last row of a workgroup.
fn last_row(group: u32) -> u32 {
    return ((group % p.blocks) * GROUP + GROUP) * ROWS - 1u;
}

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = place(group, lane, p.heads);
    let kv_head = at.head / (p.heads / p.kv_heads);
    let before = ahead(group / p.blocks / p.heads); // at.batch, of which a compiler sees that all lanes have it
    let end = visible(last_row(group), before);
    if (STEP > 1u) { // else no key behind them is read
        at.last = end - 1u;
    }
    var qs: array<Vector, ROWS>;
    var sums: array<Vector, ROWS>;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    var seen: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        top[r] = MASKED;
        seen[r] = visible(at.row0 + r, before);
    }
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            let base = q_at(at, at.row0 + r) + u - at.row0;
            qs[r] = shifted(qs[r]);
            for (var i = 0u; i < PIECE; i++) {
                qs[r][DIM - PIECE + i] = q[base + i] * p.scale;
            }
        }
    }
    for (var key0 = 0u; key0 < end; key0 += STEP) {
        let mine_at = kv_at(at, kv_head, key0 + lane / SPAN) + lane % SPAN;
        var k_mine: array<E, SPANS>;
        var v_mine: array<E, SPANS>;
        for (var c = 0u; c < SPANS; c++) {
            k_mine[c] = k[mine_at + c * SPAN];
            v_mine[c] = v[mine_at + c * SPAN];
        }
        for (var j = 0u; j < STEP; j++) {
            let key = key0 + j;
            let base = kv_at(at, kv_head, key);
            var s: array<E, ROWS>;
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    let x = unit(k_mine[c], j * SPAN + i, k[base + c * SPAN + i]);
                    for (var r = 0u; r < ROWS; r++) {
                        s[r] += qs[r][c * SPAN + i] * x;
                    }
                }
            }
            var score: array<f32, ROWS>;
            var grew = false;
            for (var r = 0u; r < ROWS; r++) {
                score[r] = select(MASKED, total(s[r]), key < seen[r]);
                grew = grew || score[r] > top[r];
            }
            // A new maximum is rare after the first keys, so what it costs is behind a branch.
            if (grew) {
                for (var r = 0u; r < ROWS; r++) {
                    let new_top = max(top[r], score[r]);
                    let shrink = exp(top[r] - new_top);
                    top[r] = new_top;
                    norm[r] *= shrink;
                    for (var c = 0u; c < SPANS; c++) {
                        for (var i = 0u; i < SPAN; i++) {
                            sums[r][c * SPAN + i] *= shrink;
                        }
                    }
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                score[r] = exp(score[r] - top[r]);
                norm[r] += score[r];
            }
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    let x = unit(v_mine[c], j * SPAN + i, v[base + c * SPAN + i]);
                    for (var r = 0u; r < ROWS; r++) {
                        sums[r][c * SPAN + i] += score[r] * x;
                    }
                }
            }
        }
    }
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            if (at.row0 + r < p.tq) {
                let base = q_at(at, at.row0 + r) + u - at.row0;
                for (var i = 0u; i < PIECE; i++) {
                    o_out[base + i] = sums[r][i] / norm[r];
                }
            }
            sums[r] = shifted(sums[r]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            lse_out[stat_at(at, at.row0 + r)] = top[r] + log(norm[r]);
        }
    }
}

// delta = sum(do * o) of each row and head: what the softmax's gradient subtracts.
@compute @workgroup_size(64)
fn row_dots(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.groups) {
        return;
    }
    // i counts (batch, head, time).
    let at = Place(i / p.tq / p.heads, i / p.tq % p.heads, i % p.tq, p.tk - 1u);
    let base = q_at(at, at.row0);
    var sum = E();
    for (var u = base; u < base + DIM; u++) { // not unrolled; see `shifted`
        sum += o[u] * do_dots[u];
    }
    delta_out[i] = total(sum);
}

// ds = p * (dp - delta), p = exp(s - lse), dp = do v^T; dq = scale * ds k.
@compute @workgroup_size(GROUP)
fn backward_q(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let at = place(group, lane, p.heads);
    let kv_head = at.head / (p.heads / p.kv_heads);
    var qs: array<Vector, ROWS>;
    var dos: array<Vector, ROWS>;
    var sums: array<Vector, ROWS>;
    var row_lse: array<f32, ROWS>;
    var row_delta: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        row_lse[r] = lse[stat_at(at, at.row0 + r)];
        row_delta[r] = delta[stat_at(at, at.row0 + r)];
    }
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            let base = q_at(at, at.row0 + r) + u - at.row0;
            qs[r] = shifted(qs[r]);
            dos[r] = shifted(dos[r]);
            for (var i = 0u; i < PIECE; i++) {
                qs[r][DIM - PIECE + i] = q[base + i] * p.scale;
                dos[r][DIM - PIECE + i] = do_[base + i];
            }
        }
    }
    let end = visible(last_row(group), p.tk - p.tq);
    for (var key0 = 0u; key0 < end; key0 += STEP) {
        let mine_at = kv_at(at, kv_head, key0 + lane / SPAN) + lane % SPAN;
        var k_mine: array<E, SPANS>;
        var v_mine: array<E, SPANS>;
        for (var c = 0u; c < SPANS; c++) {
            k_mine[c] = k[mine_at + c * SPAN];
            v_mine[c] = v[mine_at + c * SPAN];
        }
        for (var j = 0u; j < STEP; j++) {
            let base = kv_at(at, kv_head, key0 + j);
            var s: array<E, ROWS>;
            var dp: array<E, ROWS>;
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    let x = unit(k_mine[c], j * SPAN + i, k[base + c * SPAN + i]);
                    let y = unit(v_mine[c], j * SPAN + i, v[base + c * SPAN + i]);
                    for (var r = 0u; r < ROWS; r++) {
                        s[r] += qs[r][c * SPAN + i] * x;
                        dp[r] += dos[r][c * SPAN + i] * y;
                    }
                }
            }
            var ds: array<f32, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                let prob = select(0.0, exp(total(s[r]) - row_lse[r]), key0 + j < visible(at.row0 + r, p.tk - p.tq));
                ds[r] = prob * (total(dp[r]) - row_delta[r]);
            }
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    let x = unit(k_mine[c], j * SPAN + i, k[base + c * SPAN + i]);
                    for (var r = 0u; r < ROWS; r++) {
                        sums[r][c * SPAN + i] += ds[r] * x;
                    }
                }
            }
        }
    }
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            if (at.row0 + r < p.tq) {
                let base = q_at(at, at.row0 + r) + u - at.row0;
                for (var i = 0u; i < PIECE; i++) {
                    dq[base + i] = sums[r][i] * p.scale;
                }
            }
            sums[r] = shifted(sums[r]);
        }
    }
}

// dv = p^T do, dk = scale * ds^T q, summed over the query heads that share the key head.
@compute @workgroup_size(GROUP)
fn backward_kv(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = place(group, lane, p.kv_heads);
    let kv_head = at.head;
    var ks: array<Vector, ROWS>;
    var vs: array<Vector, ROWS>;
    var dks: array<Vector, ROWS>;
    var dvs: array<Vector, ROWS>;
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            let base = kv_at(at, kv_head, at.row0 + r) + u - at.row0;
            ks[r] = shifted(ks[r]);
            vs[r] = shifted(vs[r]);
            for (var i = 0u; i < PIECE; i++) {
                ks[r][DIM - PIECE + i] = k[base + i] * p.scale;
                vs[r][DIM - PIECE + i] = v[base + i];
            }
        }
    }
    // The first query that sees the first of the workgroup's keys.
    var first = 0u;
    if (CAUSAL) {
        first = max((group % p.blocks) * GROUP * ROWS + p.tq, p.tk) - p.tk;
    }
    let sharing = p.heads / p.kv_heads;
    for (var h = 0u; h < sharing; h++) {
        at.head = kv_head * sharing + h;
        for (var row0 = first; row0 < p.tq; row0 += STEP) {
            let mine_at = q_at(at, row0 + lane / SPAN) + lane % SPAN;
            var q_mine: array<E, SPANS>;
            var do_mine: array<E, SPANS>;
            for (var c = 0u; c < SPANS; c++) {
                q_mine[c] = q[mine_at + c * SPAN];
                do_mine[c] = do_[mine_at + c * SPAN];
            }
            for (var j = 0u; j < STEP; j++) {
                let row = row0 + j;
                let base = q_at(at, row);
                let stat = stat_at(at, row);
                var s: array<E, ROWS>;
                var dp: array<E, ROWS>;
                for (var c = 0u; c < SPANS; c++) {
                    for (var i = 0u; i < SPAN; i++) {
                        let x = unit(q_mine[c], j * SPAN + i, q[base + c * SPAN + i]);
                        let y = unit(do_mine[c], j * SPAN + i, do_[base + c * SPAN + i]);
                        for (var r = 0u; r < ROWS; r++) {
                            s[r] += ks[r][c * SPAN + i] * x;
                            dp[r] += vs[r][c * SPAN + i] * y;
                        }
                    }
                }
                var prob: array<f32, ROWS>;
                var ds: array<f32, ROWS>;
                for (var r = 0u; r < ROWS; r++) {
                    let sees = row < p.tq && at.row0 + r < visible(row, p.tk - p.tq);
                    prob[r] = select(0.0, exp(total(s[r]) - lse[stat]), sees);
                    ds[r] = prob[r] * (total(dp[r]) - delta[stat]);
                }
                for (var c = 0u; c < SPANS; c++) {
                    for (var i = 0u; i < SPAN; i++) {
                        let x = unit(q_mine[c], j * SPAN + i, q[base + c * SPAN + i]);
                        let y = unit(do_mine[c], j * SPAN + i, do_[base + c * SPAN + i]);
                        for (var r = 0u; r < ROWS; r++) {
                            dks[r][c * SPAN + i] += ds[r] * x;
                            dvs[r][c * SPAN + i] += prob[r] * y;
                        }
                    }
                }
            }
        }
    }
    for (var u = at.row0; u < at.row0 + DIM; u += PIECE) {
        for (var r = 0u; r < ROWS; r++) {
            if (at.row0 + r < p.tk) {
                let base = kv_at(at, kv_head, at.row0 + r) + u - at.row0;
                for (var i = 0u; i < PIECE; i++) {
                    dk[base + i] = dks[r][i] * p.scale;
                    dv[base + i] = dvs[r][i];
                }
            }
            dks[r] = shifted(dks[r]);
            dvs[r] = shifted(dvs[r]);
        }
    }
}

// ---- GPUs ----

const QUARTER: u32 = GROUP / LANES; // an invocation's four rows are so far apart
const TILE: u32 = 4u * QUARTER; // rows of a workgroup
const OTHERS: u32 = 4u * LANES; // rows of the other side that they meet at a time
const OWN: u32 = (DIM + LANES - 1u) / LANES; // units of each row's sum that an invocation keeps

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
const WHOLE: Stage = Stage(0u, SLAB, DIM, OWN * LANES);

var<workgroup> staged: array<E, max((TILE + OTHERS) * STRIDE, SLAB * OWN * LANES)>;
var<workgroup> weights: array<vec4<f32>, OTHERS * QUARTER>; // of four rows each

// Rotated, so that neither those who write nor those who read meet in one bank.
fn weight_at(other: u32, quarter: u32) -> u32 {
    return other * QUARTER + (quarter + other) % QUARTER;
}

fn slot(s: Stage, i: u32) -> u32 {
    return s.to + i / s.units * s.stride + i % s.units;
}

// Rows from `row` on, of each the units from `c` on.
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

fn kv_head(at: Place) -> u32 {
    return at.head / (p.heads / p.kv_heads);
}

fn unit_of(i: u32, lane: u32) -> u32 {
    return i * LANES + lane % LANES;
}

// The workgroup's place. Those with the most keys to see come first, so that none is left over at
// the end.
fn tile_place(group: u32, heads: u32) -> Place {
    let index = group / p.blocks;
    return Place(index / heads, index % heads, (p.blocks - 1u - group % p.blocks) * TILE, p.tk - 1u);
}

// This invocation's rows.
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

// scores += products of the rows staged as MINE and THEIRS.
fn add_products(scores: ptr<function, Scores>, lane: u32) {
    let mine = lane / LANES * STRIDE;
    let theirs = THEIRS.to + lane % LANES * STRIDE;
    for (var c = 0u; c < CHUNK; c++) {
        var x: array<E, 4>;
        for (var r = 0u; r < 4u; r++) {
            x[r] = staged[mine + r * QUARTER * STRIDE + c];
        }
        for (var j = 0u; j < 4u; j++) {
            let y = staged[theirs + j * LANES * STRIDE + c];
            for (var r = 0u; r < 4u; r++) {
                (*scores)[j][r] = add_dot(x[r], y, (*scores)[j][r]);
            }
        }
    }
}

// sums += weights of other rows from `first` on times those rows, which are staged as WHOLE.
fn add_weighted(sums: ptr<function, Sums>, lane: u32, first: u32) {
    for (var j = 0u; j < SLAB; j++) {
        let w = weights[weight_at(first + j, lane / LANES)];
        for (var i = 0u; i < OWN; i++) {
            let x = staged[(j * OWN + i) * LANES + lane % LANES];
            for (var r = 0u; r < 4u; r++) {
                (*sums)[r][i] += w[r] * x;
            }
        }
    }
}

// Maximum, or sum, over the LANES invocations that share rows. Without subgroups they meet in
// `weights`, which nobody must be reading.
fn combined(mine: vec4<f32>, lane: u32, sum: bool) -> vec4<f32> {
    var all = mine;
    if (SUBGROUPS) {
        for (var step = 1u; step < LANES; step *= 2u) {
            let other = across4(all, step);
            all = select(max(all, other), all + other, sum);
        }
        return all;
    }
    weights[lane] = mine;
    workgroupBarrier();
    for (var i = 1u; i < LANES; i++) {
        // The order differs by invocation, so that no two meet in a bank; it does not by run.
        let other = weights[lane / LANES * LANES + (lane + i) % LANES];
        all = select(max(all, other), all + other, sum);
    }
    workgroupBarrier();
    return all;
}

@compute @workgroup_size(GROUP)
fn tiled_forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = tile_place(group, p.heads);
    let rows = four(at.row0, lane);
    let before = ahead(at.batch);
    let seen = visible4(rows, before);
    let end = visible(at.row0 + TILE - 1u, before);
    at.last = end - 1u;
    var sums: Sums;
    var top = vec4<f32>(MASKED);
    var norm: vec4<f32>; // this invocation's share
    for (var key0 = 0u; key0 < end; key0 += OTHERS) {
        var s: Scores;
        for (var c = 0u; c < DIM; c += CHUNK) {
            workgroupBarrier();
            stage_q(at, lane, MINE, at.row0, c);
            stage_k(at, lane, THEIRS, key0, c);
            workgroupBarrier();
            add_products(&s, lane);
        }
        var peak = top;
        for (var j = 0u; j < 4u; j++) {
            let key = vec4<u32>(key0 + lane % LANES + j * LANES);
            s[j] = select(vec4<f32>(MASKED), s[j] * p.scale, key < seen);
            peak = max(peak, s[j]);
        }
        peak = combined(peak, lane, false);
        let shrink = exp(top - peak);
        top = peak;
        norm *= shrink;
        for (var j = 0u; j < 4u; j++) {
            let w = exp(s[j] - peak);
            norm += w;
            weights[weight_at(lane % LANES + j * LANES, lane / LANES)] = w;
        }
        for (var r = 0u; r < 4u; r++) {
            for (var i = 0u; i < OWN; i++) {
                sums[r][i] *= shrink[r];
            }
        }
        for (var j = 0u; j < OTHERS; j += SLAB) {
            workgroupBarrier();
            stage_v(at, lane, WHOLE, key0 + j, 0u);
            workgroupBarrier();
            add_weighted(&sums, lane, j);
        }
    }
    workgroupBarrier();
    norm = combined(norm, lane, true);
    for (var r = 0u; r < 4u; r++) {
        if (rows[r] < p.tq) {
            for (var i = 0u; i < OWN; i++) {
                if (unit_of(i, lane) < DIM) {
                    o_out[q_at(at, rows[r]) + unit_of(i, lane)] = sums[r][i] / norm[r];
                }
            }
            if (lane % LANES == 0u) {
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
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let at = tile_place(group, p.heads);
    let rows = four(at.row0, lane);
    let seen = visible4(rows, p.tk - p.tq);
    var row_lse: vec4<f32>;
    var row_delta: vec4<f32>;
    for (var r = 0u; r < 4u; r++) {
        row_lse[r] = lse[stat_at(at, rows[r])];
        row_delta[r] = delta[stat_at(at, rows[r])];
    }
    var sums: Sums;
    let end = visible(at.row0 + TILE - 1u, p.tk - p.tq);
    for (var key0 = 0u; key0 < end; key0 += OTHERS) {
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
        for (var j = 0u; j < 4u; j++) {
            let key = vec4<u32>(key0 + lane % LANES + j * LANES);
            let prob = select(vec4<f32>(), exp(s[j] * p.scale - row_lse), key < seen);
            weights[weight_at(lane % LANES + j * LANES, lane / LANES)] = prob * (dp[j] - row_delta);
        }
        for (var j = 0u; j < OTHERS; j += SLAB) {
            workgroupBarrier();
            stage_k(at, lane, WHOLE, key0 + j, 0u);
            workgroupBarrier();
            add_weighted(&sums, lane, j);
        }
    }
    for (var r = 0u; r < 4u; r++) {
        if (rows[r] < p.tq) {
            for (var i = 0u; i < OWN; i++) {
                if (unit_of(i, lane) < DIM) {
                    dq[q_at(at, rows[r]) + unit_of(i, lane)] = sums[r][i] * p.scale;
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
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let index = group / p.blocks;
    let sharing = p.heads / p.kv_heads;
    var at = Place(index / p.kv_heads, index % p.kv_heads * sharing, (group % p.blocks) * TILE, p.tk - 1u);
    let keys = four(at.row0, lane);
    var dks: Sums;
    var dvs: Sums;
    // The first query that sees the first of the workgroup's keys.
    var first = 0u;
    if (CAUSAL) {
        first = max(at.row0 + p.tq, p.tk) - p.tk;
    }
    for (var h = 0u; h < sharing; h++) {
        for (var row0 = first; row0 < p.tq; row0 += OTHERS) {
            var s: Scores;
            var dp: Scores;
            for (var c = 0u; c < DIM; c += CHUNK) {
                workgroupBarrier();
                stage_k(at, lane, MINE, at.row0, c);
                stage_q(at, lane, THEIRS, row0, c);
                workgroupBarrier();
                add_products(&s, lane);
            }
            for (var c = 0u; c < DIM; c += CHUNK) {
                workgroupBarrier();
                stage_v(at, lane, MINE, at.row0, c);
                stage_do(at, lane, THEIRS, row0, c);
                workgroupBarrier();
                add_products(&dp, lane);
            }
            for (var j = 0u; j < 4u; j++) {
                let other = lane % LANES + j * LANES;
                let row = row0 + other;
                let stat = stat_at(at, row);
                let sees = keys < vec4<u32>(select(0u, visible(row, p.tk - p.tq), row < p.tq));
                let prob = select(vec4<f32>(), exp(s[j] * p.scale - lse[stat]), sees);
                s[j] = prob * (dp[j] - delta[stat]);
                weights[weight_at(other, lane / LANES)] = prob;
            }
            for (var j = 0u; j < OTHERS; j += SLAB) {
                workgroupBarrier();
                stage_do(at, lane, WHOLE, row0 + j, 0u);
                workgroupBarrier();
                add_weighted(&dvs, lane, j);
            }
            workgroupBarrier();
            for (var j = 0u; j < 4u; j++) {
                weights[weight_at(lane % LANES + j * LANES, lane / LANES)] = s[j];
            }
            for (var j = 0u; j < OTHERS; j += SLAB) {
                workgroupBarrier();
                stage_q(at, lane, WHOLE, row0 + j, 0u);
                workgroupBarrier();
                add_weighted(&dks, lane, j);
            }
        }
        at.head++;
    }
    at.head--;
    for (var r = 0u; r < 4u; r++) {
        if (keys[r] < p.tk) {
            for (var i = 0u; i < OWN; i++) {
                if (unit_of(i, lane) < DIM) {
                    let to = kv_at(at, kv_head(at), keys[r]) + unit_of(i, lane);
                    dk[to] = dks[r][i] * p.scale;
                    dv[to] = dvs[r][i];
                }
            }
        }
    }
}

// ---- few queries ----

// Each LANES invocations walk keys of their own with a running maximum and sum: first each
// invocation scores four whole keys, then each adds its units of all the keys' values. The shares
// are put together at the end.
var<workgroup> shares: array<E, GROUP * OWN>;

@compute @workgroup_size(GROUP)
fn decode(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    // group counts (batch, head, time).
    var at = Place(group / p.tq / p.heads, group / p.tq % p.heads, group % p.tq, 0u);
    let end = visible(at.row0, ahead(at.batch));
    at.last = end - 1u;
    let team = lane / LANES * LANES;
    let base = q_at(at, at.row0);
    var sums: array<E, OWN>;
    var top = MASKED;
    var norm = 0.0;
    for (var key0 = 0u; key0 < end; key0 += 4u * GROUP) {
        let keys = key0 + lane + vec4<u32>(0u, 1u, 2u, 3u) * GROUP;
        var s: vec4<f32>;
        for (var u = base; u < base + DIM; u += PIECE) { // not unrolled; see `shifted`
            for (var i = 0u; i < PIECE; i++) {
                let x = q[u + i];
                for (var j = 0u; j < 4u; j++) {
                    s[j] = add_dot(x, k[kv_at(at, kv_head(at), keys[j]) + u - base + i], s[j]);
                }
            }
        }
        s = select(vec4<f32>(MASKED), s * p.scale, keys < vec4<u32>(end));
        let largest = max(max(s.x, s.y), max(s.z, s.w));
        let peak = max(top, combined(vec4<f32>(largest), lane, false).x);
        let shrink = exp(top - peak);
        top = peak;
        let mine = exp(s - peak);
        norm = norm * shrink + dot(mine, vec4<f32>(1.0));
        weights[lane] = mine;
        for (var i = 0u; i < OWN; i++) {
            sums[i] *= shrink;
        }
        workgroupBarrier();
        for (var l = team; l < team + LANES; l++) {
            let w = weights[l];
            for (var j = 0u; j < 4u; j++) {
                let row = kv_at(at, kv_head(at), key0 + l + j * GROUP);
                for (var i = 0u; i < OWN; i++) {
                    sums[i] += w[j] * v[row + min(unit_of(i, lane), DIM - 1u)];
                }
            }
        }
        workgroupBarrier();
    }
    norm = combined(vec4<f32>(norm), lane, true).x;
    weights[lane] = vec4<f32>(top, norm, 0.0, 0.0);
    for (var i = 0u; i < OWN; i++) {
        shares[i * GROUP + lane] = sums[i];
    }
    workgroupBarrier();
    if (lane >= LANES) {
        return;
    }
    for (var other = lane + LANES; other < GROUP; other += LANES) {
        top = max(top, weights[other].x);
    }
    var all = 0.0;
    var result: array<E, OWN>;
    for (var other = lane; other < GROUP; other += LANES) {
        let share = exp(weights[other].x - top); // 0 where no key was visible
        all += weights[other].y * share;
        for (var i = 0u; i < OWN; i++) {
            result[i] += shares[i * GROUP + other] * share;
        }
    }
    for (var i = 0u; i < OWN; i++) {
        if (unit_of(i, lane) < DIM) {
            o_out[base + unit_of(i, lane)] = result[i] / all;
        }
    }
    if (lane == 0u) {
        lse_out[stat_at(at, at.row0)] = top + log(all);
    }
}
