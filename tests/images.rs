//! Convolutions, pools and reductions as applications call them: against loops written out here, and against values
//! worked out by hand, which PyTorch gives too.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles};
use throughline::ops::patches::{Conv, Padding};
use throughline::ops::pool::Pool;
use throughline::ops::random_array;
use throughline::reference::{Array, nmse};
use throughline::{ExecOptions, Executable, Graph, Plan, Profile, Result, TensorType, Value};

/// Runs a graph with one kind of kernels.
fn run_with(profile: &Profile, graph: &Graph, given: &HashMap<Value, Array>, wanted: &[Value]) -> Vec<Vec<f32>> {
    let plan = Plan::new(graph, wanted, profile).unwrap();
    let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
    exec.plan().externals().iter().for_each(|e| common::write(&exec, e.value, &given[&e.value]));
    exec.submit().unwrap();
    wanted.iter().map(|&v| common::read(&exec, v)).collect()
}

/// What a function of one input makes of these numbers.
fn apply(x: Array, f: impl FnOnce(&mut Graph, Value) -> Result<Value>) -> (Vec<usize>, Vec<f32>) {
    let mut g = Graph::new();
    let input = g.input("x", TensorType::f32(x.shape.clone())).unwrap();
    let y = f(&mut g, input).unwrap();
    let shape = g.ty(y).shape.dims().to_vec();
    let given = HashMap::from([(input, x)]);
    let results: Vec<_> = profiles().iter().map(|p| run_with(p, &g, &given, &[y]).remove(0)).collect();
    assert!(results.iter().all(|r| *r == results[0]), "{results:?}");
    (shape, results[0].clone())
}

/// An image `[1, 3, 3, 1]` of the numbers from 1 to 9.
fn nine() -> Array {
    Array::new([1, 3, 3, 1], (1..=9).map(f64::from).collect())
}

#[test]
fn convolutions_by_hand() {
    let conv = |conv: Conv| {
        let mut g = Graph::new();
        let x = g.input("x", TensorType::f32([1, 3, 3, 1])).unwrap();
        let w = g.input("w", TensorType::f32([2, 2, 1, 1])).unwrap();
        let y = g.conv2d("y", x, w, None, conv).unwrap();
        let given = HashMap::from([(x, nine()), (w, Array::new([2, 2, 1, 1], vec![1.0, 2.0, 3.0, 4.0]))]);
        (g.ty(y).shape.dims().to_vec(), run_with(gpu().profile(), &g, &given, &[y]).remove(0))
    };
    assert_eq!(conv(Conv::default()), (vec![1, 2, 2, 1], vec![37.0, 47.0, 67.0, 77.0]));
    let padded = Conv { padding: Padding::Each(1), ..Conv::default() };
    let all = [4, 11, 18, 9, 18, 37, 47, 21, 36, 67, 77, 33, 14, 23, 26, 9].map(|v| v as f32);
    assert_eq!(conv(padded), (vec![1, 4, 4, 1], all.to_vec()));
    assert_eq!(conv(Conv { stride: 2, ..padded }), (vec![1, 2, 2, 1], vec![4.0, 18.0, 36.0, 77.0]));
    assert_eq!(conv(Conv { dilation: 2, ..Conv::default() }), (vec![1, 1, 1, 1], vec![1.0 + 6.0 + 21.0 + 36.0]));
    // The one row and column that make it as large as the image come after it.
    let same = [37, 47, 21, 67, 77, 33, 23, 26, 9].map(|v| v as f32);
    assert_eq!(conv(Conv::same()), (vec![1, 3, 3, 1], same.to_vec()));
}

