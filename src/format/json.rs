//! JSON files beside the weights, as Python writes them.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Value as Json;

/// Parses JSON as Python's `json` module reads and writes it: with `NaN`, `Infinity` and `-Infinity`, which become
/// strings. A byte order mark before it is skipped.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    serde_json::from_slice(text).or_else(|error| match without_python_floats(text) {
        Cow::Borrowed(_) => Err(error),
        Cow::Owned(text) => serde_json::from_slice(&text),
    })
}

/// The number of a value, if it is one: JSON's, one of those that [`parse`] makes strings of, or one that transformers 5
/// has written as `{"__float__": "Infinity"}`.
pub(crate) fn float(value: &Json) -> Option<f64> {
    let name = match value {
        Json::Object(tagged) if tagged.len() == 1 => tagged.get("__float__")?,
        value => value,
    };
    match name.as_str() {
        Some("NaN") => Some(f64::NAN),
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some(_) => None,
        None => value.as_f64(),
    }
}

/// The text with its numbers that JSON lacks in quotes.
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
                    out.extend([b"\"", found.as_bytes(), b"\""].concat());
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
    use serde_json::json;

    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        let read = |text: &str| parse::<Json>(text.as_bytes());
        let value = read(r#"{"a": [NaN, -Infinity], "NaN": "Infinity \" NaN \\", "b": Infinity}"#).unwrap();
        assert_eq!(value["NaN"], "Infinity \" NaN \\");
        assert!(float(&value["a"][0]).unwrap().is_nan());
        assert_eq!(float(&value["a"][1]), Some(f64::NEG_INFINITY));
        assert_eq!(float(&value["b"]), Some(f64::INFINITY));
        assert_eq!(float(&json!(2.5)), Some(2.5));
        assert_eq!(float(&json!({ "__float__": "-Infinity" })), Some(f64::NEG_INFINITY));
        for no_number in
            [json!({ "__float__": "2.5" }), json!({ "__float__": 2.5 }), json!("2.5"), json!({}), json!(null)]
        {
            assert_eq!(float(&no_number), None, "{no_number}");
        }
        assert_eq!(read("\u{feff}[1]").unwrap(), json!([1]));
        for broken in ["{\"a\": Infinite}", "{\"a\": NaN", "[--Infinity]", "", "\"NaN"] {
            assert!(read(broken).is_err(), "{broken}");
        }
    }
}
