// Functions that expressions may call besides those of WGSL. A kernel's text has those that it needs; each comes
// after those that it calls, and a blank line ends it.

// Whether x is no number. Not `x != x`, which a compiler that assumes numbers may drop.
fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// 1 / (1 + exp(-x)), with one exp that stays in range: relatively precise in the left tail, too.
fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

// log(1 + exp(x)). The logarithm of 1 + e, e in [0, 1], is 2 atanh(z), z = e / (2 + e), by its series: WGSL's log is
// imprecise near 1, and 1 + e loses a small e. Relatively precise in the left tail, too.
fn softplus(x: f32) -> f32 {
    let e = exp(-abs(x));
    let z = e / (2.0 + e);
    let w = z * z;
    var series = 1.0 / 13.0;
    series = series * w + 1.0 / 11.0;
    series = series * w + 1.0 / 9.0;
    series = series * w + 1.0 / 7.0;
    series = series * w + 1.0 / 5.0;
    series = series * w + 1.0 / 3.0;
    return select(x, 0.0, x < 0.0) + 2.0 * z * (1.0 + w * series);
}

// The hyperbolic tangent. WGSL's own may overflow (the quirk `tanh-overflow`), and (1 - e) / (1 + e) cancels near 0.
// The polynomial was fitted by interpolation: within 4e-8 of its value, relatively, for |x| up to 0.65.
fn safe_tanh(x: f32) -> f32 {
    let s = x * x;
    var fit = -0.00592372613;
    fit = fit * s + 0.0208734609;
    fit = fit * s - 0.0538237579;
    fit = fit * s + 0.13332583;
    fit = fit * s - 0.333333284;
    let e = exp(-2.0 * abs(x));
    let far = (1.0 - e) / (1.0 + e);
    return select(x + x * s * fit, select(far, -far, x < 0.0), s > 0.4225);
}

// x to the power of k. WGSL's pow promises nothing for a negative x, for 0 and for NaN: here a negative x has a power for
// whole k, and else NaN.
fn power(x: f32, k: f32) -> f32 {
    var nan_bits = 0x7fc00000u;
    let nan = bitcast<f32>(nan_bits);
    let growing = pow(abs(x), abs(k));
    let magnitude = select(growing, 1.0 / growing, k < 0.0);
    let whole = k == trunc(k);
    let odd = whole && 2.0 * trunc(0.5 * k) != k;
    let negative = select(nan, select(magnitude, -magnitude, odd), whole);
    let value = select(select(magnitude, negative, x < 0.0), nan, is_nan(x) || is_nan(k));
    return select(value, 1.0, k == 0.0);
}

// sin(x + quarters pi / 2). WGSL's sine has an absolute error of up to 2^-11, and none is promised beyond pi. This
// subtracts the nearest multiple of pi / 2, in three parts that are short enough for exact products, and sums a series:
// precise to a few units in the last place for |x| up to 10,000.
fn sine(x: f32, quarters: i32) -> f32 {
    let k = round(x * 0.636619772);
    let r = ((x - k * 1.5703125) - k * 4.837512969970703125e-4) - k * 7.5497899548918821e-8;
    let s = r * r;
    let sin_r = r - r * s * (1.0 / 6.0 - s * (1.0 / 120.0 - s * (1.0 / 5040.0 - s / 362880.0)));
    let cos_r = 1.0 - s * (0.5 - s * (1.0 / 24.0 - s * (1.0 / 720.0 - s * (1.0 / 40320.0 - s / 3628800.0))));
    let quarter = i32(k) + quarters;
    let value = select(sin_r, cos_r, (quarter & 1) == 1);
    return select(value, -value, (quarter & 2) == 2);
}

fn precise_sin(x: f32) -> f32 {
    return sine(x, 0);
}

fn precise_cos(x: f32) -> f32 {
    return sine(x, 1);
}
