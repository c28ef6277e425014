//! Properties of plans, on random graphs: replayed symbolically, every dispatch of a plan reads
//! what the graph says it should, and everything ends up where the plan says it does.

#[path = "common/graphs.rs"]
mod graphs;

use std::collections::{HashMap, HashSet};

use graphs::{Built, Pair, recipes};
use proptest::prelude::*;
use throughline::graph::{Operand, Part, Source};
use throughline::kernel::Kernel;
use throughline::nn::TransformerConfig;
use throughline::ops::attention::Attention;
use throughline::ops::chunks::LOGIT_BYTES;
use throughline::ops::rope::Rope;
use throughline::optim::Schedule;
use throughline::plan::{BufferCopy, PlannedDispatch, Slot, Step};
use throughline::train::{TrainConfig, TrainOptions, TrainPlan};
use throughline::{AdapterClass, Cooperative, Graph, Plan, Precision, Profile, TensorType, Value};

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_dispatch_reads_what_the_graph_says(recipe in recipes()) {
        check(&recipe.build().unwrap(), &Profile::portable(AdapterClass::Gpu))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn so_does_every_dispatch_whose_bindings_are_merged(recipe in recipes()) {
        let profile = Profile { max_storage_buffers: 3, ..Profile::portable(AdapterClass::Gpu) };
        check(&recipe.build().unwrap(), &profile)?;
    }
}

/// A graph with two inputs `a` and `b` and two states `s` and `t`, all alike.
fn small() -> (Graph, [Value; 4]) {
    let mut g = Graph::new();
    let ty = TensorType::f32([8]);
    let a = g.input("a", ty.clone()).unwrap();
    let b = g.input("b", ty.clone()).unwrap();
    let s = g.state("s", ty.clone()).unwrap();
    let t = g.state("t", ty).unwrap();
    (g, [a, b, s, t])
}

fn checked(graph: Graph, kept: &[Value]) -> Plan {
    let profile = Profile::portable(AdapterClass::Gpu);
    check(&Built { graph: graph.clone(), kept: kept.to_vec() }, &profile).unwrap();
    Plan::new(&graph, kept, &profile).unwrap()
}

#[test]
fn an_op_takes_in_the_additions_to_two_of_its_outputs() {
    let (mut g, [a, b, s, t]) = small();
    let pair = g.op("pair", Pair::default(), &[a, b]).unwrap();
    let u = g.residual_add("u", s, pair[1]).unwrap();
    let v = g.residual_add("v", t, pair[0]).unwrap();
    let y = g.mul("y", u, v).unwrap();
    let plan = checked(g, &[y, u]);
    assert_eq!(plan.steps().len(), 2, "{plan}");
    assert_eq!(plan.steps()[0].starts_as(), [Some(3), Some(2)], "{plan}");
}

#[test]
fn an_addition_that_nobody_needs_is_left_out() {
    let (mut g, [a, b, ..]) = small();
    let y = g.mul("y", a, b).unwrap();
    g.residual_add("dead", y, a).unwrap();
    assert_eq!(checked(g, &[y]).steps().len(), 1);
}

#[test]
fn states_swap_their_contents_through_a_buffer() {
    let (mut g, [_, _, s, t]) = small();
    g.store(s, t).unwrap();
    g.store(t, s).unwrap();
    let plan = checked(g, &[]);
    assert_eq!((plan.final_copies().len(), plan.buffers().len()), (3, 1), "{plan}");
}

#[test]
fn a_view_of_an_input_is_stored_by_one_copy() {
    let (mut g, [a, _, s, _]) = small();
    let view = g.reshape("view", a, [2, 4]).unwrap();
    let view = g.reshape("view", view, [8]).unwrap();
    g.store(view, s).unwrap();
    let plan = checked(g, &[]);
    assert_eq!((plan.final_copies().len(), plan.steps().len(), plan.buffers().len()), (1, 0, 0), "{plan}");
}

#[test]
fn an_optimiser_step_runs_in_place_even_if_its_parameters_are_outputs() {
    let (mut g, [grad, _, m, v]) = small();
    let param = g.param("param", [8]).unwrap();
    let hyper = g.input("hyper", TensorType::f32([8])).unwrap();
    let norm = g.l2_norm("norm", grad).unwrap();
    let new = g.adamw("step", [param, grad, m, v], hyper, norm, 8).unwrap();
    for (value, state) in new.into_iter().zip([param, m, v]) {
        g.store(value, state).unwrap();
    }
    let plan = checked(g, &[param, norm]);
    assert!(plan.final_copies().is_empty() && plan.steps().iter().all(|s| s.copies().is_empty()), "{plan}");
    assert_eq!(plan.buffer_bytes(), 16, "{plan}");
}

#[test]
fn a_tied_head_adds_to_the_gradient_of_the_table_in_place() {
    let mut g = Graph::new();
    let table = g.param("table", [63, 8]).unwrap();
    let ids = g.input("ids", TensorType::u32([2, 9])).unwrap();
    let x = g.embedding("x", table, ids).unwrap();
    let logits = g.matmul_nt("logits", x, table).unwrap();
    let loss = g.l2_norm("loss", logits).unwrap();
    let grads = g.gradients(loss, &[table]).unwrap();
    let plan = Plan::new(&g, &grads, &Profile::portable(AdapterClass::Gpu)).unwrap();
    let last = plan.steps().last().unwrap();
    assert_eq!(
        (last.op().name(), last.starts_as()[0], last.copies().len()),
        ("embedding_backward", Some(2), 0),
        "{plan}"
    );
    assert!(plan.steps().iter().all(|s| s.op().name() != "residual_add"), "{plan}");
}

