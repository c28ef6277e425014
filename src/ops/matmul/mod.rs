//! Matrix products with optional transposes, batch, bias, and addition to what the output holds.
//!
//! `y = op(a) op(b) + bias`, where `op` may transpose. Backward takes two more matmuls and a sum.

mod cases;
mod launch;
mod op;
mod product;
mod tiles;

pub use product::Matmul;

use super::cases::Row;

pub(super) const ROW: Row = Row {
    name: "matmul",
    summary: "y = op(a) op(b) + bias, where op may transpose; batched; can add to the stream in its epilogue",
    sources: launch::SOURCES,
    cases: cases::cases,
    bench: cases::bench,
};
