//! Probes against the f64 reference, patches against graphs built that way, and views against both.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::gpu;
use throughline::nn::{Block, Builder, Init, NormPlacement, StandardBlock, Transformer, TransformerConfig};
use throughline::optim::{AdamWConfig, Schedule};
use throughline::probe::{self, Edit, Instruments, Measure, Patch, Probe, Reading, Readings, Tap};
use throughline::reference::{self, Array, nmse};
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, Trainer};
use throughline::views::{AttentionMap, DropLayer, LogitLens, Subject};
use throughline::{AdapterClass, ExecOptions, Executable, Graph, Plan, Profile, Result, TensorType, Value};

const BATCH: usize = 2;
const TIME: usize = 12;

/// Attention and feed-forward side by side: one addition a layer.
#[derive(Debug)]
struct Parallel;

impl Block for Parallel {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        b.residual("both", x, |b, x| {
            let attention = b.scoped("attn", |b| b.attention(x))?;
            let mlp = b.scoped("mlp", |b| b.feed_forward(x))?;
            b.g.add("sum", attention, mlp)
        })
    }
}

fn gpt2() -> TransformerConfig {
    TransformerConfig { init: Init::Gpt2 { std: 0.1 }, ..TransformerConfig::gpt2(31, TIME, 3, 32, 4) }
}

fn llama() -> TransformerConfig {
    let base = TransformerConfig::llama(31, TIME, 3, 32, 4);
    TransformerConfig { n_kv_heads: 2, init: Init::Gpt2 { std: 0.1 }, ..base }
}

fn models() -> Vec<(TransformerConfig, &'static dyn Block)> {
    let post = TransformerConfig { norm_placement: NormPlacement::Post, ..gpt2() };
    vec![(gpt2(), &StandardBlock), (llama(), &StandardBlock), (post, &StandardBlock), (gpt2(), &Parallel)]
}

fn batch(seed: u32) -> Batch {
    let ids = |a: u32| (0..(BATCH * TIME) as u32).map(|i| (i * i * 7 + a * i + seed) % 31).collect();
    Batch::new(ids(3), ids(5))
}

fn config(model: TransformerConfig, micro_batches: usize) -> TrainConfig {
    let (schedule, adamw) = (Schedule::constant(1e-3), AdamWConfig::default());
    TrainConfig { micro_batches, schedule, adamw, seed: 7, ..TrainConfig::new(model, BATCH) }
}

/// A model with its loss, and what goes in.
struct Setup {
    graph: Graph,
    gpt: Transformer,
    loss: Value,
    given: HashMap<Value, Array>,
}

fn setup(config: &TransformerConfig, block: &dyn Block) -> Setup {
    let mut graph = Graph::new();
    let gpt = Transformer::build_with(&mut graph, config, block, BATCH, TIME, false).unwrap();
    finish(graph, gpt)
}

fn finish(mut graph: Graph, gpt: Transformer) -> Setup {
    let targets = graph.input("targets", graph.ty(gpt.tokens).clone()).unwrap();
    let loss = graph.cross_entropy("loss", gpt.logits, targets).unwrap();
    let ids = |ids: Vec<u32>| Array::new([BATCH, TIME], ids.into_iter().map(f64::from).collect());
    let Batch { tokens, targets: wanted, .. } = batch(0);
    let mut given = HashMap::from([(gpt.tokens, ids(tokens)), (targets, ids(wanted))]);
    for &p in &gpt.params {
        let values = graph.initial_values(p, 3).unwrap();
        given.insert(p, Array::new(graph.ty(p).shape.clone(), values.into_iter().map(f64::from).collect()));
    }
    Setup { graph, gpt, loss, given }
}

impl Setup {
    fn executable(&self, outputs: &[Value], profile: &Profile) -> Executable {
        let plan = Plan::new(&self.graph, outputs, profile).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        for external in exec.plan().externals() {
            common::write(&exec, external.value, &self.given[&external.value]);
        }
        exec
    }

