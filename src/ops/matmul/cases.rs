//! Test and benchmark cases.

use super::product::Matmul;
use crate::ops::cases::Case;

pub(super) fn cases() -> Vec<Case> {
    let plain = Matmul::default();
    let mut cases = Vec::new();
    // (m, n, k): every combination of transposes on shapes that fit no tile, and one that fits.
    for (m, n, k) in
        [(1, 1, 1), (127, 1, 5), (1, 130, 127), (17, 67, 33), (64, 64, 32), (20, 36, 1757), (4, 68, 13), (7, 5, 8)]
    {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let a = if ta { [k, m] } else { [m, k] };
            let b = if tb { [n, k] } else { [k, n] };
            let form = format!("{m}x{n}x{k} {}{}", if ta { 't' } else { 'n' }, if tb { 't' } else { 'n' });
            let op = Matmul { transpose_a: ta, transpose_b: tb, ..plain };
            cases.push(Case::new(form, op, &[&a, &b]));
        }
    }
    // Larger than the largest tile, in forms that together load and store in all ways.
    for (m, n, k, ta, tb) in [(130, 132, 20, false, false), (132, 129, 36, true, true), (131, 150, 18, false, true)] {
        let op = Matmul { transpose_a: ta, transpose_b: tb, ..plain };
        let (a, b) = (if ta { [k, m] } else { [m, k] }, if tb { [n, k] } else { [k, n] });
        cases.push(Case::new(format!("{m}x{n}x{k}"), op, &[&a, &b]));
    }
    let bias = Matmul { bias: true, ..plain };
    cases.push(Case::new("bias", bias, &[&[3, 5, 24], &[24, 20], &[20]]));
    let add = Matmul { accumulate: true, ..plain };
    cases.push(Case::new("accumulate", add, &[&[3, 5, 24], &[24, 20], &[3, 5, 20]]));
    let both = Matmul { bias: true, accumulate: true, ..plain };
    cases.push(Case::new("bias, accumulate", both, &[&[65, 24], &[24, 33], &[33], &[65, 33]]));
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let op = Matmul { batch: true, transpose_a: ta, transpose_b: tb, ..plain };
        let a: &[usize] = if ta { &[2, 3, 12, 9] } else { &[2, 3, 9, 12] };
        let b: &[usize] = if tb { &[2, 3, 17, 12] } else { &[2, 3, 12, 17] };
        cases.push(Case::new(format!("batch {ta} {tb}"), op, &[a, b]));
    }
    // More of k than y has columns and rows: k is split.
    for (m, n, k) in [(60, 68, 3000), (33, 35, 2061)] {
        let split = |op| Case::new(format!("{m}x{n}x{k} split"), op, &[&[k, m], &[k, n]]);
        cases.push(split(Matmul { transpose_a: true, ..plain }));
        let op = Matmul { transpose_a: true, bias: true, accumulate: true, ..plain };
        cases.push(Case::new(format!("{m}x{n}x{k} split, bias, accumulate"), op, &[&[k, m], &[k, n], &[n], &[m, n]]));
    }
    let batch = Matmul { batch: true, ..plain };
    cases.push(Case::new("batch split", batch, &[&[2, 36, 3000], &[2, 3000, 20]]));
    cases.push(Case::new("few split", plain, &[&[2, 4100], &[4100, 7]]));
    cases.push(Case::new("few nt split", Matmul { transpose_b: true, ..plain }, &[&[3, 2061], &[6, 2061]]));
    // One column or two of an invocation.
    for (n, k) in [(24, 40), (200, 40), (323, 13)] {
        cases.push(Case::new(format!("few {n}x{k}"), plain, &[&[2, k], &[k, n]]));
        let nt = Matmul { transpose_b: true, ..plain };
        cases.push(Case::new(format!("few {n}x{k} nt"), nt, &[&[3, k], &[n, k]]));
    }
    let sums = Matmul { transpose_a: true, column_sums: true, ..plain };
    for (m, n, k) in [(9, 7, 5), (70, 132, 50), (60, 68, 3000), (33, 35, 2061)] {
        let both = |op, name: &str, shapes: &[&[usize]]| {
            let case = Case::new(format!("{m}x{n}x{k} column sums{name}"), op, shapes);
            Case { main_outputs: 2, ..case }
        };
        cases.push(both(sums, "", &[&[k, m], &[k, n]]));
        let add = Matmul { accumulate: true, accumulate_sums: true, ..sums };
        cases.push(both(add, ", accumulate", &[&[k, m], &[k, n], &[m, n], &[n]]));
    }
    let few = Matmul { transpose_a: false, bias: true, accumulate_sums: true, ..sums };
    cases.push(Case { main_outputs: 2, ..Case::new("few, column sums", few, &[&[3, 20], &[20, 6], &[6], &[6]]) });
    // Enough rows for packing.
    cases.push(Case::new("tall batch", Matmul { batch: true, ..plain }, &[&[2, 129, 9], &[2, 9, 17]]));
    // Nothing but sums is rounded: those of 3,000 products are off by 1e-12.
    cases.into_iter().map(|case| case.matrix_tolerance(1e-11)).collect()
}

pub(super) fn bench() -> Vec<Case> {
    let square = |n: usize| Case::new(format!("{n}"), Matmul::default(), &[&[n, n], &[n, n]]);
    let op = |ta: bool, tb: bool| Matmul { transpose_a: ta, transpose_b: tb, ..Matmul::default() };
    let form =
        |name: &str, ta: bool, tb: bool| Case::new(format!("512 {name}"), op(ta, tb), &[&[512, 512], &[512, 512]]);
    vec![
        square(256),
        square(512),
        square(1024),
        square(2048),
        form("nt", false, true),
        form("tn", true, false),
        form("tt", true, true),
        Case::new("509x1021x383", op(false, false), &[&[509, 383], &[383, 1021]]),
        // Decoding: one row, with weights laid out as in a linear layer and as in a tied output projection.
        Case::new("1x1536x576", op(false, false), &[&[1, 576], &[576, 1536]]),
        Case::new("1x576x1536 nt", op(false, true), &[&[1, 1536], &[576, 1536]]),
        Case::new("1x32768x768 nt", op(false, true), &[&[1, 768], &[32768, 768]]),
    ]
}
