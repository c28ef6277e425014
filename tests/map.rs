//! Elementwise functions: those of an app's own, shapes that broadcast, numbers that are none, and what is an error.

mod common;

use std::sync::Arc;

use common::gpu;
use throughline::check::{self, Case};
use throughline::kernel::{Elementwise, Launch, Program};
use throughline::ops::map::Map;
use throughline::ops::patches::Conv;
use throughline::ops::scale::Scale;
use throughline::ops::{Op, Vjp};
use throughline::reference::Array;
use throughline::{Error, ExecOptions, Executable, Graph, Result, TensorType, Value};

/// The message of an error has all these words in it.
fn expect<T>(result: Result<T>, words: &[&str]) {
    match result {
        Ok(_) => panic!("accepted; expected an error with {words:?}"),
        Err(e) => words.iter().for_each(|w| assert!(e.to_string().contains(w), "no {w:?} in: {e}")),
    }
}

fn snake() -> Map {
    let wgsl = "x + sin(2.0 * x) * sin(2.0 * x) / 2.0";
    Map::new("snake", ["x"], wgsl, |[x]| x + (2.0 * x).sin().powi(2) / 2.0)
        .gradient("dy * (1.0 + sin(4.0 * x))", |[x], _y, dy| dy * (1.0 + (4.0 * x).sin()))
}

/// Gradients of both kinds: of the output and of an operand, with a setting.
fn gate(scale: f32) -> Map {
    let s = f64::from(scale);
    Map::new("gate", ["x", "g"], "x * sigmoid(scale * g)", move |[x, g]| x / (1.0 + (-s * g).exp()))
        .gradient("dy * sigmoid(scale * g)", move |[_, g], _, dy| dy / (1.0 + (-s * g).exp()))
        .gradient("dy * y * scale * sigmoid(-scale * g)", move |[_, g], y, dy| dy * y * s / (1.0 + (s * g).exp()))
        .constant("scale", scale)
}

#[test]
fn functions_of_ones_own_pass_the_checks() {
    let mut cases = vec![];
    for shape in [&[1][..], &[127], &[3, 5, 8]] {
        cases.push(Case::new(format!("snake {shape:?}"), snake(), &[shape]));
    }
    for (x, g) in [(&[127][..], &[127][..]), (&[5, 12], &[5, 1]), (&[3, 7], &[7]), (&[4, 1], &[9])] {
        cases.push(Case::new(format!("gate {x:?} {g:?}"), gate(1.5), &[x, g]));
    }
    check::op(gpu(), &cases).unwrap();
}

#[test]
fn settings_share_a_kernel() {
    let mut g = Graph::new();
    let [x, y] = ["x", "y"].map(|name| g.input(name, TensorType::f32([8])).unwrap());
    let outputs = [0.5, 2.0].map(|scale| g.map("gate", &gate(scale), &[x, y]).unwrap());
    let plan = gpu().plan(&g, &outputs).unwrap();
    let kernels: Vec<_> = plan.steps().iter().map(|s| s.dispatches()[0].kernel()).collect();
    assert_eq!(kernels[0], kernels[1]);
}

/// An op with a kernel of its own, which offers to do without.
#[derive(Debug)]
struct Half {
    elementwise: Map,
}

impl Op for Half {
    fn name(&self) -> &'static str {
        "half"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("only run forward"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        Scale { factor: 0.5, accumulate: false }.launch(cx)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].map(|x| 0.5 * x)]
    }

    fn elementwise(&self) -> Option<Elementwise> {
        self.elementwise.elementwise()
    }
}

#[test]
fn any_op_can_join_a_chain() {
    let graph = |elementwise: Map| {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([8])).unwrap();
        let y = g.op1("half", Half { elementwise }, &[x]).unwrap();
        let y = g.exp("y", y).unwrap();
        gpu().plan(&g, &[y])
    };
    let half = Map::new("half", ["x"], "0.5 * x", |[x]| 0.5 * x);
    assert_eq!(graph(half.clone()).unwrap().steps()[0].others(), ["half"]);
    check::op(gpu(), &[Case::new("half", Half { elementwise: half }, &[&[127]]).forward_only()]).unwrap();
    let two = Map::new("two", ["x", "z"], "0.5 * x * z", |[x, z]| 0.5 * x * z);
    expect(graph(two), &["`y`", "`half`", "a function of 2, not 1"]);
}

