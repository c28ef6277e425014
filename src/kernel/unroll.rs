//! Writes out loops that are marked, for GPUs.
//!
//! Where a loop's variable is an index into an array of a function, or into a vector or matrix, each driver's compiler
//! must unroll the loop to keep that in registers. FXC fails if it cannot, and others are silent and slow. naga makes it
//! hard to see for them: it turns every loop into `while (true)` with a flag. So such loops are marked in the WGSL and
//! unrolled here, after knobs are set.

use std::collections::HashMap;
use std::fmt::Write;
use std::ops::Range;

use super::merge::Checked;
use super::wgsl::Module;

/// The comment after the `{` of a loop that is to be written out. A reason may follow after a colon.
const MARK: &str = "// unroll";

/// The most bytes that a text may grow to: a marked loop of many iterations is a mistake.
const MAX_BYTES: usize = 1 << 20;

/// Whether a text may have marked loops.
pub(crate) fn is_marked(text: &str) -> bool {
    text.contains(MARK)
}

/// The text with all marked loops written out. Each iteration is a block in which the loop's variable is a `const`.
pub(crate) fn unroll(text: &str) -> Checked<String> {
    let module = Module::parse(text);
    let mut unroll = Unroll { loops: marked(&module)?, module: &module, out: String::new() };
    unroll.copy(0..text.len(), 0..module.tokens.len())?;
    Ok(unroll.out)
}

/// A marked loop. Numbers are indices of tokens.
struct Loop {
    /// The parentheses after `for`.
    header: Range<usize>,
    /// The braces of the body.
    body: Range<usize>,
    /// Where the comment ends, in bytes.
    after_mark: usize,
}

/// The marked loops, by the index of their token `for`.
fn marked(m: &Module<'_>) -> Checked<HashMap<usize, Loop>> {
    let mut headers = HashMap::new();
    for i in (0..m.tokens.len()).filter(|&i| m.word(i) == "for" && m.word(i + 1) == "(") {
        if let Some(close) = m.closing(i + 1) {
            headers.insert(close + 1, i);
        }
    }
    let mut loops = HashMap::new();
    let ends = m.tokens.iter().map(|t| t.at).skip(1).chain([m.text.len()]);
    for (i, (token, end)) in m.tokens.iter().zip(ends).enumerate() {
        let Some(after_mark) = mark_in(m.text, token.end()..end) else { continue };
        let (Some(&start), Some(close), "{") = (headers.get(&i), m.closing(i), token.text) else {
            let line = m.text[..end].rsplit('\n').find(|line| line.contains(MARK)).unwrap_or_default().trim();
            return Err(format!("`{MARK}` must come right after the `{{` of a `for`: {line}"));
        };
        loops.insert(start, Loop { header: start + 1..i - 1, body: i..close, after_mark });
    }
    Ok(loops)
}

/// Where the mark ends that lies between two tokens.
fn mark_in(text: &str, gap: Range<usize>) -> Option<usize> {
    let mut at = gap.start;
    text[gap].split_inclusive('\n').find_map(|line| {
        at += line.len();
        let rest = line.trim().strip_prefix(MARK)?;
        (rest.is_empty() || rest.starts_with(':')).then(|| at - usize::from(line.ends_with('\n')))
    })
}

struct Unroll<'a> {
    module: &'a Module<'a>,
    loops: HashMap<usize, Loop>,
    out: String,
}

