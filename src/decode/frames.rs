//! Decoding in an application's frames: many texts that start at any time, recorded into the encoders of frames as far
//! as a budget allows.
//!
//! The work is done in passes over the whole batch. A pass takes the next part of every prompt, or the last token of
//! every text that is past its prompt. One pass is recorded at a time, over as many frames as it takes. How a text is
//! cut into passes depends on that text alone. So its tokens do not depend on who else speaks, or on how much time
//! frames have.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::adapters::{NO_SLOT, Slots};
use super::decoder::{Decoder, Inputs, Step};
use super::generation::{Finish, GenerationOptions, Likeliest, Text};
use super::sample::of_sequence;
use crate::device::timeline::Timeline;
use crate::device::{Fate, Readback, now};
use crate::error::{Error, Result, joined};
use crate::model::Adapter;

/// What happened to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its next token.
    Token(u32),
    /// Its end. Nothing more follows.
    Finished(Finish),
}

/// A decoder whose sequences each generate a text of their own while frames are rendered, such as the characters of a
/// game. After construction nothing waits for the GPU.
///
/// ```
/// use std::time::Duration;
/// use throughline::decode::{DecodeOptions, Decoder, Event, FrameDecoder, GenerationOptions};
/// use throughline::Gpu;
/// use throughline::model::Model;
///
/// let gpu = Gpu::headless_blocking()?; // an app: `Gpu::from_device`
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::qwen3();
/// let model = Model::open(folder.path())?;
/// let options = DecodeOptions { batch: 3, ..DecodeOptions::new(64) }; // three characters
/// let decoder = Decoder::new_blocking(&gpu, &model, options)?;
/// let mut characters = FrameDecoder::new_blocking(decoder)?;
///
/// characters.say(1, &[5, 17, 29], GenerationOptions { max_tokens: 4, ..Default::default() })?;
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
    /// Times of the kernels and copies of a pass of each kind. A kind is an index into the decoder's steps.
    estimates: Vec<Vec<Duration>>,
    sequences: Vec<Sequence>,
    /// The pass that is being recorded.
    pass: Option<Pass>,
    /// The pass of each kind whose logits are on their way. They stay in that pass's memory until everything is drawn,
    /// so the next pass of the kind waits. It then includes all texts that have come as far.
    flights: Vec<Option<Flight>>,
    /// Kind of the last pass that was started.
    last: usize,
    /// Encoders with parts of passes, from the first that is not known to have run.
    recordings: VecDeque<Recording>,
    /// Number of encoders before those.
    settled: u64,
    /// What was counted while recording into the present encoder.
    counted: Vec<Member>,
    /// Whether an encoder was dropped, which `poll` has yet to say.
    lost: bool,
    events: Vec<(usize, Event)>,
    /// Adapters on their way into their slots.
    loading: Vec<Loading>,
    /// Of each slot, the number of the last encoder with a part of a pass that reads it.
    slot_reads: Vec<u64>,
}

/// An adapter on its way into a slot.
#[derive(Debug)]
struct Loading {
    slot: usize,
    adapter: Arc<Adapter>,
    /// Index of the next layer to write.
    layer: usize,
}

/// What was recorded into an encoder.
#[derive(Debug)]
struct Recording {
    fate: Fate,
    /// Tokens that are counted as in the cache once they are recorded: parts of prompts that no draw depends on.
    counted: Vec<Member>,
}

#[derive(Debug)]
struct Sequence {
    /// What it says, or has said. The tokens to feed from `fed` on are not in the cache, or not yet known to be.
    text: Text,
    fed: usize,
    speaks: bool,
    /// Whether the rest of its tokens was in a pass whose logits are on their way.
    waits: bool,
}

impl Sequence {
    fn unfed(&self) -> &[u32] {
        &self.text.feed[self.fed..]
    }
}

/// A sequence in a pass, and the number of its tokens in it.
#[derive(Clone, Copy, Debug)]
struct Member {
    sequence: usize,
    count: usize,
}

#[derive(Debug)]
struct Pass {
    kind: usize,
    members: Vec<Member>,
    inputs: PassInputs,
    /// Index of the next kernel or copy.
    next: usize,
}

/// What a pass is about, for each sequence. Every encoder with a part of the pass has these again: if the first is
/// dropped and a later one is submitted, its kernels must not work with the inputs of an earlier pass, or they would
/// write over that one's tokens in the caches.
#[derive(Debug)]
struct PassInputs {
    parts: Vec<Vec<u32>>,
    starts: Vec<usize>,
    temperatures: Vec<f32>,
    slots: Vec<u32>,
}

