//! A method of [`Graph`] for each function of the table, and means of some.

use super::functions::{self, functions};
use super::op::Map;
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};

macro_rules! methods {
    ([$y:ident, $dy:ident] $(
        $(#[$doc:meta])*
        $name:ident($($x:ident $(in $fill:ident)?),+ $(; $($c:ident: $value:expr),+)?) = $wgsl:literal => $f:expr, {
            $($of:ident: $slope:literal => $df:expr),*
        }
    )+) => {
        /// Elementwise functions: see [`ops::map`](crate::ops::map).
        impl Graph {
            $($(#[$doc])*
            pub fn $name(&mut self, name: &str, $($x: Value),+ $(, $($c: f32),+)?) -> Result<Value> {
                self.op1(name, Map::of_table(&functions::$name, &[$($($c),+)?]), &[$($x),+])
            })+
        }
    };
}

functions!(methods);

/// Means, and losses that are means of an elementwise function.
impl Graph {
    /// The mean of all elements, as `[1]`: how most losses end.
    pub fn mean(&mut self, name: &str, x: Value) -> Result<Value> {
        let name = or(name, "mean");
        let share = 1.0 / self.type_of(name, x)?.len() as f64;
        let sum = self.sum(&format!("{name}.sum"), x)?;
        self.scale(name, sum, share as f32)
    }

    /// The mean squared error of a prediction and a target of the same shape, as `[1]`: the loss for regression.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([256, 3]))?;
    /// let target = g.input("target", TensorType::f32([256, 1]))?;
    /// let w = g.param("w", [3, 1])?;
    /// let prediction = g.matmul("prediction", x, w)?;
    /// let loss = g.mse("loss", prediction, target)?;
    /// # g.gradients(loss, &[w])?;
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn mse(&mut self, name: &str, prediction: Value, target: Value) -> Result<Value> {
        self.mean_error(or(name, "mse"), prediction, target, Self::squared_error)
    }

    /// The mean absolute error of a prediction and a target of the same shape, as `[1]`: a loss that outliers move less
    /// than [`mse`](Self::mse).
    pub fn mae(&mut self, name: &str, prediction: Value, target: Value) -> Result<Value> {
        self.mean_error(or(name, "mae"), prediction, target, |g, name, a, b| {
            let difference = g.sub(&format!("{name}.difference"), a, b)?;
            g.abs(name, difference)
        })
    }

    /// The mean [`huber_error`](Self::huber_error) of a prediction and a target of the same shape, as `[1]`: like
    /// [`mse`](Self::mse) near the target, like [`mae`](Self::mae) far away.
    pub fn huber(&mut self, name: &str, prediction: Value, target: Value, delta: f32) -> Result<Value> {
        self.mean_error(or(name, "huber"), prediction, target, |g, name, a, b| g.huber_error(name, a, b, delta))
    }

    /// The mean binary cross-entropy of logits and targets of the same shape, as `[1]`: the loss for yes or no, or for
    /// several labels at once. Targets are from 0 to 1. It takes logits, not probabilities, and is stable for large
    /// ones; [`sigmoid`](Self::sigmoid) turns logits into probabilities.
    pub fn binary_cross_entropy(&mut self, name: &str, logits: Value, targets: Value) -> Result<Value> {
        self.mean_error(or(name, "binary_cross_entropy"), logits, targets, Self::bce_with_logits)
    }

    /// The mean of an error, for operands that must not broadcast: `[n, 1]` against `[n]` is a mistake, which would
    /// otherwise compare everything with everything.
    fn mean_error(
        &mut self,
        name: &str,
        prediction: Value,
        target: Value,
        error: impl FnOnce(&mut Graph, &str, Value, Value) -> Result<Value>,
    ) -> Result<Value> {
        let (ours, theirs) = (self.type_of(name, prediction)?, self.type_of(name, target)?);
        if ours != theirs {
            let name = self.full_name(name);
            return Err(Error::Graph(format!(
                "`{name}`: the prediction is {ours}, but the target is {theirs}: `Graph::reshape` one of them, which is \
                 free"
            )));
        }
        let error = error(self, &format!("{name}.error"), prediction, target)?;
        self.mean(name, error)
    }
}

/// The name, or that of the method if it is empty.
fn or<'a>(name: &'a str, method: &'a str) -> &'a str {
    if name.is_empty() { method } else { name }
}
