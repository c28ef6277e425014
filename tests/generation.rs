//! Streams, iterators, batches and chats generate the same tokens, and end when they should.

mod common;

use common::{gpu, hf_folder};
use futures_util::StreamExt;
use throughline::decode::sample::Sampling;
use throughline::decode::{Chat, DecodeOptions, Decoder, Event, Finish, FrameDecoder, GenerationOptions};
use throughline::model::Model;
use throughline::nn::TransformerConfig;
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::{TrainConfig, Trainer};

fn decoder(batch: usize, capacity: usize) -> Decoder {
    let options = DecodeOptions { batch, ..DecodeOptions::new(capacity) };
    Decoder::new_blocking(gpu(), &Model::open(&hf_folder("llama")).unwrap(), options).unwrap()
}

fn options(max_tokens: usize, seed: u64) -> GenerationOptions {
    let sampling = Sampling { temperature: 1.0, seed, ..Default::default() };
    GenerationOptions { max_tokens, sampling, ..Default::default() }
}

fn text(decoder: &mut Decoder, prompt: &[u32], options: GenerationOptions) -> Vec<u32> {
    decoder.clear();
    decoder.generate(prompt, options).unwrap().blocking().map(Result::unwrap).collect()
}

#[test]
fn streams_and_iterators_give_the_same_tokens() {
    let mut decoder = decoder(1, 64);
    let prompt = [5, 17, 80, 3];
    let want = text(&mut decoder, &prompt, options(20, 3));
    assert_eq!(want.len(), 20);
    assert_ne!(want, text(&mut decoder, &prompt, options(20, 4)));
    decoder.clear();
    let stream = decoder.generate(&prompt, options(20, 3)).unwrap().stream();
    let got = gpu().run_blocking(async { Ok(stream.map(Result::unwrap).collect::<Vec<u32>>().await) }).unwrap();
    assert_eq!(got, want);
}

#[test]
fn a_text_ends_at_a_stop_token_the_limit_or_the_capacity() {
    let mut decoder = decoder(1, 16);
    let all = text(&mut decoder, &[5, 17], options(8, 1));
    let stop = all[5];
    let first = all.iter().position(|&id| id == stop).unwrap();
    decoder.clear();
    let mut generation =
        decoder.generate(&[5, 17], GenerationOptions { stop: vec![stop, 1000], ..options(8, 1) }).unwrap();
    assert_eq!(generation.finish(), None);
    let got: Vec<u32> = generation.blocking().map(Result::unwrap).collect();
    assert_eq!((got.as_slice(), generation.finish()), (&all[..first], Some(Finish::Stop)));
    assert!(generation.next_blocking().unwrap().is_none());
    decoder.clear();
    let mut generation = decoder.generate(&[5, 17], options(8, 1)).unwrap();
    assert_eq!((generation.blocking().count(), generation.finish()), (8, Some(Finish::MaxTokens)));
    decoder.clear();
    // 16 tokens fit, and one more is drawn from them.
    let mut generation = decoder.generate(&[5, 17], options(100, 1)).unwrap();
    assert_eq!((generation.blocking().count(), generation.finish()), (15, Some(Finish::Capacity)));
    // What goes beyond is an error that says by how much.
    let error = decoder.generate(&[5], options(1, 1)).unwrap_err().to_string();
    assert!(error.contains("at most 0 more") && error.contains("16"), "{error}");
    decoder.clear();
    assert_eq!(decoder.generate(&[5], options(0, 1)).unwrap().blocking().count(), 0);
    let bad = GenerationOptions { sampling: Sampling { temperature: -1.0, ..Default::default() }, ..options(1, 1) };
    assert!(decoder.generate(&[5], bad).unwrap_err().to_string().contains("temperature"));
}

