//! The WGSL of elementwise functions, applied one after another.

use super::broadcast::{Access, Walk};
use crate::graph::Operand;
use crate::kernel::{Bind, Elementwise, Kernel, Launch, Program, filled, line};
use crate::ops::elementwise;

/// The text around them.
const SKELETON: &str = include_str!("../../../shaders/map/kernel.wgsl");

/// What expressions may call.
const HELPERS: &str = include_str!("../../../shaders/map/helpers.wgsl");

/// The texts as they are written.
pub(super) const SOURCES: &[&str] = &[SKELETON, HELPERS];

/// A function, and what it is applied to.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub function: Elementwise,
    pub operands: Vec<Operand>,
}

/// One dispatch that applies the links to the inputs, in order, and writes the results of some. `kernel` makes a kernel
/// of its text and entry point.
pub(super) fn launch(
    cx: &Launch<'_>,
    links: &[Link],
    outputs: &[usize],
    kernel: impl FnOnce(String, &'static str) -> Kernel,
) -> Program {
    let walk = Walk::new(cx.inputs, &cx.outputs[0].shape);
    let mut text = Text { quads: walk.quads, stride: elementwise::invocations(cx.profile), ..Text::default() };
    text.add_inputs(&walk);
    text.add_links(links);
    text.add_outputs(cx.inputs.len(), outputs);
    let (source, words) = text.finish();
    let binds: Vec<Bind> = (0..cx.inputs.len()).map(Bind::In).chain((0..outputs.len()).map(Bind::Out)).collect();
    let len = cx.outputs[0].len().div_ceil(if walk.quads { 4 } else { 1 });
    elementwise::elements(cx, len, kernel(source, "forward"), &binds, &words)
}

/// What replaces the lines of the skeleton, and the words that its uniform gets after the length.
#[derive(Default)]
struct Text {
    quads: bool,
    /// How far apart the elements of an invocation are, in units of E.
    stride: usize,
    fields: String,
    words: Vec<u32>,
    bindings: String,
    functions: String,
    start: String,
    body: String,
    /// What comes after the stores.
    advance: String,
}

impl Text {
    fn field(&mut self, name: &str, word: usize) {
        line!(self.fields, "    {name}: u32,");
        self.words.push(word as u32);
    }

    fn add_inputs(&mut self, walk: &Walk) {
        let unit = if self.quads { 4 } else { 1 };
        self.add_coordinates(&walk.sizes, unit);
        for (i, access) in walk.accesses.iter().enumerate() {
            self.add_input(i, access, unit);
        }
    }

    /// The coordinates along blocks of dimensions, as `c_0` (the innermost), `c_1`, .. They are counted along with i,
    /// digit by digit, since divisions are expensive.
    fn add_coordinates(&mut self, sizes: &[usize], unit: usize) {
        let mut step = self.stride;
        for (b, size) in sizes.iter().enumerate() {
            let size = size / if b == 0 { unit } else { 1 };
            let carry = if b == 0 { String::new() } else { format!(" + select(0u, 1u, carry_{})", b - 1) };
            // The size of the last is not needed: that coordinate is what is left.
            if b + 1 == sizes.len() {
                self.field(&format!("step_{b}"), step);
                line!(self.start, "    var c_{b} = rest;");
                line!(self.advance, "        c_{b} += p.step_{b}{carry};");
                return;
            }
            self.field(&format!("size_{b}"), size);
            self.field(&format!("step_{b}"), step % size);
            step /= size;
            if b == 0 {
                line!(self.start, "    var rest = first;");
            }
            line!(self.start, "    var c_{b} = rest % p.size_{b};");
            line!(self.start, "    rest /= p.size_{b};");
            line!(self.advance, "        c_{b} += p.step_{b}{carry};");
            line!(self.advance, "        let carry_{b} = c_{b} >= p.size_{b};");
            line!(self.advance, "        c_{b} -= select(0u, p.size_{b}, carry_{b});");
        }
    }

    /// Loads input `i` as `v_i`.
    fn add_input(&mut self, i: usize, access: &Access, unit: usize) {
        let number = i + 1;
        // One element is loaded where it counts for a whole quad.
        let single = match access {
            Access::Scalar => true,
            Access::Strided(strides) => strides[0] == 0,
            Access::Whole | Access::Period(_) => false,
        };
        let (ty, len) = (if single { "f32" } else { "E" }, if single { "elements" } else { "in units of E" });
        line!(self.bindings, "@group(0) @binding({number}) var<storage, read> in_{i}: array<{ty}>; // [{len}]");
        match access {
            Access::Whole => line!(self.body, "        let v_{i} = in_{i}[i];"),
            Access::Scalar => line!(self.start, "    let v_{i} = E(in_{i}[0]);"),
            Access::Period(period) => {
                let period = period / unit;
                self.field(&format!("period_{i}"), period);
                self.field(&format!("period_step_{i}"), self.stride % period);
                line!(self.start, "    var at_{i} = first % p.period_{i};");
                line!(self.body, "        let v_{i} = in_{i}[at_{i}];");
                line!(self.advance, "        at_{i} += p.period_step_{i};");
                line!(self.advance, "        at_{i} -= select(0u, p.period_{i}, at_{i} >= p.period_{i});");
            }
            Access::Strided(strides) => {
                let mut terms = vec![];
                for (b, &stride) in strides.iter().enumerate().filter(|(_, stride)| **stride > 0) {
                    if b == 0 {
                        terms.push("c_0".into());
                        continue;
                    }
                    self.field(&format!("stride_{i}_{b}"), if single { stride } else { stride / unit });
                    terms.push(format!("c_{b} * p.stride_{i}_{b}"));
                }
                let at = terms.join(" + ");
                match single {
                    true => line!(self.body, "        let v_{i} = E(in_{i}[{at}]);"),
                    false => line!(self.body, "        let v_{i} = in_{i}[{at}];"),
                }
            }
        }
    }

    /// Computes the result of link `j` as `t_j`.
    fn add_links(&mut self, links: &[Link]) {
        let mut written: Vec<&Elementwise> = vec![];
        for (j, link) in links.iter().enumerate() {
            let f = written.iter().position(|f| f.same_function(&link.function)).unwrap_or_else(|| {
                self.functions += &function(&format!("f_{}", written.len()), &link.function);
                written.push(&link.function);
                written.len() - 1
            });
            let mut settings = vec![];
            for (k, (_, value)) in link.function.constants.iter().enumerate() {
                line!(self.fields, "    constant_{j}_{k}: f32,");
                self.words.push(value.to_bits());
                settings.push(format!("p.constant_{j}_{k}"));
            }
            let operand = |operand: &Operand| match operand {
                Operand::Input(i) => format!("v_{i}"),
                Operand::Part(i) => format!("t_{i}"),
            };
            let operands: Vec<String> = link.operands.iter().map(operand).collect();
            line!(self.body, "        let t_{j} = {};", call(&format!("f_{f}"), self.quads, &operands, &settings));
        }
    }

    fn add_outputs(&mut self, inputs: usize, outputs: &[usize]) {
        for (o, link) in outputs.iter().enumerate() {
            let number = inputs + o + 1;
            line!(
                self.bindings,
                "@group(0) @binding({number}) var<storage, read_write> out_{o}: array<E>; // [in units of E]"
            );
            line!(self.body, "        out_{o}[i] = t_{link};");
        }
    }

    fn finish(self) -> (String, Vec<u32>) {
        let functions = helpers(&self.functions) + &self.functions;
        let skeleton = match self.quads {
            true => SKELETON.into(),
            false => SKELETON.replace("alias E = vec4<f32>;", "alias E = f32;"),
        };
        let body = self.body + &self.advance;
        let lines: [(&str, &str); 5] = [
            ("    //: fields\n", &self.fields),
            ("//: bindings\n", &self.bindings),
            ("//: functions\n", &functions),
            ("    //: start\n", &self.start),
            ("        //: body\n", &body),
        ];
        (filled(&skeleton, &lines), self.words)
    }
}

/// The function as one of WGSL.
pub(crate) fn function(name: &str, function: &Elementwise) -> String {
    let names = function.operands.iter().chain(function.constants.iter().map(|(name, _)| name));
    let parameters: Vec<String> = names.map(|name| format!("{name}: f32")).collect();
    let (parameters, wgsl) = (parameters.join(", "), &function.wgsl);
    format!("\nfn {name}({parameters}) -> f32 {{\n    return {wgsl};\n}}\n")
}

/// A call of it with these operands, elements or quads, and constants.
pub(crate) fn call(name: &str, quads: bool, operands: &[String], constants: &[String]) -> String {
    let component = |component: &str| {
        let operands = operands.iter().map(|operand| format!("{operand}{component}"));
        format!("{name}({})", operands.chain(constants.iter().cloned()).collect::<Vec<_>>().join(", "))
    };
    match quads {
        true => format!("vec4<f32>({})", [".x", ".y", ".z", ".w"].map(component).join(", ")),
        false => component(""),
    }
}

/// The helpers that a text calls.
pub(crate) fn helpers(text: &str) -> String {
    let mut found = String::new();
    // From the end: each comes after those that it calls.
    for helper in HELPERS.rsplit("\n\n").filter(|part| part.contains("fn ")) {
        let name = helper.split_once("fn ").and_then(|(_, rest)| rest.split_once('(')).map_or("", |(name, _)| name);
        let call = format!("{name}(");
        if text.contains(&call) || found.contains(&call) {
            found = format!("\n{}\n{found}", helper.trim_end());
        }
    }
    found
}
