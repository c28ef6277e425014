// Attention of few queries, as in decoding; after shared.wgsl, dots.wgsl and teams.wgsl. A whole
// workgroup works on one query row. Each team walks keys of its own with a running maximum and sum:
// first each invocation scores four whole keys, then each adds its units of the values of all the
// team's keys. The teams' shares are put together at the end.

// knobs
const PIECE: u32 = 1u; // units of a row that are loaded at a time; divides DIM

const WEIGHTS: u32 = GROUP; // quads in `weights`

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
        for (var u = base; u < base + DIM; u += PIECE) { // not from 0, or Mesa would unroll it
            for (var i = 0u; i < PIECE; i++) {
                let x = q[u + i];
                for (var j = 0u; j < 4u; j++) { // unroll
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
        for (var i = 0u; i < OWN; i++) { // unroll
            sums[i] *= shrink;
        }
        workgroupBarrier();
        for (var l = team; l < team + LANES; l++) {
            let w = weights[l];
            for (var j = 0u; j < 4u; j++) { // unroll
                let row = kv_at(at, kv_head(at), key0 + l + j * GROUP);
                for (var i = 0u; i < OWN; i++) { // unroll
                    sums[i] += w[j] * v[row + min(unit_of(i, lane), DIM - 1u)];
                }
            }
        }
        workgroupBarrier();
    }
    norm = combined(vec4<f32>(norm), lane, true).x;
    weights[lane] = vec4<f32>(top, norm, 0.0, 0.0);
    for (var i = 0u; i < OWN; i++) { // unroll
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
        for (var i = 0u; i < OWN; i++) { // unroll
            result[i] += shares[i * GROUP + other] * share;
        }
    }
    for (var i = 0u; i < OWN; i++) { // unroll
        if (unit_of(i, lane) < DIM) {
            o[base + unit_of(i, lane)] = result[i] / all;
        }
    }
    if (lane == 0u) {
        lse_out[stat_at(at, at.row0)] = top + log(all);
    }
}
