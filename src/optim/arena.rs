//! Arenas: many tensors in one buffer, or in a few.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::device::{Gpu, Tensor};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::nn::{Transformer, TransformerConfig};
use crate::precision::Precision;
use crate::profile::Profile;
use crate::tensor::{Shape, TensorType};

/// At least what an optimiser's settings take, alignment included.
const SETTINGS_BYTES: u64 = 1024;

/// The place of each tensor in an arena. Pure data, known before there is a device.
///
/// Make one to find out how much memory parameters take, or to create an [`Arena`] for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// Names and shapes, in the order given.
    pub tensors: Vec<(String, Shape)>,
    /// The place of each tensor.
    pub places: Vec<ArenaPlace>,
    /// The buffers, at least one.
    pub parts: Vec<ArenaPart>,
    /// Largest size of a part, in bytes. Graphs that use these tensors must split their tables by the same number
    /// ([`Graph::with_max_tensor_bytes`]).
    pub max_bytes: u64,
    /// Tensors start at multiples of this many elements, so that they can be bound: 64, or 128 where there are [copies
    /// in f16](crate::Precision).
    pub align: usize,
}

/// The place of a tensor in an arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaPlace {
    /// Index of the part.
    pub part: usize,
    /// Its first element in that part.
    pub offset: usize,
}

/// One buffer of an arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaPart {
    /// Number of elements, gaps included.
    pub len: usize,
    /// Weight decay applies to the elements before this one.
    pub decay_len: usize,
    /// Whether it holds Muon's matrices, and nothing else.
    pub muon: bool,
}

/// Tensors start at multiples of this many elements: 256 bytes, the alignment of bindings.
const ALIGN: usize = 64;

impl ArenaLayout {
    /// Lays out tensors in parts of at most `max_bytes` (a device's
    /// [`Profile::max_tensor_bytes`](crate::Profile::max_tensor_bytes)).
    ///
    /// Tensors with weight decay come first, each in the first part with room for it. By the usual rule these are the
    /// tensors of two or more dimensions: weights and embeddings decay, biases and gains do not.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`](crate::Error::Limit) names a tensor that fits no part, since tensors are never split.
    /// [`Error::Graph`](crate::Error::Graph) names two that have one name.
    pub fn new(tensors: Vec<(String, Shape)>, max_bytes: u64) -> Result<Self> {
        Self::with_muon(tensors, max_bytes, |_, _| false)
    }

    /// The same, with the matrices that `takes` selects in parts of their own after all others, ordered by shape: for
    /// Muon. [`nn::is_hidden_matrix`](crate::nn::is_hidden_matrix) selects those of a model.
    pub fn with_muon(
        tensors: Vec<(String, Shape)>,
        max_bytes: u64,
        takes: impl Fn(&str, &Shape) -> bool,
    ) -> Result<Self> {
        Self::aligned(tensors, max_bytes, ALIGN, takes)
    }

