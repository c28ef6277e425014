//! Flags for the shape of a GPT and its batches.

use clap::Args;
use throughline::nn::TransformerConfig;

#[derive(Args)]
pub struct Shape {
    #[arg(long, default_value_t = 65)]
    pub vocab: usize,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    #[arg(long, default_value_t = 128)]
    pub dim: usize,
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    #[arg(long, default_value_t = 64)]
    pub context: usize,
    #[arg(long, default_value_t = 12)]
    pub batch: usize,
    /// RMSNorm, RoPE and SwiGLU in place of GPT-2's parts
    #[arg(long)]
    pub llama: bool,
}

impl Shape {
    pub fn config(&self) -> TransformerConfig {
        let parts = if self.llama { TransformerConfig::llama } else { TransformerConfig::gpt2 };
        parts(self.vocab, self.context, self.layers, self.dim, self.heads)
    }
}
