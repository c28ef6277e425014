// What kernels that work row by row share. This text comes before theirs, and after subgroups.wgsl or
// no_subgroups.wgsl.
//
// A row is the work of LANES neighbours. Sums over it go through shuffles as far as subgroups reach,
// and from there on through a tree in workgroup memory. Barriers cost software adapters context
// switches, so there a row is the work of one vector of lanes, or of one lane, unless it is very long.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const LANES: u32 = 1u; // of those, how many share a row; a power of two
const REACH: u32 = 1u; // neighbours that shuffles reach; a power of two
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const WIDTH: u32 = 4u; // elements in an E

var<workgroup> partial: array<vec2<f32>, GROUP>;

// Sum over the elements of an E.
fn total(v: E) -> f32 {
    // For a scalar the constructor repeats it four times, which the weights undo.
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

// Largest element of an E.
fn largest(v: E) -> f32 {
    let q = vec4<f32>(v);
    return max(max(q.x, q.y), max(q.z, q.w));
}

fn combine(a: vec2<f32>, b: vec2<f32>, sum: bool) -> vec2<f32> {
    return select(max(a, b), a + b, sum);
}

// Sum or maximum of `v` over the LANES invocations of this row, to each of them.
fn reduce(v: vec2<f32>, lid: u32, sum: bool) -> vec2<f32> {
    if (LANES == 1u) {
        return v;
    }
    if (SUBGROUPS && GROUP == REACH) {
        // A software adapter: reading a constant lane is cheap there, reading any other is expensive.
        var all = from_lane(v.xyxy, 0u).xy;
        for (var i = 1u; i < LANES; i++) {
            all = combine(all, from_lane(v.xyxy, i).xy, sum);
        }
        return all;
    }
    var all = v;
    if (SUBGROUPS) {
        for (var step = min(LANES, REACH) / 2u; step > 0u; step /= 2u) {
            all = combine(all, across(all, step), sum);
        }
    }
    if (LANES <= REACH) {
        return all;
    }
    partial[lid] = all;
    workgroupBarrier();
    let lane = lid % LANES;
    for (var step = LANES / 2u; step >= REACH; step /= 2u) {
        if (lane < step) {
            partial[lid] = combine(partial[lid], partial[lid + step], sum);
        }
        workgroupBarrier();
    }
    all = partial[lid - lane];
    workgroupBarrier();
    return all;
}

fn row_sum(v: f32, lid: u32) -> f32 {
    return reduce(vec2<f32>(v, 0.0), lid, true).x;
}

fn row_sums(a: f32, b: f32, lid: u32) -> vec2<f32> {
    return reduce(vec2<f32>(a, b), lid, true);
}

fn row_max(v: f32, lid: u32) -> f32 {
    return reduce(vec2<f32>(v, v), lid, false).x;
}

// Stands in for missing elements of a maximum. It is finite, since WGSL promises nothing about infinities.
const LOWEST: f32 = -3e38;

// Largest element so far, and the sum of exp(element - largest).
struct Soft {
    top: f32,
    sum: f32,
}

// The same, with the elements of `v` included. One pass instead of two, since loads are what costs.
fn soften(s: Soft, v: E) -> Soft {
    let top = max(s.top, largest(v));
    return Soft(top, s.sum * exp(s.top - top) + total(exp(v - E(top))));
}

// What all lanes of a row have seen, to each of them.
fn soft_row(s: Soft, lid: u32) -> Soft {
    let top = row_max(s.top, lid);
    return Soft(top, row_sum(s.sum * exp(s.top - top), lid));
}
