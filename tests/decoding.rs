//! Attention over growing caches, in chunks and token by token, equals attention over everything at once. So do models
//! with blocks of their own.

mod common;
#[path = "../examples/architectures/parallel.rs"]
mod parallel;
#[path = "../examples/architectures/sandwich.rs"]
mod sandwich;
#[path = "../examples/architectures/value_residuals.rs"]
mod value_residuals;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use common::{gpu, profiles, worst};
use throughline::decode::{DecodeOptions, DecodePlan, Decoder};
use throughline::graph::Source;
use throughline::model::Model;
use throughline::nn::{
    Block, Builder, DecodeRows, DecodeShape, Init, StandardBlock, Transformer, TransformerConfig, TransformerDecoder,
};
use throughline::ops::attention::Attention;
use throughline::ops::random_array;
use throughline::ops::rope::{Rope, Scaling};
use throughline::reference::{self, nmse};
use throughline::train::{TrainConfig, TrainOptions, Trainer};
use throughline::{
    AdapterClass, DType, ExecOptions, Executable, Gpu, Graph, Plan, Profile, Result, Tensor, TensorType, Value,
};

const CAPACITY: usize = 21;
const WIDTH: usize = 2 * 12;
const OP: Attention = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
const ROPE: Rope =
    Rope { heads: 2, theta: 10_000.0, interleaved: false, inverse: false, has_start: true, scaling: Scaling::None };

/// A step for `time` new rows of each of `batch` sequences: q, k and v, where they start, the output.
struct Step {
    exec: Executable,
    qkv: [Value; 3],
    starts: Value,
    o: Value,
}

impl Step {
    fn new([batch, time]: [usize; 2], profile: &Profile, caches: &[Tensor; 2]) -> Step {
        let mut g = Graph::new();
        let qkv = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([batch, time, WIDTH])).unwrap());
        let starts = g.input("starts", TensorType::u32([batch])).unwrap();
        let states = ["keys", "values"].map(|n| g.state(n, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap());
        let [q, k] = [0, 1].map(|i| g.rope_from("rope", qkv[i], starts, ROPE).unwrap());
        let write = |g: &mut Graph, rows, cache| g.cache_write("write", rows, starts, cache).unwrap();
        let written = [write(&mut g, k, states[0]), write(&mut g, qkv[2], states[1])];
        let o = g.attention_cached("o", q, written, starts, OP).unwrap();
        (0..2).for_each(|i| g.store(written[i], states[i]).unwrap());
        let plan = Plan::new(&g, &[o], profile).unwrap();
        // Writing a row does not move the cache.
        assert!(plan.final_copies().is_empty() && plan.steps().iter().all(|s| s.copies().is_empty()), "{plan}");
        let bindings = states.into_iter().zip(caches.iter().cloned()).collect();
        let options = ExecOptions::bound(bindings);
        Step { exec: Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap(), qkv, starts, o }
    }

    /// Rows of q, k and v.
    fn run(&self, rows: &[Vec<f32>; 3], starts: &[u32]) -> Vec<f32> {
        self.qkv.iter().zip(rows).for_each(|(&v, rows)| self.exec.write(v, rows).unwrap());
        self.exec.write(self.starts, starts).unwrap();
        self.exec.submit().unwrap();
        self.exec.read_blocking(self.o).unwrap()
    }
}

/// q, k and v of `batch` whole sequences.
fn data(batch: usize) -> [Vec<f32>; 3] {
    let array = |seed| random_array(&[batch, CAPACITY, WIDTH].into(), seed);
    [1, 2, 3].map(|seed| array(seed).data.iter().map(|&x| x as f32).collect())
}

/// Attention of each whole sequence to itself, by the reference.
fn whole(batch: usize) -> Vec<f64> {
    let mut g = Graph::new();
    let all = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap());
    let [q, k] = [0, 1].map(|i| g.rope("rope", all[i], ROPE).unwrap());
    let o = g.attention("o", q, k, all[2], OP).unwrap();
    let arrays = data(batch).map(|d| {
        let data = d.iter().map(|&x| f64::from(x)).collect();
        reference::Array::new([batch, CAPACITY, WIDTH], data)
    });
    let given: HashMap<Value, _> = all.into_iter().zip(arrays).collect();
    reference::run(&g, &given, &[o]).unwrap().remove(0).data
}

