//! Which of an op's variants to run: measured on this adapter, remembered in a file.
//!
//! Ops offer [`variants`](crate::ops::Op::variants), tiles mostly, the first of them sensible
//! unmeasured. A [`Tuner`] runs all of them on the shapes of a graph and keeps the fastest as
//! [`Choices`], which are a part of the [`Profile`] that plans are made for.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::checkpoint::write_atomically;
use crate::error::{Error, Result};
use crate::exec::{ExecOptions, Executable};
use crate::gpu::Gpu;
use crate::graph::{Graph, Value};
use crate::ops::{Launch, Op, random_array};
use crate::plan::{Plan, Step};
use crate::profile::Profile;
use crate::tensor::{DType, Shape, TensorType};

/// Which variant each op takes, by op and class of shape. Ops that are not in here take their first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choices(Arc<BTreeMap<String, String>>);

impl Choices {
    /// Sets the variant of all ops of this [`key`].
    pub fn set(&mut self, key: String, variant: String) {
        Arc::make_mut(&mut self.0).insert(key, variant);
    }

    /// The variant set for a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Index of the variant that `op` takes: 0 if none is chosen, or one that it does not offer.
    pub(crate) fn variant(&self, op: &dyn Op, cx: &Launch<'_>) -> usize {
        if self.0.is_empty() {
            return 0;
        }
        let chosen = self.get(&key(op, cx.inputs));
        chosen.and_then(|name| op.variants(cx).iter().position(|v| v == name)).unwrap_or(0)
    }
}

/// What ops have in common that take the same variant: settings, element types, and dimensions
/// rounded up to a power of two, with a mark where they are no multiple of 4.
pub fn key(op: &dyn Op, inputs: &[TensorType]) -> String {
    let class = |&n: &usize| match n {
        0..=8 => n.to_string(),
        _ => format!("{}{}", n.next_power_of_two(), if n.is_multiple_of(4) { "" } else { "-" }),
    };
    let input = |t: &TensorType| {
        let dims: Vec<String> = t.shape.dims().iter().map(class).collect();
        format!("{}[{}]", t.dtype, dims.join(","))
    };
    let inputs: Vec<String> = inputs.iter().map(input).collect();
    format!("{op:?} {}", inputs.join(" "))
}

/// An op of a plan that offers more than one variant.
#[derive(Clone, Debug)]
pub struct Tunable {
    /// Its [`key`].
    pub key: String,
    /// What it offers.
    pub variants: Vec<String>,
    op: Arc<dyn Op>,
    inputs: Vec<TensorType>,
}

/// The ops of a plan that can be tuned, each key once.
pub fn tunables(plan: &Plan, profile: &Profile) -> Vec<Tunable> {
    let mut seen = BTreeSet::new();
    plan.steps.iter().filter_map(|step| tunable(step, profile)).filter(|t| seen.insert(t.key.clone())).collect()
}

fn tunable(step: &Step, profile: &Profile) -> Option<Tunable> {
    let types = |slots: &[(_, TensorType)]| slots.iter().map(|(_, ty)| ty.clone()).collect::<Vec<_>>();
    let (inputs, outputs) = (types(&step.inputs), types(&step.outputs));
    let variants = step.op.variants(&Launch { inputs: &inputs, outputs: &outputs, profile, variant: 0 });
    let key = key(step.op.as_ref(), &inputs);
    (variants.len() > 1).then(|| Tunable { key, variants, op: step.op.clone(), inputs })
}

/// Measures variants, and remembers which was fastest. Give one to
/// [`Gpu::with_tuner`]; what it has measured it need not measure again, in this process or, with a
/// file, in the next.
///
/// ```no_run
/// use throughline::{Gpu, Tuner};
/// let gpu = Gpu::headless_blocking()?.with_tuner(Tuner::open("tuned.json")?);
/// // Whatever is planned on `gpu` from here on is measured first.
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Tuner {
    path: Option<PathBuf>,
    cache: Cache,
    measured: usize,
}

/// The cache file.
#[derive(Debug, Serialize, Deserialize)]
struct Cache {
    format: u32,
    /// By adapter and driver, then by [`key`].
    adapters: BTreeMap<String, BTreeMap<String, Entry>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Hash of the WGSL of all variants.
    kernels: u64,
    /// The fastest.
    variant: String,
    /// What each took, for people.
    microseconds: BTreeMap<String, f64>,
}

const FORMAT: u32 = 1;
/// Far more than any real cache; a file is not read beyond it.
const MAX_FILE_BYTES: u64 = 16 << 20;

impl Default for Cache {
    fn default() -> Self {
        Cache { format: FORMAT, adapters: BTreeMap::new() }
    }
}

impl Tuner {
    /// A tuner that forgets.
    pub fn new() -> Self {
        Tuner::default()
    }

