// Moves as many bytes as the adapter can: y = x.

// knobs
const GROUP: u32 = 64u;
const EACH: u32 = 1u; // quads an invocation moves

struct Params {
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(GROUP)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * GROUP * EACH + lid;
    let end = min(first + GROUP * EACH, p.quads);
    for (var i = first; i < end; i += GROUP) {
        y[i] = x[i];
    }
}
