//! Patches of images, and convolutions with them.
//!
//! `patches` (im2col) makes each window of an image a row, tap by tap: `y[n, o, q, (ky, kx, c)] = x[n, o * stride +
//! ky * dilation - before, .., c]`, zero where that is padding. Its dual adds up what belongs to the same pixel, in the
//! order of windows, and each is the other's gradient. A convolution is the product of patches and its kernel as a
//! matrix, so it runs at the rate of matmuls, forward and backward, and inherits their variants.

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::source::table_kernel;
use super::windows::{Window, Windows};
use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::tensor::{Shape, TensorType};

const SOURCE: &str =
    concat!(include_str!("../../shaders/common/windows.wgsl"), include_str!("../../shaders/patches.wgsl"));

pub(super) const ROW: Row = Row {
    name: "patches",
    summary: "y[n, o, q, (ky, kx, c)] = x[n, o * stride + ky * dilation - before, .., c], and its dual, sums by pixel",
    sources: &[SOURCE],
    cases: || {
        let plain = |size, stride| Window::new(size, stride);
        let case = |window: Window, x: [usize; 4]| {
            let Window { size, stride, before, after, dilation } = window;
            let name =
                format!("{size:?} of {x:?}, stride {stride:?}, padding {before:?} {after:?}, dilation {dilation:?}");
            Case::new(name, Patches { window }, &[&x])
        };
        let same = |size: [usize; 2]| Window {
            before: size.map(|n| (n - 1) / 2),
            after: size.map(|n| n / 2),
            ..plain(size, [1, 1])
        };
        let dual = |window: Window, image: [usize; 4]| {
            let dy = Windows::new(window, &image.into(), "kernel").map_or([1; 4], |w| w.shape(w.taps() * w.channels));
            Case::new(format!("dual, {dy:?} to {image:?}"), PatchesBackward { window, to: image.into() }, &[&dy])
        };
        vec![
            case(plain([1, 1], [1, 1]), [1, 1, 1, 1]),
            case(plain([4, 4], [4, 4]), [2, 8, 12, 3]),
            case(same([3, 3]), [2, 7, 9, 4]),
            case(same([3, 3]), [1, 16, 16, 8]),
            case(Window { stride: [2, 2], ..same([3, 3]) }, [3, 9, 8, 5]),
            case(Window { stride: [2, 3], ..same([5, 2]) }, [1, 13, 17, 1]),
            case(Window { dilation: [2, 3], ..same([3, 2]) }, [2, 9, 11, 3]),
            case(Window { dilation: [2, 1], stride: [3, 2], before: [4, 0], ..plain([3, 4], [1, 1]) }, [1, 10, 9, 12]),
            case(Window { before: [6, 0], dilation: [3, 1], ..plain([3, 1], [1, 1]) }, [2, 33, 1, 20]),
            case(plain([2, 2], [5, 4]), [1, 14, 15, 2]), // pixels that belong to no window
            case(Window { before: [5, 1], after: [0, 4], ..plain([2, 2], [1, 1]) }, [1, 3, 4, 2]), // windows of zeros
            case(plain([1, 1], [2, 2]), [2, 5, 6, 36]),
            case(plain([3, 3], [1, 1]), [1, 3, 3, 1757]), // a single window
            case(same([7, 7]), [1, 6, 5, 6]),
            dual(Window { stride: [2, 1], dilation: [1, 2], ..same([3, 3]) }, [2, 9, 8, 4]),
            dual(Window { before: [2, 0], ..plain([3, 1], [1, 1]) }, [2, 9, 1, 5]),
        ]
    },
    bench: || {
        let window = Window { before: [1, 1], after: [1, 1], ..Window::new([3, 3], [1, 1]) };
        vec![
            Case::new("3x3 of 8x64x64x64", Patches { window }, &[&[8, 64, 64, 64]]),
            Case::new(
                "16x16 of 16x224x224x3",
                Patches { window: Window::new([16, 16], [16, 16]) },
                &[&[16, 224, 224, 3]],
            ),
        ]
    },
};

/// `x -> y`: `[n, height, width, c] -> [n, down, across, taps * c]`, each window as a row. Usually added by
/// [`Graph::patches`] or [`Graph::conv2d`]; the op itself takes other settings for each axis, too.
#[derive(Clone, Copy, Debug)]
pub struct Patches {
    /// The windows.
    pub window: Window,
}

