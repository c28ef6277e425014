//! The settings of an update at a step that the device has counted, for steps whose number the host does not know: the
//! learning rate of a [`Schedule`](crate::optim::Schedule), and AdamW's bias corrections.
//!
//! With [loss scaling](super::loss_scale), whether a step counts is known on the device alone, and nothing waits to hear
//! of it. Rates are within a few units in the last place of those that the host computes in f64.
//!
//! [`optim`](crate::optim) builds these nodes for you. Use the op directly to write your own update step.

use std::f64::consts::PI;

use super::cases::{Case, InputFill, Row};
use super::checks::expect_shape;
use super::loss_scale::expect_counts;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{DType, TensorType};

const SOURCE: &str = include_str!("../../shaders/schedule.wgsl");

pub(super) const ROW: Row = Row {
    name: "schedule",
    summary: "learning rate and bias corrections of the step that the device has counted",
    sources: &[SOURCE],
    cases: || {
        // Settings differ by orders of magnitude, and the largest would hide what the others are off: in each case one
        // is the largest.
        const RATE: &[f64] = &[0.5, 1e-6, 1e-6, 1e-6];
        const CORRECTIONS: [&[f64]; 2] = [
            &[1e-6, 0.0, 0.0, 0.0, 0.0, -0.105_360_515_657_826_3, 0.0, 0.0], // ln 0.9
            &[1e-6, 0.0, 0.0, 0.0, 0.0, 0.0, -0.001_000_500_333_583_5, 0.0], // ln 0.999
        ];
        let kinds: [(&str, &'static [f64]); 3] = [
            ("constant", &[3.0, 10.0, 110.0, 0.1, 0.0]),
            ("cosine", &[3.0, 10.0, 110.0, 0.1, 1.0]),
            ("linear", &[3.0, 10.0, 110.0, 0.0, 2.0]),
        ];
        let at: [&'static [f64]; 7] = [
            &[0.0, 0.0, 4.0],
            &[1.0, 1.0, 0.0],
            &[1.0, 7.0, 0.0],
            &[1.0, 11.0, 0.0],
            &[1.0, 60.0, 3.0],
            &[1.0, 110.0, 0.0],
            &[1.0, 100_000.0, 0.0],
        ];
        let mut cases = vec![];
        for counts in at {
            for (kind, schedule) in kinds {
                cases.push(case(&format!("{kind} at {}", counts[1]), [RATE, schedule, counts]));
            }
            for (i, hyper) in CORRECTIONS.into_iter().enumerate() {
                let name = format!("correction {} at {}", i + 1, counts[1]);
                cases.push(case(&name, [hyper, kinds[0].1, counts]));
            }
        }
        cases.push(case("cosine to zero", [RATE, &[1.0, 0.0, 1000.0, 0.0, 1.0], &[0.0, 1000.0, 0.0]]));
        cases.push(case("warm-up alone", [RATE, &[1.0, 5.0, 5.0, 0.5, 2.0], &[0.0, 6.0, 0.0]]));
        cases
    },
    bench: || {
        const HYPER: &[f64] = &[1.0, 0.9, 0.95, 1e-8, 0.1, -0.1, -0.05, 1.0];
        vec![case("8", [HYPER, &[3e-3, 10.0, 110.0, 0.1, 1.0], &[0.0, 60.0, 0.0]])]
    },
};

fn case(name: &str, [hyper, schedule, counts]: [&'static [f64]; 3]) -> Case {
    Case::new(name, Scheduled, &[&[hyper.len()], &[5]])
        .ids(&[3], 1)
        .fill(0, InputFill::Values(hyper))
        .fill(1, InputFill::Values(schedule))
        .fill(2, InputFill::Values(counts))
        .forward_only()
        // Far tighter than for tensors: one rate is for all parameters. Devices may be off by 4e-7 in an exponential.
        .tolerance(1e-12)
}

/// `(hyper, schedule, counts) -> hyper`.
///
/// `hyper` is what an update takes, `[4]` for [`Sgd`](super::sgd::Sgd) and [`Muon`](super::muon) or `[8]` for
/// [`AdamW`](super::adamw::AdamW), but with a factor of the learning rate in place of the rate, and the logarithms of
/// both betas in place of the bias corrections, 1 - beta^t. (The host computes them in f64, from the betas as f32, and
/// no less than -200.) `schedule` is f32 `[5]`: highest rate, steps of warm-up, step at which the decay ends, final rate
/// as a fraction of the highest, and 0 for no decay, 1 for half a cosine, 2 for a line. `counts` is that of a
/// [`LossScale`](super::loss_scale::LossScale); its second element counts the applied steps, this one included. Up to
/// 2^24 steps are exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheduled;

impl Graph {
    /// The settings of an update at the step that the device has counted: see [`Scheduled`].
    pub fn scheduled(&mut self, name: &str, hyper: Value, schedule: Value, counts: Value) -> Result<Value> {
        self.op1(name, Scheduled, &[hyper, schedule, counts])
    }
}

impl Op for Scheduled {
    fn name(&self) -> &'static str {
        "schedule"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [hyper, schedule, counts] = inputs else { return Err(format!("takes 3 inputs, got {}", inputs.len())) };
        if hyper.dtype != DType::F32 || !matches!(hyper.shape.dims(), [4] | [8]) {
            return Err(format!("hyper must be f32[4] or f32[8], got {hyper}"));
        }
        if schedule.dtype != DType::F32 {
            return Err(format!("schedule must be f32, got {schedule}"));
        }
        expect_shape("schedule", schedule, &[5])?;
        expect_counts(counts)?;
        Ok(vec![hyper.clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("optimiser steps are not differentiated"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let len = cx.inputs[0].len() as u32;
        let kernel = table_kernel::<Self>("schedule", SOURCE, "forward").knob("LEN", len);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0)], &[], [1, 1, 1]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let [hyper, schedule, counts] = inputs else { return vec![] };
        let [peak, warmup, end, last, decay] = schedule.data[..] else { return vec![] };
        let t = counts.data[1].max(1.0);
        let step = t - 1.0;
        let done = ((step - warmup) / (end - warmup).max(1.0)).min(1.0);
        let left = if decay == 1.0 { 0.5 * (1.0 + (PI * done).cos()) } else { 1.0 - done };
        let mut settings = (*hyper).clone();
        settings.data[0] *= match () {
            _ if step < warmup => peak * (step + 1.0) / warmup,
            _ if decay == 0.0 => peak,
            _ => peak * (last + (1.0 - last) * left),
        };
        if let [_, _, _, _, _, first, second, _] = &mut settings.data[..] {
            (*first, *second) = (-(t * *first).exp_m1(), -(t * *second).exp_m1());
        }
        vec![settings]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        60
    }
}
