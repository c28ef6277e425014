//! The header of a GGUF file, versions 2 and 3.
//!
//! A file consists of `GGUF`, a version, the counts of tensors and metadata entries, the entries, the tensors' names,
//! dimensions, types and offsets, and then their data from the next multiple of the alignment. Everything is
//! little-endian; the contiguous dimension comes first. Source: the GGUF specification, `docs/gguf.md` in
//! <https://github.com/ggml-org/ggml>.

use std::cell::Cell;
use std::fmt::Display;

use super::header::{Header, TensorInfo};
use super::metadata::{MetaArray, MetaValue, Metadata};
use super::quant::Stored;
use crate::error::{Error, Result, quoted};
use crate::tensor::Shape;

/// The first bytes of a GGUF file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";

/// Largest rank of a tensor in ggml.
pub(super) const MAX_DIMS: u32 = 4;

/// Longest key and tensor name in bytes: the specification's limit for keys. (For tensor names it says 64 bytes, but
/// not all writers keep to that.)
pub(super) const MAX_NAME: u64 = 65535;

/// Nested arrays are read to this depth. No known writer nests them.
pub(super) const MAX_DEPTH: usize = 8;

/// Size of the smallest possible entry. A count that the rest of the file cannot hold is rejected.
const MIN_ENTRY_BYTES: usize = 8 + 1 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 1 + 4 + 4 + 8;

/// Reads and checks the header of a GGUF file.
///
/// Use it to inspect or validate a file that is in memory already; [`Weights`](super::Weights) opens files from disk.
/// `path` is for messages. `file` is the whole file, so that the range of every tensor is known to lie within it. Takes
/// memory proportional to the header.
///
/// # Errors
///
/// The error names file, field or tensor, and what was expected.
pub fn gguf_header(path: &str, file: &[u8]) -> Result<Header> {
    read_header(Reader { path, file, len: file.len(), at: 0, short: &Cell::new(false) })
}

/// The header of a file of `len` bytes that starts so; `None` if more of the file is needed to tell.
pub(super) fn header_of_start(path: &str, start: &[u8], len: usize) -> Option<Result<Header>> {
    let short = Cell::new(false);
    let header = read_header(Reader { path, file: start, len, at: 0, short: &short });
    (!short.get()).then_some(header)
}

fn read_header(mut r: Reader<'_>) -> Result<Header> {
    let path = r.path;
    if r.take(4, "magic")? != MAGIC {
        return Err(r.bad("magic", "expected `GGUF`"));
    }
    let version = r.u32("version")?;
    if !(2..=3).contains(&version) {
        let why = if version.swap_bytes() <= 3 { " (a big-endian file)" } else { "" };
        return Err(r.bad("version", format!("{version}{why}; this crate reads little-endian 2 and 3")));
    }
    let tensor_count = r.u64("tensor count")?;
    let entry_count = r.u64("metadata count")?;
    let entry_count = r.count(entry_count, MIN_ENTRY_BYTES, "metadata count")?;
    r.count(tensor_count, MIN_TENSOR_BYTES, "tensor count")?;
    let mut metadata = Metadata::new(path);
    for i in 0..entry_count {
        let key = r.name(&format!("key of metadata entry {i}"))?;
        let field = format!("metadata {}", quoted(&key));
        let kind = r.u32(&field)?;
        let value = r.value(kind, &field)?;
        metadata.insert(key, value)?;
    }
    let alignment = alignment(path, &metadata)?;
    let tensor_count = r.count(tensor_count, MIN_TENSOR_BYTES, "tensor count")?;
    let mut entries = vec![];
    for i in 0..tensor_count {
        entries.push(r.tensor(i)?);
    }
    let data = r.at.checked_next_multiple_of(alignment);
    let data = data.ok_or_else(|| r.bad("general.alignment", "too large"))?;
    let mut header = Header { metadata, tensors: vec![], unread: vec![] };
    for entry in entries {
        match entry.stored() {
            Some(stored) => header.tensors.push(entry.locate(stored, path, r.len, data, alignment)?),
            None => header.unread.push(entry.unread()),
        }
    }
    header.check_names(path)?;
    header.check_overlaps(path)?;
    Ok(header)
}

/// `general.alignment`, or the default of 32.
pub(super) fn alignment(path: &str, metadata: &Metadata) -> Result<usize> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(32),
        Some(v) => {
            let bad = || Error::format(path, format!("metadata `{KEY}`: expected a power of two, got {}", v.summary()));
            metadata.usize(KEY).ok().filter(|v| v.is_power_of_two()).ok_or_else(bad)
        }
    }
}

/// A tensor as listed in the header; its offset is not checked yet.
struct TensorEntry {
    name: String,
    /// Number of the type.
    id: u32,
    /// Row-major.
    dims: Vec<usize>,
    offset: u64,
}

