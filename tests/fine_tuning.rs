//! Adapters on models from files: against PyTorch's `peft`, on bases in few bits, saved and resumed.

mod common;

use std::sync::Arc;

use common::{gpu, hf_folder, lora_expected, worst};
use throughline::model::Model;
use throughline::nn::Lora;
use throughline::optim::{Arena, LossScaling, Schedule};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::{DType, Precision};

const TIME: usize = 24;

fn base(name: &str) -> Arc<Model> {
    Arc::new(Model::open(&hf_folder(name)).unwrap())
}

/// Rank 4 on all linear layers, as in tests/data/lora.
fn lora(name: &str) -> Lora {
    Lora { shared_qkv: name == "gpt2", ..Lora::new(4, 8.0) }
}

fn config(base: &Model, lora: Lora) -> TrainConfig {
    let schedule = Schedule::constant(0.01);
    TrainConfig { lora: Some(lora), schedule, seq_len: Some(TIME), ..TrainConfig::new(base.config().clone(), 2) }
}

fn on(base: &Arc<Model>) -> TrainOptions<'static> {
    TrainOptions { base: Some(base.clone()), ..TrainOptions::default() }
}

fn trainer(base: &Arc<Model>, lora: Lora) -> Trainer {
    Trainer::with_options_blocking(gpu(), config(base, lora), &on(base)).unwrap()
}

