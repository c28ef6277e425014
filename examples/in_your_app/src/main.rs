//! Draws a picture in a window while a network learns it, with one device and one submit per frame.
//!
//! `cargo run --release -p in_your_app --features window`
//! `cargo run --release -p in_your_app -- --headless --frames 300 --out DIR`

#[macro_use]
#[path = "../../shared/cli.rs"]
mod cli;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use in_your_app::headless::{self, Headless};
use in_your_app::{Options, Picture};

#[derive(Parser)]
#[command(about = "Draw a picture while a network learns it: one device, one submit per frame, no readback")]
struct Flags {
    /// PNG file to learn [default: a built-in picture]
    #[arg(long)]
    image: Option<PathBuf>,
    /// Scale the picture down to this many pixels on its longer side. Every pixel is in every training step
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// GPU time that training may take per frame, in microseconds. A frame records at least one kernel
    #[arg(long, default_value_t = 4000)]
    budget_us: u64,
    /// Draw into PNG files instead of a window, and print the results as JSON on the last line
    #[arg(long, requires = "out")]
    headless: bool,
    /// Frames with training; the same number of frames without comes first, for comparison
    #[arg(long, default_value_t = 300, requires = "headless", value_parser = clap::value_parser!(u32).range(1..))]
    frames: u32,
    /// Write one frame out of this many, and the last
    #[arg(long, default_value_t = 1, requires = "headless", value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// Folder for the PNG files
    #[arg(long, requires = "headless")]
    out: Option<PathBuf>,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    Picture::check_size(flags.size)?;
    let picture = match &flags.image {
        Some(path) => Picture::open(path, flags.size)?,
        None => Picture::shapes(flags.size),
    };
    let options = Options { picture, budget: Duration::from_micros(flags.budget_us) };
    match (flags.headless, flags.out) {
        (true, Some(out)) => {
            let headless = Headless { frames: flags.frames as usize, every: flags.every as usize, out };
            println!("{}", serde_json::to_string(&headless::run(&options, &headless)?)?);
            Ok(())
        }
        _ => show(options),
    }
}

#[cfg(feature = "window")]
fn show(options: Options) -> Result<()> {
    println!("{}", serde_json::to_string(&in_your_app::window::run(options)?)?);
    Ok(())
}

#[cfg(not(feature = "window"))]
fn show(_: Options) -> Result<()> {
    anyhow::bail!(
        "this program was built without a window; build it with --features window, or use --headless --out DIR"
    )
}
