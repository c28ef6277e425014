// Dynamic loss scaling: what becomes of a step whose gradient was computed from the loss times `scale`, by the norm of
// that gradient; and the scale of the next step.
//
// One invocation does all of it.

struct Params {
    growth: f32, // factor of the scale after `interval` finite steps in a row
    backoff: f32, // factor of the scale after a step that overflowed
    interval: u32,
    least: f32,
    largest: f32,
    max_norm: f32, // to clip the gradient to; 0: no clipping
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> scaled_norm: array<f32>; // [1]
@group(0) @binding(2) var<storage, read_write> outcome: array<f32>; // [3]: factor of the gradient, 1 to skip, scale
@group(0) @binding(3) var<storage, read_write> norm: array<f32>; // [1]
@group(0) @binding(4) var<storage, read_write> scale: array<f32>; // [1], a power of two
@group(0) @binding(5) var<storage, read_write> counts: array<u32>; // [3]: finite steps in a row, applied, skipped

const EXPONENT: u32 = 0x7f800000u;

fn next(count: u32) -> u32 {
    return min(count, 0xfffffffeu) + 1u;
}

@compute @workgroup_size(1)
fn forward() {
    let old = scale[0];
    // Bits tell infinity and NaN from numbers even where compilers assume that there are none.
    let exponent = bitcast<u32>(scaled_norm[0]) & EXPONENT;
    let overflow = exponent == EXPONENT;
    // The exact reciprocal of a power of two. A division need not be exact.
    let inverse = bitcast<f32>(0x7f000000u - bitcast<u32>(old));
    outcome[2] = old;
    if (overflow) {
        outcome[0] = 0.0;
        outcome[1] = 1.0;
        norm[0] = bitcast<f32>(exponent); // infinity
        scale[0] = max(old * p.backoff, p.least);
        counts[0] = 0u;
        counts[2] = next(counts[2]);
        return;
    }
    let unscaled = scaled_norm[0] * inverse;
    var clip = 1.0;
    if (p.max_norm > 0.0) {
        clip = min(1.0, p.max_norm / (unscaled + 1e-6));
    }
    outcome[0] = clip * inverse;
    outcome[1] = 0.0;
    norm[0] = unscaled;
    let finite = next(counts[0]);
    let grows = finite >= p.interval;
    scale[0] = select(old, min(old * p.growth, p.largest), grows);
    counts[0] = select(finite, 0u, grows);
    counts[1] = next(counts[1]);
}
