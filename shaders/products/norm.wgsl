
// The layer norm or RMS norm of x, made as it is read; after kernel.wgsl,
// and with layer_norm.wgsl or rms_norm.wgsl. Each workgroup works out mean
// and rstd of the rows for itself: they are few, and a dispatch would take longer.

// knobs
const NORM_REACH: u32 = 1u; // how many neighbours can shuffle; at most GROUP

var<workgroup> totals: array<vec4<f32>, GROUP>;

// Of up to four rows, one in each component.
var<private> mean: vec4<f32>;
var<private> rstd: vec4<f32>;

// The sum of the deviations in quad q of row r, or of their squares.
fn moment(r: u32, q: u32, squares: bool) -> f32 {
    if (r >= ROWS) {
        return 0.0;
    }
    let v = x[r * QUADS + q] - vec4<f32>(mean[r]);
    return dot(v, select(vec4<f32>(1.0), v, squares));
}

// The mean of a moment over each row.
fn mean_moment(lid: u32, squares: bool) -> vec4<f32> {
    var sum: vec4<f32>;
    for (var q = lid; q < QUADS; q += GROUP) {
        sum += vec4<f32>(moment(0u, q, squares), moment(1u, q, squares), moment(2u, q, squares), moment(3u, q, squares));
    }
    for (var step = 1u; step < NORM_REACH; step *= 2u) {
        sum += across4(sum, step);
    }
    workgroupBarrier();
    totals[lid] = sum;
    for (var step = GROUP / 2u; step >= NORM_REACH; step /= 2u) {
        workgroupBarrier();
        if (lid < step) {
            totals[lid] += totals[lid + step];
        }
    }
    workgroupBarrier();
    return totals[0] / f32(4u * QUADS);
}

fn prepare(lid: u32) {
    if (CENTERED) {
        mean = mean_moment(lid, false);
    }
    rstd = inverseSqrt(mean_moment(lid, true) + vec4<f32>(p.eps));
}
