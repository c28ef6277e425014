//! Templates as Jinja 2 reads them, in words that `minijinja` reads the same way.
//!
//! Its parser cannot be extended, so what it lacks or reads otherwise is rewritten before it sees a template.

use std::collections::BTreeSet;

/// The function that `left % right` becomes a call of: `minijinja` knows no `%` of strings.
pub(super) const PERCENT: &str = "__percent";

/// Words in expressions and tags that are no variables.
const KEYWORDS: [&str; 9] = ["and", "or", "not", "in", "is", "if", "else", "elif", "recursive"];

/// Rewrites a template, whose lines keep their numbers:
///
/// - `{% generation %}`, which marks a model's own text for training, becomes a block with its own scope.
/// - `left % right` becomes a call of [`PERCENT`].
/// - String literals may have all of Python's escapes but `\N`; a backslash joins a line with the next one.
/// - A number may have the sign `+`.
/// - Macros see the template's variables also where they take slices of them or set attributes.
/// - The line break after `{% raw %}` stays.
pub(super) fn translate(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut writer = Writer { out: String::with_capacity(source.len()), macros: vec![] };
    let mut rest = source.as_str();
    while let Some(at) = next_tag(rest) {
        let (data, tag) = rest.split_at(at);
        writer.out += data;
        rest = match Tag::read(tag) {
            Some(read) => writer.tag(&read, &tag[read.length..]),
            None => {
                // A comment, or a tag without an end: that is for `minijinja` to complain about.
                let end = if tag.starts_with("{#") { tag.find("#}").map(|end| end + 2) } else { None };
                let (text, rest) = tag.split_at(end.unwrap_or(tag.len()));
                writer.out += text;
                rest
            }
        };
    }
    writer.out + rest
}

fn next_tag(text: &str) -> Option<usize> {
    let follows = |at: usize| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
    text.match_indices('{').map(|(at, _)| at).find(|&at| follows(at))
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Space,
    Name,
    Number,
    Text,
    Sign,
}

/// A `{{ … }}` or `{% … %}`.
struct Tag<'a> {
    /// `{{`, `{%-` and the like.
    open: &'a str,
    close: &'a str,
    tokens: Vec<(Kind, &'a str)>,
    /// Bytes from open to close.
    length: usize,
}

impl<'a> Tag<'a> {
    /// The tag that a text begins with, unless it does not end or is a comment.
    fn read(text: &'a str) -> Option<Self> {
        let end = match text.get(..2)? {
            "{{" => "}}",
            "{%" => "%}",
            _ => return None,
        };
        let open = if text[2..].starts_with(['-', '+']) { 3 } else { 2 };
        let (mut at, mut depth, mut tokens) = (open, 0_usize, vec![]);
        loop {
            let rest = &text[at..];
            let close = if rest.starts_with(['-', '+']) { 3 } else { 2 };
            if depth == 0 && rest.get(close - 2..).is_some_and(|rest| rest.starts_with(end)) {
                let (open, close) = (&text[..open], &rest[..close]);
                return Some(Tag { open, close, tokens, length: at + close.len() });
            }
            let (kind, length) = token(rest)?;
            let token = &rest[..length];
            match token {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            tokens.push((kind, token));
            at += length;
        }
    }

    /// The tokens, without spaces, of a tag such as `{% generation %}`.
    fn words(&self) -> Vec<&'a str> {
        let words = self.tokens.iter().filter(|(kind, _)| *kind != Kind::Space);
        if self.open.starts_with("{%") { words.map(|(_, word)| *word).collect() } else { vec![] }
    }

    fn is_block(&self, name: &str) -> bool {
        self.words().first() == Some(&name)
    }
}

/// The kind and length of the token at the beginning of an expression.
fn token(text: &str) -> Option<(Kind, usize)> {
    let first = text.chars().next()?;
    let while_all = |is: fn(char) -> bool| text.find(|c| !is(c)).unwrap_or(text.len());
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    Some(match first {
        '"' | '\'' => {
            let mut escaped = false;
            let closes = |c: char| {
                let closes = c == first && !escaped;
                escaped = c == '\\' && !escaped;
                closes
            };
            (Kind::Text, 2 + text[1..].find(closes)?)
        }
        c if c.is_whitespace() => (Kind::Space, while_all(char::is_whitespace)),
        c if c.is_ascii_digit() => (Kind::Number, number(text)),
        c if is_word(c) => (Kind::Name, while_all(is_word)),
        _ => {
            let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|sign| text.starts_with(sign));
            (Kind::Sign, if two { 2 } else { first.len_utf8() })
        }
    })
}

