//! Softmax and cross-entropy in one op: the mean over rows of `logsumexp(logits) - logits[target]`, in nats. Backward:
//! `(softmax(logits) - onehot(target)) * dloss / rows`.
//!
//! Rows whose target is not a class (`target >= classes`) are ignored, in the loss and in the mean. Use
//! [`IGNORE_INDEX`](crate::train::data::IGNORE_INDEX), `u32::MAX`, as the target of such positions.
//!
//! The mean over rows of which never all logits exist at once is made of [`CrossEntropySum`]s: see
//! [`Graph::cross_entropy_in_chunks`].

use super::cases::{Case, InputFill, Row};
use super::checks::expect_f32;
use super::rowwise::RowLayout;
use super::source::{LaneSource, lane_source};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::tensor::{DType, TensorType};

const SOURCE: LaneSource = lane_source!("common/rows.wgsl", "cross_entropy.wgsl");

pub(super) const ROW: Row = Row {
    name: "cross_entropy",
    summary: "loss = mean over rows of logsumexp(logits) - logits[target]",
    sources: &[SOURCE.plain],
    cases: || {
        let case = |rows: usize, classes: usize, ids: u32| {
            let case = Case::new(format!("{rows}x{classes}, targets below {ids}"), CrossEntropy, &[&[rows, classes]]);
            case.fill(0, InputFill::Normal(3.0)).ids(&[rows], ids)
        };
        // Some targets are beyond the classes, so their rows are ignored; in the last case, all are.
        let mut cases = vec![
            case(1, 1, 1),
            case(127, 63, 63),
            case(33, 65, 80),
            case(5, 1757, 1757),
            case(96, 64, 64),
            case(67, 2, 3),
            case(131, 3, 4),
            case(7, 1025, 1025),
            case(2, 20_000, 20_000),
        ];
        let ignored = Case::new("all ignored", CrossEntropy, &[&[5, 12]]).ids(&[5], 1);
        cases.push(ignored.fill(1, InputFill::Constant(4_294_967_040.0)));
        for (rows, classes, ids) in [(33, 65, 80), (7, 1025, 1025), (131, 3, 4)] {
            let case = Case::new(format!("sum of {rows}x{classes}"), CrossEntropySum, &[&[rows, classes]]);
            cases.push(case.fill(0, InputFill::Normal(3.0)).ids(&[rows], ids));
        }
        for (rows, classes, ids) in [(1, 5, 3), (33, 65, 80), (1757, 2, 3), (127, 9, 9)] {
            let share = Case::new(format!("share of {rows} targets below {ids}"), TargetShare { classes }, &[]);
            cases.push(share.ids(&[rows], ids).forward_only());
        }
        cases.push(Case::new("no targets", TargetShare { classes: 5 }, &[]).ids(&[3, 4], 1).forward_only());
        let last = cases.len() - 1;
        cases[last].inputs[0].fill = InputFill::Constant(4_294_967_040.0);
        cases
    },
    bench: || {
        let case = |r: usize, c: usize| Case::new(format!("{r}x{c}"), CrossEntropy, &[&[r, c]]).ids(&[r], c as u32);
        vec![case(1024, 65), case(256, 50_257)]
    },
};

/// `(logits, targets) -> (loss, lse, weight)`: `[.., classes], u32 [..] -> [1], [rows], [1]`. `lse` is the log of the
/// sum of exponentials of each row; `weight` is one over the number of rows that count.
///
/// [`Graph::cross_entropy`] returns only `loss`.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy;

/// `(logits, targets, lse, weight, dloss) -> dlogits`: the gradient of [`CrossEntropy`]. It takes the place of the
/// logits, the largest tensor of a language model's step, unless something reads those afterwards.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyBackward;

/// `(logits, targets) -> (sum, lse)`: `[.., classes], u32 [..] -> [1], [rows]`: the sum over the rows whose target is a
/// class, where [`CrossEntropy`] has their mean. For losses that are put together from several: a plan computes each
/// right before its gradient.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropySum;

/// `(logits, targets, lse, dsum) -> dlogits`, in place of the logits: the gradient of [`CrossEntropySum`].
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropySumBackward;

/// `targets -> share`: `u32 [..] -> [1]`, one over the number of targets that are a class, or 1 if none is: the factor
/// from sums to a mean.
#[derive(Clone, Copy, Debug)]
pub struct TargetShare {
    /// Number of classes.
    pub classes: usize,
}

