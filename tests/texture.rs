//! Tensors from and into an app's textures: every format, odd sizes, parts, a pass of the app that follows, and errors.

mod common;

use common::gpu;
use throughline::device::texture::{TextureInput, TextureOutput, TexturePart};
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
    let samples = |desc: &mut wgpu::TextureDescriptor<'_>| {
        (desc.sample_count, desc.usage) = (4, Usages::RENDER_ATTACHMENT);
    };
    refused(&rgb, &other(Format::Rgba8Unorm, samples), &["1 sample", "4"]);
    refused(&rgb, &other(Format::Rgba8Unorm, |desc| desc.dimension = wgpu::TextureDimension::D3), &["D2", "D3"]);
    // Parts.
    let of_part = |part, words: &[&str]| {
        let error = TextureOutput::to_part(gpu(), &rgb, &fits(), part).unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    of_part(TexturePart { mip_level: 1, ..Default::default() }, &["a mip level below 1", "got 1"]);
    of_part(TexturePart { layer: 2, ..Default::default() }, &["a layer below 1", "got 2"]);
    of_part(TexturePart { origin: Some([1, 0]), ..Default::default() }, &["(1, 0)", "13 x 7"]);
    // And what fits still works.
    TextureOutput::new(gpu(), &rgb, &fits()).unwrap();
}

/// A texture with these bytes in a mip level and layer, which may be read.
fn filled(format: Format, size: [u32; 2], bytes: &[u8], change: fn(&mut wgpu::TextureDescriptor<'_>)) -> wgpu::Texture {
    let texture = texture_of(gpu(), format, size, |desc| {
        desc.usage = Usages::TEXTURE_BINDING | Usages::COPY_DST;
        change(desc);
    });
    fill(&texture, Default::default(), bytes);
    texture
}

/// Writes these bytes to all pixels of a mip level and layer.
fn fill(texture: &wgpu::Texture, part: TexturePart, bytes: &[u8]) {
    let size = texture.size().mip_level_size(part.mip_level, wgpu::TextureDimension::D2);
    let row = bytes.len() as u32 / size.height;
    let to = wgpu::TexelCopyTextureInfo {
        mip_level: part.mip_level,
        origin: wgpu::Origin3d { z: part.layer, ..Default::default() },
        ..texture.as_image_copy()
    };
    let layout = wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(row), rows_per_image: None };
    gpu().queue().write_texture(to, bytes, layout, wgpu::Extent3d { depth_or_array_layers: 1, ..size });
}

/// What an input makes of a part of a texture.
fn read(texture: &wgpu::Texture, part: TexturePart, dims: &[usize]) -> Vec<f32> {
    let (tensor, _) = tensor(gpu(), dims); // filled with something else
    let input = TextureInput::of_part(gpu(), texture, part, &tensor).unwrap();
    let mut encoder = encoder(gpu());
    input.record(&mut encoder);
    gpu().submit(encoder).unwrap();
    tensor.read_blocking(gpu()).unwrap()
}

fn linear(srgb: f32) -> f32 {
    if srgb <= 0.04045 { srgb / 12.92 } else { ((srgb + 0.055) / 1.055).powf(2.4) }
}

/// Random bytes of `pixels` pixels, and red, green, blue, alpha of each, as far as the format has them.
fn stored(format: Format, pixels: usize) -> (Vec<u8>, Vec<Vec<f32>>) {
    let mut rng = Rng::new(&[17, pixels as u64]);
    let n = usize::from(format.components());
    let width = format.block_copy_size(None).unwrap() as usize / n;
    let pixel = |_| -> (Vec<u8>, Vec<f32>) {
        let value = |_| match (format, width) {
            (Format::Rgba8Snorm, _) => {
                let i = rng.below(255) as i8;
                (i.to_le_bytes().to_vec(), (f32::from(i) / 127.0).max(-1.0))
            }
            (_, 1) => {
                let b = rng.below(256) as u8;
                (vec![b], f32::from(b) / 255.0)
            }
            (Format::Depth16Unorm, _) => {
                let d = rng.below(65536) as u16;
                (d.to_le_bytes().to_vec(), f32::from(d) / 65535.0)
            }
            (_, 2) => {
                let h = half::f16::from_f64(9.0 * rng.uniform() - 4.0);
                (h.to_le_bytes().to_vec(), h.to_f32())
            }
            _ => {
                let x = (9.0 * rng.uniform() - 4.0) as f32;
                (x.to_le_bytes().to_vec(), x)
            }
        };
        let (bytes, mut values): (Vec<Vec<u8>>, Vec<f32>) = (0..n).map(value).unzip();
        if matches!(format, Format::Bgra8Unorm | Format::Bgra8UnormSrgb) {
            values.swap(0, 2);
        }
        if format.is_srgb() {
            values[..3].iter_mut().for_each(|x| *x = linear(*x));
        }
        (bytes.concat(), values)
    };
    let (bytes, values): (Vec<Vec<u8>>, Vec<Vec<f32>>) = (0..pixels).map(pixel).unzip();
    (bytes.concat(), values)
}

