//! The tiny models of tests/data/hf, written as GGUF files. These have other names, layouts and rotations, but must
//! give PyTorch's logits as well.

mod common;
#[path = "common/gguf.rs"]
mod gguf;

use std::path::Path;

use common::{gpu, hf_expected, hf_folder, worst};
use gguf::{GgufTensor, gguf_file};
use proptest::prelude::*;
use serde_json::json;
use throughline::Result;
use throughline::decode::Decoder;
use throughline::format::{MetaArray, MetaValue, Stored, Weights, is_gguf, quant};
use throughline::model::{self, Model, TensorTypes};
use throughline::nn::{Positions, TransformerConfig};
use throughline::ops::rope::Scaling;
use throughline::optim::{Arena, ArenaLayout};
use throughline::tokenize::{Message, ModelTokenizer};

/// What GGUF calls a parameter of ours.
fn gguf_name(ours: &str) -> String {
    let parts = [
        ("embed.", "token_embd."),
        ("position.", "position_embd."),
        ("norm_f.", "output_norm."),
        ("head.", "output."),
        ("attn_norm.", "attn_norm."),
        ("mlp_norm.", "ffn_norm."),
        ("attn.q_norm.", "attn_q_norm."),
        ("attn.k_norm.", "attn_k_norm."),
        ("attn.q.", "attn_q."),
        ("attn.k.", "attn_k."),
        ("attn.v.", "attn_v."),
        ("attn.o.", "attn_output."),
        ("mlp.gate.", "ffn_gate."),
        ("mlp.up.", "ffn_up."),
        ("mlp.down.", "ffn_down."),
    ];
    let (from, to) = parts.iter().find(|(from, _)| ours.contains(from)).unwrap();
    ours.replace(from, to).replacen("h.", "blk.", usize::from(ours.starts_with("h.")))
}

/// Row `i` of a head rotated by neighbours is this row of one rotated by halves.
fn neighbour(i: usize, dh: usize) -> usize {
    let (head, j) = (i / dh, i % dh);
    head * dh + j / 2 + if j % 2 == 0 { 0 } else { dh / 2 }
}

/// The tensors of a model as a GGUF file of an architecture has them; matrices in `stored`.
fn tensors(model: &Model, arch: &str, stored: Stored) -> Vec<GgufTensor> {
    tensors_of(model, arch, stored, |name| model.values(name).unwrap())
}

/// The same with these values of parameters.
fn tensors_of(model: &Model, arch: &str, stored: Stored, values: impl Fn(&str) -> Vec<f32>) -> Vec<GgufTensor> {
    let dh = model.config().head_dim();
    let mut all = vec![];
    for (name, shape) in model.params() {
        let values = values(name);
        let linear = shape.rank() == 2 && !["embed.weight", "head.weight", "position.weight"].contains(&name.as_str());
        let (mut rows, cols) = match *shape.dims() {
            // Output-major, as in all GGUF files.
            [d_in, d_out] if linear => {
                let row = |o: usize| (0..d_in).map(|i| values[i * d_out + o]).collect::<Vec<f32>>();
                ((0..d_out).map(row).collect::<Vec<_>>(), Some(d_in))
            }
            [_, cols] => (values.chunks(cols).map(<[f32]>::to_vec).collect(), Some(cols)),
            _ => (values.iter().map(|&v| vec![v]).collect(), None),
        };
        if arch == "llama" && (name.contains("attn.q.") || name.contains("attn.k.")) {
            rows = (0..rows.len()).map(|i| rows[neighbour(i, dh)].clone()).collect();
        }
        let dims = [rows.len()].into_iter().chain(cols).collect();
        let stored = if cols.is_some() { stored } else { Stored::F32 };
        let bytes = quant::quantize(stored, &rows.concat()).unwrap();
        all.push(GgufTensor { name: gguf_name(name), stored, dims, bytes });
    }
    if arch == "gpt2" { fused(all) } else { all }
}

/// GPT-2's queries, keys and values are one tensor.
fn fused(tensors: Vec<GgufTensor>) -> Vec<GgufTensor> {
    let mut all: Vec<GgufTensor> = vec![];
    for mut t in tensors {
        for part in ["attn_q.", "attn_k.", "attn_v."] {
            t.name = t.name.replace(part, "attn_qkv.");
        }
        match all.iter_mut().find(|other| other.name == t.name) {
            Some(other) => {
                other.dims[0] += t.dims[0];
                other.bytes.extend(t.bytes);
            }
            None => all.push(t),
        }
    }
    all
}

