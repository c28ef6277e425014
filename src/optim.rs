//! Parameters in arenas, and AdamW over them.
//!
//! Parameters, gradients and both moments are each one buffer with the same layout, so that a step
//! is one AdamW dispatch, one norm reduction and one clear, and a checkpoint is one copy.

use std::f64::consts::PI;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::exec::{ExecOptions, Executable};
use crate::gpu::Gpu;
use crate::graph::{Graph, Value};
use crate::nn::{Transformer, TransformerConfig};
use crate::ops::adamw::AdamWSettings;
use crate::plan::Plan;
use crate::tensor::{Shape, Tensor, TensorType};
use crate::timeline::Timeline;

/// Where each tensor lies in an arena. Pure data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// Names and shapes, in the order given.
    pub tensors: Vec<(String, Shape)>,
    /// First element of each tensor.
    pub offsets: Vec<usize>,
    /// Elements in all, gaps included.
    pub len: usize,
    /// Weight decay applies to the elements before this one.
    pub decay_len: usize,
}

impl ArenaLayout {
    /// Lays out tensors: those that decay first, each at a multiple of 64 elements (256 bytes, the
    /// alignment of bindings). By the usual rule a tensor decays if it has two dimensions or more:
    /// weights and embeddings do, biases and gains do not.
    pub fn new(tensors: Vec<(String, Shape)>) -> Self {
        let mut offsets = vec![0; tensors.len()];
        let mut len = 0;
        let mut decay_len = 0;
        for decays in [true, false] {
            for (offset, (_, shape)) in offsets.iter_mut().zip(&tensors) {
                if (shape.rank() >= 2) == decays {
                    *offset = len;
                    len += shape.len().next_multiple_of(64);
                }
            }
            if decays {
                decay_len = len;
            }
        }
        ArenaLayout { tensors, offsets, len: len.max(64), decay_len }
    }

    /// The layout of a model's parameters.
    pub fn of_model(config: &TransformerConfig) -> Result<Self> {
        let mut g = Graph::new();
        let gpt = Transformer::build(&mut g, config, 1, 1, false)?;
        Ok(Self::of(&g, &gpt.params.iter().map(|p| p.value).collect::<Vec<_>>()))
    }

    /// The layout of a graph's parameters.
    pub fn of(graph: &Graph, params: &[Value]) -> Self {
        let tensor = |&v: &Value| (graph.name(v).to_string(), graph.ty(v).shape.clone());
        Self::new(params.iter().map(tensor).collect())
    }
}

/// One buffer that holds many tensors.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Where the tensors lie.
    pub layout: Arc<ArenaLayout>,
    /// The whole buffer as a flat tensor, gaps included.
    pub whole: Tensor,
    /// Each tensor as a range of the buffer.
    pub tensors: Vec<Tensor>,
}

impl Arena {
    /// A zeroed arena. The adapter's binding limit bounds its size.
    pub fn zeros(gpu: &Gpu, label: &str, layout: &Arc<ArenaLayout>) -> Result<Self> {
        let ty = TensorType::f32([layout.len]);
        let max = gpu.profile().max_binding_bytes;
        if ty.storage_bytes() as u64 > max {
            return Err(Error::Limit(format!(
                "the {label} take {} bytes in one buffer; the adapter binds at most {max}. Use a smaller model",
                ty.storage_bytes()
            )));
        }
        let whole = Tensor::zeros(gpu, label, ty)?;
        let tensors = (layout.tensors.iter().zip(&layout.offsets))
            .map(|((_, shape), &at)| {
                Tensor::from_buffer(whole.buffer().clone(), 4 * at as u64, TensorType::f32(shape.clone()))
            })
            .collect::<Result<_>>()?;
        Ok(Arena { layout: layout.clone(), whole, tensors })
    }

    /// Queues a write of every tensor, gaps zeroed. `data` has one slice per tensor.
    pub fn write(&self, gpu: &Gpu, data: &[Vec<f32>]) -> Result<()> {
        let mut all = vec![0.0f32; self.layout.len];
        for (((name, shape), &at), values) in self.layout.tensors.iter().zip(&self.layout.offsets).zip(data) {
            if values.len() != shape.len() {
                return Err(Error::Data {
                    tensor: name.clone(),
                    expected: format!("{} elements for shape {shape}", shape.len()),
                    got: values.len().to_string(),
                });
            }
            all[at..at + values.len()].copy_from_slice(values);
        }
        self.whole.write(gpu, &all)
    }

