//! Safe code gets no kernel without bounds checks but those of the op table, on shapes that the op accepts.
//!
//! That the field cannot be set and a plan cannot be edited is for the compiler to say: `compile_fail` examples in the
//! docs of `Kernel::is_trusted` and `plan`. Here is what does compile, and what becomes of it.

#![forbid(unsafe_code)]

mod common;

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use common::gpu;
use throughline::check::Harness;
use throughline::error::Result;
use throughline::graph::Source;
use throughline::kernel::{Bind, Gemv, Kernel, Launch, Program};
use throughline::ops::map::Map;
use throughline::ops::matmul::Matmul;
use throughline::ops::residual_add::ResidualAdd;
use throughline::ops::swiglu::SwiGlu;
use throughline::ops::{Custom, Op, TABLE, Vjp};
use throughline::reference::Array;
use throughline::{
    AdapterClass, DType, Error, ExecOptions, Executable, Graph, Plan, Profile, Tensor, TensorType, Value,
};

/// An app's op of two inputs and an output of one shape, with someone else's program.
#[derive(Clone, Debug)]
struct Own(Way);

#[derive(Clone, Debug)]
enum Way {
    /// That of an op of the table, told of tensors of so many elements.
    Lie(usize),
    /// A kernel that has been in a plan.
    Planned(Kernel, [u32; 3], Vec<u32>),
    /// An honest one, but fused it becomes a matmul whose shapes nobody has checked.
    Fused,
    /// An honest one, but with others it would be a matmul of so many columns.
    Joined(usize),
}

impl Op for Own {
    fn name(&self) -> &'static str {
        "own"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("only run forward"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        match &self.0 {
            Way::Lie(len) => {
                let ty = TensorType::f32([*len]);
                SwiGlu.launch(&Launch { inputs: &[ty.clone(), ty.clone()], outputs: &[ty], ..*cx })
            }
            Way::Planned(kernel, workgroups, words) => {
                let binds = [Bind::In(0), Bind::In(1), Bind::Out(0)];
                Ok(Program::one(kernel.clone(), &binds, words, *workgroups))
            }
            Way::Fused | Way::Joined(_) => SwiGlu.launch(cx),
        }
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].clone()]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn with_addend(&self, _: usize) -> Option<Arc<dyn Op>> {
        let op = Matmul { accumulate: true, ..Matmul::default() };
        matches!(self.0, Way::Fused).then(|| Arc::new(op) as Arc<dyn Op>)
    }

    fn gemv(&self, _: &[TensorType]) -> Option<Gemv> {
        let Way::Joined(n) = self.0 else { return None };
        Matmul::default().gemv(&[TensorType::f32([1, LEN]), TensorType::f32([LEN, n])])
    }
}

/// Elements of the op's tensors.
const LEN: usize = 64;

fn own(way: Way) -> Result<(Plan, Value)> {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([LEN]))?;
    let y = g.state("y", TensorType::f32([LEN]))?;
    let own = g.op1("own", Own(way), &[x, y])?;
    let to = g.state("to", TensorType::f32([LEN]))?;
    g.store(own, to)?;
    let plan = gpu().plan(&g, &[])?;
    Ok((plan, to))
}

fn kernels(plan: &Plan) -> impl Iterator<Item = &Kernel> {
    plan.steps().iter().flat_map(|s| s.dispatches()).map(|d| d.kernel())
}

/// Runs a step that writes `to` in the middle of a buffer of sentinels; all of them must survive.
fn run_between_sentinels(plan: Plan, to: Value) {
    let sentinels: Vec<u32> = (0..4096).map(|i| 0x7fc0_0000 | i).collect();
    let all = Tensor::zeros(gpu(), "all", TensorType::u32([sentinels.len()])).unwrap();
    all.write(gpu(), &sentinels).unwrap();
    let middle = Tensor::from_buffer(all.buffer().clone(), 4096, TensorType::f32([LEN])).unwrap();
    let options = ExecOptions::bound(HashMap::from([(to, middle)]));
    let exec = Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap();
    for external in exec.plan().externals().iter().filter(|e| e.value != to) {
        let words = external.ty.len();
        match external.ty.dtype {
            DType::F32 => exec.write(external.value, &vec![1.0f32; words]).unwrap(),
            _ => exec.write(external.value, &vec![0u32; words]).unwrap(),
        }
    }
    exec.submit().unwrap();
    let after = all.read_blocking::<u32>(gpu()).unwrap();
    let outside = |i: &usize| !(1024..1024 + LEN).contains(i);
    assert!((0..after.len()).filter(outside).all(|i| after[i] == sentinels[i]), "a stray write");
}

