//! Draws frames without a window, into a texture, and saves them as PNG files.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{App, Options, Percentiles, Picture};

/// The format of PNG files.
const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;

/// What [`run`] draws.
#[derive(Clone, Debug)]
pub struct Headless {
    /// Frames in which the network trains. The same number of frames without training comes first.
    pub frames: usize,
    /// One of this many training frames is saved, and the last.
    pub every: usize,
    /// Folder for the files.
    pub out: PathBuf,
}

/// The results of [`run`].
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub adapter: String,
    pub width: usize,
    pub height: usize,
    /// Training steps completed.
    pub steps: u64,
    pub budget_us: u64,
    /// Number of slices of a step, and by a profile the time of the longest slice and of the whole step.
    pub slices: usize,
    pub longest_slice_us: u64,
    pub step_us: u64,
    /// Time from the start of recording until the GPU has finished, with and without training.
    pub frame_ms: FrameTimes,
    /// Share of training frames that take longer than the median frame without training plus the budget.
    pub share_over_budget: f64,
    /// Time of training within frames as a multiple of the profiled time, at the end.
    pub pace: f64,
    /// Mean squared error before and after the frames.
    pub loss: Change,
    /// Peak signal-to-noise ratio before and after the frames, in decibels.
    pub psnr_db: Change,
    pub files: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct FrameTimes {
    pub training: Option<Percentiles>,
    pub drawing: Option<Percentiles>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Change {
    pub first: f32,
    pub last: f32,
}

/// Draws frames with the untrained network, then frames in which it learns, and saves some of the latter.
pub fn run(options: &Options, headless: &Headless) -> Result<Report> {
    std::fs::create_dir_all(&headless.out)
        .with_context(|| format!("creating the folder {}", headless.out.display()))?;
    let mut screen = Screen::open(options)?;
    let first = screen.app.learner.loss_blocking()?;
    let drawing = (0..headless.frames).map(|_| screen.timed_frame(false)).collect::<Result<Vec<_>>>()?;
    let (mut training, mut files) = (vec![], 0);
    for i in 0..headless.frames {
        training.push(screen.timed_frame(true)?);
        if i % headless.every.max(1) == 0 || i + 1 == headless.frames {
            let [width, height] = screen.app.frame_size();
            Picture::write_png(&headless.out.join(format!("frame-{i:05}.png")), width, height, &screen.pixels()?)?;
            files += 1;
        }
    }
    let learner = &screen.app.learner;
    let loss = Change { first, last: learner.loss_blocking()? };
    let psnr = |mse: f32| -10.0 * mse.log10();
    let slices = learner.slices();
    let drawing_p50 = Percentiles::of(&drawing).map_or(0.0, |p| p.p50);
    let most = options.budget + Duration::from_secs_f64(drawing_p50 / 1e3);
    let over = training.iter().filter(|&&time| time > most).count();
    Ok(Report {
        share_over_budget: over as f64 / training.len().max(1) as f64,
        pace: learner.pace(),
        adapter: learner.gpu().describe(),
        width: options.picture.width,
        height: options.picture.height,
        steps: learner.steps(),
        budget_us: options.budget.as_micros() as u64,
        slices: slices.count(),
        longest_slice_us: slices.longest().as_micros() as u64,
        step_us: slices.total().as_micros() as u64,
        frame_ms: FrameTimes { training: Percentiles::of(&training), drawing: Percentiles::of(&drawing) },
        loss,
        psnr_db: Change { first: psnr(loss.first), last: psnr(loss.last) },
        files,
    })
}

/// An app that draws into a texture.
#[derive(Debug)]
pub struct Screen {
    pub app: App,
    texture: wgpu::Texture,
}

impl Screen {
    /// Opens the default adapter, or the one that `WGPU_ADAPTER_NAME` names.
    pub fn open(options: &Options) -> Result<Screen> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None));
        let app = App::new(&adapter.context("no Vulkan, Metal or DX12 driver found")?, FORMAT, options)?;
        let [width, height] = app.frame_size();
        let texture = app.device.create_texture(&wgpu::TextureDescriptor {
            label: Some("screen"),
            size: wgpu::Extent3d { width, height, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: FORMAT,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        Ok(Screen { app, texture })
    }

    /// Draws a frame and returns how long it took until the GPU had finished.
    pub fn timed_frame(&mut self, train: bool) -> Result<Duration> {
        let start = Instant::now();
        let submitted = self.app.frame(&self.texture.create_view(&Default::default()), train)?;
        self.app.device.poll(wgpu::PollType::Wait { submission_index: Some(submitted), timeout: None })?;
        Ok(start.elapsed())
    }

    /// RGBA pixels of the last frame, row by row. Nothing else is read back.
    pub fn pixels(&self) -> Result<Vec<u8>> {
        let size = self.texture.size();
        let row = 4 * size.width;
        let padded = row.next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
        let staging = self.app.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("pixels"),
            size: u64::from(padded * size.height),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = self.app.device.create_command_encoder(&Default::default());
        let layout = wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(padded), rows_per_image: None };
        let to = wgpu::TexelCopyBufferInfo { buffer: &staging, layout };
        encoder.copy_texture_to_buffer(self.texture.as_image_copy(), to, size);
        self.app.queue.submit([encoder.finish()]);
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |mapped| drop(sender.send(mapped)));
        self.app.device.poll(wgpu::PollType::wait_indefinitely())?;
        receiver.recv()??;
        let view = staging.get_mapped_range(..)?;
        Ok(view.chunks(padded as usize).flat_map(|line| &line[..row as usize]).copied().collect())
    }
}
