//! The op, and the sizes of the product that it is.

use crate::tensor::Shape;

/// `(a, b [, bias] [, base] [, base of sums]) -> op(a) op(b) [+ bias] [+ base] [, column sums of b]`.
///
/// Without `batch`, leading dimensions are collapsed into rows: `a` `[batch, time, k]` and `b` `[k, n]` give
/// `[batch, time, n]`. With `batch`, all dimensions but the last two must be equal, and each pair of matrices is
/// multiplied.
///
/// [`Graph::matmul`](crate::Graph::matmul), [`Graph::matmul_nt`](crate::Graph::matmul_nt) and
/// [`Graph::linear`](crate::Graph::linear) cover the common cases. Add this op with
/// [`Graph::op1`](crate::Graph::op1) for the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matmul {
    /// Whether `a` is `[k, m]` in memory.
    pub transpose_a: bool,
    /// Whether `b` is `[n, k]` in memory.
    pub transpose_b: bool,
    /// Whether to multiply matrix by matrix over leading dimensions.
    pub batch: bool,
    /// Whether a bias `[n]` follows `b`.
    pub bias: bool,
    /// Whether another input, of the output's shape, is added to the result.
    pub accumulate: bool,
    /// Whether a second output `[n]` has the sums of b over k: with `a` transposed and `b` the cotangent of a linear
    /// layer, the gradient of its bias beside that of its weight. Not with `batch` or `transpose_b`.
    pub column_sums: bool,
    /// Whether a last input `[n]` is added to these sums.
    pub accumulate_sums: bool,
}

/// Sizes of one product.
pub(super) struct Dims {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl Matmul {
    pub(super) fn dims(&self, a: &Shape, b: &Shape) -> Result<Dims, String> {
        let matrix = |s: &Shape, name: &str| match (self.batch, s.dims()) {
            (true, [.., r, c]) => Ok((*r, *c)),
            (false, [_, ..]) => Ok((s.rows(), s.cols())),
            _ => Err(format!("{name} must have at least two dimensions, got {s}")),
        };
        let (ar, ac) = matrix(a, "a")?;
        let (br, bc) = matrix(b, "b")?;
        let (m, ka) = if self.transpose_a { (ac, ar) } else { (ar, ac) };
        let (kb, n) = if self.transpose_b { (bc, br) } else { (br, bc) };
        if ka != kb {
            return Err(format!("inner dimensions differ: {ka} of a {a} against {kb} of b {b}"));
        }
        let lead = |s: &Shape| s.dims()[..s.rank().saturating_sub(2)].to_vec();
        if self.batch && lead(a) != lead(b) {
            return Err(format!("batch dimensions differ: a {a} against b {b}"));
        }
        let batch = if self.batch { lead(a).iter().product() } else { 1 };
        Ok(Dims { batch, m, n, k: ka })
    }

    /// Number of inputs.
    pub(super) fn inputs(&self) -> usize {
        2 + [self.bias, self.accumulate, self.accumulate_sums].into_iter().filter(|x| *x).count()
    }

    /// Index of the input that the result is added to, if there is one.
    pub(super) fn base(&self) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    /// Index of the input that the column sums are added to, if there is one.
    pub(super) fn base_of_sums(&self) -> Option<usize> {
        self.accumulate_sums.then(|| self.inputs() - 1)
    }

    /// The dimension along which b is contiguous.
    pub(super) fn b_axis(&self, d: &Dims) -> usize {
        if self.transpose_b { d.k } else { d.n }
    }
}
