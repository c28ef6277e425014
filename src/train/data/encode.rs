//! From texts and chats to examples whose tokens are those that a model sees and writes when it is used.

use super::examples::Example;
use crate::error::{Error, Result, quoted};
use crate::tokenize::{Message, ModelTokenizer};

/// Who may speak in a chat.
pub(super) const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Whose turns the model learns.
pub(super) const ASSISTANT: &str = "assistant";

/// Most messages of a chat: the template runs twice for each reply.
const MAX_MESSAGES: usize = 1024;
/// Most text that all those runs may write.
const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Most tokens of a chat or completion, over all examples that it becomes. No sequence is longer.
const MAX_TOKENS: usize = 1 << 20;

/// Bytes of a text that are tokenized at once, up to the end of the line.
const CHUNK_BYTES: usize = 64 << 10;
/// Most bytes of what comes before a chunk that are tokenized again with it, to see how it goes on from there.
const CONTEXT_BYTES: usize = 256;

/// Turns texts, prompts with completions, and chats into [`Example`]s for one model.
///
/// [`Examples::read`](super::Examples::read) does this for files. Use an encoder for data that comes from elsewhere.
///
/// The tokens before a reply are those that [`Chat`](crate::decode::Chat) feeds, and the reply is tokenized as its
/// continuation, not merged with the prompt. As when a model is used, control tokens that a text spells out become control
/// tokens.
///
/// ```
/// use throughline::tokenize::{Message, ModelTokenizer};
/// use throughline::train::data::ExampleEncoder;
/// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
/// let encoder = ExampleEncoder::new(&tokenizer)?;
/// let chat = [Message::new("user", "How deep is it?"), Message::new("assistant", "Two fathoms.")];
/// let examples = encoder.chat(&chat)?;
/// let learned = examples[0].tokens.iter().zip(&examples[0].counts).filter(|(_, counts)| **counts);
/// let learned: Vec<u32> = learned.map(|(&id, _)| id).collect();
/// assert_eq!(tokenizer.decode(&learned, false)?, "Two fathoms.<|im_end|>");
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct ExampleEncoder<'a> {
    tokenizer: &'a ModelTokenizer,
    /// The tokens that begin a text.
    begin: Vec<u32>,
}

impl<'a> ExampleEncoder<'a> {
    /// An encoder with the tokenizer, the special tokens and the chat template of a model.
    ///
    /// # Errors
    ///
    /// If the parts of the tokenizer's file do not fit each other.
    pub fn new(tokenizer: &'a ModelTokenizer) -> Result<Self> {
        let (bare, whole) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
        let at = whole.windows(bare.len().max(1)).position(|part| part == bare).unwrap_or(0);
        Ok(ExampleEncoder { tokenizer, begin: whole[..at].to_vec() })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'a ModelTokenizer {
        self.tokenizer
    }

    /// A text, all of which counts, with the tokens that begin and end one.
    pub fn text(&self, text: &str) -> Result<Example> {
        let mut encoding = self.start_text();
        text.split_inclusive('\n').try_for_each(|line| encoding.push(line))?;
        encoding.finish()
    }

