//! Kernels with more storage bindings than a device has: several bindings of one type become ranges of one.
//!
//! [`choose`] says which, so that the fewest bytes are copied into the shared buffer and out of it; [`rewrite`] makes
//! the kernel that reads and writes there. It rewrites text, for any op's kernel: `x[i]` becomes
//! `merged_1[merged_at[0].x + u32(i)]`, and what else a kernel does with such a global is an error.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::ops::Range;

use crate::error::Result;
use crate::kernel::{Bound, Kernel};
use crate::wgsl::{Kind, Module};

/// Ranges start at multiples of so many bytes, which the elements' size must divide.
const ALIGN: usize = 256;

/// A storage binding as the planner has resolved it.
#[derive(Clone, Copy)]
pub(crate) struct Binding {
    pub bytes: usize,
    /// Bytes to copy if it is merged: in, out or both.
    pub cost: usize,
}

/// How a dispatch's bindings are merged.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Merging {
    /// By old number, from 1.
    pub bound: Vec<Bound>,
    pub groups: Vec<Group>,
    /// The uniform behind the storage bindings: of each range its first element and its last index.
    pub words: Vec<u32>,
}

impl Merging {
    /// How many bindings are left.
    pub fn count(&self) -> usize {
        count(&self.bound)
    }
}

/// Bindings that become one.
#[derive(Debug, PartialEq)]
pub(crate) struct Group {
    pub number: u32,
    pub bytes: usize,
    /// Old index, from 0, and offset in bytes.
    pub parts: Vec<(usize, usize)>,
}

/// Or what of a text is in the way.
type Checked<T> = std::result::Result<T, String>;

/// A storage global that an entry point uses.
struct Declared<'a> {
    name: &'a str,
    item: usize,
    /// The token of its number.
    number: usize,
    writes: bool,
    /// The type of its elements, if it is an array.
    element: Option<Range<usize>>,
}

/// How many of the cheapest bindings of a type become one, of those only read and of those written, and whether
/// both become the same.
#[derive(Clone, Copy)]
struct Way {
    read: usize,
    written: usize,
    together: bool,
}

impl Way {
    const NONE: Way = Way { read: 0, written: 0, together: false };

    /// Bindings fewer.
    fn saves(self) -> usize {
        let groups = usize::from(self.read > 0) + usize::from(self.written > 0) - usize::from(self.together);
        self.read + self.written - groups
    }
}

/// The bindings of one type, the cheapest first.
#[derive(Default)]
struct Class {
    read: Vec<usize>,
    written: Vec<usize>,
    element_bytes: usize,
}

impl Class {
    /// Indices of the bindings of each group.
    fn groups(&self, way: Way) -> Vec<Vec<usize>> {
        let (read, written) = (self.read[..way.read].to_vec(), self.written[..way.written].to_vec());
        let groups = if way.together { vec![[read, written].concat()] } else { vec![read, written] };
        groups.into_iter().filter(|g| !g.is_empty()).collect()
    }

    /// All ways whose groups hold at least two bindings and at most `max_bytes`.
    fn ways(&self, binds: &[Option<Binding>], max_bytes: u64) -> Vec<Way> {
        let numbers = (0..=self.read.len()).flat_map(|read| (0..=self.written.len()).map(move |w| (read, w)));
        let ways = numbers.flat_map(|(read, written)| [false, true].map(|together| Way { read, written, together }));
        let fits = |group: &Vec<usize>| group.len() > 1 && places(group, binds).1 as u64 <= max_bytes;
        let sound = |way: &Way| !way.together || (way.read > 0 && way.written > 0);
        ways.filter(|way| sound(way) && self.groups(*way).iter().all(fits)).collect()
    }
}

/// Offsets of the bindings of a group, and the bytes of all.
fn places(group: &[usize], binds: &[Option<Binding>]) -> (Vec<(usize, usize)>, usize) {
    let mut end = 0usize;
    let place = |&i: &usize| {
        let at = end.next_multiple_of(ALIGN);
        end = at + binds[i].map_or(0, |b| b.bytes);
        (i, at)
    };
    (group.iter().map(place).collect(), end)
}