impl Graph {
    /// Mean cross-entropy in nats: `logits` `[.., classes]`, `targets` u32 `[..]`, loss `[1]`.
    ///
    /// This is the loss of a language model, with the next tokens as targets, and of classifiers. Rows whose target is
    /// not a class are ignored; trainers take only [`IGNORE_INDEX`](crate::train::data::IGNORE_INDEX) for that.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let logits = g.input("logits", TensorType::f32([4, 128, 50_257]))?;
    /// let targets = g.input("targets", TensorType::u32([4, 128]))?;
    /// let loss = g.cross_entropy("loss", logits, targets)?;
    /// assert_eq!(g.ty(loss), &TensorType::f32([1]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn cross_entropy(&mut self, name: &str, logits: Value, targets: Value) -> Result<Value> {
        self.op1(name, CrossEntropy, &[logits, targets])
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let rows = check(inputs)?;
        Ok(vec![TensorType::f32([1]), TensorType::f32([rows]), TensorType::f32([1])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.inputs[0], cx.inputs[1], cx.outputs[1], cx.outputs[2], cx.dy0()?];
        let dlogits = cx.graph.op1(&cx.name, CrossEntropyBackward, &inputs)?;
        cx.set(0, dlogits);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        forward::<Self>(cx, "finish", &[Bind::Out(0), Bind::Out(2)])
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (loss, lse, count) = reference(inputs);
        let weight = 1.0 / count.max(1.0);
        vec![one(loss * weight), Array::new(outputs[1].shape.clone(), lse), one(weight)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }
}

impl Op for CrossEntropyBackward {
    fn name(&self) -> &'static str {
        "cross_entropy_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [logits, targets, lse, weight, dloss] = inputs else {
            return Err(format!("takes 5 inputs, got {}", inputs.len()));
        };
        let forward = CrossEntropy.infer(&[logits.clone(), targets.clone()])?;
        match [dloss, lse, weight].into_iter().eq(&forward) {
            true => Ok(vec![logits.clone()]),
            false => Err(format!("loss, lse and weight must be those of {logits}, got {dloss}, {lse}, {weight}")),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of the loss are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        backward::<Self>(cx, Bind::In(4), Bind::In(3))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![reference_backward(inputs, inputs[3].data[0] * inputs[4].data[0])]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(0)
    }
}

impl Op for CrossEntropySum {
    fn name(&self) -> &'static str {
        "cross_entropy_sum"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let rows = check(inputs)?;
        Ok(vec![TensorType::f32([1]), TensorType::f32([rows])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.inputs[0], cx.inputs[1], cx.outputs[1], cx.dy0()?];
        let dlogits = cx.graph.op1(&cx.name, CrossEntropySumBackward, &inputs)?;
        cx.set(0, dlogits);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        forward::<Self>(cx, "finish_sum", &[Bind::Out(0)])
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (loss, lse, _) = reference(inputs);
        vec![one(loss), Array::new(outputs[1].shape.clone(), lse)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }

    fn runs_late(&self) -> bool {
        true
    }
}

impl Op for CrossEntropySumBackward {
    fn name(&self) -> &'static str {
        "cross_entropy_sum_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [logits, targets, lse, dsum] = inputs else { return Err(format!("takes 4 inputs, got {}", inputs.len())) };
        let forward = CrossEntropySum.infer(&[logits.clone(), targets.clone()])?;
        match [dsum, lse].into_iter().eq(&forward) {
            true => Ok(vec![logits.clone()]),
            false => Err(format!("sum and lse must be those of {logits}, got {dsum}, {lse}")),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of the loss are not implemented"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        backward::<Self>(cx, Bind::In(3), Bind::Null)
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![reference_backward(inputs, inputs[3].data[0])]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(0)
    }
}

impl Op for TargetShare {
    fn name(&self) -> &'static str {
        "target_share"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [targets] if targets.dtype == DType::U32 => Ok(vec![TensorType::f32([1])]),
            _ => Err("takes targets, which are u32".into()),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        cx.set_zero(0);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let rows = cx.inputs[0].len();
        let whole = RowLayout::whole(cx);
        cx.profile.quirks.check_loops("the number of targets", rows, rows / whole.lanes + 64)?;
        let kernel = whole.kernel::<Self>("cross_entropy", SOURCE, "share");
        let words = [rows, self.classes, 1].map(|w| w as u32);
        Ok(Program::one(kernel, &[Bind::In(0), Bind::Out(0)], &words, [1, 1, 1]))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let count = inputs[0].data.iter().filter(|&&target| target < self.classes as f64).count();
        vec![one(1.0 / count.max(1) as f64)]
    }
}

