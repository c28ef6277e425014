//! Muon: against f64 and PyTorch, its effect on singular values, and invalid settings. Training runs with it are in
//! tests/training.rs.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles, repository, write};
use safetensors::SafeTensors;
use throughline::nn::{Transformer, TransformerConfig, is_hidden_matrix};
use throughline::ops::muon::MuonStep;
use throughline::ops::random_array;
use throughline::optim::{
    AdamWConfig, Arena, ArenaLayout, MuonConfig, MuonScale, Optimizer, OptimizerConfig, Schedule,
};
use throughline::reference::{self, Array, nmse};
use throughline::train::{TrainConfig, Trainer};
use throughline::{ExecOptions, Executable, Graph, Plan, TensorType, Value};

/// A row-major matrix in f64: the plain way to write the method down.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn transposed(&self) -> Matrix {
        let data = (0..self.data.len()).map(|i| self.data[i % self.rows * self.cols + i / self.rows]).collect();
        Matrix { rows: self.cols, cols: self.rows, data }
    }

    fn times(&self, other: &Matrix) -> Matrix {
        let mut y = Matrix { rows: self.rows, cols: other.cols, data: vec![0.0; self.rows * other.cols] };
        for i in 0..self.rows {
            for k in 0..self.cols {
                for j in 0..other.cols {
                    y.data[i * other.cols + j] += self.data[i * self.cols + k] * other.data[k * other.cols + j];
                }
            }
        }
        y
    }

    /// `a self + b other`.
    fn combine(&self, a: f64, b: f64, other: &Matrix) -> Matrix {
        let data = self.data.iter().zip(&other.data).map(|(x, y)| a * x + b * y).collect();
        Matrix { data, ..*self }
    }

    fn norm(&self) -> f64 {
        self.data.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    /// As published: on the matrix that has no more rows than columns.
    fn newton_schulz(&self, steps: usize) -> Matrix {
        if self.rows > self.cols {
            return self.transposed().newton_schulz(steps).transposed();
        }
        let mut x = self.combine(1.0 / (self.norm() + 1e-7), 0.0, self);
        for _ in 0..steps {
            let a = x.times(&x.transposed());
            let b = a.combine(-4.7750, 2.0315, &a.times(&a));
            x = x.combine(3.4445, 1.0, &b.times(&x));
        }
        x
    }

    /// Singular values, by Jacobi's rotations of pairs of rows until all are at right angles.
    fn singular_values(&self) -> Vec<f64> {
        if self.rows > self.cols {
            return self.transposed().singular_values();
        }
        let mut rows: Vec<Vec<f64>> = self.data.chunks_exact(self.cols).map(<[f64]>::to_vec).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        for _ in 0..12 {
            for j in 1..rows.len() {
                for i in 0..j {
                    let (aa, bb, ab) = (dot(&rows[i], &rows[i]), dot(&rows[j], &rows[j]), dot(&rows[i], &rows[j]));
                    let angle = 0.5 * (2.0 * ab).atan2(aa - bb);
                    let (sin, cos) = angle.sin_cos();
                    let (head, tail) = rows.split_at_mut(j);
                    for (a, b) in head[i].iter_mut().zip(&mut tail[0]) {
                        (*a, *b) = (cos * *a + sin * *b, cos * *b - sin * *a);
                    }
                }
            }
        }
        rows.iter().map(|r| dot(r, r).sqrt()).collect()
    }
}

fn matrices(array: &Array) -> Vec<Matrix> {
    let [.., rows, cols] = *array.shape.dims() else { panic!("{}", array.shape) };
    array.data.chunks_exact(rows * cols).map(|data| Matrix { rows, cols, data: data.to_vec() }).collect()
}

const SETTINGS: [f64; 4] = [0.1, 0.9, 0.2, 3.0];

