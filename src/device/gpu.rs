//! The device that everything runs on: an application's own, or a headless one.
//!
//! The only file with unsafe code: unchecked shaders, the driver's cache of pipelines, experimental features.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use super::findings::SelfTest;
use super::pool::Staging;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::graph::{Graph, Value};
use crate::kernel::Kernel;
use crate::plan::Plan;
use crate::plan::requirements::Requirements;
use crate::profile::{AdapterClass, Choices, Cooperative, Lanes, Profile};

/// Usages that the buffer of a tensor must have.
pub(crate) const TENSOR_USAGES: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// A wgpu device and queue, with the pipelines compiled for them. Cloning shares all of it.
///
/// In an application that renders, make one from its device with [`from_device`](Self::from_device): tensors and
/// textures can then be shared, and steps recorded between its passes. In a command-line program use
/// [`headless_blocking`](Self::headless_blocking).
#[derive(Clone, Debug)]
pub struct Gpu {
    inner: Arc<Inner>,
    profile: Arc<Profile>,
    tested: Option<Arc<SelfTest>>,
}

/// The device that something belongs to.
#[derive(Clone, Debug)]
pub(super) struct Home {
    gpu: u32,
    device: wgpu::Device,
}

#[derive(Debug)]
struct Inner {
    /// Unique among all `Gpu`s of the process. Two may share one device.
    id: u32,
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    pipelines: Mutex<HashMap<Kernel, Arc<wgpu::ComputePipeline>>>,
    /// The driver's cache of compiled pipelines, if it has one that can be saved.
    cache: Mutex<Option<wgpu::PipelineCache>>,
    null: wgpu::Buffer,
    staging: Staging,
    /// Number of calls of the device that go on in some thread, such as a driver's compiling.
    calls: AtomicUsize,
}

/// A call of the device, counted while it goes on.
struct Call<'a>(&'a AtomicUsize);

