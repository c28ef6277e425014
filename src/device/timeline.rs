//! Where a step spends its time: node by node, and as a trace for Perfetto or `chrome://tracing`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::json;

use crate::error::{Error, Result};

/// The clock that the times come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The GPU's timestamps.
    Gpu,
    /// The host's clock around each kernel, with a wait after each: for devices opened without `TIMESTAMP_QUERY`.
    /// Includes the cost of a submit and a wait.
    Host,
}

/// The times of one step, from [`Executable::profile_blocking`](crate::Executable::profile_blocking).
///
/// Use it to find out what to optimise: print it, sum it [by op](Self::by_op), or look at its
/// [trace](Self::write_trace).
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Name and driver of the adapter.
    pub adapter: String,
    /// The clock that the times come from.
    pub clock: Clock,
    /// The nodes that ran, in order.
    pub nodes: Vec<NodeTime>,
}

/// The time of one node.
#[derive(Clone, Debug)]
pub struct NodeTime {
    /// Name of the node.
    pub node: String,
    /// Name of its op; empty for the copies at the end of a step.
    pub op: &'static str,
    /// Floating-point operations.
    pub flops: u64,
    /// The least number of bytes that must move.
    pub bytes: u64,
    /// Its copies and dispatches, in order.
    pub spans: Vec<Span>,
}

/// One dispatch or copy.
#[derive(Clone, Debug)]
pub struct Span {
    /// `label.entry` of the kernel, or `copy`.
    pub what: String,
    /// Nanoseconds since the step's start.
    pub start_ns: u64,
    /// Duration in nanoseconds.
    pub ns: u64,
}

impl NodeTime {
    /// Duration of all its spans in nanoseconds.
    pub fn ns(&self) -> u64 {
        self.spans.iter().map(|s| s.ns).sum()
    }
}

/// Time and work of several nodes together.
///
/// [`Timeline::by_op`] returns these. `flops` over `ns` is the throughput in GFLOP/s.
#[derive(Clone, Copy, Debug, Default)]
pub struct Total {
    /// Number of nodes.
    pub nodes: usize,
    /// Duration in nanoseconds.
    pub ns: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// The least number of bytes that must move.
    pub bytes: u64,
}

impl Total {
    fn add(&mut self, node: &NodeTime) {
        self.nodes += 1;
        self.ns += node.ns();
        self.flops += node.flops;
        self.bytes += node.bytes;
    }
}

impl Timeline {
    /// Duration of all kernels and copies in nanoseconds, without the gaps between them.
    pub fn ns(&self) -> u64 {
        self.nodes.iter().map(NodeTime::ns).sum()
    }

    /// Duration of each kernel and copy in nanoseconds, in order.
    pub(crate) fn command_ns(&self) -> Vec<u64> {
        self.nodes.iter().flat_map(|n| &n.spans).map(|s| s.ns).collect()
    }

    /// Duration of all kernels in nanoseconds.
    pub fn kernel_ns(&self) -> u64 {
        self.nodes.iter().flat_map(|n| &n.spans).filter(|s| s.what != COPY).map(|s| s.ns).sum()
    }

    /// Totals by op, the longest first.
    pub fn by_op(&self) -> Vec<(&'static str, Total)> {
        let mut totals: BTreeMap<&'static str, Total> = BTreeMap::new();
        self.nodes.iter().for_each(|n| totals.entry(n.op).or_default().add(n));
        let mut totals: Vec<_> = totals.into_iter().collect();
        totals.sort_by_key(|(_, t)| std::cmp::Reverse(t.ns));
        totals
    }

    /// Takes the shorter time of each command from two profiles of one step. The first run of a step is slow, and any
    /// run may be disturbed, so the shortest of several runs is the best estimate.
    pub fn shorter(mut self, other: &Timeline) -> Timeline {
        for (node, other) in self.nodes.iter_mut().zip(&other.nodes) {
            for (span, other) in node.spans.iter_mut().zip(&other.spans) {
                span.ns = span.ns.min(other.ns);
            }
        }
        self
    }

    /// Appends the times of what ran afterwards.
    pub fn then(mut self, later: Timeline) -> Timeline {
        let spans = self.nodes.iter().flat_map(|n| &n.spans);
        let end = spans.map(|s| s.start_ns + s.ns).max().unwrap_or(0);
        self.nodes.extend(later.nodes.into_iter().map(|mut node| {
            node.spans.iter_mut().for_each(|s| s.start_ns += end);
            node
        }));
        self
    }

