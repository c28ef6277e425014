//! The limits, features and bytes that training and decoding need, known before there is a device; and what would fit.

mod common;

use std::sync::Arc;

use common::{gpu, hf_folder, whole_and_split};
use throughline::decode::{DecodeOptions, DecodePlan, Decoder};
use throughline::model::Model;
use throughline::nn::TransformerConfig;
use throughline::optim::{AdamWConfig, Arena, ArenaLayout, MuonConfig, Optimizer, OptimizerPlan, Schedule};
use throughline::probe::{Edit, Patch};
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::views::{LogitLens, Subject};
use throughline::{
    AdapterClass, Cooperative, DType, Error, ExecOptions, Executable, Gpu, Graph, Plan, Precision, Profile,
    Requirements, TensorType,
};

const VOCAB: usize = 31;

fn config(batch: usize, context: usize) -> TrainConfig {
    TrainConfig {
        schedule: Schedule::constant(3e-3),
        seed: 1,
        ..TrainConfig::new(TransformerConfig::gpt2(VOCAB, context, 2, 32, 4), batch)
    }
}

/// Losses of some steps on a text that repeats.
fn train(trainer: &mut Trainer) -> Vec<f32> {
    let c = trainer.config().clone();
    let tokens: Vec<u32> = (0..(c.batch * c.seq_len()) as u32).map(|i| i % 5).collect();
    let targets = tokens.iter().map(|i| (i + 1) % 5).collect();
    let batch = Batch::new(tokens, targets);
    let batches = vec![batch; c.micro_batches];
    (0..3).map(|_| trainer.step(&batches).unwrap().wait_blocking().unwrap()).collect()
}

fn adapter() -> wgpu::Adapter {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap()
}

fn open(adapter: &wgpu::Adapter, descriptor: &wgpu::DeviceDescriptor<'_>) -> Gpu {
    let (device, queue) = pollster::block_on(adapter.request_device(descriptor)).unwrap();
    Gpu::from_device(device, queue)
}

fn expect<T>(result: Result<T, Error>, words: &[&str]) {
    let e = result.err().expect("accepted").to_string();
    words.iter().for_each(|w| assert!(e.contains(w), "no {w:?} in: {e}"));
}

/// A device of an app takes its driver's word until asked to test itself, and drops nothing of a driver that is right.
#[test]
fn a_device_tests_itself_once_it_is_asked() {
    let adapter = adapter();
    let required_features = adapter.features() & Gpu::USEFUL_FEATURES;
    let gpu = open(&adapter, &wgpu::DeviceDescriptor { required_features, ..Default::default() });
    assert!(gpu.tested().is_none());
    let tested = gpu.clone().self_test_blocking().unwrap();
    // On Metal it narrows the range of subgroups.
    assert_eq!(Profile { subgroups: gpu.profile().subgroups, ..tested.profile().clone() }, *gpu.profile());
    let found = tested.tested().unwrap();
    assert!(found.dropped.is_empty() && !found.compiles_only, "{found:?}");
    match gpu.profile().subgroups {
        Some([min, max]) => assert!(found.subgroup_size.is_some_and(|size| (min..=max).contains(&size)), "{found:?}"),
        None => assert_eq!(found.subgroup_size, None),
    }
    // A handle with other choices of variants does not forget it.
    assert_eq!(tested.with_choices(Default::default()).tested(), tested.tested());
    assert!(Gpu::headless_blocking().unwrap().tested().is_some());
}

/// Matrix units round what they multiply to f16: training in f32 leaves them alone, even if the app has opted in.
#[test]
fn training_in_f32_uses_no_matrix_units() {
    let matrices = Profile {
        cooperative: Some(Cooperative::F16),
        subgroups: Some([32, 32]),
        shader_f16: true,
        ..Profile::portable(AdapterClass::Gpu)
    };
    let model = TransformerConfig::gpt2(65, 256, 2, 384, 6);
    let features = |precision| {
        let config = TrainConfig { precision, ..TrainConfig::new(model.clone(), 4) };
        let plan = TrainPlan::new(&config, &TrainOptions::default(), &matrices).unwrap();
        plan.requirements().features.contains(Cooperative::F16.features())
    };
    assert_eq!([Precision::F32, Precision::MIXED].map(features), [false, true]);
}

