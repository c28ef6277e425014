//! The tables: all figures with a row for each kernel and card, and the shorter ones of the documentation with a column
//! for each card.

use xtask::mesa::Card;

use crate::asm::{Assembly, Mix};
use crate::figures::Figures;
use crate::kernels::Job;
use crate::vulkan::Compiled;

/// A kernel compiled for a card.
#[derive(Clone, Debug)]
pub struct Report {
    /// The kernel.
    pub job: Job,
    /// The card.
    pub card: &'static Card,
    /// The driver's output.
    pub compiled: Compiled,
    /// Bytes of workgroup memory.
    pub shared: u32,
    /// The figures in it.
    pub figures: Figures,
    /// The instruction mix of the hot stretch, if there is a loop, and a disassembly that can be read.
    pub hot: Option<Mix>,
}

impl Report {
    /// Reads statistics and assembly.
    pub fn new(job: Job, card: &'static Card, shared: u32, compiled: Compiled) -> Result<Report, String> {
        let figures = Figures::new(card.name, compiled.subgroup_size, &compiled.statistics)?;
        let mut report = Report { job, card, compiled, shared, figures, hot: None };
        report.hot = report.assembly().and_then(|assembly| Some(assembly.mix(assembly.hot()?)));
        Ok(report)
    }

    /// The disassembly, where it can be read.
    pub fn assembly(&self) -> Option<Assembly<'_>> {
        let (name, text) = self.compiled.assembly.as_ref()?;
        Assembly::new(name, text)
    }

    /// Whether registers or arrays went to memory.
    pub fn spills(&self) -> bool {
        self.figures.spills > 0 || self.figures.scratch > 0
    }

    fn hot(&self, cell: impl Fn(&Mix) -> String) -> String {
        self.hot.as_ref().map_or("-".into(), cell)
    }
}