#[test]
fn inputs_read_the_bytes_of_every_format() {
    let formats = [
        (Format::R8Unorm, 1e-6),
        (Format::Rg8Unorm, 1e-6),
        (Format::Rgba8Unorm, 1e-6),
        (Format::Bgra8Unorm, 1e-6),
        (Format::Rgba8Snorm, 1e-6),
        // Hardware may look these up in a table.
        (Format::Rgba8UnormSrgb, 2e-3),
        (Format::Bgra8UnormSrgb, 2e-3),
        (Format::R16Float, 0.0),
        (Format::Rg16Float, 0.0),
        (Format::Rgba16Float, 0.0),
        (Format::R32Float, 0.0),
        (Format::Rg32Float, 0.0),
        (Format::Rgba32Float, 0.0),
        (Format::Depth16Unorm, 1e-6),
    ];
    for (format, tolerance) in formats {
        let (bytes, values) = stored(format, 7 * 13);
        let texture = filled(format, [13, 7], &bytes, |_| ());
        for channels in 1..=usize::from(format.components()) {
            for dims in [vec![7, 13, channels], vec![1, 7, 13, channels], vec![7 * 13, channels]] {
                let got = read(&texture, Default::default(), &dims);
                for (i, (got, want)) in got.chunks(channels).zip(&values).enumerate() {
                    let near = |(got, want): (&f32, &f32)| (got - want).abs() <= tolerance;
                    assert!(got.iter().zip(want).all(near), "{format:?}, pixel {i}: {got:?} for {want:?}");
                }
            }
        }
    }
}

#[test]
fn inputs_read_depth_that_an_app_has_drawn() {
    for format in [Format::Depth32Float, Format::Depth24Plus, Format::Depth24PlusStencil8] {
        let texture = texture_of(gpu(), format, [13, 7], |desc| {
            desc.usage = Usages::RENDER_ATTACHMENT | Usages::TEXTURE_BINDING;
        });
        let depth = Tensor::zeros(gpu(), "depth", TensorType::f32([7, 13, 1])).unwrap();
        let input = TextureInput::new(gpu(), &texture, &depth).unwrap();
        let mut encoder = encoder(gpu());
        let stencil = wgpu::Operations { load: wgpu::LoadOp::Clear(1), store: wgpu::StoreOp::Store };
        let view = texture.create_view(&Default::default());
        let attachment = wgpu::RenderPassDepthStencilAttachment {
            view: &view,
            depth_ops: Some(wgpu::Operations { load: wgpu::LoadOp::Clear(0.375), store: wgpu::StoreOp::Store }),
            stencil_ops: format.has_stencil_aspect().then_some(stencil),
        };
        let desc = wgpu::RenderPassDescriptor { depth_stencil_attachment: Some(attachment), ..Default::default() };
        drop(encoder.begin_render_pass(&desc));
        input.record(&mut encoder);
        gpu().submit(encoder).unwrap();
        let got: Vec<f32> = depth.read_blocking(gpu()).unwrap();
        assert!(got.iter().all(|d| (d - 0.375).abs() < 1e-6), "{format:?}: {got:?}");
    }
}

#[test]
fn inputs_read_parts() {
    let whole = |desc: &mut wgpu::TextureDescriptor<'_>| {
        (desc.mip_level_count, desc.size.depth_or_array_layers) = (2, 3);
        desc.view_formats = &[Format::Rgba8UnormSrgb];
    };
    let texture = filled(Format::Rgba8Unorm, [26, 15], &[0; 4 * 26 * 15], whole);
    let (bytes, values) = stored(Format::Rgba8Unorm, 7 * 13);
    let part = TexturePart { mip_level: 1, layer: 2, ..Default::default() };
    fill(&texture, part, &bytes);
    let near = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(got, want)| (got - want).abs() < 2e-3);
    assert!(near(&read(&texture, part, &[7, 13, 4]), &values.concat()));
    assert_eq!(read(&texture, TexturePart { mip_level: 0, ..part }, &[15, 26, 4]), [0.0; 4 * 26 * 15]);
    // A region, in another format.
    let seen = TexturePart { origin: Some([5, 3]), format: Some(Format::Rgba8UnormSrgb), ..part };
    let region = |y: usize| (5..13).map(move |x| 13 * y + x);
    let want: Vec<f32> = (3..7).flat_map(region).flat_map(|i| &values[i][..3]).map(|&x| linear(x)).collect();
    let got = read(&texture, seen, &[4, 8, 3]);
    assert!(near(&got, &want), "{got:?} for {want:?}");
}

