//! Draws a picture in a window while a network learns it, on one device and in one submit a frame.
//!
//! `cargo run --release -p embed_in_app --features window`
//! `cargo run --release -p embed_in_app -- --headless --frames 300 --out DIR`

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use embed_in_app::headless::{self, Headless};
use embed_in_app::{Options, Picture};

#[derive(Parser)]
#[command(about = "An app that draws a picture while a network learns it: one device, one submit a frame, no readback")]
struct Flags {
    /// A PNG file to learn [a picture made here]
    #[arg(long)]
    image: Option<PathBuf>,
    /// Pixels of the picture's longer side, all of them in every step; a file with fewer stays as it is
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// GPU time that training may take of a frame, in microseconds. One kernel is the least that a frame records
    #[arg(long, default_value_t = 4000)]
    budget_us: u64,
    /// No window: frames go into PNG files, and figures are the last line, as JSON
    #[arg(long, requires = "out")]
    headless: bool,
    /// Frames to draw with training; as many come before without
    #[arg(long, default_value_t = 300, requires = "headless", value_parser = clap::value_parser!(u32).range(1..))]
    frames: u32,
    /// Write every so-manieth frame, and the last
    #[arg(long, default_value_t = 1, requires = "headless", value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// Folder of the PNG files
    #[arg(long, requires = "headless")]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
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
    println!("{}", serde_json::to_string(&embed_in_app::window::run(options)?)?);
    Ok(())
}

#[cfg(not(feature = "window"))]
fn show(_: Options) -> Result<()> {
    anyhow::bail!(
        "this is built without a window: build it with --features window, or draw into files with --headless --out DIR"
    )
}
