//! Recording into the caller's encoder and reading back: without allocations, in any executor, and with errors as
//! `Err`s.

mod common;

use std::collections::HashMap;
use std::future::Future;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use common::gpu;
use throughline::nn::TransformerConfig;
use throughline::optim::Schedule;
use throughline::rng::Rng;
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{Error, ExecOptions, Executable, Gpu, Graph, Plan, Tensor, TensorType, Value};

const VOCAB: usize = 31;

fn config(model: TransformerConfig, batch: usize) -> TrainConfig {
    TrainConfig { micro_batches: 2, schedule: Schedule::constant(3e-3), seed: 1, ..TrainConfig::new(model, batch) }
}

fn tiny() -> TrainConfig {
    config(TransformerConfig { dropout: 0.1, ..TransformerConfig::gpt2(VOCAB, 16, 2, 32, 4) }, 2)
}

fn batches(config: &TrainConfig, step: u64) -> Vec<Batch> {
    let mut rng = Rng::new(&[17, step]);
    let n = config.batch * config.seq_len();
    let mut ids = || (0..n).map(|_| rng.below(VOCAB as u64) as u32).collect::<Vec<u32>>();
    (0..config.micro_batches).map(|_| Batch::new(ids(), ids())).collect()
}

fn encoder(gpu: &Gpu) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&Default::default())
}

fn own_gpu() -> Gpu {
    Gpu::headless_blocking().unwrap()
}

/// Allocations in GPU memory, and their bytes. Where wgpu does not know (Metal), the tests say nothing of it.
fn memory(device: &wgpu::Device) -> Option<(usize, u64)> {
    device.generate_allocator_report().map(|r| (r.allocations.len(), r.total_allocated_bytes))
}

#[test]
fn several_steps_in_one_encoder_are_the_steps_one_by_one() {
    let config = tiny();
    let [mut apart, mut together] = [(); 2].map(|()| Trainer::new_blocking(gpu(), config.clone()).unwrap());
    let mut encoder = encoder(gpu());
    let mut losses = vec![];
    for step in 0..3 {
        losses.push(together.record(&mut encoder, &batches(&config, step)).unwrap());
    }
    gpu().submit(encoder).unwrap();
    for (step, loss) in losses.into_iter().enumerate() {
        let want = apart.step(&batches(&config, step as u64)).unwrap().wait_blocking().unwrap();
        assert_eq!(loss.wait_blocking::<f32>().unwrap()[0].to_bits(), want.to_bits(), "step {step}");
    }
    let checkpoint = |t: &Trainer| Checkpoint::of_blocking(t, "", 0).unwrap();
    assert!(checkpoint(&apart).same_bits(&checkpoint(&together)));
}

/// Layers and width of the model people know from nanoGPT; a short batch, since how long the GPU works is not what
/// this is about.
#[test]
fn recording_a_step_of_384_wide_layers_takes_two_milliseconds_and_no_memory() {
    let gpu = own_gpu();
    let config = config(TransformerConfig::gpt2(VOCAB, 8, 6, 384, 6), 1);
    let data = batches(&config, 0);
    let mut trainer = Trainer::new_blocking(&gpu, config).unwrap();
    let (mut before, mut fastest) = (None, Duration::MAX);
    for step in 0..6 {
        let start = Instant::now();
        let mut encoder = encoder(&gpu);
        let loss = trainer.record(&mut encoder, &data).unwrap();
        fastest = fastest.min(start.elapsed());
        if step > 0 {
            assert_eq!(memory(gpu.device()), before, "step {step}");
        }
        gpu.submit(encoder).unwrap();
        // A loss that nobody reads takes nothing either.
        if step % 2 == 0 {
            loss.wait_blocking::<f32>().unwrap();
        } else {
            drop(loss);
            gpu.wait_blocking().unwrap();
        }
        before = memory(gpu.device());
    }
    assert!(before.is_none_or(|(n, bytes)| n > 10 && bytes > 100 << 20), "{before:?}");
    // The two milliseconds are of a release build, for one micro-batch; this is neither.
    assert!(fastest < Duration::from_millis(8), "{fastest:?}");
}

#[test]
fn dropping_everything_gives_all_memory_back() {
    let gpu = own_gpu();
    let device = gpu.device().clone();
    gpu.wait_blocking().unwrap();
    let before = memory(&device);
    let config = tiny();
    let run = |gpu: &Gpu| {
        let mut trainer = Trainer::new_blocking(gpu, config.clone()).unwrap();
        let loss = trainer.step(&batches(&config, 0)).unwrap();
        trainer.evaluate_blocking(&batches(&config, 1)).unwrap();
        drop(trainer.step(&batches(&config, 1)).unwrap());
        loss.wait_blocking().unwrap();
        assert!(memory(&device).is_none_or(|(_, bytes)| bytes > 100 << 10));
    };
    run(&gpu);
    gpu.clear_pipelines();
    drop(gpu);
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let after = memory(&device);
    let less = before.zip(after).is_none_or(|(before, after)| after.0 < before.0 && after.1 < before.1);
    assert!(less, "{after:?}, was {before:?}");
}

