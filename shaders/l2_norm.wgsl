// sqrt(sum x^2), in two levels: every workgroup sums the squares of one chunk of x, and then one
// workgroup adds these sums and takes the root. Also its gradient, dx = x * dy / norm.
//
// After common/rows.wgsl, for which a chunk is a row.

// knobs
const SQUARE: bool = false; // the first level
const ROOT: bool = false; // the last level; a single level is both
const INVOCATIONS: u32 = 64u; // of a workgroup of backward
const EACH: u32 = 1u; // how many quads an invocation makes, INVOCATIONS apart
const ACCUMULATE: bool = false; // backward adds to what dx holds

struct Params {
    quads: u32, // backward: quads of x
    len: u32, // elements of x
    chunk: u32, // quads that a workgroup adds
    groups: u32, // workgroups
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [len / 4, rounded up] of vec4
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [groups]

// backward; binding 1 is x, [quads]
@group(0) @binding(2) var<storage, read> norm: array<f32>; // [1]
@group(0) @binding(3) var<storage, read> dy: array<f32>; // [1]
@group(0) @binding(4) var<storage, read_write> dx: array<vec4<f32>>; // [quads]

fn term(v: vec4<f32>) -> vec4<f32> {
    return select(v, v * v, SQUARE);
}

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let whole = p.len / 4u;
    let end = min((group + 1u) * p.chunk, whole);
    var sum = vec4<f32>();
    var at = group * p.chunk + lid;
    // Four are added before they join the sum: fewer rounding errors, and fewer iterations.
    for (; at + 3u * GROUP < end; at += 4u * GROUP) {
        sum += (term(x[at]) + term(x[at + GROUP])) + (term(x[at + 2u * GROUP]) + term(x[at + 3u * GROUP]));
    }
    for (; at < end; at += GROUP) {
        sum += term(x[at]);
    }
    if (group == p.groups - 1u && lid == 0u && whole * 4u < p.len) {
        // Past the last element there may be anything, even NaN.
        let inside = vec4<u32>(whole * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
        sum += term(select(vec4<f32>(), x[whole], inside));
    }
    let total_sum = row_sum(total(sum), lid);
    if (lid == 0u) {
        y[group] = select(total_sum, sqrt(total_sum), ROOT);
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
    var scale = 0.0;
    if (norm[0] > 0.0) {
        scale = dy[0] / norm[0];
    }
    for (var i = first; i < end; i += INVOCATIONS) {
        var v = x[i] * scale;
        if (ACCUMULATE) {
            v += dx[i];
        }
        dx[i] = v;
    }
}
