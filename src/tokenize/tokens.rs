//! Tokens and their ids, as the settings beside a vocabulary name them.

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{Error, Result, quoted};
use crate::format::{Settings, float};

/// A special token: its text, or an object with its text and how it is found.
pub(super) fn token(settings: &Settings, key: &str) -> Result<Option<AddedToken>> {
    settings.get(key).map(|value| token_of(settings, key, value, true)).transpose()
}

/// A list of special tokens, or an object that gives each a name.
pub(super) fn tokens(settings: &Settings, key: &str) -> Result<Vec<AddedToken>> {
    let values: Vec<&Value> = match settings.get(key) {
        None => return Ok(vec![]),
        Some(Value::Array(values)) => values.iter().collect(),
        Some(Value::Object(named)) => named.values().collect(),
        Some(other) => return Err(settings.unexpected(key, "a list of tokens", other)),
    };
    values.into_iter().map(|value| token_of(settings, key, value, true)).collect()
}

/// The tokens of `added_tokens_decoder` with their ids, in ascending order, if there is such a key.
pub(super) fn tokens_by_id(settings: &Settings, key: &str) -> Result<Option<Vec<(u32, AddedToken)>>> {
    let Some(entries) = settings.typed(key, "tokens by id", Value::as_object)? else { return Ok(None) };
    let token = |(id, value): (&String, &Value)| {
        let number = id.parse().map_err(|_| settings.bad(key, format!("expected ids, got {}", quoted(id))))?;
        Ok((number, token_of(settings, key, value, false)?))
    };
    let mut tokens = entries.iter().map(token).collect::<Result<Vec<_>>>()?;
    tokens.sort_by_key(|(id, _)| *id);
    Ok(Some(tokens))
}

fn token_of(settings: &Settings, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.ok_or_else(|| settings.unexpected(key, "a token", value))?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let token = AddedToken::from(text, special || flag("special") == Some(true));
    let normalized = flag("normalized").unwrap_or(token.normalized);
    Ok(token
        .normalized(normalized)
        .lstrip(flag("lstrip") == Some(true))
        .rstrip(flag("rstrip") == Some(true))
        .single_word(flag("single_word") == Some(true)))
}

/// Tokens with their ids, in ascending order, as `added_tokens.json` has them: the whole file.
pub(super) fn ids_by_token(settings: &Settings) -> Result<Vec<(u32, &str)>> {
    let id = |(token, value): (_, &Value)| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((id, token)),
        None => Err(settings.unexpected(token, "an id", value)),
    };
    let mut ids = settings.iter().map(id).collect::<Result<Vec<_>, Error>>()?;
    ids.sort_unstable();
    Ok(ids)
}

/// Ids of tokens: a single one, or a list. Numbers that are no token's id are left out, as in `transformers`: many
/// configurations have defaults that their vocabulary is too small for, or -1 for none.
pub(super) fn ids(settings: &Settings, key: &str, is_token: impl Fn(u32) -> bool) -> Result<Vec<u32>> {
    let values = match settings.get(key) {
        None => return Ok(vec![]),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    if let Some(other) = values.iter().find(|value| float(value).is_none() && !value.is_null()) {
        return Err(settings.unexpected(key, "the id of a token", other));
    }
    let ids = values.iter().filter_map(|value| u32::try_from(value.as_u64()?).ok());
    Ok(ids.filter(|&id| is_token(id)).collect())
}
