// `columns`: y[c] = sum_r x[r, c] over one chunk of rows; a launch repeats it until one row is left.
// `broadcast`: y[plane, r, c] = scale * x[plane, c].

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // broadcast: units of E that an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
alias X = f32; // broadcast: unit of x; E, or f32 where x has one column, each element of which fills units of E
const ACCUMULATE: bool = false; // columns: add to what y holds, at the last level

struct Params {
    len: u32, // broadcast: elements E of the output
    rows: u32, // broadcast: of a plane
    cols: u32, // in units of E
    chunk: u32, // rows an invocation sums
    across: u32, // workgroups along the columns
    scale: f32, // broadcast: a factor
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>; // [rows, cols]
@group(0) @binding(1) var<storage, read> small: array<X>; // [planes, cols], of broadcast
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [chunks, cols]; broadcast: [planes, rows, cols]

@compute @workgroup_size(INVOCATIONS)
fn columns(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    let col = group % p.across * INVOCATIONS + lid;
    let first = group / p.across * p.chunk;
    if (col >= p.cols || first >= p.rows) {
        return;
    }
    let cols = p.cols; // loads in a loop are expensive, even of uniforms
    let end = min(first + p.chunk, p.rows);
    var sum = E();
    var r = first;
    for (; r + 4u <= end; r += 4u) {
        let at = r * cols + col;
        sum += (x[at] + x[at + cols]) + (x[at + 2u * cols] + x[at + 3u * cols]);
    }
    for (; r < end; r++) {
        sum += x[r * cols + col];
    }
    let at = group / p.across * cols + col;
    if (ACCUMULATE) {
        sum += y[at];
    }
    y[at] = sum;
}

@compute @workgroup_size(INVOCATIONS)
fn broadcast(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    // Column, row and plane count along with i, since divisions are expensive; so are loads in a loop, even of
    // uniforms.
    let cols = p.cols;
    let plane = p.rows * cols;
    let scale = p.scale;
    let col_step = INVOCATIONS % cols;
    let plane_step = INVOCATIONS % plane;
    let base_step = INVOCATIONS / plane * cols;
    var col = first % cols;
    var in_plane = first % plane;
    var base = first / plane * cols;
    for (var i = first; i < end; i += INVOCATIONS) {
        y[i] = scale * E(small[base + col]);
        col += col_step;
        col -= select(0u, cols, col >= cols);
        base += base_step;
        in_plane += plane_step;
        if (in_plane >= plane) {
            in_plane -= plane;
            base += cols;
        }
    }
}
