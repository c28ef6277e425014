//! What the header of a model file says, whatever its format.

use std::ops::Range;

use super::metadata::Metadata;
use super::quant::Stored;
use crate::error::{Error, Result, quoted};
use crate::tensor::Shape;

/// Largest rank of a tensor that is read.
pub(super) const MAX_RANK: usize = 8;

/// What a file's header says, checked against the file's length.
#[derive(Clone, Debug)]
pub struct Header {
    /// Keys and values.
    pub metadata: Metadata,
    /// The tensors: in the order of a GGUF file's header, of a safetensors file's data.
    pub tensors: Vec<TensorInfo>,
    /// Names of tensors that are there but not read, with their types and shapes.
    pub unread: Vec<(String, String)>,
}

/// One tensor of a [`Header`].
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub stored: Stored,
    /// Row-major dimensions.
    pub shape: Shape,
    /// Where in the file its bytes are.
    pub range: Range<usize>,
}

impl Header {
    /// An `Err` if two tensors have the same name.
    pub(super) fn check_names(&self, path: &str) -> Result<()> {
        let mut names: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.extend(self.unread.iter().map(|(name, _)| name.as_str()));
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::format(path, format!("tensor {} is there twice", quoted(pair[0])))),
            None => Ok(()),
        }
    }

    /// An `Err` if two tensors share bytes.
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
