//! What the planner needs to know of an elementwise op to compute it in one kernel with others.

use std::borrow::Cow;

/// A scalar function in WGSL: how an op offers to be computed in one kernel with the elementwise ops before and after
/// it. See [`Op::elementwise`](crate::ops::Op::elementwise).
///
/// [`Map`](crate::ops::map::Map) makes one of its function; an op of your own can return that of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Elementwise {
    pub(crate) operands: Cow<'static, [&'static str]>,
    /// Settings, which a kernel reads from its uniform.
    pub(crate) constants: Vec<(&'static str, f32)>,
    /// An expression in the names of operands and constants.
    pub(crate) wgsl: Cow<'static, str>,
    trusted: bool,
}

impl Elementwise {
    /// A function whose text is this crate's own, so that it may run without bounds checks.
    pub(crate) fn trusted(
        operands: impl Into<Cow<'static, [&'static str]>>,
        wgsl: impl Into<Cow<'static, str>>,
    ) -> Self {
        Elementwise { operands: operands.into(), constants: vec![], wgsl: wgsl.into(), trusted: true }
    }

    /// One whose text may be anything.
    pub(crate) fn untrusted(
        operands: impl Into<Cow<'static, [&'static str]>>,
        wgsl: impl Into<Cow<'static, str>>,
    ) -> Self {
        Elementwise { trusted: false, ..Elementwise::trusted(operands, wgsl) }
    }

    /// Adds a constant that the expression mentions.
    pub(crate) fn constant(mut self, name: &'static str, value: f32) -> Self {
        self.constants.push((name, value));
        self
    }

    /// Whether its text is this crate's own.
    pub(crate) fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Whether both are the same function, with whatever constants.
    pub(crate) fn same_function(&self, other: &Elementwise) -> bool {
        let names = |e: &Elementwise| e.constants.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        self.wgsl == other.wgsl && self.operands == other.operands && names(self) == names(other)
    }
}
