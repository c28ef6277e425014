//! Tokens drawn from the candidates that the GPU finds, against draws from all logits; and what the tolerance of the op
//! table would hide: exact values and ids, also of unusual floats.

mod common;

use std::sync::Arc;

use common::{gpu, profiles};
use throughline::decode::sample::{Candidates, Sampling};
use throughline::rng::Rng;
use throughline::{ExecOptions, Executable, Graph, Plan, Profile, TensorType};

/// What the op gives for rows of `n` logits: values, ids and lse.
fn top_k(profile: &Profile, logits: &[f32], n: usize, temperature: f32, k: usize) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([logits.len() / n, n])).unwrap();
    let t = g.input("temperature", TensorType::f32([1])).unwrap();
    let [values, ids, lse] = g.top_k("top", x, t, k).unwrap();
    let plan = Plan::new(&g, &[values, ids, lse], profile).unwrap();
    let exec = Executable::new_blocking(gpu(), Arc::new(plan), ExecOptions::default()).unwrap();
    exec.write(x, logits).unwrap();
    exec.write(t, &[temperature]).unwrap();
    exec.submit().unwrap();
    (exec.read_blocking(values).unwrap(), exec.read_blocking(ids).unwrap(), exec.read_blocking(lse).unwrap())
}

/// Rows that differ in how far apart logits are, with many equal ones in every other.
fn rows(count: usize, n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(&[seed]);
    let row = |i: usize| {
        let (spread, step) = ([0.3, 2.0, 6.0][i % 3], if i.is_multiple_of(2) { 0.0 } else { 0.5 });
        let logit = |_| {
            let x = spread * rng.normal() as f32;
            if step > 0.0 { (x / step).round() * step } else { x }
        };
        (0..n).map(logit).collect::<Vec<f32>>()
    };
    (0..count).flat_map(row).collect()
}

#[test]
fn candidates_are_exact_for_odd_floats_too() {
    const N: usize = 2500;
    let odd =
        [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-45, -1e-45, f32::MAX, f32::MIN, 1.0];
    let mut rng = Rng::new(&[5]);
    let mut logits: Vec<f32> = (0..3 * N).map(|_| odd[rng.below(11) as usize]).collect();
    // Rows of little else than what masks leave, and rows without any number.
    logits[N..2 * N].iter_mut().for_each(|x| *x = if *x == 1.0 { -0.0 } else { f32::NEG_INFINITY });
    logits[2 * N..].iter_mut().for_each(|x| *x = if *x == 1.0 { f32::NAN } else { f32::NEG_INFINITY });
    // One NaN far behind, and none.
    logits.extend((0..2 * N).map(|i| if i == N - 1 { f32::NAN } else { (i % 97) as f32 - 150.0 }));
    for profile in profiles() {
        for k in [1, 33, 64] {
            let (values, ids, lse) = top_k(&profile, &logits, N, 0.7, k);
            assert_eq!(lse.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [true, false, true, true, false], "k {k}");
            for (r, row) in logits.chunks(N).enumerate() {
                let row: Vec<f32> = row.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x }).collect();
                let mut order: Vec<usize> = (0..N).collect();
                order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                let bits = |x: &f32| x.to_bits();
                let want: Vec<(u32, u32)> = order[..k].iter().map(|&i| (bits(&row[i]), i as u32)).collect();
                let got = values.iter().map(bits).zip(ids.iter().copied()).skip(r * k).take(k);
                assert_eq!(got.collect::<Vec<_>>(), want, "row {r}, k {k}, {profile:?}");
            }
        }
    }
}

/// All ways to sample at one temperature.
fn samplings(temperature: f32) -> Vec<Sampling> {
    let top_ks = [0, 1, 5, 64, 65, 300, 5000];
    let top_ps = [1.0, 0.95, 0.5, 0.01];
    let all = top_ks.into_iter().flat_map(|top_k| top_ps.map(|top_p| (top_k, top_p)));
    all.map(|(top_k, top_p)| Sampling { temperature, top_k, top_p, seed: 9 }).collect()
}

#[test]
fn draws_from_candidates_are_draws_from_all_logits() {
    const N: usize = 2003;
    const COUNT: usize = 24;
    for (t, temperature) in [0.0, 0.05, 0.8, 1.0, 3.0].into_iter().enumerate() {
        let logits = rows(COUNT, N, 40 + t as u64);
        for profile in profiles() {
            let (values, ids, lse) = top_k(&profile, &logits, N, temperature, 64);
            let (mut decided, mut draws) = (0, 0);
            for (r, row) in logits.chunks(N).enumerate() {
                let of_row = r * 64..(r + 1) * 64;
                let candidates = Candidates { values: &values[of_row.clone()], ids: &ids[of_row], lse: lse[r] };
                if temperature > 0.0 {
                    let top = f64::from(candidates.values[0]);
                    let weight = |&x: &f32| ((f64::from(x) - top) / f64::from(temperature)).exp();
                    let exact = row.iter().map(weight).sum::<f64>().ln();
                    // A hundredth of what a draw allows for.
                    assert!((exact - f64::from(lse[r])).abs() < 1e-6, "{exact} but {}, {profile:?}", lse[r]);
                }
                for sampling in samplings(temperature) {
                    for n in 0..4 {
                        let few = sampling.draw_from(&candidates, n).unwrap();
                        let all = sampling.draw(row, n).unwrap();
                        assert!(few.is_none_or(|id| id == all), "{few:?}, not {all}: row {r}, {n}, {sampling:?}");
                        let always = temperature == 0.0 || (1..=64).contains(&sampling.top_k);
                        assert!(few.is_some() || !always, "row {r}, {n}, {sampling:?}");
                        decided += usize::from(few.is_some());
                        draws += 1;
                    }
                }
            }
            println!("at {temperature}: {decided} of {draws} draws need no more than 64 candidates");
            assert!(decided > draws / 2, "at {temperature}: {decided} of {draws}");
        }
    }
}
