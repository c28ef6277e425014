//! The data of a step, by input.

use std::borrow::Cow;

use half::f16;

use crate::device::Executable;
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::tensor::{DType, Element, TensorType};
use crate::train::data::IGNORE_INDEX;

/// Data for an input of a graph, made by [`Value::with`].
#[derive(Clone, Debug)]
pub struct Feed<'a> {
    pub(super) value: Value,
    pub(super) data: Data<'a>,
}

/// Elements of any type.
#[derive(Clone, Debug)]
pub(super) enum Data<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    U32(Cow<'a, [u32]>),
}

impl Data<'_> {
    fn dtype(&self) -> DType {
        match self {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::U32(_) => DType::U32,
        }
    }

    fn len(&self) -> usize {
        match self {
            Data::F32(data) => data.len(),
            Data::F16(data) => data.len(),
            Data::U32(data) => data.len(),
        }
    }

    /// Checks ids: each is below this number, or [`IGNORE_INDEX`].
    pub fn check_ids(&self, name: &str, below: usize) -> Result<()> {
        let Data::U32(ids) = self else { return Ok(()) };
        match ids.iter().position(|&id| id as usize >= below && id != IGNORE_INDEX) {
            None => Ok(()),
            Some(i) => {
                let expected = format!("ids below {below}, or `IGNORE_INDEX` for none");
                Err(Error::data(name, expected, format!("{} at {i}", ids[i])))
            }
        }
    }

    /// Checks that a tensor of this name and type can hold it.
    pub fn check(&self, name: &str, ty: &TensorType) -> Result<()> {
        match self.dtype() == ty.dtype && self.len() == ty.len() {
            true => Ok(()),
            false => Err(Error::data(
                name,
                format!("{} elements for {ty}", ty.len()),
                format!("{} elements of {}", self.len(), self.dtype()),
            )),
        }
    }
}

impl Value {
    /// This input with data, for a step of a [`GraphTrainer`](crate::train::GraphTrainer): `trainer.step(&[x.with(&xs),
    /// y.with(&ys)])`. The elements have the type of the input.
    pub fn with<T: Element>(self, data: &[T]) -> Feed<'_> {
        let data = match T::DTYPE {
            DType::F32 => Data::F32(Cow::Borrowed(bytemuck::cast_slice(data))),
            DType::F16 => Data::F16(Cow::Borrowed(bytemuck::cast_slice(data))),
            DType::U32 => Data::U32(Cow::Borrowed(bytemuck::cast_slice(data))),
        };
        Feed { value: self, data }
    }

    /// [`with`](Self::with) ids that the feed keeps.
    pub(crate) fn with_owned(self, ids: Vec<u32>) -> Feed<'static> {
        Feed { value: self, data: Data::U32(Cow::Owned(ids)) }
    }
}

impl Feed<'_> {
    /// Records the copy into the input.
    pub(crate) fn record(&self, exec: &Executable, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        match &self.data {
            Data::F32(data) => exec.record_write(encoder, self.value, data),
            Data::F16(data) => exec.record_write(encoder, self.value, data),
            Data::U32(data) => exec.record_write(encoder, self.value, data),
        }
    }

    /// A copy that owns its data.
    fn owned(&self) -> Feed<'static> {
        let data = match &self.data {
            Data::F32(data) => Data::F32(Cow::Owned(data.to_vec())),
            Data::F16(data) => Data::F16(Cow::Owned(data.to_vec())),
            Data::U32(data) => Data::U32(Cow::Owned(data.to_vec())),
        };
        Feed { value: self.value, data }
    }
}

/// The data of a step. A slice or array of [`Feed`]s converts into it. For a trainer with several
/// [`micro_batches`](crate::train::GraphTrainConfig::micro_batches), use [`micro_batches`](Self::micro_batches).
#[derive(Clone, Debug, Default)]
pub struct Feeds<'a> {
    pub(super) batches: Vec<Vec<Feed<'a>>>,
    weights: Option<Vec<f32>>,
}

impl<'a> Feeds<'a> {
    /// The data of each micro-batch. Loss and gradients are the mean over the micro-batches.
    ///
    /// An input that only the first of them feeds keeps its data for the others.
    ///
    /// ```no_run
    /// # use throughline::train::{Feeds, GraphTrainer};
    /// # fn step(trainer: &mut GraphTrainer, [x, y]: [throughline::Value; 2], [xs, ys]: [&[f32]; 2])
    /// # -> throughline::Result<()> {
    /// let halves = (0..2).map(|i| {
    ///     let [xs, ys] = [xs, ys].map(|all| &all[i * all.len() / 2..(i + 1) * all.len() / 2]);
    ///     [x.with(xs), y.with(ys)]
    /// });
    /// trainer.step(Feeds::micro_batches(halves))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn micro_batches<F: AsRef<[Feed<'a>]>>(batches: impl IntoIterator<Item = F>) -> Self {
        Feeds { batches: batches.into_iter().map(|feeds| feeds.as_ref().to_vec()).collect(), weights: None }
    }

    /// The same with a weight for each micro-batch. Loss and gradients are the sum of weight times those of the
    /// micro-batch, so the weights of a mean add up to 1. Use it where micro-batches have different numbers of examples
    /// that count.
    pub fn weighted(self, weights: impl Into<Vec<f32>>) -> Self {
        Feeds { weights: Some(weights.into()), ..self }
    }

    /// A copy that owns its data.
    pub(super) fn owned(&self) -> Feeds<'static> {
        let batches = self.batches.iter().map(|feeds| feeds.iter().map(Feed::owned).collect());
        Feeds { batches: batches.collect(), weights: self.weights.clone() }
    }

    /// The weight of each of the `n` micro-batches of a step, or what is wrong with their number or weights.
    pub(super) fn weights(&self, n: usize) -> Result<Vec<f32>> {
        if self.batches.len() != n {
            let expected = format!("{n}, one for each of the `micro_batches` of the configuration");
            return Err(Error::data("feeds", expected, self.batches.len()));
        }
        let Some(weights) = &self.weights else { return Ok(vec![1.0 / n as f32; n]) };
        let valid = |&w: &f32| w.is_finite() && w >= 0.0;
        if weights.len() != n || !weights.iter().all(valid) {
            let expected = format!("{n}, none of them negative or no number");
            return Err(Error::data("weights of micro-batches", expected, format!("{weights:?}")));
        }
        if n == 1 && weights[0] != 1.0 {
            return Err(Error::data("weights of micro-batches", "1, as there is only one", weights[0]));
        }
        Ok(weights.clone())
    }
}

impl<'a> From<&[Feed<'a>]> for Feeds<'a> {
    fn from(feeds: &[Feed<'a>]) -> Self {
        Feeds { batches: vec![feeds.to_vec()], weights: None }
    }
}

impl<'a> From<&Vec<Feed<'a>>> for Feeds<'a> {
    fn from(feeds: &Vec<Feed<'a>>) -> Self {
        feeds[..].into()
    }
}

impl<'a, const N: usize> From<&[Feed<'a>; N]> for Feeds<'a> {
    fn from(feeds: &[Feed<'a>; N]) -> Self {
        feeds[..].into()
    }
}
