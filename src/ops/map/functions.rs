//! The table of elementwise functions: one line each.
//!
//! `name(operands; constants) = "WGSL" => in f64, { operand: "WGSL of its gradient" => in f64, .. }`. Gradients may
//! mention the output `y` and its cotangent `dy`. They read no operand that they do not mention, so one in `y` lets
//! the operand go. No gradient flows to an operand that is not in the braces. `x in FILL` says what tests fill an
//! operand with, if not with normal numbers, and `k: 3.0` what they set a constant to.

use crate::kernel::wgsl::Module;
use crate::ops::cases::InputFill;

/// The functions that take numbers that f16 holds to numbers that it does not.
pub(crate) const WIDE: [&str; 8] =
    ["div", "pow", "powf", "exp", "square", "reciprocal", "squared_error", "huber_error"];

/// A line of the table.
pub(crate) struct Entry {
    pub name: &'static str,
    pub operands: &'static [&'static str],
    /// What tests fill the operands with.
    pub fills: &'static [InputFill],
    pub constants: &'static [&'static str],
    /// What tests set the constants to.
    pub values: &'static [f32],
    pub wgsl: &'static str,
    pub reference: fn(&[f64]) -> f64,
    pub gradients: &'static [Slope],
}

/// An operand, and its gradient in WGSL and in f64.
type Slope = (&'static str, &'static str, fn(&[f64]) -> f64);

