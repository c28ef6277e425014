//! Reverse-mode differentiation as a transformation of the graph: a reverse walk that asks each op for its
//! vector-Jacobian product. No list of ops is needed.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, Source, Value, Vjp};
use crate::ops::fill::Fill;
use crate::ops::residual_add::ResidualAdd;
use crate::tensor::TensorType;

impl Graph {
    /// Adds the nodes that compute the gradient of `loss` with respect to each of `wrt`, and returns those gradients.
    ///
    /// `loss` must be a single f32. `wrt` may contain parameters, inputs, or any value in between, such as the residual
    /// stream at some depth. Apply [patches](Self::patched) first, so that the gradients include them.
    ///
    /// # Errors
    ///
    /// [`Error::NoGradient`] names a node on the path whose op cannot be differentiated.
    ///
    /// ```
    /// use throughline::{Graph, TensorType};
    /// let mut g = Graph::new();
    /// let x = g.input("x", TensorType::f32([4, 8]))?;
    /// let w = g.param("w", [8, 3])?;
    /// let y = g.matmul("y", x, w)?;
    /// let loss = g.sum("loss", y)?;
    /// let dw = g.gradients(loss, &[w])?[0];
    /// assert_eq!(g.ty(dw), g.ty(w));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn gradients(&mut self, loss: Value, wrt: &[Value]) -> Result<Vec<Value>> {
        self.check_values(&[loss], |_| "gradients: the loss".into())?;
        self.check_values(wrt, |i| format!("gradients: wrt[{i}]"))?;
        if self.ty(loss) != &TensorType::f32([1]) {
            return Err(Error::Graph(format!(
                "gradients: the loss `{}` must be f32[1], but is {}: `Graph::sum` makes one number of it",
                self.name(loss),
                self.ty(loss)
            )));
        }
        let path = self.on_path(loss, wrt);
        let seed_name = format!("{}.grad", self.name(loss));
        let seed = self.op1(&seed_name, Fill::new([1], 1.0), &[])?;
        let mut grads: HashMap<Value, Value> = HashMap::from([(loss, seed)]);
        for id in (0..=loss.node()).rev().filter(|id| path.contains(id)) {
            self.backward_node(id, &path, &mut grads)?;
        }
        wrt.iter()
            .map(|v| {
                grads.get(v).copied().ok_or_else(|| {
                    Error::Graph(format!(
                        "gradients: the loss `{}` does not depend on `{}`",
                        self.name(loss),
                        self.name(*v)
                    ))
                })
            })
            .collect()
    }

    /// The nodes that depend on `wrt` and that `loss` depends on.
    fn on_path(&self, loss: Value, wrt: &[Value]) -> HashSet<usize> {
        let roots: HashSet<usize> = wrt.iter().map(|v| v.node()).collect();
        let mut path = HashSet::new();
        for id in self.needed(&[loss]) {
            if roots.contains(&id) || self.node(id).inputs.iter().any(|v| path.contains(&v.node())) {
                path.insert(id);
            }
        }
        path
    }

    fn backward_node(&mut self, id: usize, path: &HashSet<usize>, grads: &mut HashMap<Value, Value>) -> Result<()> {
        let node = self.node(id).clone();
        let outputs: Vec<Value> = (0..node.outputs.len()).map(|output| self.value(id, output)).collect();
        let dy: Vec<Option<Value>> = outputs.iter().map(|v| grads.get(v).copied()).collect();
        // A node reached only by `wrt` values matters only for its own gradient.
        let needs: Vec<bool> = node.inputs.iter().map(|v| path.contains(&v.node())).collect();
        let Source::Op(op) = &node.source else { return Ok(()) };
        if dy.iter().all(Option::is_none) || !needs.contains(&true) {
            return Ok(());
        }
        let n = node.inputs.len();
        let mut cx = Vjp {
            graph: self,
            name: format!("{}.grad", node.name),
            inputs: node.inputs.clone(),
            outputs,
            dy,
            op: op.name(),
            needs,
            cotangents: vec![None; n],
            zeros: vec![],
            no_input: None,
        };
        op.vjp(&mut cx)?;
        let Vjp { cotangents, zeros, no_input, .. } = cx;
        if let Some(i) = no_input {
            let message = format!("`vjp` set the gradient of input {i}, but there are only {n}, numbered from 0");
            return Err(self.wrong_vjp(&node, op.name(), message));
        }
        for (i, (&input, cotangent)) in node.inputs.iter().zip(cotangents).enumerate() {
            if !path.contains(&input.node()) {
                continue;
            }
            let Some(new) = cotangent else {
                // Integers have no gradient; whoever asks for it is told so at the end.
                if zeros.contains(&i) || !self.ty(input).dtype.is_float() {
                    continue;
                }
                let message = format!(
                    "`vjp` did not set the gradient of input {i}, `{}`, which is needed: call `Vjp::set` or \
                     `Vjp::set_zero`, or return `Vjp::no_gradient`",
                    self.name(input)
                );
                return Err(self.wrong_vjp(&node, op.name(), message));
            };
            self.check_values(&[new], |_| format!("`{}`: the gradient that op {} gave", node.name, op.name()))?;
            if self.ty(new).computed() != self.ty(input).computed() {
                return Err(Error::Graph(format!(
                    "`{}`: op {} gave a gradient of {} for input `{}` of {}",
                    node.name,
                    op.name(),
                    self.ty(new),
                    self.name(input),
                    self.ty(input)
                )));
            }
            let total = match grads.get(&input) {
                None => new,
                Some(&old) => {
                    let name = format!("{}.grad.sum", self.name(input));
                    self.op1(&name, ResidualAdd, &[old, new])?
                }
            };
            grads.insert(input, total);
        }
        Ok(())
    }

    fn wrong_vjp(&self, node: &Node, op: &'static str, message: String) -> Error {
        Error::node(&node.name, op, message, node.inputs.iter().map(|&v| self.ty(v)))
    }
}
