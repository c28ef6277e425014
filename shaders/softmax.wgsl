// y = exp(x - max) / sum(exp(x - max)), by row; after common/rows.wgsl.

struct Params {
    rows: u32,
    cols: u32, // in units of E
    groups: u32, // workgroups
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>; // [rows, cols]
@group(0) @binding(2) var<storage, read_write> y_out: array<E>; // [rows, cols]

// backward
@group(0) @binding(1) var<storage, read> dy: array<E>; // [rows, cols]
@group(0) @binding(2) var<storage, read> y: array<E>; // [rows, cols]
@group(0) @binding(3) var<storage, read_write> dx: array<E>; // [rows, cols]

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row = group * (GROUP / LANES) + lid / LANES;
    let cols = p.cols; // loads in a loop are expensive, even of uniforms
    let base = min(row, p.rows - 1u) * cols;
    let lane = lid % LANES;
    var soft = Soft(LOWEST, 0.0);
    for (var c = lane; c < cols; c += LANES) {
        soft = soften(soft, x[base + c]);
    }
    soft = soft_row(soft, lid);
    let maximum = E(soft.top);
    let scale = 1.0 / soft.sum;
    if (row >= p.rows) {
        return;
    }
    for (var c = lane; c < cols; c += LANES) {
        y_out[base + c] = exp(x[base + c] - maximum) * scale;
    }
}

// dx = y * (dy - sum(dy * y))
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
    let row = group * (GROUP / LANES) + lid / LANES;
    let cols = p.cols;
    let base = min(row, p.rows - 1u) * cols;
    let lane = lid % LANES;
    var product = E();
    for (var c = lane; c < cols; c += LANES) {
        product += dy[base + c] * y[base + c];
    }
    let mean = E(row_sum(total(product), lid));
    if (row >= p.rows) {
        return;
    }
    for (var c = lane; c < cols; c += LANES) {
        dx[base + c] = y[base + c] * (dy[base + c] - mean);
    }
}
