//! Turnip's compiler: labels `l38:`, one instruction per line, with marks in parentheses before it: `(sy)(ss)` wait,
//! `(rpt2)` repeats it twice more, for the next registers. `;` and `@` begin remarks.

use std::collections::HashMap;

use super::{Kind, Line};

pub fn lines(text: &[&str]) -> Vec<Line> {
    let mut labels: HashMap<&str, usize> = HashMap::new();
    let mut lines = vec![];
    for (at, line) in text.iter().enumerate() {
        let mut read = Line::default();
        if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with('l')) {
            labels.insert(label, at);
            read.label = true;
        } else {
            let (times, code) = without_marks(line);
            read.kinds.extend(kind(code).into_iter().flat_map(|kind| vec![kind; times]));
            read.branch = is_branch(code);
            let target = code.rsplit_once('#').filter(|_| read.branch);
            read.back_to.extend(target.and_then(|(_, label)| labels.get(label)));
        }
        lines.push(read);
    }
    lines
}

/// How many times an instruction runs, and the instruction.
fn without_marks(line: &str) -> (usize, &str) {
    let (mut times, mut code) = (1, line.trim());
    while let Some((mark, rest)) = code.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        times += mark.strip_prefix("rpt").and_then(|n| n.parse().ok()).unwrap_or(0);
        code = rest.trim_start();
    }
    (times, code)
}

fn is_branch(code: &str) -> bool {
    code.starts_with("br") || code.starts_with("jump")
}

fn kind(code: &str) -> Option<Kind> {
    let mnemonic = code.split_whitespace().next().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))?;
    let starts = |prefixes: &[&str]| prefixes.iter().any(|p| mnemonic.starts_with(p));
    Some(if starts(&["mad.f", "dp2acc", "dp4acc"]) {
        Kind::Fma
    } else if starts(&["nop"]) {
        Kind::Wait
    } else if starts(&["ldl", "stl"]) {
        Kind::Shared
    } else if starts(&["ldc", "stc"]) {
        Kind::ScalarLoad
    } else if starts(&["isam", "sam", "ldib", "stib", "ldg", "stg", "ldp", "stp", "resinfo", "atomic"]) {
        Kind::Memory
    } else if is_branch(mnemonic) || starts(&["pred", "end", "bar", "fence", "shp", "getone", "mova", "ret", "call"]) {
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
    fn repetitions_count_and_remarks_do_not() {
        let assembly = Assembly::new("IR3 Assembly", include_str!("../../tests/data/ir3.txt")).unwrap();
        let hot = assembly.hot().unwrap();
        let (first, last) = (assembly.text()[hot.start], assembly.text()[hot.end - 1]);
        assert_eq!((first, last), ("(ss)add.u r2.x, r49.w, r1.x", "(ss)jump #l38"));
        assert_eq!(assembly.loops().len(), 1);
        // add, isam, ldl, three and one mad, mov, jump.
        let expected = Mix { all: 9, fma: 4, vector: 6, memory: 1, shared: 1, scalar_loads: 0, waits: 0 };
        assert_eq!(assembly.mix(hot), expected);
        let whole = assembly.mix(0..assembly.text().len());
        assert_eq!((whole.scalar_loads, whole.waits), (1, 9));
    }

    #[test]
    fn integer_multiplication_is_no_multiply_add() {
        assert_eq!(kind("madsh.m16 r3.x, r1.z, r1.x, (last)r3.x"), Some(Kind::Vector));
        assert_eq!(kind("mad.f32 r1.y, (last)r1.y, r1.z, (last)r2.z"), Some(Kind::Fma));
    }
}
