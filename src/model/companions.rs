//! What comes with a model besides its weights and its configuration: tokenizer, chat templates, settings for generating,
//! the modules of a sentence model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::loaded::Model;
use crate::error::{Error, Result};
use crate::format::Metadata;

/// What a model's folder has besides weights and configuration.
pub(super) enum Companions {
    /// Files of another folder, by their paths within it.
    Files { folder: PathBuf, names: Vec<String> },
    /// Files that are made from a GGUF file's metadata.
    Made(Vec<(&'static str, Json)>),
}

impl Companions {
    /// Those of a model.
    pub fn of(model: &Model) -> Result<Companions> {
        if model.weights().config().is_some() {
            let folder = folder_of(model);
            return Ok(Companions::Files { names: companions_in(&folder)?, folder });
        }
        match model.weights().metadata().contains("tokenizer.ggml.model") {
            true => made_from(model),
            false => Ok(Companions::Made(vec![])),
        }
    }

    fn contains(&self, name: &str) -> bool {
        match self {
            Companions::Files { names, .. } => names.iter().any(|n| n == name),
            Companions::Made(files) => files.iter().any(|(n, _)| *n == name),
        }
    }

    /// Returns an error if a folder that the model is saved to has a file that would be taken for one of these.
    pub fn check_strangers(&self, model: &Model, dir: &Path) -> Result<()> {
        if !dir.is_dir() || is_same(&folder_of(model), dir) {
            return Ok(());
        }
        let stranger = companions_in(dir)?.into_iter().find(|name| !self.contains(name));
        stranger.map_or(Ok(()), |name| {
            let message = "is of another model, which has none of this name: remove it, or save to another folder";
            Err(Error::format(dir.join(name), message))
        })
    }

    /// The configuration of a GGUF file's model, with the tokens that begin and end its texts.
    pub fn with_ends(&self, mut config: Json) -> Json {
        let Companions::Made(files) = self else { return config };
        for (_, generation) in files.iter().filter(|(name, _)| *name == "generation_config.json") {
            for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
                if let Some(id) = generation.get(key) {
                    config[key] = id.clone();
                }
            }
        }
        config
    }
}

/// The folder that a model comes from.
fn folder_of(model: &Model) -> PathBuf {
    let path = Path::new(model.weights().path());
    let file = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.is_dir() { path.into() } else { file.into() }
}

#[cfg(feature = "tokenizers")]
fn made_from(model: &Model) -> Result<Companions> {
    let tokenizer = crate::tokenize::ModelTokenizer::of(model.weights())?;
    Ok(Companions::Made(tokenizer.files(model.weights().metadata())?))
}

#[cfg(not(feature = "tokenizers"))]
fn made_from(model: &Model) -> Result<Companions> {
    let message = "saving its tokenizer needs the feature `tokenizers`; `model::save_arena` saves a model without one";
    Err(Error::format(model.weights().path(), message))
}

/// The tokenizer and the chat template of a folder's model as the metadata of a GGUF file. Empty if it has none.
pub(super) fn tokenizer_metadata(model: &Model) -> Result<Metadata> {
    let folder = Path::new(model.weights().path());
    if !folder.is_dir() {
        return Ok(Metadata::default());
    }
    let settings = ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
    let is_tokenizer =
        |name: &String| !settings.contains(&name.as_str()) && TOKENIZERS.iter().any(|t| name.contains(t));
    match companions_in(folder)?.iter().any(is_tokenizer) {
        true => tokenizer_in(folder, model.config().vocab_size),
        false => Ok(Metadata::default()),
    }
}

/// Parts of the names of files that hold a tokenizer.
const TOKENIZERS: &[&str] = &["tokenizer", "vocab.", "spiece", "sentencepiece", "tekken", ".tiktoken"];

#[cfg(feature = "tokenizers")]
fn tokenizer_in(folder: &Path, vocab_size: usize) -> Result<Metadata> {
    crate::tokenize::ModelTokenizer::gguf_metadata(folder, vocab_size)
}

#[cfg(not(feature = "tokenizers"))]
fn tokenizer_in(folder: &Path, _: usize) -> Result<Metadata> {
    Err(Error::format(folder, "writing its tokenizer to a GGUF file needs the feature `tokenizers`"))
}

/// Files of tokenizers, chats and sentence models besides those that begin with `tokenizer`.
const COMPANIONS: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
];

/// The files in a folder that belong to a model besides its weights and its configuration, in a fixed order.
fn companions_in(folder: &Path) -> Result<Vec<String>> {
    let mut names = vec![];
    for (name, is_folder) in entries(folder)? {
        // Further chat templates, and the modules of a sentence model: `1_Pooling`.
        let number = name.split_once('_').map_or("", |(number, _)| number);
        let is_module = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        if is_folder && (name == "additional_chat_templates" || is_module) {
            let files = entries(&folder.join(&name))?.into_iter().filter(|(_, is_folder)| !is_folder);
            names.extend(files.map(|(file, _)| format!("{name}/{file}")));
        } else if !is_folder
            && (COMPANIONS.contains(&name.as_str()) || name.starts_with("tokenizer") || name.ends_with(".tiktoken"))
        {
            names.push(name);
        }
    }
    // A file that is being written by somebody else.
    names.retain(|name| !name.ends_with(".tmp"));
    names.sort_unstable();
    Ok(names)
}

/// Names of files and folders in a folder, and which are folders. What is neither, or has a name that is not UTF-8, is
/// left out.
fn entries(folder: &Path) -> Result<Vec<(String, bool)>> {
    let mut found = vec![];
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), fs::metadata(entry.path())) else { continue };
        if metadata.is_dir() || metadata.is_file() {
            found.push((name, metadata.is_dir()));
        }
    }
    Ok(found)
}

pub(super) fn is_same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}
