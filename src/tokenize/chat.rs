//! Chat templates: the Jinja of model files, rendered by `minijinja`.

use std::io::Write;
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

use crate::error::{Error, Result, quoted};

/// Steps that a template may take on one chat. A step writes at most 64 bytes, and a long template takes a few hundred
/// steps per message.
const FUEL: u64 = 2_000_000;

/// Longest template that is compiled; the longest known ones are 20 KB.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;

/// Stack for running a template. Parsing, comparing and freeing values recurse, as deep as this many bytes of template
/// or steps can nest them. Only the part in use takes memory.
const STACK_BYTES: usize = 512 << 20;

/// Longest and deepest values that are written. Values share their parts, so a small one can have a long text.
const MAX_VALUE_BYTES: usize = 16 << 20;
const MAX_VALUE_DEPTH: usize = 100;

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
        if self.source.len() > MAX_TEMPLATE_BYTES {
            let what = format!("expected a template of at most {MAX_TEMPLATE_BYTES} bytes, got {}", self.source.len());
            return Err(self.bad(&what));
        }
        let run = || self.run(messages, add_generation_prompt).map_err(|e| self.failed(&e));
        thread::scope(|scope| {
            let started = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
            let started = started.map_err(|e| self.bad(&format!("no thread to run the template in: {e}")))?;
            started.join().unwrap_or_else(|_| Err(self.bad("the template engine panicked")))
        })
    }

    fn run(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, minijinja::Error> {
        // As in `transformers`: `tools` and `documents` are defined as none, but a token that the model lacks is
        // undefined.
        let tokens = [("bos_token", &self.bos), ("eos_token", &self.eos)].into_iter();
        let tokens = Value::from_pairs(tokens.filter_map(|(name, text)| Some((name, text.as_deref()?))));
        let turn = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let messages: Vec<Value> = messages.iter().map(turn).collect();
        let values = context! { messages, add_generation_prompt, tools => (), documents => (), ..tokens };
        environment().template_from_str(&without_generation_tags(&self.source))?.render(values)
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

/// The environment of templates, as in `transformers`: Python's methods on strings and maps, `raise_exception`,
/// `strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and blocks that swallow their lines.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(|state, value, method, args| {
        // `format` pads to any width before it counts that as work.
        let is_wide = |text: &str| text.as_bytes().windows(5).any(|part| part.iter().all(u8::is_ascii_digit));
        if method == "format" && value.as_str().is_some_and(is_wide) {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "a format of width 10000 or more"));
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: &str| {
        let now = jiff::ZonedDateTime::now();
        let text = jiff::fmt::strtime::format(format, &now);
        text.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
    });
    environment.set_formatter(|out, state, value| {
        check_size(value)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| check_size(value).map(|()| value.to_string()));
    environment.remove_filter("pprint"); // indents without limit, and only serves debugging
    // In `minijinja` none counts as iterable, like an empty list.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment
}

/// Replaces `{% generation %}`, which marks a model's own text for training and has no effect otherwise.
fn without_generation_tags(source: &str) -> String {
    let mut text = source.to_string();
    for (tag, instead) in [("generation", "if true"), ("endgeneration", "endif")] {
        for open in ["{%", "{%-"] {
            for close in ["%}", "-%}"] {
                text = text.replace(&format!("{open} {tag} {close}"), &format!("{open} {instead} {close}"));
            }
        }
    }
    text
}

/// Python's `json.dumps`: a space after `,` and `:`, and no needless escapes.
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    check_size(value)?;
    let mut out = vec![];
    let done = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    done.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Returns an error if a value is too long or too deep to be written.
fn check_size(value: &Value) -> Result<(), minijinja::Error> {
    fn fits(value: &Value, depth: usize, left: &mut usize) -> bool {
        let bytes = 64 + value.as_str().map_or(0, str::len);
        let Some(rest) = left.checked_sub(bytes) else { return false };
        *left = rest;
        let parts = match value.kind() {
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => value.try_iter().ok(),
            _ => None,
        };
        parts.into_iter().flatten().all(|part| {
            let item = if value.kind() == ValueKind::Map { value.get_item(&part).ok() } else { None };
            depth > 0 && fits(&part, depth - 1, left) && item.is_none_or(|item| fits(&item, depth - 1, left))
        })
    }
    match fits(value, MAX_VALUE_DEPTH, &mut { MAX_VALUE_BYTES }) {
        true => Ok(()),
        false => {
            let what = format!("a value of over {MAX_VALUE_BYTES} bytes or {MAX_VALUE_DEPTH} levels");
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, what))
        }
    }
}

/// JSON on one line with spaces, in Python's style.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}
