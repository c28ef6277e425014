// Kernels of matmul whose invocations have columns of their own; after shared.wgsl.

// knobs
const LANES: u32 = 8u; // invocations along n
const ROWS: u32 = 16u; // sums of an invocation: ROWS x 4*QUADS
const QUADS: u32 = 2u;

const COLS: u32 = 4u * QUADS; // columns of an invocation

// Elements i to i + COLS - 1 of b.
fn b_quads(i: u32, last: u32) -> array<vec4<f32>, QUADS> {
    var quads: array<vec4<f32>, QUADS>;
    if (B_ALIGNED) {
        for (var q = 0u; q < QUADS; q++) { // unroll
            quads[q] = b[min(i / 4u + q, last / 4u)];
        }
        return quads;
    }
    var next = b[min(i, last) / 4u];
    for (var q = 0u; q < QUADS; q++) { // unroll
        let low = next;
        next = b[min(i / 4u + q + 1u, last / 4u)];
        quads[q] = shifted(low, next, i % 4u);
    }
    return quads;
}

// Four k by COLS columns of b: [q][j] is row k + j, quad q. Columns past the end are clamped, so that
// loops over k have no branches; their sums are not stored.
fn b_block(col: u32, k: u32, b0: u32, last: u32) -> array<mat4x4<f32>, QUADS> {
    var block: array<mat4x4<f32>, QUADS>;
    if (B_TRANSPOSED) {
        for (var q = 0u; q < QUADS; q++) { // unroll
            let c = vec4<u32>(col + 4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
            let at = vec4<u32>(b0 + k) + min(c, vec4<u32>(p.n - 1u)) * p.k;
            block[q] = transpose(mat4x4<f32>(
                mask(b_quad(at.x, last), k, true),
                mask(b_quad(at.y, last), k, true),
                mask(b_quad(at.z, last), k, true),
                mask(b_quad(at.w, last), k, true),
            ));
        }
        return block;
    }
    for (var j = 0u; j < 4u; j++) { // unroll
        let row = b_quads(b0 + (k + j) * p.n + min(col, p.n - 1u), last);
        for (var q = 0u; q < QUADS; q++) { // unroll
            block[q][j] = mask(row[q], k + j, false);
        }
    }
    return block;
}

// Adds four k to a quad of sums, as fma: the loops consist of little else.
fn add_products(sum: vec4<f32>, v: vec4<f32>, block: mat4x4<f32>) -> vec4<f32> {
    return fma(vec4<f32>(v.w), block[3], fma(vec4<f32>(v.z), block[2],
        fma(vec4<f32>(v.y), block[1], fma(vec4<f32>(v.x), block[0], sum))));
}
