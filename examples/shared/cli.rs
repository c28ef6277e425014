//! Shared by all examples: flags, and how a program ends.
#![allow(dead_code, unused_macros)] // each example uses a part

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::error::ErrorKind;
use clap::{Command, Parser};

/// As in the standard library, but a reader that hangs up, such as `head`, ends the program without a message.
macro_rules! print {
    ($($text:tt)*) => {
        if let Err(error) = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!($($text)*)) {
            $crate::cli::stop_printing(&error)
        }
    };
}

/// See `print`.
macro_rules! println {
    () => { print!("\n") };
    ($($text:tt)*) => { print!("{}\n", format_args!($($text)*)) };
}

pub fn stop_printing(error: &std::io::Error) -> ! {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    eprintln!("error: writing to the standard output: {error}");
    std::process::exit(1)
}

/// The flags of an example whose result is a picture.
#[derive(Parser)]
#[command(about = "Draw what the example is about")]
pub struct Picture {
    /// SVG file to draw to
    #[arg(long, default_value = "picture.svg", value_parser = writable)]
    pub out: PathBuf,
}

/// A file for the result of long work, which could be written by now.
fn writable(file: &str) -> Result<PathBuf> {
    let file = PathBuf::from(file);
    check_output(Some(&file))?;
    Ok(file)
}

/// Reads the flags and runs the program. If either fails, one line says why, and the exit code is 1.
pub fn main<F: Parser>(run: impl FnOnce(F) -> Result<()>) -> ExitCode {
    let outcome = match flags(std::env::args_os()) {
        Ok(Some(flags)) => run(flags),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes.
fn line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors have their cause in their own text.
        if !text.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Checks before long work that its result can be written to a file.
pub fn check_output(file: Option<&Path>) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    ensure!(!file.is_dir(), "{} is a folder; name a file to write to", file.display());
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "{} cannot be written: there is no folder {}", file.display(), folder.display());
    Ok(())
}

/// The flags, or none if the user asked for help and got it.
fn flags<F: Parser>(args: impl Iterator<Item = OsString>) -> Result<Option<F>> {
    let mut command = F::command();
    command.build();
    let args = with_values(&command, args)?;
    let error = match F::try_parse_from(args) {
        Ok(flags) => return Ok(Some(flags)),
        Err(error) => error,
    };
    let text = error.render().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        print!("{text}");
        return Ok(None);
    }
    // Only what is wrong, without the usage.
    let paragraphs = text.split("\n\n").take_while(|part| !part.starts_with("Usage:") && !part.starts_with("For more"));
    let lines = paragraphs.map(|part| part.lines().map(str::trim).collect::<Vec<_>>().join(" "));
    let text = lines.collect::<Vec<_>>().join("; ");
    anyhow::bail!("{}; --help lists the flags", text.trim_start_matches("error: "))
}

/// Ties values to their flags, as in `--flag=value`, because a value may look like a flag: `--prompt "--- 1 ---"`. A
/// flag's first value can be anything but a flag of this program; further ones must not look like `--word`.
fn with_values(command: &Command, mut args: impl Iterator<Item = OsString>) -> Result<Vec<OsString>> {
    // Whether a flag takes values, and several.
    let known: BTreeMap<String, (bool, bool)> = command
        .get_arguments()
        .filter_map(|arg| {
            let several = arg.get_num_args().is_some_and(|number| number.max_values() > 1);
            Some((format!("--{}", arg.get_long()?), (arg.get_action().takes_values(), several)))
        })
        .collect();
    let name = |arg: &OsStr| arg.to_str().map(|arg| arg.split('=').next().unwrap_or(arg).to_string());
    let is_flag = |arg: &OsString| name(arg).is_some_and(|name| known.contains_key(&name));
    let looks_like_flag = |arg: &OsString| {
        let word = name(arg).and_then(|name| name.strip_prefix("--").map(String::from));
        word.is_some_and(|word| word.starts_with(|c: char| c.is_alphabetic()) && !word.contains(char::is_whitespace))
    };
    let mut tied: Vec<OsString> = args.next().into_iter().collect();
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        let Some(&(true, several)) = arg.to_str().and_then(|arg| known.get(arg)) else {
            let ends_flags = arg == "--";
            tied.push(arg);
            if ends_flags {
                tied.extend(args.by_ref());
            }
            continue;
        };
        let tie = |value: OsString| [arg.as_os_str(), OsStr::new("="), &value].into_iter().collect::<OsString>();
        let value = args.next_if(|value| !is_flag(value));
        tied.push(tie(value.with_context(|| format!("{} needs a value", arg.display()))?));
        while let Some(value) = args.next_if(|value| several && !is_flag(value) && !looks_like_flag(value)) {
            tied.push(tie(value));
        }
    }
    Ok(tied)
}
