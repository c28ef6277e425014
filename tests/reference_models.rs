//! Whole models against PyTorch: logits, loss, every gradient, ten optimiser steps. The numbers in
//! tests/data were computed with PyTorch 2 in f32 and f64.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, repository};
use safetensors::SafeTensors;
use throughline::nn::{Transformer, TransformerConfig};
use throughline::optim::{Arena, Schedule};
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{DType, ExecOptions, Executable, Graph, Plan, Precision};

/// Shape and elements of the tensors of a file.
type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

fn load(name: &str) -> Tensors {
    let path = repository("tests/data").join(name);
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: &safetensors::tensor::TensorView<'_>| {
        let data = match view.dtype() {
            safetensors::Dtype::U32 => {
                bytemuck::pod_collect_to_vec::<u8, u32>(view.data()).iter().map(|&x| x as f32).collect()
            }
            _ => bytemuck::pod_collect_to_vec(view.data()),
        };
        (view.shape().to_vec(), data)
    };
    file.iter().map(|(name, view)| (name.to_string(), tensor(&view))).collect()
}

/// A model of tests/data: its configuration and how its tensors map to ours.
struct Model {
    name: &'static str,
    config: TransformerConfig,
    /// Values of one of our parameters in a file with the original names, if it is there.
    find: fn(&Tensors, &str) -> Option<Vec<f32>>,
}

fn models() -> [Model; 2] {
    let llama = TransformerConfig { n_kv_heads: 2, d_ff: 136, ..TransformerConfig::llama(65, 32, 2, 48, 4) };
    [
        Model { name: "tiny_gpt2", config: TransformerConfig::gpt2(65, 32, 2, 48, 4), find: gpt2_tensor },
        Model { name: "tiny_llama", config: llama, find: llama_tensor },
    ]
}

/// GPT-2 keeps queries, keys and values in one matrix, side by side.
fn gpt2_tensor(file: &Tensors, name: &str) -> Option<Vec<f32>> {
    let all = [
        ("embed.weight", "wte.weight"),
        ("position.weight", "wpe.weight"),
        ("norm_f.", "ln_f."),
        ("attn_norm.", "ln_1."),
        ("mlp_norm.", "ln_2."),
        ("mlp.up.", "mlp.c_fc."),
        ("mlp.down.", "mlp.c_proj."),
        ("attn.o.", "attn.c_proj."),
        ("attn.q.", "attn.c_attn."),
        ("attn.k.", "attn.c_attn."),
        ("attn.v.", "attn.c_attn."),
    ];
    let (ours, theirs) = all.iter().find(|(ours, _)| name.contains(ours))?;
    let (shape, data) = file.get(&format!("transformer.{}", name.replace(ours, theirs)))?;
    let Some(part) = ["attn.q.", "attn.k.", "attn.v."].iter().position(|p| p == ours) else {
        return Some(data.clone());
    };
    let (cols, d) = (shape[shape.len() - 1], shape[shape.len() - 1] / 3);
    Some(data.chunks_exact(cols).flat_map(|row| row[part * d..(part + 1) * d].to_vec()).collect())
}

/// Llama's files hold linear weights output-major; ours are input-major.
fn llama_tensor(file: &Tensors, name: &str) -> Option<Vec<f32>> {
    let theirs = match name {
        "embed.weight" => "model.embed_tokens.weight".to_string(),
        "norm_f.weight" => "model.norm.weight".to_string(),
        "head.weight" => "lm_head.weight".to_string(),
        _ => {
            let name = name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm");
            let name = ["q", "k", "v", "o"]
                .iter()
                .fold(name, |n, p| n.replace(&format!("attn.{p}."), &format!("self_attn.{p}_proj.")));
            let name = ["gate", "up", "down"]
                .iter()
                .fold(name, |n, p| n.replace(&format!("mlp.{p}."), &format!("mlp.{p}_proj.")));
            name.replace("h.", "model.layers.")
        }
    };
    let (shape, data) = file.get(&theirs)?;
    Some(match shape[..] {
        [rows, cols] if !["model.embed_tokens.weight", "lm_head.weight"].contains(&theirs.as_str()) => {
            (0..rows * cols).map(|i| data[i % rows * cols + i / rows]).collect()
        }
        _ => data.clone(),
    })
}

