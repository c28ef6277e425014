//! Loading, saving and resuming take a few pieces of a model in host memory, and never a copy of it.
//!
//! Counted is what Rust allocates. The software driver's own memory, the buffers of the device, is not.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::gpu;
use throughline::decode::Decoder;
use throughline::model::{self, Model};
use throughline::nn::TransformerConfig;
use throughline::optim::{Arena, ArenaLayout};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::{TrainConfig, TrainOptions, Trainer};

/// Counts bytes that are allocated at a time, of all threads.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to `System`. The counters are atomics, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A piece of a tensor as the file has it, the same as f32, and small things.
const LIMIT: usize = (2 * 16 + 3) << 20;

/// Runs something that must stay below the limit.
fn within_the_limit<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    println!("{what}: {:.1} MB", peak as f64 / 1e6);
    assert!(peak < LIMIT, "{what}: {peak} bytes at a time, expected less than {LIMIT}");
    result
}

/// One test, since all threads count.
#[test]
fn no_copy_of_a_model_is_in_host_memory() {
    let config = TransformerConfig::llama(16_384, 8, 1, 512, 8);
    let layout = ArenaLayout::of_model(&config, gpu().profile().max_tensor_bytes()).unwrap();
    assert!(4 * layout.total_len() > 2 * LIMIT, "a copy of the model has to be more than is allowed");
    assert!(2 * layout.tensors.iter().map(|(_, shape)| 4 * shape.len()).max().unwrap() > LIMIT, "two of a tensor, too");
    let dir = tempfile::tempdir().unwrap();
    let [original, saved] = ["original", "saved"].map(|name| dir.path().join(name));
    let path = dir.path().join("checkpoint");
    let shape = |name: &str| &layout.tensors.iter().find(|(n, _)| n == name).unwrap().1;
    model::save_with(&original, &config, |name| Ok(vec![0.01; shape(name).len()])).unwrap();

    let model = Model::open(&original).unwrap();
    let options = TrainOptions { init: false, ..TrainOptions::default() };
    let config = TrainConfig::new(config.clone(), 1);
    let trainer = || Trainer::with_options_blocking(gpu(), config.clone(), &options).unwrap();
    let mut trainer = within_the_limit("a trainer", trainer);
    within_the_limit("loading a model", || model.load_blocking(gpu(), trainer.params()).unwrap());
    within_the_limit("saving a model", || model.save_blocking(&saved, gpu(), trainer.params()).unwrap());
    within_the_limit("saving a checkpoint", || Checkpoint::save_trainer_blocking(&trainer, "", 0, &path).unwrap());
    let checkpoint = within_the_limit("opening a checkpoint", || Checkpoint::load(&path).unwrap());
    within_the_limit("resuming", || checkpoint.restore_blocking(&mut trainer).unwrap());
    within_the_limit("saving weights", || checkpoint.save_weights(&path).unwrap());
    drop(trainer);
    let layout = layout.clone().into();
    let params = Arena::zeros(gpu(), "parameters", &layout).unwrap();
    let weights = Checkpoint::load(&path).unwrap();
    within_the_limit("weights", || weights.restore_weights_blocking(gpu(), &params).unwrap());
    within_the_limit("a decoder", || Decoder::new_blocking(gpu(), &Model::open(&saved).unwrap(), 8).unwrap());
    within_the_limit("checking", || model.weights().iter().for_each(|tensor| tensor.check_finite().unwrap()));
}