    /// On the GPU.
    fn run(&self, outputs: &[Value]) -> Vec<Vec<f32>> {
        let exec = self.executable(outputs, gpu().profile());
        exec.submit().unwrap();
        outputs.iter().map(|&v| exec.read_blocking(v).unwrap()).collect()
    }
}

fn rms(a: &Array) -> f64 {
    (a.dot(a) / a.data.len() as f64).sqrt()
}

/// What a probe should tell, from the tensors that it looks at.
fn expected(measure: &Measure, a: &Array, b: Option<&Array>) -> f64 {
    match (measure, b) {
        (Measure::Rms, _) => rms(a),
        (Measure::MaxAbs, _) => a.data.iter().fold(0.0, |m, x| x.abs().max(m)),
        (Measure::Mean, _) => a.data.iter().sum::<f64>() / a.data.len() as f64,
        (Measure::Ratio(_), Some(b)) => rms(a) / rms(b),
        (Measure::Cosine(_), Some(b)) => a.dot(b) / (a.dot(a) * b.dot(b)).sqrt(),
        _ => unreachable!(),
    }
}

/// The standard probes and some of every other kind.
fn many_probes(s: &Setup) -> Vec<Probe> {
    let name = |v: Value| s.graph.name(v).to_string();
    let (first, last) = (name(s.gpt.stream[0]), name(s.gpt.stream[3]));
    let weight = name(s.gpt.params[4]);
    let mut probes = probe::standard(&s.graph, &s.gpt.stream, true);
    probes.extend([
        Probe::new("top", Tap::forward(&last), Measure::MaxAbs),
        Probe::new("mean", Tap::forward("head"), Measure::Mean),
        Probe::new("far", Tap::forward(&first), Measure::Cosine(Tap::forward(&last))),
        Probe::new("turned", Tap::gradient(&first), Measure::Cosine(Tap::gradient(&last))),
        Probe::new("update", Tap::gradient(&weight), Measure::Ratio(Tap::forward(&weight))),
        Probe::new("itself", Tap::forward(&first), Measure::Cosine(Tap::forward(&first))),
        Probe::new("loss", Tap::forward("loss"), Measure::Mean),
        Probe::new("per_row", Tap::forward("loss:1"), Measure::MaxAbs),
    ]);
    probes
}

#[test]
fn probes_tell_what_the_reference_says() {
    for (config, block) in models() {
        let mut s = setup(&config, block);
        let probes = many_probes(&s);
        let taps = probe::gradient_taps(&s.graph, &probes).unwrap();
        let gradients: HashMap<Value, Value> =
            taps.iter().copied().zip(s.graph.gradients(s.loss, &taps).unwrap()).collect();
        let instruments = Instruments::new(&mut s.graph, &probes, &gradients).unwrap();
        let mut graph = s.graph.clone();
        let inputs = graph.nodes()[s.loss.node()].inputs.clone();
        let again = graph.op("again", throughline::ops::cross_entropy::CrossEntropy, &inputs).unwrap();
        let value = |tap: &Tap| match (tap, s.graph.find(tap.node())) {
            (Tap::Forward(_), Some(v)) => v,
            (Tap::Gradient(_), Some(v)) => gradients[&v],
            (other, Some(_)) => panic!("{other:?}"),
            // The only tap of another output than the first.
            (_, None) => again[1],
        };
        let arrays = |taps: &[Tap]| -> Vec<Array> {
            reference::run(&graph, &s.given, &taps.iter().map(&value).collect::<Vec<_>>()).unwrap()
        };
        let a = arrays(&probes.iter().map(|p| p.tap.clone()).collect::<Vec<_>>());
        let other = |p: &Probe| match &p.measure {
            Measure::Cosine(other) | Measure::Ratio(other) => other.clone(),
            _ => p.tap.clone(),
        };
        let b = arrays(&probes.iter().map(other).collect::<Vec<_>>());
        for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
            let profile = Profile { class, ..gpu().profile().clone() };
            let exec = s.executable(&instruments.outputs(), &profile);
            let mut encoder = gpu().device().create_command_encoder(&Default::default());
            exec.record(&mut encoder).unwrap();
            let readback = instruments.record_read(&exec, &mut encoder, 5).unwrap();
            gpu().queue().submit([encoder.finish()]);
            let readings = readback.wait_blocking().unwrap();
            assert_eq!((readings.step, readings.values.len()), (5, probes.len()));
            for (((r, probe), a), b) in readings.values.iter().zip(&probes).zip(&a).zip(&b) {
                let want = expected(&probe.measure, a, Some(b));
                // Means of both signs cancel.
                let scale = if probe.measure == Measure::Mean { rms(a) } else { want.abs().max(1e-3) };
                assert_eq!((&r.name, r.layer, &r.node[..]), (&probe.name, probe.layer, probe.tap.node()));
                assert!((r.value - want).abs() < 2e-5 * scale, "{probe:?}: {} but {want}\n{}", r.value, exec.plan());
            }
        }
    }
}