/// A column: its heading, and its cell for a kernel on a card.
type Column = (&'static str, fn(&Report) -> String);

/// The columns after the kernel's name. From FMA on, they describe the hot stretch.
const COLUMNS: [Column; 15] = [
    ("card", |r| r.card.name.into()),
    ("subgroup", |r| r.compiled.subgroup_size.to_string()),
    ("registers", |r| r.figures.registers.to_string()),
    ("spills", |r| r.figures.spills.to_string()),
    ("scratch", |r| r.figures.scratch.to_string()),
    ("shared", |r| r.shared.to_string()),
    ("occupancy", |r| format!("{}%", r.figures.occupancy)),
    ("instr.", |r| r.figures.instructions.to_string()),
    ("FMA", |r| r.hot(|m| format!("{:.0}%", m.fma_share()))),
    ("of vector", |r| r.hot(|m| format!("{:.0}%", m.fma_of_vector()))),
    ("hot", |r| r.hot(|m| m.all.to_string())),
    ("memory", |r| r.hot(|m| m.memory.to_string())),
    ("shared ops", |r| r.hot(|m| m.shared.to_string())),
    ("scalar loads", |r| r.hot(|m| m.scalar_loads.to_string())),
    ("waits", |r| r.hot(|m| m.waits.to_string())),
];

/// All columns, and a row for each kernel and card, the cards of a kernel together.
pub fn full(reports: &[Report]) -> String {
    let mut rows: Vec<Vec<String>> =
        vec![std::iter::once("kernel").chain(COLUMNS.map(|c| c.0)).map(String::from).collect()];
    for kernel in by_kernel(reports) {
        let name = name(&[kernel[0]], reports);
        rows.extend(kernel.iter().map(|r| [vec![name.clone()], COLUMNS.map(|c| c.1(r)).to_vec()].concat()));
    }
    markdown(&rows, 2)
}

/// The tables of the documentation: what spills, the kernels where arithmetic decides, and a summary of the others.
pub fn documented(reports: &[Report]) -> String {
    let cards = cards(reports);
    let heading = |text: &str| format!("\n{text}\n\n");
    let (heavy, light): (Vec<_>, Vec<_>) = by_kernel(reports).into_iter().partition(|kernel| kernel[0].job.heavy);
    let mut text = spilled(reports);
    if !heavy.is_empty() {
        text += &heading(
            "The default kernels where arithmetic takes longer than memory: registers, occupancy, and the hot stretch's share of multiply-adds.",
        );
        text += &with_cards(&["kernel", "shared"], &cards, in_full(&heavy).into_iter());
    }
    if !light.is_empty() {
        text += &heading("All others, with all variants: the most registers and the least occupancy.");
        text += &with_cards(&["kernel", "variants", "shared"], &cards, by_entry(&light).iter().map(|g| summary(g)));
    }
    text
}

/// What goes to memory, a row for each kernel and card.
pub fn spilled(reports: &[Report]) -> String {
    let mut rows = vec![["kernel", "card", "registers", "spills", "scratch"].map(String::from).to_vec()];
    for report in reports.iter().filter(|r| r.spills()) {
        let f = &report.figures;
        let numbers = [f.registers, f.spills, f.scratch].map(|n| n.to_string());
        rows.push([vec![name(&[report], reports), report.card.name.into()], numbers.to_vec()].concat());
    }
    match rows.len() {
        1 => "No kernel spills or uses private memory on any of these cards.\n".into(),
        _ => format!("Kernels whose registers or arrays go to memory:\n\n{}", markdown(&rows, 2)),
    }
}

/// `120 33% 86%`, in bold where it spills.
fn cell(spills: bool, registers: u64, occupancy: u64, hot: Option<&Mix>) -> String {
    let hot = hot.map_or(String::new(), |mix| format!(" {:.0}%", mix.fma_share()));
    let text = format!("{registers} {occupancy}%{hot}");
    if spills { format!("**{text}**") } else { text }
}

/// A row for each kernel; kernels of an entry point that do not differ in their figures share one.
fn in_full(kernels: &[Vec<&Report>]) -> Vec<Vec<String>> {
    let all: Vec<Report> = kernels.iter().flatten().map(|r| (*r).clone()).collect();
    let mut groups: Vec<(Vec<String>, Vec<&Report>)> = vec![];
    for kernel in kernels {
        let cells = kernel.iter().map(|r| cell(r.spills(), r.figures.registers, r.figures.occupancy, r.hot.as_ref()));
        let cells: Vec<String> = std::iter::once(kernel[0].shared.to_string()).chain(cells).collect();
        let like = |first: &Report| (&first.job.op, &first.job.entry) == (&kernel[0].job.op, &kernel[0].job.entry);
        match groups.iter_mut().find(|(c, group)| *c == cells && like(group[0])) {
            Some((_, group)) => group.push(kernel[0]),
            None => groups.push((cells, vec![kernel[0]])),
        }
    }
    groups.into_iter().map(|(cells, group)| [vec![name(&group, &all)], cells].concat()).collect()
}

/// A row for the kernels of an entry point.
fn summary(kernels: &[&Vec<&Report>]) -> Vec<String> {
    let first = &kernels[0][0].job;
    let shared = kernels.iter().map(|kernel| kernel[0].shared).max().unwrap_or(0);
    let mut row = vec![format!("{}.{}", first.op, first.entry), kernels.len().to_string(), shared.to_string()];
    for card in 0..kernels[0].len() {
        let reports: Vec<&Report> = kernels.iter().filter_map(|kernel| kernel.get(card).copied()).collect();
        let most = reports.iter().map(|r| r.figures.registers).max().unwrap_or(0);
        let least = reports.iter().map(|r| r.figures.occupancy).min().unwrap_or(0);
        row.push(cell(reports.iter().any(|r| r.spills()), most, least, None));
    }
    row
}

fn with_cards(first: &[&str], cards: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: Vec<String> = first.iter().chain(cards).map(|s| s.to_string()).collect();
    markdown(&std::iter::once(head).chain(rows).collect::<Vec<_>>(), 1)
}

/// The cards, in order.
fn cards(reports: &[Report]) -> Vec<&'static str> {
    let mut cards: Vec<&str> = vec![];
    for report in reports {
        if !cards.contains(&report.card.name) {
            cards.push(report.card.name);
        }
    }
    cards
}

/// The reports on each kernel, in the order of the cards.
fn by_kernel(reports: &[Report]) -> Vec<Vec<&Report>> {
    // Every card has the same kernels in the same order.
    let cards = cards(reports).len().max(1);
    let kernels = reports.len() / cards;
    (0..kernels).map(|kernel| reports.iter().skip(kernel).step_by(kernels).collect()).collect()
}

/// Kernels of the same entry point.
fn by_entry<'a, 'b>(kernels: &'b [Vec<&'a Report>]) -> Vec<Vec<&'b Vec<&'a Report>>> {
    let of = |kernel: &Vec<&'a Report>| (kernel[0].job.op.clone(), kernel[0].job.entry.clone());
    let mut groups: Vec<Vec<&Vec<&Report>>> = vec![];
    for kernel in kernels {
        match groups.iter_mut().find(|group| of(group[0]) == of(kernel)) {
            Some(group) => group.push(kernel),
            None => groups.push(vec![kernel]),
        }
    }
    groups
}

