//! Random graphs for the tests of the planner and the executor, and an op of an app's own.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use throughline::graph::{Op, Vjp};
use throughline::kernel::{Bind, Kernel, Launch, Program};
use throughline::ops::map::Map;
use throughline::ops::stats::Stats;
use throughline::reference::Array;
use throughline::{Graph, Result, TensorType, Value};

/// `(a, b [, base] [, base]) -> (a + b [+ base], a * b [+ base])`, in one kernel. It is what an app's
/// own op looks like, and has what the ops of the table do not: gradients of several outputs,
/// addends of outputs that are not the first, and of two outputs at once.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// The outputs that the bases are added to, in the order of the bases.
    bases: Vec<usize>,
}

const PAIR: &str = "
const ADD_0: bool = false;
const ADD_1: bool = false;

@group(0) @binding(0) var<uniform> quads: u32;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> sum: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> product: array<vec4<f32>>;

@compute @workgroup_size(8)
fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < quads) {
        let bases = array(select(vec4<f32>(), sum[id.x], ADD_0), select(vec4<f32>(), product[id.x], ADD_1));
        sum[id.x] = a[id.x] + b[id.x] + bases[0];
        product[id.x] = a[id.x] * b[id.x] + bases[1];
    }
}
";

impl Op for Pair {
    fn name(&self) -> &'static str {
        "pair"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs.iter().all(|t| *t == inputs[0]) {
            true => Ok(vec![inputs[0].clone(); 2]),
            false => Err("takes inputs of one type".into()),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        for (i, other) in [(0, cx.inputs[1]), (1, cx.inputs[0])] {
            let mut parts: Vec<Value> = cx.dy[0].into_iter().collect();
            if let Some(dy) = cx.dy[1] {
                parts.push(cx.graph.mul(&format!("{}.{i}", cx.name), dy, other)?);
            }
            let total = match parts[..] {
                [one] => one,
                [one, two] => cx.graph.residual_add(&format!("{}.{i}.sum", cx.name), one, two)?,
                _ => continue,
            };
            cx.set(i, total);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let quads = cx.inputs[0].len().div_ceil(4) as u32;
        let adds = |output| self.bases.contains(&output);
        let kernel = Kernel::new("pair", PAIR, "forward").knob("ADD_0", adds(0)).knob("ADD_1", adds(1));
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(0), Bind::Out(1)];
        Ok(Program::one(kernel, &binds, &[quads], [quads.div_ceil(8), 1, 1]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut outputs = vec![inputs[0].zip(inputs[1], |a, b| a + b), inputs[0].zip(inputs[1], |a, b| a * b)];
        for (&i, base) in self.bases.iter().zip(&inputs[2..]) {
            outputs[i] = outputs[i].zip(base, |y, base| y + base);
        }
        outputs
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * inputs[0].len() as u64
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        Some(2 + self.bases.iter().position(|i| *i == output)?)
    }

    fn with_addend(&self, output: usize) -> Option<Arc<dyn Op>> {
        let bases = [&self.bases[..], &[output]].concat();
        (!self.bases.contains(&output)).then(|| Arc::new(Pair { bases }) as Arc<dyn Op>)
    }
}

/// What a random graph is made from: numbers that choose ops and their inputs. Any numbers make a
/// graph, so proptest can shrink them.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Op and three inputs, by number.
    nodes: Vec<[u8; 4]>,
    /// Value and state.
    stores: Vec<[u8; 2]>,
    kept: Vec<u8>,
    /// Value whose sum is differentiated, and the optimiser step's inputs.
    loss: u8,
    step: Option<[u8; 4]>,
}

pub fn recipes() -> impl Strategy<Value = Recipe> {
    let nodes = prop::collection::vec(any::<[u8; 4]>(), 1..24);
    let stores = prop::collection::vec(any::<[u8; 2]>(), 0..5);
    let kept = prop::collection::vec(any::<u8>(), 1..4);
    let step = prop::option::of(any::<[u8; 4]>());
    (nodes, stores, kept, any::<u8>(), step).prop_map(|(nodes, stores, kept, loss, step)| Recipe {
        nodes,
        stores,
        kept,
        loss,
        step,
    })
}

/// A random graph, what to keep of it, and which of that are gradients.
pub struct Built {
    pub graph: Graph,
    pub kept: Vec<Value>,
}

struct Builder {
    graph: Graph,
    values: Vec<Value>,
    /// Degree as a polynomial of the inputs, kept low so that numbers stay in range.
    degree: HashMap<Value, usize>,
    /// Statistics, which run early, have no gradient, and may have one another as boards.
    looks: Vec<Value>,
}

const MAX_DEGREE: usize = 6;

/// One of the values, more often a late one, so that graphs are deep.
fn late(values: &[Value], number: u8) -> Option<Value> {
    let back = values.len() * usize::from(number).pow(2) / (1 << 16);
    values.iter().rev().nth(back).copied()
}

impl Builder {
    fn new() -> Result<Self> {
        let mut graph = Graph::new();
        let mut values = vec![];
        for (i, shape) in [[4, 8], [8, 8]].into_iter().enumerate() {
            values.push(graph.input(&format!("x{i}"), TensorType::f32(shape))?);
            values.push(graph.param(&format!("w{i}"), shape)?);
            values.push(graph.state(&format!("s{i}"), TensorType::f32(shape))?);
            values.push(graph.state(&format!("t{i}"), TensorType::f32(shape))?);
        }
        values.push(graph.param("gamma", [8])?);
        values.push(graph.param("beta", [8])?);
        values.push(graph.state("total", TensorType::f32([1]))?);
        let degree = values.iter().map(|&v| (v, 1)).collect();
        Ok(Builder { graph, values, degree, looks: vec![] })
    }

