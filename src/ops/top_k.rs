//! The likeliest tokens of each row of logits, so that sampling reads back a few words and not a whole vocabulary.
//!
//! Logits are ordered by [`f32::total_cmp`], so -0 comes after 0; equal ones are ordered by id. NaN counts as negative
//! infinity in this order, and makes the sum of its row NaN.

use super::cases::{Case, InputFill, Row};
use super::checks::expect_f32;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::profile::AdapterClass;
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/top_k.wgsl");

/// The largest `k` that the op supports.
pub const MAX_K: usize = 64;

pub(super) const ROW: Row = Row {
    name: "top_k",
    summary: "the k largest logits by row, their ids, and log(sum(exp((x - max) / temperature))) of the whole row",
    sources: &[SOURCE],
    cases,
    bench: || vec![case(1, 49_152, 64, 0.8), case(8, 151_936, 64, 0.8)],
};

fn cases() -> Vec<Case> {
    let ties = |rows, n, k, below| {
        let mut case = case(rows, n, k, 0.5).fill(0, InputFill::Below(below));
        case.name += &format!(", {below} values");
        case
    };
    vec![
        case(1, 1, 1, 1.0),
        case(3, 7, 7, 0.7),
        case(127, 12, 3, 1.3),
        case(5, 64, 64, 1.0),
        case(2, 1757, 40, 0.1),
        case(3, 4099, 64, 2.0),
        case(1, 5001, 1, 0.0),
        case(70_001, 2, 1, 1.0),
        case(1, 50_257, 5, 0.8),
        case(2, 20_000, 64, 100.0),
        ties(1, 1, 1, 1),
        ties(4, 1030, 64, 3),
        ties(2, 3333, 64, 1),
        ties(1, 30_002, 50, 200),
        by_row(3, 1757, 40, &[0.1, 2.0, 0.0]),
        by_row(5, 7, 7, &[0.7, 1.0]),
    ]
}

fn case(rows: usize, n: usize, k: usize, temperature: f64) -> Case {
    let op = TopK { k };
    let case = Case::new(format!("{k} of {rows}x{n} at {temperature}"), op, &[&[rows, n], &[1]]).forward_only();
    // Values and ids are exact. The tolerance is tighter than the default so that no id can be mistaken for another.
    case.fill(0, InputFill::Normal(3.0)).fill(1, InputFill::Constant(temperature)).tolerance(1e-12)
}

/// With one temperature per row, which repeat if there are more rows.
fn by_row(rows: usize, n: usize, k: usize, temperatures: &'static [f64]) -> Case {
    let name = format!("{k} of {rows}x{n} at {temperatures:?}");
    let case = Case::new(name, TopK { k }, &[&[rows, n], &[rows]]).forward_only();
    case.fill(0, InputFill::Normal(3.0)).fill(1, InputFill::Values(temperatures)).tolerance(1e-12)
}

/// `(logits, temperature) -> (values, ids, lse)`: f32 `[.., n]`, f32 `[1]` or `[rows]` to f32 `[rows, k]`, u32
/// `[rows, k]`, f32 `[rows]`.
///
/// `values` and `ids` are the `k` largest logits of each row in descending order, the lower id first among equals.
/// `lse` is `ln(sum(exp((x - values[0]) / temperature)))` over all `n` elements of the row, so the probability of a
/// token is `exp((value - values[0]) / temperature - lse)`. At a temperature of 0 it is the log of the number of tokens
/// that share first place. `lse` is accurate to about 1e-6 for logits within 1e38, and NaN if the row has a NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopK {
    /// How many tokens to find: at most [`MAX_K`] and at most `n`.
    pub k: usize,
}

impl Graph {
    /// The `k` likeliest tokens of each row of `logits`, `[.., n]`, and what it takes to compute their probabilities at
    /// this `temperature`, `[1]` or `[rows]`: values `[rows, k]`, ids u32 `[rows, k]` and lse `[rows]`, as defined by
    /// [`TopK`].
    ///
    /// Use it at the end of a decoder, and pass the three results to
    /// [`Sampling::draw_from`](crate::decode::sample::Sampling::draw_from).
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let logits = g.input("logits", TensorType::f32([4, 49_152]))?;
    /// let temperature = g.input("temperature", TensorType::f32([1]))?;
    /// let [values, ids, lse] = g.top_k("top", logits, temperature, 64)?;
    /// assert_eq!(g.ty(values), &TensorType::f32([4, 64]));
    /// assert_eq!(g.ty(ids), &TensorType::u32([4, 64]));
    /// assert_eq!(g.ty(lse), &TensorType::f32([4]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn top_k(&mut self, name: &str, logits: Value, temperature: Value, k: usize) -> Result<[Value; 3]> {
        let outputs = self.op(name, TopK { k }, &[logits, temperature])?;
        Ok([outputs[0], outputs[1], outputs[2]])
    }
}

/// The most elements that a workgroup sorts on GPUs: 8 KiB with their ids.
const MAX_SIZE: usize = 1024;

impl TopK {
    fn kernel(&self, cx: &Launch<'_>, entry: &'static str) -> Kernel {
        table_kernel::<Self>("top_k", SOURCE, entry).knob("K", self.k as u32).knob("BY_ROW", cx.inputs[1].len() > 1)
    }

