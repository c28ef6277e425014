// Attention of few queries on GPUs, as in decoding; after shared.wgsl, dots.wgsl and teams.wgsl. A workgroup
// has query rows whose heads share keys and values, and one slice of those, which it reads once. A team
// meets four keys at a time: neighbours load neighbouring units of a key and of its value, those of which
// they keep sums. Then it goes from row to row, so that the weights of only one are in registers. Each team
// has running maxima and sums of its own, which are put together at the end. Where there are several slices,
// combine.wgsl does the same with theirs.

// knobs
const ROWS: u32 = 3u; // query rows of a workgroup, up to LANES
const SLICES: u32 = 1u; // workgroups that share the keys of a row
const REACH: u32 = 4u; // neighbours whose sums shuffles can add: LANES or more; a power of two

const WEIGHTS: u32 = GROUP; // quads in `weights`
const TEAMS: u32 = GROUP / LANES;
const STEP: u32 = 4u * TEAMS; // keys that a workgroup meets at a time
const UNITS: u32 = OWN * LANES; // of a row, including some that are not there

// The queries; later a row's sums, by the invocations within reach of each other.
var<workgroup> staged: array<E, max(ROWS, GROUP / REACH) * UNITS>;
var<workgroup> seen: array<u32, ROWS>; // the first key that a row does not see in this slice

// Query row `n` of those that share a key head: query by query, and of each all heads.
fn row_place(batch: u32, kv_head: u32, n: u32, last: u32) -> Place {
    let sharing = p.heads / p.kv_heads;
    return Place(batch, kv_head * sharing + n % sharing, n / sharing, last);
}

// Where a slice's part of a row goes, if there are several.
fn part_at(at: Place, slice: u32) -> u32 {
    return ((at.batch * p.tq + at.row0) * p.heads + at.head) * SLICES + slice;
}