    /// The same with tensors at multiples of `align` elements.
    fn aligned(
        tensors: Vec<(String, Shape)>,
        max_bytes: u64,
        align: usize,
        takes: impl Fn(&str, &Shape) -> bool,
    ) -> Result<Self> {
        let mut names = HashSet::new();
        if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(name)) {
            return Err(Error::Graph(format!("an arena has two tensors named `{name}`: files find them by name")));
        }
        let room = (max_bytes / 4).min(u64::from(u32::MAX / 4)) as usize / align * align;
        let key = |(name, shape): &(String, Shape)| {
            let muon = shape.rank() == 2 && takes(name, shape);
            (muon, shape.rank() < 2, if muon { shape.dims().to_vec() } else { vec![] })
        };
        let keys: Vec<_> = tensors.iter().map(key).collect();
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|&i| &keys[i]);
        let mut places = vec![ArenaPlace::default(); tensors.len()];
        let mut parts: Vec<ArenaPart> = vec![];
        for i in order {
            let ((name, shape), &(muon, stays, _)) = (&tensors[i], &keys[i]);
            let len = shape.len().next_multiple_of(align);
            if len > room {
                let what = format!("bytes of tensor `{name}`, f32{shape}, in one binding");
                let advice = "Use a smaller model, or several tensors with some of its rows each";
                return Err(Error::limit(what, 4 * shape.len() as u64, max_bytes).advise(advice));
            }
            let part = parts.iter().position(|p| p.muon == muon && p.len + len <= room).unwrap_or(parts.len());
            if part == parts.len() {
                parts.push(ArenaPart { muon, ..ArenaPart::default() });
            }
            places[i] = ArenaPlace { part, offset: parts[part].len };
            parts[part].len += len;
            if !stays {
                parts[part].decay_len = parts[part].len;
            }
        }
        if parts.is_empty() {
            parts.push(ArenaPart { len: align, ..ArenaPart::default() });
        }
        Ok(ArenaLayout { tensors, places, parts, max_bytes, align })
    }

    /// The layout of no tensors.
    pub(crate) fn empty(&self) -> Self {
        ArenaLayout { tensors: vec![], places: vec![], parts: vec![], ..*self }
    }

    /// All tensors but Muon's, in the same order.
    pub(super) fn without_muon(&self) -> Self {
        let mut layout = self.empty();
        let mut moved = HashMap::new();
        for (i, &part) in self.parts.iter().enumerate().filter(|(_, part)| !part.muon) {
            moved.insert(i, layout.parts.len());
            layout.parts.push(part);
        }
        for (tensor, place) in self.tensors.iter().zip(&self.places) {
            if let Some(&part) = moved.get(&place.part) {
                layout.tensors.push(tensor.clone());
                layout.places.push(ArenaPlace { part, ..*place });
            }
        }
        layout
    }

    /// The layout of a model's parameters. See [`new`](Self::new) for `max_bytes`.
    pub fn of_model(config: &TransformerConfig, max_bytes: u64) -> Result<Self> {
        let mut g = Graph::with_max_tensor_bytes(max_bytes);
        let gpt = Transformer::build(&mut g, config, 1, 1, false)?;
        Self::of(&g, &gpt.params, max_bytes)
    }

    /// The layout of a graph's parameters. See [`new`](Self::new) for `max_bytes`.
    pub fn of(graph: &Graph, params: &[Value], max_bytes: u64) -> Result<Self> {
        Self::new(named(graph, params)?, max_bytes)
    }

    /// The same for training in this precision on devices of this profile, where an update binds so many storage
    /// buffers. `takes` selects matrices for Muon.
    pub(crate) fn for_training(
        graph: &Graph,
        params: &[Value],
        (profile, precision): (&Profile, Precision),
        buffers: usize,
        takes: impl Fn(&str, &Shape) -> bool,
    ) -> Result<Self> {
        // Where an update binds too many buffers, its settings lie in one binding with a gradient.
        let merged = (profile.max_storage_buffers as usize) < buffers;
        let room = profile.max_tensor_bytes().saturating_sub(if merged { SETTINGS_BYTES } else { 0 });
        let layout = Self::aligned(named(graph, params)?, room, precision.align(), takes)?;
        // Tables are in parts as the graph's.
        Ok(ArenaLayout { max_bytes: profile.max_tensor_bytes(), ..layout })
    }

    /// Number of elements of all parts, gaps included.
    pub fn total_len(&self) -> usize {
        self.parts.iter().map(|p| p.len).sum()
    }

    /// Checks that tensor `i` got this many values.
    fn expect_len(&self, i: usize, len: usize) -> Result<()> {
        let (name, shape) = &self.tensors[i];
        match len == shape.len() {
            true => Ok(()),
            false => Err(Error::data(name, format!("{} elements for shape {shape}", shape.len()), len)),
        }
    }
}

