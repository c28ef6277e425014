//! Tokenizers of GGUF files: the metadata keys `tokenizer.ggml.*`, assembled from the parts of the `tokenizers` crate.
//!
//! Sources: the meaning of the keys, the names of pre-tokenizers and their patterns follow llama.cpp
//! (`src/llama-vocab.cpp`), which took the patterns from the models' `tokenizer.json`.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::ModelTokenizer;
use super::chat::ChatTemplate;
use crate::error::{Error, Result, quoted};
use crate::format::{Metadata, Weights};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const TEMPLATE: &str = "tokenizer.chat_template";

/// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// Control tokens that end a turn or a text. Files often declare only one of them, or none.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
];

/// Longest token of a SentencePiece vocabulary. Each token is tried at every split, which takes time quadratic in its
/// length. SentencePiece itself stops at 16 characters by default.
const MAX_PIECE_BYTES: usize = 256;

/// Whether the file contains a tokenizer.
pub(super) fn has_tokenizer(weights: &Weights) -> bool {
    weights.metadata().contains(MODEL)
}

/// The tokenizer, and everything that the file defines around it.
pub(super) fn open(weights: &Weights) -> Result<ModelTokenizer> {
    let vocabulary = Vocabulary::of(weights)?;
    let defaults = Defaults::of(&vocabulary)?;
    let bos = vocabulary.id("tokenizer.ggml.bos_token_id", defaults.bos)?;
    let eos = vocabulary.id("tokenizer.ggml.eos_token_id", defaults.eos)?;
    let before = vocabulary.added("tokenizer.ggml.add_bos_token", defaults.add_bos, bos)?;
    // BERT's texts end with a separator. (The key is spelled like this.)
    let after = match defaults.sep {
        Some(_) => {
            let sep = vocabulary.id("tokenizer.ggml.seperator_token_id", defaults.sep)?;
            vocabulary.added("tokenizer.ggml.add_sep_token", true, sep)?
        }
        None => vocabulary.added("tokenizer.ggml.add_eos_token", false, eos)?,
    };
    let mut stop: Vec<u32> = eos.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        stop.extend(vocabulary.id(key, None)?);
    }
    stop.extend(vocabulary.of_type(|ty| ty == CONTROL).filter(|(_, t)| ENDS.contains(t)).map(|(id, _)| id));
    let text = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize].clone());
    let chat = match vocabulary.meta.contains(TEMPLATE) {
        true => Some(ChatTemplate {
            path: weights.path().into(),
            key: TEMPLATE.into(),
            source: vocabulary.meta.str(TEMPLATE)?.into(),
            bos: text(bos),
            eos: text(eos),
        }),
        false => None,
    };
    let tokenizer = vocabulary.tokenizer()?;
    let (before, after) = (before.into_iter().collect(), after.into_iter().collect());
    Ok(ModelTokenizer::new(tokenizer, weights.path(), before, after, stop, None, chat))
}

/// Defaults for keys that a file lacks.
#[derive(Default)]
struct Defaults {
    add_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    sep: Option<u32>,
}

impl Defaults {
    fn of(vocabulary: &Vocabulary<'_>) -> Result<Defaults> {
        Ok(match vocabulary.meta.str(MODEL)? {
            "llama" => Defaults { add_bos: true, bos: Some(1), eos: Some(2), sep: None },
            "bert" => Defaults { add_bos: true, bos: Some(101), eos: None, sep: Some(102) },
            _ => Defaults { add_bos: pre_tokenizer(vocabulary)?.adds_bos, ..Default::default() },
        })
    }
}

