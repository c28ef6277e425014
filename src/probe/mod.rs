//! Looking into a running graph with probes, and changing its values with patches.
//!
//! Use a [`Probe`] to watch training (norms of the stream, of gradients, of weights) or to read activations. It taps a
//! named node or the gradient of one, and measures it by a reduction on the GPU within the step, or copies the whole
//! tensor. All reductions write to one small tensor, and a single copy brings that to the host whenever it is
//! convenient, such as one step later. A reduction is scheduled right after the node that it reads
//! ([`Op::runs_early`]), so buffers can be overwritten in place as usual. The plan holds an extra copy only where a
//! probe compares two values that are never in memory at the same time.
//!
//! Use a [`Patch`] for ablation and steering: it changes a named node for everything that reads it.
//!
//! [`standard`] lists the usual probes of a transformer, and [`views`](crate::views) has analyses that take a pass of
//! their own. Trainers accept probes in [`TrainOptions`](crate::train::TrainOptions).
//!
//! ```
//! use std::sync::Arc;
//! use throughline::probe::{Instruments, Measure, Probe, Tap};
//! use throughline::{ExecOptions, Executable, Gpu, Graph, TensorType};
//! let mut g = Graph::new();
//! let x = g.input("x", TensorType::f32([2]))?;
//! let w = g.param("w", [2, 1])?;
//! let y = g.matmul("y", x, w)?;
//! let loss = g.sum("loss", y)?;
//! let probes = [
//!     Probe::new("rms", Tap::forward("x"), Measure::Rms),
//!     Probe::new("largest", Tap::gradient("w"), Measure::MaxAbs),
//!     Probe::new("alike", Tap::forward("x"), Measure::Cosine(Tap::gradient("x"))),
//! ];
//! let instruments = Instruments::with_gradients(&mut g, loss, &probes)?;
//! let gpu = Gpu::headless_blocking()?;
//! let plan = gpu.plan(&g, &[&[loss], &instruments.outputs()[..]].concat())?;
//! let exec = Executable::new_blocking(&gpu, Arc::new(plan), ExecOptions::default())?;
//! exec.write(x, &[3.0f32, -4.0])?;
//! exec.write(w, &[3.0f32, -4.0])?;
//! let mut encoder = gpu.device().create_command_encoder(&Default::default());
//! exec.record(&mut encoder)?;
//! let readback = instruments.record_read(&exec, &mut encoder, 0)?;
//! gpu.submit(encoder)?;
//! let values: Vec<f64> = readback.wait_blocking()?.values.iter().map(|r| r.value).collect();
//! assert!((values[0] - 12.5f64.sqrt()).abs() < 1e-6 && values[1] == 4.0 && (values[2] - 1.0).abs() < 1e-6);
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! [`Op::runs_early`]: crate::graph::Op::runs_early

mod instruments;
mod patch;
mod question;
mod readings;
mod standard;

pub use instruments::{Instruments, gradient_taps};
pub use patch::{Edit, Patch, Patched};
pub(crate) use question::tap_name;
pub use question::{Measure, Probe, Tap};
pub use readings::{ProbeReadback, Reading, Readings, TensorReading};
pub(crate) use standard::branches;
pub use standard::standard;
