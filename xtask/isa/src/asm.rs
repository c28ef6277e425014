//! Reading a disassembly: its loops, which of them is hot, and what that one is made of.

use std::collections::HashMap;
use std::ops::Range;

/// What a stretch of code is made of. Each half of a `v_dual_*` pair counts as an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// All instructions, hints to the scheduler (`s_waitcnt`, `s_delay_alu`, `s_clause`) included.
    pub all: usize,
    /// Fused multiply-adds, dot products and matrix instructions.
    pub fma: usize,
    /// Vector arithmetic: all that starts with `v_`.
    pub valu: usize,
    /// Loads and stores of buffers and other memory, scratch included.
    pub memory: usize,
    /// Loads and stores of workgroup memory, and lane permutes through its hardware.
    pub lds: usize,
    /// Scalar loads.
    pub scalar_loads: usize,
    /// `s_waitcnt` and its kin.
    pub waits: usize,
}

impl Mix {
    /// Share of multiply-adds among all instructions, in percent.
    pub fn fma_share(&self) -> f64 {
        percent(self.fma, self.all)
    }

    /// Share of multiply-adds among vector arithmetic, in percent.
    pub fn fma_of_valu(&self) -> f64 {
        percent(self.fma, self.valu)
    }

    fn count(&mut self, mnemonic: &str, times: usize) {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|p| mnemonic.starts_with(p));
        let add = |field: &mut usize, yes: bool| *field += if yes { times } else { 0 };
        add(&mut self.all, true);
        add(&mut self.fma, is_fma(mnemonic));
        add(&mut self.valu, starts(&["v_"]));
        add(&mut self.memory, starts(&["buffer_", "tbuffer_", "global_", "flat_", "scratch_", "image_"]));
        add(&mut self.lds, starts(&["ds_"]));
        add(&mut self.scalar_loads, starts(&["s_load_", "s_buffer_load_"]));
        add(&mut self.waits, starts(&["s_wait"]));
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// `v_fma_f32`, `v_fmac_f32`, `v_fmaak_f32`, `v_pk_fma_f16`, `v_dual_fmac_f32`, `v_dot2_f32_f16`,
/// `v_wmma_f32_16x16x16_f16` and the like.
fn is_fma(mnemonic: &str) -> bool {
    let Some(name) = mnemonic.strip_prefix("v_") else { return false };
    let name = name.strip_prefix("dual_").or_else(|| name.strip_prefix("pk_")).unwrap_or(name);
    ["fma", "dot", "wmma", "swmmac"].iter().any(|p| name.starts_with(p))
}

/// A disassembly as RADV prints it: labels `BB3:`, one instruction per line followed by a semicolon and its encoding,
/// and `(then repeated 2 times)` for runs.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    lines: Vec<&'a str>,
}

impl<'a> Assembly<'a> {
    /// Splits it into lines.
    pub fn new(text: &'a str) -> Self {
        Assembly { lines: text.lines().collect() }
    }

    /// The lines.
    pub fn lines(&self) -> &[&'a str] {
        &self.lines
    }

    /// What some lines are made of.
    pub fn mix(&self, lines: Range<usize>) -> Mix {
        let mut mix = Mix::default();
        for at in lines {
            let times = repeats(self.lines.get(at + 1).copied().unwrap_or_default());
            mnemonics(self.lines[at]).for_each(|m| mix.count(m, 1 + times));
        }
        mix
    }

    /// The loops, as lines from the label to the last branch back to it. A loop that lies in another
    /// has a range within the other's.
    pub fn loops(&self) -> Vec<Range<usize>> {
        let mut labels: HashMap<&str, usize> = HashMap::new();
        let mut ends: HashMap<usize, usize> = HashMap::new();
        for (at, line) in self.lines.iter().enumerate() {
            if let Some(label) = line.trim().strip_suffix(':') {
                labels.insert(label, at);
            } else if let Some(&start) = branch_target(line).and_then(|target| labels.get(target)) {
                ends.insert(start, at + 1);
            }
        }
        let mut loops: Vec<_> = ends.into_iter().map(|(start, end)| start..end).collect();
        loops.sort_by_key(|l| (l.start, l.end));
        loops
    }

