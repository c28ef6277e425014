//! Whether blocks can be decoded with a cache.
//!
//! A decoder feeds a few tokens at a time, and of those before them it has the keys and values of
//! [`attend`](super::Builder::attend), nothing else. So between one attention and the next, a block must compute the
//! row of a token from that token's row alone, wherever the row lies. That cannot be seen in a block's source, but it
//! can be tried: the ops of a small graph are evaluated in f64, with one row changed, and with all rows moved.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Source, Value};
use crate::ops::attention::CachedAttention;
use crate::ops::cache::CacheWrite;
use crate::ops::embedding::Embedding;
use crate::ops::matmul::Matmul;
use crate::ops::rope::Rope;
use crate::rng::Rng;
use crate::tensor::{DType, TensorType};

/// Sequences, and tokens of each, in a graph to try. No factor in common, so that moving rows by one in both directions
/// brings a row to every place.
pub(super) const BATCH: usize = 2;
pub(super) const TIME: usize = 3;

/// What a value depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// No token: parameters and constants.
    Fixed,
    /// Row by row on the token of that row, and on what that token attended to.
    Rows,
    /// A cache with the rows of all tokens so far.
    Cache,
    /// Several tokens, or the place of a row; or the rows are not in order, as in the middle of two transpositions.
    Mixed,
}

/// The graph of a decoder of [`BATCH`] sequences.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub graph: &'a Graph,
    /// Number of tokens of each sequence.
    pub time: usize,
    /// Start and end of the stream.
    pub stream: [Value; 2],
    /// What the host writes for each token.
    pub inputs: &'a [Value],
    pub caches: &'a [Value],
}

/// Returns an error if blocks compute the row of a token from others, except by attention.
pub(super) fn check(subject: &Subject<'_>) -> Result<()> {
    let Subject { graph, time, stream: [first, last], inputs, caches } = *subject;
    let states = graph.externals(|source| matches!(source, Source::State));
    if let Some(state) = states.into_iter().find(|state| !caches.contains(state)) {
        return Err(not_decodable(graph.name(state), "state", "Nothing keeps this state from token to token"));
    }
    let wanted: Vec<Value> = graph.stores().iter().map(|(value, _)| *value).chain([last]).collect();
    let mut trial = Trial { graph, pieces: [BATCH, time], kinds: HashMap::new(), known: HashMap::new() };
    for id in graph.needed(&wanted) {
        let node = graph.node(id);
        let value = graph.value(id, 0);
        let kinds = match &node.source {
            Source::Op(op) if value > first => trial.kinds_of(id, op.as_ref())?,
            // Our own embedding.
            Source::Op(_) => vec![Kind::Rows; node.outputs.len()],
            _ if inputs.contains(&value) => vec![Kind::Rows],
            _ => vec![Kind::Fixed],
        };
        trial.kinds.extend((0..).zip(kinds).map(|(output, kind)| (graph.value(id, output), kind)));
    }
    trial.expect_rows(last)
}

struct Trial<'a> {
    graph: &'a Graph,
    /// Sequences, and tokens of each.
    pieces: [usize; 2],
    kinds: HashMap<Value, Kind>,
    /// Kinds of the outputs of ops that were tried.
    known: HashMap<Use, Vec<Kind>>,
}

/// An op with its settings, and its inputs.
type Use = (TypeId, String, Vec<(TensorType, Kind)>);

