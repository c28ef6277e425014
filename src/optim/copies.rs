//! Copies in f16 of the matrices of an arena: what products read in mixed precision.

use std::sync::Arc;

use super::arena::{Arena, ArenaLayout, ArenaPlace, numbered};
use crate::device::timeline::Timeline;
use crate::device::{ExecOptions, Executable, Gpu, Submits, Tensor};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::plan::Plan;
use crate::plan::requirements::Requirements;
use crate::profile::Profile;
use crate::tensor::{DType, TensorType};

/// Which tensors of an arena have a copy in f16, where, and how the copies are made.
///
/// They are made of the arena at the beginning of each step rather than written by the update, so whatever wrote to the
/// arena, a step never reads old ones.
#[derive(Clone, Debug)]
pub(crate) struct CopiesPlan {
    /// The place of each tensor's copy, if it has one.
    places: Vec<Option<ArenaPlace>>,
    /// Elements of each buffer.
    parts: Vec<usize>,
    runs: Vec<Run>,
    plan: Arc<Plan>,
}

/// Neighbours in an arena, copied together.
#[derive(Clone, Copy, Debug)]
struct Run {
    from: Value,
    to: Value,
    /// Their part of the arena, and the first element in it.
    place: ArenaPlace,
    /// Where the copy is.
    copy: ArenaPlace,
    len: usize,
}

impl CopiesPlan {
    /// Plans copies of the tensors of `layout` that `has_copy` names by their index.
    pub fn new(layout: &ArenaLayout, has_copy: impl Fn(usize) -> bool, profile: &Profile) -> Result<Self> {
        let mut order: Vec<usize> = (0..layout.tensors.len()).filter(|&i| has_copy(i)).collect();
        order.sort_by_key(|&i| (layout.places[i].part, layout.places[i].offset));
        let mut places = vec![None; layout.tensors.len()];
        let mut parts: Vec<usize> = vec![];
        // The first element of each run, where its copy is, and its length.
        let mut runs: Vec<(ArenaPlace, ArenaPlace, usize)> = vec![];
        for i in order {
            let (place, len) = (layout.places[i], layout.tensors[i].1.len().next_multiple_of(layout.align));
            match runs.last_mut().filter(|(from, _, n)| from.part == place.part && from.offset + *n == place.offset) {
                Some((_, _, n)) => *n += len,
                None => {
                    if runs.last().is_none_or(|(from, ..)| from.part != place.part) {
                        parts.push(0);
                    }
                    let (part, offset) = (parts.len() - 1, parts[parts.len() - 1]);
                    runs.push((place, ArenaPlace { part, offset }, len));
                }
            }
            let part = parts.len() - 1;
            places[i] = Some(ArenaPlace { part, offset: parts[part] });
            parts[part] += len;
        }
        let mut g = Graph::new();
        let mut planned = vec![];
        for (i, (place, copy, len)) in runs.into_iter().enumerate() {
            let from = g.state(&numbered("matrices", i), TensorType::f32([len]))?;
            let to = g.state(&numbered("copies", i), TensorType::f16([len]))?;
            let cast = g.cast(&numbered("copy", i), from, DType::F16)?;
            g.store(cast, to)?;
            planned.push(Run { from, to, place, copy, len });
        }
        Ok(CopiesPlan { places, parts, runs: planned, plan: Arc::new(Plan::new(&g, &[], profile)?) })
    }

    /// Whether tensor `i` of the arena has a copy.
    pub fn has(&self, i: usize) -> bool {
        self.places.get(i).is_some_and(Option::is_some)
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        let largest = self.parts.iter().map(|len| 2 * len).max().unwrap_or(0);
        Requirements::of(&self.plan).and(Requirements::of_buffer(largest))
    }

    /// Bytes of GPU memory.
    pub fn bytes(&self) -> usize {
        2 * self.parts.iter().sum::<usize>() + self.plan.allocated_bytes(|_| true)
    }
}

/// The copies on a device.
#[derive(Debug)]
pub(crate) struct Copies {
    tensors: Vec<Option<Tensor>>,
    exec: Executable,
}

impl Copies {
    /// What a plan says, of an arena of its layout. They hold nothing until they are [recorded](Self::record).
    pub async fn from_plan(gpu: &Gpu, plan: &CopiesPlan, arena: &Arena) -> Result<Self> {
        let part = |(i, &len): (usize, &usize)| Tensor::zeros(gpu, &numbered("f16 copies", i), TensorType::f16([len]));
        let parts = gpu.scoped(|| plan.parts.iter().enumerate().map(part).collect::<Result<Vec<_>>>()).await?;
        let of = |place: ArenaPlace, ty: TensorType| parts[place.part].range(2 * place.offset as u64, ty);
        let mut tensors = vec![];
        for (place, (_, shape)) in plan.places.iter().zip(&arena.layout.tensors) {
            tensors.push(place.map(|place| of(place, TensorType::f16(shape.clone()))).transpose()?);
        }
        let mut bindings = vec![];
        for run in &plan.runs {
            let from = arena.parts[run.place.part].range(4 * run.place.offset as u64, TensorType::f32([run.len]))?;
            bindings.extend([(run.from, from), (run.to, of(run.copy, TensorType::f16([run.len]))?)]);
        }
        let exec = Executable::new(gpu, plan.plan.clone(), ExecOptions::bound(bindings.into_iter().collect())).await?;
        Ok(Copies { tensors, exec })
    }

    /// The copy of tensor `i` of the arena, if it has one.
    pub fn of(&self, i: usize) -> Option<&Tensor> {
        self.tensors.get(i)?.as_ref()
    }

    /// Records the copying of what the arena holds.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.exec.record(encoder)
    }

    /// [`record`](Self::record), in as many submits as it takes.
    pub fn record_in(&self, submits: &mut Submits) -> Result<()> {
        self.exec.make_room_in(submits)?;
        self.exec.record_in(submits)
    }

    /// Submits it.
    pub fn submit(&self) -> Result<()> {
        self.exec.submit().map(drop)
    }

    /// Runs and times it.
    pub async fn profile_by(&self, profile: impl AsyncFn(&Executable) -> Result<Timeline>) -> Result<Timeline> {
        profile(&self.exec).await
    }

    /// Number of its commands, as profiles count them.
    pub fn command_count(&self) -> usize {
        self.exec.command_count()
    }
}
