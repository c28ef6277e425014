//! Tokenizers of GGUF files: the metadata keys `tokenizer.ggml.*`, assembled from the parts of the `tokenizers` crate.
//!
//! Sources: the meaning of the keys, the names of pre-tokenizers and their patterns follow llama.cpp
//! (`src/llama-vocab.cpp`), which took the patterns from the models' `tokenizer.json`.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

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
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
    PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

use super::ModelTokenizer;
use super::chat::ChatTemplate;
use super::guard::guarded;
use super::text::byte_of;
use crate::error::{Error, Result, quoted};
use crate::format::{MetaValue, Metadata, Weights};

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";

/// Values of `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// The types of tokens that are found in a text before all others.
const ADDED: &[i64] = &[UNKNOWN, CONTROL, USER_DEFINED];

/// Tokens that end a turn or a text, whatever type the file gives them. Files often declare only one of them, or none.
/// The list is llama.cpp's.
pub(super) const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Further control tokens, if the file has no types.
const SPECIAL: &[&str] = &["<s>", "<bos>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[BOS]"];

/// Whether a token is a mark, such as the one that begins a turn, by how it looks: `<|im_start|>`. No ordinary word
/// looks like that, but converters have given such tokens the type of one.
fn is_mark(token: &str) -> bool {
    let inside = |open, close| token.strip_prefix(open)?.strip_suffix(close);
    let name: Option<&str> = inside("<|", "|>").or_else(|| inside("<｜", "｜>"));
    let is_name = |name: &str| name.contains(char::is_alphanumeric) && !name.contains(['Ġ', 'Ċ', ' ']);
    token == "<start_of_turn>" || name.is_some_and(is_name)
}

/// Longest token of a SentencePiece vocabulary. Each token is tried at every split, which takes time quadratic in its
/// length. SentencePiece itself stops at 16 characters by default.
const MAX_PIECE_BYTES: usize = 256;

/// Pairs of tokens that may form others, so that a small file needs no large memory. Llama 2 has 2 for each token.
const PAIRS_PER_TOKEN: usize = 32;
const MIN_PAIRS: usize = 100_000;

/// Whether the file contains a tokenizer.
pub(super) fn has_tokenizer(weights: &Weights) -> bool {
    weights.metadata().contains(MODEL)
}

/// The tokenizer, and everything that the file defines around it.
pub(super) fn open(weights: &Weights) -> Result<ModelTokenizer> {
    of(weights.path(), weights.metadata())
}

/// The same for the metadata of a file.
pub(super) fn of(path: &str, metadata: &Metadata) -> Result<ModelTokenizer> {
    let vocabulary = Vocabulary::of(path, metadata)?;
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
    stop.extend(vocabulary.ends());
    let stop = vocabulary.same_text(&stop);
    let text = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize].clone());
    let chat = match vocabulary.meta.contains(TEMPLATE) {
        true => Some(ChatTemplate {
            path: path.into(),
            key: TEMPLATE.into(),
            source: vocabulary.meta.str(TEMPLATE)?.into(),
            bos: text(bos),
            eos: text(eos),
        }),
        false => None,
    };
    let (tokenizer, twins) = vocabulary.tokenizer()?;
    let tokenizer = ModelTokenizer {
        eos: eos.map(|id| twins.get(&id).copied().unwrap_or(id)),
        before: before.into_iter().collect(),
        after: after.into_iter().collect(),
        chat,
        ..ModelTokenizer::new(tokenizer, path, twins)
    };
    Ok(tokenizer.with_stop(stop))
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
            _ => Defaults { add_bos: vocabulary.pre_tokenizer()?.adds_bos, ..Default::default() },
        })
    }
}