    /// One of the values of this shape.
    fn pick(&self, number: u8, shape: &[usize]) -> Option<Value> {
        let fits: Vec<Value> =
            self.values.iter().copied().filter(|v| self.graph.ty(*v).shape.dims() == shape).collect();
        late(&fits, number)
    }

    fn dims(&self, value: Value) -> Vec<usize> {
        self.graph.ty(value).shape.dims().to_vec()
    }

    fn add_node(&mut self, [op, a, b, c]: [u8; 4]) -> Result<()> {
        let shape: &[usize] = if a % 2 == 0 { &[4, 8] } else { &[8, 8] };
        let (Some(x), Some(y)) = (self.pick(a / 2, shape), self.pick(b, shape)) else { return Ok(()) };
        let Some(square) = self.pick(b, &[8, 8]) else { return Ok(()) };
        let Some(row) = self.pick(c, &[8]) else { return Ok(()) };
        let (dx, dy) = (self.degree[&x], self.degree[&y]);
        let wide = 2 * shape[0];
        let g = &mut self.graph;
        if op % 24 == 18 {
            let board = self.looks.last().copied().filter(|_| b % 4 > 0).unwrap_or(square);
            let op = Stats { pair: c % 2 == 0, row: usize::from(c % 8) };
            let inputs = if op.pair { vec![x, y, board] } else { vec![x, board] };
            if dx.max(dy) * 2 <= MAX_DEGREE {
                self.looks.push(g.op1("look", op, &inputs)?);
            }
            return Ok(());
        }
        let (new, degree) = match op % 24 {
            0..3 => (vec![g.residual_add("residual_add", x, y)?], dx.max(dy)),
            3 => (vec![g.add("add", x, y)?], dx.max(dy)),
            4 => (vec![g.add("add_row", x, row)?], dx.max(self.degree[&row])),
            5 => (vec![g.mul("mul", x, y)?], dx + dy),
            6..8 => (vec![g.matmul("matmul", x, square)?], dx + self.degree[&square]),
            8 => (vec![g.matmul_nt("matmul_nt", x, square)?], dx + self.degree[&square]),
            9 => (vec![g.sum("sum", x)?], dx),
            10 => (vec![g.sum_to("sum_to", x, [8])?], dx),
            11 => {
                let beta = g.find("beta").unwrap();
                (vec![g.layernorm("layernorm", x, row, beta, 1e-2)?], self.degree[&row] + 1)
            }
            12 => {
                // There and back: the middle is a value too.
                let flat = g.reshape("reshape", x, [4, wide])?;
                self.degree.insert(flat, dx);
                self.values.push(flat);
                (vec![self.graph.reshape("reshape", flat, shape)?], dx)
            }
            13 => (vec![g.broadcast("broadcast", row, shape)?], self.degree[&row]),
            14 => {
                let parts = [g.slice("slice", x, 1, 0, 4)?, g.slice("slice", y, 1, 4, 4)?];
                (vec![g.concat("concat", &parts, 1)?], dx.max(dy))
            }
            15 => {
                let turned = g.transpose("transpose", x, 0, 1)?;
                (vec![g.transpose("transpose", turned, 0, 1)?], dx)
            }
            19 => (vec![g.tanh("tanh", x)?], 1),
            20 => (vec![g.scale("scale", x, -0.75)?], dx),
            21 => {
                // Shapes that repeat along trailing and leading dimensions.
                let total = g.find("total").unwrap();
                let column = g.slice("column", y, 1, 3, 1)?;
                let part = g.sub("sub", x, column)?;
                let part = g.mul("mul_total", total, part)?;
                (vec![part, g.sub("sub_row", row, part)?], dx.max(dy).max(self.degree[&row]) + 1)
            }
            22 => (vec![g.squared_error("squared_error", x, y)?], 2 * dx.max(dy)),
            23 => {
                let map = Map::new("swap", ["a", "b"], "b - 0.5 * a", |[a, b]| b - 0.5 * a)
                    .gradient("-0.5 * dy", |[_, _], _, dy| -0.5 * dy)
                    .gradient("dy", |[_, _], _, dy| dy);
                (vec![g.map("swap", &map, &[x, y])?], dx.max(dy))
            }
            _ => (g.op("pair", Pair::default(), &[x, y])?, dx + dy),
        };
        if degree <= MAX_DEGREE {
            self.degree.extend(new.iter().map(|v| (*v, degree)));
            self.values.extend(new);
        }
        Ok(())
    }

