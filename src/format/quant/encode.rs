//! f32 to stored blocks, as ggml's reference rounds.

use std::num::NonZero;
use std::thread;

use half::{bf16, f16};

use super::blocks::{to_q4_0, to_q4_1, to_q5_0, to_q5_1, to_q8_0};
use super::k_quants::{to_q4_k, to_q5_k, to_q6_k};
use super::stored::Stored;
use crate::error::{Error, Result};

/// Values of fewer elements are not worth a thread.
const LEAST_VALUES: usize = 1 << 16;

/// No format of blocks reaches this magnitude: the scale of `Q6_K`, the widest, is an f16 times 128 · 32. And below it,
/// the sums of third powers in K-quants stay finite.
const BEYOND_BLOCKS: f32 = 3e8;

/// Encodes values in any of the formats. Those of blocks have the bits of ggml's reference quantisers: see the
/// [module](super). [`dequantize`](super::dequantize) has an example.
///
/// Use it to make a model smaller, or to store it where another program expects a format. It takes all processor cores
/// for many values.
///
/// # Errors
///
/// For a number of values that is not a whole number of blocks; for a finite value that the format cannot hold; and, in
/// formats of blocks, for NaN and infinity, since they would spread over their block.
pub fn quantize(stored: Stored, values: &[f32]) -> Result<Vec<u8>> {
    let (len, size) = (stored.block_len(), stored.block_bytes());
    let err = |expected: String, got: String| Error::data(format!("{stored} data"), expected, got);
    if !values.len().is_multiple_of(len) {
        return Err(err(format!("blocks of {len} elements"), format!("{} elements", values.len())));
    }
    let holds: fn(&f32) -> bool = match stored {
        Stored::F32 => |_| true,
        // The first number that rounds to infinity. What is not finite itself has a code of its own.
        Stored::F16 => |v| !v.is_finite() || v.abs() < 65520.0,
        Stored::BF16 => |v| !v.is_finite() || v.abs() < f32::from_bits(0x7f7f_8000),
        _ => |v| v.abs() < BEYOND_BLOCKS,
    };
    if let Some(i) = values.iter().position(|v| !holds(v)) {
        return Err(err("values that the format can hold".into(), format!("{} at element {i}", values[i])));
    }
    let mut out = vec![0; values.len() / len * size];
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(values.len() / LEAST_VALUES).max(1);
    let blocks = (values.len() / len).div_ceil(threads).max(1);
    thread::scope(|scope| {
        let mut parts = values.chunks(blocks * len).zip(out.chunks_mut(blocks * size));
        let first = parts.next();
        for (values, out) in parts {
            scope.spawn(move || encode(stored, values, out));
        }
        first.into_iter().for_each(|(values, out)| encode(stored, values, out));
    });
    let infinite = |block: &[u8]| {
        let scale = |at: &usize| f16::from_le_bytes([block[*at], block[*at + 1]]);
        stored.scales().iter().any(|at| !scale(at).is_finite())
    };
    match out.chunks_exact(size).position(infinite) {
        Some(block) => {
            let largest = values[block * len..][..len].iter().fold(0.0f32, |a, v| a.max(v.abs()));
            let got = format!("a block with {largest} at element {}", block * len);
            Err(err("blocks whose scale an f16 can hold".into(), got))
        }
        None => Ok(out),
    }
}

fn encode(stored: Stored, values: &[f32], out: &mut [u8]) {
    match stored {
        Stored::F32 => each_block(values, out, |[v]: &[f32; 1]| v.to_le_bytes()),
        Stored::F16 => each_block(values, out, |[v]: &[f32; 1]| f16::from_f32(*v).to_le_bytes()),
        Stored::BF16 => each_block(values, out, |[v]: &[f32; 1]| bf16::from_f32(*v).to_le_bytes()),
        Stored::Q4_0 => each_block(values, out, to_q4_0),
        Stored::Q4_1 => each_block(values, out, to_q4_1),
        Stored::Q5_0 => each_block(values, out, to_q5_0),
        Stored::Q5_1 => each_block(values, out, to_q5_1),
        Stored::Q8_0 => each_block(values, out, to_q8_0),
        Stored::Q4_K => each_block(values, out, to_q4_k),
        Stored::Q5_K => each_block(values, out, to_q5_k),
        Stored::Q6_K => each_block(values, out, to_q6_k),
    }
}

fn each_block<const B: usize, const L: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(&[f32; L]) -> [u8; B]) {
    let (values, blocks) = (values.as_chunks::<L>().0, out.as_chunks_mut::<B>().0);
    values.iter().zip(blocks).for_each(|(x, b)| *b = encode(x));
}
