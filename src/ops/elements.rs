//! Kernels that run once for each element, from what happens to one.

use std::fmt::Write;

use super::elementwise;
use crate::kernel::wgsl::Module;
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::tensor::DType;

/// A kernel that runs the same WGSL statements once for each of a number of elements: pixels, rows, pairs.
///
/// It is the quickest way to the kernel of an op of your own. You write what happens to an element; this writes the
/// bindings, the uniform and the entry point, and counts the workgroups: a few for software adapters, of which each
/// computes many elements, many for GPUs, and in several rows where there are more than one row can have. The elements
/// run at the same time and in any order, so each should write its own part of the outputs, and read no other's.
///
/// The statements see
///
/// - `i`, a `u32`: the number of the element, from 0;
/// - `n`, a `u32`: how many there are;
/// - each tensor of [`bind`](Self::bind), as an array of `f32` or `u32`, in row-major order;
/// - each number of [`word`](Self::word).
///
/// They may `return` early. Kernels that share workgroup memory, or that need functions of their own, are written in
/// full: see [`Op`](super::Op).
///
/// ```
/// use throughline::ops::{Bind, Custom, Elements};
/// use throughline::reference::Array;
/// use throughline::{ExecOptions, Executable, Gpu, TensorType};
///
/// /// `y[a, b]` is the distance between the rows `a` and `b` of `x`.
/// fn distances() -> Custom {
///     Custom::new(
///         "distances",
///         |[x]| Ok([TensorType::f32([x.shape.rows(), x.shape.rows()])]),
///         |cx| {
///             let x = &cx.inputs[0].shape;
///             let body = "
///                 let a = i / rows * cols;
///                 let b = i % rows * cols;
///                 var sum = 0.0;
///                 for (var j = 0u; j < cols; j++) {
///                     let d = x[a + j] - x[b + j];
///                     sum += d * d;
///                 }
///                 y[i] = sqrt(sum);";
///             let pairs = Elements::new("distances", cx.outputs[0].len(), body);
///             let pairs = pairs.bind("x", Bind::In(0)).bind("y", Bind::Out(0));
///             pairs.word("rows", x.rows()).word("cols", x.cols()).program(cx)
///         },
///         |[x]| {
///             let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
///             let row = |a| x.rows().map(move |b| distance(a, b));
///             [Array::new([x.shape.rows(); 2], x.rows().flat_map(row).collect())]
///         },
///     )
/// }
///
/// let gpu = Gpu::headless_blocking()?;
/// let mut g = gpu.graph();
/// let x = g.input("x", TensorType::f32([2, 2]))?;
/// let y = g.op1("y", distances(), &[x])?;
/// let exec = Executable::new_blocking(&gpu, gpu.plan(&g, &[y])?.into(), ExecOptions::default())?;
/// exec.write(x, &[1.0f32, 1.0, 4.0, 5.0])?;
/// exec.submit()?;
/// assert_eq!(exec.read_blocking::<f32>(y)?, [0.0, 5.0, 5.0, 0.0]);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Elements<'a> {
    label: &'static str,
    n: usize,
    body: &'a str,
    binds: Vec<(&'a str, Bind)>,
    words: Vec<(&'a str, Word)>,
}

/// A number in the uniform of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Word {
    /// An `f32`.
    F32(f32),
    /// An `i32`.
    I32(i32),
    /// A `u32`.
    U32(u32),
    /// A `u32` too, if it is small enough for one: lengths, strides.
    Size(usize),
}

impl From<f32> for Word {
    fn from(x: f32) -> Self {
        Word::F32(x)
    }
}

impl From<i32> for Word {
    fn from(x: i32) -> Self {
        Word::I32(x)
    }
}

impl From<u32> for Word {
    fn from(x: u32) -> Self {
        Word::U32(x)
    }
}

impl From<usize> for Word {
    fn from(x: usize) -> Self {
        Word::Size(x)
    }
}

impl Word {
    fn wgsl(self) -> &'static str {
        match self {
            Word::F32(_) => "f32",
            Word::I32(_) => "i32",
            Word::U32(_) | Word::Size(_) => "u32",
        }
    }

    fn bits(self, name: &str) -> Result<u32, String> {
        match self {
            Word::F32(x) => Ok(x.to_bits()),
            Word::I32(x) => Ok(x.cast_unsigned()),
            Word::U32(x) => Ok(x),
            Word::Size(x) => x.try_into().map_err(|_| format!("`{name}` is {x}, more than a u32 holds")),
        }
    }
}

/// The most elements that an invocation computes on software adapters. It computes fewer where there would be fewer
/// workgroups than this.
const MOST: usize = 64;

impl<'a> Elements<'a> {
    /// A kernel that runs `body` for each of `n` elements, often as many as the output has. `label` names it in plans,
    /// errors and debuggers.
    pub fn new(label: &'static str, n: usize, body: &'a str) -> Self {
        Elements { label, n, body, binds: vec![], words: vec![] }
    }

