//! Rows of a table by token id, and the gradient of the table.
//!
//! `y[t] = table[ids[t] - first]`, where `first` is 0 except for tables that are parts of a larger one. An id without a
//! row gives a row of zeros and passes no gradient, so such ids can serve as padding. Backward, `dtable[v]` is the sum
//! of `dy[t]` where `ids[t] = first + v`, added in a fixed order: the same bits on every run.

use std::sync::Arc;

use super::cases::{Case, InputFill, Row};
use super::checks::{expect_f32, expect_ids, expect_shape};
use super::elementwise;
use super::source::table_kernel;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::profile::AdapterClass;
use crate::quirks::LOOP_ITERATIONS;
use crate::tensor::TensorType;

const SOURCE: &str = include_str!("../../shaders/embedding.wgsl");

pub(super) const ROW: Row = Row {
    name: "embedding",
    summary: "y[t] = table[ids[t] - first]; ids out of range give zeros",
    sources: &[SOURCE],
    cases: || {
        // The last number bounds the ids: above the vocabulary, some are out of range.
        let forward = |table: &[usize; 2], ids: &[usize], below: u32| {
            Case::new(format!("{table:?} by {ids:?} below {below}"), Embedding::default(), &[table]).ids(ids, below)
        };
        let backward = |vocab: usize, dy: &[usize], below: u32, accumulate: bool| {
            let name = format!("backward {vocab} from {dy:?} below {below}, accumulate {accumulate}");
            let (ids, cols) = (&dy[..dy.len() - 1], dy[dy.len() - 1]);
            let case = Case::new(name, EmbeddingBackward { vocab, first: 0, accumulate }, &[dy]).ids(ids, below);
            if accumulate { case.also(&[vocab, cols]) } else { case }
        };
        // A table whose first row has id 20, so that ids fall before it, in it and after it.
        let part = |cols: usize| {
            Case::new(format!("part of {cols} columns"), Embedding { first: 20 }, &[&[33, cols]]).ids(&[3, 50], 70)
        };
        let part_backward = EmbeddingBackward { vocab: 63, first: 20, accumulate: true };
        let part_backward = Case::new("part, backward by token", part_backward, &[&[40, 8]]).ids(&[40], 100);
        // One id for most tokens: on GPUs its list is cut into many pieces. 99 has no row.
        let frequent = |vocab: usize, dy: &[usize], ids: &'static [f64], accumulate: bool| {
            let case = backward(vocab, dy, 1, accumulate);
            let name = format!("{}, mostly one", case.name);
            Case { name, ..case.fill(1, InputFill::Values(ids)) }
        };
        vec![
            forward(&[1, 1], &[1], 1),
            forward(&[63, 12], &[2, 127], 63),
            forward(&[127, 7], &[33], 140),
            forward(&[5, 64], &[2, 3, 5], 6),
            forward(&[1757, 4], &[9], 1757),
            forward(&[2, 3], &[130], 2),
            backward(63, &[127, 12], 70, true),
            backward(300, &[5, 7, 8], 310, true),
            backward(40, &[33, 5], 50, true),
            backward(300, &[35, 3], 300, true),
            backward(5000, &[1, 1], 5000, false),
            backward(2, &[1100, 2048], 1, false), // a list too long to follow for 64 columns
            part(8),
            part(5),
            part_backward.also(&[63, 8]),
            frequent(9, &[1757, 12], &[4.0, 4.0, 8.0, 4.0, 4.0, 4.0, 0.0, 4.0], false),
            frequent(9, &[3, 331, 5], &[99.0, 99.0, 99.0, 1.0, 2.0, 99.0, 1.0], true),
            frequent(2000, &[1027, 8], &[1999.0, 1999.0, 5.0, 1999.0, 99.0], true),
            backward(65, &[640, 4], 70, false),
        ]
    },
    bench: || {
        let forward = |vocab: usize, cols: usize, tokens: usize| {
            Case::new(format!("{vocab}x{cols} by {tokens}"), Embedding::default(), &[&[vocab, cols]])
                .ids(&[tokens], vocab as u32)
        };
        let backward = |vocab: usize, cols: usize, tokens: usize| {
            let op = EmbeddingBackward { vocab, first: 0, accumulate: true };
            Case::new(format!("backward {vocab}x{cols} by {tokens}"), op, &[&[tokens, cols]])
                .ids(&[tokens], vocab as u32)
                .also(&[vocab, cols])
        };
        let op = EmbeddingBackward { vocab: 65, first: 0, accumulate: false };
        let text = Case::new("backward 65x384 by 16384 of a text", op, &[&[16_384, 384]]).ids(&[16_384], 65);
        let text = text.fill(1, InputFill::Values(&LETTERS));
        vec![forward(50_257, 384, 1024), backward(65, 384, 4096), backward(50_257, 384, 1024), text]
    },
};

