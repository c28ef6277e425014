//! Text to tokens and back, as the model's file says: the `tokenizers` crate, set up. Needs the feature
//! `tokenizers`.

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use crate::error::{Error, Result};
use crate::format::Weights;

/// The tokenizer in a GGUF file's metadata: byte-level BPE, with the pre-tokenizers of GPT-2 or SmolLM. An
/// `Err` names the key whose value is not supported.
///
/// ```no_run
/// use std::path::Path;
/// use throughline::{format::Weights, tokenize};
/// let weights = Weights::open(Path::new("SmolLM2-135M-Instruct.Q4_1.gguf"))?;
/// let tokenizer = tokenize::of_gguf(&weights)?;
/// let ids = tokenizer.encode("Hello, world!", false).map(|e| e.get_ids().to_vec());
/// assert_eq!(ids.unwrap(), [19556, 28, 905, 17]);
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn of_gguf(weights: &Weights) -> Result<Tokenizer> {
    let meta = weights.metadata();
    let bad = |message: String| Error::Format { path: weights.path().into(), message };
    let model = meta.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(bad(format!("tokenizer.ggml.model: expected `gpt2` (byte-level BPE), got `{model}`")));
    }
    let words: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
    let pre_tokenizer = match meta.str("tokenizer.ggml.pre")? {
        "gpt-2" => vec![words],
        "smollm" => vec![Digits::new(true).into(), words],
        other => return Err(bad(format!("tokenizer.ggml.pre: expected `gpt-2` or `smollm`, got `{other}`"))),
    };
    let tokens = meta.strs("tokenizer.ggml.tokens")?;
    let pair = |line: &String| line.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
    let merges: Option<Merges> = meta.strs("tokenizer.ggml.merges")?.iter().map(pair).collect();
    let merges = merges.ok_or_else(|| bad("tokenizer.ggml.merges: expected two tokens with a space between".into()))?;
    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build();
    let mut tokenizer = Tokenizer::new(bpe.map_err(|e| bad(format!("tokenizer.ggml.merges: {e}")))?);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(pre_tokenizer)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    // Control tokens, such as those of chat templates, are one token each where text has them.
    const CONTROL: i64 = 3;
    let types = meta.ints("tokenizer.ggml.token_type")?;
    let control = tokens.iter().zip(types).filter(|(_, ty)| *ty == CONTROL);
    let control: Vec<AddedToken> = control.map(|(token, _)| AddedToken::from(token.clone(), true)).collect();
    let added = tokenizer.add_special_tokens(control);
    added.map_err(|e| bad(format!("tokenizer.ggml.token_type: {e}")))?;
    Ok(tokenizer)
}

/// Tokens that end a text: `tokenizer.ggml.eos_token_id`, if the file has it.
pub fn end_of_text(weights: &Weights) -> Result<Option<u32>> {
    let key = "tokenizer.ggml.eos_token_id";
    match weights.metadata().contains(key) {
        true => Ok(u32::try_from(weights.metadata().usize(key)?).ok()),
        false => Ok(None),
    }
}
