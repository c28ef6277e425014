//! `minijinja` with what templates find in `transformers`: filters, tests and functions of Jinja 2, and Python's methods.
//!
//! Functions such as `raise_exception` and `strftime_now` come from `transformers`. Filters of `minijinja` are replaced
//! where Jinja 2's have other arguments or other results: `tojson` does not escape HTML, `int` and `float` have
//! defaults, `indent` takes a text.
//!
//! tests/data/chat_templates.json has what agrees. Known to differ:
//!
//! - An error here, text there: the filters `filesizeformat`, `forceescape`, `pprint`, `random`, `striptags`, `truncate`,
//!   `urlencode`, `wordcount`, `wordwrap` and `xmlattr`; `varargs` and `kwargs` of macros; `{% block %}`; arithmetic of
//!   truth values; names and aligned formats with other letters than ASCII.
//! - Text here, an error there: `none` in loops, `<` and `in` between values of different types.
//! - Different text: functions, iterators and `dict.items()` where they are printed themselves.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::methods::{self, bind, charge};
use super::printf::printf;
use super::python::{Json, bad, text};
use super::syntax::PERCENT;

/// Steps that a template may take on one chat. A step writes at most 64 bytes, and a long template takes a few hundred
/// steps per message.
pub(super) const FUEL: u64 = 2_000_000;

/// The environment of templates, whose source has been through [`translate`](super::syntax::translate).
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, state, value| match value.kind() {
        // Strings may need escapes.
        ValueKind::String | ValueKind::Undefined => minijinja::escape_formatter(out, state, value),
        _ => minijinja::escape_formatter(out, state, &text(value)?.into()),
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        if let ("format", Some(text)) = (method, value.as_str()) {
            check_format(text, args)?;
        }
        match methods::call(state, value, method, args) {
            Err(e) if e.kind() == ErrorKind::UnknownMethod => {
                minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
            }
            done => done,
        }
    });
    add_functions(&mut environment);
    add_filters(&mut environment);
    environment
}

/// Rejects formats that `minijinja` pads without counting that as work, pads by bytes instead of characters, or cuts
/// within a character.
fn check_format(text: &str, args: &[Value]) -> Result<(), Error> {
    if text.as_bytes().windows(5).any(|part| part.iter().all(u8::is_ascii_digit)) {
        return Err(bad("a format of width 10000 or more"));
    }
    let text = text.replace("{{", "");
    let fields = || text.split('{').skip(1).map(|field| field.split('}').next().unwrap_or_default());
    if !fields().all(str::is_ascii) {
        return Err(bad("a format whose fields are not ASCII"));
    }
    let pads =
        fields().filter_map(|field| field.split_once(':')).any(|(_, spec)| spec.contains(|c: char| c.is_ascii_digit()));
    let (args, named): (Rest<Value>, Kwargs) = from_args(args)?;
    let named = named.args().map(|name| named.peek(name)).collect::<Result<Vec<Value>, _>>()?;
    let is_ascii = |value: &Value| value.as_str().is_none_or(str::is_ascii);
    match pads && !args.iter().chain(&named).all(is_ascii) {
        true => Err(bad("a format that aligns text other than ASCII")),
        false => Ok(()),
    }
}

fn add_functions(environment: &mut Environment<'_>) {
    environment.add_function(PERCENT, percent);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(bad(message)) });
    environment.add_function("strftime_now", |format: &str| {
        let text = jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now());
        text.map_err(|e| bad(e.to_string()))
    });
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("dict", dict);
    let make = environment.globals().find(|(name, _)| *name == "namespace").map(|(_, make)| make);
    environment.add_function("namespace", move |state: &mut State<'_, '_>, first: Option<Value>, named: Kwargs| {
        let make = make.as_ref().ok_or_else(|| Error::from(ErrorKind::UnknownFunction))?;
        make.call(state, &[dict(first, named)?])
    });
}

fn add_filters(environment: &mut Environment<'_>) {
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| text(value));
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("indent", indent);
    environment.add_filter("format", |state: &State<'_, '_>, text: &str, args: Rest<ValueOrKwargs>| {
        let (args, named): (Rest<Value>, Kwargs) = from_args(&args.into_values())?;
        let named = dict(None, named)?;
        printf(state, text, &if named.is_true() { named } else { Tuple::from(args.0).into() })
    });
    environment.add_filter("center", |state: &State<'_, '_>, text: &str, args: Rest<ValueOrKwargs>| {
        let [width] = bind(&args.into_values(), ["width"])?;
        methods::pad(state, text, "center", &[width.unwrap_or_else(|| 80.into())])
    });
    environment.remove_filter("pprint"); // indents without limit, and only serves debugging
    // In `minijinja` none counts as iterable, like an empty list.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    });
    environment.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Plain || value.is_undefined() || value.to_string().starts_with("<macro ")
    });
}

