//! Files of adapters: read, written, merged, and wrong in every way.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{gpu, hf_folder, lora_expected as expected, lora_folder as folder, worst};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use throughline::format::{GgufTensor, GgufWriter, Metadata, Stored};
use throughline::model::{Adapter, Model, TensorTypes};
use throughline::nn::{Lora, Transformer, TransformerOptions};
use throughline::optim::Schedule;
use throughline::train::{TrainConfig, TrainOptions, Trainer};
use throughline::{ExecOptions, Executable, Graph, Plan};

/// Shapes and elements by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The name of a tensor in a changed file, and its dimensions, if they change; `None` to leave it out.
type Change = fn(&str) -> Option<(String, Vec<usize>)>;

/// The base of an adapter of tests/data/lora.
fn base(name: &str) -> Model {
    Model::open(&hf_folder(if name == "gpt2" { "gpt2" } else { "llama" })).unwrap()
}

/// Logits for the first batch, two texts of 24 tokens, of a model with these values.
fn logits(model: &Model, lora: Option<&Lora>, name: &str, values: impl Fn(&str) -> Vec<f32>) -> Vec<f32> {
    let mut g = Graph::new();
    let options = TransformerOptions { lora, ..TransformerOptions::default() };
    let gpt = Transformer::build_of(&mut g, model.config(), [2, 24], &options).unwrap();
    let plan = Plan::new(&g, &[gpt.logits], gpu().profile()).unwrap();
    let exec = gpu().run_blocking(Executable::new(gpu(), Arc::new(plan), ExecOptions::default())).unwrap();
    for &p in &gpt.params {
        exec.write(p, &values(g.name(p))).unwrap();
    }
    let tokens: Vec<u32> = expected(name, "tokens");
    let inputs: Vec<u32> = tokens[..50].chunks(25).flat_map(|row| row[..24].to_vec()).collect();
    exec.write(gpt.tokens, &inputs).unwrap();
    exec.submit().unwrap();
    exec.read_blocking(gpt.logits).unwrap()
}

fn merged_logits(model: &Model, adapter: &Adapter, name: &str) -> Vec<f32> {
    logits(model, None, name, |param| {
        adapter.merged(model, param).unwrap().unwrap_or_else(|| model.values(param).unwrap())
    })
}

#[test]
fn merged_weights_give_the_logits_of_peft() {
    for name in ["llama", "gpt2", "llama_patterns"] {
        let model = base(name);
        let adapter = Adapter::open(&folder(name), &model).unwrap();
        let got = merged_logits(&model, &adapter, name);
        for tensor in ["merged", "logits"] {
            let error = worst(&got, &expected::<f32>(name, tensor));
            assert!(error < 1e-4, "{name}, {tensor}: {error}");
        }
    }
}

/// A trainer that goes on with an adapter evaluates to what PyTorch says, and gives the adapter back.
#[test]
fn an_adapter_goes_into_a_trainer_and_out_again() {
    for name in ["llama", "gpt2"] {
        let model = Arc::new(base(name));
        let adapter = Adapter::open(&folder(name), &model).unwrap();
        let lora = adapter.lora().unwrap();
        assert_eq!((lora.rank, lora.scale(), lora.shared_qkv), (4, 2.0, name == "gpt2"));
        let config = TrainConfig {
            lora: Some(lora),
            seq_len: Some(24),
            schedule: Schedule::constant(0.01),
            ..TrainConfig::new(model.config().clone(), 2)
        };
        let options = TrainOptions { base: Some(model.clone()), ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(gpu(), config, &options).unwrap();
        trainer.load_adapter(&adapter).unwrap();
        let again = trainer.adapter_blocking().unwrap();
        assert!(again.layers().eq(adapter.layers()), "{name}");

        let dir = tempfile::tempdir().unwrap();
        again.save_peft(dir.path(), "someone/model").unwrap();
        let saved = Adapter::open(dir.path(), &model).unwrap();
        assert!(saved.layers().eq(adapter.layers()), "{name}");
        let config: Json =
            serde_json::from_slice(&std::fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(8.0)));
        assert_eq!(config["base_model_name_or_path"], "someone/model");
    }
}

