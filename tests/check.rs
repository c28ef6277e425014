//! `throughline::check` finds what is wrong with an op, and names it.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::gpu;
use throughline::check::{self, Case, Failures};
use throughline::graph::{ParamInit, Vjp};
use throughline::kernel::Kernel;
use throughline::ops::{Bind, Custom, Elements, Launch, Op, Program};
use throughline::optim::{Arena, ArenaLayout};
use throughline::reference::{self, Array};
use throughline::train::{GraphTrainConfig, GraphTrainer};
use throughline::{AdapterClass, ExecOptions, Executable, Graph, Plan, Profile, Result, TensorType};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Not a workgroup for the last elements.
    FewWorkgroups,
    /// Right where all workgroups are in one row.
    NoGrid,
    /// Something after the last element.
    StrayWrite,
    /// Close to what it should be.
    Imprecise,
    Gradient,
    Wgsl,
}

/// `y = 2 x`.
#[derive(Clone, Copy, Debug)]
struct Twice(Fault);

impl Op for Twice {
    fn name(&self) -> &'static str {
        "twice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.scale(&cx.name, dy, if self.0 == Fault::Gradient { 2.1 } else { 2.0 })?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let row = if self.0 == Fault::NoGrid { "0u" } else { "group.y * groups.x" };
        let after = if self.0 == Fault::StrayWrite { "if (i == n - 1u) { y[n + 9u] = 0.0; }" } else { "" };
        let factor = match self.0 {
            Fault::Imprecise => "2.001",
            Fault::Wgsl => "two",
            _ => "2.0",
        };
        let wgsl = format!(
            "@group(0) @binding(0) var<uniform> n: u32;
            @group(0) @binding(1) var<storage, read> x: array<f32>;
            @group(0) @binding(2) var<storage, read_write> y: array<f32>;
            @compute @workgroup_size(64)
            fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
                    @builtin(local_invocation_index) local: u32) {{
                let i = (group.x + {row}) * 64u + local;
                if (i < n) {{ y[i] = {factor} * x[i]; }}
                {after}
            }}"
        );
        let n = cx.outputs[0].len();
        let groups = if self.0 == Fault::FewWorkgroups { n / 64 } else { n.div_ceil(64) };
        let binds = [Bind::In(0), Bind::Out(0)];
        Ok(Program::one(Kernel::new("twice", wgsl, "main"), &binds, &[n as u32], cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].map(|x| 2.0 * x)]
    }
}

fn cases(fault: Fault) -> Vec<Case> {
    [1, 900].map(|n| Case::new(format!("{n} elements"), Twice(fault), &[&[n]])).into()
}

/// All failures have all of these words; there are some.
fn expect(found: Result<(), Failures>, words: &[&str]) {
    let failures = found.expect_err("nothing was found");
    assert!(failures.iter().count() > 0);
    for failure in failures.iter().map(|f| f.to_string()) {
        words.iter().for_each(|word| assert!(failure.contains(word), "no {word:?} in: {failure}"));
    }
}

#[test]
fn a_right_op_passes() {
    check::op(gpu(), &cases(Fault::None)).unwrap();
}

#[test]
fn each_fault_is_found_by_the_check_for_it() {
    let last = &cases(Fault::None)[1..];
    let run = |fault| check::kernels(gpu(), &cases(fault));
    expect(run(Fault::FewWorkgroups), &["`900 elements`", "`y`[896] is never written, of 900"]);
    expect(run(Fault::NoGrid), &["`900 elements`", "at most 4 workgroups in x and in y", "`y`[256] is never written"]);
    expect(run(Fault::StrayWrite), &["wrote byte", "of y"]);
    expect(run(Fault::Imprecise), &["`y` has an NMSE of 2.5e-7", "more than 1e-7"]);
    expect(check::gradients(&cases(Fault::Gradient)), &["gradient of input 0"]);
    expect(check::shaders(gpu(), &cases(Fault::Wgsl)), &["kernel `twice.main`", "no definition in scope"]);
    expect(run(Fault::Wgsl), &["node `y`", "twice", "two"]);
    // What one check finds, the others need not: a gradient is right or wrong whatever the kernels are.
    check::kernels(gpu(), &cases(Fault::Gradient)).unwrap();
    check::gradients(&cases(Fault::StrayWrite)).unwrap();
    check::shaders(gpu(), last).unwrap();
    expect(check::op(gpu(), &cases(Fault::Gradient)), &["gradient of input 0"]);
}

