//! Keys and values of earlier tokens.

use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::tensor::{DType, TensorType};

/// Caches of keys and values, collected while blocks are added.
#[derive(Debug)]
pub(super) struct Caches {
    /// Number of earlier tokens of each sequence: u32 `[batch]`.
    pub start: Value,
    pub capacity: usize,
    /// How they are stored.
    pub dtype: DType,
    pub states: Vec<Value>,
}

impl Caches {
    /// Adds a cache for `rows` and writes them to it. Every attention has caches of its own, also where a scope has
    /// several.
    pub fn write(&mut self, g: &mut Graph, name: &str, rows: Value) -> Result<Value> {
        let shape = &g.type_of(name, rows)?.shape;
        let (batch, width) = (shape.dims()[0], shape.cols());
        let taken = |n: &str| g.find(&g.full_name(n)).is_some();
        let numbered = (2..).map(|i| format!("{name}#{i}"));
        let name = [name.to_string()].into_iter().chain(numbered).find(|n| !taken(n)).unwrap_or_default();
        let state = g.state(&name, TensorType::f32([batch, self.capacity, width]).with_dtype(self.dtype))?;
        let written = g.cache_write(&format!("{name}.write"), rows, self.start, state)?;
        g.store(written, state)?;
        self.states.push(state);
        Ok(written)
    }
}
