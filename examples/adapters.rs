//! Prints the adapter that throughline would use, and exits with 1 if there is none.
//!
//! `cargo run --example adapters`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use throughline::Gpu;

#[derive(clap::Parser)]
#[command(about = "Print the adapter that throughline would use")]
struct Flags {}

fn main() -> std::process::ExitCode {
    cli::main(|_: Flags| {
        let gpu = Gpu::headless_blocking()?;
        let p = gpu.profile();
        println!("{}: {:?} kernels, bindings up to {} MiB", gpu.describe(), p.class, p.max_binding_bytes >> 20);
        Ok(())
    })
}
