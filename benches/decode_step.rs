//! Benchmarks decoding one token of GPT-2 small after a full context, with a key/value cache. Most of the work is in
//! matrix products of one row.

mod measure;

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use measure::Clock;
use throughline::ops::attention::Attention;
use throughline::ops::random_array;
use throughline::{DType, ExecOptions, Executable, Gpu, Graph, Plan, Result, TensorType, Value};

const D: usize = 768;
const HEADS: usize = 12;
const LAYERS: usize = 12;
const CONTEXT: usize = 1024;
/// GPT-2's vocabulary, and one whose embedding table fits the largest binding that WebGPU guarantees.
const VOCABS: [usize; 2] = [50257, 32768];

fn main() {
    let gpu = &measure::gpu();
    println!("{}", gpu.describe());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    for vocab in VOCABS {
        let name = format!("GPT-2 small, context {CONTEXT}, vocabulary {vocab}");
        match executable(gpu, vocab) {
            Ok(exec) => {
                bench(&mut criterion, &name, &exec);
                break;
            }
            Err(e) => println!("{name}: skipped: {e}"),
        }
    }
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, name: &str, exec: &Executable) {
    let mut ran = false;
    let mut group = criterion.benchmark_group("decode_step");
    group.throughput(Throughput::Elements(1));
    group.bench_function(name, |b| {
        b.iter(|| {
            exec.submit().expect("the step runs");
            exec.gpu().wait_blocking().expect("the step runs");
        });
        ran = true;
    });
    group.finish();
    if ran {
        let clock = Clock::of(exec.gpu());
        let seconds = clock.seconds(exec, Duration::from_secs(1));
        let bytes = exec.plan().steps().iter().map(|s| s.bytes() as f64).sum::<f64>();
        println!(
            "{name}: {:.2} GB per {}, {} dispatches",
            bytes / seconds / 1e9,
            clock.unit(),
            exec.plan().dispatches()
        );
    }
}

fn executable(gpu: &Gpu, vocab: usize) -> Result<Executable> {
    let mut g = Graph::new();
    let logits = decode_step(&mut g, vocab)?;
    let plan = Arc::new(Plan::new(&g, &[logits], gpu.profile())?);
    let exec = Executable::new_blocking(gpu, plan, ExecOptions::default())?;
    for (seed, external) in exec.plan().externals().iter().enumerate() {
        if external.ty.dtype == DType::U32 {
            let id = if external.name == "start" { CONTEXT as u32 - 1 } else { 0 };
            exec.write(external.value, &[id])?;
        } else {
            let noise = random_array(&[1 << 12].into(), seed as u64).data;
            let data: Vec<f32> = (0..external.ty.len()).map(|i| 0.02 * noise[i % noise.len()] as f32).collect();
            exec.write(external.value, &data)?;
        }
    }
    Ok(exec)
}

/// Decodes the token after `CONTEXT - 1` others; returns the logits of the next.
fn decode_step(g: &mut Graph, vocab: usize) -> Result<Value> {
    let linear = |g: &mut Graph, name: &str, x: Value, d_in: usize, d_out: usize| {
        let w = g.param(&format!("{name}.weight"), [d_in, d_out])?;
        let b = g.param(&format!("{name}.bias"), [d_out])?;
        g.linear(name, x, w, Some(b))
    };
    let norm = |g: &mut Graph, name: &str, x: Value| {
        let gamma = g.param(&format!("{name}.weight"), [D])?;
        let beta = g.param(&format!("{name}.bias"), [D])?;
        g.layernorm(name, x, gamma, beta, 1e-5)
    };
    let cached = |g: &mut Graph, name: &str, rows: Value, start: Value| {
        let cache = g.state(name, TensorType::f32([1, CONTEXT, D]))?;
        let new = g.cache_write(&format!("{name}.write"), rows, start, cache)?;
        g.store(new, cache)?;
        Ok(new)
    };
    let token = g.input("token", TensorType::u32([1, 1]))?;
    let start = g.input("start", TensorType::u32([1]))?;
    let table = g.param("embed", [vocab, D])?;
    let mut x = g.embedding("embedding", table, token)?;
    for i in 0..LAYERS {
        let h = norm(g, &format!("h{i}.ln1"), x)?;
        let q = linear(g, &format!("h{i}.q"), h, D, D)?;
        let k = linear(g, &format!("h{i}.k"), h, D, D)?;
        let v = linear(g, &format!("h{i}.v"), h, D, D)?;
        let keys = cached(g, &format!("h{i}.keys"), k, start)?;
        let values = cached(g, &format!("h{i}.values"), v, start)?;
        let op = Attention { heads: HEADS, kv_heads: HEADS, causal: true, scale: None };
        let o = g.attention_cached(&format!("h{i}.attention"), q, [keys, values], start, op)?;
        let o = linear(g, &format!("h{i}.o"), o, D, D)?;
        x = g.residual_add(&format!("h{i}.add1"), x, o)?;
        let h = norm(g, &format!("h{i}.ln2"), x)?;
        let up = linear(g, &format!("h{i}.up"), h, D, 4 * D)?;
        let up = g.gelu_tanh(&format!("h{i}.gelu"), up)?;
        let down = linear(g, &format!("h{i}.down"), up, 4 * D, D)?;
        x = g.residual_add(&format!("h{i}.add2"), x, down)?;
    }
    let x = norm(g, "ln", x)?;
    g.matmul_nt("logits", x, table)
}
