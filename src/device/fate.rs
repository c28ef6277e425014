//! What becomes of an encoder after something was recorded into it. Steps, passes and measurements count only if it is
//! submitted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Whether the commands of an encoder have run, or never will.
#[derive(Clone, Debug)]
pub(crate) struct Fate(Arc<AtomicU8>);

const OPEN: u8 = 0;
const DONE: u8 = 1;
const DROPPED: u8 = 2;

impl Fate {
    /// The fate of this encoder, wherever it goes.
    pub fn of(encoder: &wgpu::CommandEncoder) -> Fate {
        let fate = Arc::new(AtomicU8::new(OPEN));
        let witness = Witness(fate.clone());
        encoder.on_submitted_work_done(move || witness.0.store(DONE, Ordering::Release));
        Fate(fate)
    }

    /// Whether the encoder was dropped instead of submitted.
    pub fn is_dropped(&self) -> bool {
        self.0.load(Ordering::Acquire) == DROPPED
    }

    /// Whether its commands have run, as far as polls have found out.
    pub fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire) == DONE
    }
}

/// Goes wherever the encoder goes.
struct Witness(Arc<AtomicU8>);

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.compare_exchange(OPEN, DROPPED, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// A count of what was recorded, less what was in encoders that were dropped.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    recorded: u64,
    open: Vec<Fate>,
}

impl Tally {
    /// The count as far as is known now.
    pub fn count(&self) -> u64 {
        self.recorded - self.open.iter().filter(|fate| fate.is_dropped()).count() as u64
    }

    /// Starts over with this count, whatever becomes of what was recorded.
    pub fn set(&mut self, count: u64) {
        *self = Tally { recorded: count, open: vec![] };
    }

    /// Counts what was recorded into this encoder.
    pub fn record(&mut self, encoder: &wgpu::CommandEncoder) {
        let recorded = &mut self.recorded;
        self.open.retain(|fate| {
            let dropped = fate.is_dropped();
            *recorded -= u64::from(dropped);
            !dropped && !fate.is_done()
        });
        self.recorded = self.recorded.saturating_add(1);
        self.open.push(Fate::of(encoder));
    }
}
