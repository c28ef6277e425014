// y = gate * sigmoid(gate) * up, in quads.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation makes, INVOCATIONS apart

struct Params {
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read> up: array<vec4<f32>>; // [quads]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>; // [quads]

// backward
@group(0) @binding(1) var<storage, read> dy: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read> saved_gate: array<vec4<f32>>; // [quads]
@group(0) @binding(3) var<storage, read> saved_up: array<vec4<f32>>; // [quads]
@group(0) @binding(4) var<storage, read_write> dgate: array<vec4<f32>>; // [quads]
@group(0) @binding(5) var<storage, read_write> dup: array<vec4<f32>>; // [quads]

// exp(-g), kept finite. Not with `max`, which may turn a NaN into a number and so hide it.
fn exp_minus(g: vec4<f32>) -> vec4<f32> {
    return exp(-select(g, vec4<f32>(-80.0), g < vec4<f32>(-80.0)));
}

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        let g = gate[i];
        y[i] = g / (1.0 + exp_minus(g)) * up[i];
    }
}

// silu'(g) = s + g s (1 - s), s = 1 / (1 + e), e = exp(-g); 1 - s = e s, which does not cancel.
@compute @workgroup_size(INVOCATIONS)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        let g = saved_gate[i];
        let e = exp_minus(g);
        let s = 1.0 / (1.0 + e);
        let d = dy[i];
        dgate[i] = d * saved_up[i] * s * (1.0 + g * (e * s));
        dup[i] = d * g * s;
    }
}