/// What such a text should be: one to the cache's end, and from an empty cache another behind the last of its tokens.
#[test]
fn a_text_goes_on_where_the_cache_is_full_from_its_last_tokens() {
    let (mut one, prompt, keep) = (decoder(1, 16), [5, 17, 80], 6);
    let greedy = GenerationOptions { sampling: Sampling { temperature: 0.0, ..Default::default() }, ..options(40, 0) };
    let mut want: Vec<u32> = prompt.to_vec();
    while want.len() < prompt.len() + 40 {
        let start = if want.len() == prompt.len() { 0 } else { want.len() - keep };
        let part = want[start..].to_vec();
        want.extend(text(&mut one, &part, greedy.clone()));
    }
    let want = &want[prompt.len()..prompt.len() + 40];
    let kept = GenerationOptions { keep, ..greedy };
    assert_eq!(text(&mut one, &prompt, kept.clone()), want);
    let mut two = decoder(2, 16);
    let both = two.generate_batch_blocking(&[&[9], &prompt], &kept).unwrap();
    assert_eq!((both[0].len(), both[1].as_slice()), (40, want));

    two.clear();
    let mut frames = FrameDecoder::new_blocking(two).unwrap();
    frames.say(1, &prompt, kept.clone()).unwrap();
    let mut events = vec![];
    while !frames.is_silent() {
        events.extend(frames.poll().unwrap());
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        frames.record(&mut encoder, std::time::Duration::from_millis(1)).unwrap();
        gpu().submit(encoder).unwrap();
    }
    let all = want.iter().map(|&id| Event::Token(id)).chain([Event::Finished(Finish::MaxTokens)]);
    assert_eq!(events, all.map(|event| (1, event)).collect::<Vec<_>>());

    let error = one.generate(&prompt, GenerationOptions { keep: 16, ..kept }).unwrap_err().to_string();
    assert!(error.contains("`keep`") && error.contains("16"), "{error}");
}

/// A model that breaks where it reads token 7: its row is NaN or, with finite weights, activations overflow.
fn broken(batch: usize, nan: bool) -> (Trainer, Decoder) {
    let model = TransformerConfig::llama(50, 32, 1, 16, 2);
    let trainer = Trainer::new_blocking(gpu(), TrainConfig::new(model.clone(), 1)).unwrap();
    let change = |name: &str, f: &dyn Fn(&mut [f32])| {
        let i = trainer.params().layout.tensors.iter().position(|(n, _)| n == name).unwrap();
        let mut values = trainer.params().read_blocking(gpu()).unwrap().swap_remove(i);
        f(&mut values);
        trainer.params().write_tensor(gpu(), i, &values).unwrap();
    };
    // Normalised, the first of 16 elements is 4 in this row, and at most 3 in others.
    let row = [if nan { f32::NAN } else { 1.0 }, 0.0, 0.0, 0.0];
    change("embed.weight", &|table| {
        table[7 * 16..8 * 16].copy_from_slice(&[row, [0.0; 4], [0.0; 4], [0.0; 4]].concat())
    });
    change("norm_f.weight", &|gain| gain[0] = if nan { 1.0 } else { 1e38 });
    let options = DecodeOptions { batch, ..DecodeOptions::new(32) };
    let decoder = gpu().run_blocking(Decoder::on_params(gpu(), &model, trainer.params(), options)).unwrap();
    (trainer, decoder)
}

#[test]
fn logits_that_are_no_numbers_end_a_text_with_an_error() {
    for (nan, temperature) in [(true, 0.0), (true, 1.0), (false, 0.0), (false, 1.0)] {
        let (_trainer, mut one) = broken(1, nan);
        let sampling = Sampling { temperature, ..Default::default() };
        let options = GenerationOptions { sampling, max_tokens: 4, ..Default::default() };
        assert!(one.feed_blocking(&[7]).unwrap().iter().all(|x| if nan { x.is_nan() } else { x.is_infinite() }));
        one.clear();
        let mut generation = one.generate(&[3, 7], options.clone()).unwrap();
        let texts: Vec<_> = generation.blocking().collect();
        assert_eq!(texts.len(), 1, "{texts:?}");
        let error = texts[0].as_ref().unwrap_err().to_string();
        let got = if nan { "got NaN" } else { "got inf as the largest" };
        assert!(error.contains("`logits`") && error.contains(got), "{error}");
        // The same again, until somebody clears the cache.
        assert!(generation.next_blocking().is_err() && generation.finish().is_none());
        assert_eq!(one.lengths(), [0]);
        let stream = one.generate(&[7], options.clone()).unwrap().stream();
        let items = gpu().run_blocking(async { Ok(stream.collect::<Vec<_>>().await) }).unwrap();
        assert!(items.len() == 1 && items[0].is_err(), "{items:?}");
        assert_eq!(text(&mut one, &[3], options.clone()).len(), 4);

        let (_trainer, mut two) = broken(2, nan);
        let error = two.generate_batch_blocking(&[&[3], &[7]], &options).unwrap_err().to_string();
        assert!(error.contains("`logits of sequence 1`"), "{error}");
    }
}

