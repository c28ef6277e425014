//! The tokenizer of a GGUF file as the files of a folder, for models that are saved as one.

use std::fmt::Display;

use serde_json::{Map, Value, json};

use super::ModelTokenizer;
use crate::error::{Error, Result};
use crate::format::Metadata;

/// Tokens with a part to play, and the keys of their ids. (The separator's is spelled like this.)
pub(super) const NAMED: &[(&str, &str)] = &[
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("sep_token", "tokenizer.ggml.seperator_token_id"),
    ("cls_token", "tokenizer.ggml.cls_token_id"),
    ("mask_token", "tokenizer.ggml.mask_token_id"),
];

impl ModelTokenizer {
    /// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` with what a GGUF file of this metadata
    /// says: a folder with them tokenizes, chats and stops as the file does, in `transformers`, too.
    pub(crate) fn files(&self, metadata: &Metadata) -> Result<Vec<(&'static str, Value)>> {
        let bad = |e: &dyn Display| Error::format(&self.codec.path, format!("tokenizer: {e}"));
        let text = self.codec.tokenizer.to_string(false).map_err(|e| bad(&e))?;
        let mut tokenizer: Value = serde_json::from_str(&text).map_err(|e| bad(&e))?;
        if !(self.before.is_empty() && self.after.is_empty()) {
            tokenizer["post_processor"] = self.around();
        }
        let mut config = Map::from_iter([
            ("tokenizer_class".into(), json!("PreTrainedTokenizerFast")),
            ("clean_up_tokenization_spaces".into(), json!(false)),
        ]);
        let mut generation = Map::new();
        for (name, key) in NAMED {
            let id = metadata.usize(key).ok().and_then(|id| u32::try_from(id).ok());
            if let Some(token) = id.and_then(|id| self.codec.token(id, false)) {
                config.insert((*name).into(), json!(token));
                if ["bos_token", "pad_token"].contains(name) {
                    generation.insert(format!("{name}_id"), json!(id));
                }
            }
        }
        if let Some(chat) = &self.chat {
            config.insert("chat_template".into(), json!(chat.source));
            // Those that the kind of tokenizer has where the file names none.
            for (name, token) in [("bos_token", &chat.bos), ("eos_token", &chat.eos)] {
                if let Some(token) = token {
                    config.entry(name).or_insert(json!(token));
                }
            }
        }
        let ends = match self.stop.as_slice() {
            [] => None,
            [only] => Some(json!(only)),
            several => Some(json!(several)),
        };
        generation.extend(ends.map(|ends| ("eos_token_id".into(), ends)));
        Ok(vec![
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", config.into()),
            ("generation_config.json", generation.into()),
        ])
    }

    /// The post-processor of a `tokenizer.json` that puts the same tokens around a text as this one does.
    fn around(&self) -> Value {
        let token = |id: &u32| self.codec.token(*id, false).unwrap_or_default();
        let special = |id: &u32| json!({ "SpecialToken": { "id": token(id), "type_id": 0 } });
        let text = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
        let put = |texts: Vec<Value>| -> Value {
            let (before, after) = (self.before.iter().map(special), self.after.iter().map(special));
            before.chain(texts).chain(after).collect()
        };
        let ids = self.before.iter().chain(&self.after);
        let special_tokens = ids.map(|id| (token(id), json!({ "id": token(id), "ids": [id], "tokens": [token(id)] })));
        json!({
            "type": "TemplateProcessing",
            "single": put(vec![text("A", 0)]),
            "pair": put(vec![text("A", 0), text("B", 1)]),
            "special_tokens": special_tokens.collect::<Map<_, _>>(),
        })
    }
}
