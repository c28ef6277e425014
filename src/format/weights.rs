//! The tensors of a model's files.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use super::file::Bytes;
use super::finite::first_bad_block;
use super::gguf;
use super::header::{Header, TensorInfo};
use super::json;
use super::metadata::Metadata;
use super::quant::{self, Stored};
use super::safetensors;
use crate::error::{Error, Result, quoted};
use crate::tensor::Shape;

/// A read-only view of a model's tensors in one or several files.
///
/// Open one to list, inspect or convert tensors. [`Model::weights`](crate::model::Model::weights) has that of a model.
pub struct Weights {
    path: String,
    files: Vec<(String, Bytes)>,
    /// Tensors, with the index of their file.
    tensors: Vec<(usize, TensorInfo)>,
    by_name: HashMap<String, usize>,
    unread: Vec<(String, String)>,
    /// Which tensor is in which file, by the folder's index.
    index: Vec<(String, String)>,
    metadata: Metadata,
    config: Option<serde_json::Value>,
}

impl Weights {
    /// Opens and checks a `.gguf` or `.safetensors` file (its first bytes decide, not its name) or a
    /// folder with `model.safetensors` or `model.safetensors.index.json`, and `config.json`.
    ///
    /// Headers are read now, tensors when they are asked for, and nothing of them is kept. If somebody writes to a file
    /// meanwhile, tensors have other values, or are an `Err`. (To replace a file by a rename changes nothing.)
    pub fn open(path: &Path) -> Result<Weights> {
        let shown = path.display().to_string();
        if !path.is_dir() {
            let files = vec![(shown.clone(), Bytes::open(path)?)];
            return Weights::new(shown, files, None);
        }
        let folder = safetensors::open_folder(path)?;
        // An index may name tensors that are in no file, such as a head that is the table of tokens.
        Ok(Weights { index: folder.index, ..Weights::new(shown, folder.files, folder.config)? })
    }

    /// The same for a file that is in memory already. `path` is its name in messages.
    pub fn from_bytes(path: &str, file: Vec<u8>) -> Result<Weights> {
        Weights::new(path.into(), vec![(path.into(), Bytes::Owned(file))], None)
    }

    /// The same weights with this `config.json`: for files in memory. [`open`](Self::open) reads a folder's itself.
    ///
    /// # Errors
    ///
    /// If it is no JSON. `NaN` and `Infinity`, which Python writes, are read.
    pub fn with_config(self, config: &[u8]) -> Result<Weights> {
        let config = json::parse(config).map_err(|e| Error::format(self.config_path(), e))?;
        Ok(Weights { config: Some(config), ..self })
    }

    fn new(path: String, files: Vec<(String, Bytes)>, config: Option<serde_json::Value>) -> Result<Weights> {
        let mut weights = Weights {
            metadata: Metadata::new(&path),
            path,
            files,
            tensors: vec![],
            by_name: HashMap::new(),
            unread: vec![],
            index: vec![],
            config,
        };
        for (i, (path, file)) in weights.files.iter().enumerate() {
            let header = header(path, file)?;
            if i == 0 {
                weights.metadata = header.metadata;
            }
            for info in header.tensors {
                if let Some(other) = weights.by_name.insert(info.name.clone(), weights.tensors.len()) {
                    let other = &weights.files[weights.tensors[other].0].0;
                    return Err(Error::format(path, format!("tensor {} is in {other} too", quoted(&info.name))));
                }
                weights.tensors.push((i, info));
            }
            weights.unread.extend(header.unread);
        }
        Ok(weights)
    }