#[derive(Debug)]
struct Flight {
    /// The sequences that have not drawn yet.
    members: Vec<Member>,
    scores: Scores,
    /// Number of encoders that must have run.
    needs: u64,
}

#[derive(Debug)]
enum Scores {
    Likeliest(Arriving<Likeliest>),
    /// The likeliest tokens did not decide all draws, and a frame has yet to record the copy of all logits.
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

/// A future's result, asked for without waiting. The mutex is never contended; it makes the type `Sync`, for
/// applications that share it between threads.
struct Arriving<T>(Mutex<Pin<Box<dyn Future<Output = Result<T>> + Send>>>);

impl<T> Arriving<T> {
    fn new(future: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Arriving(Mutex::new(Box::pin(future)))
    }

    /// Must not be called again after it has returned a result.
    fn arrived(&mut self) -> Option<Result<T>> {
        now(self.0.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> fmt::Debug for Arriving<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Arriving")
    }
}

/// Bytes of adapters that a frame queues, roughly: a fraction of a millisecond.
const LOADED_BYTES: usize = 1 << 20;

/// Number of times that passes are measured.
const RUNS: usize = 4;

impl FrameDecoder {
    /// Takes a decoder over, with what its sequences have in their caches. Runs passes of both kinds a few times, to
    /// see what they take; an `Err` where the device was opened without `TIMESTAMP_QUERY`. Resolves once the device
    /// has been polled.
    pub async fn new(decoder: Decoder) -> Result<Self> {
        let mut estimates = vec![];
        for step in &decoder.steps {
            prepare_to_measure(&decoder, step)?;
            let mut profile = step.exec.profile().await?;
            for _ in 1..RUNS {
                profile = profile.shorter(&step.exec.profile().await?);
            }
            estimates.push(command_times(&profile)?);
        }
        Ok(Self::with_estimates(decoder, estimates))
    }

    /// [`new`](Self::new), waiting for the GPU. On any device: without timestamps by the host's clock, by which
    /// kernels seem to take longer.
    pub fn new_blocking(decoder: Decoder) -> Result<Self> {
        let mut estimates = vec![];
        for step in &decoder.steps {
            prepare_to_measure(&decoder, step)?;
            let mut profile = step.exec.profile_blocking()?;
            for _ in 1..RUNS {
                profile = profile.shorter(&step.exec.profile_blocking()?);
            }
            estimates.push(command_times(&profile)?);
        }
        Ok(Self::with_estimates(decoder, estimates))
    }

    fn with_estimates(decoder: Decoder, estimates: Vec<Vec<Duration>>) -> Self {
        let silent = || {
            let text = Text::new(&[], GenerationOptions::default());
            Sequence { text, fed: 0, speaks: false, waits: false }
        };
        let sequences = decoder.cached.iter().map(|_| silent()).collect();
        let flights = decoder.steps.iter().map(|_| None).collect();
        let slot_reads = vec![0; decoder.slots.as_ref().map_or(0, Slots::count)];
        FrameDecoder {
            decoder,
            estimates,
            sequences,
            pass: None,
            flights,
            last: 0,
            recordings: VecDeque::new(),
            settled: 0,
            counted: vec![],
            lost: false,
            events: vec![],
            loading: vec![],
            slot_reads,
        }
    }

    /// Starts a new text of a sequence with this prompt, whatever it has said or is saying. Its tokens are those that
    /// [`Decoder::generate`] returns on an empty cache.
    ///
    /// Nothing is recorded yet. After an error everything is as it was.
    pub fn say(&mut self, sequence: usize, prompt: &[u32], options: GenerationOptions) -> Result<()> {
        self.expect(sequence)?;
        self.begin_text(sequence, 0, prompt.to_vec(), options)
    }

    /// Continues a sequence with this prompt, after everything that it was told and has said so far; this may be in the
    /// middle of a text. The prompt may be empty unless the last token was a stop token.
    pub fn go_on(&mut self, sequence: usize, prompt: &[u32], options: GenerationOptions) -> Result<()> {
        self.expect(sequence)?;
        let (length, unfed) = self.settled(sequence);
        let feed = [&unfed, prompt].concat();
        self.begin_text(sequence, length, feed, options)
    }