    /// The loss is the sum of a value; gradients with respect to all that it depends on.
    fn gradients(&mut self, number: u8) -> Result<Vec<Value>> {
        let of = late(&self.values, number).unwrap();
        let loss = self.graph.sum("loss", of)?;
        let needed = needed(&self.graph, loss);
        let wrt: Vec<Value> = self.values.iter().copied().filter(|v| needed.contains(v)).collect();
        let mut grads = self.graph.gradients(loss, &wrt)?;
        grads.push(loss);
        Ok(grads)
    }

    /// An optimiser step, which starts as three of its inputs at once.
    fn step(&mut self, numbers: [u8; 4]) -> Result<Vec<Value>> {
        let arenas = numbers.map(|n| self.pick(n, &[8, 8]).unwrap());
        // Its moment of squares must not be negative, and its settings have to make sense.
        let positive = self.graph.input("positive", TensorType::f32([8, 8]))?;
        let hyper = self.graph.input("hyper", TensorType::f32([8]))?;
        let norm = self.graph.l2_norm("norm", arenas[1])?;
        let new = self.graph.adamw("step", [arenas[0], arenas[1], arenas[2], positive], hyper, norm, 37)?;
        Ok(new.to_vec())
    }
}

/// The values that a value depends on, itself included.
fn needed(graph: &Graph, value: Value) -> Vec<Value> {
    let mut found = vec![value];
    let mut next = 0;
    while next < found.len() {
        for v in &graph.nodes()[found[next].node()].inputs {
            if !found.contains(v) {
                found.push(*v);
            }
        }
        next += 1;
    }
    found
}

impl Recipe {
    pub fn build(&self) -> Result<Built> {
        let mut b = Builder::new()?;
        for &node in &self.nodes {
            b.add_node(node)?;
        }
        let mut kept: Vec<Value> = self.kept.iter().filter_map(|&k| late(&b.values, k)).collect();
        let grads = b.gradients(self.loss)?;
        if let Some(numbers) = self.step {
            let new = b.step(numbers)?;
            b.values.extend(new);
        }
        // Gradients may be stored too.
        b.values.extend(&grads);
        // The first ones are those of parameters and inputs.
        kept.extend(&grads[..grads.len().min(3)]);
        kept.extend(b.looks.last());
        // Made after the values, so that no value can be written there in place.
        let late = b.graph.state("late", TensorType::f32([4, 8]))?;
        let states: Vec<Value> = ["w0", "s0", "t0", "w1", "s1", "t1", "total"]
            .iter()
            .map(|n| b.graph.find(n).unwrap())
            .chain([late])
            .collect();
        for &[value, state] in &self.stores {
            let state = states[state as usize % states.len()];
            let dims = b.dims(state);
            let Some(value) = b.pick(value, &dims) else { continue };
            if b.graph.stores().iter().all(|&(_, s)| s != state) {
                b.graph.store(value, state)?;
            }
        }
        Ok(Built { graph: b.graph, kept })
    }
}
