//! Bad input to the library: each is an `Err` that says what and where. An app's own ops work, and
//! broken ones are errors too.

mod common;

use std::sync::Arc;

use common::{gpu, profiles};
use throughline::decode::sample::Sampling;
use throughline::graph::{Op, Vjp};
use throughline::kernel::{Bind, Kernel, Launch, Program};
use throughline::nn::{Positions, Transformer, TransformerConfig};
use throughline::ops::rope::Scaling;
use throughline::optim::{Arena, ArenaLayout};
use throughline::reference::{self, Array};
use throughline::train::data::{CharTokenizer, Dataset};
use throughline::{
    AdapterClass, Error, ExecOptions, Executable, Graph, Plan, Profile, Result, Tensor, TensorType, Value,
};

/// The message of an error has all these words in it.
fn expect<T>(result: Result<T>, words: &[&str]) {
    match result {
        Ok(_) => panic!("accepted; expected an error with {words:?}"),
        Err(e) => words.iter().for_each(|w| assert!(e.to_string().contains(w), "no {w:?} in: {e}")),
    }
}

#[test]
fn wrong_shapes_name_the_node_and_what_came() {
    let mut g = Graph::new();
    let a = g.input("a", TensorType::f32([2, 3])).unwrap();
    let b = g.input("b", TensorType::f32([4, 5])).unwrap();
    let ids = g.input("ids", TensorType::u32([2])).unwrap();
    let product = g.scoped("h.0", |g| g.matmul("up", a, b));
    expect(product, &["`h.0.up`", "matmul", "3", "4", "f32[2, 3]", "f32[4, 5]"]);
    expect(g.residual_add("sum", a, b), &["`sum`", "[2, 3]", "[4, 5]"]);
    expect(g.layernorm("norm", a, b, b, 1e-5), &["`norm`", "gamma", "[3]"]);
    expect(g.cross_entropy("loss", a, b), &["`loss`", "targets", "u32"]);
    expect(g.mul("mul", a, ids), &["`mul`", "f32"]);
    expect(g.reshape("view", a, [7]), &["`view`", "6", "[7]"]);
    expect(g.input("a", TensorType::f32([1])), &["two", "`a`"]);
    expect(g.input("empty", TensorType::f32([3, 0])), &["`empty`", "at least 1"]);
    expect(g.input("huge", TensorType::f32([1 << 40, 1 << 40])), &["`huge`", "elements"]);
    expect(g.store(a, b), &["store", "`b`"]);
}

#[test]
fn gradients_need_a_scalar_loss_that_depends_on_what_is_asked() {
    let mut g = Graph::new();
    let x = g.param("x", [2, 3]).unwrap();
    let other = g.param("other", [3]).unwrap();
    let loss = g.sum("loss", x).unwrap();
    expect(g.gradients(x, &[x]), &["`x`", "f32[1]", "f32[2, 3]"]);
    expect(g.gradients(loss, &[other]), &["`loss`", "does not depend", "`other`"]);
    let foreign = Graph::new().sum("s", x);
    expect(foreign, &["`s`", "not a value of this graph"]);
    expect(Graph::new().gradients(loss, &[x]), &["not a value of this graph"]);
    expect(Graph::new().store(x, loss), &["not a value of this graph"]);
    // Gradients of gradients: norms have none, and say so.
    let gamma = g.param("gamma", [3]).unwrap();
    let y = g.rmsnorm("norm", x, gamma, 1e-5).unwrap();
    let loss = g.sum("norm_loss", y).unwrap();
    let dx = g.gradients(loss, &[x]).unwrap()[0];
    let second = g.sum("second", dx).unwrap();
    expect(g.gradients(second, &[gamma]), &["norm.grad", "no gradient"]);
}

