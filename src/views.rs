//! Views of a transformer that a training step does not offer: what each layer would predict, the loss without a layer,
//! where a head attends.
//!
//! Each view is a graph of its own on the same parameters, without dropout. Build it once and run it on demand. For
//! numbers that every step can report at little cost, use [probes](crate::probe) instead.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use crate::device::{ExecOptions, Executable, Gpu, Readback};
use crate::error::{Error, Result};
use crate::graph::{Graph, Source, Value};
use crate::nn::{Block, StandardBlock, TOKEN_TYPES, Transformer, TransformerConfig, check_ids};
use crate::ops::attention::Attention;
use crate::ops::matmul::Matmul;
use crate::optim::Arena;
use crate::probe::{Edit, Patch, Reading, TensorReading, branches, tap_name};
use crate::tensor::TensorType;
use crate::train::Trainer;
use crate::train::data::{Batch, counted};

/// The model that a view reads. Its parameters stay in place and may be trained further between two runs.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The device.
    pub gpu: &'a Gpu,
    /// The model.
    pub config: &'a TransformerConfig,
    /// Its layers.
    pub block: &'a dyn Block,
    /// Its parameters, by name.
    pub params: &'a Arena,
}

impl<'a> Subject<'a> {
    /// The model of a trainer, without its patches. If it trains blocks of your own, add
    /// [`with_block`](Self::with_block).
    pub fn of(trainer: &'a Trainer) -> Self {
        let (config, params) = (&trainer.config().model, trainer.params());
        Subject { gpu: trainer.gpu(), config, block: &StandardBlock, params }
    }

    /// The same model with this block in its layers.
    pub fn with_block(self, block: &'a dyn Block) -> Self {
        Subject { block, ..self }
    }

    fn build(&self, batch: usize, time: usize) -> Result<(Graph, Transformer)> {
        // Tables are split into the same parts as the parameters.
        let mut g = Graph::with_max_tensor_bytes(self.params.layout.max_bytes);
        let gpt = Transformer::build_with(&mut g, self.config, self.block, batch, time, false)?;
        Ok((g, gpt))
    }

    /// An executable of this graph, bound to the model's parameters.
    async fn executable(&self, g: &Graph, outputs: &[Value]) -> Result<Executable> {
        let layout = &self.params.layout;
        let named: HashMap<&str, usize> =
            layout.tensors.iter().enumerate().map(|(i, (name, _))| (name.as_str(), i)).collect();
        let plan = Arc::new(self.gpu.plan(g, outputs)?);
        let mut bindings = HashMap::new();
        // A view need not use all parameters of a model.
        for v in g.params().into_iter().filter(|&v| plan.slot(v).is_some()) {
            let i = named.get(g.name(v)).ok_or_else(|| {
                Error::Graph(format!("the model has no parameter `{}`: is it of other layers?", g.name(v)))
            })?;
            bindings.insert(v, self.params.tensors[*i].clone());
        }
        let exec = Executable::new(self.gpu, plan, ExecOptions::bound(bindings)).await?;
        if let Some(types) = g.find(TOKEN_TYPES).filter(|&types| exec.plan().slot(types).is_some()) {
            exec.leave_zero(types)?;
        }
        Ok(exec)
    }
}

/// The batches that a view takes.
#[derive(Clone, Copy, Debug)]
struct Expected {
    shape: [usize; 2],
    vocab_size: usize,
}

impl Expected {
    /// Checks sizes and ids, and that there is a loss.
    fn check(&self, batch: &Batch) -> Result<()> {
        batch.check("batch", self.shape, self.vocab_size, false)?;
        counted(std::slice::from_ref(batch)).map(drop)
    }
}

/// One number on its way to the host.
async fn number(readback: Readback) -> Result<f64> {
    Ok(f64::from(readback.take::<f32>().await?[0]))
}

/// The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): what the model predicts if the final norm
/// and the output projection follow after fewer layers.
///
/// Use it to see at which depth a prediction forms. It takes memory for the stream at every depth, and for about five
/// times the logits of a batch.
///
/// ```no_run
/// # fn of(trainer: &throughline::train::Trainer, batch: throughline::train::data::Batch) -> throughline::Result<()> {
/// use throughline::views::{LogitLens, Subject};
/// let lens = trainer.gpu().run_blocking(LogitLens::new(&Subject::of(trainer), [4, 256]))?;
/// for reading in lens.run_blocking(&batch)? {
///     println!("{} after {:?} layers: {:.3}", reading.name, reading.layer, reading.value);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LogitLens {
    exec: Executable,
    expected: Expected,
    tokens: Value,
    targets: Value,
    /// Name of the stream's node, its cross-entropy, its divergence.
    layers: Vec<(String, Value, Value)>,
}

