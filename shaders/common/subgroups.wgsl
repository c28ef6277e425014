// Values from the other lanes of a subgroup: this text, or no_subgroups.wgsl, stands in front of
// kernels that can use them. The standard wants `enable subgroups;` first, which naga rejects: the
// quirk `no-enable-subgroups`.

const SUBGROUPS: bool = true;

alias Moved = vec4<f32>; // knob: what moves

// `v` of lane `lane`; the same lane for all.
fn from_lane(v: Moved, lane: u32) -> Moved {
    return subgroupShuffle(v, lane);
}

// `v` of the lane whose number differs in the one bit of `step`.
fn across(v: vec2<f32>, step: u32) -> vec2<f32> {
    return subgroupShuffleXor(v, step);
}

fn across4(v: vec4<f32>, step: u32) -> vec4<f32> {
    return subgroupShuffleXor(v, step);
}
