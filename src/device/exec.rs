//! The executor: the only place that encodes and reads back.
//!
//! Buffers, bind groups and pipelines are created once. After that a step is one walk over a list, into an encoder of
//! the caller's, or into as many of its own as short submits take. Nothing is read back unless requested.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::gpu::{Gpu, binding_size};
use super::pool::lock;
use super::readback::Readback;
use super::stream::Uploads;
use super::submits::{Meter, Rates, Submits};
use super::tensor::Tensor;
use super::ticks;
use super::timeline::{self, Clock, NodeTime, Span, Timeline};
use crate::error::{Error, Result, joined};
use crate::graph::{ParamInit, Source, Value};
use crate::kernel::Kernel;
use crate::plan::requirements::Requirements;
use crate::plan::{BoundSlot, BufferCopy, BufferSpec, External, Plan, Slot, Step, uniform_stride};
use crate::tensor::{Element, TensorType};

/// Options of an [`Executable`]: your own tensors for inputs, parameters and states, and a seed.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Tensors for inputs, parameters and states of the plan. Any other value is an error. Those that are not listed
    /// are allocated: states are zero, parameters start from their [initialisation](crate::Graph::param_with), inputs
    /// are to be written. To get an output in a tensor of your own, [`store`](crate::Graph::store) it in a state and
    /// bind that.
    pub bindings: HashMap<Value, Tensor>,
    /// Seed of the initial parameters.
    pub seed: u64,
}

impl ExecOptions {
    /// These tensors; seed 0.
    pub fn bound(bindings: HashMap<Value, Tensor>) -> Self {
        ExecOptions { bindings, ..ExecOptions::default() }
    }
}

/// A planned graph with its memory and pipelines, ready to run any number of times.
///
/// For a single step use [`submit`](Self::submit); inside an application's frame use [`record`](Self::record), or
/// [`slices`](Self::slices) if a step takes longer than a frame allows.
#[derive(Debug)]
pub struct Executable {
    gpu: Gpu,
    plan: Arc<Plan>,
    buffers: Vec<wgpu::Buffer>,
    uniforms: wgpu::Buffer,
    externals: Vec<Tensor>,
    /// Whether each external has contents that somebody gave it.
    set: Vec<Arc<AtomicBool>>,
    commands: Vec<Command>,
    /// [`Memory::guard`].
    guard: usize,
    shared: Shared,
}

/// What executables on the same memory share besides it.
#[derive(Clone, Debug)]
struct Shared {
    meter: Meter,
    /// Held while a step is submitted, which may take several submits.
    turn: Arc<Mutex<()>>,
}

/// What the buffers of a plan are made of.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Bytes before and after every buffer of the plan, a multiple of 256, for `check::Guarded`; else 0. Kernels may
    /// access those after a buffer.
    pub guard: usize,
    /// Buffers of another executable, which never runs at the same time, in place of some of the plan's. What is in
    /// them is not preserved.
    pub lent: Vec<Option<wgpu::Buffer>>,
}

impl Memory {
    /// A buffer for each of the plan's.
    fn buffers(&self, gpu: &Gpu, plan: &Plan) -> Result<Vec<wgpu::Buffer>> {
        let buffer = |(i, b): (usize, &BufferSpec)| match self.lent.get(i) {
            Some(Some(lent)) => Ok(lent.clone()),
            _ => gpu.storage_buffer(&format!("b{i} {}", b.values[0]), (b.bytes + 2 * self.guard) as u64),
        };
        plan.buffers.iter().enumerate().map(buffer).collect()
    }
}

/// A part of a step, returned by [`Executable::slices`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    commands: Range<usize>,
    /// The time that it takes according to the profile.
    pub estimate: Duration,
}

#[derive(Debug)]
struct Command {
    /// Index of the plan's step; past the last one for the final copies.
    step: usize,
    work: Work,
    /// Time in nanoseconds, as guessed by its cost.
    ns: f64,
}

#[derive(Debug)]
enum Work {
    Copy {
        from: Place,
        to: Place,
        bytes: u64,
    },
    /// With `label.entry` of the kernel.
    Dispatch {
        name: String,
        pipeline: Arc<wgpu::ComputePipeline>,
        bind_group: wgpu::BindGroup,
        workgroups: [u32; 3],
    },
}

#[derive(Clone, Debug)]
struct Place {
    buffer: wgpu::Buffer,
    offset: u64,
}

/// What guards and unwritten memory are filled with: a NaN that no kernel makes.
#[cfg(feature = "check")]
pub(crate) const SENTINEL: u32 = 0x7fc0_dead;

impl Executable {
    /// Allocates buffers, compiles pipelines and makes bind groups. Compiling is the slow part. An [`Error::Limit`]
    /// where the plan was made for a device that offers more. Resolves at once, or, if there are many parameters to
    /// initialise, when the device has been polled; outside of frames, use [`new_blocking`](Self::new_blocking).
    pub async fn new(gpu: &Gpu, plan: Arc<Plan>, options: ExecOptions) -> Result<Self> {
        Self::with_memory(gpu, plan, options, Memory::default()).await
    }

