//! Tensors stored in f16: whole plans, from the host's data to the host's data, on devices with 16-bit floats in shaders
//! and without. The op table has each kernel.

mod common;

use std::sync::Arc;

use common::{gpu, profiles};
use half::f16;
use throughline::kernel::Kernel;
use throughline::ops::norm::Norm;
use throughline::ops::residual_add::ResidualAdd;
use throughline::ops::{Bind, Custom, Elements, Launch, Program};
use throughline::plan::Slot;
use throughline::{
    AdapterClass, DType, ExecOptions, Executable, Graph, Plan, Profile, Tensor, TensorType, Value, check,
};

/// Profiles that can run here, each with 16-bit floats, where kernels for it use them, and without.
fn both() -> Vec<Profile> {
    let of = |profile: Profile| {
        let here = profile.shader_f16 && profile.class == AdapterClass::Gpu;
        let with = move |shader_f16| Profile { shader_f16, ..profile.clone() };
        if here { vec![with(true), with(false)] } else { vec![with(false)] }
    };
    profiles().into_iter().flat_map(of).collect()
}

fn executable(plan: Plan) -> Executable {
    Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap()
}

fn halves(values: impl IntoIterator<Item = f32>) -> Vec<f16> {
    values.into_iter().map(f16::from_f32).collect()
}

/// Whether these are the numbers, up to one step of f16: drivers round as they like.
fn near(got: &[f16], want: impl IntoIterator<Item = f32>) {
    let want: Vec<f32> = want.into_iter().collect();
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let off = (got.to_f32() - want).abs();
        assert!(off <= want.abs() / 1000.0 + 6e-8, "element {i} is {got}, not {want}");
    }
}

/// Neither a whole number of words nor of quads.
const ODD: [usize; 2] = [3, 5];

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 - 6.0) * 0.37).collect()
}

#[test]
fn results_and_inputs_are_f16_for_the_host() {
    for profile in both() {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f16(ODD)).unwrap();
        let y = g.input("y", TensorType::f32(ODD)).unwrap();
        let product = g.mul("product", x, y).unwrap();
        g.store_as(product, DType::F16).unwrap();
        let flat = g.reshape("flat", product, [15]).unwrap();
        let whole = g.cast("whole", flat, DType::F32).unwrap();
        assert_eq!([product, flat, whole].map(|v| g.ty(v).dtype), [DType::F16, DType::F16, DType::F32]);
        let exec = executable(Plan::new(&g, &[product, flat, whole, x], &profile).unwrap());
        exec.write(x, &halves(numbers(15))).unwrap();
        exec.write(y, &numbers(15)).unwrap();
        exec.submit().unwrap();
        let want = || halves(numbers(15)).into_iter().zip(numbers(15)).map(|(a, b)| a.to_f32() * b);
        let [got, view] = [product, flat].map(|v| exec.read_blocking::<f16>(v).unwrap());
        near(&got, want());
        assert_eq!(got, view);
        // A cast reads what is stored, or what was to be.
        let whole: Vec<f32> = exec.read_blocking(whole).unwrap();
        near(&halves(whole), want());
        assert_eq!(exec.read_blocking::<f16>(x).unwrap(), halves(numbers(15)));
        // Each type is itself alone.
        for error in [
            exec.write(x, &numbers(15)).unwrap_err(),
            exec.write(x, &halves(numbers(14))).unwrap_err(),
            exec.write(y, &halves(numbers(15))).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(error.contains("`x`") && error.contains("f16") || error.contains("`y`"), "{error}");
        }
        let error = exec.read_blocking::<f32>(product).unwrap_err().to_string();
        assert!(error.contains("product") && error.contains("f16"), "{error}");
    }
}