/// `dy -> dx`, the dual: `[n, down, across, taps * c] -> [n, height, width, c]`, where each pixel is the sum of what
/// its windows have for it. The gradient of [`Patches`].
#[derive(Clone, Debug)]
pub struct PatchesBackward {
    window: Window,
    to: Shape,
}

/// How the kernel of a convolution goes over an image or a sequence. The default is a stride of 1 without padding or
/// dilation.
///
/// ```
/// use throughline::ops::patches::{Conv, Padding};
/// let down = Conv { stride: 2, padding: Padding::Each(1), ..Conv::default() };
/// # let _ = down;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Pixels from one window to the next.
    pub stride: usize,
    /// Zeros around the input.
    pub padding: Padding,
    /// Pixels from one tap of a window to the next.
    pub dilation: usize,
}

impl Default for Conv {
    fn default() -> Self {
        Conv { stride: 1, padding: Padding::default(), dilation: 1 }
    }
}

/// Padding at the ends of an axis, or of both axes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// So many pixels, or steps in time, at each end.
    Each(usize),
    /// As much as it takes for `len / stride` windows, rounded up: with a stride of 1 the result is as large as the
    /// input. If that is odd, there is one more at the end.
    Same,
    /// For sequences: all before the start, and as much as it takes for a window to end at each step (at each
    /// `stride`-th), so that no window sees later ones.
    Causal,
}

impl Default for Padding {
    /// None.
    fn default() -> Self {
        Padding::Each(0)
    }
}

impl Padding {
    /// Padding before and after an axis of this length.
    fn ends(self, len: usize, size: usize, stride: usize, dilation: usize) -> [usize; 2] {
        let reach = size.saturating_sub(1).saturating_mul(dilation);
        match self {
            Padding::Each(n) => [n, n],
            Padding::Same => {
                let covered = (len.div_ceil(stride.max(1)).saturating_sub(1)).saturating_mul(stride);
                let total = covered.saturating_add(reach).saturating_add(1).saturating_sub(len);
                [total / 2, total.div_ceil(2)]
            }
            Padding::Causal => [reach, 0],
        }
    }
}

impl Conv {
    /// Stride 1, with as much padding as it takes for a result as large as the input.
    pub fn same() -> Self {
        Conv { padding: Padding::Same, ..Conv::default() }
    }

    /// For sequences: no result depends on later steps.
    pub fn causal() -> Self {
        Conv { padding: Padding::Causal, ..Conv::default() }
    }

    /// The windows of this size along the axes of an image, of which the second has length 1 in a sequence.
    fn window(self, size: [usize; 2], image: [usize; 2], sequence: bool) -> Result<Window, String> {
        let Conv { stride, padding, dilation } = self;
        if padding == Padding::Causal && !sequence {
            return Err("causal padding is for sequences: conv1d".into());
        }
        let mut window = Window::new(size, [stride, if sequence { 1 } else { stride }]);
        for i in 0..if sequence { 1 } else { 2 } {
            [window.before[i], window.after[i]] = padding.ends(image[i], size[i], stride, dilation);
            // A single tap has no distance from another.
            window.dilation[i] = if size[i] == 1 { dilation.min(1) } else { dilation };
        }
        Ok(window)
    }
}

