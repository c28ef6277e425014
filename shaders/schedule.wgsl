// The settings of an update at the step that the device has counted: the learning rate of a schedule, and AdamW's bias
// corrections.
//
// One invocation does all of it.

// knobs
const LEN: u32 = 8u; // of hyper; the bias corrections are those of 8

@group(0) @binding(1) var<storage, read> hyper: array<f32>; // [LEN]
@group(0) @binding(2) var<storage, read> schedule: array<f32>; // [5]: peak, warm-up, end, final fraction, decay
@group(0) @binding(3) var<storage, read> counts: array<u32>; // [3]: the second counts steps, this one included
@group(0) @binding(4) var<storage, read_write> settings: array<f32>; // [LEN]

/// sin(pi / 2 x) for x from 0 to 1, by its series: the built-in one may be off by 5e-4.
fn sin_quarter(x: f32) -> f32 {
    let a = 1.5707964 * x;
    let q = a * a;
    let tail = 1.0 - q / 72.0 * (1.0 - q / 110.0 * (1.0 - q / 156.0));
    return a * (1.0 - q / 6.0 * (1.0 - q / 20.0 * (1.0 - q / 42.0 * tail)));
}

/// 1 - exp(-x) for x >= 0.
fn rise(x: f32) -> f32 {
    if (x > 0.5) {
        return 1.0 - exp(-x);
    }
    // Near 0 that difference would lose most of its digits.
    let tail = 1.0 - x / 5.0 * (1.0 - x / 6.0 * (1.0 - x / 7.0 * (1.0 - x / 8.0)));
    return x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0 * tail)));
}

/// The learning rate of a step, counted from 0.
fn rate(step: f32) -> f32 {
    let peak = schedule[0];
    let warmup = schedule[1];
    if (step < warmup) {
        return peak * ((step + 1.0) / warmup);
    }
    let decay = schedule[4];
    if (decay == 0.0) {
        return peak;
    }
    let span = max(schedule[2] - warmup, 1.0);
    var left = clamp((warmup - step + span) / span, 0.0, 1.0);
    if (decay == 1.0) {
        // Half a cosine: (1 + cos(pi (1 - left))) / 2.
        left = sin_quarter(left);
        left *= left;
    }
    return peak * (schedule[3] + (1.0 - schedule[3]) * left);
}

@compute @workgroup_size(1)
fn forward() {
    let t = max(counts[1], 1u);
    for (var i = 1u; i < LEN; i++) {
        settings[i] = hyper[i];
    }
    settings[0] = hyper[0] * rate(f32(t - 1u));
    if (LEN == 8u) {
        settings[5] = rise(-f32(t) * hyper[5]);
        settings[6] = rise(-f32(t) * hyper[6]);
    }
}
