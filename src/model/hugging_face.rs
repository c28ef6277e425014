//! Hugging Face's `config.json`, read and written.
//!
//! A key that is left out has the default of the architecture's class in `transformers`. Of the keys of these classes,
//! those that change what is computed are read, or refused unless they have the value of what we compute. Sources:
//! `src/transformers/models/*/configuration_*.py` and `src/transformers/modeling_rope_utils.py` in
//! <https://github.com/huggingface/transformers>.

use std::fmt::Display;

use serde_json::{Map, Value as Json, json};

use super::names::{self, Names};
use crate::error::{Error, Result, quoted};
use crate::format::{float, parse_json};
use crate::nn::{Biases, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
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
    let json = parse_json(json).map_err(|e| Error::format(path, e))?;
    let (config, _) = read(path, &json)?;
    config.validate().map_err(|e| Error::format(path, e))?;
    Ok(config)
}

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

/// The objects of a `config.json` under typed accessors, whose errors name file and key.
struct Keys<'a> {
    path: &'a str,
    /// What comes before the keys in messages: the object that they are in.
    outer: &'static str,
    object: &'a Map<String, Json>,
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

impl<'a> Keys<'a> {
    fn bad(&self, key: &str, message: impl Display) -> Error {
        Error::format(self.path, format!("{}{key}: {message}", self.outer))
    }