#[test]
fn ranks_scales_and_whole_modules_are_saved() {
    let model = base("llama_patterns");
    let adapter = Adapter::open(&folder("llama_patterns"), &model).unwrap();
    let ranks = |name: &str| adapter.layer(name).map(|layer| layer.rank);
    assert_eq!([ranks("h.0.attn.q"), ranks("h.1.attn.q"), ranks("h.0.mlp.down")], [Some(4), Some(2), Some(3)]);
    assert!(adapter.whole().any(|(name, _)| name == "head.weight"));
    let error = adapter.lora().unwrap_err().to_string();
    assert!(error.contains("ranks 4 and"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    adapter.save_peft(dir.path(), "base").unwrap();
    let saved = Adapter::open(dir.path(), &model).unwrap();
    assert!(saved.whole().eq(adapter.whole()));
    for ((name, a), (_, b)) in saved.layers().zip(adapter.layers()) {
        assert_eq!((a.rank, &a.a, &a.b), (b.rank, &b.a, &b.b), "{name}");
        assert!((a.scale / b.scale - 1.0).abs() < 1e-6, "{name}: {} and {}", a.scale, b.scale);
    }
    let want: Vec<f32> = expected("llama_patterns", "logits");
    assert!(worst(&merged_logits(&model, &saved, "llama_patterns"), &want) < 1e-4);
}

/// A base that rotates neighbours, as Llama's GGUF files do, takes the same adapter, and so does one that does not take
/// that of a GGUF file.
#[test]
fn adapters_follow_the_rotation_of_their_base() {
    for name in ["llama", "gpt2"] {
        let model = base(name);
        let adapter = Adapter::open(&folder(name), &model).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let [file, saved] = ["base.gguf", "adapter.gguf"].map(|file| dir.path().join(file));
        model.save_gguf(&file, TensorTypes::Keep, |_| Ok(None)).unwrap();
        let rotated = Model::open(&file).unwrap();
        let of_rotated = Adapter::open(&folder(name), &rotated).unwrap();
        assert_eq!(adapter.layer("h.0.attn.q") == of_rotated.layer("h.0.attn.q"), name == "gpt2");
        assert_eq!(adapter.layer("h.0.attn.v"), of_rotated.layer("h.0.attn.v"));
        let want: Vec<f32> = expected(name, "logits");
        assert!(worst(&merged_logits(&rotated, &of_rotated, name), &want) < 1e-4);

        of_rotated.save_peft(&dir.path().join("peft"), "base").unwrap();
        let again = Adapter::open(&dir.path().join("peft"), &model).unwrap();
        assert!(again.layers().eq(adapter.layers()), "{name}");
        for (from, on) in [(&adapter, &rotated), (&of_rotated, &model)] {
            from.save_gguf(&saved).unwrap();
            let read = Adapter::open(&saved, on).unwrap();
            let same = if std::ptr::eq(on, &rotated) { &of_rotated } else { &adapter };
            assert!(read.layers().eq(same.layers()), "{name}");
        }
        // What is merged into a GGUF file is there.
        let merged = dir.path().join("merged.gguf");
        model.save_gguf(&merged, TensorTypes::Keep, |param| adapter.merged(&model, param)).unwrap();
        let got = logits(&Model::open(&merged).unwrap(), None, name, |param| {
            Model::open(&merged).unwrap().values(param).unwrap()
        });
        assert!(worst(&got, &want) < 1e-4, "{name}");
    }
    let error = Adapter::open(&folder("llama_patterns"), &base("llama")).unwrap();
    let error = error.save_gguf(Path::new("unwritten.gguf")).unwrap_err().to_string();
    assert!(error.contains("trained whole"), "{error}");
}

#[test]
fn hostile_gguf_adapters_are_errors_that_name_the_key_or_tensor() {
    let (model, dir) = (base("llama"), tempfile::tempdir().unwrap());
    let path = dir.path().join("adapter.gguf");
    Adapter::open(&folder("llama"), &model).unwrap().save_gguf(&path).unwrap();
    let good = throughline::format::Weights::open(&path).unwrap();
    let write = |metadata: &Metadata, rename: Change| {
        let out = dir.path().join("wrong.gguf");
        let mut tensors = vec![];
        for tensor in good.iter() {
            let dims = tensor.shape().dims().to_vec();
            if let Some((name, dims)) = rename(tensor.name()).map(|(n, d)| (n, if d.is_empty() { dims } else { d })) {
                tensors.push(GgufTensor { name, shape: dims.into(), stored: Stored::F32 });
            }
        }
        let sizes: Vec<usize> = tensors.iter().map(|t| t.shape.len()).collect();
        let mut file = GgufWriter::create(&out, metadata, tensors).unwrap();
        sizes.iter().for_each(|&n| file.write_values(&vec![0.5; n]).unwrap());
        file.finish().unwrap();
        Adapter::open(&out, &model).map(drop).map_err(|e| e.to_string())
    };
    let same: Change = |name| Some((name.to_string(), vec![]));
    write(good.metadata(), same).unwrap();
    for (key, value) in [("general.type", "model"), ("adapter.type", "dora"), ("general.architecture", "qwen2")] {
        let mut metadata = good.metadata().clone();
        metadata.set(key, value);
        let error = write(&metadata, same).unwrap_err();
        assert!(error.contains("wrong.gguf") && error.contains(key) && error.contains(value), "{error}");
    }
    let mut metadata = good.metadata().clone();
    metadata.set("adapter.lora.alpha", f32::NAN);
    assert!(write(&metadata, same).unwrap_err().contains("wrong.gguf"));
    let changes: [(&str, Change); 4] = [
        ("blk.0.attn_q", |n| (n != "blk.0.attn_q.weight.lora_a").then(|| (n.into(), vec![]))),
        ("blk.9.attn_q", |n| Some((n.replace("blk.0.attn_q", "blk.9.attn_q"), vec![]))),
        ("blk.0.attn_q.weight.lora_a", |n| {
            Some((n.into(), if n.contains("0.attn_q.weight.lora_a") { vec![4, 31] } else { vec![] }))
        }),
        ("blk.0.attn_q.bias", |n| Some((n.replace("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.bias"), vec![]))),
    ];
    for (named, change) in changes {
        let error = write(good.metadata(), change).unwrap_err();
        assert!(error.contains("wrong.gguf") && error.contains(named), "{named}: {error}");
    }
}

/// A copy of the adapter for the Llama, changed: its configuration, and its tensors by name.
fn changed(config: impl Fn(&mut Json), tensors: impl Fn(&mut Tensors)) -> Result<Adapter, String> {
    let read = |file: &str| std::fs::read(folder("llama").join(file)).unwrap();
    let mut json: Json = serde_json::from_slice(&read("adapter_config.json")).unwrap();
    config(&mut json);
    let bytes = read("adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let plain = |view: &TensorView<'_>| (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data()));
    let mut all = file.iter().map(|(name, view)| (name.to_string(), plain(&view))).collect();
    tensors(&mut all);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), json.to_string()).unwrap();
    let views = all.iter().map(|(name, (shape, values))| {
        let bytes = bytemuck::cast_slice(values);
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), file).unwrap();
    Adapter::open(dir.path(), &base("llama")).map_err(|e| e.to_string())
}

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

#[test]
fn hostile_settings_are_errors_that_name_the_field() {
    changed(|_| {}, |_| {}).unwrap();
    let wrong = [
        ("r", json!(0)),
        ("r", json!(5)),
        ("r", json!(-1)),
        ("r", json!(1e300)),
        ("r", Json::Null),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(0)),
        ("lora_alpha", json!(1e300)),
        ("peft_type", json!("IA3")),
        ("peft_type", Json::Null),
        ("bias", json!("all")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("rank_pattern", json!({"q_proj": 2})),
        ("rank_pattern", json!({"(": 2})),
        ("rank_pattern", json!([2])),
        ("alpha_pattern", json!({"q_proj": "much"})),
        ("layer_replication", json!([[0, 2]])),
    ];
    for (key, value) in wrong {
        let error = changed(|config| config[key] = value.clone(), |_| {}).unwrap_err();
        assert!(error.contains("adapter_config.json") && error.contains(key), "{key} {value}: {error}");
    }
}

#[test]
fn hostile_tensors_are_errors_that_name_the_tensor() {
    let check = |what: &str, named: &str, change: &dyn Fn(&mut Tensors)| {
        let error = changed(|_| {}, change).unwrap_err();
        assert!(error.contains("adapter_model.safetensors") && error.contains(named), "{what}: {error}");
    };
    let (q, up) = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj");
    check("half of a pair", q, &|all| drop(all.remove(A)));
    check("the other half", q, &|all| drop(all.remove(B)));
    check("another width", q, &|all| drop(all.insert(A.into(), (vec![4, 31], vec![0.0; 4 * 31]))));
    check("transposed", q, &|all| drop(all.insert(B.into(), (vec![4, 32], vec![0.0; 4 * 32]))));
    check("one dimension", q, &|all| drop(all.insert(A.into(), (vec![128], vec![0.0; 128]))));
    check("no rows", q, &|all| drop(all.insert(A.into(), (vec![0, 32], vec![]))));
    check("not finite", q, &|all| all.get_mut(A).unwrap().1[7] = f32::NAN);
    check("infinite", up, &|all| all.get_mut(&A.replace(q, up)).unwrap().1[0] = f32::INFINITY);
    let rename = |from: &'static str, to: &str| {
        let to = to.to_string();
        move |all: &mut Tensors| {
            for matrix in ["lora_A", "lora_B"] {
                let name = A.replace("lora_A", matrix);
                let tensor = all.remove(&name).unwrap();
                all.insert(name.replace(from, &to), tensor);
            }
        }
    };
    check("a layer too many", "layers.7", &rename("layers.0", "layers.7"));
    check("an unknown layer", "w_pack", &rename("q_proj", "w_pack"));
    check("no prefix", "model.layers.0", &rename("base_model.model.", ""));
    check("of a table", "lora_embedding_A", &|all| {
        all.insert("base_model.model.model.embed_tokens.lora_embedding_A".into(), (vec![4, 96], vec![0.0; 384]));
    });
    check("an unknown parameter", "model.norm.bias", &|all| {
        all.insert("base_model.model.model.norm.bias".into(), (vec![32], vec![0.0; 32]));
    });
}