#[test]
fn what_is_too_large_becomes_infinite_and_what_is_tiny_stays() {
    let values = [65504.0, 65519.9, 65520.0, -65520.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 6e-8, -6.2e-5];
    for profile in both() {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([values.len()])).unwrap();
        let y = g.cast("y", x, DType::F16).unwrap();
        let exec = executable(Plan::new(&g, &[y], &profile).unwrap());
        exec.write(x, &values).unwrap();
        exec.submit().unwrap();
        let got: Vec<f32> = exec.read_blocking::<f16>(y).unwrap().into_iter().map(f16::to_f32).collect();
        let infinite = [f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY, f32::INFINITY, f32::NEG_INFINITY];
        assert_eq!((got[0], got[1], &got[2..7]), (65504.0, 65504.0, &infinite[..]), "{profile:?}");
        assert!(got[7].is_nan() && (got[8] == 0.0 || (got[8] - 6e-8).abs() < 1e-8), "{got:?}");
        assert!((got[9] + 6.2e-5).abs() < 1e-7, "{got:?}");
    }
}

/// An output that starts as an input which is stored as another type is converted, and the input stays.
#[test]
fn an_output_starts_as_an_input_of_another_type() {
    for profile in both() {
        for (from, to) in [(DType::F16, DType::F32), (DType::F32, DType::F16)] {
            for dims in [[3, 5], [4, 8]] {
                let mut g = Graph::new();
                let n = dims[0] * dims[1];
                let x = g.input("x", TensorType::f32(dims)).unwrap();
                let start = g.scale("start", x, 2.0).unwrap();
                g.store_as(start, from).unwrap();
                let sum = g.op1("sum", ResidualAdd, &[start, x]).unwrap();
                assert_eq!(g.ty(sum).dtype, from);
                g.store_as(sum, to).unwrap();
                // No chain takes it in, and the start is read again.
                let plan = Plan::unfused(&g, &[start, sum], &profile).unwrap();
                let step = plan.steps().iter().find(|s| s.name() == "sum").unwrap();
                assert!(step.copies().is_empty(), "{plan}");
                let exec = executable(plan);
                exec.write(x, &numbers(n)).unwrap();
                exec.submit().unwrap();
                let as_halves = |v: Value, dtype| match dtype {
                    DType::F16 => exec.read_blocking::<f16>(v).unwrap(),
                    _ => halves(exec.read_blocking::<f32>(v).unwrap()),
                };
                near(&as_halves(start, from), numbers(n).iter().map(|x| 2.0 * x));
                let got = as_halves(sum, to);
                let off = got.iter().zip(numbers(n)).map(|(got, x)| (got.to_f32() - 3.0 * x).abs() / (1.0 + x.abs()));
                assert!(off.fold(0.0, f32::max) < 4e-3, "{got:?}");
            }
        }
    }
}

/// A state of an odd length in a caller's buffer: it is updated in place step by step, and what follows stays.
#[test]
fn states_in_f16_are_updated_where_they_are() {
    for profile in both() {
        for (n, in_place) in [(7, false), (8, true)] {
            let mut g = Graph::new();
            let state = g.state("state", TensorType::f16([n])).unwrap();
            let x = g.input("x", TensorType::f32([n])).unwrap();
            let sum = g.op1("sum", ResidualAdd, &[state, x]).unwrap();
            g.store(sum, state).unwrap();
            let plan = Plan::new(&g, &[], &profile).unwrap();
            let external = |slot: Slot| matches!(slot, Slot::External(_));
            let writes = plan.steps()[0].dispatches().iter().flat_map(|d| d.binds()).flatten();
            assert_eq!(
                writes.clone().any(|b| b.writes && external(b.slot)),
                in_place || plan.final_copies().is_empty()
            );

            let size = 256 + 32;
            let usage = Tensor::USAGES;
            let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
            let buffer = gpu().device().create_buffer(&descriptor);
            let words = Tensor::from_buffer(buffer.clone(), 0, TensorType::u32([72])).unwrap();
            words.write(gpu(), &[0x3c00_3c00u32; 72]).unwrap(); // pairs of ones
            let tensor = Tensor::from_buffer(buffer, 256, TensorType::f16([n])).unwrap();
            let options = ExecOptions::bound([(state, tensor.clone())].into());
            let exec = Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap();
            exec.write(x, &numbers(n)).unwrap();
            for _ in 0..3 {
                exec.submit().unwrap();
            }
            let want = numbers(n).into_iter().map(|x| 1.0 + 3.0 * x);
            let got: Vec<f16> = tensor.read_blocking(gpu()).unwrap();
            let off = got.iter().zip(want).map(|(got, want)| (got.to_f32() - want).abs()).fold(0.0, f32::max);
            assert!(off < 0.02, "{profile:?}: {got:?}");
            // Copies are of whole words.
            let around: Vec<u32> = words.read_blocking(gpu()).unwrap();
            assert!(
                around[..64].iter().chain(&around[68..]).all(|&word| word == 0x3c00_3c00),
                "{profile:?}: {around:x?}"
            );
        }
    }
}

