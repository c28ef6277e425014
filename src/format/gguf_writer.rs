//! Writing a GGUF file: the counterpart of `gguf`, which reads one.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::finite::first_bad_block;
use super::gguf::{MAGIC, MAX_DEPTH, MAX_DIMS, MAX_NAME, alignment};
use super::metadata::{MetaArray, MetaValue, Metadata};
use super::quant::{self, Stored};
use crate::error::{Error, Result, quoted};
use crate::files::NewFile;
use crate::tensor::Shape;

/// Longest name of a tensor that ggml loads, in bytes: its buffer has 64 with the zero at the end.
const MAX_TENSOR_NAME: usize = 63;

/// A tensor of a file that a [`GgufWriter`] writes.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub stored: Stored,
    /// Dimensions, row-major: `[d_out, d_in]` for a linear layer. The file itself has them the other way round.
    pub shape: Shape,
}

/// Writes a GGUF file tensor by tensor, so that a model need never be in memory as a whole.
///
/// Use it for files of your own, such as adapters; [`Model::save_gguf`](crate::model::Model::save_gguf) writes a whole
/// model. [`create`](Self::create) takes all metadata, and the names, types and shapes of all tensors. Their bytes
/// follow in the same order, in pieces of any size. The file is put in place atomically by [`finish`](Self::finish):
/// its path holds either the old file or the new one, never a part.
///
/// Version 3 of the format is written, little-endian. Tensors start at multiples of `general.alignment`, if the metadata
/// has it, or else of 32.
///
/// ```
/// use throughline::format::{GgufTensor, GgufWriter, Metadata, Stored, Weights};
///
/// let path = std::env::temp_dir().join(format!("doc-{}.gguf", std::process::id()));
/// let mut metadata = Metadata::default();
/// metadata.set("general.architecture", "llama");
/// metadata.set("llama.block_count", 1u32);
/// let table = GgufTensor { name: "token_embd.weight".into(), stored: Stored::Q8_0, shape: [2, 64].into() };
/// let norm = GgufTensor { name: "output_norm.weight".into(), stored: Stored::F32, shape: [64].into() };
///
/// let mut file = GgufWriter::create(&path, &metadata, &[table, norm])?;
/// file.write_values(&[0.5; 64])?; // the first row of the table
/// file.write_values(&[0.25; 64])?;
/// file.write(&[0; 64 * 4])?; // the norm's bytes
/// file.finish()?;
///
/// let weights = Weights::open(&path)?;
/// assert_eq!(weights.metadata().usize("llama.block_count")?, 1);
/// assert_eq!(weights.get("token_embd.weight")?.of_shape([2, 64])?.stored(), Stored::Q8_0);
/// # drop(weights);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: NewFile,
    alignment: usize,
    tensors: Vec<Expected>,
    /// The tensor that is being written, and how many of its bytes are.
    at: usize,
    written: usize,
}

/// A tensor, and the bytes that it takes.
#[derive(Debug)]
struct Expected {
    name: String,
    stored: Stored,
    bytes: usize,
}