    /// Makes a tensor visible under this name. Outputs and scratch can be written; so can what an output starts as.
    pub fn bind(mut self, name: &'a str, bind: Bind) -> Self {
        self.binds.push((name, bind));
        self
    }

    /// Makes a number visible under this name: an `f32`, an `i32`, or for a `u32` or `usize` a `u32`. Another number
    /// needs no other pipeline.
    pub fn word(mut self, name: &'a str, word: impl Into<Word>) -> Self {
        self.words.push((name, word.into()));
        self
    }

    /// The program of this kernel alone: what an op's [`launch`](super::Op::launch) returns.
    ///
    /// # Errors
    ///
    /// Names a tensor that the body does not mention, a name that is taken, or a number that does not fit 32 bits. What
    /// is wrong with the body itself is an error of the compiler, with the name of the node, when the kernel is made.
    pub fn program(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let mut program = Program::default();
        self.dispatch(cx, &mut program)?;
        Ok(program)
    }

    /// Appends this kernel to a program of several.
    ///
    /// # Errors
    ///
    /// Those of [`program`](Self::program).
    pub fn dispatch(&self, cx: &Launch<'_>, program: &mut Program) -> Result<(), String> {
        self.check().map_err(|e| format!("kernel `{}`: {e}", self.label))?;
        let mut words = vec![Word::Size(self.n).bits("n")?];
        for (name, word) in &self.words {
            words.push(word.bits(name)?);
        }
        let kernel = Kernel::new(self.label, self.wgsl(cx, program), "main");
        // No more of them in one invocation than leaves work for many cores.
        let each = (self.n / (8 * MOST)).next_power_of_two().min(MOST);
        let (kernel, workgroups) = elementwise::spread_thinly(cx.profile, self.n, each, kernel);
        let binds: Vec<Bind> = self.binds.iter().map(|(_, bind)| *bind).collect();
        program.dispatch(kernel, &binds, &words, workgroups);
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let names: Vec<&str> = self.binds.iter().map(|(name, _)| *name).chain(self.words.iter().map(|w| w.0)).collect();
        for (at, name) in names.iter().enumerate() {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(word) {
                return Err(format!("`{name}` is no name for a variable in WGSL"));
            }
            if ["i", "n"].contains(name) || names[..at].contains(name) || OWN.contains(name) {
                return Err(format!("the name `{name}` is taken: give this one another"));
            }
        }
        let body = Module::parse(self.body);
        let mentioned = |name: &str| (0..body.tokens.len()).any(|at| body.is_name(at) && body.word(at) == name);
        match self.binds.iter().find(|(name, _)| !mentioned(name)) {
            Some((name, bind)) => Err(format!("its body does not mention `{name}`, which is bound to {bind:?}")),
            None => Ok(()),
        }
    }

    fn wgsl(&self, cx: &Launch<'_>, program: &Program) -> String {
        let mut text = String::from("struct Words {\n    n: u32,\n");
        let mut words = String::from("    let n = words.n;\n");
        // A write to a String cannot fail.
        for (name, word) in &self.words {
            let _ = writeln!(text, "    {name}: {},", word.wgsl());
            let _ = writeln!(words, "    let {name} = words.{name};");
        }
        text += "}\n@group(0) @binding(0) var<uniform> words: Words;\n";
        for ((name, bind), number) in self.binds.iter().zip(1..) {
            // What does not exist is an error of the planner.
            let (ty, access) = match *bind {
                Bind::In(i) => (cx.inputs.get(i), "read"),
                Bind::Out(i) => (cx.outputs.get(i), "read_write"),
                Bind::OutIn(i) => (cx.outputs.get(i), "read"),
                Bind::Scratch(i) => (program.scratch.get(i), "read_write"),
                Bind::ScratchIn(i) => (program.scratch.get(i), "read"),
                Bind::Null => (None, "read"),
            };
            let ty = ty.map_or(DType::F32, |ty| ty.dtype.computed());
            let _ = writeln!(text, "@group(0) @binding({number}) var<storage, {access}> {name}: array<{ty}>;");
        }
        let _ = write!(text, "fn element(i: u32) {{\n{words}{}\n}}\n{MAIN}", self.body);
        text
    }
}

/// Names that the text around the body has.
const OWN: [&str; 6] = ["words", "Words", "element", "main", "INVOCATIONS", "EACH"];

const MAIN: &str = "
const INVOCATIONS: u32 = 64u;
const EACH: u32 = 1u;

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let first = (group.x + group.y * groups.x) * (INVOCATIONS * EACH) + local;
    for (var k = 0u; k < EACH; k++) {
        let i = first + k * INVOCATIONS;
        if (i < words.n) {
            element(i);
        }
    }
}
";
