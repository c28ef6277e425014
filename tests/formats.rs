//! Model files: what is written is read back, every quantised type decodes as in ggml, and broken or hostile files are
//! errors that say where, at a bounded cost.

#[path = "common/gguf.rs"]
mod gguf;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gguf::{GgufTensor, Raw, gguf_file};
use proptest::prelude::*;
use throughline::format::{
    GgufTensor as Described, GgufWriter, Header, MetaArray, MetaValue, Metadata, SaveTensor, Stored, Weights,
    gguf_header, quant, safetensors_header, safetensors_index, save_gguf, save_safetensors,
};
use throughline::model::config_from_json;
use throughline::rng::Rng;
use throughline::{Error, Result};

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands everything on to `System`. The counter is a plain `Cell` without a destructor, which
// allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|n| n.set(n.get().saturating_add(layout.size())));
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads a header; fails if that took memory out of proportion to the file.
fn parse(read: fn(&str, &[u8]) -> Result<Header>, file: &[u8]) -> Result<Header> {
    let before = ALLOCATED.get();
    let header = read("model.file", file);
    let allocated = ALLOCATED.get() - before;
    assert!(allocated <= (64 << 10) + 100 * file.len(), "{allocated} bytes allocated for {} of file", file.len());
    header
}

/// Whatever the bytes: an error that names the file, or tensors that lie in it and decode.
fn exercise(read: fn(&str, &[u8]) -> Result<Header>, file: &[u8]) {
    match parse(read, file) {
        Err(e) => assert!(e.to_string().starts_with("model.file: ") && e.to_string().len() < 2000, "{e}"),
        Ok(header) => {
            for t in &header.tensors {
                let values = quant::dequantize(t.stored, &file[t.range.clone()]).unwrap();
                assert_eq!(values.len(), t.shape.len(), "{t:?}");
            }
            if let Ok(weights) = Weights::from_bytes("model.file", file.to_vec()) {
                assert_eq!(weights.len(), header.tensors.len());
                weights.iter().for_each(|t| drop(t.check_finite()));
            }
        }
    }
}

/// The message of an error has all these words in it.
fn expect<T>(case: &str, result: Result<T>, words: &[&str]) {
    match result {
        Ok(_) => panic!("{case}: accepted; expected an error with {words:?}"),
        Err(e) => words.iter().for_each(|w| assert!(e.to_string().contains(w), "{case}: no {w:?} in: {e}")),
    }
}

fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(&[seed]);
    (0..len).map(|_| rng.below(256) as u8).collect()
}

/// A small valid file with every type of tensor and of metadata.
fn sample_gguf() -> Vec<u8> {
    let array = MetaArray::Array(vec![MetaArray::U16(vec![1, 2]), MetaArray::Array(vec![])]);
    let entries = [
        ("general.architecture", MetaValue::String("llama".into())),
        ("llama.block_count", MetaValue::U32(2)),
        ("rope.freq_base", MetaValue::F32(1e4)),
        ("add_bos", MetaValue::Bool(true)),
        ("tokens", MetaValue::Array(MetaArray::String(vec!["a".into(), "".into(), "é".into()]))),
        ("token_type", MetaValue::Array(MetaArray::I32(vec![1, -1]))),
        ("nested", MetaValue::Array(array)),
        ("general.alignment", MetaValue::U32(8)),
    ];
    let tensor = |stored: Stored| {
        let dims = vec![2, stored.block_len()];
        let bytes = random_bytes(2 * stored.block_bytes(), u64::from(stored.ggml_id()));
        GgufTensor { name: format!("tensor.{stored}"), stored, dims, bytes }
    };
    gguf_file(&entries.map(|(k, v)| (k.to_string(), v)), &Stored::ALL.map(tensor))
}

/// A safetensors file of this header.
fn safetensors_file(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes()[..], header, &vec![0; data]].concat()
}

fn sample_safetensors() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"ids":{"dtype":"I64","shape":[1,2],"data_offsets":[20,36]},"#,
        r#""scalar":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"#,
        r#""none":{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]},"#,
        r#""h.0.w":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"#,
        r#""h.0.b":{"dtype":"F16","shape":[2],"data_offsets":[16,20]}}  "#,
    );
    safetensors_file(header, 36)
}

