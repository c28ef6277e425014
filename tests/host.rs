//! Inside an app that owns the device: with its passes around ours, its threads, its limits, and a lost device.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::gpu;
use throughline::decode::sample::Sampling;
use throughline::decode::{DecodeOptions, Decoder, FrameDecoder, GenerationOptions};
use throughline::model::Model;
use throughline::nn::{Transformer, TransformerConfig};
use throughline::optim::{MuonConfig, Schedule};
use throughline::rng::Rng;
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::Batch;
use throughline::train::{SlicedStep, TrainConfig, Trainer};
use throughline::{
    AdapterClass, Error, ExecOptions, Executable, Gpu, Graph, Plan, Profile, Readback, Requirements, Tensor,
    TensorType, Timeline,
};

const VOCAB: usize = 31;
const TIME: usize = 16;

fn config() -> TrainConfig {
    TrainConfig {
        micro_batches: 2,
        schedule: Schedule::constant(3e-3),
        seed: 1,
        ..TrainConfig::new(TransformerConfig { dropout: 0.1, ..TransformerConfig::gpt2(VOCAB, TIME, 2, 32, 4) }, 2)
    }
}

fn batches(step: u64) -> [Batch; 2] {
    let mut rng = Rng::new(&[17, step]);
    let mut ids = || (0..2 * TIME).map(|_| rng.below(VOCAB as u64) as u32).collect::<Vec<u32>>();
    [(); 2].map(|()| Batch::new(ids(), ids()))
}

fn trainer(gpu: &Gpu) -> Trainer {
    Trainer::new_blocking(gpu, config()).unwrap()
}

fn checkpoint(trainer: &Trainer) -> Checkpoint {
    Checkpoint::of_blocking(trainer, "", 0).unwrap()
}

/// A device that the app opens, with limits of its choice.
fn device(limits: impl Fn(&wgpu::Adapter) -> wgpu::Limits) -> (wgpu::Device, wgpu::Queue) {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits(&adapter), ..Default::default() };
    pollster::block_on(adapter.request_device(&descriptor)).unwrap()
}

/// The app's own work: a pass that doubles every word of a buffer.
struct HostPass {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    buffer: wgpu::Buffer,
}

impl HostPass {
    fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> HostPass {
        let source = "@group(0) @binding(0) var<storage, read_write> x: array<u32>;\n\
            @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) i: vec3<u32>) { x[i.x] *= 2u; }";
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("host"),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("host"),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let usage = Tensor::USAGES;
        let buffer =
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size: 256, usage, mapped_at_creation: false });
        queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&[1u32; 64]));
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
        });
        HostPass { pipeline, group, buffer }
    }

    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
}

#[test]
fn a_step_between_the_apps_passes_gives_the_same_bits() {
    let (mut ours, mut theirs) = (trainer(gpu()), trainer(gpu()));
    let host = HostPass::new(gpu().device(), gpu().queue());
    for step in 0..5 {
        let want = ours.step(&batches(step)).unwrap().wait_blocking().unwrap();
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        host.record(&mut encoder);
        let loss = theirs.record(&mut encoder, &batches(step)).unwrap();
        host.record(&mut encoder);
        gpu().queue().submit([encoder.finish()]);
        let got = loss.wait_blocking::<f32>().unwrap()[0];
        assert_eq!(got.to_bits(), want.to_bits(), "step {step}");
    }
    assert!(checkpoint(&ours).same_bits(&checkpoint(&theirs)));
    let words = Tensor::from_buffer(host.buffer.clone(), 0, TensorType::u32([64])).unwrap();
    assert_eq!(words.read_blocking::<u32>(gpu()).unwrap(), [1024; 64]); // ten passes
}

#[test]
fn two_trainers_on_two_threads_give_the_bits_that_each_gives_alone() {
    let gpu = gpu(); // the same on all threads
    let alone = {
        let mut trainer = trainer(gpu);
        (0..8).for_each(|step| drop(trainer.step(&batches(step)).unwrap()));
        checkpoint(&trainer)
    };
    let run = || {
        let mut trainer = trainer(gpu);
        for step in 0..8 {
            trainer.step(&batches(step)).unwrap().wait_blocking().unwrap();
        }
        checkpoint(&trainer)
    };
    let [a, b] = std::thread::scope(|scope| [scope.spawn(run), scope.spawn(run)].map(|t| t.join().unwrap()));
    assert!(a.same_bits(&alone) && b.same_bits(&alone));
}

