// Products of the same few rows with several weights, y_i = x w_i^T + bias_i, in one dispatch; after
// common/subgroups.wgsl or no_subgroups.wgsl. A workgroup makes LANES neighbouring columns of one of
// them, or quads of columns, and SLICES invocations share each.
//
// This is the frame. Then come a text that reads x (plain.wgsl, norm.wgsl) and, for each product, one
// that goes along its weight (rows.wgsl, quads.wgsl, packed.wgsl), in which everything gets the number of
// the product behind its name. `Products` adds the bindings, and the entry point that calls them.

// knobs
const ROWS: u32 = 1u; // of x
const QUADS: u32 = 16u; // of a row of x
const LANES: u32 = 1u;
const SLICES: u32 = 64u;
const STEP: u32 = 1u; // how far apart the invocations are that share a column
const REACH: u32 = 1u; // how many neighbours can shuffle; at most STEP * SLICES
alias E = f32; // an element of y, or a quad

const GROUP: u32 = LANES * SLICES;

struct Params {
    groups: u32,
    eps: f32, // of a norm
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [ROWS, QUADS]

alias Sums = array<E, ROWS>;

var<workgroup> partial: array<E, ROWS * GROUP>;

// The lane of an invocation, and its slice of k.
fn lane_of(lid: u32) -> u32 {
    return select(lid / SLICES, lid % STEP, STEP > 1u);
}

fn slice_of(lid: u32) -> u32 {
    return (lid / STEP) % SLICES;
}

// Sums over slices, in a fixed order: among neighbours that can shuffle first, then through workgroup
// memory. Those of slice 0 have the result.
fn reduced(sums: Sums, lid: u32) -> Sums {
    var total = sums;
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var step = STEP; step < REACH; step *= 2u) {
            total[r] += moved(total[r], step);
        }
    }
    if (REACH == STEP * SLICES) {
        return total;
    }
    // What an earlier call left has been read.
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r++) { // unroll
        partial[r * GROUP + lid] = total[r];
    }
    for (var step = STEP * SLICES / 2u; step >= max(STEP, REACH); step /= 2u) {
        workgroupBarrier();
        if (slice_of(lid) * STEP < step) {
            for (var r = 0u; r < ROWS; r++) { // unroll
                partial[r * GROUP + lid] += partial[r * GROUP + lid + step];
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        total[r] = partial[r * GROUP + lid];
    }
    return total;
}
