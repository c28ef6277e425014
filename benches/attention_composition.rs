//! Compares attention with what it replaces: matmul, scale, softmax, matmul, with the matrix of scores in memory.
//! Forward and backward on the same adapter; causal, 6 heads of 64, T 256 and 1024.
//!
//! The comparison favours the composition: its inputs are stored head by head, so that it needs no transposes, and it
//! applies no mask. It does compute the scores that a mask would hide, since matmuls cannot skip triangles.

mod measure;

use std::sync::Arc;
use std::time::Duration;

use measure::Clock;
use throughline::ops::attention::Attention;
use throughline::ops::matmul::Matmul;
use throughline::{ExecOptions, Executable, Gpu, Graph, Plan, Result, TensorType, Value};

const HEADS: usize = 6;
const WIDTH: usize = 64;

fn main() -> Result<()> {
    let gpu = Gpu::headless_blocking()?;
    println!("{}", gpu.describe());
    let clock = Clock::of(&gpu);
    for time in [256, 1024] {
        let fused = times(&gpu, &[1, time, HEADS * WIDTH], |g, [q, k, v]| {
            let op = Attention { heads: HEADS, kv_heads: HEADS, causal: true, scale: None };
            g.attention("attention", q, k, v, op)
        })?;
        let composed = times(&gpu, &[HEADS, time, WIDTH], |g, [q, k, v]| {
            let nt = Matmul { batch: true, transpose_b: true, ..Matmul::default() };
            let scores = g.op("scores", nt, &[q, k])?[0];
            let scaled = g.scale("scaled", scores, 1.0 / (WIDTH as f32).sqrt())?;
            let weights = g.softmax("weights", scaled)?;
            let nn = Matmul { batch: true, ..Matmul::default() };
            Ok(g.op("sums", nn, &[weights, v])?[0])
        })?;
        for (i, pass) in ["forward", "backward"].into_iter().enumerate() {
            let (f, c) = (fused[i] * 1e3, composed[i] * 1e3);
            println!(
                "T {time} {pass}: attention {f:.2} ms of {clock:?} time, composition {c:.2} ms: {:.1} times as long",
                c / f
            );
        }
    }
    Ok(())
}

/// Seconds of forward and of backward of `f` on inputs of this shape. Backward is a run of both less forward.
fn times(gpu: &Gpu, dims: &[usize], f: impl Fn(&mut Graph, [Value; 3]) -> Result<Value>) -> Result<[f64; 2]> {
    let mut g = Graph::new();
    let ty = TensorType::f32(dims);
    let [q, k, v, dy] = ["q", "k", "v", "dy"].map(|name| g.input(name, ty.clone()));
    let (inputs, dy) = ([q?, k?, v?], dy?);
    let y = f(&mut g, inputs)?;
    let product = g.mul("product", y, dy)?;
    let loss = g.sum("loss", product)?;
    let grads = g.gradients(loss, &inputs)?;
    let forward = time(gpu, Plan::new(&g, &[y], gpu.profile())?, &inputs)?;
    let both = time(gpu, Plan::new(&g, &[&[y], &grads[..]].concat(), gpu.profile())?, &[&inputs[..], &[dy]].concat())?;
    Ok([forward, both - forward])
}

fn time(gpu: &Gpu, plan: Plan, inputs: &[Value]) -> Result<f64> {
    let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
    for &value in inputs {
        let n = exec.tensor(value)?.ty().len();
        exec.write(value, &(0..n).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect::<Vec<f32>>())?;
    }
    Ok(Clock::of(gpu).seconds(&exec, Duration::from_secs(2)))
}
