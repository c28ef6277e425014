//! Every architecture from Hugging Face folders, against numbers that PyTorch computed in f64
//! (tests/pytorch/make_references.py made the folders in tests/data/hf).

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::hf_expected as expected;
use common::hf_folder as folder;
use common::{gpu, whole_and_split, worst};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, Value as Json, json};
use throughline::decode::Decoder;
use throughline::format::Weights;
use throughline::model::{self, Model};
use throughline::nn::{Biases, Mlp, Positions, TransformerConfig, TransformerEncoder};
use throughline::ops::rope::Scaling;
use throughline::optim::{Arena, ArenaLayout, Schedule};
use throughline::sentence::{Pooling, SentenceEncoder};
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{ExecOptions, Executable, Gpu, Graph, Plan};

/// A folder of its own that a test fills, removed behind it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("models-{name}"));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    /// The model of a folder under another configuration.
    fn with_config(name: &str, config: &str) -> Scratch {
        let scratch = Scratch::new(&format!("{name}-{config}"));
        std::fs::copy(folder(name).join(config), scratch.0.join("config.json")).unwrap();
        std::fs::copy(folder(name).join("model.safetensors"), scratch.0.join("model.safetensors")).unwrap();
        scratch
    }

    /// The model of a folder with its configuration and its tensors' names changed.
    fn changed(
        name: &str,
        test: &str,
        edit: impl Fn(&mut Map<String, Json>),
        rename: impl Fn(&str) -> String,
    ) -> Scratch {
        let scratch = Scratch::new(&format!("{name}-{test}"));
        let mut config = config_of(name);
        edit(&mut config);
        std::fs::write(scratch.0.join("config.json"), Json::Object(config).to_string()).unwrap();
        let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors: BTreeMap<String, _> = file.iter().map(|(name, view)| (rename(name), view)).collect();
        safetensors::serialize_to_file(&tensors, None, &scratch.0.join("model.safetensors")).unwrap();
        scratch
    }

    fn renamed(name: &str, test: &str, rename: impl Fn(&str) -> String) -> Scratch {
        Scratch::changed(name, test, |_| {}, rename)
    }
}

