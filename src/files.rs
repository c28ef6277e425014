//! This crate's own files: written whole or not at all.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file so that no partial file ever appears at its path.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        // Report the first error. A leftover temporary file does no harm.
        let _ = fs::remove_file(&temporary);
        Error::io(path)(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_no_trace() {
        let dir = std::env::temp_dir().join(format!("throughline-{}", std::process::id()));
        let target = dir.join("taken");
        // A folder that is not empty cannot be replaced by a file.
        fs::create_dir_all(target.join("inside")).unwrap();
        let err = write_atomically(&target, b"new").unwrap_err().to_string();
        assert!(err.contains("taken"), "{err}");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "a temporary file is left");
        assert!(target.join("inside").is_dir());
        fs::remove_dir_all(dir).unwrap();
    }
}