impl Graph {
    /// Each window of an image as a row: `[n, height, width, c] -> [n, down, across, kh * kw * c]` for a `size` of
    /// `[kh, kw]`. A row has the window's pixels from left to right, then down, with the channels of each together.
    ///
    /// Use it to embed the patches of a vision transformer, or for layers of your own that look at a neighbourhood.
    /// Channels are last, as in a GPU's textures. The result is `kh * kw / stride^2` times as large
    /// as the image.
    ///
    /// ```
    /// use throughline::{Graph, TensorType, ops::patches::Conv};
    /// let mut g = Graph::new();
    /// let images = g.input("images", TensorType::f32([8, 224, 224, 3]))?;
    /// let patches = g.patches("patches", images, [16, 16], Conv { stride: 16, ..Conv::default() })?;
    /// assert_eq!(g.ty(patches), &TensorType::f32([8, 14, 14, 768]));
    /// let tokens = g.reshape("tokens", patches, [8, 196, 768])?;
    /// # let _ = tokens;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn patches(&mut self, name: &str, x: Value, size: [usize; 2], conv: Conv) -> Result<Value> {
        let image = self.image(name, "patches", x)?;
        let window = conv.window(size, image, false);
        let window = window.map_err(|message| self.mismatch(name, "patches", message, &[x]))?;
        self.op1(name, Patches { window }, &[x])
    }

    /// A convolution of images: `x` `[n, height, width, c_in]`, `w` `[kh, kw, c_in, c_out]`, `bias` `[c_out]` give `[n,
    /// down, across, c_out]`. As everywhere in machine learning, the kernel is not flipped.
    ///
    /// It is the product of [`patches`](Self::patches) and `w`, so it takes memory for those: `kh * kw` times the input
    /// at a stride of 1, kept for the gradient of `w`, and as much again, for a moment, in the backward pass. A kernel
    /// of one pixel at a stride of 1 needs none. PyTorch's weights are `[c_out, c_in, kh, kw]`, with images `[n, c,
    /// height, width]`.
    ///
    /// # Errors
    ///
    /// [`Error::Node`] if the shapes do not match, or the kernel does not fit into the padded image.
    ///
    /// ```
    /// use throughline::{Graph, TensorType, ops::patches::Conv};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([8, 28, 28, 1]))?;
    /// let (w, b) = (g.param("w", [3, 3, 1, 16])?, g.param("b", [16])?);
    /// let y = g.conv2d("conv", x, w, Some(b), Conv::same())?;
    /// assert_eq!(g.ty(y), &TensorType::f32([8, 28, 28, 16]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn conv2d(&mut self, name: &str, x: Value, w: Value, bias: Option<Value>, conv: Conv) -> Result<Value> {
        let image = self.image(name, "conv2d", x)?;
        let channels = self.ty(x).shape.cols();
        let [kh, kw, c_in, c_out] = *self.type_of(name, w)?.shape.dims() else {
            return Err(self.mismatch(name, "conv2d", "w must have shape [kh, kw, c_in, c_out]".into(), &[x, w]));
        };
        if c_in != channels {
            let message = format!("w is for images with {c_in} channels, x has {channels}");
            return Err(self.mismatch(name, "conv2d", message, &[x, w]));
        }
        let window = conv.window([kh, kw], image, false);
        let window = window.map_err(|message| self.mismatch(name, "conv2d", message, &[x, w]))?;
        let rows = self.rows(name, x, window)?;
        self.product(name, rows, w, bias, [kh * kw * c_in, c_out])
    }

    /// A convolution of sequences: `x` `[n, time, c_in]`, `w` `[k, c_in, c_out]`, `bias` `[c_out]` give `[n, steps,
    /// c_out]`. Use it for audio and time series; with [`Conv::causal`] where a step must not depend on later ones.
    ///
    /// It takes memory as [`conv2d`](Self::conv2d) does: `k` times the input at a stride of 1.
    pub fn conv1d(&mut self, name: &str, x: Value, w: Value, bias: Option<Value>, conv: Conv) -> Result<Value> {
        let [n, time, channels] = *self.type_of(name, x)?.shape.dims() else {
            return Err(self.mismatch(name, "conv1d", "x must have shape [n, time, c_in]".into(), &[x]));
        };
        let [k, c_in, c_out] = *self.type_of(name, w)?.shape.dims() else {
            return Err(self.mismatch(name, "conv1d", "w must have shape [k, c_in, c_out]".into(), &[x, w]));
        };
        if c_in != channels {
            let message = format!("w is for sequences with {c_in} channels, x has {channels}");
            return Err(self.mismatch(name, "conv1d", message, &[x, w]));
        }
        let window = conv.window([k, 1], [time, 1], true);
        let window = window.map_err(|message| self.mismatch(name, "conv1d", message, &[x, w]))?;
        let rows = if window == Window::new([1, 1], [1, 1]) {
            x
        } else {
            let image = self.reshape(&format!("{name}.image"), x, [n, time, 1, c_in])?;
            let rows = self.rows(name, image, window)?;
            let steps = self.ty(rows).shape.dims()[1];
            self.reshape(&format!("{name}.rows"), rows, [n, steps, k * c_in])?
        };
        self.product(name, rows, w, bias, [k * c_in, c_out])
    }

    /// The windows of an image as rows, for a convolution of this name: the image itself, if they are its pixels.
    fn rows(&mut self, name: &str, x: Value, window: Window) -> Result<Value> {
        match window == Window::new([1, 1], [1, 1]) {
            true => Ok(x),
            false => self.op1(&format!("{name}.patches"), Patches { window }, &[x]),
        }
    }

    /// The product of rows and the weight of a convolution as a matrix.
    fn product(&mut self, name: &str, rows: Value, w: Value, bias: Option<Value>, matrix: [usize; 2]) -> Result<Value> {
        let w = self.reshape(&format!("{name}.w"), w, matrix)?;
        self.linear(name, rows, w, bias)
    }

    /// Height and width of an image.
    fn image(&self, name: &str, op: &'static str, x: Value) -> Result<[usize; 2]> {
        match *self.type_of(name, x)?.shape.dims() {
            [_, height, width, _] => Ok([height, width]),
            _ => Err(self.mismatch(name, op, "x must have shape [n, height, width, channels]".into(), &[x])),
        }
    }

    fn mismatch(&self, name: &str, op: &'static str, message: String, inputs: &[Value]) -> Error {
        let name = if name.is_empty() { op } else { name };
        Error::node(&self.full_name(name), op, message, inputs.iter().map(|&v| self.ty(v)))
    }
}

