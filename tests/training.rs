//! Training: exact claims about the residual stream, plans, resuming, and accumulation.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{gpu, repository, whole_and_split};
use throughline::nn::{
    Biases, Init, Lora, Mlp, Norm, NormPlacement, Positions, Transformer, TransformerConfig, TransformerOptions,
};
use throughline::ops::rope::Scaling;
use throughline::optim::{AdamWConfig, Arena, Decay, LossScaling, MuonConfig, MuonScale, Schedule};
use throughline::plan::{Recompute, Slot};
use throughline::rng::Rng;
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::{Batch, Dataset, IGNORE_INDEX};
use throughline::train::{TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::{AdapterClass, DType, ExecOptions, Executable, Graph, Plan, Precision, Profile, Value};

fn tiny(model: TransformerConfig) -> TrainConfig {
    let schedule = Schedule { peak: 3e-3, warmup: 2, steps: 8, final_fraction: 0.1, decay: Decay::Cosine };
    let adamw = AdamWConfig::default();
    TrainConfig { schedule, adamw, seed: 7, ..TrainConfig::new(model, 2) }
}

fn dataset() -> Dataset {
    let ids = (0..2000u32).map(|i| (i * i + i / 7) % 31).collect();
    Dataset::new(ids, 0.1, 16).unwrap()
}

fn train(trainer: &mut Trainer, until: u64) -> Vec<f32> {
    let data = dataset();
    let mut losses = vec![];
    while trainer.step_count() < until {
        let c = trainer.config();
        let micro = c.micro_batches as u64;
        let batches: Vec<Batch> = (0..micro)
            .map(|i| data.batch(c.seed, trainer.step_count() * micro + i, c.batch, c.model.context).unwrap())
            .collect();
        let loss = trainer.step(&batches).unwrap();
        losses.push(loss.wait_blocking().unwrap());
    }
    losses
}

fn bits(values: &[Vec<f32>]) -> Vec<u32> {
    values.iter().flatten().map(|x| x.to_bits()).collect()
}

/// With projections into the stream at zero, blocks contribute nothing: the stream is the
/// embedding at every depth, and the loss's gradient is the same at every depth. Bit for bit.
#[test]
fn at_zero_initialisation_the_stream_is_a_throughline() {
    let zero = |c: TransformerConfig| TransformerConfig { init: Init::ZeroResidual { std: 0.1 }, ..c };
    for config in [zero(TransformerConfig::gpt2(31, 16, 4, 32, 4)), zero(TransformerConfig::llama(31, 16, 4, 32, 4))] {
        let mut g = Graph::new();
        let gpt = Transformer::build(&mut g, &config, 2, 16, false).unwrap();
        let targets = g.input("targets", g.ty(gpt.tokens).clone()).unwrap();
        let loss = g.cross_entropy("loss", gpt.logits, targets).unwrap();
        let gradients = g.gradients(loss, &gpt.stream).unwrap();
        let wanted: Vec<Value> = gpt.stream.iter().chain(&gradients).copied().collect();
        let plan = Plan::new(&g, &wanted, gpu().profile()).unwrap();
        let options = ExecOptions { seed: 3, ..ExecOptions::default() };
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap();
        let batch = dataset().batch(0, 0, 2, 16).unwrap();
        exec.write(gpt.tokens, &batch.tokens).unwrap();
        exec.write(targets, &batch.targets).unwrap();
        exec.submit().unwrap();
        let read = |v: &Value| exec.read_blocking::<f32>(*v).unwrap();
        for (what, values) in [("stream", &gpt.stream), ("gradient", &gradients)] {
            let first = read(&values[0]);
            assert!(first.iter().any(|x| *x != 0.0), "{what} is all zeros");
            for (depth, v) in values.iter().enumerate() {
                assert_eq!(bits(std::slice::from_ref(&first)), bits(&[read(v)]), "{what} at depth {depth}");
            }
        }
    }
}

/// The residual stream is one buffer from the embedding to the last block, and its gradient is one
/// from the loss to the embedding, however deep the model.
#[test]
fn stream_and_stream_gradient_are_one_buffer_each() {
    for layers in [1, 2, 6] {
        for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
            let config = TransformerConfig::gpt2(31, 16, layers, 32, 4);
            let plan = training_plan(&config, &Profile::portable(class));
            let slots = |suffix: &str| -> Vec<Slot> {
                let steps = plan.steps().iter().filter(|s| s.name().ends_with(suffix));
                steps.map(|s| s.outputs()[0].0).collect()
            };
            let stream = [slots("position"), slots("_add")].concat();
            let gradient = [slots("norm_f.grad"), slots("_add.grad.sum"), slots("position.grad.sum")].concat();
            assert_eq!(stream.len(), 1 + 2 * layers, "{plan}");
            assert_eq!(gradient.len(), 1 + 2 * layers, "{plan}");
            for slots in [stream, gradient] {
                assert!(slots.iter().all(|s| *s == slots[0]), "{slots:?}\n{plan}");
            }
            assert!(plan.steps().iter().all(|s| s.copies().is_empty()), "{plan}");
        }
    }
}

fn training_plan(config: &TransformerConfig, profile: &Profile) -> Plan {
    let mut g = Graph::new();
    let gpt = Transformer::build(&mut g, config, 2, 16, true).unwrap();
    let targets = g.input("targets", g.ty(gpt.tokens).clone()).unwrap();
    let loss = g.cross_entropy("loss", gpt.logits, targets).unwrap();
    let params = gpt.params.clone();
    let gradients = g.gradients(loss, &params).unwrap();
    let wanted: Vec<Value> = gradients.into_iter().chain([loss]).collect();
    Plan::new(&g, &wanted, profile).unwrap()
}

/// What the planner prints for a two-layer GPT-2, kept as a file so that a change shows in review.
#[test]
fn plan_of_a_gpt2_is_as_recorded() {
    let plan =
        training_plan(&TransformerConfig::gpt2(31, 16, 2, 32, 4), &Profile::portable(AdapterClass::Cpu)).to_string();
    let path = repository("tests/data/plan_gpt2.txt");
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    if plan != recorded {
        let new = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan_gpt2.txt");
        std::fs::write(&new, &plan).unwrap();
        panic!("the plan changed; if that is meant, copy {} to {}", new.display(), path.display());
    }
}

/// A run that is saved, dropped, loaded and continued ends with the same bits as an unbroken one.
#[test]
fn a_resumed_run_equals_an_unbroken_one_bit_for_bit() {
    let config = tiny(TransformerConfig { dropout: 0.1, ..TransformerConfig::llama(31, 16, 2, 32, 4) });
    resumes_bit_for_bit(config.clone());
    // The first three steps are skipped, and in the last ones the scale grows.
    let (growth, backoff, largest) = (2f64.powi(16), 2f64.powi(-16), 2f64.powi(100));
    let scaling = LossScaling { initial: largest, growth, backoff, growth_interval: 2, least: 1.0, largest };
    resumes_bit_for_bit(TrainConfig { loss_scaling: Some(scaling), ..config.clone() });
    resumes_bit_for_bit(TrainConfig { muon: Some(MuonConfig::default()), ..config });
}

