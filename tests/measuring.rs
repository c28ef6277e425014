//! The profiler, the tuner and the pipeline cache.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::gpu;
use throughline::device::timeline::Clock;
use throughline::graph::{Op, Vjp};
use throughline::kernel::{Bind, Kernel, Launch, Program};
use throughline::plan::variants;
use throughline::reference::Array;
use throughline::{
    Choices, Error, ExecOptions, Executable, Gpu, Graph, Pace, Plan, Profile, Readback, Result, TensorType, Tuner,
    Value,
};

/// y = x, by a kernel that takes its time in one of two variants.
#[derive(Debug)]
struct Dawdle;

const WGSL: &str = "
const ROUNDS: u32 = 1u;
@group(0) @binding(0) var<uniform> n: u32;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < n) {
        var v = x[id.x];
        for (var i = 0u; i < ROUNDS; i++) {
            v = sin(v);
        }
        y[id.x] = select(v, x[id.x], v < 2.0);
    }
}";

impl Op for Dawdle {
    fn name(&self) -> &'static str {
        "dawdle"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("only for timing"))
    }
    fn variants(&self, _: &Launch<'_>) -> Vec<String> {
        vec!["slow".into(), "quick".into()]
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let n = cx.outputs[0].len();
        let kernel = Kernel::new("dawdle", WGSL, "main").knob("ROUNDS", [100_000u32, 1][cx.variant]);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &[n as u32], cx.profile.grid(n.div_ceil(64))))
    }
    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].clone()]
    }
    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        1_000
    }
}

/// y = x, then z = y + y.
fn dawdle(n: usize) -> (Graph, Value, Value) {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([n])).unwrap();
    let y = g.op1("y", Dawdle, &[x]).unwrap();
    let z = g.residual_add("z", y, y).unwrap();
    (g, x, z)
}

fn rounds(plan: &Plan) -> &str {
    &plan.steps()[0].dispatches()[0].kernel().knobs[0].1
}

#[test]
fn the_tuner_takes_the_fastest_variant_and_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tuned.json");
    let (g, x, z) = dawdle(100);
    assert_eq!(rounds(&Plan::new(&g, &[z], gpu().profile()).unwrap()), "100000u"); // unmeasured: the first
    let mut tuner = Tuner::open(&path).unwrap();
    let choices = tuner.tune_blocking(gpu(), [&gpu().plan(&g, &[z]).unwrap()]).unwrap();
    let tuned = gpu().with_choices(choices);
    let plan = tuned.plan(&g, &[z]).unwrap();
    assert_eq!(rounds(&plan), "1u");
    let exec = Executable::new_blocking(&tuned, Arc::new(plan), ExecOptions::default()).unwrap();
    exec.write(x, &[3.0f32; 100]).unwrap();
    exec.submit().unwrap();
    assert_eq!(exec.read_blocking::<f32>(z).unwrap(), [6.0; 100]);

    // Another process finds it in the file; so does another shape of the same class.
    let mut again = Tuner::open(&path).unwrap();
    let plan = |n: usize| {
        let (g, _, z) = dawdle(n);
        Plan::new(&g, &[z], gpu().profile()).unwrap()
    };
    let key = variants::tunables(&plan(100), gpu().profile())[0].key.clone();
    assert_eq!(again.tune_blocking(gpu(), [&plan(100)]).unwrap().get(&key), Some("quick"));
    assert_eq!(again.tune_blocking(gpu(), [&plan(100)]).unwrap().get(&key), Some("quick"));
    assert_eq!(again.measured(), 0);
    again.tune_blocking(gpu(), [&plan(1000)]).unwrap();
    assert_eq!(again.measured(), 1);

    // A choice that the op does not offer is as none, and other kernels are measured anew.
    let mut profile = Profile { choices: Choices::default(), ..gpu().profile().clone() };
    profile.choices.set(key, "gone".into());
    assert_eq!(rounds(&Plan::new(&g, &[z], &profile).unwrap()), "100000u");
    let text = std::fs::read_to_string(&path).unwrap();
    let kernels = text.split("\"kernels\": ").nth(1).unwrap().split(',').next().unwrap().to_string();
    std::fs::write(&path, text.replace(&kernels, "1")).unwrap();
    let mut stale = Tuner::open(&path).unwrap();
    stale.tune_blocking(gpu(), [&plan(100), &plan(1000)]).unwrap();
    assert_eq!(stale.measured(), 1);
}

