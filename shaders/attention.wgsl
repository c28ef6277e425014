// Scaled dot-product attention without the T x T matrix (Dao et al. 2022): each invocation walks the
// keys with a running maximum and sum.
//
// An invocation owns ROWS query rows (key rows in backward_kv) and keeps them and their sums in
// registers, so that a row from the other side, which all invocations of a workgroup share, serves
// ROWS of them. With subgroups each lane loads a part of that row, or of several, and hands it
// round: on software adapters a load costs as much as tens of multiply-adds. Nothing goes through
// workgroup memory.
//
// Heads lie side by side in the last dimension: element (batch, time, head, i) is at
// ((batch * times + time) * heads + head) * width + i.

// knobs
const CAUSAL: bool = true; // query t sees keys up to t + tk - tq
const GROUP: u32 = 8u; // invocations of a workgroup
const ROWS: u32 = 4u;
alias E = vec4<f32>; // f32 where the width of a head is no multiple of 4
const WIDTH: u32 = 4u;
const DIM: u32 = 8u; // width of a head, in units of E
const SPAN: u32 = 8u; // of those, how many the lanes hand round at a time; divides DIM
const STEP: u32 = 1u; // rows of the other side that are loaded at a time

const SPANS: u32 = DIM / SPAN;
alias Vector = array<array<E, SPAN>, SPANS>; // one row of one head

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

fn total(v: E) -> f32 {
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

// Which head and which rows a workgroup works on.
struct Place {
    batch: u32,
    head: u32,
    row0: u32, // of this invocation
}

fn place(group: u32, lane: u32, heads: u32) -> Place {
    let index = group / p.blocks;
    return Place(index / heads, index % heads, ((group % p.blocks) * GROUP + lane) * ROWS);
}

fn q_at(at: Place, row: u32) -> u32 {
    return ((at.batch * p.tq + min(row, p.tq - 1u)) * p.heads + at.head) * DIM;
}

fn kv_at(at: Place, kv_head: u32, key: u32) -> u32 {
    return ((at.batch * p.tk + min(key, p.tk - 1u)) * p.kv_heads + kv_head) * DIM;
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

// Keys that a query row sees.
fn visible(row: u32) -> u32 {
    if (CAUSAL) {
        return min(row, p.tq - 1u) + p.tk - p.tq + 1u;
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
    let at = place(group, lane, p.heads);
    let kv_head = at.head / (p.heads / p.kv_heads);
    var qs: array<Vector, ROWS>;
    var sums: array<Vector, ROWS>;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let base = q_at(at, at.row0 + r);
        for (var c = 0u; c < SPANS; c++) {
            for (var i = 0u; i < SPAN; i++) {
                qs[r][c][i] = q[base + c * SPAN + i] * p.scale;
            }
        }
        top[r] = MASKED;
    }
    let end = visible(last_row(group));
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
                        s[r] += qs[r][c][i] * x;
                    }
                }
            }
            var score: array<f32, ROWS>;
            var grew = false;
            for (var r = 0u; r < ROWS; r++) {
                score[r] = select(MASKED, total(s[r]), key < visible(at.row0 + r));
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
                            sums[r][c][i] *= shrink;
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
                        sums[r][c][i] += score[r] * x;
                    }
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            let base = q_at(at, at.row0 + r);
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    o_out[base + c * SPAN + i] = sums[r][c][i] / norm[r];
                }
            }
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
    let at = Place(i / p.tq / p.heads, i / p.tq % p.heads, i % p.tq);
    let base = q_at(at, at.row0);
    var sum = E();
    for (var c = 0u; c < DIM; c++) {
        sum += o[base + c] * do_dots[base + c];
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
        let base = q_at(at, at.row0 + r);
        for (var c = 0u; c < SPANS; c++) {
            for (var i = 0u; i < SPAN; i++) {
                qs[r][c][i] = q[base + c * SPAN + i] * p.scale;
                dos[r][c][i] = do_[base + c * SPAN + i];
            }
        }
        row_lse[r] = lse[stat_at(at, at.row0 + r)];
        row_delta[r] = delta[stat_at(at, at.row0 + r)];
    }
    let end = visible(last_row(group));
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
                        s[r] += qs[r][c][i] * x;
                        dp[r] += dos[r][c][i] * y;
                    }
                }
            }
            var ds: array<f32, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                let prob = select(0.0, exp(total(s[r]) - row_lse[r]), key0 + j < visible(at.row0 + r));
                ds[r] = prob * (total(dp[r]) - row_delta[r]);
            }
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    let x = unit(k_mine[c], j * SPAN + i, k[base + c * SPAN + i]);
                    for (var r = 0u; r < ROWS; r++) {
                        sums[r][c][i] += ds[r] * x;
                    }
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            let base = q_at(at, at.row0 + r);
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    dq[base + c * SPAN + i] = sums[r][c][i] * p.scale;
                }
            }
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
    for (var r = 0u; r < ROWS; r++) {
        let base = kv_at(at, kv_head, at.row0 + r);
        for (var c = 0u; c < SPANS; c++) {
            for (var i = 0u; i < SPAN; i++) {
                ks[r][c][i] = k[base + c * SPAN + i] * p.scale;
                vs[r][c][i] = v[base + c * SPAN + i];
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
                            s[r] += ks[r][c][i] * x;
                            dp[r] += vs[r][c][i] * y;
                        }
                    }
                }
                var prob: array<f32, ROWS>;
                var ds: array<f32, ROWS>;
                for (var r = 0u; r < ROWS; r++) {
                    let sees = row < p.tq && at.row0 + r < visible(row);
                    prob[r] = select(0.0, exp(total(s[r]) - lse[stat]), sees);
                    ds[r] = prob[r] * (total(dp[r]) - delta[stat]);
                }
                for (var c = 0u; c < SPANS; c++) {
                    for (var i = 0u; i < SPAN; i++) {
                        let x = unit(q_mine[c], j * SPAN + i, q[base + c * SPAN + i]);
                        let y = unit(do_mine[c], j * SPAN + i, do_[base + c * SPAN + i]);
                        for (var r = 0u; r < ROWS; r++) {
                            dks[r][c][i] += ds[r] * x;
                            dvs[r][c][i] += prob[r] * y;
                        }
                    }
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tk) {
            let base = kv_at(at, kv_head, at.row0 + r);
            for (var c = 0u; c < SPANS; c++) {
                for (var i = 0u; i < SPAN; i++) {
                    dk[base + c * SPAN + i] = dks[r][c][i] * p.scale;
                    dv[base + c * SPAN + i] = dvs[r][c][i];
                }
            }
        }
    }
}
