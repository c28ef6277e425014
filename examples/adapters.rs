//! Prints the adapter that throughline would use, and exits with 1 if there is none.
//!
//! `cargo run --example adapters`

use throughline::Gpu;

fn main() -> std::process::ExitCode {
    match Gpu::headless_blocking() {
        Ok(gpu) => {
            let p = gpu.profile();
            println!("{}: {:?} kernels, bindings up to {} MiB", gpu.describe(), p.class, p.max_binding_bytes >> 20);
            std::process::ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            std::process::ExitCode::FAILURE
        }
    }
}
