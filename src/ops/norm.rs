//! Layer norm (Ba et al. 2016, <https://arxiv.org/abs/1607.06450>) and RMS norm (Zhang and Sennrich
//! 2019, <https://arxiv.org/abs/1910.07467>) over the last dimension.
//!
//! Layer norm: `y = xhat * gamma + beta`, `xhat = (x - mean) * rstd`, `rstd = 1 / sqrt(var + eps)`, with the population
//! variance. RMS norm takes the mean as zero and has no beta. `xhat` and `rstd` are outputs too: backward needs those
//! instead of `x`, so the residual stream may be overwritten in the meantime.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{POSITIVE, expect_f32, expect_shape, is_positive};
use super::map::Chain;
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source};
use super::sum;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Kept, Op, Recomputed, Value, Vjp};
use crate::kernel::{Bind, FEW_ROWS, Launch, OnRead, Program};
use crate::profile::AdapterClass;
use crate::tensor::{DType, TensorType};

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "norm.wgsl");

macro_rules! on_read_source {
    ($file:literal) => {
        concat!(
            include_str!("../../shaders/products/norm.wgsl"),
            include_str!(concat!("../../shaders/products/", $file))
        )
    };
}
const LAYER_NORM_ON_READ: &str = on_read_source!("layer_norm.wgsl");
const RMS_NORM_ON_READ: &str = on_read_source!("rms_norm.wgsl");

pub(super) const LAYERNORM: Row = Row {
    name: "layernorm",
    summary: "y = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta, by row",
    sources: &[SOURCE.plain],
    cases: || cases(true),
    bench: || vec![case(true, &[1024, 384]), case(true, &[4096, 768])],
};

pub(super) const RMSNORM: Row = Row {
    name: "rmsnorm",
    summary: "y = x / sqrt(mean(x^2) + eps) * gamma, by row",
    sources: &[SOURCE.plain],
    cases: || cases(false),
    bench: || vec![case(false, &[4096, 768])],
};

fn cases(centered: bool) -> Vec<Case> {
    // Without subgroups, the last is too long for one lane.
    let shapes: [&[usize]; 9] =
        [&[1, 4], &[3, 127], &[5, 1757], &[257, 12], &[2, 9, 64], &[33, 384], &[7, 1028], &[67, 100], &[3, 33_001]];
    shapes.iter().map(|s| case(centered, s)).collect()
}

fn case(centered: bool, shape: &[usize]) -> Case {
    let cols = [shape[shape.len() - 1]];
    let inputs: &[&[usize]] = if centered { &[shape, &cols, &cols] } else { &[shape, &cols] };
    Case::new(format!("{shape:?}"), Norm { centered, eps: 1e-5 }, inputs).fill(1, InputFill::Uniform(0.5, 1.5))
}

/// `(x, gamma [, beta]) -> (y, xhat, rstd)`: `[.., d], [d] [, [d]] -> [.., d], [.., d], [rows]`.
///
/// [`Graph::layernorm`] and [`Graph::rmsnorm`] return only `y`. Add this op with [`Graph::op`] to use `xhat` or `rstd`
/// too.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// True for layer norm: subtracts the mean and adds `beta`. False for RMS norm.
    pub centered: bool,
    /// Added to the variance or mean square; 1e-5 in most models. Must be positive.
    pub eps: f32,
}

/// `(dy, xhat, rstd, gamma [, base]) -> (dx, dgamma [, dbeta])`: the gradient of [`Norm`].
#[derive(Clone, Copy, Debug)]
pub struct NormBackward {
    centered: bool,
    accumulate: bool,
}

impl Graph {
    /// Layer norm over the last dimension: `x` `[.., d]`, `gamma` and `beta` `[d]`, result `[.., d]`.
    pub fn layernorm(&mut self, name: &str, x: Value, gamma: Value, beta: Value, eps: f32) -> Result<Value> {
        self.op1(name, Norm { centered: true, eps }, &[x, gamma, beta])
    }