/// The lists of a file.
struct Vocabulary<'a> {
    path: &'a str,
    meta: &'a Metadata,
    tokens: &'a [String],
    types: Vec<i64>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn of(path: &'a str, meta: &'a Metadata) -> Result<Self> {
        meta.str(MODEL)?;
        let tokens = meta.strs(TOKENS)?;
        let mut vocabulary = Vocabulary { path, meta, tokens, types: vec![], ids: HashMap::new() };
        vocabulary.types = vocabulary.types()?;
        vocabulary.ids = index(tokens, &vocabulary.types);
        Ok(vocabulary)
    }

    /// The type of each token. Without a list of them, what looks like a byte or a control token is one.
    fn types(&self) -> Result<Vec<i64>> {
        let mut types = match self.meta.contains(TYPES) {
            true => self.meta.ints(TYPES)?,
            false => vec![NORMAL; self.tokens.len()],
        };
        self.check_len(TYPES, types.len())?;
        for (ty, token) in types.iter_mut().zip(self.tokens) {
            let untyped = !self.meta.contains(TYPES);
            *ty = match token.as_str() {
                token if ENDS.contains(&token) => CONTROL,
                token if *ty == NORMAL && is_mark(token) => CONTROL,
                "<unk>" | "[UNK]" if untyped => UNKNOWN,
                token if untyped && byte_of(token).is_some() => BYTE,
                token if untyped && SPECIAL.contains(&token) => CONTROL,
                _ => *ty,
            };
        }
        Ok(types)
    }

    fn bad(&self, key: &str, what: &str) -> Error {
        Error::format(self.path, format!("metadata `{key}`: {what}"))
    }

    fn check_len(&self, key: &str, len: usize) -> Result<()> {
        match len >= self.tokens.len() {
            true => Ok(()),
            false => Err(self.bad(key, &format!("expected one for each of {} tokens, got {len}", self.tokens.len()))),
        }
    }

    /// The token that a key names, or the default if the key is missing or no token has its id, as in llama.cpp.
    fn id(&self, key: &str, default: Option<u32>) -> Result<Option<u32>> {
        let is_token = |id: &u32| (*id as usize) < self.tokens.len();
        let id = match self.meta.get(key) {
            None | Some(MetaValue::I8(..0) | MetaValue::I16(..0) | MetaValue::I32(..0) | MetaValue::I64(..0)) => None,
            Some(_) => u32::try_from(self.meta.usize(key)?).ok(),
        };
        Ok(id.filter(is_token).or(default.filter(is_token)))
    }

    /// The token to put around a text, if the file asks for it.
    fn added(&self, key: &str, default: bool, id: Option<u32>) -> Result<Option<u32>> {
        let said = self.meta.optional(key, Metadata::bool)?;
        let by_default = if said.is_none() { " by default" } else { "" };
        match (said.unwrap_or(default), id) {
            (true, None) => {
                Err(self.bad(key, &format!("is true{by_default}, but the file does not say which token it is")))
            }
            (true, id) => Ok(id),
            (false, _) => Ok(None),
        }
    }

    fn of_type(&self, is: impl Fn(i64) -> bool) -> impl Iterator<Item = (u32, &'a str)> {
        let all = (0..).zip(self.tokens).zip(&self.types);
        all.filter(move |(_, ty)| is(**ty)).map(|((id, token), _)| (id, token.as_str()))
    }

    /// The tokens that end a turn or a text by their names.
    fn ends(&self) -> impl Iterator<Item = u32> {
        // In the format of gpt-oss, `<|end|>` ends only a part of a turn.
        let has = |token: &str| self.ids.contains_key(token);
        let parts = (has("<|return|>") && has("<|call|>")) || (has("<|calls|>") && has("<|flush|>"));
        let ends = (0..).zip(self.tokens).filter(|(_, token)| ENDS.contains(&token.as_str()));
        ends.filter(move |(_, token)| !(parts && *token == "<|end|>")).map(|(id, _)| id)
    }

    /// These tokens, and all others with the text of one of them.
    fn same_text(&self, ids: &[u32]) -> Vec<u32> {
        let texts: HashSet<&str> = ids.iter().map(|&id| self.tokens[id as usize].as_str()).collect();
        let others = (0..).zip(self.tokens).filter(|(_, t)| !t.is_empty() && texts.contains(t.as_str()));
        others.map(|(id, _)| id).chain(ids.iter().copied()).collect()
    }

    /// The text of the unknown token.
    fn unknown(&self, default: u32) -> Result<Option<String>> {
        let id = self.id("tokenizer.ggml.unknown_token_id", Some(default))?;
        Ok(id.map(|id| self.tokens[id as usize].clone()))
    }

    /// The tokenizer, and the ids whose token another id stands for.
    fn tokenizer(&self) -> Result<(Tokenizer, HashMap<u32, u32>)> {
        let mut names = Cow::Borrowed(self.tokens);
        let mut tokenizer = match self.meta.str(MODEL)? {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            "bert" => {
                names = Cow::Owned(self.words()?);
                self.word_piece(&names)?
            }
            other => {
                let known = "`gpt2` (byte-level BPE), `llama` (SentencePiece) or `bert` (WordPiece)";
                return Err(self.bad(MODEL, &format!("expected {known}, got {}", quoted(other))));
            }
        };
        // Control tokens, such as those of chat templates, and user-defined tokens are one token each wherever text
        // contains them. Those that are not user-defined can be skipped when decoding.
        let added = names.iter().zip(&self.types).filter(|(_, ty)| ADDED.contains(ty));
        let added = added.map(|(name, ty)| AddedToken::from(name, *ty != USER_DEFINED).normalized(false));
        let added: Vec<AddedToken> = added.collect();
        guarded(self.path, || tokenizer.add_tokens(added))?;
        let ids = index(&names, &self.types);
        let standing = |(id, name): (u32, &String)| Some((id, *ids.get(name.as_str())?));
        let twins = (0..).zip(names.iter()).filter_map(standing).filter(|(id, other)| id != other).collect();
        Ok((tokenizer, twins))
    }

    /// Byte-level BPE, with the merges in the file. Those of tokens that the file lacks merge nothing.
    fn byte_level(&self) -> Result<Tokenizer> {
        let pre = self.pre_tokenizer()?;
        let (mut merges, mut seen) = (Merges::new(), HashSet::new());
        for (i, line) in self.meta.strs(MERGES)?.iter().enumerate() {
            // The first token may itself start with a space.
            let space = line.char_indices().skip(1).find(|(_, c)| *c == ' ');
            let (a, b) = space.map(|(at, _)| (&line[..at], &line[at + 1..])).ok_or_else(|| {
                let what = format!("merge {i}, {}: expected two tokens with a space between", quoted(line));
                self.bad(MERGES, &what)
            })?;
            let known = [a, b, &[a, b].concat()].into_iter().all(|token| self.ids.contains_key(token));
            if known && seen.insert((a, b)) {
                merges.push((a.into(), b.into()));
            }
        }
        let bpe = self.bpe(merges, |builder| builder.ignore_merges(pre.whole_words), MERGES)?;
        let mut tokenizer = Tokenizer::new(bpe);
        if COMPOSED.contains(&self.pre_name()?) {
            tokenizer.with_normalizer(Some(NFC)).map_err(|e| self.bad(PRE, &e.to_string()))?;
        }
        tokenizer.with_pre_tokenizer(Some(pre.build(false)?));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Ok(tokenizer)
    }

    fn bpe(&self, merges: Merges, set: impl FnOnce(BpeBuilder) -> BpeBuilder, key: &str) -> Result<BPE> {
        let vocab: Vocab = self.ids.iter().map(|(token, id)| (token.to_string(), *id)).collect();
        let builder = set(BPE::builder().vocab_and_merges(vocab, merges));
        builder.build().map_err(|e| self.bad(key, &e.to_string()))
    }

    fn pre_name(&self) -> Result<&'a str> {
        if self.meta.contains(PRE) { self.meta.str(PRE) } else { Ok("default") }
    }

    fn pre_tokenizer(&self) -> Result<&'static PreTokenizer> {
        pre_tokenizer(self.pre_name()?).map_err(|message| self.bad(PRE, &message))
    }

    /// SentencePiece BPE. The file has no merges: the pair whose joined token has the highest score is merged first.
    fn sentence_piece(&self) -> Result<Tokenizer> {
        const SPACE: &str = "▁";
        let unknown = self.unknown(0)?;
        let set = |builder: BpeBuilder| {
            let builder = builder.byte_fallback(true).fuse_unk(true);
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
            if pairs.len() > MIN_PAIRS.max(PAIRS_PER_TOKEN * self.tokens.len()) {
                let what = format!("more than {PAIRS_PER_TOKEN} pairs for each of {} tokens", self.tokens.len());
                return Err(self.bad(TOKENS, &format!("{what} form a token")));
            }
        }
        // Pairs that form the same token have the same score. SentencePiece then prefers the first in the text. Here
        // the pairs need a fixed order, and this one is that of `transformers`.
        pairs.sort_by(|(s, l, r), (t, m, q)| t.total_cmp(s).then(l.cmp(m)).then(r.cmp(q)));
        let text = |id: u32| self.tokens[id as usize].clone();
        Ok(pairs.into_iter().map(|(_, l, r)| (text(l), text(r))).collect())
    }

    /// The tokens of a WordPiece vocabulary as BERT has them: `word` and `##part` for the file's `▁word` and `part`.
    fn words(&self) -> Result<Vec<String>> {
        let unknown = self.unknown(100)?;
        let word = |(token, ty): (&String, &i64)| match token.strip_prefix('▁') {
            _ if token.is_empty() || Some(token) == unknown.as_ref() => token.clone(),
            Some(word) => word.to_string(),
            None if ADDED.contains(ty) => token.clone(),
            None => [INSIDE, token].concat(),
        };
        Ok(self.tokens.iter().zip(&self.types).map(word).collect())
    }

    /// WordPiece, as in BERT.
    fn word_piece(&self, words: &[String]) -> Result<Tokenizer> {
        let key = "tokenizer.ggml.unknown_token_id";
        let unknown = self.unknown(100)?.ok_or_else(|| self.bad(key, "is missing: an id"))?;
        let vocab: Vocab = index(words, &self.types).into_iter().map(|(word, id)| (word.to_string(), id)).collect();
        let model = WordPiece::builder().vocab(vocab).unk_token(unknown);
        let mut tokenizer = Tokenizer::new(model.build().map_err(|e| self.bad(TOKENS, &e.to_string()))?);
        let flag = |key| self.meta.optional(key, Metadata::bool);
        let lower_case = flag("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
        let accents = flag("tokenizer.ggml.normalizer.strip_accents")?;
        let normalizer = BertNormalizer::new(true, true, accents, lower_case);
        tokenizer.with_normalizer(Some(normalizer)).map_err(|e| self.bad(MODEL, &e.to_string()))?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        tokenizer.with_decoder(Some(WordPieceDecoder::new(INSIDE.into(), true)));
        Ok(tokenizer)
    }
}