#[test]
fn a_gradient_to_which_another_is_added_is_computed_where_their_sum_is_stored() {
    let mut g = Graph::new();
    let table = g.param("table", [64, 8]).unwrap();
    let ids = g.input("ids", TensorType::u32([2, 9])).unwrap();
    let x = g.embedding("x", table, ids).unwrap();
    let logits = g.matmul_nt("logits", x, table).unwrap();
    let loss = g.l2_norm("loss", logits).unwrap();
    let grads = g.gradients(loss, &[table]).unwrap();
    let state = g.state("state", TensorType::f32([64, 8])).unwrap();
    g.store(grads[0], state).unwrap();
    let plan = checked(g, &[loss]);
    let (slot, _) = plan.slot(state).unwrap();
    assert_eq!(plan.steps().iter().filter(|s| s.outputs()[0].0 == slot).count(), 2, "{plan}");
    assert!(plan.final_copies().is_empty(), "{plan}");
}

/// Not where the addition reads another state: both may be ranges of one buffer.
#[test]
fn a_gradient_is_not_computed_in_a_state_where_something_else_in_states_is_added_to_it() {
    for stored in [false, true] {
        let (mut g, [a, b, s, t]) = small();
        let first = g.softmax("first", a).unwrap();
        let second = g.softmax("second", b).unwrap();
        let sum = g.residual_add("sum", second, first).unwrap();
        if stored {
            g.store(first, s).unwrap();
        }
        g.store(sum, t).unwrap();
        let plan = checked(g, &[]);
        let second = plan.steps().iter().find(|s| s.name() == "second").unwrap();
        assert_eq!(matches!(second.outputs()[0].0, Slot::Buffer(_)), stored, "{plan}");
    }
}

#[test]
fn a_gradient_takes_the_place_of_logits_that_nobody_reads_afterwards() {
    let plan = |read: bool| {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([6, 8])).unwrap();
        let w = g.param("w", [8, 40]).unwrap();
        let targets = g.input("targets", TensorType::u32([6])).unwrap();
        let logits = g.matmul("logits", x, w).unwrap();
        let loss = g.cross_entropy("loss", logits, targets).unwrap();
        let grads = g.gradients(loss, &[w]).unwrap();
        let kept: Vec<Value> = grads.into_iter().chain(read.then_some(logits)).collect();
        checked(g, &kept)
    };
    let backward = |plan: &Plan| {
        let step = plan.steps().iter().find(|s| s.op().name() == "cross_entropy_backward").unwrap();
        (step.inputs()[0].0 == step.outputs()[0].0, step.copies().len())
    };
    assert_eq!(backward(&plan(false)), (true, 0));
    assert_eq!(backward(&plan(true)), (false, 1));
    assert_eq!(plan(true).buffer_bytes() - plan(false).buffer_bytes(), 4 * 6 * 40);
}

/// Steps of several ops: name, number of ops, number of outputs.
fn chains(plan: &Plan) -> Vec<(&str, usize, usize)> {
    let steps = plan.steps().iter().filter(|s| !s.parts().is_empty());
    steps.map(|s| (s.name(), s.parts().len(), s.outputs().len())).collect()
}

#[test]
fn elementwise_ops_become_one_kernel_forward_and_backward() {
    let (mut g, [a, b, s, _]) = small();
    let product = g.mul("product", a, b).unwrap();
    let shifted = g.sub("shifted", product, s).unwrap();
    let y = g.tanh("y", shifted).unwrap();
    let loss = g.l2_norm("loss", y).unwrap();
    let da = g.gradients(loss, &[a]).unwrap()[0];
    let plan = checked(g.clone(), &[loss, da]);
    // Nothing but these ops reads the product, so it is nowhere.
    assert_eq!(chains(&plan), [("y", 3, 1), ("product.grad.a", 2, 1)], "{plan}");
    assert!(plan.to_string().contains("by map.forward x1, with product, shifted\n"), "{plan}");
    // Something does, and gets it from the same kernel.
    let plan = checked(g.clone(), &[product, loss, da]);
    assert_eq!(chains(&plan), [("y", 3, 2), ("product.grad.a", 2, 1)], "{plan}");
    let unfused = Plan::unfused(&g, &[product, loss, da], &Profile::portable(AdapterClass::Gpu)).unwrap();
    assert_eq!(unfused.steps().len(), plan.steps().len() + 3, "{unfused}");

    // With nothing in between, both ways become one.
    let sum = g.sum("sum", y).unwrap();
    let da = g.gradients(sum, &[a]).unwrap()[0];
    let plan = checked(g, &[y, da]);
    assert_eq!(chains(&plan), [("product.grad.a#2", 6, 2)], "{plan}");
}

#[test]
fn chains_bind_no_more_than_the_device_allows() {
    let (mut g, [a, b, s, t]) = small();
    let mut y = a;
    for (i, x) in [b, s, t, b, s].into_iter().enumerate() {
        y = g.mul(&format!("y{i}"), y, x).unwrap();
    }
    for (max_storage_buffers, expected) in [(8, 1), (5, 1), (4, 3), (3, 5)] {
        let profile = Profile { max_storage_buffers, ..Profile::portable(AdapterClass::Gpu) };
        let plan = Plan::new(&g, &[y], &profile).unwrap();
        assert_eq!(plan.steps().len(), expected, "{plan}");
        let dispatches = plan.steps().iter().flat_map(|s| s.dispatches());
        assert!(dispatches.into_iter().all(|d| d.ranges().is_empty()), "{plan}");
    }
}