#[test]
fn mixed_precision_resumes_bit_for_bit() {
    let config = tiny(TransformerConfig { dropout: 0.1, ..TransformerConfig::llama(31, 16, 2, 32, 4) });
    let config = TrainConfig { precision: Precision::MIXED, ..config };
    resumes_bit_for_bit(config.clone());
    let precision = Precision::Mixed { stream: DType::F16 };
    resumes_bit_for_bit(TrainConfig { precision, micro_batches: 2, muon: Some(MuonConfig::default()), ..config });
}

/// The losses of a run in mixed precision: those of f32 but for rounding, the same on every run, and without 16-bit floats
/// in shaders, too.
#[test]
fn mixed_precision_learns_as_f32_does() {
    for model in [TransformerConfig::gpt2(31, 16, 2, 32, 4), TransformerConfig::llama(31, 16, 2, 32, 4)] {
        let config = tiny(model);
        let run = |precision: Precision, shader_f16: bool| {
            let config = TrainConfig { precision, ..config.clone() };
            let profile = Profile { shader_f16: shader_f16 && gpu().profile().shader_f16, ..gpu().profile().clone() };
            let plan = TrainPlan::new(&config, &TrainOptions::default(), &profile).unwrap();
            let mut trainer = gpu().run_blocking(Trainer::from_plan(gpu(), &plan)).unwrap();
            let losses = train(&mut trainer, 8);
            (losses, trainer.evaluate_blocking(&dataset().val_batches(3, 2, 16).unwrap()).unwrap())
        };
        let (want, validation) = run(Precision::F32, true);
        let f16 = Precision::Mixed { stream: DType::F16 };
        for (precision, bound) in [(Precision::MIXED, 2e-3), (f16, 4e-3)] {
            let (losses, loss) = run(precision, true);
            let worst = common::worst(&[&losses[..], &[loss]].concat(), &[&want[..], &[validation]].concat());
            println!("{precision:?}: {worst:.1e}");
            assert!(worst > 0.0 && worst < bound, "{precision:?}: {losses:?}, {loss}; in f32 {want:?}, {validation}");
            let again = run(precision, true);
            assert_eq!((bits(std::slice::from_ref(&losses)), loss.to_bits()), (bits(&[again.0]), again.1.to_bits()));
            let (in_words, _) = run(precision, false);
            let worst = common::worst(&losses, &in_words);
            assert!(worst < bound, "{precision:?} in words: {worst:.1e}");
        }
    }
}

/// At a scale that is far too large, steps are skipped and halve it until it does; then the model learns.
#[test]
fn an_overflow_in_mixed_precision_recovers() {
    let scaling = LossScaling { initial: 2f64.powi(40), largest: 2f64.powi(40), ..LossScaling::default() };
    let config = TrainConfig {
        precision: Precision::MIXED,
        loss_scaling: Some(scaling),
        schedule: Schedule::constant(3e-3),
        ..tiny(TransformerConfig::gpt2(31, 16, 2, 32, 4))
    };
    let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
    let mut trainer = Trainer::with_options_blocking(gpu(), config, &options).unwrap();
    let batch = [dataset().batch(0, 0, 2, 16).unwrap()];
    let start = bits(&trainer.params().read_blocking(gpu()).unwrap());
    let mut reports = vec![trainer.step(&batch).unwrap().report_blocking().unwrap()];
    assert_eq!(bits(&trainer.params().read_blocking(gpu()).unwrap()), start);
    for _ in 0..60 {
        reports.push(trainer.step(&batch).unwrap().report_blocking().unwrap());
    }
    let skipped = reports.iter().take_while(|report| report.skipped).count();
    assert!((5..40).contains(&skipped), "{skipped} skipped");
    assert!(reports[skipped..].iter().all(|report| !report.skipped), "{reports:?}");
    assert!(reports.iter().all(|report| report.loss.is_finite()));
    assert!(reports[60].loss < 0.5 * reports[0].loss, "{reports:?}");
    // How far the gradients are from another overflow: less than the last halving, and what others have to spare.
    let readings = trainer.take_probes().unwrap().wait_blocking().unwrap();
    let gradients = readings.values.iter().filter(|reading| reading.name == "weight_grad_rms");
    let headroom: Vec<f64> = gradients.map(|reading| reading.f16_headroom()).collect();
    assert!(headroom.iter().all(|bits| (-10.0..40.0).contains(bits)), "{headroom:?}");
    let state = trainer.graph_trainer().loss_scale_blocking().unwrap().unwrap();
    assert_eq!((state.skipped as usize, state.applied as usize), (skipped, 61 - skipped));
}

/// Whatever writes to the parameters, a step and an evaluation read what they are now.
#[test]
fn copies_of_parameters_are_never_old() {
    let config = TrainConfig { precision: Precision::MIXED, ..tiny(TransformerConfig::gpt2(31, 16, 1, 32, 4)) };
    let batch = [dataset().batch(0, 0, 2, 16).unwrap()];
    let trainer = |seed| Trainer::new_blocking(gpu(), TrainConfig { seed, ..config.clone() }).unwrap();
    let (mut one, mut other) = (trainer(1), trainer(2));
    let want = one.evaluate_blocking(&batch).unwrap();
    assert_ne!(other.evaluate_blocking(&batch).unwrap(), want);
    other.params().write(gpu(), &one.params().read_blocking(gpu()).unwrap()).unwrap();
    assert_eq!(other.evaluate_blocking(&batch).unwrap(), want);
    let losses = [&mut one, &mut other].map(|trainer| trainer.step(&batch).unwrap().wait_blocking().unwrap());
    assert_eq!(losses[0], losses[1]);
    // The copies are of the matrices that products read.
    let plan = one.plan();
    let types: Vec<_> = plan.externals().iter().filter(|e| e.name.ends_with("weight")).collect();
    assert!(types.iter().all(|e| (e.ty.dtype == DType::F16) == (e.ty.shape.rank() == 2)));
    assert!(types.iter().any(|e| e.ty.dtype == DType::F16));
}

