//! Metadata of a model file: keys with typed values, and accessors whose errors name the key.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::error::{Error, Result, quoted};

/// A metadata value, with the types of GGUF. The metadata of safetensors files is all [`String`](Self::String).
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say all
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(MetaArray),
}

/// An array whose elements have one type. The vectors are typed, so an array takes about as much memory as it takes in
/// the file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say all
pub enum MetaArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<MetaArray>),
}

impl MetaArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.kind().1
    }

    /// Whether the array is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type and number of elements.
    fn kind(&self) -> (&'static str, usize) {
        match self {
            MetaArray::U8(v) => ("u8", v.len()),
            MetaArray::I8(v) => ("i8", v.len()),
            MetaArray::U16(v) => ("u16", v.len()),
            MetaArray::I16(v) => ("i16", v.len()),
            MetaArray::U32(v) => ("u32", v.len()),
            MetaArray::I32(v) => ("i32", v.len()),
            MetaArray::U64(v) => ("u64", v.len()),
            MetaArray::I64(v) => ("i64", v.len()),
            MetaArray::F32(v) => ("f32", v.len()),
            MetaArray::F64(v) => ("f64", v.len()),
            MetaArray::Bool(v) => ("bool", v.len()),
            MetaArray::String(v) => ("string", v.len()),
            MetaArray::Array(v) => ("array", v.len()),
        }
    }
}

impl MetaValue {
    /// Type and value in short, for messages and listings: long strings and arrays are truncated.
    pub fn summary(&self) -> String {
        match self {
            MetaValue::U8(v) => format!("u8 {v}"),
            MetaValue::I8(v) => format!("i8 {v}"),
            MetaValue::U16(v) => format!("u16 {v}"),
            MetaValue::I16(v) => format!("i16 {v}"),
            MetaValue::U32(v) => format!("u32 {v}"),
            MetaValue::I32(v) => format!("i32 {v}"),
            MetaValue::U64(v) => format!("u64 {v}"),
            MetaValue::I64(v) => format!("i64 {v}"),
            MetaValue::F32(v) => format!("f32 {v}"),
            MetaValue::F64(v) => format!("f64 {v}"),
            MetaValue::Bool(v) => format!("bool {v}"),
            MetaValue::String(v) => format!("string {}", quoted(v)),
            MetaValue::Array(v) => format!("array of {} {}", v.len(), v.kind().0),
        }
    }

    fn as_i128(&self) -> Option<i128> {
        Some(match self {
            MetaValue::U8(v) => (*v).into(),
            MetaValue::I8(v) => (*v).into(),
            MetaValue::U16(v) => (*v).into(),
            MetaValue::I16(v) => (*v).into(),
            MetaValue::U32(v) => (*v).into(),
            MetaValue::I32(v) => (*v).into(),
            MetaValue::U64(v) => (*v).into(),
            MetaValue::I64(v) => (*v).into(),
            _ => return None,
        })
    }
}

macro_rules! from {
    ($($ty:ty => $variant:ident),*) => {$(
        impl From<$ty> for MetaValue {
            fn from(value: $ty) -> Self {
                MetaValue::$variant(value.into())
            }
        }
    )*};
}

from!(u32 => U32, i32 => I32, u64 => U64, f32 => F32, bool => Bool, String => String, &str => String);

impl From<MetaArray> for MetaValue {
    fn from(array: MetaArray) -> Self {
        MetaValue::Array(array)
    }
}

