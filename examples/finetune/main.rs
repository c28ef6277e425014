//! Fine-tunes a pretrained model on your own chats, completions or texts.
//!
//! By default it trains a low-rank adapter (LoRA) beside the weights, which stay in the few bits of their file, and
//! writes it as Hugging Face's `peft` does. With `--lora-rank 0` it trains all weights in f32. `--export` writes a whole
//! model that other programs load.
//!
//! `cargo run --release --example finetune -- --model FILE.gguf --data chats.jsonl --out FOLDER`
//! `cargo run --release --example finetune -- --model FILE.gguf --data chats.jsonl --dry-run`

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
mod flags;
#[path = "../shared/precision.rs"]
mod precision;
mod run;

use std::process::ExitCode;

use flags::Flags;
use throughline::Gpu;

fn main() -> ExitCode {
    cli::main(start)
}

fn start(flags: Flags) -> anyhow::Result<()> {
    flags.check()?;
    let job = flags.job()?;
    eprintln!("training: {}", job.batches.stats());
    match &job.validation {
        Some(validation) => eprintln!("validation: {}", validation.stats()),
        None => eprintln!("validation: none"),
    }
    if flags.dry_run {
        return run::dry_run(&job, &flags);
    }
    run::train(Gpu::headless_blocking()?, job, &flags)
}
