//! Chat templates: the Jinja of model files, rendered by `minijinja`.
//!
//! Templates are written for Jinja 2 in Python, and use Python's methods and its ways of writing values. Where
//! `minijinja` writes other text without an error, a model would see a prompt that it was not trained on. So what
//! templates can reach is made to agree, file by file: [`syntax`] before a template is parsed, [`engine`] for filters
//! and functions, [`methods`] of values, [`python`] for values as text, and [`printf`] for `%`.
//! tests/data/chat_templates.json has what Jinja 2 makes of over 600 templates.

use std::thread;

use engine::{FUEL, environment};
use minijinja::{ErrorKind, Value, context};
use syntax::translate;

use crate::error::{Error, Result, quoted};

mod engine;
mod methods;
mod printf;
mod python;
mod syntax;

/// Longest template that is compiled; the longest known ones are 20 KB.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;

/// Stack for running a template. Parsing, comparing and freeing values recurse, as deep as this many bytes of template
/// or steps can nest them. Only the part in use takes memory.
const STACK_BYTES: usize = 512 << 20;

/// One turn of a chat.
///
/// ```
/// use throughline::tokenize::Message;
/// let turn = Message::new("user", "How deep is the harbour?");
/// assert_eq!((turn.role.as_str(), turn.content.len()), ("user", 24));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or another role that the model's template knows.
    pub role: String,
    /// What they say.
    pub content: String,
}

impl Message {
    /// A turn of this role with this content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A template, and what it needs besides the messages.
#[derive(Clone, Debug)]
pub(super) struct ChatTemplate {
    /// The file that it comes from.
    pub path: String,
    /// The key that it comes from; empty if the template is the whole file.
    pub key: String,
    pub source: String,
    /// The token that begins a text, as text, if there is one.
    pub bos: Option<String>,
    /// The token that ends a text, as text.
    pub eos: Option<String>,
}

impl ChatTemplate {
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_parts(messages, &[(messages.len(), add_generation_prompt)], usize::MAX).map(|texts| texts.concat())
    }

    /// Several beginnings of a chat: of so many messages each, with or without the generation prompt. All together they
    /// may have `max_bytes`.
    pub fn render_parts(&self, messages: &[Message], parts: &[(usize, bool)], max_bytes: usize) -> Result<Vec<String>> {
        if self.source.len() > MAX_TEMPLATE_BYTES {
            let what = format!("expected a template of at most {MAX_TEMPLATE_BYTES} bytes, got {}", self.source.len());
            return Err(self.bad(&what));
        }
        let run = || self.run(messages, parts, max_bytes).map_err(|e| self.failed(&e));
        thread::scope(|scope| {
            let started = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
            let started = started.map_err(|e| self.bad(&format!("no thread to run the template in: {e}")))?;
            started.join().unwrap_or_else(|_| Err(self.bad("the template engine panicked")))
        })
    }

    fn run(
        &self,
        messages: &[Message],
        parts: &[(usize, bool)],
        max_bytes: usize,
    ) -> Result<Vec<String>, minijinja::Error> {
        // As in `transformers`: `tools` and `documents` are defined as none, but a token that the model lacks is
        // undefined.
        let tokens = [("bos_token", &self.bos), ("eos_token", &self.eos)].into_iter();
        let tokens = Value::from_pairs(tokens.filter_map(|(name, text)| Some((name, text.as_deref()?))));
        let turn = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let turns: Vec<Value> = messages.iter().map(turn).collect();
        let (environment, source) = (environment(), translate(&self.source));
        let template = environment.template_from_str(&source)?;
        let (mut texts, mut bytes) = (Vec::with_capacity(parts.len()), 0);
        for &(len, add_generation_prompt) in parts {
            let messages: Vec<Value> = turns.iter().take(len).cloned().collect();
            let values = context! { messages, add_generation_prompt, tools => (), documents => (), ..tokens.clone() };
            let text = template.render(values)?;
            bytes += text.len();
            if bytes > max_bytes {
                return Err(python::bad(format!("writes more than {max_bytes} bytes for the turns of this chat")));
            }
            texts.push(text);
        }
        Ok(texts)
    }

    fn bad(&self, what: &str) -> Error {
        match self.key.as_str() {
            "" => Error::format(&self.path, what),
            key => Error::format(&self.path, format!("{key}: {what}")),
        }
    }

    fn failed(&self, error: &minijinja::Error) -> Error {
        let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
        let detail = error.detail().map_or(String::new(), |detail| format!(": {}", quoted(detail)));
        let why = match error.kind() {
            ErrorKind::OutOfFuel => format!("takes more than the {FUEL} steps that a chat template may take"),
            kind => format!("{kind}{detail}"),
        };
        self.bad(&format!("{line}{why}"))
    }
}