impl TensorEntry {
    /// The format of the elements, if this crate reads it and there are any.
    fn stored(&self) -> Option<Stored> {
        Stored::from_ggml_id(self.id).filter(|_| !self.dims.contains(&0))
    }

    /// What [`Header::unread`] lists.
    fn unread(self) -> (String, String) {
        let ty = format!("{} {:?}", type_name(self.id), self.dims);
        (self.name, ty)
    }

    /// The place of the tensor in the file. `data` is the start of the data section.
    fn locate(self, stored: Stored, path: &str, len: usize, data: usize, alignment: usize) -> Result<TensorInfo> {
        let TensorEntry { name, dims, offset, .. } = self;
        let shape = Shape::from(dims);
        let bad = |message: String| Error::format(path, format!("tensor {}: {message}", quoted(&name)));
        let Some(bytes) = stored.bytes_of(shape.dims()) else {
            let cols = shape.cols();
            return Err(match cols.is_multiple_of(stored.block_len()) {
                true => bad(format!("{stored}{shape} has more bytes than can be counted")),
                false => bad(format!("rows of {cols} are not whole blocks of {} ({stored})", stored.block_len())),
            });
        };
        let start = usize::try_from(offset).ok().filter(|o| o.is_multiple_of(alignment));
        let start = start.ok_or_else(|| bad(format!("offset {offset} is not a multiple of {alignment}")))?;
        let range = data.checked_add(start).and_then(|start| Some(start..start.checked_add(bytes)?));
        match range.filter(|r| r.end <= len) {
            Some(range) => Ok(TensorInfo { name, stored, shape, range }),
            None => {
                Err(bad(format!("{stored}{shape} takes {bytes} bytes from {data} + {offset}, but the file has {len}")))
            }
        }
    }
}

/// The name of a type of tensors (`ggml_type` in `ggml.h`), whether this crate reads it or not.
fn type_name(id: u32) -> String {
    const OTHERS: [(u32, &str); 24] = [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
        (41, "Q1_0"),
        (42, "Q2_0"),
    ];
    let other = OTHERS.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
    let name = Stored::from_ggml_id(id).map(Stored::name).or(other);
    name.map_or_else(|| format!("of the unknown type {id}"), String::from)
}

/// A cursor over the file. Every read names the field that it reads, for errors.
struct Reader<'a> {
    path: &'a str,
    /// The start of the file, or all of it.
    file: &'a [u8],
    /// Bytes of the file.
    len: usize,
    at: usize,
    /// Set when it needs more of the file than it has.
    short: &'a Cell<bool>,
}

impl<'a> Reader<'a> {
    fn bad(&self, field: &str, message: impl Display) -> Error {
        Error::format(self.path, format!("{field}: {message}"))
    }

    fn left(&self) -> usize {
        self.len - self.at
    }

