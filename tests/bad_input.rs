//! Bad input to the library is an `Err` that says what is wrong, and where. Custom ops work, and broken ones are errors
//! too.

mod common;

use std::sync::Arc;

use common::{gpu, hf_folder, profiles};
use throughline::check::{self, Case};
use throughline::decode::sample::Sampling;
use throughline::decode::{DecodeOptions, Decoder, FrameDecoder, GenerationOptions};
use throughline::graph::{Op, ParamInit, Vjp};
use throughline::kernel::{Bind, Kernel, Launch, Program};
use throughline::model::Model;
use throughline::nn::{Init, Positions, Transformer, TransformerConfig, TransformerOptions};
use throughline::ops::Elements;
use throughline::ops::adamw::AdamWSettings;
use throughline::ops::attention::Attention;
use throughline::ops::muon::{MuonSettings, MuonStep};
use throughline::ops::rope::Scaling;
use throughline::optim::{AdamWConfig, Arena, ArenaLayout, Decay, MuonConfig, OptimizerPlan, Schedule};
use throughline::probe::{Edit, Instruments, Measure, Patch, Probe, Tap};
use throughline::reference::{self, Array};
use throughline::sentence::{Pooling, SentenceEncoder};
use throughline::train::data::{Batch, CharTokenizer, Dataset, IGNORE_INDEX};
use throughline::train::{TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::views::{AttentionMap, DropLayer, LogitLens, Subject};
use throughline::{
    AdapterClass, Error, ExecOptions, Executable, Gpu, Graph, Plan, Profile, Result, Tensor, TensorType, Value,
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
    expect(g.input("a", TensorType::f32([1])), &["two", "`a`", "`Graph::scoped`"]);
    let tiny = TransformerConfig::gpt2(31, 16, 1, 32, 4);
    Transformer::build(&mut g, &tiny, 1, 16, false).unwrap();
    expect(Transformer::build(&mut g, &tiny, 1, 16, false), &["named `tokens`", "`Graph::scoped`"]);
    g.scoped("second", |g| Transformer::build(g, &tiny, 1, 16, false)).unwrap();
    expect(g.slice("part", b, 1, 4, 6), &["`part`", "4..10 is out of range", "axis 1 has length 5"]);
    expect(g.slice("none", b, 1, 4, 0), &["`none`", "4..4 is empty"]);
    let wide = g.input("wide", TensorType::f32([1, 3, 2050])).unwrap();
    let op = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
    expect(g.attention("o", wide, wide, wide, op), &["`o`", "heads of 1025 elements", "1024"]);
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
    expect(exec.read_blocking::<u32>(y), &["`y`", "f32", "u32"]);
    let other = Tensor::zeros(gpu(), "small", TensorType::f32([3])).unwrap();
    let options = ExecOptions::bound([(table, other)].into());
    let plan = Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap());
    expect(Executable::new_blocking(gpu(), plan, options), &["`table`", "[5, 8]", "[3]"]);
    // Ids out of range read nothing they should not.
    exec.write(table, &[1.0f32; 40]).unwrap();
    exec.write(x, &[0, 4, 5, u32::MAX]).unwrap();
    exec.submit().unwrap();
    let rows = exec.read_blocking::<f32>(y).unwrap();
    assert!(rows[..16].iter().all(|v| *v == 1.0) && rows[16..].iter().all(|v| *v == 0.0));
}

/// An op whose gradient is a value of whatever graph.
#[derive(Debug)]
struct Stray(Value);

impl Op for Stray {
    fn name(&self) -> &'static str {
        "stray"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        cx.set(0, self.0);
        Ok(())
    }
    fn launch(&self, _: &Launch<'_>) -> Result<Program, String> {
        Err("has no kernel".into())
    }
    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].clone()]
    }
    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }
}

/// The graph of `y = 2x`, `loss = sum(y)`, with `y` stored in `kept`.
fn doubling() -> (Graph, [Value; 4]) {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([4])).unwrap();
    let kept = g.state("kept", TensorType::f32([4])).unwrap();
    let y = g.scale("y", x, 2.0).unwrap();
    let loss = g.sum("loss", y).unwrap();
    g.store(y, kept).unwrap();
    (g, [x, kept, y, loss])
}

