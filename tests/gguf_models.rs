//! The tiny models of tests/data/hf, written as GGUF files. These have other names, layouts and rotations, but must
//! give PyTorch's logits as well.

mod common;
#[path = "common/gguf.rs"]
mod gguf;

use std::path::Path;

use common::{gpu, hf_expected, hf_folder, worst};
use gguf::{GgufTensor, gguf_file};
use throughline::decode::Decoder;
use throughline::format::{MetaArray, MetaValue, Stored, Weights, quant};
use throughline::model::Model;
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
    let dh = model.config().head_dim();
    let mut all = vec![];
    for (name, shape) in model.params() {
        let values = model.values(name).unwrap();
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
    refused("llama.block_count", number(u32::MAX), &["n_layers"]);
    refused("llama.block_count", number(1 << 20), &["1048576 blocks"]);
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
        // As `transformers` reads them: one id, or several.
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        let ends = config["eos_token_id"].as_array().cloned().unwrap_or_else(|| vec![config["eos_token_id"].clone()]);
        assert_eq!(ends, a.stop_tokens(), "{name}");
    }
}
