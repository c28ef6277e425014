//! Python's `text % values`, which is also the filter `format`.
//!
//! `minijinja` has no `%` of strings. Its filter `format` lacks `%r`, `%u` and widths given as `*`, and ignores values
//! that are left over, an error in Python. Only its digits of floats are used here.

use std::vec;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};

use super::methods::charge;
use super::python::{bad, repr, text};

/// Most digits after the point, and of an integer.
const MAX_PRECISION: usize = 1000;

/// Formats the values of a tuple, or one value, or those of a dictionary that the text names.
pub(super) fn printf(state: &State<'_, '_>, template: &str, values: &Value) -> Result<String, Error> {
    let list = if values.is_tuple() { values.try_iter()?.collect() } else { vec![values.clone()] };
    // Python cannot tell whether a list has names.
    let named = !values.is_tuple() && matches!(values.kind(), ValueKind::Map | ValueKind::Seq);
    let mut values = Values { list: list.into_iter(), named: named.then_some(values) };
    let (mut out, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('%') {
        out += before;
        rest = after;
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let spec = Spec::read(&mut rest, &mut values)?;
        charge(state, spec.width.max(spec.precision.unwrap_or(0)))?;
        let piece = spec.format(values.next(spec.key)?)?;
        charge(state, piece.len())?;
        out += &piece;
    }
    if values.named.is_none() && values.list.next().is_some() {
        return Err(bad(format!("more values than conversions in `{template}`")));
    }
    Ok(out + rest)
}

struct Values<'a> {
    list: vec::IntoIter<Value>,
    named: Option<&'a Value>,
}

impl Values<'_> {
    fn next(&mut self, key: Option<&str>) -> Result<Value, Error> {
        match key {
            None => self.list.next().ok_or_else(|| bad("fewer values than conversions in a format")),
            Some(key) => {
                let value = self.named.ok_or_else(|| bad("expected a dictionary to format"))?.get_item(&key.into())?;
                if value.is_undefined() { Err(bad(format!("a format without a value for `{key}`"))) } else { Ok(value) }
            }
        }
    }
}

/// A conversion such as `%(key)-5.2f`.
struct Spec<'a> {
    key: Option<&'a str>,
    flags: &'a str,
    width: usize,
    left: bool,
    precision: Option<usize>,
    conversion: char,
}

impl<'a> Spec<'a> {
    /// Reads what follows a `%`. A `*` takes a width or precision from the values.
    fn read(rest: &mut &'a str, values: &mut Values<'_>) -> Result<Self, Error> {
        let mut key = None;
        if let Some(after) = rest.strip_prefix('(') {
            let (name, after) = after.split_once(')').ok_or_else(|| bad("a format with an open bracket"))?;
            (key, *rest) = (Some(name), after);
        }
        let (flags, after) = rest.split_at(rest.find(|c| !"#0- +".contains(c)).unwrap_or(rest.len()));
        *rest = after;
        let width = number(rest, values)?.unwrap_or(0);
        let precision = match rest.strip_prefix('.') {
            Some(after) => {
                *rest = after;
                Some(usize::try_from(number(rest, values)?.unwrap_or(0)).unwrap_or(0))
            }
            None => None,
        };
        *rest = rest.strip_prefix(['h', 'l', 'L']).unwrap_or(rest);
        let conversion = rest.chars().next().ok_or_else(|| bad("a format that ends after `%`"))?;
        *rest = &rest[conversion.len_utf8()..];
        let left = width < 0 || flags.contains('-');
        let width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
        Ok(Spec { key, flags, width, left, precision, conversion })
    }

    fn format(&self, value: Value) -> Result<String, Error> {
        let short = |text: String| match self.precision {
            Some(precision) => text.chars().take(precision).collect(),
            None => text,
        };
        let conversion = self.conversion;
        match conversion {
            's' => return Ok(self.pad("", &short(text(&value)?))),
            'r' => return Ok(self.pad("", &short(repr(&value)?))),
            'c' => return Ok(self.pad("", &character(&value)?.to_string())),
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {}
            _ => return Err(bad(format!("a format with an unknown conversion `%{conversion}`"))),
        }
        if self.precision.is_some_and(|precision| precision > MAX_PRECISION) {
            return Err(bad(format!("a format of more than {MAX_PRECISION} digits")));
        }
        let wrong = || bad(format!("%{conversion}: expected a number, got a value of type {}", value.kind()));
        let value = match value.kind() {
            ValueKind::Bool => i64::from(value.is_true()).into(),
            ValueKind::Number => value.clone(),
            _ => return Err(wrong()),
        };
        let (text, prefix) = match conversion {
            'd' | 'i' | 'u' => (self.integer(decimal(&value)?), ""),
            'x' | 'X' | 'o' => {
                let value = Some(&value).filter(|value| value.is_integer()).ok_or_else(wrong)?;
                let integer = i128::try_from(value.clone())?;
                let (sign, size) = (if integer < 0 { "-" } else { "" }, integer.unsigned_abs());
                let (digits, prefix) = match conversion {
                    'x' => (format!("{size:x}"), "0x"),
                    'X' => (format!("{size:X}"), "0X"),
                    _ => (format!("{size:o}"), "0o"),
                };
                (self.integer(format!("{sign}{digits}")), if self.flags.contains('#') { prefix } else { "" })
            }
            _ => {
                let alternate = if self.flags.contains('#') { "#" } else { "" };
                let spec = format!("%{alternate}.{}{conversion}", self.precision.unwrap_or(6));
                (format(FormatStyle::Printf, &spec, &[Value::from(f64::try_from(value)?)])?, "")
            }
        };
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => ("-", digits),
            None if self.flags.contains('+') => ("+", text.as_str()),
            None if self.flags.contains(' ') => (" ", text.as_str()),
            None => ("", text.as_str()),
        };
        let sign = format!("{sign}{prefix}");
        let zeros = if self.flags.contains('0') && !self.left { self.width } else { 0 };
        let zeros = zeros.saturating_sub(sign.len() + digits.len());
        Ok(self.pad(&(sign + &"0".repeat(zeros)), digits))
    }

    /// An integer with at least as many digits as the precision.
    fn integer(&self, text: String) -> String {
        let (sign, digits) = text.split_at(usize::from(text.starts_with('-')));
        format!("{sign}{digits:0>width$}", width = self.precision.unwrap_or(0))
    }

    fn pad(&self, before: &str, text: &str) -> String {
        let spaces = " ".repeat(self.width.saturating_sub(before.len() + text.chars().count()));
        if self.left { [before, text, &spaces].concat() } else { [&spaces, before, text].concat() }
    }
}

/// A width or precision.
fn number(rest: &mut &str, values: &mut Values<'_>) -> Result<Option<i64>, Error> {
    if let Some(after) = rest.strip_prefix('*') {
        *rest = after;
        return i64::try_from(values.next(None)?).map(Some);
    }
    let (digits, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
    *rest = after;
    match digits {
        "" => Ok(None),
        _ => digits.parse().map(Some).map_err(|_| bad("a format with a width or precision that is too large")),
    }
}

/// The whole part of a number.
fn decimal(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    match number.is_finite() {
        true => Ok(format!("{:.0}", number.trunc())),
        false => Err(bad(format!("%d: expected a finite number, got {number}"))),
    }
}

fn character(value: &Value) -> Result<char, Error> {
    let found = match value.as_str() {
        Some(text) => text.chars().next().filter(|c| c.len_utf8() == text.len()),
        None => value.as_usize().and_then(|code| char::from_u32(u32::try_from(code).ok()?)),
    };
    found.ok_or_else(|| bad("%c: expected a character or its code"))
}
