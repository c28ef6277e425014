//! Generating token after token: as an async stream, as an iterator that waits, or for several sequences at once.

use futures_util::stream::{Stream, unfold};

use super::decoder::{Decoder, Step, Submitted};
use super::sample::{Candidates, Sampling, of_sequence};
use crate::error::{Error, Result};
#[cfg(feature = "tokenizers")]
use crate::tokenize::ModelTokenizer;

/// How to continue a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationOptions {
    /// Most tokens to draw.
    pub max_tokens: usize,
    /// How to draw them.
    pub sampling: Sampling,
    /// Tokens that end a text. They are not returned. `GenerationOptions::of` has those of a model.
    pub stop: Vec<u32>,
    /// What to do when the cache is full: continue from this many of the last tokens (of the prompt and the text),
    /// which are fed again. Half the capacity is a good choice. With 0 the text ends there.
    pub keep: usize,
}

impl Default for GenerationOptions {
    /// At most 100 tokens, default sampling, no stop tokens, and an end when the cache is full.
    fn default() -> Self {
        GenerationOptions { max_tokens: 100, sampling: Sampling::default(), stop: vec![], keep: 0 }
    }
}

impl GenerationOptions {
    /// The default options, with a model's stop tokens, so that texts end where the model ends them. Without these it
    /// runs on past its answer.
    ///
    /// ```
    /// use throughline::decode::GenerationOptions;
    /// use throughline::tokenize::ModelTokenizer;
    /// let tokenizer = ModelTokenizer::open("tests/data/tiny_chat".as_ref())?;
    /// let options = GenerationOptions { max_tokens: 200, ..GenerationOptions::of(&tokenizer) };
    /// assert_eq!(options.stop, tokenizer.stop_tokens());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    #[cfg(feature = "tokenizers")]
    pub fn of(tokenizer: &ModelTokenizer) -> Self {
        GenerationOptions { stop: tokenizer.stop_tokens().to_vec(), ..Default::default() }
    }

    /// Checks the settings for a cache of `capacity` tokens. The error names the first impossible one.
    pub(super) fn validate(&self, capacity: usize) -> Result<()> {
        if self.keep >= capacity {
            let message = format!("must be less than the cache's {capacity} tokens, but is {}", self.keep);
            return Err(Error::config("keep", message));
        }
        self.sampling.validate()
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// A stop token was drawn.
    Stop,
    /// The requested number of tokens was reached.
    MaxTokens,
    /// The cache is full: the text has the length of the decoder's capacity, and its last token is not in the cache.
    Capacity,
}

/// A text while it is generated, from [`Decoder::generate`].
///
/// Iterate with [`blocking`](Self::blocking), or use [`stream`](Self::stream) or [`next`](Self::next) in async code.
#[derive(Debug)]
pub struct Generation<'a> {
    decoder: &'a mut Decoder,
    text: Text,
}

/// The state of a text.
#[derive(Debug)]
pub(super) struct Text {
    pub options: GenerationOptions,
    /// Tokens that are not in the cache yet: the prompt, then the last token, or more after the cache was full.
    pub feed: Vec<u32>,
    /// The last tokens of the text, at most as many as `keep`.
    tail: Vec<u32>,
    pub drawn: usize,
    pub finish: Option<Finish>,
}

impl Text {
    /// A text that continues a prompt. It is finished at once if no tokens are wanted.
    pub fn new(prompt: &[u32], options: GenerationOptions) -> Text {
        let finish = (options.max_tokens == 0).then_some(Finish::MaxTokens);
        let tail = prompt[prompt.len().saturating_sub(options.keep)..].to_vec();
        Text { options, feed: prompt.to_vec(), tail, drawn: 0, finish }
    }