/// Only if one asks for it, since not every text can be rewritten.
#[test]
fn halved_cases_run_in_f16_and_say_so() {
    let halved = || cases(Fault::None).into_iter().map(|case| case.halved()).collect::<Vec<_>>();
    check::op(gpu(), &[cases(Fault::None), halved()].concat()).unwrap();
    let strict: Vec<Case> =
        cases(Fault::Imprecise).into_iter().map(|case| case.half_tolerance(1e-12).halved()).collect();
    expect(check::kernels(gpu(), &strict), &["tensors in f16", "`y", "more than 1e-12"]);
    let strict = check::kernels(gpu(), &strict).unwrap_err();
    let on_words = strict.iter().filter(|failure| failure.target.contains("in f16 in words")).count();
    let natively = strict.iter().count() - on_words;
    assert!(on_words > 0 && (natively > 0) == gpu().profile().shader_f16, "{strict}");
    expect(
        check::kernels(gpu(), &cases(Fault::FewWorkgroups)[1..].iter().map(Case::halved).collect::<Vec<_>>()),
        &["`900 elements`", "tensors in f16", "`y`[896] is never written"],
    );

    let op = || tripled("if (i < arrayLength(&x)) { y[i] = 3.0 * x[i]; }");
    let case = Case::new("8", op(), &[&[8]]).forward_only();
    check::op(gpu(), std::slice::from_ref(&case)).unwrap();
    expect(check::kernels(gpu(), &[case.halved()]), &["tripled, case `8`: node `y`", "cannot store `x` in f16"]);
}

/// As it is shown where a test unwraps the result.
#[test]
fn failures_are_shown_in_a_line_each_and_once() {
    let lines = |fault| format!("{:?}", check::op(gpu(), &cases(fault)).unwrap_err());
    let wgsl = lines(Fault::Wgsl);
    assert_eq!(wgsl.matches("no definition in scope").count(), 1, "{wgsl}");
    assert_eq!(check::op(gpu(), &[]).unwrap_err().to_string(), "no op, case `none`: there are no cases to check");
    let no_gradient =
        check::op(gpu(), &[Case::new("8", tripled("y[i] = 3.0 * x[i];"), &[&[8]])]).unwrap_err().to_string();
    let words = ["tripled, case `8`: node `y`", "no gradient", "`Custom::backward`", "`Case::forward_only`"];
    words.iter().for_each(|word| assert!(no_gradient.contains(word), "no {word:?} in: {no_gradient}"));
    assert_eq!(no_gradient.lines().count(), 1, "{no_gradient}");
    let imprecise = lines(Fault::Imprecise);
    assert!(imprecise.starts_with("\ntwice, case `1 elements` (kernels for Cpu adapters"), "{imprecise}");
    assert!(imprecise.contains(" more): `y` has an NMSE of") && imprecise.lines().count() < 8, "{imprecise}");
}

#[test]
fn texts_are_those_of_all_kernels() {
    let texts = check::texts(gpu(), &cases(Fault::None)).unwrap();
    assert!(texts["twice.main"].wgsl().unwrap().contains("2.0 * x[i]"));
    assert!(texts.keys().any(|name| name.starts_with("scale.forward")), "the gradient's kernel");
    assert!(check::wgsl("fn main() { this is not WGSL }").is_err());
}

