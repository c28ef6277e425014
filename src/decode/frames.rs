//! Decoding in an app's frames: many texts at their own times, recorded into the encoders of frames as far as a budget
//! goes.
//!
//! The work goes in passes over the whole batch: a pass takes the next part of every prompt, or the last token of
//! every text that is past its prompt. One pass is recorded at a time, over as many frames as it takes. How a text is
//! cut into passes depends on the text alone, so when others speak and what frames have time for changes none.

use std::fmt;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::decoder::{Decoder, Step};
use super::generation::{Finish, GenerationOptions, Likeliest, Text};
use crate::device::timeline::Timeline;
use crate::device::{Readback, now};
use crate::error::{Error, Result};

/// What comes of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its next token.
    Token(u32),
    /// Its end: nothing more comes.
    Finished(Finish),
}

/// A decoder whose sequences each say something of their own, as frames have time for it: the characters of a game,
/// say. Nothing waits for the GPU once it is made.
///
/// ```
/// use std::time::Duration;
/// use throughline::decode::{Decoder, Event, FrameDecoder, GenerationOptions};
/// use throughline::Gpu;
/// use throughline::model::Model;
///
/// let gpu = Gpu::headless_blocking()?; // an app: `Gpu::from_device`
/// let model = Model::open("tests/data/hf/llama".as_ref())?;
/// let decoder = gpu.run_blocking(Decoder::with_batch(&gpu, &model, 3, 64))?; // three characters
/// let mut characters = FrameDecoder::new_blocking(decoder)?;
///
/// characters.say(1, &[5, 17, 80], GenerationOptions { max_tokens: 4, ..Default::default() })?;
/// let mut said = vec![];
/// while !characters.is_silent() {
///     // A frame begins with what those before it have brought, to go on from that.
///     for (character, event) in characters.poll()? {
///         match event {
///             Event::Token(id) => said.push((character, id)),
///             Event::Finished(_) => assert_eq!(said.len(), 4),
///         }
///     }
///     // Your passes, and what there is time for, in one submit.
///     let mut encoder = gpu.device().create_command_encoder(&Default::default());
///     characters.record(&mut encoder, Duration::from_micros(500))?;
///     gpu.submit(encoder)?;
/// }
/// # assert!(said.iter().all(|(character, _)| *character == 1));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct FrameDecoder {
    decoder: Decoder,
    /// What the kernels and copies of a pass of each kind take.
    estimates: [Vec<Duration>; 2],
    sequences: Vec<Sequence>,
    /// What is being recorded.
    pass: Option<Pass>,
    /// Of each kind, the pass whose scores are on their way. They stay in its memory until all is drawn, so the next
    /// pass of that kind waits for that; and then has all texts in it that are as far.
    flights: [Option<Flight>; 2],
    /// Kind of the last pass that was begun.
    last: usize,
    events: Vec<(usize, Event)>,
}

/// Kinds of passes: by a token of each sequence, and by as many as a prompt's part has.
const SINGLE: usize = 0;
const CHUNK: usize = 1;

#[derive(Debug)]
struct Sequence {
    /// What it says, or has said. What it feeds from `fed` on is not in the cache, or not known to be.
    text: Text,
    fed: usize,
    speaks: bool,
    /// The rest of what is to be fed was in a pass whose scores are on their way.
    waits: bool,
}

impl Sequence {
    fn kind(&self) -> usize {
        if self.text.feed.len() > 1 { CHUNK } else { SINGLE }
    }

    fn unfed(&self) -> &[u32] {
        &self.text.feed[self.fed..]
    }
}

/// A sequence in a pass, and how many of its tokens are.
#[derive(Clone, Copy, Debug)]
struct Member {
    sequence: usize,
    count: usize,
}

#[derive(Debug)]
struct Pass {
    kind: usize,
    members: Vec<Member>,
    /// Which of its kernels and copies comes next.
    next: usize,
}

#[derive(Debug)]
struct Flight {
    /// Those that have not drawn yet.
    members: Vec<Member>,
    scores: Scores,
}