/// The stream is where something is added to that was made of it, wherever the norms are; other sums are not.
#[test]
fn the_stream_is_what_its_own_branches_are_added_to() {
    let pre = TransformerConfig::gpt2(31, 16, 2, 32, 4);
    let post = TransformerConfig { norm_placement: NormPlacement::Post, ..pre.clone() };
    let lora = Lora::new(4, 8.0);
    for (model, lora) in [(&pre, None), (&post, None), (&pre, Some(&lora))] {
        for stream in [DType::F32, DType::F16] {
            let mut g = Graph::new();
            let options = TransformerOptions { lora, ..TransformerOptions::default() };
            let gpt = Transformer::build_of(&mut g, model, [2, 16], &options).unwrap();
            let targets = g.input("targets", g.ty(gpt.tokens).clone()).unwrap();
            let loss = g.cross_entropy("loss", gpt.logits, targets).unwrap();
            let tapped = [&gpt.params[..], &gpt.stream].concat();
            let gradients = g.gradients(loss, &tapped).unwrap();
            let of_params = &gradients[..gpt.params.len()];
            let read = [&[loss], of_params].concat();
            g.store_mixed(&read, &gpt.params, stream, &Profile::portable(AdapterClass::Gpu)).unwrap();
            // Nothing is added to what leaves the last norm of a post-norm model.
            let post = model.norm_placement == NormPlacement::Post;
            let n = gpt.stream.len() - usize::from(post);
            let along = gpt.stream[..n].iter().chain(&gradients[gpt.params.len()..][..n]);
            assert!(along.clone().all(|&v| g.ty(v).dtype == stream), "{g}");
            assert!(read.iter().all(|&v| g.ty(v).dtype == DType::F32));
            let dtype = |name: &str| g.ty(g.find(name).unwrap()).dtype;
            for name in ["h.0.attn.q", "h.0.attn.o", "h.1.attn.scores", "h.1.mlp.up", "h.1.mlp.gelu", "h.1.mlp.down"] {
                assert_eq!(dtype(name), DType::F16, "`{name}`");
            }
            let attention = g.nodes().iter().find(|node| node.name == "h.0.attn.scores").unwrap();
            assert_eq!(attention.outputs[1].dtype, DType::F32);
            assert_eq!(g.ty(gpt.logits).dtype, DType::F16);
        }
    }
}

fn resumes_bit_for_bit(config: TrainConfig) {
    let mut whole = Trainer::new_blocking(gpu(), config.clone()).unwrap();
    let losses = train(&mut whole, 8);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint.safetensors");
    let mut first = Trainer::new_blocking(gpu(), config.clone()).unwrap();
    train(&mut first, 3);
    Checkpoint::save_trainer_blocking(&first, "abc", 5, &path).unwrap();
    assert!(Checkpoint::of_blocking(&first, "abc", 5).unwrap().same_bits(&Checkpoint::load(&path).unwrap()));
    drop(first);
    let loaded = Checkpoint::load(&path).unwrap();
    assert_eq!((loaded.state.step, loaded.state.alphabet.as_str(), loaded.state.text_hash), (3, "abc", 5));
    let options = TrainOptions { init: false, ..TrainOptions::default() };
    let second = Trainer::with_options(gpu(), loaded.state.config.clone(), &options);
    let mut second = gpu().run_blocking(second).unwrap();
    assert!(weights_and_moments(&second).concat().iter().all(|&x| x == 0.0), "parameters were drawn");
    loaded.restore_blocking(&mut second).unwrap();
    assert_eq!(second.graph_trainer().loss_scale_blocking().unwrap(), loaded.state.loss_scale);
    // Where one is chosen here, it is too large for the first steps.
    let counts = if config.loss_scaling.is_some() { (0, 3) } else { (3, 0) };
    assert_eq!(loaded.state.loss_scale.map(|state| (state.applied, state.skipped)), config.scaling().map(|_| counts));
    assert_eq!(bits(&[train(&mut second, 8)]), bits(&[losses[3..].to_vec()]));

    assert_eq!(bits(&weights_and_moments(&whole)), bits(&weights_and_moments(&second)));
}

/// Two trainers of one model: of one batch of four sequences, and of two micro-batches of two.
fn large_and_small() -> [Trainer; 2] {
    let large = TrainConfig { batch: 4, ..tiny(TransformerConfig::gpt2(31, 16, 2, 32, 4)) };
    let small = TrainConfig { batch: 2, micro_batches: 2, ..large.clone() };
    [large, small].map(|config| Trainer::new_blocking(gpu(), config).unwrap())
}

/// A batch of four sequences, cut in two.
fn halves(batch: &Batch) -> [Batch; 2] {
    [0..32, 32..64].map(|half| Batch::new(batch.tokens[half.clone()].to_vec(), batch.targets[half].to_vec()))
}

/// Loss and gradients of the last step are equal, up to rounding.
fn expect_equal_steps([a, b]: &[Trainer; 2]) {
    let [loss_a, loss_b] = [a, b].map(|t| t.loss().unwrap().read_blocking::<f32>(gpu()).unwrap()[0]);
    assert!((loss_a - loss_b).abs() < 1e-5, "{loss_a} {loss_b}");
    let (ga, gb) = (a.grads().read_blocking(gpu()).unwrap(), b.grads().read_blocking(gpu()).unwrap());
    for (((name, _), x), y) in a.grads().layout.tensors.iter().zip(ga).zip(gb) {
        let scale = x.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        let worst = common::worst(&x, &y);
        assert!(worst < 2e-4 * scale.max(1e-3), "{name}: {worst} of {scale}");
    }
}

/// Two micro-batches of two are one batch of four, up to rounding.
#[test]
fn accumulated_gradients_equal_those_of_one_large_batch() {
    let mut trainers = large_and_small();
    let whole = dataset().batch(1, 0, 4, 16).unwrap();
    // Twice, to see that the second step starts from zeroed gradients.
    for _ in 0..2 {
        trainers[0].step(std::slice::from_ref(&whole)).unwrap();
        trainers[1].step(&halves(&whole)).unwrap();
        expect_equal_steps(&trainers);
    }
}

/// With learned positions, and with rotations and shared keys.
fn models_of_texts(context: usize) -> [TransformerConfig; 2] {
    let rope = TransformerConfig { n_kv_heads: 2, ..TransformerConfig::llama(31, context, 2, 32, 4) };
    [TransformerConfig::gpt2(31, context, 2, 32, 4), rope]
}

/// Texts of seven, one and five tokens with three of padding, and a text of a whole sequence: packed, and each in a
/// sequence of its own.
fn packed_and_apart() -> (Batch, Vec<Batch>) {
    let mut rng = Rng::new(&[5]);
    let mut ids = |n: usize| Vec::from_iter((0..n).map(|_| rng.below(31) as u32));
    let (mut tokens, mut targets, mut starts, mut apart) = (vec![], vec![], vec![], vec![]);
    for lengths in [&[7, 1, 5][..], &[16]] {
        let mut start = 0;
        for &n in lengths {
            let (text, next) = (ids(n), ids(n));
            let padded = |ids: &[u32], with: u32| [ids, &vec![with; 16 - n]].concat();
            apart.push(Batch::new(padded(&text, 0), padded(&next, IGNORE_INDEX)));
            tokens.extend(text);
            targets.extend(next);
            starts.extend(vec![start; n]);
            start += n as u32;
        }
        tokens.resize(tokens.len().next_multiple_of(16), 0);
        targets.resize(tokens.len(), IGNORE_INDEX);
        starts.extend(start..16);
    }
    (Batch { tokens, targets, starts: Some(starts) }, apart)
}

