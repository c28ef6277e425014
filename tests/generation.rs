//! Streams, iterators, batches and chats generate the same tokens, and end when they should.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{gpu, hf_folder};
use futures_util::StreamExt;
use throughline::decode::sample::Sampling;
use throughline::decode::{AdapterSlots, Chat, DecodeOptions, Decoder, Event, Finish, FrameDecoder, GenerationOptions};
use throughline::model::{Adapter, Model, save_arena_blocking, save_with};
use throughline::nn::{Lora, TransformerConfig};
use throughline::ops::random_array;
use throughline::optim::{Arena, ArenaLayout};
use throughline::tensor::Shape;
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::{TrainConfig, Trainer};
use throughline::{AdapterClass, DType, Gpu};

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

fn values(shape: &Shape, seed: u64, std: f64) -> Vec<f32> {
    random_array(shape, seed).data.iter().map(|x| (x * std) as f32).collect()
}

/// A random adapter of a model, large enough to change what it says.
fn tuned(model: &Model, lora: Lora, seed: u64) -> Adapter {
    let mut tensors = vec![];
    let adapted = |layer: &str| lora.targets.is_empty() || lora.targets.iter().any(|target| layer.ends_with(target));
    for (i, (name, shape)) in (0..).zip(model.params()) {
        let (Some(layer), &[d_in, d_out]) = (name.strip_suffix(".weight"), shape.dims()) else { continue };
        if layer.starts_with("h.") && adapted(layer) {
            let [a, b] = [[d_in, lora.rank], [lora.rank, d_out]].map(Shape::from);
            tensors.push((format!("{layer}.lora_a"), values(&a, 100 * seed + 2 * i, 0.3)));
            tensors.push((format!("{layer}.lora_b"), values(&b, 100 * seed + 2 * i + 1, 0.3)));
        }
    }
    Adapter::new(&format!("adapter {seed}"), model, &lora, tensors).unwrap()
}

/// A decoder of the model with an adapter merged into its weights.
fn merged(model: &Model, adapter: Option<&Adapter>) -> Decoder {
    let layout = ArenaLayout::of_model(model.config(), gpu().profile().max_tensor_bytes()).unwrap();
    let arena = Arena::zeros(gpu(), "merged", &Arc::new(layout)).unwrap();
    model.load_blocking(gpu(), &arena).unwrap();
    for ((name, _), tensor) in arena.layout.tensors.iter().zip(&arena.tensors) {
        if let Some(values) = adapter.and_then(|adapter| adapter.merged(model, name).unwrap()) {
            tensor.write(gpu(), &values).unwrap();
        }
    }
    gpu().run_blocking(Decoder::on_params(gpu(), model.config(), &arena, 64)).unwrap()
}

/// A model, and two adapters for it: one of all layers, and one of another rank of some.
fn model_and_adapters() -> (Model, [Adapter; 2]) {
    let model = Model::open(&hf_folder("llama")).unwrap();
    let some = ["attn.q", "attn.v", "mlp.down"].map(String::from).to_vec();
    let all = tuned(&model, Lora::new(6, 3.0), 1);
    let some = tuned(&model, Lora { targets: some, rank_stabilized: true, ..Lora::new(3, 2.0) }, 2);
    (model, [all, some])
}

fn with_room_on(gpu: &Gpu, model: &Model, batch: usize, slots: &AdapterSlots) -> Decoder {
    let options = DecodeOptions { batch, adapters: Some(slots), ..DecodeOptions::new(64) };
    Decoder::new_blocking(gpu, model, options).unwrap()
}

fn with_room(model: &Model, batch: usize, slots: &AdapterSlots) -> Decoder {
    with_room_on(gpu(), model, batch, slots)
}

