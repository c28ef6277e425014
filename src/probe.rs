//! Probes: what a graph's values are like while it runs. Patches: what it does if they were other.
//!
//! A [`Probe`] taps a named node, forward or its gradient. Its measure is a reduction on the GPU inside the step, or the
//! whole tensor. All reductions write into one small tensor, which one copy brings to the host when it is convenient: a
//! step late, say. A reduction is planned right behind the node that it looks at ([`Op::runs_early`]), so that
//! buffers are overwritten in place as ever; only where two values are compared that never are in memory at once does
//! the plan hold a copy.
//!
//! A [`Patch`] changes a named node for whoever reads it: for ablation and steering.
//!
//! ```
//! use std::sync::Arc;
//! use throughline::probe::{Instruments, Measure, Probe, Tap};
//! use throughline::{ExecOptions, Executable, Gpu, Graph, TensorType};
//! let mut g = Graph::new();
//! let x = g.input("x", TensorType::f32([2]))?;
//! let w = g.param("w", [2, 1])?;
//! let y = g.matmul("y", x, w)?;
//! let loss = g.sum("loss", y)?;
//! let probes = [
//!     Probe::new("rms", Tap::forward("x"), Measure::Rms),
//!     Probe::new("largest", Tap::gradient("w"), Measure::MaxAbs),
//!     Probe::new("alike", Tap::forward("x"), Measure::Cosine(Tap::gradient("x"))),
//! ];
//! let instruments = Instruments::with_gradients(&mut g, loss, &probes)?;
//! let gpu = Gpu::headless_blocking()?;
//! let plan = gpu.plan(&g, &[&[loss], &instruments.outputs()[..]].concat())?;
//! let exec = Executable::new_blocking(&gpu, Arc::new(plan), ExecOptions::default())?;
//! exec.write(x, &[3.0f32, -4.0])?;
//! exec.write(w, &[3.0f32, -4.0])?;
//! let mut encoder = gpu.device().create_command_encoder(&Default::default());
//! exec.record(&mut encoder);
//! let readback = instruments.read_later(&exec, &mut encoder, 0)?;
//! gpu.submit(encoder)?;
//! let values: Vec<f64> = readback.wait_blocking(&gpu)?.values.iter().map(|r| r.value).collect();
//! assert!((values[0] - 12.5f64.sqrt()).abs() < 1e-6 && values[1] == 4.0 && (values[2] - 1.0).abs() < 1e-6);
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! [`Op::runs_early`]: crate::ops::Op::runs_early

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::exec::Executable;
use crate::gpu::Gpu;
use crate::graph::{Graph, Source, Value};
use crate::nn::Transformer;
use crate::ops::fill::Fill;
use crate::ops::stats::Stats;
use crate::staging::Readback;
use crate::tensor::{DType, TensorType};

/// What a probe looks at: a node by its name, or another output than the first of it as `name:1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tap {
    /// What the node computes, or what an input, parameter or state holds.
    Forward(String),
    /// The gradient of the loss with respect to it.
    Gradient(String),
}

impl Tap {
    /// What the node of this name computes.
    pub fn forward(node: impl Into<String>) -> Self {
        Tap::Forward(node.into())
    }

    /// The gradient with respect to the node of this name.
    pub fn gradient(node: impl Into<String>) -> Self {
        Tap::Gradient(node.into())
    }

    /// Name of the node.
    pub fn node(&self) -> &str {
        let (Tap::Forward(node) | Tap::Gradient(node)) = self;
        node
    }
}

/// What a probe tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Root of the mean square.
    Rms,
    /// Largest magnitude.
    MaxAbs,
    /// Mean.
    Mean,
    /// Cosine of the angle to another tensor of the same shape, both as one long vector. NaN if one is zero.
    Cosine(Tap),
    /// RMS over the RMS of another, of any shape.
    Ratio(Tap),
    /// All elements. They stay in memory to the end of the step.
    Whole,
}

impl Measure {
    fn other(&self) -> Option<&Tap> {
        match self {
            Measure::Cosine(other) | Measure::Ratio(other) => Some(other),
            _ => None,
        }
    }
}

/// A question about a node of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Name of the answer: `stream_rms`.
    pub name: String,
    /// The layer that it is about, if it is about one.
    #[serde(default)]
    pub layer: Option<usize>,
    /// What it looks at.
    pub tap: Tap,
    /// What it tells.
    pub measure: Measure,
}

