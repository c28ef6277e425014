//! Decoding in frames: each text is the one that `generate` gives, however little time there is and whoever else
//! speaks.

mod common;

use std::time::Duration;

use common::{gpu, hf_folder};
use throughline::decode::sample::Sampling;
use throughline::decode::{DecodeOptions, Decoder, Event, Finish, FrameDecoder, GenerationOptions};
use throughline::model::Model;
use throughline::nn::TransformerConfig;
use throughline::optim::Schedule;
use throughline::train::{TrainConfig, Trainer};
use throughline::{DType, Error, Gpu};

const BUDGETS: [Duration; 3] = [Duration::ZERO, Duration::from_micros(300), Duration::from_secs(9)];

fn decoder(gpu: &Gpu, batch: usize, capacity: usize) -> Decoder {
    let options = DecodeOptions { batch, ..DecodeOptions::new(capacity) };
    Decoder::new_blocking(gpu, &Model::open(&hf_folder("llama")).unwrap(), options).unwrap()
}

fn frames(batch: usize, capacity: usize) -> FrameDecoder {
    FrameDecoder::new_blocking(decoder(gpu(), batch, capacity)).unwrap()
}

fn options(max_tokens: usize, temperature: f32, seed: u64) -> GenerationOptions {
    GenerationOptions {
        max_tokens,
        sampling: Sampling { temperature, seed, ..Default::default() },
        ..Default::default()
    }
}

/// Ids as a text would have them.
fn prompt(n: u32, seed: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 7 + seed * 13 + i * i % 5) % 96).collect()
}

type Said = (Vec<u32>, Option<Finish>);

/// What `generate` makes of prompts, one after the other.
fn alone(decoder: &mut Decoder, prompts: &[(&[u32], GenerationOptions)]) -> Said {
    decoder.clear();
    let mut said = (vec![], None);
    for (prompt, options) in prompts {
        let mut generation = decoder.generate(prompt, options.clone()).unwrap();
        said.0 = generation.blocking().map(Result::unwrap).collect();
        said.1 = generation.finish();
    }
    said
}

/// A frame: what its recording takes by the estimates, with what has come added to what was said.
fn frame(frames: &mut FrameDecoder, budget: Duration, said: &mut [Said]) -> Duration {
    let gpu = frames.decoder().gpu().clone();
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let taken = frames.record(&mut encoder, budget).unwrap();
    gpu.submit(encoder).unwrap();
    if taken.is_zero() {
        // Nothing to do: a test may wait for what is on its way, where an app draws its next frame.
        gpu.wait_blocking().unwrap();
    }
    for (i, event) in frames.poll().unwrap() {
        let (tokens, finish) = &mut said[i];
        assert!(finish.is_none(), "sequence {i} goes on after its end");
        match event {
            Event::Token(id) => tokens.push(id),
            Event::Finished(why) => *finish = Some(why),
        }
    }
    taken
}

fn until_silent(frames: &mut FrameDecoder, budget: Duration, said: &mut [Said]) {
    for n in 0.. {
        if frames.is_silent() {
            return;
        }
        assert!(n < 100_000, "no end");
        frame(frames, budget, said);
    }
}

