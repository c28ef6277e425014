//! The formats' names, numbers and sizes.

use std::fmt;

/// Storage format of a tensor's elements. See the [module](super) for the layouts.
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
    pub(crate) const fn scales(self) -> &'static [usize] {
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
