//! Tokens to text, all at once or as they come.

use std::collections::HashMap;
use std::fmt;

use tokenizers::{Decoder, DecoderWrapper, Tokenizer};

use super::guard::guarded;
use crate::error::Result;

/// Tokens that a stream keeps to tell the decoder what is before the next one.
const CONTEXT: usize = 8;
/// Tokens that a stream collects before it goes back to that many.
const MAX_WINDOW: usize = 32;

/// A character has at most four bytes, so at most this many at the end of a text can be the start of one.
const MAX_OPEN: usize = 3;

/// What turns ids into text.
pub(super) struct Codec {
    pub tokenizer: Tokenizer,
    /// The file, for messages.
    pub path: String,
    /// Ids whose token another id stands for, and that id.
    pub twins: HashMap<u32, u32>,
}

impl Codec {
    /// The token of an id as the vocabulary writes it, unless it is skipped or empty.
    pub fn token(&self, id: u32, skip_special: bool) -> Option<String> {
        let id = self.twins.get(&id).copied().unwrap_or(id);
        let token = self.tokenizer.id_to_token(id)?;
        let skipped = skip_special && self.tokenizer.get_added_vocabulary().is_special_token(&token);
        (!skipped && !token.is_empty()).then_some(token)
    }

    /// The text of these tokens.
    pub fn decode(&self, tokens: Vec<String>) -> Result<String> {
        guarded(&self.path, || match self.tokenizer.get_decoder() {
            _ if tokens.is_empty() => Ok(String::new()), // which some decoders of the crate panic on
            Some(decoder) => Ok(chain(decoder, tokens)?.concat()),
            None => Ok(tokens.join(" ")),
        })
    }
}

fn chain(decoder: &DecoderWrapper, tokens: Vec<String>) -> tokenizers::Result<Vec<String>> {
    match decoder {
        DecoderWrapper::Sequence(parts) => parts.get_decoders().iter().try_fold(tokens, |t, part| chain(part, t)),
        DecoderWrapper::ByteFallback(_) => Ok(bytes_to_text(tokens)),
        other => other.decode_chain(tokens),
    }
}

/// Puts byte tokens such as `<0xE2>` together to characters, and writes `�` for each byte that is no part of one. The
/// decoder of the `tokenizers` crate writes `�` for all of a run of byte tokens if one of them is wrong, so that text
/// which has been shown already would turn into `�`.
fn bytes_to_text(tokens: Vec<String>) -> Vec<String> {
    let mut texts = Vec::with_capacity(tokens.len());
    let mut run = vec![];
    for token in tokens {
        match byte_of(&token) {
            Some(byte) => run.push(byte),
            None => {
                texts.extend(text_of(&std::mem::take(&mut run)));
                texts.push(token);
            }
        }
    }
    texts.extend(text_of(&run));
    texts
}

/// The byte that a token such as `<0xE2>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|d| d.is_ascii_hexdigit());
    if is_byte { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn text_of(bytes: &[u8]) -> Option<String> {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text += chunk.valid();
        text.extend(chunk.invalid().iter().map(|_| '\u{fffd}'));
    }
    (!bytes.is_empty()).then_some(text)
}

/// Bytes at the end of a text that later tokens may turn into something else.
fn open_bytes(text: &str) -> usize {
    text.chars().rev().take(MAX_OPEN).take_while(|&c| c == '\u{fffd}').map(char::len_utf8).sum()
}

/// Bytes with which both texts begin.
fn common_bytes(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// Turns tokens into text one by one, to show a text while it is generated. A character made of several tokens comes
/// with the last of them.
///
/// What the stream returns, put together, is what [`decode`](super::ModelTokenizer::decode) makes of all tokens at once,
/// unless the file's decoder changes earlier text because of later tokens, which no known model's does. Bytes that are
/// not UTF-8 become `�`, at the latest three tokens later.
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
    codec: &'a Codec,
    skip_special: bool,
    /// The last tokens.
    window: Vec<String>,
    /// What has been returned of their text.
    sent: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(codec: &'a Codec, skip_special: bool) -> Self {
        TextStream { codec, skip_special, window: vec![], sent: String::new() }
    }

    /// The text that this token adds; empty while a character is incomplete. An id without a token adds nothing.
    ///
    /// # Errors
    ///
    /// If the parts of the tokenizer's file do not fit each other. The stream can go on.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.codec.token(id, self.skip_special) else { return Ok(String::new()) };
        self.window.push(token);
        let text = self.text(0)?;
        let open = open_bytes(&text);
        let settled = &text[..text.len() - open];
        let known = common_bytes(settled, &self.sent);
        let new = settled[known..].to_string();
        if known < settled.len() {
            self.sent = settled.into();
        }
        if self.window.len() > MAX_WINDOW {
            self.forget(open)?;
        }
        Ok(new)
    }

    /// The rest of a text that ended within a character: `�` for its bytes.
    pub fn finish(self) -> Result<String> {
        let text = self.text(0)?;
        Ok(text[common_bytes(&text, &self.sent)..].into())
    }

    /// The text of the window from this token on.
    fn text(&self, from: usize) -> Result<String> {
        self.codec.decode(self.window[from..].to_vec())
    }

    /// Shortens the window, if what is left suffices as context: if some of its text is settled, and as much is open.
    fn forget(&mut self, open: usize) -> Result<()> {
        let from = self.window.len() - CONTEXT;
        let mut text = self.text(from)?;
        if open_bytes(&text) == open && text.len() > open {
            text.truncate(text.len() - open);
            self.sent = text;
            self.window.drain(..from);
        }
        Ok(())
    }
}

impl fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextStream").field("window", &self.window).field("sent", &self.sent).finish_non_exhaustive()
    }
}