type Case = (&'static str, Vec<u8>, &'static [&'static str]);

/// A file of one tensor with its bytes, which may be fewer than it needs.
fn one_tensor(dims: &[u64], ty: u32, offset: u64, data: usize) -> Vec<u8> {
    Raw::header(3, 1, 0).tensor("w", dims, ty, offset).pad(32).bytes(&vec![0; data]).0
}

/// A file of one metadata entry: what follows the key.
fn one_entry(value: Raw) -> Vec<u8> {
    Raw::header(3, 0, 1).text("some.key").bytes(&value.0).0
}

fn alignment(value: Raw) -> Vec<u8> {
    Raw::header(3, 0, 1).text("general.alignment").bytes(&value.0).0
}

fn hostile_gguf_headers() -> Vec<Case> {
    let raw = Raw::default;
    let deep = (0..9).fold(raw().u32(9), |r, _| r.u32(9).u64(1)).u32(0).u64(0);
    let pair = |a: (&str, u64), b: (&str, u64)| {
        let entries = Raw::header(3, 2, 0).tensor(a.0, &[8], 0, a.1).tensor(b.0, &[8], 0, b.1);
        entries.pad(32).bytes(&[0; 96]).0
    };
    let flag = |n: u8| raw().u32(7).bytes(&[n]);
    vec![
        ("empty", vec![], &["magic", "4 bytes"]),
        ("wrong_magic", b"GGML\x03\0\0\0".to_vec(), &["magic", "`GGUF`"]),
        ("version_1", Raw::header(1, 0, 0).0, &["version", "1"]),
        ("version_4", Raw::header(4, 0, 0).0, &["version", "4"]),
        ("big_endian", Raw::header(3 << 24, 0, 0).0, &["version", "big-endian"]),
        ("cut_counts", Raw::header(3, 0, 0).0[..12].to_vec(), &["tensor count"]),
        ("many_tensors", Raw::header(3, 1 << 60, 0).0, &["tensor count", "1152921504606846976"]),
        ("many_entries", Raw::header(3, 0, u64::MAX).0, &["metadata count", "18446744073709551615"]),
        ("more_tensors", Raw::header(3, 9, 0).pad(400).0, &["tensor 0", "0 bytes"]),
        ("empty_key", Raw::header(3, 0, 1).text("").pad(64).0, &["metadata entry 0", "0 bytes"]),
        ("long_key", Raw::header(3, 0, 1).u64(1 << 40).pad(64).0, &["metadata entry 0", "65535"]),
        ("key_not_utf8", Raw::header(3, 0, 1).text(b"\xff\xfe").pad(64).0, &["metadata entry 0", "UTF-8"]),
        ("value_type", one_entry(raw().u32(13).u64(0)), &["`some.key`", "type 13"]),
        ("bool_2", one_entry(flag(2)), &["`some.key`", "bool", "2"]),
        ("cut_value", one_entry(raw().u32(10).u32(0)), &["`some.key`", "8 bytes"]),
        ("long_string", one_entry(raw().u32(8).u64(1 << 50)), &["`some.key`", "1125899906842624"]),
        ("string_not_utf8", one_entry(raw().u32(8).text(b"\xc3\x28")), &["`some.key`", "UTF-8"]),
        ("array_type", one_entry(raw().u32(9).u32(77).u64(0)), &["`some.key`", "type 77"]),
        ("long_array", one_entry(raw().u32(9).u32(12).u64(1 << 61)), &["`some.key`", "2305843009213693952"]),
        ("long_strings", one_entry(raw().u32(9).u32(8).u64(3).u64(0)), &["`some.key`", "3 do not fit"]),
        ("long_arrays", one_entry(raw().u32(9).u32(9).u64(u64::MAX)), &["`some.key`", "18446744073709551615"]),
        ("deep_arrays", one_entry(deep), &["`some.key`", "nested"]),
        (
            "key_twice",
            {
                let bytes = Raw::header(3, 0, 2).text("a.b").bytes(&flag(0).0);
                bytes.text("a.b").bytes(&flag(1).0).0
            },
            &["`a.b`", "twice"],
        ),
        ("alignment_0", alignment(raw().u32(4).u32(0)), &["`general.alignment`", "power of two", "0"]),
        ("alignment_24", alignment(raw().u32(4).u32(24)), &["`general.alignment`", "power of two", "24"]),
        ("alignment_type", alignment(raw().u32(8).text("32")), &["`general.alignment`", "string `32`"]),
        ("names_twice", pair(("w", 0), ("w", 32)), &["tensor `w`", "twice"]),
        ("overlap", pair(("v", 32), ("w", 32)), &["`v`", "`w`", "overlap"]),
    ]
}

fn hostile_gguf_tensors() -> Vec<Case> {
    vec![
        ("name_not_utf8", Raw::header(3, 1, 0).text(b"\x80").pad(128).0, &["name of tensor 0", "UTF-8"]),
        ("rank_5", one_tensor(&[1; 5], 0, 0, 64), &["tensor `w`", "5 dimensions"]),
        ("huge_dim", one_tensor(&[u64::MAX], 0, 0, 64), &["tensor `w`", "18446744073709551615"]),
        ("product_overflow", one_tensor(&[1 << 32, 1 << 32, 4], 0, 0, 64), &["tensor `w`", "4294967296"]),
        ("bytes_overflow", one_tensor(&[1 << 62], 0, 0, 64), &["tensor `w`", "bytes"]),
        ("half_block", one_tensor(&[48, 2], 3, 0, 64), &["tensor `w`", "48", "32", "Q4_1"]),
        ("half_k_block", one_tensor(&[128], 14, 0, 256), &["tensor `w`", "128", "256", "Q6_K"]),
        ("unaligned", one_tensor(&[8], 0, 16, 64), &["tensor `w`", "offset 16", "32"]),
        ("beyond", one_tensor(&[8], 0, 64, 64), &["tensor `w`", "32 bytes", "64", "F32[8]"]),
        ("far_beyond", one_tensor(&[8], 0, u64::MAX - 31, 64), &["tensor `w`", "18446744073709551584"]),
        ("cut_data", one_tensor(&[8], 0, 0, 31), &["tensor `w`", "32 bytes"]),
    ]
}

fn hostile_gguf() -> Vec<Case> {
    [hostile_gguf_headers(), hostile_gguf_tensors()].concat()
}

fn hostile_safetensors() -> Vec<Case> {
    let header = |json: &str| safetensors_file(json, 16);
    let w = |fields: &str| safetensors_file(format!(r#"{{"w":{{{fields}}}}}"#), 16);
    let two = |a: &str, b: &str| {
        let entry = |name| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets""#);
        header(&format!("{{{}:{a}}},{}:{b}}}}}", entry("v"), entry("w")))
    };
    let twice = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#;
    vec![
        ("empty", vec![], &["header length"]),
        ("cut_length", vec![1; 7], &["header length", "7"]),
        ("long_header", [&[0xff; 8][..], b"{}"].concat(), &["header length", "18446744073709551615", "2"]),
        ("cut_header", safetensors_file("{}", 0)[..9].to_vec(), &["header length", "2", "1"]),
        ("not_json", header("{]"), &["header", "column 2"]),
        ("not_utf8", safetensors_file(b"{\"\xff\":0}", 0), &["header", "unicode"]),
        ("not_object", header("[]"), &["header", "object of tensors"]),
        ("deep", header(&"[".repeat(100_000)), &["header"]),
        ("deep_in_tensor", header(&format!(r#"{{"w":{{"x":{}"#, "[".repeat(100_000))), &["`w`", "EOF"]),
        ("no_shape", w(r#""dtype":"F32","data_offsets":[0,16]"#), &["`w`", "shape"]),
        ("negative_dim", w(r#""dtype":"F32","shape":[-4],"data_offsets":[0,16]"#), &["`w`", "-4"]),
        ("rank_9", w(r#""dtype":"F32","shape":[1,1,1,1,1,1,1,1,4],"data_offsets":[0,16]"#), &["`w`", "9 dim"]),
        ("overflow", w(r#""dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,16]"#), &["`w`", "size"]),
        ("half_byte", w(r#""dtype":"F4","shape":[3],"data_offsets":[0,16]"#), &["`w`", "size"]),
        ("wrong_size", w(r#""dtype":"F16","shape":[4],"data_offsets":[0,16]"#), &["`w`", "8 bytes", "[0, 16]"]),
        ("reversed", w(r#""dtype":"F32","shape":[4],"data_offsets":[16,0]"#), &["`w`", "[16, 0]"]),
        ("beyond", w(r#""dtype":"F32","shape":[8],"data_offsets":[0,32]"#), &["`w`", "[0, 32]", "16"]),
        ("offset_type", w(r#""dtype":"F32","shape":[4],"data_offsets":[0,1e99]"#), &["`w`", "float"]),
        ("gap", two("[0,8]", "[12,16]"), &["`w`", "[12, 16]", "8"]),
        ("overlap", two("[0,8]", "[4,12]"), &["`w`", "[4, 12]", "8"]),
        ("trailing", two("[0,4]", "[4,8]"), &["`v`"]),
        ("unused", w(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), &["data_offsets", "8", "16"]),
        ("names_twice", header(twice), &["`w`", "twice"]),
        ("key_twice", header(r#"{"__metadata__":{"a":"1","a":"2"}}"#), &["`__metadata__`", "`a`", "twice"]),
        ("metadata_twice", header(r#"{"__metadata__":{},"__metadata__":{}}"#), &["`__metadata__`", "twice"]),
        ("metadata_type", header(r#"{"__metadata__":{"a":1}}"#), &["`__metadata__`", "`a`", "string"]),
    ]
}

#[test]
fn hostile_files_are_errors_that_say_where() {
    for (case, file, words) in hostile_gguf() {
        expect(case, parse(gguf_header, &file), &[words, &["model.file: "]].concat());
        exercise(gguf_header, &file);
    }
    for (case, file, words) in hostile_safetensors() {
        expect(case, parse(safetensors_header, &file), &[words, &["model.file: "]].concat());
        exercise(safetensors_header, &file);
    }
    let pickle = b"PK\x03\x04\0\0\0\0\0\0archive/data.pkl".to_vec();
    expect("pickle", Weights::from_bytes("model.bin", pickle), &["model.bin", "neither a GGUF", "safetensors"]);
    // A name of any length and content is shown in short, on one line.
    let name = "x\n".repeat(30_000);
    let long = Raw::header(3, 1, 0).tensor(&name, &[1; 5], 0, 0).pad(64).0;
    let message = parse(gguf_header, &long).unwrap_err().to_string();
    assert!(message.len() < 500 && !message.contains('\n'), "{message}");
}

/// Every cut of a valid file is an error.
#[test]
fn cut_files_are_errors() {
    let gguf = sample_gguf();
    (0..gguf.len()).for_each(|n| expect(&format!("{n} bytes"), parse(gguf_header, &gguf[..n]), &["model.file"]));
    let file = sample_safetensors();
    (0..file.len()).for_each(|n| expect(&format!("{n} bytes"), parse(safetensors_header, &file[..n]), &["model.file"]));
}

/// JSON beside the weights that is made to take much more than it has.
#[test]
fn json_takes_memory_in_proportion() {
    let leaves = |n: usize| (0..n).map(|i| format!(r#""{i}":NaN"#)).collect::<Vec<_>>().join(",");
    let long = "k".repeat(32_000);
    for json in [
        format!(r#"{{"{long}":{{"{long}":{{{}}}}}}}"#, leaves(4000)),
        format!("[{}]", vec!["NaN"; 50_000].join(",")),
        "[".repeat(100_000),
        format!(r#"{{"model_type":"{long}","rope_scaling":[{}]}}"#, vec!["{}"; 20_000].join(",")),
        format!(r#"{{"weight_map":{{{}}}}}"#, leaves(4000)),
    ] {
        for read in [
            |json: &[u8]| config_from_json("x.json", json).map(drop).unwrap_err(),
            |json: &[u8]| safetensors_index("x.json", json).map(drop).unwrap_err(),
        ] {
            let before = ALLOCATED.get();
            let error = read(json.as_bytes()).to_string();
            let allocated = ALLOCATED.get() - before;
            assert!(error.starts_with("x.json: ") && error.len() < 1000, "{error}");
            assert!(allocated <= (64 << 10) + 200 * json.len(), "{allocated} bytes for {} of JSON", json.len());
        }
    }
}

/// A tensor that is not read hides nothing of the rest of its file.
#[test]
fn tensors_of_other_types_are_listed_and_named_when_they_are_asked_for() {
    let types = [(10, "Q2_K"), (20, "IQ4_NL"), (26, "I32"), (28, "F64"), (39, "MXFP4"), (99, "unknown type 99")];
    for (id, name) in types {
        let entries = Raw::header(3, 3, 1).text("some.key").value(&MetaValue::Bool(true));
        let tensors = entries.tensor("odd", &[256, 2], id, 0).tensor("none", &[8, 0], 0, 0).tensor("w", &[8], 0, 512);
        let weights = Weights::from_bytes("model.gguf", tensors.pad(32).bytes(&[0; 544]).0).unwrap();
        assert!(weights.metadata().bool("some.key").unwrap());
        assert_eq!(weights.get("w").unwrap().values().unwrap(), [0.0; 8]);
        let [(odd, ty), (none, empty)] = weights.unread() else { panic!("{:?}", weights.unread()) };
        assert_eq!((odd.as_str(), none.as_str(), empty.as_str()), ("odd", "none", "F32 [0, 8]"));
        assert!(ty.contains(name) && ty.contains("[2, 256]"), "{ty}");
        expect(name, weights.get("odd"), &["model.gguf", "`odd`", name, "does not read"]);
    }
    for dtype in ["I64", "BOOL", "U8", "F8_E4M3", "Q9"] {
        let header = format!(
            r#"{{"odd":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{}]}},
            "w":{{"dtype":"F32","shape":[1],"data_offsets":[{0},{}]}}}}"#,
            if dtype == "I64" { 8 } else { 1 },
            if dtype == "I64" { 12 } else { 5 },
        );
        let weights =
            Weights::from_bytes("x.safetensors", safetensors_file(&header, if dtype == "I64" { 12 } else { 5 }));
        let weights = weights.unwrap();
        assert_eq!(weights.get("w").unwrap().values().unwrap(), [0.0]);
        expect(dtype, weights.get("odd"), &["x.safetensors", "`odd`", dtype, "does not read"]);
    }
}

#[test]
fn gguf_scalars_and_alignments_of_any_integer_are_read() {
    let scalar = one_tensor(&[], 0, 0, 32);
    assert_eq!(gguf_header("x.gguf", &scalar).unwrap().tensors[0].shape.dims(), [1]);
    let header = alignment(Raw::default().u32(10).u64(64));
    assert_eq!(gguf_header("x.gguf", &header).unwrap().metadata.usize("general.alignment").unwrap(), 64);
    // The first part of a model in several files has its tokenizer.
    let part = Raw::header(3, 0, 1).text("split.count").u32(2).bytes(&[4, 0]).0;
    assert_eq!(gguf_header("x.gguf", &part).unwrap().metadata.usize("split.count").unwrap(), 4);
}

/// Large counts that the file does hold: time and memory stay in proportion.
#[test]
fn large_headers_are_read() {
    let entries = Raw::header(3, 0, 1).text("tokens").u32(9).u32(8).u64(200_000).bytes(&vec![0; 1_600_000]).0;
    assert_eq!(parse(gguf_header, &entries).unwrap().metadata.strs("tokens").unwrap().len(), 200_000);
    let empty = (0..100_000).fold(Raw::header(3, 0, 1).text("a").u32(9).u32(9).u64(100_000), |r, _| r.u32(0).u64(0));
    assert_eq!(parse(gguf_header, &empty.0).unwrap().metadata.len(), 1);
    let tensors = (0..20_000).fold(Raw::header(2, 20_000, 0), |r, i| r.tensor(&i.to_string(), &[1], 0, 32 * i));
    assert_eq!(parse(gguf_header, &tensors.pad(32).bytes(&vec![0; 32 * 20_000]).0).unwrap().tensors.len(), 20_000);
    let json: Vec<_> = (0..20_000)
        .map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4))
        .collect();
    let file = safetensors_file(format!("{{{}}}", json.join(",")), 4 * 20_000);
    assert_eq!(parse(safetensors_header, &file).unwrap().tensors.len(), 20_000);
}

/// The seeds of the fuzz targets are the cases above and two valid files; `WRITE_CORPUS=1` writes
/// them. Whatever else lies there, as what fuzzing has found, runs too.
#[test]
fn the_fuzz_corpus_is_read() {
    let valid: [Case; 2] = [("valid", sample_gguf(), &[]), ("valid", sample_safetensors(), &[])];
    let [gguf, safetensors] = valid;
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let run = |target: &str, read: fn(&str, &[u8]) -> Result<Header>, cases: Vec<Case>| {
        let dir = corpus.join(target);
        for (name, file, _) in cases.iter().filter(|(_, file, _)| file.len() < 10_000) {
            if std::env::var_os("WRITE_CORPUS").is_some() {
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join(name), file).unwrap();
            }
            let same = fs::read(dir.join(name)).is_ok_and(|bytes| bytes == *file);
            assert!(same, "{target}/{name} is not what this test makes: run it with WRITE_CORPUS=1");
        }
        for entry in fs::read_dir(&dir).unwrap() {
            exercise(read, &fs::read(entry.unwrap().path()).unwrap());
        }
    };
    run("gguf_header", gguf_header, [hostile_gguf(), vec![gguf]].concat());
    run("safetensors_header", safetensors_header, [hostile_safetensors(), vec![safetensors]].concat());
}

#[test]
fn a_gguf_file_is_read() {
    let file = sample_gguf();
    let weights = Weights::from_bytes("tiny.gguf", file.clone()).unwrap();
    let m = weights.metadata();
    assert_eq!(m.iter().map(|(key, _)| key).nth(1), Some("llama.block_count"));
    assert_eq!(m.str("general.architecture").unwrap(), "llama");
    assert_eq!(m.usize("llama.block_count").unwrap(), 2);
    assert_eq!(m.f32("rope.freq_base").unwrap(), 1e4);
    assert!(m.bool("add_bos").unwrap());
    assert_eq!(m.strs("tokens").unwrap(), ["a", "", "é"]);
    assert_eq!(m.ints("token_type").unwrap(), [1, -1]);
    assert_eq!(m.get("nested").unwrap().summary(), "array of 2 array");
    expect("missing", m.usize("llama.nothing"), &["tiny.gguf", "`llama.nothing`", "missing"]);
    expect("type", m.usize("general.architecture"), &["`general.architecture`", "integer", "string `llama`"]);
    expect("type", m.strs("token_type"), &["`token_type`", "strings", "array of 2 i32"]);
    expect("type", m.f32s("tokens"), &["`tokens`", "f32", "3 string"]);

    let names: Vec<_> = weights.iter().map(|t| t.name().to_string()).collect();
    assert_eq!(names, Stored::ALL.map(|s| format!("tensor.{s}")));
    let q4_k = weights.get("tensor.Q4_K").unwrap().stored_as(&[Stored::Q4_K]).unwrap().of_shape([2, 256]).unwrap();
    assert_eq!(q4_k.bytes().unwrap(), random_bytes(2 * 144, 12));
    let mut row = [0.0; 256];
    q4_k.read_row(1, &mut row).unwrap();
    assert_eq!(
        row.map(f32::to_bits)[..],
        bits(&quant::dequantize(Stored::Q4_K, &q4_k.bytes().unwrap()[144..]).unwrap())
    );
    expect("row", q4_k.read_row(2, &mut row), &["`tensor.Q4_K`", "row 2"]);
    expect("row", q4_k.read_row(1, &mut row[1..]), &["`tensor.Q4_K`", "255"]);
    expect("shape", q4_k.of_shape([256, 2]), &["tiny.gguf", "`tensor.Q4_K`", "[256, 2]", "[2, 256]"]);
    expect("type", q4_k.stored_as(&[Stored::F32, Stored::F16]), &["`tensor.Q4_K`", "F32 or F16", "Q4_K"]);
    expect("missing", weights.get("tensor.Q3_K"), &["tiny.gguf", "`tensor.Q3_K`", "missing"]);
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A file takes no memory of its size, only what is read of it while it is read; and what somebody does to it meanwhile
/// is an error at worst.
#[test]
fn only_what_is_asked_for_is_read() {
    const ROWS: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.gguf");
    fs::write(&path, Raw::header(3, 1, 0).tensor("w", &[32, ROWS as u64], 8, 0).pad(32).0).unwrap();
    let file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let header = file.metadata().unwrap().len();
    file.set_len(header + 34 * ROWS as u64).unwrap();
    drop(file);
    let before = ALLOCATED.get();
    let weights = Weights::open(&path).unwrap();
    let w = weights.get("w").unwrap();
    assert_eq!(w.byte_len(), 34 * ROWS);
    let mut row = [1.0; 32];
    w.read_row(ROWS - 1, &mut row).unwrap();
    assert_eq!(row, [0.0; 32]);
    let allocated = ALLOCATED.get() - before;
    assert!(allocated < 300 << 10, "{allocated} bytes");
    assert_eq!(w.bytes().unwrap().len(), 34 * ROWS);
    w.check_finite().unwrap();
    let allocated = ALLOCATED.get() - before - 2 * 34 * ROWS;
    assert!(allocated < 300 << 10, "{allocated} bytes beside those of the tensor");

    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(header + 34).unwrap();
    w.read_row(0, &mut row).unwrap();
    expect("cut short", w.read_row(1, &mut row), &["large.gguf"]);
    expect("cut short", w.bytes(), &["large.gguf"]);
}

#[test]
fn a_safetensors_file_is_read() {
    let weights = Weights::from_bytes("tiny", sample_safetensors()).unwrap();
    let names: Vec<_> = weights.iter().map(|t| format!("{t:?}")).collect();
    assert_eq!(names, ["scalar: F32[1]", "h.0.w: BF16[2, 3]", "h.0.b: F16[2]"]);
    assert_eq!(weights.metadata().str("format").unwrap(), "pt");
    expect("integers", weights.get("ids"), &["tiny", "`ids`", "I64 [1, 2]"]);
    expect("empty", weights.get("none"), &["tiny", "`none`", "F32 [0, 3]"]);
}

#[test]
fn weights_that_are_not_finite_are_found() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        for stored in [Stored::F32, Stored::F16, Stored::BF16] {
            let mut values = vec![1.0; 700];
            values[601] = value;
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("w.safetensors");
            save_safetensors(&path, &[SaveTensor { name: "h.w", shape: &[700], values: &values, stored }], &none())
                .unwrap();
            let weights = Weights::open(&path).unwrap();
            let words = ["w.safetensors", "`h.w`", "element 601", shown];
            expect("finite", weights.get("h.w").unwrap().check_finite(), &words);
        }
    }
    // A block whose scale is NaN, the third one of a row.
    let mut bytes = vec![0; 4 * 18];
    bytes[2 * 18..][..2].copy_from_slice(&0x7e00u16.to_le_bytes());
    let tensor = GgufTensor { name: "q".into(), stored: Stored::Q4_0, dims: vec![1, 128], bytes };
    let weights = Weights::from_bytes("nan.gguf", gguf_file(&[], &[tensor])).unwrap();
    expect("finite", weights.get("q").unwrap().check_finite(), &["nan.gguf", "`q`", "element 64", "NaN"]);
}

fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

/// Random blocks and what the `gguf` package makes of them: see tests/python/make_quant_golden.py.
#[test]
fn every_quantised_type_decodes_as_ggml_has_it() {
    let file = fs::read("tests/data/quant_golden.safetensors").unwrap();
    let golden = safetensors::SafeTensors::deserialize(&file).unwrap();
    let floats = |name: String| -> Vec<f32> { bytemuck::pod_collect_to_vec(golden.tensor(&name).unwrap().data()) };
    for stored in Stored::ALL.into_iter().filter(|s| s.is_quantized()) {
        let blocks = golden.tensor(&format!("{stored}.blocks")).unwrap();
        assert_eq!(blocks.shape()[1], stored.block_bytes(), "{stored}");
        let values = quant::dequantize(stored, blocks.data()).unwrap();
        assert_eq!(bits(&values), bits(&floats(format!("{stored}.values"))), "{stored}");
    }
    for stored in [Stored::Q4_0, Stored::Q4_1, Stored::Q8_0] {
        let quantized = quant::quantize(stored, &floats(format!("{stored}.source"))).unwrap();
        assert_eq!(quantized, golden.tensor(&format!("{stored}.quantized")).unwrap().data(), "{stored}");
    }
}

/// Rows of all kinds and what ggml's own quantisers make of them: see tests/python/make_quantizer_golden.py.
#[test]
fn every_type_is_encoded_as_ggml_encodes_it() {
    let file = fs::read("tests/data/quantizer_golden.safetensors").unwrap();
    let golden = safetensors::SafeTensors::deserialize(&file).unwrap();
    let source: Vec<f32> = bytemuck::pod_collect_to_vec(golden.tensor("source").unwrap().data());
    for stored in Stored::ALL.into_iter().filter(|stored| *stored != Stored::F32) {
        let (expected, blocks) = (golden.tensor(stored.name()).unwrap(), quant::quantize(stored, &source).unwrap());
        let row_bytes = stored.bytes_of(&[256]).unwrap();
        let rows = blocks.chunks(row_bytes).zip(expected.data().chunks(row_bytes));
        for (row, (got, expected)) in rows.enumerate() {
            assert_eq!(got, expected, "{stored}, row {row}");
        }
    }
}

#[test]
fn what_cannot_be_saved_is_an_error_and_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, "old").unwrap();
    let t = SaveTensor { name: "w", shape: &[2, 2], values: &[1.0, 2.0, 3.0, 7e4], stored: Stored::F32 };
    let save = |tensors: &[SaveTensor<'_>]| save_safetensors(&path, tensors, &none());
    expect("shape", save(&[SaveTensor { shape: &[3], ..t }]), &["`w`", "4", "[3]"]);
    expect("overflow", save(&[SaveTensor { shape: &[usize::MAX, 4], ..t }]), &["`w`"]);
    expect("name", save(&[t, t]), &["`w`", "taken"]);
    expect("name", save(&[SaveTensor { name: "__metadata__", ..t }]), &["`__metadata__`", "taken"]);
    expect("type", save(&[SaveTensor { stored: Stored::Q8_0, ..t }]), &["`w`", "Q8_0", "BF16"]);
    expect("range", save(&[SaveTensor { stored: Stored::F16, ..t }]), &["`w`", "F16", "65504", "70000"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    let nowhere = dir.path().join("nowhere/model.safetensors");
    assert!(matches!(save_safetensors(&nowhere, &[t], &none()), Err(Error::Io { .. })));
    save(&[t]).unwrap();
    assert_eq!(Weights::open(&path).unwrap().get("w").unwrap().values().unwrap(), t.values);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
}

/// The tensors of a file as a writer wants them.
fn described(weights: &Weights) -> Vec<Described> {
    let one = |t: throughline::format::StoredTensor<'_>| Described {
        name: t.name().into(),
        shape: t.shape().clone(),
        stored: t.stored(),
    };
    weights.iter().map(one).collect()
}

/// See tests/python/make_gguf_golden.py.
#[test]
fn gguf_files_are_written_as_ggml_writes_them() {
    let golden = "tests/data/golden.gguf";
    let weights = Weights::open(golden.as_ref()).unwrap();
    assert_eq!(weights.metadata().get("a.u64"), Some(&MetaValue::U64(1 << 63)));
    assert_eq!(weights.metadata().strs("b.texts").unwrap(), ["", "a", "⚓"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ours.gguf");
    let mut writer = GgufWriter::create(&path, weights.metadata(), described(&weights)).unwrap();
    for t in weights.iter() {
        assert_eq!(writer.next_tensor().unwrap().name, t.name());
        let bytes = t.bytes().unwrap();
        bytes.chunks(7).for_each(|piece| writer.write(piece).unwrap());
    }
    assert_eq!(writer.next_tensor(), None);
    writer.finish().unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(golden).unwrap());
}

#[test]
fn what_a_gguf_file_cannot_have_is_an_error_and_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, "old").unwrap();
    let t = SaveTensor { name: "w", shape: &[1, 64], values: &[1.5; 64], stored: Stored::Q4_0 };
    let plain = Metadata::default();
    let save = |tensors: &[SaveTensor<'_>]| save_gguf(&path, tensors, &plain);
    expect("shape", save(&[SaveTensor { shape: &[3], ..t }]), &["`w`", "64", "[3]"]);
    expect("overflow", save(&[SaveTensor { shape: &[usize::MAX, 64], ..t }]), &["`w`"]);
    expect("none", save(&[SaveTensor { shape: &[0, 64], values: &[], ..t }]), &["`w`", "[0, 64]"]);
    expect("rank", save(&[SaveTensor { shape: &[1, 1, 1, 1, 64], ..t }]), &["`w`", "4 dimensions"]);
    expect("block", save(&[SaveTensor { shape: &[4, 16], ..t }]), &["`w`", "32", "Q4_0", "[4, 16]"]);
    expect("name", save(&[t, t]), &["`w`", "taken"]);
    expect("name", save(&[SaveTensor { name: "", ..t }]), &["63", "0 bytes"]);
    expect("name", save(&[SaveTensor { name: &"n".repeat(64), ..t }]), &["nnn", "63", "64 bytes"]);
    expect("NaN", save(&[SaveTensor { values: &[f32::NAN; 64], ..t }]), &["`w`", "NaN at element 0"]);
    expect("range", save(&[SaveTensor { values: &[7e4; 64], stored: Stored::F16, ..t }]), &["`w`", "70000"]);
    let with = |key: &str, value: MetaValue| {
        let mut metadata = Metadata::default();
        metadata.set(key, value);
        save_gguf(&path, &[t], &metadata)
    };
    expect("key", with("", true.into()), &["1 to 65535"]);
    expect("key", with(&"k".repeat(65536), true.into()), &["kkk", "65536"]);
    expect("alignment", with("general.alignment", 48.into()), &["general.alignment", "power of two"]);
    expect("alignment", with("general.alignment", (1 << 20).into()), &["general.alignment", "1048576"]);
    let nested = (0..8).fold(MetaArray::U8(vec![]), |inner, _| MetaArray::Array(vec![inner]));
    expect("depth", with("deep", nested.into()), &["`deep`", "8 deep"]);
    assert!(matches!(save_gguf(&dir.path().join("nowhere/w"), &[t], &plain), Err(Error::Io { .. })));

    let start = || {
        let shape = t.shape.into();
        GgufWriter::create(&path, &plain, vec![Described { name: "w".into(), shape, stored: t.stored }]).unwrap()
    };
    let mut writer = start();
    writer.write(&[0; 30]).unwrap();
    expect("too many bytes", writer.write(&[0; 7]), &["`w`", "6 bytes", "got 7"]);
    expect("too many values", writer.write_values(&[0.0; 64]), &["`w`", "6 bytes"]);
    expect("too few bytes", writer.finish(), &["`w`", "36 bytes", "got 30"]);
    let mut writer = start();
    writer.write(&[0; 36]).unwrap();
    writer.write(&[]).unwrap();
    expect("no tensor", writer.write(&[0]), &["last tensor"]);
    expect("no tensor", writer.write_values(&[0.0; 32]), &["last tensor"]);
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    save(&[t]).unwrap();
    assert_eq!(Weights::open(&path).unwrap().get("w").unwrap().values().unwrap(), t.values);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
}

/// A folder with the files of a model: two shards, an index, a configuration.
fn model_folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |name| SaveTensor { name, shape: &[2], values: &[1.0, 2.0], stored: Stored::F32 };
    let at = |file: &str| dir.path().join(file);
    save_safetensors(&at("model-1-of-2.safetensors"), &[tensor("a"), tensor("b")], &none()).unwrap();
    save_safetensors(&at("model-2-of-2.safetensors"), &[tensor("c")], &none()).unwrap();
    let index = r#"{"metadata":{"total_size":24},"weight_map":{"c":"model-2-of-2.safetensors",
        "a":"model-1-of-2.safetensors","b":"model-1-of-2.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), index).unwrap();
    fs::write(at("config.json"), r#"{"hidden_size":48}"#).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

#[test]
fn folders_are_read() {
    let (_dir, path) = model_folder();
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.iter().map(|t| t.name()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.get("c").unwrap().values().unwrap(), [1.0, 2.0]);
    assert_eq!(weights.config().unwrap()["hidden_size"], 48);
    expect("shape", weights.get("c").unwrap().of_shape([3]), &["model-2-of-2.safetensors", "`c`"]);
    drop(weights);
    // A whole file comes before an index.
    fs::copy(path.join("model-2-of-2.safetensors"), path.join("model.safetensors")).unwrap();
    assert_eq!(Weights::open(&path).unwrap().len(), 1);
}

#[test]
fn an_index_may_name_what_is_nowhere() {
    let (_dir, path) = model_folder();
    let index = r#"{"metadata":{"total_size":NaN},"weight_map":{"a":"model-1-of-2.safetensors",
        "b":"model-2-of-2.safetensors","c":"model-2-of-2.safetensors","head":"model-2-of-2.safetensors"}}"#;
    fs::write(path.join("model.safetensors.index.json"), format!("\u{feff}{index}")).unwrap();
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.len(), 3);
    assert_eq!(weights.get("b").unwrap().values().unwrap(), [1.0, 2.0]); // in the other file
    expect("head", weights.get("head"), &["`head`", "missing", "`model-2-of-2.safetensors`"]);
    let files = safetensors_index("index.json", index.as_bytes()).unwrap();
    assert_eq!(files[3], ("head".to_string(), "model-2-of-2.safetensors".to_string()));
}

#[test]
fn folders_without_weights_say_what_to_do() {
    let with = |file: &str| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        fs::write(dir.path().join(file), "").unwrap();
        Weights::open(dir.path())
    };
    for (file, word) in [
        ("model.Q4_K.gguf", "open that file"),
        ("pytorch_model.bin", "PyTorch"),
        ("consolidated.00.pth", "PyTorch"),
        ("adapter_model.safetensors", "adapter"),
        ("model-00001-of-00002.safetensors", "index"),
        ("consolidated.safetensors", "others'"),
    ] {
        expect(file, with(file), &["neither `model.safetensors` nor", &format!("`{file}`"), word]);
    }
}

#[test]
fn broken_folders_are_errors() {
    let write = |file: &str, text: &str| {
        let (dir, path) = model_folder();
        fs::write(path.join(file), text).unwrap();
        let result = Weights::open(&path);
        drop(dir);
        result
    };
    let index = "model.safetensors.index.json";
    let map = |tensor: &str, file: &str| write(index, &format!(r#"{{"weight_map":{{"{tensor}":"{file}"}}}}"#));
    expect("config", write("config.json", "{"), &["config.json", "EOF"]);
    expect("index", write(index, "{}"), &[index, "weight_map"]);
    expect("index", write(index, r#"{"weight_map":{"a":"x","a":"y"}}"#), &[index, "`a`", "twice"]);
    for outside in ["../model.safetensors", "/etc/x.safetensors", "C:x.safetensors", "config.json", ""] {
        expect(outside, map("a", outside), &[index, "weight_map", &format!("`{outside}`")]);
    }
    expect("no file", map("a", "model-3-of-2.safetensors"), &["model-3-of-2.safetensors"]);
    expect("no index", write(index, "[]"), &[index]);
    let (_dir, path) = model_folder();
    fs::copy(path.join("model-2-of-2.safetensors"), path.join("model-1-of-2.safetensors")).unwrap();
    expect("twice", Weights::open(&path), &["model-2-of-2.safetensors", "`c`", "model-1-of-2.safetensors too"]);
    fs::File::create(path.join("config.json")).unwrap().set_len(17 << 20).unwrap();
    expect("long config", Weights::open(&path), &["config.json", "16777216"]);
    fs::remove_file(path.join(index)).unwrap();
    fs::remove_file(path.join("config.json")).unwrap();
    expect(
        "no model",
        Weights::open(&path),
        &["neither `model.safetensors` nor", "`model-1-of-2.safetensors`", "index"],
    );
    fs::create_dir(path.join("model.safetensors")).unwrap();
    expect("folder for file", Weights::open(&path), &["model.safetensors", "regular file"]);
    expect("nothing", Weights::open(&path.join("none")), &["none"]);
    #[cfg(unix)]
    expect("device", Weights::open("/dev/zero".as_ref()), &["/dev/zero", "regular file"]);
}

fn any_array() -> impl Strategy<Value = MetaArray> {
    use prop::collection::vec;
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(MetaArray::U8),
        vec(any::<i8>(), 0..5).prop_map(MetaArray::I8),
        vec(any::<u16>(), 0..5).prop_map(MetaArray::U16),
        vec(any::<i16>(), 0..5).prop_map(MetaArray::I16),
        vec(any::<u32>(), 0..5).prop_map(MetaArray::U32),
        vec(any::<i32>(), 0..5).prop_map(MetaArray::I32),
        vec(any::<u64>(), 0..5).prop_map(MetaArray::U64),
        vec(any::<i64>(), 0..5).prop_map(MetaArray::I64),
        vec(any::<f32>(), 0..5).prop_map(MetaArray::F32),
        vec(any::<f64>(), 0..5).prop_map(MetaArray::F64),
        vec(any::<bool>(), 0..5).prop_map(MetaArray::Bool),
        vec(any::<String>(), 0..5).prop_map(MetaArray::String),
    ];
    leaf.prop_recursive(4, 16, 4, |inner| vec(inner, 0..4).prop_map(MetaArray::Array))
}

fn any_value() -> impl Strategy<Value = MetaValue> {
    prop_oneof![
        any::<u8>().prop_map(MetaValue::U8),
        any::<i8>().prop_map(MetaValue::I8),
        any::<u16>().prop_map(MetaValue::U16),
        any::<i16>().prop_map(MetaValue::I16),
        any::<u32>().prop_map(MetaValue::U32),
        any::<i32>().prop_map(MetaValue::I32),
        any::<u64>().prop_map(MetaValue::U64),
        any::<i64>().prop_map(MetaValue::I64),
        any::<f32>().prop_map(MetaValue::F32),
        any::<f64>().prop_map(MetaValue::F64),
        any::<bool>().prop_map(MetaValue::Bool),
        any::<String>().prop_map(MetaValue::String),
        any_array().prop_map(MetaValue::Array),
    ]
}

fn any_gguf() -> impl Strategy<Value = (Vec<(String, MetaValue)>, Vec<GgufTensor>)> {
    let entries = prop::collection::btree_map(".{1,20}", any_value(), 0..6);
    let alignment = prop::option::of((0..8u32).prop_map(|log| MetaValue::U32(1 << log)));
    let tensor = (prop::sample::select(&Stored::ALL[..]), prop::collection::vec(1..4usize, 1..5), any::<u64>());
    let tensors = prop::collection::btree_map(".{1,40}", tensor, 0..5);
    (entries, alignment, tensors).prop_map(|(mut entries, alignment, tensors)| {
        entries.extend(alignment.map(|a| ("general.alignment".to_string(), a)));
        let tensors = tensors.into_iter().map(|(name, (stored, mut dims, seed))| {
            *dims.last_mut().unwrap() *= stored.block_len();
            let bytes = random_bytes(stored.bytes_of(&dims).unwrap(), seed);
            GgufTensor { name, stored, dims, bytes }
        });
        (entries.into_iter().collect(), tensors.collect())
    })
}

/// A change to a file: bytes overwritten, removed or inserted, or the rest cut off.
#[derive(Clone, Debug)]
enum Change {
    Set(prop::sample::Index, u8),
    Word(prop::sample::Index, u64),
    Remove(prop::sample::Index),
    Insert(prop::sample::Index, u8),
    Cut(prop::sample::Index),
}

fn any_change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    let words = prop::sample::select(vec![0, 1, 255, 1 << 31, u32::MAX.into(), 1 << 62, 1 << 63, u64::MAX]);
    prop_oneof![
        8 => (at(), any::<u8>()).prop_map(|(i, b)| Change::Set(i, b)),
        4 => (at(), words).prop_map(|(i, w)| Change::Word(i, w)),
        1 => at().prop_map(Change::Remove),
        1 => (at(), any::<u8>()).prop_map(|(i, b)| Change::Insert(i, b)),
        1 => at().prop_map(Change::Cut),
    ]
}

fn changed(mut file: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if file.is_empty() {
            break;
        }
        match change {
            Change::Set(at, byte) => *at.get_mut(&mut file) = *byte,
            Change::Word(at, word) => {
                let start = at.index(file.len());
                let rest = &mut file[start..];
                rest.iter_mut().zip(word.to_le_bytes()).for_each(|(to, byte)| *to = byte);
            }
            Change::Remove(at) => drop(file.remove(at.index(file.len()))),
            Change::Insert(at, byte) => file.insert(at.index(file.len()), *byte),
            Change::Cut(at) => file.truncate(at.index(file.len())),
        }
    }
    file
}

proptest! {
    #[test]
    fn gguf_round_trips((entries, tensors) in any_gguf()) {
        let weights = Weights::from_bytes("any.gguf", gguf_file(&entries, &tensors)).unwrap();
        let read: Vec<_> = weights.metadata().iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        prop_assert_eq!(read, entries);
        prop_assert_eq!(weights.len(), tensors.len());
        for (read, t) in weights.iter().zip(&tensors) {
            prop_assert_eq!((read.name(), read.stored()), (t.name.as_str(), t.stored));
            prop_assert_eq!((read.shape().dims(), &read.bytes().unwrap()[..]), (&t.dims[..], &t.bytes[..]));
        }
    }

    #[test]
    fn gguf_files_are_written_as_they_are_read((entries, tensors) in any_gguf()) {
        let file = gguf_file(&entries, &tensors);
        let weights = Weights::from_bytes("any.gguf", file.clone()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("any.gguf");
        let writer = GgufWriter::create(&path, weights.metadata(), described(&weights));
        if tensors.iter().any(|t| t.name.len() > 63) {
            expect("name", writer, &["63"]);
            return Ok(());
        }
        let mut writer = writer.unwrap();
        tensors.iter().for_each(|t| writer.write(&t.bytes).unwrap());
        writer.finish().unwrap();
        let written = fs::read(&path).unwrap();
        // The last tensor is padded as well.
        prop_assert!(written.starts_with(&file) && written[file.len()..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn safetensors_round_trips(
        tensors in prop::collection::btree_map(".{0,30}", (0..3usize, prop::collection::vec(1..5usize, 0..5)), 0..6),
        metadata in prop::collection::btree_map(".{0,10}", ".{0,30}", 0..4),
    ) {
        let values: Vec<f32> = (0..700).map(|i| (i as f32 - 350.0) / 7.0).collect();
        let to_save: Vec<_> = tensors.iter().map(|(name, (ty, shape))| {
            let values = &values[..shape.iter().product()];
            SaveTensor { name, shape, values, stored: Stored::ALL[*ty] }
        }).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("any.safetensors");
        save_safetensors(&path, &to_save, &metadata).unwrap();
        let weights = Weights::open(&path).unwrap();
        prop_assert_eq!(weights.len(), to_save.len());
        for t in to_save {
            let shape = if t.shape.is_empty() { &[1] } else { t.shape };
            let read = weights.get(t.name).unwrap().of_shape(shape).unwrap().stored_as(&[t.stored]).unwrap();
            prop_assert_eq!(read.bytes().unwrap(), quant::quantize(t.stored, t.values).unwrap());
        }
        for (key, value) in &metadata {
            prop_assert_eq!(weights.metadata().str(key).unwrap(), value);
        }
        prop_assert_eq!(weights.metadata().contains("format"), true);
    }

    #[test]
    fn changed_gguf_files_are_errors_or_read(changes in prop::collection::vec(any_change(), 1..6)) {
        exercise(gguf_header, &changed(sample_gguf(), &changes));
    }

    #[test]
    fn changed_safetensors_files_are_errors_or_read(changes in prop::collection::vec(any_change(), 1..4)) {
        exercise(safetensors_header, &changed(sample_safetensors(), &changes));
    }

    #[test]
    fn any_bytes_are_errors_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(gguf_header, &bytes);
        exercise(gguf_header, &Raw::header(3, 1, 1).bytes(&bytes).0);
        exercise(safetensors_header, &bytes);
        exercise(safetensors_header, &safetensors_file(&bytes, 8));
        prop_assert!(safetensors_index("index.json", &bytes).is_err());
    }
}
