//! Tokens that are added to a vocabulary: those that `tokenizer.json` lists itself, and those that only other files know.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use tokenizers::{AddedToken, Model, Tokenizer};

use super::files::Files;
use super::guard::guarded;
use super::tokens;
use crate::error::{Error, Result, quoted};
use crate::format::Settings;

/// Settings that name a special token.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Settings that list special tokens: the key of `transformers` 4, and that of 5.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token that `tokenizer.json` adds to its vocabulary.
#[derive(Deserialize)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
}

/// A vocabulary as some file has it.
pub(super) trait Base {
    /// The file.
    fn path(&self) -> &str;

    /// Tokens that the file itself adds to the vocabulary.
    fn added(&self) -> &[Added] {
        &[]
    }

    /// The tokenizer, with more tokens in its vocabulary than the file has.
    fn build(&self, more: &[(u32, &str)]) -> Result<Tokenizer>;
}

/// The tokens that a folder's other files name: `tokenizer_config.json`, `special_tokens_map.json` and
/// `added_tokens.json`.
pub(super) struct Special {
    /// Where tokens have their ids from, for messages.
    path: String,
    named: Vec<(&'static str, AddedToken)>,
    /// Further special tokens.
    listed: Vec<AddedToken>,
    /// Tokens with their ids.
    placed: Vec<(u32, AddedToken)>,
}

impl Special {
    /// As `transformers` reads these files: if `tokenizer_config.json` has `added_tokens_decoder`, it has all; otherwise
    /// the other two files count more. `defaults` are the names of tokens that no file names.
    pub fn read(files: &Files<'_>, config: &Settings, defaults: &[(&str, &str)]) -> Result<Special> {
        let map = files.settings("special_tokens_map.json")?;
        let placed = tokens::tokens_by_id(config, "added_tokens_decoder")?;
        let sources = if placed.is_some() { [config, &map] } else { [&map, config] };
        let mut named = vec![];
        for key in NAMED {
            let default = defaults.iter().find(|(name, _)| *name == key).map(|(_, text)| AddedToken::from(*text, true));
            let token = tokens::token(sources[0], key)?.or(tokens::token(sources[1], key)?).or(default);
            named.extend(token.map(|token| (key, token)));
        }
        let mut listed = vec![];
        for (source, key) in sources.iter().flat_map(|source| LISTS.map(|key| (source, key))) {
            listed.extend(tokens::tokens(source, key)?);
        }
        let texts: HashSet<&str> = named.iter().map(|(_, token)| token).chain(&listed).map(content).collect();
        let (path, placed) = match placed {
            Some(mut placed) => {
                placed.iter_mut().for_each(|(_, token)| token.special |= texts.contains(token.content.as_str()));
                (format!("{}: added_tokens_decoder", config.path()), placed)
            }
            None => {
                let legacy = files.settings("added_tokens.json")?;
                let token = |(id, text)| (id, AddedToken::from(text, texts.contains(text)));
                let placed = tokens::ids_by_token(&legacy)?.into_iter().map(token).collect();
                (legacy.path().into(), placed)
            }
        };
        Ok(Special { path, named, listed, placed })
    }

    fn special(&self) -> impl Iterator<Item = &AddedToken> {
        self.named.iter().map(|(_, token)| token).chain(&self.listed)
    }

    /// The keys that name a token, and its text.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.named.iter().map(|(key, token)| (*key, content(token)))
    }

    /// The text of the token that a key names.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.named.iter().find(|(name, _)| *name == key).map(|(_, token)| token.content.as_str())
    }

    /// The tokens to add to a tokenizer, with their ids where a file says them.
    fn additions(&self, tokenizer: &Tokenizer) -> Vec<(Option<u32>, AddedToken)> {
        let present = tokenizer.get_added_tokens_decoder();
        let present: HashMap<&str, &AddedToken> = present.values().map(|t| (t.content.as_str(), t)).collect();
        let placed = self.placed.iter().map(|(id, token)| (Some(*id), token.clone()));
        let is_placed: HashSet<&str> = self.placed.iter().map(|(_, token)| content(token)).collect();
        let special = self.special().filter(|token| !is_placed.contains(content(token))).map(|token| {
            // What `tokenizer.json` says of it counts, but that it is special.
            let token = present.get(content(token)).map_or(token, |present| *present);
            (None, token.clone().special(true))
        });
        placed.chain(special).filter(|(_, token)| !token.content.is_empty()).collect()
    }
}

