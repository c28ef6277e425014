//! The files that a tokenizer may be spread over, in a folder or in memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result, quoted};
use crate::format::{MAX_CONFIG_BYTES, float, parse_json, read_file};

/// Numbers from here on mean "no limit": `transformers` writes 1e30.
const NO_LIMIT: f64 = 1e9;

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
}

/// A JSON file of settings; empty if there is no such file.
pub(super) struct Config {
    path: String,
    values: Map<String, Value>,
}

impl Config {
    pub fn read(files: &Files<'_>, name: &str) -> Result<Config> {
        let values = files.json(name, MAX_CONFIG_BYTES)?.unwrap_or_default();
        Ok(Config { path: files.path_of(name), values })
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn bad(&self, key: &str, what: &str) -> Error {
        Error::format(&self.path, format!("{key}: {what}"))
    }

    fn expected(&self, key: &str, what: &str, got: &Value) -> Error {
        self.bad(key, &format!("expected {what}, got {}", quoted(&got.to_string())))
    }

    /// The value of a key; `None` also for `null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A name, if it is one.
    pub fn name(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.expected(key, "true or false", value))
    }

    /// A special token: its text, or an object with its text and how it is found.
    pub fn token(&self, key: &str) -> Result<Option<AddedToken>> {
        self.get(key).map(|value| self.token_of(key, value, true)).transpose()
    }

    /// A list of special tokens, or an object that gives each a name.
    pub fn tokens(&self, key: &str) -> Result<Vec<AddedToken>> {
        let values: Vec<&Value> = match self.get(key) {
            None => return Ok(vec![]),
            Some(Value::Array(values)) => values.iter().collect(),
            Some(Value::Object(named)) => named.values().collect(),
            Some(other) => return Err(self.expected(key, "a list of tokens", other)),
        };
        values.into_iter().map(|value| self.token_of(key, value, true)).collect()
    }

    /// The tokens of `added_tokens_decoder` with their ids, in ascending order, if there is such a key.
    pub fn tokens_by_id(&self, key: &str) -> Result<Option<Vec<(u32, AddedToken)>>> {
        let entries = match self.get(key) {
            None => return Ok(None),
            Some(Value::Object(entries)) => entries,
            Some(other) => return Err(self.expected(key, "tokens by id", other)),
        };
        let token = |(id, value): (&String, &Value)| {
            let number = id.parse().map_err(|_| self.bad(key, &format!("expected ids, got {}", quoted(id))))?;
            Ok((number, self.token_of(key, value, false)?))
        };
        let mut tokens = entries.iter().map(token).collect::<Result<Vec<_>>>()?;
        tokens.sort_by_key(|(id, _)| *id);
        Ok(Some(tokens))
    }

    fn token_of(&self, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        let text = text.ok_or_else(|| self.expected(key, "a token", value))?;
        let flag = |name: &str| value.get(name).and_then(Value::as_bool);
        let token = AddedToken::from(text, special || flag("special") == Some(true));
        let normalized = flag("normalized").unwrap_or(token.normalized);
        Ok(token
            .normalized(normalized)
            .lstrip(flag("lstrip") == Some(true))
            .rstrip(flag("rstrip") == Some(true))
            .single_word(flag("single_word") == Some(true)))
    }

    /// Tokens with their ids, as `added_tokens.json` has them: the whole file.
    pub fn ids_by_token(&self) -> Result<Vec<(u32, &str)>> {
        let id = |(token, value): (&'_ String, &Value)| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(id),
            None => Err(self.expected(token, "an id", value)),
        };
        let mut ids = vec![];
        for (token, value) in &self.values {
            ids.push((id((token, value))?, token.as_str()));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Ids of tokens: a single one, or a list. Numbers that are no token's id are left out, as in `transformers`: many
    /// configurations have defaults that their vocabulary is too small for, or -1 for none.
    pub fn ids(&self, key: &str, is_token: impl Fn(u32) -> bool) -> Result<Vec<u32>> {
        let values = match self.get(key) {
            None => return Ok(vec![]),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        if let Some(other) = values.iter().find(|value| float(value).is_none() && !value.is_null()) {
            return Err(self.expected(key, "the id of a token", other));
        }
        let ids = values.iter().filter_map(|value| u32::try_from(value.as_u64()?).ok());
        Ok(ids.filter(|&id| is_token(id)).collect())
    }

    /// A number of tokens.
    pub fn limit(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match float(value) {
            Some(number) if number >= NO_LIMIT => Ok(None),
            Some(number) if number >= 1.0 => Ok(Some(number as usize)),
            _ => Err(self.expected(key, "a number of at least 1", value)),
        }
    }
}
