//! Decoding with a cache of keys and values: a model from a file, fed tokens, giving the scores of the next.
//!
//! Matrices stay as the file stores them and are decoded inside the kernels. A prompt goes through in chunks,
//! then a token takes one submit. So far models of the Llama family in GGUF files are read.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::{ExecOptions, Executable};
use crate::format::{Stored, Weights};
use crate::gpu::Gpu;
use crate::graph::{Graph, Value};
use crate::nn::{Positions, TransformerConfig, TransformerDecoder};
use crate::ops::packed::Packed;
use crate::sample::{Sampling, check_ids};
use crate::tensor::{Tensor, TensorType};

/// A model that decodes. Sequences are one at a time; [`clear`](Self::clear) starts another.
///
/// ```no_run
/// use std::path::Path;
/// use throughline::decode::Decoder;
/// use throughline::format::Weights;
/// use throughline::sample::Sampling;
/// use throughline::Gpu;
///
/// let gpu = Gpu::headless_blocking()?;
/// let weights = Weights::open(Path::new("SmolLM2-135M-Instruct.Q4_1.gguf"))?;
/// let mut decoder = Decoder::new_blocking(&gpu, &weights, 512)?;
/// let prompt = [504, 28899, 436];
/// decoder.generate_blocking(&prompt, 20, &Sampling::default(), |id| {
///     println!("{id}");
///     true
/// })?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    gpu: Gpu,
    config: TransformerConfig,
    chunk: Step,
    single: Step,
    capacity: usize,
    length: usize,
    weight_bytes: usize,
}

/// Tokens of a prompt that go through at a time.
const CHUNK: usize = 32;

/// The executable for some new tokens at a time.
#[derive(Debug)]
struct Step {
    exec: Executable,
    values: TransformerDecoder,
    time: usize,
}

impl Decoder {
    /// Reads a model into GPU memory, with room for `capacity` tokens.
    pub async fn new(gpu: &Gpu, weights: &Weights, capacity: usize) -> Result<Self> {
        let config = llama_config(weights)?;
        let (mut tensors, packed) = upload(gpu, weights)?;
        let weight_bytes = tensors.values().map(|t| t.ty().bytes()).sum();
        let chunk = Step::new(gpu, &config, &packed, CHUNK.min(capacity), capacity, &mut tensors).await?;
        let single = Step::new(gpu, &config, &packed, 1, capacity, &mut tensors).await?;
        Ok(Decoder { gpu: gpu.clone(), config, chunk, single, capacity, length: 0, weight_bytes })
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, weights: &Weights, capacity: usize) -> Result<Self> {
        pollster::block_on(Self::new(gpu, weights, capacity))
    }

    /// The model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.length
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many tokens the cache holds at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that the weights take in GPU memory.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Forgets the sequence.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Appends tokens; the scores of the one behind the last. Waits for the GPU. An `Err` leaves the
    /// sequence as it was.
    pub fn feed_blocking(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        let mut rest = ids;
        let mut start = self.length;
        loop {
            let step = if rest.len() > 1 { &self.chunk } else { &self.single };
            let now;
            (now, rest) = rest.split_at(rest.len().min(step.time));
            step.submit(now, start)?;
            start += now.len();
            if rest.is_empty() {
                let logits = step.exec.read_blocking(step.values.logits)?;
                self.length = start;
                return Ok(logits);
            }
        }
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let err = |expected: String, got: String| Err(Error::Data { tensor: "tokens".into(), expected, got });
        check_ids(ids, self.config.vocab_size)?;
        let room = self.capacity - self.length;
        match ids.len() {
            0 => err("at least one token".into(), "none".into()),
            n if n > room => err(format!("at most {room} more in a cache of {}", self.capacity), n.to_string()),
            _ => Ok(()),
        }
    }

