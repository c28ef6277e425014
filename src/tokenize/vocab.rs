//! Vocabularies without a `tokenizer.json`: `vocab.json` with `merges.txt`, and `vocab.txt`. What text goes through
//! before and after them is not in these files; here it is as in the classes of `transformers` that read them.

use std::collections::HashMap;

use tokenizers::Tokenizer;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::added::{Base, Special};
use super::files::Files;
use super::gguf::pre_tokenizer;
use super::json::{MAX_TOKENIZER_BYTES, Merge, Vocabulary};
use crate::error::{Error, Result, quoted};
use crate::format::Settings;

/// The tokenizers that these files are read for.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    Gpt2,
    Qwen2,
    Bert,
}

const GPT_2_NAMES: &[(&str, &str)] =
    &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")];
const QWEN_2_NAMES: &[(&str, &str)] =
    &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")];
const BERT_NAMES: &[(&str, &str)] = &[
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// The vocabulary of one of these files, and what is around it.
pub(super) struct VocabFile<'a> {
    path: String,
    class: Class,
    config: &'a Settings,
    pub special: Special,
    tokens: Tokens,
}

enum Tokens {
    /// Of `vocab.json` and `merges.txt`.
    Pairs(Vocabulary),
    /// Of `vocab.txt`: one in each line.
    Words(Vec<String>),
}

impl<'a> VocabFile<'a> {
    pub fn read(files: &Files<'_>, config: &'a Settings) -> Result<VocabFile<'a>> {
        let class = class(files, config)?;
        let names = match class {
            Class::Gpt2 => GPT_2_NAMES,
            Class::Qwen2 => QWEN_2_NAMES,
            Class::Bert => BERT_NAMES,
        };
        let special = Special::read(files, config, names)?;
        let (path, tokens) = match class {
            Class::Bert => (files.path_of("vocab.txt"), Tokens::Words(words(files)?)),
            Class::Gpt2 | Class::Qwen2 => (files.path_of("vocab.json"), Tokens::Pairs(pairs(files)?)),
        };
        Ok(VocabFile { path, class, config, special, tokens })
    }

    /// The tokens around a text.
    pub fn around(&self, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
        let id = |key: &str| self.special.text(key).and_then(|text| tokenizer.token_to_id(text)).into_iter().collect();
        Ok(match self.class {
            Class::Bert => (id("cls_token"), id("sep_token")),
            Class::Gpt2 if self.config.bool("add_bos_token")? == Some(true) => (id("bos_token"), vec![]),
            _ => (vec![], vec![]),
        })
    }

    /// Lines of `vocab.txt` whose token is there once more, and the id that stands for it.
    pub fn twins(&self) -> HashMap<u32, u32> {
        let Tokens::Words(words) = &self.tokens else { return HashMap::new() };
        let last: HashMap<&str, u32> = words.iter().map(String::as_str).zip(0..).collect();
        (0..)
            .zip(words)
            .filter_map(|(id, word)| Some((id, *last.get(word.as_str())?)))
            .filter(|(a, b)| a != b)
            .collect()
    }

    fn byte_level(&self, vocabulary: &Vocabulary, more: &[(u32, &str)]) -> Result<Tokenizer> {
        let bad = |e: tokenizers::Error| Error::format(&self.path, e);
        let more = more.iter().map(|(id, text)| (text.to_string(), *id));
        let vocab: Vocab = vocabulary.vocab.0.iter().cloned().chain(more).collect();
        let merges = vocabulary.merges.iter().filter_map(|merge| merge.parts().ok().flatten());
        let merges = merges.map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, merges).build().map_err(bad)?);
        let prefix = self.config.bool("add_prefix_space")?.unwrap_or(false);
        match self.class {
            Class::Qwen2 => {
                tokenizer.with_normalizer(Some(NFC)).map_err(bad)?;
                let pre = pre_tokenizer("qwen2").map_err(|e| Error::format(&self.path, e))?;
                tokenizer.with_pre_tokenizer(Some(pre.build(prefix)?));
            }
            _ => {
                tokenizer.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
            }
        }
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Ok(tokenizer)
    }

    fn word_piece(&self, words: &[String], more: &[(u32, &str)]) -> Result<Tokenizer> {
        let unknown = self.special.text("unk_token").unwrap_or("[UNK]");
        let more = more.iter().map(|(id, text)| (text.to_string(), *id));
        let vocab: Vocab = words.iter().cloned().zip(0..).chain(more).collect();
        if !vocab.contains_key(unknown) {
            return Err(Error::format(
                &self.path,
                format!("has no {}, which stands for unknown words", quoted(unknown)),
            ));
        }
        let bad = |e: tokenizers::Error| Error::format(&self.path, e);
        let model = WordPiece::builder().vocab(vocab).unk_token(unknown.into()).build().map_err(bad)?;
        let mut tokenizer = Tokenizer::new(model);
        let flag = |key: &str| Ok::<_, Error>(self.config.bool(key)?.unwrap_or(true));
        let accents = self.config.bool("strip_accents")?;
        let normalizer = BertNormalizer::new(true, flag("tokenize_chinese_chars")?, accents, flag("do_lower_case")?);
        tokenizer.with_normalizer(Some(normalizer)).map_err(bad)?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        tokenizer.with_decoder(Some(WordPieceDecoder::default()));
        Ok(tokenizer)
    }
}

