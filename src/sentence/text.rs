//! From texts to sentence vectors.

use std::collections::BTreeMap;
use std::path::Path;

use super::encoder::SentenceEncoder;
use super::folder::Modules;
use crate::device::Gpu;
use crate::error::{Error, Result, joined};
use crate::model::Model;
use crate::tokenize::ModelTokenizer;

/// A sentence model that embeds texts: a tokenizer and a [`SentenceEncoder`]. Needs the feature `tokenizers`.
///
/// Texts longer than [`SentenceEncoder::max_tokens`] are cut as sentence-transformers cuts them: the special tokens at
/// both ends stay.
///
/// ```no_run
/// use throughline::Gpu;
/// use throughline::sentence::TextEncoder;
///
/// let gpu = Gpu::headless_blocking()?;
/// let mut encoder = TextEncoder::open_blocking(&gpu, "all-MiniLM-L6-v2".as_ref())?;
/// let vectors = encoder.embed_blocking(&["A man is eating food.", "A man is eating a piece of bread."])?;
/// assert_eq!(vectors[0].len(), 384);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct TextEncoder {
    encoder: SentenceEncoder,
    tokenizer: ModelTokenizer,
    /// What is put before each text.
    prompt: String,
}

impl TextEncoder {
    /// Opens a folder with everything that it says, its tokenizer included. Texts get the default prompt, if
    /// `config_sentence_transformers.json` names one: see [`set_prompt`](Self::set_prompt).
    ///
    /// Resolves once the device has been polled, several times for a large model. Outside of frames, use
    /// [`open_blocking`](Self::open_blocking).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Format`] name the file, and the module or key that is not supported.
    pub async fn open(gpu: &Gpu, path: &Path) -> Result<Self> {
        let modules = Modules::of_folder(path)?;
        let model = Model::open(&modules.transformer)?;
        let tokenizer = ModelTokenizer::of(model.weights())?;
        let default = modules.settings.text.default_prompt.clone();
        let encoder = SentenceEncoder::with_modules(gpu, &model, modules).await?;
        let mut encoder = TextEncoder { encoder, tokenizer, prompt: String::new() };
        encoder.set_prompt(default.as_deref())?;
        Ok(encoder)
    }

    /// [`open`](Self::open), waiting for the GPU.
    pub fn open_blocking(gpu: &Gpu, path: &Path) -> Result<Self> {
        gpu.run_blocking(Self::open(gpu, path))
    }

    /// The encoder of token ids.
    pub fn encoder(&self) -> &SentenceEncoder {
        &self.encoder
    }

    /// The encoder of token ids, for instance to set another [limit](SentenceEncoder::set_max_tokens).
    pub fn encoder_mut(&mut self) -> &mut SentenceEncoder {
        &mut self.encoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ModelTokenizer {
        &self.tokenizer
    }

    /// The model's prompts by name: what it was trained to see before a query or a document, say.
    pub fn prompts(&self) -> &BTreeMap<String, String> {
        &self.encoder.modules.settings.text.prompts
    }

    /// Puts another prompt before all texts from now on, by its name in [`prompts`](Self::prompts); none with `None`.
    ///
    /// # Errors
    ///
    /// If there is no prompt of this name. The error lists those that there are.
    pub fn set_prompt(&mut self, name: Option<&str>) -> Result<()> {
        self.prompt = match name {
            None => String::new(),
            Some(name) => self.prompts().get(name).cloned().ok_or_else(|| {
                Error::config(
                    "prompt",
                    format!("expected one of {}, got `{name}`", joined(self.prompts().keys(), ", ")),
                )
            })?,
        };
        Ok(())
    }

    /// The token ids of a text, as the model is to see it: after the prompt, in lower case if the model wants that,
    /// with the special tokens around it, and cut to [`SentenceEncoder::max_tokens`].
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode_within(&self.prepared(text), self.encoder.max_tokens())
    }

    fn prepared(&self, text: &str) -> String {
        let text = format!("{}{text}", self.prompt);
        if self.encoder.modules.settings.text.lower_case { text.to_lowercase() } else { text }
    }

    /// Computes one vector of [`SentenceEncoder::dim`] numbers for each text. Resolves once the device has been polled.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] names the index of a text whose vector is not finite, for example.
    pub async fn embed(&mut self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        let sentences = texts.iter().map(|text| self.ids(text.as_ref())).collect::<Result<Vec<_>>>()?;
        let before = if self.encoder.modules.pooling.include_prompt { 0 } else { self.prompt_tokens()? };
        self.encoder.embed_after(before, &sentences).await
    }

    /// [`embed`](Self::embed), waiting for the GPU.
    pub fn embed_blocking(&mut self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        let gpu = self.encoder.gpu().clone();
        gpu.run_blocking(self.embed(texts))
    }

    /// How many tokens the prompt has, with the special tokens before it.
    fn prompt_tokens(&self) -> Result<usize> {
        if self.prompt.is_empty() {
            return Ok(0);
        }
        let ids = self.tokenizer.encode(&self.prepared(""), true)?;
        let vocabulary = self.tokenizer.inner().get_added_vocabulary();
        let last = ids.last().and_then(|&id| self.tokenizer.inner().id_to_token(id));
        let ends = last.is_some_and(|token| vocabulary.is_special_token(&token));
        Ok(ids.len() - usize::from(ends))
    }
}
