//! Values, and the graph that each of them belongs to.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// One output of one node of a graph.
///
/// This is a small `Copy` handle. Its graph accepts it, and so do plans and executables of that graph. Any other graph
/// returns an error that names both graphs, by their [`Graph::id`](crate::Graph::id).
///
/// A clone of a graph accepts the values that the original had when it was cloned. Values that either adds later are
/// its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value {
    /// [`NO_GRAPH`] in lists of nodes that are not a graph.
    graph: u32,
    node: u32,
    output: u32,
}

const NO_GRAPH: u32 = 0;

impl Value {
    /// An output of a node in a list that is not a graph: the planner's, which moves nodes around.
    pub(crate) fn local(node: usize, output: usize) -> Self {
        Value { graph: NO_GRAPH, node: node as u32, output: output as u32 }
    }

    /// Number of the graph that created it.
    pub fn graph(self) -> u32 {
        self.graph
    }

    /// Index of its node in [`Graph::nodes`](crate::Graph::nodes).
    pub fn node(self) -> usize {
        self.node as usize
    }

    /// Index among the outputs of that node.
    pub fn output(self) -> usize {
        self.output as usize
    }
}

impl Hash for Value {
    /// Leaves out the graph, since maps hardly ever mix values of two. One write instead of three matters because
    /// planning consists of look-ups.
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

/// The graphs that created the nodes of a graph: itself and, for the first nodes, those that it was cloned from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lineage(Vec<Maker>);

#[derive(Clone, Copy, Debug)]
struct Maker {
    graph: u32,
    first_node: usize,
}

impl Lineage {
    /// The lineage of a new graph.
    pub fn new() -> Self {
        Self::default().cloned_at(0)
    }

    /// The lineage of a clone of a graph with this many nodes.
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

    /// Whether this value was created by the graph or by one that it was cloned from.
    pub fn made(&self, value: Value) -> bool {
        self.maker_of(value.node()) == value.graph
    }

    fn maker_of(&self, node: usize) -> u32 {
        // From the end: nearly all graphs created all their nodes themselves.
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
    /// Name of the node that computes a value, or what is wrong with a value of another graph.
    pub fn of(&self, value: Value) -> Result<&str, String> {
        match self.nodes.get(value.node()) {
            Some(name) if self.lineage.made(value) => Ok(name),
            _ => Err(format!(
                "{value:?} is not a value of this plan, which is of graph {}: use the values of that graph",
                self.lineage.id()
            )),
        }
    }
}
