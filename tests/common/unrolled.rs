//! How long a kernel becomes when a compiler inlines its functions and unrolls its loops: what its compile time grows
//! with, counted without a compiler or a clock.

use std::collections::HashMap;

use throughline::kernel::Kernel;
use wgpu::naga::{
    BinaryOperator, Block, Expression, Function, Handle, Literal, LocalVariable, Module, Statement, front::wgsl,
};

/// A kernel, unrolled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unrolled {
    /// Statements and expressions.
    pub size: usize,
    /// Iterations of the longest loop of constant length.
    pub longest: u32,
    /// Whether there are loops of no constant length.
    pub open: bool,
}

impl Unrolled {
    pub fn of(kernel: &Kernel) -> Self {
        let module = wgsl::parse_str(&kernel.wgsl().unwrap()).unwrap();
        let entry = module.entry_points.iter().find(|e| e.name == kernel.entry).unwrap();
        let mut found = Unrolled::default();
        let size = Walk::new(&module, &entry.function).size(&entry.function.body, &mut found);
        Unrolled { size, ..found }
    }
}

struct Walk<'a> {
    module: &'a Module,
    function: &'a Function,
    /// The variables whose values are known.
    values: HashMap<Handle<LocalVariable>, u32>,
}

impl<'a> Walk<'a> {
    fn new(module: &'a Module, function: &'a Function) -> Self {
        let mut walk = Walk { module, function, values: HashMap::new() };
        for (variable, local) in function.local_variables.iter() {
            let value = local.init.and_then(|init| walk.constant(init));
            walk.values.extend(value.map(|v| (variable, v)));
        }
        walk
    }

    fn size(&mut self, block: &Block, found: &mut Unrolled) -> usize {
        block.iter().map(|statement| self.size_of(statement, found)).sum()
    }

    fn size_of(&mut self, statement: &Statement, found: &mut Unrolled) -> usize {
        match statement {
            Statement::Emit(range) => range.clone().count(),
            Statement::Block(block) => self.size(block, found),
            Statement::If { accept, reject, .. } => 1 + self.size(accept, found) + self.size(reject, found),
            Statement::Switch { cases, .. } => cases.iter().map(|case| self.size(&case.body, found)).sum(),
            Statement::Loop { body, continuing, .. } => {
                let iterations = self.iterations(body, continuing);
                found.longest = iterations.unwrap_or(0).max(found.longest);
                found.open |= iterations.is_none();
                let size = self.size(body, found) + self.size(continuing, found);
                iterations.unwrap_or(1) as usize * size
            }
            Statement::Call { function, .. } => {
                let function = &self.module.functions[*function];
                1 + Walk::new(self.module, function).size(&function.body, found)
            }
            Statement::Store { pointer, value } => {
                if let Expression::LocalVariable(variable) = self.function.expressions[*pointer] {
                    match self.constant(*value) {
                        Some(value) => self.values.insert(variable, value),
                        None => self.values.remove(&variable),
                    };
                }
                1
            }
            _ => 1,
        }
    }

    /// Iterations of `for (var i = A; i < B; i += C)` with constants.
    fn iterations(&self, body: &Block, continuing: &Block) -> Option<u32> {
        let condition = body.iter().find_map(|s| match s {
            Statement::If { condition, accept, .. } if accept.is_empty() => Some(*condition),
            _ => None,
        })?;
        let (variable, end) = self.operation(BinaryOperator::Less, condition)?;
        let step = continuing.iter().find_map(|s| match s {
            Statement::Store { value, .. } => self.operation(BinaryOperator::Add, *value),
            _ => None,
        })?;
        let start = self.values.get(&variable)?;
        (step.0 == variable).then(|| end.saturating_sub(*start).div_ceil(step.1))
    }

    /// The operands of an operation on a variable and a constant.
    fn operation(&self, wanted: BinaryOperator, of: Handle<Expression>) -> Option<(Handle<LocalVariable>, u32)> {
        let Expression::Binary { op, left, right } = self.function.expressions[of] else { return None };
        let Expression::Load { pointer } = self.function.expressions[left] else { return None };
        let Expression::LocalVariable(variable) = self.function.expressions[pointer] else { return None };
        (op == wanted).then(|| Some((variable, self.constant(right)?)))?
    }

    fn constant(&self, of: Handle<Expression>) -> Option<u32> {
        let expression = match self.function.expressions[of] {
            Expression::Constant(constant) => &self.module.global_expressions[self.module.constants[constant].init],
            ref other => other,
        };
        match expression {
            Expression::Literal(Literal::U32(value)) => Some(*value),
            _ => None,
        }
    }
}
