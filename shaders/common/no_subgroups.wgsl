// Stands in for subgroups.wgsl where the device has no subgroup operations. Kernels ask SUBGROUPS
// first.

const SUBGROUPS: bool = false;

alias Moved = vec4<f32>; // knob: what moves

fn from_lane(v: Moved, lane: u32) -> Moved {
    return v;
}

fn across(v: vec2<f32>, step: u32) -> vec2<f32> {
    return v;
}

fn across4(v: vec4<f32>, step: u32) -> vec4<f32> {
    return v;
}
