//! The decoder: steps over a cache of keys and values.

use std::collections::HashSet;
use std::sync::Arc;

use super::adapters::{Slots, Stacks};
use super::plan::{DecodeOptions, DecodePlan, StepGraph, StepPlan, Top};
use crate::device::{ExecOptions, Executable, Gpu, Readback, Tensor};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::model::{Adapter, Model, Placed, Uploaded};
use crate::nn::{DecodeShape, LORA_A, LORA_B, TransformerConfig, TransformerDecoder, check_ids, layer_of};
use crate::optim::Arena;

/// A model in GPU memory, with a cache of the tokens that it was fed.
///
/// ```no_run
/// use std::path::Path;
/// use throughline::decode::{Decoder, GenerationOptions};
/// use throughline::Gpu;
/// use throughline::model::Model;
///
/// let gpu = Gpu::headless_blocking()?;
/// let model = Model::open(Path::new("SmolLM2-135M-Instruct.Q4_1.gguf"))?;
/// let mut decoder = Decoder::new_blocking(&gpu, &model, 512)?;
/// let options = GenerationOptions { max_tokens: 20, ..Default::default() };
/// for id in decoder.generate(&[504, 28899, 436], options)?.blocking() {
///     println!("{}", id?);
/// }
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    pub(super) gpu: Gpu,
    pub(super) config: TransformerConfig,
    /// What all steps share: weights, and caches once the first step has created them.
    shared: Uploaded,
    placed: Placed,
    pub(super) batch: usize,
    pub(super) capacity: usize,
    /// By number of tokens per sequence; the first is for one.
    pub(super) steps: Vec<Step>,
    /// For the logits of all rows: planned and created when it is first needed.
    all: Option<Step>,
    all_graph: Arc<StepGraph>,
    /// The tokens in the cache of each sequence.
    pub(super) cached: Vec<Vec<u32>>,
    /// The adapters, if there is room for any.
    pub(super) slots: Option<Slots>,
}

/// The executable for a fixed number of new tokens.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) exec: Executable,
    pub(super) values: TransformerDecoder,
    pub(super) shape: DecodeShape,
    pub(super) top: Option<Top>,
    /// Bytes of GPU memory, not counting what steps share.
    bytes: usize,
}

/// The inputs of a pass, for each sequence.
pub(super) struct Inputs<'a> {
    /// Up to `time` tokens.
    pub parts: Vec<&'a [u32]>,
    /// The number of tokens before them.
    pub starts: Vec<usize>,
    /// Adapters by slot. Empty if there is no room for any.
    pub slots: Vec<u32>,
}

/// A submitted step, and the values that were requested, on their way to the host.
pub(super) struct Submitted<'a> {
    pub(super) step: &'a Step,
    pub(super) readbacks: Vec<Readback>,
}

