//! From token ids to sentence vectors.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::folder::Modules;
use super::pooling::{Pooling, position_weights};
use crate::device::{ExecOptions, Executable, Gpu, Readback};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::model::{Model, Uploaded};
use crate::nn::{TransformerConfig, TransformerEncoder, check_ids};

/// An encoder that embeds sentences given as token ids.
///
/// Use it without the feature `tokenizers`, or with a tokenizer of your own. For texts there is `TextEncoder`.
///
/// ```
/// use throughline::Gpu;
/// use throughline::sentence::SentenceEncoder;
///
/// let gpu = Gpu::headless_blocking()?;
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::sentence_bert();
/// let mut encoder = SentenceEncoder::open_blocking(&gpu, folder.path())?; // of sentence-transformers, with a Normalize
/// let vectors = encoder.embed_blocking(&[vec![1, 17, 4, 2], vec![1, 40, 2]])?;
/// let cosine: f32 = vectors[0].iter().zip(&vectors[1]).map(|(a, b)| a * b).sum();
/// assert!((-1.0..1.0).contains(&cosine));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct SentenceEncoder {
    gpu: Gpu,
    config: TransformerConfig,
    pub(super) modules: Modules,
    dim: usize,
    max_tokens: usize,
    weights: Uploaded,
    /// Sentences are not padded, so there is nothing to mask.
    steps: HashMap<Rows, Step>,
}

/// Number of sentence lengths that are kept ready. Preparing one allocates a few buffers and compiles no pipeline.
const MAX_STEPS: usize = 32;

/// How many tokens a sentence has, and how many of them, at its beginning, the pooling leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rows {
    time: usize,
    before: usize,
}

#[derive(Debug)]
struct Step {
    exec: Executable,
    tokens: Value,
    pooled: Value,
}

impl SentenceEncoder {
    /// Opens a folder with everything that it says: the transformer, the pooling, the modules after it, and the longest
    /// sentence. The [module's documentation](super) lists what is supported.
    ///
    /// The transformer is read into GPU memory piece by piece. Resolves once the device has been polled, several times
    /// for a large model; outside of frames, use [`open_blocking`](Self::open_blocking).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Format`] name the file, and the module or key that is not supported.
    pub async fn open(gpu: &Gpu, path: &Path) -> Result<Self> {
        let modules = Modules::of_folder(path)?;
        let model = Model::open(&modules.transformer)?;
        Self::with_modules(gpu, &model, modules).await
    }

    /// [`open`](Self::open), waiting for the GPU.
    pub fn open_blocking(gpu: &Gpu, path: &Path) -> Result<Self> {
        gpu.run_blocking(Self::open(gpu, path))
    }

    /// Reads a model into GPU memory, piece by piece as [`open`](Self::open) does. Its sentence vectors are pooled as
    /// you say and have length 1, whatever its folder says.
    ///
    /// Use it for a plain BERT; `open` does what the folder of a sentence model asks for.
    pub async fn new(gpu: &Gpu, model: &Model, pooling: Pooling) -> Result<Self> {
        Self::with_modules(gpu, model, Modules::of_pooling(pooling)).await
    }

