//! Tensors as columns along one of their axes: for ops that work along any axis.

use crate::tensor::Shape;

/// The shape without one of its axes; `[1]` if it has no other.
pub(super) fn without_axis(shape: &Shape, axis: usize) -> Shape {
    let mut dims = shape.dims().to_vec();
    dims.remove(axis);
    if dims.is_empty() { [1].into() } else { dims.into() }
}

/// A tensor as `[planes, n, inner]`, with `n` along an axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub planes: usize,
    pub n: usize,
    pub inner: usize,
}

impl Columns {
    pub fn of(shape: &Shape, axis: usize) -> Self {
        let (before, rest) = shape.dims().split_at(axis);
        Columns { planes: before.iter().product(), n: rest[0], inner: rest[1..].iter().product() }
    }

    /// The index of element `i` of column `c`.
    pub fn at(self, c: usize, i: usize) -> usize {
        (c / self.inner * self.n + i) * self.inner + c % self.inner
    }

    /// The column of the element at this index of the tensor.
    pub fn column(self, at: usize) -> usize {
        at / (self.n * self.inner) * self.inner + at % self.inner
    }

    /// As many columns in a tensor of `elements` in all, which differs in the length of the axis.
    pub fn with_length(self, elements: usize) -> Self {
        Columns { n: elements / (self.planes * self.inner), ..self }
    }

    /// Elements of a unit that kernels load at once.
    pub fn width(self) -> usize {
        let contiguous = if self.inner == 1 { self.n } else { self.inner };
        if contiguous.is_multiple_of(4) { 4 } else { 1 }
    }

    /// The numbers of columns, in units; of units in a column; and of units from one of those to the next.
    pub fn units(self) -> [usize; 3] {
        match self.inner {
            1 => [self.planes, self.n / self.width(), 1],
            inner => [self.planes * inner / self.width(), self.n, inner / self.width()],
        }
    }
}