/// What mixed precision saves, and what an f16 stream saves of the rest: bytes of whole plans, with parameters, gradients
/// and moments.
#[test]
fn mixed_precision_takes_less_memory() {
    let profile = Profile::portable(AdapterClass::Gpu);
    let gpt2 = TransformerConfig::gpt2(50_257, 1024, 12, 768, 12);
    let small = TransformerConfig::gpt2(65, 256, 6, 384, 6);
    // Activations and all of a step, relative to f32, with a stream in f32 and in f16.
    for (name, model, batch, bounds) in [
        ("L6 d384", &small, 4, [[0.7, 0.9], [0.65, 0.9]]),
        ("GPT-2 small", &gpt2, 1, [[0.7, 1.0], [0.65, 1.0]]),
        ("GPT-2 small", &gpt2, 8, [[0.7, 0.9], [0.65, 0.9]]),
    ] {
        for recompute in [false, true] {
            let plan = |precision| {
                let config = TrainConfig { precision, ..TrainConfig::new(model.clone(), batch) };
                let options = TrainOptions { recompute, ..TrainOptions::default() };
                TrainPlan::new(&config, &options, &profile).unwrap()
            };
            let full = plan(Precision::F32);
            let bytes = |plan: &TrainPlan| [plan.plans()[0].buffer_bytes(), plan.bytes()];
            for (stream, bounds) in [DType::F32, DType::F16].into_iter().zip(bounds) {
                let [got, whole] = [bytes(&plan(Precision::Mixed { stream })), bytes(&full)];
                println!("{name} b{batch}, recompute {recompute}, stream {stream}: {got:?} of {whole:?}");
                let [activations, all] = [0, 1].map(|i| got[i] as f64 / whole[i] as f64);
                assert!(activations < bounds[0] && all < bounds[1], "{name} b{batch}: {activations:.3}, {all:.3}");
            }
        }
    }
}

/// No more than a plan says, limit by limit, does; and with any less the error names it.
#[test]
fn a_device_with_just_what_training_requires_trains() {
    let adapter = adapter();
    let config = TrainConfig { muon: Some(MuonConfig::default()), micro_batches: 2, ..config(2, 16) };
    let plan = TrainPlan::new(&config, &TrainOptions::default(), &Profile::of_adapter(&adapter)).unwrap();
    let needs = plan.requirements();
    let mut descriptor = needs.descriptor(&adapter);
    assert_eq!(descriptor.required_limits, wgpu::Limits::default(), "a small model takes no more");
    let l = &mut descriptor.required_limits;
    (l.max_storage_buffer_binding_size, l.max_buffer_size) = (needs.binding_bytes, needs.buffer_bytes);
    (l.max_storage_buffers_per_shader_stage, l.max_compute_workgroups_per_dimension) =
        (needs.storage_buffers, needs.workgroups);
    let exact = open(&adapter, &descriptor);
    let mut trainer = exact.run_blocking(Trainer::from_plan(&exact, &plan)).unwrap();
    let losses = train(&mut trainer);
    assert!(losses[2] < losses[0], "{losses:?}");
    assert_eq!(losses, train(&mut Trainer::new_blocking(gpu(), config).unwrap()));

    type Lower = fn(&mut wgpu::Limits);
    let lower: [(&str, Lower); 4] = [
        ("max_storage_buffer_binding_size", |l| l.max_storage_buffer_binding_size -= 16),
        ("max_buffer_size", |l| l.max_buffer_size -= 4),
        ("max_storage_buffers_per_shader_stage", |l| l.max_storage_buffers_per_shader_stage -= 1),
        ("max_compute_workgroups_per_dimension", |l| l.max_compute_workgroups_per_dimension -= 1),
    ];
    for (name, lower) in lower {
        let mut descriptor = descriptor.clone();
        lower(&mut descriptor.required_limits);
        let gpu = open(&adapter, &descriptor);
        expect(gpu.run_blocking(Trainer::from_plan(&gpu, &plan)), &[name, "needed", "gpu.profile()"]);
    }
}