impl LogitLens {
    /// A lens for batches of `batch` sequences of `time` tokens.
    ///
    /// Resolves like [`Executable::new`]; outside of frames, use [`Gpu::run_blocking`](crate::Gpu::run_blocking).
    pub async fn new(model: &Subject<'_>, [batch, time]: [usize; 2]) -> Result<Self> {
        let (mut g, gpt) = model.build(batch, time)?;
        let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
        let last = gpt.stream[gpt.stream.len() - 1];
        let losses = g.op("lens.loss", crate::ops::cross_entropy::CrossEntropy, &[gpt.logits, targets])?;
        let prediction = g.softmax("lens.prediction", gpt.logits)?;
        let rows = g.ty(gpt.logits).shape.rows() as f32;
        let mut layers = vec![];
        for (layer, &x) in gpt.stream.iter().enumerate() {
            let name = tap_name(&g, x);
            let (loss, kl) = g.scoped(&format!("lens.{layer}"), |g| {
                let logits = replay(g, last, gpt.logits, x)?;
                let loss = g.op("loss", crate::ops::cross_entropy::CrossEntropy, &[logits, targets])?;
                // sum p (log p - log q), with log p = logits - lse.
                let negative = g.scale("negative", logits, -1.0)?;
                let difference = g.add("difference", negative, gpt.logits)?;
                let product = g.mul("product", prediction, difference)?;
                let cross = g.sum("cross", product)?;
                let theirs = g.sum("lse", loss[1])?;
                let ours = g.sum("final_lse", losses[1])?;
                let ours = g.scale("minus_final_lse", ours, -1.0)?;
                let normalisers = g.add("normalisers", theirs, ours)?;
                let total = g.add("kl_sum", cross, normalisers)?;
                Ok((loss[0], g.scale("kl", total, 1.0 / rows)?))
            })?;
            layers.push((name, loss, kl));
        }
        let outputs: Vec<Value> = layers.iter().flat_map(|&(_, loss, kl)| [loss, kl]).collect();
        let exec = model.executable(&g, &outputs).await?;
        let expected = Expected { shape: [batch, time], vocab_size: model.config.vocab_size };
        Ok(LogitLens { exec, expected, tokens: gpt.tokens, targets, layers })
    }

    /// Runs the lens. For each depth, 0 being the embedding, it returns `lens_cross_entropy`, the loss against the
    /// targets in nats per token, and `lens_kl`, the Kullback-Leibler divergence of the model's prediction from that
    /// depth's, in nats, averaged over all tokens.
    /// Resolves once the device has been polled; outside of frames, use [`run_blocking`](Self::run_blocking).
    pub async fn run(&self, batch: &Batch) -> Result<Vec<Reading>> {
        self.expected.check(batch)?;
        self.exec.write(self.tokens, &batch.tokens)?;
        self.exec.write(self.targets, &batch.targets)?;
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("logit lens");
        self.exec.record(&mut encoder)?;
        let mut read = |v: Value| Ok::<_, Error>(self.exec.tensor(v)?.record_read(gpu, &mut encoder));
        let mut pending = vec![];
        for (layer, (node, loss, kl)) in self.layers.iter().enumerate() {
            for (name, value) in [("lens_cross_entropy", loss), ("lens_kl", kl)] {
                pending.push((name, node, layer, read(*value)?));
            }
        }
        gpu.submit(encoder)?;
        let mut readings = vec![];
        for (name, node, layer, readback) in pending {
            let value = number(readback).await?;
            readings.push(Reading { name: name.into(), node: node.clone(), layer: Some(layer), value, scale: 1.0 });
        }
        Ok(readings)
    }

    /// [`run`](Self::run), waiting for the GPU.
    pub fn run_blocking(&self, batch: &Batch) -> Result<Vec<Reading>> {
        self.exec.gpu().run_blocking(self.run(batch))
    }
}

/// Adds the nodes that lead from `from` to `to` once more, starting from `with`.
fn replay(g: &mut Graph, from: Value, to: Value, with: Value) -> Result<Value> {
    let mut moved = HashMap::from([(from, with)]);
    for id in g.needed(&[to]) {
        let node = g.node(id).clone();
        let Source::Op(op) = node.source else { continue };
        if id <= from.node() || !node.inputs.iter().any(|v| moved.contains_key(v)) {
            continue;
        }
        let inputs: Vec<Value> = node.inputs.iter().map(|v| moved.get(v).copied().unwrap_or(*v)).collect();
        let outputs = g.op_arc(&node.name, op, &inputs)?;
        moved.extend(outputs.into_iter().enumerate().map(|(output, v)| (g.value(id, output), v)));
    }
    Ok(moved.get(&to).copied().unwrap_or(to))
}