/// How BERT writes that a token continues a word.
const INSIDE: &str = "##";

/// The id that stands for each token: the first one, but an added token's rather than an ordinary one's. An empty token
/// stands for no text.
fn index<'t>(tokens: &'t [String], types: &[i64]) -> HashMap<&'t str, u32> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for added in [true, false] {
        let wanted = |(_, ty): &(_, &i64)| ADDED.contains(ty) == added;
        for ((id, token), _) in (0..).zip(tokens).zip(types).filter(wanted).filter(|((_, token), _)| !token.is_empty())
        {
            ids.entry(token.as_str()).or_insert(id);
        }
    }
    ids
}

/// How text is split into words before pairs within them are merged. Each pattern splits the pieces left by the
/// patterns before it into its matches and what lies between them.
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Whether a word that is itself a token becomes that token, even if no merges lead there.
    whole_words: bool,
    adds_bos: bool,
}

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

#[rustfmt::skip]
const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &[
            "gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "exaone4", "modern-bert",
            "trillion", "jais", "gigachat", "a.x-4.0", "mellum", "granite-docling",
        ],
        patterns: &[GPT_2],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT_2],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "midm-2.0"],
        patterns: &[LLAMA_3],
        whole_words: true, adds_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        patterns: &[LLAMA_3],
        whole_words: false, adds_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo", "f2llmv2", "solar-open"],
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

