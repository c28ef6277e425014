//! Prints the adapter that throughline would use and what its self-test found, and exits with 1 if there is none.
//!
//! `cargo run --example adapters`
//! `cargo run --example adapters -- --json`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::collections::BTreeSet;

use throughline::device::SelfTest;
use throughline::{Cooperative, Gpu, wgpu};

#[derive(clap::Parser)]
#[command(about = "Print the adapter that throughline would use")]
struct Flags {
    /// Print the facts as one line of JSON
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(|flags: Flags| {
        let gpu = Gpu::headless_blocking()?;
        let p = gpu.profile();
        // Cooperative matrices are opted in to, so a device that has them is another one.
        let matrices = |kind| Some((kind, Gpu::headless_cooperative_blocking(kind).ok()?));
        let with_matrices: Vec<(Cooperative, Gpu)> = Cooperative::ALL.into_iter().filter_map(matrices).collect();
        if flags.json {
            println!("{}", json(&gpu, &with_matrices));
            return Ok(());
        }
        println!("{}: {:?} kernels, bindings up to {} MiB", gpu.describe(), p.class, p.max_binding_bytes >> 20);
        match p.subgroups {
            Some([min, max]) if min == max => println!("subgroups of {min} lanes"),
            Some([min, max]) => println!("subgroups of {min} to {max} lanes"),
            None => println!("no subgroup operations"),
        }
        println!("{}", if p.shader_f16 { "16-bit floats in shaders" } else { "no 16-bit floats in shaders" });
        for (kind, gpu) in &with_matrices {
            if gpu.profile().cooperative.is_some() {
                println!("cooperative matrices of {kind:?}, on request");
            }
        }
        for test in tests(&gpu, &with_matrices) {
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

/// The self-tests of the device, and of those with cooperative matrices.
fn tests<'a>(gpu: &'a Gpu, with_matrices: &'a [(Cooperative, Gpu)]) -> impl Iterator<Item = &'a SelfTest> {
    std::iter::once(gpu).chain(with_matrices.iter().map(|(_, gpu)| gpu)).filter_map(Gpu::tested)
}

fn json(gpu: &Gpu, with_matrices: &[(Cooperative, Gpu)]) -> serde_json::Value {
    let (p, info) = (gpu.profile(), gpu.info());
    let usable = with_matrices.iter().filter(|(_, gpu)| gpu.profile().cooperative.is_some());
    let dropped: BTreeSet<String> =
        tests(gpu, with_matrices).flat_map(|test| &test.dropped).map(ToString::to_string).collect();
    serde_json::json!({
        "name": info.name,
        "type": format!("{:?}", info.device_type),
        "vendor_id": info.vendor,
        "device_id": info.device,
        "backend": format!("{:?}", info.backend),
        "driver": info.driver,
        "driver_info": info.driver_info,
        "kernels": format!("{:?}", p.class),
        "max_binding_bytes": p.max_binding_bytes,
        "max_buffer_bytes": p.max_buffer_bytes,
        "max_workgroups": p.max_workgroups,
        "max_storage_buffers": p.max_storage_buffers,
        "max_invocations": p.max_invocations,
        "max_workgroup_bytes": p.max_workgroup_bytes,
        "units": p.units,
        "subgroups": p.subgroups,
        "subgroup_size": gpu.tested().and_then(|test| test.subgroup_size),
        "shader_f16": p.shader_f16,
        "cooperative_matrices": usable.map(|(kind, _)| format!("{kind:?}")).collect::<Vec<_>>(),
        "slow_strides": p.quirks.slow_strides,
        "loops_end_early": p.quirks.loops_end_early,
        "timestamps": gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY),
        "compiles_only": tests(gpu, with_matrices).any(|test| test.compiles_only),
        "dropped": dropped,
    })
}
