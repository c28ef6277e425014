//! Rewrites kernels whose tensors are stored in f16: they go on computing in f32.
//!
//! A kernel is written once, for f32. Where the planner binds a tensor of [`DType::F16`](crate::DType::F16), each load
//! becomes a conversion to f32, and each store one to f16: `x[i]` turns into `vec4<f32>(x[i])`, and `y[i] = v;` into
//! `y[i] = vec4<f16>(v);`. On a device without 16-bit floats, two elements share a word; stores of single elements then
//! exchange half of a word, since another invocation may have the other half.

use std::collections::HashMap;
use std::fmt::Write;
use std::ops::Range;

use super::merge::Checked;
use super::wgsl::{Kind, Module};

/// Which storage bindings of a kernel are f16 tensors, and how a device has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Halves {
    /// Numbers of the bindings, in order.
    pub bindings: Vec<u32>,
    /// Whether they are words of two elements, for devices without `SHADER_F16`.
    pub in_words: bool,
}

/// What all helpers start with: no text of a kernel may.
const PREFIX: &str = "f16_";

/// A conversion to f16 may round to the nearest or towards zero, as the driver likes, and then gives either infinity or
/// 65504 for what is larger. Loss scaling looks for infinity.
const OVERFLOW: &str = "\
fn f16_kept(v: f32) -> f32 {
    return select(v, v * 3e38, abs(v) >= 65520.0);
}
fn f16_kept2(v: vec2<f32>) -> vec2<f32> {
    return select(v, v * 3e38, abs(v) >= vec2<f32>(65520.0));
}
fn f16_kept4(v: vec4<f32>) -> vec4<f32> {
    return select(v, v * 3e38, abs(v) >= vec4<f32>(65520.0));
}
";

const WORDS: &str = "\
fn f16_at(word: u32, i: u32) -> f32 {
    return unpack2x16float(word >> (16u * (i & 1u))).x;
}
fn f16_quad(words: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}
fn f16_words(v: vec4<f32>) -> vec2<u32> {
    return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
}
fn f16_rest(i: u32) -> u32 {
    return select(0xffff0000u, 0xffffu, (i & 1u) == 1u);
}
fn f16_bits(v: f32, i: u32) -> u32 {
    return pack2x16float(vec2<f32>(v, 0.0)) << (16u * (i & 1u));
}
";

/// How many numbers an array's elements have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lanes {
    One,
    Two,
    Four,
}

impl Lanes {
    /// Of a type, and whether the kernel has the bits of floats there: what only moves elements has them as u32.
    fn of(ty: &str) -> Option<(Lanes, bool)> {
        match ty {
            "f32" => Some((Lanes::One, false)),
            "vec2<f32>" | "vec2f" => Some((Lanes::Two, false)),
            "vec4<f32>" | "vec4f" => Some((Lanes::Four, false)),
            "u32" => Some((Lanes::One, true)),
            "vec2<u32>" | "vec2u" => Some((Lanes::Two, true)),
            "vec4<u32>" | "vec4u" => Some((Lanes::Four, true)),
            _ => None,
        }
    }

    fn bits(self) -> &'static str {
        match self {
            Lanes::One => "u32",
            Lanes::Two => "vec2<u32>",
            Lanes::Four => "vec4<u32>",
        }
    }

    fn computed(self) -> &'static str {
        match self {
            Lanes::One => "f32",
            Lanes::Two => "vec2<f32>",
            Lanes::Four => "vec4<f32>",
        }
    }

    fn stored(self) -> &'static str {
        match self {
            Lanes::One => "f16",
            Lanes::Two => "vec2<f16>",
            Lanes::Four => "vec4<f16>",
        }
    }

    /// The function that makes infinities of what f16 cannot hold.
    fn kept(self) -> &'static str {
        match self {
            Lanes::One => "f16_kept",
            Lanes::Two => "f16_kept2",
            Lanes::Four => "f16_kept4",
        }
    }
}

/// An array that is rewritten.
#[derive(Clone, Copy)]
struct Half {
    lanes: Lanes,
    /// The kernel has the bits of f32.
    is_bits: bool,
    /// A word has two elements, and single ones are stored.
    shares_words: bool,
}