impl Decoder {
    /// Reads a model into GPU memory: the usual way to start. `options` may be the number of tokens to have room for, of
    /// one sequence. The file is read piece by piece. Resolves once the device has been polled, several times for a
    /// large model.
    ///
    /// # Errors
    ///
    /// If the capacity exceeds the model's context or the limits of the device; the error says which capacity fits. If
    /// a [block](DecodeOptions::block) cannot be decoded.
    pub async fn new<'a>(gpu: &Gpu, model: &Model, options: impl Into<DecodeOptions<'a>>) -> Result<Self> {
        let placed = model.placed(gpu.profile().max_tensor_bytes())?;
        let plan = DecodePlan::on(model.config(), &placed, options.into(), gpu.profile())?;
        Self::build(gpu, &plan, model.upload(gpu, &placed).await?).await
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking<'a>(gpu: &Gpu, model: &Model, options: impl Into<DecodeOptions<'a>>) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, model, options.into()))
    }

    /// A decoder from a plan of this model. Plan first if your application requests its device for this, or wants to
    /// know the bytes before it allocates them. An error names a limit of the device that is too low for the plan.
    pub async fn from_plan(gpu: &Gpu, model: &Model, plan: &DecodePlan) -> Result<Self> {
        plan.check(gpu, model)?;
        Self::build(gpu, plan, model.upload(gpu, &plan.placed).await?).await
    }

    /// A decoder on parameters that are in GPU memory already, such as those of a [`Trainer`](crate::train::Trainer):
    /// use it to sample from a model in training. The parameters stay shared, so the decoder sees every update. Tokens
    /// in the cache keep the keys and values that they were fed with; [`clear`](Self::clear) forgets them.
    ///
    /// ```
    /// use throughline::decode::{DecodeOptions, Decoder};
    /// use throughline::nn::{Block, Builder, TransformerConfig};
    /// use throughline::train::{TrainConfig, TrainOptions, Trainer};
    /// use throughline::{Gpu, Result, Value};
    ///
    /// /// No feed-forward network, but attention twice.
    /// #[derive(Debug)]
    /// struct Attentive;
    ///
    /// impl Block for Attentive {
    ///     fn build(&self, b: &mut Builder<'_>, _layer: usize, x: Value) -> Result<Value> {
    ///         let x = b.residual("first", x, Builder::attention)?;
    ///         b.residual("second", x, Builder::attention)
    ///     }
    /// }
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let config = TrainConfig::new(TransformerConfig::llama(65, 64, 1, 32, 2), 4);
    /// let options = TrainOptions { block: &Attentive, ..Default::default() };
    /// let trainer = Trainer::with_options_blocking(&gpu, config, &options)?;
    ///
    /// let options = DecodeOptions { block: &Attentive, ..DecodeOptions::new(64) };
    /// let decoder = Decoder::on_params(&gpu, &trainer.config().model, trainer.params(), options);
    /// let logits = gpu.run_blocking(decoder)?.feed_blocking(&[7, 3])?;
    /// assert_eq!(logits.len(), 65);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and if the parameters are not those of a model of this configuration and these
    /// [blocks](DecodeOptions::block).
    pub async fn on_params<'a>(
        gpu: &Gpu,
        config: &TransformerConfig,
        params: &Arena,
        options: impl Into<DecodeOptions<'a>>,
    ) -> Result<Self> {
        let placed = Placed::of_layout(&params.layout);
        let plan = DecodePlan::on(config, &placed, options.into(), gpu.profile())?;
        check_all_used(&plan, params)?;
        let names = params.layout.tensors.iter().map(|(name, _)| name.clone());
        let tensors = names.zip(params.tensors.iter().cloned()).collect();
        Self::build(gpu, &plan, Uploaded { tensors, ..Default::default() }).await
    }

    async fn build(gpu: &Gpu, plan: &DecodePlan, mut shared: Uploaded) -> Result<Self> {
        let mut steps = vec![];
        for step in &plan.steps {
            steps.push(Step::new(gpu, step.clone(), &mut shared).await?);
        }
        let DecodePlan { batch, capacity, .. } = *plan;
        let slots = plan.adapters.clone().map(|room| Ok(Slots::new(room, stacks(plan, &shared)?, batch)));
        let (config, placed, all_graph) = (plan.config.clone(), plan.placed.clone(), plan.all.clone());
        let (gpu, cached) = (gpu.clone(), vec![vec![]; batch]);
        let slots = slots.transpose()?;
        Ok(Decoder { gpu, config, shared, placed, batch, capacity, steps, all: None, all_graph, cached, slots })
    }

    /// The configuration of the model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The device that this runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Number of tokens in the cache of each sequence.
    pub fn lengths(&self) -> Vec<usize> {
        self.cached.iter().map(Vec::len).collect()
    }

    /// The tokens in the cache of a sequence. None, if there is no such sequence.
    pub fn tokens(&self, sequence: usize) -> &[u32] {
        self.cached.get(sequence).map_or(&[], Vec::as_slice)
    }

    /// Most tokens that the cache of a sequence can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of GPU memory for the weights.
    pub fn weight_bytes(&self) -> usize {
        self.placed.bytes()
    }

    /// Bytes of all buffers: weights, slots of adapters, caches, activations. This is [`DecodePlan::bytes`] until
    /// [`feed_all`](Self::feed_all) is first called.
    pub fn buffer_bytes(&self) -> usize {
        let shared: usize = self.shared.tensors.values().map(|t| t.ty().storage_bytes()).sum();
        shared + self.steps.iter().chain(&self.all).map(|s| s.bytes).sum::<usize>()
    }

    /// Loads an adapter into a [slot](super::AdapterSlots), in place of the one that it holds. Sequences that use the slot
    /// go on with the new one. The base stays as it is, and so do all pipelines and buffers; the writes are queued, and
    /// nothing waits for them.
    ///
    /// ```no_run
    /// use throughline::Gpu;
    /// use throughline::decode::{AdapterSlots, DecodeOptions, Decoder, GenerationOptions};
    /// use throughline::model::{Adapter, Model};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let model = Model::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
    /// let options = DecodeOptions { batch: 3, adapters: Some(&AdapterSlots::new(2, 16)), ..DecodeOptions::new(512) };
    /// let mut decoder = Decoder::new_blocking(&gpu, &model, options)?;
    /// for (slot, folder) in ["knight", "ferryman"].into_iter().enumerate() {
    ///     decoder.load_adapter(slot, &Adapter::open(folder.as_ref(), &model)?)?;
    ///     decoder.set_adapter(slot, Some(slot))?; // of sequences 0 and 1; the third is the base
    /// }
    /// let prompt: &[u32] = &[504, 28899, 436];
    /// let texts = decoder.generate_batch_blocking(&[prompt; 3], &GenerationOptions::default())?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the decoder has no such slot, or the adapter is for layers of other shapes, of a larger rank, or for layers that
    /// the slots have no room for: the error names file and tensor. The slot then holds what it held before.
    pub fn load_adapter(&mut self, slot: usize, adapter: &Adapter) -> Result<()> {
        let gpu = self.gpu.clone();
        let slots = self.slots_mut()?;
        slots.check(slot, adapter)?;
        slots.set_filled(slot, false);
        let mut layer = 0;
        while slots.write(&gpu, slot, adapter, layer)?.is_some() {
            layer += 1;
        }
        slots.set_filled(slot, true);
        Ok(())
    }

    /// Lets a sequence use the adapter in a slot, or none, from the next tokens that it is fed. Of the tokens in the cache,
    /// keys and values stay as they were made: [`truncate`](Self::truncate) forgets them, to begin anew.
    ///
    /// # Errors
    ///
    /// If there is no such sequence or slot, or the slot holds nothing.
    pub fn set_adapter(&mut self, sequence: usize, slot: Option<usize>) -> Result<()> {
        if slot.is_none() && self.slots.is_none() && sequence < self.batch {
            return Ok(());
        }
        let slots = self.slots_mut()?;
        if let Some(slot) = slot {
            slots.expect_filled(slot)?;
        }
        slots.choose(sequence, slot)
    }

    /// The slot that a sequence uses.
    pub fn adapter(&self, sequence: usize) -> Option<usize> {
        self.slots.as_ref().and_then(|slots| slots.of(sequence))
    }

    pub(super) fn slots_mut(&mut self) -> Result<&mut Slots> {
        let none = || Error::config("adapters", "the decoder has no room for adapters: see `DecodeOptions::adapters`");
        self.slots.as_mut().ok_or_else(none)
    }

    /// The slot of each sequence, as kernels read it.
    pub(super) fn slot_ids(&self) -> Vec<u32> {
        self.slots.as_ref().map_or(vec![], Slots::ids)
    }

    /// Empties the caches of all sequences, to start over.
    pub fn clear(&mut self) {
        self.cached.iter_mut().for_each(Vec::clear);
    }

    /// Forgets everything after the first `len` tokens of a sequence: to try another continuation, or to keep a common
    /// beginning. Does nothing to a shorter sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        if let Some(cached) = self.cached.get_mut(sequence) {
            cached.truncate(len);
        }
    }

    /// Forgets what a sequence does not have in common with the beginning of `ids`, and returns the rest of them: what
    /// is left to feed or to generate from. That is at least the last token, whose logits are needed.
    ///
    /// Use it where prompts begin alike: with the same instructions, or with all that was said so far in a chat. What
    /// is in the cache already then costs nothing. `Chat` does this for you.
    ///
    /// ```no_run
    /// # use throughline::decode::{Decoder, GenerationOptions};
    /// # fn answer(decoder: &mut Decoder, prompt: &[u32]) -> throughline::Result<()> {
    /// let new = decoder.reuse(0, prompt);
    /// for id in decoder.generate(new, GenerationOptions::default())?.blocking() {
    ///     println!("{}", id?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn reuse<'a>(&mut self, sequence: usize, ids: &'a [u32]) -> &'a [u32] {
        let common = self.tokens(sequence).iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = common.min(ids.len().saturating_sub(1));
        self.truncate(sequence, kept);
        &ids[kept..]
    }

    /// Appends tokens to the only sequence and returns the logits of the next token, `[vocab_size]`. They are what the
    /// model computes, NaN or infinite where its activations overflow f32; to draw from such logits is an error.
    /// Resolves once the device has been polled; outside of frames, use [`feed_blocking`](Self::feed_blocking).
    ///
    /// # Errors
    ///
    /// If the tokens do not fit the cache, or one is not in the vocabulary. The sequence is then unchanged.
    pub async fn feed(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        Ok(self.feed_batch(&[ids]).await?.swap_remove(0))
    }

    /// [`feed`](Self::feed), waiting for the GPU.
    pub fn feed_blocking(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.gpu.clone().run_blocking(self.feed(ids))
    }

    /// Appends tokens to each sequence and returns the logits of the next token of each. A slice may be empty; the
    /// logits of that sequence are then meaningless.
    ///
    /// # Errors
    ///
    /// As for [`feed`](Self::feed). All sequences are then unchanged.
    pub async fn feed_batch(&mut self, new: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut submitted = self.submit(new, |step| vec![step.values.logits])?;
        let logits = submitted.readbacks.swap_remove(0).take::<f32>().await?;
        self.appended(new);
        Ok(logits.chunks_exact(self.config.vocab_size).map(<[f32]>::to_vec).collect())
    }

    /// [`feed_batch`](Self::feed_batch), waiting for the GPU.
    pub fn feed_batch_blocking(&mut self, new: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        self.gpu.clone().run_blocking(self.feed_batch(new))
    }

    /// Appends tokens to the only sequence and returns the logits after each of them, `[ids.len(), vocab_size]`: to
    /// measure how likely a text is. Resolves once the device has been polled, which takes several rounds for a long
    /// text.
    pub async fn feed_all(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(&[ids])?;
        if self.all.is_none() {
            let plan = self.all_graph.plan(self.gpu.profile())?;
            self.all = Some(Step::new(&self.gpu, plan, &mut self.shared).await?);
        }
        let Some(step) = &self.all else { return Ok(vec![]) };
        let mut all = vec![];
        let mut start = self.cached[0].len();
        for part in ids.chunks(step.shape.time) {
            let inputs = Inputs { parts: vec![part], starts: vec![start], slots: self.slot_ids() };
            let logits = step.submit(&inputs, &[step.values.logits])?.swap_remove(0);
            let logits: Vec<f32> = logits.take().await?;
            all.extend_from_slice(&logits[..part.len() * self.config.vocab_size]);
            start += part.len();
        }
        self.cached[0].extend_from_slice(ids);
        Ok(all)
    }

    /// [`feed_all`](Self::feed_all), waiting for the GPU.
    pub fn feed_all_blocking(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.gpu.clone().run_blocking(self.feed_all(ids))
    }

    pub(super) fn check(&self, new: &[&[u32]]) -> Result<()> {
        let err = |expected: String, got: String| Err(Error::data("tokens", expected, got));
        if new.len() != self.batch {
            return err(format!("tokens of {} sequences", self.batch), format!("{}", new.len()));
        }
        if new.iter().all(|ids| ids.is_empty()) {
            return err("at least one token".into(), "none".into());
        }
        if let Some(slots) = &self.slots {
            slots.check_ready()?;
        }
        let fits = |(i, (ids, cached)): (usize, (&&[u32], &Vec<u32>))| self.check_more(i, ids, cached.len());
        new.iter().zip(&self.cached).enumerate().try_for_each(fits)
    }

    /// Checks that these tokens can follow `length` earlier ones of a sequence.
    pub(super) fn check_more(&self, sequence: usize, ids: &[u32], length: usize) -> Result<()> {
        let what = self.name_of("tokens", sequence);
        check_ids(&what, ids, self.config.vocab_size)?;
        let room = self.capacity - length;
        if ids.len() > room {
            let expected = format!("at most {room} more in a cache of {}", self.capacity);
            return Err(Error::data(what, expected, ids.len()));
        }
        Ok(())
    }

    /// What messages call the tokens or logits of a sequence.
    pub(super) fn name_of(&self, what: &str, sequence: usize) -> String {
        if self.batch == 1 { what.into() } else { format!("{what} of sequence {sequence}") }
    }

    /// The step that these tokens go through: the smallest that takes all in one pass, or else the largest.
    pub(super) fn step_for(&self, new: &[&[u32]]) -> &Step {
        &self.steps[self.kind_for(new.iter().map(|ids| ids.len()).max().unwrap_or(0))]
    }

    /// The index of the step for this many tokens of a sequence.
    pub(super) fn kind_for(&self, tokens: usize) -> usize {
        let fits = self.steps.iter().position(|step| tokens <= step.shape.time);
        fits.unwrap_or(self.steps.len() - 1)
    }

    /// Submits the passes for new tokens. `read` selects the values of the last pass to copy to the host.
    pub(super) fn submit(&self, new: &[&[u32]], read: impl Fn(&Step) -> Vec<Value>) -> Result<Submitted<'_>> {
        self.check(new)?;
        let longest = new.iter().map(|ids| ids.len()).max().unwrap_or(0);
        // A single token costs less in a step of its own. All sequences end in the last pass, so that it computes the
        // logits of all.
        let step = self.step_for(new);
        let time = step.shape.time;
        let passes = longest.div_ceil(time);
        let mut readbacks = vec![];
        let fed = |ids: &[u32], passes_left: usize| ids.len().saturating_sub(passes_left * time);
        for pass in 0..passes {
            let left = passes - pass;
            let parts: Vec<&[u32]> = new.iter().map(|ids| &ids[fed(ids, left)..fed(ids, left - 1)]).collect();
            let starts: Vec<usize> = new.iter().zip(&self.cached).map(|(ids, c)| c.len() + fed(ids, left)).collect();
            let wanted = if left == 1 { read(step) } else { vec![] };
            readbacks = step.submit(&Inputs { parts, starts, slots: self.slot_ids() }, &wanted)?;
        }
        Ok(Submitted { step, readbacks })
    }

    pub(super) fn appended(&mut self, new: &[&[u32]]) {
        self.cached.iter_mut().zip(new).for_each(|(cached, ids)| cached.extend_from_slice(ids));
    }
}