#[test]
fn standard_probes_are_those_of_the_table() {
    let s = setup(&gpt2(), &StandardBlock);
    let probes = probe::standard(&s.graph, &s.gpt.stream, true);
    let layers = |name: &str| probes.iter().filter(|p| p.name == name).map(|p| p.layer.unwrap()).collect::<Vec<_>>();
    for name in ["stream_rms", "stream_grad_rms"] {
        assert_eq!(layers(name), [0, 1, 2, 3], "{name}");
    }
    for name in ["stream_cosine", "attn_rms", "mlp_rms", "attn_ratio", "mlp_ratio"] {
        assert_eq!(layers(name), [0, 1, 2], "{name}");
    }
    let weights = probes.iter().filter(|p| p.name == "weight_grad_rms").count();
    assert_eq!(weights, s.gpt.params.len());
    let s = setup(&gpt2(), &Parallel);
    let probes = probe::standard(&s.graph, &s.gpt.stream, false);
    assert_eq!(probes.iter().filter(|p| p.name == "both_ratio").count(), 3);
    assert!(probes.iter().all(|p| matches!(p.tap, Tap::Forward(_))));
}

#[test]
fn whole_tensors_come_as_they_were_before_they_were_overwritten() {
    let mut s = setup(&gpt2(), &StandardBlock);
    let first = s.gpt.stream[0];
    let name = s.graph.name(first).to_string();
    let probes = [
        Probe::new("x", Tap::forward(&name), Measure::Whole).of_layer(0),
        Probe::new("dx", Tap::gradient(&name), Measure::Whole),
        Probe::new("rms", Tap::forward(&name), Measure::Rms),
    ];
    let mut differentiated = s.graph.clone();
    let gradient = differentiated.gradients(s.loss, &[first]).unwrap()[0];
    let instruments = Instruments::with_gradients(&mut s.graph, s.loss, &probes).unwrap();
    let want = reference::run(&differentiated, &s.given, &[first, gradient]).unwrap();
    let exec = s.executable(&instruments.outputs(), gpu().profile());
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    exec.record(&mut encoder).unwrap();
    let readback = instruments.record_read(&exec, &mut encoder, 0).unwrap();
    gpu().queue().submit([encoder.finish()]);
    let readings = gpu().run_blocking(readback.take()).unwrap();
    for (tensor, want) in readings.tensors.iter().zip(&want) {
        assert!(nmse(&tensor.data, &want.data) < 1e-9, "{}", tensor.name);
        assert_eq!(tensor.shape, want.shape.dims());
    }
    assert_eq!((readings.tensors.len(), readings.tensors[0].layer, readings.values.len()), (2, Some(0), 1));
    let json = serde_json::to_string(&readings).unwrap();
    assert_eq!(serde_json::from_str::<Readings>(&json).unwrap(), readings);
}

