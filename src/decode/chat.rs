//! A conversation: messages, the tokens that they become, and replies as text.

use std::path::Path;
use std::sync::Arc;

use futures_util::stream::{Stream, unfold};

use super::decoder::Decoder;
use super::generation::{Finish, Generation, GenerationOptions};
use super::plan::DecodeOptions;
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::model::{Adapter, Model};
use crate::tokenize::{Message, ModelTokenizer, TextStream};

/// A conversation with a model, as text: it knows the model's chat template and stop tokens, and feeds only what the
/// cache does not hold yet. Needs the feature `tokenizers`.
///
/// ```no_run
/// use std::io::Write;
/// use throughline::Gpu;
/// use throughline::decode::Chat;
///
/// let gpu = Gpu::headless_blocking()?;
/// let mut chat = Chat::open_blocking(&gpu, "SmolLM2-135M-Instruct.Q4_1.gguf".as_ref(), 2048)?;
/// chat.set_system("You are a harbour pilot. Answer in one sentence.");
/// for question in ["What is a tide?", "And how often does it come?"] {
///     for piece in chat.say(question)?.blocking() {
///         print!("{}", piece?);
///         std::io::stdout().flush().unwrap();
///     }
///     println!();
/// }
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// # What the model reads
///
/// All [`messages`](Self::messages), if they leave room in the cache for a reply of
/// [`max_tokens`](GenerationOptions::max_tokens), or of half the cache if that is less. If they do not, the oldest turns
/// are left out, so many that what remains fills at most half the cache; the next turns then follow without feeding it
/// all again. System messages at the beginning always stay. [`forgotten`](Self::forgotten) tells how many messages are
/// left out; none is removed from the history.
///
/// The history is yours to edit. What the cache holds from before is used as far as the tokens are the same.
#[derive(Debug)]
pub struct Chat {
    decoder: Decoder,
    tokenizer: Arc<ModelTokenizer>,
    options: GenerationOptions,
    messages: Vec<Message>,
    /// Index of the first message that the model reads, not counting system messages at the beginning.
    start: usize,
}