/// Names and shapes of a graph's parameters.
fn named(graph: &Graph, params: &[Value]) -> Result<Vec<(String, Shape)>> {
    graph.check_values(params, |i| format!("parameter {i} of the layout"))?;
    Ok(params.iter().map(|&v| (graph.name(v).to_string(), graph.ty(v).shape.clone())).collect())
}

/// Many tensors in GPU memory, in as few buffers as possible.
///
/// One arena for all parameters makes an optimiser step a single dispatch and a checkpoint a single copy. Bind its
/// [`tensors`](Self::tensors) to the parameters of a graph with
/// [`ExecOptions::bindings`](crate::ExecOptions::bindings).
#[derive(Clone, Debug)]
pub struct Arena {
    /// The place of each tensor.
    pub layout: Arc<ArenaLayout>,
    /// Each part, gaps included, as a flat tensor in a buffer of its own.
    pub parts: Vec<Tensor>,
    /// Each tensor as a range of its part.
    pub tensors: Vec<Tensor>,
}

impl Arena {
    /// Allocates a zeroed arena. `label` names its buffers in debuggers.
    pub fn zeros(gpu: &Gpu, label: &str, layout: &Arc<ArenaLayout>) -> Result<Self> {
        let max = gpu.profile().max_tensor_bytes();
        let mut parts = vec![];
        for (i, part) in layout.parts.iter().enumerate() {
            let ty = TensorType::f32([part.len]);
            if ty.storage_bytes() as u64 > max {
                let what = format!("bytes of part {i} of the {label} in one binding");
                let advice = "Make the layout for this adapter";
                return Err(Error::limit(what, ty.storage_bytes() as u64, max).advise(advice));
            }
            parts.push(Tensor::zeros(gpu, &numbered(label, i), ty)?);
        }
        let tensors = (layout.tensors.iter().zip(&layout.places))
            .map(|((_, shape), place)| parts[place.part].range(4 * place.offset as u64, TensorType::f32(shape.clone())))
            .collect::<Result<_>>()?;
        Ok(Arena { layout: layout.clone(), parts, tensors })
    }

    /// Writes every tensor, like [`write_tensor`](Self::write_tensor). `data` holds one slice per tensor, in the order
    /// of the layout. Nothing is written unless all of them fit.
    pub fn write(&self, gpu: &Gpu, data: &[impl AsRef<[f32]>]) -> Result<()> {
        if data.len() != self.tensors.len() {
            return Err(Error::data("arena", format!("values of {} tensors", self.tensors.len()), data.len()));
        }
        for (i, values) in data.iter().enumerate() {
            self.layout.expect_len(i, values.as_ref().len())?;
        }
        (data.iter().enumerate()).try_for_each(|(i, values)| self.write_tensor(gpu, i, values.as_ref()))
    }

    /// Writes the tensor of this index in the layout. The write is submitted at once, so that copies of a whole model
    /// do not pile up in host memory until the next submit.
    pub fn write_tensor(&self, gpu: &Gpu, i: usize, values: &[f32]) -> Result<()> {
        let Some(tensor) = self.tensors.get(i) else {
            return Err(Error::data("arena", format!("a tensor's index, below {}", self.tensors.len()), i));
        };
        self.layout.expect_len(i, values.len())?;
        tensor.write(gpu, values)?;
        gpu.flush()
    }

