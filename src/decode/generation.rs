//! Tokens one after the other: as an async stream, as an iterator that waits, or for several sequences at once.

use futures_util::stream::{Stream, unfold};

use super::Decoder;
use crate::error::Result;
use crate::sample::Sampling;

/// How to go on from a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationOptions {
    /// Tokens to draw at most.
    pub max_tokens: usize,
    /// How to draw them.
    pub sampling: Sampling,
    /// Tokens that end a text. They are not part of it.
    pub stop: Vec<u32>,
}

impl Default for GenerationOptions {
    /// At most 100 tokens, default sampling, no stop tokens.
    fn default() -> Self {
        GenerationOptions { max_tokens: 100, sampling: Sampling::default(), stop: vec![] }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token came.
    Stop,
    /// There are as many tokens as asked for.
    MaxTokens,
    /// The cache is full: the text is as long as the decoder's capacity, and the last token is not in it.
    Capacity,
}

/// A text as it is drawn, from [`Decoder::generate`].
#[derive(Debug)]
pub struct Generation<'a> {
    decoder: &'a mut Decoder,
    options: GenerationOptions,
    /// Not in the cache yet: the prompt, then the last token.
    feed: Vec<u32>,
    drawn: usize,
    finish: Option<Finish>,
}

impl Decoder {
    /// Goes on from what is in the cache and `prompt`. An `Err` if the prompt does not fit, or the settings make no
    /// sense; nothing runs yet.
    pub fn generate(&mut self, prompt: &[u32], options: GenerationOptions) -> Result<Generation<'_>> {
        options.sampling.validate()?;
        self.check(&[prompt])?;
        let finish = (options.max_tokens == 0).then_some(Finish::MaxTokens);
        Ok(Generation { decoder: self, options, feed: prompt.to_vec(), drawn: 0, finish })
    }

    /// Goes on from a prompt per sequence, until all have ended. Sequence `i` draws as one alone would with the
    /// seed `sampling.seed + i`. Waits for the GPU.
    ///
    /// ```no_run
    /// # use throughline::{Gpu, decode::{Decoder, GenerationOptions}, model::Model};
    /// # let gpu = Gpu::headless_blocking()?;
    /// # let model = Model::open("model".as_ref())?;
    /// let mut decoder = Decoder::with_batch_blocking(&gpu, &model, 2, 512)?;
    /// let texts = decoder.generate_batch_blocking(&[&[1, 2, 3], &[4]], &GenerationOptions::default())?;
    /// assert_eq!(texts.len(), 2);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn generate_batch_blocking(
        &mut self,
        prompts: &[&[u32]],
        options: &GenerationOptions,
    ) -> Result<Vec<Vec<u32>>> {
        options.sampling.validate()?;
        self.check(prompts)?;
        let mut texts: Vec<Vec<u32>> = vec![vec![]; prompts.len()];
        let mut feeds: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
        for n in 0..options.max_tokens {
            let new: Vec<&[u32]> = feeds.iter().map(Vec::as_slice).collect();
            let draws: Vec<Option<Sampling>> = (feeds.iter().zip(0..))
                .map(|(feed, i)| {
                    let sampling = Sampling { seed: options.sampling.seed.wrapping_add(i), ..options.sampling };
                    (!feed.is_empty()).then_some(sampling)
                })
                .collect();
            let drawn = self.gpu.clone().run_blocking(self.feed_and_draw(&new, &draws, n as u64))?;
            for (i, id) in drawn.into_iter().enumerate() {
                feeds[i].clear();
                let Some(id) = id.filter(|id| !options.stop.contains(id)) else { continue };
                texts[i].push(id);
                if self.lengths[i] < self.capacity {
                    feeds[i].push(id);
                }
            }
            if feeds.iter().all(Vec::is_empty) {
                break;
            }
        }
        Ok(texts)
    }

    /// Appends tokens and draws token number `n` behind those of the sequences that are given a way to.
    async fn feed_and_draw(&mut self, new: &[&[u32]], draws: &[Option<Sampling>], n: u64) -> Result<Vec<Option<u32>>> {
        let logits = self.feed_batch(new).await?;
        let draw = |(sampling, logits): (&Option<Sampling>, &Vec<f32>)| sampling.map(|s| s.draw(logits, n));
        Ok(draws.iter().zip(&logits).map(draw).collect())
    }
}

impl<'a> Generation<'a> {
    /// The next token, or `None` at the end. Resolves once the device has been polled: in an app that renders, by
    /// itself. A dropped future loses nothing; after an `Err` the same token is drawn again.
    pub async fn next(&mut self) -> Result<Option<u32>> {
        if self.finish.is_some() {
            return Ok(None);
        }
        let draws = [Some(self.options.sampling)];
        let ids = self.decoder.feed_and_draw(&[&self.feed], &draws, self.drawn as u64).await?;
        Ok(ids[0].and_then(|id| self.drew(id)))
    }

    /// Takes a token up, unless it ends the text.
    fn drew(&mut self, id: u32) -> Option<u32> {
        self.feed = vec![id];
        self.drawn += 1;
        if self.options.stop.contains(&id) {
            self.finish = Some(Finish::Stop);
            return None;
        }
        if self.drawn == self.options.max_tokens {
            self.finish = Some(Finish::MaxTokens);
        } else if self.decoder.lengths[0] == self.decoder.capacity {
            self.finish = Some(Finish::Capacity);
        }
        Some(id)
    }

    /// [`next`](Self::next), waiting for the GPU.
    pub fn next_blocking(&mut self) -> Result<Option<u32>> {
        self.decoder.gpu.clone().run_blocking(self.next())
    }

    /// Why the text ended; `None` before that.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The tokens as an iterator that waits for the GPU. It ends after an `Err`.
    pub fn blocking(&mut self) -> impl Iterator<Item = Result<u32>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            let next = if failed { None } else { self.next_blocking().transpose() };
            failed = matches!(next, Some(Err(_)));
            next
        })
    }

    /// The tokens as a stream, for any executor. It ends after an `Err`.
    pub fn stream(self) -> impl Stream<Item = Result<u32>> {
        unfold(Some(self), |generation| async {
            let mut generation = generation?;
            let next = generation.next().await.transpose()?;
            let rest = next.is_ok().then_some(generation);
            Some((next, rest))
        })
    }
}
