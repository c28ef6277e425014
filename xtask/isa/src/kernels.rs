//! Collects the kernels: every variant that a GPU might run for the benchmarks of the op table.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use throughline::graph::{Node, Op, Source};
use throughline::kernel::{Kernel, Launch};
use throughline::ops::{Case, TABLE};
use throughline::{AdapterClass, Cooperative, Graph, Profile, TensorType};

/// A kernel to compile.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Job {
    /// The kernel's label: the stem of the op's file.
    pub op: String,
    /// The entry point.
    pub entry: String,
    /// Knobs and their values.
    pub knobs: Vec<(String, String)>,
    /// Whether only devices with subgroup operations launch it.
    pub subgroups: bool,
    /// Whether it is the unmeasured choice where arithmetic takes longer than memory: where the hot
    /// loop decides.
    pub heavy: bool,
    /// The text.
    pub wgsl: String,
}

impl Job {
    /// A kernel that is not heavy, for a device with subgroup operations or without.
    pub fn new(kernel: &Kernel, subgroups: bool) -> Result<Job> {
        let knobs = kernel.knobs.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        Ok(Job {
            op: kernel.label.into(),
            entry: kernel.entry.into(),
            knobs,
            subgroups,
            heavy: false,
            wgsl: kernel.wgsl()?,
        })
    }

