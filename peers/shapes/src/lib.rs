//! What the peers have in common: the shapes of the measured tasks, their data, and how a measurement is made and
//! reported.
//!
//! A program prints one JSON object on the last line of its output; `cargo xtask peers` reads it.

use std::time::{Duration, Instant};

/// A GPT to train: pre-norm, learned positions, GELU, as nanoGPT's.
#[derive(Clone, Copy, Debug)]
pub struct Gpt {
    pub vocab: usize,
    pub layers: usize,
    pub d_model: usize,
    pub heads: usize,
    pub context: usize,
    pub batch: usize,
}

/// A task that several libraries run.
#[derive(Clone, Copy, Debug)]
pub enum Task {
    /// The product of two square matrices of f32.
    Matmul(usize),
    /// A step of training with AdamW.
    Train(Gpt),
    /// A step of training SmolLM2-135M, all of it in f32, on one text of so many tokens.
    SmolLm2(usize),
}

impl Task {
    /// The task of this name.
    pub fn named(name: &str) -> Option<Task> {
        let gpt = |layers, d_model, heads, context, batch| {
            Task::Train(Gpt { vocab: 65, layers, d_model, heads, context, batch })
        };
        Some(match name {
            "matmul-512" => Task::Matmul(512),
            "matmul-1024" => Task::Matmul(1024),
            "matmul-4096" => Task::Matmul(4096),
            "train-L4-d128" => gpt(4, 128, 4, 64, 12),
            "train-L6-d384" => gpt(6, 384, 6, 256, 4),
            "smollm2-32" => Task::SmolLm2(32),
            _ => return None,
        })
    }
}

/// What the command line asks for: `TASK SECONDS`.
pub fn arguments() -> (String, Task, Duration) {
    let mut args = std::env::args().skip(1);
    let (name, seconds) = (args.next().unwrap_or_default(), args.next().and_then(|s| s.parse().ok()));
    match (Task::named(&name), seconds) {
        (Some(task), Some(seconds)) => (name, task, Duration::from_secs_f64(seconds)),
        _ => {
            eprintln!("usage: TASK SECONDS, with a task such as matmul-512, train-L4-d128 or smollm2-32");
            std::process::exit(2)
        }
    }
}

/// Reports that this library has no such task.
pub fn not_offered(library: &str, task: &str) -> ! {
    println!("{}", serde_json::json!({ "library": library, "task": task, "offered": false }));
    std::process::exit(0)
}

/// Runs that are not counted: autotuning libraries measure their variants in the first ones.
const WARM_UPS: usize = 3;

/// Runs `run`, which must end with the device idle, for some time, and reports how long a run takes.
///
/// `check` is what the last run computed, for a reader to see that it did: a loss, or an element of a product.
pub fn measure<T>(library: &str, task: &str, time: Duration, mut run: impl FnMut() -> T, check: impl FnOnce(T) -> f64) {
    let begin = Instant::now();
    run();
    let first = begin.elapsed();
    let (mut seconds, mut processor) = (vec![], vec![cpu_seconds()]);
    let begin = Instant::now();
    let last = loop {
        let start = Instant::now();
        let result = run();
        seconds.push(start.elapsed().as_secs_f64());
        processor.push(cpu_seconds());
        if enough(seconds.len(), begin.elapsed(), time) {
            break result;
        }
    };
    let warm = warm_ups(seconds.len());
    let cpu = (processor[seconds.len()] - processor[warm]) / (seconds.len() - warm) as f64;
    let mut seconds = seconds.split_off(warm);
    seconds.sort_by(f64::total_cmp);
    let runs = seconds.len();
    let report = serde_json::json!({
        "library": library,
        "task": task,
        "offered": true,
        "runs": runs,
        "first_s": first.as_secs_f64(),
        "median_s": seconds[runs / 2],
        "fastest_s": seconds[0],
        "cpu_s": cpu,
        "check": check(last),
    });
    println!("{report}");
}

/// Whether so many runs, after the first, will do: as many are counted as are not, or they took four times as long as
/// they should.
fn enough(runs: usize, took: Duration, time: Duration) -> bool {
    took >= 4 * time || (took >= time && runs >= 2 * WARM_UPS)
}

/// How many of so many runs are not counted. At least as many are.
fn warm_ups(runs: usize) -> usize {
    WARM_UPS.min(runs / 2)
}

/// Processor time of this process, where the system says: on Linux, in steps of 10 ms. On a software adapter it is
/// steadier than time by the clock.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted after the name, which may hold spaces.
    let fields: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    fields.get(11..13).map_or(0.0, |times| times.iter().sum::<f64>() / 100.0)
}

/// Numbers in -1 to 1 that any library can be given.
pub fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

impl Gpt {
    /// Tokens and targets of a step: a sequence in which each token follows from the one before.
    pub fn batch(&self, step: u64) -> (Vec<u32>, Vec<u32>) {
        let (mut tokens, mut targets) = (vec![], vec![]);
        for row in 0..self.batch {
            let first = (step as usize * 31 + row * 17) % self.vocab;
            let follows = |token: usize| (3 * token + 7) % self.vocab;
            let sequence: Vec<usize> =
                std::iter::successors(Some(first), |&t| Some(follows(t))).take(self.context + 1).collect();
            tokens.extend(sequence[..self.context].iter().map(|&t| t as u32));
            targets.extend(sequence[1..].iter().map(|&t| t as u32));
        }
        (tokens, targets)
    }
}

/// Size of SmolLM2's vocabulary.
pub const SMOLLM2_VOCAB: usize = 49_152;

/// Tokens and targets for SmolLM2, spread over its vocabulary.
pub fn smollm2_batch(tokens: usize) -> (Vec<u32>, Vec<u32>) {
    let ids = |from: usize| (from..from + tokens).map(|i| (i * 997 % SMOLLM2_VOCAB) as u32).collect();
    (ids(0), ids(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs until it is enough, and those that are counted, if each takes so long.
    fn runs(each: f64) -> (usize, usize) {
        let enough = |&n: &usize| enough(n, Duration::from_secs_f64(each * n as f64), Duration::from_secs(3));
        let all = (1..).find(enough).unwrap();
        (all, all - warm_ups(all))
    }

    #[test]
    fn slow_tasks_run_less_often() {
        assert_eq!(runs(0.01), (300, 297));
        assert_eq!(runs(1.0), (6, 3));
        assert_eq!(runs(5.0), (3, 2));
        assert_eq!(runs(25.0), (1, 1));
    }
}
