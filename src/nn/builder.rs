//! The parts of a transformer: nodes of a graph, with the parameters that they need.

use std::collections::BTreeMap;
use std::ops::Range;

use super::config::{Init, Mlp, Norm, NormPlacement, Positions, TransformerConfig};
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, ParamInit, Value};
use crate::ops::attention::Attention;
use crate::ops::rope::Rope;
use crate::tensor::{Shape, TensorType, split_rows};

/// Caches of keys and values, collected while blocks are added.
#[derive(Debug)]
pub(super) struct Caches {
    /// Number of earlier tokens of each sequence: u32 `[batch]`.
    pub start: Value,
    pub capacity: usize,
    pub states: Vec<Value>,
}

impl Caches {
    /// Adds a cache for `rows` and writes them to it.
    fn write(&mut self, g: &mut Graph, name: &str, rows: Value) -> Result<Value> {
        let shape = &g.type_of(name, rows)?.shape;
        let (batch, width) = (shape.dims()[0], shape.cols());
        let state = g.state(name, TensorType::f32([batch, self.capacity, width]))?;
        let written = g.cache_write(&format!("{name}.write"), rows, self.start, state)?;
        g.store(written, state)?;
        self.states.push(state);
        Ok(written)
    }
}

/// A matrix `[rows, d_model]` with a row per token, split into parts if it is too large for one tensor.
#[derive(Clone, Debug)]
pub(super) enum Table {
    Plain(Vec<Value>),
    Packed(Vec<(Value, Packed)>),
}

impl Table {
    /// Looks up rows by id.
    fn rows(&self, g: &mut Graph, name: &str, ids: Value) -> Result<Value> {
        match self {
            Table::Plain(parts) => g.embedding_parts(name, parts, ids),
            Table::Packed(parts) => g.packed_rows_parts(name, parts, ids),
        }
    }

    /// The product of `x` with every row.
    fn scores(&self, g: &mut Graph, name: &str, x: Value) -> Result<Value> {
        match self {
            Table::Plain(parts) => g.matmul_nt_parts(name, x, parts),
            Table::Packed(parts) => g.packed_linear_parts(name, x, parts),
        }
    }
}

/// The name of the part that starts at row `first`: the table's own name if it has only one part.
pub(crate) fn part_name(table: &str, first: usize, parts: usize) -> String {
    if parts == 1 { table.to_string() } else { format!("{table}@{first}") }
}

/// The table that a parameter of this name belongs to, and its first row.
pub(crate) fn table_of_part(name: &str) -> (&str, usize) {
    let part = name.rsplit_once('@').and_then(|(table, first)| Some((table, first.parse().ok()?)));
    part.unwrap_or((name, 0))
}

/// Whether a parameter is the weight of a linear layer inside a block. Those are the parameters that Muon updates, if
/// it is used.
///
/// They are the matrices whose name begins with `h.` and ends with `.weight`. Tables (`embed.weight`,
/// `token_type.weight`, `position.weight`, `head.weight`, and their parts such as `embed.weight@64`) are outside of
/// blocks; norms, biases and gates have only one dimension. A [`Block`](super::Block) that contains a matrix of another
/// kind, such as a table, keeps it from Muon by another last name: `h.0.values.table`.
pub fn is_hidden_matrix(name: &str, shape: &Shape) -> bool {
    shape.rank() == 2 && name.starts_with("h.") && name.ends_with(".weight")
}

/// The rows that the parameter of this name and shape has of a whole tensor. `None` if the two do not fit together.
pub(crate) fn rows_of_part(name: &str, shape: &Shape, whole: &Shape) -> Option<Range<usize>> {
    let (table, first) = table_of_part(name);
    let end = first.checked_add(shape.rows())?;
    let fits = match table == name {
        true => whole == shape,
        false => whole.rank() == 2 && whole.cols() == shape.cols() && end <= whole.rows(),
    };
    fits.then_some(first..end)
}

