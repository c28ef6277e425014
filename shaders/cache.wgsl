// Rows in the middle of longer sequences: keys and values of new tokens go into a cache, and come back
// out of it. Where they start is known only when the step runs, and differs by sequence.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // units of E that an invocation moves, INVOCATIONS apart
alias E = vec4<f32>; // f32 where rows are no multiple of 4

struct Params {
    len: u32, // elements E of the rows
    sequence: u32, // of those, in one sequence: time * cols
    cols: u32, // elements E of a row
    capacity: u32, // rows of a sequence of the cache
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> start: array<u32>; // [batch]

// write_rows: rows past the end of the cache are left out
@group(0) @binding(2) var<storage, read> rows: array<E>; // [batch, time, cols]
@group(0) @binding(3) var<storage, read_write> cache_out: array<E>; // [batch, capacity, cols]

// read_rows: rows past the end of the cache are zero
@group(0) @binding(2) var<storage, read> cache: array<E>; // [batch, capacity, cols]
@group(0) @binding(3) var<storage, read_write> rows_out: array<E>; // [batch, time, cols]

// The row of its sequence in the cache that element `i` of the rows belongs to.
fn row(i: u32) -> u32 {
    // Starts past the end are clamped, so that sums do not wrap.
    return min(start[i / p.sequence], p.capacity) + i % p.sequence / p.cols;
}

// The index in the cache of element `i` of the rows.
fn at(i: u32) -> u32 {
    return (i / p.sequence * p.capacity + row(i)) * p.cols + i % p.cols;
}

@compute @workgroup_size(INVOCATIONS)
fn write_rows(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    for (var i = first; i < min(first + INVOCATIONS * EACH, p.len); i += INVOCATIONS) {
        if (row(i) < p.capacity) {
            cache_out[at(i)] = rows[i];
        }
    }
}

@compute @workgroup_size(INVOCATIONS)
fn read_rows(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    for (var i = first; i < min(first + INVOCATIONS * EACH, p.len); i += INVOCATIONS) {
        var v = E();
        if (row(i) < p.capacity) {
            v = cache[at(i)];
        }
        rows_out[i] = v;
    }
}