/// What an app may do while it waits: nothing in particular, but poll the device now and then.
#[test]
fn readbacks_come_in_any_executor() {
    fn sendable<F: Future + Send>(f: F) -> F {
        f
    }
    let gpu = gpu(); // the same on all threads
    let config = tiny();
    let want = {
        let mut trainer = Trainer::new_blocking(gpu, config.clone()).unwrap();
        trainer.step(&batches(&config, 0)).unwrap().wait_blocking().unwrap()
    };
    // A whole trainer, made and run without a blocking call.
    let run = async |config: TrainConfig| {
        let mut trainer = Trainer::new(gpu, config.clone()).await?;
        let loss = trainer.step(&batches(&config, 0))?.take().await?;
        trainer.evaluate(&batches(&config, 1)).await?;
        Checkpoint::of(&trainer, "", 0).await?;
        trainer.grads().read(gpu).await?;
        if gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            trainer.profile(&batches(&config, 1)).await?;
        }
        Ok::<f32, Error>(loss)
    };
    let poll = || gpu.device().poll(wgpu::PollType::Poll).map(drop).unwrap();

    // A game loop: a frame polls device and future once.
    let mut future = Box::pin(run(config.clone()));
    let got = loop {
        poll();
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(loss) => break loss.unwrap(),
            Poll::Pending => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    assert_eq!(got.to_bits(), want.to_bits());

    // tokio, with a task that polls the device, on several threads: wakers are what makes this end.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let got = runtime.block_on(async {
        let over = done.clone();
        runtime.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                gpu.device().poll(wgpu::PollType::Poll).unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let task = runtime.spawn(sendable(run(config.clone())));
        tokio::time::timeout(Duration::from_secs(60), task).await.unwrap().unwrap().unwrap()
    });
    done.store(true, Ordering::Relaxed);
    assert_eq!(got.to_bits(), want.to_bits());

    // pollster parks its thread: another one polls.
    let over = AtomicBool::new(false);
    let got = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                poll();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let got = pollster::block_on(run(config.clone())).unwrap();
        over.store(true, Ordering::Relaxed);
        got
    });
    assert_eq!(got.to_bits(), want.to_bits());
}

/// `total` becomes `total + x`.
fn accumulator() -> (Arc<Plan>, Value, Value) {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64])).unwrap();
    let total = g.state("total", TensorType::f32([64])).unwrap();
    let sum = g.residual_add("sum", total, x).unwrap();
    g.store(sum, total).unwrap();
    (Arc::new(Plan::new(&g, &[], gpu().profile()).unwrap()), x, total)
}

#[test]
fn writes_happen_where_they_are_recorded() {
    let (plan, x, total) = accumulator();
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    let mut encoder = encoder(gpu());
    let mut totals = vec![];
    for i in 1..=3 {
        exec.record_write(&mut encoder, x, &[i as f32; 64]).unwrap();
        exec.record(&mut encoder).unwrap();
        totals.push(exec.tensor(total).unwrap().record_read(gpu(), &mut encoder));
    }
    let error = exec.record_write(&mut encoder, x, &[1.0f32; 63]).unwrap_err().to_string();
    assert!(error.contains("`x`") && error.contains("64 elements") && error.contains("63 elements"), "{error}");
    gpu().submit(encoder).unwrap();
    for (readback, want) in totals.into_iter().zip([1.0, 3.0, 6.0]) {
        assert_eq!(readback.wait_blocking::<f32>().unwrap(), [want; 64]);
    }
}

#[test]
fn an_output_cannot_be_written() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64])).unwrap();
    let y = g.scale("twice", x, 2.0).unwrap();
    let plan = Arc::new(Plan::new(&g, &[y], gpu().profile()).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    let mut encoder = encoder(gpu());
    for written in [exec.write(y, &[1.0f32; 64]), exec.record_write(&mut encoder, y, &[1.0f32; 64])] {
        let error = written.unwrap_err().to_string();
        assert!(error.contains("`twice` cannot be written") && error.contains("output"), "{error}");
    }
}

