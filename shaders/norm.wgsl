// Layer norm: y = xhat * gamma + beta, xhat = (x - mean(x)) * rstd, rstd = 1 / sqrt(var(x) + eps), by
// row. RMS norm is the same with the mean taken as zero and without beta.
//
// After common/rows.wgsl. The lanes of a row work on ROWS rows at a time: these share the loads of gamma
// and beta, and their parts of dgamma and dbeta are summed on the way.

// knobs
const CENTERED: bool = true; // layer norm; else RMS norm
const ACCUMULATE: bool = false; // backward adds dx to what is there
const ROWS: u32 = 1u;
const FROM_STORED: bool = false; // y is made of xhat as it was stored, in fewer bits
const HELD: u32 = 1u; // backward_held: elements E of a row that a lane holds

struct Params {
    rows: u32,
    cols: u32, // in units of E
    n: f32, // elements of a row
    eps: f32,
    groups: u32, // workgroups
    chunk: u32, // backward_held: rows of a workgroup
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>; // [rows, cols]
@group(0) @binding(2) var<storage, read> gamma: array<E>; // [cols]
@group(0) @binding(3) var<storage, read> beta: array<E>; // [cols], if CENTERED
@group(0) @binding(4) var<storage, read_write> y: array<E>; // [rows, cols]
@group(0) @binding(5) var<storage, read_write> xhat_out: array<E>; // [rows, cols]
@group(0) @binding(6) var<storage, read_write> rstd_out: array<f32>; // [rows]

// backward and backward_held. A block is the rows that these sum dgamma and dbeta over: ROWS of them, or
// `chunk`.
@group(0) @binding(1) var<storage, read> dy: array<E>; // [rows, cols]
@group(0) @binding(2) var<storage, read> xhat: array<E>; // [rows, cols]
@group(0) @binding(3) var<storage, read> rstd: array<f32>; // [rows]
@group(0) @binding(4) var<storage, read> weight: array<E>; // [cols]: gamma
@group(0) @binding(5) var<storage, read_write> dx: array<E>; // [rows, cols]
@group(0) @binding(6) var<storage, read_write> dgamma: array<E>; // [blocks, cols]
@group(0) @binding(7) var<storage, read_write> dbeta: array<E>; // [blocks, cols]

// Where each of the ROWS rows from `row0` on starts. Past the end it is the last row again, rather than
// none, to keep barriers uniform.
fn starts(row0: u32) -> array<u32, ROWS> {
    var at: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) { // unroll
        at[r] = min(row0 + r, p.rows - 1u) * p.cols;
    }
    return at;
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
    let row0 = (group * (GROUP / LANES) + lid / LANES) * ROWS;
    let at = starts(row0);
    let rows = p.rows;
    let cols = p.cols; // loads in a loop are expensive, even of uniforms
    // Mean and squared deviations of what this lane has seen, by Welford's update: one pass, without the
    // cancellation of E[x^2] - E[x]^2.
    var count = 0.0;
    var mean: array<E, ROWS>;
    var squares: array<E, ROWS>;
    for (var c = lid % LANES; c < cols; c += LANES) {
        count += 1.0;
        let share = 1.0 / count;
        for (var r = 0u; r < ROWS; r++) { // unroll
            let v = x[at[r] + c];
            let d = v - mean[r];
            if (CENTERED) {
                mean[r] += d * share;
            }
            squares[r] += d * (v - mean[r]);
        }
    }
    var row_mean: array<f32, ROWS>;
    var row_rstd: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) { // unroll
        if (CENTERED) {
            row_mean[r] = row_sum(total(mean[r]) * count, lid) / p.n;
        }
        let d = mean[r] - E(row_mean[r]);
        let variance = row_sum(total(squares[r] + d * d * count), lid) / p.n;
        row_rstd[r] = 1.0 / sqrt(variance + p.eps);
        if (lid % LANES == 0u && row0 + r < rows) {
            rstd_out[row0 + r] = row_rstd[r];
        }
    }
    for (var c = lid % LANES; c < cols; c += LANES) {
        let g = gamma[c];
        var b = E();
        if (CENTERED) {
            b = beta[c];
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            if (row0 + r < rows) {
                let i = at[r] + c;
                var v = (x[i] - E(row_mean[r])) * row_rstd[r];
                xhat_out[i] = v;
                if (FROM_STORED) {
                    v = xhat_out[i];
                }
                // In the very operations that make y again from xhat, so that it has the same bits.
                if (CENTERED) {
                    y[i] = fma(v, g, b);
                } else {
                    y[i] = v * g;
                }
            }
        }
    }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * gamma; without mean(g) in RMS norm.
