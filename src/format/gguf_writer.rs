//! GGUF files, written: version 3, little-endian. The format is described in [`gguf`](super::gguf), which reads it.

use std::collections::HashSet;
use std::path::Path;

use super::gguf::{MAGIC, MAX_DEPTH, MAX_DIMS, MAX_NAME, alignment};
use super::metadata::{MetaArray, MetaValue, Metadata};
use super::quant::{self, Stored};
use super::safetensors::SaveTensor;
use crate::error::{Error, Result, quoted};
use crate::files::NewFile;
use crate::tensor::Shape;

const VERSION: u32 = 3;

/// Longest name of a tensor in bytes: ggml refuses files with longer ones.
const MAX_TENSOR_NAME: usize = 63;

/// Largest alignment: more would be padding without a use.
const MAX_ALIGNMENT: usize = 1 << 16;

/// Elements that are encoded at a time.
const PART: usize = 1 << 20;

/// A tensor that a [`GgufWriter`] is to write.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, row-major: one to four.
    pub shape: Shape,
    /// The format of its elements. Rows are whole blocks.
    pub stored: Stored,
}

/// Writes a GGUF file, one tensor after another, so that no more than a piece of a tensor needs to be in memory.
///
/// Use it for files of your own, such as adapters. [`Model::save_gguf`](crate::model::Model::save_gguf) writes a whole
/// model, and [`save_gguf`] tensors that are in memory already. The header comes first, so names, shapes and formats are
/// known before any data. The data follows in the same order, in pieces of any length. The file takes its place with
/// [`finish`](Self::finish), atomically; a writer that is dropped before leaves nothing behind.
///
/// ```
/// use throughline::format::{GgufTensor, GgufWriter, Metadata, Stored, Weights};
///
/// let mut metadata = Metadata::default();
/// metadata.set("general.architecture", "example");
/// let table = GgufTensor { name: "table".into(), shape: [4, 32].into(), stored: Stored::Q8_0 };
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("example.gguf");
/// let mut writer = GgufWriter::create(&path, &metadata, vec![table])?;
/// for row in 0..4 {
///     writer.write_values(&[127.0 * row as f32; 32])?; // or `write`, for bytes that are encoded already
/// }
/// writer.finish()?;
///
/// let weights = Weights::open(&path)?;
/// assert_eq!(weights.metadata().str("general.architecture")?, "example");
/// assert_eq!(weights.get("table")?.values()?[96..], [381.0; 32]);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    file: NewFile,
    tensors: Vec<GgufTensor>,
    alignment: usize,
    /// The tensor that is being written.
    current: usize,
    /// How many of its bytes are written.
    written: usize,
}

impl GgufWriter {
    /// Starts a file that will be at `path`, with this metadata and these tensors.
    ///
    /// # Errors
    ///
    /// If the format, or ggml, has no room for a key, a value or a tensor: the error names it. If two tensors have one
    /// name. If the file cannot be created.
    pub fn create(path: &Path, metadata: &Metadata, tensors: Vec<GgufTensor>) -> Result<GgufWriter> {
        let shown = path.display().to_string();
        let alignment = alignment(&shown, metadata)?;
        if alignment > MAX_ALIGNMENT {
            let message = format!("metadata `general.alignment`: expected at most {MAX_ALIGNMENT}, got {alignment}");
            return Err(Error::format(path, message));
        }
        let mut header = Header(MAGIC.to_vec());
        header.u32(VERSION);
        header.len(tensors.len());
        header.len(metadata.len());
        for (key, value) in metadata.iter() {
            let bad = |what: String| Error::format(path, format!("metadata {}: {what}", quoted(key)));
            if key.is_empty() || key.len() as u64 > MAX_NAME {
                return Err(bad(format!("expected a key of 1 to {MAX_NAME} bytes, got {}", key.len())));
            }
            header.string(key);
            header.value(value).map_err(bad)?;
        }
        let (mut offset, mut names) = (0, HashSet::new());
        for tensor in &tensors {
            let bytes = bytes_of(tensor)?;
            if !names.insert(&tensor.name) {
                return Err(Error::data(&tensor.name, "a name of its own", "one that is taken"));
            }
            header.tensor(tensor, offset as u64);
            let end = bytes.checked_next_multiple_of(alignment).and_then(|bytes| bytes.checked_add(offset));
            offset =
                end.ok_or_else(|| Error::data(&tensor.name, "a file that can be counted in bytes", "a larger one"))?;
        }
        header.0.resize(header.0.len().next_multiple_of(alignment), 0);
        let mut file = NewFile::create(path)?;
        file.write(&header.0)?;
        Ok(GgufWriter { file, tensors, alignment, current: 0, written: 0 })
    }