/// Parameter and momentum after a step, by the book.
fn by_the_book([param, grad, m]: [&Array; 3], norm: f64, step: MuonStep) -> [Array; 2] {
    let [lr, momentum, decay, max_norm] = SETTINGS;
    let clip = (max_norm / (norm + 1e-6)).min(1.0);
    let mut new = [vec![], vec![]];
    for ((p, g), m) in matrices(param).into_iter().zip(matrices(grad)).zip(matrices(m)) {
        let g = g.combine(clip, 0.0, &g);
        let m = m.combine(momentum, 1.0 - momentum, &g);
        let u = if step.nesterov { g.combine(1.0 - momentum, momentum, &m) } else { m.clone() };
        let p = p.combine(1.0 - lr * decay, -lr * step.rate, &u.newton_schulz(step.steps));
        new[0].extend(p.data);
        new[1].extend(m.data);
    }
    new.map(|data| Array::new(param.shape.clone(), data))
}

/// A step as a graph: its inputs, and the new parameter and momentum.
fn graph(shape: &[usize], step: MuonStep) -> (Graph, [Value; 5], [Value; 2]) {
    let mut g = Graph::new();
    let mut input = |name: &str, shape: &[usize]| g.input(name, TensorType::f32(shape)).unwrap();
    let [param, grad, m] = ["param", "grad", "m"].map(|name| input(name, shape));
    let (hyper, norm) = (input("hyper", &[4]), input("norm", &[1]));
    let new = g.muon("muon", [param, grad, m], hyper, norm, step).unwrap();
    (g, [param, grad, m, hyper, norm], new)
}

/// Three steps with momentum, of every form of matrix, by each class of kernels and by the interpreter.
#[test]
fn steps_match_f64() {
    let shapes: [&[usize]; 8] =
        [&[127, 33], &[33, 127], &[3, 64, 64], &[1, 9], &[9, 1], &[2, 130, 68], &[7, 5], &[4, 24, 65]];
    let mut worst = 0f64;
    for (i, shape) in shapes.into_iter().enumerate() {
        let step = MuonStep { nesterov: i % 3 != 2, steps: 5, rate: 0.7 };
        let (g, inputs, new) = graph(shape, step);
        let mut wanted = [random_array(&shape.into(), 1), Array::zeros(shape)];
        let executables = profiles().into_iter().map(|profile| {
            let plan = Plan::new(&g, &new, &profile).unwrap();
            Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap()
        });
        let executables: Vec<Executable> = executables.collect();
        let mut states = vec![wanted.clone(); executables.len()];
        for turn in 0..3 {
            let grad = random_array(&shape.into(), 10 + turn);
            let norm = grad.dot(&grad).sqrt();
            let others = [Array::new([4], SETTINGS.to_vec()), Array::new([1], vec![norm])];
            let given = |[param, m]: &[Array; 2]| {
                let values = [param.clone(), grad.clone(), m.clone(), others[0].clone(), others[1].clone()];
                inputs.into_iter().zip(values).collect::<HashMap<Value, Array>>()
            };
            let interpreted = reference::run(&g, &given(&wanted), &new).unwrap();
            wanted = by_the_book([&wanted[0], &grad, &wanted[1]], norm, step);
            for (got, want) in interpreted.iter().zip(&wanted) {
                let got: Vec<f32> = got.data.iter().map(|&x| x as f32).collect();
                assert!(nmse(&got, &want.data) < 1e-12, "{shape:?}: the interpreter differs");
            }
            for (exec, state) in executables.iter().zip(&mut states) {
                given(state).iter().for_each(|(value, array)| write(exec, *value, array));
                exec.submit().unwrap();
                for ((state, value), want) in state.iter_mut().zip(new).zip(&wanted) {
                    let got: Vec<f32> = exec.read_blocking(value).unwrap();
                    let error = nmse(&got, &want.data);
                    worst = worst.max(error);
                    assert!(error < 1e-9, "{shape:?}, step {turn}: NMSE {error:.1e}");
                    state.data = got.iter().map(|&x| f64::from(x)).collect();
                }
            }
        }
    }
    println!("NMSE at most {worst:.1e}");
}