/// The lists of a file, checked to have equal length and no duplicates.
pub(super) struct Vocabulary<'a> {
    path: &'a str,
    meta: &'a Metadata,
    tokens: &'a [String],
    types: Vec<i64>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn of(weights: &'a Weights) -> Result<Self> {
        let (path, meta) = (weights.path(), weights.metadata());
        meta.str(MODEL)?;
        let tokens = meta.strs(TOKENS)?;
        let types = if meta.contains(TYPES) { meta.ints(TYPES)? } else { vec![1; tokens.len()] };
        let mut vocabulary = Vocabulary { path, meta, tokens, types, ids: HashMap::with_capacity(tokens.len()) };
        vocabulary.check_len(TYPES, vocabulary.types.len())?;
        for (id, token) in (0..).zip(tokens) {
            if let Some(other) = vocabulary.ids.insert(token, id) {
                return Err(vocabulary.bad(TOKENS, &format!("{} is token {other} and token {id}", quoted(token))));
            }
        }
        Ok(vocabulary)
    }

    fn bad(&self, key: &str, what: &str) -> Error {
        Error::format(self.path, format!("metadata `{key}`: {what}"))
    }

    fn check_len(&self, key: &str, len: usize) -> Result<()> {
        match len == self.tokens.len() {
            true => Ok(()),
            false => Err(self.bad(key, &format!("expected one for each of {} tokens, got {len}", self.tokens.len()))),
        }
    }

    /// The token that a key names, if the file has the key.
    pub(super) fn id(&self, key: &str, default: Option<u32>) -> Result<Option<u32>> {
        if !self.meta.contains(key) {
            return Ok(default.filter(|&id| (id as usize) < self.tokens.len()));
        }
        let id = self.meta.usize(key)?;
        match u32::try_from(id) {
            Ok(small) if id < self.tokens.len() => Ok(Some(small)),
            _ => Err(self.bad(key, &format!("expected an id below {}, got {id}", self.tokens.len()))),
        }
    }

    /// The token to put around a text, if the file asks for it.
    fn added(&self, key: &str, default: bool, id: Option<u32>) -> Result<Option<u32>> {
        let wanted = if self.meta.contains(key) { self.meta.bool(key)? } else { default };
        match (wanted, id) {
            (true, None) => Err(self.bad(key, "is true, but the file does not say which token that is")),
            (true, id) => Ok(id),
            (false, _) => Ok(None),
        }
    }

    fn of_type(&self, is: impl Fn(i64) -> bool) -> impl Iterator<Item = (u32, &'a str)> {
        let all = (0..).zip(self.tokens).zip(&self.types);
        all.filter(move |(_, ty)| is(**ty)).map(|((id, token), _)| (id, token.as_str()))
    }

    /// The text of the unknown token.
    fn unknown(&self, default: u32) -> Result<Option<String>> {
        let id = self.id("tokenizer.ggml.unknown_token_id", Some(default))?;
        Ok(id.map(|id| self.tokens[id as usize].clone()))
    }

    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        let mut tokenizer = match self.meta.str(MODEL)? {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            "bert" => self.word_piece()?,
            other => {
                let known = "`gpt2` (byte-level BPE), `llama` (SentencePiece) or `bert` (WordPiece)";
                return Err(self.bad(MODEL, &format!("expected {known}, got {}", quoted(other))));
            }
        };
        // Control tokens, such as those of chat templates, and user-defined tokens are one token each wherever text
        // contains them. Only control tokens can be skipped when decoding.
        let added: Vec<AddedToken> = (self.of_type(|ty| ty == CONTROL).map(|(_, token)| (token, true)))
            .chain(self.of_type(|ty| ty == USER_DEFINED).map(|(_, token)| (token, false)))
            .map(|(token, special)| AddedToken::from(token, special).normalized(false))
            .collect();
        tokenizer.add_tokens(added).map_err(|e| self.bad(TYPES, &e.to_string()))?;
        Ok(tokenizer)
    }

    /// Byte-level BPE, with the merges in the file.
    fn byte_level(&self) -> Result<Tokenizer> {
        let pre = pre_tokenizer(self)?;
        let mut merges = Merges::new();
        for (i, line) in self.meta.strs(MERGES)?.iter().enumerate() {
            let bad = |what: &str| self.bad(MERGES, &format!("merge {i}, {}: {what}", quoted(line)));
            let (a, b) = line.split_once(' ').ok_or_else(|| bad("expected two tokens with a space between"))?;
            // `BPE` panics if the joined token is missing and longer than all tokens.
            let joined = [a, b].concat();
            if let Some(missing) = [a, b, &joined].into_iter().find(|t| !self.ids.contains_key(t)) {
                return Err(bad(&format!("{} is no token", quoted(missing))));
            }
            merges.push((a.into(), b.into()));
        }
        let bpe = self.bpe(merges, |builder| builder.ignore_merges(pre.whole_words), MERGES)?;
        let mut tokenizer = Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(pre.build()?));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Ok(tokenizer)
    }

    fn bpe(&self, merges: Merges, set: impl FnOnce(BpeBuilder) -> BpeBuilder, key: &str) -> Result<BPE> {
        let vocab: Vocab = self.tokens.iter().cloned().zip(0..).collect();
        let builder = set(BPE::builder().vocab_and_merges(vocab, merges));
        builder.build().map_err(|e| self.bad(key, &e.to_string()))
    }

    /// SentencePiece BPE. The file has no merges: the pair whose joined token has the highest score is merged first.
    fn sentence_piece(&self) -> Result<Tokenizer> {
        const SPACE: &str = "▁";
        let bytes = self.of_type(|ty| ty == BYTE).count() == 256;
        let unknown = self.unknown(0)?;
        let set = |builder: BpeBuilder| {
            let builder = builder.byte_fallback(bytes).fuse_unk(true);
            unknown.into_iter().fold(builder, |builder, token| builder.unk_token(token))
        };
        let mut tokenizer = Tokenizer::new(self.bpe(self.merges_by_score()?, set, SCORES)?);
        let key = "tokenizer.ggml.add_space_prefix";
        let prefix = if self.meta.contains(key) { self.meta.bool(key)? } else { true };
        let parts = |e: tokenizers::Error| self.bad(MODEL, &e.to_string());
        let mut normalizers = vec![];
        let to_space = Replace::new(SPACE, " ").map_err(parts)?;
        let mut decoders: Vec<DecoderWrapper> = vec![to_space.into(), ByteFallback::new().into(), Fuse::new().into()];
        if prefix {
            normalizers.push(Prepend::new(SPACE.into()).into());
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        normalizers.push(Replace::new(" ", SPACE).map_err(parts)?.into());
        tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(parts)?;
        tokenizer.with_decoder(Some(Decoders::new(decoders)));
        Ok(tokenizer)
    }

    /// All pairs of tokens that form a third one, in descending order of the third one's score. Control tokens, the
    /// unknown token and byte tokens are not formed from others.
    fn merges_by_score(&self) -> Result<Merges> {
        let scores = self.meta.f32s(SCORES)?;
        self.check_len(SCORES, scores.len())?;
        let is_text = |id: u32| ![UNKNOWN, CONTROL, BYTE].contains(&self.types[id as usize]);
        let piece = |text: &str| self.ids.get(text).copied().filter(|&id| is_text(id));
        let mut pairs = vec![];
        for (id, token) in self.of_type(|ty| ![UNKNOWN, CONTROL, BYTE].contains(&ty)) {
            if token.len() > MAX_PIECE_BYTES {
                let what = format!("token {id} has {} bytes, expected at most {MAX_PIECE_BYTES}", token.len());
                return Err(self.bad(TOKENS, &what));
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (piece(left), piece(right)) {
                    pairs.push((scores[id as usize], l, r));
                }
            }
        }
        // Pairs that form the same token have the same score. SentencePiece then prefers the first in the text. Here
        // the pairs need a fixed order, and this one is that of `transformers`.
        pairs.sort_by(|(s, l, r), (t, m, q)| t.total_cmp(s).then(l.cmp(m)).then(r.cmp(q)));
        let text = |id: u32| self.tokens[id as usize].clone();
        Ok(pairs.into_iter().map(|(_, l, r)| (text(l), text(r))).collect())
    }

    /// WordPiece, as in BERT. The file stores the start of a word as `▁word` and a continuation as `part`, where BERT
    /// has `word` and `##part`.
    fn word_piece(&self) -> Result<Tokenizer> {
        let (start, inside) = ("▁", "##");
        let unknown = self.unknown(100)?;
        let unknown = unknown.ok_or_else(|| self.bad("tokenizer.ggml.unknown_token_id", "is missing: an id"))?;
        let vocab = self.tokens.iter().zip(&self.types).zip(0..).map(|((token, ty), id)| {
            let token = match token.strip_prefix(start) {
                Some(word) => word.to_string(),
                None if *ty == CONTROL || *token == unknown => token.clone(),
                None => [inside, token].concat(),
            };
            (token, id)
        });
        let model = WordPiece::builder().vocab(vocab.collect::<Vocab>()).unk_token(unknown);
        let mut tokenizer = Tokenizer::new(model.build().map_err(|e| self.bad(TOKENS, &e.to_string()))?);
        let normalizer = BertNormalizer::new(true, true, None, true);
        tokenizer.with_normalizer(Some(normalizer)).map_err(|e| self.bad(MODEL, &e.to_string()))?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        tokenizer.with_decoder(Some(WordPieceDecoder::new(inside.into(), true)));
        Ok(tokenizer)
    }
}