    /// The number of tokens that are sure to be in the cache, and those that are to follow.
    fn settled(&self, sequence: usize) -> (usize, Vec<u32>) {
        let counted = self.recordings.iter().flat_map(|r| &r.counted).filter(|m| m.sequence == sequence);
        let unsure: usize = counted.map(|m| m.count).sum();
        let s = &self.sequences[sequence];
        (self.decoder.cached[sequence].len() - unsure, s.text.feed[s.fed - unsure..].to_vec())
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
        self.decoder.check_more(sequence, &feed, length)?;
        self.stop(sequence);
        self.decoder.truncate(sequence, length);
        let s = &mut self.sequences[sequence];
        (s.text, s.fed, s.speaks) = (Text::new(&feed, options), 0, true);
        self.end_if_finished(sequence);
        Ok(())
    }

    /// Loads an adapter into a [slot](super::AdapterSlots), in place of the one that it holds. Nothing waits: the frames that
    /// follow write about a megabyte each, beginning when none that was recorded still reads the slot. Sequences that use
    /// it pause until it is there, and go on with the new one.
    ///
    /// # Errors
    ///
    /// As for [`Decoder::load_adapter`]. Everything is then as it was.
    pub fn load_adapter(&mut self, slot: usize, adapter: impl Into<Arc<Adapter>>) -> Result<()> {
        let adapter = adapter.into();
        let slots = self.decoder.slots_mut()?;
        slots.check(slot, &adapter)?;
        slots.set_filled(slot, false);
        self.loading.retain(|loading| loading.slot != slot);
        self.loading.push(Loading { slot, adapter, layer: 0 });
        Ok(())
    }

    /// Lets a sequence use the adapter in a slot, or none, from the next pass that begins. Set it before
    /// [`say`](Self::say) for all of a text. In the middle of one, its earlier tokens stay as they were read.
    ///
    /// # Errors
    ///
    /// If there is no such sequence or slot, or no adapter is in the slot or on its way there.
    pub fn set_adapter(&mut self, sequence: usize, slot: Option<usize>) -> Result<()> {
        match slot.filter(|slot| self.loading.iter().any(|loading| loading.slot == *slot)) {
            Some(slot) => self.decoder.slots_mut()?.choose(sequence, Some(slot)),
            None => self.decoder.set_adapter(sequence, slot),
        }
    }

    /// Silences a sequence: no more events of its text arrive. It remembers what it was told and has said, for
    /// [`go_on`](Self::go_on). Does nothing to a silent sequence.
    pub fn stop(&mut self, sequence: usize) {
        let Some(s) = self.sequences.get_mut(sequence) else { return };
        (s.speaks, s.waits) = (false, false);
        self.uncount(|m| m.sequence == sequence);
        self.events.retain(|(of, _)| *of != sequence);
        // Give up passes that nobody needs any more. They have only written after the tokens of caches.
        let others = |members: &mut Vec<Member>| {
            members.retain(|m| m.sequence != sequence);
            !members.is_empty()
        };
        self.pass.take_if(|pass| !others(&mut pass.members));
        self.flights.iter_mut().for_each(|flight| drop(flight.take_if(|flight| !others(&mut flight.members))));
    }

    /// Shortens a sequence to its first `len` tokens and silences it, to [go on](Self::go_on) from a common beginning.
    /// Does nothing to a shorter sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        if sequence >= self.sequences.len() {
            return;
        }
        let (length, unfed) = self.settled(sequence);
        if len < length + unfed.len() {
            self.stop(sequence);
            self.decoder.truncate(sequence, len);
            let s = &mut self.sequences[sequence];
            (s.text.feed, s.fed) = (unfed[..len.saturating_sub(length)].to_vec(), 0);
        }
    }

    /// Whether a sequence is generating a text.
    pub fn speaks(&self, sequence: usize) -> bool {
        self.sequences.get(sequence).is_some_and(|s| s.speaks)
    }

    /// Whether all sequences are silent. Nothing is recorded then, and no events arrive.
    pub fn is_silent(&self) -> bool {
        self.events.is_empty() && self.sequences.iter().all(|s| !s.speaks)
    }

    /// Estimated times of whole passes: of one token per sequence, and of the largest part of the prompts that is
    /// processed at a time. They are for full caches, so most passes take less.
    pub fn estimates(&self) -> [Duration; 2] {
        let whole = |pass: Option<&Vec<Duration>>| pass.into_iter().flatten().sum();
        [whole(self.estimates.first()), whole(self.estimates.last())]
    }