#[test]
fn each_sequence_says_what_its_adapter_merged_into_the_model_says() {
    let (model, [all, some]) = model_and_adapters();
    let mut lone = [merged(&model, Some(&all)), merged(&model, Some(&some)), merged(&model, None)];
    let mut decoder = with_room(&model, 3, &AdapterSlots::new(3, 6));
    decoder.load_adapter(2, &all).unwrap();
    decoder.load_adapter(0, &some).unwrap();
    decoder.set_adapter(0, Some(2)).unwrap();
    decoder.set_adapter(1, Some(0)).unwrap();
    assert_eq!([0, 1, 2].map(|i| decoder.adapter(i)), [Some(2), Some(0), None]);
    // One of several passes.
    let long: Vec<u32> = (0..40).map(|i| (i * 7) % 96).collect();
    let prompts: [&[u32]; 3] = [&[5, 17, 80, 3], &long, &[44]];
    let got = decoder.feed_batch_blocking(&prompts).unwrap();
    for i in 0..3 {
        lone.iter_mut().for_each(Decoder::clear);
        let want = lone[i].feed_blocking(prompts[i]).unwrap();
        let most = want.iter().fold(1.0f32, |most, x| most.max(x.abs()));
        let worst = common::worst(&got[i], &want);
        assert!(worst < 1e-5 * most, "sequence {i}: {worst} of {most}");
        // Each says something else than the others would.
        let other = lone[(i + 1) % 3].feed_blocking(prompts[i]).unwrap();
        assert!(common::worst(&got[i], &other) > 0.1, "sequence {i}");
    }
    decoder.clear();
    let texts = decoder.generate_batch_blocking(&prompts, &options(20, 7)).unwrap();
    for (i, got) in texts.iter().enumerate() {
        assert_eq!(*got, text(&mut lone[i], prompts[i], options(20, 7 + i as u64)), "sequence {i}");
    }
    // Another in the middle of a text: what comes next is another model's.
    let before = decoder.feed_batch_blocking(&[&[9], &[9], &[9]]).unwrap();
    decoder.truncate(2, decoder.lengths()[2] - 1);
    decoder.set_adapter(2, Some(2)).unwrap();
    let after = decoder.feed_batch_blocking(&[&[], &[], &[9]]).unwrap();
    assert!(common::worst(&before[2], &after[2]) > 0.1);
    // One sequence, all tokens.
    let mut one = with_room(&model, 1, &AdapterSlots::new(1, 8));
    one.load_adapter(0, &some).unwrap();
    one.set_adapter(0, Some(0)).unwrap();
    lone[1].clear();
    let worst = common::worst(&one.feed_all_blocking(&long).unwrap(), &lone[1].feed_all_blocking(&long).unwrap());
    assert!(worst < 1e-4, "{worst}");
}

/// With caches and prompts in f16: what an adapter adds is added where its layer's product is.
#[test]
fn adapters_work_in_f16_too() {
    let (model, [all, _]) = model_and_adapters();
    let mut lone = [merged(&model, Some(&all)), merged(&model, None)];
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let gpu = gpu().with_class(class);
        let slots = AdapterSlots::new(1, 6);
        let options = DecodeOptions { cache: DType::F16, prompts: DType::F16, ..DecodeOptions::new(64) };
        let options = DecodeOptions { batch: 2, adapters: Some(&slots), ..options };
        let mut decoder = Decoder::new_blocking(&gpu, &model, options).unwrap();
        decoder.load_adapter(0, &all).unwrap();
        decoder.set_adapter(0, Some(0)).unwrap();
        let prompt: Vec<u32> = (0..40).map(|i| (i * 7) % 96).collect();
        lone.iter_mut().for_each(Decoder::clear);
        for part in [&prompt[..], &[3], &[44]] {
            let got = decoder.feed_batch_blocking(&[part; 2]).unwrap();
            let want = lone.each_mut().map(|decoder| decoder.feed_blocking(part).unwrap());
            for i in 0..2 {
                let most = want[i].iter().fold(1.0f32, |most, x| most.max(x.abs()));
                let worst = common::worst(&got[i], &want[i]);
                assert!(worst < 8e-3 * most, "{class:?}, sequence {i}: {worst} of {most}");
            }
            assert!(common::worst(&got[0], &got[1]) > 0.1);
        }
    }
}