/// The length of a number: `1_000`, `0x1f`, `1.5e-3`.
fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut end = 1;
    while let Some(&byte) = bytes.get(end) {
        let exponent = matches!(bytes[end - 1], b'e' | b'E') && !text.starts_with("0x") && digit(end + 1);
        match byte {
            b'.' if digit(end + 1) => {}
            b'+' | b'-' if exponent => {}
            _ if byte.is_ascii_alphanumeric() || byte == b'_' => {}
            _ => break,
        }
        end += 1;
    }
    end
}

struct Writer<'a> {
    out: String,
    /// The names in each macro that is not closed yet.
    macros: Vec<BTreeSet<&'a str>>,
}

impl<'a> Writer<'a> {
    /// Writes a tag. The text after it, from where to go on.
    fn tag(&mut self, tag: &Tag<'a>, after: &'a str) -> &'a str {
        match tag.words()[..] {
            ["generation"] | ["generation", ":"] => self.plain(tag, " with "),
            ["endgeneration"] => self.plain(tag, " endwith "),
            ["raw"] => return self.raw(tag, after),
            _ => {
                if tag.is_block("endmacro") || tag.is_block("endcall") {
                    self.close_macro(tag);
                }
                self.expression(tag);
                if tag.is_block("macro") || tag.is_block("call") {
                    self.macros.push(BTreeSet::new());
                }
            }
        }
        after
    }

    fn plain(&mut self, tag: &Tag<'_>, words: &str) {
        let lines = tag.tokens.iter().flat_map(|(_, text)| text.matches('\n'));
        self.out.extend([tag.open, words].into_iter().chain(lines).chain([tag.close]));
    }

    /// Copies up to the tag `{% endraw %}`.
    fn raw(&mut self, tag: &Tag<'_>, after: &'a str) -> &'a str {
        self.plain(tag, " raw ");
        if tag.close == "%}" && after.starts_with('\n') {
            self.out.push('\n'); // the one that `trim_blocks` takes
        }
        let ends = |at: &usize| Tag::read(&after[*at..]).is_some_and(|tag| tag.words()[..] == ["endraw"]);
        let end = after.match_indices("{%").map(|(at, _)| at).find(ends).unwrap_or(after.len());
        self.out += &after[..end];
        &after[end..]
    }

    /// Mentions all names of a macro before its end. `minijinja` gives a macro the variables that its text mentions,
    /// and overlooks `name[1:]` and `{% set name.key = … %}`.
    fn close_macro(&mut self, tag: &Tag<'_>) {
        let Some(names) = self.macros.pop() else { return };
        let list = names.iter().copied().collect::<Vec<_>>().join(", ");
        self.out += &format!("{}if false %}}{{{{ [{list}] }}}}{{% endif %}}", tag.open);
        if let Some(outer) = self.macros.last_mut() {
            outer.extend(names);
        }
    }

    /// Writes a tag with `%`, signs and strings rewritten.
    fn expression(&mut self, tag: &Tag<'a>) {
        self.out += tag.open;
        let mut levels = Levels::new(self.out.len());
        let mut is_tag_name = tag.open.starts_with("{%");
        // The last token, and the two before it.
        let mut before = [""; 3];
        for &(kind, token) in &tag.tokens {
            let is_keyword = KEYWORDS.contains(&token) && !matches!(before[0], "." | "|");
            let in_test = before[0] == "is" || before[..2] == ["not", "is"];
            match (kind, token) {
                (Kind::Space, _) => {
                    self.out += token;
                    continue;
                }
                (Kind::Name, "is") if is_keyword => levels.join(&mut self.out, token),
                (Kind::Name, "not" | "in") if in_test => levels.join(&mut self.out, token),
                (Kind::Name, _) if is_tag_name || is_keyword => levels.separate(&mut self.out, token),
                (Kind::Name | Kind::Number, _) => levels.operand(&mut self.out, token),
                (Kind::Text, _) => levels.operand(&mut self.out, &literal(token)),
                (Kind::Sign, "%") => levels.percent(&mut self.out),
                (Kind::Sign, "*" | "/" | "//") => levels.multiply(&mut self.out, token),
                (Kind::Sign, "+") if !levels.after_operand => levels.join(&mut self.out, " "),
                (Kind::Sign, "-") if !levels.after_operand => levels.join(&mut self.out, token),
                (Kind::Sign, "." | "|" | "**") => levels.join(&mut self.out, token),
                (Kind::Sign, "(" | "[" | "{") => levels.open(&mut self.out, token),
                (Kind::Sign, ")" | "]" | "}") => levels.close(&mut self.out, token),
                (Kind::Sign, _) => levels.separate(&mut self.out, token),
            }
            let is_variable = kind == Kind::Name && !is_tag_name && !is_keyword && !matches!(before[0], "." | "|");
            if let Some(names) = self.macros.last_mut().filter(|_| is_variable) {
                names.insert(token);
            }
            is_tag_name = false;
            before = [token, before[0], before[1]];
        }
        levels.end_call(&mut self.out);
        self.out += tag.close;
    }
}