#[derive(Debug)]
enum Scores {
    Likeliest(Arriving<Likeliest>),
    /// The likeliest tokens did not decide all draws, and a frame has yet to record the copy of all scores.
    Wanted,
    All(Arriving<Vec<f32>>),
}

/// What sequences draw from.
enum Arrived {
    Likeliest(Likeliest),
    All(Vec<f32>),
}

impl Scores {
    fn arrived(&mut self) -> Option<Result<Arrived>> {
        match self {
            Scores::Likeliest(likeliest) => likeliest.arrived().map(|l| l.map(Arrived::Likeliest)),
            Scores::Wanted => None,
            Scores::All(scores) => scores.arrived().map(|s| s.map(Arrived::All)),
        }
    }
}

/// What a future will give, asked for without waiting. The mutex is never locked: it is there for apps that share what
/// they hold between threads.
struct Arriving<T>(Mutex<Pin<Box<dyn Future<Output = Result<T>> + Send>>>);

impl<T> Arriving<T> {
    fn new(future: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Arriving(Mutex::new(Box::pin(future)))
    }

    /// Not to be asked again after it was there.
    fn arrived(&mut self) -> Option<Result<T>> {
        now(self.0.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> fmt::Debug for Arriving<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Arriving")
    }
}

/// How often passes are measured.
const RUNS: usize = 4;

impl FrameDecoder {
    /// Takes a decoder over, with what its sequences have in their caches. Runs passes of both kinds a few times, to
    /// see what they take; an `Err` where the device was opened without `TIMESTAMP_QUERY`. Resolves once the device
    /// has been polled.
    pub async fn new(decoder: Decoder) -> Result<Self> {
        let mut estimates = [vec![], vec![]];
        for (kind, estimates) in estimates.iter_mut().enumerate() {
            let step = step_to_measure(&decoder, kind)?;
            let mut profile = step.exec.profile().await?;
            for _ in 1..RUNS {
                profile = profile.shorter(&step.exec.profile().await?);
            }
            *estimates = command_times(&profile);
        }
        Ok(Self::with_estimates(decoder, estimates))
    }

    /// [`new`](Self::new), waiting for the GPU. On any device: without timestamps by the host's clock, by which
    /// kernels seem to take longer.
    pub fn new_blocking(decoder: Decoder) -> Result<Self> {
        let mut estimates = [vec![], vec![]];
        for (kind, estimates) in estimates.iter_mut().enumerate() {
            let step = step_to_measure(&decoder, kind)?;
            let mut profile = step.exec.profile_blocking()?;
            for _ in 1..RUNS {
                profile = profile.shorter(&step.exec.profile_blocking()?);
            }
            *estimates = command_times(&profile);
        }
        Ok(Self::with_estimates(decoder, estimates))
    }

    fn with_estimates(decoder: Decoder, estimates: [Vec<Duration>; 2]) -> Self {
        let silent = || {
            let text = Text::new(&[], GenerationOptions::default());
            Sequence { text, fed: 0, speaks: false, waits: false }
        };
        let sequences = decoder.lengths.iter().map(|_| silent()).collect();
        let (pass, flights, events) = (None, [None, None], vec![]);
        FrameDecoder { decoder, estimates, sequences, pass, flights, last: SINGLE, events }
    }

    /// Makes a sequence begin a text with this prompt, whatever it has said or is saying. Its tokens are those of
    /// [`Decoder::generate`] on a decoder with nothing in its cache. Records nothing yet; an `Err` leaves all as it was.
    pub fn say(&mut self, sequence: usize, prompt: &[u32], options: GenerationOptions) -> Result<()> {
        self.expect(sequence)?;
        self.begin_text(sequence, 0, prompt.to_vec(), options)
    }

    /// Makes a sequence go on with this prompt behind all that it was told and has said so far, which may be in the
    /// middle of a text. The prompt may be empty where the last token was not a stop token.
    pub fn go_on(&mut self, sequence: usize, prompt: &[u32], options: GenerationOptions) -> Result<()> {
        self.expect(sequence)?;
        let feed = [self.sequences[sequence].unfed(), prompt].concat();
        self.begin_text(sequence, self.decoder.lengths[sequence], feed, options)
    }

