//! Writing tensors into an app's textures: every format, odd sizes, a pass of the app that follows, and errors.

mod common;

use common::gpu;
use throughline::device::texture::TextureOutput;
use throughline::rng::Rng;
use throughline::{Gpu, Tensor, TensorType};
use wgpu::TextureFormat as Format;
use wgpu::TextureUsages as Usages;

const USAGES: Usages = Usages::STORAGE_BINDING.union(Usages::TEXTURE_BINDING).union(Usages::COPY_SRC);

/// A texture to write to, but for what `change` makes of it.
fn texture_of(
    gpu: &Gpu,
    format: Format,
    [width, height]: [u32; 2],
    change: impl FnOnce(&mut wgpu::TextureDescriptor<'_>),
) -> wgpu::Texture {
    let mut desc = wgpu::TextureDescriptor {
        label: Some("the app's"),
        size: wgpu::Extent3d { width, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format,
        usage: USAGES,
        view_formats: &[],
    };
    change(&mut desc);
    gpu.device().create_texture(&desc)
}

fn texture(format: Format, size: [u32; 2]) -> wgpu::Texture {
    texture_of(gpu(), format, size, |_| ())
}

/// Values inside 0 to 1 and outside, and those that are in the tensor.
fn tensor(gpu: &Gpu, dims: &[usize]) -> (Tensor, Vec<f32>) {
    let ty = TensorType::f32(dims);
    let mut rng = Rng::new(&[dims.len() as u64, dims[0] as u64]);
    let values: Vec<f32> = (0..ty.len()).map(|_| (3.0 * rng.uniform() - 1.0) as f32).collect();
    let tensor = Tensor::zeros(gpu, "pixels", ty).unwrap();
    tensor.write(gpu, &values).unwrap();
    (tensor, values)
}

/// The bytes of a texture's pixels, rows from the top, after what the encoder has.
fn pixels(gpu: &Gpu, mut encoder: wgpu::CommandEncoder, texture: &wgpu::Texture) -> Vec<u8> {
    let bytes = texture.format().block_copy_size(None).unwrap();
    let row = bytes * texture.width();
    let padded = row.next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
    let ty = TensorType::u32([(padded * texture.height() / 4) as usize]);
    let staging = Tensor::zeros(gpu, "staging", ty).unwrap();
    let layout = wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(padded), rows_per_image: None };
    let to = wgpu::TexelCopyBufferInfo { buffer: staging.buffer(), layout };
    encoder.copy_texture_to_buffer(texture.as_image_copy(), to, texture.size());
    gpu.queue().submit([encoder.finish()]);
    let words: Vec<u32> = staging.read_blocking(gpu).unwrap();
    let lines = bytemuck::cast_slice(&words).chunks(padded as usize);
    lines.flat_map(|line: &[u8]| &line[..row as usize]).copied().collect()
}

fn encoder(gpu: &Gpu) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&Default::default())
}

/// Red, green, blue and alpha of a pixel of `channels`.
fn color(pixel: &[f32]) -> [f32; 4] {
    match *pixel {
        [x] => [x, x, x, 1.0],
        [r, g, b] => [r, g, b, 1.0],
        _ => [pixel[0], pixel[1], pixel[2], pixel[3]],
    }
}

/// Writes pixels to a texture of this format, and checks what is in it.
fn check(gpu: &Gpu, format: Format, size: [u32; 2], dims: &[usize]) {
    let (tensor, values) = tensor(gpu, dims);
    let texture = texture_of(gpu, format, size, |_| ());
    let output = TextureOutput::new(gpu, &tensor, &texture).unwrap();
    let mut encoder = encoder(gpu);
    output.record(&mut encoder);
    let bytes = pixels(gpu, encoder, &texture);
    let wanted: Vec<[f32; 4]> = values.chunks(dims[dims.len() - 1]).map(color).collect();
    let stored: Vec<f32> = match format {
        Format::Rgba8Unorm | Format::Bgra8Unorm => bytes.iter().map(|&b| f32::from(b) / 255.0).collect(),
        Format::Rgba16Float => {
            bytemuck::pod_collect_to_vec::<u8, u16>(&bytes).iter().map(|&h| half::f16::from_bits(h).to_f32()).collect()
        }
        _ => bytemuck::pod_collect_to_vec(&bytes),
    };
    let n = if format == Format::R32Float { 1 } else { 4 };
    assert_eq!(stored.len(), n * wanted.len());
    for (i, (got, want)) in stored.chunks(n).zip(&wanted).enumerate() {
        for (c, &x) in got.iter().enumerate() {
            let right = match format {
                Format::Rgba8Unorm => (x - want[c].clamp(0.0, 1.0)).abs() <= 0.6 / 255.0,
                Format::Bgra8Unorm => (x - want[[2, 1, 0, 3][c]].clamp(0.0, 1.0)).abs() <= 0.6 / 255.0,
                Format::Rgba16Float => (x - want[c]).abs() <= want[c].abs() / 1024.0 + 1e-7,
                _ => x == want[c],
            };
            assert!(right, "{format:?} from {dims:?}: pixel {i}: {got:?} for {want:?}");
        }
    }
}

