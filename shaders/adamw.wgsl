// One step of AdamW over flat arenas, in place, with the gradient clipped by its global norm:
//
//     g = grad * min(1, max_norm / (norm + 1e-6))
//     m = m + (g - m) * (1 - beta1)
//     v = v * beta2 + g * g * (1 - beta2)
//     p = p * (1 - lr * decay) - lr / correction1 * m / (sqrt(v) / sqrt(correction2) + eps)

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation updates, INVOCATIONS apart
const SCALED: bool = false; // norm is an outcome of loss_scale: the factor of the gradient, and 1 to skip the step

struct Params {
    quads: u32,
    decay_len: u32, // elements from here on have no weight decay
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read> hyper: array<vec4<f32>>; // [2] of vec4: see AdamWSettings::at_step
// A vec4, so that it can share a binding with the other arrays. Of a norm, its x alone counts.
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>; // [1]
@group(0) @binding(4) var<storage, read_write> param: array<vec4<f32>>; // [quads]
@group(0) @binding(5) var<storage, read_write> moment1: array<vec4<f32>>; // [quads]
@group(0) @binding(6) var<storage, read_write> moment2: array<vec4<f32>>; // [quads]

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    if (first >= p.quads) {
        return;
    }
    let rates = hyper[0]; // lr, beta1, beta2, eps
    let rest = hyper[1]; // weight decay, both bias corrections, largest norm
    var clip = 1.0;
    if (SCALED) {
        clip = norm[0].x;
        if (norm[0].y != 0.0) {
            return;
        }
    } else if (rest.w > 0.0) {
        clip = min(1.0, rest.w / (norm[0].x + 1e-6));
    }
    let keep = 1.0 - rates.x * rest.x;
    let step = rates.x / rest.y;
    let root = sqrt(rest.z);
    let end = min(first + INVOCATIONS * EACH, p.quads);
    let decay_len = vec4<u32>(p.decay_len);
    for (var i = first; i < end; i += INVOCATIONS) {
        let g = grad[i] * clip;
        let m = moment1[i] + (g - moment1[i]) * (1.0 - rates.y);
        let v = moment2[i] * rates.z + g * g * (1.0 - rates.z);
        let element = vec4<u32>(i * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
        let decayed = param[i] * select(vec4<f32>(1.0), vec4<f32>(keep), element < decay_len);
        moment1[i] = m;
        moment2[i] = v;
        param[i] = decayed - step * m / (sqrt(v) / root + rates.w);
    }
}
