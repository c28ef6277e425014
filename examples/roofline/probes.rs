//! The limits of the adapter, measured with three kernels in many sizes, written as ops with variants.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use throughline::graph::{Op, Vjp};
use throughline::kernel::{Bind, Kernel, Launch, Program};
use throughline::plan::variants;
use throughline::reference::Array;
use throughline::{Cooperative, ExecOptions, Executable, Gpu, Graph, Plan, TensorType};

use crate::measure::{self, Clock};

/// The roofs, which no kernel can beat.
#[derive(Clone, Debug, Serialize)]
pub struct Roofs {
    /// GFLOP of multiply-adds per second of the clock.
    pub gflops: f64,
    /// The variant that reached it.
    pub fma: String,
    /// GB read and written per second of the clock.
    pub gbs: f64,
    /// The variant that reached it.
    pub copy: String,
    /// GFLOP of multiply-adds in f16, where shaders have it. Kernels do not use it: they compute in f32.
    pub gflops_f16: Option<f64>,
    /// GFLOP of products of cooperative matrices, where the adapter has some.
    pub gflops_matrices: Option<f64>,
    /// Which matrices these are.
    pub matrices: Option<String>,
}

/// What bounds the arithmetic of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// Multiply-adds in f32.
    Lanes,
    /// Cooperative matrices.
    Matrices,
}

impl Roofs {
    pub fn measure(gpu: &Gpu, clock: Clock, budget: Duration) -> Result<Roofs> {
        let software = clock == Clock::Cpu;
        // On a software adapter as large as the tensors of the table's cases, so that caches help both alike; on a GPU
        // too large for its caches.
        let quads = if software { 4096 * 768 / 4 } else { 8 << 20 };
        let (invocations, turns) = if software { (1 << 12, 1 << 9) } else { (1 << 17, 1 << 10) };
        let flops = |op: &dyn Op, y: &[TensorType]| op.flops(&[], y);
        let fma = |half: bool| best(gpu, (clock, budget), Fma { invocations, turns, half }, 2, flops);
        let half = gpu.profile().shader_f16.then(|| fma(true)).transpose()?;
        let (gflops, fma) = fma(false)?;
        let (gbs, copy) = best(gpu, (clock, budget), Copy, quads, |_, y| 2 * y[0].bytes() as u64)?;
        // Kernels use matrices only where the device was opened with them; the roof is measured anyway.
        let opened = gpu.profile().cooperative.map(|_| gpu.clone()).or_else(|| measure::with_matrices().ok());
        let products: Option<Result<(f64, String)>> =
            opened.as_ref().and_then(|gpu| Some((gpu, gpu.profile().cooperative?))).map(|(gpu, kind)| {
                let turns = turns / if software { 64 } else { 1 };
                let lanes = gpu.profile().subgroups.map_or(32, |[_, max]| max as usize);
                let probe = Products { kind, lanes, subgroups: invocations / lanes, turns };
                Ok((best(gpu, (clock, budget), probe, 2, flops)?.0, format!("{kind:?}")))
            });
        let (gflops_matrices, matrices): (Option<f64>, Option<String>) = products.transpose()?.unzip();
        Ok(Roofs { gflops, fma, gbs, copy, gflops_f16: half.map(|(gflops, _)| gflops), gflops_matrices, matrices })
    }

    /// The most GFLOP of kernels that use these units.
    pub fn gflops_of(&self, units: Units) -> f64 {
        match units {
            Units::Lanes => self.gflops,
            Units::Matrices => self.gflops_matrices.unwrap_or(self.gflops),
        }
    }

    /// The share of the nearer roof that a kernel reaches, and which roof that is. The kernel moves `bytes` and does
    /// `flops` in `seconds`, on these units.
    pub fn share(&self, units: Units, flops: f64, bytes: f64, seconds: f64) -> (f64, &'static str) {
        let (compute, memory) = (flops / seconds / 1e9 / self.gflops_of(units), bytes / seconds / 1e9 / self.gbs);
        match units {
            _ if compute <= memory => (memory, "memory"),
            Units::Lanes => (compute, "compute"),
            Units::Matrices => (compute, "matrices"),
        }
    }
}

/// The work per nanosecond of the best variant of a probe, and its name. The input has `quads` quads.
fn best(
    gpu: &Gpu,
    (clock, budget): (Clock, Duration),
    op: impl Op + Clone,
    quads: usize,
    work: impl Fn(&dyn Op, &[TensorType]) -> u64,
) -> Result<(f64, String)> {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([4 * quads]))?;
    let y = g.op1("y", op.clone(), &[x])?;
    let amount = work(&op, &[g.ty(y).clone()]) as f64;
    let tunable = variants::tunables(&Plan::new(&g, &[y], gpu.profile())?, gpu.profile()).remove(0);
    let mut results = vec![];
    for name in tunable.variants {
        let mut profile = gpu.profile().clone();
        profile.choices.set(tunable.key.clone(), name.clone());
        let plan = Plan::new(&g, &[y], &profile)?;
        let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
        exec.write(x, &vec![0.5f32; 4 * quads])?;
        results.push((amount / clock.seconds(&exec, budget) / 1e9, name));
    }
    results.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).context("a probe without variants")
}