/// Of a graph with the same nodes even, as that for evaluation beside that for training.
#[test]
fn a_value_of_another_graph_is_an_error_that_names_both() {
    let ((mut g, [x, kept, y, loss]), (other, [foreign, other_kept, _, other_loss])) = (doubling(), doubling());
    let theirs = format!("not a value of this graph: it is node 0 of graph {}", other.id());
    let ours = format!("this is graph {}, `x` to `loss`", g.id());
    let both = [theirs.as_str(), &ours];
    expect(g.add("sum", x, foreign), &[&both[..], &["`sum` (add): input 1 is", "inputs: f32[4], ?"]].concat());
    expect(g.matmul("product", x, foreign), &[&both[..], &["`product`"]].concat());
    expect(g.store(foreign, kept), &[&both[..], &["store: the value"]].concat());
    expect(g.store(y, other_kept), &["store: the state", "node 1 of graph"]);
    expect(g.gradients(loss, &[x, foreign]), &[&both[..], &["gradients: wrt[1]"]].concat());
    expect(g.gradients(other_loss, &[x]), &["gradients: the loss", "node 3 of graph"]);
    expect(Plan::new(&g, &[y, foreign], gpu().profile()), &[&both[..], &["output 1 of the plan"]].concat());
    expect(ArenaLayout::of(&g, &[foreign], u64::MAX), &[&both[..], &["parameter 0 of the layout"]].concat());
    let data = Array::zeros([4]);
    expect(reference::run(&g, &[(foreign, data.clone())].into(), &[y]), &[&both[..], &["`given`"]].concat());
    expect(reference::run(&g, &[(x, data)].into(), &[y, foreign]), &[&both[..], &["wanted[1]"]].concat());
    let probe = Probe::new("p", Tap::gradient("x"), Measure::Rms);
    let instruments = Instruments::new(&mut g, &[probe], &[(x, foreign)].into());
    expect(instruments, &[&both[..], &["probe `p`: the gradient of `x`"]].concat());
    let stray = g.op1("stray", Stray(foreign), &[x]).unwrap();
    let total = g.sum("total", stray).unwrap();
    expect(g.gradients(total, &[x]), &["`stray`: the gradient that op stray gave is not a value of this graph"]);

    // Plans and executables know their graph too.
    let plan = Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap());
    assert!(plan.slot(foreign).is_none());
    let exec = Executable::new_blocking(gpu(), plan.clone(), ExecOptions::default()).unwrap();
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    let plans = [format!("node 0 of graph {} is not a value of this plan", other.id()), format!("of graph {}", g.id())];
    let both = [plans[0].as_str(), &plans[1]];
    expect(exec.tensor(foreign), &both);
    expect(exec.write(foreign, &[0.0f32; 4]), &both);
    expect(exec.record_write(&mut encoder, foreign, &[0.0f32; 4]), &both);
    expect(exec.read_blocking::<f32>(foreign), &both);
    let bindings = || [(foreign, Tensor::zeros(gpu(), "t", TensorType::f32([4])).unwrap())].into();
    expect(exec.with_bindings(&bindings()), &both);
    let options = ExecOptions::bound(bindings());
    expect(Executable::new_blocking(gpu(), plan, options), &both);

    // What cannot return an `Err` panics, as it says.
    assert!(g.contains(x) && !g.contains(foreign));
    let panic = |f: &dyn Fn()| {
        let payload = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_err();
        let message = payload.downcast::<String>().unwrap();
        assert!(message.contains(&format!("node 0 of graph {}", other.id())), "{message}");
    };
    panic(&|| _ = g.ty(foreign));
    panic(&|| _ = g.name(foreign));
    let patched = other.patched(&[Patch::new("y", Edit::Scale(3.0))]).unwrap();
    assert_eq!(patched.graph.name(patched.unpatched(foreign)), "x");
    let stranger = other.patched(&[]).unwrap();
    panic(&|| _ = stranger.graph.patched(&[]).unwrap().value(foreign));
}

#[test]
fn a_clone_of_a_graph_takes_the_values_from_before_it() {
    let (mut g, [x, ..]) = doubling();
    let mut clone = g.clone();
    let [ours, theirs] = [&mut g, &mut clone].map(|g| g.scale("after", x, 3.0).unwrap());
    assert_eq!((ours.node(), g.id() == clone.id(), ours == theirs), (theirs.node(), false, false));
    assert!(g.contains(ours) && !g.contains(theirs) && clone.contains(theirs) && !clone.contains(ours));
    let both = ["`sum`", "input 1", &format!("{ours:?}"), &format!("this is graph {}", clone.id())].map(String::from);
    expect(clone.add("sum", x, ours), &both.each_ref().map(|s| s.as_str()));
    assert!(clone.clone().contains(theirs) && clone.clone().contains(x));
    // So do plans and executables of the one and the other.
    clone.state("more", TensorType::f32([1])).unwrap();
    gpu().plan(&clone, &[x, theirs]).unwrap();
    expect(gpu().plan(&clone, &[x, ours]), &["output 1 of the plan", &format!("{ours:?}"), "`x` to `more`"]);
    let exec = |g: &Graph, output| {
        let plan = Arc::new(gpu().plan(g, &[output]).unwrap());
        Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap()
    };
    let [ours_exec, theirs_exec] = [exec(&g, ours), exec(&clone, theirs)];
    theirs_exec.write(x, &[1.0f32; 4]).unwrap();
    let of = format!("which is of graph {}: use the values of that graph", clone.id());
    expect(theirs_exec.read_blocking::<f32>(ours), &[&format!("{ours:?} is not a value of this plan"), &of]);
    expect(ours_exec.tensor(theirs), &["not a value of this plan"]);
    assert_eq!(size_of::<Value>(), 12);
}

#[test]
fn what_a_plan_does_not_have_is_neither_bound_nor_read() {
    let (mut g, [x, kept, y, loss]) = doubling();
    let unused = g.param("unused", [4]).unwrap();
    let plan = Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap());
    let exec = Executable::new_blocking(gpu(), plan.clone(), ExecOptions::default()).unwrap();
    let zeros = || Tensor::zeros(gpu(), "t", TensorType::f32([4])).unwrap();
    for (value, name) in [(y, "`y`"), (loss, "`loss`"), (unused, "`unused`")] {
        let words = [name, "cannot be bound", "An output is bound through `Graph::state` and `Graph::store`"];
        expect(exec.with_bindings(&[(value, zeros())].into()), &words);
        let options = ExecOptions::bound([(x, zeros()), (value, zeros())].into());
        expect(Executable::new_blocking(gpu(), plan.clone(), options), &words);
    }
    for (value, name) in [(loss, "`loss`"), (unused, "`unused`")] {
        expect(exec.read_blocking::<f32>(value), &[name, "add it to the outputs of `Plan::new`"]);
    }
    let bound = zeros();
    let exec = exec.with_bindings(&[(kept, bound.clone())].into()).unwrap();
    exec.write(x, &[1.0f32; 4]).unwrap();
    exec.submit().unwrap();
    assert_eq!(bound.read_blocking::<f32>(gpu()).unwrap(), [2.0; 4]);
}

