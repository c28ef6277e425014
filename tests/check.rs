//! `throughline::check` finds what is wrong with an op, and names it.

mod common;

use common::gpu;
use throughline::check::{self, Case, Failures};
use throughline::graph::Vjp;
use throughline::kernel::Kernel;
use throughline::ops::{Bind, Launch, Op, Program};
use throughline::reference::Array;
use throughline::{Result, TensorType};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Not a workgroup for the last elements.
    FewWorkgroups,
    /// Right where all workgroups are in one row.
    NoGrid,
    /// Something after the last element.
    StrayWrite,
    /// Close to what it should be.
    Imprecise,
    Gradient,
    Wgsl,
}

/// `y = 2 x`.
#[derive(Clone, Copy, Debug)]
struct Twice(Fault);

impl Op for Twice {
    fn name(&self) -> &'static str {
        "twice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let dx = cx.graph.scale(&cx.name, dy, if self.0 == Fault::Gradient { 2.1 } else { 2.0 })?;
        cx.set(0, dx);
        Ok(())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let row = if self.0 == Fault::NoGrid { "0u" } else { "group.y * groups.x" };
        let after = if self.0 == Fault::StrayWrite { "if (i == n - 1u) { y[n + 9u] = 0.0; }" } else { "" };
        let factor = match self.0 {
            Fault::Imprecise => "2.001",
            Fault::Wgsl => "two",
            _ => "2.0",
        };
        let wgsl = format!(
            "@group(0) @binding(0) var<uniform> n: u32;
            @group(0) @binding(1) var<storage, read> x: array<f32>;
            @group(0) @binding(2) var<storage, read_write> y: array<f32>;
            @compute @workgroup_size(64)
            fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
                    @builtin(local_invocation_index) local: u32) {{
                let i = (group.x + {row}) * 64u + local;
                if (i < n) {{ y[i] = {factor} * x[i]; }}
                {after}
            }}"
        );
        let n = cx.outputs[0].len();
        let groups = if self.0 == Fault::FewWorkgroups { n / 64 } else { n.div_ceil(64) };
        let binds = [Bind::In(0), Bind::Out(0)];
        Ok(Program::one(Kernel::new("twice", wgsl, "main"), &binds, &[n as u32], cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], _: &[TensorType]) -> Vec<Array> {
        vec![inputs[0].map(|x| 2.0 * x)]
    }
}

fn cases(fault: Fault) -> Vec<Case> {
    [1, 900].map(|n| Case::new(format!("{n} elements"), Twice(fault), &[&[n]])).into()
}

/// All failures have all of these words; there are some.
fn expect(found: Result<(), Failures>, words: &[&str]) {
    let failures = found.expect_err("nothing was found");
    assert!(failures.iter().count() > 0);
    for failure in failures.iter().map(|f| f.to_string()) {
        words.iter().for_each(|word| assert!(failure.contains(word), "no {word:?} in: {failure}"));
    }
}

#[test]
fn a_right_op_passes() {
    check::op(gpu(), &cases(Fault::None)).unwrap();
}

#[test]
fn each_fault_is_found_by_the_check_for_it() {
    let last = &cases(Fault::None)[1..];
    let run = |fault| check::kernels(gpu(), &cases(fault));
    expect(run(Fault::FewWorkgroups), &["`900 elements`", "`y`[896] is never written, of 900"]);
    expect(run(Fault::NoGrid), &["`900 elements`", "at most 4 workgroups in x and in y", "`y`[256] is never written"]);
    expect(run(Fault::StrayWrite), &["wrote byte", "of y"]);
    expect(run(Fault::Imprecise), &["`y` has an NMSE of 2.5e-7", "more than 1e-7"]);
    expect(check::gradients(&cases(Fault::Gradient)), &["gradient of input 0"]);
    expect(check::shaders(gpu(), &cases(Fault::Wgsl)), &["kernel `twice.main`", "no definition in scope"]);
    expect(run(Fault::Wgsl), &["node `y`", "twice", "two"]);
    // What one check finds, the others need not: a gradient is right or wrong whatever the kernels are.
    check::kernels(gpu(), &cases(Fault::Gradient)).unwrap();
    check::gradients(&cases(Fault::StrayWrite)).unwrap();
    check::shaders(gpu(), last).unwrap();
    expect(check::op(gpu(), &cases(Fault::Gradient)), &["gradient of input 0"]);
}

#[test]
fn texts_are_those_of_all_kernels() {
    let texts = check::texts(gpu(), &cases(Fault::None)).unwrap();
    assert!(texts["twice.main"].wgsl().unwrap().contains("2.0 * x[i]"));
    assert!(texts.keys().any(|name| name.starts_with("scale.forward")), "the gradient's kernel");
    assert!(check::wgsl("fn main() { this is not WGSL }").is_err());
}