impl Op for Patches {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        let windows = Windows::new(self.window, &inputs[0].shape, "kernel")?;
        Ok(vec![TensorType::f32(windows.shape(windows.taps().saturating_mul(windows.channels)))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let op = PatchesBackward { window: self.window, to: cx.graph.ty(cx.inputs[0]).shape.clone() };
        let dx = cx.graph.op1(&cx.name, op, &[dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let windows = Windows::new(self.window, &cx.inputs[0].shape, "kernel")?;
        let units = windows.taps() * windows.channels / windows.width();
        let kernel = table_kernel::<Self>("patches", SOURCE, "forward");
        let (kernel, words, groups) = windows.spread(cx, kernel, (windows.places(windows.count), units, 1))?;
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let mut y = Array::zeros(outputs[0].shape.clone());
        // `infer` accepted the shape.
        let Ok(windows) = Windows::new(self.window, &inputs[0].shape, "kernel") else { return vec![] };
        let (taps, c) = (windows.taps(), windows.channels);
        windows.each_tap(|window, tap, pixel| {
            if let Some(pixel) = pixel {
                y.data[(window * taps + tap) * c..][..c].copy_from_slice(&inputs[0].data[pixel * c..][..c]);
            }
        });
        vec![y]
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        // With large strides, pixels that belong to no window don't move.
        (inputs[0].bytes().min(outputs[0].bytes()) + outputs[0].bytes()) as u64
    }
}

impl Op for PatchesBackward {
    fn name(&self) -> &'static str {
        "patches_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        let windows = Windows::new(self.window, &self.to, "kernel")?;
        expect_shape("dy", &inputs[0], &windows.shape(windows.taps().saturating_mul(windows.channels)))?;
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.op1(&cx.name, Patches { window: self.window }, &[dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let windows = Windows::new(self.window, &self.to, "kernel")?;
        let [down, across] = windows.overlap();
        let over = (windows.places(windows.image), windows.channels / windows.width(), down * (across + 1) + 1);
        let (kernel, words, groups) = windows.spread(cx, table_kernel::<Self>("patches", SOURCE, "backward"), over)?;
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut dx = Array::zeros(self.to.clone());
        let Ok(windows) = Windows::new(self.window, &self.to, "kernel") else { return vec![] };
        let (taps, c) = (windows.taps(), windows.channels);
        windows.each_tap(|window, tap, pixel| {
            if let Some(pixel) = pixel {
                let dy = &inputs[0].data[(window * taps + tap) * c..][..c];
                dx.data[pixel * c..][..c].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
        });
        vec![dx]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_at_both_ends() {
        assert_eq!(Padding::Same.ends(7, 3, 1, 1), [1, 1]);
        assert_eq!(Padding::Same.ends(7, 4, 1, 1), [1, 2]);
        assert_eq!(Padding::Same.ends(7, 3, 1, 2), [2, 2]);
        assert_eq!(Padding::Same.ends(8, 3, 2, 1), [0, 1]);
        assert_eq!(Padding::Same.ends(7, 1, 2, 1), [0, 0]);
        assert_eq!(Padding::Causal.ends(7, 3, 1, 2), [4, 0]);
        assert_eq!(Padding::Each(3).ends(7, 3, 1, 2), [3, 3]);
    }
}