#[test]
fn a_bad_tuner_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tuned.json");
    for (text, want) in [
        ("", "EOF"),
        ("{\"format\": 1, \"adapters\": {", "EOF"),
        ("{\"format\": 1, \"adapters\": []}", "expected a map"),
        ("{\"format\": 9, \"adapters\": {}}", "expected 1, got 9"),
        ("{\"adapters\": {}}", "format"),
    ] {
        std::fs::write(&path, text).unwrap();
        let message = Tuner::open(&path).unwrap_err().to_string();
        assert!(message.contains("tuned.json") && message.contains(want), "{text}: {message}");
    }
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(Tuner::open(&path), Err(Error::Format { .. })));
    let mut nowhere = Tuner::open(dir.path().join("no/such/dir.json")).unwrap();
    let (g, _, z) = dawdle(10);
    let plan = gpu().plan(&g, &[z]).unwrap();
    assert!(matches!(nowhere.tune_blocking(gpu(), [&plan]), Err(Error::Io { .. })));
}

#[test]
fn what_is_no_measurement_in_a_tuner_file_is_ignored_with_the_reason() {
    let file = |times: &str| {
        let entry = format!("{{\"kernels\": 1, \"variant\": \"quick\", \"microseconds\": {{{times}}}}}");
        format!("{{\"format\": 1, \"adapters\": {{\"A\": {{\"dawdle f32[64]\": {entry}}}}}}}")
    };
    for (times, want) in [
        ("\"quick\": 0.0, \"slow\": 2.0", "`quick` took 0 µs"),
        ("\"quick\": 1.0, \"slow\": 0", "`slow` took 0 µs"),
        ("\"quick\": -1.0, \"slow\": 2.0", "`quick` took -1 µs"),
        ("\"quick\": null, \"slow\": 2.0", "`quick` took null µs"),
        ("\"quick\": 1.0, \"slow\": 1e300", "`slow` took 1"),
        ("\"slow\": 2.0", "`quick` has no time"),
        ("\"quick\": 3.0, \"slow\": 2.0", "`slow` is"),
    ] {
        let tuner = Tuner::from_bytes(file(times).as_bytes()).unwrap();
        let [reason] = tuner.ignored() else { panic!("{times}: {:?}", tuner.ignored()) };
        assert!(reason.contains("`A`, `dawdle f32[64]`: ") && reason.contains(want), "{times}: {reason}");
    }
    assert!(Tuner::from_bytes(file("\"quick\": 1.0, \"slow\": 2.0").as_bytes()).unwrap().ignored().is_empty());
    assert!(matches!(Tuner::from_bytes(b"{"), Err(Error::Format { .. })));

    // It is measured anew.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tuned.json");
    let (g, _, z) = dawdle(100);
    let plan = gpu().plan(&g, &[z]).unwrap();
    Tuner::open(&path).unwrap().tune_blocking(gpu(), [&plan]).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let quick = text.split("\"quick\": ").nth(1).unwrap().split([',', '\n']).next().unwrap().to_string();
    assert!(text.contains("\"clock\": \"gpu\""), "{text}");
    std::fs::write(&path, text.replace(&quick, "0.0")).unwrap();
    let mut tuner = Tuner::open(&path).unwrap();
    assert_eq!(tuner.ignored().len(), 1);
    tuner.tune_blocking(gpu(), [&plan]).unwrap();
    assert_eq!(tuner.measured(), 1);
}