#[test]
fn an_op_that_returns_a_program_of_the_table_with_a_lie_is_checked() {
    for len in [LEN, 1024 * LEN] {
        let (plan, to) = own(Way::Lie(len)).unwrap();
        assert!(kernels(&plan).all(|k| k.label == "swiglu" && !k.is_trusted()));
        run_between_sentinels(plan, to);
    }
}

#[test]
fn trust_is_not_taken_over_with_a_kernel_of_another_plan() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([1024 * LEN])).unwrap();
    let y = g.swiglu("y", x, x).unwrap();
    let plan = gpu().plan(&g, &[y]).unwrap();
    let dispatch = &plan.steps()[0].dispatches()[0];
    let mut kernel = dispatch.kernel().clone();
    assert!(kernel.is_trusted());
    kernel.label = "mine";
    let (plan, to) = own(Way::Planned(kernel, dispatch.workgroups(), dispatch.words().to_vec())).unwrap();
    assert!(kernels(&plan).all(|k| k.label == "mine" && !k.is_trusted()));
    run_between_sentinels(plan, to);
}

#[test]
fn an_op_that_fusion_puts_in_is_asked_for_its_types() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([LEN])).unwrap();
    let y = g.op1("own", Own(Way::Fused), &[x, x]).unwrap();
    let sum = g.op1("sum", ResidualAdd, &[x, y]).unwrap();
    let error = gpu().plan(&g, &[sum]).unwrap_err().to_string();
    assert!(error.contains("`sum`") && error.contains("matmul"), "{error}");
}

#[test]
fn an_op_that_offers_a_product_of_the_table_in_its_name_stays_alone() {
    let profile = Profile::portable(AdapterClass::Gpu);
    let plan = |op: &dyn Fn() -> Arc<dyn Op>| {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([1, LEN])).unwrap();
        let others = ["a", "b"].map(|name| g.input(name, TensorType::f32([1, LEN])).unwrap());
        let ys = others.map(|w| g.op_arc("y", op(), &[x, w]).unwrap()[0]);
        Plan::new(&g, &ys, &profile).unwrap()
    };
    let own = plan(&|| Arc::new(Own(Way::Joined(1024 * LEN))));
    assert_eq!(own.steps().len(), 2, "{own}");
    assert!(kernels(&own).all(|k| k.label == "swiglu" && !k.is_trusted()), "{own}");
}

#[test]
fn products_are_as_trusted_as_what_is_applied_to_them() {
    let mine = Map::new("mine", ["x"], "x * x", |v| v[0] * v[0]);
    for (own, trusted) in [(false, true), (true, false)] {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([2, LEN])).unwrap();
        let w = g.param("w", [LEN, 8]).unwrap();
        let product = g.matmul("product", x, w).unwrap();
        let y = if own { g.op1("y", mine.clone(), &[product]) } else { g.relu("y", product) }.unwrap();
        let plan = Plan::new(&g, &[y], &Profile::portable(AdapterClass::Gpu)).unwrap();
        assert!(kernels(&plan).all(|k| k.label == "products" && k.is_trusted() == trusted), "{plan}");
        assert_eq!(kernels(&plan).count(), 1, "{plan}");
    }
}