/// `x [2 quads] -> y [one quad an invocation]`: chains of multiply-adds.
#[derive(Clone, Debug)]
struct Fma {
    invocations: usize,
    turns: usize,
    /// In f16, else in f32.
    half: bool,
}

/// Workgroup size, chains, and groups of four links per turn, for each variant.
const FMA: [[usize; 3]; 8] =
    [[8, 4, 4], [8, 8, 4], [8, 8, 8], [8, 16, 1], [8, 16, 2], [64, 4, 4], [64, 8, 2], [256, 8, 2]];
/// Links that `turns` counts, whatever the variant.
const LINKS: usize = 256;

impl Op for Fma {
    fn name(&self) -> &'static str {
        "fma probe"
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(vec![TensorType::f32([4 * self.invocations])])
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> throughline::Result<()> {
        Err(cx.no_gradient("a probe"))
    }
    fn variants(&self, _: &Launch<'_>) -> Vec<String> {
        FMA.map(|[group, chains, unroll]| format!("{group} x {chains} chains x {unroll}")).into()
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let [group, chains, unroll] = FMA[cx.variant];
        let text = include_str!("fma.wgsl");
        let kernel = match self.half {
            true => Kernel::new("fma", format!("enable f16;\n{text}"), "main").knob("T", "f16"),
            false => Kernel::new("fma", text, "main"),
        };
        let kernel = kernel.knob("GROUP", group as u32).knob("CHAINS", chains as u32).knob("UNROLL", unroll as u32);
        let turns = self.turns * LINKS / (chains * unroll * 4);
        let words = [self.invocations as u32, turns as u32];
        let groups = [self.invocations.div_ceil(group) as u32, 1, 1];
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }
    fn reference(&self, _: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![] // its result is of no interest
    }
    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        // A link is a multiply-add of four components.
        (self.invocations * self.turns * LINKS * 8) as u64
    }
}

/// `x -> x`.
#[derive(Clone, Debug)]
struct Copy;

/// Workgroup and quads an invocation.
const COPY: [[usize; 2]; 9] = [[8, 16], [8, 64], [8, 256], [64, 1], [64, 4], [64, 16], [64, 64], [256, 1], [256, 4]];

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy probe"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> throughline::Result<()> {
        Err(cx.no_gradient("a probe"))
    }
    fn variants(&self, _: &Launch<'_>) -> Vec<String> {
        COPY.map(|[group, each]| format!("{group} x {each} quads")).into()
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let [group, each] = COPY[cx.variant];
        let quads = cx.outputs[0].len() / 4;
        let kernel = Kernel::new("copy", include_str!("copy.wgsl"), "main")
            .knob("GROUP", group as u32)
            .knob("EACH", each as u32);
        let groups = cx.profile.grid(quads.div_ceil(group * each));
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &[quads as u32], groups))
    }
    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].clone()]
    }
    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }
}

/// `x [2 quads] -> y [one quad a subgroup]`: products of cooperative matrices.
#[derive(Clone, Debug)]
struct Products {
    kind: Cooperative,
    /// Of a subgroup.
    lanes: usize,
    subgroups: usize,
    turns: usize,
}

/// Rows and columns of the matrices that a subgroup sums, for each variant.
const PRODUCTS: [[usize; 2]; 3] = [[2, 2], [2, 4], [4, 4]];

impl Products {
    /// Turns of the loop of a variant, so that all do the same work.
    fn turns(&self, [rows, columns]: [usize; 2]) -> usize {
        self.turns * 16 / (rows * columns)
    }
}

impl Op for Products {
    fn name(&self) -> &'static str {
        "matrix probe"
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(vec![TensorType::f32([4 * self.subgroups])])
    }
    fn vjp(&self, cx: &mut Vjp<'_>) -> throughline::Result<()> {
        Err(cx.no_gradient("a probe"))
    }
    fn variants(&self, _: &Launch<'_>) -> Vec<String> {
        PRODUCTS.map(|[rows, columns]| format!("{rows} x {columns} matrices")).into()
    }
    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let tile @ [rows, columns] = PRODUCTS[cx.variant];
        let (size, e) = (self.kind.size(), if self.kind.is_f16() { "f16" } else { "f32" });
        let enable = if self.kind.is_f16() { "wgpu_cooperative_matrix, f16" } else { "wgpu_cooperative_matrix" };
        let text = format!("enable {enable};\n{}", include_str!("matrices.wgsl"));
        let matrix = |e: &str, role: &str| format!("coop_mat{size}x{size}<{e}, {role}>");
        let kernel = Kernel::new("matrices", text, "main")
            .knob("E", e)
            .knob("MatrixA", matrix(e, "A").as_str())
            .knob("MatrixB", matrix(e, "B").as_str())
            .knob("MatrixC", matrix("f32", "C").as_str())
            .knob("SIZE", size)
            .knob("COOPERATING", self.lanes as u32)
            .knob("ROWS", rows as u32)
            .knob("COLUMNS", columns as u32);
        let words = [self.subgroups as u32, self.turns(tile) as u32];
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, [self.subgroups as u32, 1, 1]))
    }
    fn reference(&self, _: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![] // its result is of no interest
    }
    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        let products = self.subgroups * self.turns(PRODUCTS[0]) * PRODUCTS[0][0] * PRODUCTS[0][1];
        products as u64 * 2 * u64::from(self.kind.size()).pow(3)
    }
}