    /// Reads every tensor, in the order of the layout.
    /// Resolves once the device has been polled; outside of frames, use [`read_blocking`](Self::read_blocking).
    pub async fn read(&self, gpu: &Gpu) -> Result<Vec<Vec<f32>>> {
        let mut values = vec![vec![]; self.tensors.len()];
        // One part at a time: one wait each, and at most one part in host memory besides the result.
        for (part, whole) in self.parts.iter().enumerate() {
            let whole: Vec<f32> = whole.read(gpu).await?;
            for ((values, place), (_, shape)) in values.iter_mut().zip(&self.layout.places).zip(&self.layout.tensors) {
                if place.part == part {
                    *values = whole[place.offset..place.offset + shape.len()].to_vec();
                }
            }
        }
        Ok(values)
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking(&self, gpu: &Gpu) -> Result<Vec<Vec<f32>>> {
        gpu.run_blocking(self.read(gpu))
    }
}

/// A name for part `i` of something. The first part has the name of the whole.
pub(super) fn numbered(name: &str, i: usize) -> String {
    if i == 0 { name.to_string() } else { format!("{name}.{i}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(lens: &[&[usize]], max_bytes: u64) -> ArenaLayout {
        let tensors = lens.iter().enumerate().map(|(i, dims)| (format!("t{i}"), Shape::from(*dims))).collect();
        ArenaLayout::new(tensors, max_bytes).unwrap()
    }

    fn part(len: usize, decay_len: usize) -> ArenaPart {
        ArenaPart { len, decay_len, muon: false }
    }

    #[test]
    fn what_decays_comes_first_in_every_part() {
        // 64 elements, 128, 64 and 128 with their gaps, in parts of 192.
        let l = layout(&[&[3], &[8, 16], &[64, 1], &[2, 64]], 4 * 192 + 255);
        let at = |part, offset| ArenaPlace { part, offset };
        assert_eq!(l.places, [at(1, 128), at(0, 0), at(0, 128), at(1, 0)]);
        assert_eq!(l.parts, [part(192, 192), part(192, 128)]);
        assert_eq!(l.total_len(), 384);
    }

    #[test]
    fn one_part_is_in_the_order_given_but_for_decay() {
        let l = layout(&[&[3], &[8, 16], &[5], &[2, 2]], u64::MAX);
        assert_eq!(l.places.iter().map(|p| p.offset).collect::<Vec<_>>(), [192, 0, 256, 128]);
        assert_eq!(l.parts, [part(320, 192)]);
        assert_eq!(layout(&[], 1 << 20).parts, [part(64, 0)]);
    }

    #[test]
    fn what_muon_takes_is_apart_from_the_rest_and_sorted_by_shape() {
        // By shape [2, 64] comes before [8, 16]; what has other than two dimensions is AdamW's.
        let tensors = [[3].as_slice(), &[8, 16], &[5, 5], &[2, 64], &[8, 16], &[2, 2, 2]];
        let tensors = tensors.iter().enumerate().map(|(i, dims)| (format!("t{i}"), Shape::from(*dims))).collect();
        let l = ArenaLayout::with_muon(tensors, 4 * 256, |name, _| name != "t2").unwrap();
        let at = |part, offset| ArenaPlace { part, offset };
        assert_eq!(l.places, [at(0, 128), at(1, 128), at(0, 0), at(1, 0), at(2, 0), at(0, 64)]);
        let muon = |len| ArenaPart { muon: true, ..part(len, len) };
        assert_eq!(l.parts, [part(192, 128), muon(256), muon(128)]);
        let rest = l.without_muon();
        let names: Vec<&str> = rest.tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((names, rest.parts), (vec!["t0", "t2", "t5"], vec![part(192, 128)]));
        assert_eq!(rest.places, [at(0, 128), at(0, 0), at(0, 64)]);
    }

    #[test]
    fn names_are_for_one_tensor_each() {
        let err = ArenaLayout::new(vec![("w".into(), [4].into()), ("w".into(), [2].into())], u64::MAX).unwrap_err();
        assert!(err.to_string().contains("two tensors named `w`"), "{err}");
    }

    #[test]
    fn a_tensor_that_fits_no_part_is_named() {
        let tensors = vec![("small".into(), [4, 4].into()), ("table".into(), [100, 64].into())];
        let err = ArenaLayout::new(tensors, 10_000).unwrap_err().to_string();
        assert!(["`table`", "[100, 64]", "25600", "10000"].iter().all(|w| err.contains(w)), "{err}");
    }
}
