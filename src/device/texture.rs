//! Images between tensors and textures of your application, without a copy to the host.
//!
//! [`TextureInput`] reads a texture into an input of a network, and [`TextureOutput`] writes what comes out of one.
//! With the step between them, all in one encoder, a denoiser, an upscaler or a style becomes a pass of your frame.
//!
//! A shader of yours can use a tensor's buffer directly, without this. Use textures for what buffers cannot do: to draw
//! into, for filtered sampling, and for materials, post-processing or UI that expect them.
//!
//! ```
//! use std::sync::Arc;
//! use throughline::device::texture::{TextureInput, TextureOutput};
//! use throughline::{ExecOptions, Executable, Gpu, TensorType, wgpu};
//!
//! let gpu = Gpu::headless_blocking()?; // or the app's device: `Gpu::from_device`
//! # let texture = |usage| gpu.device().create_texture(&wgpu::TextureDescriptor {
//! #     label: None,
//! #     size: wgpu::Extent3d { width: 16, height: 9, depth_or_array_layers: 1 },
//! #     mip_level_count: 1,
//! #     sample_count: 1,
//! #     dimension: wgpu::TextureDimension::D2,
//! #     format: wgpu::TextureFormat::Rgba8Unorm,
//! #     usage,
//! #     view_formats: &[],
//! # });
//! # let frame = texture(wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::TEXTURE_BINDING);
//! # let graded = texture(wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::TEXTURE_BINDING);
//! // `frame` is what the app draws into, 16 x 9 pixels, and `graded` what it shows.
//! let mut g = gpu.graph();
//! let image = g.input("image", TensorType::f32([9, 16, 3]))?; // height, width, channels
//! let mix = g.param("mix", [3, 3])?;
//! let result = g.matmul("result", image, mix)?; // a network of one layer
//! let exec = Executable::new_blocking(&gpu, Arc::new(gpu.plan(&g, &[result])?), ExecOptions::default())?;
//! exec.write(mix, &[0.4f32, 0.3, 0.3, 0.7, 0.7, 0.5, 0.2, 0.1, 0.1])?; // sepia
//!
//! let input = TextureInput::new(&gpu, &frame, &exec.tensor(image)?)?;
//! let output = TextureOutput::new(&gpu, &exec.tensor(result)?, &graded)?;
//!
//! // Each frame, between the pass that draws into `frame` and the pass that samples `graded`:
//! let mut encoder = gpu.device().create_command_encoder(&Default::default());
//! input.record(&mut encoder);
//! exec.record(&mut encoder)?;
//! output.record(&mut encoder);
//! gpu.submit(encoder)?;
//! # Ok::<(), throughline::Error>(())
//! ```

use std::sync::Arc;

use wgpu::util::DeviceExt;

use super::gpu::{Gpu, binding_size};
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::tensor::DType;

const SOURCE: &str = include_str!("../../shaders/texture.wgsl");

/// Side of the square of pixels that a workgroup moves.
const GROUP: u32 = 8;

/// Which pixels of a texture a [`TextureInput`] reads or a [`TextureOutput`] writes. By default, all of the first mip
/// level of the first layer.
///
/// ```
/// use throughline::device::texture::TexturePart;
/// let face = TexturePart { layer: 3, ..Default::default() }; // of a cube map
/// let tile = TexturePart { origin: Some([256, 128]), ..Default::default() }; // as large as the tensor
/// # let _ = (face, tile);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TexturePart {
    /// The mip level.
    pub mip_level: u32,
    /// The array layer.
    pub layer: u32,
    /// x and y of the top left pixel. The tensor, `[height, width, channels]`, then says how large the part is. `None`
    /// is the whole level, and the tensor must have its size.
    pub origin: Option<[u32; 2]>,
    /// The format to see the pixels in, one of the texture's `view_formats`. `None` is its own. With `Rgba8Unorm`, an
    /// input takes the values of an `Rgba8UnormSrgb` texture as they are stored, not decoded to linear light.
    pub format: Option<wgpu::TextureFormat>,
}

/// A pass that reads a texture into a tensor, with its pipeline and bind group created once. The [module](self) has an
/// example.
#[derive(Debug)]
pub struct TextureInput {
    pass: Pass,
}

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
    pass: Pass,
}

#[derive(Debug)]
struct Pass {
    pipeline: Arc<wgpu::ComputePipeline>,
    group: wgpu::BindGroup,
    workgroups: [u32; 2],
}

