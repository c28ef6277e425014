//! The tasks on throughline.

use std::time::Duration;

use shapes::{Task, arguments, measure, numbers};
use throughline::nn::TransformerConfig;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, Trainer};
use throughline::{ExecOptions, Executable, Gpu, Graph, Result, TensorType};

const LIBRARY: &str = "throughline";

fn main() -> Result<()> {
    let (name, task, time) = arguments();
    let gpu = Gpu::headless_blocking()?;
    eprintln!("{}", gpu.describe());
    match task {
        Task::Matmul(n) => matmul(&gpu, &name, time, n),
        Task::Train(gpt) => {
            let config = TransformerConfig::gpt2(gpt.vocab, gpt.context, gpt.layers, gpt.d_model, gpt.heads);
            train(&gpu, &name, time, config, gpt.batch, |step| gpt.batch(step))
        }
        Task::SmolLm2(context) => {
            let config = TransformerConfig {
                n_kv_heads: 3,
                d_ff: 1536,
                tied_head: true,
                ..TransformerConfig::llama(shapes::SMOLLM2_VOCAB, context, 30, 576, 9)
            };
            train(&gpu, &name, time, config, 1, |_| shapes::smollm2_batch(context))
        }
    }
}

fn matmul(gpu: &Gpu, name: &str, time: Duration, n: usize) -> Result<()> {
    let mut g = Graph::new();
    let a = g.input("a", TensorType::f32([n, n]))?;
    let b = g.input("b", TensorType::f32([n, n]))?;
    let y = g.matmul("y", a, b)?;
    let exec = Executable::new_blocking(gpu, gpu.plan(&g, &[y])?.into(), ExecOptions::default())?;
    exec.write(a, &numbers(1, n * n))?;
    exec.write(b, &numbers(2, n * n))?;
    let run = || exec.submit().and_then(|_| gpu.wait_blocking()).expect("a product");
    measure(LIBRARY, name, time, run, |()| exec.read_blocking::<f32>(y).expect("a product")[0].into());
    Ok(())
}

fn train(
    gpu: &Gpu,
    name: &str,
    time: Duration,
    model: TransformerConfig,
    batch: usize,
    mut data: impl FnMut(u64) -> (Vec<u32>, Vec<u32>),
) -> Result<()> {
    let mut trainer = Trainer::new_blocking(gpu, TrainConfig::new(model, batch))?;
    let mut steps = 0..;
    let run = || {
        let (tokens, targets) = data(steps.next().unwrap_or_default());
        trainer.step(&[Batch::new(tokens, targets)]).and_then(|loss| loss.wait_blocking()).expect("a step")
    };
    measure(LIBRARY, name, time, run, f64::from);
    Ok(())
}
