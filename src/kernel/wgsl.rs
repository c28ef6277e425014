//! Just enough of a WGSL parser to find out what an entry point uses: tokens, the items of a module, the sizes of types
//! and the values of constants.

use std::collections::HashSet;
use std::ops::Range;

/// A word or a punctuation character, and its position. Whitespace and comments lie between tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub text: &'a str,
    pub at: usize,
}

impl Token<'_> {
    pub fn end(&self) -> usize {
        self.at + self.text.len()
    }
}

/// An item at the top level of a module.
#[derive(Debug)]
pub(crate) struct Item<'a> {
    pub tokens: Range<usize>,
    pub kind: Kind<'a>,
}

#[derive(Debug)]
pub(crate) enum Kind<'a> {
    Function(&'a str),
    /// `binding` is the index of the token with the binding number.
    Storage {
        name: &'a str,
        binding: usize,
        writes: bool,
        ty: Range<usize>,
    },
    Workgroup {
        name: &'a str,
        ty: Range<usize>,
    },
    Uniform {
        name: &'a str,
    },
    /// A `const` or an `alias`, and its right-hand side.
    Named {
        name: &'a str,
        value: Range<usize>,
    },
    Other,
}

/// A file, split into tokens and items.
#[derive(Debug)]
pub(crate) struct Module<'a> {
    pub text: &'a str,
    pub tokens: Vec<Token<'a>>,
    pub items: Vec<Item<'a>>,
}

impl<'a> Module<'a> {
    pub fn parse(text: &'a str) -> Module<'a> {
        let mut module = Module { text, tokens: tokens(text), items: vec![] };
        let (mut start, mut depth) = (0, 0usize);
        for i in 0..module.tokens.len() {
            match module.word(i) {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(module.word(i), ";" | "}") {
                let kind = module.kind(start..i);
                module.items.push(Item { tokens: start..i + 1, kind });
                start = i + 1;
            }
        }
        module
    }

    /// The token of this index; empty after the last one.
    pub fn word(&self, i: usize) -> &'a str {
        self.tokens.get(i).map_or("", |t| t.text)
    }

    /// Index of the first token from `from` on that is `word`, or `end`.
    fn find(&self, word: &str, from: usize, end: usize) -> usize {
        (from..end).find(|&i| self.word(i) == word).unwrap_or(end)
    }

    /// The bracket that closes the one at `open`.
    pub fn closing(&self, open: usize) -> Option<usize> {
        let mut depth = 0;
        (open..self.tokens.len()).find(|&i| {
            match self.word(i) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            depth == 0
        })
    }

    fn kind(&self, item: Range<usize>) -> Kind<'a> {
        let (mut at, mut binding) = (item.start, item.end);
        while self.word(at) == "@" {
            if self.word(at + 1) == "binding" {
                binding = at + 3;
            }
            at += 2;
            if self.word(at) == "(" {
                at = self.closing(at).unwrap_or(item.end) + 1;
            }
        }
        match self.word(at) {
            "fn" => Kind::Function(self.word(at + 1)),
            "const" | "alias" => {
                let value = self.find("=", at, item.end) + 1;
                Kind::Named { name: self.word(at + 1), value: value.min(item.end)..item.end }
            }
            "var" if self.word(at + 1) == "<" => {
                let name = self.find(">", at, item.end) + 1;
                let (space, ty) = (at + 2, (name + 2).min(item.end)..item.end);
                match self.word(space) {
                    "storage" => {
                        let writes = self.word(space + 2) == "read_write";
                        Kind::Storage { name: self.word(name), binding, writes, ty }
                    }
                    "workgroup" => Kind::Workgroup { name: self.word(name), ty },
                    "uniform" => Kind::Uniform { name: self.word(name) },
                    _ => Kind::Other,
                }
            }
            _ => Kind::Other,
        }
    }

    /// Whether token `i` can name something at the top level: it is neither a member nor a number.
    pub fn is_name(&self, i: usize) -> bool {
        let starts = self.word(i).starts_with(|c: char| c.is_alphabetic() || c == '_');
        starts && (i == 0 || self.word(i - 1) != ".")
    }

