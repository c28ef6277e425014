// matmul for software adapters; after shared.wgsl and columns.wgsl. A workgroup is one vector of lanes
// along n, and a lane keeps ROWS x COLS sums in registers. There are no barriers.

// knobs
const B_PACKED: bool = false; // b is as `pack` leaves it

const SHARES: u32 = max(ROWS / LANES, 1u); // quads of a block of a that a lane loads
const SHARE_QUADS: u32 = max(min(ROWS, LANES) / 4u, 1u);

// A block of a is some rows by four k, as quads: one for each row, or with A_TRANSPOSED one for each k
// and four rows. Loads quad `t` of the block at `row` and `k`. Rows past the end are clamped, as columns
// are in `b_block`.
fn a_block(t: u32, row: u32, k: u32, a0: u32, last: u32) -> vec4<f32> {
    if (A_TRANSPOSED) {
        let kt = k + t % 4u;
        return mask(a_quad(a0 + kt * p.m + min(row + t / 4u * 4u, p.m - 1u), last), kt, false);
    }
    return mask(a_quad(a0 + min(row + t, p.m - 1u) * p.k + k, last), k, true);
}

// `b_block` for misaligned columns. Each of its quads spans two of memory's; the first of these is
// where the previous block ended, and is held, since loads are what costs.
fn b_block_held(
    col: u32,
    k: u32,
    b0: u32,
    last: u32,
    held: ptr<function, array<vec4<f32>, COLS>>,
) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    for (var q = 0u; q < QUADS; q++) {
        for (var j = 0u; j < 4u; j++) {
            let at = b0 + k + min(col + 4u * q + j, p.n - 1u) * p.k;
            let next = b[min(at / 4u + 1u, last / 4u)];
            block[q][j] = mask(shifted((*held)[4u * q + j], next, at % 4u), k, true);
            (*held)[4u * q + j] = next;
        }
        block[q] = transpose(block[q]);
    }
    return block;
}

// b packed, which is bound as `b` with B_PACKED: the columns of each workgroup in turn, by k, with zeros
// where k ends. Lanes read it in memory's own order, whatever the form of b. Packing reads b once, the
// tiles read it once for every ROWS rows. 4 * depth is k, rounded up.
const STRIP: u32 = LANES * QUADS; // quads of a workgroup's columns
@group(0) @binding(2) var<storage, read_write> packed: array<vec4<f32>>; // [batch, groups_n, 4 * depth, STRIP] of vec4

fn b_block_packed(strip: u32, k: u32, lane: u32) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    for (var j = 0u; j < 4u; j++) {
        for (var q = 0u; q < QUADS; q++) {
            block[q][j] = b[(strip * ((p.k + 3u) / 4u * 4u) + k + j) * STRIP + lane * QUADS + q];
        }
    }
    return block;
}

// Packs b: each invocation moves a 4 x 4 block. b is bound as `a`, and its n is m here.
@compute @workgroup_size(64)
fn pack(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let width = p.groups_n * STRIP;
    let depth = (p.k + 3u) / 4u;
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= width * depth) {
        return;
    }
    let x = i % width;
    let k = i / width * 4u;
    let a0 = wid.z * p.m * p.k;
    let last = a0 + p.m * p.k - 1u;
    var rows = mat4x4<f32>(a_block(0u, 4u * x, k, a0, last), a_block(1u, 4u * x, k, a0, last),
        a_block(2u, 4u * x, k, a0, last), a_block(3u, 4u * x, k, a0, last));
    if (!A_TRANSPOSED) {
        rows = transpose(rows);
    }
    let strip = wid.z * p.groups_n + x / STRIP;
    for (var j = 0u; j < 4u; j++) {
        packed[(strip * 4u * depth + k + j) * STRIP + x % STRIP] = rows[j];
    }
}

alias Sums = array<array<array<array<vec4<f32>, QUADS>, 4>, SHARE_QUADS>, SHARES>;

