//! Test and benchmark cases.

use super::Products;
use crate::format::{Packed, Stored};
use crate::graph::{Op, Operand, Part};
use crate::ops::cases::{Case, InputFill};
use crate::ops::matmul::Matmul;
use crate::ops::norm::Norm;
use crate::ops::packed::PackedLinear;
use crate::ops::swiglu::SwiGlu;
use crate::tensor::TensorType;

/// Products of rows `[m, k]`, with weights of so many columns each.
struct Shape {
    name: &'static str,
    m: usize,
    k: usize,
    columns: &'static [usize],
    /// Layer norm or RMS norm.
    norm: Option<bool>,
    weights: Weights,
    bias: bool,
    gated: bool,
}

#[derive(Clone, Copy)]
enum Weights {
    /// f32, `[k, n]`.
    Across,
    /// f32, `[n, k]`.
    Along,
    /// In these formats, in turn.
    Packed(&'static [Stored]),
}

const PLAIN: Shape = Shape {
    name: "",
    m: 1,
    k: 36,
    columns: &[20, 8, 12],
    norm: None,
    weights: Weights::Along,
    bias: false,
    gated: false,
};

pub(super) fn cases() -> Vec<Case> {
    let gate = &[24, 24];
    let mixed = Weights::Packed(&[Stored::Q4_1, Stored::Q8_0, Stored::Q6_K]);
    let small = Weights::Packed(&[Stored::Q5_0, Stored::F16]);
    [
        Shape { name: "qkv", ..PLAIN },
        Shape { name: "qkv, layer norm, bias", m: 3, norm: Some(true), bias: true, ..PLAIN },
        Shape { name: "qkv, RMS norm", m: 2, k: 1536, norm: Some(false), ..PLAIN },
        Shape { name: "across", weights: Weights::Across, bias: true, ..PLAIN },
        Shape { name: "across, RMS norm", m: 4, k: 580, weights: Weights::Across, norm: Some(false), ..PLAIN },
        Shape { name: "wide", columns: &[1300, 4], ..PLAIN },
        Shape { name: "gated", m: 2, columns: gate, gated: true, bias: true, ..PLAIN },
        Shape { name: "gated, RMS norm", columns: gate, gated: true, norm: Some(false), ..PLAIN },
        Shape {
            name: "gated, across",
            columns: gate,
            gated: true,
            weights: Weights::Across,
            norm: Some(true),
            ..PLAIN
        },
        Shape { name: "packed", m: 3, k: 512, weights: mixed, bias: true, ..PLAIN },
        Shape { name: "packed, gated", k: 96, columns: gate, gated: true, weights: small, norm: Some(false), ..PLAIN },
    ]
    .iter()
    .map(Shape::case)
    .collect()
}

pub(super) fn bench() -> Vec<Case> {
    let smol = Shape { k: 576, columns: &[576, 192, 192], norm: Some(false), ..PLAIN };
    let gate = Shape { columns: &[1536, 1536], gated: true, ..smol };
    let packed = Weights::Packed(&[Stored::Q4_1]);
    [
        Shape { name: "qkv 576", weights: Weights::Across, ..smol },
        Shape { name: "gate, up 576", weights: Weights::Across, ..gate },
        Shape { name: "qkv 576 Q4_1", weights: packed, ..smol },
        Shape { name: "gate, up 576 Q4_1", weights: packed, ..gate },
    ]
    .iter()
    .map(Shape::case)
    .collect()
}

impl Shape {
    fn case(&self) -> Case {
        let Shape { name, m, k, .. } = *self;
        let mut inputs = vec![TensorType::f32([m, k])];
        let vectors = self.norm.map_or(0, |centered| 1 + usize::from(centered));
        inputs.extend((0..vectors).map(|_| TensorType::f32([k])));
        let x = if self.norm.is_some() { Operand::Part(0) } else { Operand::Input(0) };
        let norm = self
            .norm
            .map(|centered| Part::new("norm", Norm { centered, eps: 1e-5 }, (0..=vectors).map(Operand::Input)));
        let mut products: Vec<Part> = vec![];
        let mut packed = vec![];
        for (i, &n) in self.columns.iter().enumerate() {
            let first = inputs.len();
            let (op, weight, matrix) = self.product(i, n);
            inputs.push(weight);
            packed.push(matrix);
            if self.bias {
                inputs.push(TensorType::f32([n]));
                packed.push(None);
            }
            let operands = std::iter::once(x).chain((first..inputs.len()).map(Operand::Input)).collect();
            products.push(Part { name: format!("y{i}"), op, operands });
        }
        let before = usize::from(norm.is_some());
        let operands = (0..products.len()).map(|i| Operand::Part(before + i));
        let function = self.gated.then(|| Part::new("swiglu", SwiGlu, operands));
        let (has_norm, has_function) = (norm.is_some(), function.is_some());
        let parts = norm.into_iter().chain(products).chain(function).collect();
        let op = Products { parts, norm: has_norm, function: has_function };
        let mut case = Case::new(name, op, &[&[m, k]]).forward_only();
        for (i, ty) in inputs.iter().enumerate().skip(1) {
            let matrix = i.checked_sub(1 + vectors).and_then(|i| packed[i]);
            case = match matrix {
                Some(matrix) => case.packed(matrix),
                None => case.also(ty.shape.dims()),
            };
        }
        if self.norm.is_some() { case.fill(1, InputFill::Uniform(0.5, 1.5)) } else { case }
    }

    fn product(&self, i: usize, n: usize) -> (std::sync::Arc<dyn Op>, TensorType, Option<Packed>) {
        let (k, bias) = (self.k, self.bias);
        let matmul = |transpose_b| std::sync::Arc::new(Matmul { transpose_b, bias, ..Matmul::default() });
        match self.weights {
            Weights::Across => (matmul(false), TensorType::f32([k, n]), None),
            Weights::Along => (matmul(true), TensorType::f32([n, k]), None),
            Weights::Packed(formats) => {
                let matrix = Packed { stored: formats[i % formats.len()], n, k };
                (std::sync::Arc::new(PackedLinear::of(matrix, bias)), matrix.ty(), Some(matrix))
            }
        }
    }
}