/// Merges bindings until at most `max` are left; `None` if that cannot be. `binds` are bindings 1, 2, ...; those that
/// the dispatch does not have cost nothing.
pub(crate) fn choose(
    kernel: &Kernel,
    binds: &[Option<Binding>],
    max: usize,
    max_bytes: u64,
) -> Result<Option<Merging>> {
    let text = kernel.with_knobs()?;
    let module = Module::parse(&text);
    let declared = declared(&module, kernel.entry, binds.len()).map_err(|message| kernel.error(message))?;
    let zero = |i: &usize| binds[*i].is_none() && !declared[*i].writes && declared[*i].element.is_some();
    let mut classes: BTreeMap<String, Class> = BTreeMap::new();
    for i in (0..binds.len()).filter(|i| binds[*i].is_some()) {
        if let Some((ty, Some(element_bytes))) = declared[i].element.clone().map(|ty| module.type_of(ty))
            && ALIGN.is_multiple_of(element_bytes)
        {
            let class = classes.entry(ty).or_default();
            class.element_bytes = element_bytes;
            if declared[i].writes { &mut class.written } else { &mut class.read }.push(i);
        }
    }
    let classes: Vec<Class> = classes.into_values().map(|class| sorted(class, binds)).collect();
    let left = binds.len() - (0..binds.len()).filter(zero).count();
    // What is only read in control flow around a barrier must stay so: see "uniformity" in the standard of WGSL.
    let names = module.names(&module.reachable(kernel.entry));
    let careful = names.iter().any(|name| name.ends_with("Barrier") || name.starts_with("subgroup"));
    let Some(ways) = cheapest(&classes, binds, left.saturating_sub(max), max_bytes, careful) else { return Ok(None) };

    let mut group_of: HashMap<usize, usize> = HashMap::new();
    let mut groups = vec![];
    let mut size_of_element = vec![];
    for (class, way) in classes.iter().zip(ways) {
        for group in class.groups(way) {
            let (parts, bytes) = places(&group, binds);
            group_of.extend(group.iter().map(|i| (*i, groups.len())));
            groups.push(Group { number: 0, bytes, parts });
            size_of_element.push(class.element_bytes);
        }
    }
    let mut merging = Merging { groups, ..Merging::default() };
    let mut last = 0;
    for (i, bind) in binds.iter().enumerate() {
        let next = |last: &mut u32| {
            *last += 1;
            *last
        };
        merging.bound.push(match group_of.get(&i) {
            None if zero(&i) => Bound::Zero,
            None => Bound::Alone(next(&mut last)),
            Some(&g) => {
                let group = &mut merging.groups[g];
                if group.number == 0 {
                    group.number = next(&mut last);
                }
                let at = group.parts.iter().find(|(part, _)| *part == i).map_or(0, |(_, at)| *at);
                let elements = bind.map_or(0, |b| b.bytes.next_multiple_of(16)) / size_of_element[g];
                merging.words.extend([(at / size_of_element[g]) as u32, elements.max(1) as u32 - 1]);
                Bound::Part(group.number)
            }
        });
    }
    Ok(Some(merging))
}

fn sorted(mut class: Class, binds: &[Option<Binding>]) -> Class {
    let cost = |i: &usize| binds[*i].map_or(0, |b| b.cost);
    class.read.sort_by_key(cost);
    class.written.sort_by_key(cost);
    class
}

/// For each class the way that, with the others, saves `need` bindings at the least cost; with `careful`, first of all
/// with the fewest groups of read and written bindings.
fn cheapest(
    classes: &[Class],
    binds: &[Option<Binding>],
    need: usize,
    max_bytes: u64,
    careful: bool,
) -> Option<Vec<Way>> {
    type Rank = (usize, usize, usize);
    // By bindings saved: the best of what the classes so far can do.
    let mut best: Vec<Option<(Rank, Vec<Way>)>> = vec![None; need + 1];
    best[0] = Some(((0, 0, 0), vec![]));
    for class in classes {
        let mut next: Vec<Option<(Rank, Vec<Way>)>> = vec![None; need + 1];
        let ways = [vec![Way::NONE], class.ways(binds, max_bytes)].concat();
        for (saved, (rank, chosen)) in best.iter().enumerate().filter_map(|(n, b)| Some((n, b.as_ref()?))) {
            for &way in &ways {
                let members = class.groups(way).into_iter().flatten();
                let cost: usize = members.map(|i| binds[i].map_or(0, |b| b.cost)).sum();
                let together = usize::from(way.together);
                let rank = (rank.0 + if careful { together } else { 0 }, rank.1 + cost, rank.2 + together);
                let to = &mut next[need.min(saved + way.saves())];
                if to.as_ref().is_none_or(|(other, _)| rank < *other) {
                    *to = Some((rank, [&chosen[..], &[way]].concat()));
                }
            }
        }
        best = next;
    }
    best.pop().flatten().map(|(_, ways)| ways)
}

/// The globals at bindings 1 to `count` that an entry point uses.
fn declared<'a>(module: &Module<'a>, entry: &str, count: usize) -> Checked<Vec<Declared<'a>>> {
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

