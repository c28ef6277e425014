//! What the integration tests share.
#![allow(dead_code)] // each test binary uses a part

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use throughline::reference::Array;
use throughline::{Cooperative, Executable, Gpu, Profile, Value, check};

/// The device of this thread, one of the two that the tests of a binary share: Mesa's software driver compiles kernels
/// on one thread for each device, and that is what most tests wait for. Without an adapter every test fails.
pub fn gpu() -> &'static Gpu {
    static GPUS: [OnceLock<Gpu>; 2] = [const { OnceLock::new() }; 2];
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % GPUS.len();
    }
    let cooperative = || Cooperative::ALL.into_iter().find_map(|kind| Gpu::headless_cooperative_blocking(kind).ok());
    let open = || cooperative().map_or_else(Gpu::headless_blocking, Ok);
    GPUS[MINE.with(|mine| *mine)].get_or_init(|| match open() {
        Ok(gpu) => gpu,
        Err(e) => panic!("these tests need a GPU adapter, a software one will do: {e}"),
    })
}

/// A device as browsers give one to a page that asks for nothing: WebGPU's default limits and no features, and wgpu
/// refuses what goes beyond the standard.
pub fn webgpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        descriptor.flags = wgpu::InstanceFlags::STRICT_WEBGPU_COMPLIANCE;
        let instance = wgpu::Instance::new(descriptor);
        let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
        let device = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
        Gpu::from_device(device.0, device.1)
    })
}

/// All kinds of profiles that can run here.
pub fn profiles() -> Vec<Profile> {
    check::profiles(gpu())
}

/// Writes an f64 array to an external, in its type.
pub fn write(exec: &Executable, value: Value, array: &Array) {
    check::write(exec, value, array).unwrap();
}

/// Reads a value as f32, integers too.
pub fn read(exec: &Executable, value: Value) -> Vec<f32> {
    check::read_blocking(exec, value).unwrap()
}

/// A file of the repository. When the tests run, cargo says where that is, and so does a kit (`cargo xtask kit`), which
/// runs them on machines that do not have the folder they were built in.
pub fn repository(path: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(path)
}

/// A folder of tests/data/hf: a tiny model of Hugging Face's, with what PyTorch made of it.
pub fn hf_folder(name: &str) -> PathBuf {
    repository("tests/data/hf").join(name)
}

/// An expected tensor of such a folder.
pub fn hf_expected<T: bytemuck::Pod>(name: &str, tensor: &str) -> Vec<T> {
    expected(&hf_folder(name), tensor)
}

/// A folder of tests/data/lora: an adapter as `peft` saves it, with what PyTorch made of it.
pub fn lora_folder(name: &str) -> PathBuf {
    repository("tests/data/lora").join(name)
}

/// An expected tensor of such a folder.
pub fn lora_expected<T: bytemuck::Pod>(name: &str, tensor: &str) -> Vec<T> {
    expected(&lora_folder(name), tensor)
}

fn expected<T: bytemuck::Pod>(folder: &Path, tensor: &str) -> Vec<T> {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    bytemuck::pod_collect_to_vec(file.tensor(tensor).unwrap_or_else(|e| panic!("{tensor}: {e}")).data())
}

/// The largest difference between two arrays.
pub fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Two devices of the adapter, opened alike but for the range that a binding may cover.
pub fn whole_and_split(max_binding: u64) -> [Gpu; 2] {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    [adapter.limits().max_storage_buffer_binding_size, max_binding].map(|max_storage_buffer_binding_size| {
        let descriptor = wgpu::DeviceDescriptor {
            required_features: adapter.features() & Gpu::USEFUL_FEATURES,
            required_limits: wgpu::Limits { max_storage_buffer_binding_size, ..adapter.limits() },
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
        Gpu::from_device(device, queue)
    })
}
