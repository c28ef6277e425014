//! Recomputation: what backward reads again is computed a second time rather than kept.
//!
//! Forward leaves many tensors to backward, and those take most of the memory that training has beside the parameters.
//! Each can be made again, from others that are kept or made again themselves: the result of a norm from the normalised
//! rows, an activation from its argument, that from a product. Its second maker comes right before its first late
//! reader, and its first buffer is free in between (Chen et al. 2016, <https://arxiv.org/abs/1604.06174>).
//!
//! A second maker runs the kernel of the first on the same inputs, or one that [`Op::recomputed`] promises to give the
//! same bits. So nothing changes but memory and time. That holds for what is stored in f16, too: both read their inputs
//! as they are stored, and a norm that keeps `xhat` in f16 makes `y` of what it has stored.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::uses::Uses;
use crate::graph::{Kept, Node, Op, Source, Value, infer};
use crate::profile::AdapterClass;
use crate::tensor::TensorType;

/// Tensors of fewer bytes are kept: a dispatch costs more than they are worth.
const MIN_BYTES: usize = 64 << 10;

/// Ops between two readers of a value from which on it is not worth keeping. Those within backward are nearer.
const FAR: usize = 6;

/// Ops at most that make a value again, counting those that make what it is made from.
const MAX_OPS: usize = 6;

/// What moving a byte costs in floating-point operations of a product: 3 to 20, by the adapter.
const PER_BYTE: f64 = 6.0;

/// What a dispatch costs on a GPU beside its work, in floating-point operations: some 2 us.
const PER_DISPATCH: f64 = 2e7;

/// The share of a step that may go into what is computed twice for no other reason than that it is cheap.
const CHEAP: f64 = 0.01;

/// What a plan computes twice rather than keep: see [`Plan::recomputing`](crate::Plan::recomputing).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    Nothing,
    /// What costs next to nothing: the results of norms and activations, the cheapest first, as far as they take up to
    /// a hundredth of the step.
    #[default]
    Cheap,
    /// As much as it takes for the plan's own buffers, uniforms included, to have no more than this many bytes: after
    /// what is cheap whatever saves the most bytes for its time, up to products and attention. The plan is larger if
    /// all of that does not do.
    UpTo(usize),
}

/// What a plan computes twice, and what that costs. Printed, it says so in a line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recomputed {
    /// Names of the nodes that run twice, in order. Their second runs have the same names with `.again`.
    pub nodes: Vec<String>,
    /// Bytes of results that are not kept from forward to backward.
    pub bytes: u64,
    /// Floating-point operations that are done a second time.
    pub flops: u64,
    /// How many times as long a step takes by estimate, such as 1.25.
    pub slowdown: f64,
}

impl fmt::Display for Recomputed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [mb, mflop] = [self.bytes, self.flops].map(|n| n as f64 / 1e6);
        let factor = self.slowdown.max(1.0);
        write!(f, "{} nodes are computed twice: {mb:.1} MB that are not kept", self.nodes.len())?;
        write!(f, " for {mflop:.1} MFLOP, {factor:.3} times the step by estimate")
    }
}

/// A node to run twice.
#[derive(Clone, Debug)]
struct Again {
    of: usize,
    node: Node,
    /// Which of the node's outputs each of its own is.
    outputs: Vec<usize>,
}

/// A value, or several of one node, that can be computed twice, with all nodes that this takes.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    again: Vec<Again>,
    bytes: u64,
    cost: f64,
    is_cheap: bool,
}

/// What can be computed twice, in the order in which to do so.
pub(super) struct Candidates {
    all: Vec<Candidate>,
    /// How many of them, counted from the first, cost next to nothing.
    pub cheap: usize,
    step: f64,
}

/// Nodes of which some run twice, and where each node went.
pub(super) struct Rewritten {
    pub nodes: Vec<Node>,
    pub place: Vec<usize>,
    pub recomputed: Recomputed,
}