    /// Indices of the tokens of an item that are `name`, except for members of that name.
    pub fn mentions(&self, item: &Item<'_>, name: &str) -> impl Iterator<Item = usize> {
        item.tokens.clone().filter(move |&i| self.word(i) == name && self.is_name(i))
    }

    /// Whether token `i` of a function declares a parameter or variable, which may shadow a global.
    fn is_declared(&self, i: usize) -> bool {
        let before = if i == 0 { "" } else { self.word(i - 1) };
        let keyword = matches!(before, "let" | "const" | "var");
        keyword || self.word(i + 1) == ":" || (before == ">" && self.is_template_of_var(i - 1))
    }

    /// Whether an item declares a parameter or variable of this name.
    pub fn declares(&self, item: &Item<'_>, name: &str) -> bool {
        self.mentions(item, name).any(|i| self.is_declared(i))
    }

    /// Whether the `>` at `i` ends the template of `var<function>`.
    fn is_template_of_var(&self, i: usize) -> bool {
        i >= 3 && self.word(i - 2) == "<" && self.word(i - 3) == "var"
    }

    /// Whether it has a directive that enables this extension.
    pub fn enables(&self, extension: &str) -> bool {
        let directives = self.items.iter().filter(|i| self.word(i.tokens.start) == "enable");
        directives.flat_map(|i| i.tokens.clone()).any(|i| self.word(i) == extension)
    }

    /// Whether it calls a function of subgroups or takes a built-in value of theirs. (`enable subgroups;`, which the
    /// standard wants, is no sign: the quirk `no-enable-subgroups`.)
    pub fn uses_subgroups(&self) -> bool {
        let calls = |word: &str| {
            let operation = ["subgroup", "quad"].iter().find_map(|start| word.strip_prefix(start));
            operation.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
        };
        (0..self.tokens.len()).any(|i| match self.word(i) {
            "builtin" => self.word(i + 2).contains("subgroup"),
            word => self.word(i + 1) == "(" && self.is_name(i) && calls(word),
        })
    }

    /// Indices of the functions that an entry point may call, itself first. Empty if there is no such entry point.
    pub fn reachable(&self, entry: &str) -> Vec<usize> {
        let function = |name: &str| self.items.iter().position(|i| matches!(i.kind, Kind::Function(n) if n == name));
        let mut found: Vec<usize> = function(entry).into_iter().collect();
        let mut seen: HashSet<&str> = HashSet::from([entry]);
        let mut next = 0;
        while let Some(&item) = found.get(next) {
            for i in self.items[item].tokens.clone() {
                if self.word(i + 1) == "(" && self.is_name(i) && seen.insert(self.word(i)) {
                    found.extend(function(self.word(i)));
                }
            }
            next += 1;
        }
        found
    }