    /// [`new`](Self::new), with guards around the plan's buffers, or with some of them lent.
    pub(crate) async fn with_memory(gpu: &Gpu, plan: Arc<Plan>, options: ExecOptions, memory: Memory) -> Result<Self> {
        let seed = options.seed;
        let built = gpu.scoped(|| Self::build(gpu.clone(), plan.clone(), options, memory)).await;
        let exec = built.map_err(|e| match e {
            // What the device refuses may be something that it was not opened for; that error is more helpful.
            Error::Device(_) | Error::Node { .. } => {
                Requirements::of(&plan).check(&gpu.device().limits()).err().unwrap_or(e)
            }
            e => e,
        })?;
        exec.initialise(seed).await?;
        Ok(exec)
    }

    /// Writes the initial values of parameters that have an initialisation and no values yet.
    async fn initialise(&self, seed: u64) -> Result<()> {
        let mut uploads = Uploads::new(&self.gpu);
        for (i, external) in self.plan.externals.iter().enumerate() {
            if let (Source::Param(Some(init)), false) = (&external.source, self.set[i].load(Ordering::Relaxed)) {
                // What was just allocated is zero.
                if *init != ParamInit::ZEROS {
                    let values = init.values(external.ty.len(), seed, &external.name);
                    uploads.write(&self.externals[i], 0, bytemuck::cast_slice(&values)).await?;
                }
                self.set[i].store(true, Ordering::Relaxed);
            }
        }
        uploads.finish()
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, plan: Arc<Plan>, options: ExecOptions) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, plan, options))
    }

    fn build(gpu: Gpu, plan: Arc<Plan>, options: ExecOptions, memory: Memory) -> Result<Self> {
        if plan.lanes != gpu.profile().lanes() {
            gpu.check_lanes(plan.features(), plan.lanes)?;
        }
        let (buffers, guard) = (memory.buffers(&gpu, &plan)?, memory.guard);
        check_bindings(&gpu, &plan, &options.bindings)?;
        let external = |e: &External| match options.bindings.get(&e.value) {
            Some(tensor) => Ok(tensor.clone()),
            None => Tensor::zeros(&gpu, &e.name, e.ty.clone()),
        };
        let externals = plan.externals.iter().map(external).collect::<Result<_>>()?;
        let is_set = |e: &External| matches!(e.source, Source::State) || options.bindings.contains_key(&e.value);
        let set = plan.externals.iter().map(|e| Arc::new(AtomicBool::new(is_set(e)))).collect();
        let uniforms = upload_uniforms(&gpu, &plan);
        let (commands, shared) = (vec![], Shared { meter: Meter::new(), turn: Arc::default() });
        let mut exec =
            Executable { gpu, plan: plan.clone(), buffers, uniforms, externals, set, commands, guard, shared };
        exec.build_commands(&plan)?;
        Ok(exec)
    }

    /// The same with other tensors for some inputs, parameters or states, outputs of a step being states that it
    /// [stores](crate::Graph::store) in. All else is shared with this one, the plan's memory too, and nothing is
    /// compiled or allocated. So an app with a buffer for each frame in flight makes one of these for each.
    ///
    /// Steps of both may be recorded in any order, but the slices of one step want no other step in between.
    ///
    /// ```
    /// use std::{collections::HashMap, sync::Arc};
    /// use throughline::{ExecOptions, Executable, Gpu, Tensor, TensorType};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let mut g = gpu.graph();
    /// let x = g.input("x", TensorType::f32([4]))?;
    /// let y = g.state("y", TensorType::f32([4]))?;
    /// let twice = g.scale("twice", x, 2.0)?;
    /// g.store(twice, y)?;
    /// let plan = Arc::new(gpu.plan(&g, &[])?);
    /// let exec = Executable::new_blocking(&gpu, plan, ExecOptions::default())?;
    /// exec.write(x, &[1.0f32, 2.0, 3.0, 4.0])?;
    ///
    /// // Of the app's own buffers: `Tensor::from_buffer`.
    /// let frame = |name: &str| Tensor::zeros(&gpu, name, TensorType::f32([4]));
    /// let frames = [frame("even")?, frame("odd")?];
    /// let execs = frames.clone().map(|frame| exec.with_bindings(&HashMap::from([(y, frame)])));
    /// for exec in execs {
    ///     exec?.submit()?;
    /// }
    /// assert_eq!(frames[1].read_blocking::<f32>(&gpu)?, [2.0, 4.0, 6.0, 8.0]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn with_bindings(&self, bindings: &HashMap<Value, Tensor>) -> Result<Executable> {
        check_bindings(&self.gpu, &self.plan, bindings)?;
        let (plan, mut externals, mut set) = (self.plan.clone(), self.externals.clone(), self.set.clone());
        for (external, (tensor, set)) in plan.externals.iter().zip(externals.iter_mut().zip(&mut set)) {
            if let Some(other) = bindings.get(&external.value) {
                *tensor = other.clone();
                *set = Arc::new(AtomicBool::new(true));
            }
        }
        let (gpu, buffers, uniforms) = (self.gpu.clone(), self.buffers.clone(), self.uniforms.clone());
        let (commands, guard, shared) = (vec![], self.guard, self.shared.clone());
        let mut exec = Executable { gpu, plan, buffers, uniforms, externals, set, commands, guard, shared };
        self.gpu.guarded(|| exec.build_commands(&self.plan))?;
        Ok(exec)
    }

    /// The same with the plan's memory to itself. Inputs, parameters and states are shared.
    pub(crate) async fn apart(&self) -> Result<Executable> {
        let (plan, externals, set) = (self.plan.clone(), self.externals.clone(), self.set.clone());
        let (gpu, uniforms, guard) = (self.gpu.clone(), self.uniforms.clone(), self.guard);
        let shared = Shared { meter: self.shared.meter.clone(), turn: Arc::default() };
        let build = || {
            let buffers = Memory { guard, lent: vec![] }.buffers(&self.gpu, &self.plan)?;
            let commands = vec![];
            let mut exec = Executable { gpu, plan, buffers, uniforms, externals, set, commands, guard, shared };
            exec.build_commands(&self.plan)?;
            Ok(exec)
        };
        self.gpu.scoped(build).await
    }

    /// Some of the plan's buffers, by index, for [`Memory::lent`].
    pub(crate) fn lend(&self, buffers: &[Option<usize>]) -> Vec<Option<wgpu::Buffer>> {
        buffers.iter().map(|&i| self.buffers.get(i?).cloned()).collect()
    }

    fn build_commands(&mut self, plan: &Plan) -> Result<()> {
        let uniforms = self.uniforms.clone();
        let mut offset = 0;
        let rates = Rates::of(self.gpu.info().device_type);
        for (i, step) in plan.steps.iter().enumerate() {
            for c in &step.copies {
                self.push_copy(i, c)?;
            }
            for (d, share) in step.dispatches.iter().zip(step.shares()) {
                self.check_aliases(step, &d.binds)?;
                let pipeline = self.gpu.pipeline(&d.kernel).map_err(|e| in_step(step, e))?;
                let trusted = d.kernel.is_trusted();
                let mut uniform = |words: &[u32], exact: bool| {
                    let bytes = words.len() * 4;
                    // Of an app's kernel exactly what it is given, so that it can't read what is not there.
                    let size = if exact { NonZeroU64::new(bytes as u64) } else { binding_size(bytes) };
                    let binding = wgpu::BufferBinding { buffer: &uniforms, offset, size };
                    offset += uniform_stride(words.len());
                    size.is_some().then_some(binding)
                };
                // The ranges of merged bindings are read by text of ours, as vectors.
                let bound = [uniform(&d.words, !trusted), uniform(&d.ranges, false)];
                let group = || self.bind_group(&pipeline, &d.kernel, bound, &d.binds);
                // What else does not fit in an app's kernel is for the driver to find: the sizes of uniforms and arrays.
                let bind_group = match trusted {
                    true => group(),
                    false => self.gpu.guarded(|| Ok(group())).map_err(|e| in_step(step, of_kernel(&d.kernel, e)))?,
                };
                let name = format!("{}.{}", d.kernel.label, d.kernel.entry);
                let work = Work::Dispatch { name, pipeline, bind_group, workgroups: d.workgroups };
                d.copies_in.iter().try_for_each(|c| self.push_copy(i, c))?;
                let ns = rates.ns(step.flops as f64 * share, step.bytes as f64 * share);
                self.commands.push(Command { step: i, work, ns });
                d.copies_out.iter().try_for_each(|c| self.push_copy(i, c))?;
            }
        }
        for c in &plan.final_copies {
            self.push_copy(plan.steps.len(), c)?;
        }
        Ok(())
    }

    /// Two externals may be ranges of one buffer (an arena): then no dispatch may write one and
    /// read the other. It may write both.
    fn check_aliases(&self, step: &Step, binds: &[Option<BoundSlot>]) -> Result<()> {
        let bound: Vec<_> = binds.iter().flatten().map(|b| (self.place(b.slot), b)).collect();
        for (i, (a, first)) in bound.iter().enumerate() {
            for (b, second) in &bound[i + 1..] {
                let bytes = |b: &BoundSlot| self.bound_bytes(b.slot, b.bytes) as u64;
                let apart = a.offset + bytes(first) <= b.offset || b.offset + bytes(second) <= a.offset;
                let both_written = first.writes && second.writes && apart;
                if a.buffer == b.buffer && (first.writes || second.writes) && !both_written {
                    let [first, second] = [first, second].map(|b| self.plan.slot_values(b.slot));
                    return Err(Error::Graph(format!(
                        "`{}` would read and write one buffer, that of {first} and {second}: bind tensors that a step \
                         writes to buffers of their own, on the executable's device",
                        step.name
                    )));
                }
            }
        }
        Ok(())
    }

    fn bind_group(
        &self,
        pipeline: &wgpu::ComputePipeline,
        kernel: &Kernel,
        uniforms: [Option<wgpu::BufferBinding<'_>>; 2],
        binds: &[Option<BoundSlot>],
    ) -> wgpu::BindGroup {
        let places: Vec<Option<(Place, usize)>> =
            binds.iter().map(|b| b.map(|b| (self.place(b.slot), self.bound_bytes(b.slot, b.bytes)))).collect();
        // One uniform comes before the storage bindings, one after them.
        let numbered = uniforms.into_iter().zip([0, binds.len() as u32 + 1]);
        let mut entries: Vec<wgpu::BindGroupEntry<'_>> = numbered
            .filter_map(|(u, binding)| Some((wgpu::BindingResource::Buffer(u?), binding)))
            .map(|(resource, binding)| wgpu::BindGroupEntry { binding, resource })
            .collect();
        for (i, place) in places.iter().enumerate() {
            let resource = match place {
                Some((place, bytes)) => {
                    wgpu::BufferBinding { buffer: &place.buffer, offset: place.offset, size: binding_size(*bytes) }
                }
                None => self.gpu.null().as_entire_buffer_binding(),
            };
            let resource = wgpu::BindingResource::Buffer(resource);
            entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
        }
        self.gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(&format!("throughline {}", kernel.label)),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        })
    }

    fn bound_bytes(&self, slot: Slot, bytes: usize) -> usize {
        match slot {
            Slot::Buffer(_) => bytes + self.guard,
            Slot::External(_) => bytes,
        }
    }

    fn place(&self, slot: Slot) -> Place {
        match slot {
            Slot::Buffer(i) => Place { buffer: self.buffers[i].clone(), offset: self.guard as u64 },
            Slot::External(i) => {
                let tensor = &self.externals[i];
                Place { buffer: tensor.buffer().clone(), offset: tensor.offset() }
            }
        }
    }

    fn push_copy(&mut self, step: usize, copy: &BufferCopy) -> Result<()> {
        let (mut from, mut to) = (self.place(copy.from), self.place(copy.to));
        from.offset += copy.from_offset as u64;
        to.offset += copy.to_offset as u64;
        if from.buffer == to.buffer {
            return Err(Error::Graph(format!(
                "a step copies {} to {}, which are bound to one buffer: bind one of them to another, as WebGPU copies \
                 only between two",
                self.plan.slot_values(copy.from),
                self.plan.slot_values(copy.to)
            )));
        }
        let ns = Rates::of(self.gpu.info().device_type).ns(0.0, 2.0 * copy.bytes as f64);
        self.commands.push(Command { step, work: Work::Copy { from, to, bytes: copy.bytes as u64 }, ns });
        Ok(())
    }

    /// Records one step into your encoder. It allocates nothing on the GPU, submits nothing and does not wait.
    ///
    /// All of it is one submit of yours, which must not take long: Windows resets a device after two seconds. For steps
    /// of that order there are [`submit`](Self::submit), which cuts them, and [`slices`](Self::slices).
    ///
    /// # Errors
    ///
    /// If an input was never written, or a parameter has no values: the error names them all. Those in tensors of yours
    /// are not checked; nor is what was asked for as a [`tensor`](Self::tensor), which your own passes may write.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.check_set()?;
        self.record_commands(encoder, &self.commands);
        Ok(())
    }

    /// The inputs and parameters that have no values yet.
    pub(crate) fn unset(&self) -> impl Iterator<Item = &External> {
        let unset = self.plan.externals.iter().zip(&self.set).filter(|(_, set)| !set.load(Ordering::Relaxed));
        unset.map(|(external, _)| external)
    }

    /// The tensor of the parameter of this name.
    pub(crate) fn param(&self, name: &str) -> Option<Tensor> {
        let is_it = |e: &External| matches!(e.source, Source::Param(_)) && e.name == name;
        self.plan.externals.iter().position(is_it).map(|i| self.externals[i].clone())
    }

    /// Returns an error that names the inputs and parameters that have no values yet.
    fn check_set(&self) -> Result<()> {
        if self.set.iter().all(|set| set.load(Ordering::Relaxed)) {
            return Ok(());
        }
        let (params, inputs): (Vec<&External>, Vec<&External>) =
            self.unset().partition(|e| matches!(e.source, Source::Param(_)));
        let names = |list: &[&External]| joined(list.iter().map(|e| format!("`{}`", e.name)), ", ");
        let mut problems = vec![];
        if !inputs.is_empty() {
            problems.push(format!("never written: {}. Call `Executable::write`, or bind a tensor", names(&inputs)));
        }
        if !params.is_empty() {
            problems.push(format!(
                "parameters without values: {}. Initialise them with `Graph::param_with`, write them, or bind tensors",
                names(&params)
            ));
        }
        Err(Error::Graph(problems.join("; ")))
    }

    /// Divides the step into consecutive slices that take at most `budget` each, according to the times of a profile. A
    /// kernel that takes longer becomes a slice of its own.
    ///
    /// Use it to spread a step over several frames. Recorded one after another, over as many submits as you like, the
    /// slices are the step.
    ///
    /// # Errors
    ///
    /// If the profile is not one of this executable's step, or has no time other than zero. What it has no time for is
    /// estimated by the rest.
    ///
    /// ```no_run
    /// # fn frames(exec: &throughline::Executable) -> throughline::Result<()> {
    /// let slices = exec.slices(&exec.profile_blocking()?, std::time::Duration::from_micros(500))?;
    /// for slice in &slices {
    ///     // Each frame, into the encoder that draws it:
    ///     # let mut encoder = exec.gpu().device().create_command_encoder(&Default::default());
    ///     exec.record_slice(&mut encoder, slice)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn slices(&self, profile: &Timeline, budget: Duration) -> Result<Vec<Slice>> {
        self.slices_of(&profile.command_ns()?, budget)
    }

    /// The same, given the nanoseconds of each command.
    pub(crate) fn slices_of(&self, times: &[u64], budget: Duration) -> Result<Vec<Slice>> {
        if times.len() != self.commands.len() {
            return Err(Error::data(
                "profile",
                format!("one of this executable, with times of {} commands", self.commands.len()),
                format!("{} times", times.len()),
            ));
        }
        let mut slices: Vec<Slice> = vec![];
        for (i, &ns) in times.iter().enumerate() {
            let time = Duration::from_nanos(ns);
            match slices.last_mut() {
                Some(last) if last.estimate + time <= budget => {
                    last.commands.end = i + 1;
                    last.estimate += time;
                }
                _ => slices.push(Slice { commands: i..i + 1, estimate: time }),
            }
        }
        Ok(slices)
    }

    /// Records a slice of a step of this executable. Errors are those of [`record`](Self::record), and that of a slice
    /// of a longer step than this one.
    pub fn record_slice(&self, encoder: &mut wgpu::CommandEncoder, slice: &Slice) -> Result<()> {
        self.check_set()?;
        let (commands, count) = (&slice.commands, self.commands.len());
        if commands.end > count {
            let got = format!("commands {} to {} of another", commands.start, commands.end - 1);
            return Err(Error::data("slice", format!("a part of the {count} commands of this executable"), got));
        }
        self.record_range(encoder, commands.clone());
        Ok(())
    }

    /// Records some of the kernels and copies of a step, by index.
    pub(crate) fn record_range(&self, encoder: &mut wgpu::CommandEncoder, commands: Range<usize>) {
        self.record_commands(encoder, self.commands.get(commands).unwrap_or_default());
    }

    /// Number of kernels and copies of a step.
    pub(crate) fn command_count(&self) -> usize {
        self.commands.len()
    }

    fn record_commands(&self, encoder: &mut wgpu::CommandEncoder, commands: &[Command]) {
        let is_copy = |c: &Command| matches!(c.work, Work::Copy { .. });
        for run in commands.chunk_by(|a, b| is_copy(a) == is_copy(b)) {
            if is_copy(&run[0]) {
                run.iter().for_each(|c| c.work.copy(encoder));
            } else {
                let mut pass = encoder.begin_compute_pass(&labelled("throughline step"));
                run.iter().for_each(|c| c.work.dispatch(&mut pass));
            }
        }
    }

    /// Records one step and submits it, without waiting. A step that takes long is cut into several submits of some 75
    /// milliseconds, by estimates that are corrected by what submits take: see
    /// [`set_submit_time`](Self::set_submit_time). This returns the last.
    ///
    /// Other threads may call this at the same time; but no encoder that was given a step of this executable may be
    /// submitted meanwhile.
    pub fn submit(&self) -> Result<wgpu::SubmissionIndex> {
        self.submit_with("step", |submits| self.record_in(submits)).map(|(_, submitted)| submitted)
    }

    /// Submits what `f` records, with nothing of another such call in between.
    pub(crate) fn submit_with<T>(
        &self,
        what: &str,
        f: impl FnOnce(&mut Submits) -> Result<T>,
    ) -> Result<(T, wgpu::SubmissionIndex)> {
        let _turn = lock(&self.shared.turn);
        let mut submits = self.submits(what);
        let value = f(&mut submits)?;
        Ok((value, submits.submit()?))
    }

    /// Sets the time that a submit of [`submit`](Self::submit) takes at most, by estimate: 75 milliseconds at first. A
    /// shorter one lets other users of the device in more often, such as an app that renders on another thread. Each
    /// submit costs the host some ten microseconds. A single kernel is never cut.
    pub fn set_submit_time(&self, time: Duration) {
        self.shared.meter.set_submit_time(time);
    }

    /// Submits that the meter of this executable measures. What is submitted by [`submit_with`](Self::submit_with) may
    /// come in between.
    pub(crate) fn submits(&self, what: impl Into<String>) -> Submits {
        Submits::new(&self.gpu, &self.shared.meter, what)
    }

    /// Begins a submit unless a whole step fits into the one that is being recorded.
    pub(crate) fn make_room_in(&self, submits: &mut Submits) -> Result<()> {
        submits.make_room(self.commands.iter().map(|command| command.ns).sum())
    }

    /// Records a step, cut where it is too long for one submit.
    pub(crate) fn record_in(&self, submits: &mut Submits) -> Result<()> {
        self.check_set()?;
        let mut start = 0;
        for (i, command) in self.commands.iter().enumerate() {
            if submits.is_full(command.ns) {
                self.record_range(submits.encoder(), start..i);
                submits.submit()?;
                start = i;
            }
            submits.add(command.ns);
        }
        self.record_range(submits.encoder(), start..self.commands.len());
        Ok(())
    }

    /// Runs one step with a timestamp before and after every kernel, and returns where its time went. Resolves once the
    /// device has been polled. What inputs hold does not matter to it.
    ///
    /// Each kernel gets a compute pass of its own, so the step as a whole takes a little longer than usual.
    ///
    /// # Errors
    ///
    /// If the device was opened without `TIMESTAMP_QUERY`, or if most of its timestamps are no measurement, being zero,
    /// equal or decreasing. [`profile_blocking`](Self::profile_blocking) works there too. Where a few are none, their
    /// times are estimates: [`Span::measured`].
    pub async fn profile(&self) -> Result<Timeline> {
        self.profile_by_gpu_clock().await?.ok_or_else(|| {
            let message = "the timestamps of this device measure nothing; `profile_blocking` takes the host's clock";
            Error::Device(message.into())
        })
    }

    /// [`profile`](Self::profile), waiting for the GPU. On a device without timestamps, or with such that measure
    /// nothing, it measures each kernel by the host's clock instead: see [`Timeline::clock`].
    pub fn profile_blocking(&self) -> Result<Timeline> {
        for clock in [Clock::Gpu, Clock::Host] {
            if let Some(timeline) = self.profile_by_blocking(clock)? {
                return Ok(timeline);
            }
        }
        Err(Error::Device("neither the device's clock nor the host's measures anything".into()))
    }

    /// A profile by this clock, if it measures anything.
    pub(super) fn profile_by_blocking(&self, clock: Clock) -> Result<Option<Timeline>> {
        match clock {
            Clock::Gpu if !self.gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY) => Ok(None),
            Clock::Gpu => self.gpu.run_blocking(self.profile_by_gpu_clock()),
            Clock::Host => self.profile_by_host_clock(),
        }
    }

    async fn profile_by_gpu_clock(&self) -> Result<Option<Timeline>> {
        let mut words = vec![];
        for readback in self.submit_timed()? {
            words.extend(readback.take::<u32>().await?);
        }
        let times = ticks::spans(&ticks::from_words(&words), self.gpu.queue().get_timestamp_period());
        Ok(self.timeline(Clock::Gpu, &times))
    }

    /// Submits a step that writes two timestamps for every command.
    fn submit_timed(&self) -> Result<Vec<Readback>> {
        let device = self.gpu.device();
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Err(Error::Device(
                "profiling needs a device opened with TIMESTAMP_QUERY; `profile_blocking` does without".into(),
            ));
        }
        self.gpu.guarded(|| {
            let mut encoder = self.gpu.encoder("profiled step");
            let mut readbacks = vec![];
            for commands in self.commands.chunks(wgpu::QUERY_SET_MAX_QUERIES as usize / 2) {
                let count = 2 * commands.len() as u32;
                let label = Some("throughline timestamps");
                let queries =
                    device.create_query_set(&wgpu::QuerySetDescriptor { label, ty: wgpu::QueryType::Timestamp, count });
                for (command, at) in commands.iter().zip((0..).step_by(2)) {
                    command.work.encode_timed(&mut encoder, &queries, at);
                }
                let ty = TensorType::u32([count as usize, 2]);
                let usage = Tensor::USAGES | wgpu::BufferUsages::QUERY_RESOLVE;
                let size = ty.storage_bytes() as u64;
                let desc = wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false };
                let ticks = Tensor::from_buffer(device.create_buffer(&desc), 0, ty)?;
                encoder.resolve_query_set(&queries, 0..count, ticks.buffer(), 0);
                readbacks.push(ticks.record_read(&self.gpu, &mut encoder));
            }
            self.gpu.submit(encoder)?;
            Ok(readbacks)
        })
    }

    fn profile_by_host_clock(&self) -> Result<Option<Timeline>> {
        let start = Instant::now();
        let mut times = vec![];
        for command in &self.commands {
            let begin = start.elapsed().as_nanos() as u64;
            let mut encoder = self.gpu.encoder("profiled command");
            match &command.work {
                Work::Copy { .. } => command.work.copy(&mut encoder),
                Work::Dispatch { name, .. } => {
                    command.work.dispatch(&mut encoder.begin_compute_pass(&labelled(&format!("throughline {name}"))))
                }
            }
            self.gpu.submit(encoder)?;
            self.gpu.wait_blocking()?;
            let ns = start.elapsed().as_nanos() as u64 - begin;
            times.push((ns > 0).then_some((begin, ns)));
        }
        Ok(self.timeline(Clock::Host, &times))
    }

    /// Builds the timeline from start and length of every command that was measured, in nanoseconds. `None` if few
    /// were.
    fn timeline(&self, clock: Clock, times: &[Option<(u64, u64)>]) -> Option<Timeline> {
        let timed: Vec<_> = self.commands.iter().zip(times).collect();
        let span = |(command, time): &(&Command, &Option<(u64, u64)>)| {
            let (start_ns, ns) = time.unwrap_or_default();
            Span { what: command.work.name().into(), start_ns, ns, measured: time.is_some() }
        };
        let node = |run: &[(&Command, &Option<(u64, u64)>)]| {
            let spans = run.iter().map(span).collect();
            match self.plan.steps.get(run[0].0.step) {
                Some(s) => {
                    let op = s.op.name();
                    let others = s.others().into_iter().map(String::from).collect();
                    NodeTime { node: s.name.clone(), others, op, flops: s.flops, bytes: s.bytes, spans }
                }
                None => NodeTime { node: "final copies".into(), others: vec![], op: "", flops: 0, bytes: 0, spans },
            }
        };
        let nodes = timed.chunk_by(|a, b| a.0.step == b.0.step).map(node).collect();
        Timeline { adapter: self.gpu.describe(), clock, nodes }.with_estimates()
    }

    /// The tensor of an input, parameter, state or planned output, for instance to bind its buffer in a shader of
    /// yours.
    pub fn tensor(&self, value: Value) -> Result<Tensor> {
        if let Slot::External(i) = self.plan.find(value)?.0 {
            self.set[i].store(true, Ordering::Relaxed);
        }
        self.place_of(value)
    }

    /// The tensor of a value, to read it.
    fn place_of(&self, value: Value) -> Result<Tensor> {
        let (slot, ty) = self.plan.find(value)?;
        match slot {
            Slot::External(i) => Ok(self.externals[i].clone()),
            Slot::Buffer(i) => Tensor::on(&self.gpu, self.buffers[i].clone(), self.guard as u64, ty.clone()),
        }
    }

    /// Queues a write of an input, parameter or state. It happens before the next submit.
    ///
    /// # Errors
    ///
    /// If the value is none of these, or `data` has another length or type. An output is written by the step itself.
    pub fn write<T: Element>(&self, value: Value, data: &[T]) -> Result<()> {
        let i = self.writable(value)?;
        self.externals[i].write(&self.gpu, data).map_err(|e| self.named(i, e))?;
        self.set[i].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Records a write of an input, parameter or state; what is recorded after it sees the new data. See
    /// [`Tensor::record_write`].
    pub fn record_write<T: Element>(&self, encoder: &mut wgpu::CommandEncoder, value: Value, data: &[T]) -> Result<()> {
        let i = self.writable(value)?;
        self.externals[i].record_write(&self.gpu, encoder, data).map_err(|e| self.named(i, e))?;
        self.set[i].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Says that an input that nobody has bound or written is meant to be zero, as it is from the start.
    pub(crate) fn leave_zero(&self, input: Value) -> Result<()> {
        self.set[self.writable(input)?].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Index of an input, parameter or state.
    fn writable(&self, value: Value) -> Result<usize> {
        match self.plan.find(value)?.0 {
            Slot::External(i) => Ok(i),
            Slot::Buffer(_) => Err(Error::Graph(format!(
                "`{}` cannot be written: it is not an input, parameter or state, but an output that a step computes",
                self.plan.names.of(value).map_err(Error::Graph)?
            ))),
        }
    }

    /// The error of a write to external `i`, with its name.
    fn named(&self, i: usize, e: Error) -> Error {
        match e {
            Error::Data { expected, got, .. } => Error::data(&self.plan.externals[i].name, expected, got),
            e => e,
        }
    }

    /// Reads an output, input, parameter or state as the last submit leaves it.
    /// Resolves once the device has been polled; outside of frames, use [`read_blocking`](Self::read_blocking).
    pub async fn read<T: Element>(&self, value: Value) -> Result<Vec<T>> {
        let tensor = self.place_of(value)?;
        if tensor.ty().dtype != T::DTYPE {
            return Err(Error::data(self.plan.names.of(value).map_err(Error::Graph)?, tensor.ty().dtype, T::DTYPE));
        }
        tensor.read(&self.gpu).await
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking<T: Element>(&self, value: Value) -> Result<Vec<T>> {
        self.gpu.run_blocking(self.read(value))
    }

    /// The plan of this executable.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device of this executable.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Fills every buffer of the plan, guards included, with [`SENTINEL`].
    #[cfg(feature = "check")]
    pub(crate) fn poison(&self) -> Result<()> {
        self.buffers.iter().try_for_each(|buffer| {
            let words = vec![SENTINEL; buffer.size() as usize / 4];
            self.gpu.write(buffer, 0, bytemuck::cast_slice(&words))
        })
    }

    /// The buffers of the plan, guards included.
    #[cfg(feature = "check")]
    pub(crate) fn buffers(&self) -> &[wgpu::Buffer] {
        &self.buffers
    }
}

impl Work {
    fn name(&self) -> &str {
        match self {
            Work::Copy { .. } => timeline::COPY,
            Work::Dispatch { name, .. } => name,
        }
    }

    /// Encodes a copy; does nothing for a dispatch.
    fn copy(&self, encoder: &mut wgpu::CommandEncoder) {
        if let Work::Copy { from, to, bytes } = self {
            encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, Some(*bytes));
        }
    }

    /// Encodes a dispatch; does nothing for a copy.
    fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>) {
        if let Work::Dispatch { pipeline, bind_group, workgroups: [x, y, z], .. } = self {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, bind_group, &[]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
    }

    /// Encodes the command with its start time in query `at` and its end time in the next.
    fn encode_timed(&self, encoder: &mut wgpu::CommandEncoder, query_set: &wgpu::QuerySet, at: u32) {
        let label = format!("throughline {}", self.name());
        let desc = |begin, end| wgpu::ComputePassDescriptor {
            label: Some(&label),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: begin,
                end_of_pass_write_index: end,
            }),
        };
        match self {
            Work::Dispatch { .. } => self.dispatch(&mut encoder.begin_compute_pass(&desc(Some(at), Some(at + 1)))),
            // Copies are outside of passes, so two empty passes take their times.
            Work::Copy { .. } => {
                drop(encoder.begin_compute_pass(&desc(None, Some(at))));
                self.copy(encoder);
                drop(encoder.begin_compute_pass(&desc(Some(at + 1), None)));
            }
        }
    }
}

