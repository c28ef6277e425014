//! The WGSL of several products: the frame, a text for each part, and an entry point that calls them.

use super::{Offers, Tile};
use crate::error::Result;
use crate::kernel::{Elementwise, Gemv, Kernel, OnRead, line, suffixed};
use crate::ops::map;
use crate::ops::source::{LaneSource, lane_source};
use crate::profile::{AdapterClass, Profile};

const FRAME: LaneSource = lane_source!("products/kernel.wgsl");

macro_rules! text {
    ($($file:literal),+) => {
        concat!($(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $file))),+)
    };
}
const ELEMENT: &str = text!("products/element.wgsl");
const QUAD: &str = text!("products/quad.wgsl");
const PLAIN: &str = text!("products/plain.wgsl");

/// The frame as it is written. The texts of the parts read bindings that are added to it.
pub(super) const SOURCES: &[&str] =
    &[text!("common/no_subgroups.wgsl", "products/kernel.wgsl", "products/element.wgsl", "products/plain.wgsl")];

/// Neighbours that can shuffle.
fn reach(profile: &Profile) -> usize {
    match profile.class {
        AdapterClass::Cpu => 1,
        AdapterClass::Gpu => profile.subgroup_lanes().unwrap_or(1) as usize,
    }
}

/// A kernel of the text with the knobs of its frame.
pub(super) fn with_knobs(kernel: Kernel, offers: &Offers, tile: Tile, profile: &Profile) -> Kernel {
    let Gemv { rows, k, quads, .. } = offers.products[0];
    let step = if quads { tile.lanes } else { 1 };
    let kernel = kernel
        .knob("ROWS", rows as u32)
        .knob("QUADS", (k / 4) as u32)
        .knob("LANES", tile.lanes as u32)
        .knob("SLICES", tile.slices as u32)
        .knob("STEP", step as u32)
        .knob("REACH", reach(profile).min(step * tile.slices) as u32)
        .knob("E", if quads { "vec4<f32>" } else { "f32" });
    match offers.norm {
        Some(_) => kernel.knob("NORM_REACH", reach(profile).min(tile.lanes * tile.slices) as u32),
        None => kernel,
    }
}

pub(super) struct Text {
    text: String,
    /// The number of the next binding.
    next: usize,
    quads: bool,
}

impl Text {
    pub fn new(offers: &Offers, profile: &Profile) -> Self {
        let quads = offers.products[0].quads;
        let mut text = FRAME.text(reach(profile) > 1).to_string();
        text += if quads { QUAD } else { ELEMENT };
        Text { text, next: 2, quads }
    }

    /// The declaration of the next binding.
    fn declare(&mut self, name: &str, access: &str, element: &str) -> String {
        let number = self.next;
        self.next += 1;
        format!("@group(0) @binding({number}) var<storage, {access}> {name}: array<{element}>;\n")
    }

    /// Adds what reads x, and returns which inputs it takes besides.
    pub fn add_norm(&mut self, norm: Option<&OnRead>) -> Result<std::ops::Range<usize>> {
        let Some(norm) = norm else {
            self.text += PLAIN;
            return Ok(1..1);
        };
        let wgsl = norm.excerpt.wgsl()?;
        for name in norm.inputs {
            let vector = self.declare(name, "read", "vec4<f32>");
            self.text += &vector;
        }
        self.text += &wgsl;
        Ok(1..1 + norm.inputs.len())
    }

    /// Adds what makes a share of product `i`, and returns how many inputs it takes besides x.
    pub fn add_product(&mut self, i: usize, product: &Gemv) -> Result<usize> {
        let mut text = self.declare("w", "read", product.element);
        if product.bias {
            text += &self.declare("bias", "read", "E");
        }
        text += &product.excerpt.wgsl()?;
        self.text += &suffixed(&text, &format!("_{i}"));
        Ok(1 + usize::from(product.bias))
    }

    /// Adds the entry point. `groups` are the workgroups of each product.
    pub fn add_entry(&mut self, offers: &Offers, groups: &[usize], function: Option<&Elementwise>) {
        let columns: Vec<usize> = offers.columns().collect();
        let outputs = if function.is_some() { 1 } else { offers.products.len() };
        for i in 0..outputs {
            let output = self.declare(&format!("y_{i}"), "read_write", "E");
            self.text += &output;
        }
        let biased = |i: usize, value: &str| match offers.products[i].bias {
            true => format!("{value} + bias_{i}[col]"),
            false => value.to_string(),
        };
        let (mut make, mut store) = (String::new(), String::new());
        match function {
            Some(function) => {
                let names: Vec<String> = (0..offers.products.len()).map(|i| format!("sums_{i}")).collect();
                for (i, name) in names.iter().enumerate() {
                    line!(make, "    let {name} = reduced(share_{i}(col, slice), lid);");
                }
                let operand = |(i, name): (usize, &String)| format!("({})", biased(i, &format!("{name}[r]")));
                let operands: Vec<String> = names.iter().enumerate().map(operand).collect();
                let constant = |(_, value): &(_, f32)| format!("bitcast<f32>({}u)", value.to_bits());
                let constants: Vec<String> = function.constants.iter().map(constant).collect();
                self.text += &map::function("result", function);
                let value = map::call("result", self.quads, &operands, &constants);
                line!(store, "        for (var r = 0u; r < ROWS; r++) {{ // unroll");
                line!(store, "            y_0[r * {}u + col] = {value};", columns[0]);
                line!(store, "        }}");
            }
            None => {
                line!(make, "    var sums: Sums;");
                self.add_branches(&mut make, groups, |i, out| line!(out, "        sums = share_{i}(col, slice);"));
                line!(make, "    sums = reduced(sums, lid);");
                self.add_branches(&mut store, groups, |i, out| {
                    line!(out, "        for (var r = 0u; r < ROWS; r++) {{ // unroll");
                    line!(out, "            y_{i}[r * {}u + col] = {};", columns[i], biased(i, "sums[r]"));
                    line!(out, "        }}");
                });
            }
        }
        let mut first = 0;
        let mut place = String::new();
        for (i, count) in groups.iter().enumerate() {
            if i > 0 {
                line!(place, "    if (group >= {first}u) {{");
                line!(place, "        first = {first}u;");
                line!(place, "        columns = {}u;", columns[i]);
                line!(place, "    }}");
            }
            first += count;
        }
        line!(
            self.text,
            "
@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {{
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {{
        return;
    }}
    prepare(lid);
    // The first workgroup of the product, and its columns.
    var first = 0u;
    var columns = {}u;
{place}    let col = (group - first) * LANES + lane_of(lid);
    let slice = slice_of(lid);
{make}    if (slice == 0u && col < columns) {{
{store}    }}
}}",
            columns[0]
        );
    }

    /// Adds what is done for each product in the workgroups that are its own.
    fn add_branches(&self, out: &mut String, groups: &[usize], mut add: impl FnMut(usize, &mut String)) {
        let mut end = 0;
        for (i, count) in groups.iter().enumerate() {
            end += count;
            let (before, condition) = (if i == 0 { "    " } else { " else " }, format!("if (group < {end}u) "));
            let last = i > 0 && i + 1 == groups.len();
            line!(out, "{before}{}{{", if last { "" } else { &condition });
            add(i, out);
            out.push_str("    }");
        }
        out.push('\n');
    }

    pub fn finish(self) -> String {
        // What the function calls comes last: order does not matter in WGSL.
        let helpers = map::helpers(&self.text);
        self.text + &helpers
    }
}
