//! Windows that slide over images: what [`patches`](super::patches) and [`pool`](super::pool) share.

use crate::kernel::{Kernel, Launch};
use crate::profile::AdapterClass;
use crate::tensor::Shape;

/// Windows over the rows and columns of an image. Each setting is for both axes: first down, then across.
///
/// Tap `k` of window `o` is the pixel `o * stride + k * dilation - before`. Where there is none, there is padding.
/// There are as many windows as fit into the padded image; pixels that are left over at its end belong to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of taps.
    pub size: [usize; 2],
    /// Pixels from one window to the next.
    pub stride: [usize; 2],
    /// Pixels of padding above the image and to the left of it.
    pub before: [usize; 2],
    /// Pixels of padding below the image and to the right of it.
    pub after: [usize; 2],
    /// Pixels from one tap to the next: 1, except in dilated convolutions.
    pub dilation: [usize; 2],
}

impl Window {
    /// Windows without padding or dilation.
    pub fn new(size: [usize; 2], stride: [usize; 2]) -> Self {
        Window { size, stride, before: [0, 0], after: [0, 0], dilation: [1, 1] }
    }
}

/// Windows over images of one shape, `[n, height, width, channels]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub images: usize,
    pub image: [usize; 2],
    pub channels: usize,
    /// Rows and columns of windows.
    pub count: [usize; 2],
    pub window: Window,
}

impl Windows {
    /// `what` goes over the image: a kernel, a pool.
    pub fn new(window: Window, shape: &Shape, what: &str) -> Result<Self, String> {
        let [images, height, width, channels] = *shape.dims() else {
            return Err(format!("images must have shape [n, height, width, channels], got {shape}"));
        };
        let Window { size, stride, before, after, dilation } = window;
        for (setting, values) in [("size", size), ("stride", stride), ("dilation", dilation)] {
            if values.contains(&0) {
                return Err(format!("the {setting} of the {what} must be at least 1, got {values:?}"));
            }
        }
        let both = |f: &dyn Fn(usize) -> usize| [f(0), f(1)];
        let image = [height, width];
        let padded = both(&|i| image[i].saturating_add(before[i]).saturating_add(after[i]));
        let span = both(&|i| (size[i] - 1).saturating_mul(dilation[i]).saturating_add(1));
        if padded.iter().any(|&n| n > i32::MAX as usize) {
            return Err(format!("the padded image, {padded:?}, is larger than 2^31 - 1 along an axis"));
        }
        if (0..2).any(|i| span[i] > padded[i]) {
            let spread = if dilation == [1, 1] { String::new() } else { format!(" over {span:?} pixels") };
            return Err(format!("the {what}, {size:?}{spread}, is larger than the padded image, {padded:?}"));
        }
        // Strides and dilations that never apply need not fit the kernels' integers.
        let stride = both(&|i| stride[i].min(padded[i]));
        let dilation = both(&|i| if size[i] == 1 { 1 } else { dilation[i] });
        let count = both(&|i| (padded[i] - span[i]) / stride[i] + 1);
        Ok(Windows { images, image, channels, count, window: Window { stride, dilation, ..window } })
    }

    /// Taps of a window.
    pub fn taps(&self) -> usize {
        self.window.size[0] * self.window.size[1]
    }

    /// The shape `[n, down, across, channels]` with these channels: windows instead of pixels.
    pub fn shape(&self, channels: usize) -> [usize; 4] {
        [self.images, self.count[0], self.count[1], channels]
    }

    /// Places of windows, or of pixels, in all images.
    pub fn places(&self, grid: [usize; 2]) -> usize {
        self.images * grid[0] * grid[1]
    }

    /// Channels that a kernel takes at once.
    pub fn width(&self) -> usize {
        if self.channels.is_multiple_of(4) { 4 } else { 1 }
    }

    /// The most windows that have a pixel, down and across.
    pub fn overlap(&self) -> [usize; 2] {
        let Window { size, stride, dilation, .. } = self.window;
        [0, 1].map(|i| ((size[i] - 1) * dilation[i] / stride[i] + 1).min(self.count[i]))
    }

