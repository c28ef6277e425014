//! The op that applies an elementwise function.

use std::any::TypeId;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::broadcast;
use super::function::{Argument, Function, Slope};
use super::functions::Entry;
use super::kernel::{self, Link};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Operand, Value, Vjp};
use crate::kernel::{Elementwise, Kernel, Launch, Program};
use crate::ops::checks::expect_f32;
use crate::tensor::TensorType;

/// `(a, b, ..) -> f(a, b, ..)`, element by element, where shapes [broadcast](super#broadcasting).
///
/// [`Graph`] has a method for each function of the [table](super), such as [`Graph::tanh`]. Use this for one of your
/// own: its WGSL, its gradients, and both in f64, which is what [`check`](crate::check) tests it against.
///
/// ```
/// use throughline::ops::map::Map;
/// use throughline::{Graph, TensorType};
///
/// // Snake (Ziyin et al. 2020): x + sin(a x)^2 / a, here with a = 2.
/// let snake = Map::new("snake", ["x"], "x + sin(2.0 * x) * sin(2.0 * x) / 2.0", |[x]| {
///     x + (2.0 * x).sin().powi(2) / 2.0
/// })
/// .gradient("dy * (1.0 + sin(4.0 * x))", |[x], _y, dy| dy * (1.0 + (4.0 * x).sin()));
///
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([16, 64]))?;
/// let y = g.map("y", &snake, &[x])?;
/// # let loss = g.sum("loss", y)?;
/// # g.gradients(loss, &[x])?;
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// It is tested like any [op of your own](crate::check), with `Case::new("127", snake, &[&[127]])`.
#[derive(Clone)]
pub struct Map {
    function: Arc<Function>,
    constants: Vec<f32>,
}

impl Map {
    /// A function of some operands: its name for plans and errors, the names of its operands, its value as a scalar
    /// WGSL expression in those names, and the same in f64.
    ///
    /// The expression may use everything that WGSL has for an `f32`, and `sigmoid`, `softplus`, `safe_tanh` (WGSL's own
    /// `tanh` may overflow), `precise_sin`, `precise_cos`, `power` and `is_nan`. The text may be made at run time.
    /// Unlike kernels of the [table](crate::ops::TABLE), one with a function of your own runs with bounds checks.
    ///
    /// What is wrong with the names or the expression is an error of [`Graph::map`], and what only a compiler finds, of
    /// the [`Executable`](crate::Executable). Both name the node.
    pub fn new<const N: usize>(
        name: &'static str,
        operands: [&'static str; N],
        wgsl: impl Into<Cow<'static, str>>,
        reference: impl Fn([f64; N]) -> f64 + Send + Sync + 'static,
    ) -> Map {
        let reference = move |given: &[f64]| given.first_chunk().map_or(f64::NAN, |&operands| reference(operands));
        let function = Function::own(name, operands.to_vec(), wgsl.into(), Arc::new(reference));
        Map { function: Arc::new(function), constants: vec![] }
    }

    /// Adds the gradient of the next operand: the first call is that of the first operand, and so on. The expression
    /// may mention the operands, the output as `y` and its cotangent as `dy`; `reference` gets all of them.
    ///
    /// A gradient keeps what it mentions in memory until it is computed, so prefer `y` to operands where either will
    /// do. A function without gradients can be used where none are needed.
    pub fn gradient<const N: usize>(
        mut self,
        wgsl: impl Into<Cow<'static, str>>,
        reference: impl Fn([f64; N], f64, f64) -> f64 + Send + Sync + 'static,
    ) -> Map {
        let reference = move |given: &[f64]| match (given.first_chunk(), given) {
            (Some(&operands), [.., y, dy]) => reference(operands, *y, *dy),
            _ => f64::NAN,
        };
        let function = Arc::make_mut(&mut self.function);
        function.add_gradient(wgsl.into(), Arc::new(reference), N);
        self
    }

    /// Adds a setting that the expressions may mention by this name. It is passed in a uniform, so that maps which
    /// differ in it share a kernel. The f64 functions capture it themselves.
    ///
    /// ```
    /// use throughline::ops::map::Map;
    /// let elu = |alpha: f32| {
    ///     let a = f64::from(alpha);
    ///     Map::new("elu", ["x"], "select(alpha * (exp(x) - 1.0), x, x > 0.0)", move |[x]| {
    ///         if x > 0.0 { x } else { a * x.exp_m1() }
    ///     })
    ///     .gradient("dy * select(y + alpha, 1.0, y > 0.0)", move |[_], y, dy| dy * if y > 0.0 { 1.0 } else { y + a })
    ///     .constant("alpha", alpha)
    /// };
    /// # let mut g = throughline::Graph::new();
    /// # let x = g.input("x", throughline::TensorType::f32([16, 64]))?;
    /// # g.map("y", &elu(0.5), &[x])?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn constant(mut self, name: &'static str, value: f32) -> Map {
        Arc::make_mut(&mut self.function).add_constant(name);
        self.constants.push(value);
        self
    }