/// Keys and values in file order.
///
/// Prefer the typed accessors: their errors name file and key if the key is missing or has another type. They accept
/// integers of any width, since writers differ in that.
///
/// To write a file, start from an empty one or from a clone of another file's, and [`set`](Self::set) what is new.
///
/// ```
/// use throughline::format::Metadata;
///
/// let mut metadata = Metadata::default();
/// metadata.set("general.name", "harbour");
/// metadata.set("general.name", "harbour 2");
/// assert_eq!(metadata.str("general.name")?, "harbour 2");
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    path: String,
    entries: Vec<(String, MetaValue)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    pub(super) fn new(path: &str) -> Self {
        Metadata { path: path.into(), ..Default::default() }
    }

    /// Adds an entry. Returns an error if the key is taken.
    pub(super) fn insert(&mut self, key: String, value: MetaValue) -> Result<()> {
        match self.by_key.entry(key.clone()) {
            Entry::Occupied(_) => Err(Error::format(&self.path, format!("metadata {} is there twice", quoted(&key)))),
            Entry::Vacant(slot) => {
                slot.insert(self.entries.len());
                self.entries.push((key, value));
                Ok(())
            }
        }
    }

    /// Sets a key to a value, in its place if the key is there and at the end if not.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<MetaValue>) {
        let (key, value) = (key.into(), value.into());
        match self.by_key.get(&key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.by_key.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetaValue)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of a key, of any type.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.by_key.get(key).map(|&i| &self.entries[i].1)
    }

    /// Whether the key is present.
    pub fn contains(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// The value of a key, converted by `read`, which returns `None` for types that it does not accept.
    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a MetaValue) -> Option<T>) -> Result<T> {
        let key_shown = quoted(key);
        let value = self.get(key);
        let value =
            value.ok_or_else(|| Error::format(&self.path, format!("metadata {key_shown} is missing: {expected}")))?;
        read(value).ok_or_else(|| {
            Error::format(&self.path, format!("metadata {key_shown}: expected {expected}, got {}", value.summary()))
        })
    }

    /// An integer that fits `usize`: a count or a size.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.typed(key, "an integer of at least 0", |v| usize::try_from(v.as_i128()?).ok())
    }

    /// The result of `read` for a key, or `None` if the key is missing: for settings with a default.
    pub fn optional<'a, T>(&'a self, key: &str, read: impl Fn(&'a Self, &str) -> Result<T>) -> Result<Option<T>> {
        if self.contains(key) { read(self, key).map(Some) } else { Ok(None) }
    }

    /// A float, or an integer converted to one.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.typed(key, "a number", |v| match v {
            MetaValue::F32(v) => Some(*v),
            MetaValue::F64(v) => Some(*v as f32),
            other => other.as_i128().map(|v| v as f32),
        })
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "a bool", |v| match v {
            MetaValue::Bool(v) => Some(*v),
            _ => None,
        })
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.typed(key, "a string", |v| match v {
            MetaValue::String(v) => Some(v.as_str()),
            _ => None,
        })
    }

    /// An array of strings, such as `tokenizer.ggml.tokens`.
    pub fn strs(&self, key: &str) -> Result<&[String]> {
        self.typed(key, "an array of strings", |v| match v {
            MetaValue::Array(MetaArray::String(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of f32, such as `tokenizer.ggml.scores`.
    pub fn f32s(&self, key: &str) -> Result<&[f32]> {
        self.typed(key, "an array of f32", |v| match v {
            MetaValue::Array(MetaArray::F32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of integers that fit `i64`, such as `tokenizer.ggml.token_type`.
    pub fn ints(&self, key: &str) -> Result<Vec<i64>> {
        fn widen<T: Copy + Into<i64>>(v: &[T]) -> Option<Vec<i64>> {
            Some(v.iter().map(|&v| v.into()).collect())
        }
        self.typed(key, "an array of integers", |v| match v {
            MetaValue::Array(MetaArray::U8(v)) => widen(v),
            MetaValue::Array(MetaArray::I8(v)) => widen(v),
            MetaValue::Array(MetaArray::U16(v)) => widen(v),
            MetaValue::Array(MetaArray::I16(v)) => widen(v),
            MetaValue::Array(MetaArray::U32(v)) => widen(v),
            MetaValue::Array(MetaArray::I32(v)) => widen(v),
            MetaValue::Array(MetaArray::I64(v)) => Some(v.clone()),
            MetaValue::Array(MetaArray::U64(v)) => v.iter().map(|&v| v.try_into().ok()).collect(),
            _ => None,
        })
    }
}
