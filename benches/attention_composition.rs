//! Attention against what it replaces: matmul, scale, softmax, matmul, with the matrix of scores in
//! memory, on the same adapter, forward and backward. Causal, 6 heads of 64, T 256 and 1024.
//!
//! The composition is favoured: its inputs come head by head, so that it needs no transposes, and it
//! masks nothing. It computes what a mask would hide, since its matmuls know no triangles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use throughline::ops::attention::Attention;
use throughline::ops::matmul::Matmul;
use throughline::{ExecOptions, Executable, Gpu, Graph, Plan, Result, TensorType, Value};

const HEADS: usize = 6;
const WIDTH: usize = 64;

fn main() -> Result<()> {
    let gpu = Gpu::headless_blocking()?;
    println!("{}", gpu.describe());
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
            let (f, c) = (fused[i], composed[i]);
            println!(
                "T {time} {pass}: attention {:.2} ms of CPU, {:.2} ms; composition {:.2} ms, {:.2} ms: {:.1} and {:.1} \
                 times as long",
                f.cpu,
                f.wall,
                c.cpu,
                c.wall,
                c.cpu / f.cpu,
                c.wall / f.wall
            );
        }
    }
    Ok(())
}

/// Milliseconds of one call. `cpu` is of all threads, the driver's included; 0 where not on Linux.
#[derive(Clone, Copy)]
struct Time {
    wall: f64,
    cpu: f64,
}

/// Forward and backward of `f` on inputs of this shape. Backward is the run of both less forward.
fn times(gpu: &Gpu, dims: &[usize], f: impl Fn(&mut Graph, [Value; 3]) -> Result<Value>) -> Result<[Time; 2]> {
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
    Ok([forward, Time { wall: both.wall - forward.wall, cpu: both.cpu - forward.cpu }])
}

fn time(gpu: &Gpu, plan: Plan, inputs: &[Value]) -> Result<Time> {
    let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
    for &value in inputs {
        let n = exec.tensor(value)?.ty().len();
        exec.write(value, &(0..n).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect::<Vec<f32>>())?;
    }
    exec.submit();
    gpu.wait_blocking()?;
    let (begin, cpu) = (Instant::now(), cpu_seconds());
    let mut calls = 0.0;
    while begin.elapsed() < Duration::from_secs(2) {
        exec.submit();
        gpu.wait_blocking()?;
        calls += 1e-3;
    }
    Ok(Time { wall: begin.elapsed().as_secs_f64() / calls, cpu: (cpu_seconds() - cpu) / calls })
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    // utime and stime, in ticks of 1/100 s.
    fields.get(11..13).map_or(0.0, |ticks| ticks.iter().sum::<f64>() / 100.0)
}
