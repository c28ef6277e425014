//! Shapes as NumPy broadcasts them: aligned at the right, where dimensions of 1 and missing ones repeat.

use std::ops::Range;

use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::tensor::{Shape, TensorType};

/// The shape that all inputs have once they repeat.
pub(super) fn shape(inputs: &[TensorType]) -> Result<Shape, String> {
    let rank = inputs.iter().map(|t| t.shape.rank()).max().unwrap_or(0);
    let mut dims = vec![1; rank];
    for ty in inputs {
        for (to, &from) in dims.iter_mut().rev().zip(ty.shape.dims().iter().rev()) {
            if *to != from && from != 1 && *to != 1 {
                let shapes: Vec<String> = inputs.iter().map(|t| t.shape.to_string()).collect();
                return Err(format!(
                    "shapes {} do not fit: aligned at the right, dimensions must be equal or 1, and {to} is not {from}",
                    shapes.join(" and ")
                ));
            }
            *to = (*to).max(from);
        }
    }
    Ok(dims.into())
}

/// Adjacent dimensions of the output along which an operand either repeats or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    size: usize,
    repeats: bool,
}

/// Whether an operand repeats along each dimension of the output that is not 1.
fn repeats(operand: &Shape, output: &Shape) -> Vec<Block> {
    let missing = output.rank() - operand.rank();
    let dims = output.dims().iter().enumerate();
    let block =
        |(i, &size): (usize, &usize)| Block { size, repeats: i < missing || operand.dims()[i - missing] != size };
    dims.map(block).filter(|block| block.size > 1).collect()
}

/// How a kernel finds the element of an operand that belongs to an element of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// At the same index.
    Whole,
    /// There is only one.
    Scalar,
    /// It repeats over leading dimensions, each time so many elements.
    Period(usize),
    /// By the coordinates along blocks of dimensions, the innermost first: how far apart its elements are, 0 where it
    /// repeats.
    Strided(Vec<usize>),
}

/// How a kernel walks over the output and its operands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Walk {
    /// Whether quads of the output are quads of each operand, or one element four times.
    pub quads: bool,
    /// Sizes of the blocks that strided operands have in common, the innermost first.
    pub sizes: Vec<usize>,
    pub accesses: Vec<Access>,
}

impl Walk {
    pub fn new(inputs: &[TensorType], output: &Shape) -> Walk {
        let all: Vec<Vec<Block>> = inputs.iter().map(|ty| repeats(&ty.shape, output)).collect();
        let simple: Vec<Option<Access>> = all.iter().map(|blocks| Access::simple(blocks)).collect();
        let strided: Vec<usize> = (0..all.len()).filter(|&i| simple[i].is_none()).collect();
        // Dimensions become one block where no strided operand changes between repeating and not.
        let rank = if strided.is_empty() { 0 } else { all[0].len() };
        let mut ranges: Vec<Range<usize>> = vec![];
        for d in (0..rank).rev() {
            let same = |&i: &usize| all[i].get(d + 1).is_some_and(|next| next.repeats == all[i][d].repeats);
            match ranges.last_mut().filter(|_| strided.iter().all(same)) {
                Some(inner) => inner.start = d,
                None => ranges.push(d..d + 1),
            }
        }
        let size = |range: &Range<usize>| all[0][range.clone()].iter().map(|b| b.size).product();
        let sizes: Vec<usize> = ranges.iter().map(size).collect();
        let strides = |i: usize| {
            let mut next = 1;
            let stride = |(range, size): (&Range<usize>, &usize)| {
                if all[i][range.start].repeats {
                    return 0;
                }
                next *= size;
                next / size
            };
            Access::Strided(ranges.iter().zip(&sizes).map(stride).collect())
        };
        let accesses: Vec<Access> =
            simple.into_iter().enumerate().map(|(i, simple)| simple.unwrap_or_else(|| strides(i))).collect();
        let whole_quads = |access: &Access| match access {
            Access::Whole | Access::Scalar => true,
            Access::Period(n) => n.is_multiple_of(4),
            Access::Strided(_) => sizes[0].is_multiple_of(4),
        };
        Walk { quads: accesses.iter().all(whole_quads), sizes, accesses }
    }
}

impl Access {
    /// `None` if it takes coordinates.
    fn simple(blocks: &[Block]) -> Option<Access> {
        let first = blocks.iter().position(|b| !b.repeats).unwrap_or(blocks.len());
        let period = || blocks[first..].iter().map(|b| b.size).product();
        match first {
            0 if blocks.iter().all(|b| !b.repeats) => Some(Access::Whole),
            n if n == blocks.len() => Some(Access::Scalar),
            n if n > 0 && blocks[n..].iter().all(|b| !b.repeats) => Some(Access::Period(period())),
            _ => None,
        }
    }
}

/// The array with its elements repeated up to the shape of the output.
pub(super) fn repeated(array: &Array, output: &Shape) -> Array {
    if array.shape == *output {
        return array.clone();
    }
    let missing = output.rank() - array.shape.rank();
    let mut strides = vec![0; output.rank()];
    let mut stride = 1;
    for (i, &size) in array.shape.dims().iter().enumerate().rev() {
        strides[missing + i] = if size == 1 { 0 } else { stride };
        stride *= size;
    }
    let element = |mut index: usize| {
        let mut at = 0;
        for (size, stride) in output.dims().iter().zip(&strides).rev() {
            at += index % size * stride;
            index /= size;
        }
        array.data[at]
    };
    Array::new(output.clone(), (0..output.len()).map(element).collect())
}

/// Sums a gradient over the dimensions along which an operand of this shape repeats.
pub(super) fn sum_repeats(graph: &mut Graph, name: &str, gradient: Value, to: &Shape) -> Result<Value> {
    let full = graph.ty(gradient).shape.clone();
    if full == *to {
        return Ok(gradient);
    }
    if to.dims() == [1] || full.dims().ends_with(to.dims()) {
        return graph.sum_to(name, gradient, to.clone());
    }
    let mut blocks: Vec<Block> = vec![];
    for block in repeats(to, &full) {
        match blocks.last_mut().filter(|last| last.repeats == block.repeats) {
            Some(last) => last.size *= block.size,
            None => blocks.push(block),
        }
    }
    let dims: Vec<usize> = blocks.iter().map(|block| block.size).collect();
    let mut sum = graph.reshape(&format!("{name}.blocks"), gradient, dims)?;
    for axis in (0..blocks.len()).rev().filter(|&axis| blocks[axis].repeats) {
        sum = graph.sum_axis(name, sum, axis)?;
    }
    match graph.ty(sum).shape == *to {
        true => Ok(sum),
        false => graph.reshape(&format!("{name}.shape"), sum, to.clone()),
    }
}
