//! The planner: from order and lifetimes to whole buffers and dispatches.
//!
//! Buffers are reused whole, by lifetime: WebGPU rejects a dispatch that both reads and writes one buffer, even in
//! disjoint ranges. An output that *starts as* one of its inputs takes over that input's buffer only if nothing reads
//! the input afterwards; otherwise the plan contains a copy.

use std::any::{Any, TypeId};
use std::collections::{HashMap, HashSet};

use super::bindings::{self, Binding};
use super::recompute::{Candidates, Recompute, Rewritten};
use super::uses::END;
use super::{
    BoundSlot, BufferCopy, BufferSpec, External, Plan, PlannedDispatch, Slot, Step, chains, declared, fuse, order,
    products, together, uses, variants,
};
use crate::error::{Error, Result, joined};
use crate::graph::{Graph, Node, Op, Source, Value, check_outputs, infer};
use crate::kernel::{Bind, Bound, Dispatch, Halves, Launch, Program};
use crate::ops::cast::Cast;
use crate::profile::Profile;
use crate::tensor::{DType, TensorType};

impl Plan {
    /// Plans everything that `outputs` and the stores of the graph need. The outputs can be read after a step.
    ///
    /// Stores take effect at the end of a step: everything is computed from what states held before the step. A state
    /// or parameter that is itself an output is read after the step's stores.
    ///
    /// ```
    /// use throughline::{AdapterClass, Graph, Plan, Profile, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([4, 8]))?;
    /// let w = g.param("w", [8, 8])?;
    /// let branch = g.matmul("branch", x, w)?;
    /// let y = g.residual_add("y", x, branch)?;
    /// let plan = Plan::new(&g, &[y], &Profile::portable(AdapterClass::Gpu))?;
    /// assert_eq!(plan.steps().len(), 1); // the addition happens in the matmul's epilogue
    /// println!("{plan}");
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn new(graph: &Graph, outputs: &[Value], profile: &Profile) -> Result<Plan> {
        Ready::new(graph, outputs, profile, true)?.plan()
    }

    /// The same with less memory: values that are read again much later are computed twice rather than kept, the
    /// cheapest for their bytes first. In training those are what forward leaves to backward. [`Recompute`] says how
    /// many; [`recomputed`](Self::recomputed) which ones, and what that costs.
    ///
    /// All results have the same bits.
    ///
    /// ```
    /// use throughline::plan::Recompute;
    /// use throughline::{AdapterClass, Graph, Plan, Profile, TensorType};
    /// let mut g = Graph::new();
    /// let mut x = g.input("x", TensorType::f32([1024, 64]))?;
    /// let mut params = vec![];
    /// for layer in 0..8 {
    ///     params.push(g.param(&format!("w{layer}"), [64, 64])?);
    ///     let product = g.matmul(&format!("product{layer}"), x, params[layer])?;
    ///     x = g.gelu(&format!("gelu{layer}"), product)?;
    /// }
    /// let loss = g.sum("loss", x)?;
    /// let gradients = g.gradients(loss, &params)?;
    /// let profile = Profile::portable(AdapterClass::Gpu);
    /// let kept = Plan::new(&g, &gradients, &profile)?;
    /// // As much as can be: nothing fits into no bytes.
    /// let again = Plan::recomputing(&g, &gradients, &profile, Recompute::UpTo(0))?;
    /// let [before, after] = [&kept, &again].map(|plan| (plan.buffer_bytes(), plan.flops()));
    /// assert!(after.0 < before.0 && after.1 > before.1, "{before:?} {after:?}");
    /// println!("{}", again.recomputed());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn recomputing(graph: &Graph, outputs: &[Value], profile: &Profile, recompute: Recompute) -> Result<Plan> {
        let ready = Ready::new(graph, outputs, profile, true)?;
        let read: Vec<Value> = ready.keep.iter().chain(ready.stores.iter().map(|(v, _)| v)).copied().collect();
        let needed = reachable(&ready.nodes, &ready.keep, &ready.stores);
        let candidates = match recompute {
            Recompute::Nothing => return ready.plan(),
            _ => Candidates::of(&ready.nodes, &needed, &read, profile.class),
        };
        let plan = |n: usize| ready.recomputing(candidates.insert(n, &ready.nodes, &needed, &read, profile.class));
        match recompute {
            Recompute::UpTo(room) => least(candidates.cheap, candidates.len(), room, plan),
            _ => plan(candidates.cheap),
        }
    }

    /// The same without [chains](crate::ops::map::Chain): each elementwise op has a kernel of its own. To see how long
    /// each takes, or to find out whether a difference comes from fusion.
    pub fn unfused(graph: &Graph, outputs: &[Value], profile: &Profile) -> Result<Plan> {
        Ready::new(graph, outputs, profile, false)?.plan()
    }
}

