//! Matrices whose elements stay in their stored format.

use super::quant::{self, Stored};
use crate::array::Array;
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::{TensorType, split_rows};

/// Number of elements that the kernels decode at a time.
pub(crate) const UNIT: usize = 32;

/// Format and shape of a matrix `[n, k]` in its stored format.
///
/// It describes the words that [`packed_linear`](crate::Graph::packed_linear) and
/// [`packed_rows`](crate::Graph::packed_rows) read, and is how a model runs without being decoded to f32.
/// [`Model::packed`](crate::model::Model::packed) returns one for a parameter of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    /// Storage format of the elements.
    pub stored: Stored,
    /// Number of rows.
    pub n: usize,
    /// Number of columns: whole blocks of the format, and a multiple of 32.
    pub k: usize,
}

impl Packed {
    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.n * (self.k / self.stored.block_len()) * self.stored.block_bytes()
    }

    /// The type of the tensor that holds the matrix: its bytes as words, the last one padded.
    pub fn ty(&self) -> TensorType {
        TensorType::u32([self.bytes().div_ceil(4)])
    }

    /// Splits the matrix into parts of whole rows, each of at most `max_bytes`; see [`parts`](crate::ops::parts).
    pub fn split(&self, max_bytes: u64) -> Result<Vec<Packed>> {
        let rows = split_rows(self.n, self.bytes() / self.n.max(1), max_bytes)?;
        Ok(rows.into_iter().map(|n| Packed { n, ..*self }).collect())
    }

    pub(crate) fn check(&self, ty: &TensorType) -> Result<(), String> {
        if self.stored == Stored::F32 {
            return Err("f32 weights are not packed; use a matmul".into());
        }
        let block = self.stored.block_len().max(UNIT);
        if self.n == 0 || self.k == 0 || !self.k.is_multiple_of(block) {
            return Err(format!("rows of {} elements are not whole blocks of {block}", self.k));
        }
        if self.stored.bytes_of(&[self.n, self.k]).is_none() {
            return Err(format!("{self:?} has more bytes than can be counted"));
        }
        match *ty == self.ty() {
            true => Ok(()),
            false => Err(format!("{self:?} takes {} of words, got {ty}", self.ty())),
        }
    }

    /// Decodes the matrix of a reference input. Exact, since f64 holds any word.
    pub(crate) fn decode(&self, words: &Array) -> Vec<f64> {
        let bytes: Vec<u8> = words.data.iter().flat_map(|&w| (w as u32).to_le_bytes()).collect();
        // `check` has made sure that the blocks are whole.
        let values = quant::dequantize(self.stored, &bytes[..self.bytes()]).unwrap_or_default();
        values.into_iter().map(f64::from).collect()
    }

    /// Test data: random bytes, except that the f16 fields of every block are near 1/64, so that no element is huge or
    /// NaN.
    pub(crate) fn random_words(&self, rng: &mut Rng) -> Vec<f64> {
        let mut bytes: Vec<u8> = (0..self.bytes()).map(|_| rng.below(256) as u8).collect();
        let halves = if self.stored.is_quantized() { self.stored.scales() } else { &[0] };
        for block in bytes.chunks_exact_mut(self.stored.block_bytes()) {
            for &at in halves {
                // Sign and mantissa stay random. 0x24 is the exponent of 2^-6 in an f16, 0x3c that of
                // 2^-7 in a bf16.
                let exponent = if self.stored == Stored::BF16 { 0x3c } else { 0x24 };
                block[at + 1] = (block[at + 1] & 0x83) | exponent;
            }
        }
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.chunks_exact(4).map(|w| f64::from(u32::from_le_bytes([w[0], w[1], w[2], w[3]]))).collect()
    }
}