impl Unroll<'_> {
    /// Copies a part of the text, in bytes and in tokens.
    fn copy(&mut self, bytes: Range<usize>, tokens: Range<usize>) -> Checked<()> {
        let m = self.module;
        let (mut at, mut i) = (bytes.start, tokens.start);
        while i < tokens.end {
            let Some(l) = self.loops.get(&i) else {
                i += 1;
                continue;
            };
            let (header, body) = (l.header.clone(), l.body.clone());
            self.out.push_str(&m.text[at..m.tokens[i].at]);
            (at, i) = (m.tokens[body.end].end(), body.end + 1);
            let inside = l.after_mark..m.tokens[body.end].at;
            let source = &m.text[m.tokens[header.start].at..m.tokens[header.end].end()];
            self.write_out(header, body, inside)
                .map_err(|e| format!("cannot unroll `for {source}`, which is marked: {e}"))?;
        }
        self.out.push_str(&m.text[at..bytes.end]);
        Ok(())
    }

    fn write_out(&mut self, header: Range<usize>, body: Range<usize>, inside: Range<usize>) -> Checked<()> {
        let m = self.module;
        let Header { name, suffix, values } = Header::parse(m, header)?;
        if let Some(word) = jump(m, body.clone()) {
            return Err(format!("its body has a `{word}`"));
        }
        for value in values {
            let _ = write!(self.out, "{{ const {name} = {value}{suffix};");
            self.copy(inside.clone(), body.start + 1..body.end)?;
            self.out.push('}');
            if self.out.len() > MAX_BYTES {
                return Err(format!("the text would have more than {MAX_BYTES} bytes"));
            }
        }
        Ok(())
    }
}

/// What a loop counts.
struct Header<'a> {
    name: &'a str,
    suffix: char,
    values: std::iter::StepBy<Range<i64>>,
}

impl<'a> Header<'a> {
    /// `(var i = 0u; i < N; i++)`, or `i += N`.
    fn parse(m: &Module<'a>, tokens: Range<usize>) -> Checked<Self> {
        let is = |at: usize, words: &[&str]| words.iter().enumerate().all(|(n, word)| m.word(at + n) == *word);
        let semicolons: Vec<usize> = tokens.clone().filter(|&i| m.word(i) == ";").collect();
        let (&[first, second], name) = (&semicolons[..], m.word(tokens.start + 2)) else {
            return Err("it is not of the form `(var i = 0u; i < N; i++)`".into());
        };
        let start = m.word(first - 1);
        let suffix = start.chars().last().filter(|c| "ui".contains(*c));
        let (Some(suffix), true) = (suffix, is(tokens.start + 1, &["var", name, "=", start, ";"])) else {
            return Err("it does not start with `var`, a name and a number such as `0u`".into());
        };
        if !is(first + 1, &[name, "<"]) {
            return Err(format!("its condition is not `{name} < N`"));
        }
        let step = match [is(second + 1, &[name, "+", "+", ")"]), is(second + 1, &[name, "+", "="])] {
            [true, _] => Some(1),
            [_, true] => constant(m, second + 4..tokens.end),
            _ => return Err(format!("it goes on with neither `{name}++` nor `{name} += N`")),
        };
        let known = (constant(m, first - 1..first), constant(m, first + 3..second), step);
        let (Some(start), Some(end), Some(step @ 1..)) = known else {
            return Err("its bounds are not known from literals and the module's constants".into());
        };
        let step = usize::try_from(step).map_err(|_| "its step is too large")?;
        Ok(Header { name, suffix, values: (start..end).step_by(step) })
    }
}

/// The value of an expression, unless it has a name that its function declares.
fn constant(m: &Module<'_>, tokens: Range<usize>) -> Option<i64> {
    let function = m.items.iter().find(|item| item.tokens.contains(&tokens.start))?;
    let local = tokens.clone().any(|i| m.is_name(i) && m.declares(function, m.word(i)));
    if local { None } else { m.value(tokens) }
}

