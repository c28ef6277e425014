//! The tokenizer of a folder as the metadata of a GGUF file: the counterpart of `gguf`, which reads it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::path::Path;

use serde_json::Value;

use super::ModelTokenizer;
use super::files::Files;
use super::gguf::{
    self, BYTE, CONTROL, ENDS, MERGES, MODEL, NORMAL, PRE, SAMPLE, SCORES, TEMPLATE, TOKENS, TYPES, UNKNOWN, UNUSED,
    USER_DEFINED,
};
use super::hub;
use super::json::Merge;
use super::save::NAMED;
use super::text::byte_of;
use crate::error::{Error, Result, quoted};
use crate::format::{MetaArray, Metadata};

impl ModelTokenizer {
    /// The tokenizer and the chat template of a folder as the metadata of a GGUF file of a model with this many tokens.
    ///
    /// # Errors
    ///
    /// If such a file cannot say how the tokenizer turns text into tokens. What is written is read again and compared.
    pub(crate) fn gguf_metadata(folder: &Path, vocab_size: usize) -> Result<Metadata> {
        let files = Files::of_folder(folder);
        let tokenizer = hub::open(&files)?;
        let bad = |e: &dyn Display| Error::format(&tokenizer.codec.path, format!("tokenizer: {e}"));
        let json = tokenizer.inner().to_string(false).map_err(|e| bad(&e))?;
        let parts: Value = serde_json::from_str(&json).map_err(|e| bad(&e))?;
        let named = hub::named(&files)?.into_iter().collect();
        let source = Source { tokenizer: &tokenizer, parts, named, vocab_size };
        let mut metadata = Metadata::default();
        source.vocabulary(&mut metadata)?;
        source.ends(&mut metadata)?;
        if let Some(chat) = &tokenizer.chat {
            metadata.set(TEMPLATE, chat.source.as_str());
        }
        source.compare(&metadata)?;
        Ok(metadata)
    }
}

struct Source<'a> {
    tokenizer: &'a ModelTokenizer,
    /// Its `tokenizer.json`.
    parts: Value,
    /// Texts of tokens by what settings call them.
    named: BTreeMap<&'static str, String>,
    vocab_size: usize,
}

