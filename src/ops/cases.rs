//! Rows of the op table, and the test and benchmark cases in them.

use std::sync::Arc;

use half::f16;

use crate::array::Array;
use crate::error::Result;
use crate::format::Packed;
use crate::graph::{Graph, Op, Value};
use crate::rng::Rng;
use crate::tensor::{DType, Shape, TensorType};

/// One row of the table: everything that documentation, tests and benchmarks need to know about an op.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Name of the op: the stem of its Rust file, and of its WGSL file or folder.
    pub name: &'static str,
    /// One line: the formula.
    pub summary: &'static str,
    /// Its WGSL texts as they are compiled, shared ones before those that use them, with knobs as written and
    /// without subgroup operations. Empty for ops without a kernel.
    pub sources: &'static [&'static str],
    /// Cases that every test runs over: odd shapes, tall, wide, not multiples of any tile.
    pub cases: fn() -> Vec<Case>,
    /// Cases for `cargo bench`: sizes that are common in models.
    pub bench: fn() -> Vec<Case>,
}

/// How test data for an input is made.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum InputFill {
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform in `[low, high)`.
    Uniform(f64, f64),
    /// Integers in `0..n`.
    Below(u32),
    /// The same everywhere.
    Constant(f64),
    /// These values, cyclically: settings that a kernel reads.
    Values(&'static [f64]),
    /// Words of a matrix in this format. All bits are random except the exponents of the scales.
    Packed(Packed),
}

/// One input of a case.
#[derive(Clone, Debug)]
pub struct InputSpec {
    /// Its type.
    pub ty: TensorType,
    /// Its data.
    pub fill: InputFill,
    /// Whether its gradient is checked. False for integer inputs.
    pub grad: bool,
}

/// One op on inputs of given shapes: a test case, and with [`graph`](Self::graph) and [`data`](Self::data) all it takes
/// to run it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Shapes and settings, for messages and benchmark names.
    pub name: String,
    /// The op.
    pub op: Arc<dyn Op>,
    /// Its inputs.
    pub inputs: Vec<InputSpec>,
    /// Bound on the normalised mean squared error, `sum((got - want)^2) / sum(want^2)`, of outputs and gradients
    /// against the f64 reference. 1e-7 unless the row gives a reason.
    pub nmse: f64,
    /// The same with tensors stored in f16: see [`halved`](Self::halved). 1e-6 unless the row gives a reason.
    pub half_nmse: f64,
    /// The same where cooperative matrices of f16 multiply inputs that are f16 numbers, so that these lose nothing: see
    /// [`rounded`](Self::rounded). 2e-7 unless the row gives a reason, which is what it takes to round both factors.
    pub matrix_nmse: f64,
    /// Inputs that stay f32 with tensors stored in f16, by index: settings and statistics that f16 cannot hold.
    pub always_f32: Vec<usize>,
    /// Whether results are stored in f16.
    pub(crate) is_halved: bool,
    /// Whether data are rounded to f16.
    pub(crate) is_rounded: bool,
    /// How many of the outputs, counted from the first, a loss may depend on. Side outputs such as `rstd` have no
    /// gradient.
    pub main_outputs: usize,
}

impl Case {
    /// A case with standard normal f32 inputs of these shapes, a tolerance of 1e-7, and one differentiable output.
    pub fn new(name: impl Into<String>, op: impl Op, shapes: &[&[usize]]) -> Self {
        let inputs = shapes
            .iter()
            .map(|&s| InputSpec { ty: TensorType::f32(s), fill: InputFill::Normal(1.0), grad: true })
            .collect();
        Case {
            name: name.into(),
            op: Arc::new(op),
            inputs,
            nmse: 1e-7,
            half_nmse: 1e-6,
            matrix_nmse: 2e-7,
            always_f32: vec![],
            is_halved: false,
            is_rounded: false,
            main_outputs: 1,
        }
    }

    /// Appends a u32 input of this shape with values below `n`.
    pub fn ids(mut self, shape: &[usize], n: u32) -> Self {
        self.inputs.push(InputSpec { ty: TensorType::u32(shape), fill: InputFill::Below(n), grad: false });
        self
    }

    /// Appends an f32 input of this shape, standard normal like those of [`new`](Self::new).
    pub fn also(mut self, shape: &[usize]) -> Self {
        self.inputs.push(InputSpec { ty: TensorType::f32(shape), fill: InputFill::Normal(1.0), grad: true });
        self
    }

    /// Appends a packed matrix. It has no gradient.
    pub fn packed(mut self, matrix: Packed) -> Self {
        self.inputs.push(InputSpec { ty: matrix.ty(), fill: InputFill::Packed(matrix), grad: false });
        self
    }

    /// Changes how input `i` is filled.
    ///
    /// # Panics
    ///
    /// If there is no such input.
    pub fn fill(mut self, i: usize, fill: InputFill) -> Self {
        self.inputs[i].fill = fill;
        self
    }

    /// Gives input `i` another shape and other data.
    ///
    /// # Panics
    ///
    /// If there is no such input.
    pub fn input(mut self, i: usize, shape: &[usize], fill: InputFill) -> Self {
        self.inputs[i] =
            InputSpec { ty: TensorType { shape: shape.into(), ..self.inputs[i].ty.clone() }, fill, ..self.inputs[i] };
        self
    }