@compute @workgroup_size(GROUP)
fn split(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    // group counts (batch, key head, block of rows, slice).
    let slice = group % SLICES;
    let row0 = group / SLICES % p.blocks * ROWS;
    let kv_head = group / SLICES / p.blocks % p.kv_heads;
    let batch = group / SLICES / p.blocks / p.kv_heads;
    // The keys that are there are shared out evenly, but no slice has fewer than fill a step.
    let before = ahead(batch);
    let end = visible(p.tq - 1u, before);
    let share = max((end + SLICES - 1u) / SLICES, STEP);
    let first = slice * share;
    let until = min(first + share, end);
    if (first >= end) {
        let at = row_place(batch, kv_head, row0 + lane, 0u);
        if (lane < ROWS && at.row0 < p.tq) {
            lse_out[2u * part_at(at, slice)] = MASKED;
            lse_out[2u * part_at(at, slice) + 1u] = 0.0;
        }
        return;
    }
    for (var i = lane; i < ROWS * UNITS; i += GROUP) {
        let at = row_place(batch, kv_head, row0 + i / UNITS, 0u);
        let unit = i % UNITS;
        staged[i] = select(E(), q[q_at(at, at.row0) + min(unit, DIM - 1u)] * p.scale, unit < DIM);
    }
    if (lane < ROWS) {
        seen[lane] = min(visible(row_place(batch, kv_head, row0 + lane, 0u).row0, before), until);
    }
    workgroupBarrier();

    let keys_of = row_place(batch, kv_head, 0u, until - 1u);
    var sums: array<array<E, OWN>, ROWS>;
    var top: array<f32, ROWS>;
    var norm = 0.0; // of row number `lane % LANES`
    for (var r = 0u; r < ROWS; r++) { // unroll
        top[r] = MASKED;
    }
    for (var key0 = first; key0 < until; key0 += STEP) {
        let keys = key0 + lane / LANES + vec4<u32>(0u, 1u, 2u, 3u) * TEAMS;
        let at = vec4<u32>(
            kv_at(keys_of, kv_head, keys.x),
            kv_at(keys_of, kv_head, keys.y),
            kv_at(keys_of, kv_head, keys.z),
            kv_at(keys_of, kv_head, keys.w),
        );
        var ks: array<array<E, 4>, OWN>;
        var vs: array<array<E, 4>, OWN>;
        for (var i = 0u; i < OWN; i++) { // unroll
            let unit = at + min(unit_of(i, lane), DIM - 1u);
            ks[i] = array<E, 4>(k[unit.x], k[unit.y], k[unit.z], k[unit.w]);
            vs[i] = array<E, 4>(v[unit.x], v[unit.y], v[unit.z], v[unit.w]);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            var s = vec4<f32>(); // of four keys
            for (var i = 0u; i < OWN; i++) { // unroll
                let x = staged[r * UNITS + unit_of(i, lane)]; // 0 for a unit that is not there
                s = vec4<f32>(
                    add_dot(x, ks[i][0], s.x),
                    add_dot(x, ks[i][1], s.y),
                    add_dot(x, ks[i][2], s.z),
                    add_dot(x, ks[i][3], s.w),
                );
            }
            s = select(vec4<f32>(MASKED), combined(s, lane, true), keys < vec4<u32>(seen[r]));
            let peak = max(max(top[r], max(s.x, s.y)), max(s.z, s.w));
            let shrink = exp(top[r] - peak);
            top[r] = peak;
            s = exp(s - peak);
            norm = select(norm, norm * shrink + dot(s, vec4<f32>(1.0)), lane % LANES == r);
            for (var i = 0u; i < OWN; i++) { // unroll
                sums[r][i] = sums[r][i] * shrink + s.x * vs[i][0] + s.y * vs[i][1] + s.z * vs[i][2] + s.w * vs[i][3];
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) { // unroll
        var peak = top[r];
        for (var step = LANES; step < REACH; step *= 2u) {
            peak = max(peak, across(vec2<f32>(peak), step).x);
        }
        let part = exp(top[r] - peak); // 0 where the team has seen no key
        top[r] = peak;
        norm = select(norm, norm * part, lane % LANES == r);
        for (var i = 0u; i < OWN; i++) { // unroll
            sums[r][i] *= part;
            for (var step = LANES; step < REACH; step *= 2u) {
                sums[r][i] += across_moved(sums[r][i], step);
            }
        }
    }
    for (var step = LANES; step < REACH; step *= 2u) {
        norm += across(vec2<f32>(norm), step).x;
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        if (lane % REACH == r) {
            weights[lane / REACH] = vec4<f32>(top[r], norm, 0.0, 0.0);
        }
        workgroupBarrier();
        var peak = MASKED;
        for (var i = 0u; i < GROUP / REACH; i++) {
            peak = max(peak, weights[i].x);
        }
        var all = 0.0;
        for (var i = 0u; i < GROUP / REACH; i++) {
            all += weights[i].y * exp(weights[i].x - peak);
        }
        if (lane % REACH < LANES) {
            let part = exp(top[r] - peak);
            for (var i = 0u; i < OWN; i++) { // unroll
                staged[lane / REACH * UNITS + unit_of(i, lane)] = sums[r][i] * part;
            }
        }
        workgroupBarrier();
        let at = row_place(batch, kv_head, row0 + r, 0u);
        // The last block may lack rows.
        for (var unit = lane; unit < DIM && at.row0 < p.tq; unit += GROUP) {
            var sum = E();
            for (var i = unit; i < GROUP / REACH * UNITS; i += UNITS) {
                sum += staged[i];
            }
            if (SLICES > 1u) {
                o[part_at(at, slice) * DIM + unit] = sum;
            } else {
                o[q_at(at, at.row0) + unit] = sum / all;
            }
        }
        if (lane == 0u && at.row0 < p.tq) {
            if (SLICES > 1u) {
                lse_out[2u * part_at(at, slice)] = peak;
                lse_out[2u * part_at(at, slice) + 1u] = all;
            } else {
                lse_out[stat_at(at, at.row0)] = peak + log(all);
            }
        }
    }
}