/// Rows `from .. from + n` of one sequence, for each of q, k and v.
fn rows(data: &[Vec<f32>; 3], sequence: usize, from: usize, n: usize) -> [Vec<f32>; 3] {
    let first = sequence * CAPACITY + from;
    [0, 1, 2].map(|i: usize| data[i][first * WIDTH..(first + n) * WIDTH].to_vec())
}

/// What a cache holds behind the rows written so far must not matter: here it is no number.
fn caches(batch: usize) -> [Tensor; 2] {
    ["keys", "values"].map(|name| {
        let cache = Tensor::zeros(gpu(), name, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap();
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e6];
        let fill: Vec<f32> = odd.iter().copied().cycle().take(batch * CAPACITY * WIDTH).collect();
        cache.write(gpu(), &fill).unwrap();
        cache
    })
}

#[test]
fn a_growing_cache_gives_what_whole_attention_gives() {
    let (data, want) = (data(1), whole(1));
    for profile in profiles() {
        let caches = caches(1);
        let [chunk, single] = [7, 1].map(|time| Step::new([1, time], &profile, &caches));
        let mut got = chunk.run(&rows(&data, 0, 0, 7), &[0]);
        got.extend(chunk.run(&rows(&data, 0, 7, 7), &[7]));
        for t in 14..CAPACITY {
            got.extend(single.run(&rows(&data, 0, t, 1), &[t as u32]));
        }
        let error = nmse(&got, &want);
        assert!(error < 1e-12, "{profile:?}: {error}");
    }
}

/// Four sequences of which each step takes some rows, and a step that is past the end of two of them.
#[test]
fn a_batch_of_ragged_sequences_gives_what_each_gives_alone() {
    const BATCH: usize = 4;
    let (data, want) = (data(BATCH), whole(BATCH));
    for profile in profiles() {
        let caches = caches(BATCH);
        let steps = [5, 1].map(|time| (time, Step::new([BATCH, time], &profile, &caches)));
        let mut lengths = [0usize; BATCH];
        // How many of a step's rows stand for a token; the others are written, and written over later.
        let taken = [(0, [5, 3, 0, 1]), (1, [1, 1, 1, 0]), (0, [5, 5, 2, 5]), (0, [5, 1, 5, 0]), (0, [5, 5, 5, 5])];
        for (which, taken) in taken.into_iter().chain([(1, [0, 1, 1, 1]); 4]) {
            let (time, step) = &steps[which];
            let mut given: [Vec<f32>; 3] = Default::default();
            for (b, &length) in lengths.iter().enumerate() {
                let real = rows(&data, b, length, taken[b]);
                for (given, real) in given.iter_mut().zip(real) {
                    given.extend(real);
                    given.resize(given.len() + (time - taken[b]) * WIDTH, 9.0);
                }
            }
            let got = step.run(&given, &lengths.map(|n| n as u32));
            for b in 0..BATCH {
                let (at, n) = (b * CAPACITY + lengths[b], taken[b] * WIDTH);
                if n > 0 {
                    let error = nmse(&got[b * time * WIDTH..][..n], &want[at * WIDTH..][..n]);
                    assert!(error < 1e-12, "{profile:?}: sequence {b} from {}: {error}", lengths[b]);
                }
                lengths[b] += taken[b];
            }
        }
        assert_eq!(lengths, [CAPACITY, 19, 17, 15]);
    }
}

/// Attention twice, of which the second is without a scope of its own and looks back with the queries of the first. And
/// what every token adds to itself, on the way of which heads come before places.
#[derive(Debug)]
struct Twice;

impl Block for Twice {
    fn build(&self, b: &mut Builder<'_>, _: usize, x: Value) -> Result<Value> {
        let x = b.residual("attn", x, |b, x| {
            let [q, k, v] = b.qkv(x)?;
            let y = b.attend([q, k, v])?;
            let z = b.attend([q, y, k])?;
            b.project(z)
        })?;
        let x = b.residual("again", x, Builder::attention)?;
        b.residual("heads", x, |b, x| {
            let [batch, time, width] = b.ty(x).shape.dims().try_into().unwrap();
            let heads = b.reshape("heads", x, [batch, time, 4, width / 4])?;
            let first = b.transpose("first", heads, 1, 2)?;
            let bent = b.gelu("bent", first)?;
            let back = b.transpose("back", bent, 1, 2)?;
            b.reshape("joined", back, [batch, time, width])
        })
    }
}

/// Weights so large that tokens matter to each other.
fn config(config: TransformerConfig) -> TransformerConfig {
    TransformerConfig { init: Init::Plain { std: 0.25 }, ..config }
}