/// Looking at what is there anyway changes nothing else: the same dispatches on the same buffers, without copies.
#[test]
fn a_plan_with_probes_of_the_stream_is_the_plan_with_a_few_dispatches_more() {
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let plan = |keep: Option<&dyn Fn(&Probe) -> bool>| {
            let mut s = setup(&gpt2(), &StandardBlock);
            let wrt: Vec<Value> = [&s.gpt.params[..], &s.gpt.stream].concat();
            let gradients = s.graph.gradients(s.loss, &wrt).unwrap();
            let mut outputs: Vec<Value> = gradients[..s.gpt.params.len()].to_vec();
            outputs.push(s.loss);
            if let Some(keep) = keep {
                let mut probes = probe::standard(&s.graph, &s.gpt.stream, true);
                probes.retain(keep);
                let by_value = wrt.into_iter().zip(gradients).collect();
                outputs.extend(Instruments::new(&mut s.graph, &probes, &by_value).unwrap().outputs());
            }
            Plan::new(&s.graph, &outputs, &Profile::portable(class)).unwrap()
        };
        let plain = plan(None);
        let probed = plan(Some(&|p| p.name.starts_with("stream") && p.measure == Measure::Rms));
        assert!(probed.steps().iter().all(|s| s.copies().is_empty()), "{probed}");
        let describe = |p: &Plan| -> Vec<String> {
            let own = p.steps().iter().filter(|s| !s.name().starts_with("probe"));
            own.map(|s| {
                format!("{} {:?}", s.name(), s.dispatches().iter().map(|d| d.kernel().describe()).collect::<Vec<_>>())
            })
            .collect()
        };
        assert_eq!(describe(&plain), describe(&probed));
        assert_eq!(probed.dispatches() - plain.dispatches(), 8 + 1, "{probed}");
        assert_eq!(probed.buffers().len() - plain.buffers().len(), 1, "{probed}");
        // A comparison of neighbours costs a copy, a look at a branch an addition.
        let all = plan(Some(&|_| true));
        let additions = all.steps().iter().filter(|s| s.op().name() == "residual_add").count();
        let copies = all.steps().iter().flat_map(|s| s.copies()).chain(all.final_copies()).count();
        assert_eq!((additions, copies), (6, 3), "{all}");
    }
}