/// The gradients of a linear layer: those of its weight and of its bias in one dispatch, added to states in place.
#[test]
fn the_gradient_of_a_bias_comes_with_that_of_its_weight() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 32, 24])).unwrap();
    let w = g.param("w", [24, 20]).unwrap();
    let b = g.param("b", [20]).unwrap();
    let y = g.linear("y", x, w, Some(b)).unwrap();
    let loss = g.l2_norm("loss", y).unwrap();
    let grads = g.gradients(loss, &[w, b]).unwrap();
    let plan = |g: &Graph, outputs: &[Value], class| {
        let plan = Plan::new(g, outputs, &Profile::portable(class)).unwrap();
        let ops: Vec<&str> = plan.steps().iter().map(|s| s.op().name()).collect();
        let sums = ops.iter().filter(|op| **op == "sum").count();
        let additions = ops.iter().filter(|op| **op == "residual_add").count();
        let kernels = plan.steps().last().unwrap().dispatches().iter().map(|d| d.kernel().entry).collect::<Vec<_>>();
        (sums, additions, kernels, plan.final_copies().len())
    };
    assert_eq!(plan(&g, &grads, AdapterClass::Gpu), (0, 0, vec!["forward_tiled_sums_quads"], 0));
    assert_eq!(plan(&g, &grads, AdapterClass::Cpu).0, 1);
    // Another order of the two changes nothing.
    checked(g.clone(), &grads);
    checked(g.clone(), &[grads[1], grads[0]]);
    // Nor does it if something reads the sums.
    let early = g.scale("early", grads[1], 2.0).unwrap();
    checked(g.clone(), &[early, grads[0]]);
    for gradient in [grads[0], grads[1]] {
        let ty = g.ty(gradient).clone();
        let state = g.state(&format!("{} state", g.name(gradient)), ty).unwrap();
        let sum = g.residual_add(&format!("{} sum", g.name(gradient)), state, gradient).unwrap();
        g.store(sum, state).unwrap();
    }
    assert_eq!(plan(&g, &[], AdapterClass::Gpu), (0, 0, vec!["forward_tiled_sums_quads"], 0));
    checked(g, &[]);
}

/// The workgroups of each product's dispatch, with its name.
fn products(plan: &Plan) -> Vec<(String, u32)> {
    let products = plan.steps().iter().flat_map(|s| s.dispatches().iter().map(move |d| (s, d)));
    let products = products.filter(|(_, d)| d.kernel().label == "matmul" && d.kernel().entry.starts_with("forward"));
    products.map(|(s, d)| (s.name().to_string(), d.workgroups().iter().product())).collect()
}

/// A card of 80 units, whose bindings may be large.
fn card() -> Profile {
    let profile = Profile::portable(AdapterClass::Gpu);
    assert_eq!(profile.units, 80);
    Profile { max_binding_bytes: 4 << 30, max_buffer_bytes: 4 << 30, ..profile }
}

#[test]
fn products_of_training_fill_a_card() {
    let gpt2 = TransformerConfig::gpt2(50257, 1024, 12, 768, 12);
    let small = TransformerConfig::gpt2(65, 256, 6, 384, 6);
    for (config, batch) in [(gpt2.clone(), 1), (gpt2, 8), (small, 64)] {
        let config = TrainConfig { schedule: Schedule::constant(1e-3), ..TrainConfig::new(config, batch) };
        let plan = TrainPlan::new(&config, &TrainOptions::default(), &card()).unwrap();
        let [step, ..] = plan.plans();
        for (name, groups) in products(step) {
            assert!(groups >= 160, "{name} has {groups} workgroups with a batch of {batch}");
        }
        // None is longer than a tenth of a second, if the card does 5% of 20 TFLOP/s.
        let (longest, flops) = step.largest_dispatch().unwrap();
        assert!(flops <= 160_000_000_000, "{} has {flops}", longest.name());
        // Three of each layer run twice, and there are nine for each chunk of logits.
        let logits = 4 * batch * config.model.context * config.model.vocab_size;
        let chunks = if logits > LOGIT_BYTES { logits.div_ceil(LOGIT_BYTES) } else { 0 };
        assert!(step.dispatches() <= 410 + 9 * chunks, "{} dispatches with a batch of {batch}", step.dispatches());
        let columns = step.steps().iter().flat_map(|s| s.dispatches()).filter(|d| d.kernel().label == "sum");
        assert!(columns.count() <= 60);
        // No bias has a sum of its own.
        let sums: Vec<&str> = step.steps().iter().filter(|s| s.op().name() == "sum").map(|s| s.name()).collect();
        assert!(sums.iter().all(|name| !name.ends_with(".bias")), "{sums:?}");
    }
}