fn entries(c: &TransformerConfig, arch: &str) -> Vec<(String, MetaValue)> {
    let eps = if arch == "gpt2" { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    let numbers = [
        ("context_length", c.context),
        ("block_count", c.n_layers),
        ("embedding_length", c.d_model),
        ("feed_forward_length", c.d_ff),
        ("attention.head_count", c.n_heads),
        ("attention.head_count_kv", c.n_kv_heads),
        ("attention.key_length", c.head_dim()),
    ];
    let mut entries = vec![("general.architecture".to_string(), MetaValue::String(arch.into()))];
    entries.extend(numbers.map(|(key, n)| (format!("{arch}.{key}"), MetaValue::U32(n as u32))));
    entries.push((format!("{arch}.{eps}"), MetaValue::F32(c.norm_eps)));
    if let Positions::Rope { theta, scaling, .. } = c.positions {
        entries.push((format!("{arch}.rope.freq_base"), MetaValue::F32(theta)));
        let (kind, factor, original) = match scaling {
            Scaling::Linear { factor } => ("linear", factor, None),
            Scaling::Yarn { factor, original_context, .. } => ("yarn", factor, Some(original_context)),
            _ => return entries,
        };
        let key = |name: &str| format!("{arch}.rope.scaling.{name}");
        entries.push((key("type"), MetaValue::String(kind.into())));
        entries.push((key("factor"), MetaValue::F32(factor)));
        entries.extend(original.map(|n| (key("original_context_length"), MetaValue::U32(n as u32))));
    }
    entries
}

#[test]
fn gguf_files_decode_as_pytorch_does() {
    let cases = [
        ("gpt2", "gpt2", Stored::F32),
        ("llama", "llama", Stored::F32),
        ("llama_f16", "llama", Stored::F16),
        ("llama_bf16", "llama", Stored::BF16),
        ("llama_linear", "llama", Stored::F32),
        ("llama_yarn", "llama", Stored::F32),
        ("mistral", "llama", Stored::F32),
        ("qwen2", "qwen2", Stored::F32),
        ("qwen3", "qwen3", Stored::F32),
    ];
    for (name, arch, stored) in cases {
        let hf = Model::open(&hf_folder(name)).unwrap();
        let file = gguf_file(&entries(hf.config(), arch), &tensors(&hf, arch, stored));
        let model = Model::new(Weights::from_bytes(name, file).unwrap()).unwrap();
        let mut decoder = Decoder::new_blocking(gpu(), &model, 24).unwrap();
        let got = decoder.feed_all_blocking(&hf_expected(name, "ids")[..24]).unwrap();
        let worst = worst(&got, &hf_expected(name, "logits")[..got.len()]);
        println!("{name}: {worst:.1e}");
        assert!(worst < 1e-4, "{name}: {worst}");
    }
}

/// The entries of a model with some of them changed, left out or added.
fn changed(c: &TransformerConfig, arch: &str, changes: &[(&str, Option<MetaValue>)]) -> Vec<(String, MetaValue)> {
    let mut entries = entries(c, arch);
    entries.retain(|(key, _)| changes.iter().all(|(changed, _)| key != changed));
    entries.extend(changes.iter().filter_map(|(key, value)| Some((key.to_string(), value.clone()?))));
    entries
}

fn rope_of(entries: &[(String, MetaValue)], tensors: &[GgufTensor]) -> (f32, Scaling) {
    let model = Model::new(Weights::from_bytes("x.gguf", gguf_file(entries, tensors)).unwrap()).unwrap();
    match model.config().positions {
        Positions::Rope { theta, scaling, .. } => (theta, scaling),
        other => panic!("{other:?}"),
    }
}

#[test]
fn rope_scaling_is_found_wherever_writers_have_put_it() {
    let hf = Model::open(&hf_folder("llama_linear")).unwrap();
    let tensors = tensors(&hf, "llama", Stored::F32);
    let (kind, factor, old) = ("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear");
    let text = |s: &str| Some(MetaValue::String(s.into()));
    let float = |x: f32| Some(MetaValue::F32(x));
    let linear = |factor| Scaling::Linear { factor };
    let scaling = |changes: &[(&str, Option<MetaValue>)]| rope_of(&changed(hf.config(), "llama", changes), &tensors).1;
    // What llama.cpp makes of them: an old key, a factor without a type, and no factor.
    assert_eq!(scaling(&[(kind, None), (factor, None), (old, float(4.0))]), linear(4.0));
    assert_eq!(scaling(&[(factor, None), (old, Some(MetaValue::F64(4.0)))]), linear(4.0));
    assert_eq!(scaling(&[(old, float(2.0))]), linear(4.0));
    assert_eq!(scaling(&[(kind, None), (factor, Some(MetaValue::I8(4)))]), linear(4.0));
    assert_eq!(scaling(&[(factor, float(0.0))]), Scaling::None);
    assert_eq!(scaling(&[(factor, None)]), Scaling::None);
    assert_eq!(scaling(&[(kind, text("none"))]), Scaling::None);
    let yarn = scaling(&[
        (kind, text("yarn")),
        ("llama.rope.scaling.attn_factor", float(2.0)),
        ("llama.rope.scaling.yarn_beta_fast", float(16.0)),
        ("llama.rope.scaling.yarn_ext_factor", float(-1.0)),
        ("llama.rope.scaling.yarn_log_multiplier", float(0.0)),
    ]);
    let Scaling::Yarn { factor: 4.0, original_context: 64, beta_fast: 16.0, beta_slow: 1.0, .. } = yarn else {
        panic!("{yarn:?}")
    };
    assert!((yarn.attention_factor() - 2.0 * (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    // And PyTorch's numbers with the old key.
    let file = gguf_file(&changed(hf.config(), "llama", &[(kind, None), (factor, None), (old, float(4.0))]), &tensors);
    let model = Model::new(Weights::from_bytes("old.gguf", file).unwrap()).unwrap();
    let mut decoder = Decoder::new_blocking(gpu(), &model, 24).unwrap();
    let got = decoder.feed_all_blocking(&hf_expected("llama_linear", "ids")[..24]).unwrap();
    assert!(worst(&got, &hf_expected("llama_linear", "logits")[..got.len()]) < 1e-4);
}

#[test]
fn counts_may_be_given_layer_by_layer_and_in_any_integer_type() {
    let hf = Model::open(&hf_folder("llama")).unwrap();
    let tensors = tensors(&hf, "llama", Stored::F32);
    let c = hf.config();
    let changes = [
        ("llama.attention.head_count", Some(MetaValue::Array(MetaArray::I32(vec![4, 4])))),
        ("llama.attention.head_count_kv", Some(MetaValue::Array(MetaArray::U64(vec![2, 2])))),
        ("llama.feed_forward_length", Some(MetaValue::Array(MetaArray::U16(vec![80, 80])))),
        ("llama.context_length", Some(MetaValue::I64(64))),
        ("llama.block_count", Some(MetaValue::U8(2))),
        ("llama.attention.layer_norm_rms_epsilon", Some(MetaValue::F64(1e-5))),
        ("llama.attention.key_length", None),
        ("llama.rope.freq_base", None),
    ];
    let open = |changes: &[(&str, Option<MetaValue>)]| {
        Model::new(Weights::from_bytes("x.gguf", gguf_file(&changed(c, "llama", changes), &tensors)).unwrap())
    };
    let model = open(&changes).unwrap();
    assert_eq!((model.config().n_heads, model.config().n_kv_heads, model.config().d_ff), (4, 2, 80));
    assert_eq!(model.config().norm_eps, c.norm_eps);
    // A window bounds the context, and `key_length` follows from the heads.
    let window = open(&[("llama.attention.sliding_window", Some(MetaValue::U32(8)))]).unwrap();
    assert_eq!(window.config().context, 8);
    for counts in [vec![4, 2], vec![4], vec![], vec![-4, -4]] {
        let error =
            open(&[("llama.attention.head_count", Some(MetaValue::Array(MetaArray::I32(counts))))]).unwrap_err();
        assert!(error.to_string().contains("`llama.attention.head_count`"), "{error}");
    }
}

/// A GGUF file with a tokenizer, and a tensor of a type that is not read.
fn with_odd_tensor(hf: &Model, name: &str) -> Vec<u8> {
    let strings = |all: &[&str]| MetaValue::Array(MetaArray::String(all.iter().map(|s| s.to_string()).collect()));
    let tokenizer = [
        ("tokenizer.ggml.model", Some(MetaValue::String("gpt2".into()))),
        ("tokenizer.ggml.pre", Some(MetaValue::String("gpt-2".into()))),
        ("tokenizer.ggml.tokens", Some(strings(&["a", "b", "ab"]))),
        ("tokenizer.ggml.token_type", Some(MetaValue::Array(MetaArray::I32(vec![1; 3])))),
        ("tokenizer.ggml.merges", Some(strings(&["a b"]))),
    ];
    let mut tensors = tensors(hf, "llama", Stored::F32);
    tensors.retain(|t| t.name != name);
    // The type is changed in the finished header: the writer has only those that are read.
    tensors.push(GgufTensor {
        name: name.into(),
        stored: Stored::F32,
        dims: vec![96, 32],
        bytes: vec![0; 4 * 96 * 32],
    });
    let mut file = gguf_file(&changed(hf.config(), "llama", &tokenizer), &tensors);
    let at = file.windows(name.len()).rposition(|part| part == name.as_bytes()).unwrap() + name.len() + 4 + 2 * 8;
    file[at..at + 4].copy_from_slice(&39u32.to_le_bytes());
    file
}

#[test]
fn a_tensor_of_another_type_hides_neither_the_tokenizer_nor_the_model() {
    let hf = Model::open(&hf_folder("llama")).unwrap();
    let tokenizer = |weights: &Weights| ModelTokenizer::of(weights).unwrap().encode("abab", true).unwrap();
    let unused = Weights::from_bytes("unused.gguf", with_odd_tensor(&hf, "odd")).unwrap();
    assert_eq!(tokenizer(&unused), [2, 2]);
    assert_eq!(unused.unread(), [("odd".to_string(), "MXFP4 [96, 32]".to_string())]);
    Model::new(unused).unwrap();
    for name in ["token_embd.weight", "output.weight"] {
        let weights = Weights::from_bytes("used.gguf", with_odd_tensor(&hf, name)).unwrap();
        assert_eq!(tokenizer(&weights), [2, 2]);
        let error = Model::new(weights).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("MXFP4"), "{error}");
    }
}

#[test]
fn gguf_files_are_known_by_their_first_bytes() {
    let hf = Model::open(&hf_folder("llama")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in ["sha256-0abc", "FT.GGUF", "model.safetensors", "model.bin"] {
        let path = dir.path().join(name);
        std::fs::write(&path, with_odd_tensor(&hf, "odd")).unwrap();
        assert!(is_gguf(&path).unwrap());
        let model = Model::open(&path).unwrap();
        assert_eq!(model.config().d_ff, hf.config().d_ff);
        assert_eq!(ModelTokenizer::open(&path).unwrap().encode("ab", true).unwrap(), [2], "{name}");
        assert_eq!(ModelTokenizer::of(model.weights()).unwrap().encode("ab", true).unwrap(), [2], "{name}");
    }
    std::fs::write(dir.path().join("short.gguf"), "GGU").unwrap();
    assert!(!is_gguf(&dir.path().join("short.gguf")).unwrap());
    assert!(!is_gguf(&hf_folder("llama")).unwrap());
    assert!(is_gguf(&dir.path().join("none.gguf")).unwrap_err().to_string().contains("none.gguf"));
}

#[test]
fn the_frequencies_of_llama_3_1_are_recognised() {
    let hf = Model::open(&hf_folder("llama")).unwrap();
    let theta = 500_000.0;
    let dh = hf.config().head_dim();
    // As converters write them: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
    let divisor = |j: usize| {
        let wavelength = std::f64::consts::TAU * f64::powf(theta, 2.0 * j as f64 / dh as f64);
        match wavelength {
            w if w < 8192.0 / 4.0 => 1.0,
            w if w > 8192.0 => 8.0,
            w => {
                let smooth = (8192.0 / w - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / 8.0 + smooth)
            }
        }
    };
    let file = |scale: f64| {
        let mut tensors = tensors(&hf, "llama", Stored::F32);
        let divisors: Vec<f32> = (0..dh / 2).map(|j| (divisor(j) * scale) as f32).collect();
        let bytes = bytemuck::cast_slice(&divisors).to_vec();
        tensors.push(GgufTensor { name: "rope_freqs.weight".into(), stored: Stored::F32, dims: vec![dh / 2], bytes });
        let mut entries = entries(hf.config(), "llama");
        entries.retain(|(key, _)| key != "llama.rope.freq_base");
        entries.push(("llama.rope.freq_base".into(), MetaValue::F32(theta as f32)));
        Model::new(Weights::from_bytes("x", gguf_file(&entries, &tensors)).unwrap())
    };
    let expected = Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    assert!((1..dh / 2).any(|j| divisor(j) > 1.0 && divisor(j) <= 8.0));
    match file(1.0).unwrap().config().positions {
        Positions::Rope { scaling, .. } => assert_eq!(scaling, expected),
        other => panic!("{other:?}"),
    }
    assert!(file(1.1).unwrap_err().to_string().contains("rope_freqs.weight"));
    // Divisors are those of a head's pairs. If all are 1, they are no scaling. And two scalings at once are not supported.
    let mut tensors = tensors(&hf, "llama", Stored::F32);
    let bytes = bytemuck::cast_slice(&vec![1f32; dh / 2]).to_vec();
    tensors.push(GgufTensor { name: "rope_freqs.weight".into(), stored: Stored::F32, dims: vec![dh / 2], bytes });
    let linear = changed(hf.config(), "llama", &[("llama.rope.scale_linear", Some(MetaValue::F32(2.0)))]);
    assert_eq!(rope_of(&linear, &tensors).1, Scaling::Linear { factor: 2.0 });
    let divisors: Vec<f32> = (0..dh / 2).map(|j| divisor(j) as f32).collect();
    tensors.last_mut().unwrap().bytes = bytemuck::cast_slice(&divisors).to_vec();
    let mut short = tensors.clone();
    let last = short.last_mut().unwrap();
    (last.dims, last.bytes) = (vec![2], last.bytes[..8].to_vec());
    let entries = entries(hf.config(), "llama");
    let error = Model::new(Weights::from_bytes("x", gguf_file(&entries, &short)).unwrap()).unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight") && error.contains("[4]"), "{error}");
    let both = [
        ("llama.rope.scale_linear", Some(MetaValue::F32(2.0))),
        ("llama.rope.freq_base", Some(MetaValue::F32(theta as f32))),
    ];
    let both = gguf_file(&changed(hf.config(), "llama", &both), &tensors);
    let error = Model::new(Weights::from_bytes("x", both).unwrap()).unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight") && error.contains("Linear"), "{error}");
}

#[test]
fn what_a_file_cannot_be_is_an_error_that_names_the_key() {
    let hf = Model::open(&hf_folder("llama")).unwrap();
    let tensors = tensors(&hf, "llama", Stored::F32);
    let refused = |key: &str, value: Option<MetaValue>, parts: &[&str]| {
        let mut entries = entries(hf.config(), "llama");
        entries.retain(|(k, _)| k != key);
        entries.extend(value.map(|v| (key.to_string(), v)));
        let weights = Weights::from_bytes("file.gguf", gguf_file(&entries, &tensors)).unwrap();
        let error = Model::new(weights).unwrap_err().to_string();
        assert!(error.contains("file.gguf") && parts.iter().all(|p| error.contains(p)), "{key}: {error}");
    };
    let text = |s: &str| Some(MetaValue::String(s.into()));
    let number = |n: u32| Some(MetaValue::U32(n));
    refused("general.architecture", text("mamba"), &["general.architecture", "mamba", "qwen3"]);
    refused("general.architecture", None, &["config.json"]);
    refused("llama.block_count", None, &["llama.block_count", "missing"]);
    refused("llama.block_count", number((1 << 12) + 1), &["n_layers", "4097"]);
    refused("llama.block_count", number(1 << 12), &["4096 blocks"]);
    refused("llama.block_count", number(3), &["blk.2.attn_norm.weight"]);
    refused("llama.embedding_length", number(64), &["token_embd.weight", "[96, 64]", "[96, 32]"]);
    refused("llama.embedding_length", text("wide"), &["llama.embedding_length", "wide"]);
    refused("llama.attention.head_count", number(0), &["n_heads"]);
    refused("llama.attention.head_count", number(3), &["n_kv_heads"]);
    refused("llama.attention.layer_norm_rms_epsilon", Some(MetaValue::F32(f32::NAN)), &["norm_eps"]);
    refused("llama.expert_count", number(8), &["llama.expert_count"]);
    refused("llama.rope.dimension_count", number(4), &["llama.rope.dimension_count", "4"]);
    refused("llama.rope.freq_base", Some(MetaValue::F32(0.0)), &["theta"]);
    refused("llama.rope.scaling.type", text("longrope"), &["longrope"]);
    refused("llama.rope.scaling.factor", Some(MetaValue::F32(-2.0)), &["Linear"]);
    refused("llama.rope.scaling.attn_factor", Some(MetaValue::F32(1.2)), &["attn_factor", "1.2"]);
    refused("llama.attention.causal", Some(MetaValue::Bool(false)), &["llama.attention.causal"]);
    refused("llama.attention.scale", Some(MetaValue::F32(0.5)), &["llama.attention.scale", "0.5"]);
    refused("llama.logit_scale", Some(MetaValue::F32(8.0)), &["llama.logit_scale", "8"]);
    refused("llama.attention.value_length", number(4), &["llama.attention.value_length", "4"]);
    refused("split.count", number(3), &["split.count", "3 files"]);
}

/// A tokenizer of bytes and a few merges, as tests/data/tiny_chat has it, in a file that asks for a beginning.
fn byte_level() -> Vec<(String, MetaValue)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_chat/tokenizer.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    entries_of(&[
        ("model", MetaValue::String("gpt2".into())),
        ("pre", MetaValue::String("gpt-2".into())),
        ("tokens", MetaValue::Array(MetaArray::String(tokens))),
        ("merges", MetaValue::Array(MetaArray::String(merges.collect()))),
        ("token_type", MetaValue::Array(MetaArray::I32(types))),
        ("bos_token_id", MetaValue::U32(0)),
        ("eos_token_id", MetaValue::U32(2)),
        ("padding_token_id", MetaValue::U32(0)),
        ("add_bos_token", MetaValue::Bool(true)),
    ])
}

/// SentencePiece's, with the ids of its beginning and end by default.
fn sentence_piece() -> Vec<(String, MetaValue)> {
    let special = ["<unk>", "<s>", "</s>", "▁"].map(String::from);
    let letters = ('a'..='z').map(String::from);
    let words = ["th", "the", "▁the", "ti", "de", "tide", "▁tide"].map(String::from);
    let tokens: Vec<String> = special.into_iter().chain(letters).chain(words).collect();
    let types = (0..tokens.len()).map(|id| [2, 3, 3].get(id).copied().unwrap_or(1)).collect();
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    entries_of(&[
        ("model", MetaValue::String("llama".into())),
        ("tokens", MetaValue::Array(MetaArray::String(tokens))),
        ("scores", MetaValue::Array(MetaArray::F32(scores))),
        ("token_type", MetaValue::Array(MetaArray::I32(types))),
    ])
}

fn entries_of(entries: &[(&str, MetaValue)]) -> Vec<(String, MetaValue)> {
    entries.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value.clone())).collect()
}

/// What was loaded from a GGUF file is saved as a folder, with all that the file says besides weights.
#[test]
fn a_saved_gguf_means_what_the_file_does() {
    let chat = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}\n{% endfor %}";
    for (name, arch, tokenizer, with_chat) in [
        ("llama_linear", "llama", byte_level(), true),
        ("llama_yarn", "llama", sentence_piece(), true),
        ("llama", "llama", sentence_piece(), false),
        ("gpt2", "gpt2", byte_level(), false),
        ("qwen3", "qwen3", vec![], false),
    ] {
        let hf = Model::open(&hf_folder(name)).unwrap();
        let mut entries = [entries(hf.config(), arch), tokenizer].concat();
        if with_chat {
            entries.push(("tokenizer.chat_template".into(), MetaValue::String(chat.into())));
        }
        let file = gguf_file(&entries, &tensors(&hf, arch, Stored::F32));
        let model = Model::new(Weights::from_bytes("model.gguf", file).unwrap()).unwrap();
        let layout = ArenaLayout::of_model(model.config(), gpu().profile().max_tensor_bytes()).unwrap();
        let params = Arena::zeros(gpu(), "parameters", &layout.into()).unwrap();
        model.load_blocking(gpu(), &params).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save_blocking(dir.path(), gpu(), &params).unwrap();

        let saved = Model::open(dir.path()).unwrap();
        assert_eq!(saved.config(), &TransformerConfig { head_dim: saved.config().head_dim, ..hf.config().clone() });
        assert_eq!(saved.config().head_dim(), model.config().head_dim());
        for (param, _) in hf.params() {
            assert_eq!(saved.values(param).unwrap(), hf.values(param).unwrap(), "{name}: {param}");
        }
        if !entries.iter().any(|(key, _)| key == "tokenizer.ggml.model") {
            assert!(!dir.path().join("tokenizer.json").exists());
            continue;
        }
        let [a, b] = [&model, &saved].map(|model| ModelTokenizer::of(model.weights()).unwrap());
        assert!(a.is_stop(2) && a.stop_tokens() == b.stop_tokens(), "{name}: {a:?} {b:?}");
        for text in ["the tide", "  the  tides\n", "", "<|im_end|></s>the"] {
            for special in [false, true] {
                let ids = a.encode(text, special).unwrap();
                assert_eq!(b.encode(text, special).unwrap(), ids, "{name}: {text:?}");
                assert_eq!(b.decode(&ids, special).unwrap(), a.decode(&ids, special).unwrap());
            }
        }
        assert_eq!((a.has_chat(), b.has_chat()), (with_chat, with_chat), "{name}");
        let chat = |t: &ModelTokenizer| t.chat_ids(&[Message::new("user", "the tide")], true).ok();
        assert_eq!(chat(&a), chat(&b), "{name}");
        // And back into a GGUF file.
        let back = dir.path().join("back.gguf");
        match saved.save_gguf(&back, TensorTypes::Keep, unchanged) {
            Ok(()) => assert_same_tokenizer(name, &saved, &Model::open(&back).unwrap()),
            // The bytes of this tokenizer are more tokens than the model has.
            Err(e) => assert!(a.vocab_len() > 96 && e.to_string().contains("is beyond the 96 of the model"), "{e}"),
        }
        // As `transformers` reads them: one id, or several.
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        let ends = config["eos_token_id"].as_array().cloned().unwrap_or_else(|| vec![config["eos_token_id"].clone()]);
        assert_eq!(ends, a.stop_tokens(), "{name}");
    }
}