/// Loss and gradients of packed texts are those of the texts in sequences of their own.
#[test]
fn packed_texts_train_as_each_would_alone() {
    let (packed, apart) = packed_and_apart();
    for (model, class) in models_of_texts(16).into_iter().zip([AdapterClass::Cpu, AdapterClass::Gpu]) {
        let profile = Profile { class, ..gpu().profile().clone() };
        let trainer = |config: TrainConfig| {
            let plan = TrainPlan::new(&config, &TrainOptions::default(), &profile).unwrap();
            gpu().run_blocking(Trainer::from_plan(gpu(), &plan)).unwrap()
        };
        let together = TrainConfig { packing: true, ..tiny(model.clone()) };
        let alone = TrainConfig { batch: 1, micro_batches: apart.len(), ..tiny(model.clone()) };
        let mut trainers = [trainer(together), trainer(alone)];
        let losses = [std::slice::from_ref(&packed), &apart].map(|batches| batches.to_vec());
        let losses = [0, 1].map(|i: usize| trainers[i].evaluate_blocking(&losses[i]).unwrap());
        assert!((losses[0] - losses[1]).abs() < 1e-5, "{losses:?}");
        // The texts before do matter to a trainer that knows of no borders.
        let unaware = trainer(tiny(model));
        let loss = unaware.evaluate_blocking(&[Batch { starts: None, ..packed.clone() }]).unwrap();
        assert!((loss - losses[0]).abs() > 1e-4, "{loss} {losses:?}");

        trainers[0].step(std::slice::from_ref(&packed)).unwrap();
        trainers[1].step(&apart).unwrap();
        expect_equal_steps(&trainers);
        let [a, b] = trainers.each_ref().map(|t| t.grads().read_blocking(gpu()).unwrap().concat());
        assert!(common::worst(&a, &b) < 1e-5, "{}", common::worst(&a, &b));
    }
}

/// Whatever comes before and after a text in its sequence, and in however many texts, its logits have the same bits.
#[test]
fn logits_of_a_text_do_not_depend_on_its_neighbours() {
    const TIME: usize = 150;
    let text = 70..110;
    let mut rng = Rng::new(&[8]);
    let mut ids = || Vec::from_iter((0..TIME).map(|_| rng.below(31) as u32));
    let packed = |tokens: Vec<u32>, borders: &[usize]| {
        let start = |i: usize| borders.iter().filter(|&&border| border <= i).max().map_or(0, |&border| border as u32);
        Batch { targets: tokens.clone(), starts: Some((0..TIME).map(start).collect()), tokens }
    };
    let first = packed(ids(), &[0, 70, 110]);
    let mut tokens = ids();
    tokens[text.clone()].copy_from_slice(&first.tokens[text.clone()]);
    let others = [packed(tokens.clone(), &[0, 70, 110]), packed(tokens, &[0, 3, 66, 70, 110, 111, 140])];
    for (model, class) in models_of_texts(TIME).into_iter().zip([AdapterClass::Gpu, AdapterClass::Cpu]) {
        let mut g = Graph::new();
        let options = TransformerOptions { packing: true, ..TransformerOptions::default() };
        let gpt = Transformer::build_of(&mut g, &model, [1, TIME], &options).unwrap();
        let plan = Plan::new(&g, &[gpt.logits], &Profile { class, ..gpu().profile().clone() }).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        let run = |batch: &Batch| {
            exec.write(gpt.tokens, &batch.tokens).unwrap();
            exec.write(gpt.starts.unwrap(), batch.starts.as_ref().unwrap()).unwrap();
            gpt.positions.map_or(Ok(()), |v| exec.write(v, &batch.positions(TIME))).unwrap();
            exec.submit().unwrap();
            exec.read_blocking::<f32>(gpt.logits).unwrap()
        };
        let want = run(&first);
        for other in &others {
            let got = run(other);
            assert_ne!(got, want);
            assert_eq!(got[text.start * 31..text.end * 31], want[text.start * 31..text.end * 31]);
        }
    }
}

/// One target more in a micro-batch is one part more of the mean, and a micro-batch without any adds nothing.
#[test]
fn every_target_weighs_the_same_in_whichever_micro_batch() {
    let mut trainers = large_and_small();
    let full = dataset().batch(1, 0, 4, 16).unwrap();
    for counted in [35, 32, 1] {
        let mut whole = full.clone();
        whole.targets[counted..].fill(IGNORE_INDEX);
        let parts = halves(&whole);
        assert_eq!(parts.each_ref().map(Batch::counted), [counted.min(32), counted.saturating_sub(32)]);
        let [large, small] = &mut trainers;
        large.step(std::slice::from_ref(&whole)).unwrap();
        small.step(&parts).unwrap();
        expect_equal_steps(&trainers);

        let [large, small] = &mut trainers;
        large.profile_blocking(std::slice::from_ref(&whole)).unwrap();
        let profile = small.profile_blocking(&parts).unwrap();
        expect_equal_steps(&trainers);

        let [large, small] = &mut trainers;
        large.step(std::slice::from_ref(&whole)).unwrap();
        let slices = small.slices(&profile, Duration::from_secs(9)).unwrap();
        let mut step = small.start_sliced(&slices, &parts).unwrap();
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        while small.record_slice(&mut encoder, &mut step).unwrap().is_none() {}
        gpu().submit(encoder).unwrap();
        expect_equal_steps(&trainers);

        let [large, small] = &trainers;
        let [one, two] = [large.evaluate_blocking(&[whole]), small.evaluate_blocking(&parts)].map(Result::unwrap);
        assert!((one - two).abs() < 1e-5, "{one} {two}");
    }
}

/// Evaluation runs in the memory of the training step.
#[test]
fn evaluation_between_steps_changes_nothing() {
    let config = tiny(TransformerConfig::gpt2(31, 16, 2, 32, 4));
    for precision in [Precision::F32, Precision::MIXED] {
        evaluates_between_steps(TrainConfig { precision, ..config.clone() });
    }
}