impl Probe {
    /// A probe that is about no layer in particular.
    pub fn new(name: impl Into<String>, tap: Tap, measure: Measure) -> Self {
        Probe { name: name.into(), layer: None, tap, measure }
    }

    /// The same, about a layer.
    pub fn of_layer(self, layer: usize) -> Self {
        Probe { layer: Some(layer), ..self }
    }

    fn taps(&self) -> impl Iterator<Item = &Tap> {
        [&self.tap].into_iter().chain(self.measure.other())
    }
}

/// A number that a probe or a [view](crate::views) gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Name of the probe: what kind of number it is.
    pub name: String,
    /// Name of the node that it looks at.
    pub node: String,
    /// The layer that it is about, if it is about one.
    pub layer: Option<usize>,
    /// The number.
    pub value: f64,
}

/// A tensor that a probe or a [view](crate::views) gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorReading {
    /// Name of the probe.
    pub name: String,
    /// Name of the node that it looks at.
    pub node: String,
    /// The layer that it is about, if it is about one.
    pub layer: Option<usize>,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Vec<f32>,
}

/// What the probes of one step told, in the order of the probes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Readings {
    /// The step.
    pub step: u64,
    /// Numbers.
    pub values: Vec<Reading>,
    /// Whole tensors.
    pub tensors: Vec<TensorReading>,
}

impl Readings {
    /// All numbers of this name: by layer, or by node.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Reading> {
        self.values.iter().filter(move |r| r.name == name)
    }

    /// The first number of this name and layer.
    pub fn get(&self, name: &str, layer: impl Into<Option<usize>>) -> Option<f64> {
        let layer = layer.into();
        self.values.iter().find(|r| r.name == name && r.layer == layer).map(|r| r.value)
    }
}

/// The usual questions about a transformer; `gradients` adds those that a backward pass answers.
///
/// | name | layer | what |
/// |---|---|---|
/// | `stream_rms` | 0 to L | RMS of the stream before that layer; L is behind the last |
/// | `stream_cosine` | 0 to L - 1 | cosine of the stream before and behind that layer |
/// | `attn_rms`, `mlp_rms` | 0 to L - 1 | RMS of what a branch adds to the stream |
/// | `attn_ratio`, `mlp_ratio` | 0 to L - 1 | the same over the RMS of what it is added to |
/// | `stream_grad_rms` | 0 to L | RMS of the gradient of the stream |
/// | `weight_grad_rms` | that in its name | RMS of the gradient of each parameter, by node |
///
/// Branches are the layer's nodes of `residual_add` and named after these: a [`Block`](crate::nn::Block) whose addition
/// is `both_add` gives `both_rms` and `both_ratio`.
pub fn standard(graph: &Graph, model: &Transformer, gradients: bool) -> Vec<Probe> {
    let mut probes = vec![];
    let forward = |v: Value| Tap::Forward(tap_name(graph, v));
    for (layer, &x) in model.stream.iter().enumerate() {
        let mut add = |name: String, tap: Tap, m: Measure| probes.push(Probe::new(name, tap, m).of_layer(layer));
        add("stream_rms".into(), forward(x), Measure::Rms);
        if gradients {
            add("stream_grad_rms".into(), Tap::Gradient(tap_name(graph, x)), Measure::Rms);
        }
        let Some(&next) = model.stream.get(layer + 1) else { continue };
        add("stream_cosine".into(), forward(x), Measure::Cosine(forward(next)));
        for Branch { name, base, value } in branches(graph, x, next) {
            add(format!("{name}_rms"), forward(value), Measure::Rms);
            add(format!("{name}_ratio"), forward(value), Measure::Ratio(forward(base)));
        }
    }
    for p in model.params.iter().filter(|_| gradients) {
        let name = graph.name(p.value);
        let probe = Probe::new("weight_grad_rms", Tap::gradient(name), Measure::Rms);
        probes.push(Probe { layer: layer_of(name), ..probe });
    }
    probes
}

/// Something that is added to the stream.
pub(crate) struct Branch {
    /// `attn`, of `h.0.attn_add`.
    name: String,
    /// What it is added to.
    base: Value,
    pub value: Value,
}

/// What a layer adds to the stream between `x` and `next`.
pub(crate) fn branches(graph: &Graph, x: Value, next: Value) -> Vec<Branch> {
    // None if the layer gives back the stream of an earlier one.
    let nodes = graph.nodes().get(x.node + 1..=next.node).unwrap_or_default();
    let additions = nodes.iter().filter(|n| matches!(&n.source, Source::Op(op) if op.is_addition()));
    let branch = |node: &crate::graph::Node| {
        let local = node.name.rsplit('.').next().unwrap_or_default();
        let name = local.strip_suffix("_add").unwrap_or(local).into();
        Some(Branch { name, base: *node.inputs.first()?, value: *node.inputs.get(1)? })
    };
    additions.filter_map(branch).collect()
}