/// The text with the bindings of `entry` that `halves` names as arrays of f16.
pub(crate) fn rewrite(text: &str, entry: &str, halves: &Halves) -> Checked<String> {
    let module = Module::parse(text);
    if let Some(clash) = module.tokens.iter().find(|t| t.text.starts_with(PREFIX)) {
        return Err(format!("cannot store tensors in f16: the name `{}` is taken", clash.text));
    }
    let functions = module.reachable(entry);
    let names = module.names(&functions);
    let mut arrays: HashMap<&str, Half> = HashMap::new();
    let mut out = String::new();
    if !halves.in_words && !module.enables("f16") {
        out.push_str("enable f16;\n");
    }
    let mut declared = HashMap::new();
    for (i, item) in module.items.iter().enumerate() {
        let Kind::Storage { name, binding, writes, ref ty } = item.kind else { continue };
        let number = module.word(binding).trim_end_matches(['u', 'i']).parse::<u32>().unwrap_or(0);
        if !names.contains(name) || !halves.bindings.contains(&number) {
            continue;
        }
        let whole = module.type_of(ty.clone()).0;
        let element = whole.strip_prefix("array<").and_then(|rest| rest.strip_suffix('>'));
        let (lanes, is_bits) = element.and_then(Lanes::of).ok_or_else(|| {
            let wanted = "an array of f32, vec2 or vec4, or of their bits";
            format!("cannot store `{name}` in f16: its WGSL has it as {whole}, and not as {wanted}")
        })?;
        let half = Half { lanes, is_bits, shares_words: halves.in_words && writes && lanes == Lanes::One };
        arrays.insert(name, half);
        declared.insert(i, (ty.clone(), half));
    }
    let rewrite = Rewrite { module: &module, arrays, in_words: halves.in_words };
    let mut end = 0;
    for (i, item) in module.items.iter().enumerate() {
        let Some(first) = module.tokens.get(item.tokens.start) else { continue };
        out.push_str(&text[end..first.at]);
        match (&item.kind, declared.get(&i)) {
            (Kind::Function(_), _) if functions.contains(&i) => rewrite.function(i, &mut out)?,
            (Kind::Function(_), _) => {} // of other entry points, which may use the arrays otherwise
            (_, Some((ty, half))) => {
                out.push_str(&text[first.at..module.tokens[ty.start].at]);
                let _ = write!(out, "array<{}>", rewrite.element(*half));
                out.push_str(&text[module.tokens[ty.end - 1].end()..module.tokens[item.tokens.end - 1].end()]);
            }
            _ => out.push_str(&text[first.at..module.tokens[item.tokens.end - 1].end()]),
        }
        end = module.tokens[item.tokens.end - 1].end();
    }
    out.push_str(&text[end..]);
    out.push('\n');
    out.push_str(OVERFLOW);
    if halves.in_words {
        out.push_str(WORDS);
    }
    Ok(out)
}

struct Rewrite<'a> {
    module: &'a Module<'a>,
    arrays: HashMap<&'a str, Half>,
    in_words: bool,
}

