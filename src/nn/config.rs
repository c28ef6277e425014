//! What a transformer is made of.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::rope::Scaling;

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormPlacement {
    /// `x + f(norm(x))`: the residual stream is never normalised until the end (GPT-2 and after).
    Pre,
    /// `norm(x + f(x))`: the arrangement of 2017 (Vaswani et al., <https://arxiv.org/abs/1706.03762>).
    Post,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Norm {
    /// Mean and variance, with gamma and beta.
    LayerNorm,
    /// Root mean square, with gamma.
    RmsNorm,
}

/// How the model knows positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Positions {
    /// A learned vector per position, added to the embedding.
    Learned,
    /// Rotary embedding of queries and keys.
    Rope {
        /// Base of the geometric series of wavelengths; usually 10,000.
        theta: f32,
        /// Rotates neighbours `(2 j, 2 j + 1)`, as GGUF files of Llamas want it, rather than halves of a head.
        #[serde(default)]
        interleaved: bool,
        /// Changes for a longer context.
        #[serde(default)]
        scaling: Scaling,
    },
}

/// The feed-forward half of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mlp {
    /// `gelu(x w1) w2` with the tanh approximation, as GPT-2.
    GeluTanh,
    /// `gelu(x w1) w2` with the error function, as BERT.
    GeluErf,
    /// `(silu(x gate) * x up) down`, as Llama.
    SwiGlu,
}

/// Which linear layers have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The projection out of attention.
    pub out: bool,
    /// The feed-forward half.
    pub mlp: bool,
}

impl Biases {
    /// Everywhere, as GPT-2 and BERT.
    pub const ALL: Biases = Biases { qkv: true, out: true, mlp: true };
    /// Nowhere, as Llama.
    pub const NONE: Biases = Biases { qkv: false, out: false, mlp: false };
    /// Queries, keys and values only, as Qwen2.
    pub const QKV: Biases = Biases { qkv: true, ..Self::NONE };
}

/// How weights start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Normal of this standard deviation, whatever the weight is for.
    Plain {
        /// Standard deviation.
        std: f32,
    },
    /// GPT-2's: normal of this standard deviation; projections into the residual stream are scaled
    /// down by `1/sqrt(2 n_layers)`.
    Gpt2 {
        /// Standard deviation, 0.02 in GPT-2.
        std: f32,
    },
    /// The same, but projections into the residual stream start at zero: every block contributes
    /// nothing at first, and the stream is the embedding at every depth.
    ZeroResidual {
        /// Standard deviation of the other weights.
        std: f32,
    },
}

/// Shape and parts of a transformer. [`gpt2`](Self::gpt2), [`llama`](Self::llama) and [`bert`](Self::bert) give the
/// usual sets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// Number of different tokens.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; `n_heads` must be a multiple.
    pub n_kv_heads: usize,
    /// Width of a head; `d_model / n_heads` by default.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Hidden width of the feed-forward half.
    pub d_ff: usize,
    /// Pre- or post-norm.
    pub norm_placement: NormPlacement,
    /// Multiplies each branch by a trained number that starts at this, before it is added to the stream; 0 is
    /// ReZero (Bachlechner et al. 2020, <https://arxiv.org/abs/2003.04887>).
    #[serde(default)]
    pub residual_gate: Option<f32>,
    /// Which norm.
    pub norm: Norm,
    /// Added to the variance in norms.
    pub norm_eps: f32,
    /// Learned positions or RoPE.
    pub positions: Positions,
    /// The feed-forward half.
    pub mlp: Mlp,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Whether queries and keys go through an RMSNorm of their own, head by head, before they are rotated.
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether a token sees those behind it: an encoder's does.
    #[serde(default)]
    pub bidirectional: bool,
    /// Whether the embedding is normalised before the first block.
    #[serde(default)]
    pub embed_norm: bool,
    /// Kinds of tokens with a learned vector each, added to the embedding: BERT has 2. 0 for none.
    #[serde(default)]
    pub token_types: usize,
    /// Whether the head is the embedding, transposed.
    pub tied_head: bool,
    /// Probability of dropping an element of the embedding and of each branch while training.
    pub dropout: f32,
    /// How weights start.
    pub init: Init,
}

