//! docs/ops.md is up to date with the op table.

use throughline::ops::{TABLE, markdown};

#[test]
fn the_op_table_is_fresh() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ops.md");
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written.replace("\r\n", "\n") == markdown(TABLE),
        "docs/ops.md is stale: run `cargo run --example op_table > docs/ops.md`"
    );
}

#[test]
fn names_are_unique_and_sorted_into_the_table() {
    let names: Vec<&str> = TABLE.iter().map(|r| r.name).collect();
    let unique: std::collections::HashSet<&&str> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}