#[test]
fn outputs_write_parts() {
    let texture = texture_of(gpu(), Format::Rgba32Float, [26, 15], |desc| {
        (desc.mip_level_count, desc.size.depth_or_array_layers) = (2, 3);
    });
    let (tensor, values) = tensor(gpu(), &[1, 4, 8, 4]);
    let level = TexturePart { mip_level: 1, layer: 2, ..Default::default() };
    let output =
        TextureOutput::to_part(gpu(), &tensor, &texture, TexturePart { origin: Some([5, 3]), ..level }).unwrap();
    let mut encoder = encoder(gpu());
    output.record(&mut encoder);
    gpu().submit(encoder).unwrap();
    let got = read(&texture, level, &[7, 13, 4]);
    for (i, got) in got.chunks(4).enumerate() {
        let (x, y) = (i % 13, i / 13);
        let inside = x >= 5 && y >= 3;
        let want = if inside { &values[4 * (8 * (y - 3) + x - 5)..][..4] } else { &[0.0; 4] };
        assert_eq!(got, want, "({x}, {y})");
    }
}

#[test]
fn what_a_texture_returns_is_what_went_into_it() {
    let (image, values) = tensor(gpu(), &[7, 13, 3]);
    let back = Tensor::zeros(gpu(), "back", TensorType::f32([1, 7, 13, 3])).unwrap();
    let texture = texture(Format::Rgba32Float, [13, 7]);
    let output = TextureOutput::new(gpu(), &image, &texture).unwrap();
    let input = TextureInput::new(gpu(), &texture, &back).unwrap();
    let mut encoder = encoder(gpu());
    output.record(&mut encoder);
    input.record(&mut encoder);
    gpu().submit(encoder).unwrap();
    assert_eq!(back.read_blocking::<f32>(gpu()).unwrap(), values);
}

#[test]
fn what_an_input_cannot_read_is_refused_with_a_reason() {
    let rgb = tensor(gpu(), &[7, 13, 3]).0;
    let refused = |tensor: &Tensor, texture: &wgpu::Texture, part, words: &[&str]| {
        let error = TextureInput::of_part(gpu(), texture, part, tensor).unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    let all = TexturePart::default();
    let fits = || texture(Format::Rgba8Unorm, [13, 7]);
    refused(&tensor(gpu(), &[7, 13, 5]).0, &fits(), all, &["texture input", "1 to 4 channels", "f32[7, 13, 5]"]);
    refused(&tensor(gpu(), &[13, 7, 3]).0, &fits(), all, &["f32[7, 13, 3]", "13 x 7", "f32[13, 7, 3]"]);
    refused(&tensor(gpu(), &[2, 7, 13, 3]).0, &fits(), all, &["[height, width, channels]", "f32[2, 7, 13, 3]"]);
    let at = |x, y| TexturePart { origin: Some([x, y]), ..all };
    refused(&rgb, &fits(), at(0, 1), &["from (0, 1) inside", "13 x 7", "f32[7, 13, 3]"]);
    refused(&tensor(gpu(), &[91, 3]).0, &fits(), at(0, 0), &["[height, width, channels]", "origin", "f32[91, 3]"]);
    refused(&rgb, &fits(), TexturePart { mip_level: 1, ..all }, &["a mip level below 1", "got 1"]);
    refused(&rgb, &fits(), TexturePart { layer: 1, ..all }, &["a layer below 1", "got 1"]);
    // Formats.
    let other = |format, change: fn(&mut wgpu::TextureDescriptor<'_>)| texture_of(gpu(), format, [13, 7], change);
    let sampled = |desc: &mut wgpu::TextureDescriptor<'_>| desc.usage = Usages::TEXTURE_BINDING;
    refused(&rgb, &other(Format::Rg16Float, sampled), all, &["at most 2 channels from Rg16Float", "f32[7, 13, 3]"]);
    refused(&rgb, &other(Format::Rgba8Uint, sampled), all, &["read as f32", "Rgba8Uint"]);
    let stencil = tensor(gpu(), &[7, 13, 1]).0;
    refused(&stencil, &other(Format::Stencil8, sampled), all, &["read as f32", "Stencil8"]);
    let seen = |format| TexturePart { format: Some(format), ..all };
    refused(&rgb, &fits(), seen(Format::Rgba8Snorm), &["Rgba8Unorm", "differs in sRGB", "Rgba8Snorm"]);
    refused(&rgb, &fits(), seen(Format::Rgba8UnormSrgb), &["Rgba8UnormSrgb"]); // which it was not made for
    // The rest of a texture.
    refused(
        &rgb,
        &other(Format::Rgba8Unorm, |desc| desc.usage = Usages::COPY_SRC),
        all,
        &["TEXTURE_BINDING", "COPY_SRC"],
    );
    let samples = |desc: &mut wgpu::TextureDescriptor<'_>| {
        (desc.sample_count, desc.usage) = (4, Usages::RENDER_ATTACHMENT | Usages::TEXTURE_BINDING);
    };
    refused(&rgb, &other(Format::Rgba8Unorm, samples), all, &["1 sample", "resolve", "4"]);
    refused(&rgb, &other(Format::Rgba8Unorm, |desc| desc.dimension = wgpu::TextureDimension::D3), all, &["D2", "D3"]);
    TextureInput::new(gpu(), &fits(), &rgb).unwrap();
}