/// Folders of tests/data/hf, the architecture of their GGUF files, and the type of their matrices.
const FOLDERS: [(&str, &str, Stored); 11] = [
    ("gpt2", "gpt2", Stored::F32),
    ("llama", "llama", Stored::F32),
    ("llama_f16", "llama", Stored::F16),
    ("llama_bf16", "llama", Stored::BF16),
    ("llama_linear", "llama", Stored::F32),
    ("llama_yarn", "llama", Stored::F32),
    ("llama3", "llama", Stored::F32),
    ("mistral", "llama", Stored::F32),
    ("mistral_window", "llama", Stored::F32),
    ("qwen2", "qwen2", Stored::F32),
    ("qwen3", "qwen3", Stored::F32),
];

fn unchanged(_: &str) -> Result<Option<Vec<f32>>> {
    Ok(None)
}

/// Checks that a file has just these tensors, but for the frequencies.
fn assert_tensors(name: &str, model: &Model, expected: &[GgufTensor]) {
    let saved: Vec<_> = model.weights().iter().filter(|t| t.name() != "rope_freqs.weight").collect();
    assert_eq!(saved.len(), expected.len(), "{name}");
    for t in expected {
        let got = model.weights().get(&t.name).unwrap();
        assert_eq!((got.stored(), got.shape().dims()), (t.stored, &t.dims[..]), "{name}: {}", t.name);
        assert!(*got.bytes().unwrap() == t.bytes, "{name}: {}", t.name);
    }
}

