//! The files that a tokenizer may be spread over, in a folder or in memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::format::{MAX_CONFIG_BYTES, Settings, parse_json, read_file};

/// Files by name.
pub(super) struct Files<'a> {
    path: String,
    source: Source<'a>,
}

enum Source<'a> {
    Folder(&'a Path),
    Memory(HashMap<&'a str, &'a [u8]>),
}

impl<'a> Files<'a> {
    pub fn of_folder(folder: &'a Path) -> Self {
        Files { path: folder.display().to_string(), source: Source::Folder(folder) }
    }

    pub fn in_memory(path: &str, files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        Files { path: path.into(), source: Source::Memory(files.into_iter().collect()) }
    }

    /// Where the files are.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The path of one of them, for messages.
    pub fn path_of(&self, name: &str) -> String {
        Path::new(&self.path).join(name).display().to_string()
    }

    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Folder(folder) => folder.join(name).exists(),
            Source::Memory(files) => files.contains_key(name),
        }
    }

    /// A file of at most `limit` bytes, if it is there.
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Cow<'a, [u8]>>> {
        match &self.source {
            Source::Folder(_) if !self.has(name) => Ok(None),
            Source::Folder(folder) => Ok(Some(read_file(&folder.join(name), limit)?.into())),
            Source::Memory(files) => match files.get(name) {
                Some(file) if file.len() as u64 > limit => {
                    Err(Error::format(self.path_of(name), format!("is longer than {limit} bytes")))
                }
                file => Ok(file.map(|file| Cow::Borrowed(*file))),
            },
        }
    }

    /// A text file, if it is there.
    pub fn text(&self, name: &str, limit: u64) -> Result<Option<String>> {
        let Some(bytes) = self.read(name, limit)? else { return Ok(None) };
        let text = String::from_utf8(bytes.into_owned());
        text.map(Some).map_err(|e| Error::format(self.path_of(name), format!("expected UTF-8: {e}")))
    }

    /// A JSON file as Python writes it, if it is there.
    pub fn json<T: DeserializeOwned>(&self, name: &str, limit: u64) -> Result<Option<T>> {
        let Some(bytes) = self.read(name, limit)? else { return Ok(None) };
        parse_json(&bytes).map(Some).map_err(|e| Error::format(self.path_of(name), e))
    }

    /// A JSON file of settings; none if there is no such file.
    pub fn settings(&self, name: &str) -> Result<Settings> {
        let path = self.path_of(name);
        match self.read(name, MAX_CONFIG_BYTES)? {
            None => Ok(Settings::empty(path)),
            Some(bytes) => Settings::parse(path, &bytes),
        }
    }
}
