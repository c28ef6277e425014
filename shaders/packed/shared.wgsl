// What kernels of packed products share; after decode.wgsl. Then follows the text of a family: rows.wgsl looks up
// rows; on software adapters, lanes.wgsl multiplies, backward.wgsl makes the gradient, and with many rows unpack.wgsl
// decodes the matrix for the kernels of plain products; on GPUs, dots.wgsl and
// few.wgsl multiply few rows, tiles.wgsl and tiled.wgsl many, and tiles.wgsl and tiled_backward.wgsl make the
// gradient.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup

struct Params {
    m: u32, // rows of x; in `rows`, tokens
    n: u32,
    units: u32, // of a row: k / 32
    groups_n: u32, // workgroups along n, or along k backward
    groups: u32,
    has_bias: u32,
    accumulate: u32, // add to what the output holds
    first: u32, // id of the first row
    since: u32, // the rows of w that `backward` takes
    until: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> w: array<u32>; // [words]: those of [n, units] in FORMAT

fn weight(i: u32) -> u32 {
    return w[i];
}
