//! Other graphs on the parameters of a trainer.

use std::collections::HashMap;
use std::sync::Arc;

use super::trainer::GraphTrainer;
use crate::device::{ExecOptions, Executable, Tensor};
use crate::error::{Error, Result, joined};
use crate::graph::{Graph, Value};
use crate::precision::Precision;

impl GraphTrainer {
    /// A second graph on the same parameters, matched by name: for evaluation, with another batch size, without dropout,
    /// or with other outputs, in the same [precision](crate::Precision) (but it reads the parameters in f32). It sees every step that was submitted before. Outside of frames, use
    /// [`executable_blocking`](Self::executable_blocking).
    ///
    /// # Errors
    ///
    /// If the trainer has no parameter of the name of one of the graph's, or it has another shape: the error names it.
    ///
    /// ```
    /// use throughline::graph::ParamInit;
    /// use throughline::train::{GraphTrainConfig, GraphTrainer};
    /// use throughline::{Gpu, Graph, Result, TensorType, Value};
    ///
    /// fn network(g: &mut Graph, rows: usize) -> Result<[Value; 2]> {
    ///     let x = g.input("x", TensorType::f32([rows, 4]))?;
    ///     let w = g.param_with("w", [4, 1], ParamInit::fan_in(4))?;
    ///     Ok([x, g.matmul("y", x, w)?])
    /// }
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let mut g = gpu.graph();
    /// let [_, y] = network(&mut g, 256)?;
    /// let loss = g.sum("loss", y)?;
    /// let trainer = GraphTrainer::new_blocking(&gpu, g, loss, GraphTrainConfig::sgd(0.1))?;
    ///
    /// let mut one = gpu.graph();
    /// let [x, y] = network(&mut one, 1)?;
    /// let exec = trainer.executable_blocking(&one, &[y])?;
    /// exec.write(x, &[1.0f32, 0.0, 0.0, 0.0])?;
    /// exec.submit()?;
    /// assert_eq!(exec.read_blocking::<f32>(y)?[0], trainer.params().read_blocking(&gpu)?[0][0]);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub async fn executable(&self, graph: &Graph, outputs: &[Value]) -> Result<Executable> {
        let plan = match self.config().precision {
            Precision::F32 => self.gpu().plan(graph, outputs)?,
            Precision::Mixed { stream } => {
                let mut graph = graph.clone();
                graph.store_mixed(outputs, &[], stream, self.gpu().profile())?;
                self.gpu().plan(&graph, outputs)?
            }
        };
        let mut bindings = self.bindings(graph)?;
        bindings.retain(|&value, _| plan.bound(value).is_ok());
        Executable::new(self.gpu(), Arc::new(plan), ExecOptions::bound(bindings)).await
    }

    /// [`executable`](Self::executable), waiting.
    pub fn executable_blocking(&self, graph: &Graph, outputs: &[Value]) -> Result<Executable> {
        self.gpu().run_blocking(self.executable(graph, outputs))
    }

    /// The tensors of this trainer for the parameters of another graph, matched by name: for the
    /// [bindings](ExecOptions::bindings) of an executable with more of your own, or of another trainer's frozen
    /// parameters. Errors are those of [`executable`](Self::executable).
    pub fn bindings(&self, graph: &Graph) -> Result<HashMap<Value, Tensor>> {
        let unknown = |name: &str| {
            let ours: Vec<&str> = [self.params(), self.frozen()]
                .into_iter()
                .flat_map(|arena| arena.layout.tensors.iter().map(|(name, _)| name.as_str()))
                .collect();
            let some = joined(ours.iter().take(8).map(|name| format!("`{name}`")), ", ");
            let more = if ours.len() > 8 { format!(" and {} more", ours.len() - 8) } else { String::new() };
            Error::Graph(format!("parameter `{name}` of the graph is not one of the trainer's, which are {some}{more}"))
        };
        let bound = graph.params().into_iter().map(|param| {
            let (name, ty) = (graph.name(param), graph.ty(param));
            let tensor = self.param(name).ok_or_else(|| unknown(name))?;
            match tensor.ty() == ty {
                true => Ok((param, tensor)),
                false => Err(Error::data(name, format!("the trainer's {}", tensor.ty()), ty)),
            }
        });
        bound.collect()
    }

    /// The tensor of a parameter, trained or frozen, by its name in the graph.
    pub fn param(&self, name: &str) -> Option<Tensor> {
        for arena in [self.params(), self.frozen()] {
            if let Some(i) = arena.layout.tensors.iter().position(|(known, _)| known == name) {
                return Some(arena.tensors[i].clone());
            }
        }
        // A frozen one in a tensor of the caller's.
        self.exec().param(name)
    }
}
