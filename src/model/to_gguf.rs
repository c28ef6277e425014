//! The metadata of a GGUF file, written: the counterpart of `gguf`, which reads it.

use super::gguf::LLAMA_3_CONTEXT;
use super::names::{self, Names};
use crate::error::{Error, Result};
use crate::format::{Metadata, Stored};
use crate::nn::{Biases, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
use crate::ops::rope::Scaling;

/// How a GGUF file has a model.
pub(super) struct Described {
    pub metadata: Metadata,
    pub names: &'static Names,
    /// Whether the rows of q and k are in another order than the model's: it rotates halves of a head, and such files
    /// neighbours.
    pub permuted: bool,
    /// The divisor of each frequency, where the file has them instead of a rule: `rope_freqs.weight`.
    pub frequencies: Option<Vec<f32>>,
}

/// The metadata and the names for a model of this configuration, without its tokenizer. The error names what no
/// architecture of llama.cpp that this crate reads has.
pub(super) fn write(c: &TransformerConfig) -> Result<Described> {
    let none = |field: &'static str, message: &str| Err(Error::config(field, message));
    let pre_norm_decoder = c.norm_placement == NormPlacement::Pre && !c.bidirectional && !c.embed_norm;
    if !pre_norm_decoder || c.token_types > 0 || c.residual_gate.is_some() {
        return none("norm_placement", "only pre-norm decoders without gates can be written as a GGUF file");
    }
    match (c.norm, c.positions, c.mlp) {
        (Norm::LayerNorm, Positions::Learned, Mlp::GeluTanh) => {
            let usual = c.n_kv_heads == c.n_heads && c.head_dim() * c.n_heads == c.d_model;
            if c.biases != Biases::ALL || c.qk_norm || !usual {
                return none(
                    "biases",
                    "expected all parts of GPT-2, which is the only such model that GGUF files have",
                );
            }
            let metadata = common(c, "gpt2", "attention.layer_norm_epsilon");
            Ok(Described { metadata, names: &names::GGUF_GPT2, permuted: false, frequencies: None })
        }
        (Norm::RmsNorm, Positions::Rope { theta, interleaved, scaling }, Mlp::SwiGlu) => {
            let arch = match (c.qk_norm, c.biases) {
                (true, Biases::NONE) => "qwen3",
                (false, Biases::QKV) => "qwen2",
                (false, _) => "llama",
                (true, _) => return none("biases", "GGUF files have no model with these and norms of q and k"),
            };
            if interleaved && arch != "llama" {
                return none("positions", "GGUF files have no such model that rotates neighbours");
            }
            let mut metadata = common(c, arch, "attention.layer_norm_rms_epsilon");
            let key = |name: &str| format!("{arch}.{name}");
            metadata.set(key("rope.dimension_count"), c.head_dim() as u32);
            metadata.set(key("rope.freq_base"), theta);
            let frequencies = rope_scaling(&mut metadata, arch, scaling, theta, c.head_dim())?;
            let permuted = arch == "llama" && !interleaved;
            Ok(Described { metadata, names: &names::GGUF, permuted, frequencies })
        }
        _ => none(
            "norm",
            "expected the parts of GPT-2 (LayerNorm, learned positions, GELU by tanh, biases) or of Llama \
             (RMSNorm, RoPE, SwiGLU): GGUF files have no architecture with others that this crate reads",
        ),
    }
}

fn common(c: &TransformerConfig, arch: &str, eps: &str) -> Metadata {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", arch);
    metadata.set("general.type", "model");
    for (name, count) in [
        ("vocab_size", c.vocab_size),
        ("context_length", c.context),
        ("embedding_length", c.d_model),
        ("block_count", c.n_layers),
        ("feed_forward_length", c.d_ff),
        ("attention.head_count", c.n_heads),
        ("attention.head_count_kv", c.n_kv_heads),
    ] {
        metadata.set(format!("{arch}.{name}"), count as u32);
    }
    for name in ["attention.key_length", "attention.value_length"] {
        if let Some(head_dim) = c.head_dim {
            metadata.set(format!("{arch}.{name}"), head_dim as u32);
        }
    }
    metadata.set(format!("{arch}.{eps}"), c.norm_eps);
    metadata
}

/// Adds the scaling of RoPE. Returns the divisors of the frequencies, if the file is to have those instead.
fn rope_scaling(
    metadata: &mut Metadata,
    arch: &str,
    scaling: Scaling,
    theta: f32,
    head_dim: usize,
) -> Result<Option<Vec<f32>>> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    match scaling {
        Scaling::None => {}
        Scaling::Linear { factor } => {
            metadata.set(key("type"), "linear");
            metadata.set(key("factor"), factor);
        }
        Scaling::Llama3 { .. } if arch != "llama" => {
            let message = format!("GGUF files of {arch} have no scaling by the rule of Llama 3.1");
            return Err(Error::config("positions", message));
        }
        Scaling::Llama3 { original_context, .. } => {
            // Readers take the divisors. This crate also looks for the rule that gave them.
            if original_context != LLAMA_3_CONTEXT {
                metadata.set(key("original_context_length"), original_context as u32);
            }
            return Ok(Some(scaling.divisors(theta, head_dim).into_iter().map(|d| d as f32).collect()));
        }
        Scaling::Yarn { truncate: false, .. } => {
            return Err(Error::config("positions", "GGUF files have no YaRN between fractions of pairs"));
        }
        Scaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
            metadata.set(key("type"), "yarn");
            metadata.set(key("factor"), factor);
            metadata.set(key("original_context_length"), original_context as u32);
            metadata.set(key("yarn_beta_fast"), beta_fast);
            metadata.set(key("yarn_beta_slow"), beta_slow);
            if let Some(given) = attention_factor {
                let usual = Scaling::Yarn {
                    factor,
                    original_context,
                    beta_fast,
                    beta_slow,
                    truncate: true,
                    attention_factor: None,
                };
                metadata.set(key("attn_factor"), given / usual.attention_factor());
            }
        }
    }
    Ok(None)
}

/// Sets what the file says of its types: the number that llama.cpp has for a file of mostly this one (`llama_ftype` in
/// `llama.h`).
pub(super) fn set_file_type(metadata: &mut Metadata, stored: Stored) {
    let number: u32 = match stored {
        Stored::F32 => 0,
        Stored::F16 => 1,
        Stored::Q4_0 => 2,
        Stored::Q4_1 => 3,
        Stored::Q8_0 => 7,
        Stored::Q5_0 => 8,
        Stored::Q5_1 => 9,
        // All matrices of one type are its S: M has some of another.
        Stored::Q4_K => 14,
        Stored::Q5_K => 16,
        Stored::Q6_K => 18,
        Stored::BF16 => 32,
    };
    metadata.set("general.file_type", number);
    if stored.is_quantized() {
        metadata.set("general.quantization_version", 2u32);
    }
}
