//! What each fuzz target does with a file. `tests/corpus.rs` runs the same functions over `corpus/`.
//!
//! Every function takes any bytes and panics if the crate does something it promises not to do. Targets of folders take
//! one file with the texts of several: a line `=== NAME` starts each.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;
use throughline::format::{Weights, gguf_header, safetensors_header};
use throughline::model::{self, Model};
use throughline::nn::TransformerConfig;
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::{Batch, Batches, Examples};
use throughline::train::{GraphCheckpoint, TrainConfig};
use throughline::{Result, Tuner};

/// What a target does with a file.
pub type Target = fn(&[u8]);

/// All targets, by the names of their binaries and of their folders in `corpus/`.
pub const TARGETS: [(&str, Target); 10] = [
    ("chat_template", chat_template),
    ("checkpoint", checkpoint),
    ("gguf_header", gguf),
    ("gguf_tokenizer", gguf_tokenizer),
    ("jsonl", jsonl),
    ("model_config", model_config),
    ("safetensors_header", safetensors),
    ("safetensors_index", safetensors_index),
    ("tokenizer_folder", tokenizer_folder),
    ("tuner", tuner),
];

/// An `Err`, or a header whose tensors lie within the file and decode.
pub fn gguf(file: &[u8]) {
    let Ok(header) = gguf_header("fuzz", file) else { return };
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).collect();
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.iter().all(|r| r.start < r.end && r.end <= file.len()));
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for (key, value) in header.metadata.iter() {
        assert_eq!(header.metadata.get(key).map(|v| v.summary()), Some(value.summary()));
    }
    every_tensor(&Weights::from_bytes("fuzz", file.to_vec()).expect("its header is read"));
}

/// An `Err`, or a header that the `safetensors` crate reads in the same way, unless it has a tensor of a type that the
/// crate does not know.
pub fn safetensors(file: &[u8]) {
    let Ok(header) = safetensors_header("fuzz", file) else { return };
    let Ok(theirs) = SafeTensors::deserialize(file) else {
        return assert!(header.unread.iter().any(|(_, ty)| ty.contains("unknown type")));
    };
    assert_eq!(theirs.len(), header.tensors.len() + header.unread.len());
    for tensor in &header.tensors {
        assert_eq!(theirs.tensor(&tensor.name).expect("we have it").data(), &file[tensor.range.clone()]);
    }
    // `Weights` wants the object to start at once, as the specification does.
    match Weights::from_bytes("fuzz", file.to_vec()) {
        Ok(weights) => every_tensor(&weights),
        Err(_) => assert_ne!(file[8], b'{'),
    }
}

/// Every tensor has as many values as its shape says.
fn every_tensor(weights: &Weights) {
    for tensor in weights.iter() {
        assert_eq!(tensor.values().expect("its place was checked").len(), tensor.shape().len());
        let _ = tensor.check_finite();
    }
}

/// `model.safetensors.index.json` beside two files: an `Err`, or tensors that can all be read.
pub fn safetensors_index(file: &[u8]) {
    let files =
        [("model.safetensors.index.json", file), ("a.safetensors", one_layer()), ("b.safetensors", one_layer())];
    in_folder(files, |dir| {
        if let Ok(weights) = Weights::open(dir) {
            every_tensor(&weights);
        }
    });
}

/// `config.json`: an `Err`, or a model that, when its configuration can be saved, is read back the same.
pub fn model_config(file: &[u8]) {
    in_folder([("config.json", file), ("model.safetensors", one_layer())], |dir| {
        let Ok(model) = Model::open(dir) else { return };
        model.config().validate().expect("the configuration of a model that opens");
        let len: usize = model.params().iter().map(|(_, shape)| shape.len()).sum();
        if len > 1 << 16 {
            return;
        }
        let params: Vec<_> =
            model.params().iter().map(|(name, shape)| (name.clone(), vec![0.5; shape.len()])).collect();
        let again = dir.join("saved");
        if model::save(&again, model.config(), &params).is_ok() {
            let saved = Model::open(&again).expect("what was saved opens");
            assert_eq!(saved.config(), model.config());
        }
    });
}

/// The files of a tokenizer, and a text.
pub fn tokenizer_folder(file: &[u8]) {
    let files = sections(file);
    let known = files.iter().copied().filter(|(name, _)| TOKENIZER_FILES.contains(name));
    let Ok(tokenizer) = ModelTokenizer::from_files("fuzz", known) else { return };
    let text = files.iter().find(|(name, _)| *name == "text").map_or(&b""[..], |(_, text)| text);
    // Steps of a decoder that make no sense have no text that a stream could begin with.
    let _ = round_trip(&tokenizer, &String::from_utf8_lossy(text));
}

