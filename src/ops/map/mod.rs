//! Elementwise functions: one op that applies any of a table, or one of your own, to operands that broadcast.
//!
//! [`Graph`](crate::Graph) has a method for each: arithmetic ([`add`](crate::Graph::add),
//! [`div`](crate::Graph::div), [`pow`](crate::Graph::pow), ..), activations ([`relu`](crate::Graph::relu),
//! [`silu`](crate::Graph::silu), [`tanh`](crate::Graph::tanh), ..), comparisons and
//! [`select`](crate::Graph::select), and losses ([`mse`](crate::Graph::mse),
//! [`binary_cross_entropy`](crate::Graph::binary_cross_entropy), ..). The page `docs/ops.md` lists their expressions.
//! One of your own takes a few lines: see [`Map`].
//!
//! ```
//! use throughline::{Graph, TensorType};
//! let mut g = Graph::new();
//! let x = g.input("x", TensorType::f32([32, 8]))?;
//! let mean = g.input("mean", TensorType::f32([8]))?;
//! let scale = g.input("scale", TensorType::f32([32, 1]))?;
//! let centred = g.sub("", x, mean)?; // a node without a name takes the function's
//! let y = g.div("y", centred, scale)?;
//! assert_eq!(g.ty(y).shape.dims(), [32, 8]);
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! # Broadcasting
//!
//! Operands need not have the same shape. As in NumPy, shapes are aligned at the right; a dimension of 1 repeats, and so
//! does one that an operand lacks: `[2, 3]` with `[3]`, `[2, 1]` or `[1]` gives `[2, 3]`, and `[2, 1]` with `[3]`, too.
//! The gradient of such an operand is summed over the dimensions along which it repeats.
//!
//! An operand that repeats costs little more than one that does not, as long as its last dimension, or what repeats along
//! that, is a multiple of 4. Otherwise elements are computed one by one, not four at a time.

mod broadcast;
mod cases;
mod chain;
mod function;
mod functions;
mod kernel;
mod methods;
mod op;

pub use chain::Chain;
pub(super) use functions::{Entry, FUNCTIONS};
pub(super) use kernel::{call, function, helpers};
pub use op::Map;

use super::cases::Row;

pub(super) const ROW: Row = Row {
    name: "map",
    summary: "y = f(a, b, ..), element by element, for any of the functions below; shapes broadcast",
    sources: kernel::SOURCES,
    cases: cases::cases,
    bench: cases::bench,
};
