//! safetensors: the header of a file, folders of a model, and writing.
//!
//! A file consists of the header's length (u64, little-endian), the header (a JSON object: types, shapes and ranges by
//! name, and strings under `__metadata__`), and the data, without gaps. Types and writing come from the `safetensors`
//! crate. The header is parsed here, because that crate's reader silently takes the last of two tensors with one name
//! and does not name the tensor that is wrong. Source: the format's description in
//! <https://github.com/huggingface/safetensors>.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use ::safetensors::tensor::{Dtype, View};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IntoDeserializer, MapAccess, Visitor};

use super::file::Bytes;
use super::header::{Header, MAX_RANK, TensorInfo};
use super::json;
use super::metadata::{MetaValue, Metadata};
use super::quant::{self, Stored};
use crate::error::{Error, Result, quoted};
use crate::files::write_atomically;
use crate::tensor::Shape;

/// Longest header that is read, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Longest JSON file next to the weights that is read.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A JSON object's entries in file order; the same key twice is an error.
pub(crate) struct Entries<T>(pub(crate) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByKey<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ByKey<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut seen = BTreeSet::new();
                let mut entries = vec![];
                while let Some(key) = map.next_key::<String>()? {
                    let shown = quoted(&key);
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("{shown} is there twice")));
                    }
                    let value = map.next_value().map_err(|e| A::Error::custom(format!("{shown}: {e}")))?;
                    entries.push((key, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(ByKey(std::marker::PhantomData))
    }
}

/// A tensor's entry. The type is a string, so that one of a type that nobody here knows hides no other tensor.
#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl RawInfo {
    /// The type, if the format's description has it.
    fn dtype(&self) -> Option<Dtype> {
        let name: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
            self.dtype.as_str().into_deserializer();
        Dtype::deserialize(name).ok()
    }

    /// Type and shape, for listings.
    fn summary(&self) -> String {
        match self.dtype() {
            Some(dtype) => format!("{dtype} {:?}", self.shape),
            None => format!("of the unknown type {} {:?}", quoted(&self.dtype), self.shape),
        }
    }
}

/// The header's JSON: tensors in the order in which it lists them.
struct RawHeader {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawInfo)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByName;
        impl<'de> Visitor<'de> for ByName {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let (mut metadata, mut tensors) = (None, vec![]);
                while let Some(name) = map.next_key::<String>()? {
                    let named = |e| A::Error::custom(format!("{}: {e}", quoted(&name)));
                    if name == "__metadata__" && metadata.is_some() {
                        return Err(named(A::Error::custom("is there twice")));
                    } else if name == "__metadata__" {
                        metadata = Some(map.next_value::<Entries<String>>().map_err(named)?.0);
                    } else {
                        let info = map.next_value().map_err(named)?;
                        tensors.push((name, info));
                    }
                }
                Ok(RawHeader { metadata: metadata.unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(ByName)
    }
}

/// Reads and checks the header of a safetensors file.
///
/// Use it to inspect or validate a file that is in memory already; [`Weights`](super::Weights) opens files from disk.
/// `path` is for messages. `file` is the whole file, so that the range of every tensor is known to lie within it. Takes
/// memory proportional to the header. Tensors of types other than F32, F16 and BF16 (such as integer buffers), and
/// tensors without elements, are listed in [`Header::unread`].
///
/// # Errors
///
/// The error names file, field or tensor, and what was expected.
pub fn safetensors_header(path: &str, file: &[u8]) -> Result<Header> {
    let json = json_of(path, file, file.len())?;
    header_of_json(path, &file[json.clone()], json.start, file.len())
}

/// Where the JSON of a file's header is, by the first 8 bytes of the file's `len`.
pub(super) fn json_of(path: &str, start: &[u8], len: usize) -> Result<Range<usize>> {
    let Some((json_len, _)) = start.split_first_chunk::<8>() else {
        return Err(Error::format(path, format!("header length: needs 8 bytes, but the file has {len}")));
    };
    let json_len = u64::from_le_bytes(*json_len);
    let left = len - 8;
    if json_len > MAX_HEADER_BYTES.min(left as u64) {
        let limit = format!("the file has {left} more bytes and the format's limit is {MAX_HEADER_BYTES}");
        return Err(Error::format(path, format!("header length: {json_len}, but {limit}")));
    }
    Ok(8..8 + json_len as usize)
}

/// The header that this JSON is, which starts at byte `at` of a file of `len`.
pub(super) fn header_of_json(path: &str, json: &[u8], at: usize, len: usize) -> Result<Header> {
    let data_start = at + json.len();
    let data_len = len - data_start;
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| Error::format(path, format!("header: {e}")))?;
    let mut metadata = Metadata::new(path);
    for (key, value) in raw.metadata {
        metadata.insert(key, MetaValue::String(value))?;
    }
    let mut header = Header { metadata, tensors: vec![], unread: vec![] };
    let mut tensors = raw.tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in tensors {
        check(&info, end, data_len).map_err(|why| Error::format(path, format!("tensor {}: {why}", quoted(&name))))?;
        end = info.data_offsets.1;
        let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
        match info.dtype().and_then(stored) {
            Some(stored) if !range.is_empty() => {
                header.tensors.push(TensorInfo { name, stored, shape: shape(info.shape), range });
            }
            _ => header.unread.push((name, info.summary())),
        }
    }
    if end != data_len {
        return Err(Error::format(
            path,
            format!("data_offsets: tensors end at {end}, but the file's data at {data_len}"),
        ));
    }
    header.check_names(path)?;
    Ok(header)
}

