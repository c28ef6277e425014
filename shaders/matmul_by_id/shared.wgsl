// Products with a matrix by id. This text comes after common/subgroups.wgsl or no_subgroups.wgsl and, of matmul/,
// quads.wgsl, columns.wgsl and reduce.wgsl. After it comes forward.wgsl or backward.wgsl.
//
// The entry points of each differ in their stores: twins named `_quads` are for n that is a multiple of 4.

struct Params {
    n: u32,
    k: u32,
    rows: u32, // of a sequence
    sequences: u32,
    count: u32, // matrices of w
    groups_n: u32, // workgroups along n
    groups_rows: u32, // along the rows of a sequence
    groups: u32,
    accumulate: u32, // add to what y holds
}

@group(0) @binding(3) var<storage, read> ids: array<u32>; // [sequences]; of count or more: no matrix
