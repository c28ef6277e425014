//! The bytes of a model's file: read where they are asked for, or in memory already.

use std::borrow::Cow;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// A whole file, of which only what is asked for is in host memory: a tensor at a time while a model is loaded.
///
/// It is not mapped. Another program may write to a file or cut it short at any time, and no check rules that out:
/// undefined behaviour under a mapping, where a read gives other numbers or an error.
#[derive(Debug)]
pub(super) enum Bytes {
    /// A regular file, of this length when it was opened.
    File(Mutex<fs::File>, usize),
    Owned(Vec<u8>),
}

impl Bytes {
    /// Opens a regular file; anything else (a folder, a pipe, a device) is an `Err`.
    pub fn open(path: &Path) -> Result<Bytes> {
        // Before it is opened: to open a pipe is to wait for a writer.
        let metadata = fs::metadata(path).map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let len = usize::try_from(metadata.len()).map_err(|_| Error::format(path, "is too large for this machine"))?;
        Ok(Bytes::File(Mutex::new(fs::File::open(path).map_err(Error::io(path))?), len))
    }

    pub fn len(&self) -> usize {
        match self {
            Bytes::File(_, len) => *len,
            Bytes::Owned(bytes) => bytes.len(),
        }
    }

    /// A part of it; `path` is for messages. An `Err` if there is no such part, or not any more.
    pub fn read(&self, path: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self {
            Bytes::Owned(bytes) => {
                let part =
                    bytes.get(range.clone()).ok_or_else(|| Error::format(path, format!("has no bytes {range:?}")))?;
                Ok(Cow::Borrowed(part))
            }
            Bytes::File(file, _) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let mut part = vec![0; range.len()];
                let read = file.seek(SeekFrom::Start(range.start as u64)).and_then(|_| file.read_exact(&mut part));
                read.map_err(Error::io(Path::new(path)))?;
                Ok(Cow::Owned(part))
            }
        }
    }
}
