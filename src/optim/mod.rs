//! Optimisers: AdamW, and Muon for the hidden matrices, over parameters in arenas.
//!
//! A [`Trainer`](crate::train::Trainer) contains all of this; configure it with [`AdamWConfig`], [`MuonConfig`] and
//! [`Schedule`]. Use [`Optimizer`] and [`Arena`] directly to train a graph that is not a transformer.
//!
//! Parameters, gradients and both moments are one arena each, all with the same layout. An arena is a single buffer, so
//! a step is one AdamW dispatch, one norm reduction and one clear. Where the adapter's limits require it, it is as few
//! buffers as possible, with one of each per buffer. Muon's matrices have buffers of their own, with matrices of one
//! shape next to each other, so that they form one tensor for matmul.

mod arena;
mod config;
mod file;
mod muon;
mod optimizer;
mod plan;
mod schedule;

pub use arena::{Arena, ArenaLayout, ArenaPart, ArenaPlace};
pub use config::{AdamWConfig, OptimizerConfig, SgdConfig};
pub(crate) use file::{Named, OPTIMIZER, restore, restore_some, save, start_of, to_bytes};
pub use muon::{MuonConfig, MuonScale};
pub use optimizer::Optimizer;
pub use plan::OptimizerPlan;
pub use schedule::{Decay, Schedule};