impl TransformerConfig {
    /// GPT-2's parts: pre-norm LayerNorm, learned positions, GELU, biases, tied head.
    pub fn gpt2(vocab_size: usize, context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            vocab_size,
            context,
            n_layers,
            d_model,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: None,
            d_ff: 4 * d_model,
            norm_placement: NormPlacement::Pre,
            residual_gate: None,
            norm: Norm::LayerNorm,
            norm_eps: 1e-5,
            positions: Positions::Learned,
            mlp: Mlp::GeluTanh,
            biases: Biases::ALL,
            qk_norm: false,
            bidirectional: false,
            embed_norm: false,
            token_types: 0,
            tied_head: true,
            dropout: 0.0,
            init: Init::Gpt2 { std: 0.02 },
        }
    }

    /// Llama's parts: pre-norm RMSNorm, RoPE, SwiGLU of about 8/3 the width, no biases, own head.
    pub fn llama(vocab_size: usize, context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            d_ff: (8 * d_model / 3).next_multiple_of(16),
            norm: Norm::RmsNorm,
            positions: Positions::Rope { theta: 10_000.0, interleaved: false, scaling: Scaling::None },
            mlp: Mlp::SwiGlu,
            biases: Biases::NONE,
            tied_head: false,
            ..Self::gpt2(vocab_size, context, n_layers, d_model, n_heads)
        }
    }

    /// BERT's parts: an encoder, post-norm LayerNorm, learned positions, exact GELU, biases, two token types.
    pub fn bert(vocab_size: usize, context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            norm_placement: NormPlacement::Post,
            norm_eps: 1e-12,
            mlp: Mlp::GeluErf,
            bidirectional: true,
            embed_norm: true,
            token_types: 2,
            ..Self::gpt2(vocab_size, context, n_layers, d_model, n_heads)
        }
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.d_model / self.n_heads.max(1))
    }

    /// Factor of the scores in attention.
    pub(crate) fn attention_scale(&self) -> f32 {
        let rotated = match self.positions {
            Positions::Rope { scaling, .. } => scaling.attention_factor().powi(2),
            Positions::Learned => 1.0,
        };
        rotated / (self.head_dim() as f32).sqrt()
    }

    /// An `Err` names the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        let err = |field, message: String| Err(Error::config(field, message));
        let counts = [
            ("vocab_size", self.vocab_size),
            ("context", self.context),
            ("n_layers", self.n_layers),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("n_kv_heads", self.n_kv_heads),
            ("head_dim", self.head_dim()),
            ("d_ff", self.d_ff),
        ];
        if let Some((field, n)) = counts.into_iter().find(|(_, n)| *n == 0 || *n > 1 << 24) {
            return err(field, format!("must be from 1 to 2^24, but is {n}"));
        }
        if self.head_dim.is_none() && !self.d_model.is_multiple_of(self.n_heads) {
            return err("n_heads", format!("d_model {} is not a multiple of {}", self.d_model, self.n_heads));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return err("n_kv_heads", format!("n_heads {} is not a multiple of {}", self.n_heads, self.n_kv_heads));
        }
        if let Positions::Rope { theta, scaling, .. } = self.positions {
            if !theta.is_finite() || theta < 1.0 {
                return err("positions", format!("RoPE's theta must be finite and at least 1, but is {theta}"));
            }
            if !self.head_dim().is_multiple_of(2) {
                return err("head_dim", format!("RoPE needs an even width of heads, but it is {}", self.head_dim()));
            }
            if let Some(problem) = scaling.problem() {
                return err("positions", problem);
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return err("dropout", format!("must be in [0, 1), but is {}", self.dropout));
        }
        if self.norm_eps.is_nan() || self.norm_eps <= 0.0 {
            return err("norm_eps", format!("must be positive, but is {}", self.norm_eps));
        }
        if self.residual_gate.is_some_and(|gate| !gate.is_finite()) {
            return err("residual_gate", "must be finite".into());
        }
        let (Init::Plain { std } | Init::Gpt2 { std } | Init::ZeroResidual { std }) = self.init;
        if !std.is_finite() || std < 0.0 {
            return err("init", format!("the standard deviation must be finite and not negative, but is {std}"));
        }
        Ok(())
    }
}