/// Runs a graph on these inputs, and returns its output.
fn run(inputs: &[&[f32]], build: impl FnOnce(&mut Graph, &[Value]) -> Result<Value>) -> Vec<f32> {
    let mut g = Graph::new();
    let values: Vec<Value> = (inputs.iter().enumerate())
        .map(|(i, data)| g.input(&format!("x{i}"), TensorType::f32([data.len()])).unwrap())
        .collect();
    let y = build(&mut g, &values).unwrap();
    let plan = Arc::new(gpu().plan(&g, &[y]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    for (&value, data) in values.iter().zip(inputs) {
        exec.write(value, data).unwrap();
    }
    exec.submit().unwrap();
    exec.read_blocking(y).unwrap()
}

/// A NaN in a model must reach its loss, where somebody looks.
#[test]
fn no_function_hides_a_nan() {
    let (nan, one) = ([f32::NAN, 1.0, f32::NAN], [1.0, f32::NAN, f32::NAN]);
    type Binary = fn(&mut Graph, &str, Value, Value) -> Result<Value>;
    let binary: [(&str, Binary); 8] = [
        ("max", Graph::max),
        ("min", Graph::min),
        ("add", Graph::add),
        ("pow", Graph::pow),
        ("squared_error", Graph::squared_error),
        ("bce_with_logits", Graph::bce_with_logits),
        ("huber_error", |g, name, a, b| g.huber_error(name, a, b, 1.0)),
        ("div", Graph::div),
    ];
    for (name, op) in binary {
        let y = run(&[&nan, &one], |g, x| op(g, "y", x[0], x[1]));
        assert!(y.iter().all(|y| y.is_nan()), "{name}: {y:?}");
    }
    type Unary = fn(&mut Graph, &str, Value) -> Result<Value>;
    let unary: [(&str, Unary); 14] = [
        ("relu", Graph::relu),
        ("leaky_relu", |g, name, x| g.leaky_relu(name, x, 0.1)),
        ("silu", Graph::silu),
        ("sigmoid", Graph::sigmoid),
        ("tanh", Graph::tanh),
        ("softplus", Graph::softplus),
        ("exp", Graph::exp),
        ("log", Graph::log),
        ("sqrt", Graph::sqrt),
        ("rsqrt", Graph::rsqrt),
        ("sin", Graph::sin),
        ("clamp", |g, name, x| g.clamp(name, x, -1.0, 1.0)),
        ("powf", |g, name, x| g.powf(name, x, 3.0)),
        ("abs", Graph::abs),
    ];
    for (name, op) in unary {
        let y = run(&[&[f32::NAN; 5]], |g, x| op(g, "y", x[0]));
        assert!(y.iter().all(|y| y.is_nan()), "{name}: {y:?}");
    }
}

#[test]
fn powers_of_zero_and_of_negative_numbers() {
    let x = [-2.0, -2.0, -2.0, -2.0, 0.0, 0.0, 0.0, 3.0];
    let k = [2.0, 3.0, -1.0, 0.5, 0.0, 2.0, -1.0, 0.0];
    let y = run(&[&x, &k], |g, x| g.pow("y", x[0], x[1]));
    for (y, want) in y.iter().zip([4.0f32, -8.0, -0.5, f32::NAN, 1.0, 0.0, f32::INFINITY, 1.0]) {
        assert!((y - want).abs() < 1e-3 || *y == want || (y.is_nan() && want.is_nan()), "{y}, not {want}");
    }
}

#[test]
fn logarithms_of_what_is_not_positive() {
    let y = run(&[&[0.0, -1.0, 1.0, f32::INFINITY]], |g, x| g.log("y", x[0]));
    assert!(y[0] == f32::NEG_INFINITY && y[1].is_nan() && y[2] == 0.0 && y[3] == f32::INFINITY, "{y:?}");
}

/// What gradients of gradients there are: those whose expressions are functions of the table themselves.
#[test]
fn products_and_exponentials_have_second_derivatives() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([3])).unwrap();
    let cube = g.mul("square", x, x).unwrap();
    let cube = g.mul("cube", cube, x).unwrap();
    let loss = g.sum("loss", cube).unwrap();
    let first = g.gradients(loss, &[x]).unwrap()[0];
    let slope = g.sum("slope", first).unwrap();
    let second = g.gradients(slope, &[x]).unwrap()[0];
    let plan = Arc::new(gpu().plan(&g, &[second]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(x, &[1.0f32, -2.0, 0.5]).unwrap();
    exec.submit().unwrap();
    assert_eq!(exec.read_blocking::<f32>(second).unwrap(), [6.0, -12.0, 3.0]);

    let y = g.tanh("tanh", x).unwrap();
    let loss = g.sum("tanh_loss", y).unwrap();
    let first = g.gradients(loss, &[x]).unwrap()[0];
    let slope = g.sum("tanh_slope", first).unwrap();
    expect(g.gradients(slope, &[x]), &["`tanh.grad`", "tanh_backward", "second derivatives"]);
}

#[test]
fn nodes_without_a_name_take_the_ops() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([4])).unwrap();
    let a = g.sub("", x, x).unwrap();
    let b = g.scoped("h", |g| g.sub("", a, x)).unwrap();
    let c = g.sub("", b, x).unwrap();
    assert_eq!([a, b, c].map(|v| g.name(v)), ["sub", "h.sub", "sub#2"]);
    // Methods that add several nodes.
    let rows = g.input("rows", TensorType::f32([1, 6, 4])).unwrap();
    let w = g.param("w", [3, 4, 5]).unwrap();
    let first = g.nodes().len();
    g.mse("", x, a).unwrap();
    g.mean_axis("", rows, 0).unwrap();
    g.scoped("c", |g| g.conv1d("", rows, w, None, Conv::same())).unwrap();
    let names: Vec<&str> = g.nodes()[first..].iter().map(|node| &node.name[..]).collect();
    assert_eq!(names[..3], ["mse.error", "mse.sum", "mse"]);
    assert_eq!(names[3..], ["sum", "scale", "c.image", "c.patches", "c.rows", "c.w", "c.matmul"]);
    expect(g.mae("", x, w), &["`mae`", "the prediction is f32[4]"]);
    expect(g.conv2d("", rows, w, None, Conv::same()), &["`conv2d`", "[n, height, width, channels]"]);
}

