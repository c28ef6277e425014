//! Between a file's description of its model (`config.json`, GGUF metadata) and our configuration, in both directions.

use serde_json::Value as Json;
use serde_json::json;

use super::names::{self, Names};
use crate::error::{Error, Result};
use crate::format::{Metadata, Weights};
use crate::nn::{Biases, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
use crate::ops::rope::Scaling;

/// The configuration of the model, and the parameter names of this kind of file.
pub(super) fn read(weights: &Weights) -> Result<(TransformerConfig, &'static Names)> {
    let (config, names) = match weights.config() {
        Some(json) => {
            let path = format!("{}/config.json", weights.path().trim_end_matches('/'));
            hugging_face(&Metadata::of_json(&path, json)?, &path)?
        }
        None if weights.metadata().contains("general.architecture") => gguf(weights)?,
        None => {
            let message = "has no config.json beside it: give the folder that holds both";
            return Err(Error::format(weights.path(), message));
        }
    };
    config.validate().map_err(|e| Error::format(weights.path(), e))?;
    Ok((config, names))
}

/// Reads a `config.json` by its `model_type`.
fn hugging_face(meta: &Metadata, path: &str) -> Result<(TransformerConfig, &'static Names)> {
    match meta.str("model_type")? {
        "gpt2" => Ok((hf_gpt2(meta, path)?, &names::HF_GPT2)),
        "bert" => Ok((hf_bert(meta, path)?, &names::HF_BERT)),
        kind @ ("llama" | "mistral" | "qwen2" | "qwen3") => Ok((hf_llama(meta, path, kind)?, &names::HF_LLAMA)),
        other => {
            let known = "gpt2, llama, mistral, qwen2, qwen3 or bert";
            Err(Error::format(path, format!("model_type: expected {known}, got `{other}`")))
        }
    }
}

/// Returns an error if the setting is present with another value than `expected`.
fn only(meta: &Metadata, path: &str, key: &str, expected: bool) -> Result<()> {
    match meta.optional(key, Metadata::bool)? {
        Some(got) if got != expected => Err(Error::format(path, format!("{key}: expected {expected}, got {got}"))),
        _ => Ok(()),
    }
}

fn activation(meta: &Metadata, path: &str, key: &str, known: &[(&str, Mlp)]) -> Result<Mlp> {
    let name = meta.str(key)?;
    let found = known.iter().find(|(n, _)| *n == name);
    found.map(|(_, mlp)| *mlp).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(n, _)| *n).collect();
        Error::format(path, format!("{key}: expected {}, got `{name}`", names.join(" or ")))
    })
}

const GELUS: [(&str, Mlp); 4] = [
    ("gelu_new", Mlp::GeluTanh),
    ("gelu_pytorch_tanh", Mlp::GeluTanh),
    ("gelu_fast", Mlp::GeluTanh),
    ("gelu", Mlp::GeluErf),
];

fn hf_gpt2(meta: &Metadata, path: &str) -> Result<TransformerConfig> {
    only(meta, path, "scale_attn_weights", true)?;
    only(meta, path, "scale_attn_by_inverse_layer_idx", false)?;
    only(meta, path, "add_cross_attention", false)?;
    let context = match meta.optional("n_positions", Metadata::usize)? {
        Some(n) => n,
        None => meta.usize("n_ctx")?,
    };
    let [vocab, layers, d_model] = [meta.usize("vocab_size")?, meta.usize("n_layer")?, meta.usize("n_embd")?];
    let base = TransformerConfig::gpt2(vocab, context, layers, d_model, meta.usize("n_head")?);
    Ok(TransformerConfig {
        d_ff: meta.optional("n_inner", Metadata::usize)?.unwrap_or(base.d_ff),
        norm_eps: meta.f32("layer_norm_epsilon")?,
        mlp: activation(meta, path, "activation_function", &GELUS)?,
        tied_head: meta.optional("tie_word_embeddings", Metadata::bool)?.unwrap_or(true),
        ..base
    })
}