/// A folder's model with the rotation that its GGUF file has.
fn config_in_gguf(hf: &Model, arch: &str) -> TransformerConfig {
    let mut config = hf.config().clone();
    if let Positions::Rope { interleaved, .. } = &mut config.positions {
        *interleaved = arch == "llama";
    }
    config
}

#[test]
fn a_folder_saved_as_a_gguf_file_gives_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let [path, again] = ["model.gguf", "again.gguf"].map(|name| dir.path().join(name));
    for (name, arch, stored) in FOLDERS {
        let hf = Model::open(&hf_folder(name)).unwrap();
        hf.save_gguf(&path, TensorTypes::Keep, unchanged).unwrap();
        let model = Model::open(&path).unwrap();
        assert_eq!(model.config(), &config_in_gguf(&hf, arch), "{name}");
        assert_eq!(model.weights().metadata().str("general.name").unwrap(), name);
        assert_tensors(name, &model, &tensors(&hf, arch, stored));
        let len = model.config().context.min(24);
        let mut decoder = Decoder::new_blocking(gpu(), &model, len).unwrap();
        let got = decoder.feed_all_blocking(&hf_expected(name, "ids")[..len]).unwrap();
        let worst = worst(&got, &hf_expected(name, "logits")[..got.len()]);
        assert!(worst < 1e-4, "{name}: {worst}");
        // And once more, from the file: it is the same to the byte.
        model.save_gguf(&again, TensorTypes::Keep, unchanged).unwrap();
        assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap(), "{name}");
        model.save_gguf(&path, TensorTypes::Keep, unchanged).unwrap();
        assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap(), "{name}");
    }
}