/// The pre-tokenizer of this name; a message about the known ones if there is none.
pub(super) fn pre_tokenizer(name: &str) -> Result<&'static PreTokenizer, String> {
    let found = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name));
    found.ok_or_else(|| {
        let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        format!("expected one of {}, got {}", known.join(", "), quoted(name))
    })
}

/// The name of the pre-tokenizer that splits texts as a `tokenizer.json` does, if GGUF files have one. `whole_words` and
/// `composed` are what else comes with a name.
pub(super) fn name_of(
    path: &str,
    splitter: &PreTokenizerWrapper,
    whole_words: bool,
    composed: bool,
) -> Result<Option<&'static str>> {
    let wanted = splits(path, splitter)?;
    for pre in PRE_TOKENIZERS.iter().filter(|pre| pre.whole_words == whole_words) {
        let name = pre.names.iter().find(|name| COMPOSED.contains(name) == composed);
        if name.is_some() && splits(path, &pre.build(false)?.into())? == wanted {
            return Ok(name.copied());
        }
    }
    Ok(None)
}

/// Where a text of all kinds of characters is split.
fn splits(path: &str, splitter: &PreTokenizerWrapper) -> Result<Vec<String>> {
    guarded(path, || {
        let mut text = PreTokenizedString::from(SAMPLE);
        splitter.pre_tokenize(&mut text)?;
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.into_iter().map(|(text, ..)| text.to_string()).collect())
    })
}