    /// Feeds the prompt and draws up to `n` tokens, calling `each` with every one. Return `false` to stop.
    /// Stops at the cache's capacity too. Waits for the GPU.
    pub fn generate_blocking(
        &mut self,
        prompt: &[u32],
        n: usize,
        sampling: &Sampling,
        mut each: impl FnMut(u32) -> bool,
    ) -> Result<()> {
        sampling.validate()?;
        let mut logits = self.feed_blocking(prompt)?;
        for i in 0..n {
            let id = sampling.draw(&logits, i as u64);
            if !each(id) || i + 1 == n || self.length == self.capacity {
                break;
            }
            logits = self.feed_blocking(&[id])?;
        }
        Ok(())
    }

    /// The device that this runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Step {
    /// Binds what `tensors` has by name, and adds the caches to it, for the next step to share.
    async fn new(
        gpu: &Gpu,
        config: &TransformerConfig,
        packed: &BTreeMap<String, Packed>,
        time: usize,
        capacity: usize,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<Step> {
        let mut g = Graph::new();
        let values = TransformerDecoder::build(&mut g, config, packed, time, capacity)?;
        for &cache in &values.caches {
            if !tensors.contains_key(g.name(cache)) {
                let tensor = Tensor::zeros(gpu, g.name(cache), g.ty(cache).clone())?;
                tensors.insert(g.name(cache).to_string(), tensor);
            }
        }
        let bindings: Result<HashMap<Value, Tensor>> = (values.params.iter().chain(&values.caches))
            .map(|&v| {
                let missing = || Error::Graph(format!("the file has no tensor for `{}`", g.name(v)));
                Ok((v, tensors.get(g.name(v)).ok_or_else(missing)?.clone()))
            })
            .collect();
        let plan = Arc::new(gpu.plan(&g, &[values.logits])?);
        let options = ExecOptions { bindings: bindings?, ..Default::default() };
        Ok(Step { exec: Executable::new(gpu, plan, options).await?, values, time })
    }

    /// Runs on up to `time` tokens. Rows that stand for none leave keys behind those in use, which the
    /// next tokens overwrite.
    fn submit(&self, ids: &[u32], start: usize) -> Result<()> {
        let mut padded = ids.to_vec();
        padded.resize(self.time, 0);
        self.exec.write(self.values.tokens, &padded)?;
        self.exec.write(self.values.start, &[start as u32])?;
        self.exec.write(self.values.last, &[ids.len() as u32 - 1])?;
        self.exec.submit();
        Ok(())
    }
}

/// The shape of a Llama in a GGUF file.
fn llama_config(weights: &Weights) -> Result<TransformerConfig> {
    let meta = weights.metadata();
    let bad = |message: String| Error::Format { path: weights.path().into(), message };
    let architecture = meta.str("general.architecture")?;
    if architecture != "llama" {
        return Err(bad(format!("general.architecture: expected `llama`, got `{architecture}`")));
    }
    let (n_heads, d_model) = (meta.usize("llama.attention.head_count")?, meta.usize("llama.embedding_length")?);
    let vocab_size = weights.get("token_embd.weight")?.shape().rows();
    let context = meta.usize("llama.context_length")?;
    let kv = "llama.attention.head_count_kv";
    let theta = "llama.rope.freq_base";
    let config = TransformerConfig {
        n_kv_heads: if meta.contains(kv) { meta.usize(kv)? } else { n_heads },
        d_ff: meta.usize("llama.feed_forward_length")?,
        norm_eps: meta.f32("llama.attention.layer_norm_rms_epsilon")?,
        positions: Positions::Rope {
            theta: if meta.contains(theta) { meta.f32(theta)? } else { 10_000.0 },
            interleaved: true, // rows of q and k are permuted for it
        },
        tied_head: !weights.contains("output.weight"),
        ..TransformerConfig::llama(vocab_size, context, meta.usize("llama.block_count")?, d_model, n_heads)
    };
    for key in ["llama.rope.scaling.type", "llama.rope.scaling.factor"] {
        if meta.contains(key) {
            return Err(bad(format!("{key}: scaled rotary positions are not supported")));
        }
    }
    let dims = "llama.rope.dimension_count";
    if meta.contains(dims) && meta.usize(dims)? != config.head_dim() {
        return Err(bad(format!("{dims}: expected {}, got {}", config.head_dim(), meta.usize(dims)?)));
    }
    config.validate()?;
    Ok(config)
}

/// What we call a tensor of a Llama in a GGUF file; `None` for those that a decoder does not need.
fn our_name(name: &str) -> Option<String> {
    let parts = [
        ("attn_norm.weight", "attn_norm.weight"),
        ("attn_q.weight", "attn.q.weight"),
        ("attn_k.weight", "attn.k.weight"),
        ("attn_v.weight", "attn.v.weight"),
        ("attn_output.weight", "attn.o.weight"),
        ("ffn_norm.weight", "mlp_norm.weight"),
        ("ffn_gate.weight", "mlp.gate.weight"),
        ("ffn_up.weight", "mlp.up.weight"),
        ("ffn_down.weight", "mlp.down.weight"),
    ];
    match name {
        "token_embd.weight" => Some("embed.weight".into()),
        "output_norm.weight" => Some("norm_f.weight".into()),
        "output.weight" => Some("head.weight".into()),
        _ => {
            let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
            let (_, ours) = parts.iter().find(|(theirs, _)| *theirs == part)?;
            Some(format!("h.{layer}.{ours}"))
        }
    }
}

/// All tensors in GPU memory, by our names, and which of them stay packed.
fn upload(gpu: &Gpu, weights: &Weights) -> Result<(HashMap<String, Tensor>, BTreeMap<String, Packed>)> {
    let (mut tensors, mut packed) = (HashMap::new(), BTreeMap::new());
    for stored in weights.iter() {
        let Some(name) = our_name(stored.name()) else { continue };
        stored.check_finite()?;
        let tensor = match (stored.stored(), stored.shape().dims()) {
            (kind, &[n, k]) if kind != Stored::F32 && k.is_multiple_of(32) => {
                let matrix = Packed { stored: kind, n, k };
                packed.insert(name.clone(), matrix);
                upload_packed(gpu, &name, stored.bytes(), matrix)?
            }
            // Input-major, as trained matrices are; the table of embeddings is by rows there, too.
            (_, &[n, k]) if name != "embed.weight" => {
                let values = stored.values()?;
                let transposed = (0..k).flat_map(|c| values[c..].iter().step_by(k)).copied().collect();
                upload_f32(gpu, &name, &[k, n], transposed)?
            }
            (_, dims) => upload_f32(gpu, &name, dims, stored.values()?)?,
        };
        tensors.insert(name, tensor);
        // So that the staging memory of one tensor is free before the next needs some.
        gpu.queue().submit([]);
    }
    Ok((tensors, packed))
}

fn upload_f32(gpu: &Gpu, name: &str, dims: &[usize], values: Vec<f32>) -> Result<Tensor> {
    let tensor = Tensor::zeros(gpu, name, TensorType::f32(dims))?;
    tensor.write(gpu, &values)?;
    Ok(tensor)
}

/// The file's bytes as they are.
fn upload_packed(gpu: &Gpu, name: &str, bytes: &[u8], matrix: Packed) -> Result<Tensor> {
    let tensor = Tensor::zeros(gpu, name, matrix.ty())?;
    let (whole, rest) = bytes.split_at(bytes.len() / 4 * 4);
    gpu.queue().write_buffer(tensor.buffer(), 0, whole);
    if !rest.is_empty() {
        let mut word = [0; 4];
        word[..rest.len()].copy_from_slice(rest);
        gpu.queue().write_buffer(tensor.buffer(), whole.len() as u64, &word);
    }
    Ok(tensor)
}