/// Where the operands of `%` begin and end, at each level of brackets. `%` binds as tightly as `*`: its left operand
/// begins after the last sign that binds less tightly, its right one ends before the next sign that does not bind more
/// tightly.
struct Levels {
    levels: Vec<Level>,
    /// Whether the last token ends an operand, so that `-` subtracts.
    after_operand: bool,
    /// Where the last token ends.
    end: usize,
}

#[derive(Default)]
struct Level {
    /// Where the left operand of the next `%` begins.
    start: Option<usize>,
    /// Whether a call of [`PERCENT`] is open.
    in_call: bool,
}

impl Levels {
    fn new(end: usize) -> Self {
        Levels { levels: vec![Level::default()], after_operand: false, end }
    }

    fn write(&mut self, out: &mut String, token: &str, after_operand: bool) {
        *out += token;
        (self.after_operand, self.end) = (after_operand, out.len());
    }

    /// A part of an operand that more of it follows.
    fn join(&mut self, out: &mut String, token: &str) {
        self.begin(out);
        self.write(out, token, false);
    }

    /// A name, number or string.
    fn operand(&mut self, out: &mut String, token: &str) {
        self.begin(out);
        self.write(out, token, true);
    }

    fn begin(&mut self, out: &str) {
        if let Some(level) = self.levels.last_mut() {
            level.start.get_or_insert(out.len());
        }
    }

    /// A sign or word that binds less tightly than `%`.
    fn separate(&mut self, out: &mut String, token: &str) {
        self.end_call(out);
        self.write(out, token, false);
        if let Some(level) = self.levels.last_mut() {
            level.start = None;
        }
    }

    fn multiply(&mut self, out: &mut String, token: &str) {
        self.end_call(out);
        self.write(out, token, false);
    }

    fn percent(&mut self, out: &mut String) {
        self.end_call(out);
        if let Some((level, start)) = self.levels.last_mut().and_then(|level| level.start.map(|start| (level, start))) {
            level.in_call = true;
            out.insert_str(start, &format!("{PERCENT}("));
            self.write(out, ",", false);
        } else {
            self.write(out, "%", false);
        }
    }

    fn open(&mut self, out: &mut String, token: &str) {
        self.join(out, token);
        self.levels.push(Level::default());
    }

    fn close(&mut self, out: &mut String, token: &str) {
        self.end_call(out);
        if self.levels.len() > 1 {
            self.levels.pop();
        }
        self.write(out, token, true);
    }

    fn end_call(&mut self, out: &mut String) {
        if let Some(level) = self.levels.last_mut().filter(|level| level.in_call) {
            level.in_call = false;
            out.insert(self.end, ')');
            self.end += 1;
        }
    }
}

/// A string literal with only those escapes that `minijinja` has too.
fn literal(text: &str) -> String {
    let (mut out, mut joined, mut rest) = (String::with_capacity(text.len()), String::new(), text);
    while let Some((before, after)) = rest.split_once('\\') {
        out += before;
        let escape = after.chars().next().unwrap_or_default();
        let mut length = escape.len_utf8();
        let long = || char::from_u32(u32::from_str_radix(after.get(1..9)?, 16).ok()?);
        match escape {
            '\n' => joined.push('\n'),
            'a' => out.push('\u{7}'),
            'v' => out.push('\u{b}'),
            '/' => out += "\\\\/",
            'U' if long().is_some_and(|c| c != '\\') => {
                out.extend(long());
                length = 9;
            }
            _ => out.extend(['\\', escape]),
        }
        rest = after.get(length..).unwrap_or("");
    }
    out + rest + &joined
}