#[test]
fn slices_and_profiles_of_another_step_are_errors() {
    let exec = |outputs: fn([Value; 4]) -> Vec<Value>| {
        let (mut g, [x, kept, y, loss]) = doubling();
        let more = g.scale("more", loss, 3.0).unwrap();
        let plan = Arc::new(gpu().plan(&g, &outputs([x, y, loss, more])).unwrap());
        let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
        exec.write(x, &[1.0f32; 4]).unwrap();
        (exec, kept)
    };
    let [(long, _), (short, kept)] = [exec(|values| values.to_vec()), exec(|[x, ..]| vec![x])];
    let profile = long.profile_blocking().unwrap();
    let slices = long.slices(&profile, std::time::Duration::ZERO).unwrap();
    let last = slices.last().unwrap();
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    long.record_slice(&mut encoder, last).unwrap();
    expect(
        short.record_slice(&mut encoder, last),
        &["`slice`", "a part of the 1 commands of this executable", "another"],
    );
    expect(short.slices(&profile, std::time::Duration::ZERO), &["`profile`", "one of this executable", "1 commands"]);
    // Two states in one buffer, one of which a step writes.
    let buffer = Tensor::zeros(gpu(), "t", TensorType::f32([128])).unwrap();
    let halves = [0, 256].map(|at| Tensor::from_buffer(buffer.buffer().clone(), at, TensorType::f32([4])).unwrap());
    let [a, b] = halves;
    let x = short.plan().externals()[0].value;
    let words = ["`y` would read and write one buffer, that of `x` and `kept`", "buffers of their own"];
    expect(short.with_bindings(&[(x, a), (kept, b)].into()), &words);
}

/// wgpu counts buffers and devices from the start in each instance, so that these look like ours.
#[test]
fn a_tensor_of_another_device_is_an_error() {
    let (g, [x, kept, ..]) = doubling();
    let [mine, other] = [(); 2].map(|()| Gpu::headless_blocking().unwrap());
    let plan = Arc::new(Plan::new(&g, &[], mine.profile()).unwrap());
    let exec = Executable::new_blocking(&mine, plan, ExecOptions::default()).unwrap();
    let zeros = |gpu: &Gpu| Tensor::zeros(gpu, "t", TensorType::f32([4])).unwrap();
    let foreign = zeros(&other);
    for value in [x, kept] {
        let words = [if value == x { "`x`" } else { "`kept`" }, "of another device"];
        expect(exec.with_bindings(&[(value, foreign.clone())].into()), &words);
    }
    expect(foreign.write(&mine, &[0.0f32; 4]), &["another device"]);
    expect(foreign.read_blocking::<f32>(&mine), &["another device"]);
    // Two handles of one device are one device.
    let again = Gpu::from_device(mine.device().clone(), mine.queue().clone());
    exec.with_bindings(&[(kept, zeros(&again))].into()).unwrap();
    assert_eq!(zeros(&again).read_blocking::<f32>(&mine).unwrap(), [0.0; 4]);
    let usages = wgpu::BufferUsages::STORAGE;
    let desc = wgpu::BufferDescriptor { label: None, size: 16, usage: usages, mapped_at_creation: false };
    let buffer = mine.device().create_buffer(&desc);
    expect(Tensor::from_buffer(buffer, 0, TensorType::f32([4])), &["see `Tensor::USAGES`"]);
}

#[test]
fn batches_must_fit() {
    let model = TransformerConfig::gpt2(31, 16, 1, 32, 4);
    let config = TrainConfig { micro_batches: 2, ..TrainConfig::new(model, 2) };
    let mut trainer = Trainer::new_blocking(gpu(), config).unwrap();
    let batch = |tokens, targets| Batch::new(vec![1; tokens], vec![2; targets]);
    let mut step = |batches: &[Batch]| trainer.step(batches).map(drop);
    step(&[batch(32, 32), batch(32, 32)]).unwrap();
    expect(step(&[batch(32, 32)]), &["`batches`", "expected 2", "got 1"]);
    expect(step(&[batch(32, 32), batch(32, 31)]), &["`batches[1].targets`", "32 ids, 2 sequences of 16", "got 31"]);
    expect(step(&[batch(33, 32), batch(32, 32)]), &["`batches[0].tokens`", "32 ids", "got 33"]);
    trainer.evaluate_blocking(&[batch(32, 32)]).unwrap();
    expect(trainer.evaluate_blocking(&[]), &["`batches`", "at least one", "none"]);
    expect(trainer.evaluate_blocking(&[batch(32, 32), batch(32, 0)]), &["`batches[1].targets`", "32 ids", "got 0"]);
}

