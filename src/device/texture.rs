//! Writing image-shaped tensors into textures of your application, to be sampled in the same submit.
//!
//! A shader can read a tensor's buffer directly, without this. Use a texture for what buffers cannot do: filtered
//! sampling, and materials, post-processing or UI that expect textures.

use std::sync::Arc;

use super::gpu::{Gpu, binding_size};
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::tensor::DType;

const SOURCE: &str = include_str!("../../shaders/texture.wgsl");

/// Side of the square of pixels that a workgroup writes.
const GROUP: u32 = 8;

/// A pass that writes a tensor into a texture, with its pipeline and bind group created once.
///
/// ```
/// use throughline::{Gpu, Tensor, TensorType};
/// use throughline::device::texture::TextureOutput;
/// let gpu = Gpu::headless_blocking()?;
/// let rgb = Tensor::zeros(&gpu, "rgb", TensorType::f32([9, 16, 3]))?; // an output of yours, [height, width, channels]
/// let texture = gpu.device().create_texture(&wgpu::TextureDescriptor {
///     label: Some("the app's"),
///     size: wgpu::Extent3d { width: 16, height: 9, depth_or_array_layers: 1 },
///     mip_level_count: 1,
///     sample_count: 1,
///     dimension: wgpu::TextureDimension::D2,
///     format: wgpu::TextureFormat::Rgba8Unorm,
///     usage: wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::TEXTURE_BINDING,
///     view_formats: &[],
/// });
/// let output = TextureOutput::new(&gpu, &rgb, &texture)?;
/// // Each frame, after the step that makes `rgb` and before the pass that samples `texture`:
/// let mut encoder = gpu.device().create_command_encoder(&Default::default());
/// output.record(&mut encoder);
/// gpu.queue().submit([encoder.finish()]);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct TextureOutput {
    pipeline: Arc<wgpu::ComputePipeline>,
    group: wgpu::BindGroup,
    workgroups: [u32; 2],
}

impl TextureOutput {
    /// A pass from an f32 tensor `[height, width, channels]`, or `[height * width, channels]`, to a texture of that
    /// size, with one layer, one mip level and usage `STORAGE_BINDING`. A single channel is written as grey; without a
    /// fourth channel alpha is 1.
    ///
    /// Supported formats: `Rgba8Unorm`, which clamps to 0 to 1; `Rgba16Float`; `Rgba32Float`; `R32Float` for one
    /// channel; and `Bgra8Unorm` on devices with `BGRA8UNORM_STORAGE`. Values are written unchanged. Passes cannot
    /// write to sRGB formats: if the values are sRGB, make the texture `Rgba8Unorm` with `Rgba8UnormSrgb` among its
    /// `view_formats`, and sample a view of that format whose `usage` is `TEXTURE_BINDING`.
    ///
    /// The first pass for a format compiles a kernel.
    ///
    /// # Errors
    ///
    /// The error names what does not fit: size, format or usage.
    pub fn new(gpu: &Gpu, tensor: &Tensor, texture: &wgpu::Texture) -> Result<Self> {
        check(texture)?;
        let channels = channels(tensor, texture)?;
        tensor.check_device(gpu, "texture output")?;
        let target = target(gpu, texture, channels)?;
        let kernel =
            Kernel::new("texture", SOURCE, "store").knob("Target", target.as_str()).knob("CHANNELS", channels as u32);
        let build = || {
            let pipeline = gpu.pipeline(&kernel)?;
            let pixels = wgpu::BufferBinding {
                buffer: tensor.buffer(),
                offset: tensor.offset(),
                size: binding_size(tensor.ty().bytes()),
            };
            let view = texture.create_view(&wgpu::TextureViewDescriptor {
                label: Some("throughline texture"),
                usage: Some(wgpu::TextureUsages::STORAGE_BINDING),
                ..Default::default()
            });
            let resources = [wgpu::BindingResource::Buffer(pixels), wgpu::BindingResource::TextureView(&view)];
            let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
            let group = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("throughline texture"),
                layout: &pipeline.get_bind_group_layout(0),
                entries: &(0..).zip(resources).map(entry).collect::<Vec<_>>(),
            });
            let workgroups = [texture.width(), texture.height()].map(|n| n.div_ceil(GROUP));
            Ok(TextureOutput { pipeline, group, workgroups })
        };
        gpu.guarded(build)
    }

    /// Records one compute pass that writes all pixels from the tensor's contents at that point. Allocates nothing on
    /// the GPU and does not wait.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let label = Some("throughline texture");
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        let [x, y] = self.workgroups;
        pass.dispatch_workgroups(x, y, 1);
    }
}