    /// Reads every tensor; waits for the GPU.
    pub fn read_blocking(&self, gpu: &Gpu) -> Result<Vec<Vec<f32>>> {
        let all: Vec<f32> = self.whole.read_blocking(gpu)?;
        let ranges = self.layout.tensors.iter().zip(&self.layout.offsets);
        Ok(ranges.map(|((_, shape), &at)| all[at..at + shape.len()].to_vec()).collect())
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
}

/// Learning rate by step: a linear warm-up, then a decay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Steps of warm-up; step 0 has rate `peak / warmup`.
    pub warmup: u64,
    /// Step at which the decay ends. Later steps keep the final rate.
    pub steps: u64,
    /// Final rate as a fraction of the peak.
    pub final_fraction: f64,
    /// Shape of the decay.
    pub decay: Decay,
}

impl Schedule {
    /// The same rate at every step.
    pub fn constant(lr: f64) -> Self {
        Schedule { peak: lr, warmup: 0, steps: 0, final_fraction: 1.0, decay: Decay::Constant }
    }

    /// Rate of step `step`, counted from 0.
    ///
    /// ```
    /// use throughline::optim::{Decay, Schedule};
    /// let s = Schedule { peak: 1.0, warmup: 10, steps: 110, final_fraction: 0.1, decay: Decay::Cosine };
    /// assert_eq!(s.at(0), 0.1);
    /// assert_eq!(s.at(9), 1.0);
    /// assert!((s.at(60) - 0.55).abs() < 1e-9);
    /// assert!((s.at(500) - 0.1).abs() < 1e-9);
    /// ```
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let t = ((step - self.warmup) as f64 / span).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Cosine => 0.5 * (1.0 + (PI * t).cos()),
            Decay::Linear => 1.0 - t,
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * left)
    }
}

/// Settings of AdamW and clipping.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, for tensors of two or more dimensions.
    pub weight_decay: f64,
    /// Bound for the global gradient norm; 0 does not clip.
    pub max_grad_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 }
    }
}

/// AdamW over arenas: global norm, clipping and the update, all on the GPU.
#[derive(Debug)]
pub struct Optimizer {
    config: AdamWConfig,
    /// First moments.
    pub m: Arena,
    /// Second moments.
    pub v: Arena,
    exec: Executable,
    hyper: Value,
    norm: Value,
}

impl Optimizer {
    /// Moments for `params`, zeroed, and the dispatches of a step.
    pub async fn new(gpu: &Gpu, config: AdamWConfig, params: &Arena, grads: &Arena) -> Result<Self> {
        let layout = &params.layout;
        let (m, v) = (Arena::zeros(gpu, "first moments", layout)?, Arena::zeros(gpu, "second moments", layout)?);
        let mut g = Graph::new();
        let flat = TensorType::f32([layout.len]);
        let [p_in, g_in, m_in, v_in] = [
            g.state("params", flat.clone())?,
            g.state("grads", flat.clone())?,
            g.state("m", flat.clone())?,
            g.state("v", flat)?,
        ];
        let hyper = g.input("hyper", TensorType::f32([8]))?;
        let norm = g.l2_norm("grad_norm", g_in)?;
        let new = g.adamw("adamw", [p_in, g_in, m_in, v_in], hyper, norm, layout.decay_len)?;
        for (value, state) in new.into_iter().zip([p_in, m_in, v_in]) {
            g.store(value, state)?;
        }
        let plan = gpu.plan(&g, &[norm])?;
        let arenas = [(p_in, params), (g_in, grads), (m_in, &m), (v_in, &v)];
        let bindings = arenas.map(|(value, arena)| (value, arena.whole.clone())).into();
        let exec = Executable::new(gpu, Arc::new(plan), ExecOptions { bindings, ..Default::default() }).await?;
        Ok(Optimizer { config, m, v, exec, hyper, norm })
    }

    /// Records an update with learning rate `lr`. `step` counts from 0 and sets the bias
    /// correction. The rate is written to the queue: one update per submit.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder, lr: f64, step: u64) -> Result<()> {
        self.write_hyper(lr, step)?;
        self.exec.record(encoder);
        Ok(())
    }

    /// An update like that of [`record`](Self::record), timed kernel by kernel; waits for the GPU.
    pub fn profile_blocking(&self, lr: f64, step: u64) -> Result<Timeline> {
        self.write_hyper(lr, step)?;
        self.exec.profile_blocking()
    }

    fn write_hyper(&self, lr: f64, step: u64) -> Result<()> {
        let c = self.config;
        let [lr, beta1, beta2, eps, weight_decay, max_grad_norm] =
            [lr, c.beta1, c.beta2, c.eps, c.weight_decay, c.max_grad_norm].map(|x| x as f32);
        let hyper = AdamWSettings { lr, beta1, beta2, eps, weight_decay, max_grad_norm }.at_step(step + 1);
        self.exec.write(self.hyper, &hyper)
    }

    /// The global gradient norm of the last step, before clipping: `[1]`.
    pub fn grad_norm(&self) -> Result<Tensor> {
        self.exec.tensor(self.norm)
    }

    /// The plan of an update.
    pub fn plan(&self) -> &Plan {
        self.exec.plan()
    }
}