/// The first plan whose buffers fit into so many bytes, of those with `low` to `high` values computed twice; the last,
/// if none does. More of them take less memory.
fn least(low: usize, high: usize, room: usize, plan: impl Fn(usize) -> Result<Plan>) -> Result<Plan> {
    let fits = |plan: &Plan| plan.allocated_bytes(|_| true) <= room;
    let first = plan(low)?;
    if fits(&first) || low == high {
        return Ok(first);
    }
    let (mut low, mut high, mut best) = (low, high, plan(high)?);
    while fits(&best) && high - low > 1 {
        let middle = low + (high - low) / 2;
        let tried = plan(middle)?;
        match fits(&tried) {
            true => (high, best) = (middle, tried),
            false => low = middle,
        }
    }
    Ok(best)
}

/// A graph's nodes after fusion, in the order in which they run.
struct Ready<'a> {
    graph: &'a Graph,
    outputs: &'a [Value],
    profile: &'a Profile,
    nodes: Vec<Node>,
    /// Where each of the outputs is.
    keep: Vec<Value>,
    stores: Vec<(Value, Value)>,
    /// Where each node of the graph is.
    place: Vec<usize>,
}

impl<'a> Ready<'a> {
    fn new(graph: &'a Graph, outputs: &'a [Value], profile: &'a Profile, fused: bool) -> Result<Self> {
        graph.check_values(outputs, |i| format!("output {i} of the plan"))?;
        let local = |v: Value| Value::local(v.node(), v.output());
        let mut wanted: Vec<Value> = outputs.to_vec();
        wanted.extend(graph.stores().iter().flat_map(|&(value, state)| [value, state]));
        let live: HashSet<usize> = graph.needed(&wanted).into_iter().collect();
        let mut nodes: Vec<Node> = graph.nodes().to_vec();
        for (id, node) in nodes.iter_mut().enumerate() {
            if !live.contains(&id) {
                node.inputs.clear();
            }
            // From here on nodes move: values refer to positions in this list, not in the graph.
            node.inputs.iter_mut().for_each(|v| *v = local(*v));
        }
        let chained = match fused {
            true => {
                let kept: Vec<Value> = outputs.iter().map(|&v| local(v)).collect();
                let stores: Vec<_> = graph.stores().iter().map(|&(v, s)| (local(v), local(s))).collect();
                chains::fuse(&mut nodes, &kept, &stores, profile)
            }
            false => HashMap::new(),
        };
        let (mut nodes, place) = order::ordered(nodes);
        let placed = |v: Value| {
            let v = chained.get(&local(v)).copied().unwrap_or(v);
            Value::local(place[v.node()], v.output())
        };
        wanted.iter_mut().for_each(|v| *v = placed(*v));
        let sums = fuse::fold_column_sums(&mut nodes, &wanted, profile);
        wanted.iter_mut().for_each(|v| *v = uses::now(&sums, *v));
        let added = fuse::fold_additions(&mut nodes, &wanted);
        let joined = match fused {
            true => {
                let read: Vec<Value> = wanted.iter().map(|v| uses::now(&added, *v)).collect();
                products::join(&mut nodes, &read, profile)
            }
            false => HashMap::new(),
        };
        let produced = |v: Value| uses::now(&joined, uses::now(&added, uses::now(&sums, placed(v))));
        let launched = match fused {
            true => {
                let read = outputs.iter().chain(graph.stores().iter().map(|(v, _)| v));
                together::join(&mut nodes, &read.map(|&v| produced(v)).collect::<Vec<_>>(), profile)
            }
            false => HashMap::new(),
        };
        let now = |v: Value| uses::now(&launched, produced(v));
        let stores = graph.stores().iter().map(|&(v, s)| (now(v), placed(s))).collect();
        let keep = outputs.iter().map(|&v| now(v)).collect();
        Ok(Ready { graph, outputs, profile, nodes, keep, stores, place })
    }

