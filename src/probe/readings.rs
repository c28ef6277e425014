//! The answers: on their way to the host, and as numbers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::question::{Measure, Probe};
use crate::device::{Gpu, Readback};
use crate::error::Result;
use crate::ops::stats::Stats;

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

/// Where the statistics of one tensor, or two, are on the board.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub row: usize,
    pub rows: usize,
    pub len: usize,
}

/// How the answer to a probe comes about.
#[derive(Clone, Debug)]
pub(super) enum Recipe {
    /// Of the first tensor of an entry, or the second.
    One(Entry, bool),
    Ratio([(Entry, bool); 2]),
    Cosine(Entry),
    /// A whole tensor of this shape; the how-manieth.
    Whole(Vec<usize>, usize),
}

/// What the probes of a submitted step told, on its way to the host.
#[derive(Debug)]
pub struct ProbeReadback {
    /// The step.
    pub step: u64,
    pub(super) board: Option<Readback>,
    pub(super) wholes: Vec<Readback>,
    pub(super) recipes: Arc<Vec<(Probe, Recipe)>>,
    pub(super) gpu: Gpu,
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
