//! Pooling: the largest or the mean of each window of an image, by channel. And its dual, which makes images larger.
//!
//! Padding never wins a maximum and does not count in a mean: the mean is over the pixels that are there. (PyTorch's
//! `avg_pool2d` counts zeros of padding unless told otherwise.) The gradient of a maximum goes to the pixel that had
//! it, the first of equal ones from left to right, then down. Each pixel adds up what its windows have for it in a
//! fixed order, so results do not vary between runs.

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_shape};
use super::source::table_kernel;
use super::windows::{Window, Windows};
use crate::array::Array;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::tensor::{DType, Shape, TensorType};

const SOURCE: &str =
    concat!(include_str!("../../shaders/common/windows.wgsl"), include_str!("../../shaders/pool.wgsl"));

pub(super) const ROW: Row = Row {
    name: "pool",
    summary: "y = largest, mean or sum of x in each window of an image, by channel; and its dual, e.g. larger images",
    sources: &[SOURCE],
    cases: || {
        let plain = |size: usize, stride: usize| Window::new([size; 2], [stride; 2]);
        let padded = |n: usize, window: Window| Window { before: [n; 2], after: [n; 2], ..window };
        let case = |by: PoolBy, window: Window, x: [usize; 4]| {
            let Window { size, stride, before, after, .. } = window;
            let name = format!("{by:?} of {size:?} in {x:?}, stride {stride:?}, padding {before:?} {after:?}");
            Case::new(name, Pooling { by, window }, &[&x])
        };
        let dual = |by: PoolBy, window: Window, image: [usize; 4]| {
            let dy = Windows::new(window, &image.into(), "pool").map_or([1; 4], |w| w.shape(w.channels));
            Case::new(
                format!("dual of {by:?}, {dy:?} to {image:?}"),
                PoolingBackward { by, window, to: image.into() },
                &[&dy],
            )
        };
        let mut cases = vec![];
        for by in [PoolBy::Max, PoolBy::Mean] {
            cases.extend([
                case(by, plain(1, 1), [1, 1, 1, 1]),
                case(by, plain(2, 2), [2, 8, 10, 4]),
                case(by, plain(2, 2), [1, 7, 9, 5]), // pixels that belong to no window
                case(by, padded(1, plain(3, 2)), [2, 9, 8, 3]),
                case(by, padded(1, plain(3, 1)), [1, 12, 13, 8]),
                case(by, padded(2, plain(4, 3)), [1, 11, 5, 12]),
                case(by, Window { after: [1, 0], ..Window::new([2, 5], [2, 1]) }, [3, 9, 17, 2]),
                case(by, Window::new([5, 1], [3, 1]), [2, 127, 1, 20]),
                case(by, plain(3, 3), [1, 3, 3, 1757]),
            ]);
        }
        let below_zero =
            case(PoolBy::Max, padded(1, plain(3, 2)), [1, 8, 8, 4]).fill(0, InputFill::Uniform(-2.0, -1.0));
        cases.push(Case { name: "Max of negative numbers".into(), ..below_zero });
        // Equal ones have no gradient to compare with: it depends on the direction.
        let equal = InputFill::Values(&[1.0, 5.0, 2.0, 5.0, 5.0, 3.0, -1.0]);
        let equal = case(PoolBy::Max, padded(1, plain(3, 2)), [1, 15, 16, 3]).fill(0, equal).forward_only();
        cases.push(Case { name: format!("{}, equal ones", equal.name), ..equal });
        cases.push(case(PoolBy::Sum, padded(1, plain(3, 2)), [1, 6, 7, 4]));
        cases.push(dual(PoolBy::Sum, plain(2, 2), [2, 6, 10, 3]));
        cases.push(dual(PoolBy::Sum, Window::new([1, 3], [1, 3]), [1, 5, 9, 8]));
        cases.push(dual(PoolBy::Mean, padded(1, plain(3, 2)), [1, 7, 9, 4]));
        cases
    },
    bench: || {
        let window = Window::new([2, 2], [2, 2]);
        let case = |name: &str, by: PoolBy| Case::new(name, Pooling { by, window }, &[&[16, 64, 64, 64]]);
        let to = Shape::from([16, 64, 64, 64]);
        let upsample = PoolingBackward { by: PoolBy::Sum, window, to };
        vec![
            case("max 2x2 of 16x64x64x64", PoolBy::Max),
            case("mean 2x2 of 16x64x64x64", PoolBy::Mean),
            Case::new("upsample to 16x64x64x64", upsample, &[&[16, 32, 32, 64]]),
        ]
    },
};