/// What it takes to train these on cards of 12 and of 8 GB.
#[test]
fn training_gpt2_takes_so_many_bytes() {
    let max = u32::MAX.into();
    let profile = Profile { max_binding_bytes: max, max_buffer_bytes: max, ..Profile::portable(AdapterClass::Gpu) };
    for (layers, dim, heads, batch, most) in [(12, 768, 12, 8, 8.9e9), (24, 1024, 16, 1, 7.6e9)] {
        let model = TransformerConfig::gpt2(50_257, 1024, layers, dim, heads);
        let config = TrainConfig::new(model, batch);
        let plan = TrainPlan::new(&config, &TrainOptions::default(), &profile).unwrap();
        assert!(plan.bytes() as f64 <= most, "{} of at most {most} bytes", plan.bytes());
        // Evaluation has little of its own.
        let [step, evaluation, update] = plan.plans();
        let arenas = 4 * 4 * plan.parameter_count();
        let rest = plan.bytes() - arenas - step.buffer_bytes() - update.buffer_bytes();
        assert!(rest < evaluation.buffer_bytes() / 100, "{rest} bytes");
    }
}

#[test]
fn features_are_those_that_the_kernels_use() {
    let (config, options) = (config(2, 16), TrainOptions::default());
    let portable = Profile::portable(AdapterClass::Gpu);
    let needs = |profile: &Profile| TrainPlan::new(&config, &options, profile).unwrap().requirements().features;
    assert!(needs(&portable).is_empty());
    let subgroups = Profile { subgroups: Some([32, 32]), ..portable.clone() };
    assert_eq!(needs(&subgroups), wgpu::Features::SUBGROUP);
    // Matrices take part in mixed precision alone.
    let mixed = TrainConfig { precision: Precision::MIXED, ..config.clone() };
    for kind in Cooperative::ALL {
        let profile = Profile { cooperative: Some(kind), ..subgroups.clone() };
        assert_eq!(needs(&profile), wgpu::Features::SUBGROUP);
        let plan = TrainPlan::new(&mixed, &options, &profile).unwrap();
        assert_eq!(plan.requirements().features, kind.features());
    }
    let plan = TrainPlan::new(&config, &options, &subgroups).unwrap();
    let adapter = adapter();
    let without = open(&adapter, &wgpu::DeviceDescriptor::default());
    expect(without.run_blocking(Trainer::from_plan(&without, &plan)), &["SUBGROUP"]);
    // Kernels for wider subgroups than there are would give wrong sums.
    if adapter.features().contains(wgpu::Features::SUBGROUP) {
        let other = Profile { subgroups: Some([64, 128]), ..subgroups };
        let plan = TrainPlan::new(&config, &options, &other).unwrap();
        let descriptor = plan.requirements().descriptor(&adapter);
        let gpu = open(&adapter, &descriptor);
        expect(gpu.run_blocking(Trainer::from_plan(&gpu, &plan)), &["64, 128", "lanes"]);
        // Kernels for any size of a range do with the one that there is, as a self-test may find.
        let range = Profile { subgroups: Some([4, 128]), ..other };
        let plan = TrainPlan::new(&config, &options, &range).unwrap();
        train(&mut gpu.run_blocking(Trainer::from_plan(&gpu, &plan)).unwrap());
    }
}

/// What there is in GPU memory of one trainer, as far as the backend tells.
fn allocated(gpu: &Gpu) -> Option<usize> {
    let mut allocations = gpu.device().generate_allocator_report()?.allocations;
    let others = ["null", "readback"];
    let of_a_plan = |name: &str| name.strip_prefix("throughline ").is_some_and(|name| !others.contains(&name));
    allocations.retain(|a| of_a_plan(&a.name));
    Some(allocations.iter().map(|a| a.size as usize).sum())
}

