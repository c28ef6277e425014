//! Chat templates: Jinja, as model files have them, through `minijinja`.

use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::{bad, quoted};

/// What a template may spend on one chat: about a second of work, and memory of at most 64 bytes a unit.
const FUEL: u64 = 2_000_000;

/// Longest template that is compiled; the longest known ones take 20 KB.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Longest text that a template's `tojson` writes.
const MAX_JSON_BYTES: usize = 16 << 20;

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
        let source = without_generation_tags(&self.source);
        let environment = environment();
        // As `transformers` has it: `tools` and `documents` are there, and none; a token that a model lacks is not.
        let tokens = [("bos_token", &self.bos), ("eos_token", &self.eos)].into_iter();
        let tokens = Value::from_pairs(tokens.filter_map(|(name, text)| Some((name, text.as_deref()?))));
        let turn = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let messages: Vec<Value> = messages.iter().map(turn).collect();
        let values = context! { messages, add_generation_prompt, tools => (), documents => (), ..tokens };
        let template = environment.template_from_str(&source).map_err(|e| self.failed(&e))?;
        template.render(values).map_err(|e| self.failed(&e))
    }

    fn bad(&self, what: &str) -> Error {
        match self.key.as_str() {
            "" => bad(&self.path, what),
            key => bad(&self.path, format!("{key}: {what}")),
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
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: &str| {
        let now = jiff::ZonedDateTime::now();
        let text = jiff::fmt::strtime::format(format, &now);
        text.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
    });
    environment.add_filter("tojson", tojson);
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
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let out = Limited(vec![]);
    let out = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut json = serde_json::Serializer::with_formatter(out, pretty);
            value.serialize(&mut json).map_err(failed)?;
            json.into_inner()
        }
        None => {
            let mut json = serde_json::Serializer::with_formatter(out, Spaced);
            value.serialize(&mut json).map_err(failed)?;
            json.into_inner()
        }
    };
    Ok(String::from_utf8_lossy(&out.0).into_owned())
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

/// Refuses to grow past [`MAX_JSON_BYTES`]: a small value that holds itself many times over is a long text.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_JSON_BYTES {
            return Err(std::io::Error::other(format!("JSON of more than {MAX_JSON_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
