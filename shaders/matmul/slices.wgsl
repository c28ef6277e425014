// The last pass of a product whose k was split into slices: adds up their sums, slice by slice, so that
// the bits are the same on every run.

// knobs
alias E = vec4<f32>; // f32 where n is no multiple of 4

// Sizes are in E.
struct Slices {
    matrix: u32, // of a matrix of y
    n: u32,
    len: u32, // of y
    slices: u32,
    has_bias: u32,
    accumulate: u32, // add to what y holds
    accumulate_sums: u32, // add to what the column sums hold
}

@group(0) @binding(0) var<uniform> s: Slices;
@group(0) @binding(1) var<storage, read> parts: array<E>; // [batch, slices, m, n]
@group(0) @binding(2) var<storage, read> slices_bias: array<E>; // [n], if has_bias
@group(0) @binding(3) var<storage, read_write> total: array<E>; // [batch, m, n]

fn add_slices(i: u32) {
    let at = i / s.matrix * s.slices * s.matrix + i % s.matrix;
    var v = parts[at];
    for (var slice = 1u; slice < s.slices; slice++) {
        v += parts[at + slice * s.matrix];
    }
    if (s.has_bias != 0u) {
        v += slices_bias[i % s.n];
    }
    if (s.accumulate != 0u) {
        v += total[i];
    }
    total[i] = v;
}

@compute @workgroup_size(64)
fn sum_slices(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i < s.len) {
        add_slices(i);
    }
}

// The same, and then the column sums.
@group(0) @binding(4) var<storage, read> column_parts: array<E>; // [slices, n]
@group(0) @binding(5) var<storage, read_write> columns: array<E>; // [n]

@compute @workgroup_size(64)
fn sum_slices_and_columns(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i < s.len) {
        add_slices(i);
    } else if (i < s.len + s.n) {
        let col = i - s.len;
        var v = column_parts[col];
        for (var slice = 1u; slice < s.slices; slice++) {
            v += column_parts[slice * s.n + col];
        }
        if (s.accumulate_sums != 0u) {
            v += columns[col];
        }
        columns[col] = v;
    }
}