    /// The value of a knob.
    pub fn knob(&self, name: &str) -> Option<&String> {
        self.knobs.iter().find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// `op.entry[KNOB=value ...]`, and whether it uses subgroups.
    pub fn describe(&self) -> String {
        let knobs: Vec<String> = self.knobs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let subgroups = if self.subgroups { ", subgroups" } else { "" };
        format!("{}.{}[{}]{subgroups}", self.op, self.entry, knobs.join(" "))
    }
}

/// The GPUs that variants are collected for: one without subgroup operations, and AMD's.
pub fn profiles() -> Vec<Profile> {
    let portable = Profile::portable(AdapterClass::Gpu);
    vec![portable.clone(), Profile { subgroups: Some([32, 64]), ..portable }]
}

/// A GPU opened with cooperative matrices of this kind, whose subgroups have these sizes.
pub fn with_matrices(kind: Cooperative, subgroups: [u32; 2]) -> Profile {
    Profile {
        subgroups: Some(subgroups),
        cooperative: Some(kind),
        // What all cards with matrices have.
        max_workgroup_bytes: 32 << 10,
        ..Profile::portable(AdapterClass::Gpu)
    }
}

/// Whether a kernel multiplies matrices.
pub fn has_matrices(job: &Job) -> bool {
    job.wgsl.starts_with("enable wgpu_cooperative_matrix")
}

/// The kernels of the rows whose names are in `ops`, or of all. Each once, though several shapes and
/// profiles may launch it.
pub fn collect(ops: &[String], profiles: &[Profile]) -> Result<Vec<Job>> {
    if let Some(op) = ops.iter().find(|op| !TABLE.iter().any(|row| row.name == **op)) {
        let names: Vec<&str> = TABLE.iter().map(|row| row.name).collect();
        bail!("no op `{op}`; the ops are {}", names.join(", "));
    }
    let mut seen = BTreeMap::new();
    for row in TABLE.iter().filter(|row| ops.is_empty() || ops.iter().any(|op| op == row.name)) {
        let bench = (row.bench)();
        // An op that is not worth a benchmark has a kernel all the same.
        for case in if bench.is_empty() { (row.cases)() } else { bench } {
            let graph = with_gradients(&case).with_context(|| format!("{} {}", row.name, case.name))?;
            for profile in profiles {
                for (kernel, heavy) in
                    of_graph(&graph, profile).with_context(|| format!("{} {}", row.name, case.name))?
                {
                    let job = Job::new(&kernel, profile.subgroups.is_some())?;
                    // The profile without subgroups comes first, and gives its name to what both run.
                    seen.entry((job.entry.clone(), job.wgsl.clone())).or_insert(job).heavy |= heavy;
                }
            }
        }
    }
    let mut jobs: Vec<Job> = seen.into_values().collect();
    jobs.sort();
    Ok(jobs)
}

/// A case's op `y`, and the gradients of its inputs.
fn with_gradients(case: &Case) -> Result<Graph> {
    let (mut graph, inputs, outputs) = case.graph()?;
    let wrt: Vec<_> = inputs.iter().zip(&case.inputs).filter(|(_, spec)| spec.grad).map(|(v, _)| *v).collect();
    for (i, &y) in outputs.iter().take(case.main_outputs).enumerate() {
        let dy = graph.input(&format!("dy{i}"), graph.ty(y).clone())?;
        let product = graph.mul("loss.mul", y, dy)?;
        let loss = graph.sum("loss", product)?;
        graph.gradients(loss, &wrt)?;
    }
    Ok(graph)
}

/// What the nodes of `y` and its gradient would launch, in every variant, also of the op that fusion
/// may put in its place, and whether it is [`Job::heavy`]. The loss is scaffolding: its ops have rows
/// of their own.
fn of_graph(graph: &Graph, profile: &Profile) -> Result<Vec<(Kernel, bool)>> {
    let mut kernels = vec![];
    for node in graph.nodes().iter().filter(|node| node.name == "y" || node.name.starts_with("y.")) {
        let Source::Op(op) = &node.source else { continue };
        if op.is_view() {
            continue;
        }
        let inputs: Vec<TensorType> = node.inputs.iter().map(|&v| graph.ty(v).clone()).collect();
        of_op(op, &inputs, node, profile, &mut kernels)?;
        for output in 0..node.outputs.len() {
            if let Some(fused) = op.with_addend(output) {
                let inputs = [&inputs[..], &node.outputs[output..=output]].concat();
                of_op(&fused, &inputs, node, profile, &mut kernels)?;
            }
        }
    }
    Ok(kernels)
}

/// Floating-point operations a byte from which on arithmetic takes longer: cards offer some 60 for each
/// byte that their memory moves. Products of 512 x 512 have 85.
const HEAVY: u64 = 64;

fn of_op(
    op: &Arc<dyn Op>,
    inputs: &[TensorType],
    node: &Node,
    profile: &Profile,
    to: &mut Vec<(Kernel, bool)>,
) -> Result<()> {
    let outputs = &node.outputs;
    let heavy = op.flops(inputs, outputs) >= HEAVY * op.bytes(inputs, outputs);
    let mut cx = Launch { inputs, outputs, profile, variant: 0 };
    for variant in 0..op.variants(&cx).len().max(1) {
        cx.variant = variant;
        let program = op.launch(&cx).map_err(|e| anyhow::anyhow!("`{}` ({}): {e}", node.name, op.name()))?;
        let kernels = program.dispatches.into_iter().map(|d| d.kernel.on(profile.class));
        to.extend(kernels.map(|kernel| (kernel, heavy && variant == 0)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spirv;

    #[test]
    fn every_kernel_becomes_spirv_with_its_bindings_in_a_row() {
        for row in TABLE {
            let jobs = collect(&[row.name.into()], &profiles()).unwrap();
            assert!(row.sources.is_empty() || !jobs.is_empty(), "{} has no kernels", row.name);
        }
        let matrices = Cooperative::ALL.map(|kind| with_matrices(kind, [32, 32]));
        for job in collect(&[], &[&profiles()[..], &matrices].concat()).unwrap() {
            let shader = spirv::translate(&job.wgsl, &job.entry).unwrap();
            assert_eq!(shader.words[0], 0x0723_0203, "{}", job.describe());
            // The uniform is binding 0, where there is one; storage counts from 1.
            let first = shader.bindings[0].number;
            let in_a_row = shader.bindings.iter().zip(first..).all(|(b, n)| b.number == n && b.uniform == (n == 0));
            assert!(first <= 1 && in_a_row, "{}: {:?}", job.describe(), shader.bindings);
        }
    }

    #[test]
    fn a_kernel_that_several_cases_launch_is_there_once() {
        let mut seen = std::collections::HashSet::new();
        for job in collect(&["matmul".into(), "softmax".into()], &profiles()).unwrap() {
            assert!(seen.insert((job.entry.clone(), job.wgsl.clone())), "{} twice", job.describe());
        }
    }
}
