// A packed matrix in f32; after decode.wgsl and shared.wgsl.

@group(0) @binding(2) var<storage, read_write> plain: array<vec4<f32>>; // [n, units, 8] of vec4

// Each invocation decodes one unit.
@compute @workgroup_size(GROUP)
fn unpack(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * GROUP + lid;
    if (i >= p.n * p.units) {
        return;
    }
    let q = unit(i);
    for (var j = 0u; j < 8u; j++) { // unroll
        plain[8u * i + j] = q[j];
    }
}
