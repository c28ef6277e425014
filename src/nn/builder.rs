//! Layers: nodes of a graph, with the parameters that they need.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

use super::caches::Caches;
use super::config::{Norm, TransformerConfig};
use super::lora::{LORA_A, LORA_B, Lora};
use super::names::part_name;
use super::slots::Slots;
use super::table::Table;
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::{Graph, ParamInit, Source, Value};
use crate::ops::packed_i8::Activations;
use crate::ops::patches::Conv;
use crate::tensor::split_rows;

/// Added to the variance or the mean square in norms, where no configuration says otherwise.
const NORM_EPS: f32 = 1e-5;

/// Adds layers to a graph, with the parameters that they need.
///
/// With [`new`](Self::new) it is for networks of any kind: here are linear layers, norms, tables, convolutions and
/// dropout. With [`with_config`](Self::with_config) it adds the parts of a transformer as well: what
/// [`Block`](super::Block)s are made of, and whole [stacks](Self::stack) of them.
///
/// ```
/// use throughline::nn::Builder;
/// use throughline::{Graph, TensorType};
///
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([256, 2]))?;
/// let mut b = Builder::new(&mut g);
/// let h = b.linear("in", x, 64)?;
/// let h = b.tanh("act", h)?; // a method of the graph
/// let y = b.linear("out", h, 1)?;
///
/// assert_eq!(g.ty(y).shape.dims(), [256, 1]);
/// let names: Vec<&str> = g.params().iter().map(|&p| g.name(p)).collect();
/// assert_eq!(names, ["in.weight", "in.bias", "out.weight", "out.bias"]);
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// # Graph and builder
///
/// A builder dereferences to its [`Graph`], so every op is a method here too. Where both have a method of one name, such
/// as `linear`, this one also makes the parameters; `b.g.linear` is the graph's.
///
/// # Names
///
/// The parameters of a layer are called `{name}.weight` and `{name}.bias`, after the [scopes](Self::scoped) around it:
/// `h.0.attn.q.weight`. Files, probes and other graphs on the same parameters find them by these names, so layers with
/// parameters need one. Other nodes may have the name `""`, which stands for that of their op.
///
/// # Initial values
///
/// Parameters carry their initialisation in the graph ([`Graph::init`]). Without a configuration it is PyTorch's:
/// weights and biases uniform within `1 / sqrt(d_in)`, tables normal. With one it is the configuration's
/// [`init`](TransformerConfig::init), and biases are zero.
#[derive(Debug)]
pub struct Builder<'a> {
    /// The graph.
    pub g: &'a mut Graph,
    config: Option<&'a TransformerConfig>,
    training: bool,
    /// Number of nodes that were there before.
    first: usize,
    /// Values that earlier layers left for later ones.
    kept: BTreeMap<String, Value>,
    /// Matrices that stay packed, by name, and the inputs that they became.
    packed: Option<&'a BTreeMap<String, Packed>>,
    /// How packed products read their inputs.
    pub(super) activations: Activations,
    packed_inputs: Vec<Value>,
    /// Adapters of linear layers.
    lora: Option<&'a Lora>,
    /// Inputs times the first matrix of an adapter, by the layer that owns it.
    low: BTreeMap<String, Value>,
    /// Adapters that each sequence of a decoder chooses.
    pub(super) slots: Option<Slots>,
    pub(super) caches: Option<Caches>,
    /// Texts that share sequences.
    pub(super) texts: Option<Texts>,
}

impl Deref for Builder<'_> {
    type Target = Graph;

    fn deref(&self) -> &Graph {
        self.g
    }
}

impl DerefMut for Builder<'_> {
    fn deref_mut(&mut self) -> &mut Graph {
        self.g
    }
}

/// What [`Builder::linear_with`] adds: start from the default, a layer with a bias.
///
/// ```
/// use throughline::graph::ParamInit;
/// use throughline::nn::Linear;
/// let plain = Linear { bias: false, ..Linear::default() };
/// let before_relu = Linear { init: Some(ParamInit::he(64)), ..Linear::default() };
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linear {
    /// Whether to add a trained bias. True by default.
    pub bias: bool,
    /// Whether the result is added to the residual stream: configurations may [initialise](super::Init) such weights in
    /// another way. False by default.
    pub into_stream: bool,
    /// The initialisation of the weight. The builder's by default.
    pub init: Option<ParamInit>,
}

