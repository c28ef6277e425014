//! Prints docs/ops.md from the op table.
//!
//! `cargo run --example op_table > docs/ops.md`

use throughline::ops::TABLE;

fn main() {
    print!("{}", throughline::ops::markdown(TABLE));
}