fn models() -> [TransformerConfig; 2] {
    [TransformerConfig::gpt2(37, CAPACITY, 3, 32, 4), TransformerConfig::llama(37, CAPACITY, 3, 32, 4)].map(config)
}

fn trainer(model: &TransformerConfig, block: &dyn Block) -> Trainer {
    let options = TrainOptions { block, ..Default::default() };
    Trainer::with_options_blocking(gpu(), TrainConfig::new(model.clone(), 1), &options).unwrap()
}

fn decoder(trainer: &Trainer, options: DecodeOptions<'_>) -> Result<Decoder> {
    decoder_on(gpu(), trainer, options)
}

fn decoder_on(gpu: &Gpu, trainer: &Trainer, options: DecodeOptions<'_>) -> Result<Decoder> {
    gpu.run_blocking(Decoder::on_params(gpu, &trainer.config().model, trainer.params(), options))
}

/// The logits of all tokens at once, from a trainer's parameters.
fn forward(trainer: &Trainer, block: &dyn Block, ids: &[u32]) -> Vec<f32> {
    let mut g = gpu().graph();
    let model = Transformer::build_with(&mut g, &trainer.config().model, block, 1, ids.len(), false).unwrap();
    let names = trainer.params().layout.tensors.iter().map(|(name, _)| g.find(name).unwrap());
    let bindings = names.zip(trainer.params().tensors.iter().cloned()).collect();
    let plan = Arc::new(gpu().plan(&g, &[model.logits]).unwrap());
    let exec = Executable::new_blocking(gpu(), plan, ExecOptions::bound(bindings)).unwrap();
    exec.write(model.tokens, ids).unwrap();
    exec.submit().unwrap();
    exec.read_blocking(model.logits).unwrap()
}

#[test]
fn own_blocks_decode_as_their_forward_pass() {
    let ids: Vec<u32> = (0..CAPACITY as u32).map(|i| i * i % 37).collect();
    let blocks: [&dyn Block; 5] =
        [&StandardBlock, &parallel::Parallel, &sandwich::Sandwich, &value_residuals::ValueResiduals, &Twice];
    for model in models() {
        for block in blocks {
            let trainer = trainer(&model, block);
            let want = forward(&trainer, block, &ids);
            for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
                let options = DecodeOptions { block, ..DecodeOptions::new(CAPACITY) };
                let mut decoder = decoder_on(&gpu().with_class(class), &trainer, options).unwrap();
                check_decoder(&mut decoder, &ids, &want, &format!("{block:?} {class:?}"));
            }
        }
    }
}

/// Checks its logits of these tokens, of which it knows none, against those of a forward pass.
fn check_decoder(decoder: &mut Decoder, ids: &[u32], want: &[f32], name: &str) {
    // A prompt, tokens one by one, and the rest with the logits of each.
    let row = |n: usize| &want[(n - 1) * 37..n * 37];
    let logits = decoder.feed_blocking(&ids[..9]).unwrap();
    assert!(worst(&logits, row(9)) < 2e-4, "{name}: {}", worst(&logits, row(9)));
    for n in 10..15 {
        let logits = decoder.feed_blocking(&ids[n - 1..n]).unwrap();
        assert!(worst(&logits, row(n)) < 2e-4, "{name}: token {n}: {}", worst(&logits, row(n)));
    }
    let rest = decoder.feed_all_blocking(&ids[14..]).unwrap();
    assert!(worst(&rest, &want[14 * 37..]) < 2e-4, "{name}");
    // The earlier tokens do matter.
    decoder.clear();
    let alone = decoder.feed_blocking(&ids[13..14]).unwrap();
    assert!(worst(&alone, row(14)) > 0.05, "{name}: {}", worst(&alone, row(14)));
}

#[test]
fn a_decoder_without_the_blocks_of_its_model_says_so() {
    let [gpt2, llama] = models();
    for (model, block, name) in
        [(&gpt2, &Twice as &dyn Block, "h.0.again"), (&llama, &parallel::Parallel, "h.0.both_norm")]
    {
        let error = decoder(&trainer(model, block), CAPACITY.into()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("`DecodeOptions::block`"), "{error}");
    }
    // Every parameter of a standard block is there, and two more.
    let error = decoder(&trainer(&llama, &value_residuals::ValueResiduals), CAPACITY.into()).unwrap_err().to_string();
    assert!(error.contains("`h.1.attn.own_factor`") && error.contains("`DecodeOptions::block`"), "{error}");
}