#[test]
fn an_adapter_takes_the_place_of_another_and_no_memory() {
    let (model, [all, some]) = model_and_adapters();
    let gpu = Gpu::headless_blocking().unwrap(); // on which no other test allocates
    let mut decoder = with_room_on(&gpu, &model, 1, &AdapterSlots::new(1, 6));
    let prompt = [5, 17, 80, 3];
    let base = text(&mut decoder, &prompt, options(12, 5));
    let mut said = |adapter: &Adapter| {
        decoder.load_adapter(0, adapter).unwrap();
        decoder.set_adapter(0, Some(0)).unwrap();
        text(&mut decoder, &prompt, options(12, 5))
    };
    let first = [&all, &some].map(&mut said);
    for (said, adapter) in first.iter().zip([&all, &some]) {
        assert_eq!(*said, text(&mut merged(&model, Some(adapter)), &prompt, options(12, 5)));
        assert_ne!(*said, base);
    }
    gpu.wait_blocking().unwrap();
    let report = || gpu.device().generate_allocator_report().map(|r| (r.allocations.len(), r.total_allocated_bytes));
    let before = report();
    for _ in 0..3 {
        assert_eq!([&all, &some].map(&mut said), first);
    }
    gpu.wait_blocking().unwrap();
    assert_eq!(report(), before);
    // What room takes beside the rest is matrices of this rank, and a number for each step to say which.
    let plain = Decoder::new_blocking(&gpu, &model, 64).unwrap();
    let matrices: usize = all.layers().map(|(_, layer)| 4 * (layer.a.len() + layer.b.len())).sum();
    let more = decoder.buffer_bytes() - plain.buffer_bytes();
    assert!((matrices..2 * matrices).contains(&more), "{more} bytes for matrices of {matrices}");
}

#[test]
fn adapters_that_slots_cannot_hold_say_why() {
    let (model, [all, some]) = model_and_adapters();
    let mut plain = decoder(1, 16);
    plain.set_adapter(0, None).unwrap();
    let narrow = AdapterSlots { targets: vec!["attn.q".into(), "attn.v".into()], ..AdapterSlots::new(2, 4) };
    let mut decoder = with_room(&model, 2, &narrow);
    let error = |result: throughline::Result<()>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    error(plain.load_adapter(0, &all), &["`adapters`", "DecodeOptions::adapters"]);
    error(plain.set_adapter(0, Some(0)), &["`adapters`"]);
    error(decoder.load_adapter(0, &all), &["adapter 1", "`h.0.attn.k`", "no room"]);
    let wide = tuned(&model, Lora { targets: vec!["attn.q".into()], ..Lora::new(6, 3.0) }, 9);
    error(decoder.load_adapter(0, &wide), &["adapter 9", "`h.0.attn.q`", "rank 6", "room for 4"]);
    error(decoder.load_adapter(0, &some), &["adapter 2", "`h.0.mlp.down`", "AdapterSlots::targets"]);
    error(decoder.load_adapter(2, &some), &["slot", "one of 2", "got 2"]);
    error(decoder.set_adapter(0, Some(1)), &["slot", "holds an adapter", "got 1"]);
    error(decoder.set_adapter(2, None), &["sequence", "one of 2", "got 2"]);
    let q = Lora { targets: vec!["h.1.attn.q".into()], ..Lora::new(2, 1e30) };
    decoder.load_adapter(0, &tuned(&model, q.clone(), 3)).unwrap();
    let [a, b] = ["a", "b"].map(|matrix| (format!("h.1.attn.q.lora_{matrix}"), vec![1e10; 2 * 32]));
    let large = Adapter::new("adapter 4", &model, &q, [a, b]).unwrap();
    error(decoder.load_adapter(0, &large), &["adapter 4", "`h.1.attn.q.lora_b`", "beyond f32"]);
    let whole = ("norm_f.weight".to_string(), vec![1.0; 32]);
    let lora = Lora { trained: vec!["norm_f".into()], ..q.clone() };
    let [a, b] = ["a", "b"].map(|matrix| (format!("h.1.attn.q.lora_{matrix}"), vec![0.0; 2 * 32]));
    let whole = Adapter::new("adapter 5", &model, &lora, [a, b, whole]).unwrap();
    error(decoder.load_adapter(0, &whole), &["adapter 5", "`norm_f.weight`", "trained whole"]);
    // For models of other shapes.
    let other = |d_model: usize, layers: usize, target: &str, seed: u64| {
        let config = TransformerConfig::llama(96, 64, layers, d_model, 4);
        let dir = tempfile::tempdir().unwrap();
        save_with(dir.path(), &config, |name| {
            let layout = ArenaLayout::of_model(&config, u64::MAX)?;
            let (_, shape) = layout.tensors.iter().find(|(param, _)| param == name).unwrap();
            Ok(vec![0.5; shape.len()])
        })
        .unwrap();
        let lora = Lora { targets: vec![target.into()], ..Lora::new(2, 4.0) };
        tuned(&Model::open(dir.path()).unwrap(), lora, seed)
    };
    let narrow_model = other(24, 2, "attn.q", 6);
    error(decoder.load_adapter(0, &narrow_model), &["adapter 6", "`h.0.attn.q.lora_a`", "[32, 2]", "[24, 2]"]);
    error(decoder.load_adapter(0, &other(32, 2, "attn.v", 7)), &["`h.0.attn.v.lora_b`", "[2, 16]", "[2, 32]"]);
    error(decoder.load_adapter(0, &other(32, 3, "h.2.attn.q", 8)), &["adapter 8", "`h.2.attn.q`", "no room"]);
    decoder.set_adapter(0, Some(0)).unwrap();
    let impossible = [
        (AdapterSlots::new(0, 4), "`adapters.count`"),
        (AdapterSlots::new(1, 0), "`adapters.rank`"),
        (AdapterSlots { targets: vec!["attn.x".into()], ..narrow }, "`adapters.targets`"),
    ];
    for (slots, field) in impossible {
        let options = DecodeOptions { adapters: Some(&slots), ..DecodeOptions::new(16) };
        error(Decoder::new_blocking(gpu(), &model, options).map(drop), &[field]);
    }
}