impl Default for Linear {
    fn default() -> Self {
        Linear { bias: true, into_stream: false, init: None }
    }
}

impl<'a> Builder<'a> {
    /// A builder for networks of any kind. Parts of transformers need [`with_config`](Self::with_config).
    pub fn new(g: &'a mut Graph) -> Self {
        let first = g.nodes().len();
        let (config, training, kept, packed, activations, packed_inputs) = Default::default();
        let (lora, low, slots, caches, texts) = Default::default();
        Builder {
            g,
            config,
            training,
            first,
            kept,
            packed,
            activations,
            packed_inputs,
            lora,
            low,
            slots,
            caches,
            texts,
        }
    }

    /// A builder for parts of a transformer, such as a [`stack`](Self::stack), as well as for other layers.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first field with an impossible value. A `vocab_size` of 0 is possible here.
    ///
    /// ```
    /// use throughline::nn::{Builder, TransformerConfig};
    /// use throughline::{Graph, TensorType};
    ///
    /// // The next values of a series with 3 channels, from those before.
    /// let config = TransformerConfig { bidirectional: false, ..TransformerConfig::stack(100, 2, 32, 4) };
    /// let mut g = Graph::new();
    /// let series = g.input("series", TensorType::f32([8, 100, 3]))?;
    /// let next = g.input("next", TensorType::f32([8, 100, 3]))?;
    /// let mut b = Builder::with_config(&mut g, &config)?;
    /// let x = b.linear("in", series, 32)?;
    /// let hidden = b.stack(x)?.hidden;
    /// let y = b.linear("out", hidden, 3)?;
    /// let loss = b.mse("loss", y, next)?; // for a `GraphTrainer`
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn with_config(g: &'a mut Graph, config: &'a TransformerConfig) -> Result<Self> {
        config.validate_stack()?;
        Ok(Builder { config: Some(config), ..Self::new(g) })
    }

    /// With dropout, as in training. Build another graph without this to evaluate.
    ///
    /// The graph then has the input [`Graph::step_seed`], which trainers write.
    pub fn training(mut self) -> Self {
        self.training = true;
        self
    }

