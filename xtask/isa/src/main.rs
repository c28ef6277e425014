//! What Mesa's RADV compiler makes of the GPU kernels, for AMD cards that are not here: registers,
//! spills, waves, and what hot loops are made of. docs/kernels.md explains the table.

mod asm;
mod driver;
mod kernels;
mod spirv;
mod table;
mod vulkan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use throughline::kernel::Kernel;

use asm::Assembly;
use kernels::Job;
use table::Report;

#[derive(Parser)]
#[command(about = "Registers, spills, waves and hot loops of the GPU kernels on AMD cards that are not here")]
struct Flags {
    /// Ops, as in docs/ops.md; all if left out
    ops: Vec<String>,
    /// Card to compile for; may be given several times
    #[arg(long, default_values = ["gfx1100", "gfx1030"])]
    family: Vec<String>,
    /// Only kernels whose description contains this
    #[arg(long, default_value = "")]
    kernel: String,
    /// WGSL file to look at instead of the ops; several are joined, as ops join shaders/common
    #[arg(long)]
    wgsl: Vec<PathBuf>,
    /// Entry point of the file; all if left out
    #[arg(long, requires = "wgsl")]
    entry: Option<String>,
    /// Knob of the file to set, as NAME=VALUE
    #[arg(long, requires = "wgsl", value_parser = knob)]
    knob: Vec<(String, String)>,
    /// Print the disassembly too, with `>` before the lines of the hot loop
    #[arg(long)]
    asm: bool,
    /// Fail if a kernel spills or has too few multiply-adds
    #[arg(long)]
    check: bool,
    /// Least share of multiply-adds in a matmul's hot loop, in percent
    #[arg(long, default_value_t = 80.0)]
    min_fma: f64,
    /// Write the table into docs/kernels.md
    #[arg(long)]
    write: bool,
}

fn knob(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, got `{text}`"))?;
    Ok((name.into(), value.into()))
}

fn main() -> ExitCode {
    let outcome = match std::env::args().nth(1).as_deref() {
        Some(driver::CHILD) => driver::child(),
        _ => run(&Flags::parse()),
    };
    match outcome {
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
    if flags.asm {
        reports.iter().for_each(print_assembly);
    }
    let table = format!("{}\n\n{}", devices.join("; "), table::markdown(&reports));
    println!("{table}");
    if flags.write {
        write(Path::new("docs/kernels.md"), &table)?;
    }
    if flags.check { check(&reports, flags.min_fma) } else { Ok(()) }
}

/// The kernels of WGSL files that are not an op's.
fn scratch(flags: &Flags) -> Result<Vec<Job>> {
    let read = |file: &PathBuf| std::fs::read_to_string(file).with_context(|| file.display().to_string());
    // A `Kernel` has static texts; these live as long as the program, too.
    let source: &'static str = flags.wgsl.iter().map(read).collect::<Result<String>>()?.leak();
    let entries = match &flags.entry {
        Some(entry) => vec![entry.clone()],
        None => spirv::entry_points(source)?,
    };
    let name = flags.wgsl.last().and_then(|f| f.file_stem()).unwrap_or_default().to_string_lossy();
    let job = |entry: String| {
        let kernel = Kernel::new("scratch", source, entry.leak());
        let set = |kernel: Kernel, (name, value): &(String, String)| kernel.knob(name.clone().leak(), value.as_str());
        Job::new(&name, &flags.knob.iter().fold(kernel, set), false)
    };
    entries.into_iter().map(job).collect()
}

/// Compiles all for each family, one process each. Returns the names of the devices too.
fn compile(jobs: &[Job], families: &[String]) -> Result<(Vec<String>, Vec<Report>)> {
    let translate = |job: &Job| spirv::translate(&job.wgsl, &job.entry).with_context(|| job.describe());
    let shaders = jobs.iter().map(translate).collect::<Result<Vec<_>>>()?;
    let icd = driver::find()?;
    let answers = std::thread::scope(|scope| {
        let (icd, shaders) = (&icd, &shaders);
        let running: Vec<_> =
            families.iter().map(|family| scope.spawn(move || driver::compile(icd, family, shaders))).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect()
    });
    let answers: Vec<driver::Answer> = Result::from_iter::<Vec<_>>(answers)?;
    let mut reports = vec![];
    for (at, job) in jobs.iter().enumerate() {
        for (family, answer) in families.iter().zip(&answers) {
            let compiled = answer.compiled.get(at).context("the child left kernels out")?.clone();
            let compiled = compiled.map_err(|e| anyhow::anyhow!("{}, {family}: {e}", job.describe()))?;
            reports.push(Report::new(job.clone(), family.clone(), compiled));
        }
    }
    Ok((answers.into_iter().map(|a| a.device).collect(), reports))
}

fn print_assembly(report: &Report) {
    println!("{}, {}:", report.job.describe(), report.family);
    let assembly = Assembly::new(&report.compiled.assembly);
    let hot = assembly.hot_loop().unwrap_or_default();
    for (at, line) in assembly.lines().iter().enumerate() {
        println!("{} {line}", if hot.contains(&at) { '>' } else { ' ' });
    }
    println!();
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

/// Whether no kernel keeps registers in memory, and matmuls multiply most of the time.
fn check(reports: &[Report], min_fma: f64) -> Result<()> {
    let mut problems = vec![];
    for report in reports {
        let name = format!("{} on {}", report.job.describe(), report.family);
        if report.spills() > 0 || report.scratch() > 0 {
            problems.push(format!("{name} spills {} registers, {} bytes", report.spills(), report.scratch()));
        }
        let share = report.hot.map_or(0.0, |mix| mix.fma_share());
        if report.job.op == "matmul" && share < min_fma {
            problems.push(format!("{name}: {share:.0}% of the hot loop multiplies and adds; expected {min_fma}%"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n     "));
    Ok(())
}