fn hf_bert(meta: &Metadata, path: &str) -> Result<TransformerConfig> {
    only(meta, path, "is_decoder", false)?;
    if let Some(kind) = meta.optional("position_embedding_type", Metadata::str)?
        && kind != "absolute"
    {
        return Err(Error::format(path, format!("position_embedding_type: expected `absolute`, got `{kind}`")));
    }
    let base = TransformerConfig::bert(
        meta.usize("vocab_size")?,
        meta.usize("max_position_embeddings")?,
        meta.usize("num_hidden_layers")?,
        meta.usize("hidden_size")?,
        meta.usize("num_attention_heads")?,
    );
    Ok(TransformerConfig {
        d_ff: meta.usize("intermediate_size")?,
        norm_eps: meta.optional("layer_norm_eps", Metadata::f32)?.unwrap_or(base.norm_eps),
        mlp: activation(meta, path, "hidden_act", &GELUS)?,
        token_types: meta.optional("type_vocab_size", Metadata::usize)?.unwrap_or(base.token_types),
        ..base
    })
}

/// Llama and its descendants. The kinds differ in biases and in the head norm.
fn hf_llama(meta: &Metadata, path: &str, kind: &str) -> Result<TransformerConfig> {
    activation(meta, path, "hidden_act", &[("silu", Mlp::SwiGlu)])?;
    let flag = |key: &str| Ok::<bool, Error>(meta.optional(key, Metadata::bool)?.unwrap_or(false));
    let n_heads = meta.usize("num_attention_heads")?;
    let mut context = meta.usize("max_position_embeddings")?;
    // Within its window, windowed attention equals full attention. Qwen's configurations name a window that is turned
    // off.
    if kind == "mistral" || flag("use_sliding_window")? {
        context = context.min(meta.optional("sliding_window", Metadata::usize)?.unwrap_or(context));
    }
    let attention = flag("attention_bias")?;
    let biases = match kind {
        "qwen2" => Biases::QKV,
        _ => Biases { qkv: attention, out: attention, mlp: flag("mlp_bias")? },
    };
    let [layers, d_model] = [meta.usize("num_hidden_layers")?, meta.usize("hidden_size")?];
    Ok(TransformerConfig {
        n_kv_heads: meta.optional("num_key_value_heads", Metadata::usize)?.unwrap_or(n_heads),
        head_dim: meta.optional("head_dim", Metadata::usize)?.or((kind == "qwen3").then_some(128)),
        d_ff: meta.usize("intermediate_size")?,
        norm_eps: meta.f32("rms_norm_eps")?,
        positions: hf_rope(meta, path)?,
        biases,
        qk_norm: kind == "qwen3",
        tied_head: flag("tie_word_embeddings")?,
        ..TransformerConfig::llama(meta.usize("vocab_size")?, context, layers, d_model, n_heads)
    })
}