#[test]
fn pools_by_hand() {
    let all = |v: &[i32]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let overlapping = Pool { size: 2, stride: 1, padding: 0 };
    assert_eq!(apply(nine(), |g, x| g.max_pool2d("y", x, overlapping)), (vec![1, 2, 2, 1], all(&[5, 6, 8, 9])));
    assert_eq!(apply(nine(), |g, x| g.mean_pool2d("y", x, overlapping)), (vec![1, 2, 2, 1], all(&[3, 4, 6, 7])));
    // Each of these windows has four pixels; the rest is padding, which does not count.
    let padded = Pool { size: 3, stride: 2, padding: 1 };
    assert_eq!(apply(nine(), |g, x| g.mean_pool2d("y", x, padded)), (vec![1, 2, 2, 1], all(&[3, 4, 6, 7])));
    let negative = nine().map(|v| -v);
    assert_eq!(apply(negative, |g, x| g.max_pool2d("y", x, padded)), (vec![1, 2, 2, 1], all(&[-1, -2, -4, -5])));
    let sequence = Array::new([1, 5, 2], [1, 10, 3, 30, 2, 20, 5, 50, 4, 40].map(f64::from).to_vec());
    let by_two = apply(sequence.clone(), |g, x| g.max_pool1d("y", x, Pool::new(2)));
    assert_eq!(by_two, (vec![1, 2, 2], all(&[3, 30, 5, 50])));
    let by_five = apply(sequence, |g, x| g.mean_pool1d("y", x, Pool::new(5)));
    assert_eq!(by_five, (vec![1, 1, 2], all(&[3, 30])));
    let larger = apply(Array::new([1, 1, 2, 1], vec![1.0, 2.0]), |g, x| g.upsample2d("y", x, 2));
    assert_eq!(larger, (vec![1, 2, 4, 1], all(&[1, 1, 2, 2, 1, 1, 2, 2])));
}

#[test]
fn reductions_by_hand() {
    let x = || Array::new([2, 3, 2], [1, 7, 4, 2, 4, 9, -5, 0, -8, 0, -1, -6].map(f64::from).to_vec());
    let all = |v: &[i32]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    assert_eq!(apply(x(), |g, x| g.sum_axis("y", x, 0)), (vec![3, 2], all(&[-4, 7, -4, 2, 3, 3])));
    assert_eq!(apply(x(), |g, x| g.sum_axis("y", x, 1)), (vec![2, 2], all(&[9, 18, -14, -6])));
    assert_eq!(apply(x(), |g, x| g.sum_axis("y", x, 2)), (vec![2, 3], all(&[8, 6, 13, -5, -8, -7])));
    assert_eq!(apply(x(), |g, x| g.mean_axis("y", x, 1)).1[..2], [3.0, 6.0]);
    assert_eq!(apply(x(), |g, x| g.mean_axis("y", x, 0)), (vec![3, 2], vec![-2.0, 3.5, -2.0, 1.0, 1.5, 1.5]));
    assert_eq!(apply(x(), |g, x| g.max_axis("y", x, 1)), (vec![2, 2], all(&[4, 9, -1, 0])));
    assert_eq!(apply(x(), |g, x| g.min_axis("y", x, 1)), (vec![2, 2], all(&[1, 2, -8, -6])));
    assert_eq!(apply(x(), |g, x| g.argmax_axis("y", x, 1)), (vec![2, 2], all(&[1, 2, 2, 0])));
    let one_row = || Array::new([1, 3], vec![1.0, 5.0, 3.0]);
    assert_eq!(apply(one_row(), |g, x| g.sum_axis("y", x, 1)), (vec![1], vec![9.0]));
    assert_eq!(apply(one_row(), |g, x| g.mean_axis("y", x, 1)), (vec![1], vec![3.0]));
    let flat = || Array::new([3], vec![1.0, 5.0, 3.0]);
    assert_eq!(apply(flat(), |g, x| g.sum_axis("y", x, 0)), (vec![1], vec![9.0]));
    assert_eq!(apply(flat(), |g, x| g.max_axis("y", x, 0)), (vec![1], vec![5.0]));
    assert_eq!(apply(flat(), |g, x| g.pad("y", x, 0, 1, 2)), (vec![6], vec![0.0, 1.0, 5.0, 3.0, 0.0, 0.0]));
}