/// The loss without one layer, whose branches then add nothing to the stream. (In post-norm models its norms remain.)
///
/// Use it to see which layers the model depends on.
///
/// ```no_run
/// # fn of(trainer: &throughline::train::Trainer, batch: throughline::train::data::Batch) -> throughline::Result<()> {
/// use throughline::views::{DropLayer, Subject};
/// let view = trainer.gpu().run_blocking(DropLayer::new(&Subject::of(trainer), [4, 256]))?;
/// let losses = view.run_blocking(&batch)?;
/// for reading in &losses[1..] {
///     println!("without layer {:?} the loss rises by {:.3}", reading.layer, reading.value - losses[0].value);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DropLayer {
    exec: Executable,
    expected: Expected,
    tokens: Value,
    targets: Value,
    loss: Value,
    /// By layer: the factors of its branches.
    factors: Vec<Vec<Value>>,
}

impl DropLayer {
    /// Ablations for batches of `batch` sequences of `time` tokens. An error names a layer that adds nothing to the
    /// stream with `residual_add`.
    ///
    /// Resolves like [`Executable::new`]; outside of frames, use [`Gpu::run_blocking`](crate::Gpu::run_blocking).
    pub async fn new(model: &Subject<'_>, [batch, time]: [usize; 2]) -> Result<Self> {
        let (g, gpt) = model.build(batch, time)?;
        let mut names: Vec<Vec<String>> = vec![];
        for (layer, ends) in gpt.stream.windows(2).enumerate() {
            let of_layer: Vec<String> = branches(&g, ends[0], ends[1]).iter().map(|b| tap_name(&g, b.value)).collect();
            if of_layer.is_empty() {
                let message = format!("layer {layer} has no residual_add to the stream that could be left out");
                return Err(Error::Graph(message));
            }
            names.push(of_layer);
        }
        let patches: Vec<Patch> = names.iter().flatten().map(|name| Patch::new(name, Edit::ScaleBy)).collect();
        let patched = g.patched(&patches)?;
        let (gpt, mut g) = (patched.transformer(&gpt), patched.graph);
        let factor = |name: &String| g.find(&format!("{name}.factor"));
        let factors = names.iter().map(|names| names.iter().filter_map(factor).collect()).collect();
        let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
        let loss = g.cross_entropy("loss", gpt.logits, targets)?;
        let exec = model.executable(&g, &[loss]).await?;
        let expected = Expected { shape: [batch, time], vocab_size: model.config.vocab_size };
        Ok(DropLayer { exec, expected, tokens: gpt.tokens, targets, loss, factors })
    }

    /// Runs all ablations. Returns `loss`, with all layers, and then a `dropped_loss` for each layer left out: the mean
    /// cross-entropy in nats per token.
    /// Resolves once the device has been polled; outside of frames, use [`run_blocking`](Self::run_blocking).
    pub async fn run(&self, batch: &Batch) -> Result<Vec<Reading>> {
        self.expected.check(batch)?;
        self.exec.write(self.tokens, &batch.tokens)?;
        self.exec.write(self.targets, &batch.targets)?;
        let gpu = self.exec.gpu();
        let mut pending = vec![];
        for dropped in [None].into_iter().chain((0..self.factors.len()).map(Some)) {
            for (layer, factors) in self.factors.iter().enumerate() {
                let factor = if dropped == Some(layer) { 0.0f32 } else { 1.0 };
                for &v in factors {
                    self.exec.write(v, &[factor])?;
                }
            }
            let mut encoder = gpu.encoder("ablation");
            self.exec.record(&mut encoder)?;
            pending.push((dropped, self.exec.tensor(self.loss)?.record_read(gpu, &mut encoder)));
            gpu.submit(encoder)?;
        }
        let mut readings = vec![];
        for (layer, readback) in pending {
            let (name, node) = (if layer.is_some() { "dropped_loss" } else { "loss" }.into(), "loss".into());
            readings.push(Reading { name, node, layer, value: number(readback).await?, scale: 1.0 });
        }
        Ok(readings)
    }

    /// [`run`](Self::run), waiting for the GPU.
    pub fn run_blocking(&self, batch: &Batch) -> Result<Vec<Reading>> {
        self.exec.gpu().run_blocking(self.run(batch))
    }
}