impl Trial<'_> {
    fn inputs(&self, id: usize) -> Vec<Kind> {
        self.graph.node(id).inputs.iter().map(|v| self.kinds[v]).collect()
    }

    /// The kinds of an op's outputs.
    fn kinds_of(&mut self, id: usize, op: &dyn Op) -> Result<Vec<Kind>> {
        let node = self.graph.node(id);
        let inputs = self.inputs(id);
        let any: &dyn Any = op;
        if any.is::<CacheWrite>() {
            self.expect_rows(node.inputs[0])?;
            return Ok(vec![Kind::Cache]);
        }
        // These know how many tokens came before: places count from there.
        if any.is::<CachedAttention>() || any.downcast_ref::<Rope>().is_some_and(|rope| rope.has_start) {
            self.expect_rows(node.inputs[0])?;
            return Ok(vec![Kind::Rows; node.outputs.len()]);
        }
        if inputs.iter().all(|kind| *kind == Kind::Fixed) {
            return Ok(vec![Kind::Fixed; node.outputs.len()]);
        }
        if inputs.contains(&Kind::Cache) {
            return Ok(vec![Kind::Mixed; node.outputs.len()]);
        }
        if self.is_large_and_by_row(id, any, &inputs) {
            return Ok(vec![Kind::Rows]);
        }
        if inputs.contains(&Kind::Mixed) || node.inputs.iter().any(|v| self.is_computed_of_no_token(*v)) {
            return self.tried(id);
        }
        let types = node.inputs.iter().map(|v| self.graph.ty(*v).clone());
        let key = (any.type_id(), format!("{op:?}"), types.zip(inputs).collect());
        if let Some(kinds) = self.known.get(&key) {
            return Ok(kinds.clone());
        }
        let kinds = self.tried(id)?;
        self.known.insert(key, kinds.clone());
        Ok(kinds)
    }

    /// Whether this is an op with a matrix or table, which would take long to try, used row by row.
    fn is_large_and_by_row(&self, id: usize, op: &dyn Any, kinds: &[Kind]) -> bool {
        let inputs = &self.graph.node(id).inputs;
        let rows = match op.downcast_ref::<Matmul>() {
            // A row of the first must not be of several tokens.
            Some(m) if !m.batch && !m.transpose_a && !m.column_sums && self.has_whole_rows(inputs[0]) => 0,
            None if op.is::<Embedding>() => 1,
            _ => return false,
        };
        (0..).zip(kinds).all(|(i, kind)| *kind == if i == rows { Kind::Rows } else { Kind::Fixed })
    }

    /// Whether no row along the last dimension is of several tokens.
    fn has_whole_rows(&self, value: Value) -> bool {
        self.graph.ty(value).shape.rows().is_multiple_of(self.count())
    }

    /// Number of rows: all tokens of all sequences.
    fn count(&self) -> usize {
        self.pieces[0] * self.pieces[1]
    }

    /// The kinds of a node's outputs, from what changes in them. Goes back to inputs that are rows in order.
    fn tried(&self, id: usize) -> Result<Vec<Kind>> {
        let outputs = self.graph.node(id).outputs.len();
        let nodes = self.before(id, |v| self.kinds[&v] == Kind::Mixed || self.is_computed_of_no_token(v));
        let inputs = nodes.iter().flat_map(|&id| &self.graph.node(id).inputs);
        let leaves: BTreeSet<Value> = inputs.copied().filter(|v| !nodes.contains(&v.node())).collect();
        if leaves.iter().any(|v| self.kinds[v] == Kind::Cache) {
            return Ok(vec![Kind::Mixed; outputs]);
        }
        let mut kinds = vec![Kind::Rows; outputs];
        // Numbers of one sign reach what a root or a logarithm takes, of both what a rectifier does.
        for least in [0.25, -1.75] {
            let run = |change: Change| {
                let leaf = |&v: &Value| (v, self.leaf(v, least, change));
                self.evaluate(&nodes, leaves.iter().map(leaf).collect())
            };
            let [base, touched, moved] = [run(Change::None)?, run(Change::OneRow)?, run(Change::Move)?];
            for (output, kind) in kinds.iter_mut().enumerate() {
                if !self.is_by_row([&base[output], &touched[output], &moved[output]]) {
                    *kind = Kind::Mixed;
                }
            }
        }
        Ok(kinds)
    }

    /// A node, and those before it that it depends on by such values.
    fn before(&self, id: usize, by: impl Fn(Value) -> bool) -> BTreeSet<usize> {
        let (mut nodes, mut stack) = (BTreeSet::from([id]), vec![id]);
        while let Some(id) = stack.pop() {
            let inputs = self.graph.node(id).inputs.iter().filter(|v| by(**v));
            stack.extend(inputs.map(|v| v.node()).filter(|id| nodes.insert(*id)));
        }
        nodes
    }

    /// Whether this is computed from parameters, such as a gate that is repeated for all tokens. Random numbers would
    /// not be the same for all.
    fn is_computed_of_no_token(&self, value: Value) -> bool {
        self.kinds[&value] == Kind::Fixed && matches!(self.graph.node(value.node()).source, Source::Op(_))
    }

    /// Random contents of a value, which depend on its node alone, with a change of its rows.
    fn leaf(&self, value: Value, least: f64, change: Change) -> Array {
        let ty = self.graph.ty(value);
        let numbers = |seed: u64| {
            let mut rng = Rng::new(&[seed, value.node() as u64, value.output() as u64]);
            let mut number = || match ty.dtype {
                DType::F32 | DType::F16 => least + 2.0 * rng.uniform(),
                _ => rng.below(4) as f64,
            };
            (0..ty.len()).map(|_| number()).collect::<Vec<f64>>()
        };
        let mut data = numbers(0);
        if self.kinds[&value] == Kind::Rows {
            let width = data.len() / self.count();
            match change {
                Change::None => {}
                Change::OneRow => data[..width].copy_from_slice(&numbers(1)[..width]),
                Change::Move => {
                    let before = data.clone();
                    (0..self.count()).for_each(|row| {
                        data[self.moved(row) * width..][..width].copy_from_slice(&before[row * width..][..width]);
                    });
                }
            }
        }
        Array::new(ty.shape.clone(), data)
    }

    /// Where a row goes: to the next token of the next sequence.
    fn moved(&self, row: usize) -> usize {
        let [batch, time] = self.pieces;
        (row / time + 1) % batch * time + (row % time + 1) % time
    }

    /// The outputs of the last of these nodes, from these values.
    fn evaluate(&self, nodes: &BTreeSet<usize>, mut values: BTreeMap<Value, Array>) -> Result<Vec<Array>> {
        let mut outputs = vec![];
        for &id in nodes {
            let node = self.graph.node(id);
            let Source::Op(op) = &node.source else { continue };
            let inputs: Vec<&Array> = node.inputs.iter().filter_map(|v| values.get(v)).collect();
            outputs = op.reference(&inputs, &node.outputs);
            let given: Vec<_> = outputs.iter().map(|array| &array.shape).collect();
            if given != node.outputs.iter().map(|ty| &ty.shape).collect::<Vec<_>>() {
                let message =
                    format!("`{}` ({}): its reference gives other shapes than its `infer`", node.name, op.name());
                return Err(Error::Graph(message));
            }
            values.extend((0..).zip(&outputs).map(|(i, array)| (self.graph.value(id, i), array.clone())));
        }
        Ok(outputs)
    }

    /// Whether only the first row differs after a change of the first row, and rows move with those of the input.
    fn is_by_row(&self, [base, touched, moved]: [&Array; 3]) -> bool {
        let n = self.count();
        if !base.data.len().is_multiple_of(n) {
            return false;
        }
        let width = base.data.len() / n;
        let row = |array: &Array, i: usize| array.data[i * width..(i + 1) * width].to_vec();
        let same = |a: Vec<f64>, b: Vec<f64>| {
            let close = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-9 * (1.0 + a.abs());
            a.iter().zip(&b).all(|pair| close(pair) || pair.0.is_nan() && pair.1.is_nan())
        };
        (1..n).all(|i| same(row(base, i), row(touched, i)))
            && (0..n).all(|i| same(row(base, i), row(moved, self.moved(i))))
    }

    /// An error that names the first node to mix tokens, unless a value is rows of tokens.
    fn expect_rows(&self, value: Value) -> Result<()> {
        if self.kinds[&value] == Kind::Rows {
            return Ok(());
        }
        let first = self.before(value.node(), |v| self.kinds[&v] == Kind::Mixed).first().copied();
        let node = self.graph.node(first.unwrap_or(value.node()));
        let what = match &node.source {
            Source::Op(op) => op.name(),
            _ => "not computed from the tokens",
        };
        let why = "The row of a token must depend on that token alone, wherever the row is";
        Err(not_decodable(&node.name, what, why))
    }
}

fn not_decodable(node: &str, what: &str, why: &str) -> Error {
    Error::Graph(format!(
        "`{node}` ({what}): a block with this cannot be decoded with a cache. {why}; only what `Builder::attend` is \
         given is there of earlier tokens"
    ))
}

/// A change of the rows of a value.
#[derive(Clone, Copy)]
enum Change {
    None,
    OneRow,
    Move,
}
