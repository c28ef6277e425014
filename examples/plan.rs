//! Prints the plan of a training step without a device: nodes, kernels, buffers, bytes, and the limits and features
//! that a device must offer. If the plan does not fit, the error names a batch or context that would.
//!
//! `cargo run --example plan -- --layers 6 --dim 384 --heads 6 --context 256 --batch 4`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/precision.rs"]
mod precision;
#[path = "shared/shape.rs"]
mod shape;

use std::time::Instant;

use clap::{Parser, ValueEnum};
use precision::PrecisionFlag;
use shape::Shape;
use throughline::optim::Schedule;
use throughline::train::{TrainConfig, TrainOptions, TrainPlan};
use throughline::{AdapterClass, Profile, Requirements};

#[derive(Parser)]
#[command(about = "Print the plan for training a GPT, and what it requires of a device; needs no GPU")]
struct Flags {
    #[command(flatten)]
    shape: Shape,
    /// Micro-batches per step
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Plan for a software adapter
    #[arg(long)]
    cpu: bool,
    /// Largest binding of the device, in bytes [default: WebGPU's guaranteed limit]
    #[arg(long)]
    max_binding: Option<u64>,
    /// Largest buffer of the device, in bytes [default: WebGPU's guaranteed limit]
    #[arg(long)]
    max_buffer: Option<u64>,
    /// GPU memory that training may use, in bytes: what does not fit is computed twice
    #[arg(long)]
    max_bytes: Option<u64>,
    /// Keep all that backward needs, rather than compute activations and results of norms twice
    #[arg(long)]
    keep: bool,
    /// How activations and gradients are stored
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionFlag,
    /// Omit the table of nodes and buffers
    #[arg(long)]
    brief: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(f: Flags) -> anyhow::Result<()> {
    let portable = Profile::portable(if f.cpu { AdapterClass::Cpu } else { AdapterClass::Gpu });
    let profile = Profile {
        max_binding_bytes: f.max_binding.unwrap_or(portable.max_binding_bytes),
        max_buffer_bytes: f.max_buffer.unwrap_or(portable.max_buffer_bytes),
        ..portable
    };
    let config = TrainConfig {
        micro_batches: f.micro_batches,
        schedule: Schedule::constant(1e-3),
        precision: f.precision.into(),
        ..TrainConfig::new(f.shape.config(), f.shape.batch)
    };
    let options = TrainOptions { max_bytes: f.max_bytes, recompute: !f.keep, ..TrainOptions::default() };
    let start = Instant::now();
    let plan = TrainPlan::new(&config, &options, &profile)?;
    eprintln!("{:.1?}", start.elapsed());

    let [forward_backward, evaluation, update] = plan.plans();
    if !f.brief {
        println!("{forward_backward}");
    }
    let dispatches = [forward_backward, evaluation, update].map(|plan| plan.dispatches());
    println!("dispatches in forward and backward, evaluation, and update: {dispatches:?}");
    println!("{}", plan.recomputed());
    println!("{} parameters in {} buffers", plan.parameter_count(), plan.layout().parts.len());
    println!("{} bytes, including gradients, moments, activations and evaluation", plan.bytes());
    for other in PrecisionFlag::value_variants().iter().filter(|other| **other != f.precision) {
        let other = (TrainConfig { precision: (*other).into(), ..config.clone() }, other);
        match TrainPlan::new(&other.0, &options, &profile) {
            Ok(plan) => println!("with --precision {}: {} bytes", name(*other.1), plan.bytes()),
            Err(e) => println!("with --precision {}: {e}", name(*other.1)),
        }
    }
    let needs = plan.requirements();
    println!("required: bindings of {} bytes, buffers of {} bytes", needs.binding_bytes, needs.buffer_bytes);
    println!("required: {} storage buffers, {} workgroups", needs.storage_buffers, needs.workgroups);
    for limit in needs.missing(&wgpu::Limits::default()) {
        println!("above wgpu's default: {} must be {}, not {}", limit.what, limit.needed, limit.allowed);
    }
    let names = |features: wgpu::Features| features.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    println!("required features: {}", if needs.features.is_empty() { "none".into() } else { names(needs.features) });
    for (feature, why) in Requirements::USEFUL_FEATURES {
        println!("useful feature: {}: {why}", names(feature));
    }
    Ok(())
}

/// The flag's value.
fn name(precision: PrecisionFlag) -> String {
    precision.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
}
