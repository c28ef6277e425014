// dx = dy w on GPUs; after decode.wgsl, shared.wgsl and tiles.wgsl. Strips go along n; columns of a tile are those of
// whole pieces.

@group(0) @binding(2) var<storage, read> dy: array<f32>; // [m, n]
@group(0) @binding(3) var<storage, read_write> dx: array<vec4<f32>>; // [m, units, 8] of vec4

const QUADS: u32 = TILE_COLS / 4u;
const WIDE: u32 = TILE_N / 4u; // quads of a tile's columns
const PARTS: u32 = WIDE / PIECE; // pieces of those

fn dy_quad(row: u32, n: u32) -> vec4<f32> {
    let at = min(row, p.m - 1u) * p.n;
    let cols = vec4<u32>(n) + vec4<u32>(0u, 1u, 2u, 3u);
    let source = min(cols, vec4<u32>(p.n - 1u)) + vec4<u32>(at);
    let v = vec4<f32>(dy[source.x], dy[source.y], dy[source.z], dy[source.w]);
    return select(vec4<f32>(), v, cols < vec4<u32>(p.n));
}

fn stage_dy(row0: u32, n: u32, lid: u32) {
    for (var i = 0u; i < (4u * TILE_M + GROUP - 1u) / GROUP; i++) {
        let t = i * GROUP + lid;
        if (4u * TILE_M % GROUP == 0u || t < 4u * TILE_M) {
            left[slot(t % 4u, t / 4u, TILE_M)] = dy_quad(row0 + t / 4u, n + 4u * (t % 4u));
        }
    }
}

// Rows n to n + 15 of w, by [row][quad].
fn stage_w(piece0: u32, n: u32, lid: u32) {
    for (var i = 0u; i < (16u * PARTS + GROUP - 1u) / GROUP; i++) {
        let t = i * GROUP + lid;
        if (16u * PARTS % GROUP == 0u || t < 16u * PARTS) {
            let row = min(n + t / PARTS, p.n - 1u);
            let q = piece(row * p.units, min(piece0 + t % PARTS, p.units * 8u / PIECE - 1u));
            for (var j = 0u; j < PIECE; j++) { // unroll
                right[t * PIECE + j] = q[j];
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn backward_tiled(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * TILE_M;
    let piece0 = (group % p.groups_n) * PARTS;
    var acc: array<array<vec4<f32>, QUADS>, TILE_ROWS>;
    for (var n = 0u; n < p.n; n += 16u) {
        stage_dy(row0, n, lid);
        stage_w(piece0, n, lid);
        workgroupBarrier();
        for (var n4 = 0u; n4 < 4u; n4++) { // unroll
            var ds: array<vec4<f32>, TILE_ROWS>;
            for (var r = 0u; r < TILE_ROWS; r++) { // unroll
                ds[r] = left[slot(n4, lid / ACROSS + r * DOWN, TILE_M)];
            }
            for (var c = 0u; c < QUADS; c++) { // unroll
                let at = 4u * n4 * WIDE + lid % ACROSS + c * ACROSS;
                // One row of w at a time: with the quads of all four, cards with 128 registers spill.
                for (var j = 0u; j < 4u; j++) { // unroll
                    let v = right[at + j * WIDE];
                    for (var r = 0u; r < TILE_ROWS; r++) { // unroll
                        acc[r][c] = fma(vec4<f32>(ds[r][j]), v, acc[r][c]);
                    }
                }
            }
        }
        workgroupBarrier();
    }
    for (var r = 0u; r < TILE_ROWS; r++) { // unroll
        for (var c = 0u; c < QUADS; c++) { // unroll
            let row = row0 + lid / ACROSS + r * DOWN;
            let quad = lid % ACROSS + c * ACROSS;
            let t = piece0 + quad / PIECE;
            if (row < p.m && t < p.units * 8u / PIECE) {
                let to = row * p.units * 8u + piece_quad(t, quad % PIECE);
                var v = acc[r][c];
                if (p.accumulate != 0u) {
                    v += dx[to];
                }
                dx[to] = v;
            }
        }
    }
}