fn refused<T>(expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Result<T> {
    Err(Error::data("texture output", expected, got))
}

/// Number of channels of the tensor, if it has as many pixels as the texture.
fn channels(tensor: &Tensor, texture: &wgpu::Texture) -> Result<usize> {
    let ty = tensor.ty();
    let (width, height) = (texture.width() as usize, texture.height() as usize);
    let (pixels, channels) = match (ty.dtype, ty.shape.dims()) {
        (DType::F32, &[h, w, c]) => ([h, w] == [height, width], c),
        (DType::F32, &[n, c]) => (n == height * width, c),
        _ => return refused("f32 [height, width, channels] or [height * width, channels]", ty.to_string()),
    };
    if ![1, 3, 4].contains(&channels) {
        return refused("1, 3 or 4 channels", ty.to_string());
    }
    if !pixels {
        let [n, whole] = [format!("[{}, {channels}]", height * width), format!("[{height}, {width}, {channels}]")];
        return refused(format!("f32{whole} or f32{n} for a texture of {width} x {height}"), ty.to_string());
    }
    Ok(channels)
}

/// The texture's type in WGSL, if a pass can write to it.
fn target(gpu: &Gpu, texture: &wgpu::Texture, channels: usize) -> Result<String> {
    use wgpu::TextureFormat as Format;
    let storage = wgpu::Features::BGRA8UNORM_STORAGE;
    let format = texture.format();
    let text = match format {
        Format::Rgba8Unorm => "rgba8unorm",
        Format::Rgba16Float => "rgba16float",
        Format::Rgba32Float => "rgba32float",
        Format::R32Float if channels == 1 => "r32float",
        Format::R32Float => return refused("1 channel for R32Float", channels.to_string()),
        Format::Bgra8Unorm if gpu.device().features().contains(storage) => "bgra8unorm",
        Format::Bgra8Unorm => {
            return refused("Rgba8Unorm, or for Bgra8Unorm a device with BGRA8UNORM_STORAGE", "Bgra8Unorm without");
        }
        Format::Rgba8UnormSrgb | Format::Bgra8UnormSrgb => {
            let plain = format.remove_srgb_suffix();
            let expected = format!("format {plain:?} with {format:?} among its view_formats, to sample a view of that");
            return refused(expected, format!("{format:?}, which no pass can write to"));
        }
        _ => {
            let known = "Rgba8Unorm, Rgba16Float, Rgba32Float, R32Float or Bgra8Unorm";
            return refused(format!("one of the formats {known}"), format!("{format:?}"));
        }
    };
    match texture.usage().contains(wgpu::TextureUsages::STORAGE_BINDING) {
        true => Ok(format!("texture_storage_2d<{text}, write>")),
        false => refused("a texture with usage STORAGE_BINDING", format!("{:?}", texture.usage())),
    }
}

/// Checks what every texture must be, whatever its format and size.
fn check(texture: &wgpu::Texture) -> Result<()> {
    if texture.dimension() != wgpu::TextureDimension::D2 {
        return refused("a texture of dimension D2", format!("{:?}", texture.dimension()));
    }
    let counts = [
        ("sample", texture.sample_count()),
        ("mip level", texture.mip_level_count()),
        ("layer", texture.depth_or_array_layers()),
    ];
    match counts.into_iter().find(|(_, n)| *n != 1) {
        Some((what, n)) => refused(format!("a texture with 1 {what}"), n.to_string()),
        None => Ok(()),
    }
}