/// One that breaks says so once, and the others speak on.
#[test]
fn logits_that_are_no_numbers_silence_only_their_sequence_in_frames() {
    let greedy = GenerationOptions { sampling: Sampling { temperature: 0.0, ..Default::default() }, ..options(4, 0) };
    let (_trainer, mut one) = broken(1, true);
    let want = text(&mut one, &[3, 4], greedy.clone());
    assert!(!want.contains(&7), "{want:?} breaks, too");
    let (_trainer, three) = broken(3, true);
    let mut frames = FrameDecoder::new_blocking(three).unwrap();
    for (sequence, prompt) in [[7, 7], [3, 4], [3, 7]].iter().enumerate() {
        frames.say(sequence, prompt, greedy.clone()).unwrap();
    }
    let (mut events, mut errors) = (vec![], vec![]);
    while !frames.is_silent() {
        match frames.poll() {
            Ok(more) => events.extend(more),
            Err(e) => errors.push(e.to_string()),
        }
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        frames.record(&mut encoder, std::time::Duration::from_millis(1)).unwrap();
        gpu().submit(encoder).unwrap();
    }
    let all = want.iter().map(|&id| Event::Token(id)).chain([Event::Finished(Finish::MaxTokens)]);
    assert_eq!(events, all.map(|event| (1, event)).collect::<Vec<_>>());
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("`logits of sequence 0, 2`"), "{errors:?}");
    frames.say(0, &[3, 4], greedy).unwrap();
    assert!(frames.speaks(0) && !frames.speaks(2));
}

#[test]
fn going_back_and_on_is_like_never_having_been_there() {
    let mut decoder = decoder(1, 64);
    let want = decoder.feed_blocking(&[9, 8, 7, 6, 5]).unwrap();
    decoder.truncate(0, 3);
    decoder.feed_blocking(&[50, 51, 52, 53]).unwrap();
    decoder.truncate(0, 3);
    decoder.truncate(0, 60); // not longer than it is
    assert_eq!(decoder.lengths(), [3]);
    let got = decoder.feed_blocking(&[6, 5]).unwrap();
    let worst = common::worst(&got, &want);
    assert!(worst < 1e-5, "{worst}");
}

#[test]
fn a_batch_gives_each_sequence_what_it_gets_alone() {
    let prompts: [&[u32]; 3] = [&[5, 17, 80, 3], &[44], &(0..50).map(|i| (i * 7) % 96).collect::<Vec<u32>>()];
    let mut alone = decoder(1, 64);
    let mut together = decoder(3, 64);
    // Scores, in chunks and one by one.
    let got = together.feed_batch_blocking(&prompts).unwrap();
    assert_eq!(together.lengths(), [4, 1, 50]);
    let more: [&[u32]; 3] = [&[9], &[], &[1]];
    let got_more = together.feed_batch_blocking(&more).unwrap();
    assert_eq!(together.lengths(), [5, 1, 51]);
    for i in 0..3 {
        alone.clear();
        let want = alone.feed_blocking(prompts[i]).unwrap();
        assert!(common::worst(&got[i], &want) < 1e-5, "sequence {i}");
        if !more[i].is_empty() {
            let want = alone.feed_blocking(more[i]).unwrap();
            assert!(common::worst(&got_more[i], &want) < 1e-5, "sequence {i}, one more");
        }
    }
    // Texts, of which one is cut short by the capacity.
    together.clear();
    let texts = together.generate_batch_blocking(&prompts, &options(20, 7)).unwrap();
    for (i, got) in texts.iter().enumerate() {
        assert_eq!(*got, text(&mut alone, prompts[i], options(20, 7 + i as u64)), "sequence {i}");
    }
    assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [20, 20, 15]);
    let error = together.feed_batch_blocking(&prompts[..2]).unwrap_err().to_string();
    assert!(error.contains("3 sequences"), "{error}");
}

