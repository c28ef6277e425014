//! Stored blocks to f32.

use half::{bf16, f16};

use super::stored::Stored;
use crate::error::{Error, Result};

/// The values of whole blocks, in order. An `Err` if `bytes` is not a whole number of blocks.
///
/// ```
/// use throughline::format::{Stored, quant};
///
/// let bytes = quant::quantize(Stored::Q8_0, &[0.5; 64])?;
/// assert_eq!(bytes.len(), 2 * 34);
/// let values = quant::dequantize(Stored::Q8_0, &bytes)?;
/// assert!(values.iter().all(|v| (v - 0.5).abs() < 1e-3));
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn dequantize(stored: Stored, bytes: &[u8]) -> Result<Vec<f32>> {
    let mut out = vec![0.0; bytes.len() / stored.block_bytes() * stored.block_len()];
    dequantize_into(stored, bytes, &mut out)?;
    Ok(out)
}

/// [`dequantize`] into a slice, which must have exactly as many elements as `bytes` encodes. Use it to decode into
/// memory of your own, row by row.
pub fn dequantize_into(stored: Stored, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let blocks = bytes.len() / stored.block_bytes();
    if !bytes.len().is_multiple_of(stored.block_bytes()) || out.len() != blocks * stored.block_len() {
        return Err(Error::data(
            format!("{stored} data"),
            format!("blocks of {} bytes for {} elements", stored.block_bytes(), stored.block_len()),
            format!("{} bytes for {} elements", bytes.len(), out.len()),
        ));
    }
    match stored {
        Stored::F32 => each_block(bytes, out, |b, y| *y = [f32::from_le_bytes(*b)]),
        Stored::F16 => each_block(bytes, out, |b, y| *y = [f16::from_le_bytes(*b).to_f32()]),
        Stored::BF16 => each_block(bytes, out, |b, y| *y = [bf16::from_le_bytes(*b).to_f32()]),
        Stored::Q4_0 => each_block(bytes, out, q4_0),
        Stored::Q4_1 => each_block(bytes, out, q4_1),
        Stored::Q5_0 => each_block(bytes, out, q5_0),
        Stored::Q5_1 => each_block(bytes, out, q5_1),
        Stored::Q8_0 => each_block(bytes, out, q8_0),
        Stored::Q4_K => each_block(bytes, out, q4_k),
        Stored::Q5_K => each_block(bytes, out, q5_k),
        Stored::Q6_K => each_block(bytes, out, q6_k),
    }
    Ok(())
}

/// Decodes blocks of `B` bytes into blocks of `L` values. Arrays of known length let the compiler drop bounds checks.
fn each_block<const B: usize, const L: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(&[u8; B], &mut [f32; L])) {
    let (blocks, values) = (bytes.as_chunks::<B>().0, out.as_chunks_mut::<L>().0);
    blocks.iter().zip(values).for_each(|(b, y)| decode(b, y));
}

/// The f16 at this offset in a block.
fn scale<const B: usize>(b: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for i in 0..16 {
        y[i] = (i32::from(b[2 + i] & 15) - 8) as f32 * d;
        y[i + 16] = (i32::from(b[2 + i] >> 4) - 8) as f32 * d;
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    for i in 0..16 {
        y[i] = f32::from(b[4 + i] & 15) * d + m;
        y[i + 16] = f32::from(b[4 + i] >> 4) * d + m;
    }
}

/// The 5-bit integers `i` and `i + 16` of a block of 32, from their nibbles and the word of fifth bits.
fn five_bits(high: u32, nibbles: u8, i: usize) -> (u8, u8) {
    let bit = |at: usize| ((high >> at) as u8 & 1) << 4;
    (nibbles & 15 | bit(i), nibbles >> 4 | bit(i + 16))
}

fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for i in 0..16 {
        let (low, top) = five_bits(high, b[6 + i], i);
        y[i] = (i32::from(low) - 16) as f32 * d;
        y[i + 16] = (i32::from(top) - 16) as f32 * d;
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for i in 0..16 {
        let (low, top) = five_bits(high, b[8 + i], i);
        y[i] = f32::from(low) * d + m;
        y[i + 16] = f32::from(top) * d + m;
    }
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for i in 0..32 {
        y[i] = f32::from(b[2 + i] as i8) * d;
    }
}

/// Scale and minimum of one of the eight groups of 32 in a `Q4_K` or `Q5_K` block: 6 bits each, packed in the 12 bytes
/// from `b[4]`. The first four groups have both whole, in the low bits of bytes 0..4 and 4..8. The other groups have
/// their low nibbles in bytes 8..12 and their top two bits above those of the first groups.
fn scale_min<const B: usize>(b: &[u8; B], group: usize) -> (u8, u8) {
    let s = |i: usize| b[4 + i];
    match group {
        0..4 => (s(group) & 63, s(group + 4) & 63),
        _ => (s(group + 4) & 15 | s(group - 4) >> 6 << 4, s(group + 4) >> 4 | s(group) >> 6 << 4),
    }
}

/// `Q4_K` and `Q5_K` differ only in the fifth bits. The nibbles start at `quants`: 32 bytes hold 64 elements, the low
/// nibbles first. `fifth` returns 0 or 16 for an element of a group.
fn k_block<const B: usize>(b: &[u8; B], quants: usize, fifth: impl Fn(usize, usize) -> u8, y: &mut [f32; 256]) {
    let (d, dmin) = (scale(b, 0), scale(b, 2));
    for group in 0..8 {
        let (s, m) = scale_min(b, group);
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        for i in 0..32 {
            let byte = b[quants + group / 2 * 32 + i];
            let q = (if group % 2 == 0 { byte & 15 } else { byte >> 4 }) + fifth(group, i);
            y[group * 32 + i] = d * f32::from(q) - m;
        }
    }
}

fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    k_block(b, 16, |_, _| 0, y);
}

fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    k_block(b, 48, |group, i| (b[16 + i] >> group & 1) << 4, y);
}

/// Two halves of 128 elements. In each half, element `l` of the `k`-th 32 has its low bits in the nibbles of 64 bytes
/// (low nibbles are the first 64 elements), its top two bits in bits `2k` of byte `l` of 32, and one scale per 16
/// elements.
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = scale(b, 208);
    for half in 0..2 {
        for k in 0..4 {
            for l in 0..32 {
                let byte = b[half * 64 + k % 2 * 32 + l];
                let low = if k < 2 { byte & 15 } else { byte >> 4 };
                let top = b[128 + half * 32 + l] >> (2 * k) & 3;
                let s = b[192 + half * 8 + k * 2 + l / 16] as i8;
                let q = i32::from(low | top << 4) - 32;
                y[half * 128 + k * 32 + l] = d * f32::from(s) * q as f32;
            }
        }
    }
}