impl TextureInput {
    /// A pass from a texture to an f32 tensor of its size, `[height, width, channels]`, `[1, height, width, channels]`
    /// or `[height * width, channels]`. The tensor takes as many of the texture's channels, red first, as it has: 1 to
    /// 4, but no more than the format.
    ///
    /// The texture has one sample per pixel, the usage `TEXTURE_BINDING`, and any format that shaders read as f32:
    /// unorm, snorm, float, compressed or depth. Values are what `textureLoad` returns. So sRGB formats are decoded to
    /// linear light, except through [`TexturePart::format`], and alpha is left as it is.
    ///
    /// A texture with several mip levels or layers is read at the first; see [`of_part`](Self::of_part). The first pass
    /// for a number of channels compiles a kernel.
    ///
    /// # Errors
    ///
    /// The error names what does not fit: size, format or usage.
    pub fn new(gpu: &Gpu, texture: &wgpu::Texture, tensor: &Tensor) -> Result<Self> {
        Self::of_part(gpu, texture, TexturePart::default(), tensor)
    }

    /// [`new`](Self::new) for a mip level, a layer or a region of the texture.
    pub fn of_part(gpu: &Gpu, texture: &wgpu::Texture, part: TexturePart, tensor: &Tensor) -> Result<Self> {
        let image = Image::new(INPUT, gpu, tensor, texture, part)?;
        image.check_readable(gpu)?;
        let pass = image.pass(gpu, image.kernel("load"), wgpu::TextureUsages::TEXTURE_BINDING, [3, 4])?;
        Ok(TextureInput { pass })
    }

    /// Records one compute pass that fills the tensor from the texture's contents at that point. Allocates nothing on
    /// the GPU and does not wait.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        self.pass.record(encoder);
    }
}

impl TextureOutput {
    /// A pass from an f32 tensor `[height, width, channels]`, `[1, height, width, channels]` or
    /// `[height * width, channels]` to a texture of that size, with usage `STORAGE_BINDING`. A single channel is
    /// written as grey; without a fourth channel alpha is 1.
    ///
    /// Supported formats: `Rgba8Unorm`, which clamps to 0 to 1; `Rgba16Float`; `Rgba32Float`; `R32Float` for one
    /// channel; and `Bgra8Unorm` on devices with `BGRA8UNORM_STORAGE`. Values are written unchanged. Passes cannot
    /// write to sRGB formats: if the values are sRGB, make the texture `Rgba8Unorm` with `Rgba8UnormSrgb` among its
    /// `view_formats`, and sample a view of that format whose `usage` is `TEXTURE_BINDING`.
    ///
    /// Of a texture with several mip levels or layers, the first is written; see [`to_part`](Self::to_part). The first
    /// pass for a format compiles a kernel.
    ///
    /// # Errors
    ///
    /// The error names what does not fit: size, format or usage.
    pub fn new(gpu: &Gpu, tensor: &Tensor, texture: &wgpu::Texture) -> Result<Self> {
        Self::to_part(gpu, tensor, texture, TexturePart::default())
    }

    /// [`new`](Self::new) for a mip level, a layer or a region of the texture. The rest of it stays as it is.
    pub fn to_part(gpu: &Gpu, tensor: &Tensor, texture: &wgpu::Texture, part: TexturePart) -> Result<Self> {
        let image = Image::new(OUTPUT, gpu, tensor, texture, part)?;
        let kernel = image.kernel("store").knob("Target", image.target(gpu)?.as_str());
        let pass = image.pass(gpu, kernel, wgpu::TextureUsages::STORAGE_BINDING, [1, 2])?;
        Ok(TextureOutput { pass })
    }

    /// Records one compute pass that writes all pixels from the tensor's contents at that point. Allocates nothing on
    /// the GPU and does not wait.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        self.pass.record(encoder);
    }
}

impl Pass {
    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let label = Some("throughline texture");
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        let [x, y] = self.workgroups;
        pass.dispatch_workgroups(x, y, 1);
    }
}

/// What a pass is for.
struct Use {
    /// What messages call it.
    what: &'static str,
    /// Numbers of channels that a tensor may have, and what messages call them.
    channels: &'static [usize],
    counts: &'static str,
}

const INPUT: Use = Use { what: "texture input", channels: &[1, 2, 3, 4], counts: "1 to 4 channels" };
const OUTPUT: Use = Use { what: "texture output", channels: &[1, 3, 4], counts: "1, 3 or 4 channels" };