/// Where a head attends: the probabilities `softmax(scale * q k^T)`, which attention itself never stores.
///
/// ```no_run
/// # fn of(trainer: &throughline::train::Trainer, tokens: &[u32]) -> throughline::Result<()> {
/// use throughline::views::{AttentionMap, Subject};
/// let (gpu, model) = (trainer.gpu(), Subject::of(trainer));
/// let view = gpu.run_blocking(AttentionMap::new(&model, [1, tokens.len()], 3, 0))?;
/// let map = view.run_blocking(tokens)?;
/// let of_last_token = map.data.chunks_exact(tokens.len()).last();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AttentionMap {
    exec: Executable,
    vocab_size: usize,
    tokens: Value,
    map: Value,
    node: String,
    layer: usize,
}

/// Far below any score, and still finite.
const HIDDEN: f32 = -1e30;

impl AttentionMap {
    /// The map of one query head of a layer, for batches of `batch` sequences of `time` tokens. There must be such a
    /// layer and head, and the layer must have attention.
    ///
    /// Resolves like [`Executable::new`]; outside of frames, use [`Gpu::run_blocking`](crate::Gpu::run_blocking).
    pub async fn new(model: &Subject<'_>, [batch, time]: [usize; 2], layer: usize, head: usize) -> Result<Self> {
        let (mut g, gpt) = model.build(batch, time)?;
        let (node, op, [q, k]) = attention_of(&g, layer)?;
        if head >= op.heads {
            return Err(Error::Graph(format!("`{node}` has {} heads, and there is none numbered {head}", op.heads)));
        }
        let width = g.ty(q).shape.cols() / op.heads;
        let (q, k) = g.scoped("map", |g| {
            let kv_head = head / (op.heads / op.kv_heads);
            Ok((g.slice("q", q, 2, head * width, width)?, g.slice("k", k, 2, kv_head * width, width)?))
        })?;
        let product = Matmul { transpose_b: true, batch: true, ..Matmul::default() };
        let scores = g.op1("map.product", product, &[q, k])?;
        let scale = op.scale.unwrap_or(1.0 / (width as f32).sqrt());
        let mut scores = g.scale("map.scores", scores, scale)?;
        let mut mask = None;
        if op.causal {
            let hidden = g.input("map.mask", TensorType::f32([time, time]))?;
            scores = g.add("map.masked", scores, hidden)?;
            mask = Some(hidden);
        }
        let map = g.softmax("map", scores)?;
        let exec = model.executable(&g, &[map]).await?;
        if let Some(mask) = mask {
            let hidden = |i: usize| if i % time > i / time { HIDDEN } else { 0.0 };
            exec.write(mask, &(0..time * time).map(hidden).collect::<Vec<f32>>())?;
        }
        let vocab_size = model.config.vocab_size;
        Ok(AttentionMap { exec, vocab_size, tokens: gpt.tokens, map, node, layer })
    }

    /// Computes the map for these tokens, `[batch, query, key]`.
    /// Resolves once the device has been polled; outside of frames, use [`run_blocking`](Self::run_blocking).
    pub async fn run(&self, tokens: &[u32]) -> Result<TensorReading> {
        check_ids("tokens", tokens, self.vocab_size)?;
        self.exec.write(self.tokens, tokens)?;
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("attention map");
        self.exec.record(&mut encoder)?;
        let map = self.exec.tensor(self.map)?;
        let readback = map.record_read(gpu, &mut encoder);
        gpu.submit(encoder)?;
        let (shape, data) = (map.ty().shape.dims().to_vec(), readback.take::<f32>().await?);
        let (node, layer) = (self.node.clone(), Some(self.layer));
        Ok(TensorReading { name: "attention_map".into(), node, layer, shape, data })
    }

    /// [`run`](Self::run), waiting for the GPU.
    pub fn run_blocking(&self, tokens: &[u32]) -> Result<TensorReading> {
        self.exec.gpu().run_blocking(self.run(tokens))
    }
}

/// Name, op, queries and keys of a layer's attention.
fn attention_of(g: &Graph, layer: usize) -> Result<(String, Attention, [Value; 2])> {
    let scope = format!("h.{layer}.");
    for node in g.nodes().iter().filter(|n| n.name.starts_with(&scope)) {
        let Source::Op(op) = &node.source else { continue };
        let op: &dyn Any = op.as_ref();
        if let (Some(&op), [q, k, ..]) = (op.downcast_ref::<Attention>(), &node.inputs[..]) {
            return Ok((node.name.clone(), op, [*q, *k]));
        }
    }
    Err(Error::Graph(format!("the model has no attention in a layer {layer}")))
}
