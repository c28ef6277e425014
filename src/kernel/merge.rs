//! Rewrites kernels whose storage bindings must share buffers, for devices that bind only a few.
//!
//! It works on the WGSL of any op: `x[i]` becomes `merged_1[merged_at[0].x + u32(i)]`. A kernel that does anything else
//! with such a global is an error. The planner decides which bindings are merged.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::ops::Range;

use super::wgsl::{Kind, Module};

/// A result, or the part of the text that stands in the way.
pub(crate) type Checked<T> = std::result::Result<T, String>;

/// A storage global that an entry point uses.
pub(crate) struct Declared<'a> {
    pub name: &'a str,
    pub item: usize,
    /// Index of the token that is its binding number.
    pub number: usize,
    pub writes: bool,
    /// The type of its elements, if it is an array.
    pub element: Option<Range<usize>>,
}

/// The globals at bindings 1 to `count` that an entry point uses.
pub(crate) fn declared<'a>(module: &Module<'a>, entry: &str, count: usize) -> Checked<Vec<Declared<'a>>> {
    let functions = module.reachable(entry);
    if functions.is_empty() {
        return Err(format!("its WGSL has no function `{entry}`"));
    }
    let names = module.names(&functions);
    let mut found: Vec<Option<Declared<'a>>> = (0..count).map(|_| None).collect();
    for (item, i) in module.items.iter().enumerate() {
        let Kind::Storage { name, binding, writes, ref ty } = i.kind else { continue };
        if !names.contains(name) {
            continue;
        }
        let (open, close) = (ty.start + 1, ty.end.saturating_sub(1));
        let array = [ty.start, open, close].map(|i| module.word(i)) == ["array", "<", ">"];
        let element = (array && open + 1 < close).then_some(open + 1..close);
        let number = module.word(binding).trim_end_matches(['u', 'i']).parse::<usize>().unwrap_or(0);
        let declared = Declared { name, item, number: binding, writes, element };
        match found.get_mut(number.wrapping_sub(1)) {
            Some(place @ None) => *place = Some(declared),
            _ => return Err(format!("cannot merge bindings: `{name}` is none of 1 to {count}, or not the only one")),
        }
    }
    let missing =
        |i: usize| format!("cannot merge bindings: `{entry}` uses no array at binding {}, or hides it", i + 1);
    found.into_iter().enumerate().map(|(i, d)| d.ok_or_else(|| missing(i))).collect()
}

/// What an index into a global is rewritten to.
enum Now {
    /// An index into this array. Word `n` of `merged_at` is the first element of the range, word `n + 1` the last index
    /// in it.
    Part(String, usize),
    /// A value of this type.
    Zero(String),
}

struct Rewrite<'a> {
    module: &'a Module<'a>,
    now: HashMap<&'a str, Now>,
    /// Whether indices may stay unclamped, which is reserved for kernels of the table.
    trusted: bool,
}

/// The WGSL with `bound` in place of bindings 1, 2, ..., and without other entry points. The ranges come in a uniform
/// `merged_at` after the last binding: [`Merging::words`].
pub(crate) fn rewrite(text: &str, entry: &str, bound: &[Bound], trusted: bool) -> Checked<String> {
    let module = Module::parse(text);
    if let Some(clash) = module.tokens.iter().find(|t| t.text.starts_with("merged_")) {
        return Err(format!("cannot merge bindings: the name `{}` is taken", clash.text));
    }
    let declared = declared(&module, entry, bound.len())?;
    let functions = module.reachable(entry);
    let mut rewrite = Rewrite { module: &module, now: HashMap::new(), trusted };
    let mut arrays: BTreeMap<u32, (String, bool)> = BTreeMap::new();
    let mut parts = 0;
    for (d, bound) in declared.iter().zip(bound) {
        if matches!(bound, Bound::Alone(_)) {
            continue;
        }
        let element = d.element.clone().ok_or_else(|| format!("cannot merge bindings: `{}` is no array", d.name))?;
        let ty = text[module.tokens[element.start].at..module.tokens[element.end - 1].end()].to_string();
        match bound {
            Bound::Alone(_) => {}
            Bound::Zero => drop(rewrite.now.insert(d.name, Now::Zero(ty))),
            Bound::Part(n) => {
                rewrite.now.insert(d.name, Now::Part(format!("merged_{n}"), 2 * parts));
                arrays.entry(*n).or_insert((ty, false)).1 |= d.writes;
                parts += 1;
            }
        }
    }
    let mut out = String::new();
    for (i, item) in module.items.iter().enumerate() {
        let all = item.tokens.clone();
        match item.kind {
            Kind::Function(_) if functions.contains(&i) => rewrite.function(i, &mut out)?,
            Kind::Function(_) => continue,
            Kind::Storage { .. } => {
                let Some((d, bound)) = declared.iter().zip(bound).find(|(d, _)| d.item == i) else { continue };
                let Bound::Alone(n) = bound else { continue };
                out.push_str(&text[module.tokens[all.start].at..module.tokens[d.number].at]);
                let _ = write!(out, "{n}");
                out.push_str(&text[module.tokens[d.number].end()..module.tokens[all.end - 1].end()]);
            }
            _ => out.push_str(&text[module.tokens[all.start].at..module.tokens[all.end - 1].end()]),
        }
        out.push('\n');
    }
    for (n, (ty, writes)) in arrays {
        let access = if writes { "read_write" } else { "read" };
        let _ = writeln!(out, "@group(0) @binding({n}) var<storage, {access}> merged_{n}: array<{ty}>;");
    }
    if parts > 0 {
        let (n, quads) = (count(bound) + 1, usize::div_ceil(parts, 2));
        let _ = writeln!(out, "@group(0) @binding({n}) var<uniform> merged_at: array<vec4<u32>, {quads}>;");
    }
    Ok(out)
}

