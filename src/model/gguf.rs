//! The configuration in the metadata of a GGUF file. What is left out has llama.cpp's default.
//!
//! Sources: the GGUF specification, `docs/gguf.md` in <https://github.com/ggml-org/ggml>, and `src/llama-model.cpp` and
//! `src/llama-context.cpp` in <https://github.com/ggml-org/llama.cpp>.

use std::fmt::Display;

use super::names::{self, Names};
use crate::error::{Error, Result, quoted};
use crate::format::{MetaValue, Metadata, Weights};
use crate::nn::{Biases, Positions, TransformerConfig};
use crate::ops::rope::Scaling;

/// The keys of an architecture in a file.
struct Keys<'a> {
    weights: &'a Weights,
    meta: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn bad(&self, name: &str, message: impl Display) -> Error {
        Error::format(self.weights.path(), format!("metadata {}: {message}", quoted(&self.key(name))))
    }

    fn usize(&self, name: &str) -> Result<Option<usize>> {
        self.meta.optional(&self.key(name), Metadata::usize)
    }

    fn f32(&self, name: &str) -> Result<Option<f32>> {
        self.meta.optional(&self.key(name), Metadata::f32)
    }

    /// A count that a file may give layer by layer, if it is the same for all.
    fn of_layers(&self, name: &str, n_layers: usize) -> Result<Option<usize>> {
        let key = self.key(name);
        if !matches!(self.meta.get(&key), Some(MetaValue::Array(_))) {
            return self.usize(name);
        }
        let counts = self.meta.ints(&key)?;
        match counts.first() {
            Some(&first) if counts.len() == n_layers && counts.iter().all(|&n| n == first) => {
                usize::try_from(first).map(Some).map_err(|_| self.bad(name, format!("has {first}")))
            }
            Some(_) if counts.len() == n_layers => Err(self.bad(name, "layers of different sizes are not supported")),
            _ => Err(self.bad(name, format!("has {} layers, expected {n_layers}", counts.len()))),
        }
    }

    /// Returns an error if a setting that this crate lacks is there with a value that changes something.
    fn neutral(&self) -> Result<()> {
        if self.usize("expert_count")?.unwrap_or(0) > 0 {
            return Err(self.bad("expert_count", "mixtures of experts are not supported"));
        }
        let bools = [("attention.causal", true), ("use_parallel_residual", false)];
        for (name, expected) in bools {
            match self.meta.optional(&self.key(name), Metadata::bool)? {
                Some(got) if got != expected => return Err(self.bad(name, format!("expected {expected}, got {got}"))),
                _ => {}
            }
        }
        let numbers = [
            ("attention.scale", 0.0),
            ("attention.clamp_kqv", 0.0),
            ("attention.max_alibi_bias", 0.0),
            ("attn_logit_softcapping", 0.0),
            ("final_logit_softcapping", 0.0),
            ("embedding_scale", 1.0),
            ("residual_scale", 1.0),
            ("logit_scale", 1.0),
        ];
        for (name, neutral) in numbers {
            match self.f32(name)? {
                Some(got) if got != 0.0 && got != neutral => {
                    return Err(self.bad(name, format!("expected {neutral}, got {got}: it is not supported")));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Reads the metadata of a GGUF file by its `general.architecture`.
pub(super) fn read(weights: &Weights) -> Result<(TransformerConfig, &'static Names)> {
    let meta = weights.metadata();
    let arch = meta.str("general.architecture")?;
    if !["llama", "qwen2", "qwen3", "gpt2"].contains(&arch) {
        let message = format!("general.architecture: expected llama, qwen2, qwen3 or gpt2, got {}", quoted(arch));
        return Err(Error::format(weights.path(), message));
    }
    const PARTS: &str = "split.count";
    if let Some(parts @ 2..) = meta.optional(PARTS, Metadata::usize)? {
        let message = format!("metadata `{PARTS}`: one of {parts} files; this crate reads models in one");
        return Err(Error::format(weights.path(), message));
    }
    let keys = Keys { weights, meta, arch };
    keys.neutral()?;
    let vocab_size = weights.get("token_embd.weight")?.shape().rows();
    let need = |name: &str| meta.usize(&keys.key(name));
    let (context, n_layers, d_model) = (need("context_length")?, need("block_count")?, need("embedding_length")?);
    let missing = |name: &str| keys.bad(name, "is missing");
    const HEADS: &str = "attention.head_count";
    const D_FF: &str = "feed_forward_length";
    let n_heads = keys.of_layers(HEADS, n_layers)?.ok_or_else(|| missing(HEADS))?;
    let has = |name: &str| weights.names().any(|n| n == name);
    let (base, names, eps) = match arch {
        "gpt2" => {
            let base = TransformerConfig::gpt2(vocab_size, context, n_layers, d_model, n_heads);
            (base, &names::GGUF_GPT2, "attention.layer_norm_epsilon")
        }
        _ => {
            // Within its window, windowed attention equals full attention.
            let window = keys.usize("attention.sliding_window")?.filter(|window| *window > 0);
            let bounded = window.map_or(context, |window| window.min(context));
            let base = TransformerConfig::llama(vocab_size, bounded, n_layers, d_model, n_heads);
            let biases = Biases {
                qkv: has("blk.0.attn_q.bias"),
                out: has("blk.0.attn_output.bias"),
                mlp: has("blk.0.ffn_up.bias"),
            };
            let head_dim = keys.usize("attention.key_length")?.unwrap_or(base.head_dim());
            let positions = rope(&keys, context, head_dim)?;
            let config = TransformerConfig { positions, biases, qk_norm: has("blk.0.attn_q_norm.weight"), ..base };
            (config, &names::GGUF, "attention.layer_norm_rms_epsilon")
        }
    };
    let config = TransformerConfig {
        n_kv_heads: keys.of_layers("attention.head_count_kv", n_layers)?.unwrap_or(n_heads),
        head_dim: keys.usize("attention.key_length")?,
        d_ff: keys.of_layers(D_FF, n_layers)?.ok_or_else(|| missing(D_FF))?,
        norm_eps: meta.f32(&keys.key(eps))?,
        tied_head: !has("output.weight"),
        ..base
    };
    for name in ["rope.dimension_count", "attention.value_length"] {
        match keys.usize(name)? {
            Some(got) if got != config.head_dim() && arch != "gpt2" => {
                let message = format!("expected {}, the width of heads, got {got}", config.head_dim());
                return Err(keys.bad(name, message));
            }
            _ => {}
        }
    }
    Ok((config, names))
}

fn rope(keys: &Keys<'_>, context: usize, head_dim: usize) -> Result<Positions> {
    let theta = keys.f32("rope.freq_base")?.unwrap_or(10_000.0);
    // Before there were types of scaling, there was `scale_linear`, and without a type a factor is linear. A factor of 0
    // is none.
    let factor = keys.f32("rope.scaling.factor")?.map_or_else(|| keys.f32("rope.scale_linear"), |f| Ok(Some(f)))?;
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    let attention = keys.f32("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let scaling = match keys.meta.optional(&keys.key("rope.scaling.type"), Metadata::str)?.unwrap_or("linear") {
        "none" => Scaling::None,
        "linear" if factor == 1.0 => Scaling::None,
        "linear" => Scaling::Linear { factor },
        "yarn" => yarn(keys, factor, attention, context)?,
        other => {
            return Err(keys.bad("rope.scaling.type", format!("expected none, linear or yarn, got {}", quoted(other))));
        }
    };
    if attention != 1.0 && !matches!(scaling, Scaling::Yarn { .. }) {
        return Err(keys.bad("rope.scaling.attn_factor", format!("expected 1 without YaRN, got {attention}")));
    }
    let stored = llama3(keys, theta, head_dim)?;
    let scaling = match (scaling, stored) {
        (scaling, Scaling::None) | (Scaling::None, scaling) => scaling,
        (scaling, _) => {
            let message = format!("tensor `{FREQUENCIES}`: a second scaling of RoPE, beside {scaling:?}");
            return Err(Error::format(keys.weights.path(), message));
        }
    };
    // Writers of `llama` files permute the rows of q and k for this.
    Ok(Positions::Rope { theta, interleaved: keys.arch == "llama", scaling })
}

fn yarn(keys: &Keys<'_>, factor: f32, attention: f32, context: usize) -> Result<Scaling> {
    const MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
    const EXTRAPOLATION: &str = "rope.scaling.yarn_ext_factor";
    if let Some(got) = keys.f32(MULTIPLIER)?.filter(|got| *got != 0.0) {
        return Err(keys.bad(MULTIPLIER, format!("expected 0, got {got}: it is not supported")));
    }
    // Negative for the usual one.
    if let Some(got) = keys.f32(EXTRAPOLATION)?.filter(|got| *got >= 0.0 && *got != 1.0) {
        return Err(keys.bad(EXTRAPOLATION, format!("expected 1, got {got}: it is not supported")));
    }
    let or = |name: &str, default: f32| {
        Ok::<f32, Error>(keys.f32(&format!("rope.scaling.yarn_{name}"))?.filter(|x| *x >= 0.0).unwrap_or(default))
    };
    let original = keys.usize("rope.scaling.original_context_length")?.filter(|n| *n > 0).unwrap_or(context);
    let scaling = |attention_factor: Option<f32>| {
        Ok(Scaling::Yarn {
            factor,
            original_context: original,
            beta_fast: or("beta_fast", 32.0)?,
            beta_slow: or("beta_slow", 1.0)?,
            truncate: true,
            attention_factor,
        })
    };
    let usual = scaling(None)?;
    match attention * or("attn_factor", 1.0)? {
        1.0 => Ok(usual),
        more => scaling(Some(more * usual.attention_factor())),
    }
}

pub(super) const FREQUENCIES: &str = "rope_freqs.weight";

/// The context of Llama 3, which its rule of scaling starts from if the file has no other.
pub(super) const LLAMA_3_CONTEXT: usize = 8192;

/// GGUF files of Llama 3.1 and later store the divisor of each frequency instead of the rule that gives it.
fn llama3(keys: &Keys<'_>, theta: f32, head_dim: usize) -> Result<Scaling> {
    if !keys.weights.names().any(|name| name == FREQUENCIES) {
        return Ok(Scaling::None);
    }
    let divisors = keys.weights.get(FREQUENCIES)?.of_shape([head_dim / 2])?.values()?;
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(Scaling::None);
    }
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let original_context = keys.usize("rope.scaling.original_context_length")?.unwrap_or(LLAMA_3_CONTEXT);
    let scaling = Scaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context };
    let ours = scaling.divisors(theta, head_dim);
    let same = divisors.iter().zip(&ours).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-3 * b);
    match same {
        true => Ok(scaling),
        false => Err(Error::format(
            keys.weights.path(),
            format!("tensor `{FREQUENCIES}`: expected the frequencies of Llama 3.1 or later, got others"),
        )),
    }
}