#[test]
fn what_prompts_have_in_common_is_fed_once() {
    let mut decoder = decoder(1, 64);
    decoder.feed_blocking(&[9, 8, 7, 6, 5]).unwrap();
    let prompt = [9, 8, 7, 50, 51];
    assert_eq!(decoder.reuse(0, &prompt), [50, 51]);
    assert_eq!(decoder.tokens(0), [9, 8, 7]);
    let got = decoder.feed_blocking(&[50, 51]).unwrap();
    assert_eq!(decoder.tokens(0), prompt);
    // The logits of the last token are wanted in any case.
    assert_eq!(decoder.reuse(0, &prompt), [51]);
    assert_eq!(decoder.reuse(0, &prompt[..2]), [8]);
    assert_eq!(decoder.reuse(0, &[1, 2]), [1, 2]);
    assert!(decoder.reuse(0, &[]).is_empty() && decoder.tokens(0).is_empty());
    let want = decoder.feed_blocking(&prompt).unwrap();
    assert!(common::worst(&got, &want) < 1e-5);
    assert!(decoder.tokens(1).is_empty());
}

/// A model that knows no language, and reads and writes it nevertheless.
struct Speaker {
    trainer: Trainer,
    capacity: usize,
}

impl Speaker {
    fn new(capacity: usize) -> Self {
        let model = TransformerConfig::llama(tokenizer().vocab_len(), 512, 1, 32, 2);
        Speaker { trainer: Trainer::new_blocking(gpu(), TrainConfig::new(model, 1)).unwrap(), capacity }
    }

    fn decoder(&self, batch: usize) -> Decoder {
        let (model, params) = (&self.trainer.config().model, self.trainer.params());
        let options = DecodeOptions { batch, ..DecodeOptions::new(self.capacity) };
        gpu().run_blocking(Decoder::on_params(gpu(), model, params, options)).unwrap()
    }

    fn chat(&self, max_tokens: usize) -> Chat {
        let mut chat = Chat::new(self.decoder(1), tokenizer()).unwrap();
        let sampling = Sampling { temperature: 1.0, seed: 5, ..Default::default() };
        *chat.options_mut() = GenerationOptions { max_tokens, sampling, ..Default::default() };
        chat.set_system("Speak of the harbour.");
        chat
    }

    /// What a decoder that has read nothing else replies to these messages, of which `forgotten` are left out.
    fn reply(&self, chat: &Chat, messages: &[Message], forgotten: usize) -> String {
        let read = [&messages[..1], &messages[1 + forgotten..]].concat();
        let mut options = GenerationOptions { stop: tokenizer().stop_tokens().to_vec(), ..chat.options().clone() };
        options.sampling.seed += messages.len() as u64;
        let ids = text(&mut self.decoder(1), &tokenizer().chat_ids(&read, true).unwrap(), options);
        tokenizer().decode(&ids, true).unwrap()
    }
}

fn tokenizer() -> ModelTokenizer {
    ModelTokenizer::open("tests/data/tiny_chat".as_ref()).unwrap()
}

