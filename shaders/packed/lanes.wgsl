// Packed products on software adapters; after common/subgroups.wgsl or no_subgroups.wgsl, decode.wgsl,
// shared.wgsl and store.wgsl. An invocation sums ROWS x COLS elements of y.

// knobs
const ROWS: u32 = 1u;
const COLS: u32 = 1u;

// y = x w^T + bias
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4

@compute @workgroup_size(GROUP)
fn forward_lanes(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = ((group % p.groups_n) * GROUP + lid) * COLS;
    var acc: array<array<vec4<f32>, COLS>, ROWS>;
    let units = p.units;
    for (var u = 0u; u < units; u++) {
        var ws: array<Unit, COLS>;
        for (var c = 0u; c < COLS; c++) { // unroll
            ws[c] = unit(min(col0 + c, p.n - 1u) * units + u);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            let at = (min(row0 + r, p.m - 1u) * units + u) * 8u;
            // With subgroups, each lane loads a quad and hands it round.
            var mine: vec4<f32>;
            if (SUBGROUPS) {
                mine = x[at + lid % 8u];
            }
            for (var i = 0u; i < 8u; i++) { // unroll
                var v: vec4<f32>;
                if (SUBGROUPS) {
                    v = from_lane(mine, i);
                } else {
                    v = x[at + i];
                }
                for (var c = 0u; c < COLS; c++) { // unroll
                    acc[r][c] = fma(v, ws[c][i], acc[r][c]);
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            store(row0 + r, col0 + c, dot(acc[r][c], vec4<f32>(1.0)));
        }
    }
}
