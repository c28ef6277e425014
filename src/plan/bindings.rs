//! Decides which storage bindings of a kernel share a buffer, on devices that bind fewer than the kernel has.
//!
//! Bindings of one type become ranges of one buffer, chosen so that the fewest bytes are copied into and out of it.
//! `kernel::merge` then rewrites the kernel to match.

use std::collections::{BTreeMap, HashMap};

use crate::error::Result;
use crate::kernel::merge::{count, declared};
use crate::kernel::wgsl::Module;
use crate::kernel::{Bound, Kernel};

/// Ranges start at multiples of this many bytes, which must be a multiple of the element size.
const ALIGN: usize = 256;

/// A storage binding as resolved by the planner.
#[derive(Clone, Copy)]
pub(crate) struct Binding {
    pub bytes: usize,
    /// Bytes to copy if it is merged: in, out or both.
    pub cost: usize,
}

/// How the bindings of a dispatch are merged.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Merging {
    /// By old number, counted from 1.
    pub bound: Vec<Bound>,
    pub groups: Vec<Group>,
    /// Contents of the uniform after the storage bindings: the first element and the last index of each range.
    pub words: Vec<u32>,
}

impl Merging {
    /// Number of bindings that are left.
    pub fn count(&self) -> usize {
        count(&self.bound)
    }
}

/// Bindings that become one.
#[derive(Debug, PartialEq)]
pub(crate) struct Group {
    pub number: u32,
    pub bytes: usize,
    /// Old index, counted from 0, and offset in bytes.
    pub parts: Vec<(usize, usize)>,
}

/// One way to merge bindings of a type: how many of the cheapest read-only and of the cheapest written bindings are
/// merged, and whether both go into the same buffer.
#[derive(Clone, Copy)]
struct Way {
    read: usize,
    written: usize,
    together: bool,
}

impl Way {
    const NONE: Way = Way { read: 0, written: 0, together: false };

    /// Number of bindings saved.
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
    /// Indices of the bindings in each group.
    fn groups(&self, way: Way) -> Vec<Vec<usize>> {
        let (read, written) = (self.read[..way.read].to_vec(), self.written[..way.written].to_vec());
        let groups = if way.together { vec![[read, written].concat()] } else { vec![read, written] };
        groups.into_iter().filter(|g| !g.is_empty()).collect()
    }

    /// All ways in which each group holds at least two bindings and at most `max_bytes`.
    fn ways(&self, binds: &[Option<Binding>], max_bytes: u64) -> Vec<Way> {
        let numbers = (0..=self.read.len()).flat_map(|read| (0..=self.written.len()).map(move |w| (read, w)));
        let ways = numbers.flat_map(|(read, written)| [false, true].map(|together| Way { read, written, together }));
        let fits = |group: &Vec<usize>| group.len() > 1 && places(group, binds).1 as u64 <= max_bytes;
        let sound = |way: &Way| !way.together || (way.read > 0 && way.written > 0);
        ways.filter(|way| sound(way) && self.groups(*way).iter().all(fits)).collect()
    }
}

/// Offsets of the bindings in a group, and the total size in bytes.
fn places(group: &[usize], binds: &[Option<Binding>]) -> (Vec<(usize, usize)>, usize) {
    let mut end = 0usize;
    let place = |&i: &usize| {
        let at = end.next_multiple_of(ALIGN);
        end = at + binds[i].map_or(0, |b| b.bytes);
        (i, at)
    };
    (group.iter().map(place).collect(), end)
}

/// Merges bindings until at most `max` are left; returns `None` if that is impossible. `binds` are bindings 1, 2, ...;
/// those that the dispatch lacks cost nothing.
pub(crate) fn choose(
    kernel: &Kernel,
    binds: &[Option<Binding>],
    max: usize,
    max_bytes: u64,
) -> Result<Option<Merging>> {
    let text = kernel.as_stored()?;
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
    // What is read-only in control flow around a barrier must stay so: see "Uniformity" in the WGSL specification.
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

/// For each class, the way that together with the others saves `need` bindings at the least cost. With `careful`, ways
/// with fewer groups of both read and written bindings come first.
fn cheapest(
    classes: &[Class],
    binds: &[Option<Binding>],
    need: usize,
    max_bytes: u64,
    careful: bool,
) -> Option<Vec<Way>> {
    type Rank = (usize, usize, usize);
    // Indexed by the number of bindings saved: the best that the classes so far can do.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::merge::tests::TEXT;

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
        // If the element size does not divide their starts, bindings cannot be ranges. What is not an array stays
        // alone.
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
