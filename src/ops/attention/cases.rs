//! Test and benchmark cases.

use super::forward::{AttentionFrom, CachedAttention};
use super::heads::Attention;
use crate::ops::cases::{Case, InputFill};

pub(super) fn bench() -> Vec<Case> {
    let square = |t: usize, heads: usize| case(1, (t, t), (heads, heads), 64, true);
    let decode = case(1, (1, 1024), (12, 12), 64, true);
    let ragged = cached((1, 1024), (12, 12), 64, &[1023.0, 511.0, 255.0, 127.0]);
    let wide = case(1, (1024, 1024), (2, 2), 256, true);
    let long = cached((1, 4096), (9, 3), 64, &[4095.0]);
    let longer = cached((1, 32_768), (9, 3), 64, &[32_767.0]);
    let one = texts(1, 1024, (6, 6), 64, "one text", &[0.0]);
    let eight = texts(1, 1024, (6, 6), 64, "eight texts", &EIGHT);
    vec![square(256, 6), square(1024, 6), square(4096, 1), wide, one, eight, decode, ragged, long, longer]
}

pub(super) fn cases() -> Vec<Case> {
    let (causal, full) = (true, false);
    let mut cases = vec![
        case(1, (1, 1), (1, 1), 1, causal),
        case(1, (5, 5), (2, 2), 5, causal),
        case(2, (64, 64), (4, 2), 12, causal),
        case(1, (127, 127), (2, 1), 16, causal),
        case(1, (130, 130), (1, 1), 64, causal),
        case(2, (33, 33), (6, 3), 32, full),
        case(1, (17, 17), (2, 2), 80, causal),
        case(1, (19, 19), (4, 1), 128, full),
        // Heads too wide for the registers of a software adapter.
        case(2, (35, 35), (2, 1), 192, causal),
        case(1, (3, 5), (1, 1), 1024, causal),
        // Without subgroups, so many keys, or queries, that it takes several dispatches.
        case(1, (5, 260), (1, 1), 1023, full),
        case(1, (260, 5), (1, 1), 1023, full),
        // Fewer queries than keys: decoding, and attention to another sequence.
        case(2, (3, 70), (4, 2), 16, causal),
        case(1, (1, 33), (2, 2), 32, causal),
        case(1, (1, 600), (2, 1), 64, causal),
        case(1, (2, 131), (1, 1), 128, causal),
        case(1, (1, 9), (1, 1), 7, full),
        case(2, (37, 5), (2, 2), 8, full),
        case(1, (513, 513), (1, 1), 4, causal),
    ];
    let mut large = case(1, (65, 65), (2, 2), 16, causal);
    large.name += ", large scores";
    // Rounding makes scores of 16 off by 16 times as much as those of 1, and with them the exponents.
    cases.push(large.fill(0, InputFill::Normal(4.0)).fill(1, InputFill::Normal(4.0)).matrix_tolerance(2e-5));
    cases.extend([
        cached((1, 1), (1, 1), 1, &[0.0]),
        cached((1, 64), (4, 2), 16, &[33.0, 0.0, 63.0, 7.0]),
        cached((1, 600), (2, 1), 64, &[599.0]),
        cached((19, 131), (3, 1), 64, &[40.0, 0.0]),
        cached((70, 96), (2, 2), 5, &[0.0]),
        cached((21, 40), (1, 1), 50, &[3.0]),
        cached((9, 40), (1, 1), 128, &[37.0]), // the last queries see the whole cache
        cached((1, 66_000), (1, 1), 4, &[65_999.0]), // too many for an invocation that keeps its rows
        cached((3, 8), (1, 1), 4, &[100.0]),
        cached((6, 30), (2, 1), 8, &[20.0, 3.0, 4_294_967_295.0]),
        // Caches that GPUs split: with few keys, with as many as they hold, and in between; for heads that share keys
        // and heads that do not, for several queries, some of which see no key of the last slice.
        cached((1, 2048), (9, 3), 64, &[0.0]),
        cached((1, 2048), (3, 1), 64, &[2047.0]),
        cached((1, 1300), (4, 2), 16, &[1299.0, 700.0, 0.0, 31.0]),
        cached((4, 1100), (6, 2), 12, &[1000.0, 0.0, 30.0]),
        cached((4, 1025), (2, 2), 7, &[4_294_967_295.0]),
        cached((3, 1030), (14, 1), 20, &[64.0, 1.0]),
        cached((2, 1040), (2, 1), 320, &[900.0]),
        case(1, (1, 1100), (10, 1), 128, full),
        case(1, (4, 2050), (1, 1), 8, causal),
    ]);
    cases.extend(cases_of_texts());
    cases
}

