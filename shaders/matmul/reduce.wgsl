// Sums of products that invocations of a workgroup share: LANES of them side by side, by SLICES that each
// have a part of the terms; after columns.wgsl, and common/subgroups.wgsl or no_subgroups.wgsl.

// knobs
const SLICES: u32 = 1u; // invocations that share a column
const SUBGROUP: u32 = 1u; // how many of those can shuffle

const GROUP: u32 = LANES * SLICES;
var<workgroup> partial: array<vec4<f32>, GROUP * ROWS * QUADS>;

alias Sums = array<vec4<f32>, ROWS * QUADS>;

// Sums over slices, in a fixed order: within subgroups first, then through workgroup memory. The first
// LANES invocations find sum `i` at partial[i * GROUP + lid].
fn reduce(sums: Sums, lid: u32) {
    for (var i = 0u; i < ROWS * QUADS; i++) { // unroll
        var v = sums[i];
        for (var step = LANES; step < SUBGROUP; step *= 2u) {
            v += vec4<f32>(across(v.xy, step), across(v.zw, step));
        }
        partial[i * GROUP + lid] = v;
    }
    for (var step = GROUP / 2u; step >= max(LANES, SUBGROUP); step /= 2u) {
        workgroupBarrier();
        if (lid < step) {
            for (var i = 0u; i < ROWS * QUADS; i++) {
                partial[i * GROUP + lid] += partial[i * GROUP + lid + step];
            }
        }
    }
}