/// A convolution written out in PyTorch's layouts, images `[n, c, h, w]` and weights `[c_out, c_in, kh, kw]`: `f` gets
/// the indices of each product, of the output, the input and the weight.
fn each_product(
    x: [usize; 4],
    w: [usize; 4],
    conv: (usize, [usize; 2], usize),
    mut f: impl FnMut(usize, usize, usize),
) {
    let ([n, c, height, width], [c_out, _, kh, kw], (stride, padding, dilation)) = (x, w, conv);
    let [down, across] = out(x, w, conv);
    for (i, o) in (0..n).flat_map(|i| (0..c_out).map(move |o| (i, o))) {
        for (row, column) in (0..down).flat_map(|row| (0..across).map(move |column| (row, column))) {
            let y = ((i * c_out + o) * down + row) * across + column;
            for tap in 0..c * kh * kw {
                let (ch, ky, kx) = (tap / kw / kh, tap / kw % kh, tap % kw);
                let (a, b) = (row * stride + ky * dilation, column * stride + kx * dilation);
                let inside =
                    (padding[0]..padding[0] + height).contains(&a) && (padding[1]..padding[1] + width).contains(&b);
                if inside {
                    let at = ((i * c + ch) * height + a - padding[0]) * width + b - padding[1];
                    f(y, at, o * c * kh * kw + tap);
                }
            }
        }
    }
}

fn out(x: [usize; 4], w: [usize; 4], (stride, padding, dilation): (usize, [usize; 2], usize)) -> [usize; 2] {
    [0, 1].map(|i| (x[2 + i] + 2 * padding[i] - dilation * (w[2 + i] - 1) - 1) / stride + 1)
}

/// `[n, c, h, w]` to `[n, h, w, c]`, or `[c_out, c_in, kh, kw]` to `[kh, kw, c_in, c_out]`.
fn channels_last(x: &Array, weight: bool) -> Array {
    let [a, b, h, w] = *x.shape.dims() else { panic!() };
    let at = |row: usize, column: usize, i: usize, j: usize| x.data[((i * b + j) * h + row) * w + column];
    let mut data = vec![];
    let dims = if weight { [h, w, b, a] } else { [a, h, w, b] };
    for i in 0..x.data.len() {
        let [p, q, r, s] =
            [i / dims[3] / dims[2] / dims[1], i / dims[3] / dims[2] % dims[1], i / dims[3] % dims[2], i % dims[3]];
        data.push(if weight { at(p, q, s, r) } else { at(q, r, p, s) });
    }
    Array::new(dims, data)
}

#[test]
fn convolutions_and_their_gradients_are_those_of_loops() {
    for (x, w, conv) in [
        ([2, 3, 9, 8], [8, 3, 3, 3], (1, [1, 1], 1)),
        ([1, 8, 10, 7], [5, 8, 5, 5], (2, [2, 2], 1)),
        ([2, 4, 12, 13], [6, 4, 3, 3], (3, [2, 2], 2)),
        ([1, 12, 6, 6], [4, 12, 1, 1], (1, [0, 0], 1)),
        ([3, 5, 7, 6], [3, 5, 1, 1], (2, [0, 0], 1)),
        ([2, 6, 33, 1], [7, 6, 4, 1], (2, [3, 0], 1)), // a sequence
    ] {
        let sequence = w[3] == 1 && x[3] == 1;
        let [down, across] = out(x, w, conv);
        let y_dims = [x[0], w[0], down, across];
        let (x_data, w_data) = (random_array(&x.into(), 1), random_array(&w.into(), 2));
        let (bias_data, dy_data) = (random_array(&[w[0]].into(), 3), random_array(&y_dims.into(), 4));
        let mut y = Array::zeros(y_dims);
        y.data.iter_mut().enumerate().for_each(|(i, y)| *y = bias_data.data[i / (down * across) % w[0]]);
        let (mut dx, mut dw) = (Array::zeros(x), Array::zeros(w));
        each_product(x, w, conv, |at_y, at_x, at_w| {
            y.data[at_y] += x_data.data[at_x] * w_data.data[at_w];
            dx.data[at_x] += dy_data.data[at_y] * w_data.data[at_w];
            dw.data[at_w] += dy_data.data[at_y] * x_data.data[at_x];
        });

        let mut g = Graph::new();
        let without_width = |dims: &[usize]| -> Vec<usize> {
            let keep =
                |&(i, _): &(usize, &usize)| !(sequence && i == if dims.len() == 4 && dims[1] == 1 { 1 } else { 2 });
            dims.iter().enumerate().filter(keep).map(|(_, &n)| n).collect()
        };
        let mut given = HashMap::new();
        let mut input = |g: &mut Graph, name: &str, data: &Array, dims: Vec<usize>| {
            let value = g.input(name, TensorType::f32(dims.clone())).unwrap();
            given.insert(value, Array::new(dims, data.data.clone()));
            value
        };
        let images = channels_last(&x_data, false);
        let weight = channels_last(&w_data, true);
        let cotangent = channels_last(&dy_data, false);
        let vx = input(&mut g, "x", &images, without_width(images.shape.dims()));
        let vw = input(&mut g, "w", &weight, without_width(weight.shape.dims()));
        let vb = input(&mut g, "b", &bias_data, vec![w[0]]);
        let vdy = input(&mut g, "dy", &cotangent, without_width(cotangent.shape.dims()));
        let settings = Conv { stride: conv.0, padding: Padding::Each(conv.1[0]), dilation: conv.2 };
        let vy = match sequence {
            true => g.conv1d("conv", vx, vw, Some(vb), settings).unwrap(),
            false => g.conv2d("conv", vx, vw, Some(vb), settings).unwrap(),
        };
        let product = g.mul("product", vy, vdy).unwrap();
        let loss = g.sum("loss", product).unwrap();
        let gradients = g.gradients(loss, &[vx, vw]).unwrap();
        let wanted = [vy, gradients[0], gradients[1]];
        let want = [channels_last(&y, false), channels_last(&dx, false), channels_last(&dw, true)];
        for profile in profiles() {
            for (i, (got, want)) in run_with(&profile, &g, &given, &wanted).iter().zip(&want).enumerate() {
                let error = nmse(got, &want.data);
                assert!(error < 1e-12, "{x:?}, {w:?}, {conv:?}: result {i}: NMSE {error:.1e}");
            }
        }
    }
}

