//! Tokenizers of folders in the layout of model hubs: `tokenizer.json` and the files that come with it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{Tokenizer, TruncationDirection};

use super::chat::ChatTemplate;
use super::{ModelTokenizer, guarded};
use crate::error::{Error, Result, quoted};
use crate::format::{Entries, read_file, read_json};

/// Longest files that are read. The longest known `tokenizer.json` is 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Numbers from here on mean "no limit": `transformers` writes 1e30.
const NO_LIMIT: f64 = 1e9;

pub(super) fn open(folder: &Path) -> Result<ModelTokenizer> {
    let tokenizer = read_tokenizer(&folder.join("tokenizer.json"))?;
    let config = Config::read(folder, "tokenizer_config.json")?;
    let special = Config::read(folder, "special_tokens_map.json")?;
    let named = |key| Ok(config.token(key)?.or(special.token(key)?));
    let (bos, eos): (Option<String>, Option<String>) = (named("bos_token")?, named("eos_token")?);
    let mut stop = Config::read(folder, "generation_config.json")?.ids("eos_token_id", &tokenizer)?;
    if stop.is_empty() {
        stop = Config::read(folder, "config.json")?.ids("eos_token_id", &tokenizer)?;
    }
    stop.extend(eos.as_ref().and_then(|token| tokenizer.token_to_id(token)));
    let max_tokens = match Config::read(folder, "sentence_bert_config.json")?.limit("max_seq_length")? {
        Some(limit) => Some(limit),
        None => config.limit("model_max_length")?,
    };
    let chat = chat_template(folder, &config, bos, eos)?;
    // As in `transformers`, which writes both.
    let cut_start = match config.get("truncation_side").map(|side| side.as_str()) {
        None => tokenizer.get_truncation().is_some_and(|t| t.direction == TruncationDirection::Left),
        Some(Some("right")) => false,
        Some(Some("left")) => true,
        Some(_) => return Err(config.bad("truncation_side", "expected `left` or `right`")),
    };
    // Truncation and padding are for training and batches. Here a text keeps exactly its own tokens.
    let mut tokenizer = tokenizer;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| Error::format(folder, e))?;
    let path = folder.display().to_string();
    let opened = ModelTokenizer::new(tokenizer, &path, vec![], vec![], stop, max_tokens, chat);
    Ok(ModelTokenizer { cut_start, ..opened })
}

/// The parts of a `tokenizer.json` that are checked before the rest is read.
#[derive(Deserialize)]
struct Outline {
    model: Kind,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Kind {
    r#type: Option<String>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let text = read_file(path, MAX_TOKENIZER_BYTES)?;
    let outline: Outline = serde_json::from_slice(&text).map_err(|e| Error::format(path, e))?;
    if outline.model.r#type.as_deref() != Some("Unigram") {
        // All other models map tokens to ids. In a Unigram an id is an index into a list.
        let file: WithVocabulary = serde_json::from_slice(&text).map_err(|e| Error::format(path, e))?;
        file.model.check().map_err(|message| Error::format(path, message))?;
    }
    let tokenizer = guarded(&path.display().to_string(), || Tokenizer::from_bytes(&text))?;
    // The crate assigns the next free id if an added token's id does not fit, and only logs that.
    for Added { id, content } in &outline.added_tokens {
        let got = tokenizer.token_to_id(content);
        if got != Some(*id) {
            let what = format!("added_tokens: {} has id {id}, but by the vocabulary it is {got:?}", quoted(content));
            return Err(Error::format(path, what));
        }
    }
    Ok(tokenizer)
}

#[derive(Deserialize)]
struct WithVocabulary {
    model: Vocabulary,
}

