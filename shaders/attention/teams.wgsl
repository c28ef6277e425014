// Kernels of attention in which LANES neighbours, a team, share rows; after shared.wgsl and dots.wgsl.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const LANES: u32 = 4u; // invocations of a team; divides GROUP
const PART: u32 = DIM; // units of each row's sum that a workgroup makes; divides DIM

const OWN: u32 = (PART + LANES - 1u) / LANES; // units of each row's sum that an invocation keeps

// Softmax weights on their way from the invocations that make them to those that use them. tiled.wgsl:
// of four rows each, see `weight_at`; decode.wgsl: of four keys, one quad an invocation.
var<workgroup> weights: array<vec4<f32>, WEIGHTS>;

// The unit of a row that is number `i` of those that an invocation keeps.
fn unit_of(i: u32, lane: u32) -> u32 {
    return i * LANES + lane % LANES;
}

// Maximum, or sum, over a team. Without subgroups it goes through `weights`, which nobody may be using.
fn combined(mine: vec4<f32>, lane: u32, sum: bool) -> vec4<f32> {
    var all = mine;
    if (SUBGROUPS) {
        for (var step = 1u; step < LANES; step *= 2u) {
            let other = across4(all, step);
            all = select(max(all, other), all + other, sum);
        }
        return all;
    }
    weights[lane] = mine;
    workgroupBarrier();
    for (var i = 1u; i < LANES; i++) {
        // The order differs by invocation, so that no two meet in a bank; it does not by run.
        let other = weights[lane / LANES * LANES + (lane + i) % LANES];
        all = select(max(all, other), all + other, sum);
    }
    workgroupBarrier();
    return all;
}