/// Starts are there if and only if texts share sequences, and no text starts after one of its tokens.
#[test]
fn starts_of_packed_texts_are_checked() {
    let model = TransformerConfig::gpt2(31, 16, 1, 32, 4);
    let plain = TrainConfig { micro_batches: 1, ..TrainConfig::new(model, 2) };
    let mut packing = Trainer::new_blocking(gpu(), TrainConfig { packing: true, ..plain.clone() }).unwrap();
    let with = |starts: Option<Vec<u32>>| [Batch { starts, ..Batch::new(vec![1; 32], vec![2; 32]) }];
    packing.step(&with(Some(vec![0; 32]))).unwrap();
    packing.evaluate_blocking(&with(Some(vec![0; 32]))).unwrap();
    expect(packing.step(&with(None)).map(drop), &["`batches[0].starts`", "`packing` is set", "none"]);
    expect(packing.step(&with(Some(vec![0; 31]))).map(drop), &["`batches[0].starts`", "32 places", "31"]);
    let late = [vec![0; 17], vec![2; 15]].concat();
    expect(packing.evaluate_blocking(&with(Some(late))), &["at most 1", "2 at index 17, sequence 1"]);
    let mut without = Trainer::new_blocking(gpu(), plain).unwrap();
    expect(without.step(&with(Some(vec![0; 32]))).map(drop), &["`batches[0].starts`", "one text each"]);
    let encoder = TransformerConfig { bidirectional: true, ..TransformerConfig::gpt2(31, 16, 1, 32, 4) };
    let options = TransformerOptions { packing: true, ..TransformerOptions::default() };
    let built = Transformer::build_of(&mut Graph::new(), &encoder, [2, 16], &options);
    expect(built, &["`packing`", "see only those before them"]);

    let mut g = Graph::new();
    let q = g.input("q", TensorType::f32([2, 5, 8])).unwrap();
    let k = g.input("k", TensorType::f32([2, 6, 8])).unwrap();
    let first = g.input("first", TensorType::u32([2, 5])).unwrap();
    let one = g.input("one", TensorType::u32([2])).unwrap();
    let op = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
    let full = Attention { causal: false, ..op };
    expect(g.attention_from("y", [q, q, q], first, full), &["`y`", "must be causal"]);
    expect(g.attention_from("y", [q, k, k], first, op), &["`y`", "as many keys as queries, 5, got 6"]);
    expect(g.attention_from("y", [q, q, q], one, op), &["`y`", "u32[2, 5], one for each query"]);
}

/// In whatever way a batch comes in, before anything is recorded.
#[test]
fn ids_past_the_vocabulary_are_errors_that_say_where() {
    let model = TransformerConfig::gpt2(31, 16, 1, 32, 4);
    let config = TrainConfig { micro_batches: 2, ..TrainConfig::new(model, 2) };
    let mut trainer = Trainer::new_blocking(gpu(), config).unwrap();
    let good = Batch::new(vec![1; 32], vec![2; 32]);
    let profile = trainer.profile_blocking(&[good.clone(), good.clone()]).unwrap();
    let slices = trainer.slices(&profile, std::time::Duration::from_secs(1)).unwrap();
    let subject = Subject::of(&trainer);
    let lens = gpu().run_blocking(LogitLens::new(&subject, [2, 16])).unwrap();
    let ablation = gpu().run_blocking(DropLayer::new(&subject, [2, 16])).unwrap();
    let map = gpu().run_blocking(AttentionMap::new(&subject, [2, 16], 0, 0)).unwrap();

    let changed = |f: fn(&mut Batch)| {
        let mut batch = good.clone();
        f(&mut batch);
        batch
    };
    let cases = [
        (changed(|b| b.tokens[5] = 31), "tokens`", "31 at index 5"),
        (changed(|b| b.tokens[31] = IGNORE_INDEX), "tokens`", "4294967295 at index 31"),
        (changed(|b| b.targets[7] = 31), "targets`", "31 at index 7"),
        (changed(|b| b.targets[0] = IGNORE_INDEX - 99), "targets`", "4294967196 at index 0"), // -100 as u32
    ];
    for (bad, field, got) in cases {
        let (batches, step) = ([good.clone(), bad.clone()], trainer.step_count());
        let words = ["`batches[1].", field, "below 31, the size of the vocabulary", got];
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        expect(trainer.step(&batches), &words);
        expect(trainer.record(&mut encoder, &batches), &words);
        expect(trainer.start_sliced(&slices, &batches), &words);
        expect(trainer.profile_blocking(&batches), &words);
        expect(trainer.evaluate_blocking(&batches), &words);
        expect(lens.run_blocking(&bad), &[field, got]);
        expect(ablation.run_blocking(&bad), &[field, got]);
        if field.contains("tokens") {
            expect(map.run_blocking(&bad.tokens), &["`tokens`", got]);
        }
        assert_eq!(trainer.step_count(), step);
    }
    // Nothing to learn from is no 0 / 0, and some is enough.
    let none = changed(|b| b.targets.fill(IGNORE_INDEX));
    let words = ["`targets`", "at least one that counts", "`IGNORE_INDEX` everywhere"];
    expect(trainer.step(&[none.clone(), none.clone()]), &words);
    expect(trainer.evaluate_blocking(std::slice::from_ref(&none)), &words);
    expect(lens.run_blocking(&none), &words);
    let loss = trainer.step(&[none, changed(|b| b.targets[1..].fill(IGNORE_INDEX))]).unwrap();
    assert!(loss.wait_blocking().unwrap().is_finite());
}