#[test]
fn texts_started_at_any_frame_are_those_of_generate_whatever_the_budget() {
    let mut lone = decoder(gpu(), 1, 64);
    let mut frames = frames(4, 64);
    let [whole_token, whole_chunk] = frames.estimates();
    assert!(!whole_token.is_zero() && !whole_chunk.is_zero());
    // One of them is hot enough that the likeliest 64 of 96 tokens do not decide all draws.
    let mut texts = [
        (prompt(40, 1), options(9, 0.0, 1)),
        (prompt(1, 2), options(7, 0.8, 2)),
        (prompt(60, 3), options(20, 4.0, 3)),
        (prompt(6, 4), options(12, 1.0, 4)),
    ];
    let last = alone(&mut lone, &[(&texts[3].0, texts[3].1.clone())]).0[8];
    texts[3].1.stop = vec![last];
    let want = texts.each_ref().map(|(prompt, options)| alone(&mut lone, &[(prompt, options.clone())]));
    let finishes = [Finish::MaxTokens, Finish::MaxTokens, Finish::Capacity, Finish::Stop];
    assert_eq!(want.each_ref().map(|(_, finish)| finish.unwrap()), finishes);
    for (budget, starts) in BUDGETS.into_iter().zip([[0, 3, 40, 90], [5, 0, 1, 2], [0, 0, 1, 4]]) {
        let mut said = vec![(vec![], None); 4];
        let mut most = Duration::ZERO;
        for n in 0..100 {
            for (i, (prompt, options)) in texts.iter().enumerate().filter(|(i, _)| starts[*i] == n) {
                frames.say(i, prompt, options.clone()).unwrap();
                assert!(frames.speaks(i));
            }
            most = most.max(frame(&mut frames, budget, &mut said));
        }
        until_silent(&mut frames, budget, &mut said);
        assert_eq!(said, want, "{budget:?}");
        assert!(most <= budget || budget == BUDGETS[0] || most < whole_chunk, "{most:?} of {budget:?}");
        // Silent, it records nothing.
        assert!(frame(&mut frames, budget, &mut said).is_zero());
    }
}

/// With caches and prompts in f16.
#[test]
fn texts_in_frames_are_those_of_generate_in_f16_too() {
    let decoder = |batch| {
        let options = DecodeOptions { batch, cache: DType::F16, prompts: DType::F16, ..DecodeOptions::new(64) };
        Decoder::new_blocking(gpu(), &Model::open(&hf_folder("llama")).unwrap(), options).unwrap()
    };
    let texts = [(prompt(40, 1), options(9, 0.0, 1)), (prompt(3, 2), options(12, 0.8, 2))];
    let mut lone = decoder(1);
    let want = texts.each_ref().map(|(prompt, options)| alone(&mut lone, &[(prompt, options.clone())]));
    let mut frames = FrameDecoder::new_blocking(decoder(2)).unwrap();
    let mut said = vec![(vec![], None); 2];
    for (i, (prompt, options)) in texts.iter().enumerate() {
        frames.say(i, prompt, options.clone()).unwrap();
        frame(&mut frames, BUDGETS[1], &mut said);
    }
    until_silent(&mut frames, BUDGETS[1], &mut said);
    assert_eq!(said, want);
}