    /// A function of the table.
    pub(super) fn of_table(entry: &Entry, constants: &[f32]) -> Map {
        Map { function: Arc::new(Function::of_table(entry)), constants: constants.to_vec() }
    }
}

impl Graph {
    /// Applies an elementwise function of your own: see [`Map`]. Shapes [broadcast](crate::ops::map#broadcasting).
    pub fn map(&mut self, name: &str, map: &Map, operands: &[Value]) -> Result<Value> {
        self.op1(name, map.clone(), operands)
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let constants = self.function.constants.iter().zip(&self.constants);
        let settings: Vec<String> = constants.map(|(name, value)| format!(", {name}: {value}")).collect();
        write!(f, "{:?}{}", self.function, settings.concat())
    }
}

impl Op for Map {
    fn name(&self) -> &'static str {
        self.function.name
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.function.check()?;
        if let Some((name, value)) = self.function.constants.iter().zip(&self.constants).find(|(_, v)| v.is_nan()) {
            return Err(format!("`{name}` must be a number, got {value}"));
        }
        expect_f32(inputs, self.function.operands.len())?;
        Ok(vec![TensorType::f32(broadcast::shape(inputs)?)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        for (i, operand) in self.function.operands.iter().enumerate() {
            if !cx.needs(i) {
                continue;
            }
            let name = match self.function.operands.len() {
                1 => cx.name.clone(),
                _ => format!("{}.{operand}", cx.name),
            };
            let shape = cx.graph.ty(cx.inputs[i]).shape.clone();
            let gradient = match self.function.slope(i, &self.constants) {
                Slope::Nothing => {
                    cx.set_zero(i);
                    continue;
                }
                Slope::Missing if self.function.is_trusted() => {
                    return Err(cx.no_gradient("second derivatives of this function are not implemented"));
                }
                Slope::Missing => return Err(cx.no_gradient("none was given: see `Map::gradient`")),
                Slope::Cotangent => dy,
                Slope::Of(function, arguments, constants) => {
                    let value = |argument: &Argument| match *argument {
                        Argument::Cotangent => dy,
                        Argument::Operand(i) => cx.inputs[i],
                        Argument::Output => cx.outputs[0],
                    };
                    let operands: Vec<Value> = arguments.iter().map(value).collect();
                    let repeats = shape != cx.graph.ty(dy).shape;
                    let name = if repeats { format!("{name}.each") } else { name.clone() };
                    cx.graph.op1(&name, Map { function, constants }, &operands)?
                }
            };
            let gradient = broadcast::sum_repeats(cx.graph, &name, gradient, &shape)?;
            cx.set(i, gradient);
        }
        Ok(())
    }

    fn elementwise(&self) -> Option<Elementwise> {
        Some(self.function.elementwise(&self.constants))
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let function = self.function.elementwise(&self.constants);
        let trusted = function.is_trusted();
        let link = Link { function, operands: (0..cx.inputs.len()).map(Operand::Input).collect() };
        Ok(kernel::launch(cx, &[link], &[0], |text, entry| match trusted {
            true => Kernel::new("map", text, entry).made_by(TypeId::of::<Self>()),
            false => Kernel::new(self.function.name, text, entry),
        }))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let shape = &outputs[0].shape;
        let operands: Vec<Array> = inputs.iter().map(|array| broadcast::repeated(array, shape)).collect();
        let mut given = vec![0.0; operands.len()];
        given.extend(self.constants.iter().map(|&c| f64::from(c)));
        let element = |i: usize| {
            operands.iter().zip(&mut given).for_each(|(operand, value)| *value = operand.data[i]);
            (self.function.reference)(&given)
        };
        vec![Array::new(shape.clone(), (0..shape.len()).map(element).collect())]
    }

    fn flops(&self, _: &[TensorType], outputs: &[TensorType]) -> u64 {
        self.function.flops() * outputs[0].len() as u64
    }

    fn stays_f32(&self, _output: usize) -> bool {
        self.function.is_wide()
    }
}