#[test]
fn an_executable_takes_other_tensors() {
    let (plan, x, total) = accumulator();
    let zeros = |name: &str, n| Tensor::zeros(gpu(), name, TensorType::f32([n])).unwrap();
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::default()).unwrap();
    exec.write(x, &[1.0f32; 64]).unwrap();
    let rings = [zeros("even", 64), zeros("odd", 64)];
    let others = rings.clone().map(|t| exec.with_bindings(&HashMap::from([(total, t)])).unwrap());
    let mut encoder = encoder(gpu());
    for exec in [&others[0], &others[1], &exec, &others[1]] {
        exec.record(&mut encoder).unwrap();
    }
    gpu().submit(encoder).unwrap();
    assert_eq!(exec.read_blocking::<f32>(total).unwrap(), [1.0; 64]);
    assert_eq!(rings[0].read_blocking::<f32>(gpu()).unwrap(), [1.0; 64]);
    assert_eq!(others[1].read_blocking::<f32>(total).unwrap(), [2.0; 64]);
    // What does not fit is told at once.
    let refused = |bindings: Vec<(Value, Tensor)>| exec.with_bindings(&bindings.into_iter().collect()).unwrap_err();
    let error = refused(vec![(total, zeros("short", 32))]).to_string();
    assert!(error.contains("`total`") && error.contains("f32[32]"), "{error}");
    let error = refused(vec![(total, rings[0].clone()), (x, rings[0].clone())]).to_string();
    assert!(error.contains("`sum`") && error.contains("one buffer"), "{error}");
}

#[test]
fn a_readback_of_what_was_not_submitted_is_an_error() {
    let tensor = Tensor::zeros(gpu(), "t", TensorType::f32([4])).unwrap();
    let mut dropped = encoder(gpu());
    let readback = tensor.record_read(gpu(), &mut dropped);
    drop(dropped);
    let error = readback.wait_blocking::<f32>().unwrap_err().to_string();
    assert!(error.contains("not submitted"), "{error}");
    // Of another type than the tensor has.
    let mut encoder = encoder(gpu());
    let readback = tensor.record_read(gpu(), &mut encoder);
    gpu().submit(encoder).unwrap();
    let error = readback.wait_blocking::<u32>().unwrap_err().to_string();
    assert!(error.contains("expected f32") && error.contains("u32"), "{error}");
}

/// Its encoder may be submitted yet, so somebody has to give up; but not while there are submits.
#[test]
fn waiting_for_what_is_never_submitted_ends_a_second_after_the_last_submit() {
    let gpu = own_gpu();
    let tensor = Tensor::zeros(&gpu, "t", TensorType::f32([1 << 20])).unwrap();
    // Whether the machine is idle or has other things to do. The rest of the time is for what else runs on it.
    for busy in [0, std::thread::available_parallelism().unwrap().get()] {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..busy {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let start = Instant::now();
            let mut kept = encoder(&gpu);
            let readback = tensor.record_read(&gpu, &mut kept);
            let error = readback.wait_blocking::<f32>().unwrap_err().to_string();
            done.store(true, Ordering::Relaxed);
            assert!(error.contains("idle") && error.contains("submitted?"), "{error}");
            assert!((1.0..10.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
        });
    }

    let mut late = encoder(&gpu);
    let readback = tensor.record_read(&gpu, &mut late);
    let data = std::thread::scope(|scope| {
        let other = (gpu.clone(), tensor.clone());
        scope.spawn(move || {
            let (gpu, tensor) = other;
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(1500) {
                drop(tensor.read_blocking::<f32>(&gpu).unwrap());
            }
            gpu.submit(late).unwrap();
        });
        readback.wait_blocking::<f32>().unwrap()
    });
    assert_eq!(data.len(), 1 << 20);
}

/// A call of the driver may take seconds, since another thread compiles. What came meanwhile counts.
#[test]
fn a_wait_looks_once_more_after_a_slow_look() {
    let mut looks = 0;
    let held_up = std::future::poll_fn(|_| {
        looks += 1;
        match looks {
            300 => std::thread::sleep(Duration::from_millis(1500)),
            600.. => return Poll::Ready(Ok(looks)),
            _ => {}
        }
        Poll::Pending
    });
    assert_eq!(own_gpu().run_blocking(held_up).unwrap(), 600);
}

/// The thread whose poll found that data are there tells the others, but an app's callback may hold it up.
#[test]
fn what_another_thread_is_about_to_report_is_waited_for() {
    let gpu = own_gpu();
    let tensor = Tensor::zeros(&gpu, "t", TensorType::f32([4])).unwrap();
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let desc = wgpu::BufferDescriptor { label: Some("the app's"), size: 4, usage, mapped_at_creation: false };
    let apps = gpu.device().create_buffer(&desc);
    let (begun, begins) = std::sync::mpsc::channel();
    let mut encoder = encoder(&gpu);
    encoder.clear_buffer(&apps, 0, None);
    encoder.map_buffer_on_submit(&apps, wgpu::MapMode::Read, .., move |_| {
        begun.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(2500));
    });
    let readback = tensor.record_read(&gpu, &mut encoder);
    gpu.submit(encoder).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| gpu.wait_blocking().unwrap());
        begins.recv().unwrap();
        let start = Instant::now();
        assert_eq!(readback.wait_blocking::<f32>().unwrap(), [0.0; 4]);
        assert!(start.elapsed() > Duration::from_millis(2000), "the data were not in the other thread's hands");
    });
}

