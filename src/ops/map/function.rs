//! Elementwise functions: a WGSL expression, its gradients, and both in f64.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::functions::{self, Entry};
use crate::kernel::Elementwise;
use crate::kernel::wgsl::Module;

/// In f64, of the operands and then the constants; of gradients also of the output and its cotangent.
pub(super) type Reference = Arc<dyn Fn(&[f64]) -> f64 + Send + Sync>;

/// What expressions of gradients call the output and its cotangent.
pub(super) const OUTPUT: &str = "y";
pub(super) const COTANGENT: &str = "dy";

#[derive(Clone)]
pub(super) struct Function {
    pub name: &'static str,
    pub operands: Vec<&'static str>,
    /// Names of settings, which a kernel reads from its uniform.
    pub constants: Vec<&'static str>,
    /// A scalar expression in the names of operands and constants.
    pub wgsl: Cow<'static, str>,
    pub reference: Reference,
    /// One for each operand.
    pub gradients: Vec<Gradient>,
    origin: Origin,
    /// What was wrong with it as it was made.
    flaw: Option<String>,
}

/// Who wrote a function's expressions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The table of this crate.
    Table,
    /// Somebody else, who can write anything.
    Own,
    /// The same, and it has been checked: gradients of functions that have.
    OwnChecked,
}

#[derive(Clone)]
pub(super) enum Gradient {
    /// Nobody has given one.
    Missing,
    /// None flows: the function is constant in that operand nearly everywhere.
    Nothing,
    /// An expression that may also mention the output and its cotangent.
    Is(Cow<'static, str>, Reference),
}

/// How a gradient is computed.
pub(super) enum Slope {
    Missing,
    Nothing,
    /// It is the cotangent itself.
    Cotangent,
    /// A function of these.
    Of(Arc<Function>, Vec<Argument>, Vec<f32>),
}

/// What the function of a gradient is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    Cotangent,
    Operand(usize),
    Output,
}

impl Function {
    /// A function that somebody else wrote.
    pub fn own(name: &'static str, operands: Vec<&'static str>, wgsl: Cow<'static, str>, reference: Reference) -> Self {
        let gradients = vec![Gradient::Missing; operands.len()];
        Function { name, operands, constants: vec![], wgsl, reference, gradients, origin: Origin::Own, flaw: None }
    }

    /// A function of the table.
    pub fn of_table(entry: &Entry) -> Self {
        let gradient = |operand: &&str| match entry.gradients.iter().find(|(of, ..)| of == operand) {
            Some(&(_, wgsl, reference)) => Gradient::Is(wgsl.into(), Arc::new(reference)),
            None => Gradient::Nothing,
        };
        Function {
            name: entry.name,
            operands: entry.operands.to_vec(),
            constants: entry.constants.to_vec(),
            wgsl: entry.wgsl.into(),
            reference: Arc::new(entry.reference),
            gradients: entry.operands.iter().map(gradient).collect(),
            origin: Origin::Table,
            flaw: None,
        }
    }

    /// Adds a constant. From here on the text is no longer the table's own, wherever the function came from.
    pub fn add_constant(&mut self, name: &'static str) {
        self.origin = Origin::Own;
        self.constants.push(name);
    }

    /// Adds the gradient of the first operand that has none, from a function of `n` operands. Again, the text is no
    /// longer the table's own.
    pub fn add_gradient(&mut self, wgsl: Cow<'static, str>, reference: Reference, n: usize) {
        self.origin = Origin::Own;
        match self.gradients.iter_mut().find(|g| matches!(g, Gradient::Missing)) {
            Some(gradient) if n == self.operands.len() => *gradient = Gradient::Is(wgsl, reference),
            Some(_) => self.flaw = Some(format!("`{wgsl}` is the gradient of a function of {n} operands")),
            None => self.flaw = Some(format!("`{wgsl}` is one gradient too many")),
        }
    }

    /// Whether its results may be beyond f16 for operands that are not.
    pub fn is_wide(&self) -> bool {
        self.is_trusted() && functions::WIDE.contains(&self.name)
    }

    /// Whether its text is this crate's own, so that it may run without bounds checks.
    pub fn is_trusted(&self) -> bool {
        self.origin == Origin::Table
    }