    /// The plan in which some nodes run twice.
    fn recomputing(&self, rewritten: Rewritten) -> Result<Plan> {
        let Rewritten { nodes, place: moved, recomputed } = rewritten;
        let now = |v: &Value| Value::local(moved[v.node()], v.output());
        let ready = Ready {
            nodes,
            keep: self.keep.iter().map(now).collect(),
            stores: self.stores.iter().map(|(v, s)| (now(v), now(s))).collect(),
            place: self.place.iter().map(|&p| moved[p]).collect(),
            ..*self
        };
        Ok(Plan { recomputed, ..ready.plan()? })
    }

    fn plan(&self) -> Result<Plan> {
        let Ready { graph, outputs, profile, ref nodes, ref keep, ref stores, ref place } = *self;
        let mut plan = plan(nodes, keep, stores, profile)?;
        plan.kept = outputs.iter().zip(keep).map(|(&v, now)| (v, plan.kept[now].clone())).collect();
        let original: HashMap<usize, usize> = place.iter().enumerate().map(|(old, &new)| (new, old)).collect();
        plan.externals.iter_mut().for_each(|e| e.value = graph.value(original[&e.value.node()], 0));
        plan.names = graph.names();
        Ok(plan)
    }
}

/// Plans nodes that have been through fusion, as far as `keep` and `stores` need them.
pub(crate) fn plan(nodes: &[Node], keep: &[Value], stores: &[(Value, Value)], profile: &Profile) -> Result<Plan> {
    let mut planner = Planner::new(nodes, keep, stores, profile);
    for id in reachable(nodes, keep, stores) {
        planner.place(id)?;
    }
    planner.finish()
}

/// Ids of the nodes that are needed: inputs, parameters and states first, then ops in order.
fn reachable(nodes: &[Node], keep: &[Value], stores: &[(Value, Value)]) -> Vec<usize> {
    let mut live = vec![false; nodes.len()];
    let mut stack: Vec<usize> = keep.iter().chain(stores.iter().flat_map(|(v, s)| [v, s])).map(|v| v.node()).collect();
    while let Some(id) = stack.pop() {
        if !std::mem::replace(&mut live[id], true) {
            stack.extend(nodes[id].inputs.iter().map(|v| v.node()));
        }
    }
    let is_op = |id: &usize| matches!(nodes[*id].source, Source::Op(_));
    let (ops, externals): (Vec<usize>, Vec<usize>) = (0..nodes.len()).filter(|&id| live[id]).partition(is_op);
    externals.into_iter().chain(ops).collect()
}

struct Planner<'a> {
    nodes: &'a [Node],
    profile: &'a Profile,
    keep: &'a [Value],
    stores: &'a [(Value, Value)],
    plan: Plan,
    /// The value whose storage a view shares.
    root: HashMap<Value, Value>,
    /// The last node that reads each root.
    last_use: HashMap<Value, usize>,
    slot: HashMap<Value, Slot>,
    free: Vec<usize>,
}

impl<'a> Planner<'a> {
    fn new(nodes: &'a [Node], keep: &'a [Value], stores: &'a [(Value, Value)], profile: &'a Profile) -> Self {
        let mut planner = Planner {
            nodes,
            profile,
            keep,
            stores,
            plan: Plan { lanes: profile.lanes(), ..Plan::default() },
            root: HashMap::new(),
            last_use: HashMap::new(),
            slot: HashMap::new(),
            free: vec![],
        };
        planner.find_lifetimes();
        planner
    }

    fn find_lifetimes(&mut self) {
        for id in reachable(self.nodes, self.keep, self.stores) {
            let node = &self.nodes[id];
            for v in &node.inputs {
                let root = self.root[v];
                self.last_use.insert(root, id);
            }
            for output in 0..node.outputs.len() {
                let value = Value::local(id, output);
                let root = if is_view(node) { self.root[&node.inputs[0]] } else { value };
                self.root.insert(value, root);
            }
        }
        // A state that is an output is read after the step's stores, so being an output does not keep its old contents
        // alive.
        let computed = |v: &&Value| matches!(self.nodes[v.node()].source, Source::Op(_));
        for v in self.keep.iter().filter(computed).chain(self.stores.iter().map(|(v, _)| v)) {
            self.last_use.insert(self.root[v], END);
        }
    }

