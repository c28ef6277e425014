//! The bytes of a file: mapped read-only, or owned.

use std::fs;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A whole file. Weights are borrowed from here, so there is one copy of them in host memory, and
/// with a mapping only of the pages that are read.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Maps a regular file; anything else (a folder, a pipe, a device) is an `Err`.
pub(super) fn map(path: &Path) -> Result<Bytes> {
    // Before it is opened: to open a pipe is to wait for a writer.
    if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::format(path, "is not a regular file"));
    }
    let file = fs::File::open(path).map_err(Error::io(path))?;
    // SAFETY: the mapping is read-only, private to this crate and handed out only as `&[u8]` that
    // cannot outlive it. What no program can rule out is that another one writes to the file or cuts
    // it short meanwhile, as with every mapped file; the docs of `Weights::open` ask callers not to.
    // Files written by this crate are replaced by a rename, which leaves mappings of old ones alone.
    let map = unsafe { Mmap::map(&file) };
    Ok(Bytes::Mapped(map.map_err(Error::io(path))?))
}