/// In mixed precision, on a card opened with cooperative matrices, with subgroups of one size or of several.
#[test]
fn products_of_training_are_of_matrices_where_a_card_has_them() {
    let config = TransformerConfig::gpt2(50257, 1024, 12, 768, 12);
    let schedule = Schedule::constant(1e-3);
    let config = TrainConfig { schedule, precision: Precision::MIXED, ..TrainConfig::new(config, 8) };
    for (kind, sizes) in [
        (Cooperative::F16, [32, 32]),
        (Cooperative::F16, [32, 64]),
        (Cooperative::F16x8, [32, 32]),
        (Cooperative::F32, [32, 32]),
    ] {
        let profile = Profile { subgroups: Some(sizes), cooperative: Some(kind), ..card() };
        let plan = TrainPlan::new(&config, &TrainOptions::default(), &profile).unwrap();
        let dispatches = plan.plans()[0].steps().iter().flat_map(|s| s.dispatches().iter().map(move |d| (s.name(), d)));
        let is_product = |kernel: &Kernel| kernel.label == "matmul" && kernel.entry.starts_with("forward");
        for (name, dispatch) in dispatches.filter(|(_, d)| is_product(d.kernel())) {
            let kernel = dispatch.kernel();
            assert!(kernel.entry.starts_with("forward_cooperative"), "{name}: {}", kernel.describe());
            // WebGPU's, which the profile has.
            assert!(kernel.workgroup_bytes().unwrap() <= 16 << 10, "{name}: {}", kernel.describe());
            let knob = |name: &str| {
                let value = kernel.knobs.iter().find(|(knob, _)| *knob == name).map(|(_, value)| value.as_str());
                value.and_then(|value| value.strip_suffix('u')?.parse::<u32>().ok()).unwrap()
            };
            let subgroups = knob("SUBGROUPS_M") * knob("SUBGROUPS_N");
            assert!(subgroups == 1 || sizes[0] == sizes[1], "{name}: {}", kernel.describe());
            assert_eq!(knob("COOPERATING"), sizes[1]);
            let groups: u32 = dispatch.workgroups().iter().product();
            assert!(groups * subgroups >= 160, "{name} has {groups} workgroups of {subgroups} subgroups");
        }
    }
}

/// Backward reads the results of activations and norms again: of each layer 4096 and twice 1024 values per token.
#[test]
fn recomputing_takes_less_memory() {
    let medium = TransformerConfig::gpt2(50257, 1024, 24, 1024, 16);
    let config = TrainConfig { schedule: Schedule::constant(1e-3), ..TrainConfig::new(medium, 1) };
    let [kept, again] = [false, true].map(|recompute| {
        let options = TrainOptions { recompute, ..TrainOptions::default() };
        TrainPlan::new(&config, &options, &card()).unwrap()
    });
    let [of_kept, of_again] = [&kept, &again].map(|plan| plan.plans()[0]);
    // An activation and two norms of each layer. The head reads the result of the last norm soon after it is made.
    assert_eq!([of_kept, of_again].map(|plan| plan.recomputed().nodes.len()), [0, 3 * 24]);
    assert!((1.0..1.01).contains(&again.recomputed().slowdown), "{}", again.recomputed());
    assert_eq!(of_again.dispatches(), of_kept.dispatches() + 3 * 24);
    assert!(again.bytes() <= 7_000_000_000, "{}", again.bytes());
    let saved = kept.bytes() - again.bytes();
    assert!(saved > 24 * 4 * 1024 * (4096 + 2 * 1024) * 9 / 10, "{saved}");
    assert!(format!("{of_again}").contains("72 nodes are computed twice"));
    assert!(of_again.steps().iter().any(|step| step.name() == "h.3.mlp.gelu.again"));
}

#[test]
fn products_of_few_rows_fill_a_card() {
    // (k, n) of the products of a SmolLM2-135M: o, k and v, up, down, and the tied head.
    for (k, n, tied) in
        [(576, 576, false), (576, 192, false), (576, 1536, false), (1536, 576, false), (576, 49152, true)]
    {
        for rows in 1..=4 {
            let mut g = Graph::new();
            let x = g.input("x", TensorType::f32([rows, k])).unwrap();
            let w = g.param("w", if tied { [n, k] } else { [k, n] }).unwrap();
            let y = if tied { g.matmul_nt("y", x, w) } else { g.matmul("y", x, w) }.unwrap();
            let plan = Plan::new(&g, &[y], &card()).unwrap();
            assert_eq!(plan.dispatches(), 1, "{plan}");
            assert!(products(&plan).iter().all(|(_, groups)| *groups >= 160), "{plan}");
        }
    }
}

#[test]
fn long_products_are_cut() {
    let product = |units, batch: &[usize], m, n, k| {
        let mut g = Graph::new();
        let shape = |rows, cols| TensorType::f32([batch, &[rows, cols]].concat());
        let a = g.input("a", shape(m, k)).unwrap();
        let b = g.input("b", shape(k, n)).unwrap();
        let y = g.matmul("y", a, b).unwrap();
        let groups = products(&Plan::new(&g, &[y], &Profile { units, ..card() }).unwrap());
        (groups.len(), groups.iter().map(|(_, groups)| groups).sum::<u32>())
    };
    assert_eq!(product(80, &[], 4096, 4096, 4096), (1, 1024)); // 137 GFLOP
    assert_eq!(product(16, &[], 4096, 4096, 4096), (5, 1024)); // on a small one, 32 at most
    assert_eq!(product(80, &[], 8192, 50257, 768), (4, 64 * 393));
    assert_eq!(product(16, &[64], 1024, 128, 4096), (3, 64 * 8)); // between matrices, too
}

/// A layer of a decoder without its attention, for so many rows.
struct Layer {
    g: Graph,
    normed: Value,
    q: Value,
    /// q, k, v and the stream after it.
    outputs: Vec<Value>,
}