    /// A tuner that remembers in this file, which need not be there yet.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let io = |source| Error::Io { path: path.display().to_string(), source };
        let format = |message: String| Error::Format { path: path.display().to_string(), message };
        let cache = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Cache::default(),
            Err(e) => return Err(io(e)),
            Ok(meta) if meta.len() > MAX_FILE_BYTES => {
                return Err(format(format!(
                    "a tuner's cache has at most {MAX_FILE_BYTES} bytes, this has {}",
                    meta.len()
                )));
            }
            Ok(_) => serde_json::from_slice(&std::fs::read(&path).map_err(io)?).map_err(|e| format(e.to_string()))?,
        };
        if cache.format != FORMAT {
            return Err(format(format!("field `format`: expected {FORMAT}, got {}", cache.format)));
        }
        Ok(Tuner { path: Some(path), cache, measured: 0 })
    }

    /// How many ops were measured, and not remembered.
    pub fn measured(&self) -> usize {
        self.measured
    }

    /// The fastest variants for the ops of `plan`: remembered, or measured now, which waits for the
    /// GPU.
    pub fn choose_blocking(&mut self, gpu: &Gpu, plan: &Plan) -> Result<Choices> {
        let before = self.measured;
        let adapter = gpu.describe();
        let mut choices = Choices::default();
        for tunable in tunables(plan, gpu.profile()) {
            let plans = tunable.plans(gpu.profile())?;
            let kernels = kernels_hash(&plans)?;
            let known = self.cache.adapters.get(&adapter).and_then(|entries| entries.get(&tunable.key));
            let variant = match known {
                Some(e) if e.kernels == kernels && tunable.variants.contains(&e.variant) => e.variant.clone(),
                _ => {
                    let times = measure_blocking(gpu, &tunable, plans)?;
                    let (fastest, _) = (times.iter().enumerate())
                        .min_by(|a, b| a.1.total_cmp(b.1))
                        .ok_or_else(|| Error::Device(format!("`{}` has no variants", tunable.key)))?;
                    let variant = tunable.variants[fastest].clone();
                    let microseconds = tunable.variants.iter().cloned().zip(times).collect();
                    let entry = Entry { kernels, variant: variant.clone(), microseconds };
                    self.cache.adapters.entry(adapter.clone()).or_default().insert(tunable.key.clone(), entry);
                    self.measured += 1;
                    variant
                }
            };
            choices.set(tunable.key, variant);
        }
        if self.measured > before {
            self.save()?;
        }
        Ok(choices)
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let text = serde_json::to_string_pretty(&self.cache)
            .map_err(|e| Error::Format { path: path.display().to_string(), message: e.to_string() })?;
        write_atomically(path, text.as_bytes())
    }
}

impl Tunable {
    /// The op alone, once for each variant.
    fn plans(&self, profile: &Profile) -> Result<Vec<Plan>> {
        let (graph, outputs) = self.graph()?;
        let plan = |name: &String| {
            let mut profile = Profile { choices: Choices::default(), ..profile.clone() };
            profile.choices.set(self.key.clone(), name.clone());
            Plan::new(&graph, &outputs, &profile)
        };
        self.variants.iter().map(plan).collect()
    }

    fn graph(&self) -> Result<(Graph, Vec<Value>)> {
        let mut graph = Graph::new();
        let inputs: Vec<Value> = (self.inputs.iter().enumerate())
            .map(|(i, ty)| graph.input(&format!("x{i}"), ty.clone()))
            .collect::<Result<_>>()?;
        let outputs = graph.op_arc("tuned", self.op.clone(), &inputs)?;
        Ok((graph, outputs))
    }
}

fn kernels_hash(plans: &[Plan]) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for d in plans.iter().flat_map(|p| &p.steps).flat_map(|s| &s.dispatches) {
        (d.kernel.wgsl()?, d.kernel.entry, d.workgroups).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Rounds of measuring: in each, every variant runs once, so that all see the same weather.
const ROUNDS: usize = 5;

/// Microseconds that each variant takes: the least of a few rounds.
fn measure_blocking(gpu: &Gpu, tunable: &Tunable, plans: Vec<Plan>) -> Result<Vec<f64>> {
    let execs = plans
        .into_iter()
        .map(|plan| {
            let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
            fill(&exec)?;
            exec.submit()?; // compiles
            Ok(exec)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut least = vec![f64::INFINITY; tunable.variants.len()];
    for _ in 0..ROUNDS {
        for (least, exec) in least.iter_mut().zip(&execs) {
            *least = least.min(exec.profile_blocking()?.kernel_ns() as f64 / 1e3);
        }
    }
    Ok(least)
}

/// Random numbers for the inputs, since zeros and denormals have speeds of their own; integers,
/// which may be indices, stay zero.
fn fill(exec: &Executable) -> Result<()> {
    for (seed, external) in exec.plan().externals.iter().enumerate() {
        if external.ty.dtype == DType::F32 {
            let data = random_array(&Shape::from([external.ty.len()]), seed as u64).data;
            exec.write(external.value, &data.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
        }
    }
    Ok(())
}
