// Stands in for subgroups.wgsl where the device has no subgroup operations. Kernels ask SUBGROUPS
// first.

const SUBGROUPS: bool = false;

fn from_lane(v: vec4<f32>, lane: u32) -> vec4<f32> {
    return v;
}