#[test]
fn ids_past_the_vocabulary_are_errors_in_decoders_and_encoders() {
    let llama = Model::open(&hf_folder("llama")).unwrap();
    let mut two = Decoder::new_blocking(gpu(), &llama, DecodeOptions { batch: 2, ..DecodeOptions::new(8) }).unwrap();
    let words = ["`tokens of sequence 1`", "ids below 96, the size of the vocabulary", "96 at index 1"];
    let prompts: [&[u32]; 2] = [&[3], &[4, 96, 5]];
    expect(two.feed_batch_blocking(&prompts), &words);
    expect(two.generate_batch_blocking(&prompts, &GenerationOptions::default()), &words);
    assert_eq!(two.lengths(), [0, 0]);
    let mut frames = FrameDecoder::new_blocking(two).unwrap();
    expect(frames.say(1, prompts[1], GenerationOptions::default()), &words);
    let mut one = Decoder::new_blocking(gpu(), &llama, 8).unwrap();
    expect(one.feed_blocking(&[96]), &["`tokens`", "96 at index 0"]);
    expect(one.feed_all_blocking(&[1, 2, u32::MAX]), &["`tokens`", "4294967295 at index 2"]);
    expect(one.generate(&[96], GenerationOptions::default()), &["`tokens`", "96 at index 0"]);

    let bert = Model::open(&hf_folder("bert")).unwrap();
    let mut encoder = SentenceEncoder::new_blocking(gpu(), &bert, Pooling::Mean).unwrap();
    let vocab = bert.config().vocab_size as u32;
    expect(encoder.embed_blocking(&[vec![1], vec![2, vocab]]), &["ids below", &format!("{vocab} at index 1")]);
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
    for eps in [f32::NAN, 0.0, -1e-5, 1e-45, f32::INFINITY] {
        let config = TransformerConfig { norm_eps: eps, ..good.clone() };
        expect(config.validate(), &["`norm_eps`", "at least 1.2e-38", &format!("is {eps}")]);
    }
    expect(bad(|c| c.dropout = f32::NAN), &["`dropout`", "NaN"]);
    expect(bad(|c| c.residual_gate = Some(1e30)), &["`residual_gate`", "from -100 to 100"]);
    expect(bad(|c| c.init = Init::Plain { std: f32::INFINITY }), &["`init`", "inf"]);
    expect(bad(|c| c.n_layers = 1 << 20), &["`n_layers`", "4096", "1048576"]);
    expect(bad(|c| c.token_types = usize::MAX), &["`token_types`", "2^24"]);
    expect(bad(|c| (c.n_heads, c.head_dim) = (1 << 20, Some(1 << 20))), &["`n_heads * head_dim`", "2^24"]);
    for huge in [TransformerConfig::gpt2, TransformerConfig::llama, TransformerConfig::bert] {
        expect(huge(65, 32, 2, usize::MAX, 1).validate(), &["`d_model`"]);
    }
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
    expect(CharTokenizer::of("ab").encode("abc"), &["'c'"]);
}

#[test]
fn datasets_are_checked() {
    let ids: Vec<u32> = (0..100).collect();
    let new = |fraction, context| Dataset::new(ids.clone(), fraction, context);
    for fraction in [10.0, 1.1, -0.1, f64::NAN, f64::INFINITY] {
        expect(new(fraction, 8), &["`val_fraction`", "from 0 to 1", &format!("is {fraction}")]);
    }
    expect(Dataset::new(vec![], 0.1, 8), &["empty"]);
    expect(new(0.0, 8), &["validation text", "at least 9", "got 0"]);
    expect(new(1.0, 8), &["training text", "at least 9", "got 0"]);
    expect(new(0.1, 10), &["validation text", "at least 11", "got 10"]);
    for context in [0, usize::MAX] {
        expect(new(0.1, context), &["`context`", "from 1 to 2^20"]);
    }

    let data = new(0.1, 8).unwrap(); // 90 tokens and 10
    assert_eq!(data.batch(0, 0, 2, 89).unwrap().tokens, [&ids[..89], &ids[..89]].concat());
    expect(data.batch(0, 0, 2, 90), &["training text", "at least 91", "got 90"]);
    expect(data.val_batches(1, 2, 10), &["validation text", "at least 11", "got 10"]);
    assert_eq!(data.val_batches(2, 1, 9).unwrap()[1].targets, ids[91..]);
    for n in [0, usize::MAX] {
        expect(data.batch(0, 0, n, 8), &["`batch`", &n.to_string()]);
        expect(data.batch(0, 0, 2, n), &["`time`", &n.to_string()]);
        expect(data.val_batches(n, 2, 8), &["`batches`", &n.to_string()]);
        expect(data.val_batches(2, n, 8), &["`batch`", &n.to_string()]);
        expect(data.val_batches(2, 2, n), &["`time`", &n.to_string()]);
    }
    let empty = Dataset { train: vec![], val: vec![] };
    expect(empty.batch(0, 0, 1, 1), &["training text", "got 0"]);
    expect(empty.val_batches(1, 1, 1), &["validation text", "got 0"]);
}

/// By the plan of a run, by that of an optimiser, and by what computes the kernels' settings.
#[test]
fn settings_of_optimisers_are_checked() {
    let good = TrainConfig::new(TransformerConfig::gpt2(31, 16, 1, 32, 4), 1);
    let good = TrainConfig { muon: Some(MuonConfig::default()), ..good };
    let profile = Profile::portable(AdapterClass::Gpu);
    let layout = Arc::new(ArenaLayout::new(vec![("w".into(), [64].into())], u64::MAX).unwrap());
    let adamw = |f: fn(&mut AdamWConfig, f64), x: f64, words: &[&str]| {
        let mut adamw = AdamWConfig::default();
        f(&mut adamw, x);
        let config = TrainConfig { adamw, ..good.clone() };
        expect(TrainPlan::new(&config, &TrainOptions::default(), &profile), words);
        expect(OptimizerPlan::new(adamw, &layout, &profile), words);
        let AdamWConfig { beta1, beta2, eps, weight_decay, max_grad_norm } = adamw;
        let [beta1, beta2, eps, weight_decay, max_grad_norm] =
            [beta1, beta2, eps, weight_decay, max_grad_norm].map(|x| x as f32);
        let settings = AdamWSettings { lr: 1e-3, beta1, beta2, eps, weight_decay, max_grad_norm };
        // What only the f64 shows.
        if x as f32 != 0.0 || x == 0.0 || words[0] == "`eps`" {
            expect(settings.at_step(1), &words[..1]);
        }
        // Checkpoints bring their settings along.
        if x.is_finite() {
            let read: TrainConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
            expect(Trainer::new_blocking(gpu(), read), words);
        }
    };
    for x in [1.0, 1.5, -0.1, 1.0 - 1e-9, f64::NAN, f64::INFINITY] {
        adamw(|c, x| c.beta1 = x, x, &["`beta1`", "at least 0 and below 1", &format!("is {x}")]);
        adamw(|c, x| c.beta2 = x, x, &["`beta2`", "at least 0 and below 1", &format!("is {x}")]);
    }
    for x in [0.0, 1e-60, 1e-45, -1e-8, f64::NAN, 1e39, f64::INFINITY] {
        adamw(|c, x| c.eps = x, x, &["`eps`", "at least 1.2e-38", &format!("is {x}")]);
    }
    for x in [-0.1, f64::NAN, 1e39, f64::INFINITY] {
        adamw(|c, x| c.weight_decay = x, x, &["`weight_decay`", "finite and not negative", &format!("is {x}")]);
    }
    for x in [-1.0, 1e-45, f64::NAN, 1e39, f64::INFINITY] {
        adamw(|c, x| c.max_grad_norm = x, x, &["`max_grad_norm`", "0, which turns clipping off", &format!("is {x}")]);
    }
    let muon = |f: fn(&mut MuonConfig), words: &[&str]| {
        let mut config = good.clone();
        config.muon.iter_mut().for_each(f);
        expect(TrainPlan::new(&config, &TrainOptions::default(), &profile), words);
    };
    muon(|c| c.momentum = 1.0 - 1e-9, &["`muon.momentum`", "as f32 too"]);
    muon(|c| c.lr_factor = 1e39, &["`muon.lr_factor`"]);
    muon(|c| c.lr_factor = 1e9, &["`lr`", "from 0 to 10"]);
    muon(|c| c.weight_decay = 2000.0, &["`muon.weight_decay`", "more than the whole weight"]);
    let settings = MuonSettings { lr: 0.1, momentum: 1.0, weight_decay: 0.1, max_grad_norm: 1.0 };
    expect(settings.values(), &["`muon.momentum`"]);
    expect(MuonSettings { max_grad_norm: f32::NAN, momentum: 0.9, ..settings }.values(), &["`max_grad_norm`"]);
}

