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
use super::ticks::LONGEST;
use super::timeline::{Clock, Timeline};
use half::f16;

use crate::error::{Error, Result, quoted};
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
    ignored: Vec<String>,
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
    /// The clock that measured.
    #[serde(default)]
    clock: Clock,
    /// The time of each variant, for human readers, and to know an entry that is none. JSON has no infinity or NaN: what
    /// older versions wrote for them is `null`.
    microseconds: BTreeMap<String, Option<f64>>,
}

impl Entry {
    /// What is wrong with the entry, if anything.
    fn problem(&self) -> Option<String> {
        let Some(&best) = self.microseconds.get(&self.variant) else {
            return Some(format!("{} has no time", quoted(&self.variant)));
        };
        let odd = self.microseconds.iter().find(|(_, us)| !us.is_some_and(is_time));
        if let Some((variant, us)) = odd {
            let us = us.map_or("null".into(), |us| us.to_string());
            return Some(format!("{} took {us} µs, which is no measurement", quoted(variant)));
        }
        let faster = self.microseconds.iter().find(|(_, us)| **us < best)?.0;
        Some(format!("{} is not the fastest: {} is", quoted(&self.variant), quoted(faster)))
    }
}

/// Whether a kernel may take so many microseconds.
fn is_time(us: f64) -> bool {
    us > 0.0 && us <= LONGEST.as_micros() as f64
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
    ///
    /// Entries that are no measurement are [`ignored`](Self::ignored). An `Err` if it is no file of a tuner.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let tuner = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Tuner::new(),
            Err(e) => return Err(Error::io(&path)(e)),
            Ok(meta) if meta.len() > MAX_FILE_BYTES => {
                let message = format!("a tuner's cache has at most {MAX_FILE_BYTES} bytes, this has {}", meta.len());
                return Err(Error::format(path, message));
            }
            Ok(_) => Tuner::parse(&path, &std::fs::read(&path).map_err(Error::io(&path))?)?,
        };
        Ok(Tuner { path: Some(path), ..tuner })
    }

    /// A tuner that knows the measurements of a file with these bytes: for an application that brings them along
    /// (`include_bytes!`). What it measures itself is lost when it is dropped. Otherwise like [`open`](Self::open).
    pub fn from_bytes(file: &[u8]) -> Result<Self> {
        Tuner::parse(Path::new("tuner's bytes"), file)
    }

    fn parse(path: &Path, file: &[u8]) -> Result<Self> {
        let mut cache: Cache = serde_json::from_slice(file).map_err(|e| Error::format(path, e))?;
        if cache.format != FORMAT {
            return Err(Error::format(path, format!("field `format`: expected {FORMAT}, got {}", cache.format)));
        }
        let mut ignored = vec![];
        for (adapter, entries) in &mut cache.adapters {
            entries.retain(|key, entry| {
                let problem = entry.problem();
                ignored.extend(problem.iter().map(|p| format!("{}, {}: {p}", quoted(adapter), quoted(key))));
                problem.is_none()
            });
        }
        Ok(Tuner { cache, ignored, ..Tuner::new() })
    }

    /// The entries of the file that are no measurement, with adapter, op and reason. They are measured anew.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Number of ops that were measured, as opposed to remembered.
    pub fn measured(&self) -> usize {
        self.measured
    }

    /// Returns the fastest variants of the ops in these plans, in addition to what `gpu` already
    /// [uses](Gpu::with_choices). Variants without a remembered result are measured now, which waits for the GPU.
    ///
    /// The clock is the GPU's, or the host's where the GPU's measures nothing. Where neither does, the op keeps its
    /// default, and nothing is remembered.
    pub fn tune_blocking<'a>(&mut self, gpu: &Gpu, plans: impl IntoIterator<Item = &'a Plan>) -> Result<Choices> {
        let before = self.measured;
        let mut choices = gpu.profile().choices.clone();
        for tunable in plans.into_iter().flat_map(|plan| tunables(plan, gpu.profile())) {
            if let Some(variant) = self.fastest_blocking(gpu, &tunable)? {
                choices.set(tunable.key, variant);
            }
        }
        if self.measured > before {
            self.save()?;
        }
        Ok(choices)
    }

    /// The fastest variant of an op, if it can be measured.
    fn fastest_blocking(&mut self, gpu: &Gpu, tunable: &Tunable) -> Result<Option<String>> {
        let plans = tunable.plans(gpu.profile())?;
        let kernels = kernels_hash(&plans)?;
        let entries = self.cache.adapters.entry(gpu.describe()).or_default();
        if let Some(known) = entries.get(&tunable.key)
            && known.kernels == kernels
            && tunable.variants.contains(&known.variant)
        {
            return Ok(Some(known.variant.clone()));
        }
        let Some((clock, times)) = measure_blocking(gpu, plans)? else { return Ok(None) };
        let fastest = (times.iter().zip(&tunable.variants)).min_by(|a, b| a.0.total_cmp(b.0));
        let Some((_, variant)) = fastest else { return Ok(None) };
        let variant = variant.clone();
        let microseconds = tunable.variants.iter().cloned().zip(times.into_iter().map(Some)).collect();
        entries.insert(tunable.key.clone(), Entry { kernels, variant: variant.clone(), clock, microseconds });
        self.measured += 1;
        Ok(Some(variant))
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

/// Microseconds that each of these plans takes: the least of a few rounds, all by the same clock. `None` if no clock
/// measures all of them.
fn measure_blocking(gpu: &Gpu, plans: Vec<Plan>) -> Result<Option<(Clock, Vec<f64>)>> {
    let execs = plans
        .into_iter()
        .map(|plan| {
            let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
            fill(&exec)?;
            exec.submit()?; // compiles
            Ok(exec)
        })
        .collect::<Result<Vec<_>>>()?;
    for clock in [Clock::Gpu, Clock::Host] {
        let mut rounds = vec![];
        for _ in 0..ROUNDS {
            rounds.push(execs.iter().map(|exec| exec.profile_by_blocking(clock)).collect::<Result<Vec<_>>>()?);
        }
        if let Some(times) = least(&rounds) {
            return Ok(Some((clock, times)));
        }
    }
    Ok(None)
}

/// The least time of the kernels of each variant, in microseconds. A round in which a kernel was not measured does not
/// count; `None` if none is left for a variant.
fn least(rounds: &[Vec<Option<Timeline>>]) -> Option<Vec<f64>> {
    let time = |timeline: &Option<Timeline>| {
        let measured = timeline.as_ref().filter(|timeline| timeline.has_all_kernels());
        measured.map(|timeline| timeline.kernel_ns() as f64 / 1e3).filter(|us| is_time(*us))
    };
    let variants = rounds.first()?.len();
    (0..variants).map(|i| rounds.iter().filter_map(|round| time(&round[i])).min_by(f64::total_cmp)).collect()
}

/// Random numbers for the inputs, since zeros and denormals can be faster or slower than usual. Integers may be indices
/// and stay zero.
fn fill(exec: &Executable) -> Result<()> {
    for (seed, external) in exec.plan().externals.iter().enumerate() {
        let data = || random_array(&Shape::from([external.ty.len()]), seed as u64).data.into_iter();
        match external.ty.dtype {
            DType::F32 => exec.write(external.value, &data().map(|x| x as f32).collect::<Vec<_>>())?,
            DType::F16 => exec.write(external.value, &data().map(f16::from_f64).collect::<Vec<_>>())?,
            DType::U32 => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::timeline::{NodeTime, Span};
    use super::*;

    fn timeline(ns: &[u64]) -> Option<Timeline> {
        let span = |&ns: &u64| Span { what: "k".into(), start_ns: 0, ns, measured: ns > 0 };
        let nodes = vec![NodeTime {
            node: "n".into(),
            others: vec![],
            op: "o",
            flops: 0,
            bytes: 0,
            spans: ns.iter().map(span).collect(),
        }];
        Some(Timeline { adapter: "A".into(), clock: Clock::Gpu, nodes })
    }

    #[test]
    fn only_measurements_are_compared() {
        let good = vec![timeline(&[3000, 1000]), timeline(&[9000])];
        // A kernel in no time at all is no measurement, however fast it looks.
        let bad = vec![timeline(&[2000, 0]), None];
        assert_eq!(least(&[good.clone(), bad.clone()]), Some(vec![4.0, 9.0]));
        assert_eq!(least(&[good.clone(), vec![timeline(&[1500, 500]), None]]), Some(vec![2.0, 9.0]));
        assert_eq!(least(&[bad.clone(), bad]), None);
        assert_eq!(least(&[good, vec![timeline(&[u64::MAX]), timeline(&[1])]]), Some(vec![4.0, 0.001]));
        assert_eq!(least(&[]), None);
    }
}
