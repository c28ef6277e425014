//! Products of the same few rows in one dispatch: a layer's q, k and v, or its gate and up, with the norm before them.
//!
//! A token's step through a model is a few hundred small products. Each dispatch waits for the one before it, some 2 to
//! 5 us on a GPU, which is as long as many of them take; and alone a small product leaves most of a large GPU idle. So
//! on GPUs the planner computes together what can be: [`Plan::new`](crate::Plan::new) makes these ops of a graph's.

mod cases;
mod text;

use std::any::{Any, TypeId};

use super::cases::Row;
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Part, Vjp, infer};
use crate::kernel::{Bind, Gemv, Kernel, Launch, OnRead, Program};
use crate::profile::AdapterClass;
use crate::tensor::TensorType;

pub(super) const ROW: Row = Row {
    name: "products",
    summary: "y_i = norm(x) w_i^T + bias_i for several weights, or f(y_0, y_1), for few rows in one dispatch",
    sources: text::SOURCES,
    cases: cases::cases,
    bench: cases::bench,
};

/// Several products of the same few rows that the planner computes in one dispatch, with the norm that makes those rows
/// and an elementwise function of the results.
///
/// Its parts are the norm, if it has one, the products, and the function, if it has one. The inputs are `x`, then those
/// of each part in turn; the outputs are the products, or the function's result.
#[derive(Clone, Debug)]
pub struct Products {
    parts: Vec<Part>,
    norm: bool,
    function: bool,
}

/// What the parts of a launch offer.
struct Offers {
    norm: Option<OnRead>,
    products: Vec<Gemv>,
}

/// How the work is split: neighbouring columns, or quads of them, of a workgroup, and invocations that share each.
#[derive(Clone, Copy, Debug)]
struct Tile {
    lanes: usize,
    slices: usize,
}

impl Products {
    /// These parts: first the norm that makes the input of the products, if there is one, then those, and last an
    /// elementwise function of them in their order, if there is one. `None` if they do not offer to be computed so.
    pub(crate) fn new(parts: Vec<Part>, norm: bool, function: bool, inputs: &[TensorType]) -> Option<Self> {
        let op = Products { parts, norm, function };
        op.offers(inputs).ok().map(|_| op)
    }

    /// Storage buffers that its kernel binds.
    pub(crate) fn bindings(&self, inputs: &[TensorType]) -> usize {
        inputs.len() + self.outputs().len()
    }

    fn products(&self) -> std::ops::Range<usize> {
        usize::from(self.norm)..self.parts.len() - usize::from(self.function)
    }

    /// The parts whose results are outputs.
    fn outputs(&self) -> std::ops::Range<usize> {
        match self.function {
            true => self.parts.len() - 1..self.parts.len(),
            false => self.products(),
        }
    }

    /// The type of each part's first output. The error names the part.
    fn types(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let mut types: Vec<TensorType> = vec![];
        for part in &self.parts {
            let operands = part.types(inputs, &types)?;
            let inferred = infer(part.op.as_ref(), &operands).map_err(|e| format!("`{}`: {e}", part.name))?;
            types.extend(inferred.into_iter().take(1));
        }
        Ok(types)
    }

    /// What each part offers for inputs of these types. The error says which does not.
    fn offers(&self, inputs: &[TensorType]) -> Result<Offers, String> {
        let types = self.types(inputs)?;
        let refused = |part: &Part| format!("`{}` ({}) cannot be computed with others", part.name, part.op.name());
        let operands = |part: &Part| part.types(inputs, &types);
        let norm = match self.parts.first().filter(|_| self.norm) {
            Some(part) => {
                let offer = part.op.on_read(&operands(part)?);
                Some(offer.filter(|o| o.excerpt.is_of(part.op.as_ref() as &dyn Any)).ok_or_else(|| refused(part))?)
            }
            None => None,
        };
        let mut products: Vec<Gemv> = vec![];
        for part in &self.parts[self.products()] {
            let offer = part.op.gemv(&operands(part)?);
            let offer = offer.filter(|o| o.excerpt.is_of(part.op.as_ref() as &dyn Any));
            let alike = |o: &Gemv| products.first().is_none_or(|f| (f.rows, f.k, f.quads) == (o.rows, o.k, o.quads));
            products.push(offer.filter(alike).ok_or_else(|| refused(part))?);
        }
        if products.is_empty() {
            return Err("has no products".into());
        }
        if let Some(function) = self.parts.last().filter(|_| self.function) {
            let takes = function.op.elementwise().map_or(0, |f| f.operands.len());
            // Also of its result: a broadcast has more elements than the products.
            let same = types[self.products()].iter().all(|ty| Some(ty) == types.last());
            if takes != products.len() || function.operands.len() != takes || !same {
                return Err(refused(function));
            }
        }
        Ok(Offers { norm, products })
    }
}

