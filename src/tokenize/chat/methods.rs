//! Python's methods of strings, lists and dictionaries, where `minijinja_contrib::pycompat` lacks them or they do
//! something else. It has the rest: `upper`, `replace`, `items` and the like.
//!
//! Of those that it has, its `split` and `splitlines` take no arguments by name and end lines at fewer characters; its
//! `find`, `count`, `startswith` and `endswith` take no range; its `strip` and `isspace` know fewer spaces; its `join`
//! writes values that are no strings, which is an error in Python; and its `title` takes an apostrophe for a letter.

use std::array;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{bad, is_printable};

/// `value.name(args)`. The error is of kind `UnknownMethod` where `minijinja_contrib` should try.
pub(super) fn call(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), value.kind(), name) {
        (Some(text), ..) => string(state, text, name, args),
        (_, ValueKind::Seq, "index") => {
            let [item] = bind(args, ["value"])?;
            let at = value.try_iter()?.position(|other| Some(other) == item);
            at.map(Value::from).ok_or_else(|| bad("the list has no such value"))
        }
        (_, ValueKind::Seq | ValueKind::Map, "copy") => bind(args, []).map(|[]| value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// Arguments by position or name, in the order of `names`.
pub(super) fn bind<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (positional, named): (Rest<Value>, Kwargs) = from_args(args)?;
    if positional.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut bound = array::from_fn(|i| positional.get(i).cloned());
    for (value, name) in bound.iter_mut().zip(names) {
        if named.has(name) && value.replace(named.get(name)?).is_some() {
            return Err(bad(format!("argument `{name}` is given twice")));
        }
    }
    named.assert_all_used()?;
    Ok(bound)
}

/// The string in an argument; none if it is none or not given.
pub(super) fn text(arg: &Option<Value>) -> Result<Option<&str>, Error> {
    match arg {
        Some(value) if !value.is_none() => match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(bad(format!("expected a string, got a value of type {}", value.kind()))),
        },
        _ => Ok(None),
    }
}

fn required(arg: &Option<Value>) -> Result<&str, Error> {
    text(arg)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
}

fn integer(arg: &Option<Value>) -> Result<Option<i64>, Error> {
    arg.as_ref().filter(|value| !value.is_none()).map(|value| i64::try_from(value.clone())).transpose()
}