/// What [`Pooling`] makes of the pixels in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolBy {
    /// The largest.
    Max,
    /// Their mean.
    Mean,
    /// Their sum.
    Sum,
}

/// `x -> y`, or `x -> (y, tap u32)` for the largest: `[n, height, width, c] -> [n, down, across, c]`. `tap` is the
/// number of the first tap that has the largest, from left to right, then down.
///
/// Usually added by [`Graph::max_pool2d`] or [`Graph::mean_pool2d`]; the op itself takes other settings for each axis,
/// too. Windows that have no pixel, for all padding, are an error.
#[derive(Clone, Copy, Debug)]
pub struct Pooling {
    /// What to make of the pixels in a window.
    pub by: PoolBy,
    /// The windows, without dilation.
    pub window: Window,
}

/// `(dy [, tap]) -> dx`, the dual: each pixel is the sum over its windows of `dy`, of its share of the mean, or of `dy`
/// where it was the largest. The gradient of [`Pooling`], and what makes images larger.
#[derive(Clone, Debug)]
pub struct PoolingBackward {
    by: PoolBy,
    window: Window,
    to: Shape,
}

/// The windows of a pool, alike along all axes: see [`Graph::max_pool2d`].
///
/// ```
/// use throughline::ops::pool::Pool;
/// let halves = Pool::new(2);
/// let overlapping = Pool { size: 3, stride: 2, padding: 1 };
/// # let _ = (halves, overlapping);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Pixels, or steps in time.
    pub size: usize,
    /// Pixels from one window to the next.
    pub stride: usize,
    /// Pixels of padding at each end, fewer than `size`. They never count.
    pub padding: usize,
}

impl Pool {
    /// Windows of this size side by side, without padding.
    pub fn new(size: usize) -> Self {
        Pool { size, stride: size, padding: 0 }
    }

    fn window(self) -> Window {
        let Pool { size, stride, padding } = self;
        Window { before: [padding; 2], after: [padding; 2], ..Window::new([size; 2], [stride; 2]) }
    }
}

