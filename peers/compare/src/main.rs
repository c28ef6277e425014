//! Runs other libraries and ours on the same tasks, in turn, and prints how long they take as ratios.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde_json::Value;

/// What is run if no task is named.
const TASKS: [&str; 5] = ["matmul-512", "matmul-1024", "train-L4-d128", "train-L6-d384", "smollm2-32"];

/// The programs, ours first.
const PROGRAMS: [&str; 3] = ["peer-throughline", "peer-burn", "peer-meganeura"];

const USAGE: &str = "usage: [TASK...] [--seconds N] [--rounds N]: the time of each measurement, and how many of each";

fn main() -> ExitCode {
    match compare(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn compare(args: Vec<String>) -> Result<(), String> {
    let Options { tasks, seconds, rounds } = Options::parse(&args)?;
    let programs = programs()?;
    println!("| task | library | median | processor | first run | computed | time, ours = 1 | processor, ours = 1 |");
    println!("|------|---------|-------:|----------:|----------:|---------:|---------------:|--------------------:|");
    for task in &tasks {
        let mut reports: BTreeMap<usize, Vec<Report>> = BTreeMap::new();
        for _ in 0..rounds {
            for (i, program) in programs.iter().enumerate() {
                if let Some(report) = measured(program, task, seconds)? {
                    reports.entry(i).or_default().push(report);
                }
            }
        }
        let Some(ours) = reports.get(&0).map(|rounds| Report::middle(rounds)) else {
            return Err(format!("ours does not know the task `{task}`"));
        };
        reports.values().map(|rounds| Report::middle(rounds)).for_each(|r| println!("{}", r.row(task, &ours)));
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Options {
    tasks: Vec<String>,
    seconds: f64,
    /// In each, every program runs once: a busy machine then slows all of them.
    rounds: usize,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Options { tasks: vec![], seconds: 3.0, rounds: 3 };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--seconds" => {
                    let value = args.next().map_or("", String::as_str);
                    options.seconds = value.parse().map_err(|_| format!("--seconds takes a number, got `{value}`"))?;
                }
                "--rounds" => {
                    let value = args.next().map_or("", String::as_str);
                    options.rounds = value
                        .parse()
                        .ok()
                        .filter(|rounds| *rounds > 0)
                        .ok_or_else(|| format!("--rounds takes a whole number from 1, got `{value}`"))?;
                }
                flag if flag.starts_with('-') => return Err(format!("no flag `{flag}`; {USAGE}")),
                task => options.tasks.push(task.into()),
            }
        }
        if options.tasks.is_empty() {
            options.tasks = TASKS.map(String::from).to_vec();
        }
        Ok(options)
    }
}

/// The programs, which lie beside this one.
fn programs() -> Result<Vec<PathBuf>, String> {
    let this = std::env::current_exe().map_err(|e| format!("this program: {e}"))?;
    let folder = this.parent().unwrap_or(Path::new("."));
    Ok(PROGRAMS.iter().map(|name| folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))).collect())
}

/// What a program measured; `None` if its library does not offer the task.
fn measured(program: &Path, task: &str, seconds: f64) -> Result<Option<Report>, String> {
    let mut command = Command::new(program);
    command.arg(task).arg(seconds.to_string()).stderr(Stdio::null());
    let output = command.output().map_err(|e| format!("{}: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    Report::parse(last).map_err(|e| format!("{} {task} ({}): {e}", program.display(), output.status))
}

#[derive(Clone, Debug, PartialEq)]
struct Report {
    library: String,
    median: f64,
    cpu: f64,
    first: f64,
    check: f64,
}

impl Report {
    fn parse(line: &str) -> Result<Option<Self>, String> {
        let report: Value = serde_json::from_str(line).map_err(|_| format!("no report in its last line: {line}"))?;
        if report["offered"] != true {
            return Ok(None);
        }
        let number = |key: &str| report[key].as_f64().ok_or_else(|| format!("no number `{key}` in {line}"));
        let library = report["library"].as_str().unwrap_or_default().into();
        let [median, cpu, first, check] = [number("median_s")?, number("cpu_s")?, number("first_s")?, number("check")?];
        Ok(Some(Report { library, median, cpu, first, check }))
    }

    /// The round in the middle, by time.
    fn middle(rounds: &[Report]) -> Report {
        let mut rounds: Vec<&Report> = rounds.iter().collect();
        rounds.sort_by(|a, b| a.median.total_cmp(&b.median));
        rounds[rounds.len() / 2].clone()
    }

    fn row(&self, task: &str, ours: &Report) -> String {
        let Report { library, median, cpu, first, check } = self;
        // Where the system does not tell, it is zero.
        let ratio = |theirs: f64, ours: f64| if ours > 0.0 { format!("{:.2}", theirs / ours) } else { "?".into() };
        let (time, processor) = (ratio(*median, ours.median), ratio(*cpu, ours.cpu));
        format!(
            "| {task} | {library} | {:.2} ms | {:.2} ms | {first:.2} s | {check:.4} | {time} | {processor} |",
            median * 1e3,
            cpu * 1e3
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(median: f64) -> Report {
        let line = format!(
            r#"{{"library": "a", "offered": true, "median_s": {median}, "cpu_s": 1.0, "first_s": 2.0, "check": 4.2}}"#
        );
        Report::parse(&line).unwrap().unwrap()
    }

    #[test]
    fn reports_are_read_and_compared() {
        let rounds = [report(3.0), report(1.0), report(2.0)];
        let middle = Report::middle(&rounds);
        assert_eq!(middle.median, 2.0);
        assert!(rounds[0].row("t", &rounds[1]).ends_with("| 3.00 | 1.00 |"), "{}", rounds[0].row("t", &rounds[1]));
        assert_eq!(Report::parse(r#"{"library": "b", "offered": false}"#), Ok(None));
        assert!(Report::parse("thread panicked").unwrap_err().contains("panicked"));
        assert!(Report::parse(r#"{"offered": true}"#).unwrap_err().contains("median_s"));
    }

    #[test]
    fn options_name_what_is_wrong() {
        let parse = |args: &[&str]| Options::parse(&args.iter().map(|a| a.to_string()).collect::<Vec<_>>());
        assert_eq!(parse(&[]).unwrap().tasks.len(), TASKS.len());
        let Options { tasks, seconds, rounds } = parse(&["smollm2-32", "--seconds", "0.5", "--rounds", "1"]).unwrap();
        assert_eq!((tasks, seconds, rounds), (vec!["smollm2-32".into()], 0.5, 1));
        assert!(parse(&["--rounds", "0"]).unwrap_err().contains("`0`"));
        assert!(parse(&["--seconds", "x"]).unwrap_err().contains("`x`"));
        assert!(parse(&["--fast"]).unwrap_err().contains("--fast"));
    }
}