#[test]
fn texts_go_on_stop_and_are_replaced_at_any_time() {
    let mut lone = decoder(gpu(), 1, 64);
    let mut frames = frames(2, 64);
    let (a, b, c) = (prompt(35, 1), prompt(3, 2), prompt(2, 3));
    let first = alone(&mut lone, &[(&a, options(4, 1.0, 5))]);
    // `generate` is told the last token of the text before.
    let b_behind = [&first.0[3..], &b].concat();
    let want = alone(&mut lone, &[(&a, options(4, 1.0, 5)), (&b_behind, options(5, 1.0, 6))]);
    let fresh = alone(&mut lone, &[(&c, options(5, 1.0, 7))]);
    let none = || vec![(vec![], None); 2];
    for budget in BUDGETS {
        let mut said = none();
        frames.say(0, &a, options(4, 1.0, 5)).unwrap();
        until_silent(&mut frames, budget, &mut said);
        assert_eq!(said[0], first);
        let mut said = none();
        frames.go_on(0, &b, options(5, 1.0, 6)).unwrap();
        until_silent(&mut frames, budget, &mut said);
        assert_eq!(said[0], want, "{budget:?}");

        // In the middle of whatever pass there is; the other text does not care.
        for n in [0, 1, 2, 5, 30] {
            let mut said = none();
            frames.say(1, &c, options(5, 1.0, 7)).unwrap();
            frames.say(0, &a, options(30, 1.0, 9)).unwrap();
            (0..n).for_each(|_| {
                frame(&mut frames, budget, &mut said);
            });
            if n == 2 {
                frames.stop(0);
                assert!(!frames.speaks(0));
            }
            said[0] = (vec![], None);
            frames.say(0, &c, options(5, 1.0, 7)).unwrap();
            until_silent(&mut frames, budget, &mut said);
            assert_eq!(said, [fresh.clone(), fresh.clone()], "{budget:?}, frame {n}");
        }
        // Stopped, it says nothing more, and goes on from where it was.
        let mut said = none();
        frames.say(0, &a, options(4, 1.0, 5)).unwrap();
        while said[0].0.len() < 2 {
            frame(&mut frames, budget, &mut said);
        }
        frames.stop(0);
        (0..3).for_each(|_| {
            frame(&mut frames, budget, &mut said);
        });
        assert!(frames.is_silent() && said[0].1.is_none());
        let so_far = said[0].0.clone();
        frames.go_on(0, &b, options(5, 1.0, 6)).unwrap();
        let mut said = none();
        until_silent(&mut frames, budget, &mut said);
        let len = so_far.len();
        let behind = [&so_far[len - 1..], &b].concat();
        let want = alone(&mut lone, &[(&a, options(len, 1.0, 5)), (&behind, options(5, 1.0, 6))]);
        assert_eq!(said[0], want, "{budget:?}");
        // Back to a common beginning.
        frames.truncate(0, 35);
        frames.go_on(0, &b, options(5, 1.0, 8)).unwrap();
        let mut said = none();
        until_silent(&mut frames, budget, &mut said);
        let want = alone(&mut lone, &[(&a, options(1, 1.0, 5)), (&b, options(5, 1.0, 8))]);
        assert_eq!(said[0], want, "{budget:?}");
        assert_eq!(frames.decoder().lengths()[0], a.len() + b.len() + 4);
    }
}

