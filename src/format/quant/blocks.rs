//! Encoders of ggml's blocks of 32, and what those of 256 share with them.

use half::f16;

/// 1 / d, or 0 for a block that is all zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Writes an f16 at this offset of a block.
pub(super) fn put<const B: usize>(b: &mut [u8; B], at: usize, scale: f32) {
    b[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
}

/// The first of the values of largest magnitude, with its sign.
pub(super) fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a: f32, &v| if v.abs() > a.abs() { v } else { a })
}

/// The scale of a block whose value of largest magnitude becomes `-half`, and the integers from 0 to `2 half - 1`.
fn symmetric(x: &[f32; 32], half: f32) -> (f32, impl Fn(f32) -> u8) {
    // That value is exact, so its sign goes into the scale.
    let d = largest(x) / -half;
    let id = inverse(d);
    (d, move |v| ((v * id + (half + 0.5)) as u8).min((2.0 * half) as u8 - 1))
}

/// Scale and minimum of a block, and the integers from 0 to `top`.
fn affine(x: &[f32; 32], top: f32) -> (f32, f32, impl Fn(f32) -> u8) {
    // Not `f32::min`, which may take either of two zeros.
    let min = x.iter().fold(f32::MAX, |a, &v| if v < a { v } else { a });
    let max = x.iter().fold(f32::MIN, |a, &v| if v > a { v } else { a });
    let d = (max - min) / top;
    let id = inverse(d);
    (d, min, move |v| (((v - min) * id + 0.5) as u8).min(top as u8))
}

pub(super) fn to_q4_0(x: &[f32; 32]) -> [u8; 18] {
    let (d, q) = symmetric(x, 8.0);
    let mut b = [0; 18];
    put(&mut b, 0, d);
    for i in 0..16 {
        b[2 + i] = q(x[i]) | q(x[i + 16]) << 4;
    }
    b
}

pub(super) fn to_q4_1(x: &[f32; 32]) -> [u8; 20] {
    let (d, min, q) = affine(x, 15.0);
    let mut b = [0; 20];
    put(&mut b, 0, d);
    put(&mut b, 2, min);
    for i in 0..16 {
        b[4 + i] = q(x[i]) | q(x[i + 16]) << 4;
    }
    b
}

/// Puts integers of 5 bits into a block: a word of their fifth bits from `at` on, then their nibbles.
fn put_five_bits<const B: usize>(b: &mut [u8; B], at: usize, x: &[f32; 32], q: impl Fn(f32) -> u8) {
    let mut high = 0u32;
    for i in 0..16 {
        let (low, top) = (q(x[i]), q(x[i + 16]));
        b[at + 4 + i] = low & 15 | (top & 15) << 4;
        high |= u32::from(low >> 4) << i | u32::from(top >> 4) << (i + 16);
    }
    b[at..at + 4].copy_from_slice(&high.to_le_bytes());
}

pub(super) fn to_q5_0(x: &[f32; 32]) -> [u8; 22] {
    let (d, q) = symmetric(x, 16.0);
    let mut b = [0; 22];
    put(&mut b, 0, d);
    put_five_bits(&mut b, 2, x, q);
    b
}

pub(super) fn to_q5_1(x: &[f32; 32]) -> [u8; 24] {
    let (d, min, q) = affine(x, 31.0);
    let mut b = [0; 24];
    put(&mut b, 0, d);
    put(&mut b, 2, min);
    put_five_bits(&mut b, 4, x, q);
    b
}

pub(super) fn to_q8_0(x: &[f32; 32]) -> [u8; 34] {
    let d = largest(x).abs() / 127.0;
    let id = inverse(d);
    let mut b = [0; 34];
    put(&mut b, 0, d);
    for i in 0..32 {
        b[2 + i] = (x[i] * id).round() as i8 as u8;
    }
    b
}
