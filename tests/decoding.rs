//! Attention to a cache that grows, in chunks and token by token, against attention to everything.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{gpu, profiles};
use throughline::ops::attention::Attention;
use throughline::ops::random_array;
use throughline::reference::{self, nmse};
use throughline::{ExecOptions, Executable, Graph, Plan, Profile, Tensor, TensorType, Value};

const CAPACITY: usize = 21;
const WIDTH: usize = 2 * 12;
const OP: Attention = Attention { heads: 2, kv_heads: 2, causal: true, scale: None };

/// A step for `time` new rows: q, k and v, where they start, the output, and the caches.
struct Step {
    exec: Executable,
    qkv: [Value; 3],
    start: Value,
    o: Value,
}

impl Step {
    fn new(time: usize, profile: &Profile, caches: &[Tensor; 2]) -> Step {
        let mut g = Graph::new();
        let qkv = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([1, time, WIDTH])).unwrap());
        let start = g.input("start", TensorType::u32([1])).unwrap();
        let states = ["keys", "values"].map(|n| g.state(n, TensorType::f32([1, CAPACITY, WIDTH])).unwrap());
        let written = [0, 1].map(|i| g.cache_write(&format!("write{i}"), qkv[1 + i], start, states[i]).unwrap());
        let o = g.attention_cached("o", qkv[0], written, start, OP).unwrap();
        (0..2).for_each(|i| g.store(written[i], states[i]).unwrap());
        let plan = Plan::new(&g, &[o], profile).unwrap();
        // Writing a row does not move the cache.
        assert!(plan.final_copies.is_empty() && plan.steps.iter().all(|s| s.copies.is_empty()), "{plan}");
        let bindings = states.into_iter().zip(caches.iter().cloned()).collect();
        let options = ExecOptions { bindings, ..Default::default() };
        Step { exec: Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap(), qkv, start, o }
    }

    fn run(&self, rows: [&[f32]; 3], start: usize) -> Vec<f32> {
        self.qkv.iter().zip(rows).for_each(|(&v, rows)| self.exec.write(v, rows).unwrap());
        self.exec.write(self.start, &[start as u32]).unwrap();
        self.exec.submit();
        self.exec.read_blocking(self.o).unwrap()
    }
}

#[test]
fn a_growing_cache_gives_what_whole_attention_gives() {
    let mut g = Graph::new();
    let all = ["q", "k", "v"].map(|n| g.input(n, TensorType::f32([1, CAPACITY, WIDTH])).unwrap());
    let o = g.attention("o", all[0], all[1], all[2], OP).unwrap();
    let data = [1, 2, 3].map(|seed| random_array(&[1, CAPACITY, WIDTH].into(), seed));
    let given: HashMap<Value, _> = all.into_iter().zip(data.clone()).collect();
    let want = reference::run(&g, &given, &[o]).unwrap().remove(0).data;
    let data = data.map(|a| a.data.iter().map(|&x| x as f32).collect::<Vec<_>>());
    for profile in profiles() {
        // What the cache holds behind the rows written so far must not matter.
        let caches = ["keys", "values"].map(|name| {
            let cache = Tensor::zeros(gpu(), name, TensorType::f32([1, CAPACITY, WIDTH])).unwrap();
            cache.write(gpu(), &[1e6; CAPACITY * WIDTH]).unwrap();
            cache
        });
        let (chunk, single) = (Step::new(7, &profile, &caches), Step::new(1, &profile, &caches));
        let rows = |from: usize, n: usize| [0, 1, 2].map(|i: usize| &data[i][from * WIDTH..(from + n) * WIDTH]);
        let mut got = chunk.run(rows(0, 7), 0);
        got.extend(chunk.run(rows(7, 7), 7));
        for t in 14..CAPACITY {
            got.extend(single.run(rows(t, 1), t));
        }
        let error = nmse(&got, &want);
        assert!(error < 1e-12, "{profile:?}: {error}");
    }
}