    /// The value of a key. `null` counts as missing.
    fn get(&self, key: &str) -> Option<&'a Json> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Json::is_null)
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&'a Json) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let bad = || self.bad(key, format!("expected {expected}, got {}", quoted(&value.to_string())));
        read(value).ok_or_else(bad).map(Some)
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer of at least 0", |value| match (value.as_u64(), value.as_f64()) {
            (Some(n), _) => usize::try_from(n).ok(),
            // Some writers have floats for whole numbers.
            (None, Some(x)) if x >= 0.0 && x.fract() == 0.0 && x < 9e15 => Some(x as usize),
            _ => None,
        })
    }

    fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a number", |value| float(value).map(|x| x as f32))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Json::as_bool)
    }

    fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Json::as_str)
    }

    /// The object under a key; an empty one counts as missing, as in Python.
    fn object(&self, key: &'static str, outer: &'static str) -> Result<Option<Keys<'a>>> {
        let object = self.typed(key, "an object", Json::as_object)?.filter(|object| !object.is_empty());
        Ok(object.map(|object| Keys { path: self.path, outer, object }))
    }

    fn missing(&self, key: &str) -> Error {
        self.bad(key, "is missing")
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.bool(key)?.unwrap_or(false))
    }

    /// Returns an error if the setting is there with another value than `expected`.
    fn only(&self, key: &str, expected: bool) -> Result<()> {
        match self.bool(key)? {
            Some(got) if got != expected => Err(self.bad(key, format!("expected {expected}, got {got}"))),
            _ => Ok(()),
        }
    }

    /// Returns an error if there is anything but nothing under the key.
    fn absent(&self, key: &str, why: &str) -> Result<()> {
        let empty = |value: &Json| match value {
            Json::Object(v) => v.is_empty(),
            Json::Array(v) => v.is_empty(),
            value => *value == json!(false),
        };
        match self.get(key) {
            Some(value) if !empty(value) => Err(self.bad(key, why)),
            _ => Ok(()),
        }
    }

    /// A setting that the architecture's class reads under `own`, of which all are names of one thing. If it is under
    /// the name of another architecture only, `transformers` computes with its default: that is an error here, unless
    /// the default is what the file says.
    fn setting<T: PartialEq + Display>(
        &self,
        own: &[&str],
        default: T,
        read: impl Fn(&Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut found: Option<(&str, T)> = None;
        for &key in own {
            match (read(self, key)?, &found) {
                (Some(got), Some((first, value))) if got != *value => {
                    return Err(self.bad(key, format!("is {got}, but {first}, another name of it, is {value}")));
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
            if read(self, key)?.is_some_and(|got| got != default) {
                let message = format!("this architecture has {} instead, which is missing", own[0]);
                return Err(self.bad(key, message));
            }
        }
        Ok(default)
    }

    fn count(&self, own: &[&str], default: usize) -> Result<usize> {
        self.setting(own, default, Keys::usize)
    }

    fn eps(&self, own: &str, default: f32) -> Result<f32> {
        self.setting(&[own], default, Keys::f32)
    }

    /// The activation function, as one of its names.
    fn activation(&self, own: &str, default: Mlp, known: &[(&'static str, Mlp)]) -> Result<Mlp> {
        let read = |keys: &Self, key: &str| match keys.str(key)? {
            None => Ok(None),
            Some(name) => match known.iter().find(|(n, _)| *n == name) {
                Some((_, mlp)) => Ok(Some(Activation(*mlp))),
                None => {
                    let names: Vec<&str> = known.iter().map(|(n, _)| *n).collect();
                    Err(keys.bad(key, format!("expected {}, got {}", names.join(" or "), quoted(name))))
                }
            },
        };
        self.setting(&[own], Activation(default), read).map(|activation| activation.0)
    }
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
pub(super) fn read(path: &str, json: &Json) -> Result<(TransformerConfig, &'static Names)> {
    let object = json.as_object().ok_or_else(|| Error::format(path, "expected an object"))?;
    let keys = Keys { path, outer: "", object };
    let kind = keys.str("model_type")?.ok_or_else(|| keys.missing("model_type"))?;
    keys.absent(
        "quantization_config",
        "quantised weights of this kind are not read: take the original, or a GGUF file",
    )?;
    keys.absent("pruned_heads", "models without some of their heads are not read")?;
    keys.absent("per_layer_config", "settings that differ by layer are not read")?;
    match kind {
        "gpt2" => Ok((gpt2(&keys)?, &names::HF_GPT2)),
        "bert" => Ok((bert(&keys)?, &names::HF_BERT)),
        "llama" | "mistral" | "qwen2" | "qwen3" => Ok((llama(&keys, kind)?, &names::HF_LLAMA)),
        other => {
            let known = "gpt2, llama, mistral, qwen2, qwen3 or bert";
            Err(keys.bad("model_type", format!("expected {known}, got {}", quoted(other))))
        }
    }
}

/// What turns a decoder's causal attention into that of an encoder.
fn causal(keys: &Keys<'_>) -> Result<()> {
    keys.only("is_causal", true)?;
    keys.only("use_bidirectional_attention", false)
}

fn gpt2(keys: &Keys<'_>) -> Result<TransformerConfig> {
    keys.only("scale_attn_weights", true)?;
    keys.only("scale_attn_by_inverse_layer_idx", false)?;
    keys.only("add_cross_attention", false)?;
    causal(keys)?;
    // Old files have only `n_ctx`, which no longer has a meaning of its own.
    let context = match keys.usize("n_ctx")? {
        Some(n) if ["n_positions", "max_position_embeddings"].iter().all(|key| keys.get(key).is_none()) => n,
        _ => keys.count(&["n_positions", "max_position_embeddings"], 1024)?,
    };
    let base = TransformerConfig::gpt2(
        keys.count(&["vocab_size"], 50257)?,
        context,
        keys.count(&["n_layer", "num_hidden_layers"], 12)?,
        keys.count(&["n_embd", "hidden_size"], 768)?,
        keys.count(&["n_head", "num_attention_heads"], 12)?,
    );
    Ok(TransformerConfig {
        d_ff: keys.count(&["n_inner"], base.d_ff)?,
        norm_eps: keys.eps("layer_norm_epsilon", base.norm_eps)?,
        mlp: keys.activation("activation_function", Mlp::GeluTanh, &GELUS)?,
        tied_head: keys.bool("tie_word_embeddings")?.unwrap_or(true),
        ..base
    })
}

fn bert(keys: &Keys<'_>) -> Result<TransformerConfig> {
    keys.only("is_decoder", false)?;
    keys.only("add_cross_attention", false)?;
    if let Some(kind) = keys.str("position_embedding_type")?
        && kind != "absolute"
    {
        return Err(keys.bad("position_embedding_type", format!("expected `absolute`, got {}", quoted(kind))));
    }
    let base = TransformerConfig::bert(
        keys.count(&["vocab_size"], 30522)?,
        keys.count(&["max_position_embeddings"], 512)?,
        keys.count(&["num_hidden_layers"], 12)?,
        keys.count(&["hidden_size"], 768)?,
        keys.count(&["num_attention_heads"], 12)?,
    );
    Ok(TransformerConfig {
        d_ff: keys.count(&["intermediate_size"], 3072)?,
        norm_eps: keys.eps("layer_norm_eps", base.norm_eps)?,
        mlp: keys.activation("hidden_act", Mlp::GeluErf, &GELUS)?,
        token_types: keys.usize("type_vocab_size")?.unwrap_or(base.token_types),
        ..base
    })
}

/// Llama and its descendants. The kinds differ in biases, in the head norm and in their defaults.
fn llama(keys: &Keys<'_>, kind: &str) -> Result<TransformerConfig> {
    causal(keys)?;
    keys.activation("hidden_act", Mlp::SwiGlu, &SILUS)?;
    let (vocab, d_ff, context, kv_heads) = match kind {
        "llama" => (32000, 11008, 2048, None),
        "mistral" => (32000, 14336, 131_072, Some(8)),
        _ => (151_936, 22016, 32768, Some(32)),
    };
    let n_layers = keys.count(&["num_hidden_layers"], 32)?;
    let n_heads = keys.count(&["num_attention_heads"], 32)?;
    let kv_heads = kv_heads.filter(|_| !keys.is_null("num_key_value_heads")).unwrap_or(n_heads);
    let longest = keys.count(&["max_position_embeddings"], context)?;
    let biases = match kind {
        "qwen2" => Biases::QKV,
        "mistral" => Biases::NONE,
        _ => {
            let attention = keys.flag("attention_bias")?;
            Biases { qkv: attention, out: attention, mlp: kind == "llama" && keys.flag("mlp_bias")? }
        }
    };
    let base = TransformerConfig::llama(
        keys.count(&["vocab_size"], vocab)?,
        // Within its window, windowed attention equals full attention.
        window(keys, kind, n_layers)?.map_or(longest, |window| window.min(longest)),
        n_layers,
        keys.count(&["hidden_size"], 4096)?,
        n_heads,
    );
    Ok(TransformerConfig {
        n_kv_heads: keys.count(&["num_key_value_heads"], kv_heads)?,
        head_dim: keys.usize("head_dim")?.or((kind == "qwen3").then_some(128)),
        d_ff: keys.count(&["intermediate_size"], d_ff)?,
        norm_eps: keys.eps("rms_norm_eps", 1e-6)?,
        positions: rope(keys, longest)?,
        biases,
        qk_norm: kind == "qwen3",
        tied_head: keys.flag("tie_word_embeddings")?,
        ..base
    })
}

/// The number of tokens that attention looks back at, if some layer's is bounded.
fn window(keys: &Keys<'_>, kind: &str, n_layers: usize) -> Result<Option<usize>> {
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
    let used = keys.flag("use_sliding_window")?;
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
fn rope(keys: &Keys<'_>, context: usize) -> Result<Positions> {
    let parameters = keys.object("rope_parameters", "rope_parameters.")?;
    let scaling = keys.object("rope_scaling", "rope_scaling.")?;
    let outer = keys.f32("rope_theta")?;
    let theta_of = |group: &Option<Keys<'_>>| group.as_ref().map_or(Ok(None), |group| group.f32("rope_theta"));
    let theta = match theta_of(&scaling)?.or(if scaling.is_none() { theta_of(&parameters)? } else { None }) {
        Some(theta) => theta,
        None => outer.unwrap_or(10_000.0),
    };
    if let (Some(scaling), Some(lost)) = (&scaling, theta_of(&parameters)?)
        && lost != theta
    {
        let message = format!("rope_scaling replaces rope_parameters, whose rope_theta is {lost}: give it here, too");
        return Err(scaling.bad("rope_theta", message));
    }
    let group = scaling.or(parameters);
    let partial = match &group {
        Some(group) => group.f32("partial_rotary_factor")?.map(|part| (group, part)),
        None => None,
    };
    for (keys, part) in partial.into_iter().chain(keys.f32("partial_rotary_factor")?.map(|part| (keys, part))) {
        if part != 1.0 {
            return Err(keys.bad("partial_rotary_factor", format!("expected 1, got {part}")));
        }
    }
    let scaling = group.map_or(Ok(Scaling::None), |group| rope_scaling(keys, &group, context))?;
    Ok(Positions::Rope { theta, interleaved: false, scaling })
}

fn rope_scaling(keys: &Keys<'_>, group: &Keys<'_>, context: usize) -> Result<Scaling> {
    let need = |name: &str| group.f32(name)?.ok_or_else(|| group.missing(name));
    // A zero counts as missing, as in Python.
    let or = |name: &str, default: f32| Ok::<f32, Error>(group.f32(name)?.filter(|x| *x != 0.0).unwrap_or(default));
    if let Some((layers, _)) = group.object.iter().find(|(_, value)| value.is_object() && float(value).is_none()) {
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