    /// Leaves the gradient of input `i` unchecked, because the op does not define one.
    ///
    /// # Panics
    ///
    /// If there is no such input.
    pub fn no_grad(mut self, i: usize) -> Self {
        self.inputs[i].grad = false;
        self
    }

    /// Sets another tolerance. Give the reason in the row.
    pub fn tolerance(mut self, nmse: f64) -> Self {
        self.nmse = nmse;
        self
    }

    /// Sets another tolerance for tensors in f16. Give the reason in the row.
    pub fn half_tolerance(mut self, nmse: f64) -> Self {
        self.half_nmse = nmse;
        self
    }

    /// Sets another tolerance for cooperative matrices of f16. Give the reason in the row.
    pub fn matrix_tolerance(mut self, nmse: f64) -> Self {
        self.matrix_nmse = nmse;
        self
    }

    /// Leaves these inputs in f32 where others are stored in f16. Give the reason in the row.
    pub fn always_f32(mut self, inputs: &[usize]) -> Self {
        self.always_f32 = inputs.to_vec();
        self
    }

    /// The case with tensors in f16: inputs rounded to it, outputs and gradients left in it. Statistics that are side
    /// outputs stay f32, as they do in training. Its tolerance is [`half_nmse`](Self::half_nmse).
    ///
    /// ```
    /// use throughline::ops::Case;
    /// use throughline::ops::swiglu::SwiGlu;
    /// let case = Case::new("127x3", SwiGlu, &[&[127, 3], &[127, 3]]);
    /// let both = [case.halved(), case];
    /// # #[cfg(feature = "check")]
    /// throughline::check::op(&throughline::Gpu::headless_blocking()?, &both)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn halved(&self) -> Case {
        let mut case = Case { is_halved: true, is_rounded: true, nmse: self.half_nmse, ..self.clone() };
        for (i, input) in case.inputs.iter_mut().enumerate() {
            if input.ty.dtype.is_float() && !self.always_f32.contains(&i) {
                input.ty.dtype = DType::F16;
            }
        }
        case
    }

    /// The case with data that are f16 numbers, stored in f32: what cooperative matrices of f16 multiply without
    /// rounding it.
    pub fn rounded(&self) -> Case {
        Case { is_rounded: true, nmse: self.matrix_nmse, ..self.clone() }
    }

    /// Marks all outputs as not differentiable: optimiser steps, norms for clipping.
    pub fn forward_only(mut self) -> Self {
        self.main_outputs = 0;
        self
    }

    /// Deterministic data for every input, rounded to its type.
    pub fn data(&self, seed: u64) -> Vec<Array> {
        let mut rng = Rng::new(&[seed]);
        self.inputs
            .iter()
            .map(|spec| {
                let data = match spec.fill {
                    InputFill::Packed(matrix) => matrix.random_words(&mut rng),
                    fill => {
                        let round = match spec.ty.dtype {
                            DType::F16 => true,
                            DType::F32 => self.is_rounded && !self.is_halved,
                            DType::U32 => false,
                        };
                        (0..spec.ty.len()).map(|i| rounded(sample(&mut rng, fill, i), round)).collect()
                    }
                };
                Array::new(spec.ty.shape.clone(), data)
            })
            .collect()
    }

    /// A graph of this op alone, with its input values and its output values.
    pub fn graph(&self) -> Result<(Graph, Vec<Value>, Vec<Value>)> {
        let mut g = Graph::new();
        let mut inputs = Vec::new();
        for (i, spec) in self.inputs.iter().enumerate() {
            inputs.push(g.input(&format!("x{i}"), spec.ty.clone())?);
        }
        let outputs = g.op_arc("y", self.op.clone(), &inputs)?;
        if self.is_halved && !self.op.is_view() {
            let stored = if self.main_outputs == 0 { outputs.len() } else { self.main_outputs };
            for &y in outputs.iter().take(stored) {
                if g.ty(y).dtype.is_float() {
                    g.store_as(y, DType::F16)?;
                }
            }
        }
        Ok((g, inputs, outputs))
    }

    /// Types of the inputs.
    pub fn types(&self) -> Vec<TensorType> {
        self.inputs.iter().map(|spec| spec.ty.clone()).collect()
    }
}

/// Element `i` of a tensor filled this way.
fn sample(rng: &mut Rng, fill: InputFill, i: usize) -> f64 {
    let x = match fill {
        InputFill::Normal(std) => std * rng.normal(),
        InputFill::Uniform(low, high) => low + (high - low) * rng.uniform(),
        InputFill::Below(n) => return rng.below(u64::from(n)) as f64,
        InputFill::Constant(c) => c,
        InputFill::Values(values) => values[i % values.len()],
        InputFill::Packed(_) => return 0.0, // whole matrices are made by `Packed::random_words`
    };
    f64::from(x as f32)
}

fn rounded(x: f64, to_f16: bool) -> f64 {
    if to_f16 { f16::from_f64(x).to_f64() } else { x }
}

/// A standard normal array, rounded to f32: random cotangents for tests.
pub fn random_array(shape: &Shape, seed: u64) -> Array {
    let mut rng = Rng::new(&[seed]);
    Array::new(shape.clone(), (0..shape.len()).map(|i| sample(&mut rng, InputFill::Normal(1.0), i)).collect())
}