#[test]
fn what_cannot_be_said_is_an_error_and_changes_nothing() {
    let mut frames = frames(2, 16);
    let want = alone(&mut decoder(gpu(), 1, 16), &[(&[5, 17], options(6, 1.0, 3))]);
    frames.say(0, &[5, 17], options(6, 1.0, 3)).unwrap();
    let mut said = vec![(vec![], None); 2];
    frame(&mut frames, BUDGETS[2], &mut said);
    let mut refused = |i: usize, prompt: &[u32], options: GenerationOptions, words: &[&str]| {
        let error = frames.say(i, prompt, options).unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    refused(2, &[1], options(6, 1.0, 3), &["sequence", "2", "0"]);
    refused(0, &[], options(6, 1.0, 3), &["at least one token"]);
    refused(0, &[96], options(6, 1.0, 3), &["below 96", "96"]);
    refused(0, &[1; 17], options(6, 1.0, 3), &["at most 16", "17"]);
    refused(0, &[1], options(6, -1.0, 3), &["temperature"]);
    let error = frames.go_on(0, &[1; 16], options(6, 1.0, 3)).unwrap_err().to_string();
    assert!(error.contains("at most"), "{error}");
    frames.stop(7);
    until_silent(&mut frames, BUDGETS[2], &mut said);
    assert_eq!(said[0], want);
    // No tokens are wanted, so the end comes at once.
    frames.say(1, &[5], options(0, 1.0, 3)).unwrap();
    assert_eq!(frames.poll().unwrap(), [(1, Event::Finished(Finish::MaxTokens))]);
    assert!(frames.is_silent());
}

#[test]
fn an_encoder_that_is_dropped_is_an_error_and_its_token_comes_again() {
    let mut frames = frames(2, 16);
    let mut lone = decoder(gpu(), 1, 16);
    let want = [3, 4].map(|seed| alone(&mut lone, &[(&[5, 17], options(6, 1.0, seed))]));
    (0..2).for_each(|i| frames.say(i, &[5, 17], options(6, 1.0, 3 + i as u64)).unwrap());
    let mut said = vec![(vec![], None); 2];
    while said[0].0.is_empty() {
        frame(&mut frames, BUDGETS[2], &mut said);
    }
    // A pass in an encoder that goes nowhere.
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    while frames.record(&mut encoder, BUDGETS[2]).unwrap().is_zero() {
        gpu().wait_blocking().unwrap();
        for (i, event) in frames.poll().unwrap() {
            if let Event::Token(id) = event {
                said[i].0.push(id);
            }
        }
    }
    drop(encoder);
    let error = frames.poll().unwrap_err().to_string();
    assert!(error.contains("not submitted"), "{error}");
    until_silent(&mut frames, BUDGETS[2], &mut said);
    assert_eq!(said, want);
}

/// Records a frame and gives its encoder to `keeps`. Whether `poll` tells of one that was dropped.
fn frame_by(
    frames: &mut FrameDecoder,
    budget: Duration,
    said: &mut [Said],
    keeps: impl FnOnce(wgpu::CommandEncoder),
) -> bool {
    let mut encoder = gpu().device().create_command_encoder(&Default::default());
    frames.record(&mut encoder, budget).unwrap();
    keeps(encoder);
    match frames.poll() {
        Ok(events) => {
            for (i, event) in events {
                match event {
                    Event::Token(id) => said[i].0.push(id),
                    Event::Finished(why) => said[i].1 = Some(why),
                }
            }
            false
        }
        Err(e) => e.to_string().contains("not submitted") || panic!("{e}"),
    }
}

/// Prompts of several parts, whose passes go through several frames: any of these frames may come to nothing.
#[test]
fn frames_that_are_dropped_lose_nothing() {
    let texts = [(prompt(60, 1), options(3, 1.0, 1)), (prompt(41, 2), options(4, 0.8, 2))];
    let mut lone = decoder(gpu(), 1, 64);
    let want = texts.each_ref().map(|(prompt, options)| alone(&mut lone, &[(prompt, options.clone())]));
    for budget in BUDGETS {
        let mut frames = frames(2, 64);
        for (i, (prompt, options)) in texts.iter().enumerate() {
            frames.say(i, prompt, options.clone()).unwrap();
        }
        let (mut said, mut told, mut kept) = (vec![(vec![], None); 2], 0, None);
        for n in 0.. {
            if frames.is_silent() {
                break;
            }
            assert!(n < 100_000, "no end");
            told += usize::from(match n {
                0 | 2 | 3 | 30 | 150 => frame_by(&mut frames, budget, &mut said, drop),
                // One that is dropped after the next was submitted.
                40 => frame_by(&mut frames, budget, &mut said, |encoder| kept = Some(encoder)),
                _ => frame_by(&mut frames, budget, &mut said, |encoder| {
                    gpu().submit(encoder).unwrap();
                }),
            });
            if n == 41 {
                kept = None;
            }
        }
        drop(kept);
        assert_eq!(said, want, "{budget:?}");
        assert!(told > 0, "{budget:?}");
        // Where it went on meanwhile, it goes on from what is there.
        assert_eq!(frames.decoder().lengths(), [60 + 2, 41 + 3]);
        for (i, (prompt, _)) in texts.iter().enumerate() {
            let (_last, fed) = said[i].0.split_last().unwrap();
            assert_eq!(frames.decoder().tokens(i), [prompt, fed].concat(), "{budget:?}");
        }
    }
}

/// Wherever a pass begins in an encoder that is dropped after the rest of it was submitted: what was in the cache before
/// stays as it is.
#[test]
fn the_rest_of_a_pass_without_its_beginning_spoils_nothing() {
    // Hot, so that other keys and values soon make other tokens.
    let (text, says) = (prompt(5, 3), options(5, 4.0, 4));
    let want = alone(&mut decoder(gpu(), 1, 64), &[(&text, says.clone())]);
    let mut frames = frames(1, 64);
    for dropped in 20..130 {
        frames.say(0, &text, says.clone()).unwrap();
        let (mut said, mut kept) = (vec![(vec![], None)], None);
        for n in 0..dropped + 12 {
            let submit = |encoder| {
                gpu().submit(encoder).unwrap();
                gpu().wait_blocking().unwrap();
            };
            frame_by(&mut frames, Duration::ZERO, &mut said, |encoder| match n == dropped {
                true => kept = Some(encoder),
                false => submit(encoder),
            });
        }
        drop(kept);
        while !frames.is_silent() {
            frame_by(&mut frames, Duration::ZERO, &mut said, |encoder| {
                gpu().submit(encoder).unwrap();
            });
        }
        assert_eq!(said[0], want, "frame {dropped}");
    }
}

#[test]
fn a_text_that_goes_on_after_a_dropped_frame_has_its_whole_prompt() {
    let (a, b) = (prompt(50, 1), prompt(3, 2));
    let want = alone(&mut decoder(gpu(), 1, 64), &[(&[&a[..], &b].concat(), options(4, 1.0, 5))]);
    let mut frames = frames(1, 64);
    for drops in [true, false] {
        frames.say(0, &a, options(9, 1.0, 5)).unwrap();
        let mut said = vec![(vec![], None)];
        // The first part of the prompt, but not the second.
        let [_, part] = frames.estimates();
        frame_by(&mut frames, part, &mut said, |encoder| match drops {
            true => drop(encoder),
            false => drop(gpu().submit(encoder).unwrap()),
        });
        frames.go_on(0, &b, options(4, 1.0, 5)).unwrap();
        let mut said = vec![(vec![], None)];
        while !frames.is_silent() {
            frame_by(&mut frames, BUDGETS[2], &mut said, |encoder| {
                gpu().submit(encoder).unwrap();
            });
        }
        assert_eq!(said[0], want, "dropped: {drops}");
    }
}

#[test]
fn a_lost_device_is_an_error() {
    let gpu = Gpu::headless_blocking().unwrap();
    let mut frames = FrameDecoder::new_blocking(decoder(&gpu, 1, 16)).unwrap();
    frames.say(0, &[5, 17], options(6, 1.0, 3)).unwrap();
    gpu.device().destroy();
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let lost = frames.record(&mut encoder, BUDGETS[2]).err().or_else(|| gpu.submit(encoder).err());
    assert!(matches!(lost, Some(Error::DeviceLost(_))), "{lost:?}");
}

#[test]
fn a_model_in_training_speaks_from_the_trainers_own_parameters() {
    let model = TransformerConfig::llama(31, 16, 2, 32, 4);
    let config = TrainConfig { schedule: Schedule::constant(1e-2), seed: 1, ..TrainConfig::new(model.clone(), 2) };
    let mut trainer = Trainer::new_blocking(gpu(), config).unwrap();
    let mut decoder = gpu().run_blocking(Decoder::on_params(gpu(), &model, trainer.params(), 16)).unwrap();
    let ids: Vec<u32> = (0..32).map(|i| i * 5 % 31).collect();
    let batch = throughline::train::data::Batch::new(ids.clone(), ids);
    let batch = std::slice::from_ref(&batch);
    // Minus the log of the softmax's share of the target.
    let nats = |(logits, target): (&[f32], &u32)| {
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        sum.ln() - f64::from(logits[*target as usize])
    };
    let mut before = 0.0;
    for _ in 0..2 {
        let mut loss = 0.0;
        for (tokens, targets) in batch[0].tokens.chunks(16).zip(batch[0].targets.chunks(16)) {
            decoder.clear();
            let logits = decoder.feed_all_blocking(tokens).unwrap();
            loss += logits.chunks(31).zip(targets).map(nats).sum::<f64>() / 32.0;
        }
        let want = f64::from(trainer.evaluate_blocking(batch).unwrap());
        assert!((loss - want).abs() < 1e-5 && (loss - before).abs() > 1e-3, "{loss} {want} {before}");
        before = loss;
        trainer.step(batch).unwrap().wait_blocking().unwrap();
    }
    let other = TransformerConfig { n_layers: 3, ..model };
    let error = gpu().run_blocking(Decoder::on_params(gpu(), &other, trainer.params(), 16)).unwrap_err().to_string();
    assert!(error.contains("h.2."), "{error}");
}