/// Ids of a character-level model: few, and some of them frequent.
const LETTERS: [f64; 70] = {
    let text = b"the rows of a table are looked up by the letters of a sentence like it.";
    let mut ids = [0.0; 70];
    let mut i = 0;
    while i < ids.len() {
        ids[i] = (text[i] % 65) as f64;
        i += 1;
    }
    ids
};

/// `(table, ids) -> table[ids - first]`: `[vocab, d], u32 [..] -> [.., d]`. Zeros for ids without a row.
///
/// Usually added by [`Graph::embedding`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Embedding {
    /// Id of the table's first row: 0 unless the table is a part of a larger one.
    pub first: usize,
}

/// `(dy, ids [, base]) -> dtable [+ base]`: `[.., d], u32 [..] [, [vocab, d]] -> [vocab, d]`. Rows that no id refers to
/// are zero, or those of `base`. The gradient of [`Embedding`].
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingBackward {
    vocab: usize,
    first: usize,
    accumulate: bool,
}

impl Graph {
    /// Looks up rows of a table by id: `table` `[vocab, d]`, `ids` u32 `[..]`, result `[.., d]`.
    ///
    /// Ids of `vocab` or more give zeros and pass no gradient; trainers take only
    /// [`IGNORE_INDEX`](crate::train::data::IGNORE_INDEX) for that. A table larger than the device's binding limit needs
    /// [`embedding_parts`](Self::embedding_parts).
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let table = g.param("tokens", [50_257, 768])?;
    /// let ids = g.input("ids", TensorType::u32([4, 128]))?;
    /// let x = g.embedding("x", table, ids)?;
    /// assert_eq!(g.ty(x), &TensorType::f32([4, 128, 768]));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn embedding(&mut self, name: &str, table: Value, ids: Value) -> Result<Value> {
        self.op1(name, Embedding::default(), &[table, ids])
    }
}

/// Tokens that an invocation of a GPU sums at most.
const PIECE: usize = 32;

/// Invocations of a workgroup that sorts tokens, and how many of those share a token.
const SORT_GROUP: usize = 256;
const SORT_SLICES: usize = 4;

/// Checks that the ids of all rows fit a u32.
pub(super) fn expect_rows(first: usize, rows: usize) -> Result<(), String> {
    match first.checked_add(rows).is_some_and(|end| end <= u32::MAX as usize) {
        true => Ok(()),
        false => Err(format!("{rows} rows from id {first} are more than a u32 counts")),
    }
}

/// The row of an id in the reference's table; out of range if the id has none.
pub(super) fn row_of(id: f64, first: usize) -> usize {
    (id as usize).wrapping_sub(first)
}

