//! Examples from files: JSON lines and plain text. Files may hold anything; an error names the file and the line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::encode::{ASSISTANT, ExampleEncoder};
use super::examples::{Example, Examples};
use crate::error::{Error, Result, quoted};
use crate::format::parse_json;
use crate::tokenize::{Message, ModelTokenizer};

/// Longest line.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Extensions of files with one JSON object per line, and of text.
const JSONL: [&str; 3] = ["jsonl", "ndjson", "json"];
const TEXT: [&str; 3] = ["txt", "text", "md"];

impl Examples {
    /// Reads a file of examples, for the model of this tokenizer. Files that end in `.jsonl`, `.ndjson` or `.json` hold
    /// one JSON object per line, whose keys say what it is:
    ///
    /// | keys | what counts in the loss |
    /// |---|---|
    /// | `messages`: a list of objects with `role` and `content` | the assistant's turns: see [`ExampleEncoder::chat`] |
    /// | `prompt` and `completion` | the completion, and the token that ends a text |
    /// | `text` | all of it, and the token that ends a text |
    ///
    /// The first row that applies counts; other keys are ignored. Lines of all kinds can be mixed, and blank ones are
    /// skipped. Roles are `system`, `developer`, `user`, `assistant` and `tool`. A turn of the assistant with the key
    /// `weight` and the value 0 does not count. Calls of tools are an error.
    ///
    /// Files that end in `.txt`, `.text` or `.md` are one text each.
    ///
    /// # Errors
    ///
    /// The error names the file and the line: what is not UTF-8 or not JSON, has a wrong type or an empty text, a chat
    /// that the template refuses or in which no turn counts, and a line of more than 16 MiB. Also a file with no examples,
    /// or with another extension.
    ///
    /// ```
    /// use throughline::tokenize::ModelTokenizer;
    /// use throughline::train::data::Examples;
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let path = dir.path().join("tides.jsonl");
    /// std::fs::write(&path, r#"
    /// {"prompt": "How deep is it?", "completion": " Two fathoms."}
    /// {"messages": [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "One."}]}
    /// "#).unwrap();
    /// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
    /// assert_eq!(Examples::read(&path, &tokenizer)?.len(), 2);
    ///
    /// std::fs::write(&path, "\n{\"text\": 5}").unwrap();
    /// let error = Examples::read(&path, &tokenizer).unwrap_err().to_string();
    /// assert!(error.ends_with("tides.jsonl: line 2: text: expected a string, got `5`"));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn read(path: &Path, tokenizer: &ModelTokenizer) -> Result<Examples> {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).unwrap_or_default();
        let is_jsonl = JSONL.contains(&extension.as_str());
        if !is_jsonl && !TEXT.contains(&extension.as_str()) {
            let known = JSONL.into_iter().chain(TEXT).map(|e| format!(".{e}")).collect::<Vec<_>>().join(", ");
            let got = if extension.is_empty() { "none".into() } else { quoted(&extension) };
            return Err(Error::format(path, format!("expected a file name that ends in one of {known}, got {got}")));
        }
        let file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        if is_jsonl { Self::read_jsonl(path, file, tokenizer) } else { Self::read_text(path, file, tokenizer) }
    }

    /// [`read`](Self::read) for JSON lines from elsewhere, such as memory or a file that is unpacked on the way. `path`
    /// is for messages.
    pub fn read_jsonl(path: &Path, input: impl BufRead, tokenizer: &ModelTokenizer) -> Result<Examples> {
        let encoder = ExampleEncoder::new(tokenizer)?;
        let mut examples = Examples::ending_with(tokenizer.stop_tokens());
        let mut lines = Lines { path, input, number: 0, line: vec![] };
        while let Some((number, line)) = lines.next()? {
            if line.trim().is_empty() {
                continue;
            }
            let parts = parts(&encoder, line).map_err(|e| bad_line(path, number, &e))?;
            examples.push_all(&parts)?;
        }
        examples.unless_empty(path)
    }

    /// [`read`](Self::read) for a text from elsewhere. `path` is for messages.
    pub fn read_text(path: &Path, input: impl BufRead, tokenizer: &ModelTokenizer) -> Result<Examples> {
        let encoder = ExampleEncoder::new(tokenizer)?;
        let mut examples = Examples::ending_with(tokenizer.stop_tokens());
        let mut lines = Lines { path, input, number: 0, line: vec![] };
        let (mut text, mut is_blank) = (encoder.start_text(), true);
        while let Some((number, line)) = lines.next()? {
            is_blank &= line.trim().is_empty();
            // Windows ends lines with two characters, which models rarely see.
            let pushed = match line.strip_suffix("\r\n") {
                Some(bare) => text.push(&[bare, "\n"].concat()),
                None => text.push(line),
            };
            pushed.map_err(|e| bad_line(path, number, &told(e)))?;
        }
        if !is_blank {
            examples.push(&text.finish().map_err(|e| Error::format(path, told(e)))?)?;
        }
        examples.unless_empty(path)
    }

    fn unless_empty(self, path: &Path) -> Result<Self> {
        if self.is_empty() { Err(Error::format(path, "expected at least one example, got none")) } else { Ok(self) }
    }
}