/// The layer in a name like `h.3.attn.q.weight`.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("h.")?.split('.').next()?.parse().ok()
}

/// The name by which [`Tap`]s find a value.
pub(crate) fn tap_name(graph: &Graph, value: Value) -> String {
    match value.output {
        0 => graph.name(value).into(),
        n => format!("{}:{n}", graph.name(value)),
    }
}

/// The value of this name, `who` wants to know.
fn find(graph: &Graph, who: &str, name: &str) -> Result<Value> {
    let output = |(node, n): (&str, &str)| {
        let value = Value { output: n.parse().ok()?, ..graph.find(node)? };
        graph.check_values(&[value]).ok().map(|()| value)
    };
    let found = graph.find(name).or_else(|| name.rsplit_once(':').and_then(output));
    found.ok_or_else(|| Error::Graph(format!("{who}: the graph has no node `{name}`")))
}

/// The values whose gradients these probes look at: for [`Graph::gradients`].
pub fn gradient_taps(graph: &Graph, probes: &[Probe]) -> Result<Vec<Value>> {
    let mut values = BTreeSet::new();
    for probe in probes {
        for tap in probe.taps() {
            if let Tap::Gradient(node) = tap {
                values.insert(find(graph, &format!("probe `{}`", probe.name), node)?);
            }
        }
    }
    Ok(values.into_iter().collect())
}

/// Where the statistics of one tensor, or two, are on the board.
#[derive(Clone, Copy, Debug)]
struct Entry {
    row: usize,
    rows: usize,
    len: usize,
}

/// How the answer to a probe comes about.
#[derive(Clone, Debug)]
enum Recipe {
    /// Of the first tensor of an entry, or the second.
    One(Entry, bool),
    Ratio([(Entry, bool); 2]),
    Cosine(Entry),
    /// A whole tensor of this shape; the how-manieth.
    Whole(Vec<usize>, usize),
}

/// The probes of a graph, as nodes of it.
#[derive(Clone, Debug)]
pub struct Instruments {
    board: Option<Value>,
    wholes: Vec<Value>,
    /// Shared with what is on its way to the host.
    recipes: Arc<Vec<(Probe, Recipe)>>,
}

impl Instruments {
    /// Adds the reductions that `probes` ask for. `gradients` holds the gradient of each of the
    /// [`gradient_taps`]. To be called when the graph is complete. An `Err` names a probe whose node is not
    /// there, or is not f32.
    pub fn new(graph: &mut Graph, probes: &[Probe], gradients: &HashMap<Value, Value>) -> Result<Self> {
        let mut tapped = vec![];
        for probe in probes {
            let [a, b] = [Some(&probe.tap), probe.measure.other()].map(|tap| {
                let tap = tap?;
                Some(tap_value(graph, probe, tap, gradients))
            });
            tapped.push((a.transpose()?, b.transpose()?));
        }
        let mut wanted = Wanted::default();
        for (probe, &(a, b)) in probes.iter().zip(&tapped) {
            match (&probe.measure, a, b) {
                (Measure::Cosine(_), Some(a), Some(b)) => drop(wanted.pairs.insert((a, b))),
                (Measure::Whole, ..) => {}
                _ => wanted.singles.extend(a.into_iter().chain(b)),
            }
        }
        let (board, entries) = wanted.add_to(graph)?;
        let one = |v: Option<Value>| v.and_then(|v| entries.one.get(&v).copied());
        let mut wholes = vec![];
        let mut recipes = vec![];
        for (probe, &(a, b)) in probes.iter().zip(&tapped) {
            let recipe = match (&probe.measure, a, b) {
                (Measure::Whole, Some(a), _) => {
                    wholes.push(a);
                    Some(Recipe::Whole(graph.ty(a).shape.dims().to_vec(), wholes.len() - 1))
                }
                (Measure::Cosine(_), Some(a), Some(b)) => entries.two.get(&(a, b)).copied().map(Recipe::Cosine),
                (Measure::Ratio(_), ..) => one(a).zip(one(b)).map(|(a, b)| Recipe::Ratio([a, b])),
                _ => one(a).map(|(entry, second)| Recipe::One(entry, second)),
            };
            let missing = || Error::Graph(format!("probe `{}` was not placed", probe.name));
            recipes.push((probe.clone(), recipe.ok_or_else(missing)?));
        }
        Ok(Instruments { board, wholes, recipes: Arc::new(recipes) })
    }

