//! Prints docs/ops.md from the op table.
//!
//! `cargo run --example op_table > docs/ops.md`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use throughline::ops::TABLE;

#[derive(clap::Parser)]
#[command(about = "Print docs/ops.md from the op table")]
struct Flags {}

fn main() -> std::process::ExitCode {
    cli::main(|_: Flags| {
        print!("{}", throughline::ops::markdown(TABLE));
        Ok(())
    })
}
