//! Shape and parts of a transformer.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::ParamInit;
use crate::ops::rope::Scaling;
use crate::ops::{POSITIVE, is_positive};

/// More layers than any model has. A plan grows with each of them.
const MAX_LAYERS: usize = 1 << 12;

/// Larger initial values leave f32 no room.
const MAX_INITIAL: f32 = 100.0;

/// Where a block normalises.
///
/// Pre-norm is the default of today: it trains deep models without a long warm-up. Post-norm is for models that were
/// trained that way, such as BERT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormPlacement {
    /// `x + f(norm(x))`: the residual stream is not normalised before its end (GPT-2 and most models since).
    Pre,
    /// `norm(x + f(x))`: the original arrangement of 2017 (Vaswani et al., <https://arxiv.org/abs/1706.03762>), also
    /// BERT's.
    Post,
}

/// Kind of norm.
///
/// RMSNorm is cheaper and works as well in most models. A model from a file needs its own kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Norm {
    /// Subtracts the mean and divides by the standard deviation; scale and shift are trained.
    LayerNorm,
    /// Divides by the root mean square; the scale is trained.
    RmsNorm,
}

/// How the model knows the positions of tokens.
///
/// Rotary embeddings are the usual choice today. They add no parameters, and only the distance between tokens matters.
/// Learned positions are those of GPT-2 and BERT.
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
        /// Whether to rotate neighbours `(2 j, 2 j + 1)`, as in GGUF files of Llama models, rather than the halves of a
        /// head.
        #[serde(default)]
        interleaved: bool,
        /// Scaling of the frequencies for a longer context.
        #[serde(default)]
        scaling: Scaling,
    },
}

/// The feed-forward network of a block.
///
/// SwiGLU has three matrices instead of two; [`TransformerConfig::llama`] makes it narrower to compensate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mlp {
    /// `gelu(x w1) w2` with the tanh approximation, as in GPT-2.
    GeluTanh,
    /// `gelu(x w1) w2` with the error function, as in BERT.
    GeluErf,
    /// `(silu(x gate) * x up) down`, as in Llama.
    SwiGlu,
}

/// Which linear layers have biases.
///
/// Start from [`ALL`](Self::ALL), [`NONE`](Self::NONE) or [`QKV`](Self::QKV), which cover the usual models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The projection out of attention.
    pub out: bool,
    /// The feed-forward network.
    pub mlp: bool,
}

impl Biases {
    /// Everywhere, as in GPT-2 and BERT.
    pub const ALL: Biases = Biases { qkv: true, out: true, mlp: true };
    /// Nowhere, as in Llama.
    pub const NONE: Biases = Biases { qkv: false, out: false, mlp: false };
    /// Queries, keys and values only, as in Qwen2.
    pub const QKV: Biases = Biases { qkv: true, ..Self::NONE };
}

/// How weights are initialised.
///
/// It affects only training from scratch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Normal with one standard deviation, regardless of the weight's role.
    Plain {
        /// Standard deviation.
        std: f32,
    },
    /// GPT-2's: normal with one standard deviation, except that projections into the residual stream are scaled down by
    /// `1/sqrt(2 n_layers)`.
    Gpt2 {
        /// Standard deviation, 0.02 in GPT-2.
        std: f32,
    },
    /// The same, but projections into the residual stream start at zero. Every block contributes nothing at first, and
    /// the stream is the embedding at every depth.
    ZeroResidual {
        /// Standard deviation of the other weights.
        std: f32,
    },
}

/// Shape and parts of a transformer.
///
/// Start from [`gpt2`](Self::gpt2), [`llama`](Self::llama), [`bert`](Self::bert) or, for anything but text,
/// [`stack`](Self::stack), and change the fields that differ; a model from a file brings its own ([`Model::config`](crate::model::Model::config)).
///
/// ```
/// use throughline::nn::{Init, TransformerConfig};
/// let config = TransformerConfig {
///     dropout: 0.1,
///     init: Init::ZeroResidual { std: 0.02 },
///     ..TransformerConfig::llama(65, 256, 6, 384, 6)
/// };
/// config.validate()?;
/// assert_eq!(config.head_dim(), 64);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// Number of tokens in the vocabulary. 0 for a [stack](super::Builder::stack) on something else.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads. `n_heads` must be a multiple of it; fewer than `n_heads` is grouped-query
    /// attention.
    pub n_kv_heads: usize,
    /// Width of a head; `d_model / n_heads` if `None`.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Hidden width of the feed-forward network.
    pub d_ff: usize,
    /// Pre- or post-norm.
    pub norm_placement: NormPlacement,
    /// Multiplies each branch by a trained number before it is added to the stream. The number starts at this value; 0
    /// is ReZero (Bachlechner et al. 2020, <https://arxiv.org/abs/2003.04887>). `None` for no gate.
    #[serde(default)]
    pub residual_gate: Option<f32>,
    /// Kind of norm.
    pub norm: Norm,
    /// Added to the variance or mean square in norms.
    pub norm_eps: f32,
    /// Learned positions or RoPE.
    pub positions: Positions,
    /// The feed-forward network.
    pub mlp: Mlp,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Whether queries and keys pass through an RMSNorm of their own, head by head, before they are rotated (Qwen3).
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether a token attends to the tokens after it too, as in an encoder.
    #[serde(default)]
    pub bidirectional: bool,
    /// Whether the embedding is normalised before the first block.
    #[serde(default)]
    pub embed_norm: bool,
    /// Number of token types with a learned vector each, added to the embedding: 2 in BERT, 0 for none.
    #[serde(default)]
    pub token_types: usize,
    /// Whether the output projection is the transposed embedding rather than a matrix of its own.
    pub tied_head: bool,
    /// Probability of dropping an element of the embedding and of each branch during training.
    pub dropout: f32,
    /// How weights are initialised.
    pub init: Init,
}

