//! Tokenizers of folders in the layout of model hubs: `tokenizer.json`, or the files that older tokenizers are in, and
//! the settings that come with it.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::TruncationDirection;

use super::ModelTokenizer;
use super::added::{Base, Special, complete};
use super::chat::ChatTemplate;
use super::files::Files;
use super::json::TokenizerJson;
use super::tokens;
use super::vocab::VocabFile;
use crate::error::{Error, Result};
use crate::format::{MAX_CONFIG_BYTES, Settings};

pub(super) fn open(files: &Files<'_>) -> Result<ModelTokenizer> {
    let config = files.settings("tokenizer_config.json")?;
    let mut tokenizer = match TokenizerJson::read(files)? {
        Some(json) => {
            let special = Special::read(files, &config, &[])?;
            around(files, &config, &json, &special)?
        }
        None => {
            let vocabulary = VocabFile::read(files, &config)?;
            let mut tokenizer = around(files, &config, &vocabulary, &vocabulary.special)?;
            (tokenizer.before, tokenizer.after) = vocabulary.around(tokenizer.inner())?;
            tokenizer.codec.twins = vocabulary.twins();
            tokenizer
        }
    };
    // As in `transformers`, which writes both.
    tokenizer.cut_start = match config.str("truncation_side")? {
        None => tokenizer.codec.tokenizer.get_truncation().is_some_and(|t| t.direction == TruncationDirection::Left),
        Some("right") => false,
        Some("left") => true,
        Some(_) => return Err(config.bad("truncation_side", "expected `left` or `right`")),
    };
    // Truncation and padding are for training and batches. Here a text keeps exactly its own tokens.
    tokenizer.codec.tokenizer.with_padding(None);
    tokenizer.codec.tokenizer.with_truncation(None).map_err(|e| Error::format(files.path(), e))?;
    Ok(tokenizer)
}

/// The texts of the tokens with a part to play, by what settings call them: `bos_token`.
pub(super) fn named(files: &Files<'_>) -> Result<Vec<(&'static str, String)>> {
    let config = files.settings("tokenizer_config.json")?;
    let special = match files.has("tokenizer.json") {
        true => Special::read(files, &config, &[])?,
        false => VocabFile::read(files, &config)?.special,
    };
    Ok(special.named().map(|(key, text)| (key, text.to_string())).collect())
}

/// A vocabulary, and what the other files say about it.
fn around(files: &Files<'_>, config: &Settings, base: &dyn Base, special: &Special) -> Result<ModelTokenizer> {
    let tokenizer = complete(base, special)?;
    let is_token = |id| tokenizer.id_to_token(id).is_some();
    let mut stop = tokens::ids(&files.settings("generation_config.json")?, "eos_token_id", is_token)?;
    if stop.is_empty() {
        stop = tokens::ids(&files.settings("config.json")?, "eos_token_id", is_token)?;
    }
    let only = if let [only] = stop[..] { Some(only) } else { None };
    let eos = special.text("eos_token").and_then(|token| tokenizer.token_to_id(token)).or(only);
    stop.extend(eos);
    let sentences = files.settings("sentence_bert_config.json")?;
    let max_tokens = match sentences.limit("max_seq_length")? {
        Some(limit) => Some(limit),
        None => config.limit("model_max_length")?,
    };
    let max_tokens = max_tokens.filter(|&limit| limit < usize::MAX);
    let text = |key| special.text(key).map(String::from);
    let chat = chat_template(files, config, text("bos_token"), text("eos_token"))?;
    let lower_case = sentences.bool("do_lower_case")?.unwrap_or(false);
    let bare = ModelTokenizer::new(tokenizer, files.path(), HashMap::new());
    Ok(ModelTokenizer { eos, max_tokens, chat, lower_case, ..bare }.with_stop(stop))
}

/// A file of its own takes precedence over `tokenizer_config.json`. Of several templates there, the one named `default`
/// is used.
fn chat_template(
    files: &Files<'_>,
    config: &Settings,
    bos: Option<String>,
    eos: Option<String>,
) -> Result<Option<ChatTemplate>> {
    let own = "chat_template.jinja";
    let (path, key, source) = if let Some(source) = files.text(own, MAX_CONFIG_BYTES)? {
        (files.path_of(own), "", source)
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
        (config.path().into(), key, source.to_string())
    };
    Ok(Some(ChatTemplate { path, key: key.into(), source, bos, eos }))
}
