//! Hugging Face's `config.json`, read.
//!
//! A key that is left out has the default of the architecture's class in `transformers`. Of the keys of these classes,
//! those that change what is computed are read, or refused unless they have the value of what we compute. Sources:
//! `src/transformers/models/*/configuration_*.py` and `src/transformers/modeling_rope_utils.py` in
//! <https://github.com/huggingface/transformers>.

use std::fmt::Display;

use serde_json::{Value as Json, json};

use super::names::{self, Names};
use crate::error::{Error, Result, quoted};
use crate::format::{Settings, float};
use crate::nn::{Biases, Mlp, Positions, TransformerConfig};
use crate::ops::rope::Scaling;

/// Reads the content of a `config.json`: the configuration of the model that [`Model::open`](super::Model::open)
/// expects in the files beside it.
///
/// Use it to look at a model before its weights are there. `path` is for messages. Keys that are left out have the
/// defaults of `transformers`, and `NaN` and `Infinity`, which Python writes, are read.
///
/// # Errors
///
/// The error names the file and the key: of another architecture, or of a setting that this crate does not compute.
///
/// ```
/// use throughline::model;
///
/// let json = r#"{"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}"#;
/// let config = model::config_from_json("config.json", json.as_bytes())?;
/// assert_eq!((config.d_model, config.head_dim(), config.n_layers), (576, 64, 32));
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn config_from_json(path: &str, json: &[u8]) -> Result<TransformerConfig> {
    let (config, _) = read(&Settings::parse(path, json)?)?;
    config.validate().map_err(|e| Error::format(path, e))?;
    Ok(config)
}

/// Spellings of one setting in different architectures.
const SPELLINGS: [&[&str]; 8] = [
    &["hidden_size", "n_embd", "d_model"],
    &["num_hidden_layers", "n_layer", "n_layers", "num_layers"],
    &["num_attention_heads", "n_head", "n_heads"],
    &["num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv"],
    &["intermediate_size", "n_inner", "d_ff", "ffn_dim"],
    &["max_position_embeddings", "n_positions", "n_ctx"],
    &["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"],
    &["hidden_act", "hidden_activation", "activation_function"],
];

/// Returns an error if there is anything but nothing under the key.
fn absent(keys: &Settings, key: &str, why: &str) -> Result<()> {
    let empty = |value: &Json| match value {
        Json::Object(v) => v.is_empty(),
        Json::Array(v) => v.is_empty(),
        value => *value == json!(false),
    };
    match keys.get(key) {
        Some(value) if !empty(value) => Err(keys.bad(key, why)),
        _ => Ok(()),
    }
}

/// A setting that the architecture's class reads under `own`, of which all are names of one thing. If it is under
/// the name of another architecture only, `transformers` computes with its default: that is an error here, unless
/// the default is what the file says.
fn setting<T: PartialEq + Display>(
    keys: &Settings,
    own: &[&str],
    default: T,
    read: impl Fn(&Settings, &str) -> Result<Option<T>>,
) -> Result<T> {
    let mut found: Option<(&str, T)> = None;
    for &key in own {
        match (read(keys, key)?, &found) {
            (Some(got), Some((first, value))) if got != *value => {
                return Err(keys.bad(key, format!("is {got}, but {first}, another name of it, is {value}")));
            }
            (Some(got), None) => found = Some((key, got)),
            _ => {}
        }
    }
    if let Some((_, value)) = found {
        return Ok(value);
    }
    let names = SPELLINGS.iter().find(|names| names.contains(&own[0])).copied().unwrap_or_default();
    for &key in names.iter().filter(|name| !own.contains(name)) {
        if read(keys, key)?.is_some_and(|got| got != default) {
            let message = format!("this architecture has {} instead, which is missing", own[0]);
            return Err(keys.bad(key, message));
        }
    }
    Ok(default)
}

fn count(keys: &Settings, own: &[&str], default: usize) -> Result<usize> {
    setting(keys, own, default, Settings::usize)
}

fn eps(keys: &Settings, own: &str, default: f32) -> Result<f32> {
    setting(keys, &[own], default, Settings::f32)
}

