//! Probes as nodes of a graph: reductions onto one board.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::question::{Measure, Probe, Tap, find, tap_name};
use super::readings::{Entry, ProbeReadback, Recipe};
use crate::device::Executable;
use crate::error::{Error, Result};
use crate::graph::{Graph, Source, Value};
use crate::ops::fill::Fill;
use crate::ops::stats::Stats;

/// The values whose gradients these probes read. Pass them to [`Graph::gradients`], together with what is trained.
///
/// # Errors
///
/// [`Error::Graph`](crate::Error::Graph) names a probe whose node does not exist.
pub fn gradient_taps(graph: &Graph, probes: &[Probe]) -> Result<Vec<Value>> {
    let mut values = BTreeSet::new();
    for probe in probes {
        for tap in probe.taps() {
            if let Tap::Gradient(node) = tap {
                values.insert(find(graph, &format!("probe `{}`", probe.name), node)?);
            }
        }
    }
    Ok(values.into_iter().collect())
}

/// The probes of a graph, added to it as nodes.
///
/// A [`Trainer`](crate::train::Trainer) sets these up for its own graph. Use the type directly to probe a graph that
/// you built and run yourself; the example of the [module](super) does so.
#[derive(Clone, Debug)]
pub struct Instruments {
    board: Option<Value>,
    wholes: Vec<Value>,
    /// Shared with readbacks on their way to the host.
    recipes: Arc<Vec<(Probe, Recipe)>>,
}

impl Instruments {
    /// Adds the reductions that `probes` ask for. `gradients` holds the gradient of each of the [`gradient_taps`]. Call
    /// it when the graph is complete.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`](crate::Error::Graph) names a probe whose node does not exist or is not f32.
    pub fn new(graph: &mut Graph, probes: &[Probe], gradients: &HashMap<Value, Value>) -> Result<Self> {
        let mut tapped = vec![];
        for probe in probes {
            let [a, b] = [Some(&probe.tap), probe.measure.other()].map(|tap| {
                let tap = tap?;
                Some(tap_value(graph, probe, tap, gradients))
            });
            tapped.push((a.transpose()?, b.transpose()?));
        }
        let mut wanted = Wanted::default();
        for (probe, &(a, b)) in probes.iter().zip(&tapped) {
            match (&probe.measure, a, b) {
                (Measure::Cosine(_), Some(a), Some(b)) => drop(wanted.pairs.insert((a, b))),
                (Measure::Whole, ..) => {}
                _ => wanted.singles.extend(a.into_iter().chain(b)),
            }
        }
        let (board, entries) = wanted.add_to(graph)?;
        let one = |v: Option<Value>| v.and_then(|v| entries.one.get(&v).copied());
        let mut wholes = vec![];
        let mut recipes = vec![];
        for (probe, &(a, b)) in probes.iter().zip(&tapped) {
            let recipe = match (&probe.measure, a, b) {
                (Measure::Whole, Some(a), _) => {
                    wholes.push(a);
                    Some(Recipe::Whole(graph.ty(a).shape.dims().to_vec(), wholes.len() - 1))
                }
                (Measure::Cosine(_), Some(a), Some(b)) => entries.two.get(&(a, b)).copied().map(Recipe::Cosine),
                (Measure::Ratio(_), ..) => one(a).zip(one(b)).map(|(a, b)| Recipe::Ratio([a, b])),
                _ => one(a).map(|(entry, second)| Recipe::One(entry, second)),
            };
            let missing = || Error::Graph(format!("probe `{}` was not placed", probe.name));
            recipes.push((probe.clone(), recipe.ok_or_else(missing)?));
        }
        Ok(Instruments { board, wholes, recipes: Arc::new(recipes) })
    }

    /// [`new`](Self::new), including the gradients of `loss` that the probes need. Use it for graphs without a backward
    /// pass; in others the backward pass would run twice.
    pub fn with_gradients(graph: &mut Graph, loss: Value, probes: &[Probe]) -> Result<Self> {
        let taps = gradient_taps(graph, probes)?;
        let gradients = if taps.is_empty() { vec![] } else { graph.gradients(loss, &taps)? };
        Self::new(graph, probes, &taps.into_iter().zip(gradients).collect())
    }

