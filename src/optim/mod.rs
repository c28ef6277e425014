//! Parameters in arenas, and AdamW over them, or AdamW and Muon.
//!
//! Parameters, gradients and both moments are each an arena with the same layout: one buffer, so that a
//! step is one AdamW dispatch, one norm reduction and one clear; or as few buffers as the adapter's
//! limits ask for, and then one of each per buffer. Muon's matrices have buffers of their own, those of one shape
//! side by side, so that they are one tensor to matmul.

mod arena;
mod muon;
mod optimizer;
mod plan;
mod schedule;

pub use arena::{Arena, ArenaLayout, ArenaPart, ArenaPlace};
pub use muon::{MuonConfig, MuonScale};
pub use optimizer::Optimizer;
pub use plan::OptimizerPlan;
pub use schedule::{AdamWConfig, Decay, Schedule};