/// The activation function, as one of its names.
fn activation(keys: &Settings, own: &str, default: Mlp, known: &[(&'static str, Mlp)]) -> Result<Mlp> {
    let read = |keys: &Settings, key: &str| match keys.str(key)? {
        None => Ok(None),
        Some(name) => match known.iter().find(|(n, _)| *n == name) {
            Some((_, mlp)) => Ok(Some(Activation(*mlp))),
            None => {
                let names: Vec<&str> = known.iter().map(|(n, _)| *n).collect();
                Err(keys.bad(key, format!("expected {}, got {}", names.join(" or "), quoted(name))))
            }
        },
    };
    setting(keys, &[own], Activation(default), read).map(|activation| activation.0)
}

#[derive(PartialEq)]
struct Activation(Mlp);

impl Display for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

const GELUS: [(&str, Mlp); 7] = [
    ("gelu_new", Mlp::GeluTanh),
    ("gelu_pytorch_tanh", Mlp::GeluTanh),
    ("gelu_python_tanh", Mlp::GeluTanh),
    ("gelu_fast", Mlp::GeluTanh),
    ("gelu_accurate", Mlp::GeluTanh),
    ("gelu", Mlp::GeluErf),
    ("gelu_python", Mlp::GeluErf),
];
const SILUS: [(&str, Mlp); 2] = [("silu", Mlp::SwiGlu), ("swish", Mlp::SwiGlu)];

/// Reads a `config.json` by its `model_type`.
pub(super) fn read(keys: &Settings) -> Result<(TransformerConfig, &'static Names)> {
    let kind = keys.str("model_type")?.ok_or_else(|| keys.missing("model_type"))?;
    absent(
        keys,
        "quantization_config",
        "quantised weights of this kind are not read: take the original, or a GGUF file",
    )?;
    absent(keys, "pruned_heads", "models without some of their heads are not read")?;
    absent(keys, "per_layer_config", "settings that differ by layer are not read")?;
    match kind {
        "gpt2" => Ok((gpt2(keys)?, &names::HF_GPT2)),
        "bert" => Ok((bert(keys)?, &names::HF_BERT)),
        "llama" | "mistral" | "qwen2" | "qwen3" => Ok((llama(keys, kind)?, &names::HF_LLAMA)),
        other => {
            let known = "gpt2, llama, mistral, qwen2, qwen3 or bert";
            Err(keys.bad("model_type", format!("expected {known}, got {}", quoted(other))))
        }
    }
}

/// What turns a decoder's causal attention into that of an encoder.
fn causal(keys: &Settings) -> Result<()> {
    keys.only_bool("is_causal", true)?;
    keys.only_bool("use_bidirectional_attention", false)
}

fn gpt2(keys: &Settings) -> Result<TransformerConfig> {
    keys.only_bool("scale_attn_weights", true)?;
    keys.only_bool("scale_attn_by_inverse_layer_idx", false)?;
    keys.only_bool("add_cross_attention", false)?;
    causal(keys)?;
    // Old files have only `n_ctx`, which no longer has a meaning of its own.
    let context = match keys.usize("n_ctx")? {
        Some(n) if ["n_positions", "max_position_embeddings"].iter().all(|key| keys.get(key).is_none()) => n,
        _ => count(keys, &["n_positions", "max_position_embeddings"], 1024)?,
    };
    let base = TransformerConfig::gpt2(
        count(keys, &["vocab_size"], 50257)?,
        context,
        count(keys, &["n_layer", "num_hidden_layers"], 12)?,
        count(keys, &["n_embd", "hidden_size"], 768)?,
        count(keys, &["n_head", "num_attention_heads"], 12)?,
    );
    Ok(TransformerConfig {
        d_ff: count(keys, &["n_inner"], base.d_ff)?,
        norm_eps: eps(keys, "layer_norm_epsilon", base.norm_eps)?,
        mlp: activation(keys, "activation_function", Mlp::GeluTanh, &GELUS)?,
        tied_head: keys.bool("tie_word_embeddings")?.unwrap_or(true),
        ..base
    })
}

fn bert(keys: &Settings) -> Result<TransformerConfig> {
    keys.only_bool("is_decoder", false)?;
    keys.only_bool("add_cross_attention", false)?;
    keys.only_str("position_embedding_type", "absolute")?;
    let base = TransformerConfig::bert(
        count(keys, &["vocab_size"], 30522)?,
        count(keys, &["max_position_embeddings"], 512)?,
        count(keys, &["num_hidden_layers"], 12)?,
        count(keys, &["hidden_size"], 768)?,
        count(keys, &["num_attention_heads"], 12)?,
    );
    Ok(TransformerConfig {
        d_ff: count(keys, &["intermediate_size"], 3072)?,
        norm_eps: eps(keys, "layer_norm_eps", base.norm_eps)?,
        mlp: activation(keys, "hidden_act", Mlp::GeluErf, &GELUS)?,
        token_types: keys.usize("type_vocab_size")?.unwrap_or(base.token_types),
        ..base
    })
}

/// Llama and its descendants. The kinds differ in biases, in the head norm and in their defaults.
fn llama(keys: &Settings, kind: &str) -> Result<TransformerConfig> {
    causal(keys)?;
    activation(keys, "hidden_act", Mlp::SwiGlu, &SILUS)?;
    let (vocab, d_ff, context, kv_heads) = match kind {
        "llama" => (32000, 11008, 2048, None),
        "mistral" => (32000, 14336, 131_072, Some(8)),
        _ => (151_936, 22016, 32768, Some(32)),
    };
    let n_layers = count(keys, &["num_hidden_layers"], 32)?;
    let n_heads = count(keys, &["num_attention_heads"], 32)?;
    let kv_heads = kv_heads.filter(|_| !keys.is_null("num_key_value_heads")).unwrap_or(n_heads);
    let longest = count(keys, &["max_position_embeddings"], context)?;
    let biases = match kind {
        "qwen2" => Biases::QKV,
        "mistral" => Biases::NONE,
        _ => {
            let attention = keys.bool("attention_bias")?.unwrap_or(false);
            Biases { qkv: attention, out: attention, mlp: kind == "llama" && keys.bool("mlp_bias")?.unwrap_or(false) }
        }
    };
    let base = TransformerConfig::llama(
        count(keys, &["vocab_size"], vocab)?,
        // Within its window, windowed attention equals full attention.
        window(keys, kind, n_layers)?.map_or(longest, |window| window.min(longest)),
        n_layers,
        count(keys, &["hidden_size"], 4096)?,
        n_heads,
    );
    Ok(TransformerConfig {
        n_kv_heads: count(keys, &["num_key_value_heads"], kv_heads)?,
        head_dim: keys.usize("head_dim")?.or((kind == "qwen3").then_some(128)),
        d_ff: count(keys, &["intermediate_size"], d_ff)?,
        norm_eps: eps(keys, "rms_norm_eps", 1e-6)?,
        positions: rope(keys, longest)?,
        biases,
        qk_norm: kind == "qwen3",
        tied_head: keys.bool("tie_word_embeddings")?.unwrap_or(false),
        ..base
    })
}

/// The number of tokens that attention looks back at, if some layer's is bounded.
fn window(keys: &Settings, kind: &str, n_layers: usize) -> Result<Option<usize>> {
    const DEFAULT: usize = 4096;
    let size = match keys.is_null("sliding_window") {
        true => None,
        false => Some(keys.usize("sliding_window")?.unwrap_or(DEFAULT)),
    };
    match kind {
        "mistral" => return Ok(size),
        "qwen2" | "qwen3" => {}
        _ => return Ok(None),
    }
    let used = keys.bool("use_sliding_window")?.unwrap_or(false);
    let size = size.filter(|_| used);
    let sliding = match keys.typed("layer_types", "an array", Json::as_array)? {
        None => keys.usize("max_window_layers")?.unwrap_or(28) < n_layers,
        Some(types) if types.len() != n_layers => {
            return Err(keys.bad("layer_types", format!("has {} layers, num_hidden_layers {n_layers}", types.len())));
        }
        Some(types) => {
            let other = types.iter().find(|ty| !["full_attention", "sliding_attention"].iter().any(|k| *ty == k));
            if let Some(other) = other {
                let got = quoted(&other.to_string());
                return Err(keys.bad("layer_types", format!("expected full_attention or sliding_attention, got {got}")));
            }
            let sliding = types.iter().any(|ty| ty == "sliding_attention");
            if sliding && size.is_none() {
                return Err(keys.bad("layer_types", "has sliding_attention, but there is no sliding_window in use"));
            }
            sliding
        }
    };
    Ok(size.filter(|_| sliding))
}

/// RoPE's base and scaling. They are `rope_theta` and `rope_scaling`, or both within `rope_parameters`, as files have
/// it since transformers 5. There, a `rope_scaling` replaces `rope_parameters`.
fn rope(keys: &Settings, context: usize) -> Result<Positions> {
    let parameters = keys.object("rope_parameters")?;
    let scaling = keys.object("rope_scaling")?;
    let theta_of = |group: &Option<Settings>| group.as_ref().map_or(Ok(None), |group| group.f32("rope_theta"));
    let (in_scaling, in_parameters, outer) = (theta_of(&scaling)?, theta_of(&parameters)?, keys.f32("rope_theta")?);
    let inner = if scaling.is_some() { in_scaling } else { in_parameters };
    let theta = inner.or(outer).unwrap_or(10_000.0);
    // There, this would run with the default, which is not what the model was trained with.
    if let (Some(scaling), None, Some(lost)) = (&scaling, inner.or(outer), in_parameters)
        && lost != theta
    {
        let message = format!("rope_scaling replaces rope_parameters, whose rope_theta is {lost}: give it here, too");
        return Err(scaling.bad("rope_theta", message));
    }
    let group = scaling.or(parameters);
    for keys in group.iter().chain([keys]) {
        if let Some(part) = keys.f32("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(keys.bad("partial_rotary_factor", format!("expected 1, got {part}")));
        }
    }
    let scaling = group.map_or(Ok(Scaling::None), |group| rope_scaling(keys, &group, context))?;
    Ok(Positions::Rope { theta, interleaved: false, scaling })
}

fn rope_scaling(keys: &Settings, group: &Settings, context: usize) -> Result<Scaling> {
    let need = |name: &str| group.f32(name)?.ok_or_else(|| group.missing(name));
    // A zero counts as missing, as in Python.
    let or = |name: &str, default: f32| Ok::<f32, Error>(group.f32(name)?.filter(|x| *x != 0.0).unwrap_or(default));
    if let Some((layers, _)) = group.iter().find(|(_, value)| value.is_object() && float(value).is_none()) {
        return Err(group.bad(layers, "RoPE that differs by layer is not supported"));
    }
    let kind = match (group.str("rope_type")?, group.str("type")?) {
        (Some(kind), Some(old)) if kind != old => {
            return Err(group.bad("type", format!("is {}, but rope_type is {}", quoted(old), quoted(kind))));
        }
        (kind, old) => kind.or(old).unwrap_or("default"),
    };
    const ORIGINAL: &str = "original_max_position_embeddings";
    let given = keys.usize(ORIGINAL)?.map_or_else(|| group.usize(ORIGINAL), |n| Ok(Some(n)))?;
    let original_context = given.unwrap_or(context);
    Ok(match kind {
        // `dynamic` changes nothing within the context of the configuration.
        "default" | "dynamic" => Scaling::None,
        "linear" => Scaling::Linear { factor: need("factor")? },
        "llama3" => Scaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context,
        },
        "yarn" => {
            let factor = match (group.f32("factor")?, given) {
                (Some(factor), _) => factor,
                (None, Some(original)) => context as f32 / original as f32,
                (None, None) => return Err(group.missing("factor")),
            };
            let mscales = [group.f32("mscale")?, group.f32("mscale_all_dim")?];
            Scaling::Yarn {
                factor,
                original_context,
                beta_fast: or("beta_fast", 32.0)?,
                beta_slow: or("beta_slow", 1.0)?,
                truncate: group.bool("truncate")?.unwrap_or(true),
                attention_factor: group.f32("attention_factor")?.or_else(|| mscale_ratio(factor, mscales)),
            }
        }
        other => {
            let known = "default, linear, dynamic, llama3 or yarn";
            return Err(group.bad("rope_type", format!("expected {known}, got {}", quoted(other))));
        }
    })
}

/// YaRN's attention factor as DeepSeek's models have it, if both numbers are given.
fn mscale_ratio(factor: f32, mscales: [Option<f32>; 2]) -> Option<f32> {
    let [Some(above), Some(below)] = mscales.map(|m| m.filter(|m| *m != 0.0)) else { return None };
    let of = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * f64::from(m) * f64::from(factor).ln() + 1.0 };
    Some((of(above) / of(below)) as f32)
}
