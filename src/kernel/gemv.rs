//! What the planner needs to know of ops on few rows to compute them in one kernel: products, and what makes their
//! input.

use std::any::{Any, TypeId};

use super::knobs::Kernel;
use crate::error::Result;

/// The most rows that count as few.
pub(crate) const FEW_ROWS: usize = 4;

/// WGSL that an op offers to a kernel that does the work of several.
#[derive(Clone, Debug)]
pub(crate) struct Excerpt {
    text: Kernel,
    op: TypeId,
}

impl Excerpt {
    fn new<O: Any>(text: &'static str, declares: &'static str) -> Self {
        Excerpt { text: Kernel::new("products", text, declares), op: TypeId::of::<O>() }
    }

    /// Whether it is an op of this type that offers it, and not another in its name: such a text may run unchecked.
    pub fn is_of(&self, op: &dyn Any) -> bool {
        self.op == op.type_id()
    }

    /// The text with its knobs set.
    pub fn wgsl(&self) -> Result<String> {
        self.text.wgsl()
    }
}

/// A product of a few rows with a weight, `y = x w^T [+ bias]`, in WGSL: how an op of inputs `(x, w [, bias])` offers
/// to be computed in one kernel with the other products of `x`. See [`Op::gemv`](crate::ops::Op::gemv).
///
/// Only ops of this crate can make one.
#[derive(Clone, Debug)]
pub struct Gemv {
    /// Declares `share`, a slice's share of a column, which reads the weight as `w` and x by `x_quad`.
    pub(crate) excerpt: Excerpt,
    /// Type of an element of the weight's binding.
    pub(crate) element: &'static str,
    /// Rows of x.
    pub(crate) rows: usize,
    /// Columns of y.
    pub(crate) n: usize,
    /// Length of a row of x.
    pub(crate) k: usize,
    /// Whether `share` makes four neighbouring columns, as a quad, and not one.
    pub(crate) quads: bool,
    /// Whether a bias follows the weight.
    pub(crate) bias: bool,
}

impl Gemv {
    /// A product `[rows, k] x [n, k]` of the op `O`, by this text.
    pub(crate) fn new<O: Any>(text: &'static str, element: &'static str, [rows, n, k]: [usize; 3]) -> Self {
        let excerpt = Excerpt::new::<O>(text, "share");
        Gemv { excerpt, element, rows, n, k, quads: false, bias: false }.with(|text| text.knob("N", n as u32))
    }

    /// With these knobs of its text set.
    pub(crate) fn with(mut self, knobs: impl FnOnce(Kernel) -> Kernel) -> Self {
        self.excerpt.text = knobs(self.excerpt.text);
        self
    }
}

/// An op on rows in WGSL: how an op of inputs `(x, a, b, ..)`, of which all but x are as long as a row, offers to be
/// computed as another kernel reads its result. See [`Op::on_read`](crate::ops::Op::on_read).
///
/// Only ops of this crate can make one.
#[derive(Clone, Debug)]
pub struct OnRead {
    /// Declares `prepare`, which every invocation of a workgroup calls first, and `x_quad`.
    pub(crate) excerpt: Excerpt,
    /// What the text calls the inputs after x, as arrays of quads.
    pub(crate) inputs: &'static [&'static str],
    /// Its `p.eps`.
    pub(crate) eps: f32,
}

impl OnRead {
    /// That of the op `O`, by this text.
    pub(crate) fn new<O: Any>(text: &'static str, inputs: &'static [&'static str], eps: f32) -> Self {
        OnRead { excerpt: Excerpt::new::<O>(text, "x_quad"), inputs, eps }
    }
}
