// Kernels of matmul that go along k in strips of a and b, TILE_K at a time, for a TILE_M x TILE_N tile
// of y; after shared.wgsl.

// knobs
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;

const TILE_K: u32 = 16u;
const A_WIDTH: u32 = TILE_M / 4u; // quads of a's strip at one k
const B_WIDTH: u32 = TILE_N / 4u;
const A_BLOCKS: u32 = A_WIDTH * TILE_K / 4u; // 4 x 4 blocks of a's strip
const BLOCKS: u32 = A_BLOCKS + B_WIDTH * TILE_K / 4u; // of both strips

// What a workgroup computes: the sums from `k` to `k_end` of a tile. `plane` is the matrix of y that they
// go to, of all slices of all matrices.
struct Work {
    row0: u32,
    col0: u32,
    matrix: u32,
    plane: u32,
    k: u32,
    k_end: u32,
}

fn work(group: u32) -> Work {
    let plane = (p.first + group) / p.tiles;
    let at = (p.first + group) % p.tiles;
    let k = plane % p.slices * p.slice_k;
    return Work(
        at / p.groups_n * TILE_M,
        at % p.groups_n * TILE_N,
        plane / p.slices,
        plane,
        k,
        min(k + p.slice_k, p.k),
    );
}

// A 4 x 4 block on its way to a strip. Computed once a tile, since there is little time between barriers.
struct Block {
    at: vec4<u32>, // where in memory its quads start in the strip at k = 0
    k: u32, // its first k in the strip
    x: u32, // its quad along m or n
}

// Block `t` of a strip along m or n, `width` quads wide, from `x0` of `size` rows or columns on.
// Neighbouring invocations load neighbouring quads.
fn block(t: u32, x0: u32, size: u32, width: u32, matrix: u32, along_k: bool) -> Block {
    let count = vec4<u32>(0u, 1u, 2u, 3u);
    let x = select(t % width, t / (TILE_K / 4u), along_k);
    let k = 4u * select(t / width, t % (TILE_K / 4u), along_k);
    if (along_k) {
        let row = min(vec4<u32>(x0 + 4u * x) + count, vec4<u32>(size - 1u));
        return Block(row * p.k + vec4<u32>(matrix + k), k, x);
    }
    return Block((vec4<u32>(k) + count) * size + vec4<u32>(matrix + min(x0 + 4u * x, size - 1u)), k, x);
}

// A block of the strip that starts at `k`, as it lies in memory: quads along k, by m, or if A_TRANSPOSED
// along m, by k.
fn a_rows(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let at = source.at + vec4<u32>(k * select(1u, p.m, A_TRANSPOSED));
    var rows: mat4x4<f32>;
    for (var j = 0u; j < 4u; j++) { // unroll
        rows[j] = mask(a_quad(at[j], last), source.k + k + select(0u, j, A_TRANSPOSED), !A_TRANSPOSED);
    }
    return rows;
}

// The same of b: quads along n, by k, or if B_TRANSPOSED along k, by n.
fn b_rows(source: Block, k: u32, last: u32) -> mat4x4<f32> {
    let at = source.at + vec4<u32>(k * select(p.n, 1u, B_TRANSPOSED));
    var rows: mat4x4<f32>;
    for (var j = 0u; j < 4u; j++) { // unroll
        rows[j] = mask(b_quad(at[j], last), source.k + k + select(j, 0u, B_TRANSPOSED), B_TRANSPOSED);
    }
    return rows;
}