impl Graph {
    /// The largest of each window of an image, by channel: `[n, height, width, c] -> [n, down, across, c]`.
    ///
    /// Pixels that are left over at the end belong to no window. For the largest of a whole image use
    /// [`max_axis`](Self::max_axis).
    ///
    /// # Errors
    ///
    /// [`Error::Node`] if a window is larger than the padded image, or the padding is no smaller than a window.
    ///
    /// ```
    /// use throughline::{Graph, TensorType, ops::pool::Pool};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([8, 28, 28, 16]))?;
    /// let y = g.max_pool2d("pool", x, Pool::new(2))?;
    /// assert_eq!(g.ty(y), &TensorType::f32([8, 14, 14, 16]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn max_pool2d(&mut self, name: &str, x: Value, pool: Pool) -> Result<Value> {
        self.pool2d(name, x, PoolBy::Max, pool.window())
    }

    /// The mean of each window of an image, by channel: `[n, height, width, c] -> [n, down, across, c]`. Padding does
    /// not count: the mean is over the pixels that are there. See [`max_pool2d`](Self::max_pool2d).
    ///
    /// For the mean of a whole image use [`mean_axis`](Self::mean_axis).
    pub fn mean_pool2d(&mut self, name: &str, x: Value, pool: Pool) -> Result<Value> {
        self.pool2d(name, x, PoolBy::Mean, pool.window())
    }

    /// The largest of each window of a sequence, by channel: `[n, time, c] -> [n, steps, c]`. See
    /// [`max_pool2d`](Self::max_pool2d).
    pub fn max_pool1d(&mut self, name: &str, x: Value, pool: Pool) -> Result<Value> {
        self.pool1d(name, x, PoolBy::Max, pool)
    }

    /// The mean of each window of a sequence, by channel: `[n, time, c] -> [n, steps, c]`. See
    /// [`mean_pool2d`](Self::mean_pool2d).
    pub fn mean_pool1d(&mut self, name: &str, x: Value, pool: Pool) -> Result<Value> {
        self.pool1d(name, x, PoolBy::Mean, pool)
    }

    /// An image in which each pixel is a block of `factor` by `factor`: `[n, height, width, c] -> [n, factor * height,
    /// factor * width, c]`. Nearest-neighbour interpolation, as U-Nets and decoders of images use it, before a
    /// convolution.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([1, 8, 8, 64]))?;
    /// let y = g.upsample2d("up", x, 2)?;
    /// assert_eq!(g.ty(y), &TensorType::f32([1, 16, 16, 64]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn upsample2d(&mut self, name: &str, x: Value, factor: usize) -> Result<Value> {
        let ty = self.type_of(name, x)?;
        let [n, height, width, c] = *ty.shape.dims() else {
            let message = format!("images must have shape [n, height, width, channels], got {}", ty.shape);
            return Err(Error::node(&self.full_name(name), "upsample2d", message, [ty]));
        };
        if factor == 0 {
            return Err(Error::node(
                &self.full_name(name),
                "upsample2d",
                "factor must be at least 1, got 0".into(),
                [ty],
            ));
        }
        let to = Shape::from([n, height.saturating_mul(factor), width.saturating_mul(factor), c]);
        let window = Window::new([factor; 2], [factor; 2]);
        // The dual of the sum over each block.
        self.op1(name, PoolingBackward { by: PoolBy::Sum, window, to }, &[x])
    }

    fn pool2d(&mut self, name: &str, x: Value, by: PoolBy, window: Window) -> Result<Value> {
        Ok(self.op(name, Pooling { by, window }, &[x])?[0])
    }

    fn pool1d(&mut self, name: &str, x: Value, by: PoolBy, pool: Pool) -> Result<Value> {
        let ty = self.type_of(name, x)?;
        let [n, time, c] = *ty.shape.dims() else {
            let message = format!("sequences must have shape [n, time, channels], got {}", ty.shape);
            return Err(Error::node(&self.full_name(name), "pooling", message, [ty]));
        };
        let image = self.reshape(&format!("{name}.image"), x, [n, time, 1, c])?;
        let Pool { size, stride, padding } = pool;
        let window = Window { before: [padding, 0], after: [padding, 0], ..Window::new([size, 1], [stride, 1]) };
        let y = self.pool2d(&format!("{name}.pool"), image, by, window)?;
        let steps = self.ty(y).shape.dims()[1];
        self.reshape(name, y, [n, steps, c])
    }
}

/// The windows of a pool over images of this shape. Each has a pixel.
fn windows(window: Window, shape: &Shape) -> Result<Windows, String> {
    let windows = Windows::new(window, shape, "pool")?;
    let Window { size, before, after, dilation, .. } = window;
    if dilation != [1, 1] {
        return Err(format!("pools have no dilation, got {dilation:?}"));
    }
    if (0..2).any(|i| before[i].max(after[i]) >= size[i]) {
        return Err(format!("padding of {before:?} and {after:?} must be smaller than the pool, {size:?}"));
    }
    Ok(windows)
}

/// Sets the knobs that pools have besides those of windows.
fn knobs(kernel: Kernel, by: PoolBy, windows: &Windows) -> Kernel {
    kernel.knob("MEAN", by == PoolBy::Mean).knob("I", if windows.width() == 4 { "vec4<u32>" } else { "u32" })
}

