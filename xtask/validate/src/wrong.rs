//! Kernels that are wrong on purpose, each in one way. A layer that does not notice them proves nothing.

use anyhow::{Context, Result};
use throughline::{Gpu, wgpu};

/// Names, and the bodies of kernels of 64 invocations with the index `i`, for bindings of 64 elements each.
pub const KERNELS: [(&str, &str); 7] = [
    ("read-past-the-end", "y[i] = x[i + 1u];"),
    ("read-before-the-start", "y[i] = x[i - 1u];"),
    ("write-past-the-end", "y[i + 1u] = x[i];"),
    ("read-past-the-end-in-a-loop", "for (var j = i; j < 65u; j += 8u) { y[i] += x[j]; }"),
    ("write-past-the-end-in-a-loop", "for (var j = i; j < 65u; j += 8u) { y[j] = x[i]; }"),
    ("race", "shared_words[i / 2u] = x[i]; workgroupBarrier(); y[i] = shared_words[i];"),
    ("missing-barrier", "shared_words[i] = x[i]; y[i] = shared_words[63u - i];"),
];

/// Runs one of them in the middle of buffers that are larger, without any check of wgpu's.
pub fn run(gpu: &Gpu, name: &str) -> Result<()> {
    let (_, body) = KERNELS.iter().find(|(known, _)| *known == name).with_context(|| format!("no kernel `{name}`"))?;
    let wgsl = format!(
        "@group(0) @binding(0) var<storage, read> x: array<f32>;
        @group(0) @binding(1) var<storage, read_write> y: array<f32>;
        var<workgroup> shared_words: array<f32, 64>;
        @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) i: u32) {{ {body} }}"
    );
    let device = gpu.device();
    let source = wgpu::ShaderSource::Wgsl(wgsl.into());
    let descriptor = wgpu::ShaderModuleDescriptor { label: Some(name), source };
    // SAFETY: none. The accesses out of range stay within buffers that nothing else uses, or are what a driver makes of
    // an index of -1, in a process that does nothing else.
    let module = unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(name),
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        },
        cache: None,
    });
    let buffers = [(); 2].map(|()| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(name),
            size: 1024,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    });
    let entry = |binding: usize| {
        let size = wgpu::BufferSize::new(256);
        let range = wgpu::BufferBinding { buffer: &buffers[binding], offset: 512, size };
        wgpu::BindGroupEntry { binding: binding as u32, resource: wgpu::BindingResource::Buffer(range) }
    };
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(name),
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[entry(0), entry(1)],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(1, 1, 1);
    drop(pass);
    gpu.submit(encoder)?;
    Ok(gpu.wait_blocking()?)
}
