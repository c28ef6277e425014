//! Packed products with activations in 8 bits: integer dot products, for decoding.
//!
//! Use these where products of few rows are bound by arithmetic rather than by memory. The input is rounded: each 32
//! elements share a scale, a 127th of the largest magnitude among them. What that costs a model is at
//! [`Activations::I8`].

use std::sync::Arc;

use super::cases::{Case, Row};
use super::packed::{self, FEW, Tile, chosen, few};
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::format::{Packed, Stored, UNIT};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

const SOURCE: LaneSource = lane_source!(
    "packed/decode.wgsl",
    "packed/shared.wgsl",
    "packed/store.wgsl",
    "packed/teams.wgsl",
    "packed_i8.wgsl"
);

pub(super) const ROW: Row = Row {
    name: "packed_i8",
    summary: "y = x w^T + bias with x rounded to 8 bits, and w in blocks of 4 or 8 bits; without a gradient",
    sources: &[SOURCE.plain],
    cases,
    bench: || {
        let case = |n, k, stored| linear(1, Packed { stored, n, k }, false);
        vec![case(1536, 576, Stored::Q4_1), case(49_152, 576, Stored::Q8_0), case(4096, 4096, Stored::Q4_K)]
    },
};

/// The formats whose elements are integers of at most 8 bits, times one scale for each unit.
const FORMATS: [Stored; 4] = [Stored::Q4_0, Stored::Q4_1, Stored::Q8_0, Stored::Q4_K];

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for stored in FORMATS {
        let k = if stored.block_len() == 256 { 512 } else { 96 };
        cases.push(linear(1, Packed { stored, n: 5, k }, false));
        cases.push(linear(11, Packed { stored, n: 70, k }, true));
    }
    let matrix = Packed { stored: Stored::Q4_0, n: 7, k: 1120 };
    let op = PackedLinearI8 { matrix, bias: true, accumulate: true };
    let case = Case::new("bias, accumulate", op, &[&[2, 5, 1120]]).packed(matrix).also(&[7]).also(&[2, 5, 7]);
    cases.push(case.forward_only());
    cases
}

fn linear(m: usize, matrix: Packed, bias: bool) -> Case {
    let Packed { stored, n, k } = matrix;
    let op = PackedLinearI8 { matrix, bias, accumulate: false };
    let case = Case::new(format!("{m}x{n}x{k} {stored}"), op, &[&[m, k]]).packed(matrix).forward_only();
    if bias { case.also(&[n]) } else { case }
}

/// How products with packed weights read their inputs when a model decodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// As they are.
    #[default]
    F32,
    /// Rounded to 8 bits, in passes of at most 8 rows and for weights in Q4_0, Q4_1, Q4_K and Q8_0: see
    /// [`PackedLinearI8`]. Longer passes, of prompts, and other formats keep
    /// f32: what those store in f16 is [another choice](crate::decode::DecodeOptions::prompts).
    ///
    /// Over 199 tokens of prose, the logits of SmolLM2-135M-Instruct in Q4_1 are off by 0.16 in the mean and by 1.8 at
    /// most, where their standard deviation is 3.0. The likeliest token is the same for 193, and perplexity is 106.9 in
    /// place of 108.1.
    I8,
}

impl Activations {
    /// Those of a pass with this many rows.
    pub(crate) fn of_rows(self, rows: usize) -> Self {
        if rows <= FEW { self } else { Activations::F32 }
    }
}

/// `(x, w [, bias] [, base]) -> round(x) w^T [+ bias] [+ base]`: as [`PackedLinear`](super::packed::PackedLinear), but
/// each 32 elements of `x` are rounded to multiples of a 127th of their largest magnitude. It has no gradient. Usually
/// added by [`Graph::packed_linear_i8`].
#[derive(Clone, Copy, Debug)]
pub struct PackedLinearI8 {
    /// Format and shape of the weight: Q4_0, Q4_1, Q4_K or Q8_0.
    pub matrix: Packed,
    /// Whether there is a bias.
    pub bias: bool,
    accumulate: bool,
}

impl PackedLinearI8 {
    /// Whether it takes weights in this format.
    pub fn takes(stored: Stored) -> bool {
        FORMATS.contains(&stored)
    }

