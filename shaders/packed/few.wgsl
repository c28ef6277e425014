// Packed products of few rows on GPUs, ROWS of them at a time; after dots.wgsl and what it needs,
// shared.wgsl and store.wgsl.

// y = x w^T + bias
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4

var<private> row0: u32;

fn input(row: u32, quad: u32) -> vec4<f32> {
    return x[min(row0 + row, p.m - 1u) * p.units * 8u + quad];
}

@compute @workgroup_size(GROUP)
fn forward_few(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    row0 = (group / p.groups_n) * ROWS;
    let col0 = ((group % p.groups_n) * (GROUP / TEAM) + lid / TEAM) * COLS;
    let sums = dots(col0, p.n, p.units, lid);
    if (lid % TEAM != 0u) {
        return;
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            store(row0 + r, col0 + c, sums[r][c]);
        }
    }
}