#[test]
fn host_data_must_fit() {
    let mut g = Graph::new();
    let x = g.input("tokens", TensorType::u32([4])).unwrap();
    let table = g.param("table", [5, 8]).unwrap();
    let y = g.embedding("y", table, x).unwrap();
    let exec = Executable::new_blocking(
        gpu(),
        Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap()),
        ExecOptions::default(),
    )
    .unwrap();
    expect(exec.write(x, &[1u32, 2]), &["`tokens`", "4", "2"]);
    expect(exec.write(x, &[1.0f32; 4]), &["`tokens`", "u32", "f32"]);
    expect(exec.read_blocking::<u32>(y), &["f32", "u32"]);
    let other = Tensor::zeros(gpu(), "small", TensorType::f32([3])).unwrap();
    let options = ExecOptions { bindings: [(table, other)].into(), ..Default::default() };
    let plan = Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap());
    expect(Executable::new_blocking(gpu(), plan, options), &["`table`", "[5, 8]", "[3]"]);
    // Ids out of range read nothing they should not.
    exec.write(table, &[1.0f32; 40]).unwrap();
    exec.write(x, &[0, 4, 5, u32::MAX]).unwrap();
    exec.submit().unwrap();
    let rows = exec.read_blocking::<f32>(y).unwrap();
    assert!(rows[..16].iter().all(|v| *v == 1.0) && rows[16..].iter().all(|v| *v == 0.0));
}

#[test]
fn a_plan_over_the_adapters_limits_names_the_tensor() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([1024, 1024])).unwrap();
    let y = g.scale("wide", x, 2.0).unwrap();
    let profile = Profile { max_binding_bytes: 1 << 20, ..Profile::portable(AdapterClass::Gpu) };
    expect(Plan::new(&g, &[y], &profile), &["limits", "`x`", "4194304", "1048576"]);
    let mut other = Graph::new();
    let config = TransformerConfig::gpt2(50_257, 64, 1, 768, 12);
    let gpt = Transformer::build(&mut other, &config, 1, 64, false).unwrap();
    expect(
        Plan::new(&other, &[gpt.logits], &Profile::portable(AdapterClass::Gpu)),
        &["`embed.weight`", "in one binding"],
    );
    expect(Plan::new(&Graph::new(), &[y], &profile), &["not a value of this graph"]);
    // Floats and ids cannot be bound as one.
    let table = g.param("table", [8, 4]).unwrap();
    let ids = g.input("ids", TensorType::u32([3])).unwrap();
    let rows = g.embedding("rows", table, ids).unwrap();
    let few = Profile { max_storage_buffers: 1, ..profile.clone() };
    expect(Plan::new(&g, &[rows], &few), &["storage buffers of `rows`: 3 needed, 1 allowed", "of one type"]);
    let portable = profile.max_binding_bytes;
    expect(ArenaLayout::of_model(&config, portable), &["`h.0.attn.q.weight`", "[768, 768]", "2359296", "1048576"]);
}

#[test]
fn data_for_an_arena_must_fit() {
    let config = TransformerConfig::gpt2(31, 16, 1, 32, 4);
    let layout = Arc::new(ArenaLayout::of_model(&config, 20 << 10).unwrap());
    let arena = Arena::zeros(gpu(), "parameters", &layout).unwrap();
    let mut data: Vec<Vec<f32>> = layout.tensors.iter().map(|(_, shape)| vec![1.0; shape.len()]).collect();
    arena.write(gpu(), &data).unwrap();
    assert_eq!(arena.read_blocking(gpu()).unwrap(), data);
    let n = data.len().to_string();
    expect(arena.write_tensor(gpu(), data.len(), &[]), &["arena", "below", &n]);
    expect(arena.write_tensor(gpu(), 0, &[1.0]), &["`embed.weight`", "992", "[31, 32]", "1"]);
    data[0].fill(2.0);
    let last = data.last_mut().unwrap();
    last.pop();
    expect(arena.write(gpu(), &data), &[&layout.tensors.last().unwrap().0, "32", "31"]);
    expect(arena.write(gpu(), &data[1..]), &["arena", &n]);
    // Nothing of what did not fit as a whole was written.
    assert_eq!(arena.read_blocking(gpu()).unwrap()[0][0], 1.0);
    if gpu().profile().max_tensor_bytes() < 4 << 30 {
        let layout = ArenaLayout::new(vec![("big".into(), [1 << 20, 1023].into())], u64::MAX).unwrap();
        expect(Arena::zeros(gpu(), "parameters", &Arc::new(layout)), &["part 0 of the parameters", "4290772992"]);
    }
}

