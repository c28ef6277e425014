// loss = mean over rows of logsumexp(logits) - logits[target]; the softmax is never stored. Rows whose
// target is no class do not count.
//
// After common/rows.wgsl. Logits are read in quads even where the columns are no multiple of 4 and a
// quad may hold the end of one row and the start of the next. Shapes are in elements.

// knobs
const OFFSETS: E = vec4<f32>(0.0, 1.0, 2.0, 3.0); // of the elements of an E; 0.0 for f32
const RAGGED: bool = true; // the columns are no multiple of WIDTH
const MEAN: bool = true; // backward: of the mean over the rows that count; else of their sum

struct Params {
    rows: u32,
    cols: u32, // in elements
    groups: u32, // workgroups
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<E>; // [rows, cols]
@group(0) @binding(2) var<storage, read> targets: array<u32>; // [rows]

// forward
@group(0) @binding(3) var<storage, read_write> lse_out: array<f32>; // [rows]
@group(0) @binding(4) var<storage, read_write> row_loss: array<vec2<f32>>; // [rows] of (loss, 1 if it counts)

// finish and finish_sum
@group(0) @binding(1) var<storage, read> losses: array<vec2<f32>>; // [rows] of (loss, 1 if it counts)
@group(0) @binding(2) var<storage, read_write> loss: array<f32>; // [1]
@group(0) @binding(3) var<storage, read_write> weight_out: array<f32>; // [1]: one over the rows that count

// share
@group(0) @binding(1) var<storage, read> all_targets: array<u32>; // [rows]
@group(0) @binding(2) var<storage, read_write> share_out: array<f32>; // [1]: one over the rows that count

// backward: logits in, their gradient out
@group(0) @binding(1) var<storage, read_write> dlogits: array<E>; // [rows, cols]
@group(0) @binding(3) var<storage, read> lse: array<f32>; // [rows]
@group(0) @binding(4) var<storage, read> weight: array<f32>; // [1], if MEAN
@group(0) @binding(5) var<storage, read> dloss: array<f32>; // [1]

// The columns of the elements of logits[i], in a row that starts at element `start`; negative before
// it. Exact, since there are fewer than 2^24.
fn columns(i: u32, start: u32) -> E {
    return E(f32(i32(i * WIDTH - start))) + OFFSETS;
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
    let lane = lid % LANES;
    let cols = E(f32(p.cols));
    let start = min(row, p.rows - 1u) * p.cols;
    let end = (start + p.cols + WIDTH - 1u) / WIDTH;
    var soft = Soft(LOWEST, 0.0);
    for (var i = start / WIDTH + lane; i < end; i += LANES) {
        var v = logits[i];
        if (RAGGED) {
            let col = columns(i, start);
            v = select(select(v, E(LOWEST), col >= cols), E(LOWEST), col < E());
        }
        soft = soften(soft, v);
    }
    soft = soft_row(soft, lid);
    if (row >= p.rows || lane > 0u) {
        return;
    }
    let log_sum = log(soft.sum);
    lse_out[row] = soft.top + log_sum;
    let target_id = targets[row];
    var result = vec2<f32>();
    if (target_id < p.cols) {
        let i = (start + target_id) / WIDTH;
        let hit = columns(i, start) == E(f32(target_id));
        let score = total(select(E(), logits[i] - E(soft.top), hit));
        result = vec2<f32>(log_sum - score, 1.0);
    }
    row_loss[row] = result;
}

// Sums over all rows, in one workgroup, which takes them as the columns of a single row.
fn sums(lid: u32) -> vec2<f32> {
    var sum = vec2<f32>();
    for (var row = lid; row < p.rows; row += GROUP) {
        sum += losses[row];
    }
    return row_sums(sum.x, sum.y, lid);
}

@compute @workgroup_size(GROUP)
fn finish(@builtin(local_invocation_index) lid: u32) {
    let sum = sums(lid);
    if (lid == 0u) {
        let w = 1.0 / max(sum.y, 1.0);
        loss[0] = sum.x * w;
        weight_out[0] = w;
    }
}

@compute @workgroup_size(GROUP)
fn finish_sum(@builtin(local_invocation_index) lid: u32) {
    let sum = sums(lid);
    if (lid == 0u) {
        loss[0] = sum.x;
    }
}

// Counts the rows whose target is a class, in one workgroup. Counts are exact below 2^24.
@compute @workgroup_size(GROUP)
fn share(@builtin(local_invocation_index) lid: u32) {
    var count = 0.0;
    for (var row = lid; row < p.rows; row += GROUP) {
        count += select(0.0, 1.0, all_targets[row] < p.cols);
    }
    count = row_sum(count, lid);
    if (lid == 0u) {
        share_out[0] = 1.0 / max(count, 1.0);
    }
}

// What backward needs of a row: dlogits = (softmax - onehot(target)) * dloss / count, or without the
// count.
struct Row {
    hit: f32, // column of the target
    lse: f32,
    scale: f32,
}

fn row_of(row: u32) -> Row {
    let r = min(row, p.rows - 1u);
    let id = targets[r];
    if (id < p.cols) {
        var scale = dloss[0];
        if (MEAN) {
            scale *= weight[0];
        }
        return Row(f32(id), lse[r], scale);
    }
    return Row(-1.0, lse[r], 0.0);
}

// The invocations of a row make the quads that start in it; the last may hold columns of the next. Each
// quad is read and written by one invocation only, so the gradient takes the place of the logits.
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
    let cols = f32(p.cols);
    let start = row * p.cols;
    let end = (start + p.cols + WIDTH - 1u) / WIDTH;
    let own = row_of(row);
    var next = own;
    if (RAGGED) {
        next = row_of(row + 1u);
        next.hit += cols;
    }
    for (var i = (start + WIDTH - 1u) / WIDTH + lid % LANES; i < end; i += LANES) {
        let col = columns(i, start);
        var hit = E(own.hit);
        var sums = E(own.lse);
        var scale = E(own.scale);
        if (RAGGED) {
            let behind = col >= E(cols);
            hit = select(hit, E(next.hit), behind);
            sums = select(sums, E(next.lse), behind);
            scale = select(scale, E(next.scale), behind);
        }
        dlogits[i] = (exp(dlogits[i] - sums) - select(E(), E(1.0), col == hit)) * scale;
    }
}