/// Rows of `x` shifted by as many columns as `by` says, and what they sum to: two outputs, an integer input, scratch
/// between two kernels, two variants and a gradient that is another `Custom`.
fn shift_and_sum(back: bool) -> Custom {
    let cols = |x: &Array| x.shape.cols();
    Custom::new(
        "shift_and_sum",
        |[x, by]| match by.shape.dims() {
            [rows] if *rows == x.shape.rows() => Ok([x.clone(), TensorType::f32([*rows])]),
            _ => Err(format!("`by` must have one number for each of the {} rows", x.shape.rows())),
        },
        move |cx| {
            let (rows, cols) = (cx.outputs[0].shape.rows(), cx.outputs[0].shape.cols());
            let mut program = Program::default();
            let copy = Bind::Scratch(program.scratch(cx.outputs[0].clone()));
            let body = "let row = i / cols;
                let col = i % cols + select(by[row], cols - by[row] % cols, back != 0);
                y[i] = scale * x[row * cols + col % cols];
                copy[i] = y[i];";
            let shift = Elements::new("shift", rows * cols, body);
            let shift = shift.bind("x", Bind::In(0)).bind("by", Bind::In(1)).bind("y", Bind::Out(0)).bind("copy", copy);
            shift.word("cols", cols).word("back", i32::from(back)).word("scale", 1.0).dispatch(cx, &mut program)?;
            let order = ["j", "cols - 1u - j"][cx.variant];
            let body = format!(
                "var s = 0.0; for (var j = 0u; j < cols; j++) {{ s += copy[i * cols + {order}]; }} sum[i] = s;"
            );
            let sum = Elements::new("sum", rows, &body).bind("copy", Bind::ScratchIn(0)).bind("sum", Bind::Out(1));
            sum.word("cols", cols).dispatch(cx, &mut program)?;
            Ok(program)
        },
        move |[x, by]| {
            let from = |i: usize| {
                let (row, col, n) = (i / cols(x), i % cols(x), by.data[i / cols(x)] as usize);
                row * cols(x) + (if back { col + cols(x) - n % cols(x) } else { col + n }) % cols(x)
            };
            let y = Array::new(x.shape.clone(), (0..x.data.len()).map(|i| x.data[from(i)]).collect());
            let sums = y.rows().map(|row| row.iter().sum()).collect();
            [y, Array::new([x.shape.rows()], sums)]
        },
    )
    .vjp(move |cx| {
        let dx = cx.graph.op(&cx.name, shift_and_sum(!back), &[cx.dy0()?, cx.inputs[1]])?[0];
        cx.set(0, dx);
        Ok(())
    })
    .variants(["forwards", "backwards"])
    .settings(back)
    .flops(|inputs, _| inputs[0].len() as u64)
}

#[test]
fn an_op_of_closures_is_checked_as_any_other() {
    let case = |[rows, cols]: [usize; 2]| {
        Case::new(format!("{rows} x {cols}"), shift_and_sum(false), &[&[rows, cols]]).ids(&[rows], 9)
    };
    let cases = [[1, 1], [3, 7], [251, 13], [2, 1757]].map(case);
    check::op(gpu(), &cases).unwrap();

    let op = shift_and_sum(true);
    assert_eq!([format!("{op:?}"), op.key()], [(); 2].map(|()| "Custom(shift_and_sum, true)".to_string()));
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 64])).unwrap();
    let by = g.input("by", TensorType::u32([2])).unwrap();
    let y = g.op1("y", op.clone(), &[x, by]).unwrap();
    let plan = Plan::new(&g, &[y], gpu().profile()).unwrap();
    assert_eq!(plan.flops(), 128);
    let kernels = || plan.steps().iter().flat_map(|s| s.dispatches()).map(|d| d.kernel());
    assert!(kernels().count() == 2 && kernels().all(|k| !k.is_trusted()));
    // A choice among the variants, as a tuner makes it.
    let mut profile = gpu().profile().clone();
    let key = throughline::plan::variants::key(&op, &[g.ty(x).clone(), g.ty(by).clone()]);
    profile.choices.set(key, "backwards".into());
    let tuned = Plan::new(&g, &[y], &profile).unwrap();
    let mut texts = tuned.steps()[0].dispatches().iter().map(|d| d.kernel().wgsl().unwrap());
    assert!(texts.next_back().unwrap().contains("cols - 1u - j"));
}

/// `y = 3 x` by this body.
fn tripled(body: &'static str) -> Custom {
    Custom::new(
        "tripled",
        |[x]| Ok([x.clone()]),
        move |cx| {
            let all =
                Elements::new("tripled", cx.outputs[0].len(), body).bind("x", Bind::In(0)).bind("y", Bind::Out(0));
            all.program(cx)
        },
        |[x]| [x.map(|x| 3.0 * x)],
    )
}

/// A row of workgroups computes 4,194,240 elements of 64 each.
#[test]
fn more_elements_than_a_row_of_workgroups_has() {
    const N: usize = 5_000_000;
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([N])).unwrap();
    let y = g.op1("y", tripled("y[i] = 3.0 * x[i];"), &[x]).unwrap();
    let profile = Profile { class: AdapterClass::Gpu, ..gpu().profile().clone() };
    let plan = Arc::new(Plan::new(&g, &[y], &profile).unwrap());
    let [columns, rows, _] = plan.steps()[0].dispatches()[0].workgroups();
    assert!(rows > 1 && columns * rows >= N.div_ceil(64) as u32, "{columns} x {rows}");
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    let data: Vec<f32> = (0..N).map(|i| i as f32).collect();
    exec.write(x, &data).unwrap();
    exec.submit().unwrap();
    let got: Vec<f32> = exec.read_blocking(y).unwrap();
    assert_eq!(got.iter().zip(&data).position(|(y, x)| *y != 3.0 * x), None);
}