#[test]
fn settings_are_checked() {
    let good = TransformerConfig::gpt2(65, 32, 2, 48, 4);
    let bad = |f: fn(&mut TransformerConfig)| {
        let mut c = good.clone();
        f(&mut c);
        c.validate()
    };
    expect(bad(|c| c.vocab_size = 0), &["`vocab_size`", "0"]);
    expect(bad(|c| c.n_heads = 5), &["`n_heads`", "48", "5"]);
    expect(bad(|c| c.n_kv_heads = 3), &["`n_kv_heads`", "4", "3"]);
    expect(bad(|c| c.dropout = 1.0), &["`dropout`", "1"]);
    expect(bad(|c| c.norm_eps = f32::NAN), &["`norm_eps`", "NaN"]);
    expect(
        bad(|c| {
            (c.d_model, c.n_heads, c.positions) =
                (12, 4, Positions::Rope { theta: 1e4, interleaved: false, scaling: Scaling::None })
        }),
        &["RoPE", "3"],
    );
    expect(Transformer::build(&mut Graph::new(), &good, 1, 33, false), &["`context`", "33", "32"]);
    expect(Sampling { temperature: -1.0, ..Default::default() }.validate(), &["`temperature`", "-1"]);
    expect(Sampling { top_p: 0.0, ..Default::default() }.validate(), &["`top_p`", "0"]);
    expect(Dataset::new(vec![], 0.1, 8), &["empty"]);
    expect(Dataset::new(vec![1; 40], 0.1, 8), &["validation text", "9", "4"]);
    expect(CharTokenizer::of("ab").encode("abc"), &["'c'"]);
}

/// An app's own op: y = 2x + 1, with its own WGSL.
#[derive(Debug)]
struct TwicePlusOne {
    wgsl: &'static str,
}

const WGSL: &str = "
@group(0) @binding(0) var<uniform> n: u32;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < n) {
        y[id.x] = 2.0 * x[id.x] + 1.0;
    }
}";

impl Op for TwicePlusOne {
    fn name(&self) -> &'static str {
        "twice_plus_one"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.scale(&cx.name, dy, 2.0)?;
        cx.set(0, dx);
        Ok(())
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let n = cx.outputs[0].len();
        let kernel = Kernel::new("twice_plus_one", self.wgsl, "main");
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &[n as u32], cx.profile.grid(n.div_ceil(64))))
    }
    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].map(|x| 2.0 * x + 1.0)]
    }
    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        2 * outputs[0].len() as u64
    }
}

#[test]
fn an_apps_own_op_runs_forward_and_backward() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([127])).unwrap();
    let y = g.op1("y", TwicePlusOne { wgsl: WGSL }, &[x]).unwrap();
    let squares = g.mul("squares", y, y).unwrap();
    let loss = g.sum("loss", squares).unwrap();
    let dx = g.gradients(loss, &[x]).unwrap()[0];
    let data = throughline::ops::random_array(&[127].into(), 1);
    let want = reference::run(&g, &[(x, data.clone())].into(), &[dx]).unwrap().remove(0);
    for profile in profiles() {
        let plan = Plan::new(&g, &[dx], &profile).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        common::write(&exec, x, &data);
        exec.submit().unwrap();
        let got: Vec<f32> = exec.read_blocking(dx).unwrap();
        assert!(reference::nmse(&got, &want.data) < 1e-12);
    }
}

#[test]
fn broken_ops_are_errors_and_not_panics() {
    let build = |wgsl: &'static str| -> Result<Executable> {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([8]))?;
        let y: Value = g.op1("y", TwicePlusOne { wgsl }, &[x])?;
        Executable::new_blocking(gpu(), Arc::new(Plan::new(&g, &[y], gpu().profile())?), ExecOptions::default())
    };
    assert!(build(WGSL).is_ok());
    expect(build("fn main() { this is not WGSL }"), &["device"]);
    expect(build(&WGSL.replace("fn main", "fn other").leak()[..]), &["device"]);
    let knob = Kernel::new("k", WGSL, "main").knob("TILE", 4u32).wgsl();
    assert!(matches!(knob, Err(Error::Kernel { .. })));
    expect(knob, &["`k`", "TILE"]);
}
