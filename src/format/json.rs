//! JSON files beside the weights, as Python writes them.

use std::borrow::Cow;

use serde::de::DeserializeOwned;

/// The key under which a number that JSON lacks is written, as in `{"__float__": "Infinity"}`: transformers 5 writes
/// numbers so.
const FLOAT: &str = "__float__";

/// Parses JSON as Python's `json` module reads and writes it: with `NaN`, `Infinity` and `-Infinity`, which become
/// `{"__float__": "Infinity"}` and so on. A byte order mark before it is skipped.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    serde_json::from_slice(text).or_else(|error| match without_python_floats(text) {
        Cow::Borrowed(_) => Err(error),
        Cow::Owned(text) => serde_json::from_slice(&text),
    })
}

/// The number of a value, if it is one: JSON's, or one of those that [`parse`] writes for Python's.
pub(crate) fn float(value: &serde_json::Value) -> Option<f64> {
    match value {
        serde_json::Value::Object(tagged) if tagged.len() == 1 => match tagged.get(FLOAT)?.as_str()? {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        value => value.as_f64(),
    }
}

fn without_python_floats(text: &[u8]) -> Cow<'_, [u8]> {
    let (mut out, mut copied) = (vec![], 0);
    let (mut at, mut in_string) = (0, false);
    while at < text.len() {
        match text[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            _ => {
                let found = ["NaN", "Infinity", "-Infinity"].into_iter().find(|f| text[at..].starts_with(f.as_bytes()));
                if let Some(found) = found {
                    out.extend_from_slice(&text[copied..at]);
                    out.extend_from_slice(format!(r#"{{"{FLOAT}":"{found}"}}"#).as_bytes());
                    copied = at + found.len();
                    at = copied - 1;
                }
            }
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.extend_from_slice(&text[copied..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        let read = |text: &str| parse::<Value>(text.as_bytes());
        let value = read(r#"{"a": [NaN, -Infinity], "NaN": "Infinity \" NaN \\", "b": Infinity}"#).unwrap();
        assert_eq!(value["NaN"], "Infinity \" NaN \\");
        assert!(float(&value["a"][0]).unwrap().is_nan());
        assert_eq!(float(&value["a"][1]), Some(f64::NEG_INFINITY));
        assert_eq!(float(&value["b"]), Some(f64::INFINITY));
        assert_eq!(float(&json!(2.5)), Some(2.5));
        assert_eq!(float(&json!({ "__float__": "2.5" })), None);
        assert_eq!(read("\u{feff}[1]").unwrap(), json!([1]));
        for broken in ["{\"a\": Infinite}", "{\"a\": NaN", "[--Infinity]", "", "\"NaN"] {
            assert!(read(broken).is_err(), "{broken}");
        }
    }
}