    /// The path that was opened.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// All tensors, in file order.
    pub fn iter(&self) -> impl Iterator<Item = StoredTensor<'_>> {
        (0..self.len()).map(|i| self.at(i))
    }

    fn at(&self, index: usize) -> StoredTensor<'_> {
        let (file, info) = &self.tensors[index];
        let (path, file) = &self.files[*file];
        StoredTensor { path, info, file }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The tensor of this name. The error for an unknown name includes it and the file.
    pub fn get(&self, name: &str) -> Result<StoredTensor<'_>> {
        let found = self.by_name.get(name).map(|&i| self.at(i));
        found.ok_or_else(|| {
            let named = |pairs: &'_ [(String, String)]| pairs.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
            let why = match (named(&self.unread), named(&self.index)) {
                (Some(ty), _) => format!("is {ty}, which this crate does not read"),
                (None, Some(file)) => format!("is missing; by the index it is in {}", quoted(&file)),
                (None, None) => format!("is missing; there are {} others", self.len()),
            };
            Error::format(&self.path, format!("tensor {} {why}", quoted(name)))
        })
    }

    /// The names of all tensors, of those that are not read, too.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> + Clone {
        let read = self.tensors.iter().map(|(_, info)| info.name.as_str());
        read.chain(self.unread.iter().map(|(name, _)| name.as_str()))
    }

    /// Names, types and shapes of tensors in the files that are not read: of types that this crate lacks, such as
    /// integers, or without elements.
    pub fn unread(&self) -> &[(String, String)] {
        &self.unread
    }

    /// Metadata of the file, or of the first of several files.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The path of [`config`](Self::config), for messages.
    pub(crate) fn config_path(&self) -> String {
        format!("{}/config.json", self.path.trim_end_matches('/'))
    }

    /// The folder's `config.json`, or that of [`with_config`](Self::with_config); `None` for a single file. A number
    /// that JSON lacks is an object, `{"__float__": "Infinity"}`.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("path", &self.path).field("tensors", &self.len()).finish_non_exhaustive()
    }
}

/// Whether a file is a GGUF file: its first bytes say so, whatever its name is. An `Err` if it cannot be read.
///
/// Use it where a program takes files of several kinds. [`Weights::open`] tells them apart itself.
///
/// ```
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::qwen3();
/// assert!(!throughline::format::is_gguf(&folder.path().join("model.safetensors"))?);
/// assert!(!throughline::format::is_gguf(folder.path())?);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn is_gguf(path: &Path) -> Result<bool> {
    if path.is_dir() {
        return Ok(false);
    }
    let file = Bytes::open(path)?;
    let shown = path.display().to_string();
    Ok(file.len() >= gguf::MAGIC.len() && *file.read(&shown, 0..gguf::MAGIC.len())? == *gguf::MAGIC)
}

/// Reads the header of a file, whichever format it has.
fn header(path: &str, file: &Bytes) -> Result<Header> {
    let len = file.len();
    let mut start = file.read(path, 0..len.min(FIRST_READ))?;
    if start.starts_with(gguf::MAGIC) {
        // A GGUF header does not say how long it is.
        loop {
            if let Some(header) = gguf::header_of_start(path, &start, len) {
                return header;
            }
            start = file.read(path, 0..len.min(4 * start.len()))?;
        }
    }
    // A safetensors file has no magic number, but its JSON starts right after the length.
    if start.get(8).is_some_and(|&byte| byte != b'{') {
        return Err(Error::format(path, "magic: neither a GGUF file (`GGUF`) nor a safetensors file (`{` at byte 8)"));
    }
    let json = safetensors::json_of(path, &start, len)?;
    safetensors::header_of_json(path, &file.read(path, json.clone())?, json.start, len)
}

/// Bytes that are read of a file at first: more than most headers have without a tokenizer.
const FIRST_READ: usize = 1 << 18;

/// A tensor of [`Weights`]: its description, and its bytes.
#[derive(Clone, Copy)]
pub struct StoredTensor<'a> {
    path: &'a str,
    info: &'a TensorInfo,
    file: &'a Bytes,
}

impl<'a> StoredTensor<'a> {
    /// Name in the file.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Element type.
    pub fn stored(&self) -> Stored {
        self.info.stored
    }