#[test]
fn values_that_have_changed_are_saved() {
    let dir = tempfile::tempdir().unwrap();
    let [path, again] = ["model.gguf", "again.gguf"].map(|name| dir.path().join(name));
    for (name, arch, stored) in FOLDERS {
        let hf = Model::open(&hf_folder(name)).unwrap();
        // Exact in all types.
        let twice = |values: Vec<f32>| values.into_iter().map(|v| 2.0 * v).collect::<Vec<_>>();
        let is_changed =
            |name: &str| ["embed.", "attn.k.", "attn.o.", "mlp.up.", "mlp_norm."].iter().any(|p| name.contains(p));
        let mut asked = vec![];
        hf.save_gguf(&path, TensorTypes::Keep, |param| {
            asked.push(param.to_string());
            is_changed(param).then(|| hf.values(param).map(twice)).transpose()
        })
        .unwrap();
        asked.sort_unstable();
        let mut params: Vec<String> = hf.params().iter().map(|(name, _)| name.clone()).collect();
        params.sort_unstable();
        assert_eq!(asked, params, "{name}");
        let expected = tensors_of(&hf, arch, stored, |param| match hf.values(param).unwrap() {
            values if is_changed(param) => twice(values),
            values => values,
        });
        let model = Model::open(&path).unwrap();
        assert_tensors(name, &model, &expected);

        // Half of what is in the file is what the folder has. A head that is the table was doubled with it.
        let half = |values: Vec<f32>| values.into_iter().map(|v| v / 2.0).collect::<Vec<_>>();
        let changed = |param: &str| is_changed(param).then(|| model.values(param).map(half)).transpose();
        model.save_gguf(&again, TensorTypes::Keep, changed).unwrap();
        assert_tensors(name, &Model::open(&again).unwrap(), &tensors(&hf, arch, stored));
    }
}

