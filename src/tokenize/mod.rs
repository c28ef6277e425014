//! Text to tokens and back, and chats to text. Needs the feature `tokenizers`.
//!
//! Use this to run a loaded model on text: [`ModelTokenizer::open`] takes a GGUF file or a folder in the layout of
//! model hubs, and sets up the `tokenizers` and `minijinja` crates as the file demands. For small models of characters,
//! trained from scratch, [`CharTokenizer`](crate::train::data::CharTokenizer) suffices and needs no feature.
//!
//! Files may come from anywhere: whatever they hold, the result is an error or a tokenizer. Chat templates are
//! programs. They run with limits on their steps and on the depth and length of what they write, without access to
//! files or other templates. A hostile template can still take a long time: `minijinja` sets no limit on joining and
//! comparing lists that contain themselves many times over.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use chat::ChatTemplate;
use files::Files;
use guard::guarded;
use text::Codec;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use crate::error::{Error, Result};
use crate::format::Weights;

mod added;
mod chat;
mod files;
mod gguf;
mod guard;
mod hub;
mod json;
mod save;
mod text;
mod to_gguf;
mod tokens;
mod vocab;

pub use chat::Message;
pub use text::TextStream;

/// The tokenizer of a model, with its stop tokens and its chat template.
///
/// ```
/// use throughline::tokenize::ModelTokenizer;
/// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
/// let ids = tokenizer.encode("the harbour", false)?;
/// assert_eq!(tokenizer.decode(&ids, false)?, "the harbour");
/// # Ok::<(), throughline::Error>(())
/// ```
pub struct ModelTokenizer {
    codec: Codec,
    /// Tokens to put around a text, if `tokenizer` does not add them itself.
    before: Vec<u32>,
    after: Vec<u32>,
    /// The token that ends a text.
    eos: Option<u32>,
    stop: Vec<u32>,
    max_tokens: Option<usize>,
    /// Whether a text that is too long loses its beginning, not its end.
    cut_start: bool,
    chat: Option<ChatTemplate>,
    /// Whether texts become lower case before all else.
    lower_case: bool,
}

impl ModelTokenizer {
    /// A tokenizer with nothing around it. `twins` are ids whose token another id stands for, and that id.
    fn new(tokenizer: Tokenizer, path: &str, twins: HashMap<u32, u32>) -> Self {
        ModelTokenizer {
            codec: Codec { tokenizer, path: path.into(), twins },
            before: vec![],
            after: vec![],
            eos: None,
            stop: vec![],
            max_tokens: None,
            cut_start: false,
            chat: None,
            lower_case: false,
        }
    }

    fn with_stop(self, mut stop: Vec<u32>) -> Self {
        stop.sort_unstable();
        stop.dedup();
        ModelTokenizer { stop, ..self }
    }

    /// Opens the tokenizer of a GGUF file or of a folder.
    ///
    /// A folder holds `tokenizer.json`, or the files of an older tokenizer: `vocab.json` with `merges.txt` (GPT-2,
    /// Qwen 2) or `vocab.txt` (BERT). Further tokens, ends and settings come from `tokenizer_config.json`,
    /// `special_tokens_map.json`, `added_tokens.json`, `generation_config.json`, `config.json`,
    /// `sentence_bert_config.json` and `chat_template.jinja`, where they are there, with the defaults of
    /// `transformers`. A folder's settings for truncation and padding are ignored; see
    /// [`max_tokens`](Self::max_tokens).
    ///
    /// GGUF files may use byte-level BPE (with the pre-tokenizers of GPT-2, SmolLM, Llama 3, Qwen 2, Falcon and
    /// others), SentencePiece BPE or WordPiece. Defaults are those of llama.cpp. Tokens that mark turns count as such
    /// by their text, even if the file gives them the type of ordinary ones.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Format`] name the file and the key.
    pub fn open(path: &Path) -> Result<Self> {
        match path.is_dir() {
            true => hub::open(&Files::of_folder(path)),
            false => Self::of(&Weights::open(path)?),
        }
    }

    /// The same for weights that are already open.
    pub fn of(weights: &Weights) -> Result<Self> {
        let path = Path::new(weights.path());
        match path.is_dir() {
            true if !gguf::has_tokenizer(weights) => hub::open(&Files::of_folder(path)),
            _ => gguf::open(weights),
        }
    }