    /// The trace in Chrome's JSON format, which <https://ui.perfetto.dev> opens too.
    pub fn trace(&self) -> String {
        let thread = |name: &str| json!({"ph": "M", "pid": 1, "tid": 1, "name": name, "args": {"name": self.adapter}});
        let mut events = vec![thread("process_name"), thread("thread_name")];
        for node in &self.nodes {
            for span in &node.spans {
                events.push(json!({
                    "ph": "X", "pid": 1, "tid": 1, "cat": node.op, "name": node.node,
                    "ts": span.start_ns as f64 / 1e3, "dur": span.ns as f64 / 1e3,
                    "args": {"kernel": span.what, "node's GFLOP": node.flops as f64 / 1e9, "node's MB": node.bytes as f64 / 1e6},
                }));
            }
        }
        json!({"traceEvents": events, "displayTimeUnit": "ms"}).to_string()
    }

    /// Writes the [`trace`](Self::trace) to a file.
    pub fn write_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        std::fs::write(path, self.trace()).map_err(Error::io(path))
    }
}

/// The name of a copy among kernels.
pub(crate) const COPY: &str = "copy";

/// `kernel a, kernel b x3`.
fn kernels(node: &NodeTime) -> String {
    let mut names: Vec<(&str, usize)> = vec![];
    for span in &node.spans {
        match names.iter_mut().find(|(name, _)| *name == span.what) {
            Some((_, n)) => *n += 1,
            None => names.push((&span.what, 1)),
        }
    }
    let shown = names.iter().map(|(name, n)| if *n == 1 { name.to_string() } else { format!("{name} x{n}") });
    shown.collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Timeline {
    /// A table of the nodes in order, then one of the ops by time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.ns();
        let clock = match self.clock {
            Clock::Gpu => "GPU timestamps",
            Clock::Host => "host clock, waiting between kernels",
        };
        writeln!(f, "{}: {:.3} ms ({clock})", self.adapter, all as f64 / 1e6)?;
        let rates = |ns: u64, flops: u64, bytes: u64| {
            let per_ns = |n: u64| n as f64 / ns.max(1) as f64;
            let share = 100.0 * ns as f64 / all.max(1) as f64;
            format!("{:9.3} ms {share:5.1}% {:8.2} GFLOP/s {:7.2} GB/s", ns as f64 / 1e6, per_ns(flops), per_ns(bytes))
        };
        let width = self.nodes.iter().map(|n| n.node.len()).max().unwrap_or(4);
        for n in &self.nodes {
            writeln!(f, "  {:width$} {}  {}", n.node, rates(n.ns(), n.flops, n.bytes), kernels(n))?;
        }
        writeln!(f, "by op:")?;
        for (op, t) in self.by_op() {
            let name = if op.is_empty() { "(final copies)" } else { op };
            writeln!(f, "  {name:width$} {}  {} nodes", rates(t.ns, t.flops, t.bytes), t.nodes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline() -> Timeline {
        let span = |what: &str, start_ns, ns| Span { what: what.into(), start_ns, ns };
        let nodes = vec![
            NodeTime {
                node: "h0.\"fc\"".into(),
                op: "matmul",
                flops: 4000,
                bytes: 100,
                spans: vec![span(COPY, 0, 500), span("matmul.forward", 600, 1000), span("matmul.forward", 1700, 1000)],
            },
            NodeTime { node: "y".into(), op: "add", flops: 10, bytes: 120, spans: vec![span("add.forward", 3000, 60)] },
        ];
        Timeline { adapter: "A".into(), clock: Clock::Gpu, nodes }
    }

    #[test]
    fn totals_and_table() {
        let t = timeline();
        assert_eq!((t.ns(), t.kernel_ns()), (2560, 2060));
        assert_eq!(t.by_op()[0].0, "matmul");
        let text = t.to_string();
        assert!(text.contains("matmul.forward x2") && text.contains("97.7%"), "{text}");
    }

    #[test]
    fn the_trace_is_json_with_an_event_for_every_span() {
        let t = timeline().then(timeline());
        let trace: serde_json::Value = serde_json::from_str(&t.trace()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 + 8);
        assert_eq!(events[2]["name"], "h0.\"fc\"");
        assert_eq!(events[6]["ts"], 3.06); // after the end of the first step
        assert_eq!(events[9]["args"]["kernel"], "add.forward");
    }
}
