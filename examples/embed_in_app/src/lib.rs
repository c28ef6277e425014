//! An app that draws a picture while a network learns it: one device, one encoder and one submit a frame, and the
//! frame's shader reads the network's output in the buffer where the network leaves it.
//!
//! [`App`] is the app: it opens device and queue, owns the encoder, and draws. [`Learner`] is all that it has of
//! throughline. [`headless`] makes frames without a window.

mod app;
pub mod headless;
mod learner;
mod picture;
mod times;
#[cfg(feature = "window")]
pub mod window;

pub use app::App;
pub use learner::Learner;
pub use picture::Picture;
pub use times::Percentiles;

use std::time::Duration;

/// What the app is to do, however it shows its frames.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to learn.
    pub picture: Picture,
    /// GPU time of a frame that training may take.
    pub budget: Duration,
}