/// The first keys of eight texts of 128 tokens.
static EIGHT: [f64; 1024] = {
    let mut firsts = [0.0; 1024];
    let mut i = 0;
    while i < 1024 {
        firsts[i] = (i / 128 * 128) as f64;
        i += 1;
    }
    firsts
};

/// Texts that share sequences, and first keys that are those of no text.
fn cases_of_texts() -> Vec<Case> {
    const PAST: f64 = 4_294_967_295.0; // every token is a text of its own
    // In sequences of other lengths the values go on cyclically, so that texts begin anywhere.
    const TEXTS: &[f64] = &[0.0, 0.0, 0.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 9.0, 10.0];
    const LONG: &[f64] = &[0.0, 0.0, 0.0, 70.0, 1.0, 140.0, 64.0, 33.0, PAST, 200.0, 5.0, 130.0, 129.0];
    const FEW: &[f64] = &[0.0, 0.0, 2.0];
    vec![
        texts(1, 1, (1, 1), 1, "one token", &[0.0]),
        texts(2, 3, (2, 1), 8, "two texts", FEW),
        texts(1, 11, (2, 2), 5, "texts and padding", TEXTS),
        texts(2, 64, (4, 2), 12, "one text", &[0.0]),
        texts(2, 67, (2, 1), 16, "padding", &[PAST]),
        texts(2, 130, (2, 1), 16, "any", TEXTS),
        texts(1, 260, (4, 2), 64, "any", LONG),
        texts(1, 300, (2, 2), 64, "eight texts", &EIGHT),
        texts(2, 257, (2, 1), 4, "eight texts", &EIGHT),
        texts(1, 520, (2, 1), 20, "any", LONG),
        texts(1, 145, (2, 1), 80, "any", LONG),
        texts(1, 160, (2, 1), 128, "eight texts", &EIGHT),
        texts(1, 150, (2, 1), 192, "any", LONG),
        texts(2, 35, (1, 1), 256, "texts", TEXTS),
        texts(1, 5, (1, 1), 1024, "two texts", FEW),
        // So many keys that without subgroups it takes several dispatches.
        texts(1, 270, (1, 1), 1023, "eight texts", &EIGHT),
        texts(1, 270, (1, 1), 1023, "any", LONG),
    ]
}

/// `firsts` gives the first key that each query sees, `[batch, t]`, cyclically.
fn texts(b: usize, t: usize, heads: (usize, usize), dh: usize, what: &str, firsts: &'static [f64]) -> Case {
    let plain = case(b, (t, t), heads, dh, true);
    let op = Attention { heads: heads.0, kv_heads: heads.1, causal: true, scale: None };
    let mut case = Case::new(format!("{}, {what}", plain.name), AttentionFrom(op), &[])
        .matrix_tolerance(ROUNDED)
        .half_tolerance(HALVED);
    case.inputs = plain.inputs;
    case.ids(&[b, t], 1).fill(3, InputFill::Values(firsts))
}

/// `starts` gives the number of keys before the first query of each sequence.
fn cached(times: (usize, usize), heads: (usize, usize), dh: usize, starts: &'static [f64]) -> Case {
    let plain = case(starts.len(), times, heads, dh, true);
    let op = Attention { heads: heads.0, kv_heads: heads.1, causal: true, scale: None };
    let mut case = Case::new(format!("{}, cache of {starts:?}", plain.name), CachedAttention(op), &[])
        .matrix_tolerance(ROUNDED)
        .half_tolerance(HALVED)
        .forward_only();
    case.inputs = plain.inputs;
    case.ids(&[starts.len()], 1).fill(3, InputFill::Values(starts))
}

/// With tensors in f16: kernels for wide heads on software adapters add up their output where it is stored.
const HALVED: f64 = 4e-6;

/// How far off kernels may be that round q, k, v, do, the weights and the gradients of scores to f16. The mean square of a
/// rounding is 4e-8. Of a weight, whose exponent has the errors of q and k, and a row of v it comes to 1.6e-7, and to 2.4e-7
/// for a product of the gradient of a score; four elements of a head are too few for these to be means.
const ROUNDED: f64 = 1e-6;

fn case(b: usize, (tq, tk): (usize, usize), (heads, kv_heads): (usize, usize), dh: usize, causal: bool) -> Case {
    let op = Attention { heads, kv_heads, causal, scale: None };
    let name = format!("b{b} t{tq}/{tk} h{heads}/{kv_heads} d{dh}{}", if causal { " causal" } else { "" });
    let kv = [b, tk, kv_heads * dh];
    Case::new(name, op, &[&[b, tq, heads * dh], &kv, &kv]).matrix_tolerance(ROUNDED).half_tolerance(HALVED)
}