#[test]
fn webgpus_default_limits_and_no_features_will_do() {
    let (device, queue) = device(|_| wgpu::Limits::default());
    assert!((device.features() & Gpu::USEFUL_FEATURES).is_empty());
    let gpu = Gpu::from_device(device, queue);
    let mut trainer = trainer(&gpu);
    let losses = [0; 6].map(|step| trainer.step(&batches(step)).unwrap().wait_blocking().unwrap());
    assert!(losses[5] < losses[0], "{losses:?}");
}

/// Four storage buffers for a kernel, and a little less workgroup memory than WebGPU has.
fn downlevel(max_storage_buffer_binding_size: u64) -> Gpu {
    let limits = wgpu::Limits { max_storage_buffer_binding_size, ..wgpu::Limits::downlevel_defaults() };
    let (device, queue) = device(|_| limits.clone());
    Gpu::from_device(device, queue)
}

const DOWNLEVEL_BINDING: u64 = wgpu::Limits::downlevel_defaults().max_storage_buffer_binding_size;

#[test]
fn downlevel_limits_will_do_for_training() {
    let llama = TransformerConfig { n_kv_heads: 2, qk_norm: true, ..TransformerConfig::llama(VOCAB, TIME, 2, 32, 4) };
    let llama = TrainConfig { model: llama, muon: Some(MuonConfig::default()), ..config() };
    // Of the last, arenas are in parts, each of which is merged with something.
    for (config, binding) in [(config(), DOWNLEVEL_BINDING), (llama, DOWNLEVEL_BINDING), (config(), 32 << 10)] {
        let gpu = downlevel(binding);
        let mut trainers = [&gpu, common::gpu()].map(|gpu| Trainer::new_blocking(gpu, config.clone()).unwrap());
        let mut losses = [vec![], vec![]];
        for _ in 0..6 {
            for (trainer, losses) in trainers.iter_mut().zip(&mut losses) {
                losses.push(trainer.step(&batches(0)).unwrap().wait_blocking().unwrap());
            }
        }
        assert!(common::worst(&losses[0], &losses[1]) < 1e-4, "{losses:?}");
        assert!(losses[0][5] < losses[0][0] - 0.02, "{losses:?}");
        let merged = trainers
            .each_ref()
            .map(|t| t.plan().steps().iter().flat_map(|s| s.dispatches()).any(|d| !d.ranges().is_empty()));
        assert_eq!(merged, [true, false]);
        assert_eq!(trainers[0].params().parts.len() > 2, binding < DOWNLEVEL_BINDING);
    }
}

#[test]
fn downlevel_limits_will_do_for_decoding() {
    let few = downlevel(DOWNLEVEL_BINDING);
    let model = Model::open(&common::hf_folder("llama")).unwrap();
    let prompt = [5, 17, 80, 3];
    let [got, want] = [&few, gpu()].map(|gpu| {
        let mut decoder =
            Decoder::new_blocking(gpu, &model, DecodeOptions { batch: 2, ..DecodeOptions::new(32) }).unwrap();
        let logits = decoder.feed_batch_blocking(&[&prompt, &prompt[..2]]).unwrap().concat();
        decoder.clear();
        let options = GenerationOptions {
            max_tokens: 12,
            sampling: Sampling { temperature: 0.0, ..Default::default() },
            ..Default::default()
        };
        let mut alone = Decoder::new_blocking(gpu, &model, 32).unwrap();
        let ids: Vec<u32> = alone.generate(&prompt, options).unwrap().blocking().map(Result::unwrap).collect();
        (logits, ids)
    });
    assert!(common::worst(&got.0, &want.0) < 1e-4);
    assert_eq!(got.1, want.1);
}