/// Characters with adapters of their own, one of whom gets another while the others speak on.
#[test]
fn adapters_are_loaded_in_frames_while_others_speak() {
    let (model, [all, some]) = model_and_adapters();
    let [all, some] = [all, some].map(Arc::new);
    let mut lone = [merged(&model, Some(&all)), merged(&model, Some(&some)), merged(&model, None)];
    let prompts: [&[u32]; 3] = [&[5, 17, 80, 3], &[9, 9, 4], &[44]];
    let want = |lone: &mut [Decoder; 3], i: usize, by: usize| text(&mut lone[by], prompts[i], options(9, i as u64));
    let mut frames = FrameDecoder::new_blocking(with_room(&model, 3, &AdapterSlots::new(2, 6))).unwrap();
    assert!(frames.set_adapter(0, Some(1)).is_err());
    frames.load_adapter(1, all.clone()).unwrap();
    frames.load_adapter(0, some.clone()).unwrap();
    frames.set_adapter(0, Some(1)).unwrap();
    frames.set_adapter(1, Some(0)).unwrap();
    for (budget, swapped) in [(Duration::ZERO, false), (Duration::from_micros(300), true), (Duration::MAX / 2, false)] {
        let of = if swapped { [1, 0, 2] } else { [0, 1, 2] };
        if frames.decoder().lengths()[0] > 0 {
            // While nobody has begun, and below while one is in the middle of a text.
            let [first, second] = [&all, &some].map(Arc::clone);
            frames.load_adapter(1, if swapped { second.clone() } else { first.clone() }).unwrap();
            frames.load_adapter(0, if swapped { first } else { second }).unwrap();
        }
        let mut said = [vec![], vec![], vec![]];
        frames.say(2, prompts[2], options(9, 2)).unwrap();
        for n in 0.. {
            if n == 2 {
                frames.say(0, prompts[0], options(9, 0)).unwrap();
                frames.say(1, prompts[1], options(9, 1)).unwrap();
            }
            let mut encoder = gpu().device().create_command_encoder(&Default::default());
            frames.record(&mut encoder, budget).unwrap();
            gpu().submit(encoder).unwrap();
            for (i, event) in frames.poll().unwrap() {
                if let Event::Token(id) = event {
                    said[i].push(id);
                }
            }
            if n > 2 && frames.is_silent() {
                break;
            }
            assert!(n < 100_000, "no end");
        }
        for (i, by) in of.into_iter().enumerate() {
            assert_eq!(said[i], want(&mut lone, i, by), "sequence {i}, budget {budget:?}");
        }
    }
    // A slot that is replaced in the middle of a text holds its sequence up, and nobody else.
    frames.say(0, prompts[0], options(30, 0)).unwrap();
    frames.say(2, prompts[2], options(9, 2)).unwrap();
    let (mut said, mut replaced) = ([vec![], vec![], vec![]], false);
    while !frames.is_silent() {
        let mut encoder = gpu().device().create_command_encoder(&Default::default());
        frames.record(&mut encoder, Duration::from_micros(200)).unwrap();
        gpu().submit(encoder).unwrap();
        for (i, event) in frames.poll().unwrap() {
            if let Event::Token(id) = event {
                said[i].push(id);
            }
        }
        if said[0].len() == 3 && !replaced {
            frames.load_adapter(1, some.clone()).unwrap();
            replaced = true;
        }
    }
    let whole = text(&mut lone[0], prompts[0], options(30, 0));
    assert_eq!((said[0].len(), &said[0][..3]), (30, &whole[..3]));
    assert_ne!(said[0], whole);
    assert_eq!(said[2], want(&mut lone, 2, 2));
    // On its way when the decoder is taken back: not there.
    frames.load_adapter(1, all).unwrap();
    let mut decoder = frames.into_decoder();
    assert_eq!(decoder.adapter(0), Some(1));
    let error = decoder.feed_batch_blocking(&[&[1], &[1], &[1]]).unwrap_err().to_string();
    assert!(error.contains("holds an adapter"), "{error}");
    decoder.load_adapter(1, &some).unwrap();
    decoder.clear();
    let got = decoder.feed_batch_blocking(&prompts).unwrap();
    lone[1].clear();
    assert!(common::worst(&got[0], &lone[1].feed_blocking(prompts[0]).unwrap()) < 1e-4);
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
        *chat.options_mut() = options_of_chats(max_tokens);
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

fn options_of_chats(max_tokens: usize) -> GenerationOptions {
    let sampling = Sampling { temperature: 1.0, seed: 5, ..Default::default() };
    GenerationOptions { max_tokens, sampling, ..Default::default() }
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
fn a_chat_takes_an_adapter_up_and_lays_it_down() {
    let speaker = Speaker::new(256);
    let dir = tempfile::tempdir().unwrap();
    save_arena_blocking(dir.path(), &speaker.trainer.config().model, gpu(), speaker.trainer.params()).unwrap();
    let model = Model::open(dir.path()).unwrap();
    let adapter = tuned(&model, Lora::new(4, 4.0), 1);
    let chat = || {
        let options = DecodeOptions { adapters: Some(&AdapterSlots::new(1, 4)), ..DecodeOptions::new(256) };
        let mut chat = Chat::new(Decoder::new_blocking(gpu(), &model, options).unwrap(), tokenizer()).unwrap();
        *chat.options_mut() = options_of_chats(12);
        chat
    };
    let said = |chat: &mut Chat| {
        chat.messages_mut().clear();
        chat.say("When does it sail?").unwrap().text_blocking().unwrap()
    };
    let (mut one, mut other) = (chat(), chat());
    let plain = said(&mut one);
    one.set_adapter(Some(&adapter)).unwrap();
    other.set_adapter(Some(&adapter)).unwrap();
    let adapted = said(&mut one);
    assert_eq!(adapted, said(&mut other));
    assert_ne!(adapted, plain);
    one.set_adapter(None).unwrap();
    assert_eq!(said(&mut one), plain);
    assert!(speaker.chat(1).set_adapter(Some(&adapter)).unwrap_err().to_string().contains("`adapters`"));
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