#[test]
fn causal_convolutions_see_nothing_later() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([1, 9, 2])).unwrap();
    let w = g.input("w", TensorType::f32([3, 2, 5])).unwrap();
    let y = g.conv1d("y", x, w, None, Conv { dilation: 2, ..Conv::causal() }).unwrap();
    assert_eq!(g.ty(y).shape.dims(), [1, 9, 5]);
    let run = |data: Array| {
        let given = HashMap::from([(x, data), (w, random_array(&[3, 2, 5].into(), 2))]);
        run_with(gpu().profile(), &g, &given, &[y]).remove(0)
    };
    let data = random_array(&[1, 9, 2].into(), 1);
    let mut changed = data.clone();
    changed.data[6 * 2] += 1.0;
    let (before, after) = (run(data), run(changed));
    let differs: Vec<bool> = before.chunks(5).zip(after.chunks(5)).map(|(a, b)| a != b).collect();
    assert_eq!(differs, [false, false, false, false, false, false, true, false, true]);
}

/// A pixel is its own window: the product alone.
#[test]
fn kernels_of_one_pixel_need_no_patches() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 5, 5, 8])).unwrap();
    let t = g.input("t", TensorType::f32([2, 5, 8])).unwrap();
    let (w, v) = (g.param("w", [1, 1, 8, 3]).unwrap(), g.param("v", [1, 8, 3]).unwrap());
    let y = g.conv2d("y", x, w, None, Conv::default()).unwrap();
    let z = g.conv1d("z", t, v, None, Conv::causal()).unwrap();
    let plan = Plan::new(&g, &[y, z], gpu().profile()).unwrap();
    let steps: Vec<&str> = plan.steps().iter().filter(|s| !s.dispatches().is_empty()).map(|s| s.name()).collect();
    assert_eq!(steps, ["y", "z"]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    fn expect(result: Result<Value>, words: &[&str]) {
        let e = result.expect_err("accepted").to_string();
        words.iter().for_each(|w| assert!(e.contains(w), "no {w:?} in: {e}"));
    }
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 8, 9, 3])).unwrap();
    let t = g.input("t", TensorType::f32([2, 8, 3])).unwrap();
    let ids = g.input("ids", TensorType::u32([2, 8])).unwrap();
    let w = g.param("w", [3, 3, 3, 4]).unwrap();
    let w1 = g.param("w1", [3, 3, 4]).unwrap();
    let deep = g.param("deep", [3, 3, 5, 4]).unwrap();
    let large = g.param("large", [3, 12, 3, 4]).unwrap();
    let bias = g.param("bias", [3]).unwrap();
    let (plain, causal) = (Conv::default(), Conv::causal());
    expect(g.conv2d("c", t, w, None, plain), &["`c`", "conv2d", "[n, height, width, channels]", "[2, 8, 3]"]);
    expect(g.conv2d("c", x, w1, None, plain), &["`c`", "[kh, kw, c_in, c_out]", "[3, 3, 4]"]);
    expect(g.conv2d("c", x, deep, None, plain), &["`c`", "w is for images with 5 channels, x has 3"]);
    expect(
        g.conv2d("c", x, large, None, plain),
        &["`c.patches`", "the kernel, [3, 12]", "larger than the padded image, [8, 9]"],
    );
    expect(g.conv2d("c", x, w, Some(bias), plain), &["`c`", "bias", "[4]", "[3]"]);
    expect(g.conv2d("c", x, w, None, causal), &["`c`", "causal padding is for sequences: conv1d"]);
    expect(g.conv2d("c", x, w, None, Conv { stride: 0, ..plain }), &["`c.patches`", "stride", "at least 1"]);
    expect(g.conv2d("c", x, w, None, Conv { dilation: 5, ..plain }), &["over [11, 11] pixels", "[8, 9]"]);
    expect(g.conv1d("c", x, w1, None, plain), &["`c`", "conv1d", "[n, time, c_in]"]);
    expect(g.conv1d("c", t, w, None, plain), &["`c`", "[k, c_in, c_out]"]);
    expect(g.patches("p", t, [2, 2], plain), &["`p`", "[n, height, width, channels]"]);
    expect(g.max_pool2d("p", x, Pool::new(10)), &["`p`", "the pool, [10, 10]", "[8, 9]"]);
    expect(
        g.mean_pool2d("p", x, Pool { size: 2, stride: 2, padding: 2 }),
        &["`p`", "padding", "smaller than the pool"],
    );
    expect(g.max_pool1d("p", x, Pool::new(2)), &["`p`", "[n, time, channels]"]);
    expect(g.upsample2d("u", x, 0), &["`u`", "factor must be at least 1"]);
    expect(g.upsample2d("u", x, usize::MAX), &["u"]);
    expect(g.sum_axis("s", x, 4), &["`s`", "[2, 8, 9, 3] has no axis 4"]);
    expect(g.mean_axis("s", x, usize::MAX), &["`s`", "no axis"]);
    expect(g.max_axis("s", ids, 0), &["`s`", "f32"]);
    expect(g.gather("g", t, w), &["`g`", "ids must be u32"]);
    expect(g.gather("g", x, ids), &["`g`", "any length instead of 3", "[2, 8]"]);
    expect(g.pad("p", x, 4, 0, 1), &["`p`", "no axis 4"]);
    expect(g.pad("p", x, 0, usize::MAX, 1), &["`p`"]);
    expect(Graph::new().conv2d("c", x, w, None, plain), &["not a value of this graph"]);
    expect(Graph::new().sum_axis("s", x, 0), &["not a value of this graph"]);
}