    /// Accepts a token, unless it ends the text. `full` means that the cache has no room for it. If the text continues
    /// nevertheless, it does so from an empty cache.
    pub fn drew(&mut self, id: u32, full: bool) -> Option<u32> {
        self.drawn += 1;
        if self.options.stop.contains(&id) {
            self.feed = vec![];
            self.finish = Some(Finish::Stop);
            return None;
        }
        self.feed = vec![id];
        self.tail.push(id);
        self.tail.drain(..self.tail.len().saturating_sub(self.options.keep));
        if self.drawn == self.options.max_tokens {
            self.finish = Some(Finish::MaxTokens);
        } else if full && self.tail.is_empty() {
            self.finish = Some(Finish::Capacity);
        } else if full {
            self.feed.clone_from(&self.tail);
        }
        Some(id)
    }
}

/// The likeliest tokens of all sequences, as they came from the GPU.
#[derive(Debug)]
pub(super) struct Likeliest {
    pub values: Vec<f32>,
    pub ids: Vec<u32>,
    pub lse: Vec<f32>,
}

impl Likeliest {
    pub fn of(&self, sequence: usize) -> Candidates<'_> {
        let k = self.ids.len() / self.lse.len();
        let row = sequence * k..(sequence + 1) * k;
        Candidates { values: &self.values[row.clone()], ids: &self.ids[row], lse: self.lse[sequence] }
    }
}

impl Decoder {
    /// Continues from what is in the cache and `prompt`. Nothing runs until the first token is requested.
    ///
    /// # Errors
    ///
    /// If the prompt does not fit, or a setting is impossible.
    pub fn generate(&mut self, prompt: &[u32], options: GenerationOptions) -> Result<Generation<'_>> {
        options.validate(self.capacity)?;
        self.check(&[prompt])?;
        Ok(Generation { decoder: self, text: Text::new(prompt, options) })
    }

    /// Continues one prompt per sequence until all have ended. Sequence `i` draws as it would alone with the seed
    /// `sampling.seed + i`. Resolves after the device has been polled repeatedly.
    pub async fn generate_batch(&mut self, prompts: &[&[u32]], options: &GenerationOptions) -> Result<Vec<Vec<u32>>> {
        options.validate(self.capacity)?;
        self.check(prompts)?;
        let mut texts: Vec<Text> = prompts.iter().map(|prompt| Text::new(prompt, options.clone())).collect();
        let mut drawn: Vec<Vec<u32>> = vec![vec![]; prompts.len()];
        for n in 0..options.max_tokens {
            let going = |text: &Text| text.finish.is_none();
            if !texts.iter().any(going) {
                break;
            }
            let new: Vec<&[u32]> = texts.iter().map(|text| if going(text) { &text.feed[..] } else { &[] }).collect();
            let seed = |(text, i): (&Text, u64)| going(text).then(|| options.sampling.seed.wrapping_add(i));
            let seeds: Vec<Option<u64>> = texts.iter().zip(0..).map(seed).collect();
            let ids = self.feed_and_draw(&new, options.sampling, &seeds, n as u64).await?;
            for (i, id) in ids.into_iter().enumerate() {
                drawn[i].extend(id.and_then(|id| self.drew(i, &mut texts[i], id)));
            }
        }
        Ok(drawn)
    }

    /// [`generate_batch`](Self::generate_batch), waiting for the GPU.
    ///
    /// ```no_run
    /// # use throughline::{Gpu, decode::{DecodeOptions, Decoder, GenerationOptions}, model::Model};
    /// # let gpu = Gpu::headless_blocking()?;
    /// # let model = Model::open("model".as_ref())?;
    /// let options = DecodeOptions { batch: 2, ..DecodeOptions::new(512) };
    /// let mut decoder = Decoder::new_blocking(&gpu, &model, options)?;
    /// let texts = decoder.generate_batch_blocking(&[&[1, 2, 3], &[4]], &GenerationOptions::default())?;
    /// assert_eq!(texts.len(), 2);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn generate_batch_blocking(
        &mut self,
        prompts: &[&[u32]],
        options: &GenerationOptions,
    ) -> Result<Vec<Vec<u32>>> {
        self.gpu.clone().run_blocking(self.generate_batch(prompts, options))
    }

    /// Accepts the token that a sequence has drawn. Empties its cache if that is full and the text continues.
    pub(super) fn drew(&mut self, sequence: usize, text: &mut Text, id: u32) -> Option<u32> {
        let full = self.cached[sequence].len() == self.capacity;
        let id = text.drew(id, full);
        if full && text.finish.is_none() {
            self.truncate(sequence, 0);
        }
        id
    }

    /// Appends tokens, and draws token number `n` of each sequence that is given a seed. Only the likeliest tokens come
    /// back from the GPU; all logits follow only if those do not decide.
    async fn feed_and_draw(
        &mut self,
        new: &[&[u32]],
        sampling: Sampling,
        seeds: &[Option<u64>],
        n: u64,
    ) -> Result<Vec<Option<u32>>> {
        let step = self.step_for(new);
        if let Some(top) = step.top {
            step.exec.write(top.temperature, &vec![sampling.temperature; new.len()])?;
        }
        let candidates = |step: &Step| step.top.map_or(vec![], |top| top.candidates.to_vec());
        let Submitted { step, readbacks } = self.submit(new, candidates)?;
        let mut readbacks = readbacks.into_iter();
        let (Some(values), Some(ids), Some(lse)) = (readbacks.next(), readbacks.next(), readbacks.next()) else {
            return Ok(vec![None; new.len()]);
        };
        let (values, ids, lse) = (values.take().await?, ids.take().await?, lse.take().await?);
        let likeliest = Likeliest { values, ids, lse };
        let mut all: Option<Vec<f32>> = None;
        let mut drawn = vec![];
        for (i, seed) in seeds.iter().enumerate() {
            let Some(seed) = *seed else {
                drawn.push(None);
                continue;
            };
            let sampling = Sampling { seed, ..sampling };
            let named = |e| of_sequence(e, self.name_of("logits", i));
            let mut id = sampling.draw_from(&likeliest.of(i), n).map_err(named)?;
            if id.is_none() {
                if all.is_none() {
                    all = Some(step.read(step.values.logits)?.take().await?);
                }
                let vocab = self.config.vocab_size;
                let row = all.as_ref().map(|logits| &logits[i * vocab..(i + 1) * vocab]);
                id = row.map(|logits| sampling.draw(logits, n)).transpose().map_err(named)?;
            }
            drawn.push(id);
        }
        self.appended(new);
        Ok(drawn)
    }
}