    fn tiles(&self, m: usize, profile: &Profile) -> Vec<Tile> {
        match profile.class {
            // Each lane has a column of its own.
            AdapterClass::Cpu => {
                vec![Tile::Few { group: profile.vector_lanes().0, team: 1, rows: m.min(FEW), cols: 1 }]
            }
            AdapterClass::Gpu => few(self.matrix, m, profile),
        }
    }
}

impl Graph {
    /// [`packed_linear`](Self::packed_linear) with `x` rounded to 8 bits: for inference where arithmetic is the limit.
    ///
    /// # Errors
    ///
    /// [`Error::Node`](crate::Error::Node) for weights in another format than Q4_0, Q4_1, Q4_K and Q8_0.
    pub fn packed_linear_i8(
        &mut self,
        name: &str,
        x: Value,
        w: Value,
        matrix: Packed,
        bias: Option<Value>,
    ) -> Result<Value> {
        let op = PackedLinearI8 { matrix, bias: bias.is_some(), accumulate: false };
        let inputs: Vec<Value> = [x, w].into_iter().chain(bias).collect();
        self.op1(name, op, &inputs)
    }

    /// A packed product with these activations, where the format allows them.
    pub(crate) fn packed_linear_of(
        &mut self,
        name: &str,
        [x, w]: [Value; 2],
        matrix: Packed,
        bias: Option<Value>,
        activations: Activations,
    ) -> Result<Value> {
        match activations {
            Activations::I8 if PackedLinearI8::takes(matrix.stored) => self.packed_linear_i8(name, x, w, matrix, bias),
            Activations::I8 | Activations::F32 => self.packed_linear(name, x, w, matrix, bias),
        }
    }
}

/// Rounds in f32, as the kernel does.
fn rounded(x: &[f64]) -> Vec<f64> {
    let most = x.iter().fold(0.0f32, |most, &x| most.max((x as f32).abs()));
    let inverse = if most > 1e-30 { 127.0 / most } else { 0.0 };
    let scale = f64::from(most / 127.0);
    x.iter().map(|&x| f64::from((x as f32 * inverse).round_ties_even()) * scale).collect()
}

impl Op for PackedLinearI8 {
    fn name(&self) -> &'static str {
        "packed_linear_i8"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if !Self::takes(self.matrix.stored) {
            let stored = self.matrix.stored;
            return Err(format!("8-bit activations go with weights in Q4_0, Q4_1, Q4_K or Q8_0, got {stored}"));
        }
        packed::infer(self.matrix, [self.bias, self.accumulate], inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("activations are rounded to 8 bits; use `packed_linear` to train"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.tiles(cx.inputs[0].shape.rows(), cx.profile).into_iter().map(Tile::name).collect()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let Packed { n, k, stored } = self.matrix;
        let m = cx.inputs[0].shape.rows();
        let tile = chosen(&self.tiles(m, cx.profile), cx.variant)?;
        let groups = tile.groups([m, n]);
        cx.profile.quirks.check_loops("the inner dimension", k, tile.iterations(k))?;
        let words = self.matrix.words(m, [n.div_ceil(tile.size()[1]), groups], [self.bias, self.accumulate], 0);
        let mut program = Program::default();
        let units = m * k / UNIT;
        let scratch = program.scratch(TensorType::u32([units, 9]));
        let group = if cx.profile.class == AdapterClass::Cpu { cx.profile.vector_lanes().0 } else { 64 };
        let kernel = |entry, group: usize| {
            let kernel = table_kernel::<Self>("packed_i8", SOURCE.text(tile.shuffles(cx.profile)), entry);
            packed::decoding(kernel, stored)
                .knob("UNITS", if stored == Stored::Q4_K { 2u32 } else { 1 })
                .knob("GROUP", group as u32)
        };
        let binds = [Bind::In(0), Bind::Scratch(scratch)];
        program.dispatch(kernel("quantize", group), &binds, &words, cx.profile.grid(units.div_ceil(group)));
        let bias = if self.bias { Bind::In(2) } else { Bind::Null };
        let binds = [Bind::In(1), Bind::ScratchIn(scratch), bias, Bind::Out(0)];
        let product = tile.few(kernel("forward_i8", tile.invocations()), cx.profile);
        program.dispatch(product, &binds, &words, cx.profile.grid(groups));
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let x: Vec<f64> = inputs[0].data.chunks(UNIT).flat_map(rounded).collect();
        vec![packed::product(self.matrix, [self.bias, self.accumulate], &x, inputs, outputs)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * (inputs[0].len() * self.matrix.n) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(PackedLinearI8 { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}