    fn place(&mut self, id: usize) -> Result<()> {
        let node = &self.nodes[id];
        let Source::Op(op) = &node.source else { return self.place_external(id) };
        if op.is_view() {
            return Ok(());
        }
        let inputs: Vec<TensorType> =
            node.inputs.iter().map(|v| self.nodes[v.node()].outputs[v.output()].clone()).collect();
        let error = |message| Error::node(&node.name, op.name(), message, &inputs);
        check_types(op.as_ref(), &inputs, &node.outputs).map_err(error)?;
        let slots: Vec<Slot> = node.inputs.iter().map(|v| self.slot[&self.root[v]]).collect();
        let mut cx = Launch { inputs: &inputs, outputs: &node.outputs, profile: self.profile, variant: 0 };
        cx.variant = variants::chosen(&self.profile.choices, op.as_ref(), &cx);
        let program = op.launch(&cx).map_err(error)?;
        declared::check(op.as_ref(), &cx, &program).map_err(error)?;
        let mut started_as = Started::default();
        for output in 0..node.outputs.len() {
            self.place_output(id, output, op.as_ref(), &mut started_as)?;
        }
        let Started { copies, taken, converted } = started_as;
        let scratch: Vec<usize> = (program.scratch.iter().enumerate())
            .map(|(i, ty)| self.allocate(ty, format!("{} scratch {i}", node.name)))
            .collect::<Result<_>>()?;
        let mut dispatches = vec![];
        for (i, output) in converted {
            dispatches.extend(self.convert(id, i, output)?);
        }
        dispatches.extend(self.resolve(id, op.as_ref(), &inputs, &program, &scratch)?);
        let started = |output: &usize| op.starts_as(*output).is_some();
        let started: Vec<Slot> =
            (0..node.outputs.len()).filter(started).map(|o| self.slot[&Value::local(id, o)]).collect();
        self.merge(node, &mut dispatches, &started)?;
        let outputs = (node.outputs.iter().enumerate())
            .map(|(output, ty)| (self.slot[&Value::local(id, output)], ty.clone()))
            .collect();
        self.plan.steps.push(Step {
            name: node.name.clone(),
            op: op.clone(),
            inputs: slots.into_iter().zip(inputs.iter().cloned()).collect(),
            starts_as: (0..node.outputs.len()).map(|output| op.starts_as(output)).collect(),
            copies,
            dispatches,
            outputs,
            flops: op.flops(&inputs, &node.outputs),
            bytes: op.bytes(&inputs, &node.outputs),
        });
        self.release(id, &taken, &scratch);
        Ok(())
    }

    /// The dispatches of node `id`, with slots for bindings.
    fn resolve(
        &self,
        id: usize,
        op: &dyn Op,
        inputs: &[TensorType],
        program: &Program,
        scratch: &[usize],
    ) -> Result<Vec<PlannedDispatch>> {
        let node = &self.nodes[id];
        let input = |i: usize| (self.slot[&self.root[&node.inputs[i]]], &inputs[i]);
        let output = |i: usize| (self.slot[&Value::local(id, i)], &node.outputs[i]);
        let scratch = |i: usize| (Slot::Buffer(scratch[i]), &program.scratch[i]);
        let tensor = |bind: &Bind| match *bind {
            Bind::In(i) => Some((input(i), false)),
            Bind::Out(i) => Some((output(i), true)),
            Bind::OutIn(i) => Some((output(i), false)),
            Bind::Scratch(i) => Some((scratch(i), true)),
            Bind::ScratchIn(i) => Some((scratch(i), false)),
            Bind::Null => None,
        };
        // The concrete type, which no op can lie about.
        let made_by = (op as &dyn Any).type_id();
        let mut dispatches = vec![];
        for d in &program.dispatches {
            let tensors: Vec<_> = d.binds.iter().map(tensor).collect();
            let bound = |((slot, ty), writes): ((Slot, &TensorType), bool)| BoundSlot {
                slot,
                bytes: ty.storage_bytes(),
                writes,
            };
            let binds: Vec<_> = tensors.iter().map(|t| t.map(bound)).collect();
            self.check_dispatch(node, &binds, d.workgroups)?;
            let stored = tensors.iter().map(|t| t.map(|((_, ty), _)| ty.dtype));
            let halves = halves(stored, self.profile);
            let has_halves = !halves.bindings.is_empty();
            let kernel = d.kernel.clone().planned_for(made_by).on(self.profile.class).with_halves(halves);
            if has_halves {
                kernel.as_stored().map_err(|e| Error::node(&node.name, op.name(), e.to_string(), inputs))?;
            }
            let words = d.words.clone();
            let (ranges, copies_in, copies_out) = Default::default();
            let workgroups = d.workgroups;
            dispatches.push(PlannedDispatch { kernel, binds, words, ranges, copies_in, copies_out, workgroups });
        }
        Ok(dispatches)
    }

