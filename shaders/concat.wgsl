// Copies one part of a concatenation to its place: runs of `run` units of the part go `start` units
// into the runs of `stride` units of the whole.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // how many an invocation makes, INVOCATIONS apart
alias E = vec4<u32>; // unit that moves; u32 where runs or starts are no multiple of 4

struct Params {
    len: u32, // units of the part
    run: u32,
    stride: u32,
    start: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read_write> y: array<E>;

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    // Where in the larger one: counted along, as divisions are dear.
    let run = p.run;
    let stride = p.stride;
    let step = INVOCATIONS % run;
    let skip = INVOCATIONS / run * stride;
    var col = first % run;
    var base = first / run * stride + p.start;
    for (var i = first; i < end; i += INVOCATIONS) {
        y[base + col] = x[i];
        col += step;
        base += skip;
        if (col >= run) {
            col -= run;
            base += stride;
        }
    }
}