fn evaluates_between_steps(config: TrainConfig) {
    let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
    let trainer = || Trainer::with_options_blocking(gpu(), config.clone(), &options).unwrap();
    let (mut plain, mut evaluated) = (trainer(), trainer());
    let batches = dataset().val_batches(3, 2, 16).unwrap();
    for step in 0..3 {
        let batch = [dataset().batch(0, step, 2, 16).unwrap()];
        let want = plain.step(&batch).unwrap().wait_blocking().unwrap();
        let before = evaluated.evaluate_blocking(&batches).unwrap();
        assert_eq!(evaluated.evaluate_blocking(&batches).unwrap().to_bits(), before.to_bits());
        let loss = evaluated.step(&batch).unwrap();
        let probes = evaluated.take_probes().unwrap();
        evaluated.set_submit_time(Duration::ZERO);
        let after = evaluated.evaluate_blocking(&batches).unwrap();
        assert_ne!(after, before);
        // What can be read after a step can be read after an evaluation, too.
        assert_eq!(loss.wait_blocking().unwrap().to_bits(), want.to_bits());
        assert_eq!(evaluated.loss().unwrap().read_blocking::<f32>(gpu()).unwrap(), [want]);
        let [want, got] = [plain.take_probes().unwrap(), probes].map(|p| p.wait_blocking().unwrap());
        assert_eq!(format!("{got:?}"), format!("{want:?}"));
    }
    assert_eq!(bits(&weights_and_moments(&plain)), bits(&weights_and_moments(&evaluated)));
}

/// What is computed twice has the same bits both times, be it as little as is cheap or all that can be: activations,
/// norms, products, attention, rotations.
#[test]
fn recomputing_changes_no_bit() {
    let gpt2 = TransformerConfig { dropout: 0.1, ..TransformerConfig::gpt2(31, 16, 3, 32, 4) };
    let llama = TransformerConfig { qk_norm: true, ..TransformerConfig::llama(31, 16, 3, 32, 4) };
    // Tensors in f16 are worth computing twice if they are of twice as many rows.
    for (model, batch) in [(&gpt2, 32), (&llama, 32), (&gpt2, 64), (&llama, 64)] {
        let tokens: Vec<u32> = dataset().batch(0, 0, batch, 16).unwrap().tokens;
        let mut g = Graph::new();
        let gpt = Transformer::build(&mut g, model, batch, 16, true).unwrap();
        let targets = g.input("targets", g.ty(gpt.tokens).clone()).unwrap();
        let loss = g.cross_entropy("loss", gpt.logits, targets).unwrap();
        let outputs = [&[loss], &g.gradients(loss, &gpt.params).unwrap()[..]].concat();
        let mut rng = Rng::new(&[5]);
        let params: Vec<Vec<f32>> =
            gpt.params.iter().map(|&v| (0..g.ty(v).len()).map(|_| 0.1 + 0.2 * rng.normal() as f32).collect()).collect();
        let run = |plan: Plan| {
            let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
            for (&v, data) in gpt.params.iter().zip(&params) {
                exec.write(v, &data[..]).unwrap();
            }
            exec.write(gpt.tokens, &tokens[..]).unwrap();
            exec.write(targets, &tokens[..]).unwrap();
            gpt.dropout_seed.into_iter().for_each(|seed| exec.write(seed, &[3u32, 4]).unwrap());
            exec.submit().unwrap();
            outputs.iter().map(|&v| exec.read_blocking::<f32>(v).unwrap()).collect::<Vec<_>>()
        };
        for profile in common::profiles() {
            let mut g = g.clone();
            if batch == 64 {
                g.store_mixed(&outputs, &[], DType::F32, &profile).unwrap();
            }
            let kept = Plan::new(&g, &outputs, &profile).unwrap();
            let [cheap, all] = [Recompute::Cheap, Recompute::UpTo(0)]
                .map(|recompute| Plan::recomputing(&g, &outputs, &profile, recompute).unwrap());
            let twice = |part: &str| all.recomputed().nodes.iter().any(|name| name.contains(part));
            let parts = ["attn.v", "attn.scores", "mlp.up", "attn_norm", if model.qk_norm { "q_rope" } else { "gelu" }];
            assert!(parts.into_iter().all(twice), "{:?}", all.recomputed().nodes);
            assert!(all.buffer_bytes() < cheap.buffer_bytes() && cheap.buffer_bytes() <= kept.buffer_bytes());
            let kept = run(kept);
            assert!(kept.iter().all(|values| values.iter().any(|x| *x != 0.0)));
            for (plan, how) in [(cheap, "cheap"), (all, "all")] {
                for ((&v, kept), again) in outputs.iter().zip(&kept).zip(&run(plan)) {
                    assert_eq!(
                        bits(std::slice::from_ref(kept)),
                        bits(std::slice::from_ref(again)),
                        "{how}: {}",
                        g.name(v)
                    );
                }
            }
        }
    }
}

/// Half of what a step takes beside parameters, gradients and moments is enough, and the weights are the same.
#[test]
fn a_budget_is_held_and_changes_no_bit() {
    let config = TrainConfig { micro_batches: 2, ..TrainConfig::new(TransformerConfig::llama(31, 64, 4, 64, 4), 16) };
    let data = Dataset::new((0..40_000u32).map(|i| (i * i + i / 7) % 31).collect(), 0.1, 64).unwrap();
    let profile = gpu().profile();
    let plan = |max_bytes: Option<u64>| {
        TrainPlan::new(&config, &TrainOptions { max_bytes, ..TrainOptions::default() }, profile)
    };
    let free = plan(None).unwrap();
    let own = free.plans()[0].buffer_bytes();
    let budget = free.bytes() - own / 2;
    let tight = plan(Some(budget as u64)).unwrap();
    assert!(tight.bytes() <= budget && tight.recomputed().slowdown > free.recomputed().slowdown);
    assert!(tight.recomputed().flops > free.recomputed().flops, "{}", tight.recomputed());
    assert_eq!(tight.plans()[0].flops() - free.plans()[0].flops(), tight.recomputed().flops - free.recomputed().flops);
    let least = plan(Some(1)).unwrap_err().to_string();
    assert!(least.contains("nodes computed twice"), "{least}");
    let run = |plan: &TrainPlan| {
        let mut trainer = gpu().run_blocking(Trainer::from_plan(gpu(), plan)).unwrap();
        for step in 0..3 {
            let batches: Vec<Batch> = (0..2).map(|i| data.batch(1, 2 * step + i, 16, 64).unwrap()).collect();
            trainer.step(&batches).unwrap();
        }
        weights_and_moments(&trainer)
    };
    assert_eq!(bits(&run(&free)), bits(&run(&tight)));
}

/// All that a run leaves behind.
fn weights_and_moments(trainer: &Trainer) -> Vec<Vec<f32>> {
    let arenas = [trainer.params(), &trainer.optimizer().m, &trainer.optimizer().v];
    arenas.into_iter().flat_map(|arena| arena.read_blocking(trainer.gpu()).unwrap()).collect()
}

