// `columns`: y[c] = sum_r x[r, c] over one chunk of rows; a launch repeats it until one chunk is
// left. `broadcast`: y[r, c] = x[c].

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // how many an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const ACCUMULATE: bool = false; // add to what y holds; for the last level

struct Params {
    rows: u32,
    cols: u32, // in units of E
    chunk: u32, // rows an invocation sums
    len: u32, // elements E of the output
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read_write> y: array<E>;

@compute @workgroup_size(64)
fn columns(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.len) {
        return;
    }
    let col = i % p.cols;
    let first = (i / p.cols) * p.chunk;
    let end = min(first + p.chunk, p.rows);
    var sum = E();
    for (var r = first; r < end; r++) {
        sum += x[r * p.cols + col];
    }
    if (ACCUMULATE) {
        sum += y[i];
    }
    y[i] = sum;
}

@compute @workgroup_size(INVOCATIONS)
fn broadcast(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    for (var i = first; i < end; i += INVOCATIONS) {
        y[i] = x[i % p.cols];
    }
}