fn string(state: &State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "split" | "rsplit" => split(text, args, name == "rsplit"),
        "splitlines" => {
            let [keep] = bind(args, ["keepends"])?;
            Ok(lines(text, keep.is_some_and(|keep| keep.is_true())).into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => partition(text, args, name == "rpartition"),
        "removeprefix" | "removesuffix" => {
            let [affix] = bind(args, ["affix"])?;
            let affix = required(&affix)?;
            let rest = if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Ok(rest.unwrap_or(text).into())
        }
        "strip" | "lstrip" | "rstrip" => strip(text, name, args),
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, args),
        "startswith" | "endswith" => has_affix(text, args, name == "startswith"),
        "center" | "ljust" | "rjust" | "zfill" => pad(state, text, name, args),
        "expandtabs" => expand_tabs(state, text, args),
        "join" => join(state, text, args),
        "title" | "istitle" => {
            let [] = bind(args, [])?;
            let titled = title(text);
            Ok(if name == "title" { titled.into() } else { (titled == text && text != titled.to_lowercase()).into() })
        }
        "swapcase" | "casefold" => {
            let [] = bind(args, [])?;
            let folded = || text.to_lowercase().replace('ß', "ss").replace('ς', "σ");
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Ok(if name == "casefold" { folded() } else { text.chars().map(swap).collect() }.into())
        }
        "isspace" | "isdecimal" | "isprintable" | "isidentifier" => {
            let [] = bind(args, [])?;
            is(text, name).map(Value::from)
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

fn is(text: &str, name: &str) -> Result<bool, Error> {
    Ok(match name {
        "isspace" => !text.is_empty() && text.chars().all(is_space),
        "isprintable" => text.chars().all(is_printable),
        "isidentifier" => {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            text.chars().all(word) && text.chars().next().is_some_and(|c| !c.is_numeric())
        }
        _ => {
            // The standard library does not tell digits from fractions and the like.
            if let Some(c) = text.chars().find(|c| !c.is_ascii() && c.is_numeric()) {
                return Err(bad(format!("isdecimal: cannot tell whether `{c}` is a decimal digit")));
            }
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
        }
    })
}

fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let [separator, max] = bind(args, ["sep", "maxsplit"])?;
    let max = integer(&max)?.and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match self::text(&separator)? {
        Some("") => return Err(bad("empty separator")),
        Some(separator) if from_right => text.rsplitn(max.saturating_add(1), separator).collect(),
        Some(separator) => text.splitn(max.saturating_add(1), separator).collect(),
        None => words(text, max, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Words between spaces. What is left after `max` of them is one part, which keeps its outer spaces on the far side.
fn words(text: &str, max: usize, from_right: bool) -> Vec<&str> {
    let trim =
        |text| if from_right { str::trim_end_matches(text, is_space) } else { str::trim_start_matches(text, is_space) };
    let (mut parts, mut rest) = (vec![], trim(text));
    while !rest.is_empty() {
        let (word, left) = match from_right {
            _ if parts.len() == max => (rest, ""),
            false => rest.split_at(rest.find(is_space).unwrap_or(rest.len())),
            true => {
                let space = rest.char_indices().rev().find(|&(_, c)| is_space(c));
                let (left, word) = rest.split_at(space.map_or(0, |(at, c)| at + c.len_utf8()));
                (word, left)
            }
        };
        parts.push(word);
        rest = trim(left);
    }
    parts
}

fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let (mut lines, mut rest) = (vec![], text);
    let ends_line = |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    while let Some((at, end)) = rest.char_indices().find(|&(_, c)| ends_line(c)) {
        let length = if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(&rest[..if keep_ends { at + length } else { at }]);
        rest = &rest[at + length..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

fn partition(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let [separator] = bind(args, ["sep"])?;
    let separator = required(&separator)?;
    if separator.is_empty() {
        return Err(bad("empty separator"));
    }
    let parts = match from_right {
        false => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
        true => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
    };
    Ok(Tuple::from(parts.map(Value::from)).into())
}

fn strip(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let [chars] = bind(args, ["chars"])?;
    let chars = self::text(&chars)?;
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
    Ok(if name == "lstrip" { text } else { text.trim_end_matches(strips) }.into())
}

/// The characters from `start` to `end`, and how many precede them; none if `start` lies behind `end` or the text.
fn part<'a>(text: &'a str, start: &Option<Value>, end: &Option<Value>) -> Result<Option<(&'a str, usize)>, Error> {
    if start.is_none() && end.is_none() {
        return Ok(Some((text, 0)));
    }
    let length = i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
    let from_end = |at: i64| if at < 0 { at.saturating_add(length).max(0) } else { at };
    let start = from_end(integer(start)?.unwrap_or(0));
    let end = from_end(integer(end)?.unwrap_or(length)).min(length);
    if start > end {
        return Ok(None);
    }
    let at = |n: i64| text.char_indices().nth(n as usize).map_or(text.len(), |(at, _)| at);
    Ok(Some((&text[at(start)..at(end)], start as usize)))
}

fn search(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let [what, start, end] = bind(args, ["sub", "start", "end"])?;
    let (what, part) = (required(&what)?, part(text, &start, &end)?);
    if name == "count" {
        return Ok(part.map_or(0, |(part, _)| part.matches(what).count()).into());
    }
    let found = part.and_then(|(part, before)| {
        let at = if name.starts_with('r') { part.rfind(what) } else { part.find(what) }?;
        Some(before + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(bad(format!("{name}: the text does not contain `{what}`"))),
    }
}

fn has_affix(text: &str, args: &[Value], at_start: bool) -> Result<Value, Error> {
    let [affixes, start, end] = bind(args, ["affix", "start", "end"])?;
    let affixes = affixes.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let affixes: Vec<Value> = if affixes.is_tuple() { affixes.try_iter()?.collect() } else { vec![affixes] };
    let Some((part, _)) = part(text, &start, &end)? else { return Ok(false.into()) };
    for affix in affixes {
        let affix = Some(affix);
        let affix = required(&affix)?;
        if if at_start { part.starts_with(affix) } else { part.ends_with(affix) } {
            return Ok(true.into());
        }
    }
    Ok(false.into())
}

/// Takes the fuel for a text that is about to be made.
pub(super) fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / 64) as u64)
}

pub(super) fn pad(state: &State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let [width, fill] = bind(args, ["width", "fillchar"])?;
    let width = integer(&width)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let fill = match self::text(&fill)? {
        _ if name == "zfill" => "0",
        None => " ",
        Some(fill) if fill.chars().count() == 1 => fill,
        Some(_) => return Err(bad(format!("{name}: expected one character to fill with"))),
    };
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    charge(state, missing.saturating_mul(fill.len()))?;
    let (sign, digits) = text.split_at(usize::from(name == "zfill" && text.starts_with(['-', '+'])));
    let left = match name {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    Ok([sign, &fill.repeat(left), digits, &fill.repeat(missing - left)].concat().into())
}

fn expand_tabs(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<Value, Error> {
    let [size] = bind(args, ["tabsize"])?;
    let size = usize::try_from(integer(&size)?.unwrap_or(8)).unwrap_or(0);
    charge(state, text.matches('\t').count().saturating_mul(size))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out += &" ".repeat(spaces);
                column += spaces;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out.into())
}

fn join(state: &State<'_, '_>, separator: &str, args: &[Value]) -> Result<Value, Error> {
    let [items] = bind(args, ["iterable"])?;
    let items = items.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let Some(item) = item.as_str() else {
            return Err(bad(format!("join: item {i}: expected a string, got a value of type {}", item.kind())));
        };
        charge(state, separator.len() + item.len())?;
        out += if i == 0 { "" } else { separator };
        out += item;
    }
    Ok(out.into())
}

/// Each word with its first letter in upper case. Any character that is no letter ends a word.
fn title(text: &str) -> String {
    let (mut out, mut in_word) = (String::with_capacity(text.len()), false);
    for c in text.chars() {
        match in_word {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        in_word = c.is_alphabetic();
    }
    out
}