#[test]
fn a_range_of_a_buffer_must_hold_the_padding_of_f16_too() {
    let buffer = |size| {
        let usage = Tensor::USAGES;
        gpu().device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    // 9 elements are 18 bytes, and those 32.
    Tensor::from_buffer(buffer(256 + 32), 256, TensorType::f16([9])).unwrap();
    let error = Tensor::from_buffer(buffer(256 + 28), 256, TensorType::f16([9])).unwrap_err().to_string();
    assert!(error.contains("32 bytes") && error.contains("f16[9]"), "{error}");
    let error = Tensor::from_buffer(buffer(256), 18, TensorType::f16([9])).unwrap_err().to_string();
    assert!(error.contains("multiple of 256"), "{error}");
}

/// Norms have six bindings, all of floats.
#[test]
fn bindings_of_f16_are_merged_where_a_device_binds_few() {
    let dims = [3, 20];
    for profile in both() {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f16(dims)).unwrap();
        let [gamma, beta] = ["gamma", "beta"].map(|name| g.param(name, [20]).unwrap());
        let op = Norm { centered: true, eps: 1e-5 };
        let [y, xhat, rstd] = g.op("y", op, &[x, gamma, beta]).unwrap().try_into().unwrap();
        g.store_as(y, DType::F16).unwrap();
        g.store_as(xhat, DType::F16).unwrap();
        let run = |profile: &Profile| {
            let plan = Plan::new(&g, &[y, xhat, rstd], profile).unwrap();
            let merged = plan.steps().iter().flat_map(|s| s.dispatches()).any(|d| !d.ranges().is_empty());
            let guarded = check::Guarded::new_blocking(gpu(), Arc::new(plan)).unwrap();
            let exec = guarded.executable();
            exec.write(x, &halves(numbers(60))).unwrap();
            exec.write(gamma, &numbers(20)).unwrap();
            exec.write(beta, &numbers(20)).unwrap();
            guarded.step_blocking().unwrap();
            let halves = [y, xhat].map(|v| exec.read_blocking::<f16>(v).unwrap());
            (merged, halves, exec.read_blocking::<f32>(rstd).unwrap())
        };
        let (_, want, rows) = run(&profile);
        let (merged, got, of_few) = run(&Profile { max_storage_buffers: 4, ..profile.clone() });
        assert!(merged && got == want && of_few == rows, "{profile:?}");
    }
}

/// Elements in place of the first two of each three.
fn own(body: &'static str) -> Custom {
    let launch = move |cx: &Launch| {
        let elements = Elements::new("own", cx.outputs[0].len(), body).bind("x", Bind::In(0));
        elements.bind("y", Bind::Out(0)).program(cx)
    };
    Custom::new("own", |[x]| Ok([x.clone()]), launch, |[x]| [x.map(|x| 2.0 * x)])
}

#[test]
fn an_op_of_an_app_knows_nothing_of_f16() {
    for profile in both() {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f16(ODD)).unwrap();
        let y = g.op1("y", own("y[i] = x[i]; y[i] += x[i];"), &[x]).unwrap();
        g.store_as(y, DType::F16).unwrap();
        let exec = executable(Plan::new(&g, &[y], &profile).unwrap());
        exec.write(x, &halves(numbers(15))).unwrap();
        exec.submit().unwrap();
        let want: Vec<f16> = halves(numbers(15)).into_iter().map(|x| x + x).collect();
        assert_eq!(exec.read_blocking::<f16>(y).unwrap(), want, "{profile:?}");
    }
}