    fn expect(&self, sequence: usize) -> Result<()> {
        let n = self.sequences.len();
        let error = Error::data("sequence", format!("one of {n}, counted from 0"), sequence);
        if sequence < n { Ok(()) } else { Err(error) }
    }

    fn begin_text(&mut self, sequence: usize, length: usize, feed: Vec<u32>, options: GenerationOptions) -> Result<()> {
        options.validate(self.decoder.capacity)?;
        if feed.is_empty() {
            return Err(Error::data("tokens", "at least one token", "none"));
        }
        self.decoder.check_more(&feed, length)?;
        self.stop(sequence);
        self.decoder.truncate(sequence, length);
        let s = &mut self.sequences[sequence];
        (s.text, s.fed, s.speaks) = (Text::new(&feed, options), 0, true);
        self.end_if_finished(sequence);
        Ok(())
    }

    /// Makes a sequence silent: no more events come of its text. Keeps what it was told and has said, to
    /// [go on](Self::go_on) from. Does nothing to one that is silent.
    pub fn stop(&mut self, sequence: usize) {
        let Some(s) = self.sequences.get_mut(sequence) else { return };
        (s.speaks, s.waits) = (false, false);
        self.events.retain(|(of, _)| *of != sequence);
        // What is under way for nobody is given up. It has changed nothing but what is behind the tokens of caches.
        let others = |members: &mut Vec<Member>| {
            members.retain(|m| m.sequence != sequence);
            !members.is_empty()
        };
        self.pass.take_if(|pass| !others(&mut pass.members));
        self.flights.iter_mut().for_each(|flight| drop(flight.take_if(|flight| !others(&mut flight.members))));
    }

    /// Makes a sequence silent that has more than `len` tokens, and forgets what is behind those: to
    /// [go on](Self::go_on) from a common beginning again.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        let Some(s) = self.sequences.get(sequence) else { return };
        let (length, unfed) = (self.decoder.lengths[sequence], s.unfed().to_vec());
        if len < length + unfed.len() {
            self.stop(sequence);
            self.decoder.truncate(sequence, len);
            let s = &mut self.sequences[sequence];
            (s.text.feed, s.fed) = (unfed[..len.saturating_sub(length)].to_vec(), 0);
        }
    }

    /// Whether a sequence is saying something.
    pub fn speaks(&self, sequence: usize) -> bool {
        self.sequences.get(sequence).is_some_and(|s| s.speaks)
    }

    /// Whether none is: then nothing is recorded, and no events come.
    pub fn is_silent(&self) -> bool {
        self.events.is_empty() && self.sequences.iter().all(|s| !s.speaks)
    }

    /// What whole passes take by the estimates: one by a token of each sequence, and one by a part of prompts. That
    /// with full caches, so most take less.
    pub fn estimates(&self) -> [Duration; 2] {
        [SINGLE, CHUNK].map(|kind| self.estimates[kind].iter().sum())
    }

