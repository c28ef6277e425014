//! Answers of probes: on their way to the host, and as numbers.

use std::sync::Arc;

use half::f16;
use serde::{Deserialize, Serialize};

use super::question::{Measure, Probe, Tap};
use crate::device::{Gpu, Readback};
use crate::error::Result;
use crate::ops::stats::Stats;
use crate::tensor::DType;

/// A number reported by a probe or a [view](crate::views).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Name of the probe.
    pub name: String,
    /// Name of the node that it reads.
    pub node: String,
    /// The layer that it concerns, if any.
    pub layer: Option<usize>,
    /// The number.
    pub value: f64,
    /// What the tensor is multiplied by in memory: the loss scale for a gradient of a trainer with [loss
    /// scaling](crate::optim::LossScaling), else 1. The number is without it.
    #[serde(default = "unscaled")]
    pub scale: f64,
}

fn unscaled() -> f64 {
    1.0
}

impl Reading {
    /// How far this magnitude, as it is in memory, is from overflow in f16, in powers of two: 1 if twice as much is the
    /// largest number there, 65504; negative if it is beyond that. Infinite for 0, and NaN for NaN.
    ///
    /// Of a [`Measure::MaxAbs`] it tells whether a tensor may be in f16, and how much larger a loss scale may be.
    pub fn f16_headroom(&self) -> f64 {
        (65_504.0 / (self.value.abs() * self.scale)).log2()
    }
}

/// A tensor reported by a probe or a [view](crate::views).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorReading {
    /// Name of the probe.
    pub name: String,
    /// Name of the node that it reads.
    pub node: String,
    /// The layer that it concerns, if any.
    pub layer: Option<usize>,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements in row-major order.
    pub data: Vec<f32>,
}

/// The answers to the probes of one step, in the order of the probes.
///
/// Look up numbers with [`get`](Self::get) or [`named`](Self::named), for instance to plot them by layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Readings {
    /// Number of the step.
    pub step: u64,
    /// Answers that are numbers.
    pub values: Vec<Reading>,
    /// Answers that are whole tensors.
    pub tensors: Vec<TensorReading>,
}

impl Readings {
    /// All numbers of the probes of this name: one per layer, or one per node.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Reading> {
        self.values.iter().filter(move |r| r.name == name)
    }

    /// The first number of this name and layer.
    pub fn get(&self, name: &str, layer: impl Into<Option<usize>>) -> Option<f64> {
        let layer = layer.into();
        self.values.iter().find(|r| r.name == name && r.layer == layer).map(|r| r.value)
    }
}

/// The rows of the board that hold the statistics of one or two tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub row: usize,
    pub rows: usize,
    pub len: usize,
}

/// How the answer to a probe is computed from the board.
#[derive(Clone, Debug)]
pub(super) enum Recipe {
    /// From the first or the second tensor of an entry.
    One(Entry, bool),
    Ratio([(Entry, bool); 2]),
    Cosine(Entry),
    /// A whole tensor of this shape; the number is its index among the whole tensors.
    Whole(Vec<usize>, usize),
}

/// The answers to the probes of a submitted step, on their way to the host.
///
/// Keep it while later steps run and take it when convenient: reading it a step late costs no waiting.
#[derive(Debug)]
pub struct ProbeReadback {
    /// Number of the step.
    pub step: u64,
    pub(super) board: Option<Readback>,
    /// With the types that they are stored in.
    pub(super) wholes: Vec<(Readback, DType)>,
    pub(super) recipes: Arc<Vec<(Probe, Recipe)>>,
    /// The scale of the loss, if there is one.
    pub(super) scale: Option<Readback>,
    pub(super) gpu: Gpu,
    /// If known, waiting need not include later submissions.
    pub(crate) submitted: Option<wgpu::SubmissionIndex>,
}

impl ProbeReadback {
    /// The same where gradients are those of the loss times this scale.
    pub(crate) fn with_scale(self, scale: Readback) -> Self {
        ProbeReadback { scale: Some(scale), ..self }
    }

    /// The answers. Resolves once the device has been polled after the step has run.
    pub async fn take(self) -> Result<Readings> {
        let board = match self.board {
            Some(readback) => readback.take::<f32>().await?,
            None => vec![],
        };
        let mut wholes = vec![];
        for (readback, dtype) in self.wholes {
            wholes.push(match dtype {
                DType::F16 => readback.take::<f16>().await?.into_iter().map(f16::to_f32).collect(),
                DType::F32 | DType::U32 => readback.take::<f32>().await?,
            });
        }
        let scale = match self.scale {
            Some(readback) => readback.take::<f32>().await?[0],
            None => 1.0,
        };
        Ok(readings(self.step, &self.recipes, &board, &wholes, scale))
    }

    /// The answers, waiting for the step, and not for later ones where the [`Trainer`](crate::train::Trainer)
    /// submitted it.
    pub fn wait_blocking(mut self) -> Result<Readings> {
        let gpu = self.gpu.clone();
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

/// The answers to probes where gradients were multiplied by `scale`.
fn readings(step: u64, recipes: &[(Probe, Recipe)], board: &[f32], wholes: &[Vec<f32>], scale: f32) -> Readings {
    let scale_of = |tap: &Tap| if matches!(tap, Tap::Gradient(_)) { scale } else { 1.0 };
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
                let data = wholes[*i].iter().map(|x| x / scale_of(&tap)).collect();
                let (node, shape) = (tap.node().into(), shape.clone());
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
                    // A maximum may miss a NaN; a sum does not.
                    Measure::MaxAbs if s.square.is_nan() => f64::NAN,
                    Measure::MaxAbs => s.top,
                    _ => s.rms(),
                }
            }
        };
        let Probe { name, layer, tap, measure } = probe.clone();
        let scale = f64::from(scale_of(&tap));
        let (value, scale) = match measure {
            // Of no magnitude.
            Measure::Cosine(_) => (value, 1.0),
            Measure::Ratio(other) => (value / scale * f64::from(scale_of(&other)), 1.0),
            _ => (value / scale, scale),
        };
        result.values.push(Reading { name, node: tap.node().into(), layer, value, scale });
    }
    result
}
