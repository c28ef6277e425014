//! Matrices split into several tensors by rows give the same results and gradients as whole ones.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles};
use throughline::format::Packed;
use throughline::format::Stored;
use throughline::ops::cross_entropy::TargetShare;
use throughline::ops::{Case, random_array};
use throughline::plan::Step;
use throughline::reference::{self, Array, nmse};
use throughline::tensor::split_rows;
use throughline::{AdapterClass, ExecOptions, Executable, Graph, Plan, Profile, Result, TensorType, Value};

const D: usize = 32;
/// Rows of a table in one part, two and three; the last two are no multiple of anything.
const PARTS: [&[usize]; 3] = [&[71], &[40, 31], &[33, 1, 37]];

/// A table `[71, D]` in parts, used twice as a tied head does: rows by id, and logits. With the loss's
/// gradients of the parts and of what is multiplied.
struct Tied {
    graph: Graph,
    given: HashMap<Value, Array>,
    rows: Value,
    logits: Value,
    dx: Value,
    dtables: Vec<Value>,
}

fn tied(parts: &[usize]) -> Result<Tied> {
    let mut g = Graph::new();
    let mut given = HashMap::new();
    let whole = random_array(&[71, D].into(), 1);
    let mut at = 0;
    let mut tables = vec![];
    for (i, &n) in parts.iter().enumerate() {
        let table = g.param(&format!("table.{i}"), [n, D])?;
        given.insert(table, Array::new([n, D], whole.data[at..at + n * D].to_vec()));
        tables.push(table);
        at += n * D;
    }
    let ids = g.input("ids", TensorType::u32([2, 25]))?;
    // All rows but some, some twice, and two ids that have no row.
    given.insert(ids, Array::new([2, 25], (0..50).map(|i| f64::from(i * i % 73)).collect()));
    let x = g.input("x", TensorType::f32([2, 25, D]))?;
    given.insert(x, random_array(&[2, 25, D].into(), 2));
    let dy = g.input("dy", TensorType::f32([2, 25, 71]))?;
    given.insert(dy, random_array(&[2, 25, 71].into(), 3));
    let rows = g.embedding_parts("rows", &tables, ids)?;
    let sum = g.residual_add("sum", x, rows)?;
    let logits = g.matmul_nt_parts("logits", sum, &tables)?;
    let product = g.mul("product", logits, dy)?;
    let loss = g.sum("loss", product)?;
    let wrt: Vec<Value> = [x].into_iter().chain(tables).collect();
    let gradients = g.gradients(loss, &wrt)?;
    let (dx, dtables) = (gradients[0], gradients[1..].to_vec());
    Ok(Tied { graph: g, given, rows, logits, dx, dtables })
}

impl Tied {
    fn wanted(&self) -> Vec<Value> {
        [self.rows, self.logits, self.dx].into_iter().chain(self.dtables.iter().copied()).collect()
    }

    /// Rows, logits, gradient of x and that of the table as a whole.
    fn joined<T: Clone>(mut results: Vec<Vec<T>>) -> [Vec<T>; 4] {
        let dtable = results.split_off(3).concat();
        let [rows, logits, dx] = results.try_into().ok().unwrap();
        [rows, logits, dx, dtable]
    }

    fn reference(&self) -> [Vec<f64>; 4] {
        let arrays = reference::run(&self.graph, &self.given, &self.wanted()).unwrap();
        Self::joined(arrays.into_iter().map(|a| a.data).collect())
    }
}