/// The kernel with its element type set, and the number of columns in units of that type.
fn element<O: Op>(entry: &'static str, cols: usize) -> (crate::kernel::Kernel, usize) {
    let (elem, width) = if cols.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) };
    (table_kernel::<O>("embedding", SOURCE, entry).knob("E", elem), cols / width)
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [table, ids] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        expect_f32(std::slice::from_ref(table), 1)?;
        expect_ids(ids)?;
        let [_, cols] = table.shape.dims() else {
            return Err(format!("the table must have shape [vocab, d], got {}", table.shape));
        };
        expect_rows(self.first, table.shape.rows())?;
        Ok(vec![TensorType::f32([ids.shape.dims(), &[*cols]].concat())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let vocab = cx.graph.ty(cx.inputs[0]).shape.dims()[0];
        let op = EmbeddingBackward { vocab, first: self.first, accumulate: false };
        let dtable = cx.graph.op1(&cx.name, op, &[dy, cx.inputs[1]])?;
        cx.set(0, dtable);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (vocab, cols) = (cx.inputs[0].shape.rows(), cx.inputs[0].shape.cols());
        let tokens = cx.inputs[1].len();
        let (kernel, cols) = element::<Self>("forward", cols);
        let len = tokens * cols;
        let words = [len, cols, vocab, tokens, self.first, 0].map(|w| w as u32);
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(0)];
        let (kernel, groups) = elementwise::spread(cx.profile, len, kernel);
        Ok(Program::one(kernel, &binds, &words, groups))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (table, ids) = (inputs[0], inputs[1]);
        let zeros = vec![0.0; table.shape.cols()];
        let rows: Vec<&[f64]> = table.rows().collect();
        let row = |&id: &f64| *rows.get(row_of(id, self.first)).unwrap_or(&&zeros[..]);
        let data = ids.data.iter().flat_map(row).copied().collect();
        vec![Array::new(outputs[0].shape.clone(), data)]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        // Only the rows that are looked up move, not the whole table.
        (inputs[1].bytes() + 2 * outputs[0].bytes()) as u64
    }
}

impl EmbeddingBackward {
    /// The program for software adapters: the tokens of each id are linked into a list, and each list is walked.
    fn by_lists(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let tokens = cx.inputs[1].len();
        // If few rows of a large table change, visiting all rows would cost more than the update itself.
        let by_token = self.accumulate && tokens < self.vocab;
        let (kernel, cols) = element::<Self>("backward", cx.inputs[0].shape.cols());
        let len = if by_token { tokens } else { self.vocab } * cols;
        let words = self.words(len, cols, tokens, 0);
        let mut program = Program::default();
        let head = program.scratch(TensorType::u32([self.vocab]));
        let next = program.scratch(TensorType::u32([tokens]));
        self.chain(&mut program, cx, &words, [head, next])?;
        let kernel = kernel.knob("BY_TOKEN", by_token).knob("ACCUMULATE", self.accumulate);
        let binds = [Bind::In(0), Bind::In(1), Bind::ScratchIn(head), Bind::ScratchIn(next), Bind::Out(0)];
        // Any number of the tokens may have the same id: the quirk `loops-end-early`.
        cx.profile.quirks.check_loops("the number of tokens", tokens, tokens + 2)?;
        let each = LOOP_ITERATIONS / (tokens + 2);
        let (kernel, groups) = elementwise::spread_thinly(cx.profile, len, each, kernel);
        program.dispatch(kernel, &binds, &words, groups);
        Ok(program)
    }

    /// The program for GPUs: the tokens are sorted by row and summed in pieces, so that a frequent id does not keep the
    /// others waiting.
    fn by_pieces(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let tokens = cx.inputs[1].len();
        let (kernel, cols) = element::<Self>("sort", cx.inputs[0].shape.cols());
        let pieces = tokens.div_ceil(PIECE);
        let mut program = Program::default();
        let sorted = program.scratch(TensorType::u32([tokens, 2]));
        let parts = program.scratch(TensorType::f32([pieces, cx.inputs[0].shape.cols()]));

        // Invocations that have no token to sort only write zeros.
        let zeros = if self.accumulate { 0 } else { self.vocab * cols };
        let groups = tokens.div_ceil(SORT_GROUP / SORT_SLICES).max(zeros.div_ceil(32 * SORT_GROUP));
        let iterations = tokens.div_ceil(4 * SORT_SLICES) + 32 + SORT_SLICES;
        cx.profile.quirks.check_loops("the number of tokens", tokens, iterations)?;
        let kernel = kernel
            .knob("GROUP", SORT_GROUP as u32)
            .knob("SLICES", SORT_SLICES as u32)
            .knob("ACCUMULATE", self.accumulate);
        let words = self.words(zeros, cols, tokens, groups * SORT_GROUP);
        let binds = [Bind::In(1), Bind::Scratch(sorted), Bind::Out(0)];
        program.dispatch(kernel, &binds, &words, cx.profile.grid(groups));

        let mut level = |entry, pieces: usize, binds: &[Bind]| {
            let (kernel, cols) = element::<Self>(entry, cx.inputs[0].shape.cols());
            let kernel = kernel.knob("PIECE", PIECE as u32).knob("ACCUMULATE", self.accumulate);
            let (kernel, groups) = elementwise::spread(cx.profile, pieces * cols, kernel);
            program.dispatch(kernel, binds, &self.words(pieces * cols, cols, tokens, 0), groups);
        };
        level("pieces", pieces, &[Bind::In(0), Bind::ScratchIn(sorted), Bind::Out(0), Bind::Scratch(parts)]);
        if pieces > 1 {
            level("join", pieces - 1, &[Bind::ScratchIn(parts), Bind::ScratchIn(sorted), Bind::Out(0)]);
        }
        Ok(program)
    }