#[test]
fn a_wait_ends_when_the_device_is_lost() {
    let gpu = own_gpu();
    let tensor = Tensor::zeros(&gpu, "t", TensorType::f32([4])).unwrap();
    let mut kept = encoder(&gpu);
    let readback = tensor.record_read(&gpu, &mut kept);
    gpu.device().destroy();
    let error = readback.wait_blocking::<f32>().unwrap_err();
    assert!(matches!(error, Error::DeviceLost(_)), "{error}");
}

/// The app's handler for errors that no scope catches makes a panic of them, as wgpu's own does.
#[test]
fn what_the_device_refuses_is_an_error_and_does_not_reach_the_apps_handler() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    let [gpu, other] = [(); 2].map(|()| {
        let (device, queue) = pollster::block_on(adapter.request_device(&Default::default())).unwrap();
        Gpu::from_device(device, queue)
    });
    gpu.device().on_uncaptured_error(Arc::new(|e| panic!("uncaptured: {e}")));
    let tensor = Tensor::zeros(&gpu, "t", TensorType::f32([4])).unwrap();
    // A copy beyond a buffer's end.
    let mut bad = encoder(&gpu);
    bad.copy_buffer_to_buffer(tensor.buffer(), 0, tensor.buffer(), 1 << 20, Some(16));
    assert!(matches!(gpu.submit(bad).unwrap_err(), Error::Device(_)));
    // A buffer of another device.
    let (plan, _, total) = accumulator();
    let foreign = Tensor::zeros(&other, "foreign", TensorType::f32([64])).unwrap();
    let options = ExecOptions::bound(HashMap::from([(total, foreign)]));
    assert!(matches!(Executable::new_blocking(&gpu, plan, options).unwrap_err(), Error::Device(_)));
    assert_eq!(tensor.read_blocking::<f32>(&gpu).unwrap(), [0.0; 4]);
}

/// Without memory: wgpu keeps to a share of what the driver says that is there. Mesa 22's software driver does not say,
/// so there the test runs in a process that gets only some address space.
#[test]
fn no_memory_left_is_an_error_and_everything_else_works_on() {
    const CHILD: &str = "IN_LITTLE_MEMORY";
    let software = gpu().info().device_type == wgpu::DeviceType::Cpu;
    if software && cfg!(target_os = "linux") && std::env::var_os(CHILD).is_none() {
        let again = "ulimit -v 4000000 && exec \"$0\" --exact no_memory_left_is_an_error_and_everything_else_works_on";
        let program = std::env::current_exe().unwrap();
        let output = Command::new("sh").args(["-c", again]).arg(program).env(CHILD, "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let refused = [50, 20, 10, 5, 2, 1].into_iter().any(|percent| {
        let gpu = gpu_within(percent);
        let mut trainer = Trainer::new_blocking(&gpu, tiny()).unwrap();
        let mut step = || {
            let data = batches(&tiny(), trainer.step_count());
            trainer.step(&data).unwrap().wait_blocking().unwrap()
        };
        let first = step();
        // Nobody writes to them, so that a software driver needs no page of them.
        let large = (0..8).map(|_| Tensor::zeros(&gpu, "large", TensorType::f32([1 << 28])));
        let Some(error) = large.collect::<Result<Vec<_>, _>>().err() else { return false };
        assert!(
            matches!(&error, Error::OutOfMemory(m) if m.contains("`large`") && m.contains("1073741824")),
            "{error}"
        );
        assert!([(); 3].map(|()| step()).iter().all(|loss| loss.is_finite() && *loss != first));
        true
    });
    assert!(refused, "eight tensors of a GiB are always there");
}

/// A device on which buffers may take a share of the memory that the driver says there is.
fn gpu_within(percent: u8) -> Gpu {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.memory_budget_thresholds.for_resource_creation = Some(percent);
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    device.on_uncaptured_error(Arc::new(|e| panic!("uncaptured: {e}")));
    Gpu::from_device(device, queue)
}