/// Runs a graph on the GPU with each class of kernels.
fn run(graph: &Graph, given: &HashMap<Value, Array>, wanted: &[Value]) -> Vec<Vec<Vec<f32>>> {
    let on = |profile: Profile| {
        let plan = Plan::new(graph, wanted, &profile).unwrap();
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
        exec.plan().externals().iter().for_each(|e| common::write(&exec, e.value, &given[&e.value]));
        exec.submit().unwrap();
        wanted.iter().map(|&v| common::read(&exec, v)).collect()
    };
    profiles().into_iter().map(on).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn tables_in_parts_are_like_whole_ones() {
    let whole = tied(PARTS[0]).unwrap();
    let want = whole.reference();
    let rows_of_whole = run(&whole.graph, &whole.given, &[whole.rows]);
    for parts in PARTS {
        let t = tied(parts).unwrap();
        for (got, want) in t.reference().iter().zip(&want) {
            let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
            assert!(got.len() == want.len() && worst < 1e-12, "{parts:?}: the reference is off by {worst}");
        }
        for (results, rows) in run(&t.graph, &t.given, &t.wanted()).into_iter().zip(&rows_of_whole) {
            let results = Tied::joined(results);
            // Rows are added to zeros alone, so they keep their bits.
            assert_eq!(bits(&results[0]), bits(&rows[0]), "{parts:?}");
            for (i, (got, want)) in results.iter().zip(&want).enumerate() {
                let error = nmse(got, want);
                assert!(error < 1e-12, "{parts:?}: result {i}: NMSE {error:.1e}");
            }
        }
    }
}

#[test]
fn packed_matrices_in_parts_are_like_whole_ones() {
    for (stored, k) in [(Stored::Q8_0, 96), (Stored::F16, 64), (Stored::Q6_K, 256)] {
        let whole = Packed { stored, n: 71, k };
        // Rows of 102, 128 and 210 bytes, the first and last of which end within words.
        let split = whole.split(30 * (whole.bytes() / 71) as u64 + 15).unwrap();
        assert_eq!(split.iter().map(|p| p.n).collect::<Vec<_>>(), [24, 24, 23]);
        let bytes: Vec<u8> = (0..whole.bytes()).map(|i| (i * i % 251) as u8 & 0x3f).collect();
        let mut g = Graph::new();
        let mut given = HashMap::new();
        let mut parts_of = |g: &mut Graph, name: &str, matrices: &[Packed]| -> Vec<(Value, Packed)> {
            let mut rest = &bytes[..];
            let mut part = |(i, &matrix): (usize, &Packed)| {
                let (own, behind) = rest.split_at(matrix.bytes());
                rest = behind;
                let mut own = own.to_vec();
                own.resize(own.len().next_multiple_of(4), 0);
                let words = own.as_chunks::<4>().0.iter().map(|w| f64::from(u32::from_le_bytes(*w))).collect();
                let value = g.input(&format!("{name}.{i}"), matrix.ty()).unwrap();
                given.insert(value, Array::new(matrix.ty().shape, words));
                (value, matrix)
            };
            matrices.iter().enumerate().map(&mut part).collect()
        };
        let (one, several) = (parts_of(&mut g, "whole", &[whole]), parts_of(&mut g, "part", &split));
        let ids = g.input("ids", TensorType::u32([50])).unwrap();
        given.insert(ids, Array::new([50], (0..50).map(|i| f64::from(i * i % 73)).collect()));
        let x = g.input("x", TensorType::f32([3, k])).unwrap();
        given.insert(x, random_array(&[3, k].into(), 2));
        let mut wanted = vec![];
        for (name, parts) in [("whole", &one), ("split", &several)] {
            let rows = g.packed_rows_parts(&format!("{name}.rows"), parts, ids).unwrap();
            let y = g.packed_linear_parts(&format!("{name}.y"), x, parts).unwrap();
            let squares = g.mul("squares", y, y).unwrap();
            let loss = g.sum("loss", squares).unwrap();
            wanted.extend([rows, y, g.gradients(loss, &[x]).unwrap()[0]]);
        }
        let want = reference::run(&g, &given, &wanted).unwrap();
        for results in run(&g, &given, &wanted) {
            assert_eq!(results[0], results[3], "{stored}: rows");
            for (i, want) in want.iter().enumerate() {
                let error = nmse(&results[i], &want.data);
                assert!(error < 1e-12, "{stored}: result {i}: NMSE {error:.1e}");
            }
        }
    }
}

/// With one part the graph is that of the plain op, to the letter.
#[test]
fn one_part_gives_the_plain_op() {
    let matrix = Packed { stored: Stored::Q4_0, n: 71, k: D };
    let build = |parts: bool| -> Result<String> {
        let mut g = Graph::new();
        let (ids, x) = (g.input("ids", TensorType::u32([5]))?, g.input("x", TensorType::f32([5, D]))?);
        let (table, w) = (g.param("table", [71, D])?, g.input("w", matrix.ty())?);
        if parts {
            g.embedding_parts("a", &[table], ids)?;
            g.matmul_nt_parts("b", x, &[table])?;
            g.packed_rows_parts("c", &[(w, matrix)], ids)?;
            g.packed_linear_parts("d", x, &[(w, matrix)])?;
        } else {
            g.embedding("a", table, ids)?;
            g.matmul_nt("b", x, table)?;
            g.packed_rows("c", w, matrix, ids)?;
            g.packed_linear("d", x, w, matrix, None)?;
        }
        Ok(g.to_string())
    };
    assert_eq!(build(true).unwrap(), build(false).unwrap());
}

/// GPT-2's table does not fit the bindings that WebGPU promises; in parts it does.
#[test]
fn a_table_that_no_binding_holds_is_planned_in_parts() {
    let portable = Profile::portable(AdapterClass::Gpu);
    let build = |max_bytes: u64| -> Result<Plan> {
        let mut g = Graph::new();
        let rows = split_rows(50_257, 4 * 768, max_bytes)?;
        let tables = rows.iter().enumerate().map(|(i, &n)| g.param(&format!("table.{i}"), [n, 768]));
        let tables = tables.collect::<Result<Vec<_>>>()?;
        let ids = g.input("ids", TensorType::u32([8]))?;
        let x = g.embedding_parts("embed", &tables, ids)?;
        let logits = g.matmul_nt_parts("head", x, &tables)?;
        Plan::new(&g, &[logits], &portable)
    };
    assert!(build(u64::MAX).unwrap_err().to_string().contains("`table.0`"));
    let plan = build(portable.max_tensor_bytes()).unwrap();
    let steps: Vec<&str> = plan.steps().iter().map(|s| s.name()).collect();
    assert_eq!(steps, ["embed.part0", "embed.part1", "embed", "head.part0", "head.part1", "head"]);
}

const PACKED: Packed = Packed { stored: Stored::Q8_0, n: 71, k: D };

/// How a head makes logits of what is `[2, 25, D]`.
type Head = fn(&mut Graph, Value) -> Result<Value>;

/// A product with one table, with one in parts, with one that is packed, and with a low-rank one beside it.
const HEADS: [(&str, Head); 4] = [
    ("plain", |g, x| {
        let table = g.param("table", [71, D])?;
        g.matmul_nt("logits", x, table)
    }),
    ("parts", |g, x| {
        let tables = [g.param("a", [36, D])?, g.param("b", [35, D])?];
        g.matmul_nt_parts("logits", x, &tables)
    }),
    ("packed", |g, x| {
        let w = g.input("w", PACKED.ty())?;
        g.packed_linear("logits", x, w, PACKED, None)
    }),
    ("low rank", |g, x| {
        let [table, a, b] = [g.param("table", [71, D])?, g.param("a", [D, 3])?, g.param("b", [3, 71])?];
        let (base, inner) = (g.matmul_nt("base", x, table)?, g.matmul("inner", x, a)?);
        let delta = g.matmul("delta", inner, b)?;
        let delta = g.scale("scaled", delta, 0.5)?;
        g.residual_add("logits", base, delta)
    }),
];

/// A loss with a weight of its own, and its gradients. Logits take 14,200 bytes.
fn loss_of(head: Head, max_bytes: usize) -> Result<(Graph, Vec<Value>)> {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([2, 25, D]))?;
    let hidden = g.scale("hidden", x, 0.3)?;
    let logits = head(&mut g, hidden)?;
    let targets = g.input("targets", TensorType::u32([2, 25]))?;
    let loss = g.cross_entropy_in_chunks("loss", logits, targets, max_bytes)?;
    let weight = g.input("weight", TensorType::f32([1]))?;
    let loss = g.mul("weighted", loss, weight)?;
    let wrt: Vec<Value> = [x].into_iter().chain(g.params()).collect();
    let gradients = g.gradients(loss, &wrt)?;
    Ok((g, [loss].into_iter().chain(gradients).collect()))
}