/// What `peft` made of an adapter of tests/data/lora.
struct Expected(&'static str);

impl Expected {
    fn get<T: bytemuck::Pod>(&self, tensor: &str) -> Vec<T> {
        lora_expected(self.0, tensor)
    }

    /// A batch for each step.
    fn batches(&self) -> Vec<Batch> {
        let steps: Vec<u32> = self.get("tokens");
        let batch = |step: &[u32]| {
            let rows = || step.chunks(TIME + 1);
            let tokens = rows().flat_map(|row| row[..TIME].to_vec()).collect();
            Batch::new(tokens, rows().flat_map(|row| row[1..].to_vec()).collect())
        };
        steps.chunks(2 * (TIME + 1)).map(batch).collect()
    }

    /// The values of `prefix/N` for all tensors of an arena.
    fn values(&self, prefix: &str, arena: &Arena) -> Vec<Vec<f32>> {
        arena.layout.tensors.iter().map(|(name, _)| self.get(&format!("{prefix}/{name}"))).collect()
    }

    fn check(&self, prefix: &str, arena: &Arena) {
        let got = arena.read_blocking(gpu()).unwrap();
        for (((name, _), got), want) in arena.layout.tensors.iter().zip(got).zip(self.values(prefix, arena)) {
            let error = worst(&got, &want);
            assert!(error < 1e-4, "{prefix}/{name}: {error}");
        }
    }
}

#[test]
fn gradients_and_ten_steps_are_those_of_peft() {
    for (name, loss_scaling) in [
        ("llama", None),
        ("gpt2", None),
        ("llama", Some(LossScaling::default())),
        ("gpt2", Some(LossScaling::default())),
    ] {
        let (base, expected) = (base(name), Expected(name));
        let config = TrainConfig { loss_scaling, ..config(&base, lora(name)) };
        let mut trainer = Trainer::with_options_blocking(gpu(), config, &on(&base)).unwrap();
        trainer.params().write(gpu(), &expected.values("start", trainer.params())).unwrap();
        let losses: Vec<f32> = expected.get("loss");
        for (i, (batch, want)) in expected.batches().iter().zip(losses).enumerate() {
            let got = trainer.step(std::slice::from_ref(batch)).unwrap().wait_blocking().unwrap();
            assert!((got - want).abs() < 1e-4, "{name}, step {i}: loss {got}, PyTorch {want}");
            if i == 0 && loss_scaling.is_none() {
                expected.check("grad", trainer.grads());
            }
        }
        expected.check("final", trainer.params());
    }
}

/// Losses in mixed precision are those of `peft` but for rounding: what is trained is f32, the base is as its file has it.
#[test]
fn adapters_train_in_mixed_precision() {
    for (name, file) in [("llama", "llama"), ("gpt2", "gpt2"), ("llama", "llama_bf16")] {
        let (base, expected) = (base(file), Expected(name));
        let config = TrainConfig { precision: Precision::MIXED, ..config(&base, lora(name)) };
        let mut trainer = Trainer::with_options_blocking(gpu(), config, &on(&base)).unwrap();
        trainer.params().write(gpu(), &expected.values("start", trainer.params())).unwrap();
        for (i, (batch, want)) in expected.batches().iter().zip(expected.get::<f32>("loss")).enumerate() {
            let got = trainer.step(std::slice::from_ref(batch)).unwrap().wait_blocking().unwrap();
            assert!((got - want).abs() < 5e-3 * want, "{file}, step {i}: loss {got}, PyTorch in f32 {want}");
        }
        let is_adapter = |name: &str| name.ends_with(".lora_a") || name.ends_with(".lora_b");
        let adapters = trainer.plan().externals().iter().filter(|e| is_adapter(&e.name));
        assert!(adapters.map(|e| e.ty.dtype).all(|dtype| dtype == DType::F16));
        assert!(trainer.params().tensors.iter().all(|tensor| tensor.ty().dtype == DType::F32));
    }
}

/// The base in 16 bits gives what the same numbers in f32 give.
#[test]
fn a_base_stays_as_its_file_has_it() {
    let packed = base("llama_bf16");
    let dir = tempfile::tempdir().unwrap();
    let values = |name: &str| packed.values(name);
    throughline::model::save_with(dir.path(), packed.config(), values).unwrap();
    let plain = Arc::new(Model::open(dir.path()).unwrap());
    let batches = Expected("llama").batches();
    let bases = [&packed, &plain];
    let [small, large] = bases
        .map(|base| TrainPlan::new(&config(base, lora("llama")), &on(base), gpu().profile()).unwrap().base_bytes());
    assert!(small < large * 6 / 10, "{small} bytes in bf16, {large} in f32");
    let [mut packed, mut plain] = bases.map(|base| trainer(base, lora("llama")));
    for batch in &batches[..3] {
        let batch = std::slice::from_ref(batch);
        let [a, b] = [&mut packed, &mut plain].map(|t| t.step(batch).unwrap().wait_blocking().unwrap());
        assert!((a - b).abs() < 1e-5, "{a} on the packed base, {b} on f32");
    }
    let [a, b] = [packed, plain].map(|t| t.params().read_blocking(gpu()).unwrap().concat());
    assert!(worst(&a, &b) < 1e-3);
}

#[test]
fn a_fresh_adapter_changes_nothing_and_training_it_does() {
    let (base, expected) = (base("llama"), Expected("llama"));
    let batch = &expected.batches()[..1];
    let whole = TrainConfig { lora: None, ..config(&base, lora("llama")) };
    let mut all = Trainer::new_blocking(gpu(), whole).unwrap();
    base.load_blocking(gpu(), all.params()).unwrap();
    let mut adapted = trainer(&base, lora("llama"));
    let [before, of_base] = [&adapted, &all].map(|t| t.evaluate_blocking(batch).unwrap());
    assert!((before - of_base).abs() < 1e-5, "{before} with the adapter, {of_base} without");
    for _ in 0..5 {
        adapted.step(batch).unwrap();
        all.step(batch).unwrap();
    }
    let after = adapted.evaluate_blocking(batch).unwrap();
    assert!(after < before - 0.1, "{before} before, {after} after");
    // The moments of all weights would be as large as these.
    assert!(adapted.parameter_count() < all.parameter_count() / 2);
}

#[test]
fn a_resumed_run_has_the_same_bits() {
    let (base, batches) = (base("llama_bf16"), Expected("llama").batches());
    let lora = Lora { dropout: 0.1, trained: vec!["norm_f".into()], ..lora("llama") };
    let steps = |trainer: &mut Trainer, batches: &[Batch]| {
        batches.iter().for_each(|batch| drop(trainer.step(std::slice::from_ref(batch)).unwrap()));
    };
    let mut whole = trainer(&base, lora.clone());
    steps(&mut whole, &batches[..3]);
    let half = Checkpoint::of_blocking(&whole, "", 0).unwrap();
    steps(&mut whole, &batches[3..6]);
    let options = TrainOptions { init: false, ..on(&base) };
    let mut resumed = Trainer::with_options_blocking(gpu(), half.state.config.clone(), &options).unwrap();
    half.restore_blocking(&mut resumed).unwrap();
    steps(&mut resumed, &batches[3..6]);
    let [a, b] = [&whole, &resumed].map(|t| Checkpoint::of_blocking(t, "", 0).unwrap());
    assert!(a.same_bits(&b));
    // Only what is trained is in the file.
    assert!(a.weights().all(|(name, _)| lora.trains(name)));

    // An adapter for another model, and weights of a whole one.
    let other = trainer(&self::base("llama"), lora);
    let file = Checkpoint::of_blocking(&other, "", 0).unwrap();
    let error = file.restore_blocking(&mut resumed).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
    let all = TrainConfig { lora: None, ..half.state.config.clone() };
    let mut all = Trainer::new_blocking(gpu(), all).unwrap();
    let error = half.restore_blocking(&mut all).unwrap_err().to_string();
    assert!(error.contains("adapters") && error.contains("all weights"), "{error}");
}

/// Norms and the table of tokens are trained besides, from the values of the file.
#[test]
fn modules_are_trained_whole_if_asked() {
    let base = base("gpt2");
    let lora = Lora {
        targets: vec!["attn.v".into(), "h.1.mlp.up".into()],
        trained: vec!["embed".into(), "attn_norm".into()],
        ..Lora::new(2, 2.0)
    };
    let mut trainer = trainer(&base, lora);
    let names: Vec<&str> = trainer.params().layout.tensors.iter().map(|(name, _)| &name[..]).collect();
    let expected = ["embed.weight", "h.0.attn_norm.bias", "h.0.attn.v.lora_a", "h.1.mlp.up.lora_b"];
    assert!(expected.iter().all(|name| names.contains(name)), "{names:?}");
    assert!(!names.contains(&"h.0.mlp.up.lora_a") && !names.contains(&"norm_f.weight"), "{names:?}");
    let at = |name: &str| trainer.params().layout.tensors.iter().position(|(n, _)| n == name).unwrap();
    let (table, norm) = (at("embed.weight"), at("h.0.attn_norm.weight"));
    let before = trainer.params().read_blocking(gpu()).unwrap();
    assert_eq!(before[table], base.values("embed.weight").unwrap());
    assert_eq!(before[norm], base.values("h.0.attn_norm.weight").unwrap());
    trainer.step(&Expected("gpt2").batches()[..1]).unwrap();
    let after = trainer.params().read_blocking(gpu()).unwrap();
    assert!(before.iter().zip(&after).all(|(before, after)| before != after));
}

#[test]
fn settings_that_cannot_be_are_named() {
    let base = base("llama");
    let good = config(&base, lora("llama"));
    let error = |config: &TrainConfig, options: &TrainOptions<'_>| {
        TrainPlan::new(config, options, gpu().profile()).unwrap_err().to_string()
    };
    let with = |lora: Lora| error(&TrainConfig { lora: Some(lora), ..good.clone() }, &on(&base));
    let message = with(Lora { rank: 0, ..lora("llama") });
    assert!(message.contains("`lora.rank`") && message.contains('0'), "{message}");
    let message = with(Lora { targets: vec!["q".into(), "c_attn".into()], ..lora("llama") });
    assert!(
        message.contains("`lora.targets`") && message.contains("`c_attn`") && message.contains("`gate`"),
        "{message}"
    );
    let message = with(Lora { trained: vec!["wte".into()], ..lora("llama") });
    assert!(
        message.contains("`lora.trained`") && message.contains("`wte`") && message.contains("`norm_f`"),
        "{message}"
    );
    let message = error(&good, &TrainOptions::default());
    assert!(message.contains("`lora`") && message.contains("TrainOptions::base"), "{message}");
    let message = error(&TrainConfig { lora: None, ..good.clone() }, &on(&base));
    assert!(message.contains("`base`"), "{message}");
    let message = error(&good, &on(&self::base("gpt2")));
    assert!(message.contains("`model`") && message.contains("gpt2"), "{message}");
}