    /// The names in these functions that may refer to globals: all except those that a function declares itself.
    pub fn names(&self, functions: &[usize]) -> HashSet<&'a str> {
        let of_function = |&f: &usize| {
            let tokens = || self.items[f].tokens.clone().filter(|&i| self.is_name(i));
            let declared: HashSet<&str> = tokens().filter(|&i| self.is_declared(i)).map(|i| self.word(i)).collect();
            tokens().map(|i| self.word(i)).filter(|name| !declared.contains(name)).collect::<HashSet<&'a str>>()
        };
        functions.iter().flat_map(of_function).collect()
    }

    /// The right-hand side of a `const` or `alias`, and whether it is a `const`.
    fn meaning(&self, name: &str) -> Option<(Range<usize>, bool)> {
        self.items.iter().find_map(|i| match &i.kind {
            Kind::Named { name: n, value } if *n == name => Some((value.clone(), self.word(i.tokens.start) == "const")),
            _ => None,
        })
    }

    /// The tokens with every `alias` and `const` replaced by its right-hand side, to a bounded depth.
    fn expanded(&self, tokens: Range<usize>, depth: usize, out: &mut Vec<&'a str>) {
        for i in tokens {
            match self.meaning(self.word(i)).filter(|_| depth > 0) {
                Some((value, constant)) => {
                    // A constant counts as one operand.
                    out.extend(constant.then_some("("));
                    self.expanded(value, depth - 1, out);
                    out.extend(constant.then_some(")"));
                }
                None => out.push(self.word(i)),
            }
        }
    }

    /// A type without aliases, and its size in an array in bytes; `None` for a type that this parser does not know.
    pub fn type_of(&self, ty: Range<usize>) -> (String, Option<usize>) {
        let mut words = vec![];
        self.expanded(ty, 16, &mut words);
        (words.concat(), size_of(&words))
    }

    /// The value of an expression of integers and the module's constants; `None` if this parser cannot tell.
    pub fn value(&self, expression: Range<usize>) -> Option<i64> {
        let mut words = vec![];
        self.expanded(expression, 16, &mut words);
        evaluate(&words)
    }

    /// Bytes of workgroup memory that an entry point uses, as WebGPU counts them. `None` if the entry point is missing
    /// or uses a type that this parser does not know.
    pub fn workgroup_bytes(&self, entry: &str) -> Option<usize> {
        let functions = self.reachable(entry);
        let names = self.names(&functions);
        let used = self.items.iter().filter_map(|i| match &i.kind {
            Kind::Workgroup { name, ty } if names.contains(name) => Some(ty.clone()),
            _ => None,
        });
        let bytes = used.map(|ty| self.type_of(ty).1.map(|n| n.next_multiple_of(16)));
        (!functions.is_empty()).then(|| bytes.sum()).flatten()
    }
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = vec![];
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = match c {
            _ if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            _ if rest.starts_with("/*") => comment_len(rest),
            _ if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            _ => c.len_utf8(),
        };
        if !c.is_whitespace() && !rest.starts_with("//") && !rest.starts_with("/*") {
            tokens.push(Token { text: &rest[..len], at });
        }
        at += len;
    }
    tokens
}