#[test]
fn the_profiler_sees_every_node_and_which_is_slow() {
    let (g, x, z) = dawdle(1000);
    let plan = Arc::new(Plan::new(&g, &[z], gpu().profile()).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(x, &[0.5f32; 1000]).unwrap();
    exec.submit().unwrap(); // compiles
    let timeline = exec.profile_blocking().unwrap();
    assert_eq!(timeline.clock, Clock::Gpu);
    let nodes: Vec<(&str, &str)> = timeline.nodes.iter().map(|n| (n.node.as_str(), n.op)).collect();
    assert_eq!(nodes, [("y", "dawdle"), ("z", "residual_add")]);
    let (y, z_) = (&timeline.nodes[0], &timeline.nodes[1]);
    assert!(y.ns() > 10 * z_.ns(), "{timeline}");
    assert_eq!(y.flops, 1_000);
    assert!(z_.spans.last().unwrap().start_ns >= y.spans[0].start_ns + y.spans[0].ns, "{timeline}");
    assert_eq!(exec.read_blocking::<f32>(z).unwrap(), [1.0; 1000]); // a step like others
    let table = timeline.to_string();
    assert!(table.contains("dawdle.main") && table.contains("GFLOP/s") && table.contains("by op:"), "{table}");
    let dir = tempfile::tempdir().unwrap();
    timeline.write_trace(dir.path().join("trace.json")).unwrap();
}

/// A device with nothing but WebGPU's defaults.
fn plain_gpu() -> Gpu {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    pollster::block_on(async {
        let adapter = instance.request_adapter(&Default::default()).await.unwrap();
        let (device, queue) = adapter.request_device(&Default::default()).await.unwrap();
        Gpu::from_device(device, queue)
    })
}

#[test]
fn without_timestamps_the_hosts_clock_serves() {
    let gpu = plain_gpu();
    let (g, x, z) = dawdle(1000);
    let plan = Arc::new(Plan::new(&g, &[z], gpu.profile()).unwrap());
    let exec = Executable::new_blocking(&gpu, plan, ExecOptions::default()).unwrap();
    exec.write(x, &[0.5f32; 1000]).unwrap();
    exec.submit().unwrap();
    let timeline = exec.profile_blocking().unwrap();
    assert_eq!(timeline.clock, Clock::Host);
    assert_eq!(timeline.nodes.len(), 2);
    assert!(timeline.nodes.iter().all(|n| n.ns() > 0), "{timeline}");
    assert_eq!(exec.read_blocking::<f32>(z).unwrap(), [1.0; 1000]);
    let error = pollster::block_on(exec.profile()).unwrap_err().to_string();
    assert!(error.contains("TIMESTAMP_QUERY"), "{error}");
    // Nor is there a pipeline cache.
    let dir = tempfile::tempdir().unwrap();
    assert!(!gpu.save_pipelines(dir.path()).unwrap());
    // SAFETY: the folder is empty.
    assert!(!unsafe { gpu.load_pipelines(dir.path()) }.unwrap());
}

#[test]
fn compiled_pipelines_serve_the_next_device() {
    let dir = tempfile::tempdir().unwrap();
    let run = |gpu: &Gpu| {
        let (g, x, z) = dawdle(10);
        let plan = Arc::new(Plan::new(&g, &[z], gpu.profile()).unwrap());
        let exec = Executable::new_blocking(gpu, plan, ExecOptions::default()).unwrap();
        exec.write(x, &[0.25f32; 10]).unwrap();
        exec.submit().unwrap();
        assert_eq!(exec.read_blocking::<f32>(z).unwrap(), [0.5; 10]);
    };
    run(gpu());
    let supported = gpu().device().features().contains(wgpu::Features::PIPELINE_CACHE);
    assert_eq!(gpu().save_pipelines(dir.path()).unwrap(), supported);
    let next = Gpu::headless_blocking().unwrap();
    // SAFETY: nobody but `save_pipelines` has written to the folder.
    assert_eq!(unsafe { next.load_pipelines(dir.path()) }.unwrap(), supported);
    run(&next);
}

#[test]
fn a_profile_can_be_awaited() {
    let (g, _, z) = dawdle(10);
    let plan = Arc::new(Plan::new(&g, &[z], gpu().profile()).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    let timeline = std::thread::scope(|s| {
        let profile = s.spawn(|| pollster::block_on(exec.profile()));
        while !profile.is_finished() {
            gpu().wait_blocking().unwrap(); // the app's frame loop
        }
        profile.join().unwrap().unwrap()
    });
    assert_eq!(timeline.nodes.len(), 2);
}

#[test]
fn a_pace_corrects_estimates_by_what_frames_took() {
    let ms = Duration::from_millis;
    let mut pace = Pace::new(gpu(), ms(8)).unwrap();
    let may = |pace: &mut Pace| {
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        pace.begin(&mut encoder).unwrap()
    };
    assert_eq!(may(&mut pace), ms(8)); // nothing is known
    (0..64).for_each(|_| pace.took(ms(1), ms(2)));
    assert_eq!(may(&mut pace), ms(4));
    pace.set_budget(ms(2));
    assert_eq!(may(&mut pace), ms(1));
    // Few slow frames are none of its making; more are what frames take now.
    (0..3).for_each(|_| pace.took(ms(1), ms(4)));
    assert_eq!(pace.factor(), 2.0);
    (0..3).for_each(|_| pace.took(ms(1), ms(4)));
    assert_eq!(pace.factor(), 4.0);
    // What is long ago is forgotten, and nothing is believed beyond reason.
    (0..64).for_each(|_| pace.took(ms(1), ms(1000)));
    assert_eq!(pace.factor(), 16.0);
    (0..64).for_each(|_| pace.took(ms(1000), ms(1)));
    assert_eq!(pace.factor(), 1.0 / 16.0);

    // What is no time teaches nothing.
    let frames = pace.frames();
    assert_eq!(frames, 64);
    pace = Pace::new(gpu(), ms(8)).unwrap();
    for time in [Duration::ZERO, Duration::MAX, Duration::from_secs(4000)] {
        pace.took(ms(1), time);
    }
    pace.took(Duration::ZERO, ms(1));
    assert_eq!((pace.frames(), pace.factor()), (0, 1.0));
}

/// A frame that takes far more than the microsecond that it is estimated at.
fn long_frame(pace: &mut Pace, exec: &Executable) -> wgpu::CommandEncoder {
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    pace.begin(&mut encoder).unwrap();
    exec.record(&mut encoder).unwrap();
    pace.end(&mut encoder, Duration::from_micros(1)).unwrap();
    encoder
}

/// Waits until a pace has measured so many frames. Another test's thread may be about to report what its poll found.
fn until_measured(pace: &mut Pace, frames: usize) {
    gpu().wait_blocking().unwrap();
    for _ in 0..10_000 {
        pace.begin(&mut gpu().device().create_command_encoder(&Default::default())).unwrap();
        if pace.frames() >= frames {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(pace.frames(), frames);
}

fn dawdler() -> Executable {
    let (g, x, z) = dawdle(10);
    let plan = Arc::new(Plan::new(&g, &[z], gpu().profile()).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(x, &vec![1.0f32; g.ty(x).len()]).unwrap();
    exec
}

#[test]
fn a_pace_measures_frames_by_itself() {
    let (mut pace, exec) = (Pace::new(gpu(), Duration::from_millis(8)).unwrap(), dawdler());
    for _ in 0..8 {
        gpu().submit(long_frame(&mut pace, &exec)).unwrap();
        gpu().wait_blocking().unwrap();
    }
    until_measured(&mut pace, 8);
    assert!(pace.factor() > 8.0, "{}", pace.factor());
}

#[test]
fn a_pace_survives_frames_that_come_to_nothing() {
    let (mut pace, exec) = (Pace::new(gpu(), Duration::from_millis(8)).unwrap(), dawdler());
    let us = Duration::from_micros;
    let encoder = || gpu().device().create_command_encoder(&Default::default());
    // Dropped, also several in a row; begun in an encoder that is dropped, and ended in one that is not; begun and never
    // ended; ended and never begun; kept for long.
    (0..3).for_each(|_| drop(long_frame(&mut pace, &exec)));
    pace.begin(&mut encoder()).unwrap();
    let mut ends = encoder();
    pace.end(&mut ends, us(1)).unwrap();
    pace.end(&mut ends, us(1)).unwrap();
    gpu().submit(ends).unwrap();
    let mut begins = encoder();
    pace.begin(&mut begins).unwrap();
    gpu().submit(begins).unwrap();
    gpu().wait_blocking().unwrap();
    let kept: Vec<_> = (0..100).map(|_| long_frame(&mut pace, &exec)).collect();
    pace.begin(&mut encoder()).unwrap();
    assert_eq!(pace.frames(), 0);
    // Every frame that is submitted is measured once, however many are in flight.
    for _ in 0..10 {
        let mut encoder = long_frame(&mut pace, &exec);
        pace.end(&mut encoder, us(1)).unwrap();
        gpu().submit(encoder).unwrap();
    }
    until_measured(&mut pace, 10);
    assert!(pace.factor() > 8.0, "{}", pace.factor());
    drop(kept);
    pace.begin(&mut encoder()).unwrap();
    assert_eq!(pace.frames(), 10);
}

#[test]
fn slices_of_a_profile_with_zeros_are_estimates() {
    let exec = dawdler();
    let mut profile = exec.profile_blocking().unwrap();
    assert!(profile.nodes.iter().flat_map(|n| &n.spans).all(|span| span.measured), "{profile}");
    let spans = profile.nodes.iter_mut().flat_map(|n| &mut n.spans);
    let n = spans.enumerate().map(|(i, span)| span.ns = if i == 0 { 500 } else { 0 }).count();
    // What has no time is taken to be like the rest, not to be free.
    let [one, whole] = [500, 500 * n as u64].map(Duration::from_nanos);
    let slices = |budget| exec.slices(&profile, budget).map(|s| s.iter().map(|s| s.estimate).collect::<Vec<_>>());
    assert_eq!(slices(whole).unwrap(), [whole]);
    assert_eq!(slices(one).unwrap(), vec![one; n]);
    profile.nodes[0].spans[0].ns = 0;
    let error = exec.slices(&profile, whole).unwrap_err().to_string();
    assert!(error.contains("not zero"), "{error}");
}

const _: fn() = || {
    fn both<T: Send + Sync>() {}
    both::<Gpu>();
    both::<Executable>();
    both::<Readback>();
};