    /// [`new`](Self::new) with the gradients of `loss` that it takes. For graphs that have no backward pass of
    /// their own, which would run twice.
    pub fn with_gradients(graph: &mut Graph, loss: Value, probes: &[Probe]) -> Result<Self> {
        let taps = gradient_taps(graph, probes)?;
        let gradients = if taps.is_empty() { vec![] } else { graph.gradients(loss, &taps)? };
        Self::new(graph, probes, &taps.into_iter().zip(gradients).collect())
    }

    /// Outputs that the plan must have.
    pub fn outputs(&self) -> Vec<Value> {
        self.board.iter().chain(&self.wholes).copied().collect()
    }

    /// Records the copies that bring what `exec` found in its last step to the host.
    pub fn read_later(
        &self,
        exec: &Executable,
        encoder: &mut wgpu::CommandEncoder,
        step: u64,
    ) -> Result<ProbeReadback> {
        let mut read = |v: Value| Ok(exec.tensor(v)?.read_later(exec.gpu(), encoder));
        Ok(ProbeReadback {
            step,
            board: self.board.map(&mut read).transpose()?,
            wholes: self.wholes.iter().map(|&v| read(v)).collect::<Result<_>>()?,
            recipes: self.recipes.clone(),
            submitted: None,
        })
    }
}

/// The value that a tap stands for.
fn tap_value(graph: &Graph, probe: &Probe, tap: &Tap, gradients: &HashMap<Value, Value>) -> Result<Value> {
    let who = format!("probe `{}`", probe.name);
    let mut value = find(graph, &who, tap.node())?;
    if matches!(tap, Tap::Gradient(_)) {
        let missing = || Error::Graph(format!("{who}: the gradient of `{}` was not asked for", tap.node()));
        value = gradients.get(&value).copied().ok_or_else(missing)?;
    }
    let ty = graph.ty(value);
    if ty.dtype != DType::F32 {
        return Err(Error::Graph(format!("{who}: probes look at f32, but `{}` is {ty}", tap.node())));
    }
    Ok(value)
}

/// Tensors whose statistics are wanted.
#[derive(Default)]
struct Wanted {
    pairs: BTreeSet<(Value, Value)>,
    singles: BTreeSet<Value>,
}

/// Where statistics are on the board.
#[derive(Default)]
struct Entries {
    /// Of a tensor, as first or second of its entry.
    one: HashMap<Value, (Entry, bool)>,
    two: HashMap<(Value, Value), Entry>,
}

impl Wanted {
    /// Adds the board and a node for each pair, and for each tensor that is in no pair. They are a chain that
    /// updates the board in place, so they stand in the order in which their tensors are made.
    fn add_to(self, graph: &mut Graph) -> Result<(Option<Value>, Entries)> {
        let mut entries = Entries::default();
        let paired: BTreeSet<Value> = self.pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
        let pairs = self.pairs.iter().map(|&(a, b)| vec![a, b]);
        let singles = self.singles.iter().filter(|v| !paired.contains(v)).map(|&v| vec![v]);
        let made = |v: &Value| match graph.node(v.node).source {
            Source::Op(_) => v.node,
            _ => 0,
        };
        let mut nodes: Vec<Vec<Value>> = pairs.chain(singles).collect();
        nodes.sort_by_key(|values| values.iter().map(made).max());
        if nodes.is_empty() {
            return Ok((None, entries));
        }
        let rows = |values: &[Value]| Stats::rows(graph.ty(values[0]).len());
        let total: usize = nodes.iter().map(|values| rows(values)).sum();
        let mut board = graph.op1("probes", Fill::early([total, Stats::COLUMNS], 0.0), &[])?;
        let mut row = 0;
        for values in nodes {
            let len = graph.ty(values[0]).len();
            let entry = Entry { row, rows: Stats::rows(len), len };
            row += entry.rows;
            let names: Vec<String> = values.iter().map(|&v| tap_name(graph, v)).collect();
            let op = Stats { pair: values.len() == 2, row: entry.row };
            board = graph.op1(&format!("probe {}", names.join(" and ")), op, &[&values[..], &[board]].concat())?;
            for (i, &v) in values.iter().enumerate() {
                entries.one.entry(v).or_insert((entry, i == 1));
            }
            if let [a, b] = values[..] {
                entries.two.insert((a, b), entry);
            }
        }
        Ok((Some(board), entries))
    }
}