impl Rewrite<'_> {
    /// The type of an array's elements in the new text.
    fn element(&self, half: Half) -> &'static str {
        match (self.in_words, half.lanes) {
            (false, lanes) => lanes.stored(),
            (true, Lanes::One) if half.shares_words => "atomic<u32>",
            (true, Lanes::One | Lanes::Two) => "u32",
            (true, Lanes::Four) => "vec2<u32>",
        }
    }

    fn function(&self, item: usize, out: &mut String) -> Checked<()> {
        let (m, item) = (self.module, &self.module.items[item]);
        let mut hidden = vec![];
        for &name in self.arrays.keys().filter(|name| m.declares(item, name)) {
            if m.mentions(item, name).any(|i| m.word(i + 1) == "[") {
                return Err(format!("cannot store `{name}` in f16: a function hides it and has an index into it"));
            }
            hidden.push(name);
        }
        self.tokens(item.tokens.clone(), &hidden, out)
    }

    /// Appends tokens, and what is between them, with loads and stores rewritten.
    fn tokens(&self, tokens: Range<usize>, hidden: &[&str], out: &mut String) -> Checked<()> {
        let m = self.module;
        let mut i = tokens.start;
        while i < tokens.end {
            if i > tokens.start {
                out.push_str(&m.text[m.tokens[i - 1].end()..m.tokens[i].at]);
            }
            let word = m.word(i);
            let half = self.arrays.get(word).filter(|_| m.is_name(i) && !hidden.contains(&word));
            let Some(&half) = half else {
                out.push_str(word);
                i += 1;
                continue;
            };
            let why = |what: &str| format!("cannot store `{word}` in f16: {what}");
            let close = m.closing(i + 1).filter(|_| m.word(i + 1) == "[");
            let close = close.ok_or_else(|| why("it is used without an index after it"))?;
            if i > 0
                && m.word(i - 1) == "&"
                && m.word(i.wrapping_sub(2)) != "&"
                && !is_operand(m.word(i.wrapping_sub(2)))
            {
                return Err(why("its WGSL takes the address of an element"));
            }
            let mut index = String::new();
            self.tokens(i + 2..close, hidden, &mut index)?;
            i = match self.stored(i, close, tokens.end) {
                None => {
                    out.push_str(&self.load(word, half, &index));
                    close + 1
                }
                Some(Store::Component) => return Err(why("its WGSL stores to a component of an element")),
                Some(Store::Elsewhere) => return Err(why("its WGSL stores to it in the head of a loop")),
                Some(Store::Element { operator, value, end }) => {
                    let mut v = String::new();
                    self.tokens(value..end, hidden, &mut v)?;
                    if let Some(operator) = operator {
                        v = format!("{} {operator} ({v})", self.load(word, half, &index));
                    }
                    out.push_str(&self.store(word, half, &index, &v));
                    end
                }
            };
        }
        Ok(())
    }

    /// The statement that stores to the element whose index ends at `close`, if one starts at `at`.
    fn stored(&self, at: usize, close: usize, end: usize) -> Option<Store<'_>> {
        let m = self.module;
        let (next, after) = (m.word(close + 1), m.word(close + 2));
        let (operator, value) = match (next, after) {
            // A comparison.
            ("=", "=") => return None,
            ("=", _) => (None, close + 2),
            ("+" | "-" | "*" | "/", "=") => (Some(next), close + 3),
            _ if at == 0 || !matches!(m.word(at - 1), ";" | "{" | "}") => return None,
            _ => return Some(Store::Component),
        };
        if at == 0 || !matches!(m.word(at - 1), ";" | "{" | "}") {
            return Some(Store::Elsewhere);
        }
        let mut depth = 0usize;
        for i in value..end {
            match m.word(i) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" if depth == 0 => break,
                ")" | "]" | "}" => depth -= 1,
                ";" if depth == 0 => return Some(Store::Element { operator, value, end: i }),
                _ => {}
            }
        }
        Some(Store::Elsewhere)
    }

    fn load(&self, array: &str, half: Half, index: &str) -> String {
        let number = match (self.in_words, half.lanes) {
            (false, lanes) => format!("{}({array}[{index}])", lanes.computed()),
            (true, Lanes::One) if half.shares_words => {
                format!("f16_at(atomicLoad(&{array}[u32({index}) >> 1u]), u32({index}))")
            }
            (true, Lanes::One) => format!("f16_at({array}[u32({index}) >> 1u], u32({index}))"),
            (true, Lanes::Two) => format!("unpack2x16float({array}[{index}])"),
            (true, Lanes::Four) => format!("f16_quad({array}[{index}])"),
        };
        if half.is_bits { format!("bitcast<{}>({number})", half.lanes.bits()) } else { number }
    }

    /// The statement, without the semicolon at its end.
    fn store(&self, array: &str, half: Half, index: &str, value: &str) -> String {
        let value = match half.is_bits {
            true => format!("{}(bitcast<{}>({value}))", half.lanes.kept(), half.lanes.computed()),
            false => format!("{}({value})", half.lanes.kept()),
        };
        match (self.in_words, half.lanes) {
            (false, lanes) => format!("{array}[{index}] = {}({value})", lanes.stored()),
            (true, Lanes::One) => {
                // The value may read the element, so it comes before its bits go. A block, as it has a name.
                let word = format!("&{array}[f16_i >> 1u]");
                format!(
                    "{{ let f16_i = u32({index}); let f16_v = f16_bits({value}, f16_i); \
                     atomicAnd({word}, f16_rest(f16_i)); atomicOr({word}, f16_v); }}"
                )
            }
            (true, Lanes::Two) => format!("{array}[{index}] = pack2x16float({value})"),
            (true, Lanes::Four) => format!("{array}[{index}] = f16_words({value})"),
        }
    }
}

/// What a statement stores.
enum Store<'a> {
    /// Something into part of an element: its other lanes would have to be kept.
    Component,
    /// Something, but not in a statement of its own.
    Elsewhere,
    /// The value of these tokens, perhaps after an operation with what is there.
    Element { operator: Option<&'a str>, value: usize, end: usize },
}