#[test]
fn a_trainer_tells_a_step_late_what_each_step_was_like() {
    for (micro_batches, patches) in [(1, vec![]), (2, vec![Patch::new("h.1.mlp.down", Edit::ScaleBy)])] {
        let patched = !patches.is_empty();
        let options = TrainOptions { standard_probes: true, patches, ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(gpu(), config(gpt2(), micro_batches), &options).unwrap();
        let mut plain = Trainer::new_blocking(gpu(), config(gpt2(), micro_batches)).unwrap();
        if patched {
            trainer.write_patch("h.1.mlp.down.factor", &[1.0]).unwrap();
        }
        assert!(trainer.take_probes().is_none() && plain.take_probes().is_none());
        let mut late: Option<(probe::ProbeReadback, Vec<Vec<f32>>)> = None;
        for step in 0..3 {
            let batches: Vec<Batch> = (0..micro_batches as u32).map(|i| batch(step as u32 * 10 + i)).collect();
            let loss = trainer.step(&batches).unwrap();
            let probes = trainer.take_probes().unwrap();
            assert!(trainer.take_probes().is_none());
            let want = plain.step(&batches).unwrap().wait_blocking().unwrap();
            if let Some((probes, gradients)) = late.take() {
                let readings = probes.wait_blocking().unwrap();
                assert_eq!(readings.step, step - 1);
                let names = trainer.grads().layout.tensors.iter().map(|(name, _)| name);
                for (name, data) in names.zip(gradients) {
                    let of = |r: &&Reading| r.name == "weight_grad_rms" && &r.node == name;
                    let got = readings.values.iter().find(of).unwrap().value;
                    let want = rms(&Array::new([data.len()], data.iter().map(|&x| f64::from(x)).collect()));
                    assert!((got - want).abs() <= 1e-5 * want, "{name}: {got} but {want}");
                }
                assert!(readings.get("stream_cosine", 2).unwrap() > 0.0);
                assert!(readings.get("attn_ratio", 0).unwrap() > 0.0);
            }
            let loss = loss.wait_blocking().unwrap();
            assert!((loss - want).abs() < 1e-4 * want, "{loss} but {want}");
            late = Some((probes, trainer.grads().read_blocking(gpu()).unwrap()));
        }
        if patched {
            trainer.write_patch("h.1.mlp.down.factor", &[0.0]).unwrap();
            let [with, without] = [&plain, &trainer].map(|t| t.evaluate_blocking(&[batch(1)]).unwrap());
            assert!((with - without).abs() > 1e-4, "{with} {without}");
            assert!(trainer.write_patch("nobody.factor", &[0.0]).is_err());
        }
    }
}

/// A layer that does to the stream what a patch would do to a standard one.
#[derive(Debug)]
struct Edited(Edit);

impl Block for Edited {
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value> {
        let x = b.residual("attn", x, |b, x| {
            let y = b.attention(x)?;
            if layer != 1 {
                return Ok(y);
            }
            let ty = b.g.ty(y).clone();
            match &self.0 {
                Edit::Replace => b.g.input("by_hand", ty),
                Edit::Scale(c) => b.g.scale("by_hand.scaled", y, *c),
                Edit::ScaleBy => {
                    let factor = b.g.input("by_hand", TensorType::f32([1]))?;
                    let factor = b.g.broadcast("by_hand.repeated", factor, ty.shape)?;
                    b.g.mul("by_hand.scaled", y, factor)
                }
                Edit::Add(dims) => {
                    let addend = b.g.input("by_hand", TensorType::f32(&dims[..]))?;
                    b.g.add("by_hand.added", y, addend)
                }
                other => panic!("{other:?}"),
            }
        })?;
        b.residual("mlp", x, Builder::feed_forward)
    }
}

/// Loss and all gradients, the input of the patch written.
fn loss_and_gradients(mut s: Setup, input: Option<Value>) -> (Vec<Vec<f32>>, Vec<Array>) {
    if let Some(v) = input {
        let shape = s.graph.ty(v).shape.clone();
        s.given.insert(v, throughline::ops::random_array(&shape, 9));
    }
    // Not those that a replacement leaves unused.
    let wrt = s.gpt.params.clone();
    let used: Vec<Value> = wrt.into_iter().filter(|&v| s.graph.clone().gradients(s.loss, &[v]).is_ok()).collect();
    let mut outputs = s.graph.gradients(s.loss, &used).unwrap();
    outputs.push(s.loss);
    let want = reference::run(&s.graph, &s.given, &outputs).unwrap();
    (s.run(&outputs), want)
}

#[test]
fn a_patched_run_equals_a_graph_built_with_the_patch() {
    let edits =
        [Edit::Replace, Edit::Scale(-0.5), Edit::ScaleBy, Edit::Add(vec![32]), Edit::Add(vec![BATCH, TIME, 32])];
    for edit in edits {
        let mut g = Graph::new();
        let gpt = Transformer::build_with(&mut g, &gpt2(), &StandardBlock, BATCH, TIME, false).unwrap();
        let patched = g.patched(&[Patch::new("h.1.attn.o", edit.clone())]).unwrap();
        let s = finish(patched.graph.clone(), patched.transformer(&gpt));
        let suffix = ["replacement", "factor", "addend"];
        let input = suffix.iter().find_map(|n| s.graph.find(&format!("h.1.attn.o.{n}")));
        assert_eq!(input.is_some(), !matches!(edit, Edit::Scale(_)));
        let (got, reference_got) = loss_and_gradients(s, input);
        let by_hand = setup(&gpt2(), &Edited(edit.clone()));
        let input = by_hand.graph.find("h.1.attn.by_hand");
        let (want, reference_want) = loss_and_gradients(by_hand, input);
        assert_eq!(got, want, "{edit:?}");
        assert_eq!(reference_got, reference_want, "{edit:?}");
        for (got, want) in got.iter().zip(&reference_want) {
            assert!(nmse(got, &want.data) < 1e-7, "{edit:?}");
        }
    }
}

#[test]
fn patches_go_one_behind_the_other_and_keep_names_and_stores() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([8])).unwrap();
    let s = g.state("s", TensorType::f32([8])).unwrap();
    let y = g.add("y", x, s).unwrap();
    g.store(y, s).unwrap();
    let patched = g.patched(&[
        Patch::new("y", Edit::Scale(3.0)),
        Patch::new("y", Edit::Scale(5.0)),
        Patch::new("x", Edit::Scale(2.0)),
    ]);
    let patched = patched.unwrap();
    let new = |v| patched.unpatched(v);
    let given = [(new(x), 1.0), (new(s), 10.0)].map(|(v, x)| (v, Array::new([8], vec![x; 8]))).into();
    let got = reference::run(&patched.graph, &given, &[new(y), patched.value(y)]).unwrap();
    assert_eq!((got[0].data[0], got[1].data[0]), (12.0, 180.0));
    assert_eq!(patched.graph.stores(), [(patched.value(y), new(s))]);
    assert_eq!(patched.graph.name(new(y)), "y");
}

