// loss = mean over rows of logsumexp(logits) - logits[target], softmax never stored. Rows whose
// target is no class count for nothing.
//
// Behind common/rows.wgsl.

// knobs
const OFFSETS: E = vec4<f32>(0.0, 1.0, 2.0, 3.0); // of the elements of an E; 0.0 for f32

struct Params {
    rows: u32,
    cols: u32, // in units of E
    groups: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<E>;
@group(0) @binding(2) var<storage, read> targets: array<u32>;

// forward
@group(0) @binding(3) var<storage, read_write> lse_out: array<f32>;
@group(0) @binding(4) var<storage, read_write> row_loss: array<vec2<f32>>; // loss, 1 if it counts

// finish
@group(0) @binding(1) var<storage, read> sums: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;
@group(0) @binding(3) var<storage, read_write> weight_out: array<f32>;

// backward
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> weight: array<f32>;
@group(0) @binding(5) var<storage, read> dloss: array<f32>;
@group(0) @binding(6) var<storage, read_write> dlogits: array<E>;

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
    let target_id = targets[min(row, p.rows - 1u)];
    let lane = lid % LANES;
    // Lanes without a column start from the first one, so that there is no infinity.
    var top = logits[base];
    for (var c = lane; c < p.cols; c += LANES) {
        top = max(top, logits[base + c]);
    }
    let maximum = row_max(largest(top), lid);
    var sum = E();
    var chosen = E();
    for (var c = lane; c < p.cols; c += LANES) {
        let v = logits[base + c];
        sum += exp(v - E(maximum));
        let hit = E(f32(c * WIDTH)) + OFFSETS == E(f32(target_id));
        chosen += select(E(), v - E(maximum), hit);
    }
    let log_sum = log(row_sum(total(sum), lid));
    let score = row_sum(total(chosen), lid);
    if (row >= p.rows || lane > 0u) {
        return;
    }
    lse_out[row] = maximum + log_sum;
    let counts = target_id < p.cols * WIDTH;
    row_loss[row] = select(vec2<f32>(), vec2<f32>(log_sum - score, 1.0), counts);
}

@compute @workgroup_size(1)
fn finish() {
    let w = 1.0 / max(sums[0].y, 1.0);
    loss[0] = sums[0].x * w;
    weight_out[0] = w;
}

// dlogits = (softmax - onehot(target)) * dloss / count
@compute @workgroup_size(GROUP)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    let row = group * (GROUP / LANES) + lid / LANES;
    if (group >= p.groups || row >= p.rows) {
        return;
    }
    let base = row * p.cols;
    let target_id = targets[row];
    let scale = select(0.0, dloss[0] * weight[0], target_id < p.cols * WIDTH);
    let log_sum = lse[row];
    for (var c = lid % LANES; c < p.cols; c += LANES) {
        let hit = E(f32(c * WIDTH)) + OFFSETS == E(f32(target_id));
        dlogits[base + c] = (exp(logits[base + c] - E(log_sum)) - select(E(), E(1.0), hit)) * scale;
    }
}
