//! A case as a graph with a loss, and what it can be run with.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use half::f16;

use super::guarded::Guarded;
use crate::array::Array;
use crate::device::{ExecOptions, Executable, Gpu};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::ops::{Case, random_array};
use crate::plan::{Plan, variants};
use crate::profile::{AdapterClass, Profile};
use crate::reference;
use crate::tensor::DType;

/// A case's op in a graph, with data for its inputs and, where it has a gradient, the loss `sum(dy * y)` over its main
/// outputs for random `dy`, and the gradient of that with respect to its inputs. What [`kernels`](super::kernels) and
/// the crate's benchmarks run.
#[derive(Clone, Debug)]
pub struct Harness {
    graph: Graph,
    given: HashMap<Value, Array>,
    outputs: Vec<Value>,
    loss: Option<Value>,
    gradients: Vec<Gradient>,
}

/// The gradient of one input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gradient {
    /// Index of the input.
    pub index: usize,
    pub input: Value,
    pub gradient: Value,
}

impl Harness {
    /// The graph of a case. The data depend on nothing but the case and `seed`.
    pub fn new(case: &Case, seed: u64) -> Result<Harness> {
        let (mut graph, inputs, outputs) = case.graph()?;
        let mut given: HashMap<Value, Array> = inputs.iter().copied().zip(case.data(seed)).collect();
        let mut loss = None;
        for (i, &y) in outputs.iter().take(case.main_outputs).enumerate() {
            let ty = graph.ty(y).clone();
            let dy = graph.input(&format!("dy{i}"), ty.clone())?;
            let random = random_array(&ty.shape, seed + 100 + i as u64);
            given.insert(dy, if case.is_rounded { random.map(|x| f16::from_f64(x).to_f64()) } else { random });
            let product = graph.mul(&format!("loss{i}"), y, dy)?;
            let part = graph.sum(&format!("loss{i}.sum"), product)?;
            loss = Some(match loss {
                None => part,
                Some(sum) => graph.residual_add("loss", sum, part)?,
            });
        }
        let mut gradients = vec![];
        if let Some(loss) = loss {
            let wrt: Vec<(usize, Value)> =
                inputs.iter().copied().enumerate().filter(|(i, _)| case.inputs[*i].grad).collect();
            let values: Vec<Value> = wrt.iter().map(|(_, v)| *v).collect();
            let computed = graph.gradients(loss, &values)?;
            // Each as its input is.
            for (_, &gradient) in wrt.iter().zip(&computed).filter(|((i, _), _)| case.inputs[*i].ty.dtype == DType::F16)
            {
                store_halved(&mut graph, gradient)?;
            }
            gradients = (wrt.into_iter().zip(computed))
                .map(|((index, input), gradient)| Gradient { index, input, gradient })
                .collect();
        }
        Ok(Harness { graph, given, outputs, loss, gradients })
    }

    /// The graph: inputs `x0`, `x1`, .. and `dy0`, .., the op `y`, and what the loss and its gradient add.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The op's outputs.
    pub fn outputs(&self) -> &[Value] {
        &self.outputs
    }

    /// A value's name for messages, such as `y`; with its number where its node has several outputs.
    pub(super) fn name(&self, value: Value) -> String {
        let name = self.graph.name(value);
        match self.graph.nodes()[value.node()].outputs.len() {
            1 => format!("`{name}`"),
            _ => format!("`{name}:{}`", value.output()),
        }
    }

    pub(super) fn loss(&self) -> Option<Value> {
        self.loss
    }

    pub(super) fn gradients(&self) -> &[Gradient] {
        &self.gradients
    }

    /// Data for the graph's inputs.
    pub(super) fn given(&self) -> &HashMap<Value, Array> {
        &self.given
    }

    /// What is compared: the op's outputs, then the gradients of its inputs.
    pub fn wanted(&self) -> Vec<Value> {
        self.outputs.iter().copied().chain(self.gradients.iter().map(|g| g.gradient)).collect()
    }

    /// What they should be, in f64.
    pub fn reference(&self) -> Result<Vec<Array>> {
        reference::run(&self.graph, &self.given, &self.wanted())
    }

    /// A plan that computes them, with a kernel of its own for the op.
    pub fn plan(&self, profile: &Profile) -> Result<Plan> {
        Plan::unfused(&self.graph, &self.wanted(), profile)
    }