fn count(plan: &Plan, op: &str) -> usize {
    plan.steps().iter().filter(|s| s.op().name() == op).count()
}

/// Where a binding covers less than the model, arenas have several parts, and nothing else changes:
/// the same bits, and checkpoints go from one to the other.
#[test]
fn arenas_of_several_parts_train_like_whole_ones() {
    let [whole, split] = whole_and_split(20 << 10);
    let mut config = TrainConfig { micro_batches: 2, ..tiny(TransformerConfig::gpt2(31, 16, 2, 32, 4)) };
    config.adamw.max_grad_norm = 0.0;
    let [mut a, mut b] = [&whole, &split].map(|gpu| Trainer::new_blocking(gpu, config.clone()).unwrap());
    let parts = b.params().layout.parts.len();
    assert_eq!((a.params().layout.parts.len(), parts), (1, 6));
    assert!(b.params().layout.parts.iter().all(|p| 4 * p.len <= 20 << 10));
    assert!(b.params().layout.parts.iter().any(|p| p.decay_len > 0 && p.decay_len < p.len), "no part has both kinds");
    assert_eq!(a.optimizer().plan().dispatches(), count(a.optimizer().plan(), "adamw") + 2); // a norm of two levels
    assert_eq!([1, parts], [&a, &b].map(|t| count(t.optimizer().plan(), "adamw")));
    assert_eq!([1, parts + 1], [&a, &b].map(|t| count(t.optimizer().plan(), "l2_norm")));
    assert!(b.optimizer().plan().final_copies().is_empty(), "{}", b.optimizer().plan());

    train(&mut a, 3);
    train(&mut b, 3);
    assert_eq!(bits(&weights_and_moments(&a)), bits(&weights_and_moments(&b)));
    let [from_a, from_b] = [&a, &b].map(|t| Checkpoint::of_blocking(t, "", 0).unwrap());
    assert!(from_a.same_bits(&from_b));
    let [val_a, val_b] = [&a, &b].map(|t| t.evaluate_blocking(&dataset().val_batches(1, 2, 16).unwrap()).unwrap());
    assert_eq!(val_a.to_bits(), val_b.to_bits());
    let losses = train(&mut a, 6);
    let [mut c, mut d] = [&whole, &split].map(|gpu| Trainer::new_blocking(gpu, config.clone()).unwrap());
    for (trainer, checkpoint) in [(&mut c, &from_b), (&mut d, &from_a)] {
        checkpoint.restore_blocking(trainer).unwrap();
        assert_eq!(bits(&[train(trainer, 6)]), bits(std::slice::from_ref(&losses)));
        assert_eq!(bits(&weights_and_moments(trainer)), bits(&weights_and_moments(&a)));
    }
}

/// The same of Muon, whose matrices have parts of their own, those of one shape a batch in each.
#[test]
fn muon_over_several_parts_is_muon() {
    let [whole, split] = whole_and_split(20 << 10);
    let muon = Some(MuonConfig::default());
    let mut config = TrainConfig { micro_batches: 2, muon, ..tiny(TransformerConfig::gpt2(31, 16, 2, 32, 4)) };
    config.adamw.max_grad_norm = 0.0;
    let [mut a, mut b] = [&whole, &split].map(|gpu| Trainer::new_blocking(gpu, config.clone()).unwrap());
    assert_eq!([2, 7], [&a, &b].map(|t| t.params().layout.parts.len()));
    // Attention's square matrices, and those in and out of the feed-forward half. A small part holds five of the
    // first or one of the others.
    assert_eq!([3, 6], [&a, &b].map(|t| count(t.optimizer().plan(), "muon_update")));
    assert_eq!([3, 6], [&a, &b].map(|t| count(t.optimizer().plan(), "matmul") / 15));
    assert_eq!([1, 1], [&a, &b].map(|t| count(t.optimizer().plan(), "adamw")));
    assert!(b.optimizer().plan().final_copies().is_empty(), "{}", b.optimizer().plan());
    assert!(b.optimizer().plan().steps().iter().all(|s| s.copies().is_empty()), "{}", b.optimizer().plan());
    // One moment for what is Muon's.
    let len = |arena: &Arena| arena.layout.total_len();
    let matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128);
    assert_eq!(len(&a.optimizer().m) - len(&a.optimizer().v), matrices);

    train(&mut a, 3);
    train(&mut b, 3);
    assert_eq!(bits(&weights_and_moments(&a)), bits(&weights_and_moments(&b)));
    let [from_a, from_b] = [&a, &b].map(|t| Checkpoint::of_blocking(t, "", 0).unwrap());
    assert!(from_a.same_bits(&from_b));
    let losses = train(&mut a, 6);
    let mut c = Trainer::new_blocking(&split, config.clone()).unwrap();
    from_a.restore_blocking(&mut c).unwrap();
    assert_eq!(bits(&[train(&mut c, 6)]), bits(&[losses]));

    // AdamW's first moments do for momenta; Muon's checkpoint has not all that AdamW needs.
    let mut adamw = Trainer::new_blocking(&whole, TrainConfig { muon: None, ..config }).unwrap();
    let err = from_a.restore_blocking(&mut adamw).unwrap_err().to_string();
    assert!(err.contains("optimizer.v.h.0.attn.q.weight"), "{err}");
    Checkpoint::of_blocking(&adamw, "", 0).unwrap().restore_blocking(&mut c).unwrap();
}

/// The norm that gradients are clipped by is that of all parts. It is added up in another order than
/// that of a whole arena, so it may differ in the last bits, and with it what it scales.
#[test]
fn clipping_is_by_the_norm_of_all_parts() {
    let mut config = tiny(TransformerConfig::llama(31, 16, 2, 32, 4));
    config.adamw.max_grad_norm = 0.05; // less than any step's
    let gpus = whole_and_split(20 << 10);
    let mut trainers = gpus.each_ref().map(|gpu| Trainer::new_blocking(gpu, config.clone()).unwrap());
    for step in 1..=5 {
        let [a, b] = trainers.each_mut().map(|t| train(t, step)[0]);
        assert!((a - b).abs() <= 1e-6 * a.abs(), "loss of step {step}: {a} {b}");
        let [a, b] = trainers.each_ref().map(|t| {
            let norm: Vec<f32> = t.optimizer().grad_norm().unwrap().read_blocking(t.gpu()).unwrap();
            norm[0]
        });
        assert!(a > 0.05 && (a - b).abs() <= 2e-6 * a, "norm of step {step}: {a} {b}");
    }
    let [a, b] = trainers.each_ref().map(|t| t.params().read_blocking(t.gpu()).unwrap().concat());
    let worst = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    println!("weights differ by {worst:.1e} at most");
    assert!(worst < 1e-6, "{worst}");
}

