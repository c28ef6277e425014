// Attention for software adapters with wide heads; after shared.wgsl, dots.wgsl and own_rows.wgsl. An
// invocation owns ROWS rows, as in lanes.wgsl, but keeps neither them nor their sums in registers. It
// meets OTHERS rows of the other side at a time: it goes over the columns for scores, which it keeps,
// and again to add to the sums in memory. Both are loops, so that the text is as short for any width.
// What an invocation loads of its own rows serves OTHERS others; what the lanes load of these, and hand
// round, serves ROWS rows. Where there are too many others for one dispatch (the quirk `loops-end-early`),
// the next one goes on from o and lse, or from dq, dk and dv.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const ROWS: u32 = 2u; // rows that an invocation owns
const OTHERS: u32 = 32u; // rows of the other side that they meet at a time
const LOADS: u32 = 32u; // of those, how many each lane loads: OTHERS / GROUP if they are handed round, or all

alias Own = array<E, ROWS>; // a unit of each of an invocation's rows
alias Others = array<E, LOADS>; // a unit of each row of the other side that a lane loads
alias Pairs = array<array<f32, OTHERS>, ROWS>; // [r][j]: a number for row r and other row j

// Which of the other rows is load number `l` of a lane.
fn loaded(l: u32, lane: u32) -> u32 {
    if (SUBGROUPS) {
        return l * GROUP + lane;
    }
    return l;
}

// Other row `j`, from the lane that has loaded it.
fn other(others: Others, j: u32) -> E {
    if (SUBGROUPS) {
        return from_lane(others[j / GROUP], j % GROUP);
    }
    return others[j];
}

// scores += products of a unit of both sides.
fn add_products(scores: ptr<function, Pairs>, own: Own, others: Others) {
    for (var j = 0u; j < OTHERS; j++) {
        let x = other(others, j);
        for (var r = 0u; r < ROWS; r++) {
            (*scores)[r][j] = add_dot(own[r], x, (*scores)[r][j]);
        }
    }
}

// Sums over the other rows: weights times a unit of theirs.
fn weighted(weights: ptr<function, Pairs>, others: Others) -> Own {
    var sums: Own;
    for (var j = 0u; j < OTHERS; j++) {
        let x = other(others, j);
        for (var r = 0u; r < ROWS; r++) {
            sums[r] += (*weights)[r][j] * x;
        }
    }
    return sums;
}

fn unit_of_q(at: Place, lane: u32, row0: u32, u: u32) -> Others {
    var others: Others;
    for (var l = 0u; l < LOADS; l++) {
        others[l] = q[q_at(at, row0 + loaded(l, lane)) + u];
    }
    return others;
}

fn unit_of_do(at: Place, lane: u32, row0: u32, u: u32) -> Others {
    var others: Others;
    for (var l = 0u; l < LOADS; l++) {
        others[l] = do_[q_at(at, row0 + loaded(l, lane)) + u];
    }
    return others;
}

fn unit_of_k(at: Place, lane: u32, key0: u32, u: u32) -> Others {
    var others: Others;
    for (var l = 0u; l < LOADS; l++) {
        others[l] = k[kv_at(at, kv_head(at), key0 + loaded(l, lane)) + u];
    }
    return others;
}

fn unit_of_v(at: Place, lane: u32, key0: u32, u: u32) -> Others {
    var others: Others;
    for (var l = 0u; l < LOADS; l++) {
        others[l] = v[kv_at(at, kv_head(at), key0 + loaded(l, lane)) + u];
    }
    return others;
}

fn own_q(at: Place, u: u32) -> Own {
    var own: Own;
    for (var r = 0u; r < ROWS; r++) {
        own[r] = q[q_at(at, at.row0 + r) + u];
    }
    return own;
}