    /// The tensor that comes next, or whose data is incomplete. `None` once all are written.
    pub fn next_tensor(&self) -> Option<&GgufTensor> {
        self.tensors.get(self.current)
    }

    /// Appends bytes of the [next tensor](Self::next_tensor), as they are to be in the file.
    ///
    /// # Errors
    ///
    /// If they are more than it has left; the writer is as before. If the disk does not take them.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.next_tensor().filter(|_| !bytes.is_empty()) else {
            return match bytes.len() {
                0 => Ok(()),
                more => Err(Error::data("GGUF data", "no bytes after those of the last tensor", more)),
            };
        };
        let total = bytes_of(tensor)?;
        if bytes.len() > total - self.written {
            let expected =
                format!("{} bytes at most, which {}{} has left", total - self.written, tensor.stored, tensor.shape);
            return Err(Error::data(&tensor.name, expected, bytes.len()));
        }
        self.file.write(bytes)?;
        self.written += bytes.len();
        if self.written == total {
            let padding = total.next_multiple_of(self.alignment) - total;
            self.file.write(&vec![0; padding])?;
            (self.current, self.written) = (self.current + 1, 0);
        }
        Ok(())
    }

    /// Appends elements of the [next tensor](Self::next_tensor), row-major, encoded in its format: whole blocks.
    ///
    /// # Errors
    ///
    /// Those of [`quantize`](quant::quantize), with the tensor's name, and those of [`write`](Self::write).
    pub fn write_values(&mut self, values: &[f32]) -> Result<()> {
        for part in values.chunks(PART) {
            let Some(tensor) = self.next_tensor() else {
                return Err(Error::data("GGUF data", "no elements after those of the last tensor", part.len()));
            };
            let bytes = quant::quantize(tensor.stored, part).map_err(|e| match e {
                Error::Data { expected, got, .. } => Error::data(&tensor.name, expected, got),
                other => other,
            })?;
            self.write(&bytes)?;
        }
        Ok(())
    }

    /// Puts the file in its place, once the disk has all of it.
    ///
    /// # Errors
    ///
    /// If a tensor lacks data, which the error names; if the file cannot be put there. What was at the path stays.
    pub fn finish(self) -> Result<()> {
        match self.next_tensor() {
            Some(tensor) => Err(Error::data(
                &tensor.name,
                format!("{} bytes", bytes_of(tensor)?),
                format!("{} bytes", self.written),
            )),
            None => self.file.commit(),
        }
    }
}

/// Bytes of a tensor that a file can have.
fn bytes_of(tensor: &GgufTensor) -> Result<usize> {
    let GgufTensor { name, shape, stored } = tensor;
    let err = |expected: String, got: String| Err(Error::data(name, expected, got));
    if name.is_empty() || name.len() > MAX_TENSOR_NAME {
        return err(format!("a tensor's name of 1 to {MAX_TENSOR_NAME} bytes"), format!("{} bytes", name.len()));
    }
    if shape.rank() == 0 || shape.rank() > MAX_DIMS as usize || shape.dims().contains(&0) {
        return err(format!("1 to {MAX_DIMS} dimensions, none of them 0"), shape.to_string());
    }
    match stored.bytes_of(shape.dims()) {
        Some(bytes) => Ok(bytes),
        None => err(format!("rows of whole blocks of {} ({stored})", stored.block_len()), shape.to_string()),
    }
}

