// y = x, in quads. Where one of the two is stored in f16, the planner writes the conversion.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation copies, INVOCATIONS apart

struct Params {
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [quads]

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        y[i] = x[i];
    }
}