impl Source<'_> {
    fn bad(&self, what: impl Display) -> Error {
        Error::format(&self.tokenizer.codec.path, format!("tokenizer: {what}, which a GGUF file cannot say"))
    }

    /// What text becomes.
    fn vocabulary(&self, metadata: &mut Metadata) -> Result<()> {
        let model = &self.parts["model"];
        if model["type"] != "BPE" {
            return Err(self.bad(format!("a model of the type {}", model["type"])));
        }
        for option in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
            if !(model[option].is_null() || model[option] == "") {
                return Err(self.bad(format!("model.{option} is {}", model[option])));
            }
        }
        if self.tokenizer.lower_case {
            return Err(self.bad("`do_lower_case` is true"));
        }
        match model["byte_fallback"] == true {
            true => self.sentence_piece(metadata),
            false => self.byte_level(metadata),
        }
    }

    fn byte_level(&self, metadata: &mut Metadata) -> Result<()> {
        let normalizer = &self.parts["normalizer"];
        let composed = match normalizer["normalizers"].as_array().map(Vec::as_slice) {
            None if normalizer.is_null() => false,
            Some([]) => false,
            Some([only]) if only["type"] == "NFC" => true,
            None if normalizer["type"] == "NFC" => true,
            _ => return Err(self.bad(format!("the normalizer {}", quoted(&normalizer.to_string())))),
        };
        let whole_words = self.parts["model"]["ignore_merges"] == true;
        let pre = match self.tokenizer.inner().get_pre_tokenizer() {
            Some(splitter) => gguf::name_of(&self.tokenizer.codec.path, splitter, whole_words, composed)?,
            None => None,
        };
        let pre = pre.ok_or_else(|| {
            let shown = quoted(&self.parts["pre_tokenizer"].to_string());
            self.bad(format!("the pre-tokenizer {shown} with ignore_merges: {whole_words}, NFC: {composed}"))
        })?;
        metadata.set(MODEL, "gpt2");
        metadata.set(PRE, pre);
        let (tokens, types) = self.tokens(|_, _| NORMAL)?;
        metadata.set(TOKENS, MetaArray::String(tokens));
        metadata.set(TYPES, MetaArray::I32(types));
        let lines = self.merges()?.into_iter().map(|(a, b)| match a.contains(' ') || b.contains(' ') {
            true => Err(self.bad(format!("the merge of {} and {}", quoted(&a), quoted(&b)))),
            false => Ok(format!("{a} {b}")),
        });
        metadata.set(MERGES, MetaArray::String(lines.collect::<Result<_>>()?));
        Ok(())
    }

    /// SentencePiece's vocabularies have scores instead of merges: what is merged first has the highest one.
    fn sentence_piece(&self, metadata: &mut Metadata) -> Result<()> {
        let unknown = self.parts["model"]["unk_token"].as_str().unwrap_or("<unk>");
        let (tokens, types) = self.tokens(|_, token| match token {
            _ if token == unknown => UNKNOWN,
            _ if byte_of(token).is_some() => BYTE,
            _ => NORMAL,
        })?;
        let merges = self.merges()?;
        let mut ranks: HashMap<String, usize> = HashMap::new();
        let mut last = String::new();
        for (a, b) in &merges {
            let joined = [a.as_str(), b].concat();
            let rank = ranks.len();
            if ranks.contains_key(&joined) && joined != last {
                return Err(self.bad(format!("merges to {} before and after others", quoted(&joined))));
            }
            ranks.entry(joined.clone()).or_insert(rank);
            last = joined;
        }
        let score = |token: &String| -(*ranks.get(token).unwrap_or(&ranks.len()) as f32);
        metadata.set(MODEL, "llama");
        metadata.set(PRE, "default");
        metadata.set(SCORES, MetaArray::F32(tokens.iter().map(score).collect()));
        metadata.set(TOKENS, MetaArray::String(tokens));
        metadata.set(TYPES, MetaArray::I32(types));
        let first = self.tokenizer.encode("a", false)?.first().and_then(|&id| self.tokenizer.inner().id_to_token(id));
        metadata.set("tokenizer.ggml.add_space_prefix", first.is_some_and(|token| token.starts_with('▁')));
        if let Some(id) = self.id(unknown) {
            metadata.set("tokenizer.ggml.unknown_token_id", id);
        }
        Ok(())
    }

    /// All tokens in the order of their ids, and their types. Ids without a token get one that no text becomes.
    fn tokens(&self, ordinary: impl Fn(u32, &str) -> i64) -> Result<(Vec<String>, Vec<i32>)> {
        let inner = self.tokenizer.inner();
        let last = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if last as usize >= self.vocab_size {
            let message = format!("tokenizer: token {last} is beyond the {} of the model", self.vocab_size);
            return Err(Error::format(&self.tokenizer.codec.path, message));
        }
        let added = inner.get_added_tokens_decoder();
        let (mut tokens, mut types) = (vec![], vec![]);
        for id in 0..self.vocab_size as u32 {
            let (token, ty) = match (added.get(&id), inner.id_to_token(id)) {
                (Some(token), _) if token.lstrip || token.rstrip || token.single_word => {
                    let flags = "takes spaces beside it, or stands only for whole words";
                    return Err(self.bad(format!("the token {} {flags}", quoted(&token.content))));
                }
                (Some(token), _) => {
                    let ty = if token.special { CONTROL } else { USER_DEFINED };
                    (token.content.clone(), if ordinary(id, &token.content) == UNKNOWN { UNKNOWN } else { ty })
                }
                (None, Some(token)) => {
                    let ty = ordinary(id, &token);
                    (token, ty)
                }
                (None, None) => (format!("[PAD{id}]"), UNUSED),
            };
            tokens.push(token);
            types.push(ty as i32);
        }
        Ok((tokens, types))
    }

    fn merges(&self) -> Result<Vec<(String, String)>> {
        let bad = |e: &dyn Display| Error::format(&self.tokenizer.codec.path, format!("tokenizer: merges: {e}"));
        let merges: Vec<Merge> =
            serde::Deserialize::deserialize(&self.parts["model"]["merges"]).map_err(|e| bad(&e))?;
        let parts = merges.iter().filter_map(|merge| merge.parts().transpose());
        let parts = parts.map(|parts| parts.map(|(a, b)| (a.to_string(), b.to_string())).map_err(|e| bad(&e)));
        parts.collect()
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.inner().token_to_id(token)
    }

    /// The tokens around texts, those that end one, and others with a part to play.
    fn ends(&self, metadata: &mut Metadata) -> Result<()> {
        for (name, key) in NAMED {
            if let Some(id) = self.named.get(name).and_then(|token| self.id(token)) {
                metadata.set(*key, id);
            }
        }
        let (plain, whole) = (self.tokenizer.encode("a", false)?, self.tokenizer.encode("a", true)?);
        let text = whole.windows(plain.len().max(1)).position(|part| part == plain);
        let (before, after) = match text {
            Some(at) => (&whole[..at], &whole[at + plain.len()..]),
            None => return Err(self.bad("a text of other tokens between those that begin and end it")),
        };
        for (what, around) in [("bos", before), ("eos", after)] {
            let key = format!("tokenizer.ggml.{what}_token_id");
            let said = metadata.optional(&key, Metadata::usize)?;
            match around {
                [] => {}
                [id] if said.is_none_or(|said| said == *id as usize) => metadata.set(key, *id),
                ids => return Err(self.bad(format!("the tokens {ids:?} around a text, with {what}: {said:?}"))),
            }
            metadata.set(format!("tokenizer.ggml.add_{what}_token"), !around.is_empty());
        }
        self.stops(metadata)
    }

    /// The tokens that end a turn or a text. Readers know some of them by their names.
    fn stops(&self, metadata: &mut Metadata) -> Result<()> {
        let is_known = |id: u32| {
            let token = self.tokenizer.inner().id_to_token(id);
            token.is_some_and(|token| ENDS.contains(&token.as_str()))
        };
        let named = metadata.optional("tokenizer.ggml.eos_token_id", Metadata::usize)?;
        let others = self.tokenizer.stop_tokens().iter().copied().filter(|id| Some(*id as usize) != named);
        let mut others: Vec<u32> = others.collect();
        // Without a name for the end, one of them is it: the first that is not known anyway, if there is one.
        if named.is_none() {
            let at = others.iter().position(|id| !is_known(*id)).unwrap_or(0);
            if at < others.len() {
                metadata.set("tokenizer.ggml.eos_token_id", others.remove(at));
            }
        }
        others.retain(|id| !is_known(*id));
        match others.as_slice() {
            [] => {}
            [turn] => metadata.set("tokenizer.ggml.eot_token_id", *turn),
            [turn, message] => {
                metadata.set("tokenizer.ggml.eot_token_id", *turn);
                metadata.set("tokenizer.ggml.eom_token_id", *message);
            }
            more => return Err(self.bad(format!("{} tokens that end a text", more.len() + 1))),
        }
        Ok(())
    }

    /// Returns an error if the metadata means another tokenizer.
    fn compare(&self, metadata: &Metadata) -> Result<()> {
        let written = gguf::of(&self.tokenizer.codec.path, metadata)?;
        for special in [false, true] {
            if written.encode(SAMPLE, special)? != self.tokenizer.encode(SAMPLE, special)? {
                return Err(self.bad("splits text in a way"));
            }
        }
        if metadata.contains(SCORES) {
            let pairs = |merges: Vec<(String, String)>| merges.into_iter().collect::<BTreeSet<_>>();
            let json = written.inner().to_string(false).map_err(|e| self.bad(e))?;
            let parts: Value = serde_json::from_str(&json).map_err(|e| self.bad(e))?;
            let again = Source { tokenizer: &written, parts, named: BTreeMap::new(), vocab_size: self.vocab_size };
            if pairs(again.merges()?) != pairs(self.merges()?) {
                return Err(self.bad("not all pairs of tokens that form another are merged"));
            }
        }
        match self.tokenizer.stop_tokens().iter().find(|id| !written.is_stop(**id)) {
            None => Ok(()),
            Some(id) => Err(self.bad(format!("token {id} ends a text"))),
        }
    }
}