#[test]
fn every_format_holds_the_tensors_values() {
    for format in [Format::Rgba8Unorm, Format::Rgba16Float, Format::Rgba32Float] {
        for channels in [1, 3, 4] {
            check(gpu(), format, [13, 7], &[7, 13, channels]);
        }
    }
    check(gpu(), Format::R32Float, [13, 7], &[7, 13, 1]);
    for (size, dims) in [([64, 48], [48 * 64, 3]), ([1, 1], [1, 3]), ([1, 9], [9, 3]), ([300, 1], [300, 3])] {
        check(gpu(), Format::Rgba8Unorm, size, &dims);
    }
}

/// The adapter that tests run on, opened by an app for its own needs.
fn own_device(features: wgpu::Features) -> Option<Gpu> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    let descriptor = wgpu::DeviceDescriptor { required_features: features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).ok()?;
    Some(Gpu::from_device(device, queue))
}

#[test]
fn bgra_needs_a_feature() {
    let Some(gpu) = own_device(wgpu::Features::BGRA8UNORM_STORAGE) else { return };
    check(&gpu, Format::Bgra8Unorm, [13, 7], &[7, 13, 4]);
}

/// The app's frame: a triangle over all of it, whose colour is the texture's. Into a texture of this format.
fn draw(encoder: &mut wgpu::CommandEncoder, from: &wgpu::TextureView, to: &wgpu::Texture) {
    let source = "@group(0) @binding(0) var picture: texture_2d<f32>;\n\
        @vertex fn corner(@builtin(vertex_index) i: u32) -> @builtin(position) vec4<f32> {\n\
            return vec4<f32>(f32(i & 1u) * 4.0 - 1.0, f32(i >> 1u) * 4.0 - 1.0, 0.0, 1.0); }\n\
        @fragment fn color(@builtin(position) at: vec4<f32>) -> @location(0) vec4<f32> {\n\
            return textureLoad(picture, vec2<u32>(at.xy), 0); }";
    let device = gpu().device();
    let source = wgpu::ShaderSource::Wgsl(source.into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some("host"), source });
    let compilation_options = wgpu::PipelineCompilationOptions::default;
    let pipeline = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
        label: Some("host"),
        layout: None,
        vertex: wgpu::VertexState {
            module: &module,
            entry_point: Some("corner"),
            compilation_options: compilation_options(),
            buffers: &[],
        },
        primitive: Default::default(),
        depth_stencil: None,
        multisample: Default::default(),
        fragment: Some(wgpu::FragmentState {
            module: &module,
            entry_point: Some("color"),
            compilation_options: compilation_options(),
            targets: &[Some(to.format().into())],
        }),
        multiview_mask: None,
        cache: None,
    });
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::TextureView(from) }],
    });
    let ops = wgpu::Operations { load: wgpu::LoadOp::Clear(wgpu::Color::BLACK), store: wgpu::StoreOp::Store };
    let view = to.create_view(&Default::default());
    let color = wgpu::RenderPassColorAttachment { view: &view, depth_slice: None, resolve_target: None, ops };
    let attachments = [Some(color)];
    let desc = wgpu::RenderPassDescriptor { label: None, color_attachments: &attachments, ..Default::default() };
    let mut pass = encoder.begin_render_pass(&desc);
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.draw(0..3, 0..1);
}

