// Layer norm: y = xhat * gamma + beta, xhat = (x - mean(x)) * rstd, rstd = 1 / sqrt(var(x) + eps), by
// row. RMS norm is the same with the mean taken as zero and without beta.
// Behind common/rows.wgsl. Two passes over x for the variance: E[x^2] - E[x]^2 cancels.

// knobs
const CENTERED: bool = true; // layer norm; else RMS norm
const ACCUMULATE: bool = false; // backward adds dx to what is there

struct Params {
    rows: u32,
    cols: u32, // in units of E
    n: f32, // elements of a row
    eps: f32,
    groups: u32, // workgroups of forward and backward
    chunk: u32, // rows an invocation of backward_params sums
    chunks: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read> gamma: array<E>;
@group(0) @binding(3) var<storage, read> beta: array<E>;
@group(0) @binding(4) var<storage, read_write> y: array<E>;
@group(0) @binding(5) var<storage, read_write> xhat_out: array<E>;
@group(0) @binding(6) var<storage, read_write> rstd_out: array<f32>;

// backward and backward_params
@group(0) @binding(1) var<storage, read> dy: array<E>;
@group(0) @binding(2) var<storage, read> xhat: array<E>;
// backward
@group(0) @binding(3) var<storage, read> rstd: array<f32>;
@group(0) @binding(4) var<storage, read> gamma_b: array<E>;
@group(0) @binding(5) var<storage, read_write> dx: array<E>;
// backward_params
@group(0) @binding(3) var<storage, read_write> dgamma: array<E>;
@group(0) @binding(4) var<storage, read_write> dbeta: array<E>;

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
    // Past the end a row is computed again rather than skipped, to keep barriers uniform.
    let row = group * (GROUP / LANES) + lid / LANES;
    let base = min(row, p.rows - 1u) * p.cols;
    var mean = 0.0;
    if (CENTERED) {
        var sum = E();
        for (var c = lid % LANES; c < p.cols; c += LANES) {
            sum += x[base + c];
        }
        mean = row_sum(total(sum), lid) / p.n;
    }
    var squares = E();
    for (var c = lid % LANES; c < p.cols; c += LANES) {
        let d = x[base + c] - E(mean);
        squares += d * d;
    }
    let variance = row_sum(total(squares), lid) / p.n;
    let r = 1.0 / sqrt(variance + p.eps);
    if (row >= p.rows) {
        return;
    }
    for (var c = lid % LANES; c < p.cols; c += LANES) {
        let v = (x[base + c] - E(mean)) * r;
        xhat_out[base + c] = v;
        if (CENTERED) {
            y[base + c] = v * gamma[c] + beta[c];
        } else {
            y[base + c] = v * gamma[c];
        }
    }
    if (lid % LANES == 0u) {
        rstd_out[row] = r;
    }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * gamma; without mean(g) in RMS norm.
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
    var sum_g = E();
    var sum_gx = E();
    for (var c = lid % LANES; c < p.cols; c += LANES) {
        let g = dy[base + c] * gamma_b[c];
        sum_g += g;
        sum_gx += g * xhat[base + c];
    }
    var means = row_sums(total(sum_g), total(sum_gx), lid) / p.n;
    if (!CENTERED) {
        means.x = 0.0;
    }
    if (row >= p.rows) {
        return;
    }
    let r = rstd[row];
    for (var c = lid % LANES; c < p.cols; c += LANES) {
        let i = base + c;
        var v = (dy[i] * gamma_b[c] - E(means.x) - xhat[i] * means.y) * r;
        if (ACCUMULATE) {
            v += dx[i];
        }
        dx[i] = v;
    }
}

// dgamma = sum_rows dy * xhat, dbeta = sum_rows dy: one chunk of rows an invocation.
@compute @workgroup_size(64)
fn backward_params(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.chunks * p.cols) {
        return;
    }
    let col = i % p.cols;
    let first = (i / p.cols) * p.chunk;
    var sum_gx = E();
    var sum_g = E();
    for (var r = first; r < min(first + p.chunk, p.rows); r++) {
        let v = dy[r * p.cols + col];
        sum_g += v;
        sum_gx += v * xhat[r * p.cols + col];
    }
    dgamma[i] = sum_gx;
    dbeta[i] = sum_g;
}