const TOKENIZER_FILES: [&str; 10] = [
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The metadata of a GGUF file as a tokenizer.
pub fn gguf_tokenizer(file: &[u8]) {
    let Ok(weights) = Weights::from_bytes("fuzz", file.to_vec()) else { return };
    let Ok(tokenizer) = ModelTokenizer::of(&weights) else { return };
    for (streamed, whole) in round_trip(&tokenizer, "the tide, a caf\u{e9} and 12 boats\n<s>") {
        assert_eq!(streamed, whole);
    }
}

/// The ids of a text, and a few ids that may be no tokens, as they stream and as they decode at once.
fn round_trip(tokenizer: &ModelTokenizer, text: &str) -> Vec<(String, String)> {
    let ids = tokenizer.encode(text, true).unwrap_or_default();
    let others = [&ids[..ids.len().min(3)], &[0, 3, 1, u32::MAX, 2]].concat();
    let both = |ids: Vec<u32>| {
        let mut stream = tokenizer.stream(false);
        let streamed: Result<String> = ids.iter().map(|&id| stream.push(id)).collect();
        Some((streamed.ok()? + &stream.finish().ok()?, tokenizer.decode(&ids, false).ok()?))
    };
    let texts = [ids, others].into_iter().filter_map(both).collect();
    let _ = tokenizer.chat_ids(&[Message::new("user", text)], true);
    texts
}

/// A chat template, and a chat.
pub fn chat_template(file: &[u8]) {
    let tokenizer = br#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<s>": 0}, "unk_token": "<s>"}}"#;
    let files = sections(file);
    let template = files.iter().find(|(name, _)| *name == "chat_template.jinja").map_or(file, |(_, text)| text);
    let messages: Vec<Message> = (files.iter())
        .filter(|(name, _)| ["system", "user", "assistant", "tool"].contains(name))
        .map(|(role, text)| Message::new(*role, String::from_utf8_lossy(text)))
        .collect();
    let files = [("tokenizer.json", tokenizer.as_slice()), ("chat_template.jinja", template)];
    let Ok(tokenizer) = ModelTokenizer::from_files("fuzz", files) else { return }; // as if it is not UTF-8
    if let Ok(text) = tokenizer.chat(&messages, true) {
        assert!(text.len() < 1 << 28);
    }
}

/// A checkpoint of either kind: an `Err`, or settings that can be. That of a language model is read back with the same
/// bits.
pub fn checkpoint(file: &[u8]) {
    if let Ok(of_graph) = GraphCheckpoint::from_bytes("fuzz", file.to_vec()) {
        of_graph.config.validate().expect("settings are checked");
    }
    let Ok(first) = Checkpoint::from_bytes("fuzz", file.to_vec()) else { return };
    for (name, shape) in first.weights() {
        assert_eq!(first.values(name).expect("its place was checked").len(), shape.len());
    }
    in_folder([], |dir| {
        let path = dir.join("again.safetensors");
        first.save(&path).expect("what was read can be saved");
        assert!(Checkpoint::load(&path).expect("what was saved is read").same_bits(&first));
    });
}

/// Lines of chats, completions and texts: an `Err`, or examples whose targets are all in the batches of an epoch.
pub fn jsonl(file: &[u8]) {
    static TOKENIZER: OnceLock<ModelTokenizer> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| {
        let files: [(&str, &[u8]); 2] = [
            ("tokenizer.json", include_bytes!("../../tests/data/tiny_chat/tokenizer.json")),
            ("tokenizer_config.json", include_bytes!("../../tests/data/tiny_chat/tokenizer_config.json")),
        ];
        ModelTokenizer::from_files("tiny", files).expect("the tests read it")
    });
    let Ok(examples) = Examples::read_jsonl("fuzz".as_ref(), file, tokenizer) else { return };
    for packing in [false, true] {
        let model = TransformerConfig::llama(tokenizer.vocab_len(), 16, 1, 8, 1);
        let config = TrainConfig { packing, ..TrainConfig::new(model, 2) };
        let Ok(mut batches) = Batches::new(examples.clone(), &config) else { return };
        let counted: usize = batches.evaluation(usize::MAX).expect("not none").iter().map(Batch::counted).sum();
        assert_eq!(counted, batches.stats().counted);
        assert!(batches.step(0).expect("a small step")[0].counted() > 0);
    }
}

/// The file of a tuner.
pub fn tuner(file: &[u8]) {
    if let Ok(tuner) = Tuner::from_bytes(file) {
        assert_eq!(tuner.measured(), 0);
    }
}

/// The weights of GPT-2, of the Llamas and of BERT in one file, each with one block: `d_model` 4, 2 heads with one key
/// and value, 8 hidden units, 8 tokens and positions.
fn one_layer() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let tensors: Vec<(String, Vec<usize>)> = (ONE_LAYER.iter())
            .flat_map(|(prefix, names)| {
                names.iter().map(move |(name, dims)| (format!("{prefix}{name}"), dims.to_vec()))
            })
            .collect();
        let views = tensors.iter().map(|(name, dims)| {
            let bytes = &[0u8; 4 * 4 * 16][..4 * dims.iter().product::<usize>()];
            (name, TensorView::new(Dtype::F32, dims.clone(), bytes).expect("its length is right"))
        });
        safetensors::serialize(views, None).expect("the names differ")
    })
}

