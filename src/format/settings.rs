//! Settings in the JSON files beside a model's weights. They may hold anything: errors name the file and the key.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::json::{float, parse};
use super::safetensors::{MAX_CONFIG_BYTES, read_json};
use crate::error::{Error, Result, quoted};

/// Bounds from here on mean "no limit": `transformers` writes 1e30.
const NO_LIMIT: f64 = 1e9;

/// An object of a JSON file under typed accessors. They return `None` for a key that is not there, or is `null`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    path: String,
    /// What comes before the keys in messages: the objects that they are in.
    outer: String,
    object: Map<String, Json>,
}

impl Settings {
    /// Those of a file without any.
    pub fn empty(path: impl Into<String>) -> Settings {
        Settings { path: path.into(), ..Settings::default() }
    }

    /// Those of a file that has been parsed. `path` is for messages.
    pub fn of(path: impl Into<String>, json: Json) -> Result<Settings> {
        let path = path.into();
        match json {
            Json::Object(object) => Ok(Settings { path, outer: String::new(), object }),
            _ => Err(Error::format(path, "expected a JSON object")),
        }
    }

    /// Those of a file in memory, with what Python writes besides JSON: see [`parse`].
    pub fn parse(path: impl Into<String>, text: &[u8]) -> Result<Settings> {
        let path = path.into();
        let json = parse(text).map_err(|e| Error::format(&path, e))?;
        Settings::of(path, json)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Settings> {
        Settings::of(path.display().to_string(), read_json(path, MAX_CONFIG_BYTES)?)
    }

    /// Reads a file that need not be there.
    pub fn read_if_any(path: &Path) -> Result<Settings> {
        if path.exists() { Settings::read(path) } else { Ok(Settings::empty(path.display().to_string())) }
    }

    /// The file.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// An error that names file and key.
    pub fn bad(&self, key: &str, message: impl Display) -> Error {
        Error::format(&self.path, format!("{}{key}: {message}", self.outer))
    }

    /// The error for a value of another kind.
    pub fn unexpected(&self, key: &str, expected: &str, got: &Json) -> Error {
        self.bad(key, format!("expected {expected}, got {}", quoted(&got.to_string())))
    }

    pub fn missing(&self, key: &str) -> Error {
        self.bad(key, "is missing")
    }

    /// Keys and values, without those that are `null`.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Json)> {
        self.object.iter().map(|(key, value)| (key.as_str(), value)).filter(|(_, value)| !value.is_null())
    }

    /// The value of a key, of any kind.
    pub fn get(&self, key: &str) -> Option<&Json> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there as `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Json::is_null)
    }

    /// The value of a key, converted by `read`, which returns `None` for what it does not accept.
    pub fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Json) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).ok_or_else(|| self.unexpected(key, expected, value)).map(Some)
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Json::as_bool)
    }

    /// A count or a size.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer of at least 0", |value| match (value.as_u64(), value.as_f64()) {
            (Some(n), _) => usize::try_from(n).ok(),
            // Some writers have floats for whole numbers.
            (None, Some(x)) if x >= 0.0 && x.fract() == 0.0 && x < 9e15 => Some(x as usize),
            _ => None,
        })
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a number", |value| float(value).map(|x| x as f32))
    }

    /// A bound such as `model_max_length`; `usize::MAX` if it is so large that it means none.
    pub fn limit(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a number of at least 1", |value| match float(value)? {
            x if x >= NO_LIMIT => Some(usize::MAX),
            x if x >= 1.0 => Some(x as usize),
            _ => None,
        })
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Json::as_str)
    }

    /// A list of strings.
    pub fn strs(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of strings", |value| value.as_array()?.iter().map(Json::as_str).collect())
    }

    /// The object under a key. An empty one counts as missing, as in Python.
    pub fn object(&self, key: &str) -> Result<Option<Settings>> {
        let object = self.typed(key, "an object", Json::as_object)?.filter(|object| !object.is_empty());
        let outer = format!("{}{key}.", self.outer);
        Ok(object.map(|object| Settings { path: self.path.clone(), outer, object: object.clone() }))
    }

    /// Returns an error if the setting is there with another value than `expected`.
    pub fn only_bool(&self, key: &str, expected: bool) -> Result<()> {
        match self.bool(key)? {
            Some(got) if got != expected => Err(self.bad(key, format!("expected {expected}, got {got}"))),
            _ => Ok(()),
        }
    }

    /// [`only_bool`](Self::only_bool) for a name.
    pub fn only_str(&self, key: &str, expected: &str) -> Result<()> {
        match self.str(key)? {
            Some(got) if got != expected => {
                Err(self.bad(key, format!("expected {}, got {}", quoted(expected), quoted(got))))
            }
            _ => Ok(()),
        }
    }
}