/// A plan made before there is a device says what to open it with, and no less does.
#[test]
fn a_device_with_just_what_a_plan_requires_runs_it() {
    let mut g = Graph::new();
    let model = Transformer::build(&mut g, &config().model, 2, TIME, false).unwrap();
    let targets = g.input("targets", TensorType::u32([2, TIME])).unwrap();
    let loss = g.cross_entropy("loss", model.logits, targets).unwrap();
    let params = model.params.clone();
    let outputs = [vec![loss], g.gradients(loss, &params).unwrap()].concat();
    let profile = Profile { subgroups: None, ..Profile::portable(gpu().profile().class) };
    let plan = Arc::new(Plan::new(&g, &outputs, &profile).unwrap());
    let needs = Requirements::of(&plan);

    let mut limits = wgpu::Limits::downlevel_defaults();
    let low = needs.check(&limits).unwrap_err().to_string();
    assert!(low.contains("max_storage_buffers_per_shader_stage: ") && low.contains("4 allowed"), "{low}");
    // A plan for a device that binds as few needs no more, of either class of kernels.
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let few = Profile { class, max_storage_buffers: 4, max_workgroup_bytes: 16_352, ..profile.clone() };
        let few = Requirements::of(&Plan::new(&g, &outputs, &few).unwrap());
        few.check(&limits).unwrap();
        let less = wgpu::Limits { max_compute_workgroups_per_dimension: few.workgroups - 1, ..limits.clone() };
        let low = few.check(&less).unwrap_err().to_string();
        assert!(low.contains("max_compute_workgroups_per_dimension: ") && !low.contains(';'), "{low}");
    }
    needs.raise(&mut limits);
    needs.check(&limits).unwrap();
    limits.max_storage_buffers_per_shader_stage = needs.storage_buffers;
    let (device, queue) = device(|_| limits.clone());
    let gpu = Gpu::from_device(device, queue);
    let exec = Executable::new_blocking(&gpu, plan.clone(), ExecOptions::default()).unwrap();
    exec.write(model.tokens, &[1u32; 2 * TIME]).unwrap();
    exec.write(targets, &[2u32; 2 * TIME]).unwrap();
    exec.submit().unwrap();
    let got = exec.read_blocking::<f32>(loss).unwrap()[0];
    assert!((got - (VOCAB as f32).ln()).abs() < 0.5, "{got}");

    // What two plans need is what either needs.
    let small = Requirements::of(&Plan::new(&g, &[model.stream[0]], &profile).unwrap());
    assert_eq!(small.and(needs), needs);
    assert!(small.storage_buffers < needs.storage_buffers);
}

#[test]
fn a_lost_device_is_an_error_and_training_goes_on_from_the_checkpoint_on_another() {
    let open = || {
        let (device, queue) = device(wgpu::Adapter::limits);
        Gpu::from_device(device, queue)
    };
    let mut unbroken = trainer(&open());
    (0..6).for_each(|step| drop(unbroken.step(&batches(step)).unwrap()));
    let want = checkpoint(&unbroken);

    let first = open();
    let mut lost = trainer(&first);
    (0..3).for_each(|step| drop(lost.step(&batches(step)).unwrap()));
    let saved = checkpoint(&lost);
    let before = lost.step(&batches(3)).unwrap();
    assert!(!first.is_lost());
    first.device().destroy();
    assert!(first.is_lost());
    // Whatever is asked of it: an error of this kind, and no panic.
    let is_loss = |e: Error| assert!(matches!(e, Error::DeviceLost(_)), "{e:?}");
    let _ = before.wait_blocking(); // may have been in time
    if let Ok(loss) = lost.step(&batches(3)) {
        is_loss(loss.wait_blocking().unwrap_err());
    }
    is_loss(lost.evaluate_blocking(&batches(0)).unwrap_err());
    is_loss(lost.params().read_blocking(&first).unwrap_err());
    is_loss(Checkpoint::of_blocking(&lost, "", 0).unwrap_err());

    let mut second = trainer(&open());
    saved.restore_blocking(&mut second).unwrap();
    (3..6).for_each(|step| drop(second.step(&batches(step)).unwrap()));
    assert!(checkpoint(&second).same_bits(&want));
}

#[test]
fn too_much_memory_is_an_error_and_everything_else_works_on() {
    let limit = 32 << 20;
    let (device, queue) = device(|adapter| wgpu::Limits { max_buffer_size: limit, ..adapter.limits() });
    let gpu = Gpu::from_device(device, queue);
    let mut trainer = trainer(&gpu);
    let error = Tensor::zeros(&gpu, "large", TensorType::f32([(limit / 4 + 4) as usize])).unwrap_err();
    let Error::Limit { exceeded, advice: None } = &error else { panic!("{error}") };
    let shown = format!("over the limits: bytes of buffer `large`: {} needed, {limit} allowed", limit + 16);
    assert_eq!((exceeded[0].needed, exceeded[0].allowed, error.to_string()), (limit + 16, limit, shown));
    trainer.step(&batches(0)).unwrap().wait_blocking().unwrap();
}