/// A table in Markdown, aligned so that a terminal can show it too. The first row is the heading; the first columns are
/// text, the others numbers.
fn markdown(rows: &[Vec<String>], texts: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        // Names to the left, numbers to the right.
        let cells = cells.map(|(i, (cell, &w))| if i < texts { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rules = widths.iter().enumerate().map(|(i, &w)| match i < texts {
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

    fn report(card: &str, tile: u32, vgprs: u64, scratch: u64) -> Report {
        let kernel = Kernel::new("op", WGSL, "forward").knob("A", true).knob("TILE", tile).knob("SAME", 1u32);
        let statistics = [("VGPRs", vgprs), ("Subgroups per SIMD", 16), ("Scratch size", scratch)];
        let statistics = statistics.map(|(name, value)| (name.to_string(), value)).into();
        let compiled = Compiled { statistics, subgroup_size: 64, assembly: None };
        let card = Card::named(card).unwrap();
        Report::new(Job::new(&kernel, false).unwrap(), card, 4096, compiled).unwrap()
    }

    fn cells(table: &str, row: usize) -> Vec<&str> {
        table.lines().filter(|l| l.starts_with('|')).nth(row).unwrap().split('|').map(str::trim).collect()
    }

    #[test]
    fn names_have_the_knobs_that_differ() {
        let reports = [report("rdna2", 8, 24, 0), report("rdna2", 16, 24, 0)];
        assert_eq!(name(&[&reports[0]], &reports), "op.forward TILE=8");
        assert_eq!(name(&[&reports[0], &reports[1]], &reports), "op.forward (2 kernels)");
        assert_eq!(name(&[&reports[0]], &reports[..1]), "op.forward");
    }

    #[test]
    fn the_full_table_has_the_cards_of_a_kernel_together() {
        let of = |card| [report(card, 8, 24, 0), report(card, 16, 48, 0)];
        let table = full(&[of("rdna2"), of("rdna3")].concat());
        let firsts: Vec<_> = (2..6).map(|row| cells(&table, row)[1..5].join(" ")).collect();
        let expected = ["TILE=8 rdna2 64 24", "TILE=8 rdna3 64 24", "TILE=16 rdna2 64 48", "TILE=16 rdna3 64 48"];
        assert_eq!(firsts, expected.map(|row| format!("op.forward {row}")));
    }

    #[test]
    fn the_documented_table_summarises_what_is_not_heavy() {
        let of = |card, scratch| [report(card, 8, 24, 0), report(card, 16, 48, scratch)];
        let mut reports = [of("rdna2", 0), of("rdna3", 0)].concat();
        let table = documented(&reports);
        assert!(table.starts_with("No kernel spills"), "{table}");
        assert_eq!(cells(&table, 2)[1..6], ["op.forward", "2", "4096", "48 50%", "48 50%"]);
        reports.iter_mut().filter(|r| r.job.knob("TILE") == Some(&"8u".into())).for_each(|r| r.job.heavy = true);
        let table = documented(&reports);
        assert_eq!(cells(&table, 2)[1..5], ["op.forward", "4096", "24 50%", "24 50%"]);
        assert_eq!(table.matches("op.forward").count(), 2, "{table}");
        assert_eq!(cells(&table, 5)[1..6], ["op.forward", "1", "4096", "48 50%", "48 50%"]);
    }

    #[test]
    fn heavy_kernels_with_the_same_figures_share_a_row() {
        let mut reports = [report("rdna2", 8, 24, 0), report("rdna2", 16, 24, 0), report("rdna2", 32, 48, 0)];
        reports.iter_mut().for_each(|r| r.job.heavy = true);
        let table = documented(&reports);
        assert_eq!(cells(&table, 2)[1..4], ["op.forward (2 kernels)", "4096", "24 50%"]);
        assert_eq!(cells(&table, 3)[1..4], ["op.forward TILE=32", "4096", "48 50%"]);
    }

    #[test]
    fn what_spills_has_rows_of_its_own_and_is_bold() {
        let table = documented(&[report("rdna2", 8, 24, 0), report("rdna2", 16, 48, 256)]);
        assert_eq!(cells(&table, 2)[1..6], ["op.forward TILE=16", "rdna2", "48", "0", "256"]);
        assert_eq!(cells(&table, 5)[4], "**48 50%**");
    }
}
