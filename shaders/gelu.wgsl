// y = x * phi(x), in quads.
//
// No tanh: drivers differ in where it overflows (the quirk `tanh-overflow`), and 1 + tanh cancels for
// negative x. Both forms of phi are written with one exp each that stays in range, and keep their
// relative precision in the left tail.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // quads that an invocation makes, INVOCATIONS apart
const TANH: bool = false; // the tanh form of phi, not the exact one

// Past this phi is 0 or 1 to within 1e-18.
const LIMIT: f32 = 9.0;

struct Params {
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [quads]

// backward
@group(0) @binding(1) var<storage, read> dy: array<vec4<f32>>; // [quads]
@group(0) @binding(2) var<storage, read> saved_x: array<vec4<f32>>; // [quads]
@group(0) @binding(3) var<storage, read_write> dx: array<vec4<f32>>; // [quads]

// phi(v) and its derivative.
struct Phi {
    value: vec4<f32>,
    slope: vec4<f32>,
}

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
fn phi_tanh(v: vec4<f32>) -> Phi {
    let v2 = v * v;
    let e = exp(-1.5957691216 * v * (1.0 + 0.044715 * v2));
    let s = 1.0 / (1.0 + e);
    return Phi(s, e * s * s * 1.5957691216 * (1.0 + 0.134145 * v2));
}

// erfc(|v| / sqrt(2)) / 2 = exp(-v^2 / 2) t P(t), t = 1 / (1 + |v| / sqrt(8)), or one minus that where
// v > 0. P was fitted by least squares, with weights adjusted until no error stood out: phi is within
// 4e-7 of its value, relatively, for |v| up to 9. The derivative needs the same exp.
fn phi_erf(v: vec4<f32>) -> Phi {
    let t = 1.0 / (1.0 + 0.35355339059 * abs(v));
    var fit = vec4<f32>(0.047651075);
    fit = fit * t - 0.191029728;
    fit = fit * t + 0.212666439;
    fit = fit * t + 0.005833474;
    fit = fit * t + 0.145843482;
    fit = fit * t + 0.137792714;
    fit = fit * t + 0.141242722;
    let bell = exp(-0.5 * v * v);
    let tail = bell * (fit * t);
    return Phi(select(tail, 1.0 - tail, v > vec4<f32>()), 0.39894228040 * bell);
}

fn phi(v: vec4<f32>) -> Phi {
    if (TANH) {
        return phi_tanh(v);
    }
    return phi_erf(v);
}

// Not `clamp`, which may turn a NaN into a number and so hide it.
fn at_least(v: vec4<f32>) -> vec4<f32> {
    return select(v, vec4<f32>(-LIMIT), v < vec4<f32>(-LIMIT));
}

fn limited(v: vec4<f32>) -> vec4<f32> {
    return select(at_least(v), vec4<f32>(LIMIT), v > vec4<f32>(LIMIT));
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
        let v = x[i];
        y[i] = at_least(v) * phi(limited(v)).value;
    }
}

@compute @workgroup_size(INVOCATIONS)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    for (var i = first; i < end; i += INVOCATIONS) {
        let v = limited(saved_x[i]);
        let f = phi(v);
        dx[i] = dy[i] * (f.value + v * f.slope);
    }
}