    /// RMS norm over the last dimension: `x` `[.., d]`, `gamma` `[d]`, result `[.., d]`.
    pub fn rmsnorm(&mut self, name: &str, x: Value, gamma: Value, eps: f32) -> Result<Value> {
        self.op1(name, Norm { centered: false, eps }, &[x, gamma])
    }
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        if self.centered { "layernorm" } else { "rmsnorm" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2 + usize::from(self.centered))?;
        // A row of zeros would become 0 / 0.
        if !is_positive(self.eps) {
            return Err(format!("eps must be {POSITIVE}, got {}", self.eps));
        }
        let x = &inputs[0];
        for (name, ty) in ["gamma", "beta"].iter().zip(&inputs[1..]) {
            expect_shape(name, ty, &[x.shape.cols()])?;
        }
        Ok(vec![x.clone(), x.clone(), TensorType::f32([x.shape.rows()])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let (dy, xhat, rstd) = (cx.dy0()?, cx.outputs[1], cx.outputs[2]);
        let op = NormBackward { centered: self.centered, accumulate: false };
        let grads = cx.graph.op(&cx.name, op, &[dy, xhat, rstd, cx.inputs[1]])?;
        grads.into_iter().enumerate().for_each(|(i, grad)| cx.set(i, grad));
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
        let (layout, each) = layout(cx, rows, cols, 1)?;
        let kernel =
            layout.kernel::<Self>("norm", SOURCE, "forward").knob("CENTERED", self.centered).knob("ROWS", each as u32);
        // So that y made again from it has the same bits.
        let kernel = kernel.knob("FROM_STORED", cx.outputs[1].dtype == DType::F16);
        let beta = if self.centered { Bind::In(2) } else { Bind::Null };
        let binds = [Bind::In(0), Bind::In(1), beta, Bind::Out(0), Bind::Out(1), Bind::Out(2)];
        let words = words(&layout, rows, cols, self.eps, 0);
        Ok(Program::one(kernel, &binds, &words, cx.profile.grid(layout.groups)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (x, gamma) = (inputs[0], inputs[1]);
        let n = x.shape.cols() as f64;
        let (mut xhat, mut rstd) = (vec![], vec![]);
        for row in x.rows() {
            let mean = if self.centered { row.iter().sum::<f64>() / n } else { 0.0 };
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            let r = 1.0 / (var + f64::from(self.eps)).sqrt();
            xhat.extend(row.iter().map(|v| (v - mean) * r));
            rstd.push(r);
        }
        let xhat = Array::new(x.shape.clone(), xhat);
        let mut y = xhat.zip(gamma, |v, g| v * g);
        if self.centered {
            y = y.zip(inputs[2], |v, b| v + b);
        }
        vec![y, xhat, Array::new(outputs[2].shape.clone(), rstd)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        (if self.centered { 8 } else { 4 }) * inputs[0].len() as u64
    }

    fn recomputed(&self, output: usize, inputs: &[TensorType]) -> Option<Recomputed> {
        let y = Chain::scale_and_shift(self.centered, inputs.first()?.shape.clone());
        let from = [Kept::Output(1), Kept::Input(1), Kept::Input(2)];
        let from = from[..2 + usize::from(self.centered)].to_vec();
        (output == 0).then(|| Recomputed { op: Arc::new(y), from })
    }

    fn on_read(&self, inputs: &[TensorType]) -> Option<OnRead> {
        let x = &inputs[0].shape;
        let few = x.rows() <= FEW_ROWS && x.cols().is_multiple_of(4);
        few.then(|| match self.centered {
            true => OnRead::new::<Self>(LAYER_NORM_ON_READ, &["gamma", "beta"], self.eps),
            false => OnRead::new::<Self>(RMS_NORM_ON_READ, &["gamma"], self.eps),
        })
    }
}

impl Op for NormBackward {
    fn name(&self) -> &'static str {
        if self.centered { "layernorm_backward" } else { "rmsnorm_backward" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 4 + usize::from(self.accumulate))?;
        let dy = &inputs[0].shape;
        expect_shape("xhat", &inputs[1], dy.dims())?;
        expect_shape("rstd", &inputs[2], &[dy.rows()])?;
        expect_shape("gamma", &inputs[3], &[dy.cols()])?;
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[4], dy.dims())?;
        }
        let mut outputs = vec![inputs[0].clone(), inputs[3].clone()];
        if self.centered {
            outputs.push(inputs[3].clone());
        }
        Ok(outputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of norms are not implemented"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        if held(cx).is_some() { vec!["held".into(), "rows".into()] } else { vec![] }
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
        // Each block of `each` rows yields one row of sums, and those are summed in turn: a fixed order of additions.
        let (entry, layout, each, knob) = match held(cx).filter(|_| cx.variant == 0) {
            Some(held) => {
                let each = rows.div_ceil(32).min(64);
                ("backward_held", RowLayout::new(cx, rows, cols, each, 1), each, ("HELD", held))
            }
            None => {
                let (layout, each) = layout(cx, rows, cols, 4)?;
                ("backward", layout, each, ("ROWS", each))
            }
        };
        let kernel = layout.kernel::<Self>("norm", SOURCE, entry).knob("CENTERED", self.centered);
        let kernel = kernel.knob("ACCUMULATE", self.accumulate).knob(knob.0, knob.1 as u32);
        let mut program = Program::default();
        let blocks = rows.div_ceil(each);
        let ty = TensorType::f32([blocks, cols]);
        let (dgamma, dbeta) = (program.scratch(ty.clone()), program.scratch(ty));
        let ins = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::In(3)];
        let outs = [Bind::Out(0), Bind::Scratch(dgamma), Bind::Scratch(dbeta)];
        let words = words(&layout, rows, cols, 0.0, each);
        program.dispatch(kernel, &[&ins[..], &outs].concat(), &words, cx.profile.grid(layout.groups));
        let ends = [(dgamma, 1), (dbeta, 2)].map(|(from, to)| (Bind::ScratchIn(from), Bind::Out(to)));
        sum::sum_rows::<Self>(&mut program, cx.profile, &ends[..cx.outputs.len() - 1], (blocks, cols), false);
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let (dy, xhat, rstd, gamma) = (inputs[0], inputs[1], inputs[2], inputs[3]);
        let n = dy.shape.cols() as f64;
        let g = dy.zip(gamma, |d, g| d * g);
        let mut dx = vec![];
        for ((g, xh), r) in g.rows().zip(xhat.rows()).zip(&rstd.data) {
            let mean_g = if self.centered { g.iter().sum::<f64>() / n } else { 0.0 };
            let mean_gx = g.iter().zip(xh).map(|(g, x)| g * x).sum::<f64>() / n;
            dx.extend(g.iter().zip(xh).map(|(g, x)| r * (g - mean_g - x * mean_gx)));
        }
        let mut dx = Array::new(dy.shape.clone(), dx);
        if self.accumulate {
            dx = dx.zip(inputs[4], |d, base| d + base);
        }
        let columns = |a: &Array| sum::Sum::to(gamma.shape.clone()).reference(&[a], &[]).remove(0);
        let mut outputs = vec![dx, columns(&dy.zip(xhat, |d, x| d * x))];
        if self.centered {
            outputs.push(columns(dy));
        }
        outputs
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        13 * inputs[0].len() as u64
    }

    fn starts_as(&self, output: usize) -> Option<usize> {
        (self.accumulate && output == 0).then_some(4)
    }

    fn with_addend(&self, output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate && output == 0).then(|| Arc::new(NormBackward { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

/// The layout, and how many rows are processed at a time: at most `on_gpus` on GPUs, and at most four on software
/// adapters, where loads are expensive.
fn layout(cx: &Launch<'_>, rows: usize, cols: usize, on_gpus: usize) -> Result<(RowLayout, usize), String> {
    let most = if cx.profile.class == AdapterClass::Cpu { 4 } else { on_gpus };
    let each = rows.next_power_of_two().min(most);
    let layout = RowLayout::new(cx, rows, cols, each, 2);
    layout.check(cx, cols, 2)?;
    Ok((layout, each))
}

fn words(layout: &RowLayout, rows: usize, cols: usize, eps: f32, chunk: usize) -> [u32; 6] {
    let n = (cols as f32).to_bits();
    [rows as u32, (cols / layout.width) as u32, n, eps.to_bits(), layout.groups as u32, chunk as u32]
}

/// Quads of a row that each lane of a vector holds in `backward_held`, if that kernel can run. Beyond 24 the kernel is
/// large and no faster.
fn held(cx: &Launch<'_>) -> Option<usize> {
    let cols = cx.inputs[0].shape.cols();
    let (lanes, shuffles) = cx.profile.vector_lanes();
    let held = cols.div_ceil(4 * lanes);
    (cx.profile.class == AdapterClass::Cpu && shuffles && cols.is_multiple_of(4) && held <= 24).then_some(held)
}