    /// A text that comes line by line.
    pub(super) fn start_text(&self) -> TextEncoding<'_> {
        TextEncoding { encoder: self, ids: vec![], chunk: String::new(), context: String::new() }
    }

    /// A prompt as [`encode`](ModelTokenizer::encode) gives it with its special tokens, and a completion, which alone
    /// counts, with the token that ends a text.
    ///
    /// # Errors
    ///
    /// If they have more than 2^20 tokens.
    pub fn completion(&self, prompt: &str, completion: &str) -> Result<Example> {
        let ids = self.tokenizer.encode(prompt, false)?;
        let mut completed = self.continued(&ids, prompt, completion, "completion")?;
        self.end(&mut completed);
        let prompt = self.begun(ids);
        check_tokens("completion", prompt.len() + completed.len())?;
        Ok(Example::completion(&prompt, &completed))
    }

    /// A chat in the model's template, of which the assistant's turns count, each with the token that ends it. What the
    /// assistant says before anyone else has spoken does not count: no model is asked for it.
    ///
    /// The chat is one example if what the model reads before each reply is what the example holds so far. Some templates
    /// change earlier turns: they leave out thoughts, for instance. The chat is then several examples, so that each reply
    /// comes after what the model would read before it.
    ///
    /// # Errors
    ///
    /// If there is no template, it refuses the messages, a role is unknown, no reply counts, or the chat has more than
    /// 1,024 messages or 2^20 tokens. Also if a turn in the template does not begin with the generation prompt.
    pub fn chat(&self, messages: &[Message]) -> Result<Vec<Example>> {
        self.chat_with(messages, |_| true)
    }

    /// [`chat`](Self::chat), where only those replies count that `learned` names by index.
    pub(super) fn chat_with(&self, messages: &[Message], learned: impl Fn(usize) -> bool) -> Result<Vec<Example>> {
        let replies = replies(messages)?;
        if !replies.iter().any(|&i| learned(i)) {
            let got = if replies.is_empty() { "none" } else { "only such of weight 0" };
            return Err(Error::data("messages", "a turn of the assistant after one of the user", got));
        }
        let parts: Vec<(usize, bool)> = replies.iter().flat_map(|&i| [(i, true), (i + 1, false)]).collect();
        let texts = self.tokenizer.chat_parts(messages, &parts, MAX_RENDERED_BYTES)?;
        let (mut examples, mut tokens) = (vec![], 0);
        for (&i, pair) in replies.iter().zip(texts.chunks_exact(2)) {
            let (prompt, whole) = (&pair[0], &pair[1]);
            let Some(reply) = whole.strip_prefix(prompt.as_str()) else { return Err(no_prefix(i, prompt, whole)) };
            let ids = self.tokenizer.encode(prompt, false)?;
            let mut reply = self.continued(&ids, prompt, reply, &format!("messages[{i}].content"))?;
            // The model is stopped there, whatever the template writes after it.
            if let Some(end) = reply.iter().position(|&id| self.tokenizer.is_stop(id)) {
                reply.truncate(end + 1);
            }
            let goes_on = examples.pop_if(|last: &mut Example| ids.starts_with(&last.tokens));
            let mut example = goes_on.unwrap_or_default();
            let new = &ids[example.tokens.len()..];
            tokens += new.len() + reply.len();
            check_tokens("messages", tokens)?;
            example.extend(new, false);
            example.extend(&reply, learned(i));
            examples.push(example);
        }
        examples.retain(|example| example.counts.contains(&true));
        Ok(examples)
    }

    /// The tokens of a text, with those that begin one, unless they are there already.
    fn begun(&self, ids: Vec<u32>) -> Vec<u32> {
        if ids.starts_with(&self.begin) { ids } else { [&self.begin[..], &ids].concat() }
    }

    /// Appends the token that ends a text, unless it is there already.
    fn end(&self, ids: &mut Vec<u32>) {
        if let Some(eos) = self.tokenizer.eos().filter(|eos| ids.last() != Some(eos)) {
            ids.push(eos);
        }
    }

    /// The tokens of a text after another one, which is tokens already: those that the tokenizer gives to both together,
    /// if the first remain as they are. Otherwise a token would reach across the border, and the model, which has the
    /// prompt's tokens before it, cannot write that. Then these are the tokens of the second text alone.
    fn continued(&self, ids: &[u32], before: &str, text: &str, what: &str) -> Result<Vec<u32>> {
        let encode = |text: &str| self.tokenizer.encode(text, false);
        let whole = encode(&[before, text].concat())?;
        if let Some(rest) = whole.strip_prefix(ids) {
            return Ok(rest.to_vec());
        }
        let whole = self.tokenizer.decode(&whole, false)?;
        // Some tokenizers put a space before a text. After a line break there is none.
        for anchor in ["", "\n"] {
            let (anchor_ids, both) = (encode(anchor)?, encode(&[anchor, text].concat())?);
            if let Some(rest) = both.strip_prefix(anchor_ids.as_slice())
                && self.tokenizer.decode(&[ids, rest].concat(), false)? == whole
            {
                return Ok(rest.to_vec());
            }
        }
        let expected = format!("a text that can be tokenized after {}", quoted(tail(before)));
        Err(Error::data(what, expected, quoted(text)))
    }
}