fn layer(rows: usize) -> Layer {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([rows, 16])).unwrap();
    let gamma = g.param("gamma", [16]).unwrap();
    let weight = |g: &mut Graph, name: &str, n: usize| g.param(name, [16, n]).unwrap();
    let normed = g.rmsnorm("norm", x, gamma, 1e-5).unwrap();
    let [q, k, v] = [("q", 16), ("k", 8), ("v", 8)].map(|(name, n)| {
        let w = weight(&mut g, &format!("w_{name}"), n);
        g.matmul(name, normed, w).unwrap()
    });
    let middle = g.rmsnorm("mlp_norm", x, gamma, 1e-5).unwrap();
    let [gate, up] = ["gate", "up"].map(|name| {
        let w = weight(&mut g, &format!("w_{name}"), 32);
        g.matmul(name, middle, w).unwrap()
    });
    let gated = g.swiglu("gated", gate, up).unwrap();
    let down = g.param("w_down", [32, 16]).unwrap();
    let branch = g.matmul("down", gated, down).unwrap();
    let stream = g.residual_add("stream", x, branch).unwrap();
    Layer { g, normed, q, outputs: vec![q, k, v, stream] }
}

fn step_names(plan: &Plan) -> Vec<Vec<&str>> {
    plan.steps().iter().map(|s| s.others().into_iter().chain([s.name()]).collect()).collect()
}

#[test]
fn products_of_few_rows_become_one_dispatch_with_the_norm_before_them() {
    let Layer { g, normed, q, outputs } = layer(2);
    let plan = checked(g.clone(), &outputs);
    let expected: [&[&str]; 3] = [&["norm", "q", "k", "v"], &["mlp_norm", "gate", "up", "gated"], &["stream"]];
    assert_eq!(step_names(&plan), expected, "{plan}");
    assert_eq!(plan.dispatches(), 3, "{plan}");

    // A norm that something else reads is stored; what is read of the products is, anyway.
    let plan = checked(g.clone(), &[&outputs[..], &[normed]].concat());
    assert_eq!(step_names(&plan)[..2], [vec!["norm"], vec!["q", "k", "v"]], "{plan}");
    let mut tapped = g.clone();
    let twice = tapped.scale("twice", q, 2.0).unwrap();
    let plan = checked(tapped, &[&outputs[..], &[twice]].concat());
    assert_eq!(step_names(&plan)[0], ["norm", "q", "k", "v"], "{plan}");
    assert_eq!(*step_names(&plan).last().unwrap(), ["twice"], "{plan}");

    // Where a device binds fewer buffers, fewer products: x, gamma, two weights, two results.
    let few = Profile { max_storage_buffers: 6, ..Profile::portable(AdapterClass::Gpu) };
    let plan = Plan::new(&g, &outputs, &few).unwrap();
    assert!(plan.steps().iter().all(|s| s.dispatches().iter().all(|d| d.ranges().is_empty())), "{plan}");
    assert!(plan.steps().len() < Plan::unfused(&g, &outputs, &few).unwrap().steps().len(), "{plan}");

    // Many rows have tiles, and software adapters no gaps between dispatches.
    let many = layer(5);
    let plan = Plan::new(&many.g, &many.outputs, &Profile::portable(AdapterClass::Gpu)).unwrap();
    assert!(plan.steps().iter().all(|s| s.op().name() != "products"), "{plan}");
    let plan = Plan::new(&g, &outputs, &Profile::portable(AdapterClass::Cpu)).unwrap();
    assert!(plan.steps().iter().all(|s| s.op().name() != "products"), "{plan}");
}

/// What a matmul adds in its epilogue stays there, and in place: no chain reads the stream later.
#[test]
fn chains_leave_the_stream_in_place() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([8, 8])).unwrap();
    let w = g.param("w", [8, 8]).unwrap();
    let mut stream = g.tanh("start", x).unwrap();
    for i in 0..2 {
        let gate = g.sigmoid(&format!("{i}.gate"), stream).unwrap();
        let branch = g.matmul(&format!("{i}.branch"), stream, w).unwrap();
        stream = g.residual_add(&format!("{i}.add"), stream, branch).unwrap();
        let gated = g.mul(&format!("{i}.gated"), gate, branch).unwrap();
        let half = g.scale(&format!("{i}.half"), gated, 0.5).unwrap();
        let up = g.matmul(&format!("{i}.up"), half, w).unwrap();
        stream = g.residual_add(&format!("{i}.sum"), stream, up).unwrap();
    }
    let plan = checked(g.clone(), &[stream]);
    let unfused = Plan::unfused(&g, &[stream], &Profile::portable(AdapterClass::Gpu)).unwrap();
    let copies = |plan: &Plan| plan.steps().iter().map(|s| s.copies().len()).sum::<usize>();
    assert_eq!(copies(&plan), copies(&unfused), "{plan}\n{unfused}");
    let names: Vec<&str> = chains(&plan).iter().map(|chain| chain.0).collect();
    assert_eq!(names, ["0.gate", "0.half", "1.half"], "{plan}");
}