// The sums of the tile that starts at (row0, col0), in matrix `z` of the batch.
fn lane_sums(row0: u32, col0: u32, z: u32, lane: u32) -> Sums {
    let a0 = z * p.m * p.k;
    let b0 = z * p.k * p.n;
    let a_last = a0 + p.m * p.k - 1u;
    let b_last = b0 + p.k * p.n - 1u;
    var acc: Sums;
    var held: array<vec4<f32>, COLS>;
    if (B_TRANSPOSED && !B_ALIGNED && !B_PACKED) {
        for (var j = 0u; j < COLS; j++) {
            held[j] = b[(b0 + min(col0 + j, p.n - 1u) * p.k) / 4u];
        }
    }
    for (var k = 0u; k < p.k; k += 4u) {
        var bs: array<mat4x4<f32>, QUADS>;
        if (B_PACKED) {
            bs = b_block_packed(z * p.groups_n + col0 / (LANES * COLS), k, lane);
        } else if (B_TRANSPOSED && !B_ALIGNED) {
            bs = b_block_held(col0, k, b0, b_last, &held);
        } else {
            bs = b_block(col0, k, b0, b_last);
        }
        // All lanes need all of a's block. With subgroups each loads some quads and hands them
        // round: a load costs as much as tens of multiply-adds on software adapters.
        for (var s = 0u; s < SHARES; s++) {
            var mine: vec4<f32>;
            if (SUBGROUPS) {
                mine = a_block(s * LANES + lane % ROWS, row0, k, a0, a_last);
            }
            for (var g = 0u; g < SHARE_QUADS; g++) {
                var rows: array<vec4<f32>, 4>;
                for (var i = 0u; i < 4u; i++) {
                    if (SUBGROUPS) {
                        rows[i] = from_lane(mine, 4u * g + i);
                    } else {
                        rows[i] = a_block(s * LANES + 4u * g + i, row0, k, a0, a_last);
                    }
                }
                if (A_TRANSPOSED) {
                    let t = transpose(mat4x4<f32>(rows[0], rows[1], rows[2], rows[3]));
                    rows = array<vec4<f32>, 4>(t[0], t[1], t[2], t[3]);
                }
                for (var i = 0u; i < 4u; i++) {
                    for (var q = 0u; q < QUADS; q++) {
                        acc[s][g][i][q] = add_products(acc[s][g][i][q], rows[i], bs[q]);
                    }
                }
            }
        }
    }
    return acc;
}

// The sums of a tile on their way out. They go through workgroup memory, where an index may vary: as
// unrolled code, the stores would take longer to compile than all the rest. (Loops that read them back
// count from a row and a column, not from 0, or they would be unrolled: the quirk
// `slow-unrolled-memory`.) A lane reads only what it wrote itself, so there is no barrier.
var<workgroup> staged: array<vec4<f32>, LANES * ROWS * QUADS>;

fn stage(sums: Sums, lane: u32) {
    for (var s = 0u; s < SHARES; s++) {
        for (var g = 0u; g < SHARE_QUADS; g++) {
            for (var i = 0u; i < 4u; i++) {
                for (var q = 0u; q < QUADS; q++) {
                    staged[((s * LANES + 4u * g + i) * QUADS + q) * LANES + lane] = sums[s][g][i][q];
                }
            }
        }
    }
}

@compute @workgroup_size(LANES)
fn forward_lanes_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = (group % p.groups_n) * (LANES * COLS) + lane * COLS;
    stage(lane_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col += 4u) {
            let v = staged[((row - row0) * QUADS + (col - col0) / 4u) * LANES + lane];
            store_quad((wid.z * p.m + row) * p.n, col, v);
        }
    }
}

@compute @workgroup_size(LANES)
fn forward_lanes(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = (group % p.groups_n) * (LANES * COLS) + lane * COLS;
    stage(lane_sums(row0, col0, wid.z, lane), lane);
    for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
        for (var col = col0; col < min(col0 + COLS, p.n); col++) {
            let j = col - col0;
            store((wid.z * p.m + row) * p.n, col, staged[((row - row0) * QUADS + j / 4u) * LANES + lane][j % 4u]);
        }
    }
}
