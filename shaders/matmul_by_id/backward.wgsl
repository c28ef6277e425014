// dw[i] = sum of x[s]^T dy[s] where ids[s] = i (+ dw[i]); after shared.wgsl. x is bound as `a`, dy as `b`.
//
// An invocation makes ROWS, 4, rows of a matrix by one quad of its columns; SLICES of them share the rows of x.

@group(0) @binding(4) var<storage, read_write> dw: array<f32>; // [count, k, n]
@group(0) @binding(4) var<storage, read_write> dw_quads: array<vec4<f32>>; // [count, k, n]

struct Block {
    matrix: u32,
    row0: u32,
    col0: u32,
}

// The block of an invocation. There may be none left: it then is the last.
fn block_of(group: u32, lid: u32) -> Block {
    let across = (p.n + 3u) / 4u;
    let down = (p.k + 3u) / 4u;
    let i = min(group * LANES + lid % LANES, p.count * down * across - 1u);
    return Block(i / across / down, i / across % down * 4u, i % across * 4u);
}

fn is_left(group: u32, lid: u32) -> bool {
    return group * LANES + lid < p.count * ((p.k + 3u) / 4u) * ((p.n + 3u) / 4u);
}

fn block_sums(block: Block, lid: u32) -> Sums {
    let total = p.sequences * p.rows;
    var acc: Sums;
    for (var row = lid / LANES; row < total; row += SLICES) {
        if (ids[row / p.rows] != block.matrix) {
            continue;
        }
        let v = a_quad(row * p.k + block.row0, total * p.k - 1u);
        let d = b_quad(row * p.n + block.col0, total * p.n - 1u);
        for (var r = 0u; r < ROWS; r++) { // unroll
            acc[r] = fma(vec4<f32>(v[r]), d, acc[r]);
        }
    }
    return acc;
}

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
    let block = block_of(group, lid);
    reduce(block_sums(block, lid), lid);
    if (lid >= LANES || !is_left(group, lid)) {
        return;
    }
    for (var row = block.row0; row < min(block.row0 + 4u, p.k); row++) {
        for (var col = block.col0; col < min(block.col0 + 4u, p.n); col++) {
            let at = (block.matrix * p.k + row) * p.n + col;
            var v = partial[(row - block.row0) * GROUP + lid][col - block.col0];
            if (p.accumulate != 0u) {
                v += dw[at];
            }
            dw[at] = v;
        }
    }
}

@compute @workgroup_size(GROUP)
fn backward_quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let block = block_of(group, lid);
    reduce(block_sums(block, lid), lid);
    if (lid >= LANES || !is_left(group, lid)) {
        return;
    }
    for (var row = block.row0; row < min(block.row0 + 4u, p.k); row++) {
        let at = ((block.matrix * p.k + row) * p.n + block.col0) / 4u;
        var v = partial[(row - block.row0) * GROUP + lid];
        if (p.accumulate != 0u) {
            v += dw_quads[at];
        }
        dw_quads[at] = v;
    }
}
