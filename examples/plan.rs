//! Prints the plan of training before there is a device: nodes, kernels, buffers, bytes, and what a device must offer.
//! What does not fit says what would.
//!
//! `cargo run --example plan -- --layers 6 --dim 384 --heads 6 --context 256 --batch 4`

mod shape;

use std::time::Instant;

use clap::Parser;
use shape::Shape;
use throughline::optim::Schedule;
use throughline::train::{TrainConfig, TrainOptions, TrainPlan};
use throughline::{AdapterClass, Profile, Requirements};

#[derive(Parser)]
#[command(about = "Prints the plan of a GPT's training and what it needs of a device; needs no GPU")]
struct Flags {
    #[command(flatten)]
    shape: Shape,
    /// Micro-batches of a step
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Plan for a software adapter
    #[arg(long)]
    cpu: bool,
    /// Bytes that a binding of the device covers at most; by default what WebGPU promises
    #[arg(long)]
    max_binding: Option<u64>,
    /// Bytes of the device's largest buffer; by default what WebGPU promises
    #[arg(long)]
    max_buffer: Option<u64>,
    /// Bytes of GPU memory that training may take
    #[arg(long)]
    max_bytes: Option<u64>,
    /// Leave the table of nodes and buffers out
    #[arg(long)]
    brief: bool,
}

fn main() -> anyhow::Result<()> {
    let f = Flags::parse();
    let portable = Profile::portable(if f.cpu { AdapterClass::Cpu } else { AdapterClass::Gpu });
    let profile = Profile {
        max_binding_bytes: f.max_binding.unwrap_or(portable.max_binding_bytes),
        max_buffer_bytes: f.max_buffer.unwrap_or(portable.max_buffer_bytes),
        ..portable
    };
    let config = TrainConfig {
        micro_batches: f.micro_batches,
        schedule: Schedule::constant(1e-3),
        ..TrainConfig::new(f.shape.config(), f.shape.batch)
    };
    let options = TrainOptions { max_bytes: f.max_bytes, ..TrainOptions::default() };
    let start = Instant::now();
    let plan = TrainPlan::new(&config, &options, &profile);
    eprintln!("{:.1?}", start.elapsed());
    let plan = plan?;

    let [forward_backward, evaluation, update] = plan.plans();
    if !f.brief {
        println!("{forward_backward}");
    }
    let dispatches = [forward_backward, evaluation, update].map(|plan| plan.dispatches());
    println!("dispatches of forward and backward, evaluation, update: {dispatches:?}");
    println!("{} parameters in {} buffers", plan.parameter_count(), plan.layout().parts.len());
    println!("{} bytes with gradients, moments, activations and evaluation", plan.bytes());
    let needs = plan.requirements();
    println!("needed: bindings of {} bytes, buffers of {} bytes", needs.binding_bytes, needs.buffer_bytes);
    println!("needed: {} storage buffers, {} workgroups", needs.storage_buffers, needs.workgroups);
    for limit in needs.missing(&wgpu::Limits::default()) {
        println!("more than by default: {} must be {}, not {}", limit.what, limit.needed, limit.allowed);
    }
    let names = |features: wgpu::Features| features.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    println!("needed features: {}", if needs.features.is_empty() { "none".into() } else { names(needs.features) });
    for (feature, why) in Requirements::USEFUL_FEATURES {
        println!("useful feature: {}: {why}", names(feature));
    }
    Ok(())
}