#[test]
fn buffers_of_the_app_are_checked_before_anything_is_recorded() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64])).unwrap();
    let total = g.state("total", TensorType::f32([64])).unwrap();
    let sum = g.residual_add("sum", total, x).unwrap();
    g.store(sum, total).unwrap();
    let plan = Arc::new(Plan::new(&g, &[], gpu().profile()).unwrap());
    let buffer = |size, usage| {
        let desc = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        gpu().device().create_buffer(&desc)
    };
    let tensor =
        |buffer: &wgpu::Buffer, offset, n: usize| Tensor::from_buffer(buffer.clone(), offset, TensorType::f32([n]));
    let large = buffer(1024, Tensor::USAGES);
    let build = |bindings: Vec<(_, Tensor)>| {
        let options = ExecOptions::bound(bindings.into_iter().collect());
        Executable::new_blocking(gpu(), plan.clone(), options)
    };
    let refused = |result: Result<Executable, Error>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|p| error.contains(p)), "{error}");
    };
    refused(tensor(&large, 1024, 64).and_then(|t| build(vec![(x, t)])), &["256 bytes", "1024"]);
    refused(tensor(&large, 128, 64).and_then(|t| build(vec![(x, t)])), &["multiple of 256", "128"]);
    refused(tensor(&buffer(256, wgpu::BufferUsages::STORAGE), 0, 64).and_then(|t| build(vec![(x, t)])), &["COPY_DST"]);
    refused(tensor(&large, 0, 32).and_then(|t| build(vec![(x, t)])), &["`x`", "f32[64]", "f32[32]"]);
    let [a, b] = [tensor(&large, 0, 64).unwrap(), tensor(&large, 256, 64).unwrap()];
    refused(build(vec![(x, a.clone()), (total, b)]), &["`sum`", "one buffer"]);
    // One that fits is read and written where it is: no copy.
    a.write(gpu(), &[2.0f32; 64]).unwrap();
    let exec = build(vec![(total, a.clone())]).unwrap();
    exec.write(x, &[1.0f32; 64]).unwrap();
    exec.submit().unwrap();
    assert_eq!(a.read_blocking::<f32>(gpu()).unwrap(), [3.0; 64]);
}

#[test]
fn what_an_app_holds_may_go_to_other_threads() {
    fn sent<T: Send + Sync>() {}
    sent::<Gpu>();
    sent::<Executable>();
    sent::<Trainer>();
    sent::<Decoder>();
    sent::<FrameDecoder>();
    sent::<Readback>();
    sent::<Checkpoint>();
}

#[test]
fn a_step_in_slices_gives_the_same_bits_and_readers_see_whole_steps() {
    let (mut whole, mut sliced) = (trainer(gpu()), trainer(gpu()));
    let mut profile = sliced.profile_blocking(&batches(0)).unwrap();
    whole.step(&batches(0)).unwrap();
    // On a busy machine, one dispatch may take as long as all others.
    profile.nodes.iter_mut().flat_map(|node| &mut node.spans).for_each(|span| span.ns = 1000);
    for (budget, at_least) in [(Duration::ZERO, 100), (profile_time(&profile) / 8, 6), (Duration::from_secs(9), 3)] {
        let slices = sliced.slices(&profile, budget).unwrap();
        let seen = sliced.evaluate_blocking(&batches(99)).unwrap();
        let step = whole.step_count();
        let want = whole.step(&batches(step)).unwrap().wait_blocking().unwrap();
        // One that is given up half-way leaves no trace.
        let mut given_up = sliced.start_sliced(&slices, &batches(77)).unwrap();
        record(&mut sliced, &mut given_up);
        let mut running = sliced.start_sliced(&slices, &batches(step)).unwrap();
        let mut frames = 0;
        let loss = loop {
            assert!(budget.is_zero() || frames < 2 || running.next_estimate() <= slices.longest());
            assert_eq!(sliced.evaluate_blocking(&batches(99)).unwrap(), seen, "frame {frames}");
            frames += 1;
            if let Some(loss) = record(&mut sliced, &mut running) {
                break loss.wait_blocking::<f32>().unwrap()[0];
            }
        };
        assert!(frames >= at_least, "{frames} frames for {budget:?}");
        assert_eq!(loss.to_bits(), want.to_bits());
        assert!(checkpoint(&whole).same_bits(&checkpoint(&sliced)));
        // What is over cannot go on.
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        let error = sliced.record_slice(&mut encoder, &mut running).unwrap_err().to_string();
        assert!(error.contains("step"), "{error}");
    }
}