#[test]
fn matrices_are_saved_in_another_type_and_all_else_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let [path, again] = ["model.gguf", "again.gguf"].map(|name| dir.path().join(name));
    for (name, arch, stored) in FOLDERS {
        let hf = Model::open(&hf_folder(name)).unwrap();
        for (ty, file_type) in [
            (Stored::F32, 0),
            (Stored::F16, 1),
            (Stored::BF16, 32),
            (Stored::Q4_0, 2),
            (Stored::Q4_1, 3),
            (Stored::Q8_0, 7),
            (Stored::Q5_1, 9),
            (Stored::Q4_K, 14),
            (Stored::Q6_K, 18),
        ] {
            let mut expected = tensors(&hf, arch, Stored::F32);
            for t in expected.iter_mut().filter(|t| t.dims.len() == 2 && !t.name.starts_with("position")) {
                // Rows that are not whole blocks. None here is of 256.
                let smaller = match ty {
                    Stored::Q4_K => Stored::Q5_0,
                    Stored::Q6_K => Stored::Q8_0,
                    other => other,
                };
                t.stored = if t.dims[1] % smaller.block_len() == 0 { smaller } else { Stored::F16 };
                let values: Vec<f32> = bytemuck::pod_collect_to_vec(&t.bytes);
                t.bytes = quant::quantize(t.stored, &values).unwrap();
            }
            hf.save_gguf(&path, TensorTypes::Matrices(ty), unchanged).unwrap();
            let model = Model::open(&path).unwrap();
            assert_tensors(name, &model, &expected);
            assert_eq!(model.weights().metadata().usize("general.file_type").unwrap(), file_type);
            assert_eq!(model.weights().metadata().contains("general.quantization_version"), ty.is_quantized());
            // From a file as from a folder.
            hf.save_gguf(&again, TensorTypes::Keep, unchanged).unwrap();
            let kept = Model::open(&again).unwrap();
            assert_tensors(name, &kept, &tensors(&hf, arch, stored));
            kept.save_gguf(&again, TensorTypes::Matrices(ty), unchanged).unwrap();
            assert_tensors(name, &Model::open(&again).unwrap(), &expected);
        }
    }
}