    /// The pixel of a tap, if it is in the image.
    pub fn pixel(&self, window: [usize; 2], tap: [usize; 2]) -> Option<[usize; 2]> {
        let Window { stride, before, dilation, .. } = self.window;
        let along = |i: usize| {
            let at = (window[i] * stride[i] + tap[i] * dilation[i]).checked_sub(before[i])?;
            (at < self.image[i]).then_some(at)
        };
        Some([along(0)?, along(1)?])
    }

    /// Calls `f` with the number of each window among all, of a tap of it, and of the pixel there among all, or `None`
    /// for padding: for references.
    pub fn each_tap(&self, mut f: impl FnMut(usize, usize, Option<usize>)) {
        let (windows, taps) = (self.places(self.count), self.taps());
        for window in 0..windows {
            let [down, across] = self.count;
            let (image, at) = (window / (down * across), [window / across % down, window % across]);
            for tap in 0..taps {
                let pixel = self.pixel(at, [tap / self.window.size[1], tap % self.window.size[1]]);
                let pixel = pixel.map(|[y, x]| (image * self.image[0] + y) * self.image[1] + x);
                f(window, tap, pixel);
            }
        }
    }

    /// The rest of a kernel that goes over `places` with so many units each, in so many iterations for each unit: the
    /// kernel with its knobs, the words of the uniform, and the workgroups.
    pub fn spread(
        &self,
        cx: &Launch<'_>,
        kernel: Kernel,
        (places, units, each): (usize, usize, usize),
    ) -> Result<(Kernel, Vec<u32>, [u32; 3]), String> {
        let iterations = |lanes: usize| (units.div_ceil(lanes) + 1).saturating_mul(each);
        let (group, lanes) = match cx.profile.class {
            // One lane for a place, unless there are few places or a lane would not get to the end: the quirk
            // `loops-end-early`.
            AdapterClass::Cpu => {
                let few = if places < 64 && units >= 8 { 8 } else { 1 };
                let enough =
                    [few, 8, 32, 128].into_iter().find(|&n| n >= few && cx.profile.quirks.ends_loops(iterations(n)));
                let lanes = enough.unwrap_or(128);
                (lanes.max(8), lanes)
            }
            // Neighbours, whose units are next to each other, but not so many that the last pass has few.
            AdapterClass::Gpu => {
                let lanes = [32, 16, 8, 4, 2].into_iter().find(|&n| 5 * units.next_multiple_of(n) <= 7 * units);
                (64, lanes.unwrap_or(1))
            }
        };
        let elements = units * self.width();
        cx.profile.quirks.check_loops("the number of elements of a pixel or window", elements, iterations(lanes))?;
        let kernel = kernel
            .knob("GROUP", group as u32)
            .knob("LANES", lanes as u32)
            .knob("E", if self.width() == 4 { "vec4<f32>" } else { "f32" })
            .knob("DILATED", self.window.dilation != [1, 1]);
        let Window { size, stride, before, dilation, .. } = self.window;
        let pairs = [self.image, self.count, size, stride, dilation, before];
        let words = pairs.into_iter().flatten().chain([self.channels / self.width(), places]);
        let words = words.map(|word| word as u32).collect();
        Ok((kernel, words, cx.profile.grid(places.div_ceil(group / lanes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_make_no_sense_are_errors() {
        let image = Shape::from([1, 4, 5, 2]);
        let problem = |window: Window| Windows::new(window, &image, "kernel").unwrap_err();
        let small = Window::new([3, 3], [1, 1]);
        assert!(
            problem(Window { size: [5, 3], ..small })
                .contains("the kernel, [5, 3], is larger than the padded image, [4, 5]")
        );
        assert!(problem(Window { dilation: [1, 3], ..small }).contains("over [3, 7] pixels"));
        assert!(problem(Window { stride: [0, 1], ..small }).contains("the stride of the kernel must be at least 1"));
        assert!(problem(Window { before: [usize::MAX, 0], ..small }).contains("larger than 2^31"));
        let huge = Window { stride: [usize::MAX; 2], dilation: [usize::MAX, 1], size: [1, 3], ..small };
        assert_eq!(Windows::new(huge, &image, "kernel").unwrap().count, [1, 1]);
        assert!(Windows::new(small, &[4, 5, 2].into(), "kernel").unwrap_err().contains("[n, height, width, channels]"));
    }
}