    /// Outputs that the plan must include, in addition to your own.
    pub fn outputs(&self) -> Vec<Value> {
        self.board.iter().chain(&self.wholes).copied().collect()
    }

    /// Records the copies that bring what `exec` found in its last step to the host.
    pub fn record_read(
        &self,
        exec: &Executable,
        encoder: &mut wgpu::CommandEncoder,
        step: u64,
    ) -> Result<ProbeReadback> {
        let mut read = |v: Value| {
            let tensor = exec.tensor(v)?;
            Ok((tensor.record_read(exec.gpu(), encoder), tensor.ty().dtype))
        };
        Ok(ProbeReadback {
            step,
            board: self.board.map(&mut read).transpose()?.map(|(board, _)| board),
            wholes: self.wholes.iter().map(|&v| read(v)).collect::<Result<_>>()?,
            recipes: self.recipes.clone(),
            scale: None,
            gpu: exec.gpu().clone(),
            submitted: None,
        })
    }
}

/// The value that a tap refers to.
fn tap_value(graph: &Graph, probe: &Probe, tap: &Tap, gradients: &HashMap<Value, Value>) -> Result<Value> {
    let who = format!("probe `{}`", probe.name);
    let mut value = find(graph, &who, tap.node())?;
    if matches!(tap, Tap::Gradient(_)) {
        let missing = || {
            Error::Graph(format!(
                "{who}: there is no gradient of `{}`: `Instruments::with_gradients` adds it",
                tap.node()
            ))
        };
        value = gradients.get(&value).copied().ok_or_else(missing)?;
        graph.check_values(&[value], |_| format!("{who}: the gradient of `{}`", tap.node()))?;
    }
    let ty = graph.ty(value);
    if !ty.dtype.is_float() {
        return Err(Error::Graph(format!("{who}: probes look at floats, but `{}` is {ty}", tap.node())));
    }
    Ok(value)
}

/// Tensors whose statistics are needed.
#[derive(Default)]
struct Wanted {
    pairs: BTreeSet<(Value, Value)>,
    singles: BTreeSet<Value>,
}

/// Where their statistics are on the board.
#[derive(Default)]
struct Entries {
    /// The entry of a tensor, and whether the tensor is the first one of that entry.
    one: HashMap<Value, (Entry, bool)>,
    two: HashMap<(Value, Value), Entry>,
}

impl Wanted {
    /// Adds the board, and a node for each pair and for each tensor that is in no pair. The nodes form a chain that
    /// updates the board in place, so they are in the order in which their tensors are computed.
    fn add_to(self, graph: &mut Graph) -> Result<(Option<Value>, Entries)> {
        let mut entries = Entries::default();
        let paired: BTreeSet<Value> = self.pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
        let pairs = self.pairs.iter().map(|&(a, b)| vec![a, b]);
        let singles = self.singles.iter().filter(|v| !paired.contains(v)).map(|&v| vec![v]);
        let made = |v: &Value| match graph.node(v.node()).source {
            Source::Op(_) => v.node(),
            _ => 0,
        };
        let mut nodes: Vec<Vec<Value>> = pairs.chain(singles).collect();
        nodes.sort_by_key(|values| values.iter().map(made).max());
        if nodes.is_empty() {
            return Ok((None, entries));
        }
        let rows = |values: &[Value]| Stats::rows(graph.ty(values[0]).len());
        let total: usize = nodes.iter().map(|values| rows(values)).sum();
        let mut board = graph.op1("probes", Fill::early([total, Stats::COLUMNS], 0.0), &[])?;
        let mut row = 0;
        for values in nodes {
            let len = graph.ty(values[0]).len();
            let entry = Entry { row, rows: Stats::rows(len), len };
            row += entry.rows;
            let names: Vec<String> = values.iter().map(|&v| tap_name(graph, v)).collect();
            let op = Stats { pair: values.len() == 2, row: entry.row };
            board = graph.op1(&format!("probe {}", names.join(" and ")), op, &[&values[..], &[board]].concat())?;
            for (i, &v) in values.iter().enumerate() {
                entries.one.entry(v).or_insert((entry, i == 1));
            }
            if let [a, b] = values[..] {
                entries.two.insert((a, b), entry);
            }
        }
        Ok((Some(board), entries))
    }
}