/// Data for all inputs and parameters.
fn given(g: &Graph) -> HashMap<Value, Array> {
    let data = |v: Value| match (g.name(v), g.ty(v).shape.clone()) {
        // Some are no class, so their rows do not count.
        ("targets", shape) => Array::new(shape, (0..50).map(|i| f64::from(i * i % 90)).collect()),
        ("w", _) => Case::new("w", TargetShare { classes: 1 }, &[]).packed(PACKED).data(9).remove(0),
        (name, shape) => random_array(&shape, name.len() as u64),
    };
    let names = ["x", "targets", "weight", "w", "table", "a", "b"];
    names.into_iter().filter_map(|name| g.find(name)).map(|v| (v, data(v))).collect()
}

#[test]
fn losses_in_chunks_are_those_of_all_logits() {
    for (name, head) in HEADS {
        let (whole, wanted) = loss_of(head, usize::MAX).unwrap();
        let wanted = reference::run(&whole, &given(&whole), &wanted).unwrap();
        for rows in [32, 17, 1] {
            let (g, outputs) = loss_of(head, 4 * 71 * rows).unwrap();
            let got = reference::run(&g, &given(&g), &outputs).unwrap();
            for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                let worst = got.data.iter().zip(&wanted.data).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-12, "{name}, {rows} rows, {i}: {worst}");
            }
        }
        let (g, outputs) = loss_of(head, 4 * 71 * 17).unwrap();
        for profile in profiles() {
            let plan = Plan::new(&g, &outputs, &profile).unwrap();
            let step = |name: &str| plan.steps().iter().position(|step| step.name() == name).unwrap();
            let slot = |name: &str| plan.steps()[step(name)].outputs()[0].0;
            // One chunk after the other, each with its gradient in place.
            for (first, next) in [(34, Some(17)), (17, Some(0)), (0, None)] {
                assert_eq!(slot(&format!("logits.rows{first}")), slot(&format!("loss.rows{first}.grad")), "{plan}");
                let after = next.map(|next| step(&format!("logits.rows{next}")));
                assert!(after.is_none_or(|after| after > step(&format!("loss.rows{first}.grad"))), "{plan}");
            }
            let large =
                |step: &Step| step.outputs().iter().any(|(_, ty)| ty.shape.cols() == 71 && ty.shape.rows() > 32);
            assert!(!plan.steps().iter().any(large), "{plan}");
        }
        for results in run(&g, &given(&g), &outputs) {
            for ((got, wanted), &value) in results.iter().zip(&wanted).zip(&outputs) {
                assert!(nmse(got, &wanted.data) < 1e-7, "{name}: {}", g.name(value));
            }
        }
    }
}

