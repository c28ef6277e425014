//! RADV: labels `BB3:`, one instruction per line followed by a semicolon and its encoding, and `(then repeated 2 times)`
//! for runs.

use std::collections::HashMap;

use super::{Kind, Line};

pub fn lines(text: &[&str]) -> Vec<Line> {
    let mut labels: HashMap<&str, usize> = HashMap::new();
    let mut lines: Vec<Line> = vec![];
    for (at, line) in text.iter().enumerate() {
        let mut read = Line { kinds: mnemonics(line).map(kind).collect(), ..Line::default() };
        if let Some(label) = line.trim().strip_suffix(':') {
            labels.insert(label, at);
            read.label = true;
        } else if let Some(target) = branch_target(line) {
            read.branch = true;
            read.back_to.extend(labels.get(target));
        } else if let (Some(times), Some(before)) = (repeats(line), lines.last()) {
            read.kinds = before.kinds.repeat(times);
        }
        lines.push(read);
    }
    lines
}

fn kind(mnemonic: &str) -> Kind {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|p| mnemonic.starts_with(p));
    if is_fma(mnemonic) {
        Kind::Fma
    } else if starts(&["v_"]) {
        Kind::Vector
    } else if starts(&["buffer_", "tbuffer_", "global_", "flat_", "scratch_", "image_"]) {
        Kind::Memory
    } else if starts(&["ds_"]) {
        Kind::Shared
    } else if starts(&["s_load_", "s_buffer_load_"]) {
        Kind::ScalarLoad
    } else if starts(&["s_wait"]) {
        Kind::Wait
    } else {
        Kind::Other
    }
}

/// `v_fma_f32`, `v_fmac_f32`, `v_fmaak_f32`, `v_pk_fma_f16`, `v_dual_fmac_f32`, `v_dot2_f32_f16`,
/// `v_wmma_f32_16x16x16_f16` and the like.
fn is_fma(mnemonic: &str) -> bool {
    let Some(name) = mnemonic.strip_prefix("v_") else { return false };
    let name = name.strip_prefix("dual_").or_else(|| name.strip_prefix("pk_")).unwrap_or(name);
    ["fma", "dot", "wmma", "swmmac"].iter().any(|p| name.starts_with(p))
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
fn repeats(line: &str) -> Option<usize> {
    line.trim().strip_prefix("(then repeated ")?.split(' ').next()?.parse().ok()
}

fn branch_target(line: &str) -> Option<&str> {
    let mut words = line.split(';').next()?.split_whitespace();
    let mnemonic = words.next()?;
    (mnemonic == "s_branch" || mnemonic.starts_with("s_cbranch")).then(|| words.next())?
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::asm::{Assembly, Mix};

    /// Three loops: one for staging and one that multiplies, both within one over k, with few
    /// multiply-adds of its own.
    const TEXT: &str = include_str!("../../tests/data/radv.txt");

    #[test]
    fn loops_reach_from_the_label_to_branches_back() {
        let assembly = Assembly::new("Assembly", TEXT).unwrap();
        let ends = |l: &Range<usize>| (assembly.text()[l.start], assembly.text()[l.end - 1].split(';').next().unwrap());
        let loops = assembly.loops();
        let found: Vec<_> = loops.iter().map(ends).map(|(a, b)| (a, b.trim())).collect();
        let expected = [("BB2:", "s_cbranch_execnz BB2"), ("BB5:", "s_cbranch_scc0 BB5"), ("BB1:", "s_branch BB1")];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_hot_stretch_has_most_multiply_adds_of_those_in_loops() {
        let assembly = Assembly::new("Assembly", TEXT).unwrap();
        let hot = assembly.hot().unwrap();
        assert_eq!(assembly.text()[hot.start], "BB5:");
        // Two ds_load, a wait, a delay, a dual pair, v_fmac three times, v_fma, v_mul, one unknown,
        // and three scalar.
        let expected = Mix { all: 15, fma: 6, vector: 7, memory: 0, shared: 2, scalar_loads: 0, waits: 1 };
        assert_eq!(assembly.mix(hot), expected);
        assert_eq!(expected.fma_share(), 40.0);
    }

    #[test]
    fn runs_count() {
        let assembly = Assembly::new("Assembly", TEXT).unwrap();
        let outer = assembly.mix(assembly.loops()[2].clone());
        assert_eq!((outer.fma, outer.memory, outer.scalar_loads), (7, 2, 1));
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