/// Not only those that the trainer says it has: those that wgpu has allocated.
#[test]
fn bytes_are_known_before() {
    let adapter = adapter();
    let muon = TrainConfig { muon: Some(MuonConfig::default()), micro_batches: 3, ..config(4, 64) };
    let patches = vec![Patch::new("h.0.attn.o", Edit::Add(vec![64, 32]))];
    let options = TrainOptions { standard_probes: true, patches, ..TrainOptions::default() };
    let profile = Profile::of_adapter(&adapter);
    // Two thirds of the memory besides parameters, gradients and moments.
    let large = TrainPlan::new(&config(64, 64), &options, &profile).unwrap();
    let less = large.bytes() - large.plans()[0].buffer_bytes() / 3;
    let within = TrainOptions { max_bytes: Some(less as u64), ..options.clone() };
    for (config, options) in [(config(8, 64), &options), (muon, &options), (config(64, 64), &within)] {
        let plan = TrainPlan::new(&config, options, &profile).unwrap();
        assert!(options.max_bytes.is_none_or(|max| plan.bytes() as u64 <= max));
        let gpu = open(&adapter, &plan.requirements().descriptor(&adapter));
        let trainer = gpu.run_blocking(Trainer::from_plan(&gpu, &plan)).unwrap();
        assert_eq!((trainer.buffer_bytes(), trainer.parameter_count()), (plan.bytes(), plan.parameter_count()));
        if let Some(bytes) = allocated(&gpu) {
            println!("{bytes} bytes allocated, {} planned", plan.bytes());
            assert!(bytes >= plan.bytes(), "{bytes} {}", plan.bytes());
            // Alignment comes on top, which is little here, and less where tensors are larger.
            let software = gpu.info().backend == wgpu::Backend::Vulkan && gpu.profile().class == AdapterClass::Cpu;
            let more = plan.bytes() / if options.max_bytes.is_some() { 100 } else { 50 };
            assert!(!software || bytes < plan.bytes() + more, "{bytes} {}", plan.bytes());
        }
    }
}

#[test]
fn what_is_too_large_says_what_fits_and_that_trains() {
    let options = TrainOptions::default();
    let [_, small] = whole_and_split(32 << 10);
    let large = config(16, 16);
    expect(Trainer::new_blocking(&small, large.clone()), &["32768", "This fits: batch 4, seq_len 16, micro_batches 4"]);
    let fitted = large.fitted(&options, small.profile()).unwrap();
    assert_eq!(fitted, TrainConfig { batch: 4, micro_batches: 4, ..large.clone() });
    let losses = train(&mut Trainer::new_blocking(&small, fitted.clone()).unwrap());
    assert!(losses[2] < losses[0], "{losses:?}");
    assert_eq!(fitted.fitted(&options, small.profile()).unwrap(), fitted);

    // A sequence that is too long by itself; then a matrix that is too large.
    let limited = |max_binding_bytes| Profile { max_binding_bytes, ..small.profile().clone() };
    let long = TrainConfig { micro_batches: 2, ..config(3, 64) };
    let fitted = long.fitted(&options, &limited(16 << 10)).unwrap();
    assert_eq!((fitted.batch, fitted.seq_len, fitted.micro_batches), (1, Some(32), 12));
    let none = TrainPlan::new(&long, &options, &limited(8 << 10));
    expect(none, &["`h.0.mlp.up.weight`", "16384", "8192", "Even batch 1, seq_len 16 does not fit"]);
    expect(long.fitted(&options, &limited(8 << 10)), &["batch 1, seq_len 16", "`h.0.mlp.up.weight`"]);
    // More elements than a tensor may have.
    let portable = Profile::portable(AdapterClass::Gpu);
    let plan = |batch| TrainPlan::new(&config(batch, 1024), &options, &portable);
    expect(plan(1 << 14), &["`h.0.mlp.up`", "elements", "This fits: batch 256, seq_len 1024, micro_batches 64"]);
    expect(plan(1 << 20), &["`tokens`", "elements", "This fits: batch 256, seq_len 1024, micro_batches 4096"]);
    // What is wrong for another reason is left at that.
    let bad = TrainOptions { patches: vec![Patch::new("nowhere", Edit::Replace)], ..TrainOptions::default() };
    let error = TrainPlan::new(&large, &bad, &portable).unwrap_err().to_string();
    assert!(error.contains("`nowhere`") && !error.contains("fit"), "{error}");
}

/// A plan alone, of a device that offers more than this one.
#[test]
fn an_executable_names_the_limit_that_is_too_low() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([64, 64])).unwrap();
    let [w, b] = [g.param("w", [64]).unwrap(), g.param("b", [64]).unwrap()];
    let y = g.layernorm("y", x, w, b, 1e-5).unwrap();
    let plan = Arc::new(Plan::new(&g, &[y], &Profile::portable(gpu().profile().class)).unwrap());
    let needs = Requirements::of(&plan).storage_buffers;
    let limits = wgpu::Limits { max_storage_buffers_per_shader_stage: needs - 1, ..Default::default() };
    let gpu = open(&adapter(), &wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() });
    let words = [&format!("max_storage_buffers_per_shader_stage: {needs} needed, {} allowed", needs - 1)[..]];
    expect(Executable::new_blocking(&gpu, plan, ExecOptions::default()), &words);
}

