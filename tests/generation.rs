//! Streams, iterators and batches generate the same tokens, and end when they should.

mod common;

use common::{gpu, hf_folder};
use futures_util::StreamExt;
use throughline::decode::sample::Sampling;
use throughline::decode::{Decoder, Event, Finish, FrameDecoder, GenerationOptions};
use throughline::model::Model;
use throughline::nn::TransformerConfig;
use throughline::train::{TrainConfig, Trainer};

fn decoder(batch: usize, capacity: usize) -> Decoder {
    gpu().run_blocking(Decoder::with_batch(gpu(), &Model::open(&hf_folder("llama")).unwrap(), batch, capacity)).unwrap()
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
    let decoder = gpu().run_blocking(Decoder::on_params(gpu(), &model, trainer.params(), batch, 32)).unwrap();
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
