//! Values as Python writes them: `str(value)`, `repr(value)` and `json.dumps(value)`.
//!
//! Templates write numbers, lists and descriptions of tools into prompts. `minijinja` writes numbers without exponents
//! and strings with fewer escapes, and its JSON has no separators, sorted keys or escapes of what is not ASCII.
//! Nor does it bound how long or deep a value may be that is written.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Longest and deepest values that are written. Values share their parts, so a small one can have a long text.
const MAX_VALUE_BYTES: usize = 16 << 20;
const MAX_VALUE_DEPTH: usize = 100;

pub(super) fn bad(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `str(value)`.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    check_size(value)?;
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out += text,
        None if value.is_undefined() => {}
        None => write_repr(&mut out, value)?,
    }
    Ok(out)
}

/// `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    check_size(value)?;
    let mut out = String::new();
    write_repr(&mut out, value)?;
    Ok(out)
}

fn write_repr(out: &mut String, value: &Value) -> Result<(), Error> {
    let list = |out: &mut String, [open, close]: [&str; 2]| {
        *out += open;
        for (i, item) in value.try_iter()?.enumerate() {
            *out += if i == 0 { "" } else { ", " };
            write_repr(out, &item)?;
        }
        *out += if value.is_tuple() && value.len() == Some(1) { "," } else { "" };
        *out += close;
        Ok(())
    };
    match value.kind() {
        ValueKind::Undefined => *out += "Undefined",
        ValueKind::Number if !value.is_integer() => *out += &float(value, ["nan", "inf"]),
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq if value.is_tuple() => return list(out, ["(", ")"]),
        ValueKind::Seq => return list(out, ["[", "]"]),
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                *out += if i == 0 { "" } else { ", " };
                write_repr(out, &key)?;
                *out += ": ";
                write_repr(out, &value.get_item(&key)?)?;
            }
            out.push('}');
        }
        _ => *out += &value.to_string(),
    }
    Ok(())
}

/// Writes a string in quotes, as in a list.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        let code = u32::from(c);
        match c {
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            c if c == '\\' || c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            _ if code < 0x100 => *out += &format!("\\x{code:02x}"),
            _ if code < 0x1_0000 => *out += &format!("\\u{code:04x}"),
            _ => *out += &format!("\\U{code:08x}"),
        }
    }
    out.push(quote);
}

/// `c.isprintable()`.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_control() || c.is_ascii() {
        return !c.is_control();
    }
    // Combining marks are printable, but `escape_debug` spares them only after another character.
    !format!("x{c}").escape_debug().to_string().starts_with("x\\u{")
}

/// The shortest digits that make the same number, with an exponent below 1e-4 and from 1e16.
fn float(value: &Value, [nan, infinity]: [&str; 2]) -> String {
    let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    let sign = if number < 0.0 { "-" } else { "" };
    let text = format!("{number:?}");
    match text.split_once('e') {
        _ if number.is_nan() => nan.into(),
        _ if number.is_infinite() => format!("{sign}{infinity}"),
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(("+", exponent), |digits| ("-", digits));
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

/// How `json.dumps` writes.
pub(super) struct Json {
    pub ensure_ascii: bool,
    /// What each level of nesting begins its lines with; everything is on one line if there is none.
    pub indent: Option<String>,
    /// Between items, and between a key and its value.
    pub separators: [String; 2],
    pub sort_keys: bool,
}

impl Json {
    /// `json.dumps(value)`.
    pub fn dumps(&self, value: &Value) -> Result<String, Error> {
        check_size(value)?;
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if out.len() > MAX_VALUE_BYTES {
            return Err(bad(format!("JSON of over {MAX_VALUE_BYTES} bytes")));
        }
        match value.kind() {
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                let mut any = false;
                for item in value.try_iter()? {
                    self.begin(out, depth + 1, !std::mem::replace(&mut any, true));
                    self.write(out, &item, depth + 1)?;
                }
                self.end(out, depth, any);
                out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.begin(out, depth + 1, i == 0);
                    match key.kind() {
                        ValueKind::String => self.string(out, key.as_str().unwrap_or_default())?,
                        ValueKind::Bool | ValueKind::Number | ValueKind::None => {
                            *out += &format!("\"{}\"", scalar(key));
                        }
                        kind => return Err(bad(format!("JSON has no key of type {kind}"))),
                    }
                    *out += &self.separators[1];
                    self.write(out, &value.get_item(key)?, depth + 1)?;
                }
                self.end(out, depth, !keys.is_empty());
                out.push('}');
            }
            ValueKind::Bool | ValueKind::Number | ValueKind::None => *out += &scalar(value),
            kind => return Err(bad(format!("JSON has no value of type {kind}"))),
        }
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) -> Result<(), Error> {
        let text = serde_json::to_string(text).map_err(|e| bad(e.to_string()))?;
        for c in text.chars() {
            match self.ensure_ascii && !matches!(c, ' '..='~') {
                true => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}")),
                false => out.write_char(c),
            }
            .map_err(|e| bad(e.to_string()))?;
        }
        Ok(())
    }

    /// Before an item.
    fn begin(&self, out: &mut String, depth: usize, first: bool) {
        *out += if first { "" } else { &self.separators[0] };
        self.line(out, depth);
    }

    /// Before the closing bracket.
    fn end(&self, out: &mut String, depth: usize, any: bool) {
        if any {
            self.line(out, depth);
        }
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            *out += &indent.repeat(depth);
        }
    }
}

/// JSON of a number, a truth value or none.
fn scalar(value: &Value) -> String {
    match value.kind() {
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::None => "null".into(),
        _ if value.is_integer() => value.to_string(),
        _ => float(value, ["NaN", "Infinity"]),
    }
}

/// Returns an error if a value is too long or too deep to be written.
fn check_size(value: &Value) -> Result<(), Error> {
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
        false => Err(bad(format!("a value of over {MAX_VALUE_BYTES} bytes or {MAX_VALUE_DEPTH} levels"))),
    }
}
