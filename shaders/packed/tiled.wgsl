// y = x w^T + bias for many rows, on GPUs; after decode.wgsl, shared.wgsl, store.wgsl and
// tiles.wgsl.

@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4

const PARTS: u32 = 4u / PIECE; // pieces of a strip

// Both strips hold the quads of the same pieces, in whatever order these have them.
fn stage_x(row0: u32, strip: u32, lid: u32) {
    for (var i = 0u; i < (4u * TILE_M + GROUP - 1u) / GROUP; i++) {
        let t = i * GROUP + lid;
        if (4u * TILE_M % GROUP == 0u || t < 4u * TILE_M) {
            let quad = piece_quad(strip * PARTS + t % 4u / PIECE, t % PIECE);
            left[slot(t % 4u, t / 4u, TILE_M)] = x[min(row0 + t / 4u, p.m - 1u) * p.units * 8u + quad];
        }
    }
}

fn stage_w(col0: u32, strip: u32, lid: u32) {
    for (var i = 0u; i < (PARTS * TILE_N + GROUP - 1u) / GROUP; i++) {
        let t = i * GROUP + lid;
        if (PARTS * TILE_N % GROUP == 0u || t < PARTS * TILE_N) {
            let part = t % PARTS;
            let col = t / PARTS;
            let q = piece(min(col0 + col, p.n - 1u) * p.units, strip * PARTS + part);
            for (var j = 0u; j < PIECE; j++) { // unroll
                right[slot(part * PIECE + j, col, TILE_N)] = q[j];
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn forward_tiled(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * TILE_M;
    let col0 = (group % p.groups_n) * TILE_N;
    var acc: array<array<f32, TILE_COLS>, TILE_ROWS>;
    let strips = p.units * 2u;
    for (var strip = 0u; strip < strips; strip++) {
        stage_x(row0, strip, lid);
        stage_w(col0, strip, lid);
        workgroupBarrier();
        for (var q = 0u; q < 4u; q++) { // unroll
            var xs: array<vec4<f32>, TILE_ROWS>;
            for (var r = 0u; r < TILE_ROWS; r++) { // unroll
                xs[r] = left[slot(q, lid / ACROSS + r * DOWN, TILE_M)];
            }
            for (var c = 0u; c < TILE_COLS; c++) { // unroll
                let v = right[slot(q, lid % ACROSS + c * ACROSS, TILE_N)];
                for (var r = 0u; r < TILE_ROWS; r++) { // unroll
                    acc[r][c] = fma(xs[r].x, v.x, acc[r][c]);
                    acc[r][c] = fma(xs[r].y, v.y, acc[r][c]);
                    acc[r][c] = fma(xs[r].z, v.z, acc[r][c]);
                    acc[r][c] = fma(xs[r].w, v.w, acc[r][c]);
                }
            }
        }
        workgroupBarrier();
    }
    for (var r = 0u; r < TILE_ROWS; r++) { // unroll
        for (var c = 0u; c < TILE_COLS; c++) { // unroll
            store(row0 + lid / ACROSS + r * DOWN, col0 + lid % ACROSS + c * ACROSS, acc[r][c]);
        }
    }
}
