//! Hugging Face's `config.json`, written: the counterpart of `hugging_face`, which reads it.

use serde_json::{Value as Json, json};

use super::names::{self, Names};
use crate::error::{Error, Result};
use crate::nn::{Biases, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
use crate::ops::rope::Scaling;

/// The content of the `config.json` that describes a model of this configuration: what [`save`](super::save) writes
/// beside the weights.
///
/// # Errors
///
/// If no architecture of Hugging Face has all parts of the model (see the table of [`crate::model`]).
///
/// ```
/// use throughline::model;
/// use throughline::nn::TransformerConfig;
///
/// let config = TransformerConfig::gpt2(65, 32, 2, 48, 4);
/// let json = model::config_to_json(&config)?;
/// assert_eq!(model::config_from_json("config.json", json.as_bytes())?, config);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn config_to_json(config: &TransformerConfig) -> Result<String> {
    config.validate()?;
    Ok(format!("{:#}\n", write(config)?.0))
}

/// The `config.json` of a model of ours, and the tensor names that go with it. The error names what no architecture of
/// Hugging Face has.
pub(super) fn write(c: &TransformerConfig) -> Result<(Json, &'static Names)> {
    let none = |field: &'static str, message: &str| Err(Error::config(field, message));
    let pre_norm_decoder = c.norm_placement == NormPlacement::Pre && !c.bidirectional && !c.embed_norm;
    if !pre_norm_decoder || c.token_types > 0 || c.residual_gate.is_some() {
        return none(
            "norm_placement",
            "only pre-norm decoders without gates can be written as a model of Hugging Face's",
        );
    }
    let gpt2_like = c.n_kv_heads == c.n_heads && c.head_dim() * c.n_heads == c.d_model && !c.qk_norm;
    match (c.norm, c.positions, c.mlp) {
        (Norm::LayerNorm, Positions::Learned, Mlp::GeluTanh | Mlp::GeluErf) if c.biases == Biases::ALL && gpt2_like => {
            Ok((gpt2_json(c), &names::HF_GPT2))
        }
        (Norm::RmsNorm, Positions::Rope { theta, scaling, .. }, Mlp::SwiGlu) => {
            let kind = match (c.qk_norm, c.biases) {
                (true, Biases { qkv, out, mlp: false }) if qkv == out => "qwen3",
                (false, Biases::QKV) => "qwen2",
                (false, Biases { qkv, out, .. }) if qkv == out => "llama",
                _ => return none("biases", "no architecture of Hugging Face's has just these"),
            };
            Ok((llama_json(c, kind, theta, scaling), &names::HF_LLAMA))
        }
        _ => none(
            "norm",
            "expected the parts of GPT-2 (LayerNorm, learned positions, GELU, biases) or of Llama \
             (RMSNorm, RoPE, SwiGLU): Hugging Face has no architecture with others",
        ),
    }
}

fn gpt2_json(c: &TransformerConfig) -> Json {
    json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "activation_function": if c.mlp == Mlp::GeluTanh { "gelu_new" } else { "gelu" },
        "layer_norm_epsilon": exact(c.norm_eps),
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": null,
        "eos_token_id": null,
        "torch_dtype": "float32",
    })
}

fn llama_json(c: &TransformerConfig, kind: &str, theta: f32, scaling: Scaling) -> Json {
    let class = match kind {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    json!({
        "architectures": [class],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": if kind == "qwen3" { Some(c.head_dim()) } else { c.head_dim },
        "hidden_act": "silu",
        "rms_norm_eps": exact(c.norm_eps),
        "rope_theta": exact(theta),
        "rope_scaling": scaling_json(scaling),
        "attention_bias": c.biases.out,
        "mlp_bias": c.biases.mlp,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": null,
        "eos_token_id": null,
        "torch_dtype": "float32",
    })
}

fn scaling_json(scaling: Scaling) -> Json {
    match scaling {
        Scaling::None => Json::Null,
        Scaling::Linear { factor } => json!({ "rope_type": "linear", "factor": exact(factor) }),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": exact(factor),
            "low_freq_factor": exact(low_freq_factor),
            "high_freq_factor": exact(high_freq_factor),
            "original_max_position_embeddings": original_context,
        }),
        Scaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, attention_factor } => json!({
            "rope_type": "yarn",
            "factor": exact(factor),
            "original_max_position_embeddings": original_context,
            "beta_fast": exact(beta_fast),
            "beta_slow": exact(beta_slow),
            "truncate": truncate,
            "attention_factor": attention_factor.map(exact),
        }),
    }
}

/// The shortest decimal of an f32, as an f64: 1e-5 instead of 9.999999747378752e-6.
fn exact(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
