//! Prints the plan of a training step before anything is allocated: nodes, kernels, buffers, bytes.
//!
//! `cargo run --example plan -- --layers 6 --dim 384 --heads 6 --context 256 --batch 4`

use clap::Parser;
use throughline::nn::{Gpt, GptConfig};
use throughline::{AdapterClass, Graph, Plan, Profile, Value};

#[derive(Parser)]
#[command(about = "Prints the plan of a GPT's training step; needs no GPU")]
struct Flags {
    #[arg(long, default_value_t = 65)]
    vocab: usize,
    #[arg(long, default_value_t = 2)]
    layers: usize,
    #[arg(long, default_value_t = 128)]
    dim: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 64)]
    context: usize,
    #[arg(long, default_value_t = 12)]
    batch: usize,
    /// RMSNorm, RoPE and SwiGLU in place of GPT-2's parts
    #[arg(long)]
    llama: bool,
    /// Plan for a software adapter
    #[arg(long)]
    cpu: bool,
}

fn main() -> anyhow::Result<()> {
    let f = Flags::parse();
    let parts = if f.llama { GptConfig::llama } else { GptConfig::gpt2 };
    let config = parts(f.vocab, f.context, f.layers, f.dim, f.heads);
    let mut g = Graph::new();
    let gpt = Gpt::build(&mut g, &config, f.batch, f.context, true)?;
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let params: Vec<Value> = gpt.params.iter().map(|p| p.value).collect();
    let gradients = g.gradients(loss, &params)?;
    let wanted: Vec<Value> = gradients.into_iter().chain([loss]).collect();
    let class = if f.cpu { AdapterClass::Cpu } else { AdapterClass::Gpu };
    println!("{}", Plan::new(&g, &wanted, &Profile::portable(class))?);
    Ok(())
}
