// Small models with arbitrary weights, for doctests that open one. They include this file in hidden lines:
//
//     # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
//     # let folder = doctest::qwen3();

use std::collections::BTreeMap;
use tempfile::TempDir;
use throughline::format::{SaveTensor, Stored, save_safetensors};
use throughline::model;
use throughline::nn::TransformerConfig;
use throughline::optim::ArenaLayout;

/// Values between -1 and 1 that differ from each other.
fn weights(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32).sin()).collect()
}

/// A folder with a Qwen 3: 32 tokens, one block, `d_model` 16.
#[allow(dead_code)]
pub fn qwen3() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = TransformerConfig { qk_norm: true, tied_head: true, ..TransformerConfig::llama(32, 64, 1, 16, 2) };
    let tensors = ArenaLayout::of_model(&config, u64::MAX).unwrap().tensors;
    let params: Vec<_> = tensors.into_iter().map(|(name, shape)| (name, weights(shape.len()))).collect();
    model::save(folder.path(), &config, &params).unwrap();
    folder
}

/// A folder with a BERT: 64 tokens, one block, `d_model` 16.
#[allow(dead_code)]
pub fn bert() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = vec![];
    let mut add = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
    for (name, rows) in [("word", 64), ("position", 32), ("token_type", 2)] {
        add(&format!("embeddings.{name}_embeddings.weight"), &[rows, 16]);
    }
    for (name, d_out, d_in) in [
        ("attention.self.query", 16, 16),
        ("attention.self.key", 16, 16),
        ("attention.self.value", 16, 16),
        ("attention.output.dense", 16, 16),
        ("intermediate.dense", 32, 16),
        ("output.dense", 16, 32),
    ] {
        add(&format!("encoder.layer.0.{name}.weight"), &[d_out, d_in]);
        add(&format!("encoder.layer.0.{name}.bias"), &[d_out]);
    }
    for norm in ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"] {
        add(&format!("{norm}.LayerNorm.weight"), &[16]);
        add(&format!("{norm}.LayerNorm.bias"), &[16]);
    }
    let values: Vec<_> = tensors.iter().map(|(_, shape)| weights(shape.iter().product())).collect();
    let saved = tensors.iter().zip(&values);
    let saved: Vec<_> =
        saved.map(|((name, shape), values)| SaveTensor { name, shape, values, stored: Stored::F32 }).collect();
    save_safetensors(&folder.path().join("model.safetensors"), &saved, &BTreeMap::new()).unwrap();
    let config = r#"{
        "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 64,
        "max_position_embeddings": 32, "type_vocab_size": 2, "num_hidden_layers": 1, "hidden_size": 16,
        "num_attention_heads": 2, "intermediate_size": 32
    }"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

/// A folder of sentence-transformers with this BERT, pooled and normalised.
#[allow(dead_code)]
pub fn sentence_bert() -> TempDir {
    let folder = bert();
    let modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")];
    let modules = modules.map(|(path, class)| {
        format!(r#"{{ "path": "{path}", "type": "sentence_transformers.models.{class}" }}"#)
    });
    std::fs::write(folder.path().join("modules.json"), format!("[{}]", modules.join(","))).unwrap();
    std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    std::fs::write(folder.path().join("1_Pooling/config.json"), r#"{ "pooling_mode": "mean" }"#).unwrap();
    folder
}