/// What the device says of a kernel.
fn of_kernel(kernel: &Kernel, e: Error) -> Error {
    match e {
        Error::Device(message) => kernel.error(message),
        e => e,
    }
}

/// The error of a kernel with the node that launches it.
fn in_step(step: &Step, e: Error) -> Error {
    match e {
        Error::Kernel { kernel, message } => {
            let message = format!("kernel `{kernel}`: {message}");
            Error::node(&step.name, step.op.name(), message, step.inputs.iter().map(|(_, ty)| ty))
        }
        e => e,
    }
}

/// A pass that captures show by this name.
fn labelled(label: &str) -> wgpu::ComputePassDescriptor<'_> {
    wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None }
}

/// Checks that the tensors have the types that the plan expects.
fn check_bindings(gpu: &Gpu, plan: &Plan, bindings: &HashMap<Value, Tensor>) -> Result<()> {
    let mut bindings: Vec<_> = bindings.iter().collect();
    // Sorted, so that the error is the same on every run.
    bindings.sort_by_key(|(value, _)| **value);
    for (value, tensor) in bindings {
        let external = plan.bound(*value)?;
        if *tensor.ty() != external.ty {
            return Err(Error::data(&external.name, &external.ty, tensor.ty()));
        }
        tensor.check_device(gpu, &external.name)?;
    }
    Ok(())
}

/// All uniforms in one buffer, each at a multiple of 256 as WebGPU requires.
fn upload_uniforms(gpu: &Gpu, plan: &Plan) -> wgpu::Buffer {
    let mut bytes: Vec<u8> = vec![];
    for words in plan.steps.iter().flat_map(|s| &s.dispatches).flat_map(|d| [&d.words, &d.ranges]) {
        let at = bytes.len();
        bytes.extend_from_slice(bytemuck::cast_slice(words));
        bytes.resize(at + uniform_stride(words.len()) as usize, 0);
    }
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("throughline uniforms"),
        size: bytes.len().max(256) as u64,
        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, &bytes);
    buffer
}