    /// With adapters beside the linear layers that they are for: see [`Lora`]. Call `validate` on settings from
    /// elsewhere before.
    ///
    /// ```
    /// use throughline::nn::{Builder, Lora};
    /// use throughline::{Graph, TensorType};
    /// let lora = Lora { targets: vec!["out".into()], ..Lora::new(4, 8.0) };
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([16, 32]))?;
    /// let y = Builder::new(&mut g).adapted(&lora).linear("out", x, 64)?;
    /// let a = g.find("out.lora_a").unwrap();
    /// assert_eq!(g.ty(a).shape.dims(), [32, 4]);
    /// // For a trainer: everything but the adapters stays as it is.
    /// let frozen: Vec<_> = g.params().into_iter().filter(|&p| !lora.trains(g.name(p))).collect();
    /// assert_eq!(frozen.len(), 2);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn adapted(mut self, lora: &'a Lora) -> Self {
        self.lora = Some(lora);
        self
    }

    /// With these matrices in their stored format.
    pub(super) fn packed(mut self, packed: &'a BTreeMap<String, Packed>) -> Self {
        self.packed = Some(packed);
        self
    }

    /// The configuration.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if there is none.
    pub fn config(&self) -> Result<&'a TransformerConfig> {
        self.configured("this part of a transformer")
    }

    /// The configuration, for a part of a transformer that needs one.
    pub(super) fn configured(&self, part: &str) -> Result<&'a TransformerConfig> {
        self.config.ok_or_else(|| {
            let message = "needs a configuration: make the builder with `Builder::with_config`";
            Error::Graph(match self.g.full_name("") {
                scope if scope.is_empty() => format!("{part} {message}"),
                scope => format!("`{}`: {part} {message}", scope.trim_end_matches('.')),
            })
        })
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

    /// The parameters that were added since this builder was made, also by methods of the graph, and packed matrices.
    pub(super) fn added_params(&self) -> Vec<Value> {
        let mut added = self.g.externals(|source| matches!(source, Source::Param(_)));
        added.retain(|p| p.node() >= self.first);
        added.extend(&self.packed_inputs);
        added.sort_by_key(|p| p.node());
        added
    }

    /// `x w + bias`: `[.., d_in] -> [.., d_out]`, with the weight `{name}.weight` and the bias `{name}.bias`.
    pub fn linear(&mut self, name: &str, x: Value, d_out: usize) -> Result<Value> {
        self.linear_with(name, x, d_out, Linear::default())
    }

    /// [`linear`](Self::linear) with a choice of bias and initialisation.
    pub fn linear_with(&mut self, name: &str, x: Value, d_out: usize, how: Linear) -> Result<Value> {
        let d_in = self.g.type_of(name, x)?.shape.cols();
        let init = how.init.unwrap_or_else(|| self.weight_init(d_in, how.into_stream));
        let weight = format!("{name}.weight");
        let packed = self.packed_matrix(&weight, d_out, d_in)?;
        let w = match packed {
            Some((w, _)) => w,
            None => self.g.param_with(&weight, [d_in, d_out], init)?,
        };
        let bias = match how.bias {
            true => Some(self.bias(name, d_out, d_in)?),
            false => None,
        };
        let adapter = self.lora.filter(|lora| lora.adapts(&self.g.full_name(name)));
        let full = self.g.full_name(name);
        let by_sequence = self.slots.as_ref().is_some_and(|slots| slots.has_room_for(&full));
        let base = (adapter.is_some() || by_sequence).then(|| format!("{name}.base"));
        let product = base.as_deref().unwrap_or(name);
        let y = match packed {
            Some((_, matrix)) => self.g.packed_linear_of(product, [x, w], matrix, bias, self.activations)?,
            None => self.g.linear(product, x, w, bias)?,
        };
        match (adapter, &mut self.slots) {
            (Some(lora), _) => self.add_adapter(lora, name, x, y),
            (None, Some(slots)) if by_sequence => slots.add(self.g, name, x, y),
            _ => Ok(y),
        }
    }

    /// `y + scale * (x a) b`. The sum has the layer's name.
    fn add_adapter(&mut self, lora: &Lora, name: &str, x: Value, y: Value) -> Result<Value> {
        let owner = lora.owner_of_a(name);
        let (d_in, d_out) = (self.g.ty(x).shape.cols(), self.g.ty(y).shape.cols());
        let key = self.g.full_name(&owner);
        let low = match self.low.get(&key) {
            Some(&low) => low,
            None => {
                let x = self.dropout(x, lora.dropout)?;
                let a = self.g.param_with(&format!("{owner}.{LORA_A}"), [d_in, lora.rank], ParamInit::fan_in(d_in))?;
                let low = self.g.matmul(&format!("{owner}.low"), x, a)?;
                let low = self.g.scale(&format!("{owner}.scaled"), low, lora.scale())?;
                self.low.insert(key, low);
                low
            }
        };
        let b = self.g.param_with(&format!("{name}.{LORA_B}"), [lora.rank, d_out], ParamInit::ZEROS)?;
        let delta = self.g.matmul(&format!("{name}.delta"), low, b)?;
        self.g.residual_add(name, y, delta)
    }

    /// The initialisation of a weight, if nothing else is asked for.
    fn weight_init(&self, fan_in: usize, into_stream: bool) -> ParamInit {
        self.config.map_or(ParamInit::fan_in(fan_in), |config| config.weight_init(into_stream))
    }

    /// The bias of a layer that sums over `fan_in` inputs.
    fn bias(&mut self, name: &str, n: usize, fan_in: usize) -> Result<Value> {
        let init = if self.config.is_some() { ParamInit::ZEROS } else { ParamInit::fan_in(fan_in) };
        self.g.param_with(&format!("{name}.bias"), [n], init)
    }

    /// A multi-layer perceptron: linear layers of these widths, with an activation between them. The layers are called
    /// `{name}.0`, `{name}.1` and so on.
    ///
    /// ```
    /// use throughline::nn::Builder;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([16, 2]))?;
    /// let y = Builder::new(&mut g).mlp("net", x, &[64, 64, 3], |g, h| g.relu("act", h))?;
    /// assert_eq!(g.ty(y).shape.dims(), [16, 3]);
    /// assert!(g.find("net.2.bias").is_some());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn mlp(
        &mut self,
        name: &str,
        x: Value,
        widths: &[usize],
        mut activation: impl FnMut(&mut Graph, Value) -> Result<Value>,
    ) -> Result<Value> {
        if widths.is_empty() {
            return Err(Error::Graph(format!("`{}`: an mlp needs at least one width", self.g.full_name(name))));
        }
        self.scoped(name, |b| {
            let mut x = x;
            for (i, &width) in widths.iter().enumerate() {
                if i > 0 {
                    x = activation(b.g, x)?;
                }
                x = b.linear(&i.to_string(), x, width)?;
            }
            Ok(x)
        })
    }

    /// A convolution of images with a kernel of this size: `[n, height, width, c_in] -> [n, down, across, c_out]`, with the
    /// weight `{name}.weight`, `[kh, kw, c_in, c_out]`, and the bias `{name}.bias`.
    ///
    /// ```
    /// use throughline::nn::Builder;
    /// use throughline::ops::patches::Conv;
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let images = g.input("images", TensorType::f32([8, 28, 28, 1]))?;
    /// let mut b = Builder::new(&mut g);
    /// let h = b.conv2d("in", images, 16, [3, 3], Conv { stride: 2, ..Conv::same() })?;
    /// let h = b.relu("act", h)?;
    /// let h = b.conv2d("deep", h, 32, [3, 3], Conv { stride: 2, ..Conv::same() })?;
    /// let h = b.reshape("features", h, [8, 7 * 7 * 32])?;
    /// let logits = b.linear("out", h, 10)?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn conv2d(&mut self, name: &str, x: Value, c_out: usize, size: [usize; 2], conv: Conv) -> Result<Value> {
        let [w, bias] = self.kernel(name, x, &size, c_out)?;
        self.g.conv2d(name, x, w, Some(bias), conv)
    }

    /// A convolution of sequences with a kernel of `size` steps: `[n, time, c_in] -> [n, steps, c_out]`, with the weight
    /// `{name}.weight`, `[size, c_in, c_out]`, and the bias `{name}.bias`.
    pub fn conv1d(&mut self, name: &str, x: Value, c_out: usize, size: usize, conv: Conv) -> Result<Value> {
        let [w, bias] = self.kernel(name, x, &[size], c_out)?;
        self.g.conv1d(name, x, w, Some(bias), conv)
    }

    /// Weight and bias of a convolution.
    fn kernel(&mut self, name: &str, x: Value, size: &[usize], c_out: usize) -> Result<[Value; 2]> {
        let c_in = self.g.type_of(name, x)?.shape.cols();
        let fan_in = size.iter().fold(c_in, |taps, n| taps.saturating_mul(*n));
        let init = self.weight_init(fan_in, false);
        let w = self.g.param_with(&format!("{name}.weight"), [size, &[c_in, c_out]].concat(), init)?;
        Ok([w, self.bias(name, c_out, fan_in)?])
    }

    /// The square patches of images, side by side, through one linear layer: `[n, height, width, c] -> [n, patches,
    /// width]`, from left to right, then down. It is where a vision transformer (Dosovitskiy et al. 2020,
    /// <https://arxiv.org/abs/2010.11929>) begins; a [`stack`](Self::stack) follows.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if height or width are not whole patches.
    ///
    /// ```
    /// use throughline::nn::{Builder, TransformerConfig};
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let images = g.input("images", TensorType::f32([8, 32, 32, 3]))?;
    /// let config = TransformerConfig::stack(64, 2, 48, 4);
    /// let mut b = Builder::with_config(&mut g, &config)?;
    /// let patches = b.embed_patches("patches", images, 4, 48)?;
    /// let hidden = b.stack(patches)?.hidden;
    /// let mean = b.mean_axis("mean", hidden, 1)?;
    /// let logits = b.linear("classes", mean, 10)?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn embed_patches(&mut self, name: &str, images: Value, size: usize, width: usize) -> Result<Value> {
        let shape = &self.g.type_of(name, images)?.shape;
        let whole = |pixels: usize| size > 0 && pixels.is_multiple_of(size);
        let n = match *shape.dims() {
            [n, height, width, _] if whole(height) && whole(width) => n,
            _ => {
                let expected = format!("images [n, height, width, channels] of whole patches, {size} x {size}");
                return Err(Error::data(self.g.full_name(name), expected, shape));
            }
        };
        let rows =
            self.g.patches(&format!("{name}.pixels"), images, [size; 2], Conv { stride: size, ..Conv::default() })?;
        let [_, down, across, pixels] = [0, 1, 2, 3].map(|axis| self.g.ty(rows).shape.dims()[axis]);
        let rows = self.g.reshape(&format!("{name}.rows"), rows, [n, down * across, pixels])?;
        self.linear(name, rows, width)
    }

    /// Rows of a trained table `{name}.weight`, `[rows, width]`, by id: u32 `[..] -> [.., width]`. For tokens, and for
    /// anything else that there are few kinds of.
    pub fn embedding(&mut self, name: &str, ids: Value, rows: usize, width: usize) -> Result<Value> {
        let init = self.config.map_or(ParamInit::Normal(1.0), |config| config.weight_init(false));
        self.table(&format!("{name}.weight"), [rows, width], init)?.rows(self.g, name, ids)
    }

    /// LayerNorm over the last dimension, with the trained gain `{name}.weight` and shift `{name}.bias`.
    pub fn layernorm(&mut self, name: &str, x: Value) -> Result<Value> {
        let gamma = self.gain(name, x)?;
        let width = self.g.ty(gamma).len();
        let beta = self.g.param_with(&format!("{name}.bias"), [width], ParamInit::ZEROS)?;
        let eps = self.norm_eps();
        self.g.layernorm(name, x, gamma, beta, eps)
    }

    /// RMSNorm over the last dimension, with the trained gain `{name}.weight`.
    pub fn rmsnorm(&mut self, name: &str, x: Value) -> Result<Value> {
        let (gamma, eps) = (self.gain(name, x)?, self.norm_eps());
        self.g.rmsnorm(name, x, gamma, eps)
    }

    /// The configuration's kind of norm over the last dimension, with its trained parameters.
    pub fn norm(&mut self, name: &str, x: Value) -> Result<Value> {
        match self.configured("a norm of the model's kind")?.norm {
            Norm::RmsNorm => self.rmsnorm(name, x),
            Norm::LayerNorm => self.layernorm(name, x),
        }
    }

    /// The gain of a norm, one per element of a row.
    fn gain(&mut self, name: &str, x: Value) -> Result<Value> {
        let width = self.g.type_of(name, x)?.shape.cols();
        self.g.param_with(&format!("{name}.weight"), [width], ParamInit::ONES)
    }

    fn norm_eps(&self) -> f32 {
        self.config.map_or(NORM_EPS, |config| config.norm_eps)
    }

    /// In [training](Self::training), `x` with elements dropped with probability `p`, and the others divided by `1 - p`.
    /// Otherwise `x` itself.
    pub fn dropout(&mut self, x: Value, p: f32) -> Result<Value> {
        if !self.training || p == 0.0 {
            return Ok(x);
        }
        let seed = self.g.step_seed()?;
        // Each dropout of a graph draws from a random stream of its own.
        let is_dropout = |source: &Source| matches!(source, Source::Op(op) if op.name() == "dropout");
        let before = self.g.nodes().iter().filter(|node| is_dropout(&node.source)).count();
        self.g.dropout("drop", x, seed, p, before as u32 + 1)
    }

    /// The matrix `[n, k]` of this name, if it stays packed.
    fn packed_matrix(&mut self, name: &str, n: usize, k: usize) -> Result<Option<(Value, Packed)>> {
        let full = self.g.full_name(name);
        let Some(&matrix) = self.packed.and_then(|packed| packed.get(&full)) else { return Ok(None) };
        self.check_packed(name, matrix, n, k)?;
        Ok(Some((self.packed_input(name, matrix)?, matrix)))
    }

    /// A table in as few parts as the device allows.
    pub(super) fn table(&mut self, name: &str, [rows, width]: [usize; 2], init: ParamInit) -> Result<Table> {
        let max = self.g.max_tensor_bytes();
        if let Some(&matrix) = self.packed.and_then(|packed| packed.get(&self.g.full_name(name))) {
            self.check_packed(name, matrix, rows, width)?;
            let split = matrix.split(max)?;
            let mut parts = vec![];
            for part in &split {
                let first = parts.iter().map(|(_, part): &(Value, Packed)| part.n).sum();
                parts.push((self.packed_input(&part_name(name, first, split.len()), *part)?, *part));
            }
            return Ok(Table::Packed(parts));
        }
        let split = split_rows(rows, 4 * width, max)?;
        let (mut parts, mut first) = (vec![], 0);
        for &n in &split {
            parts.push(self.g.param_with(&part_name(name, first, split.len()), [n, width], init)?);
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
        self.packed_inputs.push(value);
        Ok(value)
    }
}
