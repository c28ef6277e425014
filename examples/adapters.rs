//! Prints the adapter that throughline would use and what its self-test found, and exits with 1 if there is none.
//!
//! `cargo run --example adapters`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use throughline::{Cooperative, Gpu};

#[derive(clap::Parser)]
#[command(about = "Print the adapter that throughline would use")]
struct Flags {}

fn main() -> std::process::ExitCode {
    cli::main(|_: Flags| {
        let gpu = Gpu::headless_blocking()?;
        let p = gpu.profile();
        println!("{}: {:?} kernels, bindings up to {} MiB", gpu.describe(), p.class, p.max_binding_bytes >> 20);
        // Cooperative matrices are opted in to, so a device that has them is another one.
        let matrices = |kind| Some((kind, Gpu::headless_cooperative_blocking(kind).ok()?));
        let with_matrices: Vec<(Cooperative, Gpu)> = Cooperative::ALL.into_iter().filter_map(matrices).collect();
        match p.subgroups {
            Some([min, max]) if min == max => println!("subgroups of {min} lanes"),
            Some([min, max]) => println!("subgroups of {min} to {max} lanes"),
            None => println!("no subgroup operations"),
        }
        for (kind, gpu) in &with_matrices {
            if gpu.profile().cooperative.is_some() {
                println!("cooperative matrices of {kind:?}, on request");
            }
        }
        for test in std::iter::once(&gpu).chain(with_matrices.iter().map(|(_, gpu)| gpu)).filter_map(Gpu::tested) {
            if test.compiles_only {
                println!("the driver compiles kernels and does not run them: every result is zero");
            }
            if let Some(size) = test.subgroup_size {
                println!("a workgroup of 256 runs in subgroups of {size} lanes");
            }
            test.dropped.iter().for_each(|dropped| println!("not used: {dropped}"));
        }
        Ok(())
    })
}
