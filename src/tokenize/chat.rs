//! Chat templates: Jinja, as model files have them, through `minijinja`.

use std::io::Write;
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

use crate::error::{Error, Result, quoted};

/// Steps of a template on one chat. A step makes at most 64 bytes, and a long template takes some hundred a message.
const FUEL: u64 = 2_000_000;

/// Longest template that is compiled; the longest known ones take 20 KB.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;

/// Stack of a template's run: what parses, compares and frees values recurses, as deep as this many bytes of template
/// or steps can nest them. It takes memory only as far as it is used.
const STACK_BYTES: usize = 512 << 20;

/// Longest and deepest values that are written out. Values share their parts, so that a small one can be long to write.
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
    /// Who speaks: `system`, `user` or `assistant`, and what else the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of a role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A template, and what it needs beside the messages.
#[derive(Clone, Debug)]
pub(super) struct ChatTemplate {
    /// File that it is from.
    pub path: String,
    /// Key that it is from; empty if it is all of the file.
    pub key: String,
    pub source: String,
    /// Text of the token that begins a text, if there is one.
    pub bos: Option<String>,
    /// Text of the token that ends one.
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
        // As `transformers` has it: `tools` and `documents` are there, and none; a token that a model lacks is not.
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

/// What templates find, as in `transformers`: Python's methods of strings and maps, `raise_exception`,
/// `strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and blocks that take their lines.
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
    environment.remove_filter("pprint"); // indents without bound, and is for looking at templates
    // Here none is iterable, as an empty list.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment
}

/// `{% generation %}` marks what a model wrote, for training: to other readers it says nothing.
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

/// `json.dumps` of Python: spaces behind `,` and `:`, nothing escaped that need not be.
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

/// An `Err` if a value is too long or too deep to be written.
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

/// JSON on one line with spaces, as Python writes it.
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