#[test]
fn what_cannot_be_probed_or_patched_is_named() {
    let s = setup(&gpt2(), &StandardBlock);
    let probe = |tap: Tap, measure: Measure| {
        let probes = [Probe::new("mine", tap, measure)];
        Instruments::with_gradients(&mut s.graph.clone(), s.loss, &probes).unwrap_err().to_string()
    };
    let expect = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    expect(probe(Tap::forward("h.9.mlp"), Measure::Rms), &["`mine`", "`h.9.mlp`"]);
    expect(probe(Tap::forward("head:1"), Measure::Rms), &["`mine`", "`head:1`"]);
    expect(probe(Tap::forward("tokens"), Measure::Whole), &["`mine`", "u32[2, 12]"]);
    expect(probe(Tap::gradient("targets"), Measure::Rms), &["`targets`"]);
    let other = Measure::Cosine(Tap::forward("h.0.mlp.up"));
    expect(probe(Tap::forward("h.0.mlp.down"), other), &["h.0.mlp.down", "[2, 12, 32]", "[2, 12, 128]"]);
    let missing = Instruments::new(
        &mut s.graph.clone(),
        &[Probe::new("mine", Tap::gradient("head"), Measure::Rms)],
        &HashMap::new(),
    );
    expect(missing.unwrap_err().to_string(), &["`mine`", "`head`"]);
    let patch = |node: &str, edit: Edit| s.graph.patched(&[Patch::new(node, edit)]).unwrap_err().to_string();
    expect(patch("h.9.mlp", Edit::Replace), &["`h.9.mlp`"]);
    expect(patch("h.0.mlp.up", Edit::Add(vec![32])), &["h.0.mlp.up", "[32]", "[2, 12, 128]"]);
    expect(patch("tokens", Edit::Scale(2.0)), &["tokens", "f32"]);
}

