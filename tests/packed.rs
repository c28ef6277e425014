//! Kernels decode packed weights to the same bits as `format::quant` does on the CPU.
//!
//! It can be, whatever a compiler makes of the kernels' arithmetic. An f16 has 11 significant bits, a scale of part
//! of a block at most 7, and an element's integer at most 5 where there is such a scale and 7 where there is
//! none: products need no more than 23 of an f32's 24, so they are exact in any order. With a minimum there is one
//! rounding, of `d q + m`, whether fused or not. And nothing is too small for a normal f32 (an f16 is a multiple
//! of 2^-24) or too large (all is below 2^31).
//!
//! WGSL leaves three things to the adapter; one that uses them otherwise than lavapipe fails these tests. It may take
//! a subnormal f16 for zero: elements of such a block are then off by less than 2^-14 times their integers. It
//! may round that one sum up or down: one unit in the last place. And arithmetic may flush subnormal f32, which only
//! bf16 weights can be: `packed_rows` moves their bits, but a product may lose them, and that is allowed for.

mod common;

use std::sync::Arc;

use common::{gpu, profiles};
use throughline::format::Packed;
use throughline::format::{Stored, quant};
use throughline::rng::Rng;
use throughline::{ExecOptions, Executable, Graph, Plan, Profile, TensorType, Value};

const K: usize = 256;

/// Where the f16 or bf16 fields of a block are.
fn halves(stored: Stored) -> &'static [usize] {
    match stored {
        Stored::Q6_K => &[208],
        Stored::Q4_1 | Stored::Q5_1 | Stored::Q4_K | Stored::Q5_K => &[0, 2],
        _ => &[0],
    }
}

/// A finite f16 or bf16 of any kind, the extremes as often as the others.
fn half(stored: Stored, rng: &mut Rng) -> u16 {
    let (exponent, mantissa) = if stored == Stored::BF16 { (0x7f80, 0x7f) } else { (0x7c00, 0x3ff) };
    let any = rng.below(1 << 16) as u16;
    let sign = any & 0x8000;
    sign | match rng.below(8) {
        0 => 0,
        1 => 1,              // the smallest
        2 => any & mantissa, // subnormal
        3 => mantissa,       // the largest of those
        4 => mantissa + 1,   // the smallest that is not
        5 => exponent - 1,   // the largest finite
        _ if any & exponent == exponent => 0x3c00 & exponent,
        _ => any & 0x7fff,
    }
}

/// `n` rows of `K` elements: random blocks, every byte of which may be anything but for scales that are not finite.
fn random_bytes(stored: Stored, n: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(&[seed, u64::from(stored.ggml_id())]);
    let len = n * K / stored.block_len() * stored.block_bytes();
    let mut bytes: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
    for block in bytes.chunks_exact_mut(stored.block_bytes()) {
        for &at in halves(stored) {
            block[at..at + 2].copy_from_slice(&half(stored, &mut rng).to_le_bytes());
        }
        match rng.below(8) {
            // Integers of one kind each: what is smallest and largest of elements, scales and minima.
            0 if stored.is_quantized() => fill_integers(stored, block, 0),
            1 if stored.is_quantized() => fill_integers(stored, block, 0xff),
            2 if stored.is_quantized() => fill_integers(stored, block, 0x80),
            _ => {}
        }
    }
    bytes
}

fn fill_integers(stored: Stored, block: &mut [u8], value: u8) {
    let fields = halves(stored);
    let is_half = |i: usize| fields.iter().any(|&at| i == at || i == at + 1);
    block.iter_mut().enumerate().filter(|(i, _)| !is_half(*i)).for_each(|(_, b)| *b = value);
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect()
}

fn executable(g: &Graph, y: Value, profile: &Profile) -> Executable {
    let plan = Plan::new(g, &[y], profile).unwrap();
    Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap()
}

fn packed_formats() -> impl Iterator<Item = Stored> {
    Stored::ALL.into_iter().filter(|s| *s != Stored::F32)
}

#[test]
fn rows_are_decoded_bit_for_bit() {
    const N: usize = 3000;
    for stored in packed_formats() {
        let matrix = Packed { stored, n: N, k: K };
        let bytes = random_bytes(stored, N, 1);
        let want = quant::dequantize(stored, &bytes).unwrap();
        let mut g = Graph::new();
        let w = g.input("w", matrix.ty()).unwrap();
        let ids = g.input("ids", TensorType::u32([N])).unwrap();
        let y = g.packed_rows("y", w, matrix, ids).unwrap();
        for profile in profiles() {
            let exec = executable(&g, y, &profile);
            exec.write(w, &words(&bytes)).unwrap();
            exec.write(ids, &(0..N as u32).collect::<Vec<_>>()).unwrap();
            exec.submit().unwrap();
            let got: Vec<f32> = exec.read_blocking(y).unwrap();
            let differ = || got.iter().zip(&want).filter(|(g, w)| g.to_bits() != w.to_bits());
            let examples: Vec<_> = differ().take(5).collect();
            assert!(examples.is_empty(), "{stored} ({:?}): {} differ: {examples:?}", profile.class, differ().count());
        }
    }
}

/// A product with rows of the identity gives the weight, but that a sum with zeros has no negative zero.
#[test]
fn products_with_one_hot_rows_give_the_weights_bit_for_bit() {
    const N: usize = 500;
    for stored in packed_formats() {
        let matrix = Packed { stored, n: N, k: K };
        let bytes = random_bytes(stored, N, 2);
        let want = quant::dequantize(stored, &bytes).unwrap();
        for m in [1, K] {
            let mut g = Graph::new();
            let x = g.input("x", TensorType::f32([m, K])).unwrap();
            let w = g.input("w", matrix.ty()).unwrap();
            let y = g.packed_linear("y", x, w, matrix, None).unwrap();
            for profile in profiles() {
                let exec = executable(&g, y, &profile);
                exec.write(w, &words(&bytes)).unwrap();
                let one_hot = |i: usize| (0..K).map(move |j| if i == j { 1.0f32 } else { 0.0 });
                exec.write(x, &(0..m).flat_map(one_hot).collect::<Vec<_>>()).unwrap();
                exec.submit().unwrap();
                let got: Vec<f32> = exec.read_blocking(y).unwrap();
                let pairs = (0..m).flat_map(|i| (0..N).map(move |row| (i * N + row, row * K + i)));
                let pairs: Vec<(f32, f32)> = pairs.map(|(at, from)| (got[at], want[from])).collect();
                // Sums of subnormals, of bf16 weights, may be flushed.
                let same = |&(g, w): &(f32, f32)| g == w || (w.is_subnormal() && g == 0.0);
                let wrong: Vec<_> = pairs.iter().filter(|p| !same(p)).take(5).collect();
                assert!(wrong.is_empty(), "{stored}, {m} rows ({:?}): {wrong:?}", profile.class);
            }
        }
    }
}
