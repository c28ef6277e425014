// Scaled dot-product attention without the T x T matrix (Dao et al. 2022): each invocation walks the
// keys with a running maximum and sum.
//
// An invocation owns ROWS query rows (key rows in backward_kv) and keeps them and their sums in
// registers, so that a row loaded from the other side, which all invocations of a workgroup share,
// serves ROWS of them. Nothing goes through workgroup memory.
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

// Keys that a query row sees.
fn visible(row: u32) -> u32 {
    if (CAUSAL) {
        return min(row, p.tq - 1u) + p.tk - p.tq + 1u;
    }
    return p.tk;
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
    var qs: array<array<E, DIM>, ROWS>;
    var sums: array<array<E, DIM>, ROWS>;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let base = q_at(at, at.row0 + r);
        for (var i = 0u; i < DIM; i++) {
            qs[r][i] = q[base + i] * p.scale;
        }
        top[r] = MASKED;
    }
    let end = visible(at.row0 + ROWS - 1u);
    for (var key = 0u; key < end; key++) {
        let base = kv_at(at, kv_head, key);
        var s: array<E, ROWS>;
        for (var i = 0u; i < DIM; i++) {
            let x = k[base + i];
            for (var r = 0u; r < ROWS; r++) {
                s[r] += qs[r][i] * x;
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
                for (var i = 0u; i < DIM; i++) {
                    sums[r][i] *= shrink;
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            score[r] = exp(score[r] - top[r]);
            norm[r] += score[r];
        }
        for (var i = 0u; i < DIM; i++) {
            let x = v[base + i];
            for (var r = 0u; r < ROWS; r++) {
                sums[r][i] += score[r] * x;
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            let base = q_at(at, at.row0 + r);
            for (var i = 0u; i < DIM; i++) {
                o_out[base + i] = sums[r][i] / norm[r];
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
    var qs: array<array<E, DIM>, ROWS>;
    var dos: array<array<E, DIM>, ROWS>;
    var sums: array<array<E, DIM>, ROWS>;
    var row_lse: array<f32, ROWS>;
    var row_delta: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let base = q_at(at, at.row0 + r);
        for (var i = 0u; i < DIM; i++) {
            qs[r][i] = q[base + i] * p.scale;
            dos[r][i] = do_[base + i];
        }
        row_lse[r] = lse[stat_at(at, at.row0 + r)];
        row_delta[r] = delta[stat_at(at, at.row0 + r)];
    }
    let end = visible(at.row0 + ROWS - 1u);
    for (var key = 0u; key < end; key++) {
        let base = kv_at(at, kv_head, key);
        var s: array<E, ROWS>;
        var dp: array<E, ROWS>;
        for (var i = 0u; i < DIM; i++) {
            let x = k[base + i];
            let y = v[base + i];
            for (var r = 0u; r < ROWS; r++) {
                s[r] += qs[r][i] * x;
                dp[r] += dos[r][i] * y;
            }
        }
        var ds: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let prob = select(0.0, exp(total(s[r]) - row_lse[r]), key < visible(at.row0 + r));
            ds[r] = prob * (total(dp[r]) - row_delta[r]);
        }
        for (var i = 0u; i < DIM; i++) {
            let x = k[base + i];
            for (var r = 0u; r < ROWS; r++) {
                sums[r][i] += ds[r] * x;
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            let base = q_at(at, at.row0 + r);
            for (var i = 0u; i < DIM; i++) {
                dq[base + i] = sums[r][i] * p.scale;
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
    var ks: array<array<E, DIM>, ROWS>;
    var vs: array<array<E, DIM>, ROWS>;
    var dks: array<array<E, DIM>, ROWS>;
    var dvs: array<array<E, DIM>, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let base = kv_at(at, kv_head, at.row0 + r);
        for (var i = 0u; i < DIM; i++) {
            ks[r][i] = k[base + i] * p.scale;
            vs[r][i] = v[base + i];
        }
    }
    // The first query that sees the first of these keys.
    var first = 0u;
    if (CAUSAL) {
        first = max(at.row0 + p.tq, p.tk) - p.tk;
    }
    let sharing = p.heads / p.kv_heads;
    for (var h = 0u; h < sharing; h++) {
        at.head = kv_head * sharing + h;
        for (var row = first; row < p.tq; row++) {
            let base = q_at(at, row);
            let stat = stat_at(at, row);
            var s: array<E, ROWS>;
            var dp: array<E, ROWS>;
            for (var i = 0u; i < DIM; i++) {
                let x = q[base + i];
                let y = do_[base + i];
                for (var r = 0u; r < ROWS; r++) {
                    s[r] += ks[r][i] * x;
                    dp[r] += vs[r][i] * y;
                }
            }
            var prob: array<f32, ROWS>;
            var ds: array<f32, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                prob[r] = select(0.0, exp(total(s[r]) - lse[stat]), at.row0 + r < visible(row));
                ds[r] = prob[r] * (total(dp[r]) - delta[stat]);
            }
            for (var i = 0u; i < DIM; i++) {
                let x = q[base + i];
                let y = do_[base + i];
                for (var r = 0u; r < ROWS; r++) {
                    dks[r][i] += ds[r] * x;
                    dvs[r][i] += prob[r] * y;
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tk) {
            let base = kv_at(at, kv_head, at.row0 + r);
            for (var i = 0u; i < DIM; i++) {
                dk[base + i] = dks[r][i] * p.scale;
                dv[base + i] = dvs[r][i];
            }
        }
    }
}