fn content(token: &AddedToken) -> &str {
    &token.content
}

/// A tokenizer with all tokens that the file and the other files of its folder add, each at its id.
pub(super) fn complete(base: &dyn Base, special: &Special) -> Result<Tokenizer> {
    let tokenizer = base.build(&[])?;
    let additions = special.additions(&tokenizer);
    let mut places = Places::default();
    for Added { id, content } in base.added() {
        let bad = |what: String| {
            let what = format!("added_tokens: {} has id {id}, but {what}", quoted(content));
            Error::format(base.path(), what)
        };
        let (in_model, at_id) = (tokenizer.get_model().token_to_id(content), tokenizer.get_model().id_to_token(*id));
        match (in_model, at_id) {
            (Some(got), _) if got != *id => return Err(bad(format!("by the vocabulary it is {got}"))),
            (None, Some(other)) => return Err(bad(format!("that is {} in the vocabulary", quoted(&other)))),
            _ => places.put(*id, content).map_err(|other| bad(format!("that is {}", quoted(other))))?,
        }
    }
    let mut free = None;
    for (id, token) in &additions {
        let content = content(token);
        if tokenizer.token_to_id(content).is_some() || places.ids.contains_key(content) {
            continue;
        }
        // Tokens without an id come last, and get the ids after all others.
        let id = id.unwrap_or_else(|| {
            let next = free.unwrap_or_else(|| places.first_free(&tokenizer));
            free = Some(next.saturating_add(1));
            next
        });
        let bad = |other: &str| {
            let what = format!("{} has id {id}, but that is {} in {}", quoted(content), quoted(other), base.path());
            Error::format(&special.path, what)
        };
        match tokenizer.id_to_token(id) {
            Some(other) => return Err(bad(&other)),
            None => places.put(id, content).map_err(bad)?,
        }
    }
    let tokens: Vec<AddedToken> = additions.iter().map(|(_, token)| token.clone()).collect();
    let tokenizer = with(base.path(), tokenizer, &tokens)?;
    // The crate gives an added token the id after the last one. For another id, the token must be in the vocabulary.
    let misplaced = places.misplaced(&tokenizer);
    if misplaced.is_empty() {
        return Ok(tokenizer);
    }
    let tokenizer = with(base.path(), base.build(&misplaced)?, &tokens)?;
    match places.misplaced(&tokenizer).first() {
        None => Ok(tokenizer),
        Some((id, text)) => {
            let what = format!("{} cannot have id {id} in this vocabulary", quoted(text));
            Err(Error::format(base.path(), what))
        }
    }
}

/// Which ids added tokens must have.
#[derive(Default)]
struct Places<'a> {
    ids: HashMap<&'a str, u32>,
    texts: HashMap<u32, &'a str>,
}

impl<'a> Places<'a> {
    /// The other token, if the id is another one's.
    fn put(&mut self, id: u32, text: &'a str) -> Result<(), &'a str> {
        match *self.texts.entry(id).or_insert(text) {
            own if own == text => {
                self.ids.insert(text, id);
                Ok(())
            }
            other => Err(other),
        }
    }

    fn misplaced(&self, tokenizer: &Tokenizer) -> Vec<(u32, &'a str)> {
        let all = self.ids.iter().map(|(text, id)| (*id, *text));
        let mut misplaced: Vec<_> = all.filter(|(id, text)| tokenizer.token_to_id(text) != Some(*id)).collect();
        misplaced.sort_unstable();
        misplaced
    }

    fn first_free(&self, tokenizer: &Tokenizer) -> u32 {
        let taken = tokenizer.get_vocab(true).into_values().chain(self.ids.values().copied());
        taken.max().map_or(0, |last| last.saturating_add(1))
    }
}

fn with(path: &str, mut tokenizer: Tokenizer, tokens: &[AddedToken]) -> Result<Tokenizer> {
    if !tokens.is_empty() {
        guarded(path, || tokenizer.add_tokens(tokens.iter().cloned()))?;
    }
    Ok(tokenizer)
}