/// The score of one class of each row, as a loss over classes takes it; of several; and a class that there is not.
#[test]
fn elements_of_rows_by_id() {
    let mut g = Graph::new();
    let scores = g.input("scores", TensorType::f32([3, 4])).unwrap();
    let one = g.input("one", TensorType::u32([3])).unwrap();
    let two = g.input("two", TensorType::u32([3, 2])).unwrap();
    let (a, b) = (g.gather("a", scores, one).unwrap(), g.gather("b", scores, two).unwrap());
    assert_eq!((g.ty(a).shape.dims(), g.ty(b).shape.dims()), (&[3][..], &[3, 2][..]));
    let loss = g.sum("loss", b).unwrap();
    let gradient = g.gradients(loss, &[scores]).unwrap()[0];
    let given = HashMap::from([
        (scores, Array::new([3, 4], (0..12).map(f64::from).collect())),
        (one, Array::new([3], vec![2.0, 0.0, 7.0])),
        (two, Array::new([3, 2], vec![1.0, 1.0, 3.0, 0.0, 4.0, 2.0])),
    ]);
    for profile in profiles() {
        let results = run_with(&profile, &g, &given, &[a, b, gradient]);
        assert_eq!(results[0], [2.0, 4.0, 0.0]);
        assert_eq!(results[1], [1.0, 1.0, 7.0, 4.0, 0.0, 10.0]);
        assert_eq!(results[2], [0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]);
    }
}
