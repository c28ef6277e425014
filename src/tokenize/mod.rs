//! Text to tokens and back, and chats to text, as the model's file says. The `tokenizers` and `minijinja` crates,
//! set up. Needs the feature `tokenizers`.
//!
//! [`ModelTokenizer::open`] takes a GGUF file or a folder as model hubs have them. Files may come from anywhere:
//! what they hold makes an `Err` or a tokenizer. Chat templates are programs, and run with bounds on their steps, the
//! depth and length of what they write, and without files or other templates. A template that is written for it can
//! still take long: `minijinja` has no bound for joining and comparing lists that hold themselves many times over.

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

pub use chat::Message;

/// A model's tokenizer, with the tokens that end a text and the model's chat template.
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
    /// Tokens around a text, where `tokenizer` does not put them itself.
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

    /// The tokenizer of a GGUF file, or of a folder with `tokenizer.json` and, if they are there,
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json`,
    /// `sentence_bert_config.json` and `chat_template.jinja`.
    ///
    /// An `Err` names file and key. In GGUF files byte-level BPE (with the pre-tokenizers of GPT-2, SmolLM, Llama 3,
    /// Qwen 2, Falcon and others), SentencePiece's BPE and WordPiece are known. A folder's settings that cut texts
    /// or fill them up are not taken over; see [`max_tokens`](Self::max_tokens).
    pub fn open(path: &Path) -> Result<Self> {
        match path.is_dir() {
            true => hub::open(path),
            false => Self::of(&Weights::open(path)?),
        }
    }

    /// The same for weights that are open already.
    pub fn of(weights: &Weights) -> Result<Self> {
        let path = Path::new(weights.path());
        match path.is_dir() {
            true if !gguf::has_tokenizer(weights) => hub::open(path),
            _ => gguf::open(weights),
        }
    }

    /// Ids of a text. `add_special` puts the tokens around it that the model wants around a whole text: one that
    /// begins it, say. Control tokens that are written out in the text become themselves.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.path, || self.tokenizer.encode_fast(text, add_special))?;
        match add_special {
            true => Ok([&self.before, encoding.get_ids(), &self.after].concat()),
            false => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// The text of ids; `skip_special` leaves control tokens out. Bytes that are no UTF-8 become `�`. An `Err` if
    /// there is no such token.
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

    /// Text as its tokens come. See [`TextStream`].
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special, inner: self.tokenizer.decode_stream(skip_special), pending: vec![] }
    }

    /// A chat as text, by the model's template. `add_generation_prompt` ends it with what begins the answer.
    ///
    /// An `Err` names the template's line, also where the template refuses the messages: roles in an order that the
    /// model does not know, say. As with `transformers`, control tokens that a message spells out become control
    /// tokens once the text is encoded: check messages of others for them.
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

    /// The same as ids, ready for the model: templates write the token themselves that begins a text.
    pub fn chat_ids(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        self.encode(&self.chat(messages, add_generation_prompt)?, false)
    }

    /// True if the model has a template for [`chat`](Self::chat).
    pub fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// True if the token ends a text or a turn.
    pub fn is_stop(&self, id: u32) -> bool {
        self.stop.binary_search(&id).is_ok()
    }

    /// The tokens that end a text or a turn, in order of their ids.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// The most tokens of a text that the model is meant for, if a folder says so. Longer texts are not cut.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// Number of tokens.
    pub fn vocab_len(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The `tokenizers` crate's, for all else that it can do. It does not put the tokens of a GGUF file around a
    /// text.
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

/// Work of the `tokenizers` crate, which panics on some files that its reader lets through: a post-processor with a
/// token that it does not list, a pattern without text. There is no end of such checks to be made before, so the
/// panic is caught; the process's hook still reports it.
fn guarded<T>(path: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    let done = done.unwrap_or_else(|_| Err("the parts of the file do not fit each other".into()));
    done.map_err(|e| Error::format(path, format!("tokenizer: {e}")))
}

/// Turns tokens into text one by one, so that it can be shown as it is made. A character of several tokens comes
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
    /// Tokens that gave no text yet.
    pending: Vec<u32>,
}

impl TextStream<'_> {
    /// The text that a token adds; empty if it takes more tokens to tell. An `Err` if there is no such token.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.tokenizer.check_id(id)?;
        self.pending.push(id);
        let text = guarded(&self.tokenizer.path, || self.inner.step(id))?;
        if text.is_some() {
            self.pending.clear();
        }
        Ok(text.unwrap_or_default())
    }

    /// What is left of a text that ended within a character: `�` for its bytes.
    pub fn finish(self) -> Result<String> {
        self.tokenizer.decode(&self.pending, self.skip_special)
    }
}

impl fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextStream").field("pending", &self.pending).finish_non_exhaustive()
    }
}