    /// The decoder, for its settings and lengths. The lengths lag behind what is recorded.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Returns the decoder. Unfinished texts stay where they are, without what is not known to have run. A slot whose
    /// adapter is still on its way holds none.
    pub fn into_decoder(mut self) -> Decoder {
        self.uncount(|_| true);
        self.decoder
    }

    /// Records as much of the pending work as fits `budget` by the estimates, but at least one kernel. Records nothing
    /// if there is nothing to do. Never waits.
    ///
    /// A text advances by at most one token per frame, since the next token depends on it, so call [`poll`](Self::poll)
    /// first. Returns the estimated time of what was recorded, zero if nothing was.
    ///
    /// Submit every encoder, in order. If one is dropped, also because of an error of this function, then what was
    /// recorded into it comes again, with the same tokens; [`poll`](Self::poll) says so once.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder, budget: Duration) -> Result<Duration> {
        self.settle();
        let needs = self.settled + self.recordings.len() as u64 + 1;
        let result = self.record_work(encoder, budget, needs);
        let scores = self.flights.iter().flatten().any(|flight| flight.needs == needs);
        if scores || !matches!(result, Ok(Duration::ZERO)) {
            let counted = std::mem::take(&mut self.counted);
            self.recordings.push_back(Recording { fate: Fate::of(encoder), counted });
        }
        result
    }

    /// Records into the encoder of this number.
    fn record_work(&mut self, encoder: &mut wgpu::CommandEncoder, budget: Duration, needs: u64) -> Result<Duration> {
        self.load_some()?;
        for kind in 0..self.flights.len() {
            self.record_scores(encoder, kind, needs)?;
        }
        let mut taken = Duration::ZERO;
        let fits = |taken: Duration, more| taken.is_zero() || taken + more <= budget;
        loop {
            let mut pass = match (self.pass.take(), self.ready()) {
                (Some(pass), _) => pass,
                (None, Some(kind)) if fits(taken, self.estimates[kind][0]) => self.begin_pass(kind),
                _ => return Ok(taken),
            };
            self.record_inputs(encoder, &pass)?;
            for &slot in &pass.inputs.slots {
                if let Some(read) = self.slot_reads.get_mut(slot as usize) {
                    *read = needs;
                }
            }
            let (estimates, first) = (&self.estimates[pass.kind], pass.next);
            while let Some(&more) = estimates.get(pass.next).filter(|more| fits(taken, **more)) {
                taken += more;
                pass.next += 1;
            }
            self.decoder.steps[pass.kind].exec.record_range(encoder, first..pass.next);
            if pass.next < estimates.len() {
                self.pass = Some(pass);
                return Ok(taken);
            }
            self.end_pass(encoder, pass, needs)?;
        }
    }

    /// Queues the writes of some layers of an adapter, which so come before everything that is submitted from now on. What
    /// reads the slot must have run.
    fn load_some(&mut self) -> Result<()> {
        let Some(slots) = &mut self.decoder.slots else { return Ok(()) };
        let pass = self.pass.as_ref().map_or(&[][..], |pass| &pass.inputs.slots);
        let is_free = |slot: usize| self.slot_reads[slot] <= self.settled && !pass.contains(&(slot as u32));
        let Some(at) = self.loading.iter().position(|loading| is_free(loading.slot)) else { return Ok(()) };
        let Loading { slot, adapter, layer } = &mut self.loading[at];
        let mut queued = 0;
        while queued < LOADED_BYTES {
            let Some(bytes) = slots.write(&self.decoder.gpu, *slot, adapter, *layer)? else {
                slots.set_filled(*slot, true);
                self.loading.remove(at);
                break;
            };
            (queued, *layer) = (queued + bytes, *layer + 1);
        }
        Ok(())
    }

    /// Records the copy of all logits, if a flight needs them.
    fn record_scores(&mut self, encoder: &mut wgpu::CommandEncoder, kind: usize, needs: u64) -> Result<()> {
        if let Some(flight @ Flight { scores: Scores::Wanted, .. }) = &mut self.flights[kind] {
            let step = &self.decoder.steps[kind];
            let readback = step.exec.tensor(step.values.logits)?.record_read(&self.decoder.gpu, encoder);
            (flight.scores, flight.needs) = (Scores::All(Arriving::new(readback.take())), needs);
        }
        Ok(())
    }

    /// Notes which encoders have run. If one was dropped, everything since then begins again: passes go through
    /// several encoders, and later ones need what earlier ones write.
    fn settle(&mut self) {
        while self.recordings.front().is_some_and(|r| r.fate.is_done()) {
            self.recordings.pop_front();
            self.settled += 1;
        }
        if self.recordings.iter().any(|r| r.fate.is_dropped()) {
            self.uncount(|_| true);
            self.recordings.clear();
            self.pass = None;
            self.flights.fill_with(|| None);
            // What is left of it comes to nothing, whatever it reads.
            self.slot_reads.fill(0);
            self.sequences.iter_mut().for_each(|s| s.waits = false);
            self.lost = true;
        }
    }

    /// Takes back the counts of what is not known to have run.
    fn uncount(&mut self, which: impl Fn(&Member) -> bool) {
        for m in self.recordings.iter_mut().flat_map(|r| r.counted.extract_if(.., |m| which(m))) {
            self.sequences[m.sequence].fed -= m.count;
            let cached = &mut self.decoder.cached[m.sequence];
            cached.truncate(cached.len() - m.count);
        }
    }

    /// The kind of pass that may start. The kinds take turns if several may.
    fn ready(&self) -> Option<usize> {
        let may_begin = |&kind: &usize| self.flights[kind].is_none() && self.members(kind).next().is_some();
        let kinds = self.flights.len();
        (1..=kinds).map(|i| (self.last + i) % kinds).find(may_begin)
    }

    /// The sequences that a pass of this kind would include now.
    fn members(&self, kind: usize) -> impl Iterator<Item = Member> {
        let time = self.decoder.steps[kind].shape.time;
        let of_kind = move |s: &Sequence| self.decoder.kind_for(s.text.feed.len()) == kind;
        let has_adapter = |i| self.decoder.slots.as_ref().is_none_or(|slots| slots.is_ready(i));
        let ready = move |i, s: &Sequence| s.speaks && !s.waits && of_kind(s) && has_adapter(i);
        // As in `Decoder::submit`, all parts of a prompt except the first are whole.
        let count = move |s: &Sequence| (s.unfed().len() - 1) % time + 1;
        let sequences = self.sequences.iter().enumerate().filter(move |(i, s)| ready(*i, s));
        sequences.map(move |(sequence, s)| Member { sequence, count: count(s) })
    }

    /// A pass of this kind, of which nothing is recorded yet.
    fn begin_pass(&mut self, kind: usize) -> Pass {
        let members: Vec<Member> = self.members(kind).collect();
        let mut parts = vec![vec![]; self.sequences.len()];
        for m in &members {
            parts[m.sequence] = self.sequences[m.sequence].unfed()[..m.count].to_vec();
        }
        // Unused rows go after the tokens that are in the cache but not counted yet.
        let start = |(s, c): (&Sequence, &Vec<u32>)| c.len() + if s.waits { s.unfed().len() } else { 0 };
        let starts = self.sequences.iter().zip(&self.decoder.cached).map(start).collect();
        let temperatures = self.sequences.iter().map(|s| s.text.options.sampling.temperature).collect();
        // Only members read their slots: the others' may be about to change.
        let ids = self.decoder.slot_ids().into_iter().enumerate();
        let slots = ids.map(|(i, id)| if members.iter().any(|m| m.sequence == i) { id } else { NO_SLOT }).collect();
        self.last = kind;
        Pass { kind, members, inputs: PassInputs { parts, starts, temperatures, slots }, next: 0 }
    }

    /// Records the inputs of a pass.
    fn record_inputs(&self, encoder: &mut wgpu::CommandEncoder, pass: &Pass) -> Result<()> {
        let step = &self.decoder.steps[pass.kind];
        let PassInputs { parts, starts, slots, .. } = &pass.inputs;
        let parts = parts.iter().map(Vec::as_slice).collect();
        step.record_inputs(encoder, &Inputs { parts, starts: starts.clone(), slots: slots.clone() })?;
        match step.top {
            Some(top) => step.exec.record_write(encoder, top.temperature, &pass.inputs.temperatures),
            None => Ok(()),
        }
    }

    /// Notes that a pass is recorded, and records the copies that its sequences draw from.
    fn end_pass(&mut self, encoder: &mut wgpu::CommandEncoder, pass: Pass, needs: u64) -> Result<()> {
        let draws = |m: &Member| m.count == self.sequences[m.sequence].unfed().len();
        let (members, rest): (Vec<Member>, Vec<Member>) = pass.members.into_iter().partition(draws);
        if !members.is_empty() {
            let scores = Scores::Likeliest(likeliest(&self.decoder.steps[pass.kind], encoder)?);
            members.iter().for_each(|m| self.sequences[m.sequence].waits = true);
            self.flights[pass.kind] = Some(Flight { members, scores, needs });
        }
        // Sequences that draw are counted once they have drawn: if the logits never arrive, they go through again.
        rest.iter().for_each(|m| self.count(m));
        self.counted.extend(rest);
        Ok(())
    }

    /// Notes that tokens are in the cache.
    fn count(&mut self, member: &Member) {
        let s = &mut self.sequences[member.sequence];
        self.decoder.cached[member.sequence].extend_from_slice(&s.unfed()[..member.count]);
        s.fed += member.count;
    }

    /// Returns what has happened since the last call, in order for each sequence. Polls the device but does not wait.
    ///
    /// After an error, such as one of an encoder that was dropped, what it cost is repeated, with the same tokens. Only
    /// where the logits of sequences are no numbers to choose by, as where activations overflow f32, the error names
    /// these sequences, and they are silent.
    pub fn poll(&mut self) -> Result<Vec<(usize, Event)>> {
        let polled = self.decoder.gpu.device().poll(wgpu::PollType::Poll);
        polled.map_err(|e| self.decoder.gpu.error(format!("polling the GPU: {e}")))?;
        self.settle();
        if std::mem::take(&mut self.lost) {
            let message = "the encoder of an earlier frame was not submitted: what it held is recorded again";
            return Err(self.decoder.gpu.error(message));
        }
        for kind in 0..self.flights.len() {
            let settled = self.settled;
            let Some(mut flight) = self.flights[kind].take_if(|flight| flight.needs <= settled) else { continue };
            let mut failed = vec![];
            match flight.scores.arrived() {
                Some(Ok(arrived)) => {
                    flight.members.retain(|m| match self.draw(m, &arrived) {
                        Ok(drew) => !drew,
                        Err(e) => {
                            let s = &mut self.sequences[m.sequence];
                            (s.speaks, s.waits) = (false, false);
                            failed.push((m.sequence, e));
                            false
                        }
                    });
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
            let names = joined(failed.iter().map(|(sequence, _)| sequence), ", ");
            if let Some((_, e)) = failed.pop() {
                return Err(of_sequence(e, format!("logits of sequence {names}")));
            }
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Draws the next token of a sequence. Returns `false` if these logits do not decide it.
    fn draw(&mut self, member: &Member, scores: &Arrived) -> Result<bool> {
        let i = member.sequence;
        let Text { options: GenerationOptions { sampling, .. }, drawn, .. } = &self.sequences[i].text;
        let vocab = self.decoder.config.vocab_size;
        let id = match scores {
            Arrived::Likeliest(likeliest) => sampling.draw_from(&likeliest.of(i), *drawn as u64)?,
            Arrived::All(logits) => Some(sampling.draw(&logits[i * vocab..(i + 1) * vocab], *drawn as u64)?),
        };
        let Some(id) = id else { return Ok(false) };
        self.count(member);
        let s = &mut self.sequences[i];
        (s.fed, s.waits) = (0, false);
        if let Some(id) = self.decoder.drew(i, &mut s.text, id) {
            self.events.push((i, Event::Token(id)));
        }
        self.end_if_finished(i);
        Ok(true)
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

/// Sets the inputs of a step for full caches: it then takes longest, and changes nothing in them.
fn prepare_to_measure(decoder: &Decoder, step: &Step) -> Result<()> {
    let mut encoder = decoder.gpu.encoder("measured decoding");
    let (parts, starts) = (vec![&[][..]; decoder.batch], vec![decoder.capacity; decoder.batch]);
    let slots = decoder.slots.as_ref().map_or(vec![], Slots::ids_to_measure);
    step.record_inputs(&mut encoder, &Inputs { parts, starts, slots })?;
    decoder.gpu.submit(encoder)?;
    Ok(())
}

/// The time of each kernel and copy. Never zero, so that zero can mean that nothing was recorded.
fn command_times(profile: &Timeline) -> Result<Vec<Duration>> {
    Ok(profile.command_ns()?.into_iter().map(Duration::from_nanos).collect())
}
