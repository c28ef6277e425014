//! Prints the plan of a training step before anything is allocated: nodes, kernels, buffers, bytes.
//!
//! `cargo run --example plan -- --layers 6 --dim 384 --heads 6 --context 256 --batch 4`

mod shape;

use clap::Parser;
use shape::Shape;
use throughline::nn::Transformer;
use throughline::{AdapterClass, Graph, Plan, Profile, Value};

#[derive(Parser)]
#[command(about = "Prints the plan of a GPT's training step; needs no GPU")]
struct Flags {
    #[command(flatten)]
    shape: Shape,
    /// Plan for a software adapter
    #[arg(long)]
    cpu: bool,
}

fn main() -> anyhow::Result<()> {
    let f = Flags::parse();
    let class = if f.cpu { AdapterClass::Cpu } else { AdapterClass::Gpu };
    let profile = Profile::portable(class);
    let mut g = Graph::with_max_tensor_bytes(profile.max_tensor_bytes());
    let gpt = Transformer::build(&mut g, &f.shape.config(), f.shape.batch, f.shape.context, true)?;
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let params: Vec<Value> = gpt.params.iter().map(|p| p.value).collect();
    let gradients = g.gradients(loss, &params)?;
    let wanted: Vec<Value> = gradients.into_iter().chain([loss]).collect();
    println!("{}", Plan::new(&g, &wanted, &profile)?);
    Ok(())
}