impl<'a> Generation<'a> {
    /// The next token, or `None` at the end of the text. Resolves once the device has been polled, which an application
    /// that renders does anyway.
    ///
    /// Dropping the future loses nothing. After an error the same token is drawn again.
    ///
    /// # Errors
    ///
    /// If the logits are no numbers to choose by, as where activations overflow f32: see
    /// [`Sampling::draw`](super::sample::Sampling::draw).
    pub async fn next(&mut self) -> Result<Option<u32>> {
        let Text { options: GenerationOptions { sampling, .. }, feed, drawn, finish, .. } = &self.text;
        if finish.is_some() {
            return Ok(None);
        }
        let ids = self.decoder.feed_and_draw(&[feed], *sampling, &[Some(sampling.seed)], *drawn as u64).await?;
        Ok(ids[0].and_then(|id| self.decoder.drew(0, &mut self.text, id)))
    }

    /// [`next`](Self::next), waiting for the GPU.
    pub fn next_blocking(&mut self) -> Result<Option<u32>> {
        self.decoder.gpu.clone().run_blocking(self.next())
    }

    /// Why the text ended; `None` while it has not.
    pub fn finish(&self) -> Option<Finish> {
        self.text.finish
    }

    /// The remaining tokens as an iterator that waits for the GPU. It ends after an error.
    pub fn blocking(&mut self) -> impl Iterator<Item = Result<u32>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            let next = if failed { None } else { self.next_blocking().transpose() };
            failed = matches!(next, Some(Err(_)));
            next
        })
    }

    /// The remaining tokens as a stream, for any executor. It ends after an error.
    pub fn stream(self) -> impl Stream<Item = Result<u32>> {
        unfold(Some(self), |generation| async {
            let mut generation = generation?;
            let next = generation.next().await.transpose()?;
            let rest = next.is_ok().then_some(generation);
            Some((next, rest))
        })
    }
}