// dgamma = sum_rows dy * xhat, dbeta = sum_rows dy.
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
    let block = group * (GROUP / LANES) + lid / LANES;
    let row0 = block * ROWS;
    let at = starts(row0);
    let rows = p.rows;
    let cols = p.cols;
    var sum_g: array<E, ROWS>;
    var sum_gx: array<E, ROWS>;
    for (var c = lid % LANES; c < cols; c += LANES) {
        let gamma = weight[c];
        for (var r = 0u; r < ROWS; r++) { // unroll
            let i = at[r] + c;
            let g = dy[i] * gamma;
            sum_g[r] += g;
            sum_gx[r] += g * xhat[i];
        }
    }
    var means: array<vec2<f32>, ROWS>;
    var row_rstd: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) { // unroll
        means[r] = row_sums(total(sum_g[r]), total(sum_gx[r]), lid) / p.n;
        if (!CENTERED) {
            means[r].x = 0.0;
        }
        row_rstd[r] = rstd[min(row0 + r, p.rows - 1u)];
    }
    if (row0 >= p.rows) {
        return;
    }
    for (var c = lid % LANES; c < cols; c += LANES) {
        let gamma = weight[c];
        var dg = E();
        var db = E();
        for (var r = 0u; r < ROWS; r++) { // unroll
            if (row0 + r < rows) {
                let i = at[r] + c;
                let d = dy[i];
                let n = xhat[i];
                dg += d * n;
                db += d;
                var v = (d * gamma - E(means[r].x) - n * means[r].y) * row_rstd[r];
                if (ACCUMULATE) {
                    v += dx[i];
                }
                dx[i] = v;
            }
        }
        dgamma[block * cols + c] = dg;
        dbeta[block * cols + c] = db;
    }
}

// The same where a row fits in registers, for software adapters: their loads are so expensive that it
// pays to unroll a whole row rather than read it twice. A workgroup goes down its rows one by one.
@compute @workgroup_size(GROUP)
fn backward_held(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let cols = p.cols;
    let share = 1.0 / p.n;
    var gamma: array<E, HELD>;
    var dg: array<E, HELD>;
    var db: array<E, HELD>;
    for (var k = 0u; k < HELD; k++) {
        // Lanes past the last column read that column, and take gamma as zero.
        let c = k * LANES + lid;
        gamma[k] = select(E(), weight[min(c, cols - 1u)], c < cols);
    }
    let end = min((group + 1u) * p.chunk, p.rows);
    for (var row = group * p.chunk; row < end; row++) {
        var d: array<E, HELD>;
        var n: array<E, HELD>;
        var sum_g = E();
        var sum_gx = E();
        for (var k = 0u; k < HELD; k++) {
            let i = row * cols + min(k * LANES + lid, cols - 1u);
            d[k] = dy[i];
            n[k] = xhat[i];
            let g = d[k] * gamma[k];
            dg[k] += d[k] * n[k];
            db[k] += d[k];
            sum_g += g;
            sum_gx += g * n[k];
        }
        var means = row_sums(total(sum_g), total(sum_gx), lid) * share;
        if (!CENTERED) {
            means.x = 0.0;
        }
        let row_rstd = rstd[row];
        for (var k = 0u; k < HELD; k++) {
            let c = k * LANES + lid;
            if (c < cols) {
                var v = (d[k] * gamma[k] - E(means.x) - n[k] * means.y) * row_rstd;
                if (ACCUMULATE) {
                    v += dx[row * cols + c];
                }
                dx[row * cols + c] = v;
            }
        }
    }
    for (var k = 0u; k < HELD; k++) {
        let c = k * LANES + lid;
        if (c < cols) {
            dgamma[group * cols + c] = dg[k];
            dbeta[group * cols + c] = db[k];
        }
    }
}
