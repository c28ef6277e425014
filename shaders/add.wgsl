// y[i] = a[i] + b[i % len(b)]; b repeats over leading dimensions.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // how many an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where b's length is no multiple of 4 and b repeats
const REPEATS: bool = true; // b is shorter than a

struct Params {
    len: u32, // of y, in units of E
    period: u32, // of b, in units of E
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<E>; // [len]
@group(0) @binding(2) var<storage, read> b: array<E>; // [period]
@group(0) @binding(3) var<storage, read_write> y: array<E>; // [len]

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    // The index in b. It counts along with i, since divisions are expensive.
    let period = p.period;
    let step = INVOCATIONS % period;
    var at = first % period;
    for (var i = first; i < end; i += INVOCATIONS) {
        if (!REPEATS) {
            y[i] = a[i] + b[i];
            continue;
        }
        y[i] = a[i] + b[at];
        at += step;
        at -= select(0u, period, at >= period);
    }
}
