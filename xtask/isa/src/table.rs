//! The table: a row for each kernel and card.

use crate::asm::{Assembly, Mix};
use crate::kernels::Job;
use crate::vulkan::Compiled;

/// A kernel compiled for a card.
#[derive(Clone, Debug)]
pub struct Report {
    /// The kernel.
    pub job: Job,
    /// The card.
    pub family: String,
    /// The driver's output.
    pub compiled: Compiled,
    /// The instruction mix of the hot loop, if there is a loop.
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

    /// Bytes of private memory per invocation: spills, and arrays that are not in registers.
    pub fn scratch(&self) -> u64 {
        self.statistic("Scratch size")
    }

    /// Waves per SIMD. On these cards RADV counts waves of 32, whatever the wave size of the kernel.
    fn waves(&self) -> u64 {
        self.statistic("Subgroups per SIMD") * 32 / u64::from(self.compiled.subgroup_size.max(32))
    }

    fn hot(&self, cell: impl Fn(&Mix) -> String) -> String {
        self.hot.as_ref().map_or("-".into(), cell)
    }
}

/// A column: its heading, and its cell for a kernel on a card.
type Column = (&'static str, fn(&Report) -> String);

/// The columns after the kernel's name. From FMA on, they describe the hot loop.
const COLUMNS: [Column; 14] = [
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
const DOCUMENTED: usize = 9;

/// All columns, and a row for each kernel and card.
pub fn full(reports: &[Report]) -> String {
    let row = |report: &Report| [vec![name(&[report], reports)], cells(report, COLUMNS.len())].concat();
    markdown(COLUMNS.len(), reports.iter().map(row).collect())
}

/// The first columns; kernels of an entry point that do not differ in them share a row.
pub fn documented(reports: &[Report]) -> String {
    let mut groups: Vec<(Vec<String>, Vec<&Report>)> = vec![];
    for report in reports {
        let cells = cells(report, DOCUMENTED);
        let like = |first: &Report| (&first.job.op, &first.job.entry) == (&report.job.op, &report.job.entry);
        match groups.iter_mut().find(|(c, group)| *c == cells && like(group[0])) {
            Some((_, group)) => group.push(report),
            None => groups.push((cells, vec![report])),
        }
    }
    markdown(
        DOCUMENTED,
        groups.into_iter().map(|(cells, group)| [vec![name(&group, reports)], cells].concat()).collect(),
    )
}

fn cells(report: &Report, columns: usize) -> Vec<String> {
    COLUMNS[..columns].iter().map(|(_, cell)| cell(report)).collect()
}

/// A table in Markdown, aligned so that a terminal can show it too.
fn markdown(columns: usize, mut rows: Vec<Vec<String>>) -> String {
    rows.insert(0, std::iter::once("kernel").chain(COLUMNS[..columns].iter().map(|c| c.0)).map(String::from).collect());
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=columns).map(width).collect();
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

/// `op.entry`, those knobs that a group has in common but others of that name have not, and how many
/// kernels the group has.
pub fn name(group: &[&Report], all: &[Report]) -> String {
    let first = &group[0].job;
    let others = || all.iter().map(|r| &r.job).filter(|job| (&job.op, &job.entry) == (&first.op, &first.entry));
    let tells = |same: &dyn Fn(&Job) -> bool| group.iter().all(|r| same(&r.job)) && !others().all(same);
    let mut parts = vec![format!("{}.{}", first.op, first.entry)];
    for (knob, value) in &first.knobs {
        if tells(&|job| job.knob(knob) == Some(value)) {
            parts.push(format!("{knob}={}", value.trim_end_matches('u')));
        }
    }
    if tells(&|job| job.subgroups == first.subgroups) {
        parts.push(if first.subgroups { "subgroups" } else { "no subgroups" }.into());
    }
    if group.len() > 1 {
        parts.push(format!("({} kernels)", group.len()));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline::kernel::Kernel;

    const WGSL: &str = "const A: bool = false;\nconst TILE: u32 = 8u;\nconst SAME: u32 = 1u;\n";

    fn report(a: bool, tile: u32, vgprs: u64) -> Report {
        let kernel = Kernel::new("op", WGSL, "forward").knob("A", a).knob("TILE", tile).knob("SAME", 1u32);
        let statistics = [("VGPRs", vgprs), ("Subgroups per SIMD", 32), ("Spilled SGPRs", 2), ("Scratch size", 16)];
        let statistics = statistics.map(|(name, value)| (name.to_string(), value)).into();
        let compiled = Compiled { statistics, subgroup_size: 64, assembly: String::new() };
        Report::new(Job::new(&kernel, false).unwrap(), "gfx1100".into(), compiled)
    }

    #[test]
    fn names_have_the_knobs_that_differ() {
        let reports = [report(false, 8, 24), report(true, 8, 24), report(false, 16, 24)];
        assert_eq!(name(&[&reports[0]], &reports), "op.forward A=false TILE=8");
        assert_eq!(name(&[&reports[0], &reports[1]], &reports), "op.forward TILE=8 (2 kernels)");
        assert_eq!(name(&[&reports[0]], &reports[..1]), "op.forward");
    }

    #[test]
    fn waves_are_of_the_size_chosen_and_spills_of_both_kinds() {
        let report = report(false, 8, 24);
        assert_eq!((report.waves(), report.spills(), report.scratch()), (16, 2, 16));
    }

    #[test]
    fn kernels_with_the_same_figures_share_a_documented_row() {
        let reports = [report(false, 8, 24), report(false, 16, 48), report(true, 8, 24)];
        let rows =
            |table: String| table.lines().skip(2).map(|l| l.split('|').nth(1).unwrap().trim().to_string()).collect();
        let documented: Vec<String> = rows(documented(&reports));
        assert_eq!(documented, ["op.forward TILE=8 (2 kernels)", "op.forward A=false TILE=16"]);
        let full: Vec<String> = rows(full(&reports));
        assert_eq!(full.len(), 3);
    }
}
