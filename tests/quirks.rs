//! The table of driver quirks: that what it names exists, and that what any machine can try still fails.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use throughline::quirks::QUIRKS;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn every_workaround_names_its_quirk_and_every_retest_exists() {
    let mut names = HashSet::new();
    for quirk in QUIRKS {
        assert!(names.insert(quirk.name), "`{}` is there twice", quirk.name);
        assert!(!quirk.places.is_empty(), "{quirk}");
        for place in quirk.places {
            assert!(read(place).contains(quirk.name), "{place} does not name `{}`", quirk.name);
        }
        // `cargo test --test FILE [NAME]` or `cargo bench --bench FILE [NAME]`
        let words: Vec<&str> = quirk.retest.split(' ').collect();
        let ["cargo", kind @ ("test" | "bench"), flag, file, ref filter @ ..] = words[..] else { panic!("{quirk}") };
        assert_eq!(flag, format!("--{kind}"), "{quirk}");
        let text = read(&format!("{}/{file}.rs", if kind == "test" { "tests" } else { "benches" }));
        let row = |name: &str| throughline::ops::TABLE.iter().any(|row| row.name == name);
        for name in filter {
            let is_row = file == "ops" && row(name);
            assert!(is_row || text.contains(&format!("fn {name}()")), "{file}.rs has no `{name}`");
        }
    }
}

/// Once this fails, `enable subgroups;` can go to the top of shaders/common/subgroups.wgsl.
#[test]
fn naga_rejects_enable_subgroups() {
    let kernel = "@compute @workgroup_size(1) fn main() {}";
    wgpu::naga::front::wgsl::parse_str(kernel).unwrap();
    let error = wgpu::naga::front::wgsl::parse_str(&format!("enable subgroups;\n{kernel}"));
    assert!(error.is_err(), "`no-enable-subgroups` is healed: remove it and its workarounds");
}
