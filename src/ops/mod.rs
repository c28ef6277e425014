//! The ops: what a graph can compute, and the table that lists them.
//!
//! Most programs never name anything in here: they call the methods that each op adds to [`Graph`](crate::Graph), such
//! as [`matmul`](crate::Graph::matmul) or [`softmax`](crate::Graph::softmax). Come here for the exact formula, shapes
//! and gradient of an op; for settings that have no method of their own, which [`Graph::op`](crate::Graph::op) takes as
//! a struct; or to write an op yourself, which [`Custom`] is for.
//!
//! An op is a Rust file and a WGSL file with the same stem, `src/ops/<op>.rs` and `shaders/<op>.wgsl` (or a folder
//! `shaders/<op>/`), and one row in [`TABLE`]. Tests, benchmarks, shader validation and the generated op table iterate
//! over the rows. Autodiff, fusion, the planner and the executor only call the trait [`Op`]. Nothing else knows which
//! ops exist, so an op of an application works exactly like the ones here.

pub mod adamw;
pub mod attention;
pub mod cache;
pub mod cast;
pub mod chunks;
pub mod concat;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod fill;
pub mod gather;
pub mod gelu;
pub mod l2_norm;
pub mod loss_scale;
pub mod map;
pub mod matmul;
pub mod matmul_by_id;
pub mod muon;
pub mod norm;
pub mod packed;
pub mod packed_i8;
pub mod parts;
pub mod patches;
pub mod pool;
pub mod products;
pub mod reduce;
pub mod reshape;
pub mod residual_add;
pub mod rope;
pub mod scale;
pub mod schedule;
pub mod sgd;
pub mod slice;
pub mod softmax;
pub mod stats;
pub mod sum;
pub mod swiglu;
pub mod together;
pub mod top_k;
pub mod transpose;
pub mod windows;

mod axis;
mod cases;
mod checks;
mod cooperative;
mod custom;
mod doc;
mod elements;
mod elementwise;
mod rowwise;
mod source;
mod table;

pub use crate::graph::{Op, Vjp};
pub use crate::kernel::{Bind, Dispatch, Launch, Program};
pub use cases::{Case, InputFill, InputSpec, Row, random_array};
pub(crate) use checks::{NOT_NEGATIVE, POSITIVE, check_lr, is_not_negative, is_positive};
pub use custom::Custom;
pub use doc::markdown;
pub use elements::{Elements, Word};
pub use table::TABLE;
