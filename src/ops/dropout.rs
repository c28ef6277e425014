//! Dropout (Srivastava et al. 2014, <https://jmlr.org/papers/v15/srivastava14a.html>), seeded and counter-based.
//!
//! `y = x * keep / (1 - p)`. Whether element `i` is kept is a pure function of `(seed, step, stream, i)`. So backward
//! recomputes the mask instead of storing it, and a run can be repeated or resumed bit for bit on any adapter.
//!
//! The hash takes the index of a quad of elements and returns one word for each of them. It is `pcg4d` of Jarzynski &
//! Olano 2020 ("Hash functions for GPU rendering") with its last round done twice. As published, flipping the top bit
//! of the stream or the seed reaches the top bits of the result too rarely, and masks of neighbouring steps are
//! correlated. With the extra round the tests below find neither fault.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::expect_shape;
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{DType, TensorType};

const SOURCE: &str = include_str!("../../shaders/dropout.wgsl");

pub(super) const ROW: Row = Row {
    name: "dropout",
    summary: "y = x * keep / (1 - p), keep from a hash of (seed, step, stream, i); adds to the stream in place",
    sources: &[SOURCE],
    cases: || {
        let half = Dropout { p: 0.5, stream: 1, accumulate: false };
        let case = |s: &&[usize]| seeded(format!("{s:?}"), half, s);
        let rate = |p| seeded(format!("p {p}"), Dropout { p, stream: u32::MAX, ..half }, &[17, 67]);
        let mut add = seeded("accumulate".into(), Dropout { p: 0.1, accumulate: true, ..half }, &[9, 13]);
        add.inputs.push(add.inputs[0].clone());
        elementwise::SHAPES.iter().map(case).chain([0.0, 0.1, 0.99].map(rate)).chain([add]).collect()
    },
    bench: || vec![seeded("4096x768".into(), Dropout { p: 0.1, ..Dropout::default() }, &[4096, 768])],
};

fn seeded(name: String, op: Dropout, shape: &[usize]) -> Case {
    Case::new(name, op, &[shape]).ids(&[2], u32::MAX).fill(0, InputFill::Uniform(0.5, 1.5))
}

/// `(x, seed [, base]) -> x * keep / (1 - p) [+ base]`: `x` of any shape, `seed` u32 `[2]`.
///
/// The host writes `seed` before each step: the seed of the run and the number of the step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped, in `[0, 1)`.
    pub p: f32,
    /// Distinguishes the uses of dropout in a model: no two may share a stream.
    pub stream: u32,
    /// Whether a last input, of the output's shape, is added to the result.
    pub accumulate: bool,
}

impl Graph {
    /// Zeroes elements of `x` with probability `p` and scales the others by `1 / (1 - p)`.
    ///
    /// `seed` is u32 `[2]`: the seed of the run and the number of the step. Each use in a model needs its own `stream`,
    /// or their masks are equal. For evaluation build the graph without dropout.
    pub fn dropout(&mut self, name: &str, x: Value, seed: Value, p: f32, stream: u32) -> Result<Value> {
        self.op1(name, Dropout { p, stream, accumulate: false }, &[x, seed])
    }
}

