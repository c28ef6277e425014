//! Runs the program as users do, with the system's driver for AMD cards and with Mesa unpacked to target/mesa. Where one
//! of them is missing, the program must say what to do about that.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn isa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isa")).args(args).output().unwrap()
}

/// With the Mesa in target/mesa, which `cargo xtask isa` unpacks.
fn unpacked(args: &[&str]) -> Output {
    let mesa = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/mesa");
    isa(&[args, &["--mesa", mesa.to_str().unwrap()]].concat())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether the driver was there. Whatever else may go wrong is an error.
fn compiled(output: &Output) -> bool {
    let errors = text(&output.stderr);
    let absent = errors.contains("apt-get install mesa-vulkan-drivers") || errors.contains("is no unpacked Mesa");
    assert!(output.status.success() != absent, "{errors}");
    !absent
}

fn scratch(name: &str, wgsl: &str) -> PathBuf {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, wgsl).unwrap();
    file
}

/// Looks for rows of these kernels and cards, with sensible figures.
fn assert_rows(table: &str, cards: &[&str]) {
    for card in cards {
        for kernel in ["matmul.", "softmax.forward", "softmax.backward"] {
            let row = table.lines().find(|l| l.contains(&format!("| {card} ")) && l.contains(kernel));
            let row = row.unwrap_or_else(|| panic!("no row for {kernel} on {card} in\n{table}"));
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let number = |i: usize| cells[i].trim_end_matches('%').parse::<u32>().unwrap();
            assert!([32, 64, 128].contains(&number(3)) && (1..=256).contains(&number(4)), "{row}");
            assert!((1..=100).contains(&number(8)) && number(9) > 10, "{row}");
        }
    }
}

#[test]
fn the_table_has_every_kernel_on_the_cards_that_the_system_knows() {
    let output = isa(&["matmul", "softmax", "--system"]);
    if compiled(&output) {
        assert_rows(&text(&output.stdout), &["rdna2", "rdna3"]);
    }
}

#[test]
fn the_table_has_every_kernel_on_the_cards_of_each_maker() {
    let output = unpacked(&["matmul", "softmax", "--card=ampere", "--card=rdna4", "--card=m1", "--card=adreno"]);
    if compiled(&output) {
        let table = text(&output.stdout);
        assert_rows(&table, &["ampere", "rdna4", "m1", "adreno"]);
        assert!(table.contains("NVK") && table.contains("RADV") && table.contains("Apple M1"), "{table}");
    }
}

/// On the card that old compilers, too, have all registers of.
#[test]
fn no_kernel_spills_and_large_matmuls_mostly_multiply() {
    compiled(&isa(&["--check", "--system", "--card", "rdna2"]));
}

/// A private array with a varying index, too large for registers.
const INDEXED: &str = "
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var local: array<f32, 512>;
    for (var i = 0u; i < u32(y[0]); i++) {
        local[u32(y[i]) % 512u] = y[i + id.x];
    }
    y[id.x] = local[id.x % 512u];
}
";

#[test]
fn a_scratch_kernel_that_spills_fails_the_check() {
    let file = scratch("indexed.wgsl", INDEXED);
    let file = file.to_str().unwrap();
    let output = isa(&["--wgsl", file, "--entry", "main", "--asm", "--system"]);
    if compiled(&output) {
        let shown = text(&output.stdout);
        assert!(shown.lines().any(|l| l.starts_with("> BB")) && shown.contains("s_endpgm"), "{shown}");
        assert_spills(&isa(&["--wgsl", file, "--check", "--system"]), "rdna2");
    }
    if compiled(&unpacked(&["--wgsl", file])) {
        for card in ["turing", "rdna3", "m1", "adreno"] {
            assert_spills(&unpacked(&["--wgsl", file, "--check", "--card", card]), card);
        }
    }
}

fn assert_spills(output: &Output, card: &str) {
    let errors = text(&output.stderr);
    assert!(!output.status.success(), "{card}: {}", text(&output.stdout));
    assert!(errors.contains("bytes of scratch; expected none") && errors.contains(card), "{errors}");
}

#[test]
fn without_the_driver_the_error_says_what_to_install() {
    let nowhere = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("no-drivers");
    std::fs::create_dir_all(&nowhere).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_isa"));
    let output = command.args(["scale", "--system"]).env("VK_DRIVER_FILES", &nowhere).output().unwrap();
    let errors = text(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    assert!(errors.contains("radeon_icd") && errors.contains("mesa-vulkan-drivers"), "{errors}");
    let output = isa(&["scale", "--mesa", nowhere.to_str().unwrap()]);
    let errors = text(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    assert!(errors.contains("no-drivers is no unpacked Mesa") && errors.contains("ld-linux"), "{errors}");
}

#[test]
fn wrong_names_are_errors_that_say_which_there_are() {
    let file = scratch("entries.wgsl", INDEXED);
    let file = file.to_str().unwrap();
    for (args, expected) in [
        (&["matmull"][..], "matmul, "),
        (&["scale", "--kernel", "nonesuch"], "`nonesuch`"),
        (&["--wgsl", file, "--entry", "mian"], "the entry points are main"),
        (&["--wgsl", file, "--knob", "TILE=8u"], "const TILE"),
        (&["scale", "--card", "voodoo"], "the cards are turing, "),
        (&["scale", "--write"], "cannot be used with"),
    ] {
        let output = isa(args);
        let errors = text(&output.stderr);
        assert!(!output.status.success() && errors.contains(expected), "{args:?}: {errors}");
    }
}