impl GgufWriter {
    /// Starts a file with its header.
    ///
    /// # Errors
    ///
    /// If it could not be read again: two tensors have one name, a name or key is empty or too long, a shape has no
    /// elements, more than 4 dimensions or rows that are not whole blocks of the type, or `general.alignment` is no
    /// power of two. If the file cannot be created.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[GgufTensor]) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let alignment = alignment(&path.display().to_string(), metadata)?;
        let mut header = Header(vec![]);
        header.0.extend(MAGIC);
        header.u32(3);
        header.u64(tensors.len());
        header.u64(metadata.len());
        for (key, value) in metadata.iter() {
            let of_key = |message: String| bad(format!("metadata {}: {message}", quoted(key)));
            if key.is_empty() || key.len() as u64 > MAX_NAME {
                return Err(of_key(format!("the key has {} bytes, expected 1 to {MAX_NAME}", key.len())));
            }
            header.text(key);
            header.value(value).map_err(of_key)?;
        }
        let (mut expected, mut names, mut offset) = (vec![], HashSet::new(), 0usize);
        for tensor in tensors {
            let of_tensor = |message: String| bad(format!("tensor {}: {message}", quoted(&tensor.name)));
            if !names.insert(tensor.name.as_str()) {
                return Err(of_tensor("is there twice".into()));
            }
            let bytes = tensor.check().map_err(of_tensor)?;
            header.tensor(tensor, offset);
            let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(alignment));
            offset = end.ok_or_else(|| of_tensor("has more bytes than can be counted".into()))?;
            expected.push(Expected { name: tensor.name.clone(), stored: tensor.stored, bytes });
        }
        let mut file = NewFile::create(path)?;
        file.write(&header.0)?;
        let mut writer = GgufWriter { path: path.into(), file, alignment, tensors: expected, at: 0, written: 0 };
        writer.pad(header.0.len())?;
        Ok(writer)
    }

    /// Appends bytes of the tensor that is next, as its type stores them: rows of whole blocks, little-endian. A piece
    /// belongs to one tensor. Elements are not looked at.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.tensors.get(self.at) else {
            return match bytes.len() {
                0 => Ok(()),
                more => Err(Error::format(&self.path, format!("{more} bytes after those of the last tensor"))),
            };
        };
        let left = tensor.bytes - self.written;
        if bytes.len() > left {
            return Err(Error::data(&tensor.name, format!("{left} bytes more of {}", tensor.bytes), bytes.len()));
        }
        self.file.write(bytes)?;
        self.written += bytes.len();
        if self.written == tensor.bytes {
            let whole = std::mem::take(&mut self.written);
            self.at += 1;
            self.pad(whole)?;
        }
        Ok(())
    }

    /// Appends elements of the tensor that is next, encoded as its type: whole blocks.
    ///
    /// # Errors
    ///
    /// If an element is NaN or infinite, or its type cannot hold it; if they are not whole blocks, or more than the
    /// tensor has left; if the type is one that is only read, see [`quant::quantize`].
    pub fn write_values(&mut self, values: &[f32]) -> Result<()> {
        let Some(tensor) = self.tensors.get(self.at) else {
            return Err(Error::format(&self.path, format!("{} values after the last tensor", values.len())));
        };
        let (stored, name) = (tensor.stored, &tensor.name);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let element = self.written / stored.block_bytes() * stored.block_len() + at;
            return Err(Error::data(name, "finite values", format!("{} as element {element}", values[at])));
        }
        let bytes = quant::quantize(stored, values)?;
        if let Some(block) = first_bad_block(stored, &bytes) {
            let from = self.written / stored.block_bytes() * stored.block_len() + block * stored.block_len();
            let largest = values[block * stored.block_len()..][..stored.block_len()].iter().copied();
            let largest = largest.fold(0.0, |a: f32, v| if v.abs() > a.abs() { v } else { a });
            let got = format!("{largest} at or after element {from}");
            return Err(Error::data(name, format!("values that {stored} can hold"), got));
        }
        self.write(&bytes)
    }

    /// Puts the file in its place. An `Err` names the first tensor that lacks bytes, and the path keeps what it held.
    pub fn finish(self) -> Result<()> {
        match self.tensors.get(self.at) {
            None => self.file.commit(),
            Some(tensor) => Err(Error::data(&tensor.name, format!("{} bytes", tensor.bytes), self.written)),
        }
    }

    /// Fills up what has this length.
    fn pad(&mut self, len: usize) -> Result<()> {
        const ZEROS: [u8; 64] = [0; 64];
        let mut left = len.next_multiple_of(self.alignment) - len;
        while left > 0 {
            let some = left.min(ZEROS.len());
            self.file.write(&ZEROS[..some])?;
            left -= some;
        }
        Ok(())
    }
}

impl GgufTensor {
    /// The bytes of its elements, or why such a tensor cannot be written.
    fn check(&self) -> Result<usize, String> {
        let (dims, stored) = (self.shape.dims(), self.stored);
        if !(1..=MAX_TENSOR_NAME).contains(&self.name.len()) {
            return Err(format!("the name has {} bytes, expected 1 to {MAX_TENSOR_NAME}", self.name.len()));
        }
        if dims.len() > MAX_DIMS as usize {
            return Err(format!("has {} dimensions, expected {MAX_DIMS} at most", dims.len()));
        }
        if let Some(problem) = self.shape.problem() {
            return Err(problem);
        }
        let cols = self.shape.cols();
        if !cols.is_multiple_of(stored.block_len()) {
            return Err(format!("rows of {cols} are not whole blocks of {} ({stored})", stored.block_len()));
        }
        stored.bytes_of(dims).ok_or_else(|| format!("{stored}{} has more bytes than can be counted", self.shape))
    }
}

