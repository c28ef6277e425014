// y = exp(x - max) / sum(exp(x - max)), by row. A row is the work of LANES invocations; see
// norm.wgsl.

// knobs
const GROUP: u32 = 8u;
const LANES: u32 = 1u;
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const WIDTH: u32 = 4u;

struct Params {
    rows: u32,
    cols: u32, // in units of E
    groups: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read_write> y_out: array<E>;

// backward
@group(0) @binding(1) var<storage, read> dy: array<E>;
@group(0) @binding(2) var<storage, read> y: array<E>;
@group(0) @binding(3) var<storage, read_write> dx: array<E>;

var<workgroup> partial: array<f32, GROUP>;

fn total(v: E) -> f32 {
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

fn largest(v: E) -> f32 {
    let q = vec4<f32>(v);
    return max(max(q.x, q.y), max(q.z, q.w));
}

// Sum or maximum of `v` over the LANES invocations of this row, to all of them.
fn reduce(v: f32, lid: u32, sum: bool) -> f32 {
    if (LANES == 1u) {
        return v;
    }
    partial[lid] = v;
    workgroupBarrier();
    let lane = lid % LANES;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        if (lane < step) {
            let other = partial[lid + step];
            partial[lid] = select(max(partial[lid], other), partial[lid] + other, sum);
        }
        workgroupBarrier();
    }
    let result = partial[lid - lane];
    workgroupBarrier();
    return result;
}

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
    let base = min(row, p.rows - 1u) * p.cols;
    let lane = lid % LANES;
    var top = x[base];
    for (var c = lane; c < p.cols; c += LANES) {
        top = max(top, x[base + c]);
    }
    let maximum = E(reduce(largest(top), lid, false));
    var sum = E();
    for (var c = lane; c < p.cols; c += LANES) {
        sum += exp(x[base + c] - maximum);
    }
    let scale = 1.0 / reduce(total(sum), lid, true);
    if (row >= p.rows) {
        return;
    }
    for (var c = lane; c < p.cols; c += LANES) {
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
    let base = min(row, p.rows - 1u) * p.cols;
    let lane = lid % LANES;
    var product = E();
    for (var c = lane; c < p.cols; c += LANES) {
        product += dy[base + c] * y[base + c];
    }
    let mean = E(reduce(total(product), lid, true));
    if (row >= p.rows) {
        return;
    }
    for (var c = lane; c < p.cols; c += LANES) {
        dx[base + c] = y[base + c] * (dy[base + c] - mean);
    }
}
