//! Swaps two axes. The gradient is the same swap.

use super::cases::{Case, Row};
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::AdapterClass;
use crate::tensor::{Shape, TensorType};

const SOURCE: &str = include_str!("../../shaders/transpose.wgsl");

pub(super) const ROW: Row = Row {
    name: "transpose",
    summary: "y = x with two axes swapped",
    sources: &[SOURCE],
    cases: || {
        let case =
            |x: &[usize], a: usize, b: usize| Case::new(format!("{a} and {b} of {x:?}"), Transpose { a, b }, &[x]);
        vec![
            case(&[1, 1], 0, 1),
            case(&[127, 3], 0, 1),
            case(&[4, 1757], 1, 0),
            case(&[2, 9, 3, 8], 1, 2),
            case(&[3, 36, 2, 300], 1, 3),
            case(&[2, 4, 8], 2, 1),
            case(&[5, 7, 6], 0, 1),
            case(&[5, 7, 6], 0, 2),
            case(&[5, 7, 6], 2, 1),
            case(&[3, 4, 2, 5, 6, 4], 1, 4),
            case(&[3, 4, 2, 5, 2, 3], 0, 5),
            Case::new("ids", Transpose { a: 0, b: 1 }, &[]).ids(&[5, 9], 50_000).forward_only(),
        ]
    },
    bench: || {
        let case =
            |x: &[usize], a: usize, b: usize| Case::new(format!("{a} and {b} of {x:?}"), Transpose { a, b }, &[x]);
        vec![case(&[4096, 768], 0, 1), case(&[4, 1024, 12, 64], 1, 2)]
    },
};

/// `x -> x` with the axes `a` and `b` swapped. Usually added by [`Graph::transpose`].
#[derive(Clone, Copy, Debug)]
pub struct Transpose {
    /// One axis, counted from 0.
    pub a: usize,
    /// The other axis.
    pub b: usize,
}

impl Graph {
    /// `x` with the axes `a` and `b` swapped: `[.., A, .., B, ..] -> [.., B, .., A, ..]`.
    ///
    /// This copies. Before a matmul it is seldom needed: [`matmul_nt`](Self::matmul_nt) and
    /// [`Matmul`](super::matmul::Matmul)'s flags read transposed operands directly.
    pub fn transpose(&mut self, name: &str, x: Value, a: usize, b: usize) -> Result<Value> {
        self.op1(name, Transpose { a, b }, &[x])
    }
}

impl Transpose {
    /// Lengths of the first axis, of the axes between, of the second axis, and of the axes after it.
    fn dims(&self, shape: &Shape) -> [usize; 4] {
        let dims = shape.dims();
        let (a, b) = (self.a.min(self.b), self.a.max(self.b));
        [dims[a], dims[a + 1..b].iter().product(), dims[b], dims[b + 1..].iter().product()]
    }
}

impl Op for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = inputs else { return Err(format!("takes 1 input, got {}", inputs.len())) };
        let mut dims = x.shape.dims().to_vec();
        let Transpose { a, b } = *self;
        if a == b || a.max(b) >= dims.len() {
            return Err(format!("swaps two different axes below {}, got {a} and {b}", dims.len()));
        }
        dims.swap(a, b);
        Ok(vec![TensorType { shape: dims.into(), dtype: x.dtype }])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.op1(&cx.name, *self, &[dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let [a, mid, b, inner] = self.dims(&cx.inputs[0].shape);
        let planes = cx.inputs[0].len() / (a * b * inner);
        // Lengths of the two axes and of the axes after them, in the kernel's units.
        let (entry, unit, [a, b, inner]) = match inner {
            1 if a % 4 == 0 && b % 4 == 0 => ("quads", "vec4<u32>", [a / 4, b / 4, 1]),
            n if n % 4 == 0 => ("forward", "vec4<u32>", [a, b, n / 4]),
            n => ("forward", "u32", [a, b, n]),
        };
        // On software adapters starting an invocation costs as much as several moves. GPUs want neighbours in both
        // directions, since reads run along one axis and writes along the other.
        let [wide, tall, each] = match cx.profile.class {
            AdapterClass::Cpu => [8, 1, 64],
            AdapterClass::Gpu => [8, 8, 1],
        };
        let (across, down) = ((b * inner).div_ceil(wide), a.div_ceil(tall * each));
        let kernel = table_kernel::<Self>("transpose", SOURCE, entry)
            .knob("WIDE", wide as u32)
            .knob("TALL", tall as u32)
            .knob("EACH", each as u32)
            .knob("E", unit);
        let words = [planes, a, mid, b, inner, across, down].map(|w| w as u32);
        let groups = cx.profile.grid(planes * across * down);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let x = inputs[0];
        let [a, mid, b, inner] = self.dims(&x.shape);
        let mut y = Array::zeros(outputs[0].shape.clone());
        for (i, &v) in x.data.iter().enumerate() {
            let (n, ib, m) = (i % inner, i / inner % b, i / inner / b % mid);
            let (ia, o) = (i / inner / b / mid % a, i / inner / b / mid / a);
            y.data[(((o * b + ib) * mid + m) * a + ia) * inner + n] = v;
        }
        vec![y]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }
}