/// What is wrong with a tensor's entry, if the one before it ends at `end` of `data_len` bytes.
fn check(info: &RawInfo, end: usize, data_len: usize) -> Result<(), String> {
    if info.shape.len() > MAX_RANK {
        return Err(format!("shape has {} dimensions, expected {MAX_RANK} at most", info.shape.len()));
    }
    let (from, to) = info.data_offsets;
    if from != end || to < from || to > data_len {
        return Err(format!("data_offsets are [{from}, {to}], expected to start at {end} and end by {data_len}"));
    }
    let Some(dtype) = info.dtype() else { return Ok(()) };
    let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bits = elements.and_then(|n| n.checked_mul(dtype.bitsize()));
    let bytes = bits.filter(|b| b.is_multiple_of(8)).map(|b| b / 8);
    match bytes {
        Some(bytes) if bytes == to - from => Ok(()),
        Some(bytes) => {
            let shape = &info.shape;
            Err(format!("{dtype}{shape:?} takes {bytes} bytes, but data_offsets [{from}, {to}] hold {}", to - from))
        }
        None => Err(format!("{dtype}{:?} is not a size in bytes", info.shape)),
    }
}

fn stored(dtype: Dtype) -> Option<Stored> {
    match dtype {
        Dtype::F32 => Some(Stored::F32),
        Dtype::F16 => Some(Stored::F16),
        Dtype::BF16 => Some(Stored::BF16),
        _ => None,
    }
}

/// A scalar has no dimensions in the file; here it is `[1]`.
fn shape(dims: Vec<usize>) -> Shape {
    if dims.is_empty() { Shape::from([1]) } else { Shape::new(dims) }
}

/// The contents of a model's folder.
pub(super) struct Folder {
    /// Paths and bytes of the weight files, in order of their names.
    pub files: Vec<(String, Bytes)>,
    /// Which tensor is in which file, if the folder has an index and needs it.
    pub index: Vec<(String, String)>,
    /// `config.json`, if there is one.
    pub config: Option<serde_json::Value>,
}

/// Opens `model.safetensors`, or else the files that `model.safetensors.index.json` lists.
pub(super) fn open_folder(dir: &Path) -> Result<Folder> {
    let config = dir.join("config.json");
    let config = if config.exists() { Some(read_json(&config, MAX_CONFIG_BYTES)?) } else { None };
    let single = dir.join("model.safetensors");
    if single.exists() {
        let files = vec![(single.display().to_string(), Bytes::open(&single)?)];
        return Ok(Folder { files, index: vec![], config });
    }
    let index_path = dir.join("model.safetensors.index.json");
    if !index_path.exists() {
        let message = "has neither `model.safetensors` nor `model.safetensors.index.json`";
        return Err(Error::format(dir, format!("{message}{}", instead(dir))));
    }
    let index = safetensors_index(&index_path.display().to_string(), &read_file(&index_path, MAX_INDEX_BYTES)?)?;
    let mut files = vec![];
    for name in index.iter().map(|(_, file)| file).collect::<BTreeSet<_>>() {
        let path = dir.join(name);
        files.push((path.display().to_string(), Bytes::open(&path)?));
    }
    Ok(Folder { files, index, config })
}

/// What to do about a folder without weights, by the files that are there.
fn instead(dir: &Path) -> String {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.sort_unstable();
    let found = |part: fn(&str) -> bool| names.iter().find(|name| part(name));
    if let Some(name) = found(|name| name.ends_with(".gguf")) {
        return format!(". It has {}: open that file instead of the folder", quoted(name));
    }
    if let Some(name) = found(|name| name.starts_with("adapter_model.")) {
        return format!(". It has {}, an adapter: merge it into its model and save that", quoted(name));
    }
    if let Some(name) = found(|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        return format!(". It has {}, but not the index of these files: download that, too", quoted(name));
    }
    if let Some(name) = found(|name| name.ends_with(".safetensors")) {
        return format!(". It has {}, whose names of tensors may be others'", quoted(name));
    }
    match found(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth")) {
        Some(name) => format!(". It has {}: load it in PyTorch and save it as safetensors", quoted(name)),
        None => String::new(),
    }
}