    /// The dispatches that make output `output` of node `id` start as its input `i`, which is stored as another type.
    fn convert(&self, id: usize, i: usize, output: usize) -> Result<Vec<PlannedDispatch>> {
        let node = &self.nodes[id];
        let (from, value) = (node.inputs[i], Value::local(id, output));
        let (root, ty) = (self.root[&from], node.outputs[output].clone());
        let (inputs, outputs) = ([self.nodes[from.node()].outputs[from.output()].clone()], [ty]);
        let cx = Launch { inputs: &inputs, outputs: &outputs, profile: self.profile, variant: 0 };
        let program = Cast.launch(&cx).map_err(|message| Error::node(&node.name, Cast.name(), message, &inputs))?;
        let slots = [self.slot[&root], self.slot[&value]];
        let dispatch = |d: &Dispatch| {
            let stored = [&inputs[0], &outputs[0]].map(|ty| Some(ty.dtype));
            let kernel = d.kernel.clone().planned_for(TypeId::of::<Cast>()).on(self.profile.class);
            let bound = |i: usize| {
                let bytes = [&inputs[0], &outputs[0]][i].storage_bytes();
                Some(BoundSlot { slot: slots[i], bytes, writes: i == 1 })
            };
            PlannedDispatch {
                kernel: kernel.with_halves(halves(stored.into_iter(), self.profile)),
                binds: [0, 1].map(bound).to_vec(),
                words: d.words.clone(),
                ranges: vec![],
                copies_in: vec![],
                copies_out: vec![],
                workgroups: d.workgroups,
            }
        };
        Ok(program.dispatches.iter().map(dispatch).collect())
    }

    /// Merges bindings of dispatches that have more than the device allows.
    fn merge(&mut self, node: &Node, dispatches: &mut [PlannedDispatch], started: &[Slot]) -> Result<()> {
        // Slots with contents that a kernel may rely on: at first, those that outputs start as.
        let mut full: HashSet<Slot> = started.iter().copied().collect();
        for d in dispatches {
            let max = self.profile.max_storage_buffers as usize;
            let writes: Vec<Slot> = d.binds.iter().flatten().filter(|b| b.writes).map(|b| b.slot).collect();
            if d.binds.len() > max {
                self.merge_bindings(node, d, |slot| full.contains(&slot))?;
            }
            full.extend(writes);
        }
        Ok(())
    }

    fn merge_bindings(&mut self, node: &Node, d: &mut PlannedDispatch, full: impl Fn(Slot) -> bool) -> Result<()> {
        let max = self.profile.max_storage_buffers;
        let reads = |b: BoundSlot| !b.writes || full(b.slot);
        let cost = |b: BoundSlot| b.bytes * (usize::from(reads(b)) + usize::from(b.writes));
        let binds: Vec<Option<Binding>> =
            d.binds.iter().map(|b| b.map(|b| Binding { bytes: b.bytes, cost: cost(b) })).collect();
        let merging =
            bindings::choose(&d.kernel, &binds, max as usize, self.profile.max_tensor_bytes())?.ok_or_else(|| {
                let advice = "Too few of them are of one type and small enough to be bound as one";
                Error::limit(format!("storage buffers of `{}`", node.name), binds.len() as u64, max.into())
                    .advise(advice)
            })?;
        let mut buffers = vec![];
        let old = std::mem::take(&mut d.binds);
        d.binds = vec![None; merging.count()];
        for (bound, bind) in merging.bound.iter().zip(&old) {
            if let Bound::Alone(n) = bound {
                d.binds[*n as usize - 1] = *bind;
            }
        }
        for group in &merging.groups {
            let buffer = self.allocate(&TensorType::f32([group.bytes / 4]), format!("{} merged", node.name))?;
            let to = Slot::Buffer(buffer);
            let parts = || group.parts.iter().filter_map(|&(i, offset)| Some((old[i]?, offset)));
            for (b, offset) in parts() {
                if reads(b) {
                    d.copies_in.push(BufferCopy { to_offset: offset, ..BufferCopy::whole(b.slot, to, b.bytes) });
                }
                if b.writes {
                    d.copies_out.push(BufferCopy { from_offset: offset, ..BufferCopy::whole(to, b.slot, b.bytes) });
                }
            }
            let writes = parts().any(|(b, _)| b.writes);
            d.binds[group.number as usize - 1] = Some(BoundSlot { slot: to, bytes: group.bytes, writes });
            buffers.push(buffer);
        }
        self.free.extend(buffers); // the next dispatch may reuse them
        d.ranges = merging.words;
        d.kernel.merged = merging.bound;
        // Text that cannot be rewritten is an error now, not only when it is compiled.
        d.kernel.wgsl().map(drop)
    }

