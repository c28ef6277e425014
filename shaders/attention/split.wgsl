// Attention of few queries on GPUs, as in decoding; after shared.wgsl, dots.wgsl and teams.wgsl. A workgroup
// has query rows whose heads share keys and values, and one slice of those, which it reads once. A team
// meets four keys at a time: neighbours load neighbouring units of a key and of its value, those of which
// they keep sums. Each team has running maxima and sums of its own, which are put together at the end.
// Where there are several slices, combine.wgsl does the same with theirs.

// knobs
const ROWS: u32 = 3u; // query rows of a workgroup
const SLICES: u32 = 1u; // workgroups that share the keys of a row
const REACH: u32 = 4u; // neighbours whose sums shuffles can add: LANES or more; a power of two

const WEIGHTS: u32 = GROUP; // quads in `weights`
const TEAMS: u32 = GROUP / LANES;
const STEP: u32 = 4u * TEAMS; // keys that a workgroup meets at a time
const UNITS: u32 = OWN * LANES; // of a row, including some that are not there

// The queries; later a row's sums, by the invocations within reach of each other.
var<workgroup> staged: array<E, max(ROWS, GROUP / REACH) * UNITS>;

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
    workgroupBarrier();

    let keys_of = row_place(batch, kv_head, 0u, until - 1u);
    var sums: array<array<E, OWN>, ROWS>;
    var top: array<f32, ROWS>;
    var norm: array<f32, ROWS>;
    var seen: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        top[r] = MASKED;
        seen[r] = min(visible(row_place(batch, kv_head, row0 + r, 0u).row0, before), until);
    }
    for (var key0 = first; key0 < until; key0 += STEP) {
        let keys = key0 + lane / LANES + vec4<u32>(0u, 1u, 2u, 3u) * TEAMS;
        let at = vec4<u32>(
            kv_at(keys_of, kv_head, keys.x),
            kv_at(keys_of, kv_head, keys.y),
            kv_at(keys_of, kv_head, keys.z),
            kv_at(keys_of, kv_head, keys.w),
        );
        var s: array<vec4<f32>, ROWS>; // of four keys
        for (var i = 0u; i < OWN; i++) {
            let unit = at + min(unit_of(i, lane), DIM - 1u);
            let a = k[unit.x];
            let b = k[unit.y];
            let c = k[unit.z];
            let d = k[unit.w];
            for (var r = 0u; r < ROWS; r++) {
                let x = staged[r * UNITS + unit_of(i, lane)]; // 0 for a unit that is not there
                s[r] = vec4<f32>(
                    add_dot(x, a, s[r].x),
                    add_dot(x, b, s[r].y),
                    add_dot(x, c, s[r].z),
                    add_dot(x, d, s[r].w),
                );
            }
        }
        var shrink: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let score = select(vec4<f32>(MASKED), combined(s[r], lane, true), keys < vec4<u32>(seen[r]));
            let peak = max(max(top[r], max(score.x, score.y)), max(score.z, score.w));
            shrink[r] = exp(top[r] - peak);
            top[r] = peak;
            s[r] = exp(score - peak);
            norm[r] = norm[r] * shrink[r] + dot(s[r], vec4<f32>(1.0));
        }
        for (var i = 0u; i < OWN; i++) {
            let unit = at + min(unit_of(i, lane), DIM - 1u);
            let a = v[unit.x];
            let b = v[unit.y];
            let c = v[unit.z];
            let d = v[unit.w];
            for (var r = 0u; r < ROWS; r++) {
                sums[r][i] = sums[r][i] * shrink[r] + s[r].x * a + s[r].y * b + s[r].z * c + s[r].w * d;
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        var peak = top[r];
        for (var step = LANES; step < REACH; step *= 2u) {
            peak = max(peak, across(vec2<f32>(peak), step).x);
        }
        let part = exp(top[r] - peak); // 0 where the team has seen no key
        top[r] = peak;
        norm[r] *= part;
        for (var step = LANES; step < REACH; step *= 2u) {
            norm[r] += across(vec2<f32>(norm[r]), step).x;
        }
        for (var i = 0u; i < OWN; i++) {
            sums[r][i] *= part;
            for (var step = LANES; step < REACH; step *= 2u) {
                sums[r][i] += across_moved(sums[r][i], step);
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        weights[lane] = vec4<f32>(top[r], norm[r], 0.0, 0.0);
        workgroupBarrier();
        var peak = MASKED;
        for (var l = 0u; l < GROUP; l += REACH) {
            peak = max(peak, weights[l].x);
        }
        var all = 0.0;
        for (var l = 0u; l < GROUP; l += REACH) {
            all += weights[l].y * exp(weights[l].x - peak);
        }
        if (lane % REACH < LANES) {
            let part = exp(top[r] - peak);
            for (var i = 0u; i < OWN; i++) {
                staged[lane / REACH * UNITS + unit_of(i, lane)] = sums[r][i] * part;
            }
        }
        workgroupBarrier();
        let at = row_place(batch, kv_head, row0 + r, 0u);
        if (at.row0 >= p.tq) {
            continue; // the last block may lack rows
        }
        for (var unit = lane; unit < DIM; unit += GROUP) {
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
        if (lane == 0u) {
            if (SLICES > 1u) {
                lse_out[2u * part_at(at, slice)] = peak;
                lse_out[2u * part_at(at, slice) + 1u] = all;
            } else {
                lse_out[stat_at(at, at.row0)] = peak + log(all);
            }
        }
    }
}
