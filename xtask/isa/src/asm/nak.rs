//! NVK's compiler: blocks `block 5 L8 [3, 4] -> {` to `} -> [6, 56]` with the numbers of the blocks before and after,
//! one instruction per line: `r7 = ffma.ftz r4 r8 r7 // delay=1`. A name with `u` is of a register that the whole
//! subgroup has in common.

use std::collections::HashMap;

use super::{Kind, Line};

pub fn lines(text: &[&str]) -> Vec<Line> {
    let mut blocks: HashMap<&str, usize> = HashMap::new();
    let mut lines = vec![];
    for (at, line) in text.iter().enumerate() {
        let mut read = Line::default();
        if let Some(block) = line.strip_prefix("block") {
            read.label = true;
            blocks.extend(block.split_whitespace().find(|word| is_number(word)).map(|number| (number, at)));
        } else if let Some(after) = line.strip_prefix("} -> [") {
            let after = after.trim_end_matches(']').split(", ");
            read.back_to.extend(after.filter_map(|number| blocks.get(number)));
        } else {
            read.kinds.extend(kind(line));
        }
        lines.push(read);
    }
    lines
}

fn is_number(word: &str) -> bool {
    word.bytes().all(|b| b.is_ascii_digit())
}

fn kind(line: &str) -> Option<Kind> {
    let code = line.split("//").next()?;
    let (result, code) = code.split_once(" = ").unwrap_or(("", code));
    // `@!p0` before an instruction is its condition.
    let of_all = result.split_whitespace().any(|word| word.starts_with("ur") || word.starts_with("up"));
    let mnemonic = code.split_whitespace().find(|word| !word.starts_with('@'))?;
    let starts = |prefixes: &[&str]| prefixes.iter().any(|p| mnemonic.starts_with(p));
    Some(if starts(&["ffma", "hfma2", "dfma", "hmma", "imma", "idp4"]) {
        Kind::Fma
    } else if starts(&["ldc"]) {
        Kind::ScalarLoad
    } else if starts(&["ld.shared", "st.shared", "ldsm", "shfl", "atom.shared"]) {
        Kind::Shared
    } else if starts(&["ld.", "st.", "atom", "red", "cctl"]) {
        Kind::Memory
    } else if starts(&["nop", "depbar"]) {
        Kind::Wait
    } else if of_all || starts(&["bra", "brx", "bsync", "bssy", "bclear", "bar", "membar", "exit", "break", "warpsync"])
    {
        Kind::Other
    } else {
        Kind::Vector
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::{Assembly, Mix};

    #[test]
    fn the_hot_block_is_in_a_loop() {
        let assembly = Assembly::new("NAK assembly", include_str!("../../tests/data/nak.txt")).unwrap();
        let hot = assembly.hot().unwrap();
        let (first, last) = (assembly.text()[hot.start], assembly.text()[hot.end - 1]);
        assert_eq!((first, last), ("block 3 L9 [2] -> {", "} -> [4]"));
        assert_eq!(assembly.loops().first(), Some(&(8..28)));
        assert_eq!(assembly.loops().len(), 1);
        let expected = Mix { all: 8, fma: 3, vector: 4, memory: 1, shared: 1, scalar_loads: 1, waits: 0 };
        assert_eq!(assembly.mix(hot), expected);
    }

    #[test]
    fn instructions_are_told_by_name_and_result() {
        for (line, expected) in [
            ("      r8      = ffma.ftz r4 r8 r7      // delay=1 wt=000001", Kind::Fma),
            ("      r8 p0   = iadd3 r8 c[0x1][0x10] rZ // delay=1", Kind::Vector),
            ("@p1   ur4     = imad ur1 ur5 ur0       // delay=4", Kind::Other),
            ("@!p0            bra pT L10             // delay=1", Kind::Other),
            ("      r9      = ld.global.a64.constant.b32 [r10..12+rZ], p0 // delay=2 rd:0", Kind::Memory),
            ("                st.shared.strong.cta.b64 [r0.x8+rZ] r8..10 // delay=1", Kind::Shared),
            ("      ur5     = ldc.b32 c[0x0][+0xc]   // delay=1 wr:3", Kind::ScalarLoad),
        ] {
            assert_eq!(kind(line), Some(expected), "{line}");
        }
        assert_eq!(kind(""), None);
    }
}
