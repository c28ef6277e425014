//! Draws frames in a window.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use winit::application::ApplicationHandler;
use winit::event::{ElementState, WindowEvent};
use winit::event_loop::{ActiveEventLoop, ControlFlow, EventLoop};
use winit::keyboard::{Key, NamedKey};
use winit::window::{Window, WindowId};

use crate::headless::FrameTimes;
use crate::{App, Options, Percentiles};

/// Frames between two updates of the title.
const TITLE_EVERY: usize = 60;

/// Shows the app until its window is closed. The space bar pauses and resumes training. Returns the times between
/// frames, with and without training.
pub fn run(options: Options) -> Result<FrameTimes> {
    let event_loop =
        EventLoop::new().context("no display to open a window on; use --headless --out DIR to draw into PNG files")?;
    event_loop.set_control_flow(ControlFlow::Poll);
    let mut shell =
        Shell { options, shown: None, train: true, last: None, training: vec![], drawing: vec![], failure: None };
    event_loop.run_app(&mut shell)?;
    match shell.failure {
        Some(e) => Err(e),
        None => Ok(FrameTimes { training: Percentiles::of(&shell.training), drawing: Percentiles::of(&shell.drawing) }),
    }
}

/// What winit drives.
struct Shell {
    options: Options,
    /// `None` until there is a window.
    shown: Option<Shown>,
    train: bool,
    /// When the last frame was presented.
    last: Option<Instant>,
    training: Vec<Duration>,
    drawing: Vec<Duration>,
    failure: Option<anyhow::Error>,
}

struct Shown {
    app: App,
    window: Arc<Window>,
    surface: wgpu::Surface<'static>,
    config: wgpu::SurfaceConfiguration,
}

impl Shown {
    fn open(event_loop: &ActiveEventLoop, options: &Options) -> Result<Shown> {
        let pixels = winit::dpi::LogicalSize::new(1024.0, 512.0);
        let attributes = Window::default_attributes().with_title("learning a picture").with_inner_size(pixels);
        let window = Arc::new(event_loop.create_window(attributes).context("opening a window")?);
        let display = Box::new(event_loop.owned_display_handle());
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_with_display_handle_from_env(display));
        let surface = instance.create_surface(window.clone())?;
        let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, Some(&surface)))
            .context("no Vulkan, Metal or DX12 driver can draw in this window")?;
        let size = window.inner_size();
        let config = surface.get_default_config(&adapter, size.width.max(1), size.height.max(1));
        let mut config = config.context("the adapter cannot draw in this window")?;
        // The picture has the values of a PNG file, which are already sRGB: they must not be converted again.
        let formats = surface.get_capabilities(&adapter).formats;
        config.format = formats.into_iter().find(|f| !f.is_srgb()).unwrap_or(config.format);
        config.present_mode = wgpu::PresentMode::AutoVsync;
        let app = App::new(&adapter, config.format, options)?;
        let shown = Shown { app, window, surface, config };
        shown.configure();
        Ok(shown)
    }

    fn configure(&self) {
        self.surface.configure(&self.app.device, &self.config);
        self.app.resize([self.config.width, self.config.height]);
    }

    /// Draws a frame. Returns false if there was no texture to draw into.
    fn frame(&mut self, train: bool) -> Result<bool> {
        use wgpu::CurrentSurfaceTexture as Current;
        let texture = match self.surface.get_current_texture() {
            Current::Success(texture) | Current::Suboptimal(texture) => texture,
            Current::Timeout | Current::Occluded => return Ok(false),
            Current::Outdated => {
                self.configure();
                return Ok(false);
            }
            Current::Lost | Current::Validation => bail!("the window's surface is lost"),
        };
        self.app.frame(&texture.texture.create_view(&Default::default()), train)?;
        self.window.pre_present_notify();
        self.app.queue.present(texture);
        Ok(true)
    }
}

impl Shell {
    fn frame(&mut self) -> Result<()> {
        let Some(shown) = &mut self.shown else { return Ok(()) };
        if shown.frame(self.train)? {
            let now = Instant::now();
            let times = if self.train { &mut self.training } else { &mut self.drawing };
            times.extend(self.last.replace(now).map(|last| now - last));
            if let Some(p) = Percentiles::of(&times[times.len().saturating_sub(TITLE_EVERY)..])
                && times.len().is_multiple_of(TITLE_EVERY)
            {
                let (doing, steps) = (if self.train { "training" } else { "drawing only" }, shown.app.learner.steps());
                let title = format!(
                    "step {steps}, {doing}: {:.1} ms per frame, at most {:.1} (space: pause or resume)",
                    p.p50, p.max
                );
                shown.window.set_title(&title);
            }
        }
        shown.window.request_redraw();
        Ok(())
    }

    /// Ends the app if an error occurred.
    fn check(&mut self, event_loop: &ActiveEventLoop, result: Result<()>) {
        if let Err(e) = result {
            self.failure = Some(e);
            event_loop.exit();
        }
    }
}

impl ApplicationHandler for Shell {
    fn resumed(&mut self, event_loop: &ActiveEventLoop) {
        if self.shown.is_some() {
            return;
        }
        let opened = Shown::open(event_loop, &self.options).map(|shown| {
            shown.window.request_redraw();
            self.shown = Some(shown);
        });
        self.check(event_loop, opened);
    }

    fn window_event(&mut self, event_loop: &ActiveEventLoop, _: WindowId, event: WindowEvent) {
        match event {
            WindowEvent::CloseRequested => event_loop.exit(),
            WindowEvent::Resized(size) if size.width > 0 && size.height > 0 => {
                if let Some(shown) = &mut self.shown {
                    (shown.config.width, shown.config.height) = (size.width, size.height);
                    shown.configure();
                }
            }
            WindowEvent::KeyboardInput { event, .. }
                if event.state == ElementState::Pressed
                    && !event.repeat
                    && event.logical_key == Key::Named(NamedKey::Space) =>
            {
                // The time between a frame with training and one without counts as neither.
                (self.train, self.last) = (!self.train, None);
            }
            WindowEvent::RedrawRequested => {
                let result = self.frame();
                self.check(event_loop, result);
            }
            _ => {}
        }
    }
}
