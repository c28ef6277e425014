//! Softmax attention without storing the matrix of scores (FlashAttention, Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>).
//!
//! `o = softmax(scale * q k^T) v` for each head, causal or full. Several query heads may share a key and value head
//! (GQA, Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>). Forward also outputs `lse`, the log of the sum of
//! exponentials of each row of scores, from which backward recomputes the probabilities.

mod backward;
mod cases;
mod forward;
mod heads;
mod launch;
mod matrices;
mod texts;
mod tiles;

pub use backward::AttentionBackward;
pub use forward::{AttentionFrom, CachedAttention};
pub use heads::Attention;

use super::cases::Row;

pub(super) const ROW: Row = Row {
    name: "attention",
    summary: "o = softmax(scale * q k^T) v by head, causal or full, grouped heads; no T x T matrix",
    sources: texts::SOURCES,
    cases: cases::cases,
    bench: cases::bench,
};