/// What a step of rate 1 takes from a parameter of zeros.
fn update_of(grad: &Array, steps: usize) -> Vec<Matrix> {
    let step = MuonStep { nesterov: true, steps, rate: 1.0 };
    let (g, inputs, new) = graph(grad.shape.dims(), step);
    let plan = Plan::new(&g, &new, gpu().profile()).unwrap();
    let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
    let zeros = Array::zeros(grad.shape.clone());
    let others = [Array::new([4], vec![1.0, 0.9, 0.0, 0.0]), Array::zeros([1])];
    for (value, array) in inputs.into_iter().zip([&zeros, grad, &zeros, &others[0], &others[1]]) {
        write(&exec, value, array);
    }
    exec.submit().unwrap();
    let got: Vec<f32> = exec.read_blocking(new[0]).unwrap();
    matrices(&Array::new(grad.shape.clone(), got.iter().map(|&x| -f64::from(x)).collect()))
}

/// All singular values near 1, whatever the size of the gradient: the iteration takes 0.004 .. 1 to 0.68 .. 1.21.
#[test]
fn updates_are_nearly_orthogonal() {
    let shapes: [&[usize]; 4] = [&[2, 48, 96], &[96, 48], &[2, 64, 64], &[1, 40]];
    let (mut low, mut high) = (f64::INFINITY, 0f64);
    for shape in shapes {
        for scale in [1e-3, 1.0, 1e3] {
            let grad = random_array(&shape.into(), 3).map(|x| scale * x);
            for (x, g) in update_of(&grad, 5).iter().zip(matrices(&grad)) {
                let mut inputs = g.singular_values();
                inputs.sort_by(f64::total_cmp);
                // What is nearly zero stays small: five iterations make it at most 3.4445^5 = 485 times as large.
                let tiny = inputs.iter().filter(|s| **s < 4e-3 * g.norm()).count();
                let mut values = x.singular_values();
                values.sort_by(f64::total_cmp);
                low = low.min(values[tiny]);
                high = high.max(values[values.len() - 1]);
            }
        }
    }
    println!("singular values from {low:.3} to {high:.3}");
    assert!(low > 0.67 && high < 1.21, "{low} to {high}");
}

/// A gradient of zeros changes nothing but by weight decay, and makes no NaN.
#[test]
fn zeros_are_no_direction() {
    for x in update_of(&Array::zeros([2, 12, 8]), 5) {
        assert!(x.data.iter().all(|x| *x == 0.0));
    }
}