#[test]
fn the_logit_lens_ends_in_the_loss_and_agrees_with_the_reference() {
    for (model, block) in models() {
        let options = TrainOptions { block, ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(gpu(), config(model.clone(), 1), &options).unwrap();
        trainer.step(&[batch(3)]).unwrap();
        let lens = gpu().run_blocking(LogitLens::new(&Subject::of(&trainer).with_block(block), [BATCH, TIME])).unwrap();
        let readings = lens.run_blocking(&batch(0)).unwrap();
        let get = |name: &str, layer| readings.iter().find(|r| r.name == name && r.layer == Some(layer)).unwrap().value;
        let loss = f64::from(trainer.evaluate_blocking(&[batch(0)]).unwrap());
        assert!((get("lens_cross_entropy", 3) - loss).abs() < 1e-5 && get("lens_kl", 3).abs() < 1e-5);
        // In f64: the stream from the reference, the rest by hand.
        let mut s = setup(&model, block);
        let params = trainer.params().read_blocking(gpu()).unwrap();
        for (p, data) in s.gpt.params.iter().zip(&params) {
            s.given.get_mut(p).unwrap().data = data.iter().map(|&x| f64::from(x)).collect();
        }
        let log_probabilities = |x: Array| {
            let mut g = Graph::new();
            let input = g.input("x", TensorType::f32(x.shape.clone())).unwrap();
            let mut given = HashMap::from([(input, x)]);
            let mut hidden = input;
            if model.norm_placement == NormPlacement::Pre {
                let node = &s.graph.nodes()[s.gpt.hidden.node()];
                let mut inputs = vec![input];
                for v in &node.inputs[1..] {
                    let param = g.param(s.graph.name(*v), s.graph.ty(*v).shape.clone()).unwrap();
                    given.insert(param, s.given[v].clone());
                    inputs.push(param);
                }
                let throughline::graph::Source::Op(op) = &node.source else { panic!() };
                hidden = g.op_arc("norm", op.clone(), &inputs).unwrap()[0];
            }
            let table = &s.graph.nodes()[s.gpt.logits.node()].inputs[1];
            let head = g.param("table", s.graph.ty(*table).shape.clone()).unwrap();
            given.insert(head, s.given[table].clone());
            let logits = g.matmul_nt("logits", hidden, head).unwrap();
            let logits = reference::run(&g, &given, &[logits]).unwrap().remove(0);
            let log_softmax = |row: &[f64]| {
                let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
                row.iter().map(|x| x - lse).collect::<Vec<_>>()
            };
            logits.rows().map(log_softmax).collect::<Vec<_>>()
        };
        let streams = reference::run(&s.graph, &s.given, &s.gpt.stream).unwrap();
        let predictions: Vec<_> = streams.into_iter().map(log_probabilities).collect();
        let rows = (BATCH * TIME) as f64;
        for (layer, prediction) in predictions.iter().enumerate() {
            let losses = prediction.iter().zip(batch(0).targets).map(|(row, t)| -row[t as usize]);
            let loss = losses.sum::<f64>() / rows;
            let last = predictions[3].iter().flatten();
            let kl = last.zip(prediction.iter().flatten()).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / rows;
            let (got_loss, got_kl) = (get("lens_cross_entropy", layer), get("lens_kl", layer));
            assert!((got_loss - loss).abs() < 1e-5 && (got_kl - kl).abs() < 1e-5, "{got_loss} {loss} {got_kl} {kl}");
        }
    }
}

/// Standard layers, but for one whose branches add nothing.
#[derive(Debug)]
struct Silent(usize);

impl Block for Silent {
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value> {
        let factor = if layer == self.0 { 0.0 } else { 1.0 };
        let x = b.residual("attn", x, |b, x| {
            let y = b.attention(x)?;
            b.g.scale("silent", y, factor)
        })?;
        b.residual("mlp", x, |b, x| {
            let y = b.feed_forward(x)?;
            b.g.scale("silent", y, factor)
        })
    }
}

/// Other layers, but for one that leaves the stream as it is.
#[derive(Debug)]
struct Without<'a>(usize, &'a dyn Block);

impl Block for Without<'_> {
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value> {
        let y = self.1.build(b, layer, x)?;
        Ok(if layer == self.0 { x } else { y })
    }
}