impl Op for Pooling {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 1)?;
        let windows = windows(self.window, &inputs[0].shape)?;
        let shape = windows.shape(windows.channels);
        let mut outputs = vec![TensorType::f32(shape)];
        if self.by == PoolBy::Max {
            outputs.push(TensorType::u32(shape));
        }
        Ok(outputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs: Vec<Value> = [cx.dy0()?].into_iter().chain(cx.outputs[1..].iter().copied()).collect();
        let op = PoolingBackward { by: self.by, window: self.window, to: cx.graph.ty(cx.inputs[0]).shape.clone() };
        let dx = cx.graph.op1(&cx.name, op, &inputs)?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let windows = windows(self.window, &cx.inputs[0].shape)?;
        let largest = self.by == PoolBy::Max;
        let kernel = table_kernel::<Self>("pool", SOURCE, if largest { "largest" } else { "sum" });
        let [down, across] = self.window.size;
        let over = (windows.places(windows.count), windows.channels / windows.width(), down * (across + 1) + 1);
        let (kernel, words, groups) = windows.spread(cx, knobs(kernel, self.by, &windows), over)?;
        let binds = [Bind::In(0), Bind::Out(0), Bind::Out(1)];
        Ok(Program::one(kernel, if largest { &binds } else { &binds[..2] }, &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let Ok(windows) = windows(self.window, &inputs[0].shape) else { return vec![] };
        let (x, c, shape) = (&inputs[0].data, windows.channels, &outputs[0].shape);
        let start = if self.by == PoolBy::Max { f64::NEG_INFINITY } else { 0.0 };
        let mut y = Array::new(shape.clone(), vec![start; shape.len()]);
        let mut first = Array::zeros(shape.clone());
        let sizes = sizes(&windows);
        windows.each_tap(|window, tap, pixel| {
            let Some(pixel) = pixel else { return };
            for (channel, &x) in x[pixel * c..][..c].iter().enumerate() {
                let at = window * c + channel;
                match self.by {
                    PoolBy::Max if x > y.data[at] => (y.data[at], first.data[at]) = (x, tap as f64),
                    PoolBy::Max => {}
                    PoolBy::Mean => y.data[at] += x / sizes[window],
                    PoolBy::Sum => y.data[at] += x,
                }
            }
        });
        if self.by == PoolBy::Max { vec![y, first] } else { vec![y] }
    }

    fn flops(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        let windows = windows(self.window, &inputs[0].shape);
        windows.map_or(0, |windows| (outputs[0].len() * windows.taps()) as u64)
    }
}

/// The number of pixels in each window: for references.
fn sizes(windows: &Windows) -> Vec<f64> {
    let mut sizes = vec![0.0; windows.places(windows.count)];
    windows.each_tap(|window, _, pixel| sizes[window] += f64::from(u8::from(pixel.is_some())));
    sizes
}

impl Op for PoolingBackward {
    fn name(&self) -> &'static str {
        "pool_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let largest = self.by == PoolBy::Max;
        if inputs.len() != 1 + usize::from(largest) {
            return Err(format!("takes {} inputs, got {}", 1 + usize::from(largest), inputs.len()));
        }
        expect_f32(&inputs[..1], 1)?;
        let windows = windows(self.window, &self.to)?;
        for ty in inputs {
            expect_shape("what the windows have", ty, &windows.shape(windows.channels))?;
        }
        if largest && inputs[1].dtype != DType::U32 {
            return Err(format!("the taps must be u32, got {}", inputs[1].dtype));
        }
        Ok(vec![TensorType::f32(self.to.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        if self.by == PoolBy::Max {
            return Err(cx.no_gradient("second derivatives of a maximum are not implemented"));
        }
        let dy = cx.dy0()?;
        let dx = cx.graph.op1(&cx.name, Pooling { by: self.by, window: self.window }, &[dy])?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let windows = windows(self.window, &self.to)?;
        let largest = self.by == PoolBy::Max;
        let kernel = table_kernel::<Self>("pool", SOURCE, "backward").knob("LARGEST", largest);
        let [down, across] = windows.overlap();
        let over = (windows.places(windows.image), windows.channels / windows.width(), down * (across + 1) + 1);
        let (kernel, words, groups) = windows.spread(cx, knobs(kernel, self.by, &windows), over)?;
        let taps = if largest { Bind::In(1) } else { Bind::Null };
        Ok(Program::one(kernel, &[Bind::In(0), taps, Bind::Out(0)], &words, groups))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let mut dx = Array::zeros(self.to.clone());
        let Ok(windows) = windows(self.window, &self.to) else { return vec![] };
        let (dy, c) = (&inputs[0].data, windows.channels);
        let sizes = sizes(&windows);
        windows.each_tap(|window, tap, pixel| {
            let Some(pixel) = pixel else { return };
            for (channel, dx) in dx.data[pixel * c..][..c].iter_mut().enumerate() {
                let at = window * c + channel;
                *dx += match self.by {
                    PoolBy::Max if inputs[1].data[at] == tap as f64 => dy[at],
                    PoolBy::Max => 0.0,
                    PoolBy::Mean => dy[at] / sizes[window],
                    PoolBy::Sum => dy[at],
                };
            }
        });
        vec![dx]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let windows = windows(self.window, &self.to);
        windows.map_or(0, |windows| (inputs[0].len() * windows.taps()) as u64)
    }
}