#[test]
fn every_kernel_of_the_table_is_trusted_forward_and_backward() {
    let mut seen = HashSet::new();
    for row in TABLE {
        for case in (row.cases)() {
            let harness = Harness::new(&case, 1).unwrap();
            for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
                let profile = Profile { class, ..gpu().profile().clone() };
                for max_storage_buffers in [4, profile.max_storage_buffers] {
                    let profile = Profile { max_storage_buffers, ..profile.clone() };
                    let plan = harness.plan(&profile).unwrap();
                    for kernel in kernels(&plan) {
                        assert!(kernel.is_trusted(), "{}: {}", case.name, kernel.describe());
                        seen.insert(kernel.label);
                    }
                }
            }
        }
    }
    assert!(seen.len() >= 20, "{seen:?}");
}

/// Only the table's own expressions run unchecked. An app's can be any text, and its gradients too.
#[test]
fn functions_of_an_app_are_checked() {
    let mut g = Graph::new();
    let [x, y] = ["x", "y"].map(|name| g.input(name, TensorType::f32([LEN])).unwrap());
    let mine = Map::new("tanh", ["x", "z"], "x * z * z", |[x, z]| x * z * z)
        .gradient("dy * z * z", |[_, z], _, dy| dy * z * z)
        .gradient("2.0 * dy * x * z", |[x, z], _, dy| 2.0 * dy * x * z);
    let own = g.map("own", &mine, &[x, y]).unwrap();
    let table = g.tanh("table", own).unwrap();
    let loss = g.sum("loss", table).unwrap();
    let mut wanted = g.gradients(loss, &[x, y]).unwrap();
    wanted.extend([own, table]);
    let plan = Plan::unfused(&g, &wanted, gpu().profile()).unwrap();
    for step in plan.steps() {
        for kernel in step.dispatches().iter().map(|d| d.kernel()) {
            let own = step.name().starts_with("own");
            assert_eq!(kernel.is_trusted(), !own, "{}: {}", step.name(), kernel.describe());
        }
    }
    // It cannot name what the text around it declares.
    let error = g.map("y", &Map::new("m", ["x"], "x + in_0[7u].x", |[x]| x), &[x]).unwrap_err().to_string();
    assert!(error.contains("mentions `in_0`"), "{error}");
}

/// What a graph gives out of the table's functions can be added to, and is then as anybody's.
#[test]
fn functions_of_the_table_lose_their_trust_with_what_is_added() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([LEN])).unwrap();
    let y = g.tanh("y", x).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let dx = g.gradients(loss, &[x]).unwrap()[0];
    let map = |g: &Graph, v: Value| match &g.nodes()[v.node()].source {
        Source::Op(op) => (op.as_ref() as &dyn Any).downcast_ref::<Map>().unwrap().clone(),
        _ => panic!("not an op"),
    };
    let (tanh, backward) = (map(&g, y), map(&g, dx));
    let kernel = |g: &mut Graph, map: Map, inputs: &[Value]| {
        let y = g.map("z", &map, inputs).map_err(|e| e.to_string())?;
        let plan = gpu().plan(g, &[y]).map_err(|e| e.to_string())?;
        Ok::<_, String>(plan.steps().last().unwrap().dispatches()[0].kernel().is_trusted())
    };
    assert_eq!(kernel(&mut g, tanh.clone(), &[x]), Ok(true));
    assert_eq!(kernel(&mut g, backward.clone(), &[x, x]), Ok(true));
    assert_eq!(kernel(&mut g, tanh.clone().constant("k", 1.0), &[x]), Ok(false));
    let error = kernel(&mut g, tanh.constant("k: f32) -> f32 { return in_0[9u].x; } fn g(k", 1.0), &[x]).unwrap_err();
    assert!(error.contains("is no name"), "{error}");
    // A gradient of the gradient, with any text.
    let second = backward.gradient("dy + in_0[0x3fffffffu].x", |[_, _], _, dy| dy);
    assert!(kernel(&mut g, second, &[x, x]).is_err());
}

/// One function of somebody's own makes a whole chain checked.
#[test]
fn a_chain_is_as_trusted_as_all_its_parts() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([LEN])).unwrap();
    let mine = Map::new("mine", ["x"], "x + 1.0", |[x]| x + 1.0);
    for (own, trusted) in [(false, true), (true, false)] {
        let y = g.tanh("tanh", x).unwrap();
        let y = if own { g.map("mine", &mine, &[y]).unwrap() } else { g.exp("exp", y).unwrap() };
        let y = g.neg("y", y).unwrap();
        let plan = gpu().plan(&g, &[y]).unwrap();
        assert_eq!((plan.steps().len(), plan.steps()[0].parts().len()), (1, 3), "{plan}");
        assert!(kernels(&plan).all(|k| k.is_trusted() == trusted), "{plan}");
    }
}