/// Four steps of `torch.optim.Muon`, beside one of its AdamW.
#[test]
fn steps_match_pytorch() {
    let bytes = std::fs::read(repository("tests/data/muon.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |name: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
    let shape = |name: &str| file.tensor(&format!("start/{name}")).unwrap().shape().to_vec();
    let names = ["wide", "tall", "bias", "square.0", "odd", "square.1"];
    let tensors = names.iter().map(|name| (name.to_string(), shape(name).into())).collect();
    let layout = Arc::new(ArenaLayout::with_muon(tensors, u64::MAX, |_, _| true).unwrap());
    let base = MuonConfig { momentum: 0.9, weight_decay: 0.3, scale: MuonScale::Original, ..MuonConfig::default() };
    let matching = MuonConfig { nesterov: false, scale: MuonScale::MatchAdamW, ..base };
    for (setting, muon, max_grad_norm) in [("original", base, 0.0), ("match", matching, 0.0), ("clipped", base, 0.5)] {
        let [params, grads] = ["params", "grads"].map(|label| Arena::zeros(gpu(), label, &layout).unwrap());
        params.write(gpu(), &names.map(|name| values(&format!("start/{name}")))).unwrap();
        let adamw = AdamWConfig { weight_decay: 0.0, max_grad_norm, ..AdamWConfig::default() };
        let config = OptimizerConfig::Muon { muon, adamw };
        let optimizer = Optimizer::new_blocking(gpu(), config, &params, &grads).unwrap();
        for step in 0..4 {
            grads.write(gpu(), &names.map(|name| values(&format!("grad/{step}/{name}")))).unwrap();
            let mut encoder = gpu().device().create_command_encoder(&Default::default());
            optimizer.record(&mut encoder, 0.02, step).unwrap();
            gpu().queue().submit([encoder.finish()]);
        }
        for (name, got) in names.iter().zip(params.read_blocking(gpu()).unwrap()) {
            let want = values(&format!("{setting}/{name}"));
            let worst = common::worst(&got, &want);
            println!("{setting} {name}: {worst:.1e}");
            assert!(worst < 2e-6, "{setting} {name}: {worst:.1e}");
        }
    }
}

fn config(muon: MuonConfig) -> TrainConfig {
    let (schedule, adamw) = (Schedule::constant(1e-3), AdamWConfig::default());
    let model = TransformerConfig::llama(31, 16, 1, 32, 4);
    TrainConfig { schedule, adamw, muon: Some(muon), seed: 7, ..TrainConfig::new(model, 2) }
}

#[test]
fn bad_settings_are_named() {
    let base = MuonConfig::default();
    let bad = [
        ("muon.momentum", MuonConfig { momentum: 1.0, ..base }),
        ("muon.momentum", MuonConfig { momentum: f64::NAN, ..base }),
        ("muon.steps", MuonConfig { steps: 0, ..base }),
        ("muon.steps", MuonConfig { steps: 1000, ..base }),
        ("muon.lr_factor", MuonConfig { lr_factor: -1.0, ..base }),
        ("muon.weight_decay", MuonConfig { weight_decay: f64::INFINITY, ..base }),
    ];
    for (field, muon) in bad {
        let err = Trainer::new_blocking(gpu(), config(muon)).unwrap_err().to_string();
        assert!(err.contains(field), "{err}");
    }
    // A layout that knows of no matrices for it.
    let layout = Arc::new(ArenaLayout::new(vec![("w".into(), [8, 8].into())], u64::MAX).unwrap());
    let arena = Arena::zeros(gpu(), "all", &layout).unwrap();
    let muon = OptimizerConfig::Muon { muon: base, adamw: AdamWConfig::default() };
    let err = Optimizer::new_blocking(gpu(), muon, &arena, &arena).unwrap_err().to_string();
    assert!(err.contains("muon") && err.contains("with_muon"), "{err}");
    // Shapes that are no matrices, and a batch that lies across quads.
    for (shape, what) in [(&[8][..], "matrix"), (&[2, 3, 5], "multiple of 4")] {
        let mut g = Graph::new();
        let [p, grad, m] = ["p", "g", "m"].map(|name| g.input(name, TensorType::f32(shape)).unwrap());
        let [hyper, norm] = [("hyper", 4), ("norm", 1)].map(|(name, n)| g.input(name, TensorType::f32([n])).unwrap());
        let step = MuonStep { nesterov: true, steps: 5, rate: 1.0 };
        let err = g.muon("muon", [p, grad, m], hyper, norm, step).unwrap_err().to_string();
        assert!(err.contains(what), "{err}");
    }
}

/// Settings that were written before there was Muon are AdamW's; what is not given is the default.
#[test]
fn settings_have_defaults() {
    let mut json = serde_json::to_value(config(MuonConfig::default())).unwrap();
    json["muon"] = serde_json::json!({ "momentum": 0.9, "scale": "original" });
    let read: TrainConfig = serde_json::from_value(json.clone()).unwrap();
    let want = MuonConfig { momentum: 0.9, scale: MuonScale::Original, ..MuonConfig::default() };
    assert_eq!(read.muon, Some(want));
    json.as_object_mut().unwrap().remove("muon");
    assert_eq!(serde_json::from_value::<TrainConfig>(json).unwrap().muon, None);
}

#[test]
fn hidden_matrices_are_those_of_linear_layers() {
    for model in [TransformerConfig::gpt2(300, 16, 2, 32, 4), TransformerConfig::llama(300, 16, 2, 32, 4)] {
        let mut g = Graph::with_max_tensor_bytes(20 << 10); // so that tables are in parts
        let gpt = Transformer::build(&mut g, &model, 1, 16, true).unwrap();
        let is_hidden = |&p: &Value| is_hidden_matrix(g.name(p), &g.ty(p).shape);
        let hidden = gpt.params.iter().copied().filter(is_hidden).map(|p| g.name(p));
        let mut last: Vec<String> = hidden.map(|name| name[4..].to_string()).collect();
        last.sort();
        last.dedup();
        let mut want = vec!["attn.k.weight", "attn.o.weight", "attn.q.weight", "attn.v.weight", "mlp.down.weight"];
        if !model.tied_head {
            want.push("mlp.gate.weight");
        }
        want.push("mlp.up.weight");
        assert_eq!(last, want);
    }
}
