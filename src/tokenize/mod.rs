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

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use chat::ChatTemplate;
use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
};

use crate::error::{Error, Result};
use crate::format::Weights;

mod chat;
mod gguf;
mod hub;
mod save;

pub use chat::Message;

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
    tokenizer: Tokenizer,
    path: String,
    /// Tokens to put around a text, if `tokenizer` does not add them itself.
    before: Vec<u32>,
    after: Vec<u32>,
    stop: Vec<u32>,
    max_tokens: Option<usize>,
    chat: Option<ChatTemplate>,
}

impl ModelTokenizer {
    fn new(
        tokenizer: Tokenizer,
        path: &str,
        before: Vec<u32>,
        after: Vec<u32>,
        mut stop: Vec<u32>,
        max_tokens: Option<usize>,
        chat: Option<ChatTemplate>,
    ) -> Self {
        stop.sort_unstable();
        stop.dedup();
        ModelTokenizer { tokenizer, path: path.into(), before, after, stop, max_tokens, chat }
    }

    /// Opens the tokenizer of a GGUF file or of a folder. A folder holds `tokenizer.json` and optionally
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json`,
    /// `sentence_bert_config.json` and `chat_template.jinja`.
    ///
    /// GGUF files may use byte-level BPE (with the pre-tokenizers of GPT-2, SmolLM, Llama 3, Qwen 2, Falcon and
    /// others), SentencePiece BPE or WordPiece. A folder's settings for truncation and padding are ignored; see
    /// [`max_tokens`](Self::max_tokens).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Format`] name the file and the key.
    pub fn open(path: &Path) -> Result<Self> {
        match path.is_dir() {
            true => hub::open(path),
            false => Self::of(&Weights::open(path)?),
        }
    }

    /// The same for weights that are already open.
    pub fn of(weights: &Weights) -> Result<Self> {
        let path = Path::new(weights.path());
        match path.is_dir() {
            true if !gguf::has_tokenizer(weights) => hub::open(path),
            _ => gguf::open(weights),
        }
    }

    /// Turns text into token ids.
    ///
    /// `add_special` adds the tokens that the model expects around a whole text, such as one that begins it. Control
    /// tokens that are spelled out in the text become control tokens.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.path, || self.tokenizer.encode_fast(text, add_special))?;
        match add_special {
            true => Ok([&self.before, encoding.get_ids(), &self.after].concat()),
            false => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// Turns token ids into text. `skip_special` leaves control tokens out. Bytes that are not UTF-8 become `�`.
    ///
    /// To print a text while it is generated use [`stream`](Self::stream).
    ///
    /// # Errors
    ///
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        ids.iter().try_for_each(|&id| self.check_id(id))?;
        guarded(&self.path, || self.tokenizer.decode(ids, skip_special))
    }

    fn check_id(&self, id: u32) -> Result<()> {
        match self.tokenizer.id_to_token(id) {
            Some(_) => Ok(()),
            None => Err(Error::data("ids", format!("one of the {} tokens of {}", self.vocab_len(), self.path), id)),
        }
    }

    /// Decodes tokens one by one, as they arrive. See [`TextStream`].
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special, inner: self.tokenizer.decode_stream(skip_special), pending: vec![] }
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
        let chat = self.chat.as_ref().ok_or_else(|| Error::format(&self.path, "has no chat template"))?;
        chat.render(messages, add_generation_prompt)
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

    /// The longest text, in tokens, that the model is meant for, if a folder sets one. Longer texts are not truncated:
    /// check or cut them yourself.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// Number of tokens in the vocabulary.
    pub fn vocab_len(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The underlying tokenizer of the `tokenizers` crate, for everything else that it can do. For a GGUF file it does
    /// not add the tokens around a text.
    pub fn inner(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

impl fmt::Debug for ModelTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ModelTokenizer");
        shown.field("path", &self.path).field("tokens", &self.vocab_len()).field("stop", &self.stop);
        shown.finish_non_exhaustive()
    }
}

/// Runs code of the `tokenizers` crate, which panics on some files that its reader accepts: a post-processor with a
/// token that it does not list, a pattern without text. No set of checks beforehand could cover all such files, so the
/// panic is caught. The panic hook of the process still reports it.
fn guarded<T>(path: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    let done = done.unwrap_or_else(|_| Err("the parts of the file do not fit each other".into()));
    done.map_err(|e| Error::format(path, format!("tokenizer: {e}")))
}

/// Turns tokens into text one by one, to show a text while it is generated. A character made of several tokens comes
/// with the last of them.
///
/// ```
/// use throughline::tokenize::ModelTokenizer;
/// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
/// let mut stream = tokenizer.stream(true);
/// let mut text = String::new();
/// for id in tokenizer.encode("déjà vu", false)? {
///     text += &stream.push(id)?;
/// }
/// assert_eq!(text + &stream.finish()?, "déjà vu");
/// # Ok::<(), throughline::Error>(())
/// ```
pub struct TextStream<'a> {
    tokenizer: &'a ModelTokenizer,
    skip_special: bool,
    inner: DecodeStream<'a, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>,
    /// Tokens that have not produced text yet.
    pending: Vec<u32>,
}

impl TextStream<'_> {
    /// The text that this token adds; empty while a character is incomplete.
    ///
    /// # Errors
    ///
    /// If the id is not in the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.tokenizer.check_id(id)?;
        self.pending.push(id);
        let text = guarded(&self.tokenizer.path, || self.inner.step(id))?;
        if text.is_some() {
            self.pending.clear();
        }
        Ok(text.unwrap_or_default())
    }

    /// The rest of a text that ended within a character: `�` for its bytes.
    pub fn finish(self) -> Result<String> {
        self.tokenizer.decode(&self.pending, self.skip_special)
    }
}

impl fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextStream").field("pending", &self.pending).finish_non_exhaustive()
    }
}
