//! Where a step spends its time: node by node, and as a trace for Perfetto or `chrome://tracing`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, Result};

/// The clock that the times come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The GPU's timestamps.
    #[default]
    Gpu,
    /// The host's clock around each kernel, with a wait after each: for devices opened without `TIMESTAMP_QUERY`, and
    /// those whose timestamps measure nothing. Includes the cost of a submit and a wait.
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
    /// Names of other nodes that it computes in the same kernel: those before it in a
    /// [chain](crate::ops::map::Chain).
    pub others: Vec<String>,
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
    /// `false` if the clock gave no time for it, so that `ns` is an estimate: the mean of this kernel's other
    /// dispatches in the step, or else of all that was measured.
    pub measured: bool,
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

    /// Duration of each kernel and copy in nanoseconds, in order: never zero, which would be no measurement but is
    /// estimated. An `Err` if all are zero.
    pub(crate) fn command_ns(&self) -> Result<Vec<u64>> {
        let spans = || self.nodes.iter().flat_map(|n| &n.spans);
        let mean = |what: Option<&str>| {
            let known = spans().filter(|s| s.ns > 0 && what.is_none_or(|what| s.what == what));
            let (sum, n) = known.fold((0u128, 0u128), |(sum, n), s| (sum + u128::from(s.ns), n + 1));
            sum.checked_div(n).map(|ns| ns as u64)
        };
        let Some(usual) = mean(None) else {
            return Err(Error::data("profile", "at least one time that is not zero", "none"));
        };
        let ns = |s: &Span| if s.ns > 0 { s.ns } else { mean(Some(&s.what)).unwrap_or(usual) };
        Ok(spans().map(ns).collect())
    }

    /// The same timeline with estimates where nothing was measured, which is where `ns` is zero. `None` if less than
    /// half was.
    pub(super) fn with_estimates(mut self) -> Option<Timeline> {
        let spans = || self.nodes.iter().flat_map(|n| &n.spans);
        if 2 * spans().filter(|s| s.measured).count() < spans().count() {
            return None;
        }
        let estimates = if spans().any(|s| !s.measured) { self.command_ns().ok()? } else { return Some(self) };
        let mut end = 0;
        for (span, ns) in self.nodes.iter_mut().flat_map(|n| &mut n.spans).zip(estimates) {
            if !span.measured {
                (span.start_ns, span.ns) = (end, ns);
            }
            end = span.start_ns + span.ns;
        }
        Some(self)
    }

    /// Whether the times of all kernels were measured.
    pub(super) fn has_all_kernels(&self) -> bool {
        self.nodes.iter().flat_map(|n| &n.spans).all(|s| s.measured || s.what == COPY)
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
                // An estimate gives way to a measurement.
                if (!other.measured, other.ns) < (!span.measured, span.ns) {
                    (span.ns, span.measured) = (other.ns, other.measured);
                }
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
                    "args": {"kernel": span.what, "others": node.others, "node's GFLOP": node.flops as f64 / 1e9, "node's MB": node.bytes as f64 / 1e6, "measured": span.measured},
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

/// `kernel a, kernel b x3, with node c`.
fn kernels(node: &NodeTime) -> String {
    let mut names: Vec<(&str, usize)> = vec![];
    for span in &node.spans {
        match names.iter_mut().find(|(name, _)| *name == span.what) {
            Some((_, n)) => *n += 1,
            None => names.push((&span.what, 1)),
        }
    }
    let shown = names.iter().map(|(name, n)| if *n == 1 { name.to_string() } else { format!("{name} x{n}") });
    let with = if node.others.is_empty() { String::new() } else { format!(", with {}", node.others.join(", ")) };
    shown.collect::<Vec<_>>().join(", ") + &with
}

impl fmt::Display for Timeline {
    /// A table of the nodes in order, then one of the ops by time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.ns();
        let clock = match self.clock {
            Clock::Gpu => "GPU timestamps",
            Clock::Host => "host clock, waiting between kernels",
        };
        let spans = || self.nodes.iter().flat_map(|n| &n.spans);
        let estimated = match spans().filter(|s| !s.measured).count() {
            0 => String::new(),
            n => format!("; {n} of {} times are estimates", spans().count()),
        };
        writeln!(f, "{}: {:.3} ms ({clock}{estimated})", self.adapter, all as f64 / 1e6)?;
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
        let span = |what: &str, start_ns, ns| Span { what: what.into(), start_ns, ns, measured: true };
        let nodes = vec![
            NodeTime {
                node: "h0.\"fc\"".into(),
                others: vec![],
                op: "matmul",
                flops: 4000,
                bytes: 100,
                spans: vec![span(COPY, 0, 500), span("matmul.forward", 600, 1000), span("matmul.forward", 1700, 1000)],
            },
            NodeTime {
                node: "y".into(),
                others: vec!["x".into()],
                op: "chain",
                flops: 10,
                bytes: 120,
                spans: vec![span("map.forward", 3000, 60)],
            },
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
        assert!(text.contains("map.forward, with x\n"), "{text}");
    }

    #[test]
    fn the_trace_is_json_with_an_event_for_every_span() {
        let t = timeline().then(timeline());
        let trace: serde_json::Value = serde_json::from_str(&t.trace()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 + 8);
        assert_eq!(events[2]["name"], "h0.\"fc\"");
        assert_eq!(events[6]["ts"], 3.06); // after the end of the first step
        assert_eq!(
            (&events[9]["args"]["kernel"], &events[9]["args"]["others"][0]),
            (&"map.forward".into(), &"x".into())
        );
    }

    #[test]
    fn what_was_not_measured_is_estimated_and_says_so() {
        let missing = |spans: &[usize]| {
            let mut t = timeline();
            let all = t.nodes.iter_mut().flat_map(|n| &mut n.spans).enumerate();
            all.filter(|(i, _)| spans.contains(i)).for_each(|(_, s)| (s.ns, s.measured) = (0, false));
            t
        };
        assert!(missing(&[0, 1, 2]).with_estimates().is_none());
        let t = missing(&[0, 2]).with_estimates().unwrap();
        // A copy gets the mean of all, a kernel that of its other dispatch.
        let spans: Vec<_> = t.nodes.iter().flat_map(|n| &n.spans).map(|s| (s.start_ns, s.ns, s.measured)).collect();
        assert_eq!(spans, [(0, 530, false), (600, 1000, true), (1600, 1000, false), (3000, 60, true)]);
        assert!(t.to_string().contains("2 of 4 times are estimates"), "{t}");
        assert!(!t.has_all_kernels() && missing(&[0]).has_all_kernels());
        // Measured once, it is known.
        assert_eq!(t.clone().shorter(&timeline()).ns(), 2560);
        assert_eq!(timeline().shorter(&t).command_ns().unwrap(), [500, 1000, 1000, 60]);
        assert!(missing(&[0, 1, 2, 3]).command_ns().unwrap_err().to_string().contains("not zero"));
    }
}
