// One step of gradient descent over flat arenas, in place, with the gradient clipped by its global norm:
//
//     g = grad * min(1, max_norm / (norm + 1e-6)) + decay * p
//     v = momentum * v + g
//     p = p - lr * v    or, with Nesterov momentum,    p = p - lr * (g + momentum * v)

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation updates, INVOCATIONS apart
const SCALED: bool = false; // norm is an outcome of loss_scale: the factor of the gradient, and 1 to skip the step
const NESTEROV: bool = false;

struct Params {
    quads: u32,
    decay_len: u32, // elements from here on have no weight decay
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>; // [quads]
// A vec4, so that it can share a binding with the other arrays, as can the norm. Of that, x alone counts.
@group(0) @binding(2) var<storage, read> hyper: array<vec4<f32>>; // [1] of vec4: lr, momentum, weight decay, max norm
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>; // [1]
@group(0) @binding(4) var<storage, read_write> param: array<vec4<f32>>; // [quads]
@group(0) @binding(5) var<storage, read_write> velocity: array<vec4<f32>>; // [quads]

/// Whether the step is to be skipped.
fn skips() -> bool {
    return SCALED && norm[0].y != 0.0;
}

/// The factor of the gradient that clips it.
fn clip() -> f32 {
    if (SCALED) {
        return norm[0].x;
    }
    let max_norm = hyper[0].w;
    return select(1.0, min(1.0, max_norm / (norm[0].x + 1e-6)), max_norm > 0.0);
}

/// Weight decay of the elements of a quad.
fn decay_of(quad: u32) -> vec4<f32> {
    let element = vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(0.0), vec4<f32>(hyper[0].z), element < vec4<u32>(p.decay_len));
}

@compute @workgroup_size(INVOCATIONS)
fn momentum(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    if (first >= p.quads || skips()) {
        return;
    }
    let scale = clip();
    let lr = hyper[0].x;
    let mu = hyper[0].y;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        let old = param[i];
        let g = grad[i] * scale + old * decay_of(i);
        let v = velocity[i] * mu + g;
        velocity[i] = v;
        param[i] = old - lr * select(v, g + mu * v, NESTEROV);
    }
}

// Without momentum, which needs no velocity.
@compute @workgroup_size(INVOCATIONS)
fn plain(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    if (first >= p.quads || skips()) {
        return;
    }
    let scale = clip();
    let lr = hyper[0].x;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        let old = param[i];
        param[i] = old - lr * (grad[i] * scale + old * decay_of(i));
    }
}
