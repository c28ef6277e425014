//! Reading a disassembly: which stretch of it is hot, and what that one is made of.

mod ir3;
mod nak;
mod radv;

use std::ops::Range;

/// What a stretch of code is made of. Each half of a pair of instructions counts, and each repetition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// All instructions, waits and hints to the scheduler included.
    pub all: usize,
    /// Fused multiply-adds, dot products and matrix instructions.
    pub fma: usize,
    /// Vector arithmetic, these included.
    pub vector: usize,
    /// Loads and stores of buffers and other memory, scratch included.
    pub memory: usize,
    /// Loads and stores of workgroup memory, and what passes values between lanes through its hardware.
    pub shared: usize,
    /// Loads of values that a whole subgroup has in common.
    pub scalar_loads: usize,
    /// Instructions that only wait.
    pub waits: usize,
}

impl Mix {
    /// Share of multiply-adds among all instructions, in percent.
    pub fn fma_share(&self) -> f64 {
        percent(self.fma, self.all)
    }

    /// Share of multiply-adds among vector arithmetic, in percent.
    pub fn fma_of_vector(&self) -> f64 {
        percent(self.fma, self.vector)
    }

    fn count(&mut self, kind: Kind) {
        self.all += 1;
        match kind {
            Kind::Fma => (self.fma, self.vector) = (self.fma + 1, self.vector + 1),
            Kind::Vector => self.vector += 1,
            Kind::Memory => self.memory += 1,
            Kind::Shared => self.shared += 1,
            Kind::ScalarLoad => self.scalar_loads += 1,
            Kind::Wait => self.waits += 1,
            Kind::Other => {}
        }
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// What an instruction does, as [`Mix`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fma,
    Vector,
    Memory,
    Shared,
    ScalarLoad,
    Wait,
    /// Scalar arithmetic, branches, barriers.
    Other,
}

/// A line of a disassembly.
#[derive(Clone, Debug, Default)]
struct Line {
    /// Its instructions.
    kinds: Vec<Kind>,
    /// Whether other code may go on here.
    label: bool,
    /// Whether it may go on elsewhere.
    branch: bool,
    /// The lines, before this one, where loops begin that go on after this line.
    back_to: Vec<usize>,
}

/// A disassembly.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    text: Vec<&'a str>,
    lines: Vec<Line>,
}

impl<'a> Assembly<'a> {
    /// Reads what a driver calls a representation of this name: `Assembly` of RADV, `NAK assembly` of NVK, `IR3
    /// Assembly` of Turnip. `None` if it is another.
    pub fn new(name: &str, text: &'a str) -> Option<Self> {
        let text: Vec<&str> = text.lines().collect();
        let lines = match name {
            "Assembly" => radv::lines(&text),
            "NAK assembly" => nak::lines(&text),
            "IR3 Assembly" => ir3::lines(&text),
            _ => return None,
        };
        Some(Assembly { text, lines })
    }

    /// The text, line by line.
    pub fn text(&self) -> &[&'a str] {
        &self.text
    }

    /// What some lines are made of.
    pub fn mix(&self, lines: Range<usize>) -> Mix {
        let mut mix = Mix::default();
        self.lines[lines].iter().flat_map(|line| &line.kinds).for_each(|kind| mix.count(*kind));
        mix
    }

    /// The hot stretch: of those without branches, within a loop, the one that has most multiply-adds; among equals the
    /// one with most instructions. `None` where there is no loop.
    ///
    /// A loop as a whole would not do: one compiler unrolls what is the innermost loop for another.
    pub fn hot(&self) -> Option<Range<usize>> {
        let loops = self.loops();
        let looping = |at: usize| loops.iter().any(|l| l.contains(&at));
        let size = |stretch: &Range<usize>| {
            let mix = self.mix(stretch.clone());
            (mix.fma, mix.all)
        };
        self.stretches().into_iter().filter(|stretch| looping(stretch.start)).max_by_key(size)
    }

    /// The loops, as lines from the label to a branch back to it.
    fn loops(&self) -> Vec<Range<usize>> {
        let branches = |(at, line): (usize, &Line)| line.back_to.iter().map(|&to| to..at + 1).collect::<Vec<_>>();
        self.lines.iter().enumerate().flat_map(branches).collect()
    }

    /// The lines between labels and branches.
    fn stretches(&self) -> Vec<Range<usize>> {
        let mut stretches = vec![];
        let mut start = 0;
        for (at, line) in self.lines.iter().enumerate() {
            if line.label {
                stretches.push(start..at);
                start = at;
            }
            if line.branch {
                stretches.push(start..at + 1);
                start = at + 1;
            }
        }
        stretches.push(start..self.lines.len());
        stretches.retain(|stretch| !stretch.is_empty());
        stretches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_branch_back_there_is_no_loop() {
        let text =
            "BB0:\n\ts_cbranch_scc0 BB2 ; bf84\nBB1:\n\tv_fma_f32 v0, v1, v2, v3 ; d54b\nBB2:\n\ts_endpgm ; bf81\n";
        assert_eq!(Assembly::new("Assembly", text).unwrap().hot(), None);
    }

    #[test]
    fn what_no_driver_is_known_to_print_is_not_read() {
        assert!(Assembly::new("Final NIR", "").is_none());
    }
}