impl Chat {
    /// Opens a model for a chat: weights, tokenizer and template from one GGUF file or folder. `options` may be the number
    /// of tokens that the cache holds; for a long chat, they may have [`cache`](super::DecodeOptions::cache) in f16.
    /// Resolves once the device has been polled, several times for a large model.
    ///
    /// # Errors
    ///
    /// As for [`Model::open`], [`ModelTokenizer::of`] and [`Decoder::new`], or if the model has no chat template.
    pub async fn open<'a>(gpu: &Gpu, path: &Path, options: impl Into<DecodeOptions<'a>>) -> Result<Self> {
        let model = Model::open(path)?;
        let tokenizer = ModelTokenizer::of(model.weights())?;
        tokenizer.check_chat()?; // before the weights are read
        Self::new(Decoder::new(gpu, &model, options).await?, tokenizer)
    }

    /// [`open`](Self::open), waiting.
    pub fn open_blocking<'a>(gpu: &Gpu, path: &Path, options: impl Into<DecodeOptions<'a>>) -> Result<Self> {
        gpu.run_blocking(Self::open(gpu, path, options))
    }

    /// A chat with a decoder of your own, such as one on the parameters of a trainer. Chats can share a tokenizer: pass
    /// an `Arc`.
    ///
    /// # Errors
    ///
    /// If the tokenizer has no chat template, or the decoder has several sequences.
    pub fn new(decoder: Decoder, tokenizer: impl Into<Arc<ModelTokenizer>>) -> Result<Self> {
        let tokenizer = tokenizer.into();
        tokenizer.check_chat()?;
        Error::unless(decoder.batch == 1, "batch", "1 in the decoder of a chat", decoder.batch)?;
        let options = GenerationOptions::of(&tokenizer);
        Ok(Chat { decoder, tokenizer, options, messages: vec![], start: 0 })
    }

    /// The settings of replies: their length, and how to sample.
    pub fn options(&self) -> &GenerationOptions {
        &self.options
    }

    /// The settings of replies, to change them. The model's stop tokens always end a reply, whether
    /// [`stop`](GenerationOptions::stop) has them or not. The seed of a reply is `sampling.seed` plus the number of
    /// messages before it, so that replies do not all draw alike.
    pub fn options_mut(&mut self) -> &mut GenerationOptions {
        &mut self.options
    }

    /// Replies with this adapter from now on, or with none. It goes into the first
    /// [slot](super::DecodeOptions::adapters) of the decoder, and the history is read again.
    ///
    /// # Errors
    ///
    /// As for [`Decoder::load_adapter`]. Everything is then as it was.
    pub fn set_adapter(&mut self, adapter: Option<&Adapter>) -> Result<()> {
        if let Some(adapter) = adapter {
            self.decoder.load_adapter(0, adapter)?;
        }
        self.decoder.set_adapter(0, adapter.map(|_| 0))?;
        self.decoder.clear();
        Ok(())
    }

    /// The history: what was said by all sides, also what the model has [forgotten](Self::forgotten).
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The history, to restore, edit or clear it. To have the last message answered again, remove the reply and call
    /// [`reply`](Self::reply).
    pub fn messages_mut(&mut self) -> &mut Vec<Message> {
        self.start = 0;
        &mut self.messages
    }

    /// Sets the system message: what the model is told before all else. Replaces the one that is there.
    pub fn set_system(&mut self, text: impl Into<String>) {
        let message = Message::new("system", text);
        let messages = self.messages_mut();
        match messages.first_mut().filter(|first| first.role == "system") {
            Some(first) => *first = message,
            None => messages.insert(0, message),
        }
    }

    /// Number of messages that the last reply was made without, since they do not fit the cache: the oldest ones, not
    /// counting system messages.
    pub fn forgotten(&self) -> usize {
        self.start.saturating_sub(self.system_len())
    }

    /// The decoder, for its settings and what is in its cache.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ModelTokenizer {
        &self.tokenizer
    }

    /// Returns the decoder and the history.
    pub fn into_parts(self) -> (Decoder, Vec<Message>) {
        (self.decoder, self.messages)
    }

    /// Adds a message of the user and starts the [`reply`](Self::reply) to it.
    ///
    /// # Errors
    ///
    /// If the system message and this one do not fit the cache, the template refuses the messages, or an option is
    /// impossible. The history is then as it was.
    pub fn say(&mut self, text: impl Into<String>) -> Result<Reply<'_>> {
        self.messages.push(Message::new("user", text));
        match self.prompt() {
            Ok(prompt) => self.reply_to(&prompt),
            Err(e) => {
                self.messages.pop();
                Err(e)
            }
        }
    }

    /// Starts a reply to the history as it is. Nothing runs until its first piece is requested. What has arrived is in
    /// the history at once, so a reply that is dropped early is there as far as it came.
    ///
    /// # Errors
    ///
    /// As for [`say`](Self::say), and if the last message is the assistant's.
    pub fn reply(&mut self) -> Result<Reply<'_>> {
        let prompt = self.prompt()?;
        self.reply_to(&prompt)
    }

    fn reply_to(&mut self, prompt: &[u32]) -> Result<Reply<'_>> {
        let new = self.decoder.reuse(0, prompt);
        let mut options = self.options.clone();
        options.stop.extend_from_slice(self.tokenizer.stop_tokens());
        options.sampling.seed = options.sampling.seed.wrapping_add(self.messages.len() as u64);
        let gpu = self.decoder.gpu.clone();
        let generation = self.decoder.generate(new, options)?;
        let text = Some(self.tokenizer.stream(true));
        Ok(Reply { gpu, generation, text, messages: &mut self.messages, begun: false })
    }

    /// Number of system messages at the beginning.
    fn system_len(&self) -> usize {
        self.messages.iter().take_while(|m| m.role == "system").count()
    }

    /// The tokens of the chat without what lies between the system messages and this one.
    fn ids_from(&self, start: usize) -> Result<Vec<u32>> {
        let read = [&self.messages[..self.system_len()], &self.messages[start..]].concat();
        self.tokenizer.chat_ids(&read, true)
    }

    /// The tokens of as much of the chat as the cache has room for. Nothing that can be checked is wrong with them.
    fn prompt(&mut self) -> Result<Vec<u32>> {
        let (system, capacity) = (self.system_len(), self.decoder.capacity);
        if self.messages.last().is_none_or(|last| last.role == "assistant") {
            let last = self.messages.last().map_or("there is none", |_| "it is the assistant's");
            return Err(Error::config("messages", format!("the last must be one to reply to, but {last}")));
        }
        // The last token of a reply is never fed.
        let reply = self.options.max_tokens.clamp(1, (capacity / 2).max(1));
        let most = capacity + 1 - reply;
        // Turns begin with the user; many templates insist.
        let users = (system + 1..self.messages.len()).filter(|&i| self.messages[i].role == "user");
        let starts: Vec<usize> = std::iter::once(system).chain(users).collect();
        let from = starts.iter().position(|&start| start == self.start).unwrap_or(0);
        let mut start = starts[from];
        let mut ids = self.ids_from(start)?;
        if let Some((&last, later)) = starts[from + 1..].split_last().filter(|_| ids.len() > most) {
            let long = |&start: &usize| self.ids_from(start).is_ok_and(|ids| ids.len() > most.min(capacity / 2));
            start = later.get(later.partition_point(long)).copied().unwrap_or(last);
            ids = self.ids_from(start)?;
        }
        if ids.len() > most {
            let what = "the system message and the last turn";
            let advice = "shorten them, lower `max_tokens`, or give the decoder more capacity";
            let expected = format!("at most {most} in {what}, to leave {reply} of {capacity} for the reply: {advice}");
            return Err(Error::data("tokens", expected, ids.len()));
        }
        self.options.validate(capacity)?;
        self.decoder.check_more(0, &ids, 0)?;
        self.start = start;
        Ok(ids)
    }
}

