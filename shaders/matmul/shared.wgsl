// y[m, n] = sum_k op(a)[m, k] * op(b)[k, n]  (+ bias[n])  (+ y[m, n])
//
// This text comes first in every kernel of matmul. After it comes one family of entry points:
//
// - columns.wgsl, then lanes.wgsl, for software adapters: no barriers, sums in registers;
// - columns.wgsl, then few.wgsl, for any adapter where y has few rows: k is split over invocations;
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

// knobs
const A_TRANSPOSED: bool = false; // a is [k, m] in memory, not [m, k]
const B_TRANSPOSED: bool = false; // b is [n, k] in memory, not [k, n]
const A_ALIGNED: bool = true; // a's contiguous axis is a multiple of 4
const B_ALIGNED: bool = true; // b's is
const K_TAIL: bool = true; // k is no multiple of the k that the kernel takes at a time

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

// Shapes are in elements; a quad may hold the end of one row and the start of the next.
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>; // [batch, m, k], or [batch, k, m] if A_TRANSPOSED
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>; // [batch, k, n], or [batch, n, k] if B_TRANSPOSED
@group(0) @binding(3) var<storage, read> bias: array<f32>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [batch, m, n]

// Entry points that store quads.
@group(0) @binding(3) var<storage, read> bias_quads: array<vec4<f32>>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y_quads: array<vec4<f32>>; // [batch, m, n]

// Elements `by` to `by + 3` of two quads, for `by` below 4.
fn shifted(low: vec4<f32>, high: vec4<f32>, by: u32) -> vec4<f32> {
    let odd = (by & 1u) != 0u;
    let l = select(low, vec4<f32>(low.yzw, high.x), odd);
    let h = select(high.xy, high.yz, odd);
    return select(l, vec4<f32>(l.zw, h), (by & 2u) != 0u);
}

// Elements i to i + 3 of a. `last` is the index of its last element: no quad past it is read. What is
// read in place of such a quad is masked, or goes into sums that are not stored.
fn a_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (A_ALIGNED) {
        return a[at / 4u];
    }
    return shifted(a[at / 4u], a[min(at / 4u + 1u, last / 4u)], at % 4u);
}

fn b_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (B_ALIGNED) {
        return b[at / 4u];
    }
    return shifted(b[at / 4u], b[min(at / 4u + 1u, last / 4u)], at % 4u);
}

// Zeros past the end of k, for a quad that lies at `k` as a whole, or runs along k from there.
fn mask(v: vec4<f32>, k: u32, along: bool) -> vec4<f32> {
    if (!K_TAIL) {
        return v;
    }
    return select(
        vec4<f32>(),
        v,
        vec4<u32>(k) + select(vec4<u32>(), vec4<u32>(0u, 1u, 2u, 3u), along) < vec4<u32>(p.k),
    );
}

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
