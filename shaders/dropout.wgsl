// y = x * keep / (1 - p), in quads. keep is a hash of (quad, stream, seed, step), so no mask is stored,
// and backward is this kernel on dy.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation makes, INVOCATIONS apart
const ACCUMULATE: bool = false; // add to what y holds

struct Params {
    quads: u32,
    threshold: u32, // p * 2^32: an element is kept if its hash is at least this
    scale: f32, // 1 / (1 - p)
    stream: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read> seed: array<vec2<u32>>; // [1]: (seed, step)
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>; // [quads]

fn mix(key: vec4<u32>) -> vec4<u32> {
    var v = key;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    return v;
}

// See `hash` in src/ops/dropout.rs, which must stay the same bit for bit.
fn hash(key: vec4<u32>) -> vec4<u32> {
    var v = mix(key * 1664525u + 1013904223u);
    v = mix(v ^ (v >> vec4<u32>(16u)));
    return mix(v ^ (v >> vec4<u32>(16u)));
}

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    // Loads in a loop are expensive, even of uniforms.
    let key = vec3<u32>(p.stream, seed[0]);
    let threshold = vec4<u32>(p.threshold);
    let scale = p.scale;
    for (var i = first; i < end; i += INVOCATIONS) {
        let kept = hash(vec4<u32>(i, key)) >= threshold;
        var v = select(vec4<f32>(), x[i] * scale, kept);
        if (ACCUMULATE) {
            v += y[i];
        }
        y[i] = v;
    }
}
