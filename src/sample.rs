//! Choosing the next token, and generating text with a model.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::{ExecOptions, Executable};
use crate::gpu::Gpu;
use crate::graph::Value;
use crate::nn::{Transformer, TransformerConfig};
use crate::optim::Arena;
use crate::rng::Rng;

/// How to choose a token from logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.8, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// An `Err` names the first field that makes no sense.
    pub fn validate(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            let message = format!("must be finite and not negative, but is {}", self.temperature);
            return Err(Error::Config { field: "temperature", message });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Config { field: "top_p", message: format!("must be in (0, 1], but is {}", self.top_p) });
        }
        Ok(())
    }

    /// Draws token number `n` of a text from its logits. The draw depends on (seed, n) alone.
    ///
    /// ```
    /// use throughline::sample::Sampling;
    /// let greedy = Sampling { temperature: 0.0, ..Default::default() };
    /// assert_eq!(greedy.draw(&[0.1, 2.0, -1.0], 0), 1);
    /// let top2 = Sampling { temperature: 5.0, top_k: 2, ..Default::default() };
    /// assert!((0..100).all(|n| top2.draw(&[3.0, 2.0, 1.0], n) != 2));
    /// ```
    pub fn draw(&self, logits: &[f32], n: u64) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Likeliest first; equal ones by id, so that the order is the same everywhere.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.temperature == 0.0 || order.len() < 2 {
            return order.first().map_or(0, |&i| i as u32);
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let max = f64::from(logits[order[0]]);
        let weight = |&i: &usize| ((f64::from(logits[i]) - max) / f64::from(self.temperature)).exp();
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        // As many as reach top_p together: the one that crosses it included.
        let enough = weights.iter().position(|w| {
            kept += w;
            kept >= f64::from(self.top_p) * total
        });
        weights.truncate(enough.map_or(weights.len(), |i| i + 1));
        let mut left = Rng::new(&[self.seed, n]).uniform() * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[chosen.unwrap_or(weights.len() - 1)] as u32
    }
}

/// An `Err` names the first id that is not in the vocabulary.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(Error::Data {
            tensor: "tokens".into(),
            expected: format!("ids below {vocab_size}"),
            got: id.to_string(),
        }),
    }
}

/// Generates text with a GPT: one forward pass over the last `context` tokens for each new one.
#[derive(Debug)]
pub struct Generator {
    gpu: Gpu,
    exec: Executable,
    tokens: Value,
    logits: Value,
    context: usize,
    vocab_size: usize,
}

impl Generator {
    /// A generator on these parameters, which stay shared: it sees what training changes.
    pub async fn new(gpu: &Gpu, config: &TransformerConfig, params: &Arena) -> Result<Self> {
        let mut g = gpu.graph();
        let gpt = Transformer::build(&mut g, config, 1, config.context, false)?;
        let plan = Arc::new(gpu.plan(&g, &[gpt.logits])?);
        let bindings = gpt.params.iter().map(|p| p.value).zip(params.tensors.iter().cloned()).collect();
        let exec = Executable::new(gpu, plan, ExecOptions { bindings, ..Default::default() }).await?;
        let (context, vocab_size) = (config.context, config.vocab_size);
        Ok(Generator { gpu: gpu.clone(), exec, tokens: gpt.tokens, logits: gpt.logits, context, vocab_size })
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, config: &TransformerConfig, params: &Arena) -> Result<Self> {
        pollster::block_on(Self::new(gpu, config, params))
    }

    /// Scores of the token after `ids`, of which the last `context` count; waits for the GPU.
    pub fn logits_blocking(&self, ids: &[u32]) -> Result<Vec<f32>> {
        check_ids(ids, self.vocab_size)?;
        if ids.is_empty() {
            return Err(Error::Data {
                tensor: "tokens".into(),
                expected: "a prompt".into(),
                got: "an empty one".into(),
            });
        }
        let window = &ids[ids.len().saturating_sub(self.context)..];
        // Attention is causal: what stands behind the last token does not matter.
        let mut padded = window.to_vec();
        padded.resize(self.context, 0);
        self.exec.write(self.tokens, &padded)?;
        self.exec.submit();
        let all: Vec<f32> = self.exec.read_blocking(self.logits)?;
        let at = (window.len() - 1) * self.vocab_size;
        Ok(all[at..at + self.vocab_size].to_vec())
    }

    /// Appends `n` tokens to `ids`, calling `each` with every new one. Return `false` to stop.
    pub fn generate_blocking(
        &self,
        ids: &mut Vec<u32>,
        n: usize,
        sampling: &Sampling,
        mut each: impl FnMut(u32) -> bool,
    ) -> Result<()> {
        sampling.validate()?;
        for i in 0..n {
            let logits = self.logits_blocking(ids)?;
            let id = sampling.draw(&logits, i as u64);
            ids.push(id);
            if !each(id) {
                break;
            }
        }
        Ok(())
    }

    /// The device that this runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}
