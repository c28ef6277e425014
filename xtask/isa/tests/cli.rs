//! Runs the program as users do. If Mesa's Radeon driver is installed, it compiles; if not, it must say what to
//! install.

use std::path::PathBuf;
use std::process::{Command, Output};

fn isa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isa")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether the driver was there. Whatever else may go wrong is an error.
fn compiled(output: &Output) -> bool {
    let errors = text(&output.stderr);
    let absent = errors.contains("apt-get install mesa-vulkan-drivers");
    assert!(output.status.success() != absent, "{errors}");
    !absent
}

fn scratch(name: &str, wgsl: &str) -> PathBuf {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, wgsl).unwrap();
    file
}

#[test]
fn the_table_has_every_kernel_on_both_cards() {
    let output = isa(&["matmul", "softmax"]);
    if !compiled(&output) {
        return;
    }
    let table = text(&output.stdout);
    for card in ["gfx1100", "gfx1030"] {
        for kernel in ["matmul.", "softmax.forward", "softmax.backward"] {
            let row = table.lines().find(|l| l.contains(card) && l.contains(kernel));
            let row = row.unwrap_or_else(|| panic!("no row for {kernel} on {card} in\n{table}"));
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let number = |i: usize| cells[i].parse::<u32>().unwrap();
            assert!([32, 64].contains(&number(3)) && (1..=256).contains(&number(4)), "{row}");
            assert!((1..=20).contains(&number(7)), "{row}");
        }
    }
}

/// On the card that old compilers, too, have all registers of.
#[test]
fn no_kernel_spills_and_large_matmuls_mostly_multiply() {
    compiled(&isa(&["--check", "--family", "gfx1030"]));
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
    let output = isa(&["--wgsl", file.to_str().unwrap(), "--entry", "main", "--asm"]);
    if !compiled(&output) {
        return;
    }
    let shown = text(&output.stdout);
    assert!(shown.lines().any(|l| l.starts_with("> BB")) && shown.contains("s_endpgm"), "{shown}");
    let output = isa(&["--wgsl", file.to_str().unwrap(), "--check"]);
    let errors = text(&output.stderr);
    assert!(!output.status.success() && errors.contains("bytes of scratch; expected none"), "{errors}");
}

#[test]
fn without_the_driver_the_error_says_what_to_install() {
    let nowhere = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("no-drivers");
    std::fs::create_dir_all(&nowhere).unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_isa")).arg("scale").env("VK_DRIVER_FILES", &nowhere).output().unwrap();
    let errors = text(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    assert!(errors.contains("radeon_icd") && errors.contains("mesa-vulkan-drivers"), "{errors}");
}

#[test]
fn wrong_names_are_errors_that_say_which_there_are() {
    let file = scratch("entries.wgsl", INDEXED);
    for (args, expected) in [
        (&["matmull"][..], "matmul, "),
        (&["scale", "--kernel", "nonesuch"], "`nonesuch`"),
        (&["--wgsl", file.to_str().unwrap(), "--entry", "mian"], "the entry points are main"),
        (&["--wgsl", file.to_str().unwrap(), "--knob", "TILE=8u"], "const TILE"),
    ] {
        let output = isa(args);
        let errors = text(&output.stderr);
        assert!(!output.status.success() && errors.contains(expected), "{args:?}: {errors}");
    }
}