/// Returns an error if a parameter of a layer is none of the decoder's: it would compute something else.
fn check_all_used(plan: &DecodePlan, params: &Arena) -> Result<()> {
    let used: HashSet<&str> =
        plan.steps.iter().flat_map(|step| &step.plan.externals).map(|e| e.name.as_str()).collect();
    let mut names = params.layout.tensors.iter().map(|(name, _)| name.as_str());
    match names.find(|name| layer_of(name).is_some() && !used.contains(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Graph(format!(
            "the decoder has no use for the parameter `{name}`: if the model has blocks of its own, pass them: \
             `DecodeOptions::block`"
        ))),
    }
}

/// The tensors with the slots of each layer.
fn stacks(plan: &DecodePlan, shared: &Uploaded) -> Result<Vec<Stacks>> {
    let step = plan.steps.first();
    let names = step.into_iter().flat_map(|step| step.made()).map(|e| e.name.as_str());
    let layers = names.filter_map(|name| name.strip_suffix(LORA_A)?.strip_suffix('.'));
    let tensor = |layer: &str, matrix: &str| shared.tensor(&format!("{layer}.{matrix}"));
    layers
        .map(|layer| Ok(Stacks { layer: layer.into(), a: tensor(layer, LORA_A)?, b: tensor(layer, LORA_B)? }))
        .collect()
}

