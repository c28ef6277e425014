// sqrt(sum x^2), level by level: every invocation adds CHUNK quads, the first level squares them,
// the last takes the root. Also its gradient, dx = x * dy / norm.

// knobs
const GROUP: u32 = 64u; // invocations of a workgroup of forward
const CHUNK: u32 = 16u; // quads that an invocation adds
const SQUARE: bool = false; // the first level
const ROOT: bool = false; // the last level
const ACCUMULATE: bool = false; // backward adds to what dx holds

// Quads that are added before they join the sum, so that rounding errors grow slowly.
const BLOCK: u32 = 16u;

struct Params {
    len: u32, // elements of x
    quads: u32, // the same in quads, the last one perhaps not full
    count: u32, // elements of y
    lanes: u32, // invocations of a workgroup that have work
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// backward; binding 1 is x
@group(0) @binding(2) var<storage, read> norm: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read_write> dx: array<vec4<f32>>;

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    let i = group * GROUP + lid;
    if (i >= p.count) {
        return;
    }
    // A workgroup's quads are contiguous and its invocations take turns.
    var at = group * GROUP * CHUNK + lid;
    let end = min(group * GROUP * CHUNK + p.lanes * CHUNK, p.quads);
    var sum = vec4<f32>();
    while (at < end) {
        let block_end = min(at + p.lanes * BLOCK, end);
        var block = vec4<f32>();
        for (; at < block_end; at += p.lanes) {
            // What lies behind the last element may be anything, NaN too.
            let inside = vec4<u32>(at * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
            let v = select(vec4<f32>(), x[at], inside);
            block += select(v, v * v, SQUARE);
        }
        sum += block;
    }
    let total = (sum.x + sum.y) + (sum.z + sum.w);
    y[i] = select(total, sqrt(total), ROOT);
}

@compute @workgroup_size(64)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.quads) {
        return;
    }
    var scale = 0.0;
    if (norm[0] > 0.0) {
        scale = dy[0] / norm[0];
    }
    var v = x[i] * scale;
    if (ACCUMULATE) {
        v += dx[i];
    }
    dx[i] = v;
}
