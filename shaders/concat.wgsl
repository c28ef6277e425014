// Copies one part of a concatenation to its place: each run of `run` units of the part goes into a run
// of `stride` units of the whole, `start` units from its beginning.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // units that an invocation moves, INVOCATIONS apart
alias E = vec4<u32>; // unit that moves; u32 where runs or starts are no multiple of 4

struct Params {
    len: u32, // units of the part
    run: u32,
    stride: u32,
    start: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>; // [len / run, run]
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [len / run, stride]

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    // The index in y. It counts along with i, since divisions are expensive.
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