/// A reply while it is generated, from [`Chat::say`].
///
/// Iterate over its pieces with [`blocking`](Self::blocking), or use [`stream`](Self::stream) or [`next`](Self::next) in
/// async code. Put together, they are the reply.
#[derive(Debug)]
pub struct Reply<'a> {
    gpu: Gpu,
    generation: Generation<'a>,
    /// Turns tokens into text; `None` after the end.
    text: Option<TextStream<'a>>,
    messages: &'a mut Vec<Message>,
    /// Whether the last message is this reply.
    begun: bool,
}

impl Reply<'_> {
    /// The next piece of text, which is not empty, or `None` at the end of the reply. Resolves once the device has been
    /// polled, which an application that renders does anyway.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// As for [`Generation::next`].
    pub async fn next(&mut self) -> Result<Option<String>> {
        while let Some(text) = &mut self.text {
            let piece = match self.generation.next().await? {
                Some(id) => text.push(id)?,
                None => self.text.take().map_or(Ok(String::new()), TextStream::finish)?,
            };
            self.heard(&piece);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// Adds to the reply in the history.
    fn heard(&mut self, piece: &str) {
        if !self.begun {
            self.messages.push(Message::new("assistant", ""));
            self.begun = true;
        }
        if let Some(last) = self.messages.last_mut() {
            last.content += piece;
        }
    }

    /// [`next`](Self::next), waiting for the GPU.
    pub fn next_blocking(&mut self) -> Result<Option<String>> {
        self.gpu.clone().run_blocking(self.next())
    }

    /// Why the reply ended; `None` while it has not.
    pub fn finish(&self) -> Option<Finish> {
        self.generation.finish()
    }

    /// The remaining pieces as an iterator that waits for the GPU. It ends after an error.
    pub fn blocking(&mut self) -> impl Iterator<Item = Result<String>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            let next = if failed { None } else { self.next_blocking().transpose() };
            failed = matches!(next, Some(Err(_)));
            next
        })
    }

    /// The rest of the reply as one text.
    pub async fn text(&mut self) -> Result<String> {
        let mut text = String::new();
        while let Some(piece) = self.next().await? {
            text += &piece;
        }
        Ok(text)
    }

    /// [`text`](Self::text), waiting for the GPU.
    pub fn text_blocking(&mut self) -> Result<String> {
        self.gpu.clone().run_blocking(self.text())
    }
}

impl<'a> Reply<'a> {
    /// The remaining pieces as a stream, for any executor. It ends after an error.
    pub fn stream(self) -> impl Stream<Item = Result<String>> {
        unfold(Some(self), |reply| async {
            let mut reply = reply?;
            let next = reply.next().await.transpose()?;
            let rest = next.is_ok().then_some(reply);
            Some((next, rest))
        })
    }
}