/// A model of the folder's tokens with the tokenizer of tests/data/tiny_chat, some of its files changed.
fn tiny_chat(dir: &Path, change: impl Fn(&str, &mut serde_json::Value)) -> Model {
    let config = TransformerConfig { tied_head: true, ..TransformerConfig::llama(320, 32, 1, 16, 2) };
    let layout = ArenaLayout::of_model(&config, u64::MAX).unwrap();
    let params = layout.tensors.into_iter().map(|(name, shape)| (name, vec![0.5; shape.len()]));
    model::save(dir, &config, &params.collect::<Vec<_>>()).unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_chat");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let mut json = serde_json::from_slice(&std::fs::read(from.join(name)).unwrap()).unwrap();
        change(name, &mut json);
        std::fs::write(dir.join(name), json.to_string()).unwrap();
    }
    Model::open(dir).unwrap()
}

/// Checks that two models tokenize, chat and stop alike.
fn assert_same_tokenizer(name: &str, a: &Model, b: &Model) {
    let [a, b] = [a, b].map(|model| ModelTokenizer::of(model.weights()).unwrap());
    for text in ["the harbour  wall\n\n", "It's 1234 tides, é!", "", "<|im_start|>user", "the tide"] {
        for special in [false, true] {
            let ids = a.encode(text, special).unwrap();
            assert_eq!(b.encode(text, special).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(b.decode(&ids, special).unwrap(), a.decode(&ids, special).unwrap(), "{name}");
        }
    }
    assert!(a.stop_tokens().iter().all(|&id| b.is_stop(id)), "{name}: {a:?} {b:?}");
    let chat = |t: &ModelTokenizer| t.chat_ids(&[Message::new("user", "the tide")], true).ok();
    assert_eq!(chat(&a), chat(&b), "{name}");
}

#[test]
fn the_tokenizer_of_a_folder_is_saved_in_a_gguf_file() {
    const LLAMA_3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}\
        | ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let sequence = |first: serde_json::Value, regex: bool| json!({ "type": "Sequence", "pretokenizers": [first, byte_level(regex)] });
    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let cases = [
        ("gpt-2", byte_level(true), json!(null), false),
        ("mpt", byte_level(true), json!({ "type": "NFC" }), false),
        ("smollm", sequence(json!({ "type": "Digits", "individual_digits": true }), true), json!(null), false),
        ("llama-bpe", sequence(split(LLAMA_3), false), json!(null), true),
        ("dbrx", sequence(split(LLAMA_3), false), json!(null), false),
        ("qwen2", sequence(split(&LLAMA_3.replace("{1,3}", "")), false), json!({ "type": "NFC" }), false),
    ];
    let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let path = to.path().join("model.gguf");
    for (pre, splitter, normalizer, whole_words) in cases {
        let model = tiny_chat(from.path(), |name, json| {
            if name == "tokenizer.json" {
                json["pre_tokenizer"] = splitter.clone();
                json["normalizer"] = normalizer.clone();
                json["model"]["ignore_merges"] = whole_words.into();
            }
        });
        model.save_gguf(&path, TensorTypes::Keep, unchanged).unwrap();
        let saved = Model::open(&path).unwrap();
        let metadata = saved.weights().metadata();
        assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), pre);
        assert_eq!(metadata.strs("tokenizer.ggml.tokens").unwrap().len(), 320);
        assert_eq!(metadata.usize("tokenizer.ggml.eos_token_id").unwrap(), 2);
        assert!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap() && metadata.contains("tokenizer.chat_template"));
        assert_same_tokenizer(pre, &model, &saved);
    }
}