    fn take(&mut self, bytes: usize, field: &str) -> Result<&'a [u8]> {
        let Some((taken, _)) = self.file[self.at..].split_at_checked(bytes) else {
            let (at, left) = (self.at, self.left());
            self.short.set(self.short.get() || bytes <= left);
            return Err(self.bad(field, format!("needs {bytes} bytes from {at}, but the file has {left} more")));
        };
        self.at += bytes;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, field)?);
        Ok(bytes)
    }

    fn u32(&mut self, field: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A count of things of at least this many bytes each, if the rest of the file can hold them.
    fn count(&self, count: u64, least_bytes: usize, field: &str) -> Result<usize> {
        let left = self.left();
        let fits = usize::try_from(count).ok().filter(|&n| n <= left / least_bytes);
        fits.ok_or_else(|| self.bad(field, format!("{count} do not fit the file's remaining {left} bytes")))
    }

    fn string(&mut self, field: &str) -> Result<String> {
        let len = self.u64(field)?;
        let len = self.count(len, 1, field)?;
        let text = std::str::from_utf8(self.take(len, field)?);
        text.map(str::to_owned).map_err(|e| self.bad(field, format!("not UTF-8: {e}")))
    }

    /// A key or the name of a tensor: a string that is neither empty nor very long.
    fn name(&mut self, field: &str) -> Result<String> {
        let len = self.u64(field)?;
        if !(1..=MAX_NAME).contains(&len) {
            return Err(self.bad(field, format!("has {len} bytes, expected 1 to {MAX_NAME}")));
        }
        let text = std::str::from_utf8(self.take(len as usize, field)?);
        text.map(str::to_owned).map_err(|e| self.bad(field, format!("not UTF-8: {e}")))
    }

    fn to_bool(&self, byte: u8, field: &str) -> Result<bool> {
        match byte {
            0 | 1 => Ok(byte == 1),
            _ => Err(self.bad(field, format!("a bool must be 0 or 1, but is {byte}"))),
        }
    }

    /// A metadata value of a type given by its number in the specification.
    fn value(&mut self, kind: u32, field: &str) -> Result<MetaValue> {
        Ok(match kind {
            0 => MetaValue::U8(u8::from_le_bytes(self.array(field)?)),
            1 => MetaValue::I8(i8::from_le_bytes(self.array(field)?)),
            2 => MetaValue::U16(u16::from_le_bytes(self.array(field)?)),
            3 => MetaValue::I16(i16::from_le_bytes(self.array(field)?)),
            4 => MetaValue::U32(self.u32(field)?),
            5 => MetaValue::I32(i32::from_le_bytes(self.array(field)?)),
            6 => MetaValue::F32(f32::from_le_bytes(self.array(field)?)),
            7 => {
                let [byte] = self.array(field)?;
                MetaValue::Bool(self.to_bool(byte, field)?)
            }
            8 => MetaValue::String(self.string(field)?),
            9 => MetaValue::Array(self.values(field, MAX_DEPTH)?),
            10 => MetaValue::U64(self.u64(field)?),
            11 => MetaValue::I64(i64::from_le_bytes(self.array(field)?)),
            12 => MetaValue::F64(f64::from_le_bytes(self.array(field)?)),
            _ => return Err(self.bad(field, format!("unknown type {kind}; the specification has 0 to 12"))),
        })
    }

    /// An array value: element type, count, elements.
    fn values(&mut self, field: &str, depth: usize) -> Result<MetaArray> {
        if depth == 0 {
            return Err(self.bad(field, format!("arrays are nested more than {MAX_DEPTH} deep")));
        }
        let kind = self.u32(field)?;
        let count = self.u64(field)?;
        Ok(match kind {
            0 => MetaArray::U8(self.numbers(count, u8::from_le_bytes, field)?),
            1 => MetaArray::I8(self.numbers(count, i8::from_le_bytes, field)?),
            2 => MetaArray::U16(self.numbers(count, u16::from_le_bytes, field)?),
            3 => MetaArray::I16(self.numbers(count, i16::from_le_bytes, field)?),
            4 => MetaArray::U32(self.numbers(count, u32::from_le_bytes, field)?),
            5 => MetaArray::I32(self.numbers(count, i32::from_le_bytes, field)?),
            6 => MetaArray::F32(self.numbers(count, f32::from_le_bytes, field)?),
            7 => {
                let bytes = self.numbers(count, u8::from_le_bytes, field)?;
                MetaArray::Bool(bytes.into_iter().map(|b| self.to_bool(b, field)).collect::<Result<_>>()?)
            }
            8 => MetaArray::String(self.each(count, 8, field, |r| r.string(field))?),
            9 => MetaArray::Array(self.each(count, 12, field, |r| r.values(field, depth - 1))?),
            10 => MetaArray::U64(self.numbers(count, u64::from_le_bytes, field)?),
            11 => MetaArray::I64(self.numbers(count, i64::from_le_bytes, field)?),
            12 => MetaArray::F64(self.numbers(count, f64::from_le_bytes, field)?),
            _ => return Err(self.bad(field, format!("unknown element type {kind}; the specification has 0 to 12"))),
        })
    }

    fn numbers<T, const N: usize>(&mut self, count: u64, read: fn([u8; N]) -> T, field: &str) -> Result<Vec<T>> {
        let count = self.count(count, N, field)?;
        let bytes = self.take(count * N, field)?;
        Ok(bytes.as_chunks().0.iter().map(|&b| read(b)).collect())
    }

    /// Elements of varying size. Memory grows with the elements that are present, not with the count.
    fn each<T>(
        &mut self,
        count: u64,
        least_bytes: usize,
        field: &str,
        read: impl Fn(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.count(count, least_bytes, field)?;
        let mut out = vec![];
        for _ in 0..count {
            out.push(read(self)?);
        }
        Ok(out)
    }

    /// The entry of one tensor.
    fn tensor(&mut self, index: usize) -> Result<TensorEntry> {
        let name = self.name(&format!("name of tensor {index}"))?;
        let field = format!("tensor {}", quoted(&name));
        let rank = self.u32(&field)?;
        if rank > MAX_DIMS {
            return Err(self.bad(&field, format!("has {rank} dimensions, expected {MAX_DIMS} at most")));
        }
        let mut dims = vec![];
        for _ in 0..rank {
            let dim = self.u64(&field)?;
            let fits = usize::try_from(dim).ok().filter(|&d| isize::try_from(d).is_ok());
            dims.push(fits.ok_or_else(|| self.bad(&field, format!("a dimension is {dim}")))?);
        }
        if dims.is_empty() {
            dims.push(1); // a scalar
        }
        dims.reverse(); // the contiguous dimension is first in the file and last here
        Ok(TensorEntry { name, id: self.u32(&field)?, dims, offset: self.u64(&field)? })
    }
}
