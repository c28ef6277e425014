//! Finding the fastest variant of each op on this adapter, by measuring.
//!
//! Ops offer [`variants`](crate::graph::Op::variants), mostly tile sizes, the first of them a sensible default. A
//! [`Tuner`] measures all of them on the shapes of a graph and keeps the fastest as [`Choices`]. Those are a part of
//! the [`Profile`](crate::Profile) that plans are made for.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::exec::{ExecOptions, Executable};
use super::gpu::Gpu;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::hash::fnv1a;
use crate::ops::random_array;
use crate::plan::Plan;
use crate::plan::variants::{Tunable, tunables};
use crate::profile::Choices;
use crate::tensor::{DType, Shape};

/// Measures which variants of ops are fastest on an adapter. It remembers the results in this process, and in a file
/// for the next one.
///
/// Use one when the same model will run for a while. Plan first, let the tuner measure those plans, and plan again on
/// a [handle with the choices](Gpu::with_choices):
///
/// ```
/// use throughline::{Gpu, TensorType, Tuner};
/// let gpu = Gpu::headless_blocking()?;
/// let mut g = gpu.graph();
/// let x = g.input("x", TensorType::f32([64, 32]))?;
/// let w = g.param("w", [32, 48])?;
/// let y = g.matmul("y", x, w)?;
///
/// let mut tuner = Tuner::new(); // or `Tuner::open("tuned.json")`, to measure once and not in every run
/// let choices = tuner.tune_blocking(&gpu, [&gpu.plan(&g, &[y])?])?;
/// let gpu = gpu.with_choices(choices);
/// let tuned = gpu.plan(&g, &[y])?; // and so does everything else that is planned on this handle
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// [`TrainPlan::plans`](crate::train::TrainPlan::plans) and [`DecodePlan::plans`](crate::decode::DecodePlan::plans)
/// are the plans of a trainer and of a decoder.
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
    /// The fastest variant.
    variant: String,
    /// The time of each variant, for human readers.
    microseconds: BTreeMap<String, f64>,
}

const FORMAT: u32 = 1;

/// Far more than any real cache takes; longer files are not read.
const MAX_FILE_BYTES: u64 = 16 << 20;

impl Default for Cache {
    fn default() -> Self {
        Cache { format: FORMAT, adapters: BTreeMap::new() }
    }
}

impl Tuner {
    /// A tuner without a file: its measurements are lost when it is dropped.
    pub fn new() -> Self {
        Tuner::default()
    }

    /// A tuner that keeps its measurements in this file, which need not exist yet.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let cache = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Cache::default(),
            Err(e) => return Err(Error::io(&path)(e)),
            Ok(meta) if meta.len() > MAX_FILE_BYTES => {
                let message = format!("a tuner's cache has at most {MAX_FILE_BYTES} bytes, this has {}", meta.len());
                return Err(Error::format(path, message));
            }
            Ok(_) => serde_json::from_slice(&std::fs::read(&path).map_err(Error::io(&path))?)
                .map_err(|e| Error::format(&path, e))?,
        };
        if cache.format != FORMAT {
            return Err(Error::format(path, format!("field `format`: expected {FORMAT}, got {}", cache.format)));
        }
        Ok(Tuner { path: Some(path), cache, measured: 0 })
    }

    /// Number of ops that were measured, as opposed to remembered.
    pub fn measured(&self) -> usize {
        self.measured
    }

    /// Returns the fastest variants of the ops in these plans, in addition to what `gpu` already
    /// [uses](Gpu::with_choices). Variants without a remembered result are measured now, which waits for the GPU.
    pub fn tune_blocking<'a>(&mut self, gpu: &Gpu, plans: impl IntoIterator<Item = &'a Plan>) -> Result<Choices> {
        let before = self.measured;
        let mut choices = gpu.profile().choices.clone();
        for tunable in plans.into_iter().flat_map(|plan| tunables(plan, gpu.profile())) {
            let variant = self.fastest_blocking(gpu, &tunable)?;
            choices.set(tunable.key, variant);
        }
        if self.measured > before {
            self.save()?;
        }
        Ok(choices)
    }

    /// The fastest variant of an op.
    fn fastest_blocking(&mut self, gpu: &Gpu, tunable: &Tunable) -> Result<String> {
        let plans = tunable.plans(gpu.profile())?;
        let kernels = kernels_hash(&plans)?;
        let entries = self.cache.adapters.entry(gpu.describe()).or_default();
        if let Some(known) = entries.get(&tunable.key)
            && known.kernels == kernels
            && tunable.variants.contains(&known.variant)
        {
            return Ok(known.variant.clone());
        }
        let times = measure_blocking(gpu, tunable, plans)?;
        let (fastest, _) = (times.iter().enumerate())
            .min_by(|a, b| a.1.total_cmp(b.1))
            .ok_or_else(|| Error::Device(format!("`{}` has no variants", tunable.key)))?;
        let variant = tunable.variants[fastest].clone();
        let microseconds = tunable.variants.iter().cloned().zip(times).collect();
        entries.insert(tunable.key.clone(), Entry { kernels, variant: variant.clone(), microseconds });
        self.measured += 1;
        Ok(variant)
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let text = serde_json::to_string_pretty(&self.cache).map_err(|e| Error::format(path, e))?;
        write_atomically(path, text.as_bytes())
    }
}

fn kernels_hash(plans: &[Plan]) -> Result<u64> {
    let mut text = String::new();
    for d in plans.iter().flat_map(|p| &p.steps).flat_map(|s| &s.dispatches) {
        let _ = writeln!(text, "{}\n{} {:?}", d.kernel.wgsl()?, d.kernel.entry, d.workgroups); // to a String: no error
    }
    Ok(fnv1a(text.bytes()))
}

/// Rounds of measuring. Each round runs every variant once, so that all meet the same conditions.
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

/// Random numbers for the inputs, since zeros and denormals can be faster or slower than usual. Integers may be indices
/// and stay zero.
fn fill(exec: &Executable) -> Result<()> {
    for (seed, external) in exec.plan().externals.iter().enumerate() {
        if external.ty.dtype == DType::F32 {
            let data = random_array(&Shape::from([external.ty.len()]), seed as u64).data;
            exec.write(external.value, &data.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
        }
    }
    Ok(())
}