#[test]
fn wgsl_that_cannot_have_f16_is_an_error_that_names_the_node() {
    let bodies = [
        ("let p = &x[i]; y[i] = *p;", "`x` in f16: its WGSL takes the address"),
        ("for (y[i] = 0.0; y[i] < 1.0;) { y[i] = x[i] + 1.0; }", "`y` in f16: its WGSL stores to it in the head"),
        ("let f16_x = x[i]; y[i] = f16_x;", "`f16_x` is taken"),
    ];
    for (body, expected) in bodies {
        for profile in both() {
            let plan = |dtype| {
                let mut g = Graph::new();
                let x = g.input("x", TensorType::f32(ODD).with_dtype(dtype)).unwrap();
                let y = g.op1("mine", own(body), &[x]).unwrap();
                g.store_as(y, dtype).unwrap();
                Plan::new(&g, &[y], &profile)
            };
            plan(DType::F32).unwrap();
            let error = plan(DType::F16).unwrap_err().to_string();
            assert!(error.contains("`mine` (own)") && error.contains(expected), "{error}");
        }
    }
    // A buffer that is no array of floats.
    let whole = |_: &Launch| {
        let text = "struct S { v: array<f32, 15> }
            @group(0) @binding(1) var<storage, read> x: S;
            @group(0) @binding(2) var<storage, read_write> y: array<f32>;
            @compute @workgroup_size(1) fn main(@builtin(global_invocation_id) id: vec3<u32>) { y[id.x] = x.v[id.x]; }";
        let mut program = Program::default();
        program.dispatch(Kernel::new("whole", text, "main"), &[Bind::In(0), Bind::Out(0)], &[], [15, 1, 1]);
        Ok(program)
    };
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f16(ODD)).unwrap();
    let op = Custom::new("whole", |[x]| Ok([x.clone()]), whole, |[x]| [x.clone()]);
    let y = g.op1("mine", op, &[x]).unwrap();
    let error = Plan::new(&g, &[y], &Profile::portable(AdapterClass::Gpu)).unwrap_err().to_string();
    assert!(error.contains("`mine` (whole)") && error.contains("`x` in f16: its WGSL has it as S, and not"), "{error}");
}

#[test]
fn what_cannot_be_stored_so_is_an_error_that_names_it() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([4, 4])).unwrap();
    let ids = g.input("ids", TensorType::u32([2])).unwrap();
    let state = g.state("state", TensorType::f32([16])).unwrap();
    let y = g.scale("y", x, 2.0).unwrap();
    let z = g.scale("z", x, 3.0).unwrap();
    let flat = g.reshape("flat", y, [16]).unwrap();
    let again = g.reshape("again", flat, [2, 8]).unwrap();
    let last = g.reshape("last", again, [16]).unwrap();
    let rows = g.embedding("rows", x, ids).unwrap();
    g.store(last, state).unwrap();
    let mut refused = |value, dtype, parts: &[&str]| {
        let error = g.store_as(value, dtype).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    refused(x, DType::F16, &["`x`", "f32[4, 4]", "`Graph::cast`"]);
    refused(ids, DType::F16, &["`ids`", "u32[2]", "only floats"]);
    refused(rows, DType::U32, &["`rows`", "u32", "only floats"]);
    refused(flat, DType::F16, &["`flat`", "the storage of its input"]);
    // A view of a view of it is left in a state.
    refused(y, DType::F16, &["`y`", "`state`", "which is f32"]);
    assert_eq!(g.ty(y).dtype, DType::F32);
    g.store_as(z, DType::F16).unwrap();
    let half = g.state("half", TensorType::f16([4, 4])).unwrap();
    g.store(z, half).unwrap();
    let error = g.store_as(z, DType::F32).unwrap_err().to_string();
    assert!(error.contains("`z`") && error.contains("`half`, which is f16"), "{error}");
    let error = g.store(y, half).unwrap_err().to_string();
    assert!(error.contains("f32[4, 4]") && error.contains("f16[4, 4]"), "{error}");
}