#[test]
fn a_step_in_an_encoder_that_is_dropped_does_not_count() {
    let (mut plain, mut dropping) = (trainer(gpu()), trainer(gpu()));
    let encoder = || gpu().device().create_command_encoder(&Default::default());
    for step in 0..3 {
        plain.step(&batches(step)).unwrap();
        let mut dropped = encoder();
        let losses = [77, 78].map(|other| dropping.record(&mut dropped, &batches(other)).unwrap());
        assert_eq!(dropping.step_count(), step + 2);
        drop(dropped);
        assert_eq!(dropping.step_count(), step);
        for loss in losses {
            assert!(loss.wait_blocking::<f32>().unwrap_err().to_string().contains("not submitted"));
        }
        let mut submitted = encoder();
        dropping.record(&mut submitted, &batches(step)).unwrap();
        gpu().submit(submitted).unwrap();
        assert_eq!(dropping.step_count(), step + 1);
    }
    assert!(checkpoint(&plain).same_bits(&checkpoint(&dropping)));
}

#[test]
fn a_step_in_slices_starts_over_after_a_frame_that_is_dropped() {
    let (mut whole, mut sliced) = (trainer(gpu()), trainer(gpu()));
    let profile = sliced.profile_blocking(&batches(0)).unwrap();
    whole.step(&batches(0)).unwrap();
    let slices = sliced.slices(&profile, profile_time(&profile) / 8).unwrap();
    for step in 1..3 {
        let want = whole.step(&batches(step)).unwrap().wait_blocking().unwrap();
        let mut running = sliced.start_sliced(&slices, &batches(step)).unwrap();
        let mut last = 0;
        // The first slice, one in the middle, and the last, which is the update.
        let loss = (0..).find_map(|frame| {
            let mut encoder = gpu().device().create_command_encoder(&Default::default());
            let loss = sliced.record_slice(&mut encoder, &mut running).unwrap();
            if [0, 4].contains(&frame) || loss.is_some() && last == 0 {
                last = if loss.is_some() { frame } else { 0 };
                return None;
            }
            gpu().submit(encoder).unwrap();
            loss
        });
        assert_eq!(loss.unwrap().wait_blocking::<f32>().unwrap()[0].to_bits(), want.to_bits());
        assert!(last > 4 && sliced.step_count() == step + 1);
    }
    assert!(checkpoint(&whole).same_bits(&checkpoint(&sliced)));
    // The step after one whose end is dropped takes its place.
    let mut running = sliced.start_sliced(&slices, &batches(3)).unwrap();
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    while sliced.record_slice(&mut encoder, &mut running).unwrap().is_none() {}
    let mut running = sliced.start_sliced(&slices, &batches(3)).unwrap();
    drop(encoder);
    while record(&mut sliced, &mut running).is_none() {}
    whole.step(&batches(3)).unwrap();
    assert!(checkpoint(&whole).same_bits(&checkpoint(&sliced)));
}

#[test]
fn a_profile_with_zeros_slices_by_what_it_has() {
    let mut trainer = trainer(gpu());
    let mut profile = trainer.profile_blocking(&batches(0)).unwrap();
    let spans = profile.nodes.iter_mut().flat_map(|n| &mut n.spans);
    spans.enumerate().for_each(|(i, span)| span.ns = if i % 3 == 0 { 1000 } else { 0 });
    let slices = trainer.slices(&profile, Duration::from_micros(5)).unwrap();
    let step = trainer.start_sliced(&slices, &batches(1)).unwrap();
    assert_eq!(step.next_estimate(), Duration::from_micros(5));
    profile.nodes.iter_mut().flat_map(|n| &mut n.spans).for_each(|span| span.ns = 0);
    let error = trainer.slices(&profile, Duration::from_micros(5)).unwrap_err().to_string();
    assert!(error.contains("not zero"), "{error}");
}

fn profile_time(profile: &Timeline) -> Duration {
    Duration::from_nanos(profile.ns())
}

/// A frame.
fn record(trainer: &mut Trainer, step: &mut SlicedStep) -> Option<Readback> {
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    let loss = trainer.record_slice(&mut encoder, step).unwrap();
    gpu().queue().submit([encoder.finish()]);
    loss
}