/// What the probes of a submitted step told, on its way to the host.
#[derive(Debug)]
pub struct ProbeReadback {
    /// The step.
    pub step: u64,
    board: Option<Readback>,
    wholes: Vec<Readback>,
    recipes: Arc<Vec<(Probe, Recipe)>>,
    /// Where it is known, there is no need to wait for later submissions.
    pub(crate) submitted: Option<wgpu::SubmissionIndex>,
}

impl ProbeReadback {
    /// The answers. Resolves once the device has been polled after the step ran.
    pub async fn take(self) -> Result<Readings> {
        let board = match self.board {
            Some(readback) => readback.take::<f32>().await?,
            None => vec![],
        };
        let mut wholes = vec![];
        for readback in self.wholes {
            wholes.push(readback.take::<f32>().await?);
        }
        Ok(readings(self.step, &self.recipes, &board, &wholes))
    }

    /// The answers, waiting for the step, and not for later ones where the [`Trainer`](crate::train::Trainer)
    /// submitted it.
    pub fn wait_blocking(mut self, gpu: &Gpu) -> Result<Readings> {
        if let Some(submitted) = self.submitted.take() {
            gpu.wait_for_blocking(submitted)?;
        }
        gpu.run_blocking(self.take())
    }
}

/// Statistics of a tensor.
#[derive(Clone, Copy, Default)]
struct Sums {
    sum: f64,
    square: f64,
    top: f64,
    len: f64,
}

impl Sums {
    fn rms(self) -> f64 {
        (self.square / self.len).sqrt()
    }
}

fn readings(step: u64, recipes: &[(Probe, Recipe)], board: &[f32], wholes: &[Vec<f32>]) -> Readings {
    let rows = |e: Entry| board.chunks_exact(Stats::COLUMNS).skip(e.row).take(e.rows);
    let sums = |(e, second): (Entry, bool)| {
        let mut all = Sums { len: e.len as f64, ..Sums::default() };
        for row in rows(e) {
            let [sum, square, top] = if second { [row[4], row[5], row[6]] } else { [row[0], row[1], row[2]] };
            all.sum += f64::from(sum);
            all.square += f64::from(square);
            all.top = all.top.max(f64::from(top));
        }
        all
    };
    let mut result = Readings { step, ..Readings::default() };
    for (probe, recipe) in recipes {
        let value = match (recipe, &probe.measure) {
            (Recipe::Whole(shape, i), _) => {
                let Probe { name, layer, tap, .. } = probe.clone();
                let (node, shape, data) = (tap.node().into(), shape.clone(), wholes[*i].clone());
                result.tensors.push(TensorReading { name, node, layer, shape, data });
                continue;
            }
            (Recipe::Cosine(e), _) => {
                let dot: f64 = rows(*e).map(|row| f64::from(row[3])).sum();
                dot / (sums((*e, false)).square * sums((*e, true)).square).sqrt()
            }
            (Recipe::Ratio([a, b]), _) => sums(*a).rms() / sums(*b).rms(),
            (Recipe::One(e, second), measure) => {
                let s = sums((*e, *second));
                match measure {
                    Measure::Mean => s.sum / s.len,
                    // A maximum may not see a NaN; a sum does.
                    Measure::MaxAbs if s.square.is_nan() => f64::NAN,
                    Measure::MaxAbs => s.top,
                    _ => s.rms(),
                }
            }
        };
        let Probe { name, layer, tap, .. } = probe.clone();
        result.values.push(Reading { name, node: tap.node().into(), layer, value });
    }
    result
}

/// What a patch does to a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edit {
    /// Takes another tensor instead: the new input `<node>.replacement`, of the same type.
    Replace,
    /// Multiplies with a constant.
    Scale(f32),
    /// Multiplies with the new input `<node>.factor`, f32 `[1]`: 0 is ablation, 1 changes nothing.
    ScaleBy,
    /// Adds the new input `<node>.addend` of these dimensions: those of the value, or the last few of them, `[d_model]`
    /// say.
    Add(Vec<usize>),
}

/// A change to a node of a graph, for all that read it. Inputs that it brings are the host's to write, and zero until
/// then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Patch {
    /// Name of the node, or `name:1` for another output than the first.
    pub node: String,
    /// What happens to it.
    pub edit: Edit,
}

impl Patch {
    /// This edit of this node.
    pub fn new(node: impl Into<String>, edit: Edit) -> Self {
        Patch { node: node.into(), edit }
    }
}

