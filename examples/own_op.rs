//! An op of your own, with its gradient and its test: how crowded the surroundings of each point are on a tile that
//! repeats, `y[i] = sum_j exp(-k |p[i] - p[j]|^2)`. Points that descend its gradient spread out evenly: blue noise.
//!
//! `cargo run --release --example own_op -- --out points.svg`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use plotters::prelude::*;
use throughline::ops::{Bind, Case, Custom, Elements, Launch};
use throughline::train::{GraphTrainConfig, GraphTrainer};
use throughline::{Gpu, TensorType, check, graph::ParamInit, reference::Array};

const K: f32 = 300.0;

/// `d`, from point `j` to point `i`, and `e`, what the one adds to the crowding of the other.
const PAIR: &str = "var d = vec2(p[2 * i] - p[2 * j], p[2 * i + 1] - p[2 * j + 1]); d -= round(d);
    let e = exp(-k * dot(d, d));";

fn pair(p: &Array, i: usize, j: usize) -> ([f64; 2], f64) {
    let d = [0, 1].map(|axis| p.data[2 * i + axis] - p.data[2 * j + axis]).map(|d| d - d.round());
    (d, (-f64::from(K) * (d[0] * d[0] + d[1] * d[1])).exp())
}

fn crowding() -> Custom {
    let body = format!("var s = 0.0; for (var j = 0u; j < n; j++) {{ {PAIR} s += e; }} y[i] = s;");
    let launch = move |cx: &Launch| {
        let points = Elements::new("crowding", cx.outputs[0].len(), &body).word("k", K);
        points.bind("p", Bind::In(0)).bind("y", Bind::Out(0)).program(cx)
    };
    let reference = |[p]: [&Array; 1]| {
        let sum = |i| (0..p.shape.rows()).map(|j| pair(p, i, j).1).sum();
        [Array::new([p.shape.rows()], (0..p.shape.rows()).map(sum).collect())]
    };
    Custom::new("crowding", |[p]| Ok([TensorType::f32([p.shape.rows()])]), launch, reference).backward(backward())
}

fn backward() -> Custom {
    let add = "s -= 2.0 * k * (dy[i] + dy[j]) * e * d;";
    let sum = format!("var s = vec2(0.0); for (var j = 0u; j < n; j++) {{ {PAIR} {add} }}");
    let body = sum + "dp[2 * i] = s.x; dp[2 * i + 1] = s.y;";
    let launch = move |cx: &Launch| {
        let points = Elements::new("crowding_backward", cx.inputs[1].len(), &body).word("k", K);
        points.bind("p", Bind::In(0)).bind("dy", Bind::In(1)).bind("dp", Bind::Out(0)).program(cx)
    };
    let reference = |[p, dy]: [&Array; 2]| {
        let add = |i, j, (d, e): ([f64; 2], f64)| d.map(|d| -2.0 * f64::from(K) * (dy.data[i] + dy.data[j]) * e * d);
        let sum = |at: usize| (0..dy.data.len()).map(|j| add(at / 2, j, pair(p, at / 2, j))[at % 2]).sum();
        [Array::new(p.shape.clone(), (0..p.data.len()).map(sum).collect())]
    };
    Custom::new("crowding_backward", |[p, _]| Ok([p.clone()]), launch, reference)
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(cli::Picture { out }: cli::Picture) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    check::op(&gpu, &[1, 37, 300].map(|n| Case::new(format!("{n} points"), crowding(), &[&[n, 2]])))?;
    println!("the op and its gradient are right on 3 cases");

    let mut g = gpu.graph();
    let p = g.param_with("p", [400, 2], ParamInit::Uniform(0.5))?;
    let y = g.op1("y", crowding(), &[p])?;
    let energy = g.sum("energy", y)?;
    let mut trainer = GraphTrainer::new_blocking(&gpu, g, energy, GraphTrainConfig::sgd(2e-5))?;

    let picture = SVGBackend::new(&out, (1000, 500)).into_drawing_area();
    for (panel, steps) in picture.split_evenly((1, 2)).iter().zip([1, 1000]) {
        (0..steps).try_for_each(|_| trainer.step(&[]).map(drop))?;
        println!("after {steps} steps: {:.1}", trainer.loss_blocking()?);
        let at: Vec<i32> = trainer.read_blocking(p)?.iter().map(|x: &f32| (500.0 * x.rem_euclid(1.0)) as i32).collect();
        at.chunks(2).try_for_each(|at| panel.draw(&Circle::new((at[0], at[1]), 3, BLACK.filled())))?;
    }
    Ok(picture.present()?)
}
