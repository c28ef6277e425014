//! Storage formats of elements: plain floats, and ggml's blocks of quantised weights.
//!
//! Use [`dequantize`] to get the f32 values of stored bytes, and [`quantize`] to make a file smaller. Kernels that read
//! these formats directly are in [`ops::packed`](crate::ops::packed).
//!
//! A block holds [`Stored::block_len`] consecutive elements of a row in [`Stored::block_bytes`] bytes, all
//! little-endian. Below, `d` and `m` are f16 scales and `q` is the integer of an element:
//!
//! | type | elements | bytes | layout | element |
//! |---|---|---|---|---|
//! | `Q4_0` | 32 | 18 | d, 16 × two 4-bit q | d·(q − 8) |
//! | `Q4_1` | 32 | 20 | d, m, 16 × two 4-bit q | d·q + m |
//! | `Q5_0` | 32 | 22 | d, 32 fifth bits, 16 × two 4-bit q | d·(q − 16) |
//! | `Q5_1` | 32 | 24 | d, m, 32 fifth bits, 16 × two 4-bit q | d·q + m |
//! | `Q8_0` | 32 | 34 | d, 32 × i8 q | d·q |
//! | `Q4_K` | 256 | 144 | d, dmin, 8 × 6-bit (s, m), 128 × two 4-bit q | d·s·q − dmin·m |
//! | `Q5_K` | 256 | 176 | d, dmin, 8 × 6-bit (s, m), 256 fifth bits, 128 × two 4-bit q | d·s·q − dmin·m |
//! | `Q6_K` | 256 | 210 | 128 × two 4-bit q, 64 × four 2-bit tops, 16 × i8 s, d | d·s·(q − 32) |
//!
//! The low nibbles of a block of 32 are its first 16 elements, the high nibbles its last 16. The layouts are those of
//! ggml (`ggml-common.h` and `ggml-quants.c` in <https://github.com/ggml-org/ggml>). Arithmetic is in f32 in the order
//! written, without fused multiply-adds, like ggml's scalar code: kernels are tested against it.

use std::fmt;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// Storage format of a tensor's elements. See the [module](self) for the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)] // ggml's names
#[non_exhaustive]
pub enum Stored {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Stored {
    /// All formats.
    pub const ALL: [Stored; 11] = [
        Stored::F32,
        Stored::F16,
        Stored::BF16,
        Stored::Q4_0,
        Stored::Q4_1,
        Stored::Q5_0,
        Stored::Q5_1,
        Stored::Q8_0,
        Stored::Q4_K,
        Stored::Q5_K,
        Stored::Q6_K,
    ];

    /// Name, number in GGUF files (`ggml_type`), elements per block, bytes per block.
    const fn row(self) -> (&'static str, u32, usize, usize) {
        match self {
            Stored::F32 => ("F32", 0, 1, 4),
            Stored::F16 => ("F16", 1, 1, 2),
            Stored::BF16 => ("BF16", 30, 1, 2),
            Stored::Q4_0 => ("Q4_0", 2, 32, 18),
            Stored::Q4_1 => ("Q4_1", 3, 32, 20),
            Stored::Q5_0 => ("Q5_0", 6, 32, 22),
            Stored::Q5_1 => ("Q5_1", 7, 32, 24),
            Stored::Q8_0 => ("Q8_0", 8, 32, 34),
            Stored::Q4_K => ("Q4_K", 12, 256, 144),
            Stored::Q5_K => ("Q5_K", 13, 256, 176),
            Stored::Q6_K => ("Q6_K", 14, 256, 210),
        }
    }

    /// The name, as in `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// The number of this type in GGUF files.
    pub const fn ggml_id(self) -> u32 {
        self.row().1
    }

    /// The format with this number in GGUF files, if this crate reads it.
    pub fn from_ggml_id(id: u32) -> Option<Stored> {
        Stored::ALL.into_iter().find(|s| s.ggml_id() == id)
    }

    /// Elements of a block: 1, 32 or 256. A row is a whole number of blocks.
    pub const fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Whether elements share scales in blocks.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Where the f16 numbers of a quantised block are; none for plain floats.
    pub(super) const fn scales(self) -> &'static [usize] {
        match self {
            Stored::F32 | Stored::F16 | Stored::BF16 => &[],
            Stored::Q4_0 | Stored::Q5_0 | Stored::Q8_0 => &[0],
            Stored::Q4_1 | Stored::Q5_1 | Stored::Q4_K | Stored::Q5_K => &[0, 2],
            Stored::Q6_K => &[208],
        }
    }