/// What cannot be taken by rows, and what fits, is a plain cross-entropy.
#[test]
fn only_large_logits_are_in_chunks() {
    let count = |max_bytes: usize, head: Head| {
        let (g, _) = loss_of(head, max_bytes).unwrap();
        let chunk = |name: &str| name.strip_prefix("loss.rows").is_some_and(|first| first.parse::<usize>().is_ok());
        g.nodes().iter().filter(|node| chunk(&node.name)).count()
    };
    let plain = HEADS[0].1;
    assert_eq!((count(4 * 71 * 50, plain), count(4 * 71 * 49, plain), count(4 * 71 * 7, plain)), (0, 2, 8));
    let normed: Head = |g, x| {
        let table = g.param("table", [D, 71])?;
        let logits = g.matmul("product", x, table)?;
        g.softmax("logits", logits)
    };
    assert_eq!(count(4 * 71 * 7, normed), 0);
}

#[test]
fn matrices_are_split_into_whole_rows() {
    let split = |rows, row_bytes, max| split_rows(rows, row_bytes, max).unwrap();
    assert_eq!(split(10, 16, 160), [10]);
    assert_eq!(split(10, 16, 159), [5, 5]);
    assert_eq!(split(10, 16, 16), [1; 10]);
    assert!(split(0, 16, 16).is_empty());
    for (rows, row_bytes, max) in [(1000, 34, 1 << 12), (50_257, 3072, 128 << 20), (129, 100, 6400), (65, 1, 64)] {
        let parts = split(rows, row_bytes, max);
        assert_eq!(parts.iter().sum::<usize>(), rows);
        assert!(parts.iter().all(|n| (n * row_bytes).next_multiple_of(16) as u64 <= max), "{parts:?}");
        assert!(parts[..parts.len() - 1].iter().all(|n| n % 64 == 0), "{parts:?}");
        assert_eq!(parts.len(), rows.div_ceil(max as usize / row_bytes / 64 * 64), "{parts:?}");
    }
}