/// Blocks that a cache of keys and values does not suffice for.
#[derive(Clone, Copy, Debug)]
enum Mixing {
    /// Attention past the cache.
    Attention,
    /// The row before, by a shift.
    Shift,
    /// A matrix over time.
    Matrix,
    /// A number for each place in the graph.
    Places,
    /// The mean of all rows so far in the graph.
    Mean,
    /// Values in another order than their keys.
    Values,
    /// A sum of all steps so far.
    Memory,
}

impl Block for Mixing {
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value> {
        let x = b.residual("mlp", x, Builder::feed_forward)?;
        if layer == 0 {
            return Ok(x);
        }
        let [batch, time, width] = b.ty(x).shape.dims().try_into().unwrap();
        let from_trained = |b: &mut Builder<'_>, shape: &[usize]| {
            b.param_with("trained", shape, throughline::graph::ParamInit::Normal(0.5))
        };
        b.residual("mix", x, |b, x| match self {
            Mixing::Attention => {
                let [q, k, v] = b.qkv(x)?;
                let (heads, kv_heads) = (b.config()?.n_heads, b.config()?.n_kv_heads);
                let y = b.g.attention("past", q, k, v, Attention { heads, kv_heads, causal: true, scale: None })?;
                b.project(y)
            }
            Mixing::Shift => {
                let none = b.fill("none", [batch, 1, width], 0.0)?;
                let both = b.concat("both", &[none, x], 1)?;
                b.slice("before", both, 1, 0, time)
            }
            Mixing::Matrix => {
                let turned = b.transpose("turned", x, 1, 2)?;
                let w = from_trained(b, &[time, time])?;
                let y = b.matmul("over_time", turned, w)?;
                b.transpose("back", y, 1, 2)
            }
            Mixing::Places => {
                let places = from_trained(b, &[time, width])?;
                b.add("placed", x, places)
            }
            Mixing::Mean => {
                let sum = b.sum_to("sum", x, [width])?;
                b.broadcast("everywhere", sum, [batch, time, width])
            }
            Mixing::Memory => {
                let memory = b.state("memory", TensorType::f32([batch, time, width]))?;
                let sum = b.residual_add("remembered", memory, x)?;
                b.store(sum, memory)?;
                Ok(sum)
            }
            Mixing::Values => {
                let [q, k, v] = b.qkv(x)?;
                let turned = b.transpose("turned", v, 0, 1)?;
                let shape = b.ty(v).shape.clone();
                let values = b.reshape("values", turned, shape)?;
                let y = b.attend([q, k, values])?;
                b.project(y)
            }
        })
    }
}

#[test]
fn blocks_that_a_cache_does_not_suffice_for_are_an_error() {
    use Mixing::{Attention, Matrix, Mean, Memory, Places, Shift, Values};
    let model = Model::open(&common::hf_folder("llama")).unwrap();
    let expected = [
        (Attention, "h.1.mix.past", "attention"),
        (Shift, "h.1.mix.both", "concat"),
        (Matrix, "h.1.mix.turned", "transpose"),
        (Places, "h.1.mix.placed", "add"),
        (Mean, "h.1.mix.sum", "sum"),
        (Values, "h.1.mix.turned", "transpose"),
        (Memory, "h.1.mix.memory", "state"),
    ];
    for (block, node, op) in expected {
        let options = DecodeOptions { block: &block, ..DecodeOptions::new(8) };
        let errors = [
            DecodePlan::new(&model, options, gpu().profile()).unwrap_err().to_string(),
            decoder(&trainer(&models()[0], &block), options).unwrap_err().to_string(),
        ];
        for error in errors {
            assert!(error.contains(&format!("`{node}` ({op})")) && error.contains("`Builder::attend`"), "{error}");
        }
    }
}

