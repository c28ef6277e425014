//! Compiles the GPU kernels with Mesa for cards that are not there, and prints registers, spills, occupancy and the
//! instruction mix of hot stretches. docs/kernels.md explains the tables.

mod asm;
#[path = "../../../examples/shared/cli.rs"]
mod cli;
mod driver;
mod figures;
mod kernels;
mod spirv;
mod table;
mod vulkan;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use driver::{Answer, Driver};
use kernels::Job;
use table::Report;
use throughline::kernel::Kernel;
use throughline::{AdapterClass, Cooperative};
use xtask::mesa::Card;

#[derive(Parser)]
#[command(
    about = "Show registers, spills, occupancy and hot stretches of the GPU kernels on nine cards, without a card"
)]
struct Flags {
    /// Ops to compile, as in docs/ops.md [default: all]
    ops: Vec<String>,
    /// Card to compile for; may be repeated [default: all]
    #[arg(long, value_parser = card)]
    card: Vec<&'static Card>,
    /// Folder of an unpacked Mesa [default: target/mesa, which is downloaded first]
    #[arg(long, conflicts_with = "system")]
    mesa: Option<PathBuf>,
    /// Use the system's Mesa instead, which can compile for AMD cards
    #[arg(long)]
    system: bool,
    /// Only kernels on cooperative matrices of this kind: F16, F16x8 or F32
    #[arg(long, value_parser = kind, conflicts_with_all = ["wgsl", "system", "write"])]
    cooperative: Option<Cooperative>,
    /// Invocations of the smallest and the largest subgroup of a card with these matrices
    #[arg(long, value_name = "MIN,MAX", value_parser = sizes, default_value = "32,32", requires = "cooperative")]
    subgroups: Sizes,
    /// Only kernels whose description contains this
    #[arg(long, default_value = "")]
    kernel: String,
    /// WGSL file to compile instead of the ops; repeat it to concatenate several, as ops do with shaders/common
    #[arg(long)]
    wgsl: Vec<PathBuf>,
    /// Entry point of the file [default: all]
    #[arg(long, requires = "wgsl")]
    entry: Option<String>,
    /// Knob of the file to set, as NAME=VALUE
    #[arg(long, requires = "wgsl", value_parser = knob)]
    knob: Vec<(String, String)>,
    /// Also print the disassembly, with the hot stretch marked by `>`
    #[arg(long)]
    asm: bool,
    /// Fail if a kernel spills or has too few multiply-adds
    #[arg(long)]
    check: bool,
    /// With --check, the minimum percentage of multiply-adds in the hot stretch of large matmuls on AMD cards
    #[arg(long, default_value_t = 65.0)]
    min_fma: f64,
    /// Print the shorter tables of docs/kernels.md
    #[arg(long)]
    markdown: bool,
    /// Write those tables for all ops and cards to docs/kernels.md
    #[arg(long, conflicts_with_all = ["ops", "kernel", "wgsl", "asm", "card", "system"])]
    write: bool,
}

fn knob(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, got `{text}`"))?;
    Ok((name.into(), value.into()))
}

/// The smallest and the largest.
type Sizes = [u32; 2];

fn sizes(text: &str) -> Result<Sizes, String> {
    let parsed = text.split_once(',').and_then(|(min, max)| Some([min.parse().ok()?, max.parse().ok()?]));
    parsed.ok_or_else(|| format!("expected MIN,MAX, got `{text}`"))
}