/// Reads the index of a model in several safetensors files: pairs of a tensor's name and the name of its file.
///
/// Use it to see which files a model needs before they are there; [`Weights::open`](super::Weights::open) reads the
/// index of a folder itself. `path` is for messages, `json` the content of `model.safetensors.index.json`.
///
/// # Errors
///
/// If it is no index, names a tensor twice, or a file that is not in the folder of the index.
///
/// ```
/// use throughline::format::safetensors_index;
///
/// let json = r#"{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}"#;
/// let index = safetensors_index("model.safetensors.index.json", json.as_bytes())?;
/// assert_eq!(index[0].1, "model-00001-of-00002.safetensors");
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn safetensors_index(path: &str, json: &[u8]) -> Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Entries<String>,
    }
    let index: Index = json::parse(json).map_err(|e| Error::format(path, e))?;
    for (_, file) in &index.weight_map.0 {
        // A file of this very folder: an index must not point elsewhere.
        if file.contains(['/', '\\', ':']) || !file.ends_with(".safetensors") {
            let message = format!("weight_map: {} is not the name of a safetensors file", quoted(file));
            return Err(Error::format(path, message));
        }
    }
    Ok(index.weight_map.0)
}

/// Reads a JSON file of at most `limit` bytes, as Python writes it.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, limit: u64) -> Result<T> {
    json::parse(&read_file(path, limit)?).map_err(|e| Error::format(path, e))
}

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::format(path, "is not a regular file"));
    }
    let mut bytes = vec![];
    File::open(path).map_err(Error::io(path))?.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    match bytes.len() as u64 > limit {
        true => Err(Error::format(path, format!("is longer than {limit} bytes"))),
        false => Ok(bytes),
    }
}

/// A tensor to be written by [`save_safetensors`].
#[derive(Clone, Copy, Debug)]
pub struct SaveTensor<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Row-major dimensions.
    pub shape: &'a [usize],
    /// Its elements, row-major.
    pub values: &'a [f32],
    /// Format to store them in: `F32`, `F16` or `BF16`, rounded to nearest even.
    pub stored: Stored,
}

/// Converted while it is written, so that only one tensor at a time is in memory twice.
impl View for SaveTensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.stored {
            Stored::F16 => Dtype::F16,
            Stored::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // This cannot fail any more: `save_safetensors` has checked the type.
        quant::quantize(self.stored, self.values).unwrap_or_default().into()
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.stored.block_bytes()
    }
}

/// Writes tensors to a safetensors file, which PyTorch and others load under the same names.
///
/// Use it for your own tensors; [`model::save`](crate::model::save) writes a whole model. The file is built in host
/// memory and then put in place atomically: `path` holds either the old file or the new one, never a part. `metadata`
/// goes under `__metadata__`, with `format: pt` added unless it sets `format`, since some loaders insist on that. Its
/// entries are written in no particular order.
///
/// # Errors
///
/// The error names the tensor whose name is taken, whose shape does not match its values, whose type safetensors lacks,
/// or that has finite values which its type cannot hold.
///
/// ```
/// use throughline::format::{SaveTensor, Stored, Weights, save_safetensors};
///
/// let path = std::env::temp_dir().join(format!("doc-{}.safetensors", std::process::id()));
/// let table = SaveTensor { name: "wte.weight", shape: &[2, 3], values: &[0.5; 6], stored: Stored::BF16 };
/// save_safetensors(&path, &[table], &Default::default())?;
///
/// let weights = Weights::open(&path)?;
/// let table = weights.get("wte.weight")?.of_shape([2, 3])?;
/// assert_eq!(table.stored(), Stored::BF16);
/// assert_eq!(table.values()?, [0.5; 6]);
/// # drop(weights);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn save_safetensors(path: &Path, tensors: &[SaveTensor<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut names = BTreeSet::from(["__metadata__"]);
    for t in tensors {
        let err = |expected: &str, got: String| Err(Error::data(t.name, expected, got));
        if !names.insert(t.name) {
            return err("a name of its own", "one that is taken".into());
        }
        if t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(t.values.len()) {
            return err("as many values as the shape has", format!("{} for {:?}", t.values.len(), t.shape));
        }
        let largest = match t.stored {
            Stored::F32 => f32::MAX,
            Stored::F16 => half::f16::MAX.to_f32(),
            Stored::BF16 => half::bf16::MAX.to_f32(),
            other => return err("F32, F16 or BF16", other.to_string()),
        };
        if let Some(v) = t.values.iter().find(|v| v.is_finite() && v.abs() > largest) {
            return err(&format!("values of {}, at most {largest}", t.stored), v.to_string());
        }
    }
    let mut entries: HashMap<_, _> = metadata.clone().into_iter().collect();
    entries.entry("format".into()).or_insert_with(|| "pt".into());
    let bytes = ::safetensors::serialize(tensors.iter().map(|t| (t.name, *t)), Some(entries));
    let bytes = bytes.map_err(|e| Error::format(path, e))?;
    write_atomically(path, &bytes)
}