/// `left % right`.
fn percent(state: &State<'_, '_>, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return printf(state, text, right).map(Value::from);
    }
    let types = || bad(format!("tried to use % operator on unsupported types {} and {}", left.kind(), right.kind()));
    let integer = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    // The result has the sign of the divisor.
    if let (Some(a), Some(b)) = (integer(left), integer(right)) {
        let rest = a.checked_rem(b).ok_or_else(|| bad("division by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let number = |value: &Value| match integer(value) {
        Some(integer) => Ok(integer as f64),
        None if value.is_number() => f64::try_from(value.clone()),
        None => Err(types()),
    };
    let (a, b) = (number(left)?, number(right)?);
    if b == 0.0 {
        return Err(bad("division by zero"));
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}

/// A dictionary, from another or from pairs, with further keys.
fn dict(first: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut pairs = vec![];
    if let Some(first) = first.filter(|first| !first.is_undefined()) {
        for item in first.try_iter()? {
            pairs.push(match (first.kind(), item.len()) {
                (ValueKind::Map, _) => (item.clone(), first.get_item(&item)?),
                (_, Some(2)) => (item.get_item_by_index(0)?, item.get_item_by_index(1)?),
                _ => return Err(bad("dict: expected a dictionary or pairs")),
            });
        }
    }
    for key in named.args() {
        pairs.push((key.into(), named.peek(key)?));
    }
    Ok(Value::from_pairs(pairs))
}

/// `json.dumps`, without the HTML escapes of Jinja's own `tojson`.
fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [ensure_ascii, indent, separators, sort_keys] =
        bind(&args.into_values(), ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is_true = |arg: Option<Value>| arg.is_some_and(|arg| arg.is_true());
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) if text.len() <= 16 => text.to_string(),
            None if indent.is_integer() => " ".repeat(usize::try_from(indent).unwrap_or(0).min(16)),
            _ => return Err(bad("tojson: expected an indent of at most 16 spaces or characters")),
        }),
    };
    let separators = match separators.filter(|separators| !separators.is_none()) {
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(String::from),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            match pair.iter().map(Value::as_str).collect::<Option<Vec<_>>>().as_deref() {
                Some([item, key]) if item.len() + key.len() <= 16 => [item.to_string(), key.to_string()],
                _ => return Err(bad("tojson: expected two separators of at most 16 bytes")),
            }
        }
    };
    Json { ensure_ascii: is_true(ensure_ascii), indent, separators, sort_keys: is_true(sort_keys) }.dumps(value)
}

/// A number of at most 38 digits from a number or text; the default for what is none.
fn int(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default, base] = bind(&args.into_values(), ["default", "base"])?;
    let default = default.unwrap_or_else(|| 0.into());
    let base = base.map_or(Ok(10), u32::try_from)?;
    if !matches!(base, 2..=36) {
        return Err(bad(format!("int: expected a base from 2 to 36, got {base}")));
    }
    let number = match value.as_str() {
        Some(text) => {
            let text = text.trim().replace('_', "").to_lowercase();
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let prefix = [(2, "0b"), (8, "0o"), (16, "0x")].into_iter().find(|(of, _)| *of == base);
            let digits = prefix.and_then(|(_, prefix)| digits.strip_prefix(prefix)).unwrap_or(digits);
            match i128::from_str_radix(&format!("{sign}{digits}"), base) {
                Ok(integer) => return Ok(integer.into()),
                Err(_) => text.parse().ok(),
            }
        }
        None => match value.kind() {
            ValueKind::Undefined => return Err(undefined("int")),
            ValueKind::Bool => return Ok(i64::from(value.is_true()).into()),
            ValueKind::Number if value.is_integer() => return Ok(value.clone()),
            _ => f64::try_from(value.clone()).ok().filter(|_| value.is_number()),
        },
    };
    match number {
        Some(number) if number.is_finite() && number.abs() >= 1e38 => Err(bad(format!("int: {number:e} is too large"))),
        Some(number) if number.is_finite() => Ok((number as i128).into()),
        _ => Ok(default),
    }
}

fn float(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default] = bind(&args.into_values(), ["default"])?;
    let number = match value.kind() {
        ValueKind::Undefined => return Err(undefined("float")),
        ValueKind::String => value.as_str().and_then(|text| text.trim().replace('_', "").parse().ok()),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    };
    Ok(number.map_or_else(|| default.unwrap_or_else(|| 0.0.into()), |number: f64| number.into()))
}

fn undefined(filter: &str) -> Error {
    Error::new(ErrorKind::UndefinedError, format!("{filter} of a value that is not defined"))
}

/// A value, or another one if it is undefined; with `boolean`, also if it is false, zero or empty.
fn default(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [other, boolean] = bind(&args.into_values(), ["default_value", "boolean"])?;
    let is_missing = value.is_undefined() || boolean.is_some_and(|boolean| boolean.is_true()) && !value.is_true();
    Ok(if is_missing { other.unwrap_or_else(|| "".into()) } else { value.clone() })
}

/// Begins lines with spaces or another text; the first line and empty ones only if asked to.
fn indent(state: &State<'_, '_>, value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [width, first, blank] = bind(&args.into_values(), ["width", "first", "blank"])?;
    let is_true = |arg: Option<Value>| arg.is_some_and(|arg| arg.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let text = text(value)?;
    let lines = text.matches('\n').count() + 1;
    let indent = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_string(),
            None => {
                let width = usize::try_from(width)?;
                charge(state, width)?;
                " ".repeat(width)
            }
        },
    };
    charge(state, lines.saturating_mul(indent.len()))?;
    let mut out = String::new();
    for (i, line) in text.split('\n').enumerate() {
        out += if i == 0 { "" } else { "\n" };
        let indents = if i == 0 { first } else { blank || !line.is_empty() };
        out += if indents { &indent } else { "" };
        out += line;
    }
    Ok(out)
}
