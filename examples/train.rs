//! Trains a character-level GPT on a text.
//!
//! `cargo run --release --example train -- --text FILE --out DIR`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/training.rs"]
mod training;

use clap::Parser;

#[derive(Parser)]
#[command(about = "Train a character-level GPT on a text, on any GPU")]
struct Flags {
    #[command(flatten)]
    train: training::TrainFlags,
    /// Print a JSON summary as the last line
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let outcome = training::run(&flags.train)?;
    let out = flags.train.out_dir();
    if outcome.interrupted {
        eprintln!("stopped at step {}; go on with --resume {}", outcome.summary.steps, out.display());
    } else {
        println!("{}", outcome.sample);
    }
    eprintln!("checkpoint: {}", training::checkpoint_path(&out).display());
    if flags.json {
        println!("{}", serde_json::to_string(&outcome.summary)?);
    }
    Ok(())
}
