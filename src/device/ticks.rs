//! The GPU's timestamps as times. The only place that reads them.
//!
//! Drivers return timestamps that measure nothing: zeros, a begin that equals the end or comes after it, all bits set
//! where sampling failed (Metal). Whoever asks then falls back on something else.

use std::time::Duration;

/// No command runs longer: drivers end those that take seconds.
pub(super) const LONGEST: Duration = Duration::from_secs(3600);

/// Timestamps as they are read back: two words each, the low one first.
pub(super) fn from_words(words: &[u32]) -> Vec<u64> {
    words.chunks_exact(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32).collect()
}

/// The time between two timestamps, for a clock with ticks of `period` nanoseconds. `None` if they are no measurement.
pub(super) fn between(begin: u64, end: u64, period: f32) -> Option<Duration> {
    let ticks = end.checked_sub(begin).filter(|ticks| begin > 0 && *ticks > 0)?;
    let ns = ticks as f64 * f64::from(period);
    // Not so if the period is NaN.
    let is_time = ns >= 1.0 && ns <= LONGEST.as_nanos() as f64;
    is_time.then(|| Duration::from_nanos(ns as u64))
}

/// Begin and length of each command in nanoseconds, from a pair of timestamps each; `None` where there is no
/// measurement. The first command that is measured begins at 0.
pub(super) fn spans(ticks: &[u64], period: f32) -> Vec<Option<(u64, u64)>> {
    let mut first = None;
    let span = |pair: &[u64]| {
        let time = between(pair[0], pair[1], period)?;
        let first = *first.get_or_insert(pair[0]);
        let start = if pair[0] == first { Duration::ZERO } else { between(first, pair[0], period)? };
        Some((start.as_nanos() as u64, time.as_nanos() as u64))
    };
    ticks.chunks_exact(2).map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_that_measure_nothing_are_no_times() {
        assert_eq!(between(100, 350, 2.0), Some(Duration::from_nanos(500)));
        let nothing = [(0, 0), (0, 500), (500, 0), (500, 500), (501, 500), (u64::MAX, u64::MAX), (5, u64::MAX)];
        for (begin, end) in nothing {
            assert_eq!(between(begin, end, 1.0), None, "{begin} to {end}");
        }
        for period in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-9] {
            assert_eq!(between(100, 350, period), None, "period {period}");
        }
        assert_eq!(between(1, 1 + 3_600_000_000_000, 1.0), Some(LONGEST));
        assert_eq!(between(1, 2 + 3_600_000_000_000, 1.0), None);
    }

    #[test]
    fn spans_begin_with_the_first_that_is_measured() {
        let ticks = [0, 0, 10, 30, 30, 30, 30, 35, 5, 9, 40, u64::MAX];
        assert_eq!(spans(&ticks, 2.0), [None, Some((0, 40)), None, Some((40, 10)), None, None]);
        assert_eq!(from_words(&[1, 0, 2, 1]), [1, 2 + (1 << 32)]);
    }
}
