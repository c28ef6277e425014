//! Optimisers: AdamW, Muon for hidden matrices, and SGD, over parameters in arenas.
//!
//! A [`GraphTrainer`](crate::train::GraphTrainer) contains all of this and trains any graph: configure it with an
//! [`OptimizerConfig`] and a [`Schedule`]. For a training loop of your own there are two more ways.
//!
//! **An [`Optimizer`] over arenas** updates all parameters with few dispatches, in a plan of its own. This is what
//! trainers do:
//!
//! ```
//! use std::collections::HashMap;
//! use std::sync::Arc;
//! use throughline::optim::{Arena, ArenaLayout, Optimizer, SgdConfig};
//! use throughline::{ExecOptions, Executable, Gpu, TensorType};
//!
//! let gpu = Gpu::headless_blocking()?;
//! let mut g = gpu.graph();
//! let x = g.input("x", TensorType::f32([1, 2]))?;
//! let w = g.param("w", [2, 1])?;
//! let y = g.matmul("y", x, w)?;
//! let loss = g.sum("loss", y)?;
//! let dw = g.gradients(loss, &[w])?[0];
//! let state = g.state("dw", TensorType::f32([2, 1]))?;
//! g.store(dw, state)?;
//!
//! let layout = Arc::new(ArenaLayout::of(&g, &[w], gpu.profile().max_tensor_bytes())?);
//! let (params, grads) = (Arena::zeros(&gpu, "params", &layout)?, Arena::zeros(&gpu, "grads", &layout)?);
//! let bindings = HashMap::from([(w, params.tensors[0].clone()), (state, grads.tensors[0].clone())]);
//! let exec = Executable::new_blocking(&gpu, Arc::new(gpu.plan(&g, &[loss])?), ExecOptions::bound(bindings))?;
//! let optimizer = Optimizer::new_blocking(&gpu, SgdConfig::default(), &params, &grads)?;
//!
//! exec.write(x, &[1.0f32, 2.0])?;
//! let mut encoder = gpu.device().create_command_encoder(&Default::default());
//! exec.record(&mut encoder)?;
//! optimizer.record(&mut encoder, 0.5, 0)?; // at a learning rate of 0.5; this is step 0
//! gpu.submit(encoder)?;
//! assert_eq!(params.read_blocking(&gpu)?, [[-0.5, -1.0]]);
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! **An update in the graph itself** needs neither arenas nor bindings, and costs a dispatch for each parameter:
//! [`Graph::store`](crate::Graph::store) and [`Graph::adamw`](crate::Graph::adamw) show how.
//!
//! # Loss scaling
//!
//! Gradients in 16 bits need a loss that is multiplied by a scale, and steps that change nothing where the scale was too
//! large. [`LossScaling`] describes it; trainers take it as a setting. For a training loop of your own, plan the
//! optimiser with [`OptimizerPlan::scaled`], and multiply the loss by [`Optimizer::loss_scale`] before you take
//! gradients.
//!
//! # Arenas
//!
//! Parameters, gradients and moments are one arena each, all with the same layout. An arena is a single buffer, so a
//! step is one dispatch of the optimiser, one norm reduction and one clear. Where the adapter's limits require it, it
//! is as few buffers as possible, with one of each per buffer. Muon's matrices have buffers of their own, with matrices
//! of one shape next to each other, so that they form one tensor for matmul.

mod arena;
mod config;
mod copies;
mod file;
mod muon;
mod optimizer;
mod plan;
mod scaling;
mod schedule;

pub use arena::{Arena, ArenaLayout, ArenaPart, ArenaPlace};
pub use config::{AdamWConfig, OptimizerConfig, SgdConfig};
pub(crate) use copies::{Copies, CopiesPlan};
pub(crate) use file::{Named, OPTIMIZER, restore, restore_some, save, start_of, to_bytes};
pub use muon::{MuonConfig, MuonScale};
pub use optimizer::Optimizer;
pub use plan::OptimizerPlan;
pub use scaling::{LossScaleState, LossScaling};
pub use schedule::{Decay, Schedule};
