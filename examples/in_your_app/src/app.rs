//! The app: its device, its frame, and a network in it.

use anyhow::{Context, Result};
use throughline::{Gpu, Tensor, TensorType};

use crate::{Learner, Options};

/// Draws a picture next to what a network has learnt of it.
#[derive(Debug)]
pub struct App {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub learner: Learner,
    /// f32 `[height * width, 3]` in one of the app's buffers: the network writes it, the fragment shader reads it.
    pub output: Tensor,
    /// Size of the picture. The frame shows two of them side by side.
    size: [u32; 2],
    sizes: wgpu::Buffer,
    pipeline: wgpu::RenderPipeline,
    group: wgpu::BindGroup,
}

impl App {
    /// Opens the app's device, with the features that throughline can use if the adapter has them. `format` is the
    /// texture format of the frames.
    pub fn new(adapter: &wgpu::Adapter, format: wgpu::TextureFormat, options: &Options) -> Result<App> {
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("app"),
            required_features: adapter.features() & Gpu::USEFUL_FEATURES,
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (device, queue) = opened.with_context(|| format!("opening {}", adapter.get_info().name))?;

        let picture = &options.picture;
        let size = [picture.width as u32, picture.height as u32];
        let ty = TensorType::f32([picture.width * picture.height, 3]);
        let buffer = |label: &str, size: usize, usage: wgpu::BufferUsages| {
            let (label, size) = (Some(label), size as u64);
            device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
        };
        let wanted = buffer("picture", ty.storage_bytes(), Tensor::USAGES);
        let learnt = buffer("learnt", ty.storage_bytes(), Tensor::USAGES);
        queue.write_buffer(&wanted, 0, bytemuck::cast_slice(&picture.rgb));
        let sizes = buffer("sizes", 16, wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST);
        let pipeline = pipeline(&device, format);
        let entries = [(0, &sizes), (1, &wanted), (2, &learnt)];
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("frame"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries.map(|(binding, b)| wgpu::BindGroupEntry { binding, resource: b.as_entire_binding() }),
        });

        // This is all that the network gets from the app: its device, and two of its buffers.
        let gpu = Gpu::from_device(device.clone(), queue.clone()).self_test_blocking()?;
        let wanted = Tensor::from_buffer(wanted, 0, ty.clone())?;
        let output = Tensor::from_buffer(learnt, 0, ty)?;
        let learner = Learner::new(&gpu, picture.width, &wanted, &output, options.budget)?;
        let app = App { device, queue, learner, output, size, sizes, pipeline, group };
        app.resize(app.frame_size());
        Ok(app)
    }

    /// The frame size at which both pictures are shown pixel by pixel.
    pub fn frame_size(&self) -> [u32; 2] {
        [2 * self.size[0], self.size[1]]
    }

    /// Sets the size of the frames from now on.
    pub fn resize(&self, frame: [u32; 2]) {
        self.queue.write_buffer(&self.sizes, 0, bytemuck::cast_slice(&[self.size, frame]));
    }

    /// Draws a frame with one submit: part of a training step if `train` is set, followed by the app's own pass, which
    /// reads what the network wrote.
    pub fn frame(&mut self, target: &wgpu::TextureView, train: bool) -> Result<wgpu::SubmissionIndex> {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        if train {
            self.learner.record(&mut encoder)?;
        }
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            label: Some("frame"),
            color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                view: target,
                depth_slice: None,
                resolve_target: None,
                ops: wgpu::Operations { load: wgpu::LoadOp::Clear(wgpu::Color::BLACK), store: wgpu::StoreOp::Store },
            })],
            ..Default::default()
        });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        pass.draw(0..3, 0..1);
        drop(pass);
        Ok(self.queue.submit([encoder.finish()]))
    }
}

fn pipeline(device: &wgpu::Device, format: wgpu::TextureFormat) -> wgpu::RenderPipeline {
    let module = device.create_shader_module(wgpu::include_wgsl!("frame.wgsl"));
    device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
        label: Some("frame"),
        layout: None,
        vertex: wgpu::VertexState {
            module: &module,
            entry_point: Some("corner"),
            compilation_options: Default::default(),
            buffers: &[],
        },
        primitive: Default::default(),
        depth_stencil: None,
        multisample: Default::default(),
        fragment: Some(wgpu::FragmentState {
            module: &module,
            entry_point: Some("color"),
            compilation_options: Default::default(),
            targets: &[Some(format.into())],
        }),
        multiview_mask: None,
        cache: None,
    })
}
