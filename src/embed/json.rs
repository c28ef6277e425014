//! JSON files of a folder.

use std::path::Path;

use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::format::{MAX_CONFIG_BYTES, Metadata, read_json};

/// Reads a file that holds a JSON object.
pub(super) fn read_object(path: &Path) -> Result<Json> {
    let json: Json = read_json(path, MAX_CONFIG_BYTES)?;
    match json.is_object() {
        true => Ok(json),
        false => Err(Error::format(path, "expected a JSON object")),
    }
}

/// Its values, with errors that name the file and the key.
pub(super) fn metadata(path: &Path, object: &Json) -> Result<Metadata> {
    Metadata::of_json(&path.display().to_string(), object)
}

/// The values of a file that need not be there.
pub(super) fn optional_metadata(path: &Path) -> Result<Metadata> {
    match path.exists() {
        true => metadata(path, &read_object(path)?),
        false => Ok(Metadata::default()),
    }
}
