//! Dense f64 arrays on the host, for the reference interpreter.

use crate::tensor::Shape;

/// A dense f64 array in row-major order. Integer tensors hold their values as f64, exactly.
///
/// Ops define their results on these ([`Op::reference`](crate::ops::Op::reference)), and
/// [`reference::run`](crate::reference::run) takes and returns them.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Dimensions.
    pub shape: Shape,
    /// Elements in row-major order.
    pub data: Vec<f64>,
}

impl Array {
    /// An array with these elements.
    ///
    /// # Panics
    ///
    /// If there are more or fewer of them than the shape has.
    pub fn new(shape: impl Into<Shape>, data: Vec<f64>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.len(), data.len(), "array of shape {shape} given {} elements", data.len());
        Array { shape, data }
    }

    /// An array of zeros.
    pub fn zeros(shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Array { data: vec![0.0; shape.len()], shape }
    }

    /// Applies `f` to every element.
    pub fn map(&self, f: impl FnMut(f64) -> f64) -> Self {
        Array { shape: self.shape.clone(), data: self.data.iter().copied().map(f).collect() }
    }

    /// Combines two arrays element by element. `other` repeats over leading dimensions if it is shorter.
    pub fn zip(&self, other: &Array, mut f: impl FnMut(f64, f64) -> f64) -> Self {
        let n = other.data.len();
        let data = self.data.iter().enumerate().map(|(i, &a)| f(a, other.data[i % n])).collect();
        Array { shape: self.shape.clone(), data }
    }

    /// The rows along the last dimension.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.data.chunks_exact(self.shape.cols())
    }

    /// The sum of the products of corresponding elements.
    pub fn dot(&self, other: &Array) -> f64 {
        self.data.iter().zip(&other.data).map(|(a, b)| a * b).sum()
    }
}

/// Normalised mean squared error, `sum((got - want)^2) / sum(want^2)`: how the tests compare a tensor with the
/// reference. Zero against zero is 0, and an infinity against the same one, too; a NaN, or any difference from all
/// zeros, is infinite.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    let (mut err, mut norm) = (0.0, 0.0);
    let differs = |&(g, w): &(&f32, &f64)| w.is_finite() || f64::from(*g) != *w;
    for (&g, &w) in got.iter().zip(want).filter(differs) {
        err += (f64::from(g) - w).powi(2);
        norm += w * w;
    }
    match (got.len() == want.len() && err.is_finite(), err == 0.0) {
        (false, _) => f64::INFINITY,
        (true, true) => 0.0,
        // Below this norm a tensor counts as zero: f32 noise around an exact zero is not an error.
        (true, false) if norm < 1e-20 * want.len() as f64 => {
            if err < 1e-12 * want.len() as f64 {
                0.0
            } else {
                f64::INFINITY
            }
        }
        (true, false) => err / norm,
    }
}
