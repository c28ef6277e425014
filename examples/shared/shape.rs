//! Flags for the size of a GPT and its batches.

use clap::Args;
use throughline::nn::TransformerConfig;

#[derive(Args)]
pub struct Shape {
    /// Vocabulary size
    #[arg(long, default_value_t = 65)]
    pub vocab: usize,
    /// Number of blocks
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 128)]
    pub dim: usize,
    /// Attention heads per block
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Sequence length in tokens
    #[arg(long, default_value_t = 64)]
    pub context: usize,
    /// Sequences per micro-batch
    #[arg(long, default_value_t = 12)]
    pub batch: usize,
    /// Use Llama's parts (RMSNorm, RoPE, SwiGLU) instead of GPT-2's
    #[arg(long)]
    pub llama: bool,
}

impl Shape {
    pub fn config(&self) -> TransformerConfig {
        let parts = if self.llama { TransformerConfig::llama } else { TransformerConfig::gpt2 };
        parts(self.vocab, self.context, self.layers, self.dim, self.heads)
    }
}