    fn place_external(&mut self, id: usize) -> Result<()> {
        let node = &self.nodes[id];
        let value = Value::local(id, 0);
        self.slot.insert(value, Slot::External(self.plan.externals.len()));
        self.plan.externals.push(External {
            name: node.name.clone(),
            value,
            ty: node.outputs[0].clone(),
            source: node.source.clone(),
            written: self.stores.iter().any(|&(_, s)| s == value),
        });
        self.check_size(&node.name, &node.outputs[0])
    }

    fn place_output(&mut self, id: usize, output: usize, op: &dyn Op, started: &mut Started) -> Result<()> {
        let node = &self.nodes[id];
        let value = Value::local(id, output);
        let ty = &node.outputs[output];
        let target = self.target(value);
        let slot = match op.starts_as(output) {
            Some(i) => {
                let root = self.root[&node.inputs[i]];
                let source = self.slot[&root];
                let same = self.nodes[root.node()].outputs[root.output()].dtype == ty.dtype;
                if same && self.may_take_over(id, i, target) && started.taken.insert(source) {
                    if let Slot::Buffer(b) = source {
                        self.plan.buffers[b].values.push(node.name.clone());
                    }
                    source
                } else {
                    let to = Slot::Buffer(self.allocate(ty, node.name.clone())?);
                    match same {
                        true => started.copies.push(BufferCopy::whole(source, to, ty.storage_bytes())),
                        false => started.converted.push((i, output)),
                    }
                    to
                }
            }
            None => match target.filter(|t| self.external_is_free(*t, id)) {
                Some(state) => self.slot[&state],
                None => {
                    let label = label(&node.name, op, output);
                    Slot::Buffer(self.allocate(ty, label)?)
                }
            },
        };
        self.slot.insert(value, slot);
        Ok(())
    }

    /// A state that the value is stored in; if there are several, the others get copies. Kernels may write the padding
    /// after a tensor. The padding of a state may be a gap in an arena, which must stay clean, so a state that is not
    /// whole quads gets an exact copy too.
    fn store_target(&self, value: Value) -> Option<Value> {
        let whole_quads = |state: &Value| self.nodes[state.node()].outputs[0].len().is_multiple_of(4);
        let same = |state: Value| {
            let dtype = |v: Value| self.nodes[v.node()].outputs[v.output()].dtype;
            dtype(state) == dtype(value)
        };
        let stored = self.stores.iter().filter(|&&(v, state)| self.root[&v] == value && same(state));
        stored.map(|&(_, state)| state).find(whole_quads)
    }

    /// The state that the value is stored in, or that its sum with something else is: as gradients of a parameter that
    /// is used twice.
    fn target(&self, value: Value) -> Option<Value> {
        let mut sum = value;
        loop {
            let target = self.store_target(sum);
            if target.is_some() {
                let made = &self.nodes[value.node()];
                let reads_state = |v: &Value| self.is_state(self.root[v]);
                // Both states may be ranges of one buffer.
                let dtype = |v: Value| self.nodes[v.node()].outputs[v.output()].dtype;
                let same = |state: &Value| dtype(*state) == dtype(value);
                return target.filter(same).filter(|_| sum == value || !made.inputs.iter().any(reads_state));
            }
            sum = self.sum_with(sum)?;
        }
    }

    /// The result that starts as the value, if the node that computes it has only that one, is the last to read the
    /// value, and reads nothing besides that may be in a state.
    fn sum_with(&self, value: Value) -> Option<Value> {
        let &id = self.last_use.get(&value).filter(|&&last| last != END)?;
        let node = &self.nodes[id];
        let (Source::Op(op), [_]) = (&node.source, &node.outputs[..]) else { return None };
        let starts = op.starts_as(0)?;
        let passes = |(i, v): (usize, &Value)| {
            let root = self.root[v];
            let unchanged = !matches!(self.nodes[root.node()].source, Source::Op(_)) && !self.is_state(root);
            (i == starts) == (root == value) && (i == starts || unchanged || self.is_never_stored(root))
        };
        node.inputs.iter().enumerate().all(passes).then_some(Value::local(id, 0))
    }

