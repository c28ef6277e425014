//! The modules of a model by the names that files have for them, and what their matrices are in ours.

use super::{Adapter, AdapterLayer};
use crate::error::{Error, Result, joined, quoted};
use crate::format::StoredTensor;
use crate::model::layout::{beside, is_interleaved, is_linear, is_query_or_key, to_halves, to_neighbours, transpose};
use crate::model::loaded::{Model, parameters};
use crate::model::names::Names;
use crate::model::to_hugging_face;
use crate::nn::{Lora, MAX_RANK, TransformerConfig, is_called, layer_of};
use crate::ops::is_positive;
use crate::tensor::Shape;

/// A linear layer of a file: one of ours, or q, k and v side by side.
pub(super) struct Linear {
    /// Its name in the file.
    pub theirs: String,
    /// Our layers in it, with the width of their outputs.
    pub ours: Vec<(String, usize)>,
    pub d_in: usize,
}

/// The linear layers of a model in one kind of file.
pub(super) struct Modules {
    pub linears: Vec<Linear>,
    pub names: &'static Names,
    head_dim: usize,
    /// Whether the file is of a model that rotates neighbours, and whether ours does.
    interleaved: [bool; 2],
}

impl Modules {
    /// Those of Hugging Face's files.
    pub fn hugging_face(config: &TransformerConfig) -> Result<Modules> {
        let (_, names) = to_hugging_face::write(config)?;
        Modules::of(config, names, false)
    }

    /// Those in files with these names.
    pub fn of(config: &TransformerConfig, names: &'static Names, interleaved: bool) -> Result<Modules> {
        let mut linears: Vec<Linear> = vec![];
        for (name, shape) in parameters(config)? {
            if shape.rank() != 2 || !is_linear(&name) {
                continue;
            }
            let (Some(layer), Some(place)) = (name.strip_suffix(".weight"), names.place(&name, false)) else {
                continue;
            };
            let theirs = place.tensor.trim_end_matches(".weight").to_string();
            let part = (layer.to_string(), shape.cols());
            match linears.iter_mut().find(|linear| linear.theirs == theirs) {
                Some(linear) => linear.ours.push(part),
                None => linears.push(Linear { theirs, ours: vec![part], d_in: shape.rows() }),
            }
        }
        Ok(Modules { linears, names, head_dim: config.head_dim(), interleaved: [interleaved, is_interleaved(config)] })
    }

    /// Whether files have q, k and v in one layer.
    pub fn stack_qkv(&self) -> bool {
        self.linears.iter().any(|linear| linear.ours.len() > 1)
    }

    /// Columns of ours from those of a file.
    pub fn columns_of_ours(&self, name: &str, values: Vec<f32>) -> Vec<f32> {
        let [file, ours] = self.interleaved;
        self.rotated(name, values, [file, ours])
    }

    /// Columns of a file from ours.
    fn columns_of_file(&self, name: &str, values: Vec<f32>) -> Vec<f32> {
        let [file, ours] = self.interleaved;
        self.rotated(name, values, [ours, file])
    }

    /// Columns of a model that rotates neighbours or does not, from those of another.
    fn rotated(&self, name: &str, values: Vec<f32>, from_to: [bool; 2]) -> Vec<f32> {
        match from_to {
            [true, false] if is_query_or_key(name) => to_halves(self.head_dim, &values),
            [false, true] if is_query_or_key(name) => to_neighbours(self.head_dim, &values),
            _ => values,
        }
    }
}

/// What a file has of a linear layer's adapter.
pub(super) struct Written {
    pub rank: usize,
    pub scale: f32,
    /// `[rank, d_in]`.
    pub a: Vec<f32>,
    /// `[d_out, rank]`.
    pub b: Vec<f32>,
    pub d_out: usize,
}

/// The two matrices of a file's linear layer, `[rank, d_in]` and `[d_out, rank]`.
pub(super) type Pair<'a> = [Option<StoredTensor<'a>>; 2];

impl Linear {
    /// Adds a pair of a file to an adapter. `scale` gives the factor for a rank.
    pub fn read(
        &self,
        adapter: &mut Adapter,
        modules: &Modules,
        pair: &Pair<'_>,
        scale: impl Fn(usize) -> Result<f32>,
    ) -> Result<()> {
        let [Some(a), Some(b)] = pair else {
            let there = pair.iter().flatten().map(|tensor| quoted(tensor.name())).next().unwrap_or_default();
            return Err(adapter.bad(format!("{there}: the other matrix of {} is missing", quoted(&self.theirs))));
        };
        let rank = a.shape().dims().first().copied().unwrap_or(0);
        if !(1..=MAX_RANK).contains(&rank) {
            let message = format!("tensor {}: expected [rank, {}], got {}", quoted(a.name()), self.d_in, a.shape());
            return Err(adapter.bad(message));
        }
        let d_out: usize = self.ours.iter().map(|(_, width)| width).sum();
        let a = finite(a, [rank, self.d_in])?;
        let b = finite(b, [d_out, rank])?;
        let scale = scale(rank)?;
        if !is_positive(scale.abs()) {
            return Err(adapter.bad(format!("{}: a scale of {scale}", quoted(&self.theirs))));
        }
        let (a, mut first) = (transpose(&a, self.d_in), 0);
        for (name, width) in &self.ours {
            let rows = &b[first * rank..(first + width) * rank];
            first += width;
            // Names of parameters tell what is rotated.
            let b = modules.columns_of_ours(&format!("{name}.weight"), transpose(rows, rank));
            let layer = AdapterLayer { d_in: self.d_in, d_out: *width, rank, scale, a: a.clone(), b };
            adapter.layers.insert(name.clone(), layer);
        }
        Ok(())
    }

