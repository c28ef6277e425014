// Reductions along one axis of [planes, n, inner]. `sum`: y[p, m] = scale * sum_i x[p, i, m]. `extreme`: the largest
// x[p, i, m], or the smallest, and the first index i that has it.
//
// A column, all that becomes one y, is the work of LANES invocations. Each goes over every LANES-th unit of it, and
// then they meet in workgroup memory. If the reduced axis is the last, a column is contiguous, and its units are quads
// of it where they can be; otherwise a unit is a quad of neighbouring columns, or one.

// knobs
const GROUP: u32 = 256u; // invocations of a workgroup
const LANES: u32 = 1u; // of those, how many share a column; a power of two
const LAST: bool = true; // the reduced axis is the last
alias E = vec4<f32>; // a unit: f32 if the last axis is no multiple of 4
alias I = vec4<u32>; // an index for each element of a unit
const WIDTH: u32 = 4u; // elements of a unit
const SIGN: f32 = 1.0; // extreme: -1 for the smallest

struct Params {
    columns: u32, // in all planes, in units unless LAST
    length: u32, // units of a column
    apart: u32, // from one unit of a column to the next
    groups: u32, // workgroups
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>; // [planes, n, inner]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [planes, inner]
@group(0) @binding(3) var<storage, read_write> index: array<u32>; // [planes, inner]

var<workgroup> units: array<E, GROUP>;
var<workgroup> places: array<I, GROUP>;

// Columns of a workgroup, and how far apart in it the lanes of one are. Neighbours read neighbours.
const COLUMNS: u32 = GROUP / LANES;
const STEP: u32 = select(COLUMNS, 1u, LAST);

// What an invocation goes over.
struct Share {
    column: u32,
    base: u32, // the column's first unit
    lane: u32,
}

fn share_of(group: u32, lid: u32) -> Share {
    let column = group * COLUMNS + select(lid % COLUMNS, lid / LANES, LAST);
    let lane = select(lid / COLUMNS, lid % LANES, LAST);
    // Past the last column lanes go along with it, since all must meet at barriers.
    let inside = min(column, p.columns - 1u);
    return Share(column, inside / p.apart * p.length * p.apart + inside % p.apart, lane);
}

@compute @workgroup_size(GROUP)
fn sum(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let s = share_of(group, lid);
    let length = p.length; // loads in a loop are expensive, even of uniforms
    let apart = p.apart;
    let step = LANES * apart;
    var sum = E();
    var i = s.lane;
    for (; i + 3u * LANES < length; i += 4u * LANES) {
        let at = s.base + i * apart;
        sum += (x[at] + x[at + step]) + (x[at + 2u * step] + x[at + 3u * step]);
    }
    for (; i < length; i += LANES) {
        sum += x[s.base + i * apart];
    }
    if (LANES > 1u) {
        units[lid] = sum;
        workgroupBarrier();
        for (var half = LANES / 2u; half > 0u; half /= 2u) {
            if (s.lane < half) {
                units[lid] += units[lid + half * STEP];
            }
            workgroupBarrier();
        }
        sum = units[lid];
    }
    if (s.lane > 0u || s.column >= p.columns) {
        return;
    }
    let quad = p.scale * vec4<f32>(sum); // the same four times where a unit is one element
    if (LAST) {
        y[s.column] = dot(quad, vec4<f32>(f32(WIDTH) * 0.25));
    } else {
        for (var j = 0u; j < WIDTH; j++) {
            y[s.column * WIDTH + j] = quad[j];
        }
    }
}

@compute @workgroup_size(GROUP)
fn extreme(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let s = share_of(group, lid);
    let length = p.length;
    let apart = p.apart;
    // A lane without units takes the last one, which changes nothing.
    let first = min(s.lane, length - 1u);
    var top = SIGN * x[s.base + first * apart];
    var place = I(first);
    for (var i = first + LANES; i < length; i += LANES) {
        let v = SIGN * x[s.base + i * apart];
        let better = v > top;
        top = select(top, v, better);
        place = select(place, I(i), better);
    }
    if (LANES > 1u) {
        units[lid] = top;
        places[lid] = place;
        workgroupBarrier();
        for (var half = LANES / 2u; half > 0u; half /= 2u) {
            if (s.lane < half) {
                let v = units[lid + half * STEP];
                let at = places[lid + half * STEP];
                let better = (v > top) | ((v == top) & (at < place));
                top = select(top, v, better);
                place = select(place, at, better);
                units[lid] = top;
                places[lid] = place;
            }
            workgroupBarrier();
        }
    }
    if (s.lane > 0u || s.column >= p.columns) {
        return;
    }
    let quad = SIGN * vec4<f32>(top);
    let at = vec4<u32>(place);
    if (LAST) {
        var best = 0u;
        for (var j = 1u; j < WIDTH; j++) {
            let v = SIGN * quad[j];
            if (v > SIGN * quad[best] || (v == SIGN * quad[best] && at[j] < at[best])) {
                best = j;
            }
        }
        y[s.column] = quad[best];
        index[s.column] = at[best] * WIDTH + best;
    } else {
        for (var j = 0u; j < WIDTH; j++) {
            y[s.column * WIDTH + j] = quad[j];
            index[s.column * WIDTH + j] = at[j];
        }
    }
}