impl<'a> Call<'a> {
    fn begin(calls: &'a AtomicUsize) -> Self {
        calls.fetch_add(1, Ordering::Relaxed);
        Call(calls)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gpu {
    /// Features that make throughline faster or let it measure itself. None is required: request those that the adapter
    /// has.
    pub const USEFUL_FEATURES: wgpu::Features = Profile::USEFUL_FEATURES;

    /// Uses a device that the application already owns. Any features and limits will do: plans stay within what the
    /// device was opened with.
    ///
    /// This takes the driver's word and runs nothing; [`self_test`](Self::self_test) also tries what the driver says.
    ///
    /// To find out beforehand what a model needs, make its plan first; see [`Requirements`].
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        Gpu::with_cooperative(device, queue, None)
    }

    /// [`from_device`](Self::from_device), with matmuls on cooperative matrices. `properties` are those of the adapter
    /// (`wgpu::Adapter::cooperative_matrix_properties`), and the device must have been opened with
    /// [`Cooperative::features`].
    pub fn from_device_cooperative(
        device: wgpu::Device,
        queue: wgpu::Queue,
        properties: &[wgpu::CooperativeMatrixProperties],
        kind: Cooperative,
    ) -> Result<Self> {
        if !kind.is_in(properties) || !device.features().contains(kind.features()) {
            return Err(no_matrices(kind, &device.adapter_info().name));
        }
        Ok(Gpu::with_cooperative(device, queue, Some(kind)))
    }

    fn with_cooperative(device: wgpu::Device, queue: wgpu::Queue, cooperative: Option<Cooperative>) -> Self {
        let info = device.adapter_info();
        let profile = Profile { cooperative, ..Profile::of(&info, device.features(), &device.limits()) };
        let null = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("throughline null"),
            size: 16,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let (pipelines, cache, staging) = (Mutex::default(), Mutex::default(), Staging::new(&device));
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let calls = AtomicUsize::new(0);
        let inner = Inner { id, device, queue, info, pipelines, cache, null, staging, calls };
        Gpu { inner: Arc::new(inner), profile: Arc::new(profile), tested: None }
    }

    /// A handle on the same device whose plans use these variants of ops, as measured by a [`Tuner`](crate::Tuner). See
    /// [`Profile::choices`].
    pub fn with_choices(&self, choices: Choices) -> Self {
        let profile = Profile { choices, ..Profile::clone(&self.profile) };
        Gpu { profile: Arc::new(profile), ..self.clone() }
    }

    /// A handle on the same device whose plans use the kernels of this class of adapters: to test those for GPUs on a
    /// software adapter, where they are slower but give the same results up to rounding.
    pub fn with_class(&self, class: AdapterClass) -> Self {
        let profile = Profile { class, ..Profile::clone(&self.profile) };
        Gpu { profile: Arc::new(profile), ..self.clone() }
    }

    /// This device with the results of its test, and the profile that follows from them.
    pub(super) fn with_test(self, profile: Profile, test: SelfTest) -> Self {
        Gpu { profile: Arc::new(profile), tested: Some(Arc::new(test)), ..self }
    }

    /// What the [self-test](Self::self_test) found; `None` if there was none.
    pub fn tested(&self) -> Option<&SelfTest> {
        self.tested.as_deref()
    }

    /// An empty graph that splits tables too large for this device into parts. Build models in it rather than in
    /// [`Graph::new`].
    pub fn graph(&self) -> Graph {
        Graph::with_max_tensor_bytes(self.profile().max_tensor_bytes())
    }

    /// Plans a graph for this device: [`Plan::new`] with its profile.
    pub fn plan(&self, graph: &Graph, outputs: &[Value]) -> Result<Plan> {
        Plan::new(graph, outputs, self.profile())
    }

    /// Opens the best available adapter, including software adapters, with the adapter's own limits. `WGPU_BACKEND` and
    /// `WGPU_ADAPTER_NAME` select another one, as in other wgpu programs, and so does wgpu's debugging, such as
    /// `WGPU_VALIDATION` and `WGPU_STRICT_WEBGPU_COMPLIANCE`. The device runs its [self-test](Self::self_test).
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`] if there is no adapter.
    pub async fn headless() -> Result<Self> {
        let (_, device, queue) = open(None).await?;
        Gpu::from_device(device, queue).self_test_unpolled().await
    }

    /// [`headless`](Self::headless), with matmuls on cooperative matrices. Experimental in wgpu, and therefore here.
    ///
    /// If they do not multiply as specified, matmuls do without: see [`tested`](Self::tested).
    ///
    /// # Errors
    ///
    /// If the adapter has no cooperative matrices of this kind.
    pub async fn headless_cooperative(kind: Cooperative) -> Result<Self> {
        let (adapter, device, queue) = open(Some(kind)).await?;
        let properties = adapter.cooperative_matrix_properties();
        Gpu::from_device_cooperative(device, queue, &properties, kind)?.self_test_unpolled().await
    }

    /// [`headless_cooperative`](Self::headless_cooperative), waiting.
    pub fn headless_cooperative_blocking(kind: Cooperative) -> Result<Self> {
        pollster::block_on(Self::headless_cooperative(kind))
    }

    /// [`headless`](Self::headless), waiting.
    pub fn headless_blocking() -> Result<Self> {
        pollster::block_on(Self::headless())
    }

    /// The wgpu device, for your own passes on it.
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The wgpu queue, for your own submits.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// Returns an error if this device lacks a limit or feature that plans require, or has subgroups of other sizes
    /// than the plans use. `subgroups` comes from the profile that the plans were made for.
    pub(crate) fn check(&self, requirements: &Requirements, lanes: Lanes) -> Result<()> {
        let advice =
            "A plan made for `gpu.profile()` has its arenas and tables in parts that fit, or says what else would";
        requirements.check(&self.device().limits()).map_err(|e| e.advise(advice))?;
        let missing = requirements.features - self.device().features();
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
            let message = format!("the plan needs {}, but the device was opened without. {advice}", names.join(", "));
            return Err(Error::Device(message));
        }
        self.check_lanes(requirements.features, lanes)
    }

    /// An `Err` for kernels that are made for other subgroups or matrices than this device has. Others than these would
    /// compute something else, and unchecked ones might do so anywhere in their buffers.
    pub(crate) fn check_lanes(&self, features: wgpu::Features, lanes: Lanes) -> Result<()> {
        lanes.problem(features, self.profile().lanes()).map_or(Ok(()), |message| Err(Error::Device(message)))
    }

    /// Name, driver and type of the adapter.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.inner.info
    }

    /// The adapter in the form `name (driver, backend)`, for messages.
    pub fn describe(&self) -> String {
        let info = self.info();
        format!("{} ({} {}, {:?})", info.name, info.driver, info.driver_info, info.backend)
    }

    /// The facts about the adapter that plans depend on.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// An encoder that captures show as `throughline` and what it is for.
    pub(crate) fn encoder(&self, what: &str) -> wgpu::CommandEncoder {
        let label = format!("throughline {what}");
        self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(&label) })
    }

    /// Submits what was recorded, without waiting. Prefer it to `Queue::submit`: if something is wrong with the
    /// commands, the result is an error here and not a call of your device's error handler.
    pub fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
        let id = encoder_id(&encoder);
        let submitted = self.guarded(|| Ok(self.queue().submit([encoder.finish()])))?;
        self.staging().arriving.submitted(id);
        Ok(submitted)
    }

    /// Queues a write, to happen before the next submit.
    pub(crate) fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.guarded(|| {
            self.queue().write_buffer(buffer, offset, bytes);
            Ok(())
        })
    }

    /// Submits the queued writes, so that those of a whole model do not pile up in host memory.
    pub(crate) fn flush(&self) -> Result<()> {
        self.guarded(|| Ok(self.queue().submit([]))).map(drop)
    }

    /// Whether something will come of its own accord: another thread's call of the device goes on, or what
    /// [`submit`](Self::submit) submitted has not arrived yet.
    pub(super) fn is_at_work(&self) -> bool {
        self.inner.calls.load(Ordering::Relaxed) > 0 || self.staging().arriving.is_any_submitted()
    }

    pub(super) fn staging(&self) -> &Staging {
        &self.inner.staging
    }

    /// Bound where a kernel declares a read-only buffer that the launch does not use.
    pub(crate) fn null(&self) -> &wgpu::Buffer {
        &self.inner.null
    }

    /// A zeroed buffer for tensors.
    pub(crate) fn storage_buffer(&self, label: &str, size: u64) -> Result<wgpu::Buffer> {
        let max = self.profile().max_buffer_bytes;
        if size > max {
            return Err(Error::limit(format!("bytes of buffer `{label}`"), size, max));
        }
        let named = format!("throughline {label}");
        let descriptor =
            wgpu::BufferDescriptor { label: Some(&named), size, usage: TENSOR_USAGES, mapped_at_creation: false };
        self.guarded(|| Ok(self.device().create_buffer(&descriptor))).map_err(|e| match e {
            Error::OutOfMemory(_) => Error::OutOfMemory(format!("buffer `{label}` needs {size} bytes")),
            e => e,
        })
    }

    /// The pipeline for a kernel, compiled the first time and cached. What the device says of its text is an
    /// [`Error::Kernel`].
    pub(crate) fn pipeline(&self, kernel: &Kernel) -> Result<Arc<wgpu::ComputePipeline>> {
        let lock = || self.inner.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = lock().get(kernel) {
            return Ok(pipeline.clone());
        }
        let compiled = self.guarded(|| self.compile(kernel)).map_err(|e| match e {
            Error::Device(message) => kernel.error(message),
            e => e,
        });
        let pipeline = Arc::new(compiled?);
        lock().insert(kernel.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// Drops the compiled pipelines, so that the next plan compiles again: for measuring cold starts.
    pub fn clear_pipelines(&self) {
        self.inner.pipelines.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Loads the compiled pipelines that [`save_pipelines`](Self::save_pipelines) left in this folder, to start faster.
    /// Call it before the first executable is made. Returns `false` if the driver has no such cache, or the folder has
    /// none for this adapter.
    ///
    /// # Safety
    ///
    /// The driver trusts the file: nothing but `save_pipelines` may have written to the folder.
    pub unsafe fn load_pipelines(&self, dir: &Path) -> Result<bool> {
        let Some(path) = self.pipelines_path(dir) else { return Ok(false) };
        let data = match std::fs::read(&path) {
            Ok(data) => data,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        // SAFETY: the caller vouches that the bytes come from `PipelineCache::get_data`.
        let cache = unsafe { self.create_pipeline_cache(Some(&data)) };
        *self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner) = Some(cache);
        Ok(true)
    }

    /// Saves the pipelines compiled so far in this folder, for the next process. Returns `false` if the driver has no
    /// cache that can be saved.
    pub fn save_pipelines(&self, dir: &Path) -> Result<bool> {
        let Some(path) = self.pipelines_path(dir) else { return Ok(false) };
        let cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(data) = cache.and_then(|cache| cache.get_data()) else { return Ok(false) };
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        write_atomically(&path, &data).map(|()| true)
    }

    fn pipelines_path(&self, dir: &Path) -> Option<PathBuf> {
        let supported = self.device().features().contains(wgpu::Features::PIPELINE_CACHE);
        supported.then(|| wgpu::util::pipeline_cache_key(self.info()).map(|key| dir.join(key))).flatten()
    }

    /// # Safety
    ///
    /// As in wgpu: `data` must come from `PipelineCache::get_data`.
    unsafe fn create_pipeline_cache(&self, data: Option<&[u8]>) -> wgpu::PipelineCache {
        let desc = wgpu::PipelineCacheDescriptor { label: Some("throughline"), data, fallback: true };
        // SAFETY: the caller's, and the device has the feature, or there would be no path.
        unsafe { self.device().create_pipeline_cache(&desc) }
    }

    /// The driver's cache, created empty on first use; `None` if it has none.
    fn pipeline_cache(&self) -> Option<wgpu::PipelineCache> {
        if !self.device().features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let mut cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: without data there is nothing to trust.
        Some(cache.get_or_insert_with(|| unsafe { self.create_pipeline_cache(None) }).clone())
    }

    fn compile(&self, kernel: &Kernel) -> Result<wgpu::ComputePipeline> {
        let wgsl = kernel.wgsl()?;
        let label = format!("throughline {}", kernel.describe());
        let desc = wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(wgsl.into()) };
        let module = if kernel.is_trusted() {
            // SAFETY: a kernel is trusted only if the planner found it in the program of the op of the
            // table that made it, for shapes that this op's `infer` accepts; safe code can neither set
            // that nor edit the plan afterwards (tests/locks.rs tries). tests/ops.rs runs each of
            // them on every case of its row with bindings longer than the tensors and sentinels
            // after every output, so indices are in range without injected checks; indices that are
            // data (tokens, starts) are compared with what they index; loops are bounded by shapes.
            // The platform's own buffer checks (robustBufferAccess) stay on either way.
            unsafe { self.device().create_shader_module_trusted(desc, wgpu::ShaderRuntimeChecks::unchecked()) }
        } else {
            self.device().create_shader_module(desc)
        };
        Ok(self.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: None,
            module: &module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: !kernel.is_trusted(),
                ..Default::default()
            },
            cache: self.pipeline_cache().as_ref(),
        }))
    }

    /// Whether the device is lost. wgpu reports that only to the one callback that the application may have set.
    /// Otherwise it makes every object invalid, so this checks whether a new object is.
    pub fn is_lost(&self) -> bool {
        let scope = self.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let buffer = self.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("throughline check for a lost device"),
            size: 4,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        buffer.map_async(wgpu::MapMode::Read, .., |_| {});
        now(scope.pop()).flatten().is_some()
    }

    pub(super) fn home(&self) -> Home {
        Home { gpu: self.inner.id, device: self.device().clone() }
    }

    /// Whether something that belongs to `home` belongs to this device.
    pub(super) fn is_home(&self, home: &Home) -> bool {
        home.gpu == self.inner.id || same_device(self.device(), &home.device)
    }

    /// The error for something that went wrong on the device, or because it is lost.
    pub(crate) fn error(&self, message: impl ToString) -> Error {
        let message = message.to_string();
        if self.is_lost() { Error::DeviceLost(message) } else { Error::Device(message) }
    }

    /// The error for what an error scope caught.
    fn caught(&self, e: wgpu::Error) -> Error {
        match e {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory(e.to_string()),
            e => self.error(e),
        }
    }

    /// [`scoped`](Self::scoped) for calls that cannot wait. On native devices the errors of a call are known when it
    /// returns. Browsers may report them later, and then to the application's handler.
    pub(crate) fn guarded<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let (result, errors) = self.in_scopes(f);
        let value = result?;
        match errors.into_iter().filter_map(now).flatten().next() {
            Some(e) => Err(self.caught(e)),
            None => Ok(value),
        }
    }

    /// Runs `f` and turns what the device reports meanwhile (validation, memory) into an error.
    pub(crate) async fn scoped<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let (result, errors) = self.in_scopes(f);
        let value = result?;
        for error in errors {
            if let Some(e) = error.await {
                return Err(self.caught(e));
            }
        }
        Ok(value)
    }

    /// The result of `f`, and what the device reports meanwhile, the most specific error first. Scopes belong to a
    /// thread, so they end here, before a future can move to another.
    fn in_scopes<T>(
        &self,
        f: impl FnOnce() -> Result<T>,
    ) -> (Result<T>, [impl Future<Output = Option<wgpu::Error>>; 3]) {
        let _call = Call::begin(&self.inner.calls);
        let scope = |filter| self.device().push_error_scope(filter);
        let memory = scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = scope(wgpu::ErrorFilter::Internal);
        let validation = scope(wgpu::ErrorFilter::Validation);
        let result = f();
        (result, [validation.pop(), internal.pop(), memory.pop()])
    }
}

/// Whether two handles belong to one device. wgpu compares ids, which start anew in each `wgpu::Instance`. Error
/// scopes, however, belong to the device: if both handles are of one device, a scope of one catches the errors of the
/// other.
fn same_device(a: &wgpu::Device, b: &wgpu::Device) -> bool {
    if a != b {
        return false;
    }
    let outer = b.push_error_scope(wgpu::ErrorFilter::Validation);
    let inner = a.push_error_scope(wgpu::ErrorFilter::Validation);
    drop(b.create_buffer(&wgpu::BufferDescriptor {
        label: Some("throughline: an error on purpose, to compare devices"),
        size: 4,
        usage: wgpu::BufferUsages::empty(),
        mapped_at_creation: false,
    }));
    let caught = now(inner.pop());
    drop(now(outer.pop()));
    // If the answer is not available at once, they may be.
    caught.is_none_or(|error| error.is_some())
}

/// An encoder among those that exist.
pub(super) fn encoder_id(encoder: &wgpu::CommandEncoder) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(encoder)
}

/// The result of a future, if it is ready at once.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// The adapter that `WGPU_ADAPTER_NAME` asks for, or else the best available one.
async fn best_adapter() -> Result<wgpu::Adapter> {
    // wgpu would panic.
    if wgpu::Instance::enabled_backend_features().is_empty() {
        let features = "turn on the feature `vulkan`, `metal` or `dx12` that this system has";
        return Err(Error::NoAdapter(format!("throughline was built without a back end: {features}")));
    }
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    // Validation layers are for people who write backends or look for a fault; wgpu's own checks stay on.
    desc.flags = wgpu::InstanceFlags::empty().with_env();
    let instance = wgpu::Instance::new(desc);
    if let Some(name) = std::env::var_os("WGPU_ADAPTER_NAME") {
        return named_adapter(&instance, &name.to_string_lossy()).await;
    }
    let power_preference = wgpu::PowerPreference::HighPerformance;
    let options = wgpu::RequestAdapterOptions { power_preference, ..Default::default() };
    instance.request_adapter(&options).await.map_err(|e| {
        Error::NoAdapter(format!(
            "{e}. throughline needs a Vulkan, Metal or DX12 driver; on Linux without a GPU install Mesa's software \
             driver (Debian: apt-get install mesa-vulkan-drivers libvulkan1)"
        ))
    })
}

/// The first adapter with this in its name, in whichever case, as in other wgpu programs. wgpu's own function panics if
/// there is none.
async fn named_adapter(instance: &wgpu::Instance, name: &str) -> Result<wgpu::Adapter> {
    let adapters = instance.enumerate_adapters(wgpu::Backends::all()).await;
    let names: Vec<String> = adapters.iter().map(|adapter| adapter.get_info().name).collect();
    let matches = |known: &String| known.to_lowercase().contains(&name.to_lowercase());
    let found = names.iter().position(matches).and_then(|i| adapters.into_iter().nth(i));
    found.ok_or_else(|| {
        let known = if names.is_empty() { "none".into() } else { names.join(", ") };
        Error::NoAdapter(format!("WGPU_ADAPTER_NAME is `{name}`, but the adapters here are: {known}"))
    })
}

/// The best adapter and its device, with the experimental features of `cooperative` if it has them.
async fn open(cooperative: Option<Cooperative>) -> Result<(wgpu::Adapter, wgpu::Device, wgpu::Queue)> {
    let adapter = best_adapter().await?;
    if let Some(kind) = cooperative.filter(|kind| !kind.is_in(&adapter.cooperative_matrix_properties())) {
        return Err(no_matrices(kind, &adapter.get_info().name));
    }
    let wanted = Gpu::USEFUL_FEATURES | cooperative.map_or(wgpu::Features::empty(), Cooperative::features);
    let experimental_features = match cooperative {
        // SAFETY: the token states that its holder knows of bugs that safe calls may run into; the caller opted in to
        // that. The only feature requested with it is cooperative matrices, used by kernels whose loads and stores of
        // matrices stay within their workgroup memory.
        Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
        None => wgpu::ExperimentalFeatures::disabled(),
    };
    let (device, queue) = adapter
        .request_device(&wgpu::DeviceDescriptor {
            label: Some("throughline"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            experimental_features,
            ..Default::default()
        })
        .await
        .map_err(|e| Error::NoAdapter(format!("{} does not open: {e}", adapter.get_info().name)))?;
    Ok((adapter, device, queue))
}

fn no_matrices(kind: Cooperative, name: &str) -> Error {
    Error::Device(format!("{name} has no cooperative matrices of {kind:?}, or was opened without"))
}

/// Size for a binding: whole quads, never zero.
pub(crate) fn binding_size(bytes: usize) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes.next_multiple_of(16) as u64)
}
