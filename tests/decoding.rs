//! Attention over growing caches, in chunks and token by token, equals attention over everything at once.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles};
use throughline::ops::attention::Attention;
use throughline::ops::random_array;
use throughline::ops::rope::{Rope, Scaling};
use throughline::reference::{self, nmse};
use throughline::{ExecOptions, Executable, Graph, Plan, Profile, Tensor, TensorType, Value};

const CAPACITY: usize = 21;
const WIDTH: usize = 2 * 12;
const OP: Attention = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };
const ROPE: Rope =
    Rope { heads: 2, theta: 10_000.0, interleaved: false, inverse: false, has_start: true, scaling: Scaling::None };

/// A step for `time` new rows of each of `batch` sequences: q, k and v, where they start, the output.
struct Step {
    exec: Executable,
    qkv: [Value; 3],
    starts: Value,
    o: Value,
}

impl Step {
    fn new([batch, time]: [usize; 2], profile: &Profile, caches: &[Tensor; 2]) -> Step {
        let mut g = Graph::new();
        let qkv = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([batch, time, WIDTH])).unwrap());
        let starts = g.input("starts", TensorType::u32([batch])).unwrap();
        let states = ["keys", "values"].map(|n| g.state(n, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap());
        let [q, k] = [0, 1].map(|i| g.rope_from("rope", qkv[i], starts, ROPE).unwrap());
        let write = |g: &mut Graph, rows, cache| g.cache_write("write", rows, starts, cache).unwrap();
        let written = [write(&mut g, k, states[0]), write(&mut g, qkv[2], states[1])];
        let o = g.attention_cached("o", q, written, starts, OP).unwrap();
        (0..2).for_each(|i| g.store(written[i], states[i]).unwrap());
        let plan = Plan::new(&g, &[o], profile).unwrap();
        // Writing a row does not move the cache.
        assert!(plan.final_copies().is_empty() && plan.steps().iter().all(|s| s.copies().is_empty()), "{plan}");
        let bindings = states.into_iter().zip(caches.iter().cloned()).collect();
        let options = ExecOptions::bound(bindings);
        Step { exec: Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap(), qkv, starts, o }
    }

    /// Rows of q, k and v.
    fn run(&self, rows: &[Vec<f32>; 3], starts: &[u32]) -> Vec<f32> {
        self.qkv.iter().zip(rows).for_each(|(&v, rows)| self.exec.write(v, rows).unwrap());
        self.exec.write(self.starts, starts).unwrap();
        self.exec.submit().unwrap();
        self.exec.read_blocking(self.o).unwrap()
    }
}

/// q, k and v of `batch` whole sequences.
fn data(batch: usize) -> [Vec<f32>; 3] {
    let array = |seed| random_array(&[batch, CAPACITY, WIDTH].into(), seed);
    [1, 2, 3].map(|seed| array(seed).data.iter().map(|&x| x as f32).collect())
}

/// Attention of each whole sequence to itself, by the reference.
fn whole(batch: usize) -> Vec<f64> {
    let mut g = Graph::new();
    let all = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap());
    let [q, k] = [0, 1].map(|i| g.rope("rope", all[i], ROPE).unwrap());
    let o = g.attention("o", q, k, all[2], OP).unwrap();
    let arrays = data(batch).map(|d| {
        let data = d.iter().map(|&x| f64::from(x)).collect();
        reference::Array::new([batch, CAPACITY, WIDTH], data)
    });
    let given: HashMap<Value, _> = all.into_iter().zip(arrays).collect();
    reference::run(&g, &given, &[o]).unwrap().remove(0).data
}

/// Rows `from .. from + n` of one sequence, for each of q, k and v.
fn rows(data: &[Vec<f32>; 3], sequence: usize, from: usize, n: usize) -> [Vec<f32>; 3] {
    let first = sequence * CAPACITY + from;
    [0, 1, 2].map(|i: usize| data[i][first * WIDTH..(first + n) * WIDTH].to_vec())
}

/// What a cache holds behind the rows written so far must not matter: here it is no number.
fn caches(batch: usize) -> [Tensor; 2] {
    ["keys", "values"].map(|name| {
        let cache = Tensor::zeros(gpu(), name, TensorType::f32([batch, CAPACITY, WIDTH])).unwrap();
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e6];
        let fill: Vec<f32> = odd.iter().copied().cycle().take(batch * CAPACITY * WIDTH).collect();
        cache.write(gpu(), &fill).unwrap();
        cache
    })
}

#[test]
fn a_growing_cache_gives_what_whole_attention_gives() {
    let (data, want) = (data(1), whole(1));
    for profile in profiles() {
        let caches = caches(1);
        let [chunk, single] = [7, 1].map(|time| Step::new([1, time], &profile, &caches));
        let mut got = chunk.run(&rows(&data, 0, 0, 7), &[0]);
        got.extend(chunk.run(&rows(&data, 0, 7, 7), &[7]));
        for t in 14..CAPACITY {
            got.extend(single.run(&rows(&data, 0, t, 1), &[t as u32]));
        }
        let error = nmse(&got, &want);
        assert!(error < 1e-12, "{profile:?}: {error}");
    }
}

/// Four sequences of which each step takes some rows, and a step that is past the end of two of them.
#[test]
fn a_batch_of_ragged_sequences_gives_what_each_gives_alone() {
    const BATCH: usize = 4;
    let (data, want) = (data(BATCH), whole(BATCH));
    for profile in profiles() {
        let caches = caches(BATCH);
        let steps = [5, 1].map(|time| (time, Step::new([BATCH, time], &profile, &caches)));
        let mut lengths = [0usize; BATCH];
        // How many of a step's rows stand for a token; the others are written, and written over later.
        let taken = [(0, [5, 3, 0, 1]), (1, [1, 1, 1, 0]), (0, [5, 5, 2, 5]), (0, [5, 1, 5, 0]), (0, [5, 5, 5, 5])];
        for (which, taken) in taken.into_iter().chain([(1, [0, 1, 1, 1]); 4]) {
            let (time, step) = &steps[which];
            let mut given: [Vec<f32>; 3] = Default::default();
            for (b, &length) in lengths.iter().enumerate() {
                let real = rows(&data, b, length, taken[b]);
                for (given, real) in given.iter_mut().zip(real) {
                    given.extend(real);
                    given.resize(given.len() + (time - taken[b]) * WIDTH, 9.0);
                }
            }
            let got = step.run(&given, &lengths.map(|n| n as u32));
            for b in 0..BATCH {
                let (at, n) = (b * CAPACITY + lengths[b], taken[b] * WIDTH);
                if n > 0 {
                    let error = nmse(&got[b * time * WIDTH..][..n], &want[at * WIDTH..][..n]);
                    assert!(error < 1e-12, "{profile:?}: sequence {b} from {}: {error}", lengths[b]);
                }
                lengths[b] += taken[b];
            }
        }
        assert_eq!(lengths, [CAPACITY, 19, 17, 15]);
    }
}