/// Checks that all ids are in the vocabulary. The error names the first that is not, and its place in `what`.
pub(crate) fn check_ids(what: impl Display, ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(i) => {
            let expected = format!("ids below {vocab_size}, the size of the vocabulary");
            Err(Error::data(what, expected, format!("{} at index {i}", ids[i])))
        }
    }
}

impl TransformerConfig {
    /// A model like GPT-2: pre-norm LayerNorm, learned positions, tanh GELU of 4 times the width, biases, tied head.
    pub fn gpt2(vocab_size: usize, context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            vocab_size,
            context,
            n_layers,
            d_model,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: None,
            d_ff: d_model.saturating_mul(4),
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

    /// A model like Llama: pre-norm RMSNorm, RoPE, SwiGLU of about 8/3 the width, no biases, untied head.
    pub fn llama(vocab_size: usize, context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            d_ff: (d_model.saturating_mul(8) / 3).div_ceil(16) * 16,
            norm: Norm::RmsNorm,
            positions: Positions::Rope { theta: 10_000.0, interleaved: false, scaling: Scaling::None },
            mlp: Mlp::SwiGlu,
            biases: Biases::NONE,
            tied_head: false,
            ..Self::gpt2(vocab_size, context, n_layers, d_model, n_heads)
        }
    }

    /// A model like BERT: an encoder with post-norm LayerNorm, learned positions, exact GELU, biases, two token types.
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

    /// Blocks for anything but text, as in vision transformers: pre-norm LayerNorm, learned positions, exact GELU of 4
    /// times the width, biases. Every place sees all others: set `bidirectional` to false where the future is unknown.
    /// Weights are as large as PyTorch's at first, `1 / sqrt(3 d_model)`, since GPT-2's learn slowly in a narrow model.
    ///
    /// It has no vocabulary: [`Builder::stack`](super::Builder::stack) takes it, and models of tokens do if you set
    /// `vocab_size`.
    pub fn stack(context: usize, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        TransformerConfig {
            mlp: Mlp::GeluErf,
            bidirectional: true,
            init: Init::Gpt2 { std: (3.0 * d_model as f32).sqrt().recip() },
            ..Self::gpt2(0, context, n_layers, d_model, n_heads)
        }
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.d_model / self.n_heads.max(1))
    }

    /// Factor of the attention scores.
    pub(crate) fn attention_scale(&self) -> f32 {
        let rotated = match self.positions {
            Positions::Rope { scaling, .. } => scaling.attention_factor().powi(2),
            Positions::Learned => 1.0,
        };
        rotated / (self.head_dim() as f32).sqrt()
    }

    /// The initialisation of ordinary weights, or of projections into the residual stream: of parameters that you add
    /// to a [`Block`](super::Block) yourself.
    pub fn weight_init(&self, into_stream: bool) -> ParamInit {
        let scale = 1.0 / (2.0 * self.n_layers as f32).sqrt();
        match self.init {
            Init::Gpt2 { std } if into_stream => ParamInit::Normal(std * scale),
            Init::ZeroResidual { .. } if into_stream => ParamInit::ZEROS,
            Init::Plain { std } | Init::Gpt2 { std } | Init::ZeroResidual { std } => ParamInit::Normal(std),
        }
    }

    /// Checks that the fields fit together. [`Transformer::build`](super::Transformer::build) and the others call it
    /// themselves.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) names the first field with an impossible value. A `vocab_size` of 0 is
    /// one: only a [`Builder`](super::Builder) takes a configuration without a vocabulary.
    pub fn validate(&self) -> Result<()> {
        Error::unless(self.vocab_size > 0, "vocab_size", "from 1 to 2^24", self.vocab_size)?;
        self.validate_stack()
    }

    /// The same for a stack without tokens.
    pub(super) fn validate_stack(&self) -> Result<()> {
        let err = |field, message: String| Err(Error::config(field, message));
        let vocab_size = self.vocab_size.max(1);
        let counts = [
            ("vocab_size", vocab_size),
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
        Error::unless(self.n_layers <= MAX_LAYERS, "n_layers", &format!("at most {MAX_LAYERS}"), self.n_layers)?;
        let width = self.n_heads.saturating_mul(self.head_dim());
        for (field, n) in [("token_types", self.token_types), ("n_heads * head_dim", width)] {
            Error::unless(n <= 1 << 24, field, "at most 2^24", n)?;
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
        Error::unless(is_positive(self.norm_eps), "norm_eps", POSITIVE, self.norm_eps)?;
        let gate = self.residual_gate.unwrap_or(0.0);
        Error::unless((-MAX_INITIAL..=MAX_INITIAL).contains(&gate), "residual_gate", "from -100 to 100", gate)?;
        let (Init::Plain { std } | Init::Gpt2 { std } | Init::ZeroResidual { std }) = self.init;
        Error::unless((0.0..=MAX_INITIAL).contains(&std), "init", "a standard deviation from 0 to 100", std)
    }
}