    /// The same for the files of a folder that are in memory: pairs of a file's name and its content. `path` is where
    /// they are, for messages.
    ///
    /// Use it for files that are part of a program, or that came over a network. For a GGUF file in memory, use
    /// [`Weights::from_bytes`] and [`of`](Self::of).
    ///
    /// ```
    /// use throughline::tokenize::ModelTokenizer;
    /// # let (json, config) = ("tests/data/tiny_chat/tokenizer.json", "tests/data/tiny_chat/tokenizer_config.json");
    /// let (json, config) = (std::fs::read(json).unwrap(), std::fs::read(config).unwrap());
    /// let files = [("tokenizer.json", json.as_slice()), ("tokenizer_config.json", config.as_slice())];
    /// let tokenizer = ModelTokenizer::from_files("tiny_chat", files)?;
    /// assert!(tokenizer.has_chat());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn from_files<'a>(path: &str, files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self> {
        hub::open(&Files::in_memory(path, files))
    }

    /// Turns text into token ids.
    ///
    /// `add_special` adds the tokens that the model expects around a whole text, such as one that begins it. Control
    /// tokens that are spelled out in the text become control tokens.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encode = || self.codec.tokenizer.encode_fast(self.cased(text), add_special);
        let encoding = guarded(&self.codec.path, encode)?;
        match add_special {
            true => Ok([&self.before, encoding.get_ids(), &self.after].concat()),
            false => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// The text in the case that the vocabulary has.
    fn cased<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if self.lower_case { Cow::Owned(text.to_lowercase()) } else { Cow::Borrowed(text) }
    }

    /// [`encode`](Self::encode) for a text that must not have more than `max_tokens` tokens. If it has, it loses those
    /// at its end, or at its beginning if the model's folder says so. The special tokens around it stay and count.
    ///
    /// # Errors
    ///
    /// If there is no room for the special tokens.
    ///
    /// ```
    /// use throughline::tokenize::ModelTokenizer;
    /// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
    /// let ids = tokenizer.encode("the harbour wall", true)?;
    /// assert_eq!(tokenizer.encode_within("the harbour wall", 3)?, ids[..3]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn encode_within(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>> {
        let processor = self.codec.tokenizer.get_post_processor();
        let added = self.before.len() + self.after.len() + processor.map_or(0, |p| p.added_tokens(false));
        let Some(room) = max_tokens.checked_sub(added) else {
            return Err(Error::data("max_tokens", format!("room for {added} special tokens"), max_tokens));
        };
        let direction = if self.cut_start { TruncationDirection::Left } else { TruncationDirection::Right };
        let encoding = guarded(&self.codec.path, || {
            let mut encoding = self.codec.tokenizer.encode_fast(self.cased(text), false)?;
            encoding.truncate(room, 0, direction);
            self.codec.tokenizer.post_process(encoding, None, true)
        })?;
        Ok([&self.before, encoding.get_ids(), &self.after].concat())
    }

    /// Turns token ids into text. `skip_special` leaves control tokens out. Bytes that are not UTF-8 become `�`, and an
    /// id without a token is no text: models often have room for more tokens than their tokenizer has.
    ///
    /// To print a text while it is generated use [`stream`](Self::stream).
    ///
    /// # Errors
    ///
    /// If the parts of the tokenizer's file do not fit each other.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.codec.decode(ids.iter().filter_map(|&id| self.codec.token(id, skip_special)).collect())
    }

    /// Decodes tokens one by one, as they arrive. See [`TextStream`].
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream::new(&self.codec, skip_special)
    }

    /// Renders a chat as text with the model's template. `add_generation_prompt` ends it with the beginning of the
    /// assistant's answer.
    ///
    /// As in `transformers`, control tokens that a message spells out become control tokens when the text is encoded.
    /// Check messages from untrusted users for them.
    ///
    /// # Errors
    ///
    /// The error names the template's line. Templates also reject messages on purpose, for instance roles in an order
    /// that the model does not know.
    ///
    /// ```
    /// use throughline::tokenize::{Message, ModelTokenizer};
    /// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
    /// let text = tokenizer.chat(&[Message::new("user", "How deep is it?")], true)?;
    /// assert_eq!(text, "<|im_start|>user\nHow deep is it?<|im_end|>\n<|im_start|>assistant\n");
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template()?.render(messages, add_generation_prompt)
    }

    /// [`chat`](Self::chat) for several beginnings of a chat at once: of so many messages each, with or without the
    /// generation prompt. It is an error if they have more than `max_bytes` all together.
    pub(crate) fn chat_parts(
        &self,
        messages: &[Message],
        parts: &[(usize, bool)],
        max_bytes: usize,
    ) -> Result<Vec<String>> {
        self.template()?.render_parts(messages, parts, max_bytes)
    }

    fn template(&self) -> Result<&ChatTemplate> {
        self.chat.as_ref().ok_or_else(|| Error::format(&self.codec.path, "has no chat template"))
    }

    /// The error of [`chat`](Self::chat), if there is no template.
    pub(crate) fn check_chat(&self) -> Result<()> {
        self.template().map(drop)
    }

    /// Renders a chat and encodes it, ready for the model. No further tokens are added: templates write the token that
    /// begins a text themselves.
    pub fn chat_ids(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        self.encode(&self.chat(messages, add_generation_prompt)?, false)
    }

    /// Whether the model has a template for [`chat`](Self::chat).
    pub fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// Whether the token ends a text or a turn: stop generating there.
    pub fn is_stop(&self, id: u32) -> bool {
        self.stop.binary_search(&id).is_ok()
    }

    /// The tokens that end a text or a turn, in ascending order.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// The token that ends a text, if the files name one: what a text that a model is trained on ends with. Of models
    /// that chat it is often the token that ends a turn.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The longest text, in tokens, that the model is meant for, if a folder sets one. [`encode`](Self::encode) cuts
    /// nothing; [`encode_within`](Self::encode_within) does.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// Number of tokens in the vocabulary.
    pub fn vocab_len(&self) -> usize {
        self.codec.tokenizer.get_vocab_size(true)
    }

    /// The underlying tokenizer of the `tokenizers` crate, for everything else that it can do. It adds the tokens around
    /// a text only if it comes from a `tokenizer.json`.
    pub fn inner(&self) -> &Tokenizer {
        &self.codec.tokenizer
    }
}

impl fmt::Debug for ModelTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ModelTokenizer");
        shown.field("path", &self.codec.path).field("tokens", &self.vocab_len()).field("stop", &self.stop);
        shown.finish_non_exhaustive()
    }
}