/// A `break` or `continue` of the loop whose braces these are.
fn jump<'a>(m: &Module<'a>, body: Range<usize>) -> Option<&'a str> {
    let mut i = body.start + 1;
    while i < body.end {
        match m.word(i) {
            word @ ("break" | "continue") => return Some(word),
            // What is inside of another loop is that loop's.
            "for" | "while" | "loop" => {
                let open = (i..body.end).find(|&i| m.word(i) == "{")?;
                i = m.closing(open)?;
            }
            _ => {}
        }
        i += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function with this statement.
    fn text(statement: &str) -> String {
        format!("const N: u32 = 2u; // two\nconst M: u32 = N + 1u;\nfn f(n: u32) {{ let K = n; {statement} }}\n")
    }

    fn written(statement: &str) -> Checked<String> {
        let (before, after) = (text("|"), unroll(&text(statement))?);
        let (start, end) = before.split_once('|').unwrap();
        Ok(after.strip_prefix(start).unwrap().strip_suffix(end).unwrap().to_string())
    }

    #[test]
    fn iterations_are_blocks_with_a_constant() {
        let unmarked = "for (var i = 0u; i < N; i++) { x[i] = 1.0; } // unrolled\n";
        assert_eq!(written(unmarked).unwrap(), unmarked);
        let marked = "for (var i = 0u; i < N; i++) { // unroll\nx[i] = 1.0; // set\n}";
        assert_eq!(
            written(marked).unwrap(),
            "{ const i = 0u;\nx[i] = 1.0; // set\n}{ const i = 1u;\nx[i] = 1.0; // set\n}"
        );
        let steps = "for (var i = 1i; i < 4 * (M - 1u) + 0x1; i += M) {\n// unroll: for FXC\nf(i); }";
        assert_eq!(written(steps).unwrap(), "{ const i = 1i;\nf(i); }{ const i = 4i;\nf(i); }{ const i = 7i;\nf(i); }");
        assert_eq!(written("for (var i = 2u; i < N; i++) { // unroll\n}").unwrap(), "");
    }

    #[test]
    fn loops_nest() {
        let inner = "for (var j = 0u; j < K; j++) { break; }";
        let nested = format!(
            "for (var i = 0u; i < 2u; i++) {{ // unroll\n{inner} for (var k = 0u; k < 2u; k++) {{ // unroll\nf(k); }} }}"
        );
        let body = format!("\n{inner} {{ const k = 0u;\nf(k); }}{{ const k = 1u;\nf(k); }} }}");
        assert_eq!(written(&nested).unwrap(), format!("{{ const i = 0u;{body}{{ const i = 1u;{body}"));
    }

    #[test]
    fn what_cannot_be_unrolled_is_an_error_that_says_why() {
        let marked = |header: &str, body: &str| format!("for ({header}) {{ // unroll\n{body} }}");
        for (statement, part) in [
            (marked("var i = 0u; i < K; i++", ""), "its bounds are not known"),
            (marked("var i = 0u; i < absent; i++", ""), "its bounds are not known"),
            (marked("var i = 0u; i < N; i += 0u", ""), "its bounds are not known"),
            (marked("var i = 0; i < 2; i++", ""), "a number such as `0u`"),
            (marked("var i = N; i < 4u; i++", ""), "a number such as `0u`"),
            (marked("; i < 2u; i++", ""), "a number such as `0u`"),
            (marked("var i = 0u; i <= N; i++", ""), "its bounds are not known"),
            (marked("var i = 0u; 2u > i; i++", ""), "its condition is not `i < N`"),
            (marked("var i = 1u; i < N; i *= 2u", ""), "neither `i++` nor `i += N`"),
            (marked("", ""), "not of the form"),
            (marked("var i = 0u; i < N; i++", "if (K > i) { break; }"), "has a `break`"),
            (marked("var i = 0u; i < N; i++", "continue;"), "has a `continue`"),
            (marked("var i = 0u; i < 100000u; i++", "f(i); f(i);"), "more than 1048576 bytes"),
            ("// unroll\nfor (var i = 0u; i < N; i++) { }".into(), "must come right after the `{` of a `for`: fn f"),
            ("if (K > 1u) { // unroll: no loop\n}".into(), "must come right after"),
        ] {
            let error = written(&statement).unwrap_err();
            assert!(error.contains(part), "{statement}: {error}");
        }
        let odd = text(&marked("var i = 0u; i < N; i++", "x[i] = 1.0;"));
        for n in 0..odd.len() {
            let _ = unroll(&odd[..n]);
            let _ = unroll(&odd[n..]);
        }
    }
}