/// The configuration of a folder.
fn config_of(name: &str) -> Map<String, Json> {
    serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

/// What a folder's configuration becomes with these keys changed. `null` removes a key; `"null"` is null.
fn read_with(name: &str, edits: &[(&str, Json)]) -> throughline::Result<TransformerConfig> {
    let mut config = config_of(name);
    for (key, value) in edits {
        match value {
            Json::Null => drop(config.remove(*key)),
            value if *value == "null" => drop(config.insert(key.to_string(), Json::Null)),
            value => drop(config.insert(key.to_string(), value.clone())),
        }
    }
    model::config_from_json("config.json", Json::Object(config).to_string().as_bytes())
}

fn rope_of(name: &str, edits: &[(&str, Json)]) -> (f32, Scaling) {
    match read_with(name, edits).unwrap().positions {
        Positions::Rope { theta, scaling, .. } => (theta, scaling),
        other => panic!("{other:?}"),
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const TIME: usize = 24;
const VOCAB: usize = 96;

/// Scores of both sequences by decoding with a cache.
fn decoded(model: &Model, ids: &[u32]) -> Vec<f32> {
    decoded_on(gpu(), model, ids)
}

fn decoded_on(gpu: &Gpu, model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut decoder = Decoder::new_blocking(gpu, model, TIME).unwrap();
    let mut logits = vec![];
    for ids in ids.chunks(TIME) {
        decoder.clear();
        // Some at once, then the rest: the cache and the positions carry over.
        logits.extend(decoder.feed_all_blocking(&ids[..10]).unwrap());
        logits.extend(decoder.feed_all_blocking(&ids[10..23]).unwrap());
        logits.extend(decoder.feed_blocking(&ids[23..]).unwrap());
    }
    logits
}

#[test]
fn every_architecture_decodes_as_pytorch_does() {
    // Weights in f16 and bf16 stay so, and PyTorch's numbers are from the same rounded ones.
    let names = [
        "gpt2",
        "llama",
        "llama_f16",
        "llama_bf16",
        "llama3",
        "llama_linear",
        "llama_yarn",
        "mistral",
        "qwen2",
        "qwen3",
    ];
    for name in names {
        let model = Model::open(&folder(name)).unwrap();
        let got = decoded(&model, &expected(name, "ids"));
        let worst = worst(&got, &expected(name, "logits"));
        println!("{name}: {worst:.1e}");
        assert!(worst < 1e-4, "{name}: {worst}");
    }
    // In seven files.
    let got = decoded(&Model::open(&folder("qwen2_sharded")).unwrap(), &expected("qwen2", "ids"));
    assert!(worst(&got, &expected("qwen2", "logits")) < 1e-4);
}

#[test]
fn configurations_of_older_and_other_spelling() {
    for (name, config) in [
        ("llama", "config_v4.json"),
        ("llama3", "config_v4.json"),
        ("llama_linear", "config_v4.json"),
        ("llama_yarn", "config_v4.json"),
        ("qwen3", "config_v4.json"),
    ] {
        let scratch = Scratch::with_config(name, config);
        assert_eq!(Model::open(&scratch.0).unwrap().config(), Model::open(&folder(name)).unwrap().config(), "{name}");
    }
    for (name, config, file) in [
        ("llama3", "config_bands.json", "expected_bands.safetensors"),
        ("llama_yarn", "config_explicit.json", "expected_explicit.safetensors"),
    ] {
        let scratch = Scratch::with_config(name, config);
        let got = decoded(&Model::open(&scratch.0).unwrap(), &expected(name, "ids"));
        let bytes = std::fs::read(folder(name).join(file)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let want: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("logits").unwrap().data());
        assert!(worst(&got, &want) < 1e-4, "{name} {config}: {}", worst(&got, &want));
    }
}

#[test]
fn scaling_that_a_user_adds_replaces_that_of_the_file() {
    // As model cards tell them to.
    let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let edit = |config: &mut Map<String, Json>| {
        config["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 10_000.0 });
        config.insert("rope_scaling".into(), scaling.clone());
    };
    let scratch = Scratch::changed("llama_yarn", "beside", edit, str::to_string);
    let got = decoded(&Model::open(&scratch.0).unwrap(), &expected("llama_yarn", "ids"));
    assert!(worst(&got, &expected("llama_yarn", "logits")) < 1e-4);
}

#[test]
fn rope_is_read_wherever_transformers_has_put_it() {
    let none = Json::Null;
    let yarn = |more: Json| {
        let mut group = json!({ "type": "yarn", "factor": 4.0 });
        group.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        group
    };
    let old = |scaling: Json| rope_of("llama", &[("rope_parameters", Json::Null), ("rope_scaling", scaling)]);
    let v4 = |theta: Json| rope_of("llama", &[("rope_parameters", Json::Null), ("rope_theta", theta)]);
    assert_eq!(v4(none.clone()), (10_000.0, Scaling::None));
    assert_eq!(v4(json!(500_000)), (500_000.0, Scaling::None));
    let linear = Scaling::Linear { factor: 2.0 };
    assert_eq!(old(json!({ "type": "linear", "factor": 2 })), (10_000.0, linear));
    assert_eq!(
        old(json!({ "rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 5e4 })),
        (5e4, linear)
    );
    assert_eq!(old(json!({ "type": "dynamic", "factor": 8.0 })).1, Scaling::None);
    assert_eq!(old(json!({})), (10_000.0, Scaling::None));
    assert_eq!(old(json!("null")), (10_000.0, Scaling::None));
    // Without a type, parameters say only theta.
    assert_eq!(rope_of("llama", &[("rope_parameters", json!({ "rope_theta": 7e4 }))]), (7e4, Scaling::None));
    assert_eq!(
        rope_of("llama", &[("rope_parameters", json!({ "rope_type": "default" })), ("rope_theta", json!(6e4))]).0,
        6e4
    );
    // The context before the scaling: within, above it, or the context itself.
    let original = |scaling: Scaling| match scaling {
        Scaling::Yarn { original_context, .. } => original_context,
        other => panic!("{other:?}"),
    };
    assert_eq!(original(old(yarn(json!({}))).1), 64);
    assert_eq!(original(old(yarn(json!({ "original_max_position_embeddings": 16 }))).1), 16);
    let above = [("rope_parameters", yarn(json!({}))), ("original_max_position_embeddings", json!(32))];
    assert_eq!(original(rope_of("llama", &above).1), 32);
    // Numbers that are left out, zero or null.
    let Scaling::Yarn { factor, beta_fast, beta_slow, truncate, attention_factor, .. } =
        old(yarn(json!({ "factor": null, "original_max_position_embeddings": 16, "beta_fast": 0, "beta_slow": null })))
            .1
    else {
        panic!()
    };
    assert_eq!((factor, beta_fast, beta_slow, truncate, attention_factor), (4.0, 32.0, 1.0, true, None));
    let attention = |more: Json| old(yarn(more)).1.attention_factor();
    assert!((attention(json!({})) - 1.138_629_4).abs() < 1e-6);
    assert_eq!(attention(json!({ "attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0 })), 1.5);
    assert!((attention(json!({ "mscale": 2.0, "mscale_all_dim": 1.0 })) - 1.277_258_9 / 1.138_629_4).abs() < 1e-6);
    assert_eq!(attention(json!({ "mscale": 1.0, "mscale_all_dim": 1.0 })), 1.0);
    assert!((attention(json!({ "mscale": 2.0, "mscale_all_dim": 0 })) - 1.138_629_4).abs() < 1e-6);
    // A theta that is said again, within or above, replaces that of the parameters.
    let again =
        |more: (&str, Json)| rope_of("qwen3", &[("rope_scaling", json!({ "type": "linear", "factor": 2.0 })), more]);
    assert_eq!(again(("rope_theta", json!(3e6))), (3e6, linear));
    let within = json!({ "type": "linear", "factor": 2.0, "rope_theta": 2e6 });
    assert_eq!(rope_of("qwen3", &[("rope_scaling", within)]), (2e6, linear));
    // Infinite, as transformers 5 writes it.
    let error = read_with(
        "llama",
        &[("rope_theta", json!(1)), ("rope_parameters", json!({ "rope_theta": { "__float__": "Infinity" } }))],
    );
    assert!(error.unwrap_err().to_string().contains("theta"));
}

#[test]
fn settings_that_are_left_out_have_the_defaults_of_transformers() {
    let kind = |kind: &str| json!({ "model_type": kind }).to_string();
    let read = |name: &str| model::config_from_json("config.json", kind(name).as_bytes()).unwrap();
    let sizes =
        |c: &TransformerConfig| [c.vocab_size, c.context, c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.d_ff];
    for (name, want, head, eps, tied) in [
        ("gpt2", [50257, 1024, 12, 768, 12, 12, 3072], 64, 1e-5, true),
        ("bert", [30522, 512, 12, 768, 12, 12, 3072], 64, 1e-12, true),
        ("llama", [32000, 2048, 32, 4096, 32, 32, 11008], 128, 1e-6, false),
        // A window of 4096 bounds a context of 131072.
        ("mistral", [32000, 4096, 32, 4096, 32, 8, 14336], 128, 1e-6, false),
        ("qwen2", [151936, 32768, 32, 4096, 32, 32, 22016], 128, 1e-6, false),
        ("qwen3", [151936, 32768, 32, 4096, 32, 32, 22016], 128, 1e-6, false),
    ] {
        let c = read(name);
        assert_eq!(sizes(&c), want, "{name}");
        assert_eq!((c.head_dim(), c.norm_eps, c.tied_head), (head, eps, tied), "{name}");
    }
    assert_eq!((read("bert").token_types, read("bert").mlp), (2, Mlp::GeluErf));
    assert_eq!((read("gpt2").mlp, read("qwen2").biases), (Mlp::GeluTanh, Biases::QKV));
    let without = |name: &str, keys: &[&str]| {
        read_with(name, &keys.iter().map(|key| (*key, Json::Null)).collect::<Vec<_>>()).unwrap()
    };
    assert_eq!(without("llama", &["rms_norm_eps", "hidden_act"]).norm_eps, 1e-6);
    assert_eq!(without("gpt2", &["n_inner", "activation_function"]).d_ff, 4 * 32);
    assert_eq!(without("llama", &["num_key_value_heads", "head_dim", "tie_word_embeddings"]).n_kv_heads, 4);
    assert_eq!(without("qwen3", &["head_dim"]).head_dim(), 128);
    // Null and nothing differ where the default is not "none".
    let kv_heads = |value: Json| read_with("mistral", &[("num_key_value_heads", value)]).map(|c| c.n_kv_heads);
    assert_eq!(kv_heads(json!("null")).unwrap(), 4);
    assert!(kv_heads(Json::Null).unwrap_err().to_string().contains("n_kv_heads"));
    let window = |value: Json| {
        let long = ("max_position_embeddings", json!(10_000));
        read_with("mistral", &[("sliding_window", value), long]).unwrap().context
    };
    assert_eq!([window(Json::Null), window(json!("null")), window(json!(100))], [4096, 10_000, 100]);
}

#[test]
fn one_setting_has_several_names() {
    let value = |name: &str, edits: &[(&str, Json)]| read_with(name, edits).unwrap();
    // GPT-2's class knows both.
    let renamed = [
        ("n_embd", Json::Null),
        ("hidden_size", json!(32)),
        ("n_layer", Json::Null),
        ("num_hidden_layers", json!(2)),
        ("n_head", Json::Null),
        ("num_attention_heads", json!(4.0)),
        ("n_positions", Json::Null),
        ("max_position_embeddings", json!(64)),
    ];
    assert_eq!(value("gpt2", &renamed), value("gpt2", &[]));
    assert_eq!(value("gpt2", &[("n_positions", Json::Null), ("n_ctx", json!(48))]).context, 48);
    assert_eq!(value("gpt2", &[("n_ctx", json!(48))]).context, 64);
    for name in ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"] {
        assert_eq!(value("gpt2", &[("activation_function", json!(name))]).mlp, Mlp::GeluTanh);
        assert_eq!(value("bert", &[("hidden_act", json!(name))]).mlp, Mlp::GeluTanh);
    }
    assert_eq!(value("gpt2", &[("activation_function", json!("gelu"))]).mlp, Mlp::GeluErf);
    assert_eq!(value("llama", &[("hidden_act", json!("swish"))]), value("llama", &[]));
    // Another architecture's name beside the own one says nothing; alone, it must say what the default says.
    assert_eq!(value("llama", &[("layer_norm_eps", json!(1e-3))]), value("llama", &[]));
    assert_eq!(value("llama", &[("rms_norm_eps", Json::Null), ("layer_norm_eps", json!(1e-6))]).norm_eps, 1e-6);
}

#[test]
fn layers_with_windows_bound_the_context() {
    let context = |edits: &[(&str, Json)]| read_with("qwen2", edits).map(|c| c.context);
    let used = ("use_sliding_window", json!(true));
    let window = ("sliding_window", json!(8));
    let layers = |types: &[&str]| ("layer_types", json!(types));
    let (full, sliding) = ("full_attention", "sliding_attention");
    assert_eq!(context(&[window.clone(), layers(&[full, full])]).unwrap(), 64);
    assert_eq!(context(&[used.clone(), window.clone(), layers(&[full, sliding])]).unwrap(), 8);
    assert_eq!(context(&[used.clone(), window.clone(), layers(&[full, full])]).unwrap(), 64);
    let without = ("layer_types", Json::Null);
    let from = |first: usize| ("max_window_layers", json!(first));
    assert_eq!(context(&[used.clone(), window.clone(), without.clone(), from(2)]).unwrap(), 64);
    assert_eq!(context(&[used.clone(), window.clone(), without, from(1)]).unwrap(), 8);
    for (edits, word) in [
        (vec![layers(&[full, sliding])], "sliding_window"),
        (vec![used.clone(), window.clone(), layers(&[full])], "layer_types"),
        (vec![used, window, layers(&[full, "chunked_attention"])], "chunked_attention"),
    ] {
        let error = context(&edits).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn configurations_as_python_writes_them_are_read() {
    let scratch = Scratch::new("python");
    std::fs::copy(folder("llama").join("model.safetensors"), scratch.0.join("model.safetensors")).unwrap();
    let text = std::fs::read_to_string(folder("llama").join("config.json")).unwrap();
    let text = text.trim_end().strip_suffix('}').unwrap();
    let more = r#", "router_z_limit": Infinity, "aux": [NaN, -Infinity], "nested": {"__float__": "NaN"}}"#;
    std::fs::write(scratch.0.join("config.json"), format!("\u{feff}{text}{more}")).unwrap();
    let model = Model::open(&scratch.0).unwrap();
    assert_eq!(model.config(), Model::open(&folder("llama")).unwrap().config());
    let weights = Weights::open(&folder("llama").join("model.safetensors")).unwrap();
    let same = Model::new(weights.with_config(format!("{text}{more}").as_bytes()).unwrap()).unwrap();
    assert_eq!(same.config(), model.config());
    let error = model::config_from_json("config.json", b"[NaN]").unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("object"), "{error}");
}

#[test]
fn tensors_are_found_under_other_spellings() {
    let same = |name: &str, test: &str, rename: &dyn Fn(&str) -> String| {
        let scratch = Scratch::renamed(name, test, rename);
        let (model, want) = (Model::open(&scratch.0).unwrap(), Model::open(&folder(name)).unwrap());
        for (param, _) in want.params() {
            assert_eq!(model.values(param).unwrap(), want.values(param).unwrap(), "{name} {test}: {param}");
        }
    };
    let old = |name: &str| match name.contains("LayerNorm") {
        true => name.replace(".weight", ".gamma").replace(".bias", ".beta"),
        false => name.to_string(),
    };
    same("bert", "gamma", &old);
    same("bert", "prefixed", &|name| format!("bert.{}", old(name)));
    same("gpt2", "module", &|name| format!("module.{name}"));
    same("gpt2", "bare", &|name| name.replace("transformer.", ""));
    same("llama", "compiled", &|name| format!("_orig_mod.{name}"));
    same("llama", "bare", &|name| name.replace("model.", ""));
    same("qwen3", "language_model", &|name| name.replace("model.", "model.language_model."));
}

#[test]
fn an_original_bert_embeds_as_the_same_with_new_names_does() {
    let gamma = |name: &str| match name.contains("LayerNorm") {
        true => name.replace(".weight", ".gamma").replace(".bias", ".beta"),
        false => name.to_string(),
    };
    let scratch = Scratch::renamed("bert", "original", gamma);
    let mut encoder = SentenceEncoder::new_blocking(gpu(), &Model::open(&scratch.0).unwrap(), Pooling::Mean).unwrap();
    let ids: Vec<u32> = expected("bert", "ids");
    let got = encoder.embed_blocking(&[ids[..12].to_vec()]).unwrap().concat();
    assert!(worst(&got, &expected("bert", "mean_pooled")[..32]) < 1e-5);
}

#[test]
fn what_a_file_has_of_a_module_is_read_or_refused() {
    let add = |name: &str, tensor: &str, rows: usize| {
        let scratch = Scratch::new(&format!("{name}-{tensor}"));
        std::fs::copy(folder(name).join("config.json"), scratch.0.join("config.json")).unwrap();
        let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = vec![0; 4 * rows];
        let more = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows], &data).unwrap();
        let tensors: BTreeMap<&str, _> = file.iter().chain([(tensor, more)]).collect();
        safetensors::serialize_to_file(&tensors, None, &scratch.0.join("model.safetensors")).unwrap();
        Model::open(&scratch.0).map(drop)
    };
    for (name, tensor) in [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.1.mlp.up_proj.weight_scale_inv"),
        ("llama", "model.layers.1.self_attn.v_proj.lora_A.default.weight"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("gpt2", "transformer.h.0.attn.c_attn.scale"),
    ] {
        let error = add(name, tensor, 32).unwrap_err().to_string();
        assert!(error.contains(tensor), "{error}");
    }
    // Buffers and heads that the model does not use.
    for (name, tensor) in [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "score.weight"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("bert", "embeddings.position_ids"),
        ("bert", "pooler.dense.bias"),
        ("bert", "cls.predictions.bias"),
    ] {
        add(name, tensor, 4).unwrap();
    }
}

#[test]
fn a_head_beside_the_table_counts_if_it_is_another_one() {
    let tied = |scale: f32| {
        let scratch = Scratch::new(&format!("tied-{scale}"));
        std::fs::copy(folder("qwen2").join("config.json"), scratch.0.join("config.json")).unwrap();
        let bytes = std::fs::read(folder("qwen2").join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let table = file.tensor("model.embed_tokens.weight").unwrap();
        let mut data = table.data().to_vec();
        let last: &mut [u8] = data.last_chunk_mut::<4>().unwrap();
        let value = f32::from_le_bytes(last.try_into().unwrap()) * scale;
        last.copy_from_slice(&value.to_le_bytes());
        let head = safetensors::tensor::TensorView::new(table.dtype(), table.shape().to_vec(), &data).unwrap();
        let tensors: BTreeMap<&str, _> = file.iter().chain([("lm_head.weight", head)]).collect();
        safetensors::serialize_to_file(&tensors, None, &scratch.0.join("model.safetensors")).unwrap();
        Model::open(&scratch.0).unwrap().config().tied_head
    };
    assert!(tied(1.0) && !tied(2.0));
}

#[test]
fn a_window_bounds_the_context() {
    let model = Model::open(&folder("mistral_window")).unwrap();
    assert_eq!(model.config().context, 8);
    let mut decoder = Decoder::new_blocking(gpu(), &model, 8).unwrap();
    let got = decoder.feed_all_blocking(&expected("mistral_window", "ids")[..8]).unwrap();
    assert!(worst(&got, &expected("mistral_window", "logits")[..8 * VOCAB]) < 1e-4);
    assert!(Decoder::new_blocking(gpu(), &model, 9).is_err());
}

/// A trainer of the model on sequences of so many tokens.
fn trainer(gpu: &Gpu, model: &Model, seq_len: usize) -> Trainer {
    let config = TrainConfig {
        seq_len: Some(seq_len),
        schedule: Schedule::constant(1e-3),
        ..TrainConfig::new(model.config().clone(), 2)
    };
    let trainer = Trainer::new_blocking(gpu, config).unwrap();
    model.load_blocking(gpu, trainer.params()).unwrap();
    trainer
}

/// The first tokens of each sequence; the targets are the next ones.
fn batch(ids: &[u32], seq_len: usize) -> Batch {
    let rows = |from: usize| ids.chunks(TIME).flat_map(|row| row[from..from + seq_len].to_vec()).collect();
    Batch::new(rows(0), rows(1))
}

#[test]
fn loaded_models_have_the_loss_and_the_gradients_of_pytorch() {
    for name in ["gpt2", "llama", "qwen2", "qwen3"] {
        let mut trainer = trainer(gpu(), &Model::open(&folder(name)).unwrap(), TIME - 1);
        let loss = trainer.step(&[batch(&expected(name, "ids"), TIME - 1)]).unwrap().wait_blocking().unwrap();
        let want = expected::<f32>(name, "loss")[0];
        assert!((loss - want).abs() < 1e-4, "{name}: loss {loss}, PyTorch {want}");
        // The gradients have the names and layouts of the weights, so they load as a model.
        let scratch = Scratch::new(&format!("{name}-gradients"));
        std::fs::copy(folder(name).join("config.json"), scratch.0.join("config.json")).unwrap();
        let bytes = std::fs::read(folder(name).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let gradients: BTreeMap<&str, _> =
            file.iter().filter_map(|(n, view)| Some((n.strip_prefix("grad/")?, view))).collect();
        safetensors::serialize_to_file(&gradients, None, &scratch.0.join("model.safetensors")).unwrap();
        let gradients = Model::open(&scratch.0).unwrap();
        for ((param, _), got) in
            trainer.grads().layout.tensors.iter().zip(trainer.grads().read_blocking(gpu()).unwrap())
        {
            let want = gradients.values(param).unwrap();
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b));
            // That of a key bias is zero in theory.
            let scale = norm(&mut want.iter().copied()).max(1e-3);
            assert!(error < 1e-4 * scale, "{name} {param}: {error:.1e} of {scale:.1e}");
        }
    }
}

#[test]
fn saved_models_load_again_bit_for_bit() {
    for name in ["gpt2", "llama", "llama3", "llama_yarn", "qwen2", "qwen3"] {
        let model = Model::open(&folder(name)).unwrap();
        let params: Vec<(String, Vec<f32>)> =
            model.params().iter().map(|(n, _)| (n.clone(), model.values(n).unwrap())).collect();
        let scratch = Scratch::new(&format!("{name}-saved"));
        model::save(&scratch.0, model.config(), &params).unwrap();
        let again = Model::open(&scratch.0).unwrap();
        assert_eq!(again.config(), model.config(), "{name}");
        for tensor in model.weights().iter() {
            let same = again.weights().get(tensor.name()).unwrap();
            assert!(
                same.shape() == tensor.shape() && same.bytes().unwrap() == tensor.bytes().unwrap(),
                "{name}: {}",
                tensor.name()
            );
        }
        assert_eq!(again.weights().len(), model.weights().len(), "{name}");
    }
}

#[test]
fn an_encoder_embeds_as_pytorch_does() {
    let model = Model::open(&folder("bert")).unwrap();
    let ids: Vec<u32> = expected("bert", "ids");
    let mask: Vec<u32> = expected("bert", "attention_mask");
    let want: Vec<f32> = expected("bert", "mean_pooled");
    // PyTorch masks what pads the second sentence; here it is as long as it is.
    let length = |i: usize| mask[i * 12..(i + 1) * 12].iter().sum::<u32>() as usize;
    let sentences: Vec<Vec<u32>> = (0..2).map(|i| ids[i * 12..i * 12 + length(i)].to_vec()).collect();
    assert_eq!(sentences[1].len(), 7);
    let mut encoder = SentenceEncoder::new_blocking(gpu(), &model, Pooling::Mean).unwrap();
    let got = encoder.embed_blocking(&sentences).unwrap().concat();
    assert!(worst(&got, &want) < 1e-5, "{}", worst(&got, &want));
}

#[test]
fn an_encoder_has_the_hidden_states_of_pytorch() {
    let model = Model::open(&folder("bert")).unwrap();
    for (expected_name, with_types) in [("hidden", false), ("hidden_types", true)] {
        let mut g = Graph::new();
        let encoder = TransformerEncoder::build(&mut g, model.config(), 2, 12).unwrap();
        let plan = Plan::new(&g, &[encoder.hidden], gpu().profile()).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        for &p in &encoder.params {
            exec.write(p, &model.values(g.name(p)).unwrap()).unwrap();
        }
        exec.write(encoder.tokens, &expected::<u32>("bert", "ids")).unwrap();
        let types = if with_types { expected("bert", "token_types") } else { vec![0u32; g.ty(encoder.tokens).len()] };
        exec.write(encoder.token_types.unwrap(), &types).unwrap();
        exec.submit().unwrap();
        let got: Vec<f32> = exec.read_blocking(encoder.hidden).unwrap();
        let worst = worst(&got, &expected("bert", expected_name));
        assert!(worst < 1e-5, "{expected_name}: {worst}");
    }
}

#[test]
fn tables_larger_than_a_binding_are_in_parts() {
    // All tensors of these models are within the limit but for the tables of tokens, and their heads.
    let [_, split] = whole_and_split(11 << 10);
    for (name, table) in [("gpt2", "embed.weight@64"), ("llama", "head.weight@64"), ("qwen2", "embed.weight@64")] {
        let model = Model::open(&folder(name)).unwrap();
        let ids = expected(name, "ids");
        assert!(worst(&decoded_on(&split, &model, &ids), &expected(name, "logits")) < 1e-4, "{name}");
        let (mut whole, mut parts) = (trainer(gpu(), &model, 12), trainer(&split, &model, 12));
        assert!(
            parts.params().layout.tensors.iter().any(|(name, _)| name == table),
            "{:?}",
            parts.params().layout.tensors
        );
        let losses = |trainer: &mut Trainer| {
            [0, 1, 2].map(|_| trainer.step(&[batch(&ids, 12)]).unwrap().wait_blocking().unwrap())
        };
        let (a, b) = (losses(&mut whole), losses(&mut parts));
        assert!(worst(&a, &b) < 1e-4, "{name}: {a:?} {b:?}");
        // A checkpoint does not know of parts: it goes on where there are none.
        let saved = Checkpoint::of_blocking(&parts, "", 0).unwrap();
        saved.restore_blocking(&mut whole).unwrap();
        assert!(Checkpoint::of_blocking(&whole, "", 0).unwrap().same_bits(&saved), "{name}");
        saved.restore_blocking(&mut parts).unwrap();
    }
}

#[test]
fn configurations_that_cannot_be_are_errors_that_name_file_and_key() {
    let refused = |name: &str, edits: &[(&str, Json)], parts: &[&str]| {
        let mut config = Json::Object(config_of(name));
        for (key, value) in edits {
            let at = key.split('.').fold(&mut config, |at, key| &mut at[key]);
            *at = value.clone();
        }
        let scratch = Scratch::new("bad-configuration");
        std::fs::write(scratch.0.join("config.json"), config.to_string()).unwrap();
        std::fs::copy(folder(name).join("model.safetensors"), scratch.0.join("model.safetensors")).unwrap();
        let error = Model::open(&scratch.0).unwrap_err().to_string();
        assert!(error.contains("bad-configuration") && parts.iter().all(|p| error.contains(p)), "{edits:?}: {error}");
    };
    refused("llama", &[("model_type", json!("mamba"))], &["config.json", "model_type", "mamba", "qwen3"]);
    refused("llama", &[("model_type", json!(null))], &["model_type", "missing"]);
    refused("llama", &[("hidden_size", json!("wide"))], &["hidden_size", "wide"]);
    refused("llama", &[("hidden_size", json!(-32))], &["hidden_size", "-32"]);
    refused("llama", &[("hidden_size", json!(64))], &["model.embed_tokens.weight", "[96, 64]", "[96, 32]"]);
    refused("llama", &[("hidden_size", json!(1u64 << 40))], &["d_model"]);
    refused("llama", &[("num_hidden_layers", json!(4_000))], &["4000 blocks"]);
    refused("llama", &[("num_hidden_layers", json!(4_000_000))], &["n_layers", "4000000"]);
    refused("llama", &[("num_hidden_layers", json!(3))], &["model.layers.2.input_layernorm.weight"]);
    refused("llama", &[("num_attention_heads", json!(0))], &["n_heads"]);
    refused("llama", &[("num_key_value_heads", json!(3))], &["n_kv_heads"]);
    refused("llama", &[("intermediate_size", json!(81))], &["mlp.up_proj.weight", "[81, 32]"]);
    refused("llama", &[("hidden_act", json!("relu"))], &["hidden_act", "silu", "relu"]);
    refused("llama", &[("rms_norm_eps", json!(-1.0))], &["norm_eps"]);
    refused("llama", &[("rms_norm_eps", json!({"__float__": "Infinity"}))], &["norm_eps", "inf"]);
    refused("llama", &[("rms_norm_eps", json!("1e-5"))], &["rms_norm_eps", "number", "1e-5"]);
    refused("llama", &[("rope_parameters.rope_type", json!("longrope"))], &["rope_type", "longrope"]);
    refused(
        "llama",
        &[("rope_parameters", json!({"full_attention": {"rope_theta": 1e4}}))],
        &["full_attention", "layer"],
    );
    refused("llama", &[("rope_parameters.type", json!("mrope"))], &["rope_parameters.type", "mrope"]);
    refused("llama", &[("rope_parameters", json!({"type": "su"}))], &["rope_type", "su", "yarn"]);
    refused("llama", &[("rope_parameters", json!("yarn"))], &["rope_parameters", "object", "yarn"]);
    refused("llama", &[("rope_parameters", json!({"type": "linear"}))], &["rope_parameters.factor", "missing"]);
    refused("llama3", &[("rope_parameters.low_freq_factor", json!(null))], &["low_freq_factor", "missing"]);
    refused("llama", &[("rope_parameters.partial_rotary_factor", json!(0.5))], &["partial_rotary_factor", "0.5"]);
    refused("llama", &[("partial_rotary_factor", json!(0.25))], &["partial_rotary_factor", "0.25"]);
    refused(
        "qwen3",
        &[("rope_scaling", json!({"type": "linear", "factor": 2}))],
        &["rope_scaling.rope_theta", "1000000"],
    );
    refused("llama", &[("quantization_config", json!({"quant_method": "fp8"}))], &["quantization_config"]);
    refused("llama", &[("per_layer_config", json!({"0": {"head_dim": 4}}))], &["per_layer_config"]);
    refused("bert", &[("pruned_heads", json!({"0": [1]}))], &["pruned_heads"]);
    refused("qwen3", &[("is_causal", json!(false))], &["is_causal"]);
    refused("qwen2", &[("use_bidirectional_attention", json!(true))], &["use_bidirectional_attention"]);
    refused("gpt2", &[("hidden_size", json!(64))], &["hidden_size", "64", "n_embd", "32"]);
    refused("gpt2", &[("layer_norm_epsilon", json!(null)), ("layer_norm_eps", json!(1e-3))], &["layer_norm_eps"]);
    refused("gpt2", &[("scale_attn_weights", json!(false))], &["scale_attn_weights"]);
    refused("gpt2", &[("add_cross_attention", json!(true))], &["add_cross_attention"]);
    refused("bert", &[("hidden_act", json!("relu"))], &["hidden_act", "gelu", "relu"]);
    refused("llama", &[("hidden_act", json!("gelu"))], &["hidden_act", "silu", "gelu"]);
    refused("llama", &[("hidden_size", json!(32.5))], &["hidden_size", "32.5"]);
    refused("llama", &[("rope_parameters.rope_theta", json!(0.5))], &["theta", "0.5"]);
    refused("llama_linear", &[("rope_parameters.factor", json!(0))], &["Linear"]);
    refused("gpt2", &[("scale_attn_by_inverse_layer_idx", json!(true))], &["scale_attn_by_inverse_layer_idx"]);
    refused("gpt2", &[("activation_function", json!("swish"))], &["activation_function", "gelu_new", "swish"]);
    refused("gpt2", &[("n_inner", json!(96))], &["c_fc.weight", "[32, 96]", "[32, 80]"]);
    refused("bert", &[("is_decoder", json!(true))], &["is_decoder"]);
    refused("bert", &[("position_embedding_type", json!("relative_key"))], &["position_embedding_type"]);
    // A head of its own that is not there.
    refused("qwen2", &[("tie_word_embeddings", json!(false))], &["lm_head.weight", "missing"]);
    // Weights alone say too little.
    let error = Model::open(&folder("llama").join("model.safetensors")).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    // An encoder does not decode, and a decoder does not embed.
    let error = Decoder::new_blocking(gpu(), &Model::open(&folder("bert")).unwrap(), 8).unwrap_err().to_string();
    assert!(error.contains("encoder"), "{error}");
    let llama = Model::open(&folder("llama")).unwrap();
    let error = SentenceEncoder::new_blocking(gpu(), &llama, Pooling::Mean).unwrap_err().to_string();
    assert!(error.contains("encoder"), "{error}");
}

fn any_scaling() -> impl Strategy<Value = Scaling> {
    let number = || 0.01f32..100.0;
    prop_oneof![
        Just(Scaling::None),
        number().prop_map(|factor| Scaling::Linear { factor }),
        (number(), number(), number(), 1..100_000usize).prop_map(|(factor, low, more, original_context)| {
            Scaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: low + more, original_context }
        }),
        (number(), number(), number(), 1..100_000usize, any::<bool>(), prop::option::of(number())).prop_map(
            |(factor, slow, more, original_context, truncate, attention_factor)| Scaling::Yarn {
                factor,
                original_context,
                beta_fast: slow + more,
                beta_slow: slow,
                truncate,
                attention_factor,
            }
        ),
    ]
}

/// Decoders that `transformers` has, too.
fn any_config() -> impl Strategy<Value = TransformerConfig> {
    let sizes = (1..1000usize, 1..5000usize, 1..9usize, 1..5usize, 1..5usize, 1..33usize, 1..500usize);
    let kinds = (any::<bool>(), prop::option::of(1..40usize), any::<[bool; 5]>());
    let numbers = (1e-12f32..1e-2, 1.0f32..1e7, any_scaling());
    (sizes, kinds, numbers).prop_map(|((vocab, context, layers, kv, groups, half, d_ff), kinds, numbers)| {
        let ((gpt2, head_dim, [qk_norm, attention, mlp, qkv_only, tied_head]), (norm_eps, theta, scaling)) =
            (kinds, numbers);
        let (heads, d_model) = (kv * groups, kv * groups * 2 * half);
        if gpt2 {
            let mlp = if mlp { Mlp::GeluTanh } else { Mlp::GeluErf };
            let base = TransformerConfig::gpt2(vocab, context, layers, d_model, heads);
            return TransformerConfig { d_ff, norm_eps, mlp, tied_head, ..base };
        }
        let biases = match qkv_only && !qk_norm {
            true => Biases::QKV,
            false => Biases { qkv: attention, out: attention, mlp: mlp && !qk_norm },
        };
        TransformerConfig {
            n_kv_heads: kv,
            head_dim: head_dim.map(|half| 2 * half),
            d_ff,
            norm_eps,
            positions: Positions::Rope { theta, interleaved: false, scaling },
            biases,
            qk_norm,
            tied_head,
            ..TransformerConfig::llama(vocab, context, layers, d_model, heads)
        }
    })
}

/// Any value that a stranger's configuration may have under a key.
fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        (0..200u64).prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        prop::sample::select(vec!["yarn", "linear", "default", "silu", "gelu", "full_attention", ""])
            .prop_map(Json::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        let keys = prop::sample::select(vec!["rope_type", "type", "factor", "rope_theta", "__float__", "x"]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            prop::collection::btree_map(keys, inner, 0..4)
                .prop_map(|entries| entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn saved_configurations_mean_the_same(config in any_config()) {
        let json = model::config_to_json(&config).unwrap();
        let again = model::config_from_json("config.json", json.as_bytes()).unwrap();
        // Qwen3's files always say how wide heads are.
        let head_dim = config.qk_norm.then_some(config.head_dim()).or(config.head_dim);
        prop_assert_eq!(again, TransformerConfig { head_dim, ..config });
    }

    #[test]
    fn any_configuration_is_read_or_an_error_that_names_it(
        name in prop::sample::select(vec!["gpt2", "llama3", "llama_yarn", "mistral_window", "qwen2", "qwen3", "bert"]),
        at in any::<prop::sample::Index>(),
        value in any_json(),
        text in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut config = config_of(name);
        let key = at.get(&config.keys().cloned().collect::<Vec<_>>()).clone();
        config.insert(key, value);
        let config = Json::Object(config).to_string();
        // The same beside weights, which seldom fit it.
        let weights = Weights::from_bytes("x.safetensors", std::fs::read(folder(name).join("model.safetensors")).unwrap());
        if let Err(e) = Model::new(weights.unwrap().with_config(config.as_bytes()).unwrap()) {
            prop_assert!(e.to_string().contains("x.safetensors"), "{}", e);
        }
        match model::config_from_json("config.json", config.as_bytes()) {
            Ok(config) => config.validate().unwrap(),
            Err(e) => prop_assert!(e.to_string().starts_with("config.json: ") && e.to_string().len() < 1000, "{}", e),
        }
        prop_assert!(model::config_from_json("config.json", &text).is_err());
    }
}

#[test]
fn weights_that_are_no_numbers_are_found() {
    let scratch = Scratch::new("nan");
    std::fs::copy(folder("llama").join("config.json"), scratch.0.join("config.json")).unwrap();
    let mut bytes = std::fs::read(folder("llama").join("model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(scratch.0.join("model.safetensors"), bytes).unwrap();
    let model = Model::open(&scratch.0).unwrap();
    let error = Decoder::new_blocking(gpu(), &model, 8).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("model.safetensors"), "{error}");
}

// Saving a model that was loaded: everything that it had is still there.

/// The parameters of a model on the device.
fn loaded(model: &Model) -> Arena {
    let layout = ArenaLayout::of_model(model.config(), gpu().profile().max_tensor_bytes()).unwrap();
    let params = Arena::zeros(gpu(), "parameters", &layout.into()).unwrap();
    model.load_blocking(gpu(), &params).unwrap();
    params
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Fails unless both hold the same model: configuration, names and elements of tensors.
fn assert_same_model(a: &Model, b: &Model) {
    assert_eq!(a.config(), b.config());
    assert_eq!(a.weights().len(), b.weights().len(), "{} and {}", a.weights().path(), b.weights().path());
    for tensor in a.weights().iter() {
        let same = b.weights().get(tensor.name()).unwrap();
        assert!(same.shape() == tensor.shape() && same.values().unwrap() == tensor.values().unwrap(), "{tensor:?}");
    }
}

/// A chat template of `tests/data/tiny_chat` elsewhere than in its configuration, or the folder as it is.
fn tiny_chat(dir: &Path, template: &str) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_chat");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(from.join(name), dir.join(name)).unwrap();
    }
    if !template.is_empty() {
        let mut config = json(&dir.join("tokenizer_config.json"));
        config.as_object_mut().unwrap().remove("chat_template");
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        let path = dir.join(template);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}").unwrap();
    }
}

#[test]
fn a_saved_model_has_the_files_of_the_original() {
    let config = TransformerConfig { tied_head: true, ..TransformerConfig::llama(320, 32, 1, 16, 2) };
    let layout = ArenaLayout::of_model(&config, u64::MAX).unwrap();
    let params: Vec<_> = layout
        .tensors
        .iter()
        .map(|(n, shape)| (n.clone(), (0..shape.len()).map(|i| (i as f32).sin()).collect()))
        .collect();
    for template in ["", "chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja"] {
        let [from, to] = ["from", "to"].map(|name| Scratch::new(&format!("companions-{name}")));
        model::save(&from.0, &config, &params).unwrap();
        tiny_chat(&from.0, template);
        for name in ["vocab.json", "merges.txt", "tokenizer.model", "1_Pooling/config.json", "README.md"] {
            std::fs::create_dir_all(from.0.join(name).parent().unwrap()).unwrap();
            std::fs::write(from.0.join(name), name).unwrap();
        }
        // What this crate does not read stays in the configuration.
        let mut written = json(&from.0.join("config.json"));
        written["eos_token_id"] = serde_json::json!([2, 0]);
        written["initializer_range"] = serde_json::json!(0.125);
        written["dtype"] = serde_json::json!("bfloat16");
        std::fs::write(from.0.join("config.json"), written.to_string()).unwrap();

        let model = Model::open(&from.0).unwrap();
        model.save_blocking(&to.0, gpu(), &loaded(&model)).unwrap();
        let saved = Model::open(&to.0).unwrap();
        assert_same_model(&model, &saved);
        written["dtype"] = serde_json::json!("float32");
        written.as_object_mut().unwrap().remove("torch_dtype");
        assert_eq!(json(&to.0.join("config.json")), written);
        let names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt"];
        let others = ["tokenizer.model", "1_Pooling/config.json", template];
        for name in names.into_iter().chain(others).filter(|name| !name.is_empty()) {
            assert_eq!(std::fs::read(to.0.join(name)).unwrap(), std::fs::read(from.0.join(name)).unwrap(), "{name}");
        }
        assert!(!to.0.join("README.md").exists());
        let [a, b] = [&model, &saved].map(|model| ModelTokenizer::of(model.weights()).unwrap());
        assert_eq!(a.stop_tokens(), [0, 2]);
        assert_eq!(a.stop_tokens(), b.stop_tokens());
        let chat =
            |t: &ModelTokenizer| t.has_chat().then(|| t.chat(&[Message::new("user", "the tide")], true).unwrap());
        assert_eq!(chat(&a), chat(&b), "{template}");
        assert!(chat(&a).is_some() || template.contains("json") || template.contains('/'));
    }
}

#[test]
fn a_model_is_saved_into_its_own_folder_or_an_empty_one() {
    let [own, other] = ["own-folder", "other-folder"].map(Scratch::new);
    for entry in std::fs::read_dir(folder("qwen2_sharded")).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), own.0.join(entry.file_name())).unwrap();
    }
    let model = Model::open(&own.0).unwrap();
    let (gpu, params) = (gpu(), loaded(&model));
    let mut values = params.tensors[0].read_blocking::<f32>(gpu).unwrap();
    values[0] = 7.0;
    params.write_tensor(gpu, 0, &values).unwrap();
    // By several threads at once, while it is being read.
    std::thread::scope(|scope| {
        for dir in [&own.0, &own.0, &other.0] {
            let (model, params) = (&model, &params);
            scope.spawn(move || model.save_blocking(dir, gpu, params).unwrap());
        }
    });
    let name = &params.layout.tensors[0].0;
    assert_ne!(model.values(name).unwrap(), values, "the open files are the old ones");
    for dir in [&own.0, &other.0] {
        let saved = Model::open(dir).unwrap();
        assert_eq!(saved.values(name).unwrap(), values);
        assert_eq!(saved.config(), model.config());
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(names.into_iter().all(|name| !name.ends_with(".tmp")), "a temporary file is left");
    }
    // A template that the model does not have would be taken for its own.
    std::fs::write(other.0.join("chat_template.jinja"), "hello").unwrap();
    let before = std::fs::read(other.0.join("model.safetensors")).unwrap();
    let error = model.save_blocking(&other.0, gpu, &params).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("another"), "{error}");
    assert_eq!(std::fs::read(other.0.join("model.safetensors")).unwrap(), before);
    // Parameters of another model.
    let llama = Model::open(&folder("llama")).unwrap();
    let error = llama.save_blocking(&own.0, gpu, &params).unwrap_err().to_string();
    assert!(error.contains("tensor `") && error.contains("rows"), "{error}");
}

#[test]
fn models_of_parts_and_of_encoders_are_saved_whole() {
    // A table in parts on the device is one tensor in the file.
    let [_, split] = whole_and_split(11 << 10);
    let model = Model::open(&folder("gpt2")).unwrap();
    let trainer = trainer(&split, &model, 12);
    assert!(trainer.params().layout.tensors.iter().any(|(name, _)| name == "embed.weight@64"));
    let scratch = Scratch::new("parts-saved");
    model.save_blocking(&scratch.0, &split, trainer.params()).unwrap();
    assert_same_model(&model, &Model::open(&scratch.0).unwrap());
    let scratch = Scratch::new("parts-saved-without-the-original");
    model::save_arena_blocking(&scratch.0, model.config(), &split, trainer.params()).unwrap();
    assert_same_model(&model, &Model::open(&scratch.0).unwrap());

    let bert = Model::open(&folder("bert")).unwrap();
    let layout = ArenaLayout::new(bert.params().to_vec(), u64::MAX).unwrap();
    let params = Arena::zeros(gpu(), "parameters", &layout.into()).unwrap();
    bert.load_blocking(gpu(), &params).unwrap();
    let scratch = Scratch::new("bert-saved");
    bert.save_blocking(&scratch.0, gpu(), &params).unwrap();
    let saved = Model::open(&scratch.0).unwrap();
    assert_eq!(saved.config(), bert.config());
    assert!(bert.params().iter().all(|(name, _)| saved.values(name).unwrap() == bert.values(name).unwrap()));
}

/// Models of the architectures that can be saved, with settings drawn at random.
fn any_small_model() -> impl Strategy<Value = TransformerConfig> {
    let sizes = (1usize..40, 1usize..20, 1usize..3, 1usize..3, prop::sample::select(vec![4usize, 8]), 1usize..30);
    let settings = (any::<[bool; 3]>(), 0usize..5, 1e-8f32..1e-2, 2.0f32..1e7);
    (sizes, settings, any_scaling()).prop_map(
        |((vocab, context, layers, kv, dh, d_ff), (flags, kind, eps, theta), scaling)| {
            let [tied_head, gelu, grouped] = flags;
            let (n_kv_heads, n_heads) = (kv, if grouped { 2 * kv } else { kv });
            let base = match kind {
                0 => {
                    let mlp = if gelu { Mlp::GeluErf } else { Mlp::GeluTanh };
                    let gpt2 = TransformerConfig::gpt2(vocab, context, layers, n_heads * dh, n_heads);
                    return TransformerConfig { d_ff, norm_eps: eps, mlp, tied_head, ..gpt2 };
                }
                _ => TransformerConfig::llama(vocab, context, layers, n_heads * dh, n_heads),
            };
            let (biases, head_dim, qk_norm) = match kind {
                1 => (Biases::NONE, grouped.then_some(2 * dh), false),
                2 => (Biases { qkv: true, out: true, mlp: gelu }, None, false),
                3 => (Biases::QKV, None, false),
                _ => (Biases::NONE, Some(dh), true),
            };
            let positions = Positions::Rope { theta, interleaved: false, scaling };
            TransformerConfig {
                d_ff,
                norm_eps: eps,
                n_kv_heads,
                positions,
                biases,
                head_dim,
                qk_norm,
                tied_head,
                ..base
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_model_that_is_saved_loaded_and_saved_again_is_the_same(config in any_small_model()) {
        let layout = ArenaLayout::of_model(&config, u64::MAX).unwrap();
        let value = |name: &str, i: usize| ((name.len() + i) as f32).sin();
        let values = |name: &str| {
            let (_, shape) = layout.tensors.iter().find(|(n, _)| n == name).unwrap();
            Ok((0..shape.len()).map(|i| value(name, i)).collect::<Vec<f32>>())
        };
        let [once, twice] = ["once", "twice"].map(|name| Scratch::new(&format!("saved-{name}")));
        model::save_with(&once.0, &config, values).unwrap();
        let first = Model::open(&once.0).unwrap();
        prop_assert_eq!(first.config(), &config);
        for (name, _) in first.params() {
            prop_assert_eq!(first.values(name).unwrap(), values(name).unwrap());
        }
        first.save_blocking(&twice.0, gpu(), &loaded(&first)).unwrap();
        assert_same_model(&first, &Model::open(&twice.0).unwrap());
    }
}