/// Whether an `&` after this token is an operation on bits, and not the address of what follows.
fn is_operand(word: &str) -> bool {
    word == ")" || word == "]" || word.starts_with(|c: char| c.is_alphanumeric() || c == '_') && word != "return"
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
alias E = vec4<f32>;
@group(0) @binding(1) var<storage, read> x: array<E>; // x[0] of a comment
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<E>;
@group(0) @binding(4) var<storage, read_write> z: array<f32>;
fn scaled(i: u32) -> E { return x[ids[i] * 2u] * 2.0; }
@compute @workgroup_size(1) fn main() {
    y[0] = scaled(1u) - x[1];
    y[1] += y[2];
    z[ids[0]] = z[3] + y[1].x;
}
";

    fn rewritten(text: &str, bindings: &[u32], in_words: bool) -> Checked<String> {
        rewrite(text, "main", &Halves { bindings: bindings.to_vec(), in_words })
    }

    #[test]
    fn loads_and_stores_convert() {
        let text = rewritten(TEXT, &[1, 3, 4], false).unwrap();
        for part in [
            "enable f16;\n",
            "x: array<vec4<f16>>; // x[0] of a comment",
            "ids: array<u32>;",
            "z: array<f16>;",
            "return vec4<f32>(x[ids[i] * 2u]) * 2.0;",
            "y[0] = vec4<f16>(f16_kept4(scaled(1u) - vec4<f32>(x[1])));",
            "y[1] = vec4<f16>(f16_kept4(vec4<f32>(y[1]) + (vec4<f32>(y[2]))));",
            "z[ids[0]] = f16(f16_kept(f32(z[3]) + vec4<f32>(y[1]).x));",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn words_hold_two_where_there_is_no_f16() {
        let text = rewritten(TEXT, &[1, 3, 4], true).unwrap();
        for part in [
            "x: array<vec2<u32>>;",
            "z: array<atomic<u32>>;",
            "return f16_quad(x[ids[i] * 2u]) * 2.0;",
            "y[0] = f16_words(f16_kept4(scaled(1u) - f16_quad(x[1])));",
            "let f16_v = f16_bits(f16_kept(f16_at(atomicLoad(&z[u32(3) >> 1u]), u32(3)) + f16_quad(y[1]).x), f16_i);",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("enable f16"));
    }

    #[test]
    fn what_moves_bits_gets_those_of_f32() {
        let moves = TEXT.replace("array<f32>", "array<u32>").replace("z[3] + y[1].x", "z[3]");
        let text = rewritten(&moves, &[4], false).unwrap();
        let store = "z[ids[0]] = f16(f16_kept(bitcast<f32>(bitcast<u32>(f32(z[3])))));";
        assert!(text.contains(store), "{text}");
    }

    #[test]
    fn what_is_f32_stays_as_it_is() {
        let text = rewritten(TEXT, &[4], false).unwrap();
        assert!(text.contains("x: array<E>;") && text.contains("y[1] += y[2];"), "{text}");
    }

    #[test]
    fn what_cannot_be_rewritten_is_an_error_that_says_why() {
        let main = |body: &str| TEXT.replace("y[1] += y[2];", body);
        for (body, part) in [
            ("let n = arrayLength(&x);", "`x` in f16: it is used without an index"),
            ("let p = &y[0];", "`y` in f16: its WGSL takes the address"),
            ("y[0].x = 1.0;", "`y` in f16: its WGSL stores to a component"),
            ("y[0][2] = 1.0;", "`y` in f16: its WGSL stores to a component"),
            ("for (var i = 0u; i < 2u; y[i] += E(1.0)) { i++; }", "`y` in f16: its WGSL stores to it in the head"),
            (
                "for (y[0] = E(1.0); y[0].x == y[1].x;) { y[1] = y[0]; }",
                "`y` in f16: its WGSL stores to it in the head",
            ),
            ("let f16_n = 1u;", "`f16_n` is taken"),
        ] {
            let error = rewritten(&main(body), &[1, 3, 4], false).unwrap_err();
            assert!(error.contains(part), "{body}: {error}");
        }
        let error = rewritten(&TEXT.replace("array<u32>", "array<vec3<u32>>"), &[2], false).unwrap_err();
        assert!(error.contains("`ids` in f16: its WGSL has it as array<vec3<u32>>"), "{error}");
        for n in 0..TEXT.len() {
            let _ = rewritten(&TEXT[..n], &[1, 3, 4], true);
            let _ = rewritten(&TEXT[n..], &[1, 3, 4], false);
        }
    }
}
