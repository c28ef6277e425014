//! An op of your own: WGSL, launch, gradient and reference, tested by `throughline::check` and then trained with. It
//! is the activation *snake*, `y = x + sin(a x)^2 / a`, which learns periodic functions (Ziyin et al. 2020,
//! <https://arxiv.org/abs/2006.08195>).
//!
//! `cargo run --example own_op`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::sync::Arc;

use anyhow::{Result, ensure};
use throughline::check::{self, Case};
use throughline::graph::Vjp;
use throughline::kernel::Kernel;
use throughline::ops::{Bind, Launch, Op, Program};
use throughline::reference::Array;
use throughline::rng::Rng;
use throughline::{ExecOptions, Executable, Gpu, Graph, TensorType, Value};

/// Both passes. Bindings count from 1 without gaps for each entry point, so `y` and `dy` may share a number.
const WGSL: &str = "
struct Params { n: u32, a: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
           @builtin(local_invocation_index) local: u32) {
    // `Profile::grid` spreads workgroups over x and y: more than 65,535 do not fit in x.
    let i = (group.x + group.y * groups.x) * 64u + local;
    if (i >= p.n) { return; }
    let s = sin(p.a * x[i]);
    y[i] = x[i] + s * s / p.a;
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
            @builtin(local_invocation_index) local: u32) {
    let i = (group.x + group.y * groups.x) * 64u + local;
    if (i >= p.n) { return; }
    dx[i] = dy[i] * (1.0 + sin(2.0 * p.a * x[i]));
}";

/// `x -> y`; with `backward`, `(x, dy) -> dx`. `a` is the frequency.
#[derive(Clone, Copy, Debug)]
struct Snake {
    a: f32,
    backward: bool,
}

impl Op for Snake {
    fn name(&self) -> &'static str {
        if self.backward { "snake_backward" } else { "snake" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, rest @ ..] if rest.len() == usize::from(self.backward) && rest.iter().all(|t| t == x) => {
                Ok(vec![x.clone()])
            }
            _ => Err("takes x or, backward, x and dy of the same type".into()),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> throughline::Result<()> {
        if self.backward {
            return Err(cx.no_gradient("second derivatives of snake are not implemented"));
        }
        let (x, dy) = (cx.inputs[0], cx.dy0()?);
        let dx = cx.graph.op1(&cx.name, Snake { backward: true, ..*self }, &[x, dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let n = cx.outputs[0].len();
        let (entry, binds) = match self.backward {
            false => ("forward", &[Bind::In(0), Bind::Out(0)][..]),
            true => ("backward", &[Bind::In(0), Bind::In(1), Bind::Out(0)][..]),
        };
        let words = [n as u32, self.a.to_bits()];
        Ok(Program::one(Kernel::new("snake", WGSL, entry), binds, &words, cx.profile.grid(n.div_ceil(64))))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let a = f64::from(self.a);
        vec![match self.backward {
            false => inputs[0].map(|x| x + (a * x).sin().powi(2) / a),
            true => inputs[0].zip(inputs[1], |x, dy| dy * (1.0 + (2.0 * a * x).sin())),
        }]
    }
}

#[derive(clap::Parser)]
#[command(about = "Check and train with an op of one's own")]
struct Flags {}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(_: Flags) -> Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let snake = Snake { a: 2.0, backward: false };
    // One element, less than a workgroup, and many workgroups of which the last is not full.
    let cases = [1, 37, 1757].map(|n| Case::new(format!("{n}"), snake, &[&[n]]));
    check::op(&gpu, &cases)?;
    println!("snake is right on {} cases, forward and backward", cases.len());
    let [first, last] = train(&gpu, snake)?;
    println!("a network of 32 snakes learns a wave: mean squared error {first:.3}, then {last:.5}");
    ensure!(last < 0.01 * first, "it has not learned");
    Ok(())
}

/// Fits `x + sin(4 x)` by gradient descent. The errors of the first step and of the last.
fn train(gpu: &Gpu, snake: Snake) -> Result<[f32; 2]> {
    const POINTS: usize = 64;
    const HIDDEN: usize = 32;
    let mut g = Graph::new();
    let [x, want] = ["x", "want"].map(|name| g.input(name, TensorType::f32([POINTS, 1])));
    let (x, want) = (x?, want?);
    let shapes: [(&str, &[usize]); 4] = [("w0", &[1, HIDDEN]), ("b0", &[HIDDEN]), ("w1", &[HIDDEN, 1]), ("b1", &[1])];
    let params: Vec<Value> = shapes.iter().map(|(name, shape)| g.param(name, *shape)).collect::<Result<_, _>>()?;
    let hidden = g.linear("hidden", x, params[0], Some(params[1]))?;
    let hidden = g.op1("snake", snake, &[hidden])?;
    let y = g.linear("y", hidden, params[2], Some(params[3]))?;
    let minus = g.scale("minus", want, -1.0)?;
    let error = g.add("error", y, minus)?;
    let squares = g.mul("squares", error, error)?;
    let sum = g.sum("sum", squares)?;
    let loss = g.scale("loss", sum, 1.0 / POINTS as f32)?;
    for (&param, gradient) in params.iter().zip(g.gradients(loss, &params)?) {
        let step = g.scale("step", gradient, -0.02)?;
        let next = g.add("next", param, step)?;
        g.store(next, param)?;
    }

    let exec = Executable::new_blocking(gpu, Arc::new(gpu.plan(&g, &[loss])?), ExecOptions::default())?;
    let points: Vec<f32> = (0..POINTS).map(|i| i as f32 / 16.0 - 2.0).collect();
    exec.write(x, &points)?;
    exec.write(want, &points.iter().map(|x| x + (4.0 * x).sin()).collect::<Vec<_>>())?;
    let mut rng = Rng::new(&[1]);
    for &weight in &[params[0], params[2]] {
        exec.write(weight, &(0..HIDDEN).map(|_| 0.5 * rng.normal() as f32).collect::<Vec<_>>())?;
    }
    exec.submit()?;
    let first = exec.read_blocking::<f32>(loss)?[0];
    for _ in 0..1000 {
        exec.submit()?;
    }
    Ok([first, exec.read_blocking::<f32>(loss)?[0]])
}
