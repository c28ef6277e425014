//! What the fuzz targets share.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::sync::Once;

pub mod targets;

/// Runs a target on a file, and aborts if it panics.
///
/// libFuzzer's own hook aborts at every panic, also at those that the crate catches: `tokenizers` panics on some files.
pub fn run(target: targets::Target, file: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| set_hook(Box::new(|_| {})));
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(file))) {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        eprintln!("the target panicked: {}", text.unwrap_or("?"));
        std::process::abort();
    }
}
