//! The tasks on Burn with its wgpu backend (WGSL), fusion and autotuning, as its users would write them.

use std::time::Duration;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::activation::{gelu, softmax};
use shapes::{Gpt, Task, arguments, measure, not_offered, numbers};

const LIBRARY: &str = "burn 0.22.1 (wgpu)";

fn main() {
    let (name, task, time) = arguments();
    // A GPU, or else the software adapter.
    let device = Device::wgpu(DeviceKind::DefaultDevice);
    eprintln!("{device:?}");
    match task {
        Task::Matmul(n) => matmul(&device, &name, time, n),
        Task::Train(gpt) => train(&device.autodiff(), &name, time, gpt),
        Task::SmolLm2(_) => not_offered(LIBRARY, &name),
    }
}

fn matmul(device: &Device, name: &str, time: Duration, n: usize) {
    let matrix = |seed| Tensor::<2>::from_data(TensorData::new(numbers(seed, n * n), [n, n]), device);
    let (a, b) = (matrix(1), matrix(2));
    let run = || {
        let y = a.clone().matmul(b.clone());
        device.sync().expect("a product");
        y
    };
    let first = |y: Tensor<2>| y.into_data().try_to_vec::<f32>().expect("floats")[0].into();
    measure(LIBRARY, name, time, run, first);
}

#[derive(Module, Debug)]
struct Block {
    attn_norm: LayerNorm,
    qkv: Linear,
    out: Linear,
    mlp_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Model {
    embed: Embedding,
    position: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
    heads: usize,
}

impl Model {
    fn new(gpt: Gpt, device: &Device) -> Self {
        let d = gpt.d_model;
        let norm = || LayerNormConfig::new(d).init(device);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let block = || Block {
            attn_norm: norm(),
            qkv: linear(d, 3 * d),
            out: linear(d, d),
            mlp_norm: norm(),
            up: linear(d, 4 * d),
            down: linear(4 * d, d),
        };
        Model {
            embed: EmbeddingConfig::new(gpt.vocab, d).init(device),
            position: EmbeddingConfig::new(gpt.context, d).init(device),
            blocks: (0..gpt.layers).map(|_| block()).collect(),
            norm: norm(),
            head: LinearConfig::new(d, gpt.vocab).with_bias(false).init(device),
            heads: gpt.heads,
        }
    }

    /// Logits `[batch, time, vocab]` of tokens `[batch, time]`. `hidden` is true where a query may not look.
    fn forward(&self, tokens: Tensor<2, Int>, hidden: &Tensor<4, Bool>) -> Tensor<3> {
        let [batch, time] = tokens.dims();
        let positions = Tensor::<1, Int>::arange(0..time as i64, &tokens.device()).reshape([1, time]);
        let mut stream = self.embed.forward(tokens) + self.position.forward(positions);
        let d = stream.dims()[2];
        let per_head = d / self.heads;
        for block in &self.blocks {
            let qkv = block.qkv.forward(block.attn_norm.forward(stream.clone()));
            let heads = |part: Tensor<3>| part.reshape([batch, time, self.heads, per_head]).swap_dims(1, 2);
            let [q, k, v] = <[_; 3]>::try_from(qkv.chunk(3, 2)).expect("three chunks").map(heads);
            let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar(1.0 / (per_head as f64).sqrt());
            let mixed = softmax(scores.mask_fill(hidden.clone(), -1e9), 3).matmul(v);
            stream = stream + block.out.forward(mixed.swap_dims(1, 2).reshape([batch, time, d]));
            let inner = gelu(block.up.forward(block.mlp_norm.forward(stream.clone())));
            stream = stream + block.down.forward(inner);
        }
        self.head.forward(self.norm.forward(stream))
    }
}

fn train(device: &Device, name: &str, time: Duration, gpt: Gpt) {
    let Gpt { context, batch, vocab, heads, .. } = gpt;
    let mut model = Some(Model::new(gpt, device));
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let hidden: Vec<bool> = (0..context * context).map(|i| i % context > i / context).collect();
    let hidden = Tensor::<4, Bool>::from_data(TensorData::new(hidden, [1, 1, context, context]), device)
        .expand([batch, heads, context, context]);
    let cross_entropy = CrossEntropyLossConfig::new().init(device);
    let mut steps = 0..;
    let run = || {
        let (tokens, targets) = gpt.batch(steps.next().unwrap_or_default());
        let ids = |ids: Vec<u32>| ids.into_iter().map(|id| id as i32).collect::<Vec<_>>();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids(tokens), [batch, context]), device);
        let targets = Tensor::<1, Int>::from_data(TensorData::new(ids(targets), [batch * context]), device);
        let current = model.take().expect("a model");
        let logits = current.forward(tokens, &hidden).reshape([batch * context, vocab]);
        let loss = cross_entropy.forward(logits, targets);
        let gradients = GradientsParams::from_grads(loss.backward(), &current);
        model = Some(optimizer.step(1e-3, current, gradients));
        let loss: f32 = loss.into_scalar();
        device.sync().expect("a step");
        loss
    };
    measure(LIBRARY, name, time, run, f64::from);
}