#[test]
fn a_chat_feeds_only_what_is_new() {
    let speaker = Speaker::new(256);
    let mut chat = speaker.chat(12);
    let first = chat.say("How deep is it?").unwrap().text_blocking().unwrap();
    let prompt = tokenizer().chat_ids(&chat.messages()[..2], true).unwrap();
    let before = chat.decoder().tokens(0).to_vec();
    assert!(before.starts_with(&prompt));
    drop(chat.say("And the wall?").unwrap()); // has not fed anything yet
    let second = tokenizer().chat_ids(chat.messages(), true).unwrap();
    let common = before.iter().zip(&second).take_while(|(a, b)| a == b).count();
    assert!(common >= prompt.len() && common < second.len(), "{common}");
    assert_eq!(chat.decoder().tokens(0), &second[..common]);
    let reply = chat.reply().unwrap().text_blocking().unwrap();
    // As if it had read all of it at once.
    let messages = chat.messages();
    let roles: Vec<&str> = messages.iter().map(|m| m.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!([&messages[2].content, &messages[4].content], [&first, &reply]);
    assert!(!first.is_empty() && first != reply, "{first}");
    assert_eq!(first, speaker.reply(&chat, &messages[..2], 0));
    assert_eq!(reply, speaker.reply(&chat, &messages[..4], 0));
    // And from a history that was changed.
    chat.set_system("Speak of the wall.");
    *chat.messages_mut() = chat.messages()[..2].to_vec();
    let other = chat.reply().unwrap().text_blocking().unwrap();
    assert_eq!(other, speaker.reply(&chat, &chat.messages()[..2], 0));
    assert_ne!(other, first);
}

#[test]
fn replies_are_the_same_in_pieces_and_streams() {
    let speaker = Speaker::new(256);
    let mut chat = speaker.chat(20);
    let want = chat.say("How deep is it?").unwrap().text_blocking().unwrap();
    chat.messages_mut().pop();
    let mut reply = chat.reply().unwrap();
    let pieces: Vec<String> = reply.blocking().map(Result::unwrap).collect();
    assert!(reply.finish().is_some() && reply.next_blocking().unwrap().is_none());
    assert!(pieces.len() > 1 && pieces.iter().all(|piece| !piece.is_empty()));
    assert_eq!(pieces.concat(), want);
    chat.messages_mut().pop();
    let stream = chat.reply().unwrap().stream();
    let got = gpu().run_blocking(async { Ok(stream.map(Result::unwrap).collect::<Vec<_>>().await) }).unwrap();
    assert_eq!(got, pieces);
    // What has come of a reply that nobody reads to its end.
    chat.messages_mut().pop();
    let start = chat.reply().unwrap().next_blocking().unwrap().unwrap();
    assert_eq!(start, pieces[0]);
    assert_eq!(chat.messages().last(), Some(&Message::new("assistant", start)));
}

#[test]
fn a_chat_that_is_too_long_forgets_its_oldest_turns() {
    let speaker = Speaker::new(160);
    let mut chat = speaker.chat(8);
    let mut forgotten = vec![];
    for turn in 0..8 {
        let reply = chat.say(format!("How deep is it at {turn}?")).unwrap().text_blocking().unwrap();
        forgotten.push(chat.forgotten());
        assert_eq!(chat.messages().len(), 1 + 2 * (turn + 1));
        let before = &chat.messages()[..2 * (turn + 1)];
        assert_eq!(reply, speaker.reply(&chat, before, chat.forgotten()), "turn {turn}, {forgotten:?}");
    }
    // Not a turn each time, but several now and then.
    let steps: Vec<usize> = forgotten.windows(2).map(|pair| pair[1] - pair[0]).filter(|step| *step > 0).collect();
    assert!(forgotten[0] == 0 && !steps.is_empty() && steps.len() < 6, "{forgotten:?}");
    assert!(steps.iter().all(|step| step % 2 == 0), "{forgotten:?}");
}

#[test]
fn chats_that_cannot_be_say_why() {
    let speaker = Speaker::new(128);
    let mut chat = speaker.chat(1000);
    let error = |result: Result<(), throughline::Error>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    chat.messages_mut().clear();
    error(chat.reply().map(drop), &["`messages`", "none"]);
    let long = "tide ".repeat(60);
    error(chat.say(&*long).map(drop), &["at most 65", "leave 64 of 128", "max_tokens", "capacity"]);
    assert_eq!(chat.messages(), []);
    chat.options_mut().sampling.temperature = -1.0;
    error(chat.say("Hi").map(drop), &["temperature"]);
    assert_eq!(chat.messages(), []);
    chat.options_mut().sampling.temperature = 0.0;
    assert!(chat.say("Hi").unwrap().next_blocking().unwrap().is_some());
    error(chat.reply().map(drop), &["`messages`", "the assistant's"]);

    error(Chat::new(speaker.decoder(2), tokenizer()).map(drop), &["`batch`", "2"]);
    let json = std::fs::read("tests/data/tiny_chat/tokenizer.json").unwrap();
    let plain = ModelTokenizer::from_files("plain", [("tokenizer.json", json.as_slice())]).unwrap();
    error(Chat::new(speaker.decoder(1), plain).map(drop), &["plain", "chat template"]);
}