/// A chain in other hands is still a chain of what it was made for.
#[test]
fn a_chain_takes_no_inputs_that_do_not_fit() {
    let mut g = Graph::new();
    let [x, long] = [("x", LEN), ("long", 2 * LEN)].map(|(name, n)| g.input(name, TensorType::f32([n])).unwrap());
    let sum = g.add("sum", x, x).unwrap();
    let y = g.tanh("y", sum).unwrap();
    let plan = gpu().plan(&g, &[y]).unwrap();
    let chain = plan.steps()[0].op().clone();
    assert_eq!(chain.name(), "chain");
    assert!(g.op_arc("again", chain.clone(), &[x]).is_ok());
    for inputs in [&[long][..], &[x, x], &[]] {
        assert!(g.op_arc("wrong", chain.clone(), inputs).is_err());
    }
}

#[test]
fn kernels_for_other_subgroups_do_not_run() {
    let here = gpu().profile();
    let other = if here.subgroups == Some([4, 4]) { [8, 8] } else { [4, 4] };
    let profile = Profile { class: AdapterClass::Cpu, subgroups: Some(other), ..here.clone() };
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64, 64])).unwrap();
    let y = g.softmax("y", x).unwrap();
    let plan = Arc::new(Plan::new(&g, &[y], &profile).unwrap());
    let error = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Device(m) if m.contains("subgroups")), "{error}");
    // One without subgroups runs anywhere.
    let profile = Profile { subgroups: None, ..profile };
    let plan = Arc::new(Plan::new(&g, &[y], &profile).unwrap());
    Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
}

/// Inputs of an op that may have another length without another of its outputs or inputs: what is summed, ranked or
/// looked up in, and rows that go into a longer tensor.
const FREE: &[(&str, usize)] = &[
    ("sum", 0),
    ("stats", 0),
    ("cross_entropy", 0),
    ("top_k", 0),
    ("top_k", 1),             // one temperature, or one a row
    ("matmul_by_id", 1),      // any number of matrices
    ("cross_entropy_sum", 0), // any number of classes
    ("embedding", 0),
    ("gather", 0),
    ("slice_pad", 0),
    ("cache_write", 0),
    ("rope_write", 0),
    ("together", 1), // the rows of two writes
    ("together", 2),
    ("cache_read", 0),
    ("mul", 1), // a dimension of 1 repeats
];

/// Anybody can give an op of the table other inputs, those that a gradient is made of too.
#[test]
fn ops_of_the_table_take_no_inputs_that_do_not_fit_each_other() {
    let mut accepted = HashSet::new();
    for case in TABLE.iter().flat_map(|row| (row.cases)()) {
        let harness = Harness::new(&case, 1).unwrap();
        let graph = harness.graph();
        for node in graph.nodes() {
            let Source::Op(op) = &node.source else { continue };
            let inputs: Vec<TensorType> = node.inputs.iter().map(|&v| graph.ty(v).clone()).collect();
            assert_eq!(op.infer(&inputs).unwrap(), node.outputs);
            let dims = |i: usize| inputs[i].shape.dims();
            let axes = (0..inputs.len()).flat_map(|i| (0..dims(i).len()).map(move |axis| (i, axis)));
            for (i, axis) in axes.filter(|_| inputs.len() > 1) {
                let mut longer = dims(i).to_vec();
                longer[axis] += 1;
                let mut changed = inputs.clone();
                changed[i] = TensorType { shape: longer.into(), ..changed[i].clone() };
                if op.infer(&changed).is_ok_and(|outputs| outputs == node.outputs) && !FREE.contains(&(op.name(), i)) {
                    accepted.insert((op.name(), i, axis));
                }
            }
            for n in 0..inputs.len() {
                assert!(op.infer(&inputs[..n]).is_err() || op.name() == "concat", "{} of {n} inputs", op.name());
            }
        }
    }
    assert!(accepted.is_empty(), "{accepted:?}");
}

