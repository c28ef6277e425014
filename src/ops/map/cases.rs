//! Cases of the op table: every function, every way to broadcast, and both tails of what could overflow.

use super::functions::{self, Entry, FUNCTIONS};
use super::op::Map;
use crate::ops::cases::{Case, InputFill};
use crate::ops::elementwise;

/// All that remains are rounding errors of f32, far below the table's default tolerance.
const ROUNDING: f64 = 1e-11;

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> =
        FUNCTIONS.iter().map(|entry| case(entry, &vec![&[127][..]; entry.operands.len()])).collect();
    let tanh = |shape: &&[usize]| case(&functions::tanh, &[shape]);
    cases.extend(elementwise::SHAPES.iter().map(tanh));
    // Every way to repeat: not at all, over everything, over leading dimensions in quads and not, over trailing ones,
    // over those in between, and several at once.
    let pairs: [[&[usize]; 2]; 14] = [
        [&[1], &[1]],
        [&[1757], &[1757]],
        [&[3, 5, 7], &[5, 7]],
        [&[4, 6, 8], &[8]],
        [&[127, 3], &[1]],
        [&[8], &[3, 6, 8]],
        [&[1, 1], &[5, 9]],
        [&[127, 12], &[127, 1]],
        [&[127, 3], &[127, 1]],
        [&[2, 5, 3, 8], &[1, 5, 1, 1]],
        [&[2, 5, 3, 4], &[2, 1, 3, 1]],
        [&[9, 1], &[13]],
        [&[6, 1, 4], &[1, 7, 1]],
        [&[3, 4, 1, 8], &[4, 5, 1]],
    ];
    cases.extend(pairs.iter().map(|pair| case(&functions::mul, pair)));
    cases.extend(pairs[..9].iter().map(|pair| case(&functions::add, pair)));
    cases.push(case(&functions::select, &[&[7, 1, 4], &[1], &[5, 4]]));
    cases.push(case(&functions::select, &[&[5, 3], &[6, 5, 1], &[3]]));
    cases.extend(far());
    cases.into_iter().map(|case| case.tolerance(ROUNDING)).collect()
}

/// Where naive forms overflow or cancel.
fn far() -> Vec<Case> {
    let one = |entry: &'static Entry, x: InputFill| {
        let case = case(entry, &[&[301]]).fill(0, x);
        Case { name: format!("{} {x:?}", entry.name), ..case }
    };
    let constant = InputFill::Constant;
    let mut cases = vec![];
    for entry in [&functions::tanh, &functions::sigmoid, &functions::silu, &functions::softplus] {
        cases.extend([-60.0, -20.0, 1e-4, 30.0].map(|x| one(entry, constant(x))));
        cases.push(one(entry, InputFill::Uniform(-100.0, 100.0)));
    }
    // Central differences take steps that are too long for these.
    let many_turns = InputFill::Uniform(-3000.0, 3000.0);
    cases.extend([&functions::sin, &functions::cos].map(|entry| one(entry, many_turns).no_grad(0)));
    cases.push(one(&functions::sin, constant(1e-4)));
    cases.push(one(&functions::neg, constant(1e30)));
    for [x, t] in [[20.0, 1.0], [-20.0, 0.0], [-1000.0, 1.0], [1000.0, 0.0]] {
        let bce = case(&functions::bce_with_logits, &[&[301], &[301]]).fill(0, constant(x)).fill(1, constant(t));
        cases.push(Case { name: format!("bce_with_logits of {x} and {t}"), ..bce });
    }
    let powf = |k: f32, x: InputFill| {
        let case = Case::new(format!("powf({k}) {x:?}"), Map::of_table(&functions::powf, &[k]), &[&[301]]);
        case.fill(0, x)
    };
    cases.extend([2.0, 0.0, -1.5].map(|k| powf(k, InputFill::Uniform(0.25, 4.0))));
    cases.push(powf(-1.0, InputFill::Uniform(-4.0, -0.25)));
    cases
}

fn case(entry: &'static Entry, shapes: &[&[usize]]) -> Case {
    let shown: Vec<String> = shapes.iter().map(|s| format!("{s:?}")).collect();
    let name = format!("{}({})", entry.name, shown.join(", "));
    let mut case = Case::new(name, Map::of_table(entry, entry.values), shapes);
    for (i, &fill) in entry.fills.iter().enumerate() {
        case = case.fill(i, fill);
        let flows = entry.gradients.iter().any(|(of, ..)| *of == entry.operands[i]);
        case = if flows { case } else { case.no_grad(i) };
    }
    if entry.gradients.is_empty() { case.forward_only() } else { case }
}

pub(super) fn bench() -> Vec<Case> {
    let same: [&[usize]; 2] = [&[4096, 768], &[4096, 768]];
    let mut cases: Vec<Case> = [&functions::add, &functions::mul].map(|entry| case(entry, &same)).into();
    let shapes: [&[usize]; 4] = [&[768], &[1], &[4096, 1], &[4, 1, 768]];
    cases.extend(shapes.map(|b| case(&functions::mul, &[if b.len() == 3 { &[4, 1024, 768] } else { same[0] }, b])));
    cases.extend([&functions::tanh, &functions::silu, &functions::sin].map(|entry| case(entry, &same[..1])));
    cases
}