/// How text is split into words before pairs within them are merged. Each pattern splits the pieces left by the
/// patterns before it into its matches and what lies between them.
struct PreTokenizer {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Whether a word that is itself a token becomes that token, even if no merges lead there.
    whole_words: bool,
    adds_bos: bool,
}

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

#[rustfmt::skip]
const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "exaone4", "modern-bert", "trillion"],
        patterns: &[GPT_2],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        patterns: &[r"\p{N}", GPT_2],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"],
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        whole_words: true, adds_bos: true,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"],
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, "[0-9][0-9][0-9]"],
        whole_words: false, adds_bos: false,
    },
    // Also used if the file names none.
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],
        whole_words: false, adds_bos: false,
    },
];

fn pre_tokenizer(vocabulary: &Vocabulary<'_>) -> Result<&'static PreTokenizer> {
    let name = if vocabulary.meta.contains(PRE) { vocabulary.meta.str(PRE)? } else { "default" };
    let found = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name));
    found.ok_or_else(|| {
        let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        vocabulary.bad(PRE, &format!("expected one of {}, got {}", known.join(", "), quoted(name)))
    })
}

impl PreTokenizer {
    fn build(&self) -> Result<PreTokenizers> {
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex((*pattern).into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            split.map(PreTokenizerWrapper::from).map_err(|e| Error::format(self.names[0], e))
        };
        let mut parts = self.patterns.iter().map(split).collect::<Result<Vec<_>>>()?;
        // Bytes become the characters that the vocabulary writes them as.
        parts.push(ByteLevel::new(false, true, false).into());
        Ok(PreTokenizers::new(parts))
    }
}
