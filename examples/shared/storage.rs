//! How programs that decode store keys, values and activations.

use clap::{Args, ValueEnum};
use throughline::DType;
use throughline::decode::DecodeOptions;

#[derive(Args, Clone, Copy)]
pub struct Storage {
    /// How keys and values of earlier tokens are stored: f16 has room for twice the context in the same memory
    #[arg(long, default_value = "f32", value_enum)]
    cache: Floats,
    /// How passes over a prompt store their activations: f16 takes half the memory
    #[arg(long, default_value = "f32", value_enum)]
    prompts: Floats,
}

#[derive(Clone, Copy, ValueEnum)]
enum Floats {
    F32,
    F16,
}

impl Storage {
    /// Options for one sequence of this many tokens.
    pub fn options(self, capacity: usize) -> DecodeOptions<'static> {
        let [cache, prompts] = [self.cache, self.prompts].map(|floats| match floats {
            Floats::F32 => DType::F32,
            Floats::F16 => DType::F16,
        });
        DecodeOptions { cache, prompts, ..DecodeOptions::new(capacity) }
    }
}
