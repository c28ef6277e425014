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

    fn hot(&self, cell: impl Fn(&Mix) -> String) -> String {
        self.hot.as_ref().map_or("-".into(), cell)
    }
}

/// A column: its head, and what it says of a kernel on a card.
type Column = (&'static str, fn(&Report) -> String);

/// The columns behind the kernel's name. FMA and what follows is of the hot loop.
pub const COLUMNS: [Column; 14] = [
    ("card", |r| r.family.clone()),
    ("wave", |r| r.compiled.subgroup_size.to_string()),
    ("VGPRs", |r| r.statistic("VGPRs").to_string()),
    ("spills", |r| r.spills().to_string()),
    ("scratch", |r| r.scratch().to_string()),
    ("waves/SIMD", |r| r.waves().to_string()),
    ("LDS", |r| r.statistic("LDS size").to_string()),
    ("FMA", |r| r.hot(|m| format!("{:.0}%", m.fma_share()))),
    ("of VALU", |r| r.hot(|m| format!("{:.0}%", m.fma_of_valu()))),
    ("instr.", |r| r.hot(|m| m.all.to_string())),
    ("memory", |r| r.hot(|m| m.memory.to_string())),
    ("LDS ops", |r| r.hot(|m| m.lds.to_string())),
    ("s_load", |r| r.hot(|m| m.scalar_loads.to_string())),
    ("waits", |r| r.hot(|m| m.waits.to_string())),
];

/// How many of these docs/kernels.md has.
pub const DOCUMENTED: usize = 9;

/// The table with the first of the columns, as Markdown, which is also how a terminal shows it.
pub fn markdown(reports: &[Report], columns: usize) -> String {
    let jobs: Vec<&Job> = reports.iter().map(|r| &r.job).collect();
    let columns = &COLUMNS[..columns];
    let mut rows = vec![std::iter::once("kernel").chain(columns.iter().map(|c| c.0)).map(String::from).collect()];
    for report in reports {
        let cells = columns.iter().map(|(_, cell)| cell(report));
        rows.push(std::iter::once(short_name(&report.job, &jobs)).chain(cells).collect::<Vec<_>>());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=columns.len()).map(width).collect();
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
pub fn short_name(job: &Job, all: &[&Job]) -> String {
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
