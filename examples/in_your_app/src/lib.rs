//! An app that draws a picture while a network learns it. There is one device, and one encoder and one submit per
//! frame. The app's shader reads the output of the network from the buffer that the network writes.
//!
//! [`App`] opens the device and the queue, owns the encoder, and draws. [`Learner`] is the only part that uses
//! throughline. [`headless`] draws frames without a window.

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

/// Options that apply with and without a window.
#[derive(Clone, Debug)]
pub struct Options {
    /// The picture to learn.
    pub picture: Picture,
    /// GPU time that training may take per frame.
    pub budget: Duration,
}