/// Every arrangement of the parts builds, trains and learns a text that repeats.
#[test]
fn every_arrangement_learns() {
    let base = TransformerConfig { init: Init::Gpt2 { std: 0.1 }, ..TransformerConfig::gpt2(31, 16, 2, 32, 4) };
    let llama = TransformerConfig { n_kv_heads: 2, ..TransformerConfig::llama(31, 16, 2, 32, 4) };
    let configs = [
        base.clone(),
        TransformerConfig { norm_placement: NormPlacement::Post, ..base.clone() },
        TransformerConfig { norm: Norm::RmsNorm, mlp: Mlp::GeluErf, tied_head: false, ..base.clone() },
        TransformerConfig { init: Init::ZeroResidual { std: 0.1 }, dropout: 0.1, ..llama.clone() },
        TransformerConfig {
            norm_placement: NormPlacement::Post,
            tied_head: true,
            biases: Biases::ALL,
            init: base.init,
            ..llama
        },
    ];
    let ids: Vec<u32> = (0..2000).map(|i| [3, 1, 4, 1, 5, 9, 2, 6][i % 8]).collect();
    let data = Dataset::new(ids, 0.1, 16).unwrap();
    let muon = [None, Some(MuonConfig::default())];
    for (model, muon) in configs.into_iter().flat_map(|model| muon.map(|muon| (model.clone(), muon))) {
        let mut config = TrainConfig { muon, ..tiny(model) };
        config.schedule = Schedule::constant(1e-2);
        let mut trainer = Trainer::new_blocking(gpu(), config).unwrap();
        let step = |t: &mut Trainer| {
            t.step(&[data.batch(0, t.step_count(), 2, 16).unwrap()]).unwrap().wait_blocking().unwrap()
        };
        let first = step(&mut trainer);
        let last = (0..30).map(|_| step(&mut trainer)).last().unwrap();
        assert!(last < 0.5 * first, "{:?}: from {first} to {last}", trainer.config());
        let val = trainer.evaluate_blocking(&data.val_batches(2, 2, 16).unwrap()).unwrap();
        assert!(val.is_finite() && val < first, "{val}");
    }
}

// Checkpoints: files that others may have written, and that several write.

/// A small trainer, and its checkpoint as a file in memory.
fn saved() -> (Trainer, Vec<u8>) {
    let mut trainer = Trainer::new_blocking(gpu(), tiny(TransformerConfig::llama(31, 16, 1, 32, 4))).unwrap();
    train(&mut trainer, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    Checkpoint::save_trainer_blocking(&trainer, "", 0, &path).unwrap();
    (trainer, std::fs::read(path).unwrap())
}

/// The file with another header.
fn with_header(file: &[u8], edit: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let (len, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let mut header: serde_json::Value = serde_json::from_slice(header).unwrap();
    edit(&mut header);
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The file with another state.
fn with_state(file: &[u8], edit: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    with_header(file, |header| {
        let state = &mut header["__metadata__"]["throughline"];
        let mut inner = serde_json::from_str(state.as_str().unwrap()).unwrap();
        edit(&mut inner);
        *state = inner.to_string().into();
    })
}

#[test]
fn checkpoints_that_cannot_be_are_errors_that_say_why() {
    use serde_json::{Value, json};
    let (_, file) = saved();
    assert!(Checkpoint::from_bytes("good", with_state(&file, |_| ())).is_ok());
    let refused = |file: Vec<u8>, parts: &[&str]| {
        let error = Checkpoint::from_bytes("some.file", file).unwrap_err().to_string();
        assert!(error.starts_with("some.file: ") && parts.iter().all(|p| error.contains(p)), "{parts:?}: {error}");
    };
    let state = |key: &str, value: Value, parts: &[&str]| {
        let at = |state: &mut Value| *key.split('.').fold(state, |at, key| &mut at[key]) = value;
        refused(with_state(&file, at), parts);
    };
    state("version", json!(2), &["version 2", "reads 1"]);
    state("step", json!(u64::MAX), &["step", "18446744073709551615"]);
    state("step", json!(-1), &["throughline", "-1"]);
    state("config.model.n_layers", json!(1_000_000), &["1000000 blocks"]);
    state("config.model.n_heads", json!(0), &["n_heads"]);
    state("config.batch", json!(0), &["batch"]);
    state("config.model", json!(null), &["throughline", "null"]);
    refused(with_header(&file, |h| h["__metadata__"] = json!({})), &["no `throughline` metadata"]);
    refused(with_header(&file, |h| h["norm_f.weight"]["dtype"] = json!("I32")), &["`norm_f.weight`", "F32", "I32"]);
    refused(with_header(&file, |h| h["norm_f.weight"]["shape"] = json!([33])), &["`norm_f.weight`", "[33]"]);
    for len in [0, 7, 8, 100, file.len() - 1] {
        refused(file[..len].to_vec(), &[]);
    }
}

#[test]
fn a_checkpoint_of_another_model_leaves_the_trainer_as_it_was() {
    let (mut trainer, file) = saved();
    let before = Checkpoint::of_blocking(&trainer, "", 0).unwrap();
    let mut rename = |from: &str, to: &str| {
        let renamed = with_header(&file, |header| {
            let info = header.as_object_mut().unwrap().remove(from).unwrap();
            header[to] = info;
        });
        Checkpoint::from_bytes("some.file", renamed).unwrap().restore_blocking(&mut trainer).unwrap_err().to_string()
    };
    let error = rename("head.weight", "tail.weight");
    assert!(error.contains("some.file") && error.contains("`head.weight` is missing"), "{error}");
    // The moments of a parameter that the trainer does not have are nobody's.
    let error = rename("optimizer.v.norm_f.weight", "extra.weight");
    assert!(error.contains("`optimizer.v.norm_f.weight` is missing"), "{error}");
    let gpt2 = Trainer::new_blocking(gpu(), tiny(TransformerConfig::gpt2(31, 16, 1, 32, 4))).unwrap();
    let gpt2 = Checkpoint::of_blocking(&gpt2, "", 0).unwrap();
    let error = gpt2.restore_blocking(&mut trainer).unwrap_err().to_string();
    assert!(error.contains("is missing") || error.contains("shape"), "{error}");
    // One that has all that is needed, and more.
    let wide = with_header(&file, |header| {
        let at = header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max();
        header["extra.weight"] =
            serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": [at, at.unwrap() + 4]});
    });
    let wide = Checkpoint::from_bytes("some.file", [wide, vec![0; 4]].concat()).unwrap();
    let error = wide.restore_blocking(&mut trainer).unwrap_err().to_string();
    assert!(error.contains("`extra.weight` is not one of the trainer's"), "{error}");
    assert!(Checkpoint::of_blocking(&trainer, "", 0).unwrap().same_bits(&before));
}

#[test]
fn threads_that_save_to_one_path_leave_a_whole_checkpoint() {
    let (trainer, file) = saved();
    let checkpoint = Checkpoint::from_bytes("checkpoint", file.clone()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint.safetensors");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| checkpoint.save(&path).unwrap());
            scope.spawn(|| Checkpoint::save_trainer_blocking(&trainer, "", 0, &path).unwrap());
        }
    });
    assert_eq!(std::fs::read(&path).unwrap(), file);
    // Into the file that it comes from, which others have open.
    let loaded = Checkpoint::load(&path).unwrap();
    Checkpoint::load(&path).unwrap().save_weights(&path).unwrap();
    assert!(loaded.same_bits(&checkpoint));
    let weights = Checkpoint::load(&path).unwrap();
    assert!(weights.weights().eq(checkpoint.weights()) && !weights.same_bits(&checkpoint));
    loaded.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), file);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
}