#[test]
fn an_adapter_of_another_model_is_an_error() {
    let error = Adapter::open(&folder("llama"), &base("gpt2")).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors") && error.contains("no linear layer"), "{error}");
    let error = Adapter::open(&folder("gpt2"), &base("llama")).unwrap_err().to_string();
    assert!(error.contains("c_attn"), "{error}");
    let error = Adapter::open(&folder("nothing"), &base("llama")).unwrap_err().to_string();
    assert!(error.contains("nothing"), "{error}");
}

#[test]
fn targets_have_the_names_of_other_software_or_ours() {
    let (llama, gpt2) = (base("llama"), base("gpt2"));
    let targets = |model: &Model, names: &[&str]| model.lora(Lora::new(4, 8.0), names).unwrap();
    assert_eq!(targets(&llama, &["q_proj", "mlp.up_proj"]).targets, ["attn.q", "mlp.up"]);
    assert_eq!(targets(&llama, &["layers.1.self_attn.o_proj", "v"]).targets, ["h.1.attn.o", "attn.v"]);
    assert_eq!(targets(&llama, &["all-linear"]), Lora::new(4, 8.0));
    let stacked = targets(&gpt2, &["c_attn"]);
    assert_eq!(
        (&stacked.targets[..], stacked.shared_qkv),
        (&["attn.q", "attn.k", "attn.v"].map(String::from)[..], true)
    );
    assert!(targets(&gpt2, &["all-linear"]).shared_qkv && !targets(&gpt2, &["c_fc"]).shared_qkv);
    let settings = Lora { trained: vec!["lm_head".into(), "input_layernorm".into()], ..Lora::new(4, 8.0) };
    assert_eq!(llama.lora(settings, &["q_proj"]).unwrap().trained, ["head", "attn_norm"]);
    let error = llama.lora(Lora::new(4, 8.0), &["c_attn"]).unwrap_err().to_string();
    assert!(error.contains("`lora.targets`") && error.contains("`c_attn`") && error.contains("`gate_proj`"), "{error}");
    let settings = Lora { trained: vec!["wte".into()], ..Lora::new(4, 8.0) };
    let error = llama.lora(settings, &["q_proj"]).unwrap_err().to_string();
    assert!(error.contains("`lora.trained`") && error.contains("`wte`"), "{error}");
}