    /// Dimensions, row-major; a scalar is `[1]`.
    pub fn shape(&self) -> &'a Shape {
        &self.info.shape
    }

    /// How many [`bytes`](Self::bytes) it has.
    pub fn byte_len(&self) -> usize {
        self.info.range.len()
    }

    /// The bytes as stored in the file, little-endian: [`Stored::bytes_of`] the shape. Not necessarily aligned.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        self.file.read(self.path, self.info.range.clone())
    }

    /// The same, if no element is NaN or infinite: see [`check_finite`](Self::check_finite).
    pub(crate) fn finite_bytes(&self) -> Result<Cow<'a, [u8]>> {
        let bytes = self.bytes()?;
        self.check_finite_in(&bytes)?;
        Ok(bytes)
    }

    fn bad(&self, message: String) -> Error {
        Error::format(self.path, format!("tensor {}: {message}", quoted(self.name())))
    }

    /// Returns this tensor if it has this shape, otherwise an error with both shapes.
    pub fn of_shape(self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        match *self.shape() == shape {
            true => Ok(self),
            false => Err(self.bad(format!("expected shape {shape}, got {}", self.shape()))),
        }
    }

    /// Returns this tensor if it is stored in one of these formats, otherwise an error with them and its own.
    pub fn stored_as(self, types: &[Stored]) -> Result<Self> {
        if types.contains(&self.stored()) {
            return Ok(self);
        }
        let names: Vec<_> = types.iter().map(|t| t.name()).collect();
        Err(self.bad(format!("expected {}, got {}", names.join(" or "), self.stored())))
    }

    /// All elements, decoded to f32.
    pub fn values(&self) -> Result<Vec<f32>> {
        quant::dequantize(self.stored(), &self.bytes()?)
    }

    /// Decodes the elements of one row to f32. Rows run along the last dimension; all others are flattened.
    pub fn read_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let rows = self.shape().rows();
        if row >= rows || out.len() != self.shape().cols() {
            let asked = format!("row {row} into {} elements", out.len());
            return Err(self.bad(format!("expected a row below {rows} of {}, got {asked}", self.shape())));
        }
        let row_bytes = self.info.range.len() / rows;
        let start = self.info.range.start + row * row_bytes;
        quant::dequantize_into(self.stored(), &self.file.read(self.path, start..start + row_bytes)?, out)
    }

    /// Returns an error that names the first element that is NaN or infinite. Reads the whole tensor.
    pub fn check_finite(&self) -> Result<()> {
        self.finite_bytes().map(drop)
    }

    fn check_finite_in(&self, bytes: &[u8]) -> Result<()> {
        let Some(block) = first_bad_block(self.stored(), bytes) else { return Ok(()) };
        let (len, size) = (self.stored().block_len(), self.stored().block_bytes());
        let values = quant::dequantize(self.stored(), &bytes[block * size..][..size])?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                let element = block * len + i;
                Err(self.bad(format!("element {element} is {}, expected finite values", values[i])))
            }
            None => Ok(()),
        }
    }

    /// Whether the elements of two tensors are the same numbers, looked at in pieces.
    pub(crate) fn same_elements(&self, other: &Self) -> Result<bool> {
        const PIECE: usize = 1 << 20;
        if self.shape() != other.shape() {
            return Ok(false);
        }
        if self.stored() != other.stored() {
            let cols = self.shape().cols();
            let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
            for row in 0..self.shape().rows() {
                self.read_row(row, &mut a)?;
                other.read_row(row, &mut b)?;
                if a != b {
                    return Ok(false);
                }
            }
            return Ok(true);
        }
        for start in (0..self.byte_len()).step_by(PIECE) {
            let piece = |tensor: &Self| {
                let from = tensor.info.range.start + start;
                tensor.file.read(tensor.path, from..tensor.info.range.end.min(from + PIECE))
            };
            if piece(self)? != piece(other)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl fmt::Debug for StoredTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}{}", self.name(), self.stored(), self.shape())
    }
}