    /// A plan for this target.
    pub(super) fn plan_for(&self, target: &Target) -> Result<Plan> {
        match target.fused {
            true => Plan::new(&self.graph, &self.wanted(), &target.profile),
            false => self.plan(&target.profile),
        }
    }

    /// The steps of such a plan that are the op itself, or those that its gradient adds, without the copies that the
    /// planner makes where an op can't work in place. They read what a run of the whole plan has left. For benchmarks.
    pub fn part(&self, profile: &Profile, backward: bool) -> Result<Plan> {
        let last = self.outputs.first().map_or(0, |v| v.node());
        let forward: Vec<&str> = self.graph.nodes()[..=last].iter().map(|n| n.name.as_str()).collect();
        let wanted = |name: &str| !name.starts_with("loss") && forward.contains(&name) != backward;
        Ok(self.plan(profile)?.kernels_of(|s| wanted(&s.name)))
    }

    /// A plan of this graph, or a part of one, with its inputs written.
    pub fn executable_blocking(&self, gpu: &Gpu, plan: Plan) -> Result<Executable> {
        let exec = Executable::new_blocking(gpu, Arc::new(plan), ExecOptions::default())?;
        self.write_inputs(&exec)?;
        Ok(exec)
    }

    /// The same between guards.
    pub fn guarded_blocking(&self, gpu: &Gpu, plan: Plan) -> Result<Guarded> {
        let guarded = Guarded::new_blocking(gpu, Arc::new(plan))?;
        self.write_inputs(guarded.executable())?;
        Ok(guarded)
    }

    fn write_inputs(&self, exec: &Executable) -> Result<()> {
        exec.plan().externals.iter().try_for_each(|e| write(exec, e.value, &self.given[&e.value]))
    }

    /// Outputs and gradients as the last step has left them.
    pub fn read_blocking(&self, exec: &Executable) -> Result<Vec<Vec<f32>>> {
        self.wanted().into_iter().map(|v| read_blocking(exec, v)).collect()
    }

    /// Everything that the case can run with on a device: each of [`profiles`] with each variant of its ops.
    pub fn targets(&self, gpu: &Gpu) -> Result<Vec<Target>> {
        let mut targets = vec![];
        for profile in profiles(gpu) {
            targets.extend(self.variants(profile)?);
        }
        Ok(targets)
    }

    /// `profile` once for each variant: the second target has the second variant of each op that has one, and so on.
    pub(super) fn variants(&self, profile: Profile) -> Result<Vec<Target>> {
        let tunables = variants::tunables(&self.plan(&profile)?, &profile);
        let most = tunables.iter().map(|t| t.variants.len()).max().unwrap_or(1);
        let nth = |variant: usize| {
            let mut target = Target { variant, ..Target::of(profile.clone()) };
            for t in &tunables {
                let name = &t.variants[variant.min(t.variants.len() - 1)];
                target.profile.choices.set(t.key.clone(), name.clone());
                target.variants.push(name.clone());
            }
            target
        };
        Ok((0..most).map(nth).collect())
    }
}

/// Stores a gradient in f16, if an op computes it.
fn store_halved(graph: &mut Graph, gradient: Value) -> Result<()> {
    let computed = graph.nodes()[gradient.node()].op().is_some_and(|op| !op.is_view());
    if computed { graph.store_as(gradient, DType::F16) } else { Ok(()) }
}

/// What a case runs with: a profile, which names the variants of ops.
#[derive(Clone, Debug)]
pub struct Target {
    /// What the plan is made for.
    pub profile: Profile,
    /// Index of the variant that ops take, if they have that many. 0 is the default, used unless a tuner has measured.
    pub variant: usize,
    pub(super) variants: Vec<String>,
    /// Whether elementwise ops are computed in one kernel with their neighbours.
    pub(super) fused: bool,
    /// Whether floats are stored in f16.
    pub(super) halved: bool,
}

impl Target {
    /// The first variants.
    pub(super) fn of(profile: Profile) -> Target {
        Target { profile, variant: 0, variants: vec![], fused: false, halved: false }
    }

    /// The variants of the case's ops that have several.
    pub fn variants(&self) -> &[String] {
        &self.variants
    }

    /// The same with tensors in f16, or as pairs in words, as devices without 16-bit floats in shaders have them. `None`
    /// if this device has them as words in any case, and they are not to be.
    pub(super) fn halved(&self, in_words: bool) -> Option<Target> {
        let profile = Profile { shader_f16: !in_words, ..self.profile.clone() };
        (in_words || !self.profile.f16_in_words()).then(|| Target { profile, halved: true, ..self.clone() })
    }

