//! docs/ops.md is up to date with the op table, and no kernel of the table grows with its shapes.

#[path = "common/unrolled.rs"]
mod unrolled;

use throughline::check::Harness;
use throughline::ops::attention::Attention;
use throughline::ops::cache::CacheWrite;
use throughline::ops::concat::Concat;
use throughline::ops::cross_entropy::CrossEntropy;
use throughline::ops::embedding::Embedding;
use throughline::ops::l2_norm::L2Norm;
use throughline::ops::matmul::Matmul;
use throughline::ops::norm::Norm;
use throughline::ops::rope::Rope;
use throughline::ops::slice::Slice;
use throughline::ops::softmax::Softmax;
use throughline::ops::sum::Sum;
use throughline::ops::swiglu::SwiGlu;
use throughline::ops::top_k::TopK;
use throughline::ops::transpose::Transpose;
use throughline::ops::{Case, TABLE, markdown};
use throughline::{AdapterClass, Profile};
use unrolled::Unrolled;

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

/// A kernel that a software adapter runs for a case or its gradient.
struct Found {
    description: String,
    /// Its entry point, and whether it is for a device with subgroups.
    key: (&'static str, bool),
    unrolled: Unrolled,
}

/// All of them.
fn kernels(case: &Case) -> Vec<Found> {
    let harness = Harness::new(case, 1).unwrap();
    let mut found = vec![];
    for subgroups in [None, Some([8, 8])] {
        let plan = harness.plan(&Profile { subgroups, ..Profile::portable(AdapterClass::Cpu) }).unwrap();
        found.extend(plan.steps().iter().flat_map(|step| step.dispatches()).map(|d| Found {
            description: format!("{}: {}", case.name, d.kernel().describe()),
            key: (d.kernel().entry, subgroups.is_some()),
            unrolled: Unrolled::of(d.kernel()),
        }));
    }
    found
}

/// The size of the longest of those that are wanted.
fn longest(kernels: &[Found], wanted: impl Fn(&Found) -> bool) -> Option<usize> {
    kernels.iter().filter(|k| wanted(k)).map(|k| k.unrolled.size).max()
}

/// Heads of 192 once took a minute to compile where those of 128 took a second.
#[test]
fn kernels_of_wide_heads_stay_short() {
    let attention = |queries: usize, dh: usize| {
        let op = Attention { heads: 1, kv_heads: 1, causal: true, scale: None };
        let (q, kv) = ([1, queries, dh], [1, 64, dh]);
        Case::new(format!("{queries} queries, heads of {dh}"), op, &[&q, &kv, &kv])
    };
    for queries in [1, 64] {
        // Scalars and vectors count alike here: kernels for wide heads have more scalars, and compile as fast.
        let most = longest(&kernels(&attention(queries, 128)), |_| true).unwrap() * 5 / 2;
        for dh in [33, 80, 100, 127, 128, 131, 160, 192, 200, 256, 257, 320, 512, 1023, 1024] {
            for Found { description, unrolled, .. } in kernels(&attention(queries, dh)) {
                assert!(unrolled.size <= most, "{description}: {unrolled:?}, more than {most}");
                assert!(unrolled.longest <= 32, "{description}: {unrolled:?}, which Mesa does not unroll");
            }
        }
    }
}

/// So do those of other ops whose rows or tables may be long.
#[test]
fn kernels_of_long_rows_stay_short() {
    type OfSize = fn(usize) -> Case;
    let ops: [([usize; 2], OfSize); 16] = [
        ([64, 1024], |n| Case::new("rope", Rope { heads: 1, ..Rope::default() }, &[&[1, 3, n]])),
        ([768, 8192], |n| Case::new("norm", Norm { centered: true, eps: 1e-5 }, &[&[3, n], &[n], &[n]])),
        ([256, 1 << 18], |n| Case::new("softmax", Softmax, &[&[2, n]])),
        ([256, 1 << 18], |n| Case::new("cross_entropy", CrossEntropy, &[&[2, n]]).ids(&[2], n as u32)),
        ([256, 8192], |n| Case::new("columns", Embedding::default(), &[&[40, n]]).ids(&[3], 40)),
        ([256, 1 << 18], |n| Case::new("vocabulary", Embedding::default(), &[&[n, 4]]).ids(&[3], n as u32)),
        ([256, 1 << 18], |n| Case::new("top_k", TopK { k: 64 }, &[&[1, n], &[1]]).forward_only()),
        ([256, 8192], |n| Case::new("cache", CacheWrite, &[&[1, 2, n]]).ids(&[1], 1).also(&[1, 8, n])),
        ([256, 8192], |n| Case::new("slice", Slice { axis: 1, start: n / 2, len: n / 4 }, &[&[3, n]])),
        ([256, 8192], |n| Case::new("concat", Concat { axis: 1 }, &[&[3, n], &[3, n]])),
        ([256, 8192], |n| Case::new("transpose", Transpose { a: 0, b: 1 }, &[&[8, n]])),
        ([256, 8192], |n| Case::new("sum", Sum::to([n]), &[&[9, n]])),
        ([256, 1 << 18], |n| Case::new("l2_norm", L2Norm, &[&[n]])),
        ([256, 8192], |n| Case::new("swiglu", SwiGlu, &[&[3, n], &[3, n]])),
        ([256, 8192], |n| Case::new("matmul", Matmul::default(), &[&[64, n], &[n, 32]])),
        ([256, 1 << 16], |n| Case::new("logits", Matmul::default(), &[&[1, 16], &[16, n]])),
    ];
    for ([short, long], case) in ops {
        let of_short = kernels(&case(short));
        for Found { description, key, unrolled } in kernels(&case(long)) {
            // Long rows may have kernels of their own.
            let same = longest(&of_short, |k| k.key == key).or(longest(&of_short, |_| true));
            let most = same.unwrap() * 5 / 4;
            assert!(unrolled.size <= most, "{description} of {long}: {unrolled:?}, of {short} at most {most}");
        }
    }
}

/// A lane that goes twice over a row of 33,001 elements would meet the quirk `loops-end-early`.
#[test]
fn lanes_share_rows_that_are_too_long_for_one() {
    for (columns, lanes) in [(1001, "LANES=1u"), (33_001, "LANES=8u")] {
        let found = kernels(&Case::new("softmax", Softmax, &[&[64, columns]]));
        let mut rows = found.iter().filter(|k| k.key.1 && k.description.contains("softmax.")).peekable();
        assert!(rows.peek().is_some());
        rows.for_each(|k| assert!(k.description.contains(lanes), "{}", k.description));
    }
}
