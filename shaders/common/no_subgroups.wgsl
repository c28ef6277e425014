// Stands in for subgroups.wgsl where the device has no subgroup operations. Kernels check SUBGROUPS before
// they call these.

const SUBGROUPS: bool = false;

alias Moved = vec4<f32>; // knob: the type that `from_lane` moves

fn from_lane(v: Moved, lane: u32) -> Moved {
    return v;
}

fn across(v: vec2<f32>, step: u32) -> vec2<f32> {
    return v;
}

fn across4(v: vec4<f32>, step: u32) -> vec4<f32> {
    return v;
}

fn across_moved(v: Moved, step: u32) -> Moved {
    return v;
}