#[derive(Deserialize)]
struct Vocabulary {
    vocab: Entries<u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Vocabulary {
    /// Checks what the crate would accept silently, or panic on.
    fn check(&self) -> Result<(), String> {
        let mut ids = HashMap::with_capacity(self.vocab.0.len());
        let mut tokens = HashMap::with_capacity(self.vocab.0.len());
        for (token, id) in &self.vocab.0 {
            tokens.insert(token.as_str(), *id);
            if let Some(other) = ids.insert(id, token) {
                return Err(format!("model.vocab: {} and {} both have id {id}", quoted(other), quoted(token)));
            }
        }
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or("");
        for (i, merge) in self.merges.iter().enumerate() {
            let (a, b) = match merge {
                Merge::Pair(a, b) => (a.as_str(), b.as_str()),
                Merge::Line(line) if line.starts_with("#version") => continue,
                Merge::Line(line) => line.split_once(' ').ok_or_else(|| {
                    format!("model.merges: merge {i}: expected two tokens with a space between, got {}", quoted(line))
                })?,
            };
            let rest = b.strip_prefix(prefix).ok_or_else(|| {
                format!("model.merges: merge {i}: {} does not start with {}", quoted(b), quoted(prefix))
            })?;
            let joined = [a, rest].concat();
            if let Some(missing) = [a, b, &joined].into_iter().find(|t| !tokens.contains_key(t)) {
                return Err(format!("model.merges: merge {i}: {} is no token", quoted(missing)));
            }
        }
        Ok(())
    }
}

/// A JSON file next to `tokenizer.json`; empty if there is no such file.
struct Config {
    path: String,
    values: serde_json::Map<String, Value>,
}

impl Config {
    fn read(folder: &Path, name: &str) -> Result<Config> {
        let path: PathBuf = folder.join(name);
        let values = if path.exists() { read_json(&path, MAX_CONFIG_BYTES)? } else { serde_json::Map::new() };
        Ok(Config { path: path.display().to_string(), values })
    }

    fn bad(&self, key: &str, what: &str) -> Error {
        Error::format(&self.path, format!("{key}: {what}"))
    }

    /// The value of a key; `None` also for `null`.
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A token's text: a string, or an object that contains one.
    fn token(&self, key: &str) -> Result<Option<String>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        let text =
            text.ok_or_else(|| self.bad(key, &format!("expected a token, got {}", quoted(&value.to_string()))))?;
        Ok(Some(text.into()))
    }

    /// Ids of tokens: a single one, or a list.
    fn ids(&self, key: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let values = match self.get(key) {
            None => return Ok(vec![]),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.filter(|&id| tokenizer.id_to_token(id).is_some());
            let got = quoted(&value.to_string());
            id.ok_or_else(|| self.bad(key, &format!("expected the id of a token of tokenizer.json, got {got}")))
        };
        values.iter().map(id).collect()
    }

    /// A number of tokens.
    fn limit(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number >= NO_LIMIT => Ok(None),
            Some(number) if number >= 1.0 => Ok(Some(number as usize)),
            _ => Err(self.bad(key, &format!("expected a number of at least 1, got {}", quoted(&value.to_string())))),
        }
    }
}

/// A file of its own takes precedence over `tokenizer_config.json`. Of several templates there, the one named `default`
/// is used.
fn chat_template(
    folder: &Path,
    config: &Config,
    bos: Option<String>,
    eos: Option<String>,
) -> Result<Option<ChatTemplate>> {
    let own = folder.join("chat_template.jinja");
    let (path, key, source) = if own.exists() {
        let path = own.display().to_string();
        let source = String::from_utf8(read_file(&own, MAX_CONFIG_BYTES)?);
        (path.clone(), "", source.map_err(|e| Error::format(&path, format!("expected UTF-8: {e}")))?)
    } else {
        let key = "chat_template";
        let source = match config.get(key) {
            None => return Ok(None),
            Some(Value::String(source)) => source,
            Some(Value::Array(several)) => {
                let default = several.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
                default.ok_or_else(|| config.bad(key, "expected one that is named `default` among several"))?
            }
            Some(_) => return Err(config.bad(key, "expected a string, or a list of names and templates")),
        };
        (config.path.clone(), key, source.to_string())
    };
    Ok(Some(ChatTemplate { path, key: key.into(), source, bos, eos }))
}