/// Bytes of a header in the making.
struct Header(Vec<u8>);

impl Header {
    fn u32(&mut self, v: u32) {
        self.0.extend(v.to_le_bytes());
    }

    fn u64(&mut self, v: usize) {
        self.0.extend((v as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len());
        self.0.extend(text.as_bytes());
    }

    fn tensor(&mut self, tensor: &GgufTensor, offset: usize) {
        self.text(&tensor.name);
        self.u32(tensor.shape.dims().len() as u32);
        // The contiguous dimension comes first.
        tensor.shape.dims().iter().rev().for_each(|&dim| self.u64(dim));
        self.u32(tensor.stored.ggml_id());
        self.u64(offset);
    }

    /// The number of a value's type in the specification, and the value.
    fn value(&mut self, value: &MetaValue) -> Result<(), String> {
        match value {
            MetaValue::U8(v) => self.number(0, v.to_le_bytes()),
            MetaValue::I8(v) => self.number(1, v.to_le_bytes()),
            MetaValue::U16(v) => self.number(2, v.to_le_bytes()),
            MetaValue::I16(v) => self.number(3, v.to_le_bytes()),
            MetaValue::U32(v) => self.number(4, v.to_le_bytes()),
            MetaValue::I32(v) => self.number(5, v.to_le_bytes()),
            MetaValue::F32(v) => self.number(6, v.to_le_bytes()),
            MetaValue::Bool(v) => self.number(7, [u8::from(*v)]),
            MetaValue::String(v) => {
                self.u32(8);
                self.text(v);
            }
            MetaValue::Array(v) => {
                self.u32(9);
                self.array(v, MAX_DEPTH)?;
            }
            MetaValue::U64(v) => self.number(10, v.to_le_bytes()),
            MetaValue::I64(v) => self.number(11, v.to_le_bytes()),
            MetaValue::F64(v) => self.number(12, v.to_le_bytes()),
        }
        Ok(())
    }

    fn number<const N: usize>(&mut self, kind: u32, bytes: [u8; N]) {
        self.u32(kind);
        self.0.extend(bytes);
    }

    /// Element type, count, elements.
    fn array(&mut self, array: &MetaArray, depth: usize) -> Result<(), String> {
        if depth == 0 {
            return Err(format!("arrays are nested more than {MAX_DEPTH} deep"));
        }
        match array {
            MetaArray::U8(v) => self.numbers(0, v, u8::to_le_bytes),
            MetaArray::I8(v) => self.numbers(1, v, i8::to_le_bytes),
            MetaArray::U16(v) => self.numbers(2, v, u16::to_le_bytes),
            MetaArray::I16(v) => self.numbers(3, v, i16::to_le_bytes),
            MetaArray::U32(v) => self.numbers(4, v, u32::to_le_bytes),
            MetaArray::I32(v) => self.numbers(5, v, i32::to_le_bytes),
            MetaArray::F32(v) => self.numbers(6, v, f32::to_le_bytes),
            MetaArray::Bool(v) => self.numbers(7, v, |v| [u8::from(v)]),
            MetaArray::String(v) => {
                self.count(8, v.len());
                v.iter().for_each(|text| self.text(text));
            }
            MetaArray::Array(v) => {
                self.count(9, v.len());
                v.iter().try_for_each(|array| self.array(array, depth - 1))?;
            }
            MetaArray::U64(v) => self.numbers(10, v, u64::to_le_bytes),
            MetaArray::I64(v) => self.numbers(11, v, i64::to_le_bytes),
            MetaArray::F64(v) => self.numbers(12, v, f64::to_le_bytes),
        }
        Ok(())
    }

    fn count(&mut self, kind: u32, len: usize) {
        self.u32(kind);
        self.u64(len);
    }

    fn numbers<T: Copy, const N: usize>(&mut self, kind: u32, v: &[T], bytes: fn(T) -> [u8; N]) {
        self.count(kind, v.len());
        self.0.extend(v.iter().flat_map(|&v| bytes(v)));
    }
}