#[test]
fn learning_rates_and_schedules_are_checked() {
    let good = Schedule { peak: 1e-3, warmup: 10, steps: 100, final_fraction: 0.1, decay: Decay::Cosine };
    let bad = |f: fn(&mut Schedule), words: &[&str]| {
        let mut schedule = good;
        f(&mut schedule);
        expect(schedule.validate(), words);
        let config = TrainConfig::new(TransformerConfig::gpt2(31, 16, 1, 32, 4), 1);
        expect(TrainConfig { schedule, ..config }.validate(), words);
    };
    bad(|s| s.peak = f64::NAN, &["`lr`", "from 0 to 10", "NaN"]);
    bad(|s| s.peak = -1e-3, &["`lr`", "-0.001"]);
    bad(|s| s.peak = 1e39, &["`lr`", "from 0 to 10,"]);
    bad(|s| s.final_fraction = f64::NAN, &["`schedule.final_fraction`", "from 0 to 1", "NaN"]);
    bad(|s| s.final_fraction = 1.5, &["`schedule.final_fraction`", "1.5"]);
    bad(|s| s.warmup = 101, &["`schedule.steps`", "at least the 101 steps of warm-up", "100"]);
    bad(|s| s.warmup = u64::MAX, &["`schedule.steps`", "18446744073709551615"]);
    // Without a decay its end does not matter, and no step is too far.
    let long = Schedule { warmup: u64::MAX, decay: Decay::Constant, ..good };
    long.validate().unwrap();
    assert!(long.at(0) > 0.0 && long.at(u64::MAX) == 1e-3 && good.at(u64::MAX) == 1e-4);

    // A rate that comes with each step, and a step count from wherever.
    let adamw = AdamWConfig { weight_decay: 1.0, ..Default::default() };
    let config = TrainConfig { adamw, ..TrainConfig::new(TransformerConfig::gpt2(31, 16, 1, 32, 4), 1) };
    expect(
        TrainConfig { schedule: Schedule::constant(5.0), ..config.clone() }.validate(),
        &["`weight_decay`", "1 / 5"],
    );
    let mut trainer = Trainer::new_blocking(gpu(), config).unwrap();
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    for lr in [f64::NAN, -1.0, f64::INFINITY, 1e4] {
        expect(trainer.optimizer().record(&mut encoder, lr, 0), &["`lr`", "from 0 to 10", &format!("is {lr}")]);
    }
    expect(trainer.optimizer().record(&mut encoder, 5.0, 0), &["`weight_decay`", "at most 1 / 5", "is 1"]);
    trainer.set_step_count(u64::MAX).unwrap();
    let loss = trainer.step(&[Batch::new(vec![1; 16], vec![2; 16])]).unwrap();
    assert!(loss.wait_blocking().unwrap().is_finite());
}

#[test]
fn settings_of_ops_are_checked() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 4])).unwrap();
    let [gamma, beta] = ["gamma", "beta"].map(|name| g.param(name, [4]).unwrap());
    let seed = g.input("seed", TensorType::u32([2])).unwrap();
    for eps in [0.0, -1e-5, 1e-45, f32::NAN, f32::INFINITY] {
        expect(g.layernorm("norm", x, gamma, beta, eps), &["`norm`", "eps", &format!("got {eps}")]);
        expect(g.rmsnorm("norm", x, gamma, eps), &["`norm`", "eps", &format!("got {eps}")]);
    }
    for p in [-0.1, 1.0, f32::NAN] {
        expect(g.dropout("drop", x, seed, p, 0), &["`drop`", "probability", &format!("got {p}")]);
    }
    let [w, grad, m] = ["w", "grad", "m"].map(|name| g.param(name, [4, 4]).unwrap());
    let hyper = g.input("hyper", TensorType::f32([4])).unwrap();
    let norm = g.input("norm", TensorType::f32([1])).unwrap();
    let mut muon =
        |name: &str, steps, rate| g.muon(name, [w, grad, m], hyper, norm, MuonStep { nesterov: true, steps, rate });
    muon("good", 5, 0.2).unwrap();
    expect(muon("endless", usize::MAX, 0.2), &["`steps`", "at most 20"]);
    for (i, rate) in [f64::NAN, -1.0, 1e39].into_iter().enumerate() {
        expect(muon(&format!("rate{i}"), 1, rate), &["rate", "finite and not negative"]);
    }
}

