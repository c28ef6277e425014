//! A GGUF writer for tests: piece by piece, so that every piece can be wrong.
#![allow(dead_code)] // each test binary uses a part

use throughline::format::{MetaArray, MetaValue, Stored};

/// Bytes of a file in the making.
#[derive(Clone, Debug, Default)]
pub struct Raw(pub Vec<u8>);

impl Raw {
    /// Magic, version and counts.
    pub fn header(version: u32, tensors: u64, entries: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(version).u64(tensors).u64(entries)
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend(bytes);
        self
    }

    pub fn u32(self, v: u32) -> Raw {
        self.bytes(&v.to_le_bytes())
    }

    pub fn u64(self, v: u64) -> Raw {
        self.bytes(&v.to_le_bytes())
    }

    /// A string: length and bytes, UTF-8 or not.
    pub fn text(self, text: impl AsRef<[u8]>) -> Raw {
        self.u64(text.as_ref().len() as u64).bytes(text.as_ref())
    }

    /// The entry of a tensor; dimensions as the file has them, the contiguous one first.
    pub fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        let start = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(start, |raw, &d| raw.u64(d)).u32(ty).u64(offset)
    }

    /// Zeros up to a multiple of `to`.
    pub fn pad(mut self, to: usize) -> Raw {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
        self
    }

    pub fn value(self, value: &MetaValue) -> Raw {
        match value {
            MetaValue::U8(v) => self.u32(0).bytes(&v.to_le_bytes()),
            MetaValue::I8(v) => self.u32(1).bytes(&v.to_le_bytes()),
            MetaValue::U16(v) => self.u32(2).bytes(&v.to_le_bytes()),
            MetaValue::I16(v) => self.u32(3).bytes(&v.to_le_bytes()),
            MetaValue::U32(v) => self.u32(4).u32(*v),
            MetaValue::I32(v) => self.u32(5).bytes(&v.to_le_bytes()),
            MetaValue::F32(v) => self.u32(6).bytes(&v.to_le_bytes()),
            MetaValue::Bool(v) => self.u32(7).bytes(&[u8::from(*v)]),
            MetaValue::String(v) => self.u32(8).text(v),
            MetaValue::Array(v) => self.u32(9).array(v),
            MetaValue::U64(v) => self.u32(10).u64(*v),
            MetaValue::I64(v) => self.u32(11).bytes(&v.to_le_bytes()),
            MetaValue::F64(v) => self.u32(12).bytes(&v.to_le_bytes()),
        }
    }

    fn array(self, array: &MetaArray) -> Raw {
        fn numbers<T: Copy, const N: usize>(raw: Raw, kind: u32, v: &[T], bytes: fn(T) -> [u8; N]) -> Raw {
            v.iter().fold(raw.u32(kind).u64(v.len() as u64), |raw, &v| raw.bytes(&bytes(v)))
        }
        match array {
            MetaArray::U8(v) => numbers(self, 0, v, u8::to_le_bytes),
            MetaArray::I8(v) => numbers(self, 1, v, i8::to_le_bytes),
            MetaArray::U16(v) => numbers(self, 2, v, u16::to_le_bytes),
            MetaArray::I16(v) => numbers(self, 3, v, i16::to_le_bytes),
            MetaArray::U32(v) => numbers(self, 4, v, u32::to_le_bytes),
            MetaArray::I32(v) => numbers(self, 5, v, i32::to_le_bytes),
            MetaArray::F32(v) => numbers(self, 6, v, f32::to_le_bytes),
            MetaArray::Bool(v) => numbers(self, 7, v, |v| [u8::from(v)]),
            MetaArray::String(v) => v.iter().fold(self.u32(8).u64(v.len() as u64), |raw, v| raw.text(v)),
            MetaArray::Array(v) => v.iter().fold(self.u32(9).u64(v.len() as u64), |raw, v| raw.array(v)),
            MetaArray::U64(v) => numbers(self, 10, v, u64::to_le_bytes),
            MetaArray::I64(v) => numbers(self, 11, v, i64::to_le_bytes),
            MetaArray::F64(v) => numbers(self, 12, v, f64::to_le_bytes),
        }
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    pub name: String,
    pub stored: Stored,
    /// Row-major.
    pub dims: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A whole, valid file of version 3; `general.alignment`, if it is among the entries, is kept to.
pub fn gguf_file(entries: &[(String, MetaValue)], tensors: &[GgufTensor]) -> Vec<u8> {
    let alignment = entries.iter().find_map(|(key, value)| match value {
        MetaValue::U32(v) if key == "general.alignment" => Some(*v as usize),
        _ => None,
    });
    let alignment = alignment.unwrap_or(32);
    let mut raw = Raw::header(3, tensors.len() as u64, entries.len() as u64);
    for (key, value) in entries {
        raw = raw.text(key).value(value);
    }
    let mut data = Raw::default();
    for t in tensors {
        data = data.pad(alignment);
        let dims: Vec<u64> = t.dims.iter().rev().map(|&d| d as u64).collect();
        raw = raw.tensor(&t.name, &dims, t.stored.ggml_id(), data.0.len() as u64);
        data = data.bytes(&t.bytes);
    }
    raw.pad(alignment).bytes(&data.0).0
}
