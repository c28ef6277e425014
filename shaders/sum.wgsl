// `columns`: y[c] = sum_r x[r, c] over one chunk of rows; a launch repeats it until one row is left. For software
// adapters: an invocation sums a column.
// `strips`: the same for GPUs, which sum all rows at once if they can. A workgroup sums a strip of neighbouring columns:
// SLICES invocations share each, and go over every SLICES-th row. Then a tree in workgroup memory adds up the slices.
// `strip_pairs`: two such sums over matrices of the same shape.
// `broadcast`: y[plane, r, c] = scale * x[plane, c].

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // broadcast: units of E that an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
alias X = f32; // broadcast: unit of x; E, or f32 where x has one column, each element of which fills units of E
const ACCUMULATE: bool = false; // add to what y holds, at the last level
const STRIP: u32 = 8u; // strips: columns of a workgroup, in units of E
const SLICES: u32 = 8u; // strips: invocations that share a column; STRIP * SLICES <= INVOCATIONS

struct Params {
    len: u32, // broadcast: elements E of the output
    rows: u32, // broadcast: of a plane
    cols: u32, // in units of E
    chunk: u32, // rows that an invocation of columns sums, or a workgroup of strips
    across: u32, // workgroups along the columns
    scale: f32, // broadcast: a factor
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>; // [rows, cols]
@group(0) @binding(1) var<storage, read> small: array<X>; // [planes, cols], of broadcast
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [chunks, cols]; broadcast: [planes, rows, cols]

// strip_pairs; bindings 1 and 2 are x and y
@group(0) @binding(3) var<storage, read> x2: array<E>; // [rows, cols]
@group(0) @binding(4) var<storage, read_write> y2: array<E>; // [chunks, cols]

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

var<workgroup> parts: array<E, INVOCATIONS>;

// What an invocation of strips goes over.
struct Slice {
    col: u32,
    row: u32, // the first
    end: u32, // of the chunk's rows; 0 for an invocation without work
    at: u32, // where the sum goes
}

fn slice_of(group: u32, lid: u32) -> Slice {
    let chunk = group / p.across;
    let col = group % p.across * STRIP + lid % STRIP;
    let works = col < p.cols && lid / STRIP < SLICES;
    let end = select(0u, min((chunk + 1u) * p.chunk, p.rows), works);
    return Slice(col, chunk * p.chunk + lid / STRIP, end, chunk * p.cols + col);
}

// The sum over the slices of each column, to the first slice.
fn over_slices(sum: E, lid: u32) -> E {
    if (SLICES == 1u) {
        return sum;
    }
    parts[lid] = sum;
    workgroupBarrier();
    for (var n = SLICES; n > 1u; n = (n + 1u) / 2u) {
        let half = (n + 1u) / 2u;
        if (lid / STRIP + half < n) {
            parts[lid] += parts[lid + half * STRIP];
        }
        workgroupBarrier();
    }
    return parts[lid];
}

@compute @workgroup_size(INVOCATIONS)
fn strips(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group / p.across * p.chunk >= p.rows) {
        return;
    }
    let s = slice_of(group, lid);
    let cols = p.cols;
    let step = SLICES * cols;
    var sum = E();
    var r = s.row;
    for (; r + 7u * SLICES < s.end; r += 8u * SLICES) {
        let a = r * cols + s.col;
        let b = a + 4u * step;
        sum += ((x[a] + x[a + step]) + (x[a + 2u * step] + x[a + 3u * step]))
            + ((x[b] + x[b + step]) + (x[b + 2u * step] + x[b + 3u * step]));
    }
    for (; r < s.end; r += SLICES) {
        sum += x[r * cols + s.col];
    }
    sum = over_slices(sum, lid);
    if (lid < STRIP && s.end > 0u) {
        if (ACCUMULATE) {
            sum += y[s.at];
        }
        y[s.at] = sum;
    }
}

@compute @workgroup_size(INVOCATIONS)
fn strip_pairs(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group / p.across * p.chunk >= p.rows) {
        return;
    }
    let s = slice_of(group, lid);
    let cols = p.cols;
    let step = SLICES * cols;
    var sum = E();
    var sum2 = E();
    var r = s.row;
    for (; r + 3u * SLICES < s.end; r += 4u * SLICES) {
        let a = r * cols + s.col;
        sum += (x[a] + x[a + step]) + (x[a + 2u * step] + x[a + 3u * step]);
        sum2 += (x2[a] + x2[a + step]) + (x2[a + 2u * step] + x2[a + 3u * step]);
    }
    for (; r < s.end; r += SLICES) {
        sum += x[r * cols + s.col];
        sum2 += x2[r * cols + s.col];
    }
    sum = over_slices(sum, lid);
    sum2 = over_slices(sum2, lid);
    if (lid < STRIP && s.end > 0u) {
        if (ACCUMULATE) {
            sum += y[s.at];
            sum2 += y2[s.at];
        }
        y[s.at] = sum;
        y2[s.at] = sum2;
    }
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
