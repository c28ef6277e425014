// Attention for software adapters; after shared.wgsl and own_rows.wgsl. An invocation owns ROWS query
// rows (key rows in backward_kv) and keeps them and their sums in registers, so that a row from the
// other side, which all invocations of a workgroup need, serves ROWS of them. With subgroups each lane
// loads a part of that row, or of several, and hands it round: a load costs as much as tens of
// multiply-adds here. Nothing goes through workgroup memory.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const ROWS: u32 = 4u; // rows that an invocation owns
const SPAN: u32 = 1u; // units of a row that the lanes hand round at a time; divides DIM
const PIECE: u32 = 1u; // units that an invocation loads or stores of its rows at a time; divides DIM
const STEP: u32 = 1u; // rows of the other side that are loaded at a time

const SPANS: u32 = DIM / SPAN;
alias Vector = array<E, DIM>; // one row of one head

// Unit of a row of the other side: from the lane that loaded it as `mine`, or `direct` from memory.
// Compilers drop the load that is not used.
fn unit(mine: E, lane: u32, direct: E) -> E {
    if (SUBGROUPS) {
        return from_lane(mine, lane);
    }
    return direct;
}

// A row moved down by PIECE units; the last PIECE stay as they are. A lane's own rows are loaded at
// their end and stored from their start, a piece at a time between shifts. Mesa compiles loads and
// stores slowly (the quirk `slow-unrolled-memory`), so there should be few of them, in a loop that it
// does not unroll: hence one that counts from the row's number. Arrays indexed by a loop's variable
// compile more slowly still.
fn shifted(row: Vector) -> Vector {
    var next = row;
    for (var i = 0u; i < DIM - PIECE; i++) {
        next[i] = next[i + PIECE];
    }
    return next;
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
    let batch = group / p.blocks / p.heads; // at.batch, in a form that compilers see to be uniform
    let before = ahead(batch);
    let end = visible(last_row(group), before);
    if (STEP > 1u) { // else no later key is read
        at.last = end - 1u;
    }
    var qs: array<Vector, ROWS>;
    var sums: array<Vector, ROWS>;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    var first: array<u32, ROWS>;
    var seen: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        top[r] = MASKED;
        first[r] = first_key(batch, at.row0 + r);
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
    for (var key0 = first_key_of(batch, first_row(group), GROUP * ROWS); key0 < end; key0 += STEP) {
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
                score[r] = select(MASKED, total(s[r]), first[r] <= key && key < seen[r]);
                grew = grew || score[r] > top[r];
            }
            // A new maximum is rare after the first keys, so only then is its cost paid.
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
                    o[base + i] = sums[r][i] / norm[r];
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
    let batch = group / p.blocks / p.heads; // at.batch, as above
    var qs: array<Vector, ROWS>;
    var dos: array<Vector, ROWS>;
    var sums: array<Vector, ROWS>;
    var row_lse: array<f32, ROWS>;
    var row_delta: array<f32, ROWS>;
    var first: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        row_lse[r] = lse_at(stat_at(at, at.row0 + r));
        row_delta[r] = delta_at(stat_at(at, at.row0 + r));
        first[r] = first_key(batch, at.row0 + r);
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
    for (var key0 = first_key_of(batch, first_row(group), GROUP * ROWS); key0 < end; key0 += STEP) {
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
                let sees = first[r] <= key && key < visible(at.row0 + r, p.tk - p.tq);
                let prob = select(0.0, exp(total(s[r]) - row_lse[r]), sees);
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
    // The first query that sees the first of the workgroup's keys, and the last that sees any.
    var first = 0u;
    if (CAUSAL) {
        first = max(first_row(group) + p.tq, p.tk) - p.tk;
    }
    let batch = group / p.blocks / p.kv_heads; // at.batch, as above
    let until = queries_until(batch, last_row(group));
    let sharing = p.heads / p.kv_heads;
    for (var h = 0u; h < sharing; h++) {
        at.head = kv_head * sharing + h;
        for (var row0 = first; row0 < until; row0 += STEP) {
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
                let row_first = first_key(batch, row);
                for (var r = 0u; r < ROWS; r++) {
                    let key = at.row0 + r;
                    let sees = row < p.tq && row_first <= key && key < visible(row, p.tk - p.tq);
                    prob[r] = select(0.0, exp(total(s[r]) - lse_at(stat)), sees);
                    ds[r] = prob[r] * (total(dp[r]) - delta_at(stat));
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
