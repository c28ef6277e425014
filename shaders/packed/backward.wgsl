// The gradient of packed products; after decode.wgsl and shared.wgsl.

// knobs
const ROWS: u32 = 1u; // rows of dx that an invocation makes

@group(0) @binding(2) var<storage, read> dy: array<f32>; // [m, n]
@group(0) @binding(3) var<storage, read_write> dx: array<vec4<f32>>; // [m, units, 8] of vec4

// dx = dy w. An invocation makes one unit of ROWS rows.
@compute @workgroup_size(GROUP)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let at = (group % p.groups_n) * GROUP + lid;
    let u = min(at, p.units - 1u);
    var acc: array<Unit, ROWS>;
    let until = p.until;
    for (var col = p.since; col < until; col++) {
        let ws = unit(col * p.units + u);
        for (var r = 0u; r < ROWS; r++) { // unroll
            let d = dy[min(row0 + r, p.m - 1u) * p.n + col];
            for (var i = 0u; i < 8u; i++) { // unroll
                acc[r][i] = fma(vec4<f32>(d), ws[i], acc[r][i]);
            }
        }
    }
    if (at >= p.units) {
        return;
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        if (row0 + r < p.m) {
            for (var i = 0u; i < 8u; i++) { // unroll
                let to = ((row0 + r) * p.units + u) * 8u + i;
                var v = acc[r][i];
                if (p.accumulate != 0u) {
                    v += dx[to];
                }
                dx[to] = v;
            }
        }
    }
}