/// Numbers that settings should not have, and some that they may.
const ODD: [f64; 26] = [
    0.0,
    -0.0,
    1e-300,
    1e-60,
    1e-45,
    1e-38,
    1e-20,
    1e-8,
    1e-3,
    0.1,
    0.5,
    0.999,
    0.999_999_999,
    1.0,
    2.0,
    10.0,
    1e3,
    1e10,
    1e38,
    1e39,
    1e300,
    -1e-60,
    -1.0,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
];
const ODD_COUNTS: [usize; 12] = [0, 1, 2, 3, 5, 8, 16, 1 << 20, (1 << 24) + 1, 1 << 32, usize::MAX / 2, usize::MAX];

/// A configuration of which a few fields have odd values.
fn odd_config(rng: &mut Rng, fields: u64) -> TrainConfig {
    let rope = Positions::Rope { theta: 1e4, interleaved: false, scaling: Scaling::None };
    let gpt2 = TransformerConfig::gpt2(31, 16, 2, 8, 2);
    let models =
        [gpt2.clone(), TransformerConfig { positions: rope, ..gpt2 }, TransformerConfig::llama(31, 16, 2, 8, 2)];
    let mut c = TrainConfig { micro_batches: 2, seq_len: Some(8), ..tiny(models[rng.below(3) as usize].clone()) };
    c.muon = (rng.below(2) == 0).then(MuonConfig::default);
    for _ in 0..fields {
        let x = ODD[rng.below(ODD.len() as u64) as usize];
        let n = ODD_COUNTS[rng.below(ODD_COUNTS.len() as u64) as usize];
        let even = n.is_multiple_of(2);
        let (model, field) = (&mut c.model, rng.below(35));
        let mut muon = c.muon.unwrap_or_default();
        match field {
            0 => c.adamw.beta1 = x,
            1 => c.adamw.beta2 = x,
            2 => c.adamw.eps = x,
            3 => c.adamw.weight_decay = x,
            4 => c.adamw.max_grad_norm = x,
            5 => c.schedule.peak = x,
            6 => c.schedule.final_fraction = x,
            7 => c.schedule.warmup = n as u64,
            8 => c.schedule.steps = n as u64,
            9 => c.schedule.decay = [Decay::Constant, Decay::Linear][usize::from(even)],
            10 => muon.momentum = x,
            11 => muon.steps = n,
            12 => muon.lr_factor = x,
            13 => muon.weight_decay = x,
            14 => (muon.nesterov, muon.scale) = (even, MuonScale::Original),
            15 => model.dropout = x as f32,
            16 => model.norm_eps = x as f32,
            17 => model.residual_gate = Some(x as f32),
            18 => model.init = Init::Plain { std: x as f32 },
            19 => model.init = Init::ZeroResidual { std: x as f32 },
            20 => model.positions = Positions::Rope { theta: x as f32, interleaved: even, scaling: Scaling::None },
            21 => model.vocab_size = n,
            22 => model.context = n,
            23 => model.n_layers = n,
            24 => model.d_model = n,
            25 => model.n_heads = n,
            26 => model.n_kv_heads = n,
            27 => model.head_dim = Some(n),
            28 => model.d_ff = n,
            29 => model.token_types = n,
            30 => c.batch = n,
            31 => c.micro_batches = n,
            32 => c.seq_len = [None, Some(n)][usize::from(n != 2)],
            33 => (model.norm_placement, model.qk_norm) = (NormPlacement::Post, even),
            _ => c.seed = n as u64,
        }
        if (10..=14).contains(&field) {
            c.muon = Some(muon);
        }
    }
    c
}

#[test]
fn any_settings_give_a_plan_or_an_error() {
    let mut rng = Rng::new(&[1]);
    let (mut plans, profile) = (0, Profile::portable(AdapterClass::Gpu));
    for round in 0..600 {
        let config = odd_config(&mut rng, 1 + round % 4);
        match TrainPlan::new(&config, &TrainOptions::default(), &profile) {
            Ok(_) => plans += 1,
            Err(e) => assert!(e.to_string().contains(['`', ':']), "{e}"),
        }
    }
    println!("{plans} of 600 have a plan");
    assert!((100..500).contains(&plans), "{plans}");
}

/// What is accepted trains with finite losses to finite weights, with up to three odd fields at once. (Enough extremes
/// together still diverge, as anywhere: that is what the loss is for.)
#[test]
fn any_settings_that_are_accepted_give_finite_weights() {
    let mut rng = Rng::new(&[2]);
    let options = TrainOptions { max_bytes: Some(1 << 20), ..TrainOptions::default() };
    let mut trained = 0;
    while trained < 60 {
        let config = odd_config(&mut rng, 1 + trained % 3);
        let Ok(plan) = TrainPlan::new(&config, &options, gpu().profile()) else { continue };
        if config.micro_batches > 16 || plan.plans()[0].dispatches() > 1000 {
            continue;
        }
        let mut trainer = gpu().run_blocking(Trainer::from_plan(gpu(), &plan)).unwrap();
        let (len, vocab) = (config.batch * config.seq_len(), config.model.vocab_size as u64);
        let mut ids = || Vec::from_iter((0..len).map(|_| rng.below(vocab) as u32));
        for _ in 0..12 {
            let batches: Vec<Batch> = (0..config.micro_batches).map(|_| Batch::new(ids(), ids())).collect();
            let loss = trainer.step(&batches).unwrap().wait_blocking().unwrap();
            assert!(loss.is_finite(), "the loss is {loss} at step {}: {config:#?}", trainer.step_count());
        }
        let weights = weights_and_moments(&trainer);
        assert!(weights.iter().flatten().all(|x| x.is_finite()), "{config:#?}");
        trained += 1;
    }
}
