//! The header of a model file, independent of its format.

use std::ops::Range;

use super::metadata::Metadata;
use super::quant::Stored;
use crate::error::{Error, Result, quoted};
use crate::tensor::Shape;

/// Largest rank of a tensor that is read.
pub(super) const MAX_RANK: usize = 8;

/// The header of a file, checked against the file's length.
///
/// [`gguf_header`](super::gguf_header) and [`safetensors_header`](super::safetensors_header) return one.
#[derive(Clone, Debug)]
pub struct Header {
    /// Keys and values.
    pub metadata: Metadata,
    /// The tensors: in the order of the header for GGUF, in the order of the data for safetensors.
    pub tensors: Vec<TensorInfo>,
    /// Names, types and shapes of tensors that this crate does not read.
    pub unread: Vec<(String, String)>,
}

/// One tensor of a [`Header`].
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub stored: Stored,
    /// Dimensions, row-major.
    pub shape: Shape,
    /// The place of its bytes in the file.
    pub range: Range<usize>,
}

impl Header {
    /// Returns an error if two tensors have the same name.
    pub(super) fn check_names(&self, path: &str) -> Result<()> {
        let mut names: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.extend(self.unread.iter().map(|(name, _)| name.as_str()));
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::format(path, format!("tensor {} is there twice", quoted(pair[0])))),
            None => Ok(()),
        }
    }

    /// Returns an error if two tensors share bytes.
    pub(super) fn check_overlaps(&self, path: &str) -> Result<()> {
        let mut tensors: Vec<&TensorInfo> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|t| t.range.start);
        match tensors.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            Some(pair) => {
                let [a, b] = [pair[0], pair[1]].map(|t| format!("{} at {:?}", quoted(&t.name), t.range));
                Err(Error::format(path, format!("tensors {a} and {b} overlap")))
            }
            None => Ok(()),
        }
    }
}