    /// Whether a computed value is the plan's alone: no state receives it, nor what starts as it.
    fn is_never_stored(&self, root: Value) -> bool {
        let is_computed = self.nodes[root.node()].op().is_some();
        let last = self.last_use.get(&root).filter(|_| is_computed);
        let Some(node) = last.and_then(|&last| self.nodes.get(last)) else { return false };
        let begins = |o: usize| node.op().and_then(|op| op.starts_as(o)).and_then(|i| node.inputs.get(i));
        !(0..node.outputs.len()).filter_map(begins).any(|v| self.root[v] == root)
    }

    /// Whether a step may write this where it is stored.
    fn is_state(&self, root: Value) -> bool {
        let stored = |(value, state): &(Value, Value)| *state == root || self.root[value] == root;
        matches!(self.nodes[root.node()].source, Source::State) || self.stores.iter().any(stored)
    }

    /// Whether nothing reads the state from node `id` on, including that node.
    fn external_is_free(&self, state: Value, id: usize) -> bool {
        let unread = self.last_use.get(&state).is_none_or(|&last| last < id);
        unread && !self.stores.iter().any(|(v, _)| *v == state)
    }

    /// Whether node `id` may overwrite its input `i`: it is the last to read it, reads it only there, and the storage
    /// is the plan's own or the state that the result is stored in.
    fn may_take_over(&self, id: usize, i: usize, target: Option<Value>) -> bool {
        let node = &self.nodes[id];
        let root = self.root[&node.inputs[i]];
        let slot = self.slot[&root];
        let reads = node.inputs.iter().filter(|v| self.slot[&self.root[*v]] == slot).count();
        let last = self.last_use.get(&root) == Some(&id);
        let own = match slot {
            // If a buffer's contents must end up in a state, a copy at the end takes them there.
            Slot::Buffer(_) => true,
            Slot::External(_) => target.is_some_and(|state| self.slot[&state] == slot),
        };
        last && own && reads == 1
    }

    fn allocate(&mut self, ty: &TensorType, label: String) -> Result<usize> {
        self.check_size(&label, ty)?;
        let bytes = ty.storage_bytes();
        let size = |&b: &usize| self.plan.buffers[b].bytes;
        // The smallest that fits and wastes at most half; otherwise the largest free one, grown; otherwise a new one.
        let fits = self.free.iter().copied().filter(|b| size(b) >= bytes && size(b) <= 2 * bytes).min_by_key(size);
        let grows = || self.free.iter().copied().filter(|b| size(b) < bytes && 2 * size(b) >= bytes).max_by_key(size);
        let buffer = match fits.or_else(grows) {
            Some(b) => {
                self.free.retain(|&f| f != b);
                b
            }
            None => {
                self.plan.buffers.push(BufferSpec { bytes, values: vec![] });
                self.plan.buffers.len() - 1
            }
        };
        let spec = &mut self.plan.buffers[buffer];
        spec.bytes = spec.bytes.max(bytes);
        spec.values.push(label);
        Ok(buffer)
    }

    /// Frees what no later node reads.
    fn release(&mut self, id: usize, taken: &HashSet<Slot>, scratch: &[usize]) {
        self.free.extend(scratch);
        let node = &self.nodes[id];
        let mut done: Vec<Value> = node.inputs.iter().map(|v| self.root[v]).collect();
        done.retain(|root| self.last_use.get(root) == Some(&id) && !taken.contains(&self.slot[root]));
        let outputs = (0..node.outputs.len()).map(|output| Value::local(id, output));
        done.extend(outputs.filter(|v| !self.last_use.contains_key(v)));
        for root in done {
            if let Slot::Buffer(b) = self.slot[&root]
                && !self.free.contains(&b)
            {
                self.free.push(b);
            }
        }
    }

    fn check_size(&self, name: &str, ty: &TensorType) -> Result<()> {
        let max = self.profile.max_tensor_bytes();
        if ty.storage_bytes() as u64 <= max {
            return Ok(());
        }
        let what = format!("bytes of `{name}`, {ty}, in one binding");
        let advice = "Use a smaller batch, context, vocabulary or width, or open the device with higher limits";
        Err(Error::limit(what, ty.storage_bytes() as u64, max).advise(advice))
    }