#[test]
fn what_is_wrong_with_an_op_of_closures_is_told() {
    let error = |op: Custom, inputs: usize| -> String {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([8])).unwrap();
        let build = |g: &mut Graph| {
            let y = g.scoped("h.0", |g| g.op1("y", op, &vec![x; inputs]))?;
            let plan = Plan::new(g, &[y], gpu().profile())?;
            Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default())
        };
        build(&mut g).expect_err("accepted").to_string()
    };
    let expect = |error: String, words: &[&str]| {
        let words = [&["node `h.0.y` (tripled)", "f32[8]"], words].concat();
        words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in: {error}"));
    };
    expect(error(tripled("y[i] = x[i];"), 2), &["takes 1 input, got 2"]);
    expect(error(tripled("y[i] = 1.0;"), 1), &["`tripled`", "does not mention `x`", "In(0)"]);
    expect(error(tripled("y[i] = x[i] * tree;"), 1), &["no definition in scope", "tree"]);
    expect(error(tripled("y[i] = x[i]"), 1), &["expected", ";"]);
    let launched = |launch: fn(Elements<'static>) -> Elements<'static>| {
        let all = move |cx: &Launch<'_>| launch(Elements::new("all", 8, "y[i] = x[i];")).program(cx);
        Custom::new("tripled", |[x]| Ok([x.clone()]), all, |[x]| [x.clone()])
    };
    expect(error(launched(|e| e.bind("x", Bind::In(1)).bind("y", Bind::Out(0))), 1), &["binds input 1", "only 1"]);
    expect(error(launched(|e| e.bind("x", Bind::In(0)).bind("y", Bind::In(0))), 1), &["no dispatch writes output 0"]);
    expect(error(launched(|e| e.bind("x", Bind::In(0)).bind("x", Bind::Out(0))), 1), &["`x` is taken"]);
    expect(error(launched(|e| e.bind("x y", Bind::In(0))), 1), &["`x y` is no name"]);
    let n = |e: Elements<'static>| e.bind("x", Bind::In(0)).bind("y", Bind::Out(0)).word("n", 1u32);
    expect(error(launched(n), 1), &["`n` is taken"]);
    let large = |e: Elements<'static>| e.bind("x", Bind::In(0)).bind("y", Bind::Out(0)).word("stride", 1usize << 32);
    expect(error(launched(large), 1), &["`stride` is 4294967296", "u32"]);

    // It has no gradient unless it is given one.
    let mut g = Graph::new();
    let x = g.param("x", [8]).unwrap();
    let y = g.op1("y", tripled("y[i] = 3.0 * x[i];"), &[x]).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let none = g.gradients(loss, &[x]).unwrap_err().to_string();
    assert!(none.contains("node `y`") && none.contains("`tripled` has no gradient (`Custom::backward`"), "{none}");
    // Without a device.
    let data = Array::new([8], vec![1.0; 8]);
    assert_eq!(reference::run(&g, &[(x, data)].into(), &[loss]).unwrap()[0].data, [24.0]);
}

/// `y = a x + b`, whose backward kernel has six storage bindings and writes the gradients of two parameters.
fn affine() -> Custom {
    let backward = Custom::new(
        "affine_backward",
        |[x, a, b, _]| Ok([x.clone(), a.clone(), b.clone()]),
        |cx| {
            let body = "dx[i] = dy[i] * a[i]; da[i] = dy[i] * x[i]; db[i] = dy[i];";
            let elements = Elements::new("affine_backward", cx.outputs[0].len(), body);
            let elements = elements.bind("x", Bind::In(0)).bind("a", Bind::In(1)).bind("dy", Bind::In(3));
            elements.bind("dx", Bind::Out(0)).bind("da", Bind::Out(1)).bind("db", Bind::Out(2)).program(cx)
        },
        |[x, a, _, dy]: [&Array; 4]| [dy.zip(a, |dy, a| dy * a), dy.zip(x, |dy, x| dy * x), dy.clone()],
    );
    let forward = |cx: &Launch<'_>| {
        let elements = Elements::new("affine", cx.outputs[0].len(), "y[i] = x[i] * a[i] + b[i];");
        let elements = elements.bind("x", Bind::In(0)).bind("a", Bind::In(1)).bind("b", Bind::In(2));
        elements.bind("y", Bind::Out(0)).program(cx)
    };
    let reference = |[x, a, b]: [&Array; 3]| [x.zip(a, |x, a| x * a).zip(b, |y, b| y + b)];
    Custom::new("affine", |[x, _, _]| Ok([x.clone()]), forward, reference).backward(backward)
}