    /// The pair for a file. `None` if no layer is adapted.
    pub fn write(&self, adapter: &Adapter, modules: &Modules) -> Result<Option<Written>> {
        let found: Vec<Option<&AdapterLayer>> = self.ours.iter().map(|(name, _)| adapter.layers.get(name)).collect();
        let Some(first) = found.iter().copied().flatten().next() else { return Ok(None) };
        let (mut b, mut cols) = (vec![], 0);
        for ((name, width), layer) in self.ours.iter().zip(&found) {
            let part = match layer {
                Some(layer) if (layer.rank, layer.scale, &layer.a) == (first.rank, first.scale, &first.a) => &layer.b,
                _ => {
                    let message = "is one layer in such files, so q, k and v must share `a`: `Lora::shared_qkv`";
                    return Err(adapter.bad(format!("{} {message}", quoted(&self.theirs))));
                }
            };
            let part = modules.columns_of_file(&format!("{name}.weight"), part.clone());
            b = if cols == 0 { part } else { beside(&b, cols, &part, *width) };
            cols += width;
        }
        let (rank, scale) = (first.rank, first.scale);
        Ok(Some(Written { rank, scale, a: transpose(&first.a, rank), b: transpose(&b, cols), d_out: cols }))
    }
}

/// The values of a tensor that must have this shape.
pub(super) fn finite(tensor: &StoredTensor<'_>, shape: [usize; 2]) -> Result<Vec<f32>> {
    let tensor = tensor.of_shape(Shape::from(shape))?;
    tensor.check_finite()?;
    tensor.values()
}

impl Model {
    /// Settings of adapters for these linear layers, by the names that `peft` and Hugging Face's files have (`q_proj`,
    /// `c_attn`), by ours (`attn.q`), or `all-linear`. [`Lora::trained`] may have either kind of names, too.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names one that the model has not, and lists those that it has.
    ///
    /// ```
    /// use throughline::model::Model;
    /// use throughline::nn::Lora;
    ///
    /// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
    /// # let folder = doctest::qwen3();
    /// let model = Model::open(folder.path())?;
    /// let lora = model.lora(Lora::new(8, 16.0), &["q_proj", "v_proj"])?;
    /// assert_eq!(lora.targets, ["attn.q", "attn.v"]);
    /// assert!(model.lora(Lora::new(8, 16.0), &["c_attn"]).unwrap_err().to_string().contains("`gate_proj`"));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn lora(&self, settings: Lora, targets: &[&str]) -> Result<Lora> {
        let modules = Modules::hugging_face(self.config())?;
        let mut lora = Lora { targets: vec![], ..settings };
        if targets != ["all-linear"] {
            for target in targets {
                lora.targets.extend(self.layers_called(target, &modules)?);
            }
            lora.targets.dedup();
        }
        let qkv = |linear: &Linear| linear.ours.len() > 1 && linear.ours.iter().any(|(layer, _)| lora.adapts(layer));
        lora.shared_qkv = modules.linears.iter().any(qkv);
        let trained = std::mem::take(&mut lora.trained);
        lora.trained = trained.iter().map(|name| self.module_called(name)).collect::<Result<Vec<_>>>()?.concat();
        Ok(lora)
    }

    /// Our names of the linear layers that are called so, as short as they can be.
    fn layers_called(&self, target: &str, modules: &Modules) -> Result<Vec<String>> {
        let linears = || modules.linears.iter().filter(|linear| linear.ours.iter().any(|(n, _)| layer_of(n).is_some()));
        let mut found: Vec<&str> = vec![];
        for linear in linears() {
            let whole = is_called(&linear.theirs, target);
            found.extend(linear.ours.iter().map(|(n, _)| &n[..]).filter(|name| whole || is_called(name, target)));
        }
        if found.is_empty() {
            let mut names: Vec<String> = vec![];
            for name in linears().map(|linear| quoted(last(&linear.theirs))) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            let message =
                format!("no linear layer is called {}. The model has {}", quoted(target), joined(names, ", "));
            return Err(Error::config("lora.targets", message));
        }
        Ok(shortened(&found, self.config().n_layers))
    }

    /// Our names of the modules that are called so in files or here.
    fn module_called(&self, name: &str) -> Result<Vec<String>> {
        let (_, names) = to_hugging_face::write(self.config())?;
        let mut found: Vec<&str> = vec![];
        for (param, _) in self.params() {
            let Some((module, _)) = param.rsplit_once('.') else { continue };
            let theirs = names.place(param, false);
            let theirs = theirs.as_ref().and_then(|place| Some(place.tensor.rsplit_once('.')?.0));
            let called = is_called(module, name) || theirs.is_some_and(|theirs| is_called(theirs, name));
            if called && found.last() != Some(&module) {
                found.push(module);
            }
        }
        match found.is_empty() {
            true => Err(Error::config("lora.trained", format!("no module of the model is called {}", quoted(name)))),
            false => Ok(shortened(&found, self.config().n_layers)),
        }
    }
}

/// Names of modules without their layer, where all layers have them.
fn shortened(found: &[&str], layers: usize) -> Vec<String> {
    let inner = |name: &str| {
        let (_, rest) = name.strip_prefix("h.")?.split_once('.')?;
        Some(rest.to_string())
    };
    let mut short: Vec<String> = vec![];
    for name in found {
        let rest = inner(name);
        let everywhere = found.iter().filter(|other| inner(other) == rest).count() == layers;
        let name = rest.filter(|_| everywhere).unwrap_or_else(|| name.to_string());
        if !short.contains(&name) {
            short.push(name);
        }
    }
    short
}

pub(super) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}