#[test]
fn parts_that_do_not_fit_each_other_are_errors() {
    fn expect<T>(result: Result<T>, words: &[&str]) {
        let e = result.err().expect("accepted").to_string();
        words.iter().for_each(|w| assert!(e.contains(w), "no {w:?} in: {e}"));
    }
    let mut g = Graph::new();
    let ids = g.input("ids", TensorType::u32([5])).unwrap();
    let x = g.input("x", TensorType::f32([5, 8])).unwrap();
    let (a, b) = (g.param("a", [4, 8]).unwrap(), g.param("b", [4, 9]).unwrap());
    let flat = g.param("flat", [8]).unwrap();
    let matrix = Packed { stored: Stored::Q8_0, n: 3, k: 64 };
    let w = g.input("w", matrix.ty()).unwrap();
    expect(g.embedding_parts("e", &[], ids), &["`e`", "at least one part"]);
    expect(g.packed_rows_parts("e", &[], ids), &["`e`", "at least one part"]);
    expect(g.matmul_nt_parts("e", x, &[]), &["`e`", "at least one part"]);
    expect(g.packed_linear_parts("e", x, &[]), &["`e`", "at least one part"]);
    expect(g.embedding_parts("e", &[a, b], ids), &["`e`", "[5, 8]", "[5, 9]"]);
    expect(g.embedding_parts("e", &[a, flat], ids), &["`e.part1`", "[vocab, d]", "[8]"]);
    expect(g.matmul_nt_parts("y", x, &[a, b]), &["`y.part1`", "8", "9"]);
    expect(g.packed_linear_parts("y", x, &[(w, matrix), (w, matrix)]), &["`y.part0`", "64", "[5, 8]"]);
    expect(
        g.packed_rows_parts("r", &[(w, matrix), (w, Packed { n: 4, ..matrix })], ids),
        &["`r.part1`", "n: 4", "u32"],
    );
    expect(Graph::new().embedding_parts("e", &[a, b], ids), &["not a value of this graph"]);
    expect(split_rows(5, 100, 99), &["100 needed", "99 allowed"]);
    expect(Packed { n: 5, ..matrix }.split(50), &["68 needed", "50 allowed"]);
    let op = throughline::ops::embedding::Embedding { first: u32::MAX as usize };
    expect(g.op1("far", op, &[a, ids]), &["`far`", "4 rows", "4294967295"]);
}