    fn words(&self, len: usize, cols: usize, tokens: usize, stride: usize) -> [u32; 6] {
        [len, cols, self.vocab, tokens, self.first, stride].map(|w| w as u32)
    }

    /// The dispatch that links the tokens of each id into a list.
    fn chain(
        &self,
        program: &mut Program,
        cx: &Launch<'_>,
        words: &[u32],
        [head, next]: [usize; 2],
    ) -> Result<(), String> {
        // Just enough for a few threads, because each invocation walks over all tokens.
        let (group, ways) = (8, 16);
        let rows = self.vocab.div_ceil(ways) + 1;
        cx.profile.quirks.check_loops("the number of rows of the table", self.vocab, rows)?;
        let tokens = cx.inputs[1].len();
        // Mesa does not unroll the loop over the tokens of a quad.
        cx.profile.quirks.check_loops("the number of tokens", tokens, 5 * tokens.div_ceil(4) + rows)?;
        let kernel =
            table_kernel::<Self>("embedding", SOURCE, "chain").knob("GROUP", group as u32).knob("WAYS", ways as u32);
        let binds = [Bind::In(1), Bind::Scratch(head), Bind::Scratch(next)];
        program.dispatch(kernel, &binds, words, [(ways / group) as u32, 1, 1]);
        Ok(())
    }
}

impl Op for EmbeddingBackward {
    fn name(&self) -> &'static str {
        "embedding_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let n = 2 + usize::from(self.accumulate);
        if inputs.len() != n {
            return Err(format!("takes {n} inputs, got {}", inputs.len()));
        }
        let (dy, ids) = (&inputs[0], &inputs[1]);
        expect_f32(std::slice::from_ref(dy), 1)?;
        expect_ids(ids)?;
        expect_shape("ids", ids, dy.shape.lead())?;
        let ty = TensorType::f32([self.vocab, dy.shape.cols()]);
        match inputs.get(2) {
            Some(base) if *base != ty => Err(format!("the tensor to add to must be {ty}, got {base}")),
            _ => Ok(vec![ty]),
        }
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        if cx.needs(0) {
            let name = cx.name.clone();
            let back = cx.graph.op1(&name, Embedding { first: self.first }, &[dy, cx.inputs[1]])?;
            cx.set(0, back);
        }
        if self.accumulate {
            cx.set(2, dy);
        }
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        match cx.profile.class {
            AdapterClass::Cpu => self.by_lists(cx),
            AdapterClass::Gpu => self.by_pieces(cx),
        }
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let mut dtable = match self.accumulate {
            true => inputs[2].clone(),
            false => Array::zeros(outputs[0].shape.clone()),
        };
        let cols = dtable.shape.cols();
        for (dy, &id) in inputs[0].rows().zip(&inputs[1].data) {
            let row = dtable.data.chunks_exact_mut(cols).nth(row_of(id, self.first));
            row.into_iter().flatten().zip(dy).for_each(|(sum, d)| *sum += d);
        }
        vec![dtable]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        inputs[0].len() as u64
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        let (dy, ids) = (inputs[0].bytes(), inputs[1].bytes());
        let table = if self.accumulate { 2 * dy.min(outputs[0].bytes()) } else { outputs[0].bytes() };
        (dy + ids + table) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(EmbeddingBackward { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}