/// Adds the parts of a transformer to a graph: what a [`Block`](super::Block) is made of.
///
/// Parameters are named after their part and the scopes around it: `h.0.attn.q.weight`.
#[derive(Debug)]
pub struct Builder<'a> {
    /// The graph, for ops that have no method here.
    pub g: &'a mut Graph,
    config: &'a TransformerConfig,
    /// Matrices that stay packed, by name.
    packed: Option<&'a BTreeMap<String, Packed>>,
    pub(super) caches: Option<Caches>,
    dropout: f32,
    pub(super) dropout_seed: Option<Value>,
    /// Number of dropout nodes so far. Each gets a random stream of its own.
    dropout_sites: u32,
    /// Values that earlier layers left for later ones.
    kept: BTreeMap<String, Value>,
    pub(super) params: Vec<Value>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(g: &'a mut Graph, config: &'a TransformerConfig) -> Result<Self> {
        config.validate()?;
        let (packed, caches, dropout_seed) = (None, None, None);
        Ok(Builder {
            g,
            config,
            packed,
            caches,
            dropout: 0.0,
            dropout_seed,
            dropout_sites: 0,
            kept: BTreeMap::new(),
            params: vec![],
        })
    }

    /// With dropout, as in training.
    pub(super) fn training(mut self) -> Result<Self> {
        self.dropout = self.config.dropout;
        if self.dropout > 0.0 {
            self.dropout_seed = Some(self.g.step_seed()?);
        }
        Ok(self)
    }

    /// With these matrices in their stored format.
    pub(super) fn packed(mut self, packed: &'a BTreeMap<String, Packed>) -> Self {
        self.packed = Some(packed);
        self
    }

    /// The model's configuration.
    pub fn config(&self) -> &'a TransformerConfig {
        self.config
    }

    /// Runs `f` with `scope.` prepended to every name.
    ///
    /// Use it to keep the names of a branch apart from those of its siblings: two calls of [`linear`](Self::linear)
    /// with the same name in the same scope are an error.
    pub fn scoped<T>(&mut self, scope: &str, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.g.enter(scope);
        let result = f(self);
        self.g.leave();
        result
    }

    /// Leaves a value for later layers, under a name: for connections that skip layers.
    pub fn keep(&mut self, name: &str, value: Value) {
        self.kept.insert(name.to_string(), value);
    }

    /// The value that an earlier layer left under this name with [`keep`](Self::keep).
    pub fn kept(&self, name: &str) -> Option<Value> {
        self.kept.get(name).copied()
    }

    /// Adds a trained tensor of your own to the model.
    pub fn param(&mut self, name: &str, shape: &[usize], init: ParamInit) -> Result<Value> {
        let value = self.g.param_with(name, shape, init)?;
        self.params.push(value);
        Ok(value)
    }

    /// The matrix `[n, k]` of this name, if it stays packed.
    fn packed_matrix(&mut self, name: &str, n: usize, k: usize) -> Result<Option<(Value, Packed)>> {
        let full = self.g.full_name(name);
        let Some(&matrix) = self.packed.and_then(|packed| packed.get(&full)) else { return Ok(None) };
        self.check_packed(name, matrix, n, k)?;
        Ok(Some((self.packed_input(name, matrix)?, matrix)))
    }

    /// A table of `rows` rows, in as few parts as the device allows.
    fn table(&mut self, name: &str, rows: usize) -> Result<Table> {
        let (d, max) = (self.config.d_model, self.g.max_tensor_bytes());
        if let Some(&matrix) = self.packed.and_then(|packed| packed.get(&self.g.full_name(name))) {
            self.check_packed(name, matrix, rows, d)?;
            let split = matrix.split(max)?;
            let mut parts = vec![];
            for part in &split {
                let first = parts.iter().map(|(_, part): &(Value, Packed)| part.n).sum();
                parts.push((self.packed_input(&part_name(name, first, split.len()), *part)?, *part));
            }
            return Ok(Table::Packed(parts));
        }
        let (split, init) = (split_rows(rows, 4 * d, max)?, self.weight_init(false));
        let (mut parts, mut first) = (vec![], 0);
        for &n in &split {
            parts.push(self.param(&part_name(name, first, split.len()), &[n, d], init)?);
            first += n;
        }
        Ok(Table::Plain(parts))
    }

    /// Returns an error if a packed matrix is not `[n, k]`.
    fn check_packed(&self, name: &str, matrix: Packed, n: usize, k: usize) -> Result<()> {
        if [matrix.n, matrix.k] == [n, k] {
            return Ok(());
        }
        Err(Error::data(self.g.full_name(name), format!("{n} x {k}"), format!("{} x {}", matrix.n, matrix.k)))
    }

    /// A packed matrix as an input. It is frozen, so it is not a parameter to train.
    fn packed_input(&mut self, name: &str, matrix: Packed) -> Result<Value> {
        let value = self.g.input(name, matrix.ty())?;
        self.params.push(value);
        Ok(value)
    }

    /// The initialisation that the configuration asks for, for ordinary weights or for projections into the residual
    /// stream.
    pub fn weight_init(&self, into_stream: bool) -> ParamInit {
        let scale = 1.0 / (2.0 * self.config.n_layers as f32).sqrt();
        match self.config.init {
            Init::Gpt2 { std } if into_stream => ParamInit::Normal(std * scale),
            Init::ZeroResidual { .. } if into_stream => ParamInit::ZEROS,
            Init::Plain { std } | Init::Gpt2 { std } | Init::ZeroResidual { std } => ParamInit::Normal(std),
        }
    }

    /// The embedding of `tokens`, `[batch, time]`, with everything that the model adds to it: the start of the stream,
    /// `[batch, time, d_model]`. `positions` are those of the tokens, u32 `[batch, time]`; without them they count from
    /// 0.
    pub(super) fn embed(
        &mut self,
        tokens: Value,
        token_types: Option<Value>,
        positions: Option<Value>,
    ) -> Result<(Table, Value)> {
        let c = self.config;
        let init = self.weight_init(false);
        let table = self.table("embed.weight", c.vocab_size)?;
        let mut x = table.rows(self.g, "embed", tokens)?;
        if let Some(types) = token_types {
            let kinds = self.param("token_type.weight", &[c.token_types, c.d_model], init)?;
            let rows = self.g.embedding("token_type", kinds, types)?;
            x = self.g.add("token_type.add", x, rows)?;
        }
        if c.positions == Positions::Learned {
            let all = self.param("position.weight", &[c.context, c.d_model], init)?;
            let time = self.g.ty(tokens).shape.cols();
            let used = match positions {
                Some(ids) => self.g.embedding("position.used", all, ids)?,
                None if time == c.context => all,
                None => self.g.slice("position.used", all, 0, 0, time)?,
            };
            x = self.g.add("position", x, used)?;
        }
        if c.embed_norm {
            x = self.norm("embed_norm", x)?;
        }
        Ok((table, self.dropout(x)?))
    }

    /// Adds a branch to the residual stream: `x + f(norm(x))`, or `norm(x + f(x))` in post-norm models.
    ///
    /// `branch` receives the input of the branch and returns what to add to the stream, both `[batch, time, d_model]`.
    /// Dropout and the [residual gate](TransformerConfig::residual_gate) are applied here.
    pub fn residual(
        &mut self,
        name: &str,
        x: Value,
        branch: impl FnOnce(&mut Self, Value) -> Result<Value>,
    ) -> Result<Value> {
        let norm = format!("{name}_norm");
        let pre = self.config.norm_placement == NormPlacement::Pre;
        let input = if pre { self.norm(&norm, x)? } else { x };
        let mut y = self.scoped(name, |b| branch(b, input))?;
        y = self.dropout(y)?;
        if let Some(start) = self.config.residual_gate {
            let gate = self.param(&format!("{name}_gate"), &[1], ParamInit::Constant(start))?;
            y = self.scaled(&format!("{name}_gated"), y, gate)?;
        }
        let sum = self.g.residual_add(&format!("{name}_add"), x, y)?;
        if pre { Ok(sum) } else { self.norm(&norm, sum) }
    }

    /// `x` times `factor`, a tensor of shape `[1]` or of the last dimensions of `x`: trained gates and per-channel
    /// scales.
    pub fn scaled(&mut self, name: &str, x: Value, factor: Value) -> Result<Value> {
        let shape = self.g.type_of(name, x)?.shape.clone();
        let factor = self.g.broadcast(&format!("{name}.factor"), factor, shape)?;
        self.g.mul(name, x, factor)
    }

    /// Self-attention of `x`, `[batch, time, d_model] -> [batch, time, d_model]`, including the cache when decoding.
    ///
    /// It is [`qkv`](Self::qkv), [`attend`](Self::attend) and the output projection. Call those yourself to change what
    /// happens between them.
    pub fn attention(&mut self, x: Value) -> Result<Value> {
        let qkv = self.qkv(x)?;
        let y = self.attend(qkv)?;
        self.linear("o", y, self.config.d_model, self.config.biases.out, true)
    }

    /// Queries, `[batch, time, n_heads * head_dim]`, and keys and values, `[batch, time, n_kv_heads * head_dim]`.
    /// Queries and keys are normalised and rotated as the configuration says.
    pub fn qkv(&mut self, x: Value) -> Result<[Value; 3]> {
        let c = self.config;
        let [q_width, kv_width] = [c.n_heads, c.n_kv_heads].map(|n| n * c.head_dim());
        let q = self.linear("q", x, q_width, c.biases.qkv, false)?;
        let k = self.linear("k", x, kv_width, c.biases.qkv, false)?;
        let v = self.linear("v", x, kv_width, c.biases.qkv, false)?;
        Ok([self.positioned("q", q, c.n_heads)?, self.positioned("k", k, c.n_kv_heads)?, v])
    }

    /// The outputs of all heads, concatenated: `[batch, time, n_heads * head_dim]`.
    pub fn attend(&mut self, [q, k, v]: [Value; 3]) -> Result<Value> {
        let c = self.config;
        let (heads, kv_heads, causal) = (c.n_heads, c.n_kv_heads, !c.bidirectional);
        let op = Attention { heads, kv_heads, causal, scale: Some(c.attention_scale()) };
        match &mut self.caches {
            Some(caches) => {
                let written = [caches.write(self.g, "keys", k)?, caches.write(self.g, "values", v)?];
                self.g.attention_cached("scores", q, written, caches.start, op)
            }
            None => self.g.attention("scores", q, k, v, op),
        }
    }

    /// Queries or keys with the head norm and the rotation of the model applied.
    fn positioned(&mut self, name: &str, x: Value, heads: usize) -> Result<Value> {
        let c = self.config;
        let mut x = x;
        if c.qk_norm {
            let whole = self.g.ty(x).shape.clone();
            let by_head = [self.g.ty(x).shape.rows() * heads, c.head_dim()];
            let split = self.g.reshape(&format!("{name}.heads"), x, by_head)?;
            let gamma = self.param(&format!("{name}_norm.weight"), &[c.head_dim()], ParamInit::ONES)?;
            let normed = self.g.rmsnorm(&format!("{name}_norm"), split, gamma, c.norm_eps)?;
            x = self.g.reshape(&format!("{name}.joined"), normed, whole)?;
        }
        let Positions::Rope { theta, interleaved, scaling } = c.positions else { return Ok(x) };
        let rope = Rope { heads, theta, interleaved, scaling, ..Rope::default() };
        let name = format!("{name}_rope");
        match &self.caches {
            Some(caches) => self.g.rope_from(&name, x, caches.start, rope),
            None => self.g.rope(&name, x, rope),
        }
    }

    /// The feed-forward network of a block: `[batch, time, d_model] -> [batch, time, d_model]`.
    pub fn mlp(&mut self, x: Value) -> Result<Value> {
        let c = self.config;
        let up = self.linear("up", x, c.d_ff, c.biases.mlp, false)?;
        let hidden = match c.mlp {
            Mlp::GeluTanh => self.g.gelu_tanh("gelu", up)?,
            Mlp::GeluErf => self.g.gelu("gelu", up)?,
            Mlp::SwiGlu => {
                let gate = self.linear("gate", x, c.d_ff, c.biases.mlp, false)?;
                self.g.swiglu("swiglu", gate, up)?
            }
        };
        self.linear("down", hidden, c.d_model, c.biases.mlp, true)
    }

    /// The logits of all tokens, from the normalised end of the stream.
    pub(super) fn head(&mut self, embedding: Table, x: Value) -> Result<Value> {
        let table = match self.config.tied_head {
            true => embedding,
            false => self.table("head.weight", self.config.vocab_size)?,
        };
        table.scores(self.g, "head", x)
    }

    /// `x w + bias`: `[.., d_in] -> [.., d_out]`, with the weight `{name}.weight` and, if `bias` is true,
    /// `{name}.bias`.
    ///
    /// Set `into_stream` if the result is added to the residual stream: such weights are initialised differently (see
    /// [`Init`]).
    pub fn linear(&mut self, name: &str, x: Value, d_out: usize, bias: bool, into_stream: bool) -> Result<Value> {
        let d_in = self.g.type_of(name, x)?.shape.cols();
        let init = self.weight_init(into_stream);
        let weight = format!("{name}.weight");
        let packed = self.packed_matrix(&weight, d_out, d_in)?;
        let w = match packed {
            Some((w, _)) => w,
            None => self.param(&weight, &[d_in, d_out], init)?,
        };
        let bias = match bias {
            true => Some(self.param(&format!("{name}.bias"), &[d_out], ParamInit::ZEROS)?),
            false => None,
        };
        match packed {
            Some((_, matrix)) => self.g.packed_linear(name, x, w, matrix, bias),
            None => self.g.linear(name, x, w, bias),
        }
    }

    /// The model's kind of norm over the last dimension, with its trained parameters.
    pub fn norm(&mut self, name: &str, x: Value) -> Result<Value> {
        let (d, eps) = (self.g.type_of(name, x)?.shape.cols(), self.config.norm_eps);
        let gamma = self.param(&format!("{name}.weight"), &[d], ParamInit::ONES)?;
        match self.config.norm {
            Norm::RmsNorm => self.g.rmsnorm(name, x, gamma, eps),
            Norm::LayerNorm => {
                let beta = self.param(&format!("{name}.bias"), &[d], ParamInit::ZEROS)?;
                self.g.layernorm(name, x, gamma, beta, eps)
            }
        }
    }

    /// `x` with elements dropped if the graph is for training and the model has dropout; otherwise `x` itself.
    pub fn dropout(&mut self, x: Value) -> Result<Value> {
        let Some(seed) = self.dropout_seed else { return Ok(x) };
        self.dropout_sites += 1;
        self.g.dropout("drop", x, seed, self.dropout, self.dropout_sites)
    }
}