/// What is never given has no value: it is not zero.
#[test]
fn a_step_without_its_inputs_or_parameters_is_an_error_that_names_them() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 3])).unwrap();
    let [w, b] = [("w", vec![3, 4]), ("b", vec![4])].map(|(name, shape)| g.param(name, shape).unwrap());
    let scale = g.param_with("scale", [4], ParamInit::ONES).unwrap();
    let y = g.linear("y", x, w, Some(b)).unwrap();
    let rows = g.broadcast("rows", scale, [2, 4]).unwrap();
    let scaled = g.mul("scaled", y, rows).unwrap();
    let plan = Arc::new(gpu().plan(&g, &[scaled]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan.clone(), ExecOptions::default()).unwrap();
    let both = ["never written: `x`", "`Executable::write`", "without values: `w`, `b`", "`Graph::param_with`"];
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    expect(exec.submit(), &both);
    expect(exec.record(&mut encoder), &both);
    exec.write(x, &[1.0f32; 6]).unwrap();
    let message = exec.submit().unwrap_err().to_string();
    assert!(!message.contains("`x`") && !message.contains("`scale`"), "{message}");
    exec.write(w, &[1.0f32; 12]).unwrap();
    expect(exec.submit(), &["without values: `b`"]);
    exec.record_write(&mut encoder, b, &[0.5f32; 4]).unwrap();
    exec.record(&mut encoder).unwrap();
    gpu().submit(encoder).unwrap();
    assert_eq!(exec.read_blocking::<f32>(scaled).unwrap(), [3.5; 8]);

    // Tensors that somebody binds hold what he put there; reading one that nobody has written gives nobody a value.
    let zeros = |ty: &[usize]| Tensor::zeros(gpu(), "t", TensorType::f32(ty)).unwrap();
    let bound = ExecOptions::bound([(w, zeros(&[3, 4])), (b, zeros(&[4]))].into());
    let exec = Executable::new_blocking(gpu(), plan, bound).unwrap();
    exec.read_blocking::<f32>(x).unwrap();
    expect(exec.submit(), &["never written: `x`"]);
    exec.with_bindings(&[(x, zeros(&[2, 3]))].into()).unwrap().submit().unwrap();
}

/// An op that is wrong in one way, and otherwise `y = x`.
#[derive(Clone, Copy, Debug)]
struct Broken(Fault);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    NoOutputs,
    NarrowView,
    StartsAsNothing,
    StartsAsAnother,
    GradientOfNothing,
    NoGradientSet,
    ZeroGradient,
    NoReference,
    NoWorkgroups,
    TooManyWorkgroups,
    BoundTwice,
}

impl Op for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(match self.0 {
            Fault::NoOutputs => vec![],
            Fault::NarrowView | Fault::StartsAsAnother => vec![TensorType::f32([3])],
            _ => inputs[..1].to_vec(),
        })
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        assert!(cx.needs(0) && !cx.needs(7));
        if self.0 == Fault::GradientOfNothing {
            cx.set(7, dy);
        }
        if self.0 == Fault::ZeroGradient {
            cx.set_zero(0);
        }
        Ok(())
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let y = ["y[i] = x[i];", "y[i] = y[i] + x[i];"][usize::from(self.0 == Fault::BoundTwice)];
        let all = Elements::new("broken", cx.outputs[0].len(), y).bind("x", Bind::In(0)).bind("y", Bind::Out(0));
        let mut program = all.program(cx)?;
        match self.0 {
            Fault::NoWorkgroups => program.dispatches[0].workgroups = [1, 0, 1],
            Fault::TooManyWorkgroups => program.dispatches[0].workgroups = [1 << 20, 1, 1],
            _ => {}
        }
        Ok(program)
    }
    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        if self.0 == Fault::NoReference { vec![] } else { vec![inputs[0].clone()] }
    }
    fn is_view(&self) -> bool {
        self.0 == Fault::NarrowView
    }
    fn starts_as(&self, _: usize) -> Option<usize> {
        match self.0 {
            Fault::StartsAsNothing => Some(1),
            Fault::StartsAsAnother | Fault::BoundTwice => Some(0),
            _ => None,
        }
    }
}