/// Bytes of the comment at the start of the text. Block comments nest.
fn comment_len(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let step = match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                2
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// Size of a type in an array, in bytes: scalars, vectors, and arrays of known length.
fn size_of(ty: &[&str]) -> Option<usize> {
    match ty {
        ["f32" | "u32" | "i32"] => Some(4),
        ["f16"] => Some(2),
        ["atomic", "<", inner @ .., ">"] => size_of(inner),
        ["vec2", "<", inner @ .., ">"] => Some(2 * size_of(inner)?),
        ["vec3" | "vec4", "<", inner @ .., ">"] => Some(4 * size_of(inner)?),
        [short] => {
            let scalar = short.strip_prefix("vec").and_then(|s| s.chars().nth(1))?;
            let lanes = if short.starts_with("vec2") { 2 } else { 4 };
            let bytes = if scalar == 'h' { 2 } else { 4 };
            (short.len() == 5 && "fuih".contains(scalar) && "234".contains(&short[3..4])).then_some(lanes * bytes)
        }
        ["array", "<", inner @ .., ">"] => {
            let mut depth = 0;
            let comma = inner.iter().position(|w| {
                match *w {
                    "<" | "(" => depth += 1,
                    ">" | ")" => depth -= 1,
                    _ => {}
                }
                depth == 0 && *w == ","
            })?;
            let count = usize::try_from(evaluate(&inner[comma + 1..])?).ok()?;
            size_of(&inner[..comma])?.checked_mul(count)
        }
        _ => None,
    }
}

/// The value of a constant integer expression.
fn evaluate(words: &[&str]) -> Option<i64> {
    let mut rest = words;
    let value = operation(&mut rest, 0)?;
    rest.is_empty().then_some(value)
}

/// Operators by precedence, the lowest first.
const LEVELS: [&[&str]; 5] = [&["|"], &["&"], &["<", ">"], &["+", "-"], &["*", "/", "%"]];

fn operation(rest: &mut &[&str], level: usize) -> Option<i64> {
    let Some(operators) = LEVELS.get(level) else { return operand(rest) };
    let mut a = operation(rest, level + 1)?;
    while let [op, more @ ..] = *rest
        && operators.contains(op)
    {
        *rest = more;
        if level == 2 {
            // The second character of a shift operator.
            *rest = rest.strip_prefix(&[*op])?;
        }
        let b = operation(rest, level + 1)?;
        a = match *op {
            "|" => a | b,
            "&" => a & b,
            "<" => a.checked_shl(u32::try_from(b).ok()?)?,
            ">" => a.checked_shr(u32::try_from(b).ok()?)?,
            "+" => a.checked_add(b)?,
            "-" => a.checked_sub(b)?,
            "*" => a.checked_mul(b)?,
            "/" => a.checked_div(b)?,
            _ => a.checked_rem(b)?,
        };
    }
    Some(a)
}

fn operand(rest: &mut &[&str]) -> Option<i64> {
    let (word, more) = rest.split_first()?;
    *rest = more;
    let call = *word != "(" && rest.first() == Some(&"(");
    if *word != "(" && !call {
        return number(word);
    }
    *rest = &rest[usize::from(call)..];
    let mut arguments = vec![];
    while rest.first() != Some(&")") {
        arguments.push(operation(rest, 0)?);
        *rest = rest.strip_prefix(&[","]).unwrap_or(rest);
    }
    *rest = &rest[1..];
    match (*word, &arguments[..]) {
        ("(" | "u32" | "i32", [a]) => Some(*a),
        ("max", [a, b]) => Some(*a.max(b)),
        ("min", [a, b]) => Some(*a.min(b)),
        _ => None,
    }
}

fn number(word: &str) -> Option<i64> {
    let digits = word.trim_end_matches(['u', 'i']);
    match digits.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16).ok(),
        None => digits.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
        const GROUP: u32 = 8u * 4u; // a comment; with { brackets
        alias E = vec4<f32>;
        /* another /* nested */ } */
        struct P { x: u32, y: array<u32, 2> }
        @group(0) @binding(1) var<storage, read> x: array<E>;
        @group(0) @binding(1) var<storage, read_write> x_b: array<f32>;
        var<workgroup> shared_: array<E, max(GROUP, (3u + 1u) * 4u) | 1u>;
        var<workgroup> flag: u32;
        fn helper(i: u32) -> E { return x[i]; }
        fn other(x_b: u32) -> u32 { return x_b + flag; }
        @compute @workgroup_size(GROUP) fn main(@builtin(local_invocation_index) i: u32) { shared_[i] = helper(i); }
        @compute @workgroup_size(1) fn second() { x_b[0] = f32(other(1u)); }
    ";

    #[test]
    fn an_entry_point_uses_what_its_functions_use() {
        let m = Module::parse(TEXT);
        let [main, second] = ["main", "second"].map(|e| m.reachable(e));
        assert_eq!((main.len(), second.len()), (2, 2));
        let used = |functions: &[usize]| ["x", "x_b", "shared_", "flag"].map(|name| m.names(functions).contains(name));
        assert_eq!(used(&main), [true, false, true, false]);
        assert_eq!(used(&second), [false, true, false, true]);
        assert!(m.reachable("third").is_empty());
    }

    #[test]
    fn workgroup_memory_is_that_of_the_entry_point() {
        let m = Module::parse(TEXT);
        assert_eq!(m.workgroup_bytes("main"), Some(16 * 33));
        assert_eq!(m.workgroup_bytes("second"), Some(16));
        assert_eq!(m.workgroup_bytes("third"), None);
    }

    #[test]
    fn constants_are_evaluated_and_odd_ones_are_none() {
        let value = |text: &str| evaluate(&tokens(text).iter().map(|t| t.text).collect::<Vec<_>>());
        assert_eq!(value("2u + 3u * (4u - 1u) % 5u"), Some(6));
        assert_eq!(value("max(0x10u, 7u) | 1u << 2u"), Some(20));
        assert_eq!(value("u32(min(9, 4,))"), Some(4));
        for odd in ["", "1 +", "f(1)", "1 / 0", "(1", "1 2", "-1", "x"] {
            assert_eq!(value(odd), None, "{odd}");
        }
    }

    #[test]
    fn sizes() {
        let size = |ty: &str| size_of(&tokens(ty).iter().map(|t| t.text).collect::<Vec<_>>());
        assert_eq!(size("array<vec3<f32>, 4>"), Some(64));
        assert_eq!(size("array<array<vec2u, 2>, 3u>"), Some(48));
        assert_eq!((size("vec4h"), size("atomic<u32>"), size("f16")), (Some(8), Some(4), Some(2)));
        assert_eq!((size("array<f32>"), size("Params"), size("vec5f"), size("bool")), (None, None, None, None));
    }
}