/// Passes the table to another macro.
macro_rules! functions {
    ($to:ident) => { $to! {
    [y, dy]
    /// `a + b`, where shapes [broadcast](crate::ops::map#broadcasting): biases, position tables, masks.
    ///
    /// To add a branch to the residual stream use [`residual_add`](Self::residual_add), which the planner can run in
    /// place.
    add(a, b) = "a + b" => a + b, { a: "dy" => dy, b: "dy" => dy }
    /// `a - b`, where shapes [broadcast](crate::ops::map#broadcasting).
    sub(a, b) = "a - b" => a - b, { a: "dy" => dy, b: "-dy" => -dy }
    /// `a * b`, where shapes [broadcast](crate::ops::map#broadcasting): gates, masks, weights of rows.
    mul(a, b) = "a * b" => a * b, { a: "dy * b" => dy * b, b: "dy * a" => dy * a }
    /// `a * b + c`, where shapes [broadcast](crate::ops::map#broadcasting): scale and shift. Rounded once where the
    /// adapter can.
    fma(a, b, c) = "fma(a, b, c)" => a * b + c, { a: "dy * b" => dy * b, b: "dy * a" => dy * a, c: "dy" => dy }
    /// `a / b`, where shapes [broadcast](crate::ops::map#broadcasting).
    div(a, b in POSITIVE) = "a / b" => a / b, { a: "dy / b" => dy / b, b: "-dy * y / b" => -dy * y / b }
    /// The larger of `a` and `b`, or NaN if either is; shapes [broadcast](crate::ops::map#broadcasting). Where both are
    /// equal, each receives half of the gradient.
    max(a, b) = "select(select(a, b, b > a), b, is_nan(b))" => if b > a || b.is_nan() { b } else { a }, {
        a: "select(select(0.0, 0.5 * dy, a == b), dy, a > b)" => dy * half_step(a - b),
        b: "select(select(0.0, 0.5 * dy, a == b), dy, b > a)" => dy * half_step(b - a)
    }
    /// The smaller of `a` and `b`, or NaN if either is; shapes [broadcast](crate::ops::map#broadcasting). Where both
    /// are equal, each receives half of the gradient.
    min(a, b) = "select(select(a, b, b < a), b, is_nan(b))" => if b < a || b.is_nan() { b } else { a }, {
        a: "select(select(0.0, 0.5 * dy, a == b), dy, a < b)" => dy * half_step(b - a),
        b: "select(select(0.0, 0.5 * dy, a == b), dy, b < a)" => dy * half_step(a - b)
    }
    /// `a` to the power of `b`, where shapes [broadcast](crate::ops::map#broadcasting). A negative `a` has a power only
    /// for whole `b`, and the gradient of such a `b` is NaN.
    pow(a in POSITIVE, b) = "power(a, b)" => a.powf(b), {
        a: "dy * b * power(a, b - 1.0)" => dy * b * a.powf(b - 1.0), b: "select(dy * y * log(a), 0.0, a == 0.0)" => dy * y * a.ln()
    }
    /// `x` to the power of a constant `k`. A negative `x` has a power only for whole `k`.
    powf(x; k: 3.0) = "power(x, k)" => x.powf(k), {
        x: "select(dy * k * power(x, k - 1.0), 0.0, k == 0.0)" => dy * k * x.powf(k - 1.0)
    }
    /// `-x`.
    neg(x) = "-x" => -x, { x: "-dy" => -dy }
    /// The absolute value of `x`. Its gradient at 0 is 0.
    abs(x) = "abs(x)" => x.abs(), { x: "dy * sign(x)" => dy * sign_of(x) }
    /// -1, 0 or 1, as `x` is negative, zero or positive. No gradient flows to `x`.
    sign(x) = "sign(x)" => sign_of(x), {}
    /// `x` where it is positive, else 0 (Glorot et al. 2011).
    relu(x) = "select(x, 0.0, x < 0.0)" => if x < 0.0 { 0.0 } else { x }, {
        x: "select(dy, 0.0, y <= 0.0)" => if y <= 0.0 { 0.0 } else { dy }
    }
    /// `x` where it is positive, else `slope * x` with a constant slope (Maas et al. 2013).
    leaky_relu(x; slope: 0.125) = "select(x, slope * x, x < 0.0)" => if x < 0.0 { slope * x } else { x }, {
        x: "select(dy, slope * dy, x <= 0.0)" => if x <= 0.0 { slope * dy } else { dy }
    }
    /// `x * sigmoid(x)`, also called Swish (Elfwing et al. 2017, <https://arxiv.org/abs/1702.03118>).
    silu(x) = "x * sigmoid(x)" => x * sigmoid_of(x), {
        x: "dy * sigmoid(x) * (1.0 + x * sigmoid(-x))" => dy * sigmoid_of(x) * (1.0 + x * sigmoid_of(-x))
    }
    /// `1 / (1 + exp(-x))`: a probability from a logit.
    sigmoid(x) = "sigmoid(x)" => sigmoid_of(x), { x: "dy * y * (1.0 - y)" => dy * y * (1.0 - y) }
    /// The hyperbolic tangent.
    tanh(x) = "safe_tanh(x)" => x.tanh(), { x: "dy * (1.0 - y) * (1.0 + y)" => dy * (1.0 - y) * (1.0 + y) }
    /// `log(1 + exp(x))`: a smooth ReLU, and a way to positive numbers.
    softplus(x) = "softplus(x)" => softplus_of(x), { x: "dy * sigmoid(x)" => dy * sigmoid_of(x) }
    /// `e` to the power of `x`.
    exp(x) = "exp(x)" => x.exp(), { x: "dy * y" => dy * y }
    /// The natural logarithm. Of 0 it is negative infinity, of negative numbers NaN.
    log(x in POSITIVE) = "log(x)" => x.ln(), { x: "dy / x" => dy / x }
    /// The square root. Its gradient at 0 is infinite.
    sqrt(x in POSITIVE) = "sqrt(x)" => x.sqrt(), { x: "0.5 * dy / y" => 0.5 * dy / y }
    /// `1 / sqrt(x)`.
    rsqrt(x in POSITIVE) = "inverseSqrt(x)" => x.sqrt().recip(), { x: "-0.5 * dy * y * y * y" => -0.5 * dy * y * y * y }
    /// The sine of `x` in radians, precise for `x` up to 10,000.
    sin(x) = "precise_sin(x)" => x.sin(), { x: "dy * precise_cos(x)" => dy * x.cos() }
    /// The cosine of `x` in radians, precise for `x` up to 10,000.
    cos(x) = "precise_cos(x)" => x.cos(), { x: "-dy * precise_sin(x)" => -dy * x.sin() }
    /// `x * x`.
    square(x) = "x * x" => x * x, { x: "2.0 * dy * x" => 2.0 * dy * x }
    /// `1 / x`.
    reciprocal(x in POSITIVE) = "1.0 / x" => x.recip(), { x: "-dy * y * y" => -dy * y * y }
    /// `x` within the constants `low` and `high`, or NaN if it is. No gradient flows where it is outside.
    clamp(x; low: -0.5, high: 0.75) = "select(select(x, low, x < low), high, x > high)" => clamped(x, low, high), {
        x: "select(0.0, dy, x >= low && x <= high)" => if x >= low && x <= high { dy } else { 0.0 }
    }
    /// 1 where `a < b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    less(a in SMALL, b in OTHER) = "select(0.0, 1.0, a < b)" => truth(a < b), {}
    /// 1 where `a <= b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    less_equal(a in SMALL, b in OTHER) = "select(0.0, 1.0, a <= b)" => truth(a <= b), {}
    /// 1 where `a > b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    greater(a in SMALL, b in OTHER) = "select(0.0, 1.0, a > b)" => truth(a > b), {}
    /// 1 where `a >= b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    greater_equal(a in SMALL, b in OTHER) = "select(0.0, 1.0, a >= b)" => truth(a >= b), {}
    /// 1 where `a` equals `b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    equal(a in SMALL, b in OTHER) = "select(0.0, 1.0, a == b)" => truth(a == b), {}
    /// 1 where `a` does not equal `b`, else 0; shapes [broadcast](crate::ops::map#broadcasting). No gradient flows.
    not_equal(a in SMALL, b in OTHER) = "select(0.0, 1.0, a != b)" => truth(a != b), {}
    /// `a` where `condition` is not 0, else `b`; shapes [broadcast](crate::ops::map#broadcasting). Conditions come from
    /// comparisons such as [`less`](Self::less), and receive no gradient.
    select(condition in SMALL, a, b) = "select(b, a, condition != 0.0)" => if condition != 0.0 { a } else { b }, {
        a: "select(0.0, dy, condition != 0.0)" => dy * truth(condition != 0.0),
        b: "select(dy, 0.0, condition != 0.0)" => dy * truth(condition == 0.0)
    }
    /// `(a - b)^2`, where shapes [broadcast](crate::ops::map#broadcasting). Its mean is [`mse`](Self::mse).
    squared_error(a, b) = "(a - b) * (a - b)" => (a - b) * (a - b), {
        a: "2.0 * dy * (a - b)" => 2.0 * dy * (a - b), b: "2.0 * dy * (b - a)" => 2.0 * dy * (b - a)
    }
    /// `(a - b)^2 / 2` where `a` and `b` are within the constant `delta`, else `delta * (|a - b| - delta / 2)` (Huber
    /// 1964); shapes [broadcast](crate::ops::map#broadcasting). Its mean is [`huber`](Self::huber).
    huber_error(a, b; delta: 0.75) = "select(delta * (abs(a - b) - 0.5 * delta), 0.5 * (a - b) * (a - b), abs(a - b) <= delta)"
        => if (a - b).abs() <= delta { 0.5 * (a - b) * (a - b) } else { delta * ((a - b).abs() - 0.5 * delta) }, {
        a: "select(dy * delta * sign(a - b), dy * (a - b), abs(a - b) <= delta)" => dy * clamped(a - b, -delta, delta),
        b: "select(dy * delta * sign(b - a), dy * (b - a), abs(a - b) <= delta)" => dy * clamped(b - a, -delta, delta)
    }
    /// Cross-entropy of a probability with the logit `x` and a target from 0 to 1,
    /// `-t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x))`, stable for large logits; shapes
    /// [broadcast](crate::ops::map#broadcasting). Its mean is [`binary_cross_entropy`](Self::binary_cross_entropy).
    bce_with_logits(x, t in SHARE) = "(1.0 - t) * softplus(x) + t * softplus(-x)" => (1.0 - t) * softplus_of(x) + t * softplus_of(-x), {
        x: "dy * ((1.0 - t) * sigmoid(x) - t * sigmoid(-x))" => dy * (sigmoid_of(x) - t), t: "-dy * x" => -dy * x
    }
    } };
}