/// A graph with patches, and where the values of the old one went.
#[derive(Clone, Debug)]
pub struct Patched {
    /// The new graph. Its nodes have the names that they had.
    pub graph: Graph,
    /// By old value: itself, and what its readers read now.
    values: BTreeMap<Value, (Value, Value)>,
}

impl Patched {
    /// What the readers of an old value read now: the patched one, if it is.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    pub fn value(&self, old: Value) -> Value {
        self.values[&old].1
    }

    /// The same value in the new graph, before any patch. Inputs, parameters and states are to be written by it.
    ///
    /// # Panics
    ///
    /// If the value is not of the old graph.
    pub fn unpatched(&self, old: Value) -> Value {
        self.values[&old].0
    }

    /// The values of a model in the new graph.
    pub fn transformer(&self, old: &Transformer) -> Transformer {
        let mut new = old.clone();
        let inputs = new.token_types.iter_mut().chain(&mut new.dropout_seed).chain([&mut new.tokens]);
        for v in inputs.chain(new.params.iter_mut().map(|p| &mut p.value)) {
            *v = self.unpatched(*v);
        }
        for v in new.stream.iter_mut().chain([&mut new.hidden, &mut new.logits]) {
            *v = self.value(*v);
        }
        new
    }
}

impl Graph {
    /// The graph with some of its values changed for all that read them; several patches of one node go one behind the
    /// other. Gradients are to be made afterwards: they then see the patches. An `Err` names a node that is not there.
    ///
    /// ```
    /// use throughline::probe::{Edit, Patch};
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([4, 8]))?;
    /// let h = g.gelu("h", x)?;
    /// let y = g.sum("y", h)?;
    /// let patched = g.patched(&[Patch::new("h", Edit::Add(vec![8])), Patch::new("h", Edit::ScaleBy)])?;
    /// let factor = patched.graph.find("h.factor").unwrap();
    /// assert_eq!(patched.graph.ty(factor).len(), 1);
    /// assert_eq!(patched.graph.name(patched.value(y)), "y");
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn patched(&self, patches: &[Patch]) -> Result<Patched> {
        let mut edits: BTreeMap<Value, Vec<&Patch>> = BTreeMap::new();
        for patch in patches {
            edits.entry(find(self, "patch", &patch.node)?).or_default().push(patch);
        }
        let mut patched =
            Patched { graph: Graph::with_max_tensor_bytes(self.max_tensor_bytes()), values: BTreeMap::new() };
        for (id, node) in self.nodes().iter().enumerate() {
            let g = &mut patched.graph;
            let ty = || node.outputs[0].clone();
            let made = match &node.source {
                Source::Input => vec![g.input(&node.name, ty())?],
                Source::Param => vec![g.param(&node.name, ty().shape)?],
                Source::State => vec![g.state(&node.name, ty())?],
                Source::Op(op) => {
                    let inputs: Vec<Value> = node.inputs.iter().map(|v| patched.values[v].1).collect();
                    g.op_arc(&node.name, op.clone(), &inputs)?
                }
            };
            for (output, value) in made.into_iter().enumerate() {
                let old = Value { node: id, output };
                let mut now = value;
                for patch in edits.get(&old).into_iter().flatten() {
                    now = patch.apply(&mut patched.graph, now)?;
                }
                patched.values.insert(old, (value, now));
            }
        }
        for &(value, state) in self.stores() {
            let (value, state) = (patched.value(value), patched.unpatched(state));
            patched.graph.store(value, state)?;
        }
        Ok(patched)
    }
}

impl Patch {
    /// Adds the nodes that make another value of `x`.
    fn apply(&self, g: &mut Graph, x: Value) -> Result<Value> {
        let (node, ty) = (&self.node, g.ty(x).clone());
        match &self.edit {
            Edit::Replace => g.input(&format!("{node}.replacement"), ty),
            Edit::Scale(factor) => g.scale(&format!("{node}.scaled"), x, *factor),
            Edit::ScaleBy => {
                let factor = g.input(&format!("{node}.factor"), TensorType::f32([1]))?;
                let factor = g.broadcast(&format!("{node}.factors"), factor, ty.shape)?;
                g.mul(&format!("{node}.scaled"), x, factor)
            }
            Edit::Add(dims) => {
                let addend = g.input(&format!("{node}.addend"), TensorType::f32(&dims[..]))?;
                g.add(&format!("{node}.steered"), x, addend)
            }
        }
    }
}