#[test]
fn what_an_op_says_of_itself_is_checked() {
    let node = |fault| {
        let mut g = Graph::new();
        let x = g.param("x", [8]).unwrap();
        let y = g.scoped("h.0", |g| g.op1("y", Broken(fault), &[x]));
        y.map(|y| (g, x, y))
    };
    let refused = |fault, words: &[&str]| expect(node(fault), &[&["node `h.0.y` (broken)", "f32[8]"], words].concat());
    refused(Fault::NoOutputs, &["no outputs", "`infer`"]);
    refused(Fault::NarrowView, &["is a view", "as many elements as its first input"]);
    refused(Fault::StartsAsNothing, &["output 0 starts as input 1", "only 1"]);
    refused(Fault::StartsAsAnother, &["output 0, f32[3], cannot start as input 0, f32[8]"]);

    let gradients = |fault| {
        let (mut g, x, y) = node(fault)?;
        let loss = g.sum("loss", y)?;
        g.gradients(loss, &[x])
    };
    let words = ["node `h.0.y` (broken)", "f32[8]", "`vjp`"];
    expect(gradients(Fault::GradientOfNothing), &[&words[..], &["gradient of input 7", "only 1"]].concat());
    expect(gradients(Fault::NoGradientSet), &[&words[..], &["input 0, `x`", "`Vjp::no_gradient`"]].concat());

    // Where it is zero, the loss depends on something else or on nothing.
    expect(gradients(Fault::ZeroGradient), &["`loss` does not depend on `x`"]);
    let mut g = Graph::new();
    let x = g.param("x", [8]).unwrap();
    let sign = g.sign("sign", x).unwrap();
    let gated = g.mul("gated", sign, x).unwrap();
    let loss = g.sum("loss", gated).unwrap();
    g.gradients(loss, &[x]).unwrap();

    let (g, x, y) = node(Fault::NoReference).unwrap();
    let given = [(x, Array::zeros([8]))].into();
    expect(reference::run(&g, &given, &[y]), &["node `h.0.y` (broken)", "`reference` gave 0 outputs, but `infer` 1"]);
    let cases = [Case::new("8", Broken(Fault::NoReference), &[&[8]]).forward_only()];
    let failures = check::op(gpu(), &cases).unwrap_err().to_string();
    assert!(failures.starts_with("broken, case `8`: node `y` (broken): `reference` gave 0 outputs"), "{failures}");

    let plan = |fault| node(fault).and_then(|(g, _, y)| gpu().plan(&g, &[y]));
    expect(plan(Fault::NoWorkgroups), &["`h.0.y` dispatches [1, 0, 1] workgroups", "at least 1"]);
    expect(plan(Fault::TooManyWorkgroups), &["workgroups of `h.0.y`", "1048576 needed", "`Profile::grid`"]);
    let twice = |g: &mut Graph| {
        let x = g.input("x", TensorType::f32([8]))?;
        let doubled = g.scale("doubled", x, 2.0)?;
        let y = g.op1("y", Broken(Fault::BoundTwice), &[doubled])?;
        gpu().plan(g, &[y])
    };
    expect(twice(&mut Graph::new()), &["`y` reads and writes `doubled` or `y` through two bindings", "bind it once"]);
}

/// An app's own op: y = 2x + 1, with its own WGSL.
#[derive(Debug)]
struct TwicePlusOne {
    wgsl: String,
    binds: Vec<Bind>,
    words: usize,
}

impl TwicePlusOne {
    fn new() -> Self {
        TwicePlusOne { wgsl: WGSL.into(), binds: vec![Bind::In(0), Bind::Out(0)], words: 1 }
    }
}

const WGSL: &str = "
@group(0) @binding(0) var<uniform> n: u32;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let i = (group.x + group.y * groups.x) * 64u + local;
    if (i < n) {
        y[i] = 2.0 * x[i] + 1.0;
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
        let kernel = Kernel::new("twice_plus_one", self.wgsl.clone(), "main");
        let words = vec![n as u32; self.words];
        Ok(Program::one(kernel, &self.binds, &words, cx.profile.grid(n.div_ceil(64))))
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
    let y = g.op1("y", TwicePlusOne::new(), &[x]).unwrap();
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
    let build = |change: fn(&mut TwicePlusOne)| -> Result<Executable> {
        let mut op = TwicePlusOne::new();
        change(&mut op);
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([8]))?;
        let y: Value = g.op1("y", op, &[x])?;
        Executable::new_blocking(gpu(), Arc::new(Plan::new(&g, &[y], gpu().profile())?), ExecOptions::default())
    };
    assert!(build(|_| {}).is_ok());
    let node = ["node `y`", "twice_plus_one"];
    let expect_in_node = |change, words: &[&str]| expect(build(change), &[&node[..], words].concat());
    // Launch against WGSL: errors of the plan.
    expect_in_node(|op| op.wgsl = WGSL.replace("fn main", "fn other"), &["no function", ".main`"]);
    expect_in_node(|op| op.binds = vec![Bind::Out(0), Bind::In(0)], &["`x`", "binding 1", "Out(0)"]);
    expect_in_node(|op| op.binds = vec![Bind::In(1), Bind::Out(0)], &["input 1", "only 1"]);
    expect_in_node(|op| op.binds = vec![Bind::In(0), Bind::Out(1)], &["output 1", "only 1"]);
    expect_in_node(|op| op.binds = vec![Bind::In(0), Bind::Scratch(0)], &["scratch tensor 0", "only 0"]);
    expect_in_node(|op| op.binds = vec![Bind::In(0)], &["`y`", "binding 2"]);
    expect_in_node(|op| op.binds.push(Bind::In(0)), &["binding 3"]);
    expect_in_node(|op| op.words = 0, &["uniform", "no words"]);
    let unwritten = |op: &mut TwicePlusOne| {
        op.wgsl = WGSL.replace("read_write", "read").replace("y[i] = 2.0 * x[i] + 1.0", "_ = x[i] + y[i]");
        op.binds = vec![Bind::In(0), Bind::OutIn(0)];
    };
    expect_in_node(unwritten, &["no dispatch writes output 0"]);
    // What only a driver can find.
    let more_words = |op: &mut TwicePlusOne| {
        op.wgsl = WGSL.replace("n: u32", "all: vec4<u32>").replace("i < n", "i < all.x");
    };
    expect_in_node(more_words, &["kernel `twice_plus_one`", "size 4", "16"]);
    expect_in_node(|op| op.wgsl = WGSL.replacen("array<f32>", "array<f32, 100>", 1), &["size 32", "400"]);
    expect_in_node(|op| op.wgsl = WGSL.replace("2.0", "two"), &["no definition in scope", "two"]);
    let knob = Kernel::new("k", WGSL, "main").knob("TILE", 4u32).wgsl();
    assert!(matches!(knob, Err(Error::Kernel { .. })));
    expect(knob, &["`k`", "TILE"]);
}