fn kind(name: &str) -> Result<Cooperative, String> {
    let found = Cooperative::ALL.into_iter().find(|kind| format!("{kind:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("expected one of {:?}", Cooperative::ALL))
}

fn card(name: &str) -> Result<&'static Card, String> {
    Card::named(name)
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some(driver::CHILD) {
        return cli::main(|flags: Flags| run(&flags));
    }
    match driver::child() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("isa: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<()> {
    let mut jobs = match flags.cooperative {
        _ if !flags.wgsl.is_empty() => scratch(flags)?,
        Some(kind) => {
            let mut jobs = kernels::collect(&flags.ops, &[kernels::with_matrices(kind, flags.subgroups)])?;
            jobs.retain(kernels::has_matrices);
            jobs
        }
        None => kernels::collect(&flags.ops, &kernels::profiles())?,
    };
    jobs.retain(|job| job.describe().contains(&flags.kernel));
    ensure!(!jobs.is_empty(), "no kernel's description contains `{}`", flags.kernel);
    let driver = Driver::find(flags.system, flags.mesa.as_deref())?;
    let cards = if flags.card.is_empty() { driver.cards() } else { flags.card.clone() };
    let (devices, reports) = compile(&jobs, &driver, &cards)?;
    let table = match flags.markdown || flags.write {
        true => table::documented(&reports),
        false => table::full(&reports),
    };
    let table = format!("{}.\n\n{table}", devices.join("; "));
    match flags.write {
        true => write(Path::new("docs/kernels.md"), &table)?,
        false => {
            let listings: Vec<String> = reports.iter().filter(|_| flags.asm).map(listing).collect();
            print(&(listings.concat() + &table))?;
        }
    }
    if flags.check { check(&reports, flags.min_fma) } else { Ok(()) }
}

/// The kernels of WGSL files that belong to no op.
fn scratch(flags: &Flags) -> Result<Vec<Job>> {
    let read = |file: &PathBuf| std::fs::read_to_string(file).with_context(|| file.display().to_string());
    // A `Kernel` has static texts; these live as long as the program, too.
    let source: &'static str = flags.wgsl.iter().map(read).collect::<Result<String>>()?.leak();
    let entries = match &flags.entry {
        Some(entry) => vec![entry.clone()],
        None => spirv::entry_points(source)?,
    };
    let name = flags.wgsl.last().and_then(|f| f.file_stem()).unwrap_or_default();
    let label: &'static str = name.to_string_lossy().into_owned().leak();
    let job = |entry: String| {
        let kernel = Kernel::new(label, source, entry.leak());
        let set = |kernel: Kernel, (name, value): &(String, String)| kernel.knob(name.clone().leak(), value.as_str());
        Job::new(&flags.knob.iter().fold(kernel, set).on(AdapterClass::Gpu), false)
    };
    entries.into_iter().map(job).collect()
}

/// Compiles all jobs for each card, in one process per card. Also returns the names of the devices.
fn compile(jobs: &[Job], driver: &Driver, cards: &[&'static Card]) -> Result<(Vec<String>, Vec<Report>)> {
    let translate = |job: &Job| spirv::translate(&job.wgsl, &job.entry).with_context(|| job.describe());
    let shaders = jobs.iter().map(translate).collect::<Result<Vec<_>>>()?;
    let answers: Vec<Mutex<Option<Result<Answer>>>> = cards.iter().map(|_| Mutex::default()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((card, answer)) = at(&next, cards, &answers) {
            let result = driver.compile(card, &shaders);
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(cards.len());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let (mut devices, mut reports) = (vec![], vec![]);
    for (&card, answer) in cards.iter().zip(answers) {
        let answer = answer.into_inner().unwrap_or_else(PoisonError::into_inner).context("a thread ended early")??;
        ensure!(answer.compiled.len() == jobs.len(), "the child process for {} skipped kernels", card.name);
        for ((job, shader), compiled) in jobs.iter().zip(&shaders).zip(answer.compiled) {
            let report = compiled.and_then(|compiled| Report::new(job.clone(), card, shader.shared, compiled));
            reports.push(report.map_err(|e| anyhow!("{}, {}: {e}", job.describe(), card.name))?);
        }
        // NVK has one name for all cards that are not there.
        if !devices.contains(&answer.device) {
            devices.push(answer.device);
        }
    }
    Ok((devices, reports))
}

/// The next card that no thread has taken, and the place of its answer.
fn at<'a, T>(next: &AtomicUsize, cards: &[&'static Card], answers: &'a [T]) -> Option<(&'static Card, &'a T)> {
    let at = next.fetch_add(1, Ordering::Relaxed);
    Some((*cards.get(at)?, answers.get(at)?))
}

/// The disassembly, with the hot stretch marked.
fn listing(report: &Report) -> String {
    let title = format!("{}, {}:\n", report.job.describe(), report.card.name);
    let Some(assembly) = report.assembly() else { return title + "the driver gives no disassembly\n\n" };
    let hot = assembly.hot().unwrap_or_default();
    let mark = |at: usize| if hot.contains(&at) { '>' } else { ' ' };
    let lines = assembly.text().iter().enumerate().map(|(at, line)| format!("{} {line}\n", mark(at)));
    title + &lines.collect::<String>() + "\n"
}

/// Prints to stdout. A closed pipe is no error: `head` stops reading early.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("writing to stdout"),
        _ => Ok(()),
    }
}

const BEGIN: &str = "<!-- isa:begin -->\n";
const END: &str = "<!-- isa:end -->";

/// Puts the table between the file's markers.
fn write(file: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("{} (run from the root)", file.display()))?;
    let place = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) =
        place.with_context(|| format!("expected {} and {END} in {}", BEGIN.trim_end(), file.display()))?;
    std::fs::write(file, format!("{before}{BEGIN}\n{table}\n{END}{after}"))?;
    Ok(())
}

/// Checks that no kernel spills registers, and that the hot stretches of matmuls consist mostly of multiply-adds.
fn check(reports: &[Report], min_fma: f64) -> Result<()> {
    let mut problems = vec![];
    for report in reports {
        let name = format!("{} on {}", table::name(&[report], reports), report.card.name);
        if report.spills() {
            let figures = &report.figures;
            problems.push(format!(
                "{name} has {} spills and {} bytes of scratch; expected none",
                figures.spills, figures.scratch
            ));
        }
        let share = report.hot.map_or(0.0, |mix| mix.fma_share());
        let amd = report.card.name.starts_with("rdna");
        if amd && report.job.op == "matmul" && report.job.heavy && share < min_fma {
            problems.push(format!("{name}: {share:.0}% of its hot stretch is multiply-adds; expected {min_fma}%"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n     "));
    Ok(())
}
