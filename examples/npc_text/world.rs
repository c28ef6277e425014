//! The rest of the game: what an app records into its frames besides speech.

use throughline::Gpu;

const MEMBERS: u32 = 4096;

/// A crowd, and the pass that moves it.
pub struct World {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
}

impl World {
    pub fn new(gpu: &Gpu) -> World {
        let device = gpu.device();
        let module = device.create_shader_module(wgpu::include_wgsl!("world.wgsl"));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("world"),
            layout: None,
            module: &module,
            entry_point: Some("walk"),
            compilation_options: Default::default(),
            cache: None,
        });
        let crowd = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("crowd"),
            size: u64::from(16 * MEMBERS),
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("world"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: crowd.as_entire_binding() }],
        });
        World { pipeline, group }
    }

    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        pass.dispatch_workgroups(MEMBERS / 64, 1, 1);
    }
}