/// A text that known pre-tokenizers split differently: contractions in both cases, runs of digits, spaces, line ends and
/// punctuation, other scripts and marks.
pub(super) const SAMPLE: &str = "Hello, world! I'm sure they'LL've it's Don'T  gone  camelCase HTTPServer\n\n \n\t\tto 3 33 \
    333 3333 33333333 places...\r\n\r\n  $50.00 +=~^|`code`<tag x=\"y\">{});// _a__b  \n élan nai\u{308}ve \
    \u{65e5}\u{672c}\u{8a9e}\u{30c6}\u{30b9}\u{30c8}\u{3002} ру\u{301}сский ١٢٣ ½² \u{1f600}\u{1f44d}\u{1f3fd} \
    \u{a0}x\u{3000}y हिन्दी\u{200d}ไทย!!!??  end   ";

/// The pre-tokenizers of models whose `tokenizer.json` composes characters first (NFC), which GGUF files do not say.
const COMPOSED: &[&str] = &["qwen2", "stablelm2", "hunyuan", "command-r", "olmo", "mpt", "modern-bert"];

impl PreTokenizer {
    /// Splits a text, and writes its bytes as the characters of the vocabulary.
    pub(super) fn build(&self, add_prefix_space: bool) -> Result<PreTokenizers> {
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex((*pattern).into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            split.map(PreTokenizerWrapper::from).map_err(|e| Error::format(self.names[0], e))
        };
        let mut parts = self.patterns.iter().map(split).collect::<Result<Vec<_>>>()?;
        parts.push(ByteLevel::new(add_prefix_space, true, false).into());
        Ok(PreTokenizers::new(parts))
    }
}
