//! The house rule of ARCHITECTURE.md: data flows down. A file imports from its own floor or a lower one, no files
//! import each other in a circle, and below `device/` nothing names what only a device has.
//!
//! `cargo test --test floors -- --nocapture` prints the counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// From the ground up. A room is a file or a folder of `src/`.
const FLOORS: &[&[&str]] = &[
    &["array", "error", "files", "hash", "profile", "quirks", "rng", "tensor"],
    &["format", "kernel"],
    &["graph"],
    &["ops"],
    &["autodiff", "precision", "reference"],
    &["plan"],
    &["device"],
    &["check", "nn", "optim", "probe", "tokenize"],
    &["model", "train"],
    &["decode", "sentence", "views"],
    &["lib"],
];

/// A graph is made of ops, and an op's gradient adds to a graph: two files that cannot do without each other.
const TOGETHER: &[[&str; 2]] = &[["graph/mod.rs", "graph/op.rs"]];

/// Files and the files that they import from.
type Imports = BTreeMap<String, BTreeSet<String>>;

#[test]
fn data_flows_down() {
    let sources = sources();
    let imports: Imports = sources.iter().map(|(file, text)| (file.clone(), imported(file, text, &sources))).collect();
    let arrows = || imports.iter().flat_map(|(from, all)| all.iter().map(move |to| (from, to)));
    let upward: Vec<_> = arrows().filter(|(from, to)| floor(to) > floor(from)).collect();
    let circular: Vec<_> = imports.keys().filter(|file| reachable(file, &imports).contains(*file)).collect();
    println!("{} files, {} arrows, {} upward", imports.len(), arrows().count(), upward.len());
    println!("{} files in circles: {circular:?}", circular.len());
    assert!(upward.is_empty(), "imports from a higher floor: {upward:#?}");
    assert!(circular.iter().all(|file| TOGETHER.iter().flatten().any(|kept| kept == file)), "circles: {circular:#?}");
}

#[test]
fn only_the_device_floor_and_those_above_know_a_device() {
    let device = FLOORS.iter().position(|floor| floor.contains(&"device"));
    for (file, text) in sources().iter().filter(|(file, _)| Some(floor(file)) < device) {
        for name in ["wgpu::Device", "wgpu::Queue", "wgpu::Buffer", "wgpu::CommandEncoder", "crate::device"] {
            let names = |at: usize| !text[at + name.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
            assert!(!text.match_indices(name).any(|(at, _)| names(at)), "{file} names {name}");
        }
    }
}

/// All of `src/`, by path, without comments and unit tests.
fn sources() -> BTreeMap<String, String> {
    fn read(dir: &Path, prefix: &str, all: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            if entry.path().is_dir() {
                read(&entry.path(), &format!("{name}/"), all);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(entry.path()).unwrap();
                let code = text.split("#[cfg(test)]\n").next().unwrap_or_default().lines();
                let code = code.map(|line| line.split("//").next().unwrap_or_default());
                all.insert(name, code.collect::<Vec<_>>().join("\n"));
            }
        }
    }
    let mut all = BTreeMap::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut all);
    all
}

fn floor(file: &str) -> usize {
    let room = file.split('/').next().unwrap_or_default().trim_end_matches(".rs");
    let found = FLOORS.iter().position(|floor| floor.contains(&room));
    found.unwrap_or_else(|| panic!("src/{file} is on no floor: add `{room}` to FLOORS"))
}

/// Files that the text of `file` has paths into.
fn imported(file: &str, text: &str, sources: &BTreeMap<String, String>) -> BTreeSet<String> {
    let module: Vec<&str> = file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let mut found = BTreeSet::new();
    let children = if file == "lib.rs" { &[][..] } else { &module[..] };
    for (start, parent) in [("crate::", &[][..]), ("super::", &module[..module.len() - 1]), ("use ", children)] {
        for (at, _) in text.match_indices(start) {
            for path in paths(&text[at + start.len()..]) {
                let full: Vec<&str> = parent.iter().copied().chain(path).collect();
                let candidates = (1..=full.len()).rev().map(|n| full[..n].join("/"));
                let files = candidates.flat_map(|c| [format!("{c}.rs"), format!("{c}/mod.rs")]);
                found.extend({ files }.find(|f| sources.contains_key(f)).filter(|f| f != file));
            }
        }
    }
    found
}

/// What follows `crate::`: one path, or several in braces.
fn paths(text: &str) -> Vec<Vec<&str>> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    if let Some(list) = rest.strip_prefix('{').filter(|_| name.is_empty()) {
        let mut depth = 0;
        let split = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth < 0 || (depth == 0 && c == ',')
        };
        let close = list.find("};").unwrap_or(list.len());
        let parts = list[..close].split(split).map(str::trim_start).filter(|part| !part.is_empty());
        return parts.flat_map(paths).collect();
    }
    match rest.strip_prefix("::") {
        Some(rest) => paths(rest).into_iter().map(|path| [&[name][..], &path].concat()).collect(),
        None => vec![vec![name]],
    }
}

/// Files that one reaches from `file` along arrows.
fn reachable<'a>(file: &'a String, imports: &'a Imports) -> BTreeSet<&'a String> {
    let mut seen = BTreeSet::new();
    let mut stack = vec![file];
    while let Some(next) = stack.pop() {
        stack.extend(imports[next].iter().filter(|to| seen.insert(*to)));
    }
    seen
}