impl Dropout {
    /// Elements are kept if their hash is at least this.
    fn threshold(&self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    fn scale(&self) -> f64 {
        1.0 / (1.0 - f64::from(self.p))
    }
}

/// Four random words for the key `[quad, stream, seed, step]`, as the kernel computes them.
fn hash(key: [u32; 4]) -> [u32; 4] {
    fn mix([mut x, mut y, mut z, mut w]: [u32; 4]) -> [u32; 4] {
        x = x.wrapping_add(y.wrapping_mul(w));
        y = y.wrapping_add(z.wrapping_mul(x));
        z = z.wrapping_add(x.wrapping_mul(y));
        w = w.wrapping_add(y.wrapping_mul(z));
        [x, y, z, w]
    }
    let v = mix(key.map(|k| k.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)));
    let v = mix(v.map(|x| x ^ (x >> 16)));
    mix(v.map(|x| x ^ (x >> 16)))
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(format!("the probability must be at least 0 and below 1, got {}", self.p));
        }
        let n = 2 + usize::from(self.accumulate);
        if inputs.len() != n {
            return Err(format!("takes {n} inputs, got {}", inputs.len()));
        }
        if inputs[0].dtype != DType::F32 {
            return Err(format!("x must be f32, got {}", inputs[0]));
        }
        if inputs[1] != TensorType::u32([2]) {
            return Err(format!("the seed must be u32[2], seed and step, got {}", inputs[1]));
        }
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[2], inputs[0].shape.dims())?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        if cx.needs(0) {
            let dx = cx.graph.dropout(&cx.name, dy, cx.inputs[1], self.p, self.stream)?;
            cx.set(0, dx);
        }
        if self.accumulate {
            cx.set(2, dy);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let kernel = table_kernel::<Self>("dropout", SOURCE, "forward").knob("ACCUMULATE", self.accumulate);
        let words = [self.threshold(), (self.scale() as f32).to_bits(), self.stream];
        Ok(elementwise::quads(cx, kernel, &[Bind::In(0), Bind::In(1), Bind::Out(0)], &words))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let [seed, step] = [0, 1].map(|i| inputs[1].data[i] as u32);
        let mut y = inputs[0].clone();
        for (quad, elements) in y.data.chunks_mut(4).enumerate() {
            let words = hash([quad as u32, self.stream, seed, step]);
            for (v, word) in elements.iter_mut().zip(words) {
                *v *= if word >= self.threshold() { self.scale() } else { 0.0 };
            }
        }
        vec![if self.accumulate { y.zip(inputs[2], |y, base| y + base) } else { y }]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        outputs[0].len() as u64 * if self.accumulate { 2 } else { 1 } // the hash is integer work
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Dropout { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: f32 = 0.1;

    /// Which of the first 4 `quads` elements `[stream, seed, step]` drops.
    fn dropped(quads: u32, [stream, seed, step]: [u32; 3]) -> Vec<bool> {
        let threshold = Dropout { p: P, ..Dropout::default() }.threshold();
        (0..quads).flat_map(|quad| hash([quad, stream, seed, step])).map(|word| word < threshold).collect()
    }

    /// How many standard deviations `count` hits of `n` are from what `p` makes likely.
    fn sigmas(count: usize, n: usize, p: f64) -> f64 {
        let n = n as f64;
        ((count as f64 - n * p) / (n * p * (1.0 - p)).sqrt()).abs()
    }

    /// Keys as models have them: small numbers that differ little.
    fn keys() -> impl Iterator<Item = [u32; 3]> {
        (0..24).map(|i| [i % 6, 1000 * (i / 12), i / 6])
    }

    #[test]
    fn the_rate_is_p_for_every_key() {
        for key in keys() {
            let mask = dropped(1 << 14, key);
            let count = mask.iter().filter(|d| **d).count();
            assert!(sigmas(count, mask.len(), f64::from(P)) < 5.0, "{key:?} drops {count} of {}", mask.len());
        }
    }

    #[test]
    fn masks_of_neighbouring_streams_seeds_and_steps_are_independent() {
        for key in keys() {
            let mask = dropped(1 << 12, key);
            assert_eq!(mask, dropped(1 << 12, key), "the same key must give the same mask");
            for which in 0..3 {
                for delta in [1, 2, 1 << 16, 1 << 31] {
                    let mut other = key;
                    other[which] = other[which].wrapping_add(delta);
                    let both = mask.iter().zip(dropped(1 << 12, other)).filter(|(a, b)| **a && *b).count();
                    let expected = f64::from(P) * f64::from(P);
                    assert!(sigmas(both, mask.len(), expected) < 5.0, "{key:?} and {other:?} share {both}");
                }
            }
        }
    }

    #[test]
    fn every_bit_of_the_key_flips_half_of_the_decisions() {
        for bit in 0..128 {
            let mut flips = [0; 4];
            for quad in 0..1 << 12 {
                let key = [quad, 3, 42, quad % 5];
                let mut other = key;
                other[bit / 32] ^= 1 << (bit % 32);
                for ((flip, a), b) in flips.iter_mut().zip(hash(key)).zip(hash(other)) {
                    *flip += usize::from((a ^ b) >> 31 == 1);
                }
            }
            for flip in flips {
                assert!(sigmas(flip, 1 << 12, 0.5) < 5.0, "bit {bit}: {flip} of {}", 1 << 12);
            }
        }
    }

    #[test]
    fn neighbouring_elements_are_independent() {
        let mask = dropped(1 << 14, [3, 42, 7]);
        for lag in [1, 2, 3, 4, 8, 64, 768, 1024] {
            let both = mask.iter().zip(&mask[lag..]).filter(|(a, b)| **a && **b).count();
            assert!(sigmas(both, mask.len() - lag, f64::from(P) * f64::from(P)) < 5.0, "lag {lag}: {both}");
        }
    }

    #[test]
    fn probabilities_outside_zero_to_one_are_errors() {
        let inputs = [TensorType::f32([4]), TensorType::u32([2])];
        for p in [-0.1, 1.0, 2.0, f32::NAN] {
            let err = Dropout { p, ..Dropout::default() }.infer(&inputs).unwrap_err();
            assert!(err.contains("probability"), "{err}");
        }
        assert!(Dropout::default().infer(&inputs).is_ok());
    }
}