/// Before a token's attention: the turns of q and k and the writes to both caches.
#[test]
fn ropes_and_cache_writes_are_one_dispatch_on_gpus() {
    let mut g = Graph::new();
    let [q, k, v] = ["q", "k", "v"].map(|name| g.input(name, TensorType::f32([2, 1, 24])).unwrap());
    let start = g.input("start", TensorType::u32([2])).unwrap();
    let rope = Rope { heads: 2, ..Rope::default() };
    let q = g.rope_from("q_rope", q, start, rope).unwrap();
    let k_rope = g.rope_from("k_rope", k, start, rope).unwrap();
    let states = ["keys", "values"].map(|name| g.state(name, TensorType::f32([2, 9, 24])).unwrap());
    let keys = g.cache_write("keys.write", k_rope, start, states[0]).unwrap();
    let values = g.cache_write("values.write", v, start, states[1]).unwrap();
    let op = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
    let o = g.attention_cached("o", q, [keys, values], start, op).unwrap();
    g.store(keys, states[0]).unwrap();
    g.store(values, states[1]).unwrap();

    let gpu = Profile::portable(AdapterClass::Gpu);
    let plan = |kept: &[Value], profile: &Profile| {
        let built = Built { graph: g.clone(), kept: kept.to_vec() };
        check(&built, profile).unwrap();
        Plan::new(&g, kept, profile).unwrap()
    };
    let names = |plan: &Plan| -> Vec<(String, usize)> {
        plan.steps().iter().map(|s| (s.name().to_string(), s.parts().len())).collect()
    };
    let together = plan(&[o], &gpu);
    assert_eq!(names(&together), [("values.write".into(), 4), ("o".into(), 0)], "{together}");
    assert_eq!(together.steps()[0].others(), ["q_rope", "k_rope", "keys.write"]);
    assert!(together.steps()[0].copies().is_empty() && together.final_copies().is_empty(), "{together}");
    assert_eq!(together.steps()[0].dispatches().len(), 1);
    // The turned keys are an output, too: then they are written out, and copied to the cache.
    let kept = plan(&[o, k_rope], &gpu);
    assert_eq!(
        names(&kept),
        [("k_rope", 2), ("values.write", 2), ("o", 0)].map(|(n, parts)| (n.into(), parts)),
        "{kept}"
    );
    // A device that binds less computes fewer together.
    let few = plan(&[o], &Profile { max_storage_buffers: 5, ..gpu.clone() });
    assert_eq!(names(&few)[..2], [("keys.write".into(), 3), ("values.write".into(), 0)], "{few}");
    assert!(few.steps()[0].dispatches()[0].ranges().is_empty(), "{few}");
    for profile in [gpu, Profile::portable(AdapterClass::Cpu)] {
        let unfused = Plan::unfused(&g, &[o], &profile).unwrap();
        assert_eq!(unfused.steps().len(), 5, "{unfused}");
    }
    assert_eq!(plan(&[o], &Profile::portable(AdapterClass::Cpu)).steps().len(), 5);
}

/// Gradients that one dispatch makes go to their states without a copy, also where those may be ranges of one arena.
#[test]
fn a_kernel_writes_several_states() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64, 8])).unwrap();
    let [gamma, beta] = ["gamma", "beta"].map(|name| g.param(name, [8]).unwrap());
    let y = g.layernorm("y", x, gamma, beta, 1e-5).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let gradients = g.gradients(loss, &[gamma, beta]).unwrap();
    for (name, gradient) in ["dgamma", "dbeta"].into_iter().zip(gradients) {
        let state = g.state(name, TensorType::f32([8])).unwrap();
        g.store(gradient, state).unwrap();
    }
    let plan = Plan::new(&g, &[loss], &Profile::portable(AdapterClass::Gpu)).unwrap();
    let backward = plan.steps().iter().find(|s| s.name() == "y.grad").unwrap();
    let sums = backward.dispatches().last().unwrap();
    let written = sums.binds().iter().flatten().filter(|b| b.writes && matches!(b.slot, Slot::External(_)));
    assert_eq!((backward.dispatches().len(), written.count()), (2, 2), "{plan}");
    assert!(plan.final_copies().is_empty(), "{plan}");
}

fn check(built: &Built, profile: &Profile) -> Result<(), TestCaseError> {
    let Built { graph, kept } = built;
    let plan = Plan::new(graph, kept, profile).map_err(|e| TestCaseError::fail(format!("{e}\n{graph}")))?;
    let mut replay = Replay { terms: Terms::default(), held: HashMap::new(), plan: &plan };
    replay
        .run(graph, kept)
        .map_err(|e| TestCaseError::fail(format!("{e}\n{graph}\nstores {:?}\n{plan}", graph.stores())))
}

/// What a tensor holds, as an expression. Equal expressions have equal numbers.
type Term = usize;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// What an input, parameter or state holds before the step.
    External(String),
    /// Output of an op on these.
    Op(&'static str, Vec<TensorType>, usize, Vec<Term>),
    /// A sum, the smaller term first.
    Sum(Term, Term),
    /// Scratch, or what a buffer holds at first: equal to nothing.
    Garbage(usize),
}

#[derive(Default)]
struct Terms {
    numbers: HashMap<Key, Term>,
}

impl Terms {
    fn of(&mut self, key: Key) -> Term {
        let next = self.numbers.len();
        *self.numbers.entry(key).or_insert(next)
    }

    fn garbage(&mut self) -> Term {
        let next = self.numbers.len();
        self.of(Key::Garbage(next))
    }

    /// The outputs of an op. Where one starts as a base, as fusion makes them, it is a sum.
    fn outputs(
        &mut self,
        op: &'static str,
        inputs: &[Term],
        types: &[TensorType],
        starts_as: impl Fn(usize) -> Option<usize>,
    ) -> Vec<Term> {
        if op == "residual_add" {
            return vec![self.sum(inputs[0], inputs[1])];
        }
        let plain = inputs_without_bases(op).unwrap_or(inputs.len());
        let output = |i: usize| {
            // On GPUs a product takes over the column sums of its second input.
            let key = match (op, i) {
                ("matmul", 0) => Key::Op(op, types[..1].to_vec(), 0, inputs[..plain].to_vec()),
                ("matmul", _) => Key::Op("sum", types[i..].to_vec(), 0, vec![inputs[1]]),
                _ => Key::Op(op, types.to_vec(), i, inputs[..plain].to_vec()),
            };
            let term = self.of(key);
            match starts_as(i) {
                Some(base) if base >= plain => self.sum(term, inputs[base]),
                _ => term,
            }
        };
        (0..types.len()).map(output).collect()
    }