fn batches(file: &Tensors) -> Vec<Batch> {
    let ids = |name: &str| {
        file[name].1.chunks_exact(96).map(|c| c.iter().map(|&x| x as u32).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    ids("x").into_iter().zip(ids("y")).map(|(tokens, targets)| Batch::new(tokens, targets)).collect()
}

fn numbers(model: &Model) -> serde_json::Value {
    let path = repository("tests/data").join(format!("{}.json", model.name));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn write_params(model: &Model, params: &Arena) {
    let file = load(&format!("{}.safetensors", model.name));
    let values: Vec<Vec<f32>> =
        params.layout.tensors.iter().map(|(name, _)| (model.find)(&file, name).unwrap()).collect();
    params.write(gpu(), &values).unwrap();
}

fn trainer(model: &Model) -> Trainer {
    trainer_in(model, Precision::F32)
}

fn trainer_in(model: &Model, precision: Precision) -> Trainer {
    let config =
        TrainConfig { schedule: Schedule::constant(1e-3), precision, ..TrainConfig::new(model.config.clone(), 3) };
    let trainer = Trainer::new_blocking(gpu(), config).unwrap();
    write_params(model, trainer.params());
    trainer
}

fn norm(x: impl IntoIterator<Item = f32>) -> f64 {
    x.into_iter().map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// The gradient of a key bias is zero in theory (it shifts all scores of a query alike), so what
/// there is of it is rounding noise.
fn is_noise(model: &Model, name: &str) -> bool {
    model.name == "tiny_gpt2" && name.ends_with("attn.k.bias")
}

#[test]
fn logits_match_pytorch() {
    for model in models() {
        let file = load(&format!("{}_batches.safetensors", model.name));
        let mut g = Graph::new();
        let gpt = Transformer::build(&mut g, &model.config, 3, 32, false).unwrap();
        let weights = load(&format!("{}.safetensors", model.name));
        let plan = Plan::new(&g, &[gpt.logits], gpu().profile()).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        for &p in &gpt.params {
            exec.write(p, &(model.find)(&weights, g.name(p)).unwrap()).unwrap();
        }
        exec.write(gpt.tokens, &batches(&file)[0].tokens).unwrap();
        exec.submit().unwrap();
        let got: Vec<f32> = exec.read_blocking(gpt.logits).unwrap();
        let worst = got.iter().zip(&file["logits0"].1).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
        println!("{}: worst difference of a logit {worst:.1e}", model.name);
        assert!(got.len() == 3 * 32 * 65 && worst < 2e-5, "{}: {worst}", model.name);
    }
}

#[test]
fn loss_and_every_gradient_match_pytorch() {
    for model in models() {
        let mut trainer = trainer(&model);
        let batch = batches(&load(&format!("{}_batches.safetensors", model.name))).swap_remove(0);
        let loss = trainer.step(&[batch]).unwrap().wait_blocking().unwrap();
        let want = numbers(&model)["loss"].as_f64().unwrap();
        assert!((f64::from(loss) - want).abs() < 1e-5, "{}: loss {loss}, PyTorch {want}", model.name);
        let file = load(&format!("{}_grads.safetensors", model.name));
        let grads = trainer.grads().read_blocking(gpu()).unwrap();
        for ((name, _), got) in trainer.grads().layout.tensors.iter().zip(grads) {
            let want = (model.find)(&file, name).unwrap();
            let error = norm(got.iter().zip(&want).map(|(g, w)| g - w));
            match is_noise(&model, name) {
                true => assert!(error < 1e-7, "{} {name}: {error:.1e}", model.name),
                false => {
                    let relative = error / norm(want.iter().copied());
                    assert!(relative <= 1e-4, "{} {name}: relative error {relative:.1e}", model.name);
                }
            }
        }
    }
}

/// Under autocast PyTorch rounds to f16 in other places, so its gradients and ours differ as much as each does from f32:
/// by half a thousandth to two thousandths of their norm. Elements that the file lacks are left out.
#[test]
fn gradients_in_mixed_precision_are_as_close_as_pytorchs() {
    for model in models() {
        let file = load(&format!("{}_autocast.safetensors", model.name));
        let full = load(&format!("{}_grads.safetensors", model.name));
        let sparse: Tensors = full
            .iter()
            .map(|(name, (shape, all))| {
                let some = &file[&format!("grad/{name}")].1;
                let stride = all.len().div_ceil(509);
                let element = |i: usize| if i.is_multiple_of(stride) { some[i / stride] } else { f32::NAN };
                (name.clone(), (shape.clone(), (0..all.len()).map(element).collect()))
            })
            .collect();
        let errors: Tensors = full
            .iter()
            .map(|(name, (shape, all))| {
                let error = file[&format!("error/{name}")].1[0];
                (name.clone(), (shape.clone(), vec![error; all.len()]))
            })
            .collect();
        for stream in [DType::F32, DType::F16] {
            let mut trainer = trainer_in(&model, Precision::Mixed { stream });
            let batch = batches(&load(&format!("{}_batches.safetensors", model.name))).swap_remove(0);
            let loss = trainer.step(&[batch]).unwrap().wait_blocking().unwrap();
            let want = file["loss"].1[0];
            assert!((loss - want).abs() < 1e-3, "{}: loss {loss}, PyTorch {want}", model.name);
            let grads = trainer.grads().read_blocking(gpu()).unwrap();
            for ((name, _), got) in trainer.grads().layout.tensors.iter().zip(grads) {
                if is_noise(&model, name) {
                    continue;
                }
                let [theirs, want, error] = [&sparse, &full, &errors].map(|file| (model.find)(file, name).unwrap());
                let relative = norm(got.iter().zip(&want).map(|(g, w)| g - w)) / norm(want.iter().copied());
                let known = || got.iter().zip(&theirs).filter(|(_, t)| !t.is_nan());
                let apart = norm(known().map(|(g, t)| g - t)) / norm(known().map(|(_, t)| *t));
                println!(
                    "{} {name}: {relative:.1e} from f32 (autocast {:.1e}), {apart:.1e} from autocast",
                    model.name, error[0]
                );
                let most = if stream == DType::F32 { 3e-3 } else { 6e-3 };
                assert!(relative < most && apart < most, "{} {name}: {relative:.1e}, {apart:.1e}", model.name);
            }
        }
    }
}

#[test]
fn ten_optimiser_steps_match_pytorch() {
    for model in models() {
        let data = batches(&load(&format!("{}_batches.safetensors", model.name)));
        for (key, varied) in [("losses_fixed", false), ("losses_varied", true)] {
            let mut trainer = trainer(&model);
            let numbers = numbers(&model);
            let want = numbers[key].as_array().unwrap();
            // The 11th loss is the one after the 10th step.
            for (i, want) in want.iter().enumerate() {
                if i == 10 && varied {
                    compare_final_weights(&model, &trainer);
                }
                let batch = data[if varied { i } else { 0 }].clone();
                let loss = f64::from(trainer.step(&[batch]).unwrap().wait_blocking().unwrap());
                let want = want.as_f64().unwrap();
                assert!((loss - want).abs() <= 1e-4, "{} {key} step {i}: {loss}, PyTorch {want}", model.name);
            }
            assert_eq!(want.len(), 11);
        }
    }
}

fn compare_final_weights(model: &Model, trainer: &Trainer) {
    let file: Tensors = load(&format!("{}_batches.safetensors", model.name))
        .into_iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("final/")?.to_string(), t)))
        .collect();
    let mut compared = 0;
    for ((name, _), got) in trainer.params().layout.tensors.iter().zip(trainer.params().read_blocking(gpu()).unwrap()) {
        // The file holds some of the weights only.
        let Some(want) = (model.find)(&file, name) else { continue };
        if !is_noise(model, name) {
            let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(worst < 5e-4, "{} {name}: {worst} after ten steps", model.name);
            compared += 1;
        }
    }
    assert!(compared >= 7, "{}: only {compared} final weights compared", model.name);
}