    /// What is wrong with its names and expressions, if anything. What only a compiler can tell is left to that.
    pub fn check(&self) -> Result<(), String> {
        if self.origin != Origin::Own {
            return Ok(());
        }
        if let Some(flaw) = &self.flaw {
            return Err(flaw.clone());
        }
        let names = [&self.operands[..], &self.constants].concat();
        for (i, name) in names.iter().enumerate() {
            let word = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !word || !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
                return Err(format!("`{name}` is no name for an operand or constant: names are letters and digits"));
            }
            if [OUTPUT, COTANGENT].contains(name) || names[..i].contains(name) {
                return Err(format!("the name `{name}` has two meanings: `y` is the output, `dy` its cotangent"));
            }
        }
        check_expression(&self.wgsl, &names)?;
        for gradient in &self.gradients {
            if let Gradient::Is(wgsl, _) = gradient {
                check_expression(wgsl, &[&names[..], &[OUTPUT, COTANGENT]].concat())?;
            }
        }
        Ok(())
    }

    /// How the gradient of an operand is computed, with these values of the constants.
    pub fn slope(&self, operand: usize, values: &[f32]) -> Slope {
        let (wgsl, reference) = match &self.gradients[operand] {
            Gradient::Missing => return Slope::Missing,
            Gradient::Nothing => return Slope::Nothing,
            Gradient::Is(wgsl, reference) => (wgsl, reference),
        };
        if wgsl.trim() == COTANGENT {
            return Slope::Cotangent;
        }
        let words = Module::parse(wgsl);
        let mentioned = |name: &str| (0..words.tokens.len()).any(|i| words.word(i) == name && words.is_name(i));
        // The cotangent always takes part, as it has the output's shape.
        let mut arguments = vec![Argument::Cotangent];
        arguments.extend((0..self.operands.len()).filter(|&i| mentioned(self.operands[i])).map(Argument::Operand));
        arguments.extend(mentioned(OUTPUT).then_some(Argument::Output));
        let constants: Vec<usize> = (0..self.constants.len()).filter(|&i| mentioned(self.constants[i])).collect();
        let name = |argument: &Argument| match *argument {
            Argument::Cotangent => COTANGENT,
            Argument::Operand(i) => self.operands[i],
            Argument::Output => OUTPUT,
        };
        let operands: Vec<&'static str> = arguments.iter().map(name).collect();
        if constants.is_empty()
            && let Some(known) = functions::find(&functions::canonical(wgsl, &operands))
        {
            return Slope::Of(Arc::new(Function::of_table(known)), arguments, vec![]);
        }
        // Where the reference finds its values among those that the new function is called with.
        let at = |argument: Argument| arguments.iter().position(|a| *a == argument);
        let mut places: Vec<Option<usize>> = (0..self.operands.len()).map(|i| at(Argument::Operand(i))).collect();
        let constant = |i: usize| constants.iter().position(|&c| c == i).map(|i| arguments.len() + i);
        places.extend((0..self.constants.len()).map(constant));
        places.extend([at(Argument::Output), at(Argument::Cotangent)]);
        let reference = reference.clone();
        let reference = move |given: &[f64]| {
            let all: Vec<f64> = places.iter().map(|at| at.map_or(f64::NAN, |i| given[i])).collect();
            reference(&all)
        };
        let function = Function {
            name: backward_name(self.name),
            gradients: vec![Gradient::Missing; operands.len()],
            operands,
            constants: constants.iter().map(|&i| self.constants[i]).collect(),
            wgsl: wgsl.clone(),
            reference: Arc::new(reference),
            origin: if self.is_trusted() { Origin::Table } else { Origin::OwnChecked },
            flaw: None,
        };
        Slope::Of(Arc::new(function), arguments, constants.iter().map(|&i| values[i]).collect())
    }

    /// What a kernel is made of, with these values of the constants.
    pub fn elementwise(&self, values: &[f32]) -> Elementwise {
        let (operands, wgsl) = (self.operands.clone(), self.wgsl.clone());
        let function = match self.is_trusted() {
            true => Elementwise::trusted(operands, wgsl),
            false => Elementwise::untrusted(operands, wgsl),
        };
        self.constants.iter().zip(values).fold(function, |f, (name, &value)| f.constant(name, value))
    }

    /// Operations of one element: operators, and calls of functions.
    pub fn flops(&self) -> u64 {
        let words = Module::parse(&self.wgsl);
        let operator = |i: usize| matches!(words.word(i), "+" | "-" | "*" | "/");
        let call = |i: usize| words.is_name(i) && words.word(i + 1) == "(" && words.word(i) != "select";
        (0..words.tokens.len()).filter(|&i| operator(i) || call(i)).count() as u64
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}) = {}", self.name, self.operands.join(", "), self.wgsl)
    }
}

/// `<name>_backward`. Names of ops live as long as the program, so each is made once.
fn backward_name(name: &'static str) -> &'static str {
    static NAMES: Mutex<Option<HashMap<&'static str, &'static str>>> = Mutex::new(None);
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let names = names.get_or_insert_default();
    names.entry(name).or_insert_with(|| format!("{name}_backward").leak())
}

/// Names that an expression may mention without calling them.
const TYPES: [&str; 12] =
    ["f32", "u32", "i32", "bool", "vec2", "vec3", "vec4", "array", "bitcast", "true", "false", "f16"];

/// Checks that a text is one expression, with no names but those that are known and those of functions.
fn check_expression(wgsl: &str, known: &[&str]) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("its WGSL `{wgsl}` {what}"));
    if wgsl.contains("//") || wgsl.contains("/*") {
        return wrong("has a comment");
    }
    let words = Module::parse(wgsl);
    if words.tokens.is_empty() {
        return wrong("is empty");
    }
    let mut open = vec![];
    for i in 0..words.tokens.len() {
        let word = words.word(i);
        match word {
            ";" | "{" | "}" | "@" => return wrong(&format!("has a `{word}`, but must be a single expression")),
            "(" => open.push(")"),
            "[" => open.push("]"),
            ")" | "]" if open.pop() != Some(word) => return wrong("has brackets that do not match"),
            _ => {}
        }
        let called = words.word(i + 1) == "(";
        if words.is_name(i) && !called && !known.contains(&word) && !TYPES.contains(&word) {
            return wrong(&format!("mentions `{word}`, but it knows only {}", known.join(", ")));
        }
    }
    match open.is_empty() {
        true => Ok(()),
        false => wrong("has brackets that do not match"),
    }
}
