//! Statistics of frame times.

use std::time::Duration;

use serde::Serialize;

/// Percentiles of frame times, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    pub frames: usize,
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// `None` if there are no frames.
    pub fn of(times: &[Duration]) -> Option<Percentiles> {
        let mut ms: Vec<f64> = times.iter().map(|t| t.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let max = *ms.last()?;
        // The smallest measured time that this share of the frames does not exceed.
        let at = |share: f64| ms[((share * ms.len() as f64).ceil() as usize).saturating_sub(1)];
        Some(Percentiles { frames: ms.len(), p50: at(0.5), p99: at(0.99), max })
    }
}

#[test]
fn percentiles_are_times_that_were_measured() {
    let times: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
    assert_eq!(Percentiles::of(&times), Some(Percentiles { frames: 200, p50: 100.0, p99: 198.0, max: 200.0 }));
    let one = Percentiles::of(&times[..1]).map(|p| [p.p50, p.p99, p.max]);
    assert_eq!(one, Some([200.0; 3]));
    assert_eq!(Percentiles::of(&[]), None);
}