#[test]
fn a_dropped_layer_is_one_that_is_not_there() {
    for (model, block) in models() {
        let options = TrainOptions { block, ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(gpu(), config(model.clone(), 1), &options).unwrap();
        trainer.step(&[batch(3)]).unwrap();
        let drop = gpu().run_blocking(DropLayer::new(&Subject::of(&trainer).with_block(block), [BATCH, TIME])).unwrap();
        let losses = drop.run_blocking(&batch(0)).unwrap();
        let whole = f64::from(trainer.evaluate_blocking(&[batch(0)]).unwrap());
        assert!((losses[0].value - whole).abs() < 1e-5 && losses[0].layer.is_none() && losses.len() == 4);
        let params = trainer.params().read_blocking(gpu()).unwrap();
        for layer in 0..3 {
            // The norms of a post-norm layer stay.
            let mut s = match model.norm_placement {
                NormPlacement::Post => setup(&model, &Silent(layer)),
                _ => setup(&model, &Without(layer, block)),
            };
            for (p, data) in s.gpt.params.iter().zip(&params) {
                s.given.get_mut(p).unwrap().data = data.iter().map(|&x| f64::from(x)).collect();
            }
            let want = reference::run(&s.graph, &s.given, &[s.loss]).unwrap()[0].data[0];
            let got = &losses[1 + layer];
            assert!((got.value - want).abs() < 1e-5 && got.layer == Some(layer), "{got:?} but {want}");
        }
    }
}

#[test]
fn attention_maps_are_the_softmax_of_the_scores() {
    for (model, block) in models()
        .into_iter()
        .chain([(TransformerConfig { bidirectional: true, ..gpt2() }, &StandardBlock as &dyn Block)])
    {
        let options = TrainOptions { block, ..TrainOptions::default() };
        let trainer = Trainer::with_options_blocking(gpu(), config(model.clone(), 1), &options).unwrap();
        let view = Subject::of(&trainer).with_block(block);
        let (layer, head) = (1, 3);
        let map = gpu().run_blocking(AttentionMap::new(&view, [BATCH, TIME], layer, head)).unwrap();
        let got = map.run_blocking(&batch(0).tokens).unwrap();
        assert_eq!((&got.shape[..], got.layer), (&[BATCH, TIME, TIME][..], Some(layer)));
        let mut s = setup(&model, block);
        for p in &s.gpt.params {
            let values = s.graph.initial_values(*p, 7).unwrap();
            s.given.get_mut(p).unwrap().data = values.into_iter().map(f64::from).collect();
        }
        let attention = s.graph.find(&got.node).unwrap();
        let inputs = &s.graph.nodes()[attention.node()].inputs;
        let qk = reference::run(&s.graph, &s.given, &inputs[..2]).unwrap();
        let (dh, kv_head) = (8, head / (4 / model.n_kv_heads));
        let mut want = vec![];
        for b in 0..BATCH {
            for i in 0..TIME {
                let seen = |j: usize| model.bidirectional || j <= i;
                let row = |a: &Array, t: usize, h: usize| {
                    let at = (b * TIME + t) * a.shape.cols() + h * dh;
                    a.data[at..at + dh].to_vec()
                };
                let score = |j: usize| {
                    let products = row(&qk[0], i, head).into_iter().zip(row(&qk[1], j, kv_head)).map(|(q, k)| q * k);
                    (products.sum::<f64>() / (dh as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (0..TIME).map(|j| if seen(j) { score(j) } else { 0.0 }).collect();
                let sum: f64 = scores.iter().sum();
                want.extend(scores.iter().map(|s| s / sum));
            }
        }
        assert!(nmse(&got.data, &want) < 1e-9, "{}", nmse(&got.data, &want));
        for (layer, head) in [(3, 0), (0, 4)] {
            let error =
                gpu().run_blocking(AttentionMap::new(&view, [BATCH, TIME], layer, head)).unwrap_err().to_string();
            assert!(error.contains(&layer.max(head).to_string()), "{error}");
        }
    }
}
