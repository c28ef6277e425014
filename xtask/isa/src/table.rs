//! The table: a row for each kernel and card.

use crate::asm::{Assembly, Mix};
use crate::kernels::Job;
use crate::vulkan::Compiled;

/// What became of a kernel on a card.
#[derive(Clone, Debug)]
pub struct Report {
    /// The kernel.
    pub job: Job,
    /// The card.
    pub family: String,
    /// What the driver says.
    pub compiled: Compiled,
    /// What the hot loop is made of, where there is a loop.
    pub hot: Option<Mix>,
}

impl Report {
    /// Reads the assembly.
    pub fn new(job: Job, family: String, compiled: Compiled) -> Report {
        let assembly = Assembly::new(&compiled.assembly);
        let hot = assembly.hot_loop().map(|lines| assembly.mix(lines));
        Report { job, family, compiled, hot }
    }

    fn statistic(&self, name: &str) -> u64 {
        self.compiled.statistics.get(name).copied().unwrap_or(0)
    }

    /// Registers that did not fit, of both kinds.
    pub fn spills(&self) -> u64 {
        self.statistic("Spilled VGPRs") + self.statistic("Spilled SGPRs")
    }

    /// Bytes of private memory an invocation: spills, and arrays that are not in registers.
    pub fn scratch(&self) -> u64 {
        self.statistic("Scratch size")
    }

    /// Waves per SIMD. RADV counts in waves of 32 on these cards, whatever the kernel's.
    fn waves(&self) -> u64 {
        self.statistic("Subgroups per SIMD") * 32 / u64::from(self.compiled.subgroup_size.max(32))
    }

    fn cells(&self, name: String) -> Vec<String> {
        let hot = |f: fn(&Mix) -> String| self.hot.as_ref().map_or("-".into(), f);
        vec![
            name,
            self.family.clone(),
            self.compiled.subgroup_size.to_string(),
            self.statistic("VGPRs").to_string(),
            self.spills().to_string(),
            self.scratch().to_string(),
            self.waves().to_string(),
            self.statistic("LDS size").to_string(),
            hot(|m| format!("{:.0}%", m.fma_share())),
            hot(|m| format!("{:.0}%", m.fma_of_valu())),
            hot(|m| m.all.to_string()),
            hot(|m| m.memory.to_string()),
            hot(|m| m.lds.to_string()),
            hot(|m| m.scalar_loads.to_string()),
            hot(|m| m.waits.to_string()),
        ]
    }
}

const HEADS: [&str; 15] = [
    "kernel",
    "card",
    "wave",
    "VGPRs",
    "spills",
    "scratch",
    "waves/SIMD",
    "LDS",
    "FMA",
    "FMA of VALU",
    "instr.",
    "mem.",
    "LDS ops",
    "scalar",
    "waits",
];

/// The table as Markdown, which is also how a terminal shows it.
pub fn markdown(reports: &[Report]) -> String {
    let jobs: Vec<&Job> = reports.iter().map(|r| &r.job).collect();
    let mut rows = vec![HEADS.map(String::from).to_vec()];
    rows.extend(reports.iter().map(|r| r.cells(short_name(&r.job, &jobs))));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADS.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        // Names to the left, numbers to the right.
        let cells = cells.map(|(i, (cell, &w))| if i < 2 { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rules = widths.iter().enumerate().map(|(i, &w)| match i < 2 {
        true => "-".repeat(w + 2),
        false => format!("{}:", "-".repeat(w + 1)),
    });
    let rule = format!("|{}|\n", rules.collect::<Vec<_>>().join("|"));
    line(&rows[0]) + &rule + &rows[1..].iter().map(line).collect::<String>()
}

/// `op.entry` and those knobs by which it differs from others of that name.
fn short_name(job: &Job, all: &[&Job]) -> String {
    let same = || all.iter().filter(|other| other.op == job.op && other.entry == job.entry);
    let mut parts = vec![format!("{}.{}", job.op, job.entry)];
    for (name, value) in &job.knobs {
        if same().any(|other| other.knob(name) != Some(value)) {
            parts.push(format!("{name}={value}"));
        }
    }
    if same().any(|other| other.subgroups != job.subgroups) {
        parts.push(if job.subgroups { "subgroups" } else { "no subgroups" }.into());
    }
    parts.join(" ")
}