/// On a device with four storage buffers, bindings of the backward kernel share one.
#[test]
fn own_kernels_of_many_bindings_run_on_devices_of_four() {
    let cases = [1, 37, 300].map(|n| Case::new(format!("{n}"), affine(), &[&[n], &[n], &[n]]));
    check::op(gpu(), &cases).unwrap();
}

/// On a GPU one kernel computes the gradients of a linear layer's weight and bias. Both go to one arena, in which they
/// may be added up.
#[test]
fn gradients_of_a_layer_go_to_one_arena() {
    let mut g = gpu().graph();
    let x = g.input("x", TensorType::f32([300, 40])).unwrap();
    let w = g.param_with("w", [40, 24], ParamInit::Normal(0.1)).unwrap();
    let b = g.param_with("b", [24], ParamInit::ONES).unwrap();
    let y = g.linear("y", x, w, Some(b)).unwrap();
    let y = g.tanh("tanh", y).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let gradients = g.gradients(loss, &[w, b]).unwrap();
    let data: Vec<f32> = (0..300 * 40).map(|i| (i as f32).sin()).collect();
    let run = |class, accumulate: bool| {
        let mut g = g.clone();
        let mut bindings = HashMap::new();
        let layout = Arc::new(ArenaLayout::of(&g, &[w, b], gpu().profile().max_tensor_bytes()).unwrap());
        let arena = Arena::zeros(gpu(), "gradients", &layout).unwrap();
        for (&gradient, tensor) in gradients.iter().zip(&arena.tensors) {
            let state = g.state(&format!("{}.state", g.name(gradient)), g.ty(gradient).clone()).unwrap();
            let value = match accumulate {
                true => g.residual_add(&format!("{}.sum", g.name(gradient)), state, gradient).unwrap(),
                false => gradient,
            };
            g.store(value, state).unwrap();
            bindings.insert(state, tensor.clone());
        }
        let plan = Plan::new(&g, &[], &Profile { class, ..gpu().profile().clone() }).unwrap();
        let sums = plan.steps().iter().filter(|s| s.op().name() == "sum").count();
        assert_eq!(sums, usize::from(class == AdapterClass::Cpu), "{plan}");
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::bound(bindings)).unwrap();
        exec.write(x, &data).unwrap();
        exec.submit().unwrap();
        exec.submit().unwrap();
        arena.read_blocking(gpu()).unwrap()
    };
    let once = run(AdapterClass::Cpu, false);
    for (accumulate, times) in [(false, 1.0), (true, 2.0)] {
        for (got, want) in run(AdapterClass::Gpu, accumulate).iter().zip(&once) {
            let close = |(got, want): (&f32, &f32)| (got - times * want).abs() <= 1e-3;
            assert!(got.iter().zip(want).all(close), "{got:?}\n{want:?}");
        }
    }
}

/// A kernel may write two ranges of one buffer, as gradients in an arena are.
#[test]
fn two_gradients_of_one_kernel_are_trained_with() {
    let mut g = gpu().graph();
    let [x, target] = ["x", "target"].map(|name| g.input(name, TensorType::f32([64])).unwrap());
    let a = g.param_with("a", [64], ParamInit::ONES).unwrap();
    let b = g.param_with("b", [64], ParamInit::ZEROS).unwrap();
    let y = g.op1("y", affine(), &[x, a, b]).unwrap();
    let loss = g.mse("loss", y, target).unwrap();
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::adamw(0.05)).unwrap();
    for _ in 0..200 {
        trainer.step(&[x.with(&[0.5f32; 64]), target.with(&[2.0f32; 64])]).unwrap();
    }
    let loss = trainer.loss_blocking().unwrap();
    assert!(loss < 1e-3, "{loss}");
}
