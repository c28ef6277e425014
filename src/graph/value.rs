//! Values, and which graph each of them is of.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// One output of one node of a graph.
///
/// It is a small, `Copy` handle that its graph, and plans and executables of that graph, understand. Given to another
/// graph it is an `Err` that names both, by the numbers that [`Graph::id`](crate::Graph::id) gives.
///
/// A clone of a graph understands the values that the original had when it was cloned. What either makes from then on
/// is its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value {
    /// [`NO_GRAPH`] in lists of nodes that are no graph.
    graph: u32,
    node: u32,
    output: u32,
}

const NO_GRAPH: u32 = 0;

impl Value {
    /// An output of a node in a list that is no graph: the planner's, which moves nodes about.
    pub(crate) fn local(node: usize, output: usize) -> Self {
        Value { graph: NO_GRAPH, node: node as u32, output: output as u32 }
    }

    /// Number of the graph that made it.
    pub fn graph(self) -> u32 {
        self.graph
    }

    /// Index of its node in [`Graph::nodes`](crate::Graph::nodes).
    pub fn node(self) -> usize {
        self.node as usize
    }

    /// Which of the node's outputs it is.
    pub fn output(self) -> usize {
        self.output as usize
    }
}

impl Hash for Value {
    /// Without the graph, which maps hardly ever hold two of: one write in place of three, since plans are made of
    /// look-ups.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(u64::from(self.node) << 32 | u64::from(self.output));
    }
}

impl fmt::Debug for Value {
    /// `node 3 of graph 1`, or `output 2 of node 3 of graph 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.output > 0 {
            write!(f, "output {} of ", self.output)?;
        }
        write!(f, "node {}", self.node)?;
        if self.graph == NO_GRAPH { Ok(()) } else { write!(f, " of graph {}", self.graph) }
    }
}

/// The graphs that made the nodes of a graph: itself and, for the first ones, those that it is a clone of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lineage(Vec<Maker>);

#[derive(Clone, Copy, Debug)]
struct Maker {
    graph: u32,
    first_node: usize,
}

impl Lineage {
    /// That of a new graph.
    pub fn new() -> Self {
        Self::default().cloned_at(0)
    }

    /// That of a clone of a graph of so many nodes.
    pub fn cloned_at(&self, nodes: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(NO_GRAPH + 1);
        let graph = NEXT.fetch_add(1, Ordering::Relaxed);
        let earlier = self.0.iter().copied().filter(|maker| maker.first_node < nodes);
        Lineage(earlier.chain([Maker { graph, first_node: nodes }]).collect())
    }

    /// Number of the graph itself.
    pub fn id(&self) -> u32 {
        self.0.last().map_or(NO_GRAPH, |maker| maker.graph)
    }

    pub fn value(&self, node: usize, output: usize) -> Value {
        Value { graph: self.maker_of(node), ..Value::local(node, output) }
    }

    /// Whether the graph, or one that it is a clone of, made this value.
    pub fn made(&self, value: Value) -> bool {
        self.maker_of(value.node()) == value.graph
    }

    fn maker_of(&self, node: usize) -> u32 {
        // From the end: nearly all graphs have made all their nodes themselves.
        self.0.iter().rev().find(|maker| maker.first_node <= node).map_or(NO_GRAPH, |maker| maker.graph)
    }
}

/// What plans keep of their graph, to name its values in messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub lineage: Lineage,
    pub nodes: Arc<[String]>,
}

impl Names {
    /// Name of the node that makes a value, or an `Err` with what is wrong with one of another graph.
    pub fn of(&self, value: Value) -> Result<&str, String> {
        match self.nodes.get(value.node()) {
            Some(name) if self.lineage.made(value) => Ok(name),
            _ => Err(format!("{value:?} is not a value of this plan, which is of graph {}", self.lineage.id())),
        }
    }
}