    /// Bytes of a tensor with these row-major dimensions. `None` if its rows are not whole blocks, or the number is too
    /// large.
    pub fn bytes_of(self, dims: &[usize]) -> Option<usize> {
        let (&cols, lead) = dims.split_last()?;
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        let row = (cols / self.block_len()).checked_mul(self.block_bytes())?;
        lead.iter().try_fold(row, |n, &d| n.checked_mul(d))
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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

/// Encodes values as `F32`, `F16`, `BF16`, `Q4_0`, `Q4_1` or `Q8_0`, rounding like ggml's reference. [`dequantize`] has
/// an example.
///
/// # Errors
///
/// For other formats, and for a number of values that is not a whole number of blocks.
pub fn quantize(stored: Stored, values: &[f32]) -> Result<Vec<u8>> {
    let err = |expected: String, got: String| Error::data(format!("{stored} data"), expected, got);
    if !values.len().is_multiple_of(stored.block_len()) {
        return Err(err(format!("blocks of {} elements", stored.block_len()), format!("{} elements", values.len())));
    }
    let blocks = values.as_chunks::<32>().0;
    Ok(match stored {
        Stored::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Stored::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Stored::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Stored::Q4_0 => blocks.iter().flat_map(to_q4_0).collect(),
        Stored::Q4_1 => blocks.iter().flat_map(to_q4_1).collect(),
        Stored::Q8_0 => blocks.iter().flat_map(to_q8_0).collect(),
        _ => return Err(err("F32, F16, BF16, Q4_0, Q4_1 or Q8_0".into(), format!("{stored}, which is only read"))),
    })
}

/// 1 / d, or 0 for a block that is all zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn to_q4_0(x: &[f32; 32]) -> [u8; 18] {
    // The value of largest magnitude becomes -8 exactly, so its sign goes into the scale.
    let largest = x.iter().fold(0.0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    let d = largest / -8.0;
    let id = inverse(d);
    let q = |v: f32| ((v * id + 8.5) as u8).min(15);
    let mut b = [0; 18];
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for i in 0..16 {
        b[2 + i] = q(x[i]) | q(x[i + 16]) << 4;
    }
    b
}

fn to_q4_1(x: &[f32; 32]) -> [u8; 20] {
    let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    let d = (max - min) / 15.0;
    let id = inverse(d);
    let q = |v: f32| (((v - min) * id + 0.5) as u8).min(15);
    let mut b = [0; 20];
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    b[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    for i in 0..16 {
        b[4 + i] = q(x[i]) | q(x[i + 16]) << 4;
    }
    b
}

fn to_q8_0(x: &[f32; 32]) -> [u8; 34] {
    let d = x.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 127.0;
    let id = inverse(d);
    let mut b = [0; 34];
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for i in 0..32 {
        b[2 + i] = (x[i] * id).round() as i8 as u8;
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_sizes_are_consistent() {
        for s in Stored::ALL {
            assert_eq!(Stored::from_ggml_id(s.ggml_id()), Some(s));
            assert_eq!(s.bytes_of(&[3, 512]), Some(3 * 512 / s.block_len() * s.block_bytes()));
            assert_eq!(s.bytes_of(&[usize::MAX / 2, 512]), None, "{s}");
            assert_eq!(s.bytes_of(&[]), None);
            assert_eq!(s.bytes_of(&[512, 8]).is_none(), s.is_quantized());
            let one = vec![0; s.block_bytes()];
            assert_eq!(dequantize(s, &one).unwrap().len(), s.block_len());
            let err = dequantize(s, &one[1..]).unwrap_err().to_string();
            assert!(err.contains(s.name()), "{err}");
        }
        assert_eq!(Stored::from_ggml_id(10), None);
        assert!(quantize(Stored::Q6_K, &[0.0; 256]).unwrap_err().to_string().contains("Q6_K"));
        assert!(quantize(Stored::Q8_0, &[0.0; 31]).unwrap_err().to_string().contains("31"));
    }

    #[test]
    fn quantising_is_off_by_half_a_step_at_most() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37 % 96) as f32 - 40.0) / 24.0).collect();
        // Step over the range of a block of values in [-40/24, 55/24], scale's own rounding included.
        for (stored, step) in [(Stored::Q4_0, 0.30), (Stored::Q4_1, 0.27), (Stored::Q8_0, 0.019)] {
            let back = dequantize(stored, &quantize(stored, &values).unwrap()).unwrap();
            // Q4_0 reaches -8 steps on one side but only 7 on the other: a whole step there.
            let off = if stored == Stored::Q4_0 { step } else { step / 2.0 };
            let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= off, "{stored}: {worst}");
        }
        let zeros = [0.0; 32];
        for stored in [Stored::Q4_0, Stored::Q4_1, Stored::Q8_0] {
            assert_eq!(dequantize(stored, &quantize(stored, &zeros).unwrap()).unwrap(), zeros);
        }
    }
}