#[test]
fn a_tokenizer_that_no_gguf_file_has_is_an_error() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change, &str); 9] = [
        ("tokenizer.json", |j| j["pre_tokenizer"]["add_prefix_space"] = true.into(), "pre-tokenizer"),
        ("tokenizer.json", |j| j["pre_tokenizer"] = json!({ "type": "Whitespace" }), "Whitespace"),
        ("tokenizer.json", |j| j["normalizer"] = json!({ "type": "Lowercase" }), "Lowercase"),
        ("tokenizer.json", |j| j["model"]["ignore_merges"] = true.into(), "ignore_merges"),
        ("tokenizer.json", |j| j["model"]["dropout"] = 0.1.into(), "dropout"),
        ("tokenizer.json", |j| j["added_tokens"][2]["lstrip"] = true.into(), "<|im_end|>"),
        (
            "tokenizer.json",
            |j| {
                let only = json!([j["post_processor"]["single"][0], j["post_processor"]["single"][0], { "Sequence": { "id": "A", "type_id": 0 } }]);
                j["post_processor"]["single"] = only;
            },
            "[0, 0]",
        ),
        ("tokenizer_config.json", |j| j["bos_token"] = "<|im_start|>".into(), "[0]"),
        ("generation_config.json", |j| j["eos_token_id"] = json!([3, 4, 5]), "4 tokens that end"),
    ];
    let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let path = to.path().join("model.gguf");
    std::fs::write(&path, "old").unwrap();
    for (file, change, word) in cases {
        let model = tiny_chat(from.path(), |name, json| {
            if name == file {
                change(json)
            }
        });
        let error = model.save_gguf(&path, TensorTypes::Keep, unchanged).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("GGUF file cannot say"), "{word}: {error}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn what_cannot_be_saved_as_a_gguf_file_is_an_error_and_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, "old").unwrap();
    let refused = |model: &Model, types: TensorTypes, value: Option<(&str, Vec<f32>)>, words: &[&str]| {
        let saved = model.save_gguf(&path, types, |name| {
            Ok(value.as_ref().filter(|(param, _)| *param == name).map(|(_, values)| values.clone()))
        });
        let error = saved.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    };
    let llama = Model::open(&hf_folder("llama")).unwrap();
    let (keep, half) = (TensorTypes::Keep, TensorTypes::Matrices(Stored::F16));
    refused(&llama, keep, Some(("norm_f.weight", vec![1.0; 31])), &["`norm_f.weight`", "32 values", "got 31"]);
    refused(&llama, keep, Some(("h.1.attn.q.weight", vec![f32::NAN; 32 * 32])), &["`h.1.attn.q.weight`", "NaN"]);
    refused(&llama, half, Some(("embed.weight", vec![1e6; 96 * 32])), &["`token_embd.weight`", "1000000"]);
    let failed = llama.save_gguf(&path, keep, |_| Err(throughline::Error::Graph("no such adapter".into())));
    assert!(failed.unwrap_err().to_string().contains("no such adapter"));
    refused(&Model::open(&hf_folder("bert")).unwrap(), keep, None, &["norm_placement", "GGUF"]);
    let odd = Model::new(Weights::from_bytes("odd.gguf", with_odd_tensor(&llama, "odd")).unwrap()).unwrap();
    refused(&odd, keep, None, &["odd.gguf", "`odd`", "MXFP4", "cannot copy"]);
    let nowhere = llama.save_gguf(&dir.path().join("none").join("model.gguf"), keep, unchanged);
    assert!(nowhere.unwrap_err().to_string().contains("none"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
}

/// Any value that a stranger's file may have under a key.
fn any_value() -> impl Strategy<Value = MetaValue> {
    prop_oneof![
        any::<u64>().prop_map(MetaValue::U64),
        any::<i8>().prop_map(MetaValue::I8),
        any::<f32>().prop_map(MetaValue::F32),
        prop::sample::select(vec![f32::NAN, f32::INFINITY, 0.0, -1.0]).prop_map(MetaValue::F32),
        any::<bool>().prop_map(MetaValue::Bool),
        prop::sample::select(vec!["yarn", "linear", "none", "gpt2", "qwen3", ""])
            .prop_map(|text| MetaValue::String(text.into())),
        prop::collection::vec(any::<i64>(), 0..3).prop_map(|counts| MetaValue::Array(MetaArray::I64(counts))),
    ]
}

proptest! {
    #[test]
    fn any_metadata_makes_a_model_or_an_error_that_names_the_file(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..3),
    ) {
        let hf = Model::open(&hf_folder("llama_yarn")).unwrap();
        let tensors = tensors(&hf, "llama", Stored::F32);
        let mut keys: Vec<String> = entries(hf.config(), "llama").into_iter().map(|(key, _)| key).collect();
        keys.extend(["rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_slow"].map(|k| format!("llama.{k}")));
        let changes: Vec<(&str, Option<MetaValue>)> =
            changes.iter().map(|(at, value)| (at.get(&keys).as_str(), Some(value.clone()))).collect();
        let mut entries = changed(hf.config(), "llama", &changes);
        let mut seen = std::collections::BTreeSet::new();
        entries.retain(|(key, _)| seen.insert(key.clone()));
        match Model::new(Weights::from_bytes("x.gguf", gguf_file(&entries, &tensors)).unwrap()) {
            Ok(model) => model.config().validate().unwrap(),
            Err(e) => prop_assert!(e.to_string().starts_with("x.gguf: "), "{}", e),
        }
    }
}