    /// The same with no more than `wgpu::Limits::downlevel_defaults` offers.
    pub(super) fn downlevel(&self) -> Target {
        let profile = Profile { max_storage_buffers: 4, max_workgroup_bytes: 16_352, ..self.profile.clone() };
        Target { profile, ..self.clone() }
    }

    /// The same on a device that allows so few workgroups in x that [`Profile::grid`] spreads those of `plan` over x
    /// and y, as it does with large tensors everywhere. `None` if there are too few.
    pub(super) fn folded(&self, plan: &Plan) -> Option<Target> {
        let most = |dimensions: &[usize]| {
            let dispatches = plan.steps.iter().flat_map(|s| &s.dispatches);
            dispatches.flat_map(|d| dimensions.iter().map(|&i| d.workgroups[i])).max().unwrap_or(1)
        };
        let max_workgroups = f64::from(most(&[0])).sqrt().ceil().max(f64::from(most(&[1, 2]))) as u32;
        let profile = Profile { max_workgroups, ..self.profile.clone() };
        (max_workgroups < most(&[0])).then(|| Target { profile, ..self.clone() })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Profile { class, subgroups, shader_f16, cooperative, max_storage_buffers, max_workgroups, .. } =
            &self.profile;
        write!(f, "kernels for {class:?} adapters, ")?;
        match subgroups {
            Some([min, max]) if min == max => write!(f, "subgroups of {min}")?,
            Some([min, max]) => write!(f, "subgroups of {min} to {max}")?,
            None => write!(f, "no subgroups")?,
        }
        if self.halved {
            write!(f, ", tensors in f16{}", if *shader_f16 { "" } else { " in words" })?;
        }
        if let Some(kind) = cooperative {
            write!(f, ", cooperative matrices of {kind:?}")?;
        }
        if *max_storage_buffers <= 4 {
            write!(f, ", {max_storage_buffers} storage buffers")?;
        }
        if *max_workgroups < 65_535 {
            write!(f, ", at most {max_workgroups} workgroups in x and in y")?;
        }
        if self.fused {
            write!(f, ", in one kernel with its neighbours")?;
        }
        match self.variants() {
            [] => Ok(()),
            names => write!(f, ", variants {}", names.join(" and ")),
        }
    }
}

/// The device's profile with the kernels for each class of adapters, each with its subgroups and without; and with its
/// cooperative matrices, if it has them. So all kernels that can run on a device run there.
pub fn profiles(gpu: &Gpu) -> Vec<Profile> {
    let here = gpu.profile();
    let mut profiles = vec![];
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        for subgroups in [None, here.subgroups] {
            profiles.push(Profile { class, subgroups, cooperative: None, ..here.clone() });
        }
    }
    profiles.push(Profile { class: AdapterClass::Gpu, ..here.clone() });
    profiles.dedup();
    profiles
}

/// The plan with the loops of its kernels as they are written, where plans for GPUs repeat their bodies: for tools that
/// take long over each access in a text. What is computed and accessed is the same.
pub fn with_loops(mut plan: Plan) -> Plan {
    for dispatch in plan.steps.iter_mut().flat_map(|step| &mut step.dispatches) {
        dispatch.kernel = dispatch.kernel.clone().on(AdapterClass::Cpu);
    }
    plan
}

/// Writes an f64 array to an input, parameter or state, in its type.
pub fn write(exec: &Executable, value: Value, array: &Array) -> Result<()> {
    match exec.tensor(value)?.ty().dtype {
        DType::F32 => exec.write(value, &array.data.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        DType::F16 => exec.write(value, &array.data.iter().map(|&x| f16::from_f64(x)).collect::<Vec<_>>()),
        DType::U32 => exec.write(value, &array.data.iter().map(|&x| x as u32).collect::<Vec<_>>()),
    }
}

/// Reads a value as f32, integers too.
pub fn read_blocking(exec: &Executable, value: Value) -> Result<Vec<f32>> {
    match exec.tensor(value)?.ty().dtype {
        DType::F32 => exec.read_blocking(value),
        DType::F16 => Ok(exec.read_blocking::<f16>(value)?.iter().map(|&x| x.to_f32()).collect()),
        DType::U32 => Ok(exec.read_blocking::<u32>(value)?.iter().map(|&x| x as f32).collect()),
    }
}