impl Step {
    async fn new(gpu: &Gpu, plan: StepPlan, shared: &mut Uploaded) -> Result<Step> {
        for made in plan.made() {
            if !shared.tensors.contains_key(&made.name) {
                shared.tensors.insert(made.name.clone(), Tensor::zeros(gpu, &made.name, made.ty.clone())?);
            }
        }
        let bound = plan.plan.externals.iter().filter(|e| plan.is_shared(e.value));
        let bindings = bound.map(|e| Ok((e.value, shared.tensor(&e.name)?))).collect::<Result<_>>()?;
        let bytes = plan.bytes();
        let StepPlan { plan, values, shape, top } = plan;
        let exec = Executable::new(gpu, plan, ExecOptions::bound(bindings)).await?;
        if let Some(top) = &top {
            // A prompt that nothing is sampled after needs no temperature.
            exec.write(top.temperature, &vec![1.0f32; shape.batch])?;
        }
        Ok(Step { exec, values, shape, top, bytes })
    }

    /// Records the inputs of a pass. Unused rows write keys after those in use, and the next tokens overwrite them.
    pub(super) fn record_inputs(&self, encoder: &mut wgpu::CommandEncoder, inputs: &Inputs<'_>) -> Result<()> {
        let Inputs { parts, starts, slots } = inputs;
        let time = self.shape.time;
        let mut write = |value, words: Vec<u32>| self.exec.record_write(encoder, value, &words);
        let padded = |ids: &&[u32]| ids.iter().copied().chain(std::iter::repeat(0)).take(time).collect::<Vec<_>>();
        write(self.values.tokens, parts.iter().flat_map(padded).collect())?;
        write(self.values.start, starts.iter().map(|&n| n as u32).collect())?;
        if let Some(value) = self.values.slots {
            write(value, slots.clone())?;
        }
        if let Some(positions) = self.values.positions {
            write(positions, starts.iter().flat_map(|&start| start..start + time).map(|p| p as u32).collect())?;
        }
        if let Some(last) = self.values.last {
            let row = |(b, ids): (usize, &&[u32])| (b * time + ids.len().saturating_sub(1)) as u32;
            write(last, parts.iter().enumerate().map(row).collect())?;
        }
        Ok(())
    }

    /// Runs up to `time` tokens of each sequence, in as many submits as that takes, with the copies of the values to
    /// read.
    fn submit(&self, inputs: &Inputs<'_>, read: &[Value]) -> Result<Vec<Readback>> {
        let submitted = self.exec.submit_with("decoding", |submits| {
            self.record_inputs(submits.encoder(), inputs)?;
            self.exec.record_in(submits)?;
            self.record_read(submits.encoder(), read)
        });
        submitted.map(|(readbacks, _)| readbacks)
    }

    /// Records the copies of values to the host.
    pub(super) fn record_read(&self, encoder: &mut wgpu::CommandEncoder, values: &[Value]) -> Result<Vec<Readback>> {
        values.iter().map(|&value| Ok(self.exec.tensor(value)?.record_read(self.exec.gpu(), encoder))).collect()
    }

    /// A value of the last pass, on its way to the host.
    pub(super) fn read(&self, value: Value) -> Result<Readback> {
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("decoder read");
        let readback = self.exec.tensor(value)?.record_read(gpu, &mut encoder);
        gpu.submit(encoder)?;
        Ok(readback)
    }
}