/// Decoders of a folder of tests/data/hf, with the kernels for each class of adapters: on devices with 16-bit floats in
/// shaders and without.
fn decoders(name: &str, options: DecodeOptions<'_>) -> Vec<(String, Decoder)> {
    let model = Model::open(&common::hf_folder(name)).unwrap();
    let mut decoders = vec![];
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let gpu = gpu().with_class(class);
        let here = gpu.profile().shader_f16 && class == AdapterClass::Gpu;
        for shader_f16 in BTreeSet::from([here, false]) {
            let profile = Profile { shader_f16, ..gpu.profile().clone() };
            let plan = DecodePlan::new(&model, options, &profile).unwrap();
            let decoder = gpu.run_blocking(Decoder::from_plan(&gpu, &model, &plan)).unwrap();
            decoders.push((format!("{name}, {class:?}, shader_f16: {shader_f16}"), decoder));
        }
    }
    decoders
}

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// Of these models, logits are off by some thousandths of the largest.
#[test]
fn decoding_in_f16_says_nearly_what_decoding_in_f32_says() {
    let ids: Vec<u32> = (0..40).map(|i| (i * 7 + i * i % 5) % 96).collect();
    for name in ["gpt2", "llama"] {
        let (_, mut exact) = decoders(name, DecodeOptions::new(63)).remove(0);
        let want = exact.feed_all_blocking(&ids).unwrap();
        let most = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let row = want.len() / ids.len();
        let half = DType::F16;
        for (cache, prompts) in [(half, DType::F32), (DType::F32, half), (half, half)] {
            let options = DecodeOptions { cache, prompts, ..DecodeOptions::new(63) };
            for (name, mut decoder) in decoders(name, options) {
                let all = decoder.feed_all_blocking(&ids).unwrap();
                let off = worst(&all, &want);
                println!("{name}, cache {cache}, prompts {prompts}: {off} of {most}");
                assert!(0.0 < off && off < 4e-3 * most, "{name}: {off} of {most}");
                // Token by token, only the cache matters.
                decoder.clear();
                decoder.feed_blocking(&ids[..30]).unwrap();
                for n in 30..ids.len() {
                    let logits = decoder.feed_blocking(&ids[n..n + 1]).unwrap();
                    let off = worst(&logits, &want[n * row..][..row]);
                    assert!(off < 4e-3 * most, "{name}: {off} of {most} at {n}");
                }
                // What is generated with a cache is what is generated by feeding all again.
                for _ in 0..6 {
                    let tokens = decoder.tokens(0).to_vec();
                    let next = likeliest(&decoder.feed_blocking(&[tokens[0]]).unwrap());
                    decoder.truncate(0, tokens.len());
                    let mut again = tokens.clone();
                    again.push(tokens[0]);
                    decoder.clear();
                    assert_eq!(likeliest(&decoder.feed_blocking(&again).unwrap()), next, "{name}");
                    decoder.feed_blocking(&[next]).unwrap();
                }
            }
        }
    }
}

/// The keys and values of a model of an odd width, which share words with those of the next token.
#[test]
fn caches_in_f16_hold_what_caches_in_f32_hold() {
    let model = TransformerConfig::gpt2(37, CAPACITY, 2, 21, 3);
    let trainer = trainer(&config(model.clone()), &StandardBlock);
    let profiles = profiles().into_iter().flat_map(|profile| {
        let here = profile.shader_f16 && profile.class == AdapterClass::Gpu;
        let of = move |shader_f16| Profile { shader_f16, ..profile.clone() };
        BTreeSet::from([here, false]).into_iter().map(of)
    });
    for profile in profiles {
        let caches = |cache: DType| {
            let mut g = gpu().graph();
            let (activations, prompts) = (Default::default(), DType::F32);
            let shape = DecodeShape {
                batch: 2,
                time: 3,
                capacity: CAPACITY,
                rows: DecodeRows::All,
                activations,
                cache,
                prompts,
            };
            let decoder =
                TransformerDecoder::build(&mut g, &config(model.clone()), &Default::default(), shape).unwrap();
            let plan = Arc::new(Plan::new(&g, &[decoder.logits], &profile).unwrap());
            let names = trainer.params().layout.tensors.iter().map(|(name, _)| g.find(name).unwrap());
            let bindings = names.zip(trainer.params().tensors.iter().cloned()).collect();
            let exec = Executable::new_blocking(gpu(), plan, ExecOptions::bound(bindings)).unwrap();
            let mut logits = vec![];
            // The second sequence begins later, and the last pass ends past the capacity.
            for start in [[0u32, 4], [3, 7], [19, 10]] {
                exec.write(decoder.tokens, &[5u32, 7, 11, 13, 17, 19].map(|id| (id + start[0]) % 37)).unwrap();
                exec.write(decoder.start, &start).unwrap();
                let positions = |i: usize| (start[i / 3] + i as u32 % 3).min(CAPACITY as u32 - 1);
                exec.write(decoder.positions.unwrap(), &[0, 1, 2, 3, 4, 5].map(positions)).unwrap();
                exec.submit().unwrap();
                logits.extend(exec.read_blocking::<f32>(decoder.logits).unwrap());
            }
            let read = |&cache: &Value| common::read(&exec, cache);
            (decoder.caches.iter().map(read).collect::<Vec<_>>(), logits)
        };
        let [(want, exact), (got, near)] = [DType::F32, DType::F16].map(caches);
        assert_eq!(got.len(), 4);
        for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.len(), 2 * CAPACITY * 21);
            // Those of the first layer are the same numbers, rounded.
            let most = if layer < 2 { 1e-3 } else { 2e-2 };
            let off = |(got, want): (&f32, &f32)| (got - want).abs() / (want.abs() + 1e-4);
            let off = if layer < 2 { got.iter().zip(want).map(off).fold(0.0, f32::max) } else { worst(got, want) };
            assert!(off < most, "{profile:?}: {off} in cache {layer}");
            let zeros = |cache: &[f32]| cache.iter().filter(|x| **x == 0.0).count();
            assert_eq!(zeros(got), zeros(want), "{profile:?}: cache {layer}");
        }
        assert!(worst(&near, &exact) < 0.05, "{profile:?}: {}", worst(&near, &exact));
    }
}

