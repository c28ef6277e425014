//! Panics of the `tokenizers` crate as errors.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// Runs code of the `tokenizers` crate, which panics on some files that its reader accepts: a post-processor with a
/// token that it does not list, a pattern without text. No set of checks beforehand could cover all such files, so the
/// panic is caught. The panic hook of the process still reports it.
pub(super) fn guarded<T>(path: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    let done = done.unwrap_or_else(|_| Err("the parts of the file do not fit each other".into()));
    done.map_err(|e| Error::format(path, format!("tokenizer: {e}")))
}