    /// The decoder: for its settings and lengths, which lag behind what is recorded.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Gives the decoder back. Texts that are not at their end are left where they are.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// Records what there is to do and time for within `budget`, by the estimates, and a kernel at least; nothing if
    /// there is nothing to do. Costs no wait. A text has a token a frame at most, since the next depends on it: so
    /// [`poll`](Self::poll) first.
    ///
    /// How long that takes, by the estimates; zero if it is nothing.
    ///
    /// Encoders must be submitted, in their order. What the scores of one that is dropped would have drawn is drawn
    /// again, but parts of passes in it are lost unnoticed, so [`say`](Self::say) anew what was being said; so, too,
    /// where an `Err` of this is why it is dropped.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder, budget: Duration) -> Result<Duration> {
        for kind in [SINGLE, CHUNK] {
            self.record_scores(encoder, kind)?;
        }
        let mut taken = Duration::ZERO;
        let fits = |taken: Duration, more| taken.is_zero() || taken + more <= budget;
        loop {
            let mut pass = match (self.pass.take(), self.ready()) {
                (Some(pass), _) => pass,
                (None, Some(kind)) if fits(taken, self.estimates[kind][0]) => self.begin_pass(encoder, kind)?,
                _ => return Ok(taken),
            };
            let (estimates, first) = (&self.estimates[pass.kind], pass.next);
            while let Some(&more) = estimates.get(pass.next).filter(|more| fits(taken, **more)) {
                taken += more;
                pass.next += 1;
            }
            self.decoder.step(pass.kind == CHUNK).exec.record_range(encoder, first..pass.next);
            if pass.next < estimates.len() {
                self.pass = Some(pass);
                return Ok(taken);
            }
            self.end_pass(encoder, pass)?;
        }
    }

    /// Records the copy of all scores, where a flight needs them.
    fn record_scores(&mut self, encoder: &mut wgpu::CommandEncoder, kind: usize) -> Result<()> {
        if let Some(flight @ Flight { scores: Scores::Wanted, .. }) = &mut self.flights[kind] {
            let step = self.decoder.step(kind == CHUNK);
            let readback = step.exec.tensor(step.values.logits)?.record_read(&self.decoder.gpu, encoder);
            flight.scores = Scores::All(Arriving::new(readback.take()));
        }
        Ok(())
    }

    /// The kind of pass that may begin: in turn, where it is both.
    fn ready(&self) -> Option<usize> {
        let may_begin = |&kind: &usize| self.flights[kind].is_none() && self.members(kind).next().is_some();
        [1 - self.last, self.last].into_iter().find(may_begin)
    }

    /// Those that a pass of this kind would have in it now.
    fn members(&self, kind: usize) -> impl Iterator<Item = Member> {
        let time = self.decoder.step(kind == CHUNK).shape.time;
        let ready = move |s: &Sequence| s.speaks && !s.waits && s.kind() == kind;
        // As in `Decoder::submit`, all parts of a prompt are whole but the first.
        let count = move |s: &Sequence| (s.unfed().len() - 1) % time + 1;
        let sequences = self.sequences.iter().enumerate().filter(move |(_, s)| ready(s));
        sequences.map(move |(sequence, s)| Member { sequence, count: count(s) })
    }

    /// Records what a pass is told.
    fn begin_pass(&mut self, encoder: &mut wgpu::CommandEncoder, kind: usize) -> Result<Pass> {
        let members: Vec<Member> = self.members(kind).collect();
        let mut parts: Vec<&[u32]> = vec![&[]; self.sequences.len()];
        for m in &members {
            parts[m.sequence] = &self.sequences[m.sequence].unfed()[..m.count];
        }
        // Rows that stand for no token go behind those that are in the cache already, if not counted yet.
        let start = |(s, n): (&Sequence, &usize)| n + if s.waits { s.unfed().len() } else { 0 };
        let starts = self.sequences.iter().zip(&self.decoder.lengths).map(start);
        let step = self.decoder.step(kind == CHUNK);
        step.record_inputs(encoder, &parts, starts)?;
        if let Some(top) = step.top {
            let temperatures: Vec<f32> = self.sequences.iter().map(|s| s.text.options.sampling.temperature).collect();
            step.exec.record_write(encoder, top.temperature, &temperatures)?;
        }
        self.last = kind;
        Ok(Pass { kind, members, next: 0 })
    }

    /// Takes up that a pass is recorded, and records the copies of what its sequences draw from.
    fn end_pass(&mut self, encoder: &mut wgpu::CommandEncoder, pass: Pass) -> Result<()> {
        let draws = |m: &Member| m.count == self.sequences[m.sequence].unfed().len();
        let (members, rest): (Vec<Member>, Vec<Member>) = pass.members.into_iter().partition(draws);
        if !members.is_empty() {
            let scores = Scores::Likeliest(likeliest(self.decoder.step(pass.kind == CHUNK), encoder)?);
            members.iter().for_each(|m| self.sequences[m.sequence].waits = true);
            self.flights[pass.kind] = Some(Flight { members, scores });
        }
        // What draws is counted when it has drawn: should the scores not come, it goes through again.
        rest.iter().for_each(|m| self.count(m));
        Ok(())
    }

    /// Takes up that tokens are in the cache.
    fn count(&mut self, member: &Member) {
        self.sequences[member.sequence].fed += member.count;
        self.decoder.lengths[member.sequence] += member.count;
    }

    /// What has come since the last time, in order for each sequence. Does not wait, but polls the device. After an
    /// `Err` the tokens that it cost are drawn again, the same ones.
    pub fn poll(&mut self) -> Result<Vec<(usize, Event)>> {
        let polled = self.decoder.gpu.device().poll(wgpu::PollType::Poll);
        polled.map_err(|e| self.decoder.gpu.error(format!("polling the GPU: {e}")))?;
        for kind in [SINGLE, CHUNK] {
            let Some(mut flight) = self.flights[kind].take() else { continue };
            match flight.scores.arrived() {
                Some(Ok(arrived)) => {
                    flight.members.retain(|m| !self.draw(m, &arrived));
                    flight.scores = Scores::Wanted;
                }
                Some(Err(e)) => {
                    flight.members.iter().for_each(|m| self.sequences[m.sequence].waits = false);
                    return Err(e);
                }
                None => {}
            }
            if !flight.members.is_empty() {
                self.flights[kind] = Some(flight);
            }
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Draws a sequence's next token. `false` where these scores do not decide which.
    fn draw(&mut self, member: &Member, scores: &Arrived) -> bool {
        let i = member.sequence;
        let Text { options: GenerationOptions { sampling, .. }, drawn, .. } = &self.sequences[i].text;
        let vocab = self.decoder.config.vocab_size;
        let id = match scores {
            Arrived::Likeliest(likeliest) => sampling.draw_from(&likeliest.of(i), *drawn as u64),
            Arrived::All(logits) => Some(sampling.draw(&logits[i * vocab..(i + 1) * vocab], *drawn as u64)),
        };
        let Some(id) = id else { return false };
        self.count(member);
        let s = &mut self.sequences[i];
        (s.fed, s.waits) = (0, false);
        if let Some(id) = self.decoder.drew(i, &mut s.text, id) {
            self.events.push((i, Event::Token(id)));
        }
        self.end_if_finished(i);
        true
    }

    fn end_if_finished(&mut self, sequence: usize) {
        let s = &mut self.sequences[sequence];
        if let Some(finish) = s.text.finish {
            s.speaks = false;
            self.events.push((sequence, Event::Finished(finish)));
        }
    }
}

/// Records the copies of the likeliest tokens.
fn likeliest(step: &Step, encoder: &mut wgpu::CommandEncoder) -> Result<Arriving<Likeliest>> {
    let candidates = step.top.map_or(vec![], |top| top.candidates.to_vec());
    let readbacks: Result<[Readback; 3], _> = step.record_read(encoder, &candidates)?.try_into();
    let Ok([values, ids, lse]) = readbacks else { return Err(Error::Graph("a step without likeliest tokens".into())) };
    Ok(Arriving::new(async {
        Ok(Likeliest { values: values.take().await?, ids: ids.take().await?, lse: lse.take().await? })
    }))
}

/// The step of a kind, told that all caches are full: then it takes longest, and changes nothing in them.
fn step_to_measure(decoder: &Decoder, kind: usize) -> Result<&Step> {
    let step = decoder.step(kind == CHUNK);
    let mut encoder = decoder.gpu.device().create_command_encoder(&Default::default());
    let starts = decoder.lengths.iter().map(|_| decoder.capacity);
    step.record_inputs(&mut encoder, &vec![&[][..]; decoder.batch], starts)?;
    decoder.gpu.submit(encoder)?;
    Ok(step)
}

/// What each kernel and copy takes; never zero, so that zero is what nothing takes.
fn command_times(profile: &Timeline) -> Vec<Duration> {
    profile.command_ns().into_iter().map(|ns| Duration::from_nanos(ns.max(1))).collect()
}
