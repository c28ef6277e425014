//! Encoders of ggml's blocks of 256. Each group of 16 or 32 elements tries several scales and keeps the one of the
//! least weighted square error; then the groups' scales become integers themselves. Sums run in order, and no product is
//! fused with a sum: other orders give other bits.
//!
//! Source: `make_qx_quants` and `make_qkx2_quants` in ggml's `ggml-quants.c`.

use std::array;

use half::f16;

use super::blocks::{largest, put};

/// Scales below count as none, as in ggml.
const LEAST_SCALE: f32 = 1e-15;

/// The nearest integer of a number of at most 22 bits, ties to even: the low bits of its sum with 1.5 · 2^23. (Beyond
/// that range they are other bits, the same as ggml's.)
fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// Scale and minimum of a group, by which integers from 0 to `top` stand for its elements: `scale · q − min`.
///
/// It tries to spread the range of the elements over `top` and these many steps more, and finds the best scale and
/// minimum for the integers of each try.
fn affine(x: &[f32; 32], top: i32, tries: impl Iterator<Item = f32>, levels: &mut [u8; 32]) -> (f32, f32) {
    let square_sum = x.iter().fold(0.0, |sum: f32, v| sum + v * v);
    let mean = (square_sum / 32.0).sqrt();
    let weights: [f32; 32] = array::from_fn(|i| mean + x[i].abs());
    let (mut min, mut max, mut sum_w, mut sum_x) = (x[0], x[0], weights[0], weights[0] * x[0]);
    for (&v, &w) in x.iter().zip(&weights).skip(1) {
        min = if v < min { v } else { min };
        max = if v > max { v } else { max };
        sum_w += w;
        sum_x += w * v;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max == min {
        *levels = [0; 32];
        return (0.0, -min);
    }
    let round = |inverse: f32, min: f32| -> [i32; 32] { x.map(|v| nearest(inverse * (v - min)).clamp(0, top)) };
    let error = |q: &[i32; 32], scale: f32, min: f32| {
        let square = |i: usize| {
            let off = scale * q[i] as f32 + min - x[i];
            off * off
        };
        (0..32).fold(0.0, |sum: f32, i| sum + weights[i] * square(i))
    };
    let inverse = top as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    let mut best = round(inverse, min);
    let mut least = error(&best, scale, min);
    for steps in tries {
        // From the best minimum so far.
        let q = round((steps + top as f32) / (max - min), min);
        let (mut sum_q, mut sum_q2, mut sum_xq) = (0.0f32, 0.0f32, 0.0f32);
        for i in 0..32 {
            let (w, q) = (weights[i], q[i] as f32);
            sum_q += w * q;
            sum_q2 += w * q * q;
            sum_xq += w * q * x[i];
        }
        let determinant = sum_w * sum_q2 - sum_q * sum_q;
        if determinant > 0.0 {
            let mut its_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
            let mut its_min = (sum_q2 * sum_x - sum_q * sum_xq) / determinant;
            if its_min > 0.0 {
                (its_min, its_scale) = (0.0, sum_xq / sum_q2);
            }
            let its_error = error(&q, its_scale, its_min);
            if its_error < least {
                (least, best, scale, min) = (its_error, q, its_scale, its_min);
            }
        }
    }
    *levels = best.map(|q| q as u8);
    (scale, -min)
}

/// What `Q4_K` and `Q5_K` share: the head of the block up to its 6-bit scales and minima, and the integers from 0 to
/// `top`.
fn affine_block(x: &[f32; 256], top: i32, first_try: f32, last_try: i32) -> ([u8; 16], [u8; 256]) {
    let (groups, mut levels) = (x.as_chunks::<32>().0, [0; 256]);
    let mut found = [(0.0, 0.0); 8];
    for ((group, levels), found) in groups.iter().zip(levels.as_chunks_mut::<32>().0).zip(&mut found) {
        let tries = (0..=last_try).map(|step| first_try + 0.1 * step as f32);
        *found = affine(group, top, tries, levels);
    }
    let above = |a: f32, b: f32| if b > a { b } else { a };
    let (max_scale, max_min) = found.iter().fold((0.0, 0.0), |(s, m), &(scale, min)| (above(s, scale), above(m, min)));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let six_bits = |inverse: f32, v: f32| (nearest(inverse * v) as u8).min(63);
    let (inverse_scale, inverse_min) = (inverse(max_scale), inverse(max_min));
    let mut head = [0; 16];
    put(&mut head, 0, max_scale / 63.0);
    put(&mut head, 2, max_min / 63.0);
    let half = |at: usize| f16::from_le_bytes([head[at], head[at + 1]]).to_f32();
    let (d, dmin) = (half(0), half(2));
    let small = found.map(|(scale, min)| (six_bits(inverse_scale, scale), six_bits(inverse_min, min)));
    for (group, (levels, (s, m))) in groups.iter().zip(levels.as_chunks_mut::<32>().0.iter_mut().zip(small)) {
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        if d != 0.0 {
            *levels = group.map(|v| nearest((v + m) / d).clamp(0, top) as u8);
        }
    }
    for i in 0..4 {
        let ((s, m), (s4, m4)) = (small[i], small[i + 4]);
        head[4 + i] = s | s4 >> 4 << 6;
        head[8 + i] = m | m4 >> 4 << 6;
        head[12 + i] = s4 & 15 | (m4 & 15) << 4;
    }
    (head, levels)
}

/// The nibbles of 256 integers: 32 bytes hold 64 of them, the low nibbles first.
fn put_nibbles(out: &mut [u8], levels: &[u8; 256]) {
    for (i, byte) in out.iter_mut().enumerate() {
        let at = i / 32 * 64 + i % 32;
        *byte = levels[at] & 15 | (levels[at + 32] & 15) << 4;
    }
}

pub(super) fn to_q4_k(x: &[f32; 256]) -> [u8; 144] {
    let (head, levels) = affine_block(x, 15, -1.0, 20);
    let mut b = [0; 144];
    b[..16].copy_from_slice(&head);
    put_nibbles(&mut b[16..], &levels);
    b
}

pub(super) fn to_q5_k(x: &[f32; 256]) -> [u8; 176] {
    let (head, levels) = affine_block(x, 31, -0.5, 15);
    let mut b = [0; 176];
    b[..16].copy_from_slice(&head);
    for (i, level) in levels.iter().enumerate() {
        b[16 + i % 32] |= level >> 4 << (i / 32);
    }
    put_nibbles(&mut b[48..], &levels);
    b
}

/// The scale of a group, by which integers from -32 to 31 stand for its elements, and these integers plus 32.
fn symmetric(x: &[f32; 16], levels: &mut [u8; 16]) -> f32 {
    const HALF: i32 = 32;
    let max = largest(x);
    if max.abs() < LEAST_SCALE {
        *levels = [0; 16];
        return 0.0;
    }
    let round = |inverse: f32| -> [i32; 16] { x.map(|v| nearest(inverse * v).clamp(-HALF, HALF - 1)) };
    // Elements count by their squares.
    let sums = |q: &[i32; 16]| {
        x.iter().zip(q).fold((0.0f32, 0.0f32), |(xq, qq), (&v, &q)| {
            let (w, q) = (v * v, q as f32);
            (xq + w * v * q, qq + w * q * q)
        })
    };
    let mut q = round(-HALF as f32 / max);
    let (sum_xq, sum_qq) = sums(&q);
    let mut scale = if sum_qq == 0.0 { 0.0 } else { sum_xq / sum_qq };
    let mut best = scale * sum_xq;
    for step in (-9..=9).filter(|&step| step != 0) {
        let other = round(-(HALF as f32 + 0.1 * step as f32) / max);
        let (sum_xq, sum_qq) = sums(&other);
        if sum_qq > 0.0 && sum_xq * sum_xq > best * sum_qq {
            (q, scale) = (other, sum_xq / sum_qq);
            best = scale * sum_xq;
        }
    }
    *levels = q.map(|q| (q + HALF) as u8);
    scale
}

pub(super) fn to_q6_k(x: &[f32; 256]) -> [u8; 210] {
    let (groups, mut levels, mut scales) = (x.as_chunks::<16>().0, [0; 256], [0.0; 16]);
    for ((group, levels), scale) in groups.iter().zip(levels.as_chunks_mut::<16>().0).zip(&mut scales) {
        *scale = symmetric(group, levels);
    }
    let max = largest(&scales);
    let mut b = [0; 210];
    if max.abs() < LEAST_SCALE {
        return b;
    }
    let inverse = -128.0 / max;
    put(&mut b, 208, 1.0 / inverse);
    let d = f16::from_le_bytes([b[208], b[209]]).to_f32();
    let small = scales.map(|scale| nearest(inverse * scale).min(127) as i8);
    for (group, (levels, scale)) in groups.iter().zip(levels.as_chunks_mut::<16>().0.iter_mut().zip(small)) {
        let d = d * f32::from(scale);
        if d != 0.0 {
            *levels = group.map(|v| (nearest(v / d).clamp(-32, 31) + 32) as u8);
        }
    }
    for half in 0..2 {
        for l in 0..32 {
            let q = |k: usize| levels[half * 128 + k * 32 + l];
            b[half * 64 + l] = q(0) & 15 | (q(2) & 15) << 4;
            b[half * 64 + 32 + l] = q(1) & 15 | (q(3) & 15) << 4;
            b[128 + half * 32 + l] = q(0) >> 4 | q(1) >> 4 << 2 | q(2) >> 4 << 4 | q(3) >> 4 << 6;
        }
    }
    b[192..208].copy_from_slice(&small.map(|s| s as u8));
    b
}
