//! Sentence embeddings: an encoder from a file whose output is pooled to one vector of length 1 per sentence (Reimers
//! and Gurevych 2019, <https://arxiv.org/abs/1908.10084>).
//!
//! Use them for semantic search and clustering: the dot product of two vectors is the cosine similarity of the
//! sentences.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use crate::decode::sample::check_ids;
use crate::device::{ExecOptions, Executable, Gpu, Readback};
use crate::error::{Error, Result};
use crate::format::{MAX_CONFIG_BYTES, read_json};
use crate::graph::Value;
use crate::model::{Model, Uploaded};
use crate::nn::{TransformerConfig, TransformerEncoder};

/// How the token vectors of a sentence are reduced to one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean, as most sentence models use.
    #[default]
    Mean,
    /// The vector of the first token.
    First,
}

impl Pooling {
    /// The pooling that a model's folder asks for in `1_Pooling/config.json`, or the mean if it has no such file.
    ///
    /// # Errors
    ///
    /// If the folder asks for a pooling that is not supported.
    pub fn of_folder(dir: &Path) -> Result<Pooling> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Config {
            pooling_mode_cls_token: bool,
            pooling_mode_mean_tokens: bool,
        }
        let path = dir.join("1_Pooling").join("config.json");
        if !path.exists() {
            return Ok(Pooling::Mean);
        }
        let config: Config = read_json(&path, MAX_CONFIG_BYTES)?;
        match (config.pooling_mode_mean_tokens, config.pooling_mode_cls_token) {
            (true, false) => Ok(Pooling::Mean),
            (false, true) => Ok(Pooling::First),
            _ => Err(Error::format(
                path,
                "expected one of pooling_mode_mean_tokens and pooling_mode_cls_token to be true",
            )),
        }
    }
}

/// An encoder that embeds sentences given as token ids.
///
/// Turn text into ids with the model's own tokenizer (module `tokenize`, with the feature `tokenizers`).
///
/// ```
/// use throughline::embed::{Pooling, SentenceEncoder};
/// use throughline::Gpu;
/// use throughline::model::Model;
///
/// let gpu = Gpu::headless_blocking()?;
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::bert();
/// let model = Model::open(folder.path())?; // of a BERT
/// let mut encoder = SentenceEncoder::new(&gpu, &model, Pooling::Mean)?;
/// let vectors = encoder.embed_blocking(&[vec![1, 17, 4, 2], vec![1, 40, 2]])?;
/// let cosine: f32 = vectors[0].iter().zip(&vectors[1]).map(|(a, b)| a * b).sum();
/// assert!((-1.0..1.0).contains(&cosine));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct SentenceEncoder {
    gpu: Gpu,
    config: TransformerConfig,
    pooling: Pooling,
    weights: Uploaded,
    /// Keyed by the number of tokens: sentences are not padded, so there is nothing to mask.
    steps: HashMap<usize, Step>,
}

/// Number of sentence lengths that are kept ready. Preparing one allocates a few buffers and compiles no pipeline.
const MAX_STEPS: usize = 32;

#[derive(Debug)]
struct Step {
    exec: Executable,
    tokens: Value,
    pooled: Value,
}

impl SentenceEncoder {
    /// Uploads a model to GPU memory.
    pub fn new(gpu: &Gpu, model: &Model, pooling: Pooling) -> Result<Self> {
        let config = model.config().clone();
        if !config.bidirectional {
            let message = "expected an encoder, such as a BERT; this model predicts the next token";
            return Err(Error::config("bidirectional", message));
        }
        let weights = model.upload_unpaced(gpu, &model.placed(gpu.profile().max_tensor_bytes())?)?;
        Ok(SentenceEncoder { gpu: gpu.clone(), config, pooling, weights, steps: HashMap::new() })
    }

    /// The configuration of the model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Computes one vector of `d_model` numbers and length 1 for each sentence.
    ///
    /// A sentence is the list of ids from the model's tokenizer, including the special tokens at its beginning and end,
    /// and at most as long as the model's context. Resolves once the device has been polled.
    pub async fn embed(&mut self, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let mut readbacks = vec![];
        for ids in sentences {
            readbacks.push(self.submit(ids).await?);
        }
        let mut vectors = vec![];
        for readback in readbacks {
            let vector: Vec<f32> = readback.take().await?;
            let norm = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(1e-12);
            vectors.push(vector.iter().map(|&x| (f64::from(x) / norm) as f32).collect());
        }
        Ok(vectors)
    }

    /// [`embed`](Self::embed), waiting for the GPU.
    pub fn embed_blocking(&mut self, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        self.gpu.clone().run_blocking(self.embed(sentences))
    }

    async fn submit(&mut self, ids: &[u32]) -> Result<Readback> {
        check_ids(ids, self.config.vocab_size)?;
        if ids.is_empty() || ids.len() > self.config.context {
            return Err(Error::data("sentence", format!("from 1 to {} tokens", self.config.context), ids.len()));
        }
        if !self.steps.contains_key(&ids.len()) {
            let step = self.step(ids.len()).await?;
            if self.steps.len() == MAX_STEPS {
                self.steps.clear();
            }
            self.steps.insert(ids.len(), step);
        }
        let step = &self.steps[&ids.len()];
        step.exec.write(step.tokens, ids)?;
        let mut encoder = self.gpu.encoder("embedding");
        step.exec.record(&mut encoder);
        let readback = step.exec.tensor(step.pooled)?.record_read(&self.gpu, &mut encoder);
        self.gpu.submit(encoder)?;
        Ok(readback)
    }

    async fn step(&self, time: usize) -> Result<Step> {
        let mut g = self.gpu.graph();
        let encoder = TransformerEncoder::build_packed(&mut g, &self.config, &self.weights.packed, 1, time)?;
        let d_model = self.config.d_model;
        let rows = g.reshape("rows", encoder.hidden, [time, d_model])?;
        let pooled = match self.pooling {
            Pooling::Mean => {
                let sum = g.sum_to("sum", rows, [d_model])?;
                g.scale("mean", sum, 1.0 / time as f32)?
            }
            Pooling::First => g.slice("first", rows, 0, 0, 1)?,
        };
        let bindings = self.weights.bind(&g, encoder.params.iter().map(|p| p.value))?;
        let plan = Arc::new(self.gpu.plan(&g, &[pooled])?);
        let options = ExecOptions { bindings };
        Ok(Step { exec: Executable::new(&self.gpu, plan, options).await?, tokens: encoder.tokens, pooled })
    }
}