/// The second dispatch of `embedding_backward` alone, on lists of tokens that its first has not made: slices of a step
/// may be recorded in any order, so scratch may hold anything.
#[derive(Clone, Debug)]
struct Lists;

/// Tokens of the lists; there are rows of `dy` for twice as many.
const TOKENS: usize = 4;

impl Op for Lists {
    fn name(&self) -> &'static str {
        "lists"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(vec![TensorType::f32([inputs[2].len(), 4])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("only run forward"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = Kernel::new("embedding", include_str!("../shaders/embedding.wgsl"), "backward");
        let vocab = cx.inputs[2].len() as u32;
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::In(3), Bind::Out(0)];
        Ok(Program::one(kernel, &binds, &[vocab, 1, vocab, TOKENS as u32, 0, 0], [1, 1, 1]))
    }

    fn reference(&self, _: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        vec![Array::zeros(outputs[0].shape.clone())]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }
}

#[test]
fn lists_of_tokens_that_are_garbage_lead_nowhere() {
    let mut g = Graph::new();
    let dy = g.input("dy", TensorType::f32([2 * TOKENS, 4])).unwrap();
    let [ids, head, next] = [("ids", TOKENS), ("head", 3), ("next", 2 * TOKENS)]
        .map(|(name, n)| g.input(name, TensorType::u32([n])).unwrap());
    let y = g.op1("y", Lists, &[dy, ids, head, next]).unwrap();
    let plan = Arc::new(gpu().plan(&g, &[y]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(dy, &(0..8 * TOKENS).map(|i| (i / 4) as f32 + 1.0).collect::<Vec<_>>()).unwrap();
    exec.write(ids, &[0u32; TOKENS]).unwrap();
    // Tokens count from 1. A list that starts past the last, one that goes back, and one that leads past the last.
    exec.write(head, &[6u32, 3, 2]).unwrap();
    exec.write(next, &[0u32, 7, 1, 0, 0, 0, 0, 0]).unwrap();
    exec.submit().unwrap();
    let y = exec.read_blocking::<f32>(y).unwrap();
    assert_eq!([y[0], y[4], y[8]], [0.0, 3.0, 2.0]);
}

/// So do those of a GPU, sorted by a dispatch that has not run.
#[test]
fn sorted_tokens_that_are_garbage_lead_nowhere() {
    const ROWS: usize = 3;
    let pieces = Custom::new(
        "pieces",
        |[_, _]| Ok([TensorType::f32([ROWS, 4]), TensorType::f32([1, 4])]),
        |cx| {
            let kernel = Kernel::new("embedding", include_str!("../shaders/embedding.wgsl"), "pieces");
            let binds = [Bind::In(0), Bind::In(1), Bind::Out(0), Bind::Out(1)];
            Ok(Program::one(kernel, &binds, &[1, 1, ROWS as u32, TOKENS as u32, 0, 0], cx.profile.grid(1)))
        },
        |_: [&Array; 2]| [Array::zeros([ROWS, 4]), Array::zeros([1, 4])],
    );
    let mut g = Graph::new();
    let dy = g.input("dy", TensorType::f32([2 * TOKENS, 4])).unwrap();
    let sorted = g.input("sorted", TensorType::u32([TOKENS, 2])).unwrap();
    let y = g.op("y", pieces, &[dy, sorted]).unwrap()[0];
    let plan = Arc::new(gpu().plan(&g, &[y]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(dy, &(0..8 * TOKENS).map(|i| (i / 4) as f32 + 1.0).collect::<Vec<_>>()).unwrap();
    // Rows and tokens. There is no row 3, and the tokens end with 3.
    exec.write(sorted, &[3u32, 0, 1, 6, 1, 2, u32::MAX, 0]).unwrap();
    exec.submit().unwrap();
    let y = exec.read_blocking::<f32>(y).unwrap();
    assert_eq!(y[4..8], [4.0 + 3.0; 4]);
}