    /// About sqrt(n) chunks of about sqrt(n) elements, so that finding the best chunk costs as much as searching it.
    fn launch_chunks(&self, cx: &Launch<'_>, rows: usize, n: usize) -> Result<Program, String> {
        let chunks = n.isqrt().next_multiple_of(4);
        // Rows need not start at a quad.
        let span = ((n + 6) / 4).div_ceil(chunks);
        // To pick an element takes a pass over the chunks, and one over the elements of its chunk.
        cx.profile.quirks.check_loops("the length of a row", n, self.k * (chunks / 4 + span + 3) + chunks / 4)?;
        let words = [rows, n, chunks, span].map(|w| w as u32);
        let mut program = Program::default();
        let [keys, places] = [0, 1].map(|_| program.scratch(TensorType::u32([rows * chunks])));
        let sums = program.scratch(TensorType::f32([rows * chunks]));
        let group = cx.profile.vector_lanes().0;
        let kernel = |entry| self.kernel(cx, entry).knob("GROUP", group as u32);
        let found = [Bind::Scratch(keys), Bind::Scratch(places)];
        let binds = [&[Bind::In(0), Bind::In(1)], &found[..], &[Bind::Scratch(sums)]].concat();
        program.dispatch(kernel("chunks"), &binds, &words, cx.profile.grid((rows * chunks).div_ceil(group)));
        let outs = [Bind::ScratchIn(sums), Bind::Out(0), Bind::Out(1), Bind::Out(2)];
        let binds = [&[Bind::In(0), Bind::In(1)], &found[..], &outs].concat();
        program.dispatch(kernel("pick"), &binds, &words, cx.profile.grid(rows.div_ceil(group)));
        Ok(program)
    }

    /// Levels of workgroups that each keep `k` elements, until there is one workgroup per row.
    fn launch_sorted(&self, cx: &Launch<'_>, rows: usize, n: usize) -> Program {
        let mut program = Program::default();
        let mut from = [Bind::In(0), Bind::Null, Bind::Null];
        let mut len = n;
        for level in 0.. {
            let size = len.next_power_of_two().clamp(self.k.next_power_of_two().max(2), MAX_SIZE);
            // After the first level, whole groups of `k` that earlier workgroups kept.
            let span = if level == 0 { size } else { size / self.k * self.k };
            let groups = len.div_ceil(span);
            let to = match groups {
                1 => [Bind::Out(0), Bind::Out(1), Bind::Out(2)],
                _ => [
                    Bind::Scratch(program.scratch(TensorType::u32([rows * groups * self.k]))),
                    Bind::Scratch(program.scratch(TensorType::u32([rows * groups * self.k]))),
                    Bind::Scratch(program.scratch(TensorType::f32([rows * groups]))),
                ],
            };
            let kernel = (self.kernel(cx, "sorted"))
                .knob("GROUP", (size / 4).max(32) as u32)
                .knob("SIZE", size as u32)
                .knob("FIRST", level == 0)
                .knob("LAST", groups == 1);
            let binds = [from[0], Bind::In(1), from[1], from[2], to[0], to[1], to[2]];
            let words = [rows, len, groups, span].map(|w| w as u32);
            program.dispatch(kernel, &binds, &words, cx.profile.grid(rows * groups));
            if groups == 1 {
                break;
            }
            from = to.map(|bind| if let Bind::Scratch(i) = bind { Bind::ScratchIn(i) } else { bind });
            len = groups * self.k;
        }
        program
    }
}

impl Op for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2)?;
        let (rows, n) = (inputs[0].shape.rows(), inputs[0].shape.cols());
        if inputs[1].shape.dims() != [1] && inputs[1].shape.dims() != [rows] {
            return Err(format!("temperature must have shape [1] or [{rows}], got {}", inputs[1].shape));
        }
        if self.k == 0 || self.k > MAX_K.min(n) {
            return Err(format!("k must be 1 to {} for rows of {n}, got {}", MAX_K.min(n), self.k));
        }
        Ok(vec![TensorType::f32([rows, self.k]), TensorType::u32([rows, self.k]), TensorType::f32([rows])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("top_k is for sampling: ids have no gradient"))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (rows, n) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
        match cx.profile.class {
            AdapterClass::Cpu => self.launch_chunks(cx, rows, n),
            AdapterClass::Gpu => Ok(self.launch_sorted(cx, rows, n)),
        }
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (mut values, mut ids, mut lse) = (vec![], vec![], vec![]);
        let temperatures = &inputs[1].data;
        for (i, row) in inputs[0].rows().enumerate() {
            let divisor = temperatures[i % temperatures.len()].clamp(1e-30, 1e30);
            let odd = row.iter().any(|x| x.is_nan());
            let row: Vec<f64> = row.iter().map(|&x| if x.is_nan() { f64::NEG_INFINITY } else { x }).collect();
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            values.extend(order[..self.k].iter().map(|&i| row[i]));
            ids.extend(order[..self.k].iter().map(|&i| i as f64));
            let bounded = |x: f64| x.clamp(-1e38, 1e38);
            let weight = |&x: &f64| ((bounded(x) - bounded(row[order[0]])) / divisor).exp();
            lse.push(if odd { f64::NAN } else { row.iter().map(weight).sum::<f64>().ln() });
        }
        let arrays = outputs.iter().zip([values, ids, lse]);
        arrays.map(|(ty, data)| Array::new(ty.shape.clone(), data)).collect()
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        4 * inputs[0].len() as u64
    }

    fn stays_f32(&self, _output: usize) -> bool {
        true
    }
}