/// Arenas that a plan is not for are named.
#[test]
fn an_optimizer_is_bound_to_arenas_of_its_layout() {
    let arena = |n: usize| {
        let layout = Arc::new(ArenaLayout::new(vec![("w".into(), [n, 64].into())], u64::MAX).unwrap());
        Arena::zeros(gpu(), "all", &layout).unwrap()
    };
    let (params, grads) = (arena(2), arena(1));
    let plan = OptimizerPlan::new(AdamWConfig::default(), &params.layout, gpu().profile()).unwrap();
    let bound = |grads| pollster::block_on(Optimizer::from_plan(gpu(), &plan, &params, grads));
    expect(bound(&grads), &["gradients", "[128]", "[64]"]);
    bound(&params).unwrap_err(); // one buffer for both
    bound(&arena(2)).unwrap();
}

#[test]
fn a_budget_of_memory_is_kept_to() {
    let profile = gpu().profile();
    let within = |max_bytes| TrainOptions { max_bytes: Some(max_bytes), ..TrainOptions::default() };
    let large = config(16, 64);
    let plan = |c: &TrainConfig, max_bytes| TrainPlan::new(c, &within(max_bytes), profile);
    let bytes = plan(&large, u64::MAX).unwrap().bytes() as u64;
    plan(&large, bytes).unwrap();
    // A little less fits if more is computed twice, much less does not.
    let smaller = plan(&large, bytes - 1).unwrap().bytes() as u64;
    assert!(smaller < bytes);
    expect(plan(&large, bytes / 3), &[&(bytes / 3).to_string(), "nodes computed twice", "This fits: batch"]);
    let fitted = large.fitted(&within(bytes / 3), profile).unwrap();
    assert!(plan(&fitted, bytes / 3).unwrap().bytes() as u64 <= bytes / 3);
    assert!(fitted.batch < 8 && fitted.tokens_per_step() == large.tokens_per_step(), "{fitted:?}");
    let trainer = Trainer::with_options_blocking(gpu(), fitted, &within(bytes / 3)).unwrap();
    assert!(trainer.buffer_bytes() as u64 <= bytes / 3);
    expect(plan(&large, 400_000), &["28512 parameters", "400000 allowed", "Even batch 1, seq_len 16"]);
}

/// A plan for small bindings runs where larger ones would do, and views of its model do too.
#[test]
fn tables_stay_in_the_parts_that_were_planned() {
    let model = TransformerConfig { vocab_size: 300, ..config(1, 16).model };
    let config = TrainConfig { model, ..config(1, 16) };
    let narrow = Profile { max_binding_bytes: 20 << 10, ..gpu().profile().clone() };
    let plan = TrainPlan::new(&config, &TrainOptions::default(), &narrow).unwrap();
    assert!(plan.layout().tensors.iter().any(|(name, _)| name.contains('@')));
    let mut trainer = gpu().run_blocking(Trainer::from_plan(gpu(), &plan)).unwrap();
    train(&mut trainer);
    let lens = gpu().run_blocking(LogitLens::new(&Subject::of(&trainer), [1, 16])).unwrap();
    let batch = Batch::new(vec![1; 16], vec![2; 16]);
    assert!(lens.run_blocking(&batch).unwrap().iter().all(|r| r.value.is_finite()));
}

fn of(batch: usize, capacity: usize) -> DecodeOptions<'static> {
    DecodeOptions { batch, ..DecodeOptions::new(capacity) }
}