    fn sum(&mut self, a: Term, b: Term) -> Term {
        self.of(Key::Sum(a.min(b), a.max(b)))
    }

    fn name(&self, term: Term) -> String {
        match self.numbers.iter().find(|(_, n)| **n == term).unwrap().0 {
            Key::External(name) => name.clone(),
            Key::Op(op, _, i, inputs) => {
                format!("{op}:{i}({})", inputs.iter().map(|t| self.name(*t)).collect::<Vec<_>>().join(", "))
            }
            Key::Sum(a, b) => format!("({} + {})", self.name(*a), self.name(*b)),
            Key::Garbage(_) => "garbage".into(),
        }
    }
}

/// Number of inputs without bases, for ops that fusion gives some.
fn inputs_without_bases(op: &str) -> Option<usize> {
    Some(match op {
        "matmul" | "pair" | "embedding_backward" => 2,
        "sum" | "slice_pad" | "scale" => 1,
        "layernorm_backward" => 4,
        _ => return None,
    })
}

/// The term of every output of every node.
#[derive(Default)]
struct Values(Vec<Vec<Term>>);

impl Values {
    fn of(&self, value: Value) -> Term {
        self.0[value.node()][value.output()]
    }
}

struct Replay<'a> {
    terms: Terms,
    held: HashMap<Slot, Term>,
    plan: &'a Plan,
}

macro_rules! ensure {
    ($cond:expr, $($arg:tt)+) => {
        if !$cond {
            return Err(format!($($arg)+));
        }
    };
}

