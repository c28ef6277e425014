//! Embeddings of sentences: an encoder from a file, its output pooled to one vector of length 1 per sentence
//! (Reimers and Gurevych 2019, <https://arxiv.org/abs/1908.10084>).

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

/// How the vectors of a sentence's tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the first token.
    First,
}

impl Pooling {
    /// What the folder of a model says in `1_Pooling/config.json`; the mean, if it has no such file. An `Err` if it
    /// asks for something else.
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

/// An encoder that embeds sentences, given as token ids.
///
/// ```
/// use throughline::embed::{Pooling, SentenceEncoder};
/// use throughline::Gpu;
/// use throughline::model::Model;
///
/// let gpu = Gpu::headless_blocking()?;
/// let model = Model::open("tests/data/hf/bert".as_ref())?;
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
    /// By number of tokens: no padding, so none to mask.
    steps: HashMap<usize, Step>,
}

/// Lengths that are kept ready. Making one costs some buffers and no pipeline.
const MAX_STEPS: usize = 32;

#[derive(Debug)]
struct Step {
    exec: Executable,
    tokens: Value,
    pooled: Value,
}

impl SentenceEncoder {
    /// Reads a model into GPU memory.
    pub fn new(gpu: &Gpu, model: &Model, pooling: Pooling) -> Result<Self> {
        let config = model.config().clone();
        if !config.bidirectional {
            let message = "expected an encoder, such as a BERT; this model predicts the next token";
            return Err(Error::config("bidirectional", message));
        }
        let weights = model.upload(gpu, &model.placed(gpu.profile().max_tensor_bytes())?)?;
        Ok(SentenceEncoder { gpu: gpu.clone(), config, pooling, weights, steps: HashMap::new() })
    }

    /// The model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// A vector of `d_model` numbers and length 1 for each sentence. Sentences hold the ids that the model's
    /// tokenizer gives, those at beginning and end included, and at most the model's context of them. Resolves
    /// once the device has been polled.
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
        let mut encoder = self.gpu.device().create_command_encoder(&Default::default());
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
        let options = ExecOptions { bindings, ..Default::default() };
        Ok(Step { exec: Executable::new(&self.gpu, plan, options).await?, tokens: encoder.tokens, pooled })
    }
}
