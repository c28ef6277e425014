//! Softmax and cross-entropy in one op: the mean over rows of `logsumexp(logits) - logits[target]`, in nats. Backward:
//! `(softmax(logits) - onehot(target)) * dloss / rows`.
//!
//! Rows whose target is not a class (`target >= classes`) are ignored, in the loss and in the mean. Use
//! [`IGNORE_INDEX`](crate::train::data::IGNORE_INDEX), `u32::MAX`, as the target of such positions.

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
        let [logits, targets] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        expect_f32(&inputs[..1], 1)?;
        if targets.dtype != DType::U32 || targets.len() != logits.shape.rows() {
            return Err(format!("targets must be {} u32 ids, one for each row of logits", logits.shape.rows()));
        }
        // Kernels compare class indices as f32, which is exact up to 2^24.
        if logits.shape.cols() > (1 << 24) - 4 {
            return Err(format!("at most 2^24 - 4 classes, got {}", logits.shape.cols()));
        }
        Ok(vec![TensorType::f32([1]), TensorType::f32([logits.shape.rows()]), TensorType::f32([1])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let inputs = [cx.inputs[0], cx.inputs[1], cx.outputs[1], cx.outputs[2], cx.dy0()?];
        let dlogits = cx.graph.op1(&cx.name, CrossEntropyBackward, &inputs)?;
        cx.set(0, dlogits);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (rows, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
        let (kernel, layout) = kernel::<Self>(cx, "forward")?;
        let mut program = Program::default();
        let losses = program.scratch(TensorType::f32([rows, 2]));
        let words = [rows, cols, layout.groups].map(|w| w as u32);
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(1), Bind::Scratch(losses)];
        program.dispatch(kernel, &binds, &words, cx.profile.grid(layout.groups));
        let whole = RowLayout::whole(cx);
        cx.profile.quirks.check_loops("the number of rows", rows, rows / whole.lanes + 64)?;
        let finish = whole.kernel::<Self>("cross_entropy", SOURCE, "finish");
        let binds = [Bind::ScratchIn(losses), Bind::Out(0), Bind::Out(2)];
        program.dispatch(finish, &binds, &words, [1, 1, 1]);
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (mut lse, mut loss, mut count) = (vec![], 0.0, 0.0f64);
        for (row, target) in inputs[0].rows().zip(&inputs[1].data) {
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            lse.push(max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln());
            if let Some(score) = row.get(*target as usize) {
                loss += lse[lse.len() - 1] - score;
                count += 1.0;
            }
        }
        let weight = 1.0 / count.max(1.0);
        let one = |x: f64| Array::new([1], vec![x]);
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
        let (kernel, layout) = kernel::<Self>(cx, "backward")?;
        let binds = [Bind::Out(0), Bind::In(1), Bind::In(2), Bind::In(3), Bind::In(4)];
        let words = [cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols(), layout.groups].map(|w| w as u32);
        Ok(Program::one(kernel, &binds, &words, cx.profile.grid(layout.groups)))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        let (logits, targets, lse) = (inputs[0], inputs[1], inputs[2]);
        let scale = inputs[3].data[0] * inputs[4].data[0];
        let mut dlogits = vec![];
        for ((row, target), lse) in logits.rows().zip(&targets.data).zip(&lse.data) {
            let scale = if (*target as usize) < row.len() { scale } else { 0.0 };
            let hit = |c: usize| f64::from(u8::from(c as f64 == *target));
            dlogits.extend(row.iter().enumerate().map(|(c, v)| ((v - lse).exp() - hit(c)) * scale));
        }
        vec![Array::new(logits.shape.clone(), dlogits)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        Some(0)
    }
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
