//! Compiles the GPU kernels with Mesa's RADV for AMD cards, without a card, and prints registers, spills, waves and the
//! instruction mix of hot loops. docs/kernels.md explains the table.

mod asm;
#[path = "../../../examples/shared/cli.rs"]
mod cli;
mod driver;
mod kernels;
mod spirv;
mod table;
mod vulkan;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result, bail, ensure};
use asm::Assembly;
use clap::Parser;
use driver::Answer;
use kernels::Job;
use table::Report;
use throughline::kernel::Kernel;

#[derive(Parser)]
#[command(about = "Show registers, spills, waves and hot loops of the GPU kernels on AMD cards, without a card")]
struct Flags {
    /// Ops to compile, as in docs/ops.md [default: all]
    ops: Vec<String>,
    /// Card to compile for; may be repeated
    #[arg(long, default_values = ["gfx1100", "gfx1030"])]
    family: Vec<String>,
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
    /// Also print the disassembly, with the hot loop marked by `>`
    #[arg(long)]
    asm: bool,
    /// Fail if a kernel spills or has too few multiply-adds
    #[arg(long)]
    check: bool,
    /// With --check, the minimum percentage of multiply-adds in the hot loop of large matmuls
    #[arg(long, default_value_t = 80.0)]
    min_fma: f64,
    /// Print the shorter table of docs/kernels.md
    #[arg(long)]
    markdown: bool,
    /// Write that table for all ops to docs/kernels.md
    #[arg(long, conflicts_with_all = ["ops", "kernel", "wgsl", "asm"])]
    write: bool,
}

fn knob(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, got `{text}`"))?;
    Ok((name.into(), value.into()))
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
    let mut jobs = if flags.wgsl.is_empty() { kernels::collect(&flags.ops)? } else { scratch(flags)? };
    jobs.retain(|job| job.describe().contains(&flags.kernel));
    ensure!(!jobs.is_empty(), "no kernel's description contains `{}`", flags.kernel);
    let (devices, reports) = compile(&jobs, &flags.family)?;
    let table = match flags.markdown || flags.write {
        true => table::documented(&reports),
        false => table::full(&reports),
    };
    let table = format!("{}\n\n{table}", devices.join("; "));
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
        Job::new(&flags.knob.iter().fold(kernel, set), false)
    };
    entries.into_iter().map(job).collect()
}

/// Compiles all jobs for each family, in one process per family. Also returns the names of the devices.
fn compile(jobs: &[Job], families: &[String]) -> Result<(Vec<String>, Vec<Report>)> {
    let translate = |job: &Job| spirv::translate(&job.wgsl, &job.entry).with_context(|| job.describe());
    let shaders = jobs.iter().map(translate).collect::<Result<Vec<_>>>()?;
    let icd = driver::find()?;
    let (icd, shaders) = (&icd, &shaders);
    let answers = std::thread::scope(|scope| {
        let start = |family| scope.spawn(move || driver::compile(icd, family, shaders));
        let running: Vec<_> = families.iter().map(String::as_str).map(start).collect();
        let finish = |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|_| bail!("a thread panicked"));
        running.into_iter().map(finish).collect::<Result<Vec<Answer>>>()
    })?;
    let mut reports = vec![];
    for (at, job) in jobs.iter().enumerate() {
        for (family, answer) in families.iter().zip(&answers) {
            let compiled = answer.compiled.get(at).context("the child process skipped kernels")?.clone();
            let compiled = compiled.map_err(|e| anyhow::anyhow!("{}, {family}: {e}", job.describe()))?;
            reports.push(Report::new(job.clone(), family.clone(), compiled));
        }
    }
    Ok((answers.into_iter().map(|a| a.device).collect(), reports))
}

/// The disassembly, with the hot loop marked.
fn listing(report: &Report) -> String {
    let assembly = Assembly::new(&report.compiled.assembly);
    let hot = assembly.hot_loop().unwrap_or_default();
    let mark = |at: usize| if hot.contains(&at) { '>' } else { ' ' };
    let lines: Vec<String> =
        assembly.lines().iter().enumerate().map(|(at, line)| format!("{} {line}\n", mark(at))).collect();
    format!("{}, {}:\n{}\n", report.job.describe(), report.family, lines.concat())
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

/// Checks that no kernel spills registers, and that the hot loops of matmuls consist mostly of multiply-adds.
fn check(reports: &[Report], min_fma: f64) -> Result<()> {
    let mut problems = vec![];
    for report in reports {
        let name = format!("{} on {}", table::name(&[report], reports), report.family);
        if report.spills() > 0 || report.scratch() > 0 {
            problems.push(format!(
                "{name} spills {} registers and has {} bytes of scratch; expected none",
                report.spills(),
                report.scratch()
            ));
        }
        let share = report.hot.map_or(0.0, |mix| mix.fma_share());
        if report.job.op == "matmul" && report.job.heavy && share < min_fma {
            problems.push(format!("{name}: {share:.0}% of its hot loop is multiply-adds; expected {min_fma}%"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n     "));
    Ok(())
}