/// The lines of a file, with their numbers.
struct Lines<'a, R> {
    path: &'a Path,
    input: R,
    number: usize,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<'_, R> {
    /// The next line, with its line break.
    fn next(&mut self) -> Result<Option<(usize, &str)>> {
        self.line.clear();
        let mut input = (&mut self.input).take(MAX_LINE_BYTES as u64 + 1);
        let read = input.read_until(b'\n', &mut self.line).map_err(Error::io(self.path))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        if read > MAX_LINE_BYTES {
            let what = format!("expected at most {MAX_LINE_BYTES} bytes, got more");
            return Err(bad_line(self.path, self.number, &what));
        }
        let mark = if self.number == 1 { "\u{feff}" } else { "" };
        let line = self.line.strip_prefix(mark.as_bytes()).unwrap_or(&self.line);
        match std::str::from_utf8(line) {
            Ok(line) => Ok(Some((self.number, line))),
            Err(e) => {
                let at = e.valid_up_to();
                let what = format!("expected UTF-8, got {:#04x} as byte {}", line[at], at + 1);
                Err(bad_line(self.path, self.number, &what))
            }
        }
    }
}

fn bad_line(path: &Path, number: usize, what: &str) -> Error {
    Error::format(path, format!("line {number}: {what}"))
}

/// What an error says, without the word that errors about tensors begin with.
fn told(error: Error) -> String {
    match error {
        Error::Data { tensor, expected, got } => format!("{tensor}: expected {expected}, got {got}"),
        other => other.to_string(),
    }
}

/// The examples of a line. An error says what is wrong with it.
fn parts(encoder: &ExampleEncoder<'_>, line: &str) -> Result<Vec<Example>, String> {
    let json: Json = parse_json(line.as_bytes()).map_err(|e| {
        let hint = if line.trim_start().starts_with('[') { "; a list must become one object per line" } else { "" };
        // Its own line number is that within this line.
        let what = e.to_string().replace(&format!(" at line {} column {}", e.line(), e.column()), "");
        format!("expected a JSON object, got invalid JSON: {what} at column {}{hint}", e.column())
    })?;
    let object = json.as_object().ok_or_else(|| format!("expected a JSON object, got {}", shown(&json)))?;
    if let Some(messages) = present(object, "messages") {
        only_text(object, "", &["tools", "functions"])?;
        return chat(encoder, messages);
    }
    if present(object, "completion").is_some() {
        let (prompt, completion) = (text(object, "", "prompt")?, filled(object, "", "completion")?);
        return encoder.completion(prompt, completion).map(|example| vec![example]).map_err(told);
    }
    if present(object, "text").is_some() {
        return encoder.text(filled(object, "", "text")?).map(|example| vec![example]).map_err(told);
    }
    let keys = object.keys().map(|key| quoted(key)).take(8).collect::<Vec<_>>().join(", ");
    let got = if keys.is_empty() { "none of them".into() } else { keys };
    Err(format!("expected the key `messages`, `prompt` and `completion`, or `text`, got {got}"))
}

fn chat(encoder: &ExampleEncoder<'_>, messages: &Json) -> Result<Vec<Example>, String> {
    let list = messages.as_array().ok_or_else(|| format!("messages: expected a list, got {}", shown(messages)))?;
    if list.is_empty() {
        return Err("messages: expected at least one, got an empty list".into());
    }
    let (mut turns, mut learned) = (Vec::with_capacity(list.len()), vec![]);
    for (i, message) in list.iter().enumerate() {
        let outer = format!("messages[{i}]");
        let object = message.as_object();
        let object = object.ok_or_else(|| format!("{outer}: expected an object, got {}", shown(message)))?;
        let outer = format!("{outer}.");
        only_text(object, &outer, &["tool_calls", "function_call"])?;
        let role = filled(object, &outer, "role")?;
        let content = if role == ASSISTANT { filled } else { text };
        turns.push(Message::new(role, content(object, &outer, "content")?));
        learned.push(match present(object, "weight").map(|weight| (weight.as_f64(), weight)) {
            None | Some((Some(1.0), _)) => true,
            Some((Some(0.0), _)) => false,
            Some((_, other)) => return Err(format!("{outer}weight: expected 0 or 1, got {}", shown(other))),
        });
    }
    encoder.chat_with(&turns, |i| learned[i]).map_err(told)
}

/// Refuses what would be lost: the model's template gets roles and texts only.
fn only_text(object: &Map<String, Json>, outer: &str, keys: &[&str]) -> Result<(), String> {
    let is_empty = |value: &Json| value.as_array().is_some_and(Vec::is_empty);
    match keys.iter().find(|key| present(object, key).is_some_and(|value| !is_empty(value))) {
        None => Ok(()),
        Some(key) => Err(format!("{outer}{key}: expected a chat without tools, got {}", shown(&object[*key]))),
    }
}

/// The value of a key that is there and not `null`.
fn present<'a>(object: &'a Map<String, Json>, key: &str) -> Option<&'a Json> {
    object.get(key).filter(|value| !value.is_null())
}

fn text<'a>(object: &'a Map<String, Json>, outer: &str, key: &str) -> Result<&'a str, String> {
    let value = object.get(key).ok_or_else(|| format!("{outer}{key}: expected a string, but it is missing"))?;
    value.as_str().ok_or_else(|| format!("{outer}{key}: expected a string, got {}", shown(value)))
}

/// A text that is not empty.
fn filled<'a>(object: &'a Map<String, Json>, outer: &str, key: &str) -> Result<&'a str, String> {
    match text(object, outer, key)? {
        "" => Err(format!("{outer}{key}: expected some text, got an empty string")),
        text => Ok(text),
    }
}

/// A value as it is in the file.
fn shown(value: &Json) -> String {
    match value {
        Json::Array(_) => "a list".into(),
        Json::Object(_) => "an object".into(),
        other => quoted(&other.to_string()),
    }
}
