// Values from the other lanes of a subgroup. This text or no_subgroups.wgsl comes before kernels that can
// use them. The standard requires `enable subgroups;` here, which naga rejects: the quirk `no-enable-subgroups`.

const SUBGROUPS: bool = true;

alias Moved = vec4<f32>; // knob: the type that `from_lane` moves

// `v` of lane `lane`, which must be the same for all lanes.
fn from_lane(v: Moved, lane: u32) -> Moved {
    return subgroupShuffle(v, lane);
}

// `v` of the lane whose index differs in the one bit that is set in `step`.
fn across(v: vec2<f32>, step: u32) -> vec2<f32> {
    return subgroupShuffleXor(v, step);
}

fn across4(v: vec4<f32>, step: u32) -> vec4<f32> {
    return subgroupShuffleXor(v, step);
}

// The same for the type that `from_lane` moves.
fn across_moved(v: Moved, step: u32) -> Moved {
    return subgroupShuffleXor(v, step);
}