/// Names and dimensions of tensors.
type Tensors = &'static [(&'static str, &'static [usize])];

#[rustfmt::skip]
const ONE_LAYER: [(&str, Tensors); 6] = [
    ("transformer.", &[
        ("wte.weight", &[8, 4]), ("wpe.weight", &[8, 4]), ("ln_f.weight", &[4]), ("ln_f.bias", &[4]),
    ]),
    ("transformer.h.0.", &[
        ("ln_1.weight", &[4]), ("ln_1.bias", &[4]), ("ln_2.weight", &[4]), ("ln_2.bias", &[4]),
        ("attn.c_attn.weight", &[4, 12]), ("attn.c_attn.bias", &[12]),
        ("attn.c_proj.weight", &[4, 4]), ("attn.c_proj.bias", &[4]),
        ("mlp.c_fc.weight", &[4, 8]), ("mlp.c_fc.bias", &[8]), ("mlp.c_proj.weight", &[8, 4]), ("mlp.c_proj.bias", &[4]),
    ]),
    ("", &[
        ("model.embed_tokens.weight", &[8, 4]), ("model.norm.weight", &[4]), ("lm_head.weight", &[8, 4]),
        ("embeddings.word_embeddings.weight", &[8, 4]), ("embeddings.position_embeddings.weight", &[8, 4]),
        ("embeddings.token_type_embeddings.weight", &[2, 4]),
        ("embeddings.LayerNorm.weight", &[4]), ("embeddings.LayerNorm.bias", &[4]),
    ]),
    ("model.layers.0.", &[
        ("input_layernorm.weight", &[4]), ("post_attention_layernorm.weight", &[4]),
        ("mlp.gate_proj.weight", &[8, 4]), ("mlp.up_proj.weight", &[8, 4]), ("mlp.down_proj.weight", &[4, 8]),
        ("mlp.gate_proj.bias", &[8]), ("mlp.up_proj.bias", &[8]), ("mlp.down_proj.bias", &[4]),
    ]),
    ("model.layers.0.self_attn.", &[
        ("q_proj.weight", &[4, 4]), ("k_proj.weight", &[2, 4]), ("v_proj.weight", &[2, 4]), ("o_proj.weight", &[4, 4]),
        ("q_proj.bias", &[4]), ("k_proj.bias", &[2]), ("v_proj.bias", &[2]), ("o_proj.bias", &[4]),
        ("q_norm.weight", &[2]), ("k_norm.weight", &[2]),
    ]),
    ("encoder.layer.0.", &[
        ("attention.self.query.weight", &[4, 4]), ("attention.self.query.bias", &[4]),
        ("attention.self.key.weight", &[4, 4]), ("attention.self.key.bias", &[4]),
        ("attention.self.value.weight", &[4, 4]), ("attention.self.value.bias", &[4]),
        ("attention.output.dense.weight", &[4, 4]), ("attention.output.dense.bias", &[4]),
        ("attention.output.LayerNorm.weight", &[4]), ("attention.output.LayerNorm.bias", &[4]),
        ("intermediate.dense.weight", &[8, 4]), ("intermediate.dense.bias", &[8]),
        ("output.dense.weight", &[4, 8]), ("output.dense.bias", &[4]),
        ("output.LayerNorm.weight", &[4]), ("output.LayerNorm.bias", &[4]),
    ]),
];

/// The parts of a file, each under the name in the line `=== NAME` before it. What comes before the first is left out.
fn sections(file: &[u8]) -> Vec<(&str, &[u8])> {
    let marks: Vec<usize> =
        (0..file.len()).filter(|&i| file[i..].starts_with(b"=== ") && (i == 0 || file[i - 1] == b'\n')).collect();
    let ends = marks.iter().skip(1).copied().chain([file.len()]);
    let section = |(start, end): (&usize, usize)| {
        let (name, text) = file[start + 4..end].split_at(file[start + 4..end].iter().position(|&b| b == b'\n')?);
        // The line break before the next mark belongs to the mark.
        let text = &text[1..];
        Some((std::str::from_utf8(name).ok()?, text.strip_suffix(b"\n").unwrap_or(text)))
    };
    marks.iter().zip(ends).filter_map(section).collect()
}

/// Calls `f` with a folder that holds just these files.
fn in_folder<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>, f: impl FnOnce(&Path)) {
    thread_local! {
        static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
    }
    DIR.with_borrow_mut(|dir| {
        let dir = dir.get_or_insert_with(|| TempDir::new().expect("a temporary folder")).path();
        let mut written = BTreeSet::new();
        for (name, bytes) in files {
            fs::write(dir.join(name), bytes).expect("a temporary file");
            written.insert(name);
        }
        for entry in fs::read_dir(dir).expect("the temporary folder").flatten() {
            if entry.file_name().to_str().is_none_or(|name| !written.contains(name)) {
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
                removed.expect("a file of ours");
            }
        }
        f(dir);
    });
}