/// A text on its way to tokens, line by line.
pub(super) struct TextEncoding<'a> {
    encoder: &'a ExampleEncoder<'a>,
    ids: Vec<u32>,
    /// What is not tokenized yet.
    chunk: String,
    /// The end of what is.
    context: String,
}

impl TextEncoding<'_> {
    /// Adds a line, with its line break.
    pub fn push(&mut self, line: &str) -> Result<()> {
        // Tokens do not reach from one line into the next, unless there is more space before or after the line break.
        let before = self.chunk.strip_suffix('\n').unwrap_or(&self.chunk);
        let is_border = !before.ends_with(char::is_whitespace) && !line.starts_with(char::is_whitespace);
        let may_end = is_border || self.chunk.len() >= 2 * CHUNK_BYTES;
        if self.chunk.len() >= CHUNK_BYTES && may_end {
            self.flush()?;
        }
        self.chunk += line;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let before = self.encoder.tokenizer.encode(&self.context, false)?;
        let ids = self.encoder.continued(&before, &self.context, &self.chunk, "text")?;
        self.ids.extend(ids);
        self.context = std::mem::take(&mut self.chunk);
        let from = self.context.len() - tail(&self.context).len();
        self.context.drain(..from);
        Ok(())
    }

    /// The whole text.
    pub fn finish(mut self) -> Result<Example> {
        if !self.chunk.is_empty() {
            self.flush()?;
        }
        let mut ids = self.encoder.begun(self.ids);
        self.encoder.end(&mut ids);
        Ok(Example::text(ids))
    }
}

/// The end of a text.
fn tail(text: &str) -> &str {
    let from = (text.len().saturating_sub(CONTEXT_BYTES)..text.len()).find(|&at| text.is_char_boundary(at));
    &text[from.unwrap_or(text.len())..]
}

/// The turns of the assistant after someone else has spoken.
fn replies(messages: &[Message]) -> Result<Vec<usize>> {
    if messages.len() > MAX_MESSAGES {
        return Err(Error::data("messages", format!("at most {MAX_MESSAGES}"), messages.len()));
    }
    let unknown = messages.iter().position(|m| !ROLES.contains(&m.role.as_str()));
    if let Some(i) = unknown {
        let expected = format!("one of {}", ROLES.join(", "));
        return Err(Error::data(format!("messages[{i}].role"), expected, quoted(&messages[i].role)));
    }
    let asked = messages.iter().position(|m| ["user", "tool"].contains(&m.role.as_str()));
    let from = asked.unwrap_or(messages.len());
    Ok((from..messages.len()).filter(|&i| messages[i].role == ASSISTANT).collect())
}

/// The error for a template whose turns are not what its generation prompt begins.
fn no_prefix(i: usize, prompt: &str, whole: &str) -> Error {
    let same = prompt.char_indices().zip(whole.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
    let same = same.unwrap_or_else(|| whole.len().min(prompt.len()));
    let shown = |text: &str| quoted(&text[same..]);
    let expected = format!("a turn that the template writes with {} before it, as it prompts for one", shown(prompt));
    Error::data(format!("messages[{i}]"), expected, shown(whole))
}

fn check_tokens(what: &str, tokens: usize) -> Result<()> {
    match tokens <= MAX_TOKENS {
        true => Ok(()),
        false => Err(Error::data(what, format!("at most {MAX_TOKENS} tokens"), tokens)),
    }
}