/// Number of bindings that are left.
pub(crate) fn count(bound: &[Bound]) -> usize {
    bound.iter().map(|b| b.number()).max().unwrap_or(0) as usize
}

impl Rewrite<'_> {
    fn function(&self, item: usize, out: &mut String) -> Checked<()> {
        let (m, item) = (self.module, &self.module.items[item]);
        let mut hidden = vec![];
        for &name in self.now.keys().filter(|name| m.declares(item, name)) {
            let indexed = |i: usize| m.word(i + 1) == "[";
            if m.mentions(item, name).any(indexed) {
                return Err(format!("cannot merge bindings: a function hides `{name}` and has an index into it"));
            }
            hidden.push(name);
        }
        self.tokens(item.tokens.clone(), &hidden, out)
    }

    fn tokens(&self, tokens: Range<usize>, hidden: &[&str], out: &mut String) -> Checked<()> {
        let m = self.module;
        let mut i = tokens.start;
        while i < tokens.end {
            let token = m.tokens[i];
            if i > tokens.start {
                out.push_str(&m.text[m.tokens[i - 1].end()..token.at]);
            }
            let now = self.now.get(token.text).filter(|_| m.is_name(i) && !hidden.contains(&token.text));
            let Some(now) = now else {
                out.push_str(token.text);
                i += 1;
                continue;
            };
            let close = m.closing(i + 1).filter(|_| m.word(i + 1) == "[");
            let close = close
                .ok_or_else(|| format!("cannot merge bindings: `{}` is used without an index after it", token.text))?;
            match now {
                Now::Zero(ty) => {
                    let _ = write!(out, "{ty}()");
                }
                Now::Part(array, word) => {
                    let at = |n: usize| format!("merged_at[{}].{}", n / 4, ["x", "y", "z", "w"][n % 4]);
                    let _ = write!(out, "{array}[{} + ", at(*word));
                    out.push_str(if self.trusted { "u32(" } else { "min(u32(" });
                    self.tokens(i + 2..close, hidden, out)?;
                    let _ = if self.trusted { write!(out, ")]") } else { write!(out, "), {})]", at(word + 1)) };
                }
            }
            i = close + 1;
        }
        Ok(())
    }
}

/// What becomes of a storage binding on a device that binds fewer than the kernel has. The planner decides; ops need
/// not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bound {
    /// It stays a binding of its own, with this number.
    Alone(u32),
    /// It becomes a range of the buffer at this number.
    Part(u32),
    /// It is not bound, and reads of it give zeros.
    Zero,
}