/// What an index into a global becomes.
enum Now {
    /// Of this array, from the element that this word of `merged_at` says; the word behind it is its last index.
    Part(String, usize),
    /// A value of this type.
    Zero(String),
}

struct Rewrite<'a> {
    module: &'a Module<'a>,
    now: HashMap<&'a str, Now>,
    /// Whether indices need no clamping: as elsewhere, that is left to kernels of the table.
    trusted: bool,
}

/// The WGSL with `bound` in place of bindings 1, 2, ..., and with no other entry point. Ranges are found by a uniform
/// `merged_at` behind the last binding: [`Merging::words`].
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

/// How many bindings are left.
fn count(bound: &[Bound]) -> usize {
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
            let close = close.ok_or_else(|| {
                format!("cannot merge bindings: `{}` is used other than with an index behind it", token.text)
            })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
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
            ("let n = arrayLength(&x);", "`x` is used other than"),
            ("let q = &x;", "`x` is used other than"),
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
        // Hiding alone does no harm.
        let text = rewritten(&main("{ let ids = 1u; let n = ids + 1u; }"), &ALL).unwrap();
        assert!(text.contains("let ids = 1u; let n = ids + 1u;"));
    }

    fn chosen(binds: &[Option<(usize, usize)>], max: usize, max_bytes: u64) -> Option<Merging> {
        let binds: Vec<_> = binds.iter().map(|b| b.map(|(bytes, cost)| Binding { bytes, cost })).collect();
        choose(&Kernel::new("t", TEXT, "main"), &binds, max, max_bytes).unwrap()
    }

    #[test]
    fn the_cheapest_are_merged_and_types_are_kept_apart() {
        let binds = [Some((1024, 1024)), Some((64, 64)), Some((400, 400)), Some((1024, 2048))];
        let m = chosen(&binds, 3, 1 << 20).unwrap();
        assert_eq!(m.bound, [Bound::Part(1), Bound::Alone(2), Bound::Part(1), Bound::Alone(3)]);
        // The cheaper one comes first in the buffer.
        assert_eq!(m.groups, [Group { number: 1, bytes: 512 + 1024, parts: vec![(2, 0), (0, 512)] }]);
        assert_eq!(m.words, [512 / 16, 63, 0, 24]);
        let m = chosen(&binds, 2, 1 << 20).unwrap();
        assert_eq!(m.bound, [Bound::Part(1), Bound::Alone(2), Bound::Part(1), Bound::Part(1)]);
        assert_eq!(chosen(&binds, 1, 1 << 20), None);
        assert_eq!(chosen(&binds, 3, 1024), None);
        // Ranges of elements whose size does not divide their starts are no ranges; what is no array stays alone.
        for odd in ["array<array<vec4<f32>, 3>>", "array<P>", "P"] {
            let text: &'static str = TEXT.replace("array<vec4<f32>>", odd).replace("array<E>", odd).leak();
            let binds = binds.map(|b| b.map(|(bytes, cost)| Binding { bytes, cost }));
            assert_eq!(choose(&Kernel::new("t", text, "main"), &binds, 3, 1 << 20).unwrap(), None, "{odd}");
        }
    }

    #[test]
    fn what_a_dispatch_does_not_have_goes_first() {
        let m = chosen(&[Some((16, 16)), None, Some((16, 16)), Some((16, 16))], 3, 1 << 20).unwrap();
        assert_eq!(m.bound, [Bound::Alone(1), Bound::Zero, Bound::Alone(2), Bound::Alone(3)]);
        assert_eq!((m.groups.len(), m.words.len()), (0, 0));
    }

    #[test]
    fn around_barriers_what_is_only_read_stays_so_where_that_will_do() {
        let source: &'static str = "
            @group(0) @binding(1) var<storage, read> a: array<f32>;
            @group(0) @binding(2) var<storage, read> b: array<f32>;
            @group(0) @binding(3) var<storage, read_write> y: array<f32>;
            @compute @workgroup_size(1) fn main() { y[0] = a[0] + b[0]; workgroupBarrier(); }";
        let binds = [64, 640, 64].map(|bytes| Some(Binding { bytes, cost: bytes }));
        let bound = |source| choose(&Kernel::new("t", source, "main"), &binds, 2, 1 << 20).unwrap().unwrap().bound;
        assert_eq!(bound(source), [Bound::Part(1), Bound::Part(1), Bound::Alone(2)]);
        let without: &'static str = source.replace("workgroupBarrier();", "").leak();
        assert_eq!(bound(without), [Bound::Part(1), Bound::Alone(2), Bound::Part(1)]);
    }
}