impl Replay<'_> {
    fn run(&mut self, graph: &Graph, kept: &[Value]) -> Result<(), String> {
        let values = self.graph_terms(graph);
        for (i, e) in self.plan.externals().iter().enumerate() {
            let term = self.terms.of(Key::External(e.name.clone()));
            self.held.insert(Slot::External(i), term);
        }
        for step in self.plan.steps() {
            self.step(step).map_err(|e| format!("step {}: {e}", step.name()))?;
        }
        self.plan.final_copies().iter().try_for_each(|c| self.copy(c))?;
        let stored: HashMap<Value, Value> = graph.stores().iter().map(|&(v, s)| (s, v)).collect();
        for (i, e) in self.plan.externals().iter().enumerate() {
            let want = values.of(*stored.get(&e.value).unwrap_or(&e.value));
            self.expect(Slot::External(i), want, &e.name)?;
            ensure!(e.written == stored.contains_key(&e.value), "`{}` is wrongly marked as written or not", e.name);
        }
        for v in kept {
            // A kept state is read as the step leaves it; any other value as the graph computes it.
            let want = values.of(*stored.get(v).unwrap_or(v));
            let (slot, ty) = self.plan.slot(*v).ok_or("a kept value has no slot")?;
            ensure!(ty == graph.ty(*v), "a kept value has the wrong type");
            self.expect(slot, want, graph.name(*v))?;
        }
        Ok(())
    }

    /// What every value of the graph is.
    fn graph_terms(&mut self, graph: &Graph) -> Values {
        let mut values = Values::default();
        for node in graph.nodes() {
            let inputs: Vec<Term> = node.inputs.iter().map(|v| values.of(*v)).collect();
            let outputs = match &node.source {
                Source::Op(op) if op.is_view() => inputs.clone(),
                Source::Op(op) => self.terms.outputs(op.name(), &inputs, &node.outputs, |_| None),
                _ => vec![self.terms.of(Key::External(node.name.clone()))],
            };
            values.0.push(outputs);
        }
        values
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        let slots: Vec<Slot> = step.inputs().iter().map(|i| i.0).collect();
        let inputs: Vec<Term> = slots.iter().map(|s| self.read(*s)).collect();
        let outputs: Vec<Slot> = step.outputs().iter().map(|o| o.0).collect();
        ensure!(outputs.iter().collect::<HashSet<_>>().len() == outputs.len(), "two outputs share a buffer");
        step.copies().iter().try_for_each(|c| self.copy(c))?;
        for (output, start) in step.starts_as().iter().enumerate() {
            if let Some(input) = start {
                self.expect(outputs[output], inputs[*input], "the start of an output")?;
            }
        }
        for (output, slot) in outputs.iter().enumerate() {
            for (i, input) in slots.iter().enumerate() {
                ensure!(
                    slot != input || step.starts_as()[output] == Some(i),
                    "output {output} is in the buffer of input {i}"
                );
            }
        }
        let mut scratch = HashSet::new();
        // What holds something that must not be lost.
        let mut full: HashSet<Slot> = slots.iter().copied().collect();
        full.extend((0..outputs.len()).filter(|&i| step.starts_as()[i].is_some()).map(|i| outputs[i]));
        for d in step.dispatches() {
            let binds = self.unmerged(d, &full)?;
            for &(slot, bytes, writes) in &binds {
                ensure!(bytes <= self.bytes(slot), "{slot:?} is too small");
                if writes && !outputs.contains(&slot) {
                    ensure!(matches!(slot, Slot::Buffer(_)) && !slots.contains(&slot), "scratch in {slot:?}");
                    scratch.insert(slot);
                    let garbage = self.terms.garbage();
                    self.held.insert(slot, garbage);
                }
                let known = [&slots[..], &outputs[..]].concat().contains(&slot) || scratch.contains(&slot);
                ensure!(known, "reads {slot:?}, which is none of its inputs");
            }
            full.extend(binds.iter().filter(|b| b.2).map(|b| b.0));
        }
        let types: Vec<TensorType> = step.outputs().iter().map(|o| o.1.clone()).collect();
        let results = match step.parts() {
            [] => self.terms.outputs(step.op().name(), &inputs, &types, |i| step.starts_as()[i]),
            parts => {
                let results = self.parts(parts, step.inputs(), &inputs)?;
                (0..types.len()).map(|output| results[step.op().made_by(output).unwrap()]).collect()
            }
        };
        self.held.extend(outputs.into_iter().zip(results));
        Ok(())
    }

    /// What each of several ops in one kernel makes of the inputs of them all.
    fn parts(&mut self, parts: &[Part], slots: &[(Slot, TensorType)], inputs: &[Term]) -> Result<Vec<Term>, String> {
        let mut results: Vec<(Term, TensorType)> = vec![];
        for Part { op, operands, .. } in parts {
            let operand = |operand: &Operand| match *operand {
                Operand::Input(i) => (inputs[i], slots[i].1.clone()),
                Operand::Part(i) => results[i].clone(),
            };
            let (terms, types): (Vec<Term>, Vec<TensorType>) = operands.iter().map(operand).unzip();
            let types = op.infer(&types)?;
            let outputs = self.terms.outputs(op.name(), &terms, &types, |output| op.starts_as(output));
            results.push((outputs[0], types[0].clone()));
        }
        Ok(results.into_iter().map(|(term, _)| term).collect())
    }

    /// A dispatch's bindings as they were before some were merged, whose buffer then holds garbage.
    fn unmerged(&mut self, d: &PlannedDispatch, full: &HashSet<Slot>) -> Result<Vec<(Slot, usize, bool)>, String> {
        // Slot, buffer, range in it, whether it is written.
        let copied_in = d.copies_in().iter().map(|c| (c.from, c.to, c.to_offset, c.bytes, c.from_offset));
        let copied_out = d.copies_out().iter().map(|c| (c.to, c.from, c.from_offset, c.bytes, c.to_offset));
        let mut parts: Vec<_> = copied_in.clone().chain(copied_out.clone()).collect();
        parts.sort_by_key(|p| (p.1, p.2, p.0));
        parts.dedup();
        let buffers: HashSet<Slot> = parts.iter().map(|p| p.1).collect();
        let mut binds: Vec<_> = d.binds().iter().flatten().map(|b| (b.slot, b.bytes, b.writes)).collect();
        for &buffer in &buffers {
            ensure!(matches!(buffer, Slot::Buffer(_)), "bindings are merged in {buffer:?}");
            ensure!(binds.iter().filter(|b| b.0 == buffer).count() == 1, "{buffer:?} is not bound once");
            let garbage = self.terms.garbage();
            self.held.insert(buffer, garbage);
        }
        for pair in parts.windows(2) {
            ensure!(pair[0].1 != pair[1].1 || pair[0].2 + pair[0].3 <= pair[1].2, "parts overlap: {pair:?}");
        }
        for part @ &(slot, buffer, at, bytes, offset) in &parts {
            ensure!(offset == 0 && at % 256 == 0 && at + bytes <= self.bytes(buffer), "an odd part: {part:?}");
            ensure!(!buffers.contains(&slot), "{slot:?} is bound and copied to");
            let [taken, given] = [copied_in.clone().any(|p| p == *part), copied_out.clone().any(|p| p == *part)];
            ensure!(taken || !full.contains(&slot), "what {slot:?} holds is lost");
            let group = binds.iter().find(|b| b.0 == buffer);
            ensure!(group.is_some_and(|b| at + bytes <= b.1 && (b.2 || !given)), "{part:?} is not bound");
            binds.push((slot, bytes, given));
        }
        ensure!(d.ranges().len() == 2 * parts.len(), "{} parts and {:?}", parts.len(), d.ranges());
        binds.retain(|b| !buffers.contains(&b.0));
        Ok(binds)
    }

    fn copy(&mut self, copy: &BufferCopy) -> Result<(), String> {
        ensure!(copy.from != copy.to, "a copy from {:?} to itself", copy.from);
        ensure!(copy.bytes <= self.bytes(copy.from).min(self.bytes(copy.to)), "{copy:?} is too long");
        let term = self.read(copy.from);
        self.held.insert(copy.to, term);
        Ok(())
    }

    fn read(&mut self, slot: Slot) -> Term {
        let Replay { held, terms, .. } = self;
        *held.entry(slot).or_insert_with(|| terms.garbage())
    }

    fn bytes(&self, slot: Slot) -> usize {
        match slot {
            Slot::Buffer(i) => self.plan.buffers()[i].bytes,
            Slot::External(i) => self.plan.externals()[i].ty.storage_bytes(),
        }
    }

    fn expect(&mut self, slot: Slot, want: Term, what: &str) -> Result<(), String> {
        let got = self.read(slot);
        let (got_name, want_name) = (self.terms.name(got), self.terms.name(want));
        ensure!(got == want, "{what} in {slot:?} should be {want_name}, but is {got_name}");
        Ok(())
    }
}
