//! docs/ops.md is up to date with the op table, and no kernel of the table grows with its shapes.

#[path = "common/unrolled.rs"]
mod unrolled;

use std::collections::BTreeSet;

use throughline::check::Harness;
use throughline::ops::attention::Attention;
use throughline::ops::cache::CacheWrite;
use throughline::ops::concat::Concat;
use throughline::ops::cross_entropy::CrossEntropy;
use throughline::ops::embedding::Embedding;
use throughline::ops::gather::Gather;
use throughline::ops::l2_norm::L2Norm;
use throughline::ops::matmul::Matmul;
use throughline::ops::matmul_by_id::MatmulById;
use throughline::ops::norm::Norm;
use throughline::ops::patches::Patches;
use throughline::ops::pool::{PoolBy, Pooling};
use throughline::ops::reduce::{Reduce, Reduction};
use throughline::ops::rope::Rope;
use throughline::ops::slice::Slice;
use throughline::ops::softmax::Softmax;
use throughline::ops::sum::Sum;
use throughline::ops::swiglu::SwiGlu;
use throughline::ops::top_k::TopK;
use throughline::ops::transpose::Transpose;
use throughline::ops::windows::Window;
use throughline::ops::{Case, TABLE, markdown};
use throughline::quirks::Quirks;
use throughline::{AdapterClass, Plan, Profile, Result, Value};
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
    label: &'static str,
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
            label: d.kernel().label,
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
    let ops: [([usize; 2], OfSize); 23] = [
        ([64, 1024], |n| Case::new("rope", Rope { heads: 1, ..Rope::default() }, &[&[1, 3, n]])),
        ([768, 8192], |n| Case::new("norm", Norm { centered: true, eps: 1e-5 }, &[&[3, n], &[n], &[n]])),
        ([256, 1 << 16], |n| Case::new("softmax", Softmax, &[&[2, n]])),
        ([256, 1 << 17], |n| Case::new("cross_entropy", CrossEntropy, &[&[2, n]]).ids(&[2], n as u32)),
        ([256, 8192], |n| Case::new("columns", Embedding::default(), &[&[40, n]]).ids(&[3], 40)),
        ([256, 1 << 18], |n| Case::new("vocabulary", Embedding::default(), &[&[n, 4]]).ids(&[3], n as u32)),
        ([256, 1 << 18], |n| Case::new("top_k", TopK { k: 64 }, &[&[1, n], &[1]]).forward_only()),
        ([256, 8192], |n| Case::new("cache", CacheWrite, &[&[1, 2, n]]).ids(&[1], 1).also(&[1, 8, n])),
        ([256, 8192], |n| Case::new("slice", Slice { axis: 1, start: n / 2, len: n / 4 }, &[&[3, n]])),
        ([256, 8192], |n| Case::new("concat", Concat { axis: 1 }, &[&[3, n], &[3, n]])),
        ([256, 8192], |n| Case::new("transpose", Transpose { a: 0, b: 1 }, &[&[8, n]])),
        ([256, 8192], |n| Case::new("sum", Sum::to([n]), &[&[9, n]])),
        ([256, 1 << 18], |n| Case::new("rows", Reduce { axis: 1, by: Reduction::Max }, &[&[3, n]])),
        ([256, 1 << 18], |n| Case::new("columns", Reduce { axis: 1, by: Reduction::Sum }, &[&[3, n, 4]])),
        ([256, 1 << 16], |n| Case::new("gather", Gather { axis: 1 }, &[&[3, n]]).ids(&[3, 5], n as u32)),
        ([64, 4096], |n| {
            let window = Window { after: [2, 0], ..Window::new([3, 3], [1, 2]) };
            Case::new("patches", Patches { window }, &[&[1, 5, 5, n]])
        }),
        ([64, 4096], |n| {
            let window = Window::new([n / 32, 2], [2, 2]);
            Case::new("pool", Pooling { by: PoolBy::Max, window }, &[&[1, n, 5, 8]])
        }),
        ([256, 1 << 18], |n| Case::new("l2_norm", L2Norm, &[&[n]])),
        ([256, 8192], |n| Case::new("swiglu", SwiGlu, &[&[3, n], &[3, n]])),
        ([256, 8192], |n| Case::new("matmul", Matmul::default(), &[&[64, n], &[n, 32]])),
        ([256, 8192], |n| Case::new("down by id", MatmulById::default(), &[&[3, 9, n], &[4, n, 8]]).ids(&[3], 4)),
        ([256, 8192], |n| Case::new("up by id", MatmulById::default(), &[&[3, 9, 8], &[4, 8, n]]).ids(&[3], 4)),
        ([256, 1 << 16], |n| Case::new("logits", Matmul::default(), &[&[1, 16], &[16, n]])),
    ];
    for ([short, long], case) in ops {
        let of_short = kernels(&case(short));
        for Found { description, key, unrolled, .. } in kernels(&case(long)) {
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

/// What keeps the loops of no constant length below the quirk `loops-end-early`. A kernel that is new here needs a
/// reason, too: if its loops grow with a shape, it must split the work, or call `Quirks::check_loops`.
const OPEN_LOOPS: [(&str, &str); 5] = [
    (
        "an invocation computes a fixed number of elements",
        "adamw.forward cache.read_rows cache.write_rows cast.forward concat.forward dropout.forward embedding.forward \
         fill.forward gather.forward gelu.backward gelu.forward l2_norm.backward map.forward muon.shift muon.update \
         muon.update_scaled \
         residual_add.forward scale.forward sgd.momentum sgd.plain slice.forward slice.pad sum.broadcast swiglu.backward swiglu.forward \
         together.forward transpose.forward transpose.quads",
    ),
    (
        "the work is split into chunks, which are short for all tensors that fit a binding",
        "attention.row_dots l2_norm.forward muon.momentum muon.normalise norm.backward_held sum.columns",
    ),
    (
        "the work is split into several dispatches, or variants that split it replace the kernel",
        "attention.backward_kv attention.backward_q attention.decode attention.forward attention.wide_backward_kv \
         attention.wide_backward_q attention.wide_forward packed.backward",
    ),
    ("a loop that ends early finds a bound that is too large, and still right", "attention.row_stats"),
    (
        "planning is an error where it is too much: `Quirks::check_loops`",
        "cross_entropy.backward cross_entropy.finish cross_entropy.finish_sum cross_entropy.forward cross_entropy.share \
         embedding.backward embedding.chain \
         gather.backward matmul.forward_few matmul.forward_lanes matmul.forward_lanes_quads \
         matmul_by_id.backward matmul_by_id.backward_quads matmul_by_id.forward matmul_by_id.forward_quads \
         matmul_by_id.forward_shared_quads norm.backward norm.forward packed.forward_lanes packed_i8.forward_i8 patches.backward patches.forward pool.backward pool.largest pool.sum \
         products.forward reduce.extreme reduce.sum rope.halves rope.interleaved softmax.backward softmax.forward stats.forward \
         top_k.chunks top_k.pick",
    ),
];

#[test]
fn every_loop_of_no_constant_length_has_a_bound() {
    let known: BTreeSet<String> =
        OPEN_LOOPS.iter().flat_map(|(_, kernels)| kernels.split(' ')).map(String::from).collect();
    let mut open = BTreeSet::new();
    for case in TABLE.iter().flat_map(|row| (row.cases)()) {
        let found = kernels(&case).into_iter().filter(|k| k.unrolled.open);
        open.extend(found.map(|k| format!("{}.{}", k.label, k.key.0)));
    }
    assert_eq!(open, known);
}

/// The plan of a case and its gradient.
fn plan(case: &Case, profile: &Profile) -> Result<Plan> {
    let (mut g, inputs, mut wanted) = case.graph()?;
    if case.main_outputs > 0 {
        let loss = g.sum("loss", wanted[0])?;
        let with_gradient = inputs.iter().zip(&case.inputs).filter(|(_, spec)| spec.grad);
        let wrt: Vec<Value> = with_gradient.map(|(&input, _)| input).collect();
        wanted.extend(g.gradients(loss, &wrt)?);
    }
    Plan::new(&g, &wanted, profile)
}

/// Where the quirk `loops-end-early` would make results wrong without a word.
#[test]
fn what_would_end_loops_early_is_an_error() {
    let large =
        Profile { max_binding_bytes: 1 << 32, max_buffer_bytes: 1 << 32, ..Profile::portable(AdapterClass::Cpu) };
    let sound = Profile { quirks: Quirks::default(), ..large.clone() };
    type OfSize = fn(usize) -> Case;
    let ops: [([usize; 2], &str, OfSize); 16] = [
        ([261_000, 263_000], "the inner dimension", |n| Case::new("", Matmul::default(), &[&[64, n], &[n, 32]])),
        // The gradient of the weight sums over rows.
        ([261_000, 263_000], "the inner dimension", |n| Case::new("", Matmul::default(), &[&[n, 8], &[8, 8]])),
        ([260_000, 263_000], "the inner dimension", |n| {
            Case::new("", MatmulById::default(), &[&[3, 1, n], &[1, n, 32]]).ids(&[3], 1)
        }),
        ([65_000, 66_000], "the number of rows", |n| {
            Case::new("", MatmulById::default(), &[&[1, n, 8], &[1, 8, 8]]).ids(&[1], 1)
        }),
        ([261_000, 263_000], "the length of a row", |n| Case::new("", Softmax, &[&[64, n + 1]])),
        ([1_000_000, 1 << 21], "the length of a row", |n| Case::new("", Softmax, &[&[2, n]])),
        ([1_000_000, 1 << 21], "the length of a row", |n| {
            Case::new("", Norm { centered: true, eps: 1e-5 }, &[&[4, n], &[n], &[n]])
        }),
        ([1 << 20, 1 << 22], "the length of a row", |n| Case::new("", CrossEntropy, &[&[2, n]]).ids(&[2], n as u32)),
        ([520_000, 530_000], "the number of rows", |n| Case::new("", CrossEntropy, &[&[n, 2]]).ids(&[n], 2)),
        ([52_000, 53_000], "the number of tokens", |n| Case::new("", Embedding::default(), &[&[3, 8]]).ids(&[n], 3)),
        ([1_000_000, 1_100_000], "the number of rows of the table", |n| {
            Case::new("", Embedding::default(), &[&[n, 8]]).ids(&[9], n as u32)
        }),
        ([1 << 20, 1 << 23], "the length of a row", |n| Case::new("", TopK { k: 64 }, &[&[1, n], &[1]]).forward_only()),
        ([16_000_000, 17_000_000], "the length of the axis", |n| {
            Case::new("", Reduce { axis: 1, by: Reduction::Max }, &[&[2, n, 1, 3]])
        }),
        ([60_000, 70_000], "the number of ids by row", |n| {
            Case::new("", Gather { axis: 1 }, &[&[2, 3]]).ids(&[2, n], 3)
        }),
        ([32_000_000, 36_000_000], "the number of elements of a pixel or window", |n| {
            Case::new("", Patches { window: Window::new([2, 2], [1, 1]) }, &[&[1, 2, 2, n / 4]])
        }),
        ([60_000, 70_000], "the number of heads", |n| {
            Case::new("", Rope { heads: n, ..Rope::default() }, &[&[1, 3, 2 * n]])
        }),
    ];
    for ([fits, too_much], what, case) in ops {
        let name = case(1).op.name();
        plan(&case(fits), &large).unwrap_or_else(|e| panic!("{name} of {fits}: {e}"));
        plan(&case(too_much), &sound).unwrap_or_else(|e| panic!("{name} of {too_much}: {e}"));
        let error = plan(&case(too_much), &large).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("update Mesa"), "{name} of {too_much}: {error}");
    }
}