/// `rope_theta` and `rope_scaling`, or both within `rope_parameters` as in files since 2025.
fn hf_rope(meta: &Metadata, path: &str) -> Result<Positions> {
    let has_group = meta.iter().any(|(key, _)| key.starts_with("rope_parameters."));
    let group = if has_group { "rope_parameters" } else { "rope_scaling" };
    if has_group {
        meta.str("rope_parameters.rope_type")?; // missing if it differs by layer
    }
    let key = |name: &str| format!("{group}.{name}");
    let number = |name: &str| meta.f32(&key(name));
    let or = |name: &str, default: f32| Ok::<f32, Error>(meta.optional(&key(name), Metadata::f32)?.unwrap_or(default));
    let theta = match meta.optional("rope_parameters.rope_theta", Metadata::f32)? {
        Some(theta) => theta,
        None => meta.optional("rope_theta", Metadata::f32)?.unwrap_or(10_000.0),
    };
    let original_context = || match meta.optional(&key("original_max_position_embeddings"), Metadata::usize)? {
        Some(n) => Ok(n),
        None => meta.usize("max_position_embeddings"),
    };
    let kind = match meta.optional(&key("rope_type"), Metadata::str)? {
        Some(kind) => Some(kind),
        None => meta.optional(&key("type"), Metadata::str)?,
    };
    let scaling = match kind.unwrap_or("default") {
        // `dynamic` changes nothing within the context of the configuration.
        "default" | "dynamic" => Scaling::None,
        "linear" => Scaling::Linear { factor: number("factor")? },
        "llama3" => Scaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: original_context()?,
        },
        "yarn" if !meta.contains(&key("mscale")) => Scaling::Yarn {
            factor: number("factor")?,
            original_context: original_context()?,
            beta_fast: or("beta_fast", 32.0)?,
            beta_slow: or("beta_slow", 1.0)?,
            truncate: meta.optional(&key("truncate"), Metadata::bool)?.unwrap_or(true),
            attention_factor: meta.optional(&key("attention_factor"), Metadata::f32)?,
        },
        other => {
            let known = "default, linear, dynamic, llama3 or yarn (without mscale)";
            return Err(Error::format(path, format!("{}: expected {known}, got `{other}`", key("rope_type"))));
        }
    };
    if let Some(part) = meta.optional("partial_rotary_factor", Metadata::f32)?
        && part != 1.0
    {
        return Err(Error::format(path, format!("partial_rotary_factor: expected 1, got {part}")));
    }
    Ok(Positions::Rope { theta, interleaved: false, scaling })
}

/// Reads the metadata of a GGUF file by its `general.architecture`.
fn gguf(weights: &Weights) -> Result<(TransformerConfig, &'static Names)> {
    let meta = weights.metadata();
    let arch = meta.str("general.architecture")?;
    if !["llama", "qwen2", "qwen3", "gpt2"].contains(&arch) {
        let message = format!("general.architecture: expected llama, qwen2, qwen3 or gpt2, got `{arch}`");
        return Err(Error::format(weights.path(), message));
    }
    let key = |name: &str| format!("{arch}.{name}");
    if meta.optional(&key("expert_count"), Metadata::usize)?.unwrap_or(0) > 0 {
        let message = format!("{}: mixtures of experts are not supported", key("expert_count"));
        return Err(Error::format(weights.path(), message));
    }
    let vocab_size = weights.get("token_embd.weight")?.shape().rows();
    let [context, layers] = [meta.usize(&key("context_length"))?, meta.usize(&key("block_count"))?];
    let [d_model, n_heads] = [meta.usize(&key("embedding_length"))?, meta.usize(&key("attention.head_count"))?];
    let has = |name: &str| weights.contains(name);
    let (base, names, eps) = match arch {
        "gpt2" => {
            let base = TransformerConfig::gpt2(vocab_size, context, layers, d_model, n_heads);
            (base, &names::GGUF_GPT2, "attention.layer_norm_epsilon")
        }
        _ => {
            let base = TransformerConfig::llama(vocab_size, context, layers, d_model, n_heads);
            let biases = Biases {
                qkv: has("blk.0.attn_q.bias"),
                out: has("blk.0.attn_output.bias"),
                mlp: has("blk.0.ffn_up.bias"),
            };
            let positions = gguf_rope(weights, arch)?;
            let config = TransformerConfig { positions, biases, qk_norm: has("blk.0.attn_q_norm.weight"), ..base };
            (config, &names::GGUF, "attention.layer_norm_rms_epsilon")
        }
    };
    let config = TransformerConfig {
        n_kv_heads: meta.optional(&key("attention.head_count_kv"), Metadata::usize)?.unwrap_or(n_heads),
        head_dim: meta.optional(&key("attention.key_length"), Metadata::usize)?,
        d_ff: meta.usize(&key("feed_forward_length"))?,
        norm_eps: meta.f32(&key(eps))?,
        tied_head: !has("output.weight"),
        ..base
    };
    for dims in ["rope.dimension_count", "attention.value_length"].map(key) {
        match meta.optional(&dims, Metadata::usize)? {
            Some(got) if got != config.head_dim() && arch != "gpt2" => {
                let message = format!("{dims}: expected {}, the width of heads, got {got}", config.head_dim());
                return Err(Error::format(weights.path(), message));
            }
            _ => {}
        }
    }
    Ok((config, names))
}