    /// [`new`](Self::new), waiting for the GPU.
    pub fn new_blocking(gpu: &Gpu, model: &Model, pooling: Pooling) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, model, pooling))
    }

    #[cfg(feature = "tokenizers")]
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) async fn with_modules(gpu: &Gpu, model: &Model, modules: Modules) -> Result<Self> {
        let config = model.config().clone();
        if !config.bidirectional {
            let message = "expected an encoder, such as a BERT; this model predicts the next token";
            return Err(Error::config("bidirectional", message));
        }
        let dim = modules.dim(config.d_model)?;
        let max_tokens = modules.settings.max_tokens.unwrap_or(config.context).min(config.context);
        let weights = model.upload(gpu, &model.placed(gpu.profile().max_tensor_bytes())?).await?;
        Ok(SentenceEncoder { gpu: gpu.clone(), config, modules, dim, max_tokens, weights, steps: HashMap::new() })
    }

    /// The configuration of the transformer.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// How many numbers a sentence vector has.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The longest sentence, in tokens: as the folder says (`max_seq_length`, or the tokenizer's `model_max_length`),
    /// and at most the model's context.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Sets another limit on the length of sentences. Models embed sentences badly that are longer than those they were
    /// trained on.
    ///
    /// # Errors
    ///
    /// If it is 0 or more than the model's context.
    pub fn set_max_tokens(&mut self, max_tokens: usize) -> Result<()> {
        if !(1..=self.config.context).contains(&max_tokens) {
            let message = format!("must be from 1 to the context, {}, but is {max_tokens}", self.config.context);
            return Err(Error::config("max_tokens", message));
        }
        self.max_tokens = max_tokens;
        Ok(())
    }

    /// Computes one vector of [`dim`](Self::dim) numbers for each sentence. Resolves once the device has been polled.
    ///
    /// A sentence is the list of ids from the model's tokenizer, including the special tokens at its beginning and end.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] names the first sentence that is empty or longer than [`max_tokens`](Self::max_tokens), that has
    /// an id beyond the vocabulary, or whose vector is not finite.
    pub async fn embed(&mut self, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        self.embed_after(0, sentences).await
    }

    /// [`embed`](Self::embed), waiting for the GPU.
    pub fn embed_blocking(&mut self, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        self.gpu.clone().run_blocking(self.embed(sentences))
    }

    /// The same for sentences that each begin with a prompt of `before` tokens, which the pooling leaves out.
    pub(super) async fn embed_after(&mut self, before: usize, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        for (i, ids) in sentences.iter().enumerate() {
            self.check(i, ids, before)?;
        }
        let mut readbacks = vec![];
        for ids in sentences {
            readbacks.push(self.submit(ids, before).await?);
        }
        let mut vectors = vec![];
        for (i, readback) in readbacks.into_iter().enumerate() {
            let pooled: Vec<f32> = readback.take().await?;
            let pooled = pooled.into_iter().map(f64::from).collect();
            let vector = self.modules.layers.iter().fold(pooled, |x, layer| layer.apply(x));
            let vector: Vec<f32> = vector.into_iter().take(self.dim).map(|x| x as f32).collect();
            if let Some(x) = vector.iter().find(|x| !x.is_finite()) {
                return Err(Error::data(format!("vector of sentence {i}"), "finite numbers", x));
            }
            vectors.push(vector);
        }
        Ok(vectors)
    }

    fn check(&self, i: usize, ids: &[u32], before: usize) -> Result<()> {
        let what = format!("sentence {i}");
        if ids.len() <= before || ids.len() > self.max_tokens {
            return Err(Error::data(what, format!("from {} to {} tokens", before + 1, self.max_tokens), ids.len()));
        }
        check_ids(what, ids, self.config.vocab_size)
    }

    async fn submit(&mut self, ids: &[u32], before: usize) -> Result<Readback> {
        let rows = Rows { time: ids.len(), before };
        if !self.steps.contains_key(&rows) {
            let step = self.step(rows).await?;
            if self.steps.len() == MAX_STEPS {
                self.steps.clear();
            }
            self.steps.insert(rows, step);
        }
        let step = &self.steps[&rows];
        step.exec.write(step.tokens, ids)?;
        let mut encoder = self.gpu.encoder("embedding");
        step.exec.record(&mut encoder)?;
        let readback = step.exec.tensor(step.pooled)?.record_read(&self.gpu, &mut encoder);
        self.gpu.submit(encoder)?;
        Ok(readback)
    }

    async fn step(&self, Rows { time, before }: Rows) -> Result<Step> {
        let mut g = self.gpu.graph();
        let encoder = TransformerEncoder::build_packed(&mut g, &self.config, &self.weights.packed, 1, time)?;
        let mut rows = g.reshape("rows", encoder.hidden, [time, self.config.d_model])?;
        if before > 0 {
            rows = g.slice("rows_of_text", rows, 0, before, time - before)?;
        }
        let (mut weights, mut parts) = (None, vec![]);
        for (i, pooling) in self.modules.pooling.modes.iter().enumerate() {
            parts.push(g.scoped(&format!("pooling.{i}"), |g| pooling.build(g, rows, before, &mut weights))?);
        }
        let pooled = match parts[..] {
            [pooled] => pooled,
            _ => g.concat("pooled", &parts, 0)?,
        };
        let bindings = self.weights.bind(&g, encoder.params.iter().copied())?;
        let plan = Arc::new(self.gpu.plan(&g, &[pooled])?);
        let exec = Executable::new(&self.gpu, plan, ExecOptions::bound(bindings)).await?;
        if let Some(types) = encoder.token_types {
            exec.leave_zero(types)?;
        }
        if let Some(weights) = weights {
            exec.write(weights, &position_weights(time - before, before))?;
        }
        Ok(Step { exec, tokens: encoder.tokens, pooled })
    }
}