pub(super) use functions;

/// Away from 0, where logarithms and quotients are large.
const POSITIVE: InputFill = InputFill::Uniform(0.25, 4.0);
/// From 0 to 1.
const SHARE: InputFill = InputFill::Uniform(0.0, 1.0);
/// Numbers that often equal those of the other list.
const SMALL: InputFill = InputFill::Values(&[0.0, 1.0, -1.0, 2.0, 0.0, -0.5]);
const OTHER: InputFill = InputFill::Values(&[0.0, 2.0, -1.0, 1.0, 0.25]);

macro_rules! table {
    ([$y:ident, $dy:ident] $(
        $(#[$doc:meta])*
        $name:ident($($x:ident $(in $fill:ident)?),+ $(; $($c:ident: $value:expr),+)?) = $wgsl:literal => $f:expr, {
            $($of:ident: $slope:literal => $df:expr),*
        }
    )+) => {
        // Each under its name.
        $(#[allow(non_upper_case_globals)]
        pub(super) const $name: Entry = Entry {
            name: stringify!($name),
            operands: &[$(stringify!($x)),+],
            fills: &[$(fill!($($fill)?)),+],
            constants: &[$($(stringify!($c)),+)?],
            values: &[$($($value),+)?],
            wgsl: $wgsl,
            reference: |given| match *given {
                [$($x,)+ $($($c),+)?] => $f,
                _ => f64::NAN,
            },
            gradients: gradients!([$($x,)+ $($($c,)+)?] [$y, $dy] $($of $slope $df),*),
        };)+

        /// All of them.
        pub(crate) const FUNCTIONS: &[Entry] = &[$($name),+];
    };
}

/// The gradients of a function whose reference is given these values, then those in the second brackets.
macro_rules! gradients {
    ($given:tt $more:tt $($of:ident $slope:literal $df:expr),*) => {
        &[$((stringify!($of), $slope, |given| gradient!(given $given $more $df))),*]
    };
}

macro_rules! gradient {
    ($values:ident [$($x:ident,)+] [$y:ident, $dy:ident] $df:expr) => {
        match *$values {
            #[allow(unused_variables)] // no gradient mentions everything
            [$($x,)+ $y, $dy] => $df,
            _ => f64::NAN,
        }
    };
}

macro_rules! fill {
    () => {
        InputFill::Normal(1.0)
    };
    ($fill:ident) => {
        $fill
    };
}

functions!(table);

/// The function without constants that has these words; see [`canonical`].
pub(super) fn find(words: &str) -> Option<&'static Entry> {
    FUNCTIONS.iter().find(|entry| entry.constants.is_empty() && canonical(entry.wgsl, entry.operands) == words)
}

/// The words of an expression, with numbers for its operands: what two spellings of one function have in common.
pub(super) fn canonical(wgsl: &str, operands: &[&str]) -> String {
    let words = Module::parse(wgsl);
    let word = |i: usize| match operands.iter().position(|o| *o == words.word(i) && words.is_name(i)) {
        Some(operand) => format!("${operand}"),
        None => words.word(i).to_string(),
    };
    (0..words.tokens.len()).map(word).collect::<Vec<_>>().join(" ")
}

fn truth(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

fn sign_of(x: f64) -> f64 {
    truth(x > 0.0) - truth(x < 0.0)
}

/// 0, 1/2 or 1: the gradient of the larger of two numbers that differ by `x`.
fn half_step(x: f64) -> f64 {
    0.5 * (1.0 + sign_of(x))
}

fn clamped(x: f64, low: f64, high: f64) -> f64 {
    if x > high {
        high
    } else if x < low {
        low
    } else {
        x
    }
}

fn sigmoid_of(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus_of(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