/// Writes tensors to a GGUF file, version 3, which llama.cpp and others read.
///
/// Use it for your own tensors. [`GgufWriter`] writes those that are not all in memory at once. The file is put in
/// place atomically: `path` holds either the old file or the new one, never a part.
///
/// # Errors
///
/// The error names the tensor or the key that the file cannot have; see [`GgufWriter`].
///
/// ```
/// use throughline::format::{Metadata, SaveTensor, Stored, Weights, save_gguf};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("example.gguf");
/// let scales = SaveTensor { name: "scales", shape: &[2, 3], values: &[0.5; 6], stored: Stored::F16 };
/// save_gguf(&path, &[scales], &Metadata::default())?;
/// assert_eq!(Weights::open(&path)?.get("scales")?.values()?, [0.5; 6]);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn save_gguf(path: &Path, tensors: &[SaveTensor<'_>], metadata: &Metadata) -> Result<()> {
    for t in tensors {
        if t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(t.values.len()) {
            let got = format!("{} for {:?}", t.values.len(), t.shape);
            return Err(Error::data(t.name, "as many values as the shape has", got));
        }
    }
    let described = |t: &SaveTensor<'_>| GgufTensor {
        name: t.name.into(),
        // A scalar has one dimension here.
        shape: if t.shape.is_empty() { Shape::from([1]) } else { Shape::new(t.shape.to_vec()) },
        stored: t.stored,
    };
    let mut writer = GgufWriter::create(path, metadata, tensors.iter().map(described).collect())?;
    tensors.iter().try_for_each(|t| writer.write_values(t.values))?;
    writer.finish()
}

/// The bytes of a header in the making.
struct Header(Vec<u8>);

impl Header {
    fn u32(&mut self, v: u32) {
        self.0.extend(v.to_le_bytes());
    }

    fn len(&mut self, len: usize) {
        self.0.extend((len as u64).to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.len(text.len());
        self.0.extend(text.bytes());
    }

    /// A type's number and a number of this type.
    fn number<const N: usize>(&mut self, kind: u32, bytes: [u8; N]) {
        self.u32(kind);
        self.0.extend(bytes);
    }

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
                self.string(v);
            }
            MetaValue::Array(v) => {
                self.u32(9);
                return self.array(v, MAX_DEPTH);
            }
            MetaValue::U64(v) => self.number(10, v.to_le_bytes()),
            MetaValue::I64(v) => self.number(11, v.to_le_bytes()),
            MetaValue::F64(v) => self.number(12, v.to_le_bytes()),
        }
        Ok(())
    }

    /// `depth` is how many arrays may be within each other from here on.
    fn array(&mut self, array: &MetaArray, depth: usize) -> Result<(), String> {
        if depth == 0 {
            return Err(format!("arrays within arrays, more than {MAX_DEPTH} deep"));
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
                self.u32(8);
                self.len(v.len());
                v.iter().for_each(|text| self.string(text));
            }
            MetaArray::Array(v) => {
                self.u32(9);
                self.len(v.len());
                return v.iter().try_for_each(|array| self.array(array, depth - 1));
            }
            MetaArray::U64(v) => self.numbers(10, v, u64::to_le_bytes),
            MetaArray::I64(v) => self.numbers(11, v, i64::to_le_bytes),
            MetaArray::F64(v) => self.numbers(12, v, f64::to_le_bytes),
        }
        Ok(())
    }

    fn numbers<T: Copy, const N: usize>(&mut self, kind: u32, v: &[T], bytes: fn(T) -> [u8; N]) {
        self.u32(kind);
        self.len(v.len());
        self.0.extend(v.iter().flat_map(|&v| bytes(v)));
    }

    fn tensor(&mut self, tensor: &GgufTensor, offset: u64) {
        self.string(&tensor.name);
        let dims = tensor.shape.dims();
        self.u32(dims.len() as u32);
        dims.iter().rev().for_each(|&dim| self.len(dim)); // the contiguous one first
        self.u32(tensor.stored.ggml_id());
        self.0.extend(offset.to_le_bytes());
    }
}