/// A tensor and the part of a texture that has the same pixels.
struct Image<'a> {
    to: Use,
    tensor: &'a Tensor,
    texture: &'a wgpu::Texture,
    part: TexturePart,
    /// Of the tensor.
    width: u32,
    height: u32,
    channels: u32,
}

impl<'a> Image<'a> {
    fn new(to: Use, gpu: &Gpu, tensor: &'a Tensor, texture: &'a wgpu::Texture, part: TexturePart) -> Result<Self> {
        tensor.check_device(gpu, to.what)?;
        let mut image = Image { to, tensor, texture, part, width: 0, height: 0, channels: 0 };
        image.check_part()?;
        [image.width, image.height, image.channels] = image.measures()?;
        Ok(image)
    }

    fn refused<T>(&self, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Result<T> {
        Err(Error::data(self.to.what, expected, got))
    }

    /// The format that the pass sees.
    fn format(&self) -> wgpu::TextureFormat {
        self.part.format.unwrap_or(self.texture.format())
    }

    /// Checks what every texture must be, whatever its format and size, and that it has this level and layer.
    fn check_part(&self) -> Result<()> {
        let texture = self.texture;
        if texture.dimension() != wgpu::TextureDimension::D2 {
            return self.refused("a texture of dimension D2", format!("{:?}", texture.dimension()));
        }
        if texture.sample_count() != 1 {
            return self.refused("a texture with 1 sample: resolve it first", texture.sample_count());
        }
        let parts = [
            ("mip level", self.part.mip_level, texture.mip_level_count()),
            ("layer", self.part.layer, texture.depth_or_array_layers()),
        ];
        if let Some((what, i, n)) = parts.into_iter().find(|(_, i, n)| i >= n) {
            return self.refused(format!("a {what} below {n}"), i);
        }
        let (own, seen) = (texture.format(), self.format());
        if own.remove_srgb_suffix() != seen.remove_srgb_suffix() {
            return self
                .refused(format!("a view of {own:?} in a format that differs in sRGB alone"), format!("{seen:?}"));
        }
        Ok(())
    }

    /// Width, height and channels of the tensor, if its pixels are those of the part.
    fn measures(&self) -> Result<[u32; 3]> {
        let ty = self.tensor.ty();
        let TexturePart { mip_level, origin, .. } = self.part;
        let level = self.texture.size().mip_level_size(mip_level, self.texture.dimension());
        let (width, height) = (level.width as usize, level.height as usize);
        let ([h, w, channels], fits) = match (ty.dtype, ty.shape.dims(), origin) {
            (DType::F32, &[h, w, c] | &[1, h, w, c], None) => ([h, w, c], [h, w] == [height, width]),
            (DType::F32, &[n, c], None) => ([height, width, c], n == height * width),
            (DType::F32, &[h, w, c] | &[1, h, w, c], Some([x, y])) => {
                ([h, w, c], h + y as usize <= height && w + x as usize <= width)
            }
            (.., None) => {
                return self.refused("f32 [height, width, channels] or [height * width, channels]", ty);
            }
            (.., Some(_)) => return self.refused("f32 [height, width, channels] for a part with an origin", ty),
        };
        if !self.to.channels.contains(&channels) {
            return self.refused(self.to.counts, ty);
        }
        match (fits, origin) {
            (true, _) => Ok([w as u32, h as u32, channels as u32]),
            (false, Some([x, y])) => {
                let expected = format!("pixels from ({x}, {y}) inside a texture of {width} x {height}");
                self.refused(expected, format!("{w} x {h} of {ty}"))
            }
            (false, None) => {
                let of = if mip_level == 0 { String::new() } else { format!("mip level {mip_level} of ") };
                let [rows, whole] =
                    [format!("[{}, {channels}]", height * width), format!("[{height}, {width}, {channels}]")];
                self.refused(format!("f32{whole} or f32{rows} for {of}a texture of {width} x {height}"), ty)
            }
        }
    }

    fn kernel(&self, entry: &'static str) -> Kernel {
        Kernel::new("texture", SOURCE, entry).knob("CHANNELS", self.channels)
    }

    fn check_usage(&self, usage: wgpu::TextureUsages, name: &str) -> Result<()> {
        match self.texture.usage().contains(usage) {
            true => Ok(()),
            false => self.refused(format!("a texture with usage {name}"), format!("{:?}", self.texture.usage())),
        }
    }

    /// The plane of the texture that is read: depth, where there is also a stencil.
    fn aspect(&self) -> wgpu::TextureAspect {
        let both = self.format().is_combined_depth_stencil_format();
        if both { wgpu::TextureAspect::DepthOnly } else { wgpu::TextureAspect::All }
    }

    /// Checks that a pass can read the texture as f32, with as many channels as the tensor has.
    fn check_readable(&self, gpu: &Gpu) -> Result<()> {
        use wgpu::TextureSampleType as Type;
        let (format, aspect) = (self.format(), self.aspect());
        let kind = format.sample_type(Some(aspect), Some(gpu.device().features()));
        if !matches!(kind, Some(Type::Float { .. } | Type::Depth)) {
            return self.refused("a format that shaders read as f32, such as Rgba8Unorm", format!("{format:?}"));
        }
        let most = u32::from(format.components_with_aspect(aspect));
        if self.channels > most {
            return self.refused(format!("at most {most} channels from {format:?}"), self.tensor.ty());
        }
        self.check_usage(wgpu::TextureUsages::TEXTURE_BINDING, "TEXTURE_BINDING")
    }

    /// The texture's type in WGSL, if a pass can write to it.
    fn target(&self, gpu: &Gpu) -> Result<String> {
        use wgpu::TextureFormat as Format;
        let storage = wgpu::Features::BGRA8UNORM_STORAGE;
        let format = self.format();
        let text = match format {
            Format::Rgba8Unorm => "rgba8unorm",
            Format::Rgba16Float => "rgba16float",
            Format::Rgba32Float => "rgba32float",
            Format::R32Float if self.channels == 1 => "r32float",
            Format::R32Float => return self.refused("1 channel for R32Float", self.channels),
            Format::Bgra8Unorm if gpu.device().features().contains(storage) => "bgra8unorm",
            Format::Bgra8Unorm => {
                let expected = "Rgba8Unorm, or for Bgra8Unorm a device with BGRA8UNORM_STORAGE";
                return self.refused(expected, "Bgra8Unorm without");
            }
            Format::Rgba8UnormSrgb | Format::Bgra8UnormSrgb => {
                let plain = format.remove_srgb_suffix();
                let expected =
                    format!("format {plain:?} with {format:?} among its view_formats, to sample a view of that");
                return self.refused(expected, format!("{format:?}, which no pass can write to"));
            }
            _ => {
                let known = "Rgba8Unorm, Rgba16Float, Rgba32Float, R32Float or Bgra8Unorm";
                return self.refused(format!("one of the formats {known}"), format!("{format:?}"));
            }
        };
        self.check_usage(wgpu::TextureUsages::STORAGE_BINDING, "STORAGE_BINDING")?;
        Ok(format!("texture_storage_2d<{text}, write>"))
    }

    /// The pass of this kernel, which declares tensor and texture at these two bindings.
    fn pass(&self, gpu: &Gpu, kernel: Kernel, usage: wgpu::TextureUsages, bindings: [u32; 2]) -> Result<Pass> {
        let build = || {
            let pipeline = gpu.pipeline(&kernel)?;
            let [x, y] = self.part.origin.unwrap_or_default();
            let part = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: Some("throughline texture part"),
                contents: bytemuck::bytes_of(&[x, y, self.width, self.height]),
                usage: wgpu::BufferUsages::UNIFORM,
            });
            let pixels = wgpu::BufferBinding {
                buffer: self.tensor.buffer(),
                offset: self.tensor.offset(),
                size: binding_size(self.tensor.ty().bytes()),
            };
            let view = self.texture.create_view(&wgpu::TextureViewDescriptor {
                label: Some("throughline texture"),
                format: self.part.format,
                dimension: Some(wgpu::TextureViewDimension::D2),
                usage: Some(usage),
                aspect: self.aspect(),
                base_mip_level: self.part.mip_level,
                mip_level_count: Some(1),
                base_array_layer: self.part.layer,
                array_layer_count: Some(1),
            });
            let resources = [
                (0, part.as_entire_binding()),
                (bindings[0], wgpu::BindingResource::Buffer(pixels)),
                (bindings[1], wgpu::BindingResource::TextureView(&view)),
            ];
            let group = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("throughline texture"),
                layout: &pipeline.get_bind_group_layout(0),
                entries: &resources.map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource }),
            });
            let workgroups = [self.width, self.height].map(|n| n.div_ceil(GROUP));
            Ok(Pass { pipeline, group, workgroups })
        };
        gpu.guarded(build)
    }
}