fn gguf_rope(weights: &Weights, arch: &str) -> Result<Positions> {
    let meta = weights.metadata();
    let key = |name: &str| format!("{arch}.rope.{name}");
    let theta = meta.optional(&key("freq_base"), Metadata::f32)?.unwrap_or(10_000.0);
    let original = meta.optional(&key("scaling.original_context_length"), Metadata::usize)?;
    let factor = || meta.f32(&key("scaling.factor"));
    let scaling = match meta.optional(&key("scaling.type"), Metadata::str)? {
        None | Some("none") => llama3_of(weights, theta)?,
        Some("linear") => Scaling::Linear { factor: factor()? },
        Some("yarn") => Scaling::Yarn {
            factor: factor()?,
            original_context: original.map_or_else(|| meta.usize(&format!("{arch}.context_length")), Ok)?,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
        },
        Some(other) => {
            let at = key("scaling.type");
            return Err(Error::format(weights.path(), format!("{at}: expected none, linear or yarn, got `{other}`")));
        }
    };
    // Writers of `llama` files permute the rows of q and k for this.
    Ok(Positions::Rope { theta, interleaved: arch == "llama", scaling })
}

/// GGUF files of Llama 3.1 and later store the divisor of each frequency instead of the rule that gives it.
fn llama3_of(weights: &Weights, theta: f32) -> Result<Scaling> {
    const NAME: &str = "rope_freqs.weight";
    if !weights.contains(NAME) {
        return Ok(Scaling::None);
    }
    let divisors = weights.get(NAME)?.values()?;
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let scaling = Scaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    let ours = scaling.divisors(theta, 2 * divisors.len());
    let same = divisors.iter().zip(&ours).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-3 * b);
    match same {
        true => Ok(scaling),
        false => Err(Error::format(
            weights.path(),
            format!("tensor `{NAME}`: expected the frequencies of Llama 3.1 or later, got others"),
        )),
    }
}

/// The `config.json` of a model of ours, and the tensor names that go with it. The error names what no architecture of
/// Hugging Face has.
pub(super) fn to_hugging_face(c: &TransformerConfig) -> Result<(Json, &'static Names)> {
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
            Ok((to_hf_gpt2(c), &names::HF_GPT2))
        }
        (Norm::RmsNorm, Positions::Rope { theta, scaling, .. }, Mlp::SwiGlu) => {
            let kind = match (c.qk_norm, c.biases) {
                (true, Biases { qkv, out, mlp: false }) if qkv == out => "qwen3",
                (false, Biases::QKV) => "qwen2",
                (false, Biases { qkv, out, .. }) if qkv == out => "llama",
                _ => return none("biases", "no architecture of Hugging Face's has just these"),
            };
            Ok((to_hf_llama(c, kind, theta, scaling), &names::HF_LLAMA))
        }
        _ => none(
            "norm",
            "expected the parts of GPT-2 (LayerNorm, learned positions, GELU, biases) or of Llama \
             (RMSNorm, RoPE, SwiGLU): Hugging Face has no architecture with others",
        ),
    }
}

fn to_hf_gpt2(c: &TransformerConfig) -> Json {
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

fn to_hf_llama(c: &TransformerConfig, kind: &str, theta: f32, scaling: Scaling) -> Json {
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
        "rope_scaling": rope_scaling(scaling),
        "attention_bias": c.biases.out,
        "mlp_bias": c.biases.mlp,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": null,
        "eos_token_id": null,
        "torch_dtype": "float32",
    })
}

fn rope_scaling(scaling: Scaling) -> Json {
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