// Scores of the rows and the keys from `key0` on, without the scale. Loops over units count from the
// workgroup's number, or Mesa would unroll the short ones (the quirk `slow-unrolled-memory`).
fn q_by_k(at: Place, group: u32, lane: u32, key0: u32) -> Pairs {
    var s: Pairs;
    for (var c = group; c < group + DIM; c++) {
        add_products(&s, own_q(at, c - group), unit_of_k(at, lane, key0, c - group));
    }
    return s;
}

// The first keys that query rows of a workgroup meet. Sets of keys are the same for all, so that each is in one
// dispatch, and sums do not depend on where other texts begin.
fn first_set(batch: u32, group: u32) -> u32 {
    return first_key_of(batch, first_row(group), GROUP * ROWS) / OTHERS * OTHERS;
}

@compute @workgroup_size(GROUP)
fn wide_forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = place(group, lane, p.heads);
    let batch = group / p.blocks / p.heads; // at.batch, in a form that compilers see to be uniform
    let before = ahead(batch);
    let end = min(visible(last_row(group), before), p.until);
    let first = first_set(batch, group);
    let begin = max(first, p.since);
    if (end <= begin) {
        return;
    }
    at.last = end - 1u;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        top[r] = MASKED;
        if (p.since > first && at.row0 + r < p.tq) {
            top[r] = lse_out[stat_at(at, at.row0 + r)];
            norm[r] = 1.0;
        }
    }
    for (var key0 = begin; key0 < end; key0 += OTHERS) {
        var w = q_by_k(at, group, lane, key0);
        var shrink: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let row_first = first_key(batch, at.row0 + r);
            let seen = visible(at.row0 + r, before);
            var peak = top[r];
            for (var j = 0u; j < OTHERS; j++) {
                let sees = row_first <= key0 + j && key0 + j < seen;
                w[r][j] = select(MASKED, w[r][j] * p.scale, sees);
                peak = max(peak, w[r][j]);
            }
            shrink[r] = exp(top[r] - peak);
            top[r] = peak;
            norm[r] *= shrink[r];
            for (var j = 0u; j < OTHERS; j++) {
                w[r][j] = exp(w[r][j] - peak);
                norm[r] += w[r][j];
            }
            // The last keys complete the norm.
            let part = select(1.0, 1.0 / norm[r], key0 + OTHERS >= end);
            shrink[r] *= part;
            for (var j = 0u; j < OTHERS; j++) {
                w[r][j] *= part;
            }
        }
        for (var c = group; c < group + DIM; c++) {
            var sums = weighted(&w, unit_of_v(at, lane, key0, c - group));
            for (var r = 0u; r < ROWS; r++) {
                if (at.row0 + r < p.tq) {
                    let to = q_at(at, at.row0 + r) + c - group;
                    if (key0 > first) {
                        sums[r] += o[to] * shrink[r];
                    }
                    o[to] = sums[r];
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (at.row0 + r < p.tq) {
            lse_out[stat_at(at, at.row0 + r)] = top[r] + log(norm[r]);
        }
    }
}

// ds = p * (dp - delta), p = exp(s - lse), dp = do v^T; dq = scale * ds k.
@compute @workgroup_size(GROUP)
fn wide_backward_q(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let at = place(group, lane, p.heads);
    let batch = group / p.blocks / p.heads; // at.batch, as above
    let first = first_set(batch, group);
    let end = min(visible(last_row(group), p.tk - p.tq), p.until);
    for (var key0 = max(first, p.since); key0 < end; key0 += OTHERS) {
        var ds = q_by_k(at, group, lane, key0);
        var dp: Pairs;
        for (var c = group; c < group + DIM; c++) {
            var own: Own;
            for (var r = 0u; r < ROWS; r++) {
                own[r] = do_[q_at(at, at.row0 + r) + c - group];
            }
            add_products(&dp, own, unit_of_v(at, lane, key0, c - group));
        }
        for (var r = 0u; r < ROWS; r++) {
            let stat = stat_at(at, at.row0 + r);
            let row_lse = lse_at(stat);
            let row_delta = delta_at(stat);
            let row_first = first_key(batch, at.row0 + r);
            let seen = visible(at.row0 + r, p.tk - p.tq);
            for (var j = 0u; j < OTHERS; j++) {
                let sees = row_first <= key0 + j && key0 + j < seen;
                let prob = select(0.0, exp(ds[r][j] * p.scale - row_lse), sees);
                ds[r][j] = prob * (dp[r][j] - row_delta) * p.scale;
            }
        }
        for (var c = group; c < group + DIM; c++) {
            var sums = weighted(&ds, unit_of_k(at, lane, key0, c - group));
            for (var r = 0u; r < ROWS; r++) {
                if (at.row0 + r < p.tq) {
                    let to = q_at(at, at.row0 + r) + c - group;
                    if (key0 > first) {
                        sums[r] += dq[to];
                    }
                    dq[to] = sums[r];
                }
            }
        }
    }
}

// dv = p^T do, dk = scale * ds^T q, summed over the query heads that share the key head.
@compute @workgroup_size(GROUP)
fn wide_backward_kv(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = place(group, lane, p.kv_heads);
    let sharing = p.heads / p.kv_heads;
    let own_head = at.head;
    // The first query that sees the first of the workgroup's keys.
    var first = 0u;
    if (CAUSAL) {
        first = max(first_row(group) + p.tq, p.tk) - p.tk;
    }
    let batch = group / p.blocks / p.kv_heads; // at.batch, as above
    let end = min(queries_until(batch, last_row(group)), p.until);
    for (var h = 0u; h < sharing; h++) {
        at.head = own_head * sharing + h;
        for (var row0 = max(first, p.since); row0 < end; row0 += OTHERS) {
            var prob: Pairs;
            var ds: Pairs;
            for (var c = group; c < group + DIM; c++) {
                var ks: Own;
                var vs: Own;
                for (var r = 0u; r < ROWS; r++) {
                    let base = kv_at(at, own_head, at.row0 + r) + c - group;
                    ks[r] = k[base];
                    vs[r] = v[base];
                }
                add_products(&prob, ks, unit_of_q(at, lane, row0, c - group));
                add_products(&ds, vs, unit_of_do(at, lane, row0, c - group));
            }
            var lses: Others;
            var deltas: Others;
            for (var l = 0u; l < LOADS; l++) {
                let stat = stat_at(at, row0 + loaded(l, lane));
                lses[l] = E(lse_at(stat));
                deltas[l] = E(delta_at(stat));
            }
            for (var j = 0u; j < OTHERS; j++) {
                let row_lse = vec4<f32>(other(lses, j)).x;
                let row_delta = vec4<f32>(other(deltas, j)).x;
                let row = row0 + j;
                let row_first = first_key(batch, row);
                let seen = select(0u, visible(row, p.tk - p.tq), row < end);
                for (var r = 0u; r < ROWS; r++) {
                    let sees = row_first <= at.row0 + r && at.row0 + r < seen;
                    prob[r][j] = select(0.0, exp(prob[r][j] * p.scale - row_lse), sees);
                    ds[r][j] = prob[r][j] * (ds[r][j] - row_delta) * p.scale;
                }
            }
            for (var c = group; c < group + DIM; c++) {
                var dks = weighted(&ds, unit_of_q(at, lane, row0, c - group));
                var dvs = weighted(&prob, unit_of_do(at, lane, row0, c - group));
                for (var r = 0u; r < ROWS; r++) {
                    if (at.row0 + r < p.tk) {
                        let to = kv_at(at, own_head, at.row0 + r) + c - group;
                        if (h > 0u || row0 > first) {
                            dks[r] += dk[to];
                            dvs[r] += dv[to];
                        }
                        dk[to] = dks[r];
                        dv[to] = dvs[r];
                    }
                }
            }
        }
    }
}
