//! The executor on random graphs: outputs, gradients and stored states equal those of the f64
//! reference, on both classes of kernels, step after step.

mod common;
#[path = "common/graphs.rs"]
mod graphs;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles, read, write};
use graphs::{Built, recipes};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use throughline::check::Guarded;
use throughline::graph::Source;
use throughline::ops::map::Map;
use throughline::ops::random_array;
use throughline::ops::rope::Rope;
use throughline::ops::stats::Stats;
use throughline::reference::{self, Array, nmse};
use throughline::rng::Rng;
use throughline::{DType, ExecOptions, Executable, Graph, Plan, Profile, Result, Tensor, TensorType, Value};

const GRAPHS: u64 = 40;

#[test]
fn outputs_gradients_and_states_equal_the_reference() {
    // Always the same graphs, so that a failure is one for everybody.
    let mut runner = TestRunner::deterministic();
    let mut failures = vec![];
    for seed in 0..GRAPHS {
        let built = recipes().new_tree(&mut runner).unwrap().current().build().unwrap();
        // And as on a device on which most of these have bindings merged.
        let few = Profile { max_storage_buffers: 3, ..profiles().swap_remove(0) };
        for profile in profiles().into_iter().chain((seed % 4 == 0).then_some(few)) {
            let differences = differences(&built, &profile, seed);
            if !differences.is_empty() {
                failures.push(format!(
                    "graph {seed}, {:?}: {}\n{}",
                    profile.class,
                    differences.join("; "),
                    built.graph
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), 2 * GRAPHS, failures.join("\n"));
}

/// Graphs of nothing but elementwise ops, whose operands repeat in all ways, with their gradients and a probe inside.
#[test]
fn chains_equal_the_reference() {
    let (mut failures, mut parts, mut steps) = (vec![], 0, 0);
    for seed in 0..GRAPHS / 2 {
        let built = elementwise(seed).unwrap();
        for (i, profile) in profiles().into_iter().enumerate() {
            let max_storage_buffers =
                if (seed as usize + i).is_multiple_of(2) { 4 } else { profile.max_storage_buffers };
            let profile = Profile { max_storage_buffers, ..profile };
            let plan = Plan::new(&built.graph, &built.kept, &profile).unwrap();
            let chains = plan.steps().iter().filter(|s| !s.parts().is_empty());
            (parts, steps) = chains.fold((parts, steps), |(parts, steps), s| (parts + s.parts().len(), steps + 1));
            let differences = differences(&built, &profile, seed);
            if !differences.is_empty() {
                failures.push(format!("graph {seed}: {}\n{}{plan}", differences.join("; "), built.graph));
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    assert!(2 * parts > 5 * steps, "{parts} ops in {steps} chains");
}

fn elementwise(seed: u64) -> Result<Built> {
    let mut rng = Rng::new(&[seed, 7]);
    let mut g = Graph::new();
    let full = [3, 4, 8];
    let shapes: [&[usize]; 7] = [&full, &full, &[8], &[4, 1], &[3, 1, 1], &[1], &[3, 1, 8]];
    let inputs: Vec<Value> =
        (0..7).map(|i| g.input(&format!("x{i}"), TensorType::f32(shapes[i]))).collect::<Result<_>>()?;
    let board = g.input("board", TensorType::f32([8, 8]))?;
    let snake = Map::new("snake", ["x"], "x + 0.5 * sin(x) * sin(x)", |[x]| x + 0.5 * x.sin().powi(2))
        .gradient("dy * (1.0 + sin(x) * cos(x))", |[x], _, dy| dy * (1.0 + x.sin() * x.cos()));
    // Each with its degree as a polynomial of the inputs, so that numbers stay in range.
    let mut values: Vec<(Value, u32)> = inputs.iter().map(|&v| (v, 1)).collect();
    for _ in 0..16 {
        let mut late = || values[values.len() - 1 - (values.len() as f64 * rng.uniform().powi(2)) as usize];
        let ((a, da), (b, db)) = (late(), late());
        let most = da.max(db);
        let new = match rng.below(11) {
            0 => (g.tanh("tanh", a)?, 1),
            1 => (g.sigmoid("sigmoid", a)?, 1),
            2 => (g.silu("silu", a)?, da),
            3 => (g.scale("scale", a, -0.75)?, da),
            4 => (g.map("snake", &snake, &[a])?, da),
            5 => (g.add("add", a, b)?, most),
            6 => (g.sub("sub", a, b)?, most),
            7 => (g.max("max", a, b)?, most),
            8 => (g.broadcast("broadcast", inputs[2], full)?, 1),
            9 if g.ty(a) == g.ty(b) => (g.residual_add("residual_add", a, b)?, most),
            _ => (g.mul("mul", a, b)?, da + db),
        };
        values.extend((new.1 <= 4).then_some(new));
    }
    let pick = |n: u64| values[7 + n as usize % (values.len() - 7)].0;
    let mut kept = vec![pick(rng.next_u64() >> 32), values[values.len() - 1].0];
    let loss = g.mean("loss", kept[1])?;
    let mut needed = vec![loss];
    for node in (0..=loss.node()).rev() {
        if needed.iter().any(|v| v.node() == node) {
            needed.extend(g.nodes()[node].inputs.clone());
        }
    }
    let wrt: Vec<Value> = inputs.into_iter().filter(|v| needed.contains(v)).collect();
    kept.extend(g.gradients(loss, &wrt)?);
    kept.push(loss);
    let looked_at = pick(rng.next_u64() >> 32);
    kept.push(g.op1("look", Stats { pair: false, row: 0 }, &[looked_at, board])?);
    Ok(Built { graph: g, kept })
}

/// Graphs of what a decoder does for a few rows, in an order that no model has: norms and products of one input,
/// functions of products, ropes and cache writes, and probes and outputs among them.
#[test]
fn few_rows_equal_the_reference() {
    let (mut failures, mut joined) = (vec![], 0);
    for seed in 0..GRAPHS {
        let built = few_rows(seed).unwrap();
        for profile in profiles() {
            let max_storage_buffers = [4, 8, profile.max_storage_buffers][(seed % 3) as usize];
            let profile = Profile { max_storage_buffers, ..profile };
            let plan = match Plan::new(&built.graph, &built.kept, &profile) {
                Ok(plan) => plan,
                Err(e) => {
                    failures.push(format!("graph {seed}: {e}\n{}", built.graph));
                    continue;
                }
            };
            joined += plan.steps().iter().filter(|s| ["products", "together"].contains(&s.op().name())).count();
            let differences = differences(&built, &profile, seed);
            if !differences.is_empty() {
                failures.push(format!("graph {seed}: {}\n{}{plan}", differences.join("; "), built.graph));
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    assert!(joined > GRAPHS as usize, "only {joined} dispatches do the work of several");
}

fn few_rows(seed: u64) -> Result<Built> {
    const D: usize = 16;
    let mut rng = Rng::new(&[seed, 11]);
    let [batch, time, capacity] = [[1, 1, 5], [1, 3, 4], [2, 2, 3]][(seed % 3) as usize];
    let mut g = Graph::new();
    let ty = TensorType::f32([batch, time, D]);
    let mut values = vec![g.input("x0", ty.clone())?, g.input("x1", ty.clone())?, g.state("s", ty.clone())?];
    let weights = [[D, D], [D, D], [D, 24]];
    let weights: Vec<Value> =
        weights.into_iter().enumerate().map(|(i, shape)| g.param(&format!("w{i}"), shape)).collect::<Result<_>>()?;
    let rows = [g.param("gamma", [D])?, g.param("beta", [D])?];
    let start = g.input("start", TensorType::u32([batch]))?;
    let board = g.input("board", TensorType::f32([8, 8]))?;
    let mut caches: Vec<Value> =
        (0..3).map(|i| g.state(&format!("cache{i}"), TensorType::f32([batch, capacity, D]))).collect::<Result<_>>()?;
    let mut kept = vec![];
    for _ in 0..28 {
        let mut late = || values[values.len() - 1 - (values.len() as f64 * rng.uniform().powi(3)) as usize];
        let (a, b) = (late(), late());
        let w = weights[rng.below(2) as usize];
        let bias = (rng.below(2) == 0).then_some(rows[rng.below(2) as usize]);
        let new = match rng.below(18) {
            0..3 => g.rmsnorm("rmsnorm", a, rows[0], 1e-2)?,
            3 => g.layernorm("layernorm", a, rows[0], rows[1], 1e-2)?,
            4..8 => g.linear("linear", a, w, bias)?,
            8 => g.matmul_nt("matmul_nt", a, w)?,
            // As a rule a number of columns that is no multiple of 4, and a weight that may be the input itself.
            9 => {
                let scores = g.matmul_nt("scores", a, b)?;
                kept.push(scores);
                g.linear("again", a, w, None)?
            }
            10 => {
                let (gate, up) = (g.linear("gate", a, weights[0], bias)?, g.linear("up", a, weights[1], None)?);
                g.swiglu("swiglu", gate, up)?
            }
            11 => {
                let wide = g.linear("wide", a, weights[2], None)?;
                let part = g.slice("part", wide, 2, 4, D)?;
                g.tanh("tanh", part)?
            }
            12 => {
                g.rope_from("rope", a, start, Rope { heads: 2, interleaved: rng.below(2) == 0, ..Rope::default() })?
            }
            13 | 14 => {
                let op = Rope { heads: 2, ..Rope::default() };
                let rows = if rng.below(2) == 0 { g.rope_from("rope", a, start, op)? } else { a };
                let at = rng.below(3) as usize;
                caches[at] = g.cache_write("write", rows, start, caches[at])?;
                kept.extend((rng.below(4) == 0).then_some(caches[at]));
                continue;
            }
            15 => {
                kept.push(g.op1("look", Stats { pair: false, row: 0 }, &[a, board])?);
                continue;
            }
            16 => {
                let normed = g.rmsnorm("own", a, rows[0], 1e-2)?;
                kept.push(g.matmul_nt("square", normed, normed)?);
                let product = g.linear("row", a, w, None)?;
                kept.push(g.broadcast("broadcast", product, [2, batch, time, D])?);
                continue;
            }
            _ => g.residual_add("residual_add", a, b)?,
        };
        // So that numbers stay in range.
        let new = if rng.below(4) == 0 { g.tanh("tanh", new)? } else { new };
        values.push(new);
        kept.extend((rng.below(12) == 0).then_some(new));
    }
    kept.push(values[values.len() - 1]);
    g.store(values[values.len() - 2], values[2])?;
    for (i, &cache) in caches.iter().enumerate() {
        let state = g.find(&format!("cache{i}")).unwrap();
        if cache != state {
            g.store(cache, state)?;
        }
    }
    Ok(Built { graph: g, kept })
}

/// The same graphs with some of their results stored in f16: outputs that start as an input of another type, chains and
/// joined products of both, states beside them.
#[test]
fn some_in_f16_equal_the_reference() {
    let mut runner = TestRunner::deterministic();
    let mut failures = vec![];
    // Few, since their kernels are like no others' and take long to compile.
    for seed in 0..GRAPHS / 5 {
        let recipe = recipes().new_tree(&mut runner).unwrap().current().build().unwrap();
        for (i, mut built) in [recipe, elementwise(seed).unwrap(), few_rows(seed).unwrap()].into_iter().enumerate() {
            let stored = store_some(&mut built.graph, seed);
            let profile = profiles().swap_remove((seed as usize + i) % profiles().len());
            let shader_f16 = profile.shader_f16 && (seed / 2).is_multiple_of(2);
            let max_storage_buffers = [4, 8, profile.max_storage_buffers][(seed % 3) as usize];
            let profile = Profile { shader_f16, max_storage_buffers, ..profile };
            // Roundings add up, and some of these ops divide by small numbers.
            let differences = differences_within(&built, &profile, seed, 1e-4);
            if !differences.is_empty() {
                failures.push(format!(
                    "graph {seed}, {:?}, f16 {shader_f16}, {stored} stored: {}\n{}",
                    profile.class,
                    differences.join("; "),
                    built.graph
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

/// Stores every other result in f16, as far as that can be; returns how many.
fn store_some(graph: &mut Graph, seed: u64) -> usize {
    let mut rng = Rng::new(&[seed, 13]);
    let first = graph.nodes().iter().filter_map(|node| graph.find(&node.name));
    let values: Vec<Value> = first.filter(|_| rng.below(2) == 0).collect();
    values.into_iter().filter(|&v| graph.store_as(v, DType::F16).is_ok()).count()
}

/// What differs from the reference in the first two steps.
fn differences(built: &Built, profile: &Profile, seed: u64) -> Vec<String> {
    differences_within(built, profile, seed, 1e-6)
}

fn differences_within(built: &Built, profile: &Profile, seed: u64, nmse_allowed: f64) -> Vec<String> {
    let Built { graph, kept } = built;
    let plan = Plan::new(graph, kept, profile).unwrap();
    let guarded = Guarded::new_blocking(gpu(), Arc::new(plan)).unwrap();
    let exec = guarded.executable();
    let mut given = data(graph, seed);
    for external in exec.plan().externals() {
        write(exec, external.value, &given[&external.value]);
    }
    let stored: HashMap<Value, Value> = graph.stores().iter().map(|&(v, s)| (s, v)).collect();
    // A kept state is read as the step leaves it.
    let read_from: Vec<Value> = kept.iter().copied().chain(stored.keys().copied()).collect();
    let wanted: Vec<Value> = read_from.iter().map(|v| *stored.get(v).unwrap_or(v)).collect();
    let mut found = vec![];
    for step in 1..=2 {
        found.extend(guarded.step_blocking().err().map(|e| e.to_string()));
        let want = reference::run(graph, &given, &wanted).unwrap();
        for (&value, want) in read_from.iter().zip(&want) {
            let error = nmse(&read(exec, value), &want.data);
            if error.is_nan() || error > nmse_allowed {
                found.push(format!("step {step}: {} has NMSE {error:.1e}", graph.name(value)));
            }
        }
        // The second step starts from what the first one left on the GPU.
        for &state in stored.keys() {
            let held = read(exec, state).into_iter().map(f64::from).collect();
            given.insert(state, Array::new(graph.ty(state).shape.clone(), held));
        }
    }
    found
}

/// Values for all inputs, parameters and states.
fn data(graph: &Graph, seed: u64) -> HashMap<Value, Array> {
    let externals = graph.nodes().iter().filter(|node| !matches!(node.source, Source::Op(_)));
    let fill = |(i, node): (usize, &throughline::graph::Node)| {
        let array = random_array(&node.outputs[0].shape, 1000 * seed + i as u64).map(|x| f64::from(0.5 * x as f32));
        let array = match node.name.as_str() {
            "positive" => array.map(f64::abs),
            "start" => array.map(|_| (seed % 4) as f64),
            "hyper" => Array::new([8], [0.1, 0.9, 0.99, 1e-3, 0.1, 0.1, 0.01, 1.0].map(|x: f32| x.into()).to_vec()),
            _ => array,
        };
        (graph.find(&node.name).unwrap(), array)
    };
    externals.enumerate().map(fill).collect()
}

#[test]
fn a_copy_within_one_buffer_is_an_error_and_not_a_crash() {
    let mut g = Graph::new();
    let ty = TensorType::f32([8]);
    let x = g.input("x", ty.clone()).unwrap();
    let s = g.state("s", ty.clone()).unwrap();
    g.store(x, s).unwrap();
    let plan = Arc::new(Plan::new(&g, &[], gpu().profile()).unwrap());
    let arena = Tensor::zeros(gpu(), "arena", TensorType::f32([128])).unwrap().buffer().clone();
    let bindings = [(x, 0), (s, 256)]
        .map(|(value, offset)| (value, Tensor::from_buffer(arena.clone(), offset, ty.clone()).unwrap()))
        .into();
    let options = ExecOptions::bound(bindings);
    let error = Executable::new_blocking(gpu(), plan, options).unwrap_err().to_string();
    assert!(error.contains("`x`") && error.contains("`s`"), "{error}");
}