#[test]
fn what_is_wrong_with_a_function_names_the_node() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([4])).unwrap();
    let mut map = |map: Map| g.map("mine", &map, &[x]);
    let identity = |[x]: [f64; 1]| x;
    let of = |wgsl: &'static str| Map::new("of", ["x"], wgsl, identity);
    expect(map(of("x + z")), &["`mine` (of)", "`x + z`", "mentions `z`", "x"]);
    expect(map(of("")), &["`mine`", "empty"]);
    expect(map(of("x; } fn g() {")), &["`mine`", "`;`", "single expression"]);
    expect(map(of("x // twice")), &["`mine`", "comment"]);
    expect(map(of("(x")), &["`mine`", "brackets"]);
    expect(map(of("x) + (x")), &["`mine`", "brackets"]);
    expect(map(of("x").gradient("dy * z", |[_], _, dy| dy)), &["`mine`", "mentions `z`", "y, dy"]);
    expect(map(of("x").gradient("dy", |[_, _], _, dy| dy)), &["`mine`", "2 operands"]);
    let twice = of("x").gradient("dy", |[_], _, dy| dy).gradient("dy", |[_], _, dy| dy);
    expect(map(twice), &["`mine`", "one gradient too many"]);
    expect(map(Map::new("of", ["dy"], "dy", identity)), &["`mine`", "`dy`"]);
    expect(map(Map::new("of", ["a b"], "x", identity)), &["`mine`", "`a b`"]);
    expect(map(of("x * k").constant("k", f32::NAN)), &["`mine`", "`k`", "NaN"]);
    expect(map(Map::new("of", ["x", "z"], "x", |[x, _]| x)), &["`mine`", "takes 2 inputs, got 1"]);
    let y = g.map("y", &of("x"), &[x]).unwrap();
    let loss = g.sum("loss", y).unwrap();
    let error = g.gradients(loss, &[x]).unwrap_err();
    assert!(matches!(&error, Error::NoGradient { .. }) && error.to_string().contains("Map::gradient"), "{error}");
    // What only a compiler finds.
    let y = g.map("unknown", &of("x + sinus(x)"), &[x]).unwrap();
    let plan = Arc::new(gpu().plan(&g, &[y]).unwrap());
    expect(Executable::new_blocking(gpu(), plan, ExecOptions::default()), &["`unknown`", "sinus"]);
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut g = Graph::new();
    let a = g.input("a", TensorType::f32([4, 3])).unwrap();
    let b = g.input("b", TensorType::f32([4])).unwrap();
    let column = g.input("column", TensorType::f32([4, 1])).unwrap();
    expect(g.sub("difference", a, b), &["`difference`", "[4, 3]", "[4]", "aligned at the right"]);
    // Losses do not broadcast: [4, 1] against [4] would compare everything with everything.
    expect(g.mse("loss", column, b), &["`loss`", "f32[4, 1]", "f32[4]"]);
    let loss = g.scoped("h", |g| g.binary_cross_entropy("loss", a, column));
    expect(loss, &["`h.loss`", "f32[4, 3]", "f32[4, 1]"]);
    let everything = g.sub("everything", column, b).unwrap();
    assert_eq!(g.ty(everything).shape.dims(), [4, 4]);
}

#[test]
fn losses_are_means() {
    let (a, b) = ([1.0, 2.0, -1.0, 0.0], [0.5, 0.0, -1.0, 4.0]);
    let close = |got: Vec<f32>, want: f32| assert!((got[0] - want).abs() < 1e-6, "{got:?}, not {want}");
    close(run(&[&a], |g, x| g.mean("y", x[0])), 0.5);
    close(run(&[&a, &b], |g, x| g.mse("y", x[0], x[1])), (0.25 + 4.0 + 16.0) / 4.0);
    close(run(&[&a, &b], |g, x| g.mae("y", x[0], x[1])), 6.5 / 4.0);
    close(run(&[&a, &b], |g, x| g.huber("y", x[0], x[1], 1.0)), (0.125 + 1.5 + 3.5) / 4.0);
    let bce = run(&[&a, &[1.0, 0.0, 1.0, 0.0]], |g, x| g.binary_cross_entropy("", x[0], x[1]));
    let each = [1.0f32, -2.0, -1.0, 0.0].map(|x| (1.0 + (-x).exp()).ln());
    close(bce, each.iter().sum::<f32>() / 4.0);
}