#[test]
fn an_apps_pass_sees_what_the_same_submit_wrote() {
    let size = [13, 7];
    let (tensor, values) = tensor(gpu(), &[7, 13, 3]);
    let picture = texture_of(gpu(), Format::Rgba8Unorm, size, |desc| desc.view_formats = &[Format::Rgba8UnormSrgb]);
    let screen =
        |format| texture_of(gpu(), format, size, |desc| desc.usage = Usages::RENDER_ATTACHMENT | Usages::COPY_SRC);
    let output = TextureOutput::new(gpu(), &tensor, &picture).unwrap();
    let (plain, srgb) = (screen(Format::Rgba8Unorm), screen(Format::Rgba8Unorm));
    let mut encoder = encoder(gpu());
    output.record(&mut encoder);
    draw(&mut encoder, &picture.create_view(&Default::default()), &plain);
    // As the documentation says: a view of the same texture whose values are sRGB's.
    let view = picture.create_view(&wgpu::TextureViewDescriptor {
        format: Some(Format::Rgba8UnormSrgb),
        usage: Some(Usages::TEXTURE_BINDING),
        ..Default::default()
    });
    draw(&mut encoder, &view, &srgb);
    let seen = pixels(gpu(), encoder, &plain);
    let linear = pixels(gpu(), self::encoder(gpu()), &srgb);
    for (i, want) in values.chunks(3).enumerate() {
        for (c, want) in want.iter().map(|x| x.clamp(0.0, 1.0)).enumerate() {
            let [seen, linear] = [&seen, &linear].map(|pixels| f32::from(pixels[4 * i + c]) / 255.0);
            assert!((seen - want).abs() < 0.6 / 255.0, "pixel {i}: {seen} for {want}");
            let want = if want <= 0.04045 { want / 12.92 } else { ((want + 0.055) / 1.055).powf(2.4) };
            assert!((linear - want).abs() < 2.0 / 255.0, "pixel {i} as sRGB: {linear} for {want}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    let rgb = tensor(gpu(), &[7, 13, 3]).0;
    let refused = |tensor: &Tensor, texture: &wgpu::Texture, words: &[&str]| {
        let error = TextureOutput::new(gpu(), tensor, texture).unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    let fits = || texture(Format::Rgba8Unorm, [13, 7]);
    // Tensors.
    refused(&tensor(gpu(), &[7, 13, 2]).0, &fits(), &["1, 3 or 4 channels", "f32[7, 13, 2]"]);
    refused(&tensor(gpu(), &[13, 7, 3]).0, &fits(), &["f32[7, 13, 3]", "f32[91, 3]", "13 x 7", "f32[13, 7, 3]"]);
    refused(&tensor(gpu(), &[90, 3]).0, &fits(), &["f32[91, 3]", "f32[90, 3]"]);
    refused(&tensor(gpu(), &[273]).0, &fits(), &["[height, width, channels]", "f32[273]"]);
    let ids = Tensor::zeros(gpu(), "ids", TensorType::u32([7, 13, 3])).unwrap();
    refused(&ids, &fits(), &["f32 [height", "u32[7, 13, 3]"]);
    // Formats.
    refused(&rgb, &texture(Format::Rgba8Snorm, [13, 7]), &["Rgba8Unorm, Rgba16Float", "Rgba8Snorm"]);
    refused(&rgb, &texture(Format::R32Float, [13, 7]), &["1 channel for R32Float", "3"]);
    let other = |format, change: fn(&mut wgpu::TextureDescriptor<'_>)| texture_of(gpu(), format, [13, 7], change);
    let sampled = |desc: &mut wgpu::TextureDescriptor<'_>| desc.usage = Usages::TEXTURE_BINDING;
    refused(&rgb, &other(Format::Rgba8UnormSrgb, sampled), &["Rgba8Unorm with Rgba8UnormSrgb among its view_formats"]);
    refused(&rgb, &other(Format::Bgra8Unorm, sampled), &["BGRA8UNORM_STORAGE"]);
    // The rest of a texture.
    refused(&rgb, &other(Format::Rgba8Unorm, sampled), &["STORAGE_BINDING", "TEXTURE_BINDING"]);
    refused(&rgb, &other(Format::Rgba8Unorm, |desc| desc.mip_level_count = 2), &["1 mip level", "2"]);
    refused(&rgb, &other(Format::Rgba8Unorm, |desc| desc.size.depth_or_array_layers = 3), &["1 layer", "3"]);
    let samples = |desc: &mut wgpu::TextureDescriptor<'_>| {
        (desc.sample_count, desc.usage) = (4, Usages::RENDER_ATTACHMENT);
    };
    refused(&rgb, &other(Format::Rgba8Unorm, samples), &["1 sample", "4"]);
    refused(&rgb, &other(Format::Rgba8Unorm, |desc| desc.dimension = wgpu::TextureDimension::D3), &["D2", "D3"]);
    // And what fits still works.
    TextureOutput::new(gpu(), &rgb, &fits()).unwrap();
}