#[test]
fn caches_in_f16_take_half_the_memory() {
    let model = Model::open(&common::hf_folder("llama")).unwrap();
    let whole = |capacity| DecodeOptions::new(capacity);
    let half = |capacity| DecodeOptions { cache: DType::F16, ..DecodeOptions::new(capacity) };
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let profile = Profile::portable(class);
        let bytes = |options| DecodePlan::new(&model, options, &profile).unwrap().cache_bytes();
        assert_eq!(bytes(half(64)), bytes(whole(32)));
        assert!(bytes(whole(32)) > 0);
    }
    for (field, options) in [
        ("cache", DecodeOptions { cache: DType::U32, ..DecodeOptions::new(8) }),
        ("prompts", DecodeOptions { prompts: DType::U32, ..DecodeOptions::new(8) }),
    ] {
        let error = DecodePlan::new(&model, options, gpu().profile()).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("f32 or f16, but is u32"), "{error}");
    }
}

/// The stream and all logits stay f32, and so do passes of one token.
#[test]
fn prompts_in_f16_take_less_memory() {
    let model = Model::open(&common::hf_folder("llama")).unwrap();
    for block in [&StandardBlock as &dyn Block, &parallel::Parallel] {
        let plan = |prompts| {
            let mut g = Graph::new();
            let (activations, cache, rows) = (Default::default(), DType::F32, DecodeRows::All);
            let shape = DecodeShape { batch: 1, time: 32, capacity: 64, rows, activations, cache, prompts };
            let decoder =
                TransformerDecoder::build_with(&mut g, model.config(), block, &Default::default(), shape).unwrap();
            assert!(decoder.stream.iter().chain([&decoder.logits]).all(|&v| g.ty(v).dtype == DType::F32));
            // Additions to the stream inside of blocks.
            let sums = g.nodes().iter().filter(|n| matches!(&n.source, Source::Op(op) if op.name() == "residual_add"));
            assert!(sums.flat_map(|n| &n.outputs).all(|ty| ty.dtype == DType::F32));
            let wide = g.nodes().iter().filter(|n| n.outputs.iter().any(|ty| ty.dtype == DType::F16)).count();
            assert_eq!(wide > 0, prompts == DType::F16);
            let plan = Plan::new(&g, &[decoder.logits], &Profile::portable(AdapterClass::Gpu)).unwrap();
            assert!(plan.steps().iter().all(|s| s.copies().is_empty()) && plan.final_copies().is_empty(), "{plan}");
            (plan.dispatches(), plan.buffer_bytes())
        };
        let [(whole, f32_bytes), (half, f16_bytes)] = [DType::F32, DType::F16].map(plan);
        // Nothing is converted by a kernel of its own.
        assert_eq!(whole, half);
        assert!(f16_bytes < f32_bytes, "{f16_bytes} of {f32_bytes}");
    }
    let bytes = |prompts| {
        let options = DecodeOptions { prompts, ..DecodeOptions::new(64) };
        DecodePlan::new(&model, options, &Profile::portable(AdapterClass::Cpu)).unwrap().bytes()
    };
    assert!(bytes(DType::F16) < bytes(DType::F32));
}
