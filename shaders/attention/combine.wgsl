// Puts together what split.wgsl has made of the slices of a row's keys; after shared.wgsl. Neighbours have
// neighbouring units of a row, and each of SETS sets of them has every SETS-th slice.

// knobs
const SLICES: u32 = 4u; // parts of each row
const SETS: u32 = 4u; // sets of invocations

const SPAN: u32 = 16u; // units of a row that a workgroup makes

@group(0) @binding(1) var<storage, read> parts: array<E>; // [batch, tq, heads, slices, head_dim]
@group(0) @binding(2) var<storage, read> stats: array<vec2<f32>>; // [batch, tq, heads, slices]: maximum and norm
@group(0) @binding(3) var<storage, read_write> o_rows: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(4) var<storage, read_write> lse_rows: array<f32>; // [batch, heads, tq]

var<workgroup> set_stats: array<vec2<f32>, SETS>;
var<workgroup> set_sums: array<E, SETS * SPAN>;

@compute @workgroup_size(SETS * SPAN)
fn combine(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    // group counts (batch, time, head, block of units).
    let row = group / p.blocks;
    let unit = group % p.blocks * SPAN + lane % SPAN;
    var top = MASKED;
    var norm = 0.0;
    var sum: E;
    for (var slice = lane / SPAN; slice < SLICES; slice += SETS) {
        let stat = stats[row * SLICES + slice];
        let part = parts[(row * SLICES + slice) * DIM + min(unit, DIM - 1u)];
        let peak = max(top, stat.x);
        let shrink = exp(top - peak);
        let share = exp(stat.x - peak);
        top = peak;
        norm = norm * shrink + stat.y * share;
        sum = sum * shrink + select(E(), part, stat.y > 0.0) * share; // a slice without keys has left no part
    }
    if (lane % SPAN == 0u) {
        set_stats[lane / SPAN] = vec2<f32>(top, norm);
    }
    set_sums[lane] = sum;
    workgroupBarrier();
    if (lane >= SPAN) {
        return;
    }
    for (var other = 1u; other < SETS; other++) {
        top = max(top, set_stats[other].x);
    }
    norm = 0.0;
    sum = E();
    for (var other = 0u; other < SETS; other++) {
        let share = exp(set_stats[other].x - top);
        norm += set_stats[other].y * share;
        sum += set_sums[other * SPAN + lane] * share;
    }
    if (unit < DIM) {
        o_rows[row * DIM + unit] = sum / norm;
    }
    if (unit == 0u) {
        let at = row / p.heads; // counts (batch, time)
        lse_rows[(at / p.tq * p.heads + row % p.heads) * p.tq + at % p.tq] = top + log(norm);
    }
}