    fn check_dispatch(&self, node: &Node, binds: &[Option<BoundSlot>], groups: [u32; 3]) -> Result<()> {
        let (max, most) = (self.profile.max_workgroups, groups.into_iter().max().unwrap_or(0));
        if most > max {
            let what = format!("workgroups of `{}` along one dimension", node.name);
            let advice =
                "`Profile::grid` and `Elements` spread the workgroups of an op of your own over two dimensions";
            return Err(Error::limit(what, most.into(), max.into()).advise(advice));
        }
        if groups.contains(&0) {
            return Err(Error::Graph(format!(
                "`{}` dispatches {groups:?} workgroups, which is none: there must be at least 1 in each dimension",
                node.name
            )));
        }
        for (i, a) in binds.iter().enumerate() {
            for b in binds[i + 1..].iter().flatten() {
                if a.is_some_and(|a| a.slot == b.slot && (a.writes || b.writes)) {
                    return Err(Error::Graph(format!(
                        "`{}` reads and writes {} through two bindings: bind it once, an input that an output starts as \
                         through that output",
                        node.name,
                        self.plan.slot_values(b.slot)
                    )));
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Plan> {
        let mut copies = vec![];
        for &(value, state) in self.stores {
            let (from, to) = (self.slot[&self.root[&value]], self.slot[&state]);
            if from != to {
                let bytes = self.nodes[state.node()].outputs[0].word_bytes();
                copies.push(BufferCopy::whole(from, to, bytes));
            }
        }
        for v in self.keep {
            let ty = self.nodes[v.node()].outputs[v.output()].clone();
            let mut slot = self.slot[&self.root[v]];
            if self.root[v] != *v && copies.iter().any(|c| c.to == slot) {
                // A view of a state that is about to change: it shows what the state held before.
                let to = Slot::Buffer(self.allocate(&ty, self.nodes[v.node()].name.clone())?);
                copies.push(BufferCopy::whole(slot, to, ty.storage_bytes()));
                slot = to;
            }
            self.plan.kept.insert(*v, (slot, ty));
        }
        self.order_copies(copies)?;
        Ok(self.plan)
    }

    /// Orders copies that are meant to happen simultaneously: states that take each other's contents.
    fn order_copies(&mut self, mut pending: Vec<BufferCopy>) -> Result<()> {
        while let Some(&first) = pending.first() {
            let unread = |c: &BufferCopy| pending.iter().all(|other| other.from != c.to);
            if let Some(i) = pending.iter().position(unread) {
                let copy = pending.remove(i);
                self.plan.final_copies.push(copy);
                continue;
            }
            // They form a cycle: save what the first one overwrites.
            let ty = TensorType::f32([first.bytes / 4]);
            let aside = Slot::Buffer(self.allocate(&ty, "put aside for stores".into())?);
            self.plan.final_copies.push(BufferCopy::whole(first.to, aside, first.bytes));
            pending.iter_mut().filter(|c| c.from == first.to).for_each(|c| c.from = aside);
        }
        Ok(())
    }
}

/// How the outputs of a node come to start as inputs.
#[derive(Default)]
struct Started {
    copies: Vec<BufferCopy>,
    /// Slots of inputs that become those of outputs.
    taken: HashSet<Slot>,
    /// Inputs and outputs of different types.
    converted: Vec<(usize, usize)>,
}

/// Which bindings, counted from 1, are stored in f16.
fn halves(stored: impl Iterator<Item = Option<DType>>, profile: &Profile) -> Halves {
    let halves = (1..).zip(stored).filter(|(_, dtype)| *dtype == Some(DType::F16));
    let bindings: Vec<u32> = halves.map(|(n, _)| n).collect();
    // A kernel without any is the same on all devices.
    let in_words = !bindings.is_empty() && profile.f16_in_words();
    Halves { bindings, in_words }
}

/// Checks the types of a node again, which the graph has checked already for the op that the node had then: fusion puts
/// others in, and an app's own op says which (`with_addend`). Unchecked kernels rely on it.
fn check_types(op: &dyn Op, inputs: &[TensorType], outputs: &[TensorType]) -> Result<(), String> {
    let inferred = infer(op, inputs)?;
    let computed: Vec<TensorType> = outputs.iter().map(TensorType::computed).collect();
    match inferred == computed {
        true => check_outputs(op, inputs, outputs),
        false => {
            let [ours, theirs] = [&computed, &inferred].map(|types| joined(types, ", "));
            Err(format!("the graph has {ours} as its outputs, the op {theirs}"))
        }
    }
}

/// What the buffer of an output is called: after its own node, where an op does the work of several.
fn label(node: &str, op: &dyn Op, output: usize) -> String {
    match op.made_by(output).and_then(|part| op.parts().get(part)) {
        Some(part) => part.name.clone(),
        None if output == 0 => node.into(),
        None => format!("{node}:{output}"),
    }
}

fn is_view(node: &Node) -> bool {
    node.op().is_some_and(|op| op.is_view())
}