    /// The loop that has most multiply-adds outside loops within it; among equals the longest. `None`
    /// where there is no loop.
    pub fn hot_loop(&self) -> Option<Range<usize>> {
        let loops = self.loops();
        let own = |l: &Range<usize>| {
            let within = |inner: &&Range<usize>| *inner != l && l.start <= inner.start && inner.end <= l.end;
            // Of loops in loops in this one, the outer ones have them all.
            let inner: Vec<_> = loops.iter().filter(within).collect();
            let outermost = inner
                .iter()
                .filter(|i| !inner.iter().any(|other| other != *i && other.start <= i.start && i.end <= other.end));
            self.mix(l.clone()).fma - outermost.map(|i| self.mix((*i).clone()).fma).sum::<usize>()
        };
        loops.iter().max_by_key(|l| (own(l), l.len())).cloned()
    }
}

/// The instructions of a line: none, one, or the two of a `v_dual_*` pair.
fn mnemonics(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split(';').next().unwrap_or_default();
    code.split("::").filter_map(|part| part.split_whitespace().next()).filter(|word| is_mnemonic(word))
}

/// Instructions have an underscore in their names; labels, remarks and constant data do not. The
/// disassembler may be older than the card: `(invalid instruction)` is one that it does not know.
fn is_mnemonic(word: &str) -> bool {
    word == "(invalid"
        || word.starts_with(|c: char| c.is_ascii_lowercase())
            && word.contains('_')
            && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// How many more times the line before this one stands there.
fn repeats(line: &str) -> usize {
    let number = line.trim().strip_prefix("(then repeated ").and_then(|rest| rest.split(' ').next());
    number.and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn branch_target(line: &str) -> Option<&str> {
    let mut words = line.split(';').next()?.split_whitespace();
    let mnemonic = words.next()?;
    (mnemonic == "s_branch" || mnemonic.starts_with("s_cbranch")).then(|| words.next())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three loops: one for staging and one that multiplies, both within one over k, with few
    /// multiply-adds of its own.
    const TEXT: &str = include_str!("../tests/data/loops.txt");

    #[test]
    fn loops_reach_from_the_label_to_the_last_branch_back() {
        let assembly = Assembly::new(TEXT);
        let ends =
            |l: &Range<usize>| (assembly.lines()[l.start], assembly.lines()[l.end - 1].split(';').next().unwrap());
        let loops = assembly.loops();
        let found: Vec<_> = loops.iter().map(ends).map(|(a, b)| (a, b.trim())).collect();
        let expected = [("BB1:", "s_branch BB1"), ("BB2:", "s_cbranch_execnz BB2"), ("BB5:", "s_cbranch_scc0 BB5")];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_hot_loop_has_most_multiply_adds_of_its_own() {
        let assembly = Assembly::new(TEXT);
        let hot = assembly.hot_loop().unwrap();
        assert_eq!(assembly.lines()[hot.start], "BB5:");
        // Two ds_load, a wait, a delay, a dual pair, v_fmac three times, v_fma, v_mul, one unknown,
        // and three scalar.
        let expected = Mix { all: 15, fma: 6, valu: 7, memory: 0, lds: 2, scalar_loads: 0, waits: 1 };
        assert_eq!(assembly.mix(hot), expected);
        assert_eq!(expected.fma_share(), 40.0);
    }

    #[test]
    fn a_loop_counts_what_lies_in_loops_within() {
        let assembly = Assembly::new(TEXT);
        let outer = assembly.mix(assembly.loops()[0].clone());
        assert_eq!((outer.fma, outer.memory, outer.scalar_loads), (7, 2, 1));
    }

    #[test]
    fn without_a_branch_back_there_is_no_loop() {
        let text =
            "BB0:\n\ts_cbranch_scc0 BB2 ; bf84\nBB1:\n\tv_fma_f32 v0, v1, v2, v3 ; d54b\nBB2:\n\ts_endpgm ; bf81\n";
        assert_eq!(Assembly::new(text).hot_loop(), None);
    }

    #[test]
    fn multiply_adds_are_told_from_their_neighbours() {
        for yes in ["v_fma_f32", "v_fmac_f32_e32", "v_fmaak_f32", "v_fma_mix_f32", "v_pk_fma_f16", "v_dual_fmamk_f32"] {
            assert!(is_fma(yes), "{yes}");
        }
        for yes in ["v_dot2_f32_f16", "v_dual_dot2acc_f32_f16", "v_wmma_f32_16x16x16_f16"] {
            assert!(is_fma(yes), "{yes}");
        }
        for no in ["v_mul_f32_e32", "v_div_fmas_f32", "v_div_fixup_f32", "v_pk_mul_f16", "v_mad_u64_u32", "s_fmac_f32"]
        {
            assert!(!is_fma(no), "{no}");
        }
    }
}
