// Rows of a packed matrix by id; after decode.wgsl and shared.wgsl.

// y[t] = w[ids[t] - first], zeros where there is no such row; an id below `first` wraps far above n
@group(0) @binding(2) var<storage, read> ids: array<u32>; // [m]
@group(0) @binding(3) var<storage, read_write> rows_out: array<vec4<f32>>; // [m, units, 8] of vec4

// Each invocation decodes one unit.
@compute @workgroup_size(GROUP)
fn rows(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * GROUP + lid;
    if (i >= p.m * p.units) {
        return;
    }
    let id = ids[i / p.units] - p.first;
    var q: Unit;
    if (id < p.n) {
        q = unit(id * p.units + i % p.units);
    }
    for (var j = 0u; j < 8u; j++) { // unroll
        rows_out[8u * i + j] = q[j];
    }
}
