//! `tokenizer.json`, read by the `tokenizers` crate once what it would accept silently, or panic on, is ruled out.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::added::{Added, Base};
use super::files::Files;
use super::guard::guarded;
use crate::error::{Error, Result, quoted};
use crate::format::Entries;

/// Longest file that is read. The longest known one is 33 MB.
pub(super) const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

/// A text may become this many times longer on its way to tokens or back. Known files stay below 100.
const MAX_GROWTH: f64 = 4096.0;

/// A checked file.
pub(super) struct TokenizerJson<'a> {
    path: String,
    text: Cow<'a, [u8]>,
    outline: Outline,
}

/// The parts that are checked before the rest is read.
#[derive(Deserialize)]
struct Outline {
    model: Kind,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct Kind {
    r#type: Option<String>,
}

impl<'a> TokenizerJson<'a> {
    /// Reads and checks the file, if it is there.
    pub fn read(files: &Files<'a>) -> Result<Option<Self>> {
        let name = "tokenizer.json";
        let Some(text) = files.read(name, MAX_TOKENIZER_BYTES)? else { return Ok(None) };
        let path = files.path_of(name);
        let bad = |e: serde_json::Error| Error::format(&path, e);
        let outline: Outline = serde_json::from_slice(&text).map_err(bad)?;
        if !outline.is_unigram() {
            // All other models map tokens to ids. In a Unigram an id is an index into a list.
            let file: WithVocabulary = serde_json::from_slice(&text).map_err(bad)?;
            file.model.check().map_err(|message| Error::format(&path, format!("model.{message}")))?;
        }
        outline.check().map_err(|message| Error::format(&path, message))?;
        Ok(Some(TokenizerJson { path, text, outline }))
    }
}

impl Base for TokenizerJson<'_> {
    fn path(&self) -> &str {
        &self.path
    }

    fn added(&self) -> &[Added] {
        &self.outline.added_tokens
    }

    fn build(&self, more: &[(u32, &str)]) -> Result<Tokenizer> {
        if more.is_empty() || self.outline.is_unigram() {
            return guarded(&self.path, || Tokenizer::from_bytes(&self.text));
        }
        let mut file: Value = serde_json::from_slice(&self.text).map_err(|e| Error::format(&self.path, e))?;
        if let Some(vocab) = file.pointer_mut("/model/vocab").and_then(Value::as_object_mut) {
            vocab.extend(more.iter().map(|(id, text)| (text.to_string(), Value::from(*id))));
        }
        guarded(&self.path, || Tokenizer::from_bytes(file.to_string()))
    }
}

impl Outline {
    fn is_unigram(&self) -> bool {
        self.model.r#type.as_deref() == Some("Unigram")
    }

    /// A few steps that each double a text would make it too long for any memory.
    fn check(&self) -> Result<(), String> {
        let steps = [
            ("normalizer", &self.normalizer),
            ("pre_tokenizer", &self.pre_tokenizer),
            ("post_processor", &self.post_processor),
            ("decoder", &self.decoder),
        ];
        match steps.into_iter().find(|(_, step)| growth(step) > MAX_GROWTH) {
            Some((name, _)) => Err(format!("{name}: can make a text more than {MAX_GROWTH} times longer")),
            None => Ok(()),
        }
    }
}

/// How many times longer a text can become by a step with all steps in it: an upper bound, except for maps of
/// characters, whose replacements are in binary data.
fn growth(step: &Value) -> f64 {
    match step {
        Value::Array(steps) => steps.iter().map(growth).product(),
        Value::Object(parts) => own_growth(step) * parts.values().map(growth).product::<f64>(),
        _ => 1.0,
    }
}

fn own_growth(step: &Value) -> f64 {
    let bytes = |key: &str| step[key].as_str().map_or(0, str::len) as f64;
    match step["type"].as_str() {
        Some("Replace") => match step["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => (bytes("content") / pattern.len() as f64).max(1.0),
            _ => bytes("content") + 1.0,
        },
        Some("Prepend") => bytes("prepend") + 1.0,
        Some("TemplateProcessing") => {
            let ids = |token: &Value| token["ids"].as_array().map_or(0, Vec::len);
            let ids: usize = step["special_tokens"].as_object().map_or(0, |all| all.values().map(ids).sum());
            (step["single"].as_array().map_or(0, Vec::len) + ids).max(1) as f64
        }
        Some("Precompiled") => 65.0, // one per file, and no second one
        Some("Metaspace") => 4.0,
        Some("ByteLevel" | "BPEDecoder" | "WordPiece" | "CTC" | "BertProcessing" | "RobertaProcessing") => 2.0,
        _ => 1.0,
    }
}

#[derive(Deserialize)]
struct WithVocabulary {
    model: Vocabulary,
}

/// Tokens with their ids, and which of them make others.
#[derive(Deserialize)]
pub(super) struct Vocabulary {
    pub vocab: Entries<u32>,
    #[serde(default)]
    pub merges: Vec<Merge>,
    pub continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    /// The two parts; `None` for the line with the version.
    pub fn parts(&self) -> Result<Option<(&str, &str)>, String> {
        match self {
            Merge::Pair(a, b) => Ok(Some((a, b))),
            Merge::Line(line) if line.starts_with("#version") => Ok(None),
            Merge::Line(line) => line
                .split_once(' ')
                .map(Some)
                .ok_or_else(|| format!("expected two tokens with a space between, got {}", quoted(line))),
        }
    }
}

impl Vocabulary {
    /// Checks what the crate would accept silently, or panic on.
    pub fn check(&self) -> Result<(), String> {
        let mut ids = HashMap::with_capacity(self.vocab.0.len());
        let mut tokens = HashMap::with_capacity(self.vocab.0.len());
        for (token, id) in &self.vocab.0 {
            tokens.insert(token.as_str(), *id);
            if let Some(other) = ids.insert(id, token) {
                return Err(format!("vocab: {} and {} both have id {id}", quoted(other), quoted(token)));
            }
        }
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or("");
        for (i, merge) in self.merges.iter().enumerate() {
            let bad = |what: String| format!("merges: merge {i}: {what}");
            let Some((a, b)) = merge.parts().map_err(bad)? else { continue };
            let rest = b.strip_prefix(prefix);
            let rest = rest.ok_or_else(|| bad(format!("{} does not start with {}", quoted(b), quoted(prefix))))?;
            let joined = [a, rest].concat();
            if let Some(missing) = [a, b, &joined].into_iter().find(|t| !tokens.contains_key(t)) {
                return Err(bad(format!("{} is no token", quoted(missing))));
            }
        }
        Ok(())
    }
}