impl Bound {
    /// The number of its binding, or of the binding that it is a range of.
    pub(crate) fn number(self) -> u32 {
        match self {
            Bound::Alone(n) | Bound::Part(n) => n,
            Bound::Zero => 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const TEXT: &str = "\
alias E = vec4<f32>;
struct P { x: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read> x: array<E>; // x[0] of a comment
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read> w: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<E>;
@group(0) @binding(3) var<storage, read_write> z: array<f32>;
fn at(x: u32) -> u32 { return x; }
fn scaled(i: u32) -> E { return x[ids[i] * 2u + ids[i + 1u]] * 2.0; }
@compute @workgroup_size(1) fn main() { let v = vec4<f32>(); y[at(0u)] = scaled(p.x) - v.x * w[0][1]; }
@compute @workgroup_size(1) fn other() { z[0] = x[0].x + f32(ids[1]); }
";

    fn rewritten(text: &str, bound: &[Bound]) -> Checked<String> {
        rewrite(text, "main", bound, true)
    }

    const ALL: [Bound; 4] = [Bound::Part(1), Bound::Part(2), Bound::Part(1), Bound::Part(1)];

    #[test]
    fn indices_are_shifted_whole_and_nested_ones_too() {
        let text = rewritten(TEXT, &ALL).unwrap();
        let has = |part: &str| assert!(text.contains(part), "{part} in {text}");
        has(
            "merged_1[merged_at[0].x + u32(merged_2[merged_at[0].z + u32(i)] * 2u + merged_2[merged_at[0].z + u32(i + 1u)])]",
        );
        has("merged_1[merged_at[1].z + u32(at(0u))] = scaled(p.x) - v.x * merged_1[merged_at[1].x + u32(0)][1];");
        has("@group(0) @binding(1) var<storage, read_write> merged_1: array<E>;");
        has("@group(0) @binding(2) var<storage, read> merged_2: array<u32>;");
        has("@group(0) @binding(3) var<uniform> merged_at: array<vec4<u32>, 2>;");
        has("fn at(x: u32) -> u32 { return x; }");
    }

    #[test]
    fn what_other_entry_points_use_is_gone_and_the_rest_renumbered() {
        let text = rewritten(TEXT, &[Bound::Part(1), Bound::Zero, Bound::Part(1), Bound::Alone(2)]).unwrap();
        assert!(!text.contains("fn other") && !text.contains("> z:") && !text.contains("> ids:"), "{text}");
        assert!(text.contains("@binding(2) var<storage, read_write> y: array<E>;"), "{text}");
        assert!(text.contains("u32(u32() * 2u + u32())") && text.contains("fn main() {"), "{text}");
    }

    #[test]
    fn indices_of_untrusted_kernels_stay_in_their_range() {
        let text = rewrite(TEXT, "main", &ALL, false).unwrap();
        assert!(text.contains("merged_1[merged_at[1].x + min(u32(0), merged_at[1].y)][1]"), "{text}");
    }

    #[test]
    fn what_cannot_be_rewritten_is_an_error_that_says_why() {
        let main = |body: &str| TEXT.replace("let v = vec4<f32>();", &format!("let v = vec4<f32>(); {body}"));
        for (body, part) in [
            ("let n = arrayLength(&x);", "`x` is used without an index"),
            ("let q = &x;", "`x` is used without an index"),
            ("{ var w = array(1.0, 2.0); let e = w[1]; }", "binding 3, or hides it"),
            ("{ var<function> y: array<f32, 2>; }", "binding 4, or hides it"),
            ("let merged_1 = 1u;", "`merged_1` is taken"),
            ("z[0] = 1.0;", "`z` is none of 1 to 4, or not the only one"),
        ] {
            let error = rewritten(&main(body), &ALL).unwrap_err();
            assert!(error.contains(part), "{body}: {error}");
        }
        let hiding = TEXT.replace("at(x: u32) -> u32 { return x; }", "at(x: vec2<u32>) -> u32 { return x[0]; }");
        assert!(rewritten(&hiding, &ALL).unwrap_err().contains("hides `x`"));
        assert!(rewrite(TEXT, "absent", &ALL, true).unwrap_err().contains("no function `absent`"));
        assert!(rewritten(&TEXT.replace("array<u32>", "u32"), &ALL).unwrap_err().contains("`ids` is no array"));
        for odd in ["array", "array<>", "array<f32", "", "array>"] {
            rewritten(&TEXT.replace("array<u32>", odd), &ALL).unwrap_err();
        }
        for n in 0..TEXT.len() {
            let _ = rewritten(&TEXT[..n], &ALL);
            let _ = rewritten(&TEXT[n..], &ALL);
        }
        // Shadowing alone does no harm.
        let text = rewritten(&main("{ let ids = 1u; let n = ids + 1u; }"), &ALL).unwrap();
        assert!(text.contains("let ids = 1u; let n = ids + 1u;"));
    }
}