/// Checks logits and targets, and returns the number of rows.
fn check(inputs: &[TensorType]) -> Result<usize, String> {
    let [logits, targets] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
    expect_f32(&inputs[..1], 1)?;
    let rows = logits.shape.rows();
    if targets.dtype != DType::U32 || targets.len() != rows {
        return Err(format!("targets must be {rows} u32 ids, one for each row of logits"));
    }
    // Kernels compare class indices as f32, which is exact up to 2^24.
    if logits.shape.cols() > (1 << 24) - 4 {
        return Err(format!("at most 2^24 - 4 classes, got {}", logits.shape.cols()));
    }
    Ok(rows)
}

/// The program of the loss. `finish` is what makes these outputs of the losses of rows.
fn forward<O: Op>(cx: &Launch<'_>, finish: &'static str, outputs: &[Bind]) -> Result<Program, String> {
    let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
    let (kernel, layout) = kernel::<O>(cx, "forward")?;
    let mut program = Program::default();
    let losses = program.scratch(TensorType::f32([rows, 2]));
    let words = [rows, cols, layout.groups].map(|w| w as u32);
    let binds = [Bind::In(0), Bind::In(1), Bind::Out(1), Bind::Scratch(losses)];
    program.dispatch(kernel, &binds, &words, cx.profile.grid(layout.groups));
    let whole = RowLayout::whole(cx);
    cx.profile.quirks.check_loops("the number of rows", rows, rows / whole.lanes + 64)?;
    let finish = whole.kernel::<O>("cross_entropy", SOURCE, finish);
    program.dispatch(finish, &[&[Bind::ScratchIn(losses)], outputs].concat(), &words, [1, 1, 1]);
    Ok(program)
}

/// The program of the gradient, with the weight if the loss is a mean.
fn backward<O: Op>(cx: &Launch<'_>, dloss: Bind, weight: Bind) -> Result<Program, String> {
    let (kernel, layout) = kernel::<O>(cx, "backward")?;
    let binds = [Bind::Out(0), Bind::In(1), Bind::In(2), weight, dloss];
    let words = [cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols(), layout.groups].map(|w| w as u32);
    let kernel = kernel.knob("MEAN", weight != Bind::Null);
    Ok(Program::one(kernel, &binds, &words, cx.profile.grid(layout.groups)))
}

/// The sum of the losses of logits and targets, the log of the sum of exponentials of each row, and the number of rows
/// that count.
fn reference(inputs: &[&Array]) -> (f64, Vec<f64>, f64) {
    let (mut lse, mut loss, mut count) = (vec![], 0.0, 0.0f64);
    for (row, target) in inputs[0].rows().zip(&inputs[1].data) {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        lse.push(max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln());
        if let Some(score) = row.get(*target as usize) {
            loss += lse[lse.len() - 1] - score;
            count += 1.0;
        }
    }
    (loss, lse, count)
}

/// The gradient of logits, given them, the targets and `lse`, where the loss has the sum times `scale`.
fn reference_backward(inputs: &[&Array], scale: f64) -> Array {
    let (logits, targets, lse) = (inputs[0], inputs[1], inputs[2]);
    let mut dlogits = vec![];
    for ((row, target), lse) in logits.rows().zip(&targets.data).zip(&lse.data) {
        let scale = if (*target as usize) < row.len() { scale } else { 0.0 };
        let hit = |c: usize| f64::from(u8::from(c as f64 == *target));
        dlogits.extend(row.iter().enumerate().map(|(c, v)| ((v - lse).exp() - hit(c)) * scale));
    }
    Array::new(logits.shape.clone(), dlogits)
}

fn one(x: f64) -> Array {
    Array::new([1], vec![x])
}

/// A quad then holds columns of at most two rows. With fewer than three columns it could hold more, so those use single
/// elements.
fn kernel<O: Op>(cx: &Launch<'_>, entry: &'static str) -> Result<(Kernel, RowLayout), String> {
    let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
    let (width, offsets) = if cols < 3 { (1, "0.0") } else { (4, "vec4<f32>(0.0, 1.0, 2.0, 3.0)") };
    let mut layout = RowLayout::independent(cx, rows, cols.next_multiple_of(width), 1);
    layout.width = width;
    layout.check(cx, cols, 1)?;
    let kernel = layout.kernel::<O>("cross_entropy", SOURCE, entry).knob("OFFSETS", offsets);
    Ok((kernel.knob("RAGGED", !cols.is_multiple_of(width)), layout))
}