#[test]
fn a_decoder_is_planned_before_there_is_a_device() {
    let adapter = adapter();
    let model = Model::open(&hf_folder("qwen3")).unwrap();
    let context = model.config().context;
    let plan = DecodePlan::new(&model, of(2, context), &Profile::of_adapter(&adapter)).unwrap();
    let needs = plan.requirements();
    let mut descriptor = needs.descriptor(&adapter);
    let l = &mut descriptor.required_limits;
    (l.max_storage_buffer_binding_size, l.max_buffer_size) = (needs.binding_bytes, needs.buffer_bytes);
    let exact = open(&adapter, &descriptor);
    let mut decoder = exact.run_blocking(Decoder::from_plan(&exact, &model, &plan)).unwrap();
    assert_eq!((plan.bytes(), plan.weight_bytes()), (decoder.buffer_bytes(), decoder.weight_bytes()));
    let mut usual = Decoder::new_blocking(gpu(), &model, of(2, context)).unwrap();
    let prompts: [&[u32]; 2] = [&[1, 5, 9], &[7]];
    assert_eq!(decoder.feed_batch_blocking(&prompts).unwrap(), usual.feed_batch_blocking(&prompts).unwrap());
    descriptor.required_limits.max_storage_buffer_binding_size -= 16;
    let lower = open(&adapter, &descriptor);
    expect(lower.run_blocking(Decoder::from_plan(&lower, &model, &plan)), &["max_storage_buffer_binding_size"]);
    let other = Model::open(&hf_folder("llama")).unwrap();
    expect(gpu().run_blocking(Decoder::from_plan(gpu(), &other, &plan)), &["of this model"]);

    // Many sequences side by side: their caches are the largest.
    let narrow = Profile { max_binding_bytes: 256 << 10, ..gpu().profile().clone() };
    let fitting = DecodePlan::fitted_capacity(&model, of(64, context), &narrow).unwrap();
    assert!(fitting > 1 && fitting < context, "{fitting}");
    let error = DecodePlan::new(&model, of(64, context), &narrow).unwrap_err();
    let Error::Limit { exceeded, advice: Some(advice) } = &error else { panic!("{error}") };
    assert!(advice.ends_with(&format!("A capacity of {fitting} fits")), "{error}");
    assert!(exceeded[0].needed > 256 << 10 && exceeded[0].allowed == 256 << 10, "{error}");
    DecodePlan::new(&model, of(64, fitting), &narrow).unwrap();
    DecodePlan::new(&model, of(64, fitting + 1), &narrow).unwrap_err();
    expect(DecodePlan::new(&model, 8, &Profile { max_binding_bytes: 64, ..narrow }), &["64"]);
}

/// Prompts take few passes on a GPU, in steps that fit the device, the cache and the number of sequences.
#[test]
fn long_prompts_go_to_gpus_in_large_steps() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(hf_folder("llama")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let config = std::fs::read_to_string(hf_folder("llama").join("config.json")).unwrap();
    let longer = config.replace("\"max_position_embeddings\": 64", "\"max_position_embeddings\": 2048");
    assert_ne!(config, longer);
    std::fs::write(folder.path().join("config.json"), longer).unwrap();
    let model = Model::open(folder.path()).unwrap();
    let card = Profile::portable(AdapterClass::Gpu);
    let plan = |options, profile: &Profile| DecodePlan::new(&model, options, profile).unwrap();
    let tokens = |options, profile: &Profile| plan(options, profile).tokens_per_pass();

    let most = plan(of(1, 2048), &card);
    assert_eq!(most.tokens_per_pass(), 512);
    assert_eq!(most.plans().len(), 3);
    // The step may take as much memory as the others share, or 64 MiB.
    let short = plan(of(1, 2048), &Profile::portable(AdapterClass::Cpu));
    assert!(most.bytes() - short.bytes() <= 64 << 20, "{} and {}", most.bytes(), short.bytes());
    assert_eq!((short.tokens_per_pass(), short.plans().len()), (32, 2));
    // No tensor of 512 rows of the feed-forward network fits this binding, but the caches do.
    let narrow = Profile { max_binding_bytes: 140_000, ..card.clone() };
    let narrow_plan = plan(of(1, 2048), &narrow);
    assert_eq!(narrow_plan.tokens_per_pass(), 256);
    assert!(narrow_plan.requirements().binding_bytes <= 140_000);
    // A small cache, and several sequences in a step.
    assert_eq!(tokens(of(1, 100), &card), 100);
    assert_eq!(tokens(of(1, 20), &card), 20);
    assert!(tokens(of(4, 2048), &card) <= 128);
    assert_eq!(tokens(of(16, 2048), &card), 32);
}