impl Offers {
    /// Columns, or quads of them, of each product.
    fn columns(&self) -> impl Iterator<Item = usize> {
        self.products.iter().map(|p| if p.quads { p.n / 4 } else { p.n })
    }

    /// Workgroups of each dispatch's products, one after another.
    fn groups(&self, tile: Tile, function: bool) -> Vec<usize> {
        let sets = if function { 1 } else { self.products.len() };
        self.columns().take(sets).map(|columns| columns.div_ceil(tile.lanes)).collect()
    }

    /// The ways to split the work, the first one first: the most columns to a workgroup that leave twice as many
    /// workgroups as the GPU has units.
    fn tiles(&self, cx: &Launch<'_>, function: bool) -> Vec<Tile> {
        let tile = |lanes: usize| match self.products[0].quads {
            true => Tile { lanes, slices: 64 / lanes },
            false => Tile { lanes, slices: 32 },
        };
        let enough = 2 * cx.profile.units as usize;
        let mut tiles: Vec<Tile> = [8, 4, 2, 1].map(tile).to_vec();
        let groups = |tile: &Tile| self.groups(*tile, function).iter().sum::<usize>();
        let best = tiles.iter().position(|tile| groups(tile) >= enough).unwrap_or(tiles.len() - 1);
        tiles[..=best].rotate_right(1);
        tiles
    }
}

impl Op for Products {
    fn name(&self) -> &'static str {
        "products"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.offers(inputs)?;
        let types = self.types(inputs)?;
        Ok(types[self.outputs()].to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("plans make these, of graphs that have their gradients"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        let offers = self.offers(cx.inputs);
        let name = |tile: &Tile| format!("{}x{}", tile.lanes, tile.slices);
        offers.map_or(vec![], |o| o.tiles(cx, self.function).iter().map(name).collect())
    }

    fn key(&self) -> String {
        // Nodes of any name.
        self.parts.iter().map(|part| part.op.key()).collect::<Vec<_>>().join(", ")
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let offers = self.offers(cx.inputs)?;
        let tiles = offers.tiles(cx, self.function);
        let tile = *tiles.get(cx.variant).ok_or_else(|| format!("no variant {} of {}", cx.variant, tiles.len()))?;
        if cx.profile.class == AdapterClass::Cpu {
            let k = offers.products[0].k;
            cx.profile.quirks.check_loops("the inner dimension", k, (k / 4).div_ceil(tile.slices))?;
        }
        let function = self.parts.last().filter(|_| self.function).and_then(|part| part.op.elementwise());
        let groups = offers.groups(tile, self.function);
        let mut text = text::Text::new(&offers, cx.profile);
        let mut binds = vec![Bind::In(0)];
        binds.extend(text.add_norm(offers.norm.as_ref()).map_err(|e| e.to_string())?.map(Bind::In));
        for (i, product) in offers.products.iter().enumerate() {
            let next = binds.len();
            let count = text.add_product(i, product).map_err(|e| e.to_string())?;
            binds.extend((next..next + count).map(Bind::In));
        }
        text.add_entry(&offers, &groups, function.as_ref());
        binds.extend((0..cx.outputs.len()).map(Bind::Out));
        let trusted = function.is_none_or(|f| f.is_trusted());
        let kernel = Kernel::new("products", text.finish(), "forward");
        let kernel = if trusted { kernel.made_by(TypeId::of::<Self>()) } else { kernel };
        let kernel = text::with_knobs(kernel, &offers, tile, cx.profile);
        let total: usize = groups.iter().sum();
        let eps = offers.norm.as_ref().map_or(0.0, |norm| norm.eps);
        Ok(Program::one(kernel, &binds, &[total as u32, eps.to_bits()], cx.profile.grid(total)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let types = |i: usize, operands: &[&Array]| match i.checked_sub(self.products().start) {
            // Of a norm: all its inputs are f32.
            None => {
                let types: Vec<_> = operands.iter().map(|a| TensorType::f32(a.shape.clone())).collect();
                self.parts[i].op.infer(&types).unwrap_or_default()
            }
            // What a function takes has the type of its result.
            Some(_) if self.function => outputs.to_vec(),
            Some(product) => vec![outputs[product].clone()],
        };
        let results = Part::results(&self.parts, inputs, types);
        results[self.outputs()].to_vec()
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let Ok(types) = self.types(inputs) else { return 0 };
        let flops = |(part, ty): (&Part, &TensorType)| {
            let operands = part.types(inputs, &types).unwrap_or_default();
            part.op.flops(&operands, std::slice::from_ref(ty))
        };
        self.parts.iter().zip(&types).map(flops).sum()
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn made_by(&self, output: usize) -> Option<usize> {
        self.outputs().nth(output)
    }
}