impl Base for VocabFile<'_> {
    fn path(&self) -> &str {
        &self.path
    }

    fn build(&self, more: &[(u32, &str)]) -> Result<Tokenizer> {
        match &self.tokens {
            Tokens::Pairs(vocabulary) => self.byte_level(vocabulary, more),
            Tokens::Words(words) => self.word_piece(words, more),
        }
    }
}

/// What the files are for: the class of tokenizer that a configuration names, or else the model's.
fn class(files: &Files<'_>, config: &Settings) -> Result<Class> {
    let model = files.settings("config.json")?;
    let own = config.str("tokenizer_class")?;
    let name = own.or(model.str("tokenizer_class")?).or(model.str("model_type")?);
    let (pairs, words) = (files.has("vocab.json") && files.has("merges.txt"), files.has("vocab.txt"));
    let found = match name.map(|name| name.trim_end_matches("Fast")) {
        Some("GPT2Tokenizer" | "CodeGenTokenizer" | "gpt2") => Some(Class::Gpt2),
        Some("Qwen2Tokenizer" | "qwen2" | "qwen3") => Some(Class::Qwen2),
        Some("BertTokenizer" | "DistilBertTokenizer" | "ElectraTokenizer" | "bert") => Some(Class::Bert),
        None if pairs => Some(Class::Gpt2),
        None => Some(Class::Bert),
        Some(_) => None,
    };
    match found {
        Some(Class::Bert) if words => Ok(Class::Bert),
        Some(class @ (Class::Gpt2 | Class::Qwen2)) if pairs => Ok(class),
        _ => {
            let what = match name {
                Some(name) if found.is_none() => {
                    format!("has no tokenizer.json, without which {} is not read", quoted(name))
                }
                _ => "has no tokenizer.json, no vocab.json with merges.txt and no vocab.txt".into(),
            };
            let advice = "Python's `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` makes one";
            Err(Error::format(files.path(), format!("{what}; {advice} if `transformers` can read the folder")))
        }
    }
}

/// A file that the class needs.
fn text(files: &Files<'_>, name: &str) -> Result<String> {
    let missing = || Error::format(files.path(), format!("has no {name}"));
    files.text(name, MAX_TOKENIZER_BYTES)?.ok_or_else(missing)
}

fn pairs(files: &Files<'_>) -> Result<Vocabulary> {
    let bad = |name: &str, message: String| Error::format(files.path_of(name), message);
    let vocab = files.json("vocab.json", MAX_TOKENIZER_BYTES)?;
    let vocab = vocab.ok_or_else(|| Error::format(files.path(), "has no vocab.json"))?;
    let lines = text(files, "merges.txt")?;
    let lines = lines.lines().filter(|line| !line.trim().is_empty());
    let merges = lines.map(|line| Merge::Line(line.trim_end().into())).collect();
    let vocabulary = Vocabulary { vocab, merges, continuing_subword_prefix: None };
    vocabulary.check().map_err(|message| {
        let name = if message.starts_with("merges") { "merges.txt" } else { "vocab.json" };
        bad(name, message)
    })?;
    Ok(vocabulary)
}

/// The lines of `vocab.txt`, whichever way they end.
fn words(files: &Files<'_>) -> Result<Vec<String>> {
    let text = text(files, "vocab.txt")?.replace("\r\n", "\n").replace('\r', "\n");
    Ok(text.split_terminator('\n').map(str::to_string).collect())
}
