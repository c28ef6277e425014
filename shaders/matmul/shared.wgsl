// y[m, n] = sum_k op(a)[m, k] * op(b)[k, n]  (+ bias[n])  (+ y[m, n])
//
// quads.wgsl and this text come first in every kernel of matmul. After them comes one family of entry
// points:
//
// - columns.wgsl, then lanes.wgsl, for software adapters: no barriers, sums in registers;
// - columns.wgsl and reduce.wgsl, then few.wgsl, for any adapter where y has few rows: k is split over
//   invocations;
// - strips.wgsl, then tiled.wgsl, for GPUs: tiles of y, strips of a and b in workgroup memory;
// - strips.wgsl, then cooperative.wgsl, for GPUs with cooperative matrices.
//
// Where y has too few tiles to fill a GPU, k is split into slices, whose sums slices.wgsl adds up.
//
// All of them load quads, four consecutive elements, along whichever axis is contiguous in memory. A
// 4 x 4 block is transposed in registers where that axis is the wrong one, which costs nothing.
//
// `forward_lanes` and `forward_tiled` have twins, named `_quads`, that store whole quads where n is a
// multiple of 4. Twins differ in their stores alone, but not by a knob: y has another type, and WGSL
// checks both branches of an `if`.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    groups_n: u32, // workgroups along n
    groups: u32, // workgroups of the dispatch; of lanes and few, in each plane z
    // Flags and not knobs: the epilogue is short, and each pipeline takes software adapters half a
    // second to compile.
    has_bias: u32,
    accumulate: u32, // add to what y holds
    slices: u32, // of k, each with sums of its own: y is [batch, slices, m, n] if there are several
    slice_k: u32, // k of a slice
    tiles: u32, // of a matrix, where they are numbered through all slices and matrices
    first: u32, // the dispatch's first of these
    accumulate_sums: u32, // add to what the column sums hold
}

@group(0) @binding(3) var<storage, read> bias: array<f32>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [batch, m, n]

// Entry points that store quads.
@group(0) @binding(3) var<storage, read> bias_quads: array<vec4<f32>>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y_quads: array<vec4<f32>>; // [batch, m, n]

// Stores to column `col` of the row of y that starts at `row`.
fn store(row: u32, col: u32, sum: f32) {
    var v = sum;
    if (p.has_bias != 0u) {
        v += bias[col];
    }
    if (p.accumulate != 0u) {
        v += y[row + col];
    }
    y[row + col] = v;
}

fn store_quad(row: u32, col: u32, sum: vec4<f32>) {
    var v = sum;
    if (p.has_bias != 0u) {
        v += bias_quads[col / 4u];
    }
    if (p.accumulate != 0u) {
        v += y_quads[(row + col) / 4u];
    }
    y_quads[(row + col) / 4u] = v;
}