impl Candidates {
    /// What can be computed twice in `nodes`, of which `needed` are, in order. `keep` is read after the step.
    pub fn of(nodes: &[Node], needed: &[usize], keep: &[Value], class: AdapterClass) -> Self {
        let search = Search::new(nodes, needed, keep, class);
        let mut all: Vec<Candidate> = needed.iter().flat_map(|&id| search.candidates(id)).collect();
        // The cheap ones first; then whatever saves the most for its time. Of equals those of early layers, which are
        // made again when most else has been freed.
        let per_byte = |c: &Candidate| c.cost / c.bytes.max(1) as f64;
        all.sort_by(|a, b| b.is_cheap.cmp(&a.is_cheap).then(per_byte(a).total_cmp(&per_byte(b))));
        let step: f64 = needed.iter().filter_map(|&id| search.cost(&nodes[id])).sum();
        let mut spent = 0.0;
        let affordable = |c: &&Candidate| {
            spent += c.cost;
            c.is_cheap && spent <= CHEAP * step
        };
        let cheap = all.iter().take_while(affordable).count();
        Candidates { all, cheap, step }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The nodes with the first `n` of these computed twice.
    pub fn insert(&self, n: usize, nodes: &[Node], needed: &[usize], keep: &[Value], class: AdapterClass) -> Rewritten {
        let search = Search::new(nodes, needed, keep, class);
        let chosen = &self.all[..n];
        let mut again: BTreeMap<(usize, Vec<usize>), &Again> = BTreeMap::new();
        for one in chosen.iter().flat_map(|c| &c.again) {
            again.insert((one.of, one.outputs.clone()), one);
        }
        let places = search.places(again.into_values().collect());
        let cost: f64 = places.iter().filter_map(|(_, one)| search.cost(&one.node)).sum();
        let flops = places.iter().map(|(_, one)| search.flops(&one.node)).sum();
        let names = places.iter().map(|(_, one)| nodes[one.of].name.clone()).collect();
        let recomputed = Recomputed {
            nodes: names,
            bytes: chosen.iter().map(|c| c.bytes).sum(),
            flops,
            slowdown: 1.0 + cost / self.step.max(1.0),
        };
        let (nodes, place) = rewritten(nodes, &places);
        Rewritten { nodes, place, recomputed }
    }
}

/// Puts second makers before the nodes of these ids, and lets all from there on read them.
fn rewritten(nodes: &[Node], places: &[(usize, &Again)]) -> (Vec<Node>, Vec<usize>) {
    let mut before: HashMap<usize, Vec<&Again>> = HashMap::new();
    places.iter().for_each(|&(id, one)| before.entry(id).or_default().push(one));
    // The nodes in their new order, each with its old place or that of the node that it goes before.
    let mut ordered: Vec<(usize, Node)> = vec![];
    let mut place = vec![];
    let mut second: HashMap<Value, (usize, Value)> = HashMap::new();
    for (id, node) in nodes.iter().enumerate() {
        for one in before.get(&id).into_iter().flatten() {
            for (o, &output) in one.outputs.iter().enumerate() {
                second.insert(Value::local(one.of, output), (id, Value::local(ordered.len(), o)));
            }
            ordered.push((id, one.node.clone()));
        }
        place.push(ordered.len());
        ordered.push((id, node.clone()));
    }
    for (at, node) in &mut ordered {
        for v in &mut node.inputs {
            *v = match second.get(v) {
                Some(&(from, second)) if *at >= from => second,
                _ => Value::local(place[v.node()], v.output()),
            };
        }
    }
    (ordered.into_iter().map(|(_, node)| node).collect(), place)
}

struct Search<'a> {
    nodes: &'a [Node],
    /// The needed nodes that read each value, in order.
    uses: Uses,
    /// Needed nodes before each node.
    rank: Vec<usize>,
    class: AdapterClass,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a [Node], needed: &[usize], keep: &[Value], class: AdapterClass) -> Self {
        let mut uses = Uses::new();
        let mut rank = vec![0; nodes.len()];
        for (i, &id) in needed.iter().enumerate() {
            rank[id] = i;
            nodes[id].inputs.iter().for_each(|&v| uses.entry(v).or_default().push(id));
        }
        // What is read after the step has to be kept.
        keep.iter().for_each(|v| drop(uses.remove(v)));
        Search { nodes, uses, rank, class }
    }

    /// What a node costs, in floating-point operations. `None` without an op.
    fn cost(&self, node: &Node) -> Option<f64> {
        let (op, inputs) = (node.op()?, self.types(&node.inputs));
        if op.is_view() {
            return Some(0.0);
        }
        let dispatch = if self.class == AdapterClass::Gpu { PER_DISPATCH } else { 0.0 };
        let [flops, bytes] = [op.flops(&inputs, &node.outputs), op.bytes(&inputs, &node.outputs)].map(|n| n as f64);
        Some(flops + PER_BYTE * bytes + dispatch)
    }

    fn flops(&self, node: &Node) -> u64 {
        node.op().map_or(0, |op| op.flops(&self.types(&node.inputs), &node.outputs))
    }

    fn types(&self, values: &[Value]) -> Vec<TensorType> {
        values.iter().map(|v| self.nodes[v.node()].outputs[v.output()].clone()).collect()
    }

    /// The ways to make outputs of a node again.
    fn candidates(&self, id: usize) -> Vec<Candidate> {
        let Some(op) = self.nodes[id].op().filter(|op| can_repeat(op.as_ref(), self.nodes[id].outputs.len())) else {
            return vec![];
        };
        let n = self.nodes[id].outputs.len();
        let mut found: Vec<Candidate> = (0..n).filter_map(|output| self.of_output(id, output, op.as_ref())).collect();
        if found.is_empty() {
            found.extend(self.of_node(id));
        }
        found
    }

    /// An output, if the op knows a cheap way to make it again from what is kept anyway.
    fn of_output(&self, id: usize, output: usize, op: &dyn Op) -> Option<Candidate> {
        let (maker, value) = (&self.nodes[id], Value::local(id, output));
        let bytes = maker.outputs[output].bytes();
        if bytes < MIN_BYTES {
            return None;
        }
        let recomputed = op.recomputed(output, &self.types(&maker.inputs))?;
        let before = self.first_late_reader(value)?;
        let from = |kept: &Kept| match *kept {
            Kept::Input(i) => maker.inputs.get(i).copied(),
            Kept::Output(o) => (o < maker.outputs.len()).then_some(Value::local(id, o)),
        };
        let inputs: Vec<Value> = recomputed.from.iter().map(from).collect::<Option<_>>()?;
        let outputs = vec![maker.outputs[output].clone()];
        // What the node computes with must be what is kept of it: f16 would have rounded it.
        let is_exact = |kept: &Kept| match *kept {
            Kept::Input(_) => true,
            Kept::Output(o) => maker.outputs[o] == maker.outputs[o].computed(),
        };
        let fits =
            infer(recomputed.op.as_ref(), &self.types(&inputs)).is_ok_and(|types| types[..] == [outputs[0].computed()]);
        let fits = fits && recomputed.from.iter().all(is_exact) && can_repeat(recomputed.op.as_ref(), 1);
        if !fits || !inputs.iter().all(|&v| self.is_kept_until(v, before)) {
            return None;
        }
        let node = Node { name: again(&maker.name), source: Source::Op(recomputed.op), inputs, outputs };
        let cost = self.cost(&node)?;
        let one = Again { of: id, node, outputs: vec![output] };
        Some(Candidate { again: vec![one], bytes: bytes as u64, cost, is_cheap: true })
    }

    /// All outputs that are read late, by running the node again, and those before it whose results are not kept.
    fn of_node(&self, id: usize) -> Option<Candidate> {
        let node = &self.nodes[id];
        let late = |o: &usize| self.first_late_reader(Value::local(id, *o)).is_some();
        let outputs: Vec<usize> = (0..node.outputs.len()).filter(late).collect();
        let bytes: usize = outputs.iter().map(|&o| node.outputs[o].bytes()).sum();
        let before = outputs.iter().filter_map(|&o| self.first_late_reader(Value::local(id, o))).min()?;
        if bytes < MIN_BYTES {
            return None;
        }
        let mut ids = vec![];
        self.repeat(id, before, &mut ids)?;
        let again: Vec<Again> = ids.iter().map(|&id| self.run_again(id)).collect();
        let cost = again.iter().filter_map(|one| self.cost(&one.node)).sum();
        Some(Candidate { again, bytes: bytes as u64, cost, is_cheap: false })
    }

    fn run_again(&self, id: usize) -> Again {
        let node = Node { name: again(&self.nodes[id].name), ..self.nodes[id].clone() };
        Again { of: id, outputs: (0..node.outputs.len()).collect(), node }
    }

    /// Adds a node to those that run again before `before`, after those that it takes. `None` if that cannot be.
    fn repeat(&self, id: usize, before: usize, ids: &mut Vec<usize>) -> Option<()> {
        if ids.contains(&id) {
            return Some(());
        }
        let node = &self.nodes[id];
        let op = node.op()?;
        if ids.len() >= MAX_OPS || !(can_repeat(op.as_ref(), node.outputs.len()) || op.is_view()) {
            return None;
        }
        ids.push(id);
        for &v in &node.inputs {
            if !self.is_kept_until(v, before) {
                self.repeat(v.node(), before, ids)?;
            }
        }
        Some(())
    }

    /// The reader after the longest time without one.
    fn first_late_reader(&self, value: Value) -> Option<usize> {
        let readers = self.uses.get(&value)?;
        // A view shares the value's memory, for readers of its own.
        if readers.iter().any(|&id| self.nodes[id].op().is_some_and(|op| op.is_view())) {
            return None;
        }
        let wait = |pair: &[usize]| self.rank[pair[1]] - self.rank[pair[0]];
        let longest = readers.windows(2).max_by_key(|pair| wait(pair))?;
        (wait(longest) > FAR).then_some(longest[1])
    }

    /// Whether a value is in memory then in any case.
    fn is_kept_until(&self, value: Value, id: usize) -> bool {
        match self.nodes[value.node()].source {
            Source::Op(_) => self.uses.get(&value).is_some_and(|readers| readers.iter().any(|&reader| reader >= id)),
            Source::Param(_) | Source::Input => true,
            Source::State => false,
        }
    }

    /// The node that each second maker goes before: the first late reader of what it makes, among those of the graph
    /// and other second makers. Those that nothing reads are left out. In order.
    fn places<'b>(&self, again: Vec<&'b Again>) -> Vec<(usize, &'b Again)> {
        let mut first: HashMap<Value, usize> = HashMap::new();
        let mut places = vec![];
        for one in again.into_iter().rev() {
            let values = || one.outputs.iter().map(|&o| Value::local(one.of, o));
            let read = values().filter_map(|v| self.first_late_reader(v));
            let again = values().filter_map(|v| first.get(&v).copied());
            let Some(before) = read.chain(again).min() else { continue };
            for &v in &one.node.inputs {
                let earliest = first.entry(v).or_insert(before);
                *earliest = before.min(*earliest);
            }
            places.push((before, one));
        }
        places.reverse();
        places
    }
}

/// Whether running the op twice takes no memory that it would not let go again: it is no view, and writes in place of
/// nothing.
fn can_repeat(op: &dyn Op, outputs: usize) -> bool {
    !op.is_view() && (0..outputs).all(|output| op.starts_as(output).is_none())
}

fn again(name: &str) -> String {
    format!("{name}.again")
}
